"""Masks: which keys a query may attend to, and the positions of both. Dense only where needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from zoo.components.cache import Cache, Step
from zoo.components.inputs import check_mask
from zoo.errors import MaskError

T = TypeVar("T")


class Mask:
    """What all layers of one call share.

    `allowed` is (b, 1, s, t) or broadcasts to it, True where a query may attend to a key; None is
    all True, or the lower triangle where `causal`. `positions` (b, s) and `keys` (b, t) are the
    positions of queries and keys, or one row for all.
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
        self._kept: dict[object, Any] = {}
        self._past: Past | None = None

    def dense(self, length: int) -> Tensor | None:
        """(s, t) written out where the mask is causal, else `allowed`."""
        if not self.causal:
            return self.allowed
        return _lower(length, self.positions.device)

    def keep(self, owner: object, make: Callable[[], T]) -> T:
        """What `owner` derives from this mask, made by the first layer and shared by the rest."""
        if owner not in self._kept:
            self._kept[owner] = make()
        return self._kept[owner]

    def remember(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(b, g, t, e) of keys and values: those in the cache, then these (b, g, s, e)."""
        return (k, v) if self._past is None else self._past(k, v)

    def on(self, past: Past) -> Mask:
        """This mask, whose layers keep keys and values in a cache."""
        self._past = past
        return self

    def take(self, rows: Tensor) -> Mask:
        """Select rows by number, also of tensors that layers keep here."""

        def selected(x: Tensor) -> Tensor:
            return x if len(x) == 1 else x.index_select(0, rows)

        mask = Mask(
            None if self.allowed is None else selected(self.allowed),
            selected(self.positions),
            self.causal,
            selected(self.keys),
        )
        mask._kept = {owner: tuple(map(selected, kept)) for owner, kept in self._kept.items()}
        return mask


class Past:
    """One call's part of a cache; layers ask for theirs in the order in which they run."""

    def __init__(self, step: Step) -> None:
        self.step, self.layer = step, 0

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.layer += 1
        return self.step.remember(self.layer - 1, k, v)


def positions_of(real: Tensor | None, ids: Tensor, pad: int | None = None) -> Tensor:
    """(1, s) or (b, s): each real token's position among the real tokens of its row.

    With `pad`, positions start at pad + 1, and tokens of that id are not counted (RoBERTa).
    """
    if pad is not None:
        counted = ids != pad if real is None else real & (ids != pad)
        return counted.cumsum(dim=-1) * counted + pad
    if real is None:
        return torch.arange(ids.shape[1], device=ids.device)[None]
    return (real.cumsum(dim=-1) - 1).clamp(min=0)


def full(ids: Tensor, attention_mask: Tensor | None, pad: int | None = None) -> Mask:
    """Each token attends to every real token; `pad` as in `positions_of`."""
    real = check_mask(attention_mask, ids)
    allowed = None if real is None else real[:, None, None, :]
    return Mask(allowed, positions_of(real, ids, pad))


def causal(
    ids: Tensor,
    attention_mask: Tensor | None,
    window: int | None = None,
    cache: Cache | None = None,
) -> Mask:
    """Each token attends to real tokens up to itself, or to the last `window` of them."""
    return windowed(ids, attention_mask, [window], cache)[window]


def windowed(
    ids: Tensor,
    attention_mask: Tensor | None,
    windows: Iterable[int | None],
    cache: Cache | None = None,
) -> dict[int | None, Mask]:
    """A causal mask for each window, shared by the layers that have it."""
    distinct = dict.fromkeys(windows)
    if cache is None:
        real = check_mask(attention_mask, ids)
        return {window: _alone(ids, real, window) for window in distinct}
    before = cache.length if attention_mask is not None else 0
    real = check_mask(_of_new_tokens(attention_mask, ids, cache, before), ids, chunk=True)
    step = cache.step(ids, real)
    past = Past(step)
    if step.eager and step.start == 0:
        return {window: _alone(ids, real, window).on(past) for window in distinct}
    return {window: _after_others(step, window).on(past) for window in distinct}


def _of_new_tokens(
    attention_mask: Tensor | None, ids: Tensor, cache: Cache, before: int
) -> Tensor | None:
    """(b, s) of the new tokens, from a mask that may also cover those in the cache."""
    if attention_mask is None or torch.compiler.is_compiling():
        return attention_mask
    if not before or attention_mask.shape != (len(ids), before + ids.shape[1]):
        return attention_mask
    old = attention_mask[:, :before]
    if old.device.type == "cpu":
        cached = torch.ones(()) if cache.real is None else cache.real[:, :before]
        if (old != cached).any():
            raise MaskError(
                f"attention_mask: of the {before} tokens that the cache holds, it differs from "
                "the mask that they came with"
            )
    return attention_mask[:, before:]


def _alone(ids: Tensor, real: Tensor | None, window: int | None) -> Mask:
    """A causal mask with nothing in a cache before it."""
    positions = positions_of(real, ids)
    length = ids.shape[1]
    if real is None and (window is None or window >= length):
        return Mask(None, positions, causal=True)
    lower = _lower(length, ids.device)
    if window is not None:
        lower = lower.triu(1 - window)
    if real is None:
        return Mask(lower, positions)
    # a padding token attends to itself, lest its row be empty and its NaN spread
    itself = torch.eye(length, dtype=torch.bool, device=ids.device)
    return Mask((real[:, None, None, :] & lower) | itself, positions)


def _after_others(step: Step, window: int | None) -> Mask:
    """A causal mask after tokens in a cache; in compiled code it also covers the empty slots."""
    slots, real = step.slots, step.real()
    every = torch.arange(step.end, device=slots.device)
    if window is not None and step.eager and window >= step.end:
        window = None
    if real is None:
        keys, positions = every[None], slots[None]
        if step.eager and len(slots) == 1 and window is None:
            return Mask(None, positions, keys=keys)
    else:
        keys = (real.cumsum(dim=-1) - 1).clamp(min=0)
        positions = keys.index_select(1, slots)
    allowed = every <= slots[:, None]
    if window is not None:
        allowed = allowed & (every > slots[:, None] - window)
    if real is not None:
        allowed = (real[:, None, None, :] & allowed) | (every == slots[:, None])
    return Mask(allowed, positions, keys=keys)


def _lower(length: int, device: torch.device) -> Tensor:
    """(s, t), True at and before the query."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()
