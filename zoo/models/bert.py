"""BERT: every token sees every token, and norms stand after each branch, on the sum."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.components import activations, config, encoder, inputs, masks
from zoo.components.attention import Attention
from zoo.components.masks import Mask
from zoo.components.mlp import MLP
from zoo.components.model import Embedding


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    head: str = "masked_lm"
    vocab: int = 30522
    dim: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    act: str = "gelu"
    positions: int = 512
    types: int = 2
    eps: float = 1e-12
    dropout: float = 0.1
    attn_dropout: float = 0.1
    head_dropout: float | None = None  # dropout
    tied: bool = True
    pad: int | None = 0
    heads_known: ClassVar = encoder.HEADS

    def problems(self) -> Iterator[str]:
        yield from config.divides("heads", self.heads, "dim", self.dim)
        if self.head == "question_answering" and len(self.labels) != 2:
            yield f"labels: {len(self.labels)}, and a span has 2, its start and its end"


class Block(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        width = c.dim // c.heads
        self.attn = Attention(c.dim, c.heads, c.heads, width, bias=True, dropout=c.attn_dropout)
        self.norm1 = nn.LayerNorm(c.dim, c.eps)
        self.mlp = MLP(c.dim, c.hidden, activations.ACTIVATIONS[c.act], bias=True)
        self.norm2 = nn.LayerNorm(c.dim, c.eps)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        x = self.norm1(x + self.dropout(self.attn(x, mask)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class Model(encoder.Encoder):
    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.embed = Embedding(c.vocab, c.dim, padding_idx=c.pad)
        self.positions = Embedding(c.positions, c.dim)
        self.types = Embedding(c.types, c.dim)
        self.norm = nn.LayerNorm(c.dim, c.eps)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.add_head()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> encoder.Output:
        inputs.check(input_ids, self.config)
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        inputs.check_ids(types, self.config.types, "token type")
        mask = masks.full(input_ids, attention_mask)
        x = self.embed(input_ids) + self.types(types) + self.positions(mask.positions)
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, mask)
        return self.read_out(x, attention_mask)
