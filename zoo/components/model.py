"""The base of every model: config, heads, initialization, and the factory users expect."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo import verbs
from zoo.components.config import Config

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from contextlib import AbstractContextManager
    from os import PathLike
    from pathlib import Path


@verbs.hang
class Model(nn.Module):
    """A plain module. On the meta device it has shapes only; elsewhere it is initialized.

    What a model can do besides `forward` is hung on it by `zoo.verbs`, from the table in
    `zoo/__init__.py`: `help(Model.generate)` shows the function itself.
    """

    heads: ClassVar[tuple[str, ...]] = ()
    headless: ClassVar[tuple[str, ...]] = ("none",)  # those of them that give hidden states

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config: Any = config
        self.architecture = ""  # the registry's name, once loaded through it
        self.provenance: Any = None  # zoo.checkpoints.provenance.Provenance, of a loaded model
        self.adapter: Any = None  # zoo.lora.Adapter: low-rank factors beside the weights
        self.prepared: Any = None  # zoo.prepared.prepare.Preparation, once it was prepared

    @property
    def is_prepared(self) -> bool:
        """Whether its weights are packed for inference: `zoo.prepare` gives it such a class."""
        return False

    @torch.no_grad()
    def initialize(self) -> None:
        """Normal weights, zero biases, unit norms; a padding token's embedding is zero."""
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0, std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if draw := getattr(module, "draw", None):  # other modules with weights have this
                draw(std)
        for module in self.modules():  # last: a tied head has drawn the same weight again
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()

    def finish(self) -> None:
        """Initialize, unless on the meta device; call this at the end of a model's constructor."""
        if not any(p.is_meta for p in self.parameters()):
            self.initialize()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """In training, compute each layer's activations again instead of keeping them."""
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        for name, module in self.named_modules():
            if name.rpartition(".")[0].endswith("blocks"):
                module.forward = partial(_recomputed, module.forward, options)

    if TYPE_CHECKING:  # the verbs, for type checkers; tests/test_verbs.py compares them

        @classmethod
        def from_pretrained(cls, ref: str | PathLike[str], **options: Any) -> Self: ...
        def save_pretrained(self, dst: str | PathLike[str], **options: Any) -> Path: ...
        def load_adapter(self, directory: str | PathLike[str]) -> Self: ...
        def add_adapter(self, targets: Collection[str], **options: Any) -> Self: ...
        def merge_adapter(self) -> Self: ...
        def remove_adapter(self) -> Self: ...
        def save_adapter(self, directory: str | PathLike[str], **options: Any) -> Path: ...
        def generate(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
        ) -> Any: ...
        def run_with_cache(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            names: str | Iterable[str] = "*",
            **options: Any,
        ) -> tuple[Any, Any]: ...
        def patch(self, changes: Mapping[str, Any]) -> AbstractContextManager[None]: ...
        def logit_lens(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
        ) -> Any: ...
        @property
        def tokenizer(self) -> Any: ...


def _recomputed(forward: Any, options: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, **options, **kwargs)


class Linear(nn.Linear):
    """Left as allocated: the model initializes, and a loaded one never needs it."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class Embedding(nn.Embedding):
    """Left as allocated, likewise."""

    def reset_parameters(self) -> None:
        """Do nothing."""


__all__ = ["Config", "Embedding", "Linear", "Model"]
