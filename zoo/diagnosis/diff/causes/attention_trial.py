"""Variants of an attention tried on a sample of rows: which of them a model computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from zoo.components.masks import Mask
from zoo.components.rotary import Rotary
from zoo.diagnosis.attention import Form, Sizes, Variant, all_of, changed
from zoo.diagnosis.diff.causes.scene import FITS, error


@dataclass(frozen=True)
class Trial:
    """A few rows of one attention's queries, keys and values, with their masks.

    `own` is what the class computes of them; `ours` and `theirs` what both models made.
    """

    rows: list[dict[str, Tensor]]
    masks: list[Mask]
    own: Form
    sizes: Sizes
    ours: Tensor
    theirs: Tensor

    def error(self, form: Form, wanted: Tensor) -> float:
        """How far what a form makes is from what is wanted."""
        try:
            out = self.made(form)
        except (RuntimeError, ValueError):
            return math.inf
        return error(out, wanted) if out.shape == wanted.shape else math.inf

    def made(self, form: Form) -> Tensor:
        """(tokens, h e) what a form makes of the sample."""
        with torch.no_grad():
            pairs = zip(self.rows, self.masks, strict=True)
            return torch.cat([form(row, mask, self.sizes.width) for row, mask in pairs])

    def fitted(self, variants: Sequence[Variant], wanted: Tensor) -> tuple[Variant, ...] | None:
        """The fewest variants that make what is wanted; None where none do."""
        if self.error(self.own, wanted) <= FITS:
            return ()
        few = [(variant,) for variant in variants]
        usual = [variant for variant in variants if not variant.lone]
        pairs = ((a, b) for a, b in combinations(usual, 2) if a.kind != b.kind)
        for some in (*few, *pairs):
            if self.error(all_of(some, self.own), wanted) <= FITS:
                return some
        return self.solved(wanted)

    def solved(self, wanted: Tensor) -> tuple[Variant, ...] | None:
        """A scale or a theta that nobody would think of, by Newton's method."""
        own = self.own

        def scaled(by: float) -> Form:
            return replace(own, scale=own.scale * by)

        def based(by: float) -> Form:
            return replace(own, rotary=changed(own.rotary, base=own.rotary.base * by))

        for kind, vary in (("scale", scaled), ("rotary", based)):
            if kind == "rotary" and not isinstance(own.rotary, Rotary):
                continue
            if (by := self.newton(vary, wanted)) is not None:
                form = vary(by)
                what = f"scores are scaled by {form.scale:.6g}, {by:.6g} times what is usual"
                config = dict[str, Any]()
                if kind == "rotary":
                    what = f"theta is {form.rotary.base:.6g}"
                    config = {"rope_base": form.rotary.base}
                change = partial(replace, rotary=form.rotary, scale=form.scale)
                return (Variant(kind, what, change, config),)
        return None

    def newton(self, vary: Callable[[float], Form], wanted: Tensor) -> float | None:
        """The factor with which a form makes what is wanted."""
        at, step = 0.0, 1e-6  # of its logarithm
        for _ in range(20):
            made = self.made(vary(math.exp(at)))
            slope = (self.made(vary(math.exp(at + step))) - made) / step
            off = wanted - made
            if error(made, wanted) <= FITS:
                return math.exp(at)
            change = float((slope * off).sum() / slope.square().sum().clamp(min=1e-300))
            at += max(-0.5, min(0.5, change))
            if abs(at) > 10:
                return None
        return None
