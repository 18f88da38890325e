"""Qwen2: Llama with biases on q, k and v; models for a million tokens attend in dual chunks."""

from dataclasses import dataclass

from zoo.components.dual_chunk import DualChunk, DualChunkAttention
from zoo.components.rotary import NO_ROTARY
from zoo.models import llama


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    dual_chunk: DualChunk | None = None  # None: ordinary attention


class Model(llama.Model):
    def __init__(self, c: Config) -> None:
        if c.dual_chunk is None:
            super().__init__(c)
        else:  # dual chunk attention rotates queries and keys itself
            super().__init__(c, NO_ROTARY, DualChunkAttention(c.dual_chunk, c.rotary()))
