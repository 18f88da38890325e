"""Encoder-decoders: the encoder reads a question once, and the cache keeps what it made of it."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.components import inputs, masks
from zoo.components.cache import Cache
from zoo.components.masks import Mask
from zoo.components.model import Embedding, Linear, Model
from zoo.components.relative_bias import RelativeBias
from zoo.errors import InputError

HEADS: tuple[str, ...] = ("lm", "shared_lm", "encoder", "none")


class Memory:
    """(b, t, d) of encoder states, the mask for whoever reads them, and the (b, t) ids."""

    def __init__(self, states: Tensor, mask: Mask, ids: Tensor) -> None:
        self.states, self.mask, self.ids = states, mask, ids

    def check(self, ids: Tensor) -> None:
        """Refuse the ids of another question, where comparing them costs nothing: on CPUs."""
        if torch.compiler.is_compiling() or ids.device.type != "cpu":
            return
        if not torch.equal(self.ids, ids):
            raise InputError("the cache holds an answer to another question: take a new one")

    def take(self, rows: Tensor) -> "Memory":
        """Select rows by number, as a beam search does."""
        ids, states = (x.index_select(0, rows) for x in (self.ids, self.states))
        return Memory(states, self.mask.take(rows), ids)


class Stack(nn.Module):
    """Blocks that share one bias by distance, and the norm after the last of them."""

    def __init__(
        self, distances: RelativeBias, blocks: Iterable[nn.Module], norm: nn.Module, dropout: float
    ) -> None:
        super().__init__()
        self.distances = distances
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.dropout = norm, nn.Dropout(dropout)

    def forward(self, x: Tensor, *context: Mask | Tensor) -> Tensor:
        """(b, s, d) from (b, s, d); `context` is what each block takes besides.

        That is a mask, and for a decoder also the encoder's states and the mask for them.
        """
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, *context)
        return self.dropout(self.norm(x))


class EncoderDecoder(Model):
    """Expects `embed`, an `encoder` of (b, t, d) and a mask, and a config with dim, vocab, tied."""

    heads: ClassVar[tuple[str, ...]] = HEADS
    headless: ClassVar[tuple[str, ...]] = ("encoder", "none")
    embed: Embedding
    encoder: nn.Module

    def add_head(self) -> None:
        """Add the head that the config names, and initialize: the constructor's last line."""
        c = self.config
        if c.head in ("lm", "shared_lm"):
            self.head = Linear(c.dim, c.vocab, bias=False)
            if c.tied or c.head == "shared_lm":
                self.head.weight = self.embed.weight
        self.finish()

    def encode(self, ids: Tensor, attention_mask: Tensor | None) -> Memory:
        """Check the question, and run the encoder over it."""
        inputs.check(ids, self.config)
        mask = masks.full(ids, attention_mask)
        return Memory(self.encoder(self.embed(ids), mask), mask, ids)

    def read(self, ids: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Memory:
        """The question's memory: the cache's, or a new one that the cache keeps."""
        if cache is None:
            return self.encode(ids, attention_mask)
        if not isinstance(cache.memory, Memory):
            cache.memory = self.encode(ids, attention_mask)
        cache.memory.check(ids)
        return cache.memory

    def mask(self, ids: Tensor | None, attention_mask: Tensor | None, cache: Cache | None) -> Mask:
        """Check the answer so far, and make its causal mask."""
        if ids is None:
            raise InputError(
                "decoder_input_ids: missing; the answer so far, one padding id at first"
            )
        inputs.check(ids, self.config, cache)
        return masks.causal(ids, attention_mask, cache=cache)
