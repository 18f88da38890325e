"""What comes back: which part of a gradient is lost, or counted otherwise, on its way."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from zoo.diagnosis.diff.causes.scene import FITS, Scene, fits
from zoo.diagnosis.diff.flows import Flow
from zoo.diagnosis.diff.residual_sums import summed
from zoo.diagnosis.edits import Hypothesis, stars

STEP = 1e-6  # of a derivative taken by differences


def ideas(scene: Scene) -> Iterator[Hypothesis]:
    name, flow = scene.name, scene.flow
    learns = name in scene.measurement.match.parameters
    if flow.ours is None or not flow.ours.any():
        yield from _cut(scene, learns)
        return
    if flow.theirs is None or flow.theirs.shape != flow.ours.shape:
        return
    if learns:
        yield from _row(scene)
    elif scene.side == "in":
        yield from _parts(scene, [name])
        yield from _derived(scene)
    else:
        yield from _parts(scene, _readers(scene))
    ratio = float((flow.ours * flow.theirs).sum() / flow.theirs.square().sum())
    if fits(flow.ours, flow.theirs * ratio):
        yield Hypothesis(f"the gradient there is {ratio:.6g} times what it is in the other model")


def _cut(scene: Scene, learns: bool) -> Iterator[Hypothesis]:
    name = scene.name
    if learns:
        if not scene.model.get_parameter(name).requires_grad:
            yield Hypothesis(f"{scene.name} learns nothing: its requires_grad is off")
        return
    side = "comes out of" if scene.side == "out" else "goes into"
    yield Hypothesis(
        f"what {side} {name} is cut from its gradient here: it is detached on its way on"
    )


def _row(scene: Scene) -> Iterator[Hypothesis]:
    """Which rows of a table learn."""
    ours, theirs, name = scene.flow.ours, scene.flow.theirs, scene.name
    assert ours is not None and theirs is not None
    apart = (ours - theirs).abs().amax(-1) > FITS * theirs.abs().max()
    rows = apart.nonzero().flatten().tolist()
    if len(rows) == 1 and len(ours) > 1:
        what = f"row {rows[0]} of {name} learns otherwise here: it is not known to be the padding's"
        config = {"pad": rows[0]} if hasattr(scene.model.config, "pad") else {}
        yield Hypothesis(what, f"pad is {rows[0]}", config=config)


def _readers(scene: Scene) -> list[str]:
    """The modules that are given what comes out there, and agree in what comes back to them."""
    output = scene.comparison.heard[scene.name][scene.measurement.call].values["out"]
    readers = []
    for name, calls in scene.comparison.heard.items():
        values = [one.values["in"] for one in calls]
        if any(x.shape == output.shape and torch.equal(x, output) for x in values):
            readers.append(name)
    return readers


def _derived(scene: Scene) -> Iterator[Hypothesis]:
    """Whether it gives back the derivative of what it computes, by a small step."""
    flow, module = scene.agreed.get((scene.name, "out", scene.measurement.call)), scene.module
    x, ours = _input(scene, scene.name), scene.flow.ours
    if flow is None or flow.ours is None or module is None or x is None or ours is None:
        return
    random = torch.Generator().manual_seed(0)
    step = STEP * torch.randn(x.shape, generator=random, dtype=x.dtype)
    with torch.no_grad():
        try:
            moved = ((module(x + step) - module(x - step)) * flow.ours).sum()
        except (RuntimeError, TypeError):
            return
    numeric, own = float(moved), float(2 * (step * ours).sum())
    if abs(numeric - own) > 1e-4 * abs(numeric):
        what = "is not the derivative of what it computes: something in it is detached"
        yield Hypothesis(f"what {stars(scene.name)} gives back {what}")


def _parts(scene: Scene, readers: list[str]) -> Iterator[Hypothesis]:
    """A sum of what each reader gives back and of what came to the stream before."""
    ours, theirs = scene.flow.ours, scene.flow.theirs
    assert ours is not None and theirs is not None
    parts = {f"what {name} gives back": x for name in readers for x in _back(scene, name)}
    for (name, side, _), flow in scene.agreed.items():
        x = flow.ours
        if x is not None and x.shape == ours.shape and side == "in":
            parts.setdefault(f"what comes to {name}", x)
    here, there = (summed(parts, x) for x in (ours, theirs))
    if here is None or there is None:
        if there is not None:
            yield Hypothesis(
                f"the gradient there is {there} in the other model, and no such sum here"
            )
        return
    for name in parts:
        mine, other = here.parts.get(name, 0), there.parts.get(name, 0)
        if math.isclose(mine, other, rel_tol=1e-6, abs_tol=1e-9):
            continue
        how = "is cut off here" if not mine else f"counts {mine:.6g} times here, {other:.6g} there"
        yield Hypothesis(f"{name} {how}")


def _back(scene: Scene, name: str) -> Iterator[Tensor]:
    """(tokens, features) of the gradient that a module of the class makes of what comes to it."""
    flow: Flow | None = scene.agreed.get((name, "out", scene.measurement.call))
    module, x = dict(scene.fresh.named_modules()).get(name), _input(scene, name)
    if flow is None or flow.ours is None or module is None or x is None:
        return
    if len(x) != len(flow.ours):
        return
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        try:
            out = module(x)
            (gradient,) = torch.autograd.grad(out, x, flow.ours)
        except (RuntimeError, TypeError):
            return
    yield gradient


def _input(scene: Scene, name: str) -> Tensor | None:
    """(tokens, features) of what a module was given."""
    calls, k = scene.comparison.heard.get(name, []), scene.measurement.call
    if len(calls) <= k:
        return None
    return scene.comparison.way.tokens([calls[k].values["in"]], scene.flow.counts)
