"""BLOOM: ALiBi instead of position embeddings, and a norm on the token embeddings."""

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor, nn

from zoo.components import config, decoder
from zoo.components.alibi import Alibi
from zoo.components.attention import Attention, Biased
from zoo.components.masks import Cache, Mask
from zoo.components.mlp import MLP
from zoo.components.model import Embedding


class Config(config.Config):
    vocab: config.Size = 250880
    dim: config.Size = 64
    layers: config.Layers = 2
    heads: config.Size = 8
    eps: config.Positive = 1e-5
    residual_normed: bool = False  # the residual stream is taken after the norms
    dropout: config.Fraction = 0.0
    attn_dropout: config.Fraction = 0.0
    tied: bool = True
    heads_known: ClassVar = decoder.HEADS

    def problems(self) -> Iterator[str]:
        """A width that heads do not divide."""
        yield from super().problems()
        yield from config.divides("heads", self.heads, "dim", self.dim)


def gelu(x: Tensor) -> Tensor:
    """GELU approximated by tanh, its constant cut off where the original cuts it off."""
    return x * 0.5 * (1 + (0.79788456 * x * (1 + 0.044715 * x * x)).tanh())


class Block(nn.Module):
    def __init__(self, c: Config, attend: Biased) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, c.eps)
        shape = (c.dim, c.heads, c.heads, c.dim // c.heads)
        self.attn = Attention(*shape, bias=True, dropout=c.attn_dropout, attend=attend)
        self.norm2 = nn.LayerNorm(c.dim, c.eps)
        self.mlp = MLP(c.dim, 4 * c.dim, gelu, bias=True)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class NormedResidual(Block):
    """The residual stream is taken after each norm."""

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        x = self.norm1(x)
        x = self.norm2(x + self.dropout(self.attn(x, mask)))
        return x + self.dropout(self.mlp(x))


class Model(decoder.Decoder):
    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.embed = Embedding(c.vocab, c.dim)
        self.embed_norm = nn.LayerNorm(c.dim, c.eps)
        attend, block = Biased(Alibi(c.heads)), NormedResidual if c.residual_normed else Block
        self.blocks = nn.ModuleList(block(c, attend) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.dim, c.eps)
        self.add_head()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """(b, s, v) of logits, or what the config's head gives, from (b, s) of token ids."""
        mask = self.mask(input_ids, attention_mask, cache)
        x = self.embed_norm(self.embed(input_ids))
        for block in self.blocks:
            x = block(x, mask)
        return self.read_out(self.norm(x), input_ids, attention_mask)
