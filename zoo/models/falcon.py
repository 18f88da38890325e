"""Falcon: attention and MLP run in parallel on one norm, on a norm each, or in sequence."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from zoo.components import activations, decoder
from zoo.components.alibi import Alibi
from zoo.components.attention import Attention, Biased
from zoo.components.masks import Cache, Mask
from zoo.components.mlp import MLP
from zoo.components.model import Embedding
from zoo.models._falcon_config import Config


def attention(c: Config) -> Callable[[], Attention]:
    """Constructor of each layer's attention; all layers share one rotary or one ALiBi term."""
    make = partial(Attention, c.dim, c.heads, c.kv_heads, c.rotary_dim, bias=c.bias)
    if c.alibi:
        # the term is rounded to bf16 in every dtype, and scaled as the scores are
        term = Alibi(c.heads, c.rotary_dim**-0.5, torch.bfloat16)
        return partial(make, dropout=c.attn_dropout, attend=Biased(term))
    return partial(make, rotary=c.rotary())


class Parallel(nn.Module):
    """Attention and MLP read one norm of the stream."""

    def __init__(self, c: Config, attn: Attention) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, c.eps)
        self.attn = attn
        self.mlp = MLP(c.dim, c.hidden, activations.ACTIVATIONS[c.act], bias=c.bias)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        y = self.norm1(x)
        return x + self.dropout(self.attn(y, mask) + self.mlp(y))


class ParallelTwoNorms(nn.Module):
    """Attention and MLP read a norm of the stream each."""

    def __init__(self, c: Config, attn: Attention) -> None:
        super().__init__()
        self.norm_attn = nn.LayerNorm(c.dim, c.eps)
        self.norm_mlp = nn.LayerNorm(c.dim, c.eps)
        self.attn = attn
        self.mlp = MLP(c.dim, c.hidden, activations.ACTIVATIONS[c.act], bias=c.bias)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        return x + self.dropout(self.attn(self.norm_attn(x), mask) + self.mlp(self.norm_mlp(x)))


class Sequential(nn.Module):
    """The MLP reads the stream that attention was added to."""

    def __init__(self, c: Config, attn: Attention) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, c.eps)
        self.norm2 = nn.LayerNorm(c.dim, c.eps)
        self.attn = attn
        self.mlp = MLP(c.dim, c.hidden, activations.ACTIVATIONS[c.act], bias=c.bias)
        self.attn_dropout, self.dropout = nn.Dropout(c.attn_dropout), nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        x = x + self.attn_dropout(self.attn(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Model(decoder.Decoder):
    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.embed = Embedding(c.vocab, c.dim)
        parallel = ParallelTwoNorms if c.grouped and c.norms != 1 else Parallel
        block, attn = parallel if c.parallel else Sequential, attention(c)
        self.blocks = nn.ModuleList(block(c, attn()) for _ in range(c.layers))
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
