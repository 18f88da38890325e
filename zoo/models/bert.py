"""BERT: every token sees every token, and norms stand after each branch, on the sum."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

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
    offset: bool = False  # places are counted from behind the padding id's
    types: int = 2  # of tokens; 0: none
    eps: float = 1e-12
    dropout: float = 0.1
    attn_dropout: float = 0.1
    head_dropout: float | None = None  # dropout
    head_act: str = config.DERIVED  # act
    summary_act: str | None = None  # of a classifier's own layer; None: it reads the pooler
    summary_dropped: bool = False  # before that layer too
    lone_bias: bool = True  # the masked LM's bias has a second name
    tied: bool = True
    pad: int | None = 0
    heads_known: ClassVar = encoder.HEADS

    @property
    def behind(self) -> int | None:
        return self.pad if self.offset else None

    @property
    def limit(self) -> int:
        return self.positions - (0 if self.behind is None else self.behind + 1)

    def derived(self) -> Mapping[str, Any]:
        return {"head_act": self.act}

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
        self.positions = Embedding(c.positions, c.dim, padding_idx=c.behind)
        self.types = Embedding(c.types, c.dim) if c.types else None
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
        mask = masks.full(input_ids, attention_mask, self.config.behind)
        x = self.embed(input_ids) + self.positions(mask.positions)
        if self.types is not None:
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            inputs.check_ids(types, self.config.types, "token type")
            x = x + self.types(types)
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, mask)
        return self.read_out(x, attention_mask)
