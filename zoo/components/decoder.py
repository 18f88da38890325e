"""Decoders: causal masks, and the heads that read their last hidden states."""

from typing import ClassVar

from torch import Tensor

from zoo.components import inputs, masks
from zoo.components.heads import last_token
from zoo.components.masks import Cache, Mask
from zoo.components.model import Embedding, Linear, Model
from zoo.errors import InputError

HEADS: tuple[str, ...] = ("lm", "none", "sequence_classification")


class Decoder(Model):
    """Expects `embed` and a config with vocab, dim, tied, pad and labels."""

    heads: ClassVar[tuple[str, ...]] = HEADS
    embed: Embedding

    def add_head(self) -> None:
        """Add the head that the config names, and initialize: the constructor's last line."""
        c = self.config
        if c.head == "lm":
            self.head = Linear(c.dim, c.vocab, bias=False)
            if c.tied:
                self.head.weight = self.embed.weight
        elif c.head == "sequence_classification":
            self.score = Linear(c.dim, len(c.labels), bias=False)
        self.finish()

    def mask(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Mask:
        """Check the inputs of a model whose layers share one causal mask, and make it."""
        return self.masks(input_ids, attention_mask, cache)[0]

    def masks(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None
    ) -> list[Mask]:
        """Check the model's inputs, and make each layer's causal mask, windowed or not."""
        c = self.config
        if cache is not None and c.head == "sequence_classification":
            raise InputError("a row is classified as a whole, and a cache gives it in parts")
        inputs.check(input_ids, c, cache)
        by_window = masks.windowed(input_ids, attention_mask, c.windows(), cache)
        return [by_window[window] for window in c.windows()]

    def read_out(self, x: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Apply the head to (b, s, d): (b, s, v), (b, labels), or the hidden states as they are."""
        match self.config.head:
            case "lm":
                return self.head(x)
            case "sequence_classification":
                return self.score(last_token(x, input_ids, attention_mask, self.config.pad))
        return x
