"""Llama: RMS norms before each branch, rotary embedding, grouped queries, gated MLPs or experts."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from zoo.components import activations, config, decoder
from zoo.components.attention import Attend, Attention, attend
from zoo.components.masks import Cache, Mask
from zoo.components.mlp import GatedMLP
from zoo.components.model import Embedding
from zoo.components.moe import Experts
from zoo.components.norm import RMSNorm
from zoo.components.rotary import Rotated, Rotation


class Config(Rotated, config.Windowed):
    vocab: config.Size = 32000
    dim: config.Size = 4096
    layers: config.Layers = 32
    heads: config.Size = 32
    kv_heads: config.Size = config.DERIVED  # as many as heads
    head_dim: config.Size = config.DERIVED  # dim / heads
    hidden: config.Size = 11008
    experts: config.Experts = 0  # none: one MLP for every token
    experts_per_token: config.Size = 2  # experts a token goes through
    act: config.ActivationName = "silu"
    eps: config.Positive = 1e-6
    attn_bias: bool = False
    attn_out_bias: bool = config.DERIVED  # attn_bias
    mlp_bias: bool = False
    attn_dropout: config.Fraction | None = 0.0
    tied: bool = False
    heads_known: ClassVar[tuple[str, ...]] = decoder.HEADS

    def derived(self) -> Mapping[str, Any]:
        """As many key heads as heads; heads divide the width; one setting for all biases."""
        width = self.dim // self.heads
        return {"kv_heads": self.heads, "head_dim": width, "attn_out_bias": self.attn_bias}

    def problems(self) -> Iterator[str]:
        """Numbers of heads or of experts that do not fit together."""
        yield from super().problems()
        yield from config.divides("kv_heads", self.kv_heads, "heads", self.heads)
        if self.head_dim * self.heads != self.dim and self.dim % self.heads:
            yield from config.divides("heads", self.heads, "dim", self.dim)
        if self.experts and self.experts_per_token > self.experts:
            yield f"experts_per_token: {self.experts_per_token} of {self.experts} experts"


def mlp(c: Config) -> nn.Module:
    """One gated MLP for every token, or a mixture of experts."""
    act = activations.ACTIVATIONS[c.act]
    if not c.experts:
        return GatedMLP(c.dim, c.hidden, act, bias=c.mlp_bias)
    k = c.experts_per_token
    return Experts(c.dim, c.hidden, act, experts=c.experts, experts_per_token=k)


class Block(nn.Module):
    def __init__(self, c: Config, rotary: Rotation, attend: Attend) -> None:
        super().__init__()
        self.norm1 = RMSNorm(c.dim, c.eps)
        shape = (c.dim, c.heads, c.kv_heads, c.head_dim)
        self.attn = Attention(
            *shape,
            bias=c.attn_bias,
            out_bias=c.attn_out_bias,
            dropout=c.attn_dropout or 0.0,
            rotary=rotary,
            attend=attend,
        )
        self.norm2 = RMSNorm(c.dim, c.eps)
        self.mlp = mlp(c)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Model(decoder.Decoder):
    def __init__(self, c: Config, rotary: Rotation | None = None, attend: Attend = attend) -> None:
        super().__init__(c)
        self.embed = Embedding(c.vocab, c.dim, padding_idx=c.pad)
        rotary = rotary or c.rotary()
        self.blocks = nn.ModuleList(Block(c, rotary, attend) for _ in range(c.layers))
        self.norm = RMSNorm(c.dim, c.eps)
        self.add_head()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """(b, s, v) of logits, or what the config's head gives, from (b, s) of token ids."""
        masks = self.masks(input_ids, attention_mask, cache)
        x = self.embed(input_ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, masks[layer])
        return self.read_out(self.norm(x), input_ids, attention_mask)
