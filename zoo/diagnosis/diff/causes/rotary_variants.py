"""Other rotary embeddings, of numbers seen in the other model, and rare slips."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.components import rotary as component
from zoo.components.masks import Mask
from zoo.components.rotary import Rotary
from zoo.diagnosis.attention import Form, Variant, changed, pairs_of_neighbors, variants
from zoo.diagnosis.diff.causes.scene import Scene
from zoo.diagnosis.variants import bases, scalings


def rotaries(scene: Scene, own: Form) -> Iterator[Variant]:
    """Other bases, scalings, widths and precisions of a rotary embedding."""
    config = scene.model.config

    def variant(what: str, rotary: Any, lone: bool = False, **fields: Any) -> Variant:
        return Variant("rotary", what, partial(replace, rotary=rotary), fields, lone)

    standard = own.rotary
    if not isinstance(standard, Rotary):  # the class turns nothing
        return
    yield variant(
        "queries and keys are rotated twice",
        lambda q, k, m: standard(*standard(q, k, m), m),
        lone=True,
    )

    def values_too(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *rest: Any) -> Tensor:
        out: Tensor = own(q, k, standard(v, v, Mask(None, mask.keys))[0], mask, *rest)
        return out

    table = {"values are rotated, too": lambda form: form.attending(values_too)}
    yield from variants("rotary", table, lone=True)
    yield variant(
        "neighbors anywhere in a head are rotated as pairs, not halves of its part",
        partial(pairs_of_neighbors, standard, whole=True),
    )
    exact = partial(_coarse, standard, torch.float64, True)
    yield variant(_exactly(standard), exact, lone=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for early in (True, False):
            what = f"cosines and sines are {'computed in' if early else 'rounded to'}"
            coarse = partial(_coarse, standard, dtype, early)
            yield variant(f"{what} {str(dtype)[6:]}", coarse, lone=True)
    for base in bases(standard.base, scene.numbers):
        yield variant(f"theta is {base:g}", changed(standard, base=base), rope_base=base)
    for scaling in scalings(standard.scaling, scene.scalings, scene.numbers):
        what = (
            f"the rope's scaling is {', '.join(f'{k} {v}' for k, v in scaling.to_json().items())}"
        )
        yield variant(what, changed(standard, scaling=scaling), rope=scaling.to_json())
    whole = getattr(config, "head_dim", None) or config.dim // config.heads
    for width in dict.fromkeys((whole, standard.width // 2, standard.width // 4, whole // 2)):
        if width % 2 == 0 and 0 < width != standard.width:
            share = {"rope_share": width / whole} if hasattr(config, "rope_share") else {}
            what = f"{width} of a head's {whole} are rotated"
            yield variant(what, changed(standard, width=width), **share)


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
    """What exact angles are called, by how far the class's own are off."""
    places = torch.arange(64)[None]
    x = torch.ones(1, 1, 64, standard.width, dtype=torch.float64)
    mask = Mask(None, places)
    exact, own = _coarse(standard, torch.float64, True, x, x, mask)[0], standard(x, x, mask)[0]
    off = float((exact - own).abs().max())
    for dtype, large in ((torch.float32, 64), (torch.float16, 1), (torch.bfloat16, 1)):
        if off < 4 * large * torch.finfo(dtype).eps:  # angles in float32 are as large as places
            return f"cosines and sines are exact, and here as in {str(dtype)[6:]}"
    return "angles are what theta, scaling and places say, and here they are not"
