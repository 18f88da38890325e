"""How queries and keys may be turned otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from zoo.components import rotary as component
from zoo.components.masks import Mask
from zoo.components.rotary import NO_ROTARY, Rotary
from zoo.diagnosis.diff.causes.attention_trial import Look, Turn
from zoo.diagnosis.diff.causes.scene import Scene
from zoo.diagnosis.edits import backwards, bases, scalings


def rotaries(scene: Scene, own: Look) -> Iterator[Turn]:
    config = scene.model.config

    def turn(what: str, rotary: Any, lone: bool = False, **fields: Any) -> Turn:
        changed = partial(_with, rotary)
        return Turn("rotary", what, changed, "", fields, lone=lone)

    standard = own.rotary
    if not isinstance(standard, Rotary):  # the class turns nothing
        return
    yield turn("queries and keys are not turned", NO_ROTARY)
    yield turn("keys are not turned", lambda q, k, m: (standard(q, k, m)[0], k))
    yield turn("queries are not turned", lambda q, k, m: (q, standard(q, k, m)[1]))
    for ahead in (1, -1):
        way = "ahead" if ahead > 0 else "behind"
        yield turn(
            f"queries are turned as if one place {way}",
            lambda q, k, m, n=ahead: (standard(q, k, _moved(m, n))[0], standard(q, k, m)[1]),
        )
    yield turn(
        "queries and keys are turned twice",
        lambda q, k, m: standard(*standard(q, k, m), m),
        lone=True,
    )
    yield Turn(
        "rotary",
        "values are turned, too",
        lambda look: replace(look, attend=partial(_values_too, standard, look.attend)),
        lone=True,
    )
    yield turn("queries and keys are turned backwards", partial(backwards, standard))
    yield turn(
        "neighbors are turned against each other, not halves", partial(_neighbours, standard)
    )
    yield turn(
        "neighbors are turned against each other in all of a head, not halves of its part",
        partial(_neighbours, standard, whole=True),
    )
    exact = partial(_coarse, standard, torch.float64, True)
    yield turn(_exactly(standard), exact, lone=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for early in (True, False):
            how = "computed in" if early else "rounded to"
            yield turn(
                f"cosines and sines are {how} {str(dtype)[6:]}",
                partial(_coarse, standard, dtype, early),
                lone=True,
            )
    for base in bases(standard.base, scene.numbers):
        rotary = Rotary(standard.width, base, standard.scaling, standard.limit)
        yield turn(f"theta is {base:g}", rotary, rope_base=base)
    for scaling in scalings(standard.scaling, scene.scalings, scene.numbers):
        rotary = Rotary(standard.width, standard.base, scaling, standard.limit)
        said = ", ".join(f"{k} {v}" for k, v in scaling.to_json().items())
        yield turn(f"the rope's scaling is {said}", rotary, rope=scaling.to_json())
    whole = getattr(config, "head_dim", None) or config.dim // config.heads
    for width in dict.fromkeys((whole, standard.width // 2, standard.width // 4, whole // 2)):
        if width % 2 == 0 and 0 < width != standard.width:
            rotary = Rotary(width, standard.base, standard.scaling, standard.limit)
            share = {"rope_share": width / whole} if hasattr(config, "rope_share") else {}
            yield turn(f"{width} of a head's {whole} are turned", rotary, **share)


def _with(rotary: Any, look: Look) -> Look:
    return replace(look, rotary=rotary)


def _values_too(
    standard: Rotary, attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *rest: Any
) -> Tensor:
    at = Mask(None, mask.keys)
    out: Tensor = attend(q, k, standard(v, v, at)[0], mask, *rest)
    return out


def _coarse(
    standard: Rotary, dtype: torch.dtype, early: bool, q: Tensor, k: Tensor, mask: Mask
) -> tuple[Tensor, Tensor]:
    """With cosines and sines computed in a dtype, or rounded to it; float64 is all there is."""
    wide = torch.promote_types(dtype, torch.float32) if early else q.dtype
    at = mask.positions.to(wide)
    steps = torch.arange(0, standard.width, 2).to(wide) / standard.width
    angles = (at[..., None] * standard.scaling.frequencies(standard, steps, mask.positions))[
        :, None
    ]
    scale = standard.scaling.amplitude(standard)
    cos, sin = ((x * scale).to(dtype).to(q.dtype) for x in (angles.cos(), angles.sin()))
    return component.rotate(q, cos, sin), component.rotate(k, cos, sin)


def _exactly(standard: Rotary) -> str:
    """What it is to be turned by exact angles, by how far the class's own are off."""
    places = torch.arange(64)[None]
    x = torch.ones(1, 1, 64, standard.width, dtype=torch.float64)
    mask = Mask(None, places)
    exact, own = _coarse(standard, torch.float64, True, x, x, mask)[0], standard(x, x, mask)[0]
    off = float((exact - own).abs().max())
    for dtype, large in ((torch.float32, 64), (torch.float16, 1), (torch.bfloat16, 1)):
        if off < 4 * large * torch.finfo(dtype).eps:  # angles in float32 are as large as places
            return f"cosines and sines are exact, and here as in {str(dtype)[6:]}"
    return "angles are what theta, scaling and places say, and here they are not"


def _moved(mask: Mask, by: int) -> Mask:
    return Mask(mask.allowed, mask.positions + by, mask.causal)


def _neighbours(
    rotary: Rotary, q: Tensor, k: Tensor, mask: Mask, whole: bool = False
) -> tuple[Tensor, Tensor]:
    """Those in the part of a head that is turned; or brought there from all of it."""

    def apart(x: Tensor) -> Tensor:
        x, rest = x.split((width, x.shape[-1] - width), dim=-1)
        return torch.cat((rearrange(x, "b h s (e two) -> b h s (two e)", two=2), rest), -1)

    def together(x: Tensor) -> Tensor:
        x, rest = x.split((width, x.shape[-1] - width), dim=-1)
        return torch.cat((rearrange(x, "b h s (two e) -> b h s (e two)", two=2), rest), -1)

    width = q.shape[-1] if whole else rotary.width
    q, k = rotary(apart(q), apart(k), mask)
    return together(q), together(k)
