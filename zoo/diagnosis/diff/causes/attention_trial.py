"""A way to look, what may be otherwise in it, and what it makes of a few rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from zoo.components.masks import Mask
from zoo.components.rotary import Rotary
from zoo.diagnosis.diff.causes.scene import FITS, error
from zoo.diagnosis.edits import PARTS

FUSED = "qkv"
READ = (FUSED, *PARTS, "out")  # kinds of turns that are an order in which rows are read


@dataclass(frozen=True)
class Look:
    """One way to look: how rows of the parts are read, and what is done with them."""

    rotary: Any
    attend: Any
    scale: float
    roles: tuple[str, ...] = PARTS
    # part -> which of its rows; FUSED: of all three, one below the other
    orders: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, rows: Mapping[str, Tensor], mask: Mask, width: int) -> Tensor:
        """(s, h e) of one row's (s, h e) of queries and (t, g e) of keys and values."""
        given = dict(zip(PARTS, self.ordered([rows[name] for name in PARTS], 1), strict=True))
        q, k, v = (rearrange(given[name], "s (h e) -> 1 h s e", e=width) for name in self.roles)
        mask = Mask(mask.allowed, mask.positions, mask.causal, mask.keys)
        q, k = self.rotary(q, k, mask)
        y = rearrange(self.attend(q, k, v, mask, self.scale, 0.0), "1 h s e -> s (h e)")
        return y[:, self.orders["out"]] if "out" in self.orders else y

    def ordered(self, parts: Sequence[Tensor], axis: int) -> list[Tensor]:
        """Queries, keys and values, or what makes them."""
        if (order := self.orders.get(FUSED)) is not None:
            sizes = [x.shape[axis] for x in parts]
            parts = torch.cat(list(parts), axis).index_select(axis, order).split(sizes, axis)
        return [
            x if (order := self.orders.get(name)) is None else x.index_select(axis, order)
            for name, x in zip(PARTS, parts, strict=True)
        ]


@dataclass(frozen=True)
class Turn:
    """Something that may be otherwise: of one kind there is one at a time."""

    kind: str
    what: str  # of the attention in which it is so
    change: Callable[[Look], Look]
    fix: str = ""  # where it is rows that are read in another order
    config: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = False  # they stand so on disk
    lone: bool = False  # so seldom that it is tried by itself alone


@dataclass(frozen=True)
class Bench:
    """A few rows of one attention's parts."""

    rows: list[dict[str, Tensor]]
    masks: list[Mask]
    width: int

    @property
    def heads(self) -> dict[str, int]:
        first = self.rows[0]
        return {part: first[part].shape[-1] // self.width for part in PARTS}

    def error(self, look: Look, wanted: Tensor) -> float:
        try:
            out = self.made(look)
        except (RuntimeError, ValueError):
            return math.inf
        return error(out, wanted) if out.shape == wanted.shape else math.inf

    def made(self, look: Look) -> Tensor:
        with torch.no_grad():
            pairs = zip(self.rows, self.masks, strict=True)
            return torch.cat([look(row, mask, self.width) for row, mask in pairs])

    def fitted(self, own: Look, turns: Sequence[Turn], wanted: Tensor) -> tuple[Turn, ...] | None:
        """The fewest turns that make what is wanted; None where none do."""
        if self.error(own, wanted) <= FITS:
            return ()
        few = [(turn,) for turn in turns]
        usual = [turn for turn in turns if not turn.lone]
        pairs = ((a, b) for a, b in combinations(usual, 2) if a.kind != b.kind)
        for some in (*few, *pairs):
            if self.error(all_of(some, own), wanted) <= FITS:
                return some
        return self.solved(own, wanted)

    def solved(self, own: Look, wanted: Tensor) -> tuple[Turn, ...] | None:
        """A scale or a theta that nobody would think of, by Newton's method."""

        def scaled(by: float) -> Look:
            return replace(own, scale=own.scale * by)

        def based(by: float) -> Look:
            rotary = own.rotary
            base = rotary.base * by
            return replace(own, rotary=Rotary(rotary.width, base, rotary.scaling, rotary.limit))

        for kind, look in (("scale", scaled), ("rotary", based)):
            if kind == "rotary" and not isinstance(own.rotary, Rotary):
                continue
            if (by := self.newton(look, wanted)) is not None:
                found = look(by)
                what = f"scores are scaled by {found.scale:.6g}, {by:.6g} times what is usual"
                config = dict[str, Any]()
                if kind == "rotary":
                    what = f"theta is {found.rotary.base:.6g}"
                    config = {"rope_base": found.rotary.base}
                changed = partial(replace, rotary=found.rotary, scale=found.scale)
                return (Turn(kind, what, changed, "", config),)
        return None

    def newton(self, look: Callable[[float], Look], wanted: Tensor) -> float | None:
        """The factor with which a look makes what is wanted."""
        at, step = 0.0, 1e-6  # of its logarithm
        for _ in range(20):
            made = self.made(look(math.exp(at)))
            slope = (self.made(look(math.exp(at + step))) - made) / step
            off = wanted - made
            if error(made, wanted) <= FITS:
                return math.exp(at)
            change = float((slope * off).sum() / slope.square().sum().clamp(min=1e-300))
            at += max(-0.5, min(0.5, change))
            if abs(at) > 10:
                return None
        return None


def all_of(turns: Sequence[Turn], look: Look) -> Look:
    for turn in turns:
        look = turn.change(look)
    return look
