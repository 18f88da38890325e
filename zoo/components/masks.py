"""Masks: who may look at whom, and where each token stands. Dense only where they have to be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from zoo.components.inputs import check_mask


class Mask:
    """`allowed`: (b, 1, s, t) or what broadcasts to it, True where a query may look; or None."""

    def __init__(self, allowed: Tensor | None, positions: Tensor, causal: bool = False) -> None:
        self.allowed, self.positions, self.causal = allowed, positions, causal
        self._kept: dict[Any, Any] = {}

    def dense(self, length: int) -> Tensor | None:
        """`allowed` where the kernel knows no causal masks: they are written out."""
        if not self.causal:
            return self.allowed
        return _back(length, self.positions.device)

    def keep(self, owner: object, make: Callable[[], Any]) -> Any:
        """What `owner` derives from this mask, made once for all layers."""
        if owner not in self._kept:
            self._kept[owner] = make()
        return self._kept[owner]


def positions_of(real: Tensor | None, ids: Tensor, behind: int | None = None) -> Tensor:
    """(1, s) or (b, s): each real token's place among the real ones of its row.

    `behind` is a padding id: tokens that are not it are counted, from the place after it.
    """
    if behind is not None:
        counted = ids != behind if real is None else real & (ids != behind)
        return counted.cumsum(dim=-1) * counted + behind
    if real is None:
        return torch.arange(ids.shape[1], device=ids.device)[None]
    return (real.cumsum(dim=-1) - 1).clamp(min=0)


def causal(ids: Tensor, attention_mask: Tensor | None, window: int | None = None) -> Mask:
    """Each token looks back, at real tokens only, and at the last `window` of them if given."""
    real = check_mask(attention_mask, ids)
    positions = positions_of(real, ids)
    length = ids.shape[1]
    if real is None and (window is None or window >= length):
        return Mask(None, positions, causal=True)
    back = _back(length, ids.device)
    if window is not None:
        back = back.triu(1 - window)
    if real is None:
        return Mask(back, positions)
    # a padding token looks at itself, lest its row be empty and its NaN spread
    itself = torch.eye(length, dtype=torch.bool, device=ids.device)
    return Mask((real[:, None, None, :] & back) | itself, positions)


def windowed(
    ids: Tensor, attention_mask: Tensor | None, windows: Iterable[int | None]
) -> dict[int | None, Mask]:
    """A causal mask for each window; the layers that have it share what they keep there."""
    return {window: causal(ids, attention_mask, window) for window in dict.fromkeys(windows)}


def _back(length: int, device: torch.device) -> Tensor:
    """(s, t), True at and before the query."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def full(ids: Tensor, attention_mask: Tensor | None, behind: int | None = None) -> Mask:
    """Each token looks at every real token; `behind` as in `positions_of`."""
    real = check_mask(attention_mask, ids)
    allowed = None if real is None else real[:, None, None, :]
    return Mask(allowed, positions_of(real, ids, behind))
