"""BERT: every token attends to every token; a norm follows each sum of stream and branch."""

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor, nn

from zoo.components import activations, config, encoder, inputs, masks
from zoo.components.attention import Attention
from zoo.components.masks import Mask
from zoo.components.mlp import MLP
from zoo.components.model import Embedding


class Config(encoder.EncoderConfig):
    head: str = "masked_lm"
    vocab: config.Size = 30522
    layers: config.Layers = 12
    positions: config.Size = 512
    positions_after_pad: bool = False  # position ids start at pad + 1 (RoBERTa)
    types: config.Count = 2  # of tokens; 0: none
    heads_known: ClassVar = encoder.HEADS

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.positions_after_pad and self.pad is None:
            yield "pad: null, and positions_after_pad needs a padding id"
        elif self.limit < 1:
            yield f"positions: {self.positions} leave none after the padding id {self.pad}"

    @property
    def position_pad(self) -> int | None:
        """The padding id after which position ids start, None where they start at 0."""
        return self.pad if self.positions_after_pad else None

    @property
    def limit(self) -> int:
        return self.positions - (0 if self.position_pad is None else self.position_pad + 1)


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
        """(b, s, d) from (b, s, d)."""
        x = self.norm1(x + self.dropout(self.attn(x, mask)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class Model(encoder.Encoder):
    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.embed = Embedding(c.vocab, c.dim, padding_idx=c.pad)
        self.positions = Embedding(c.positions, c.dim, padding_idx=c.position_pad)
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
        """What the config's head gives, from (b, s) of token ids."""
        inputs.check(input_ids, self.config)
        mask = masks.full(input_ids, attention_mask, self.config.position_pad)
        x = self.embed(input_ids) + self.positions(mask.positions)
        if self.types is not None:
            x = x + self.types(inputs.token_types(token_type_ids, self.config.types, input_ids))
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, mask)
        return self.read_out(x, attention_mask)
