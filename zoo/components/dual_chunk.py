"""Dual chunk attention: no distance grows beyond those of training, however long the sequence.

Positions count within a chunk. A query sees the keys of its own chunk at their true distances,
those of the chunk before at distances up to the chunk size, and all earlier ones at the largest
distance.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from zoo.components.config import Parsed
from zoo.components.masks import Mask
from zoo.components.rotary import Rotary, rotate
from zoo.errors import ConfigError

ROWS = 1024  # queries whose scores are in memory at a time
SCHEMA = {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}}


@dataclass(frozen=True)
class DualChunk(Parsed):
    """Sizes, and the length beyond which scores grow with the logarithm of the position."""

    json_schema = SCHEMA

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int = 0

    @classmethod
    def from_json(cls, value: Any) -> DualChunk:
        """From an object of the sizes; local_size must be below chunk_size."""
        fields = cls.__dataclass_fields__
        if not isinstance(value, dict) or value.keys() - fields or len(value) < 2:
            raise ConfigError(f"expected {', '.join(fields)}, found {value!r}")
        if any(type(size) is not int or size < 0 for size in value.values()):
            raise ConfigError(f"expected whole numbers, found {value!r}")
        made = cls(**value)
        if made.length < 1:
            raise ConfigError(f"local_size {made.local_size} is not below {made.chunk_size}")
        return made

    def to_json(self) -> dict[str, Any]:
        """The sizes by name."""
        return asdict(self)

    @property
    def length(self) -> int:
        """Tokens in a chunk. The next one sees the last `local_size` at their true distances."""
        return self.chunk_size - self.local_size


class DualChunkAttention:
    """An `attend` that rotates queries and keys itself."""

    def __init__(self, sizes: DualChunk, rotary: Rotary) -> None:
        self.sizes, self.rotary = sizes, rotary

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float
    ) -> Tensor:
        k, v = (repeat(x, "b g t e -> b (g r) t e", r=q.shape[1] // k.shape[1]) for x in (k, v))
        own, before, far = mask.keep(self, lambda: self.tables(mask.positions, q.dtype))
        length = self.sizes.length
        k = rotate(k, *self.rotary.tables(mask.keys % length, q.dtype))
        chunk, of_key = mask.positions // length, mask.keys // length
        wide = torch.promote_types(q.dtype, torch.float32)
        if self.sizes.original_max_position_embeddings:
            q = q * self.temperature(mask.positions.to(wide)).to(q.dtype)
        out = []
        for rows in self.rows(q.shape[2]):
            back = (chunk[:, rows, None] - of_key[:, None, :])[:, None]  # in chunks
            near, next_to, beyond = (
                rotate(q[:, :, rows], *(table[:, :, rows] for table in tables)) @ k.mT
                for tables in (own, before, far)
            )
            scores = torch.where(back == 0, near, torch.where(back == 1, next_to, beyond))
            scores = (scores * scale).masked_fill(~self.allowed(mask, rows, q), -torch.inf)
            out.append(F.dropout(scores.softmax(dim=-1, dtype=wide).to(v.dtype), dropout) @ v)
        return torch.cat(out, dim=2)

    def rows(self, length: int) -> list[slice]:
        """Slices of queries. Compiled code takes all at once: a loop would fix the length."""
        if torch.compiler.is_compiling():
            return [slice(None)]
        return [slice(at, min(at + ROWS, length)) for at in range(0, length, ROWS)]

    def allowed(self, mask: Mask, rows: slice, q: Tensor) -> Tensor:
        """(b, 1, s, t) of these queries, or what broadcasts to it."""
        if mask.allowed is not None:
            return mask.allowed[..., rows, :]
        if not mask.causal:
            return torch.ones((), dtype=torch.bool, device=q.device)
        index = torch.arange(q.shape[2], device=q.device)
        return index[rows, None] >= index

    def tables(self, positions: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Rotary tables of queries for keys of their own chunk, of the one before, of others."""
        length, most = self.sizes.length, self.sizes.chunk_size
        own = positions % length
        before = (own + length).clamp(max=most)
        far = torch.full_like(own, min(2 * length - 1, most))
        return [self.rotary.tables(at, dtype) for at in (own, before, far)]

    def temperature(self, positions: Tensor) -> Tensor:
        """(b, 1, s, 1) factors of the scores, one up to the original length."""
        beyond = (positions + 1) / self.sizes.original_max_position_embeddings
        return (0.1 * beyond.log() + 1).clamp(min=1)[:, None, :, None]
