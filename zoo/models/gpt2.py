"""GPT-2: learned positions, norms before each branch, biases everywhere, a head tied to embed."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.components import activations, config, decoder
from zoo.components.attention import Attention, Explicit, attend
from zoo.components.masks import Cache, Mask
from zoo.components.mlp import MLP
from zoo.components.model import Embedding


class Config(config.Config):
    vocab: config.Size = 50257
    dim: config.Size = 768
    layers: config.Layers = 12
    heads: config.Size = 12
    hidden: config.Size = config.DERIVED  # four times dim
    act: config.ActivationName = "gelu_new"
    positions: config.Size = 1024
    eps: config.Positive = 1e-5
    scale_attn: bool = True  # by the root of the head width
    scale_attn_by_layer: bool = False  # and by the layer's number
    upcast_attn: bool = False
    dropout: config.Fraction = 0.1
    embed_dropout: config.Fraction = 0.1
    attn_dropout: config.Fraction = 0.1
    tied: bool = True
    bias: bool = True  # of norms and projections
    qkv_bias: bool = config.DERIVED  # bias
    heads_known: ClassVar = decoder.HEADS

    def derived(self) -> Mapping[str, Any]:
        """The usual width of the MLP; q, k and v have biases where all projections do."""
        return {"hidden": 4 * self.dim, "qkv_bias": self.bias}

    def problems(self) -> Iterator[str]:
        """A width that heads do not divide."""
        yield from super().problems()
        yield from config.divides("heads", self.heads, "dim", self.dim)


class Block(nn.Module):
    def __init__(self, c: Config, layer: int) -> None:
        super().__init__()
        width = c.dim // c.heads
        scale = (width**-0.5 if c.scale_attn else 1.0) / (layer + 1 if c.scale_attn_by_layer else 1)
        self.norm1 = nn.LayerNorm(c.dim, c.eps, bias=c.bias)
        self.attn = Attention(
            c.dim,
            c.heads,
            c.heads,
            width,
            bias=c.qkv_bias,
            out_bias=c.bias,
            dropout=c.attn_dropout,
            scale=scale,
            attend=Explicit(upcast=True) if c.upcast_attn else attend,
        )
        self.norm2 = nn.LayerNorm(c.dim, c.eps, bias=c.bias)
        self.mlp = MLP(c.dim, c.hidden, activations.ACTIVATIONS[c.act], bias=c.bias)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Model(decoder.Decoder):
    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.embed = Embedding(c.vocab, c.dim)
        self.positions = Embedding(c.positions, c.dim)
        self.dropout = nn.Dropout(c.embed_dropout)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.layers))
        self.norm = nn.LayerNorm(c.dim, c.eps, bias=c.bias)
        self.add_head()

    @torch.no_grad()
    def initialize(self) -> None:
        """As every model, with smaller weights where a branch ends: two add up in each layer."""
        super().initialize()
        std = self.config.init_std * (2 * self.config.layers) ** -0.5
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(("attn.out.weight", "mlp.down.weight")):
                parameter.normal_(0, std)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """(b, s, v) of logits, or what the config's head gives, from (b, s) of token ids."""
        mask = self.mask(input_ids, attention_mask, cache)
        x = self.dropout(self.embed(input_ids) + self.positions(mask.positions))
        for block in self.blocks:
            x = block(x, mask)
        return self.read_out(self.norm(x), input_ids, attention_mask)
