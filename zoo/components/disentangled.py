"""Disentangled attention: contents and relative positions score each other (DeBERTa)."""

from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from zoo.components.attention import Attention, attend
from zoo.components.config import Parsed
from zoo.components.masks import Mask
from zoo.components.model import Embedding, Linear
from zoo.errors import ConfigError


class PositionTerms(Parsed, tuple[str, ...]):
    """Terms of the scores beside content to content: c2p, content to position, and p2c."""

    json_schema: ClassVar = {"type": ["array", "string", "null"]}

    @classmethod
    def from_json(cls, value: Any) -> "PositionTerms":
        """From a list of c2p and p2c, or from both joined by |; null is neither."""
        names = value.split("|") if isinstance(value, str) else value or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"expected c2p and p2c in a list, or joined by |, found {value!r}")
        names = [name.strip().lower() for name in names]
        if others := [name for name in names if name not in ("c2p", "p2c")]:
            raise ConfigError(f"{others[0]!r} is not implemented (only c2p and p2c)")
        return cls(names)

    def to_json(self) -> list[str]:
        """The terms as a list."""
        return list(self)


NO_TERMS = PositionTerms()


class RelativePositions(nn.Module):
    """(p, d): a vector for each distance in either direction, or for each bucket of distances.

    With `buckets` > 0, far distances share logarithmic buckets; else each distance up to
    `max_distance` has a vector of its own. `norm` is applied to the vectors where there is one.
    """

    def __init__(self, dim: int, max_distance: int, buckets: int, norm: nn.Module | None) -> None:
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.span = buckets if buckets > 0 else max_distance
        self.embed = Embedding(2 * self.span, dim)
        self.norm = norm

    def once(self, mask: Mask) -> tuple[Tensor, Tensor]:
        """(p, d) and (b, 1, s, t), computed once for all layers that share a mask."""
        return mask.keep(self, lambda: self(mask.positions))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(p, d) of vectors, and (b, 1, s, t): which of them a query and a key have."""
        vectors = self.embed.weight
        return vectors if self.norm is None else self.norm(vectors), self.rows(positions)

    def rows(self, positions: Tensor) -> Tensor:
        """(b, 1, s, t): the row of the table for the distance from each key to each query."""
        behind = positions[:, None, :, None] - positions[:, None, None, :]
        if self.buckets > 0:
            behind = self.bucket(behind)
        return (behind + self.span).clamp(0, 2 * self.span - 1)

    def bucket(self, behind: Tensor) -> Tensor:
        """(b, 1, s, t): the nearer half of the buckets hold one distance each, the rest grow."""
        near = self.buckets // 2
        wide = torch.promote_types(self.embed.weight.dtype, torch.float32)
        far = behind.abs().clamp(min=near).to(wide)
        most = torch.tensor((self.max_distance - 1) / near, dtype=wide).log()
        shared = ((far / near).log() / most * (near - 1)).ceil() + near
        return torch.where(behind.abs() <= near, behind, shared.long() * behind.sign())


class DisentangledAttention(Attention):
    """Attention whose scores have more terms: c2p, content to position, and p2c.

    `relative` gives vectors and rows for a mask, as `RelativePositions.once` does; without it, or
    without terms, attention is the ordinary one. With `shared_projections` positions go through
    the projections of contents, else through `pos_k` and `pos_q`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        *,
        terms: Collection[str],
        relative: Callable[[Mask], tuple[Tensor, Tensor]] | None,
        key_bias: bool,
        shared_projections: bool,
        dropout: float,
        table_dropout: float,
    ) -> None:
        scale = (head_dim * (1 + len(terms))) ** -0.5
        shape = (dim, heads, heads, head_dim)
        super().__init__(*shape, bias=True, dropout=dropout, scale=scale, attend=self.look)
        self.k = Linear(dim, dim, bias=key_bias)
        self.position_terms, self.distances = terms, relative
        own = [] if shared_projections or relative is None else terms
        self.pos_k = Linear(dim, dim, bias=key_bias) if "c2p" in own else None
        self.pos_q = Linear(dim, dim) if "p2c" in own else None
        self.table_dropout = nn.Dropout(table_dropout)

    def look(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float
    ) -> Tensor:
        """(b, h, s, e): `attend` with the terms of relative positions as a bias."""
        if self.distances is None or not self.position_terms:
            return attend(q, k, v, mask, scale, dropout)
        vectors, rows = self.distances(mask)
        vectors, bias = self.table_dropout(vectors), torch.zeros((), dtype=q.dtype, device=q.device)
        if "c2p" in self.position_terms:
            bias = bias + self.scores(rows, q, (self.pos_k or self.k)(vectors))
        if "p2c" in self.position_terms:
            bias = bias + self.scores(rows.mT, k, (self.pos_q or self.q)(vectors)).mT
        return attend(q, k, v, mask, scale, dropout, bias * scale)

    def scores(self, rows: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
        """(b, h, s, t): each of x (b, h, s, e) times the vector of its row."""
        scores = x @ rearrange(vectors, "p (h e) -> h e p", e=self.head_dim)
        return scores.gather(-1, rows.expand(*scores.shape[:2], -1, -1))
