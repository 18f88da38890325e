"""GPT-NeoX: attention and MLP read one stream in parallel; part of each head is rotated."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from zoo.components import activations, config, decoder
from zoo.components.attention import Attention
from zoo.components.masks import Cache, Mask
from zoo.components.mlp import MLP
from zoo.components.model import Embedding
from zoo.components.rotary import Rotary, Rotated


class Config(Rotated):
    vocab: config.Size = 50432
    dim: config.Size = 6144
    layers: config.Layers = 44
    heads: config.Size = 64
    hidden: config.Size = config.DERIVED  # four times dim
    act: config.ActivationName = "gelu"
    eps: config.Positive = 1e-5
    parallel: bool = True
    rope_share: config.Amount = 0.25  # of a head's width
    attn_bias: bool = True
    dropout: config.Fraction = 0.0
    attn_dropout: config.Fraction = 0.0
    tied: bool = False
    heads_known: ClassVar = decoder.HEADS

    @property
    def rotary_dim(self) -> int:
        """The rotated part of each head."""
        return int(self.dim // self.heads * self.rope_share)

    def derived(self) -> Mapping[str, Any]:
        """The usual width of the MLP."""
        return {"hidden": 4 * self.dim}

    def problems(self) -> Iterator[str]:
        """A width that heads do not divide, or more rotated than a head has."""
        yield from config.divides("heads", self.heads, "dim", self.dim)
        if self.rope_share > 1:
            yield f"rope_share: {self.rope_share} is more than a head"
        else:
            yield from super().problems()


class Sequential(nn.Module):
    """The MLP reads the stream that attention was added to."""

    def __init__(self, c: Config, rotary: Rotary) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, c.eps)
        shape = (c.dim, c.heads, c.heads, c.dim // c.heads)
        self.attn = Attention(
            *shape,
            bias=c.attn_bias,
            dropout=c.attn_dropout,
            rotary=rotary,
        )
        self.norm2 = nn.LayerNorm(c.dim, c.eps)
        self.mlp = MLP(c.dim, c.hidden, activations.ACTIVATIONS[c.act], bias=True)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Parallel(Sequential):
    """Attention and MLP read one stream."""

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        y = x + self.dropout(self.attn(self.norm1(x), mask))
        return y + self.dropout(self.mlp(self.norm2(x)))


class Model(decoder.Decoder):
    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.embed = Embedding(c.vocab, c.dim)
        rotary, block = c.rotary(), Parallel if c.parallel else Sequential
        self.blocks = nn.ModuleList(block(c, rotary) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.dim, c.eps)
        self.add_head()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """(b, s, v) of logits, or what the config's head gives, from (b, s) of token ids."""
        mask = self.mask(input_ids, attention_mask, cache)
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.read_out(self.norm(x), input_ids, attention_mask)
