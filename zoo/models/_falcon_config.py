"""Falcon's config: how keys are shared, how positions are told, and how branches are wired."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from zoo.components import config, decoder
from zoo.components.rotary import Rotated


class Config(Rotated):
    vocab: config.Size = 65024
    dim: config.Size = 4544
    layers: config.Layers = 32
    heads: config.Size = 71
    kv_heads: config.Size = config.DERIVED  # groups if grouped, one if multi-query, else heads
    groups: config.Size = config.DERIVED  # heads
    grouped: bool = False  # the new decoder architecture
    multi_query: bool = True
    parallel: bool = True
    norms: config.Size | None = None  # before parallel branches; None: one, or two where grouped
    alibi: bool = False
    hidden: config.Size = config.DERIVED  # four times dim
    act: config.ActivationName = "gelu"
    eps: config.Positive = 1e-5
    bias: bool = False
    dropout: config.Fraction = 0.0
    attn_dropout: config.Fraction = 0.0
    tied: bool = True
    heads_known: ClassVar = decoder.HEADS

    @property
    def rotary_dim(self) -> int:
        """The whole head is rotated."""
        return self.dim // self.heads

    def derived(self) -> Mapping[str, Any]:
        """The number of key heads, which follows from how they are shared, and the MLP's width."""
        groups = self.groups or self.heads
        shared = groups if self.grouped else 1 if self.multi_query else self.heads
        return {"groups": groups, "kv_heads": shared, "hidden": 4 * self.dim}

    def problems(self) -> Iterator[str]:
        """Numbers of heads that do not divide, or of norms that no wiring has."""
        yield from super().problems()
        yield from config.divides("heads", self.heads, "dim", self.dim)
        yield from config.divides("kv_heads", self.kv_heads, "heads", self.heads)
        if self.grouped > self.parallel or self.norms not in (None, 1, 1 + self.grouped):
            yield f"grouped, parallel, norms: no Falcon has {self.norms} norms before such branches"
