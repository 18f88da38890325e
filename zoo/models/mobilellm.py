"""MobileLLM: a deep and thin Llama, each of whose blocks may run twice in a row."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zoo.components.masks import Cache
from zoo.models import llama


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    repeat: bool = False  # run each block a second time
    heads_known: ClassVar = ("lm", "none")


class Model(llama.Model):
    heads: ClassVar = Config.heads_known

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """(b, s, v) of logits, or what the config's head gives, from (b, s) of token ids."""
        masks = self.masks(input_ids, attention_mask, cache)
        x = self.embed(input_ids)
        for layer, block in enumerate(self.blocks):
            for _ in range(2 if self.config.repeat else 1):
                x = block(x, masks[layer])
        return self.read_out(self.norm(x), input_ids, attention_mask)
