"""T5's config: its stacks, its MLPs and its biases by distance."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from zoo.components import config, encoder_decoder
from zoo.components.activations import ACTIVATIONS
from zoo.components.attention import Attend, Attention, attend
from zoo.components.mlp import MLP, GatedMLP


class Config(config.Config):
    vocab: config.Size = 32128
    dim: config.Size = 512
    layers: config.Layers = 6
    decoder_layers: config.Layers = config.DERIVED  # layers
    heads: config.Size = 8
    head_dim: config.Size = 64
    hidden: config.Size = 2048
    mlp: str = "relu"  # gated- before it: of two projections
    act: config.ActivationName = config.DERIVED  # what mlp says
    gated: bool = config.DERIVED
    buckets: config.Size = 32
    max_distance: config.Size = 128
    eps: config.Positive = 1e-6
    dropout: config.Fraction = 0.1
    tied: bool = True  # and the states scaled before it, which an untied head's are not
    may_share: bool = True  # the embedding is the head where files hold no other
    init_std: config.Amount = 1.0
    pad: config.TokenId | None = 0
    start: config.TokenId | None = config.DERIVED  # what answers begin with: pad
    heads_known: ClassVar = encoder_decoder.HEADS

    def derived(self) -> Mapping[str, Any]:
        """The activation, and whether the MLP is gated, from `mlp`; answers start with padding."""
        gated, act = self.mlp.startswith("gated-"), self.mlp.removeprefix("gated-")
        act = "gelu_new" if self.mlp == "gated-gelu" else act
        return {
            "decoder_layers": self.layers,
            "act": act,
            "gated": gated,
            "start": self.pad,
        }

    def problems(self) -> Iterator[str]:
        """A start token outside the vocabulary, or a shared head where sharing is off."""
        yield from super().problems()
        yield from self.vocabulary_problems("start")
        if self.head == "shared_lm" and not self.may_share:
            yield "may_share: false, so the head is a matrix of its own"

    def attention(self, attend: Attend = attend) -> Attention:
        """Attention without biases, whose scores are not scaled."""
        shape = (self.dim, self.heads, self.heads, self.head_dim)
        return Attention(*shape, bias=False, dropout=self.dropout, scale=1.0, attend=attend)

    def feed_forward(self) -> nn.Module:
        """The MLP, gated or plain."""
        kind = GatedMLP if self.gated else MLP
        act = ACTIVATIONS[self.act]
        return kind(self.dim, self.hidden, act, bias=False, dropout=self.dropout)
