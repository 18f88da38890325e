"""Variants of an attention to try on a sample: the catalogue's, and those of numbers seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.components.masks import Mask
from zoo.diagnosis.attention import Form, Sizes, Variant, at, variants
from zoo.diagnosis.diff.causes.rotary_variants import rotaries
from zoo.diagnosis.diff.causes.scene import Scene
from zoo.diagnosis.diff.causes.score_variants import terms
from zoo.diagnosis.edits import PARTS
from zoo.diagnosis.families import Attends, PermutedRows, own_rows
from zoo.diagnosis.faults import FAULTS
from zoo.diagnosis.kinds import attentions
from zoo.diagnosis.variants import NOT_TRIED


def row_variants(scene: Scene, name: str, joint: bool = False) -> Iterator[Variant]:
    """Rows that the catalogue knows to be read in another order; `joint`: of several parts alike.

    The latter come last, since code that differs may do the same.
    """
    kind = next((kind for kind in attentions(scene.model) if name in kind.modules), None)
    if kind is None:
        return
    own = own_rows(kind)

    def change(rows: Mapping[str, Tensor], form: Form) -> Form:
        before = torch.cat([form.rows.get(part, own[part]) for part in PARTS])
        moved = {part: x if part == "out" else before[x] for part, x in rows.items()}
        return replace(form, rows={**form.rows, **moved})

    some = [h for h in scene.hypotheses if h.rows and f"{name}." in " ".join(h.parameters)]
    # where another order of q does the same as one of k, the rule that reorders is to blame
    for each in sorted(some, key=lambda h: "as it stands" not in h.fix):
        if joint != (len(each.rows) > 1 and isinstance(FAULTS[each.fault].edit, PermutedRows)):
            continue
        parts = "roles" if "exchanged" in each.fix else "".join(each.rows)
        lone = parts != "roles" and (len(each.rows) > 1 or each.across)
        yield Variant(
            parts,
            each.what,
            partial(change, each.rows),
            lone=lone,
            hypotheses=(each,),
            fault=each.fault,
        )


def variants_of(scene: Scene, own: Form, sizes: Sizes) -> Iterator[Variant]:
    """Other code, the likeliest first."""
    listed = [
        replace(variant, fault=fault.name)
        for fault in FAULTS.values()
        if isinstance(fault.edit, Attends)
        if (variant := fault.edit.variant(own, sizes)) is not None
    ]
    yield from (v for v in listed if v.kind == "rotary")
    yield from rotaries(scene, own)
    yield from (_with_field(scene, v, own) for v in listed if v.kind == "scale")
    yield from _scales(scene, own)
    yield from (v for v in listed if v.kind not in ("rotary", "scale"))
    yield from _masks(scene)
    yield from _later(scene)
    yield from terms(own)


def _with_field(scene: Scene, variant: Variant, own: Form) -> Variant:
    """The config field whose root scores are divided by, if it is no width of parameters."""
    config = scene.model.config
    names = [
        name
        for name, n in vars(config).items()
        if name not in NOT_TRIED and type(n) in (int, float) and n > 0
        if math.isclose(n**-0.5, own.scale, rel_tol=1e-9)
    ]
    n = variant.change(own).scale ** -2
    value = round(n) if math.isclose(n, round(n)) else n
    return replace(variant, config={names[0]: value} if names else {})


def _scales(scene: Scene, own: Form) -> Iterator[Variant]:
    for n in scene.numbers:
        if n > 1 and not math.isclose(n**-0.5, own.scale, rel_tol=1e-12):
            what = f"scores are divided by the root of {n:g}"
            yield _with_field(scene, Variant("scale", what, partial(replace, scale=n**-0.5)), own)


def _mask(
    what: str, change: Callable[[Tensor], Tensor], lone: bool = False, **config: int
) -> Variant:
    return Variant("mask", what, lambda form: form.masked(change), config, lone)


def _masks(scene: Scene) -> Iterator[Variant]:
    yield _mask("the future is visible", torch.ones_like)
    yield _mask("the future is hidden", lambda mask: mask.tril())
    yield _mask("the past is hidden", lambda mask: torch.ones_like(mask).triu())
    tokens = scene.comparison.way.inputs.positions.ids.shape[1]
    now = getattr(scene.model.config, "window", None)
    near = [n for n in (now and now + 1, now and now - 1) if n]
    windows = [int(n) for n in (*near, *scene.numbers, 1, 2) if 0 < n < tokens and n == int(n)]
    for window in dict.fromkeys(windows):
        config: dict[str, Any] = {"window": window} if now else {}
        yield _mask(f"tokens see {window} positions back", partial(_back, window=window), **config)
    yield _mask("tokens see back without a window", _back)


def _later(scene: Scene) -> Iterator[Variant]:
    """Tokens that come after others, which a cache keeps."""
    way = scene.comparison.way
    if way.name != "cached":
        return
    cut, behind = way.cut, "of tokens that come after others in a cache"
    positions: dict[str, Callable[[Tensor], Tensor]] = {
        f"positions {behind} are off by +1": lambda now: now + 1,
        f"positions {behind} are off by -1": lambda now: now - 1,
        f"positions {behind} begin at 0 again": lambda now: now - cut,
    }
    table = {what: partial(_moved, cut, change) for what, change in positions.items()}
    yield from variants("rotary", table)
    masks: dict[str, Callable[[Tensor], Tensor]] = {
        f"the future is visible to queries {behind}": torch.ones_like,
        f"queries {behind} see back without a window": _back,
        f"queries {behind} see nothing of what was before": lambda mask: (
            mask & (torch.arange(mask.shape[-1]) >= cut)
        ),
    }
    for what, change in masks.items():
        yield _mask(what, partial(_late, cut, change), lone=True)


def _moved(cut: int, change: Callable[[Tensor], Tensor], form: Form) -> Form:
    def rotary(q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        now = mask.positions
        other = torch.where(torch.arange(now.shape[-1]) < cut, now, change(now))
        out: tuple[Tensor, Tensor] = form.rotary(q, k, at(mask, other))
        return out

    return replace(form, rotary=rotary)


def _late(cut: int, change: Callable[[Tensor], Tensor], mask: Tensor) -> Tensor:
    late = torch.arange(mask.shape[-2])[:, None] >= cut
    return torch.where(late, change(mask), mask)


def _back(mask: Tensor, window: int | None = None) -> Tensor:
    back = torch.ones_like(mask).tril()
    return back if window is None else back.triu(1 - window)
