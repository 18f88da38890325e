"""Masks: who may look at whom, and where each token stands. Dense only where they have to be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from zoo.components.cache import Cache, Step
from zoo.components.inputs import check_mask
from zoo.errors import MaskError


class Mask:
    """`allowed`: (b, 1, s, t) or what broadcasts to it, True where a query may look; or None.

    `positions` and `keys`: (b, s) and (b, t) or one row for all, where queries and keys stand.
    """

    def __init__(
        self,
        allowed: Tensor | None,
        positions: Tensor,
        causal: bool = False,
        keys: Tensor | None = None,
    ) -> None:
        self.allowed, self.positions, self.causal = allowed, positions, causal
        self.keys = positions if keys is None else keys
        self._kept: dict[Any, Any] = {}
        self._past: Past | None = None

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

    def remember(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """These keys and values, behind those that a cache holds for the layer that asks."""
        return (k, v) if self._past is None else self._past(k, v)

    def on(self, past: Past) -> Mask:
        self._past = past
        return self

    def take(self, rows: Tensor) -> Mask:
        """The same for other rows, with what tensors were kept for its own."""

        def taken(x: Tensor) -> Tensor:
            return x if len(x) == 1 else x.index_select(0, rows)

        mask = Mask(
            None if self.allowed is None else taken(self.allowed),
            taken(self.positions),
            self.causal,
            taken(self.keys),
        )
        mask._kept = {owner: tuple(map(taken, kept)) for owner, kept in self._kept.items()}
        return mask


class Past:
    """What layers share of one call's place in a cache, each taking its turn."""

    def __init__(self, step: Step) -> None:
        self.step, self.turn = step, 0

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.turn += 1
        return self.step.remember(self.turn - 1, k, v)


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


def causal(
    ids: Tensor,
    attention_mask: Tensor | None,
    window: int | None = None,
    cache: Cache | None = None,
) -> Mask:
    """Each token looks back, at real tokens only, and at the last `window` of them if given."""
    return windowed(ids, attention_mask, [window], cache)[window]


def windowed(
    ids: Tensor,
    attention_mask: Tensor | None,
    windows: Iterable[int | None],
    cache: Cache | None = None,
) -> dict[int | None, Mask]:
    """A causal mask for each window; the layers that have it share what they keep there."""
    distinct = dict.fromkeys(windows)
    if cache is None:
        real = check_mask(attention_mask, ids)
        return {window: _alone(ids, real, window) for window in distinct}
    before = cache.length if attention_mask is not None else 0
    real = check_mask(_of_these(attention_mask, ids, cache, before), ids, chunk=True)
    step = cache.step(ids, real)
    past = Past(step)
    if step.eager and step.start == 0:
        return {window: _alone(ids, real, window).on(past) for window in distinct}
    return {window: _behind(step, window).on(past) for window in distinct}


def _of_these(
    attention_mask: Tensor | None, ids: Tensor, cache: Cache, before: int
) -> Tensor | None:
    """The mask of new tokens, of one that names those before them too."""
    if attention_mask is None or torch.compiler.is_compiling():
        return attention_mask
    if not before or attention_mask.shape != (len(ids), before + ids.shape[1]):
        return attention_mask
    said = attention_mask[:, :before]
    if said.device.type == "cpu":
        known = torch.ones(()) if cache.real is None else cache.real[:, :before]
        if (said != known).any():
            raise MaskError(
                f"attention_mask: of the {before} tokens that the cache holds, it says otherwise "
                "than they were given with"
            )
    return attention_mask[:, before:]


def _alone(ids: Tensor, real: Tensor | None, window: int | None) -> Mask:
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


def _behind(step: Step, window: int | None) -> Mask:
    """For tokens that others stand before, and in compiled code empty places behind."""
    places, real = step.places, step.seen()
    every = torch.arange(step.end, device=places.device)
    if window is not None and step.eager and window >= step.end:
        window = None
    if real is None:
        keys, positions = every[None], places[None]
        if step.eager and len(places) == 1 and window is None:
            return Mask(None, positions, keys=keys)
    else:
        keys = (real.cumsum(dim=-1) - 1).clamp(min=0)
        positions = keys.index_select(1, places)
    allowed = every <= places[:, None]
    if window is not None:
        allowed = allowed & (every > places[:, None] - window)
    if real is not None:
        allowed = (real[:, None, None, :] & allowed) | (every == places[:, None])
    return Mask(allowed, positions, keys=keys)


def _back(length: int, device: torch.device) -> Tensor:
    """(s, t), True at and before the query."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def full(ids: Tensor, attention_mask: Tensor | None, behind: int | None = None) -> Mask:
    """Each token looks at every real token; `behind` as in `positions_of`."""
    real = check_mask(attention_mask, ids)
    allowed = None if real is None else real[:, None, None, :]
    return Mask(allowed, positions_of(real, ids, behind))
