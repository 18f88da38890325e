"""Why two models part: likely causes are tried where they do, and those that fit are confirmed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

from zoo.components.model import Model
from zoo.diagnosis.diff.causes import (
    attention,
    catalogue,
    config,
    experts,
    gradients,
    layer,
    mlp,
    parameters,
    reruns,
    residual,
    spec_lines,
)
from zoo.diagnosis.diff.causes.scene import Scene, applied, put
from zoo.diagnosis.diff.comparison import Comparison
from zoo.diagnosis.diff.difference import Cause, Difference
from zoo.diagnosis.edits import Hypothesis
from zoo.errors import ZooError

MOST = 5  # causes that are told
THERE = "the other model's numbers are put there, and wherever the same is done"


def diagnosed(comparison: Comparison, difference: Difference) -> list[Cause]:
    """The most likely first: what restores parity, what moves the difference on, what fits."""
    if difference.first is None:
        return list(_unmet(comparison, difference))
    scene = Scene(comparison, difference)
    if difference.back:
        return [_confirmed(scene, idea) for idea in gradients.ideas(scene)]
    causes = list[Cause]()
    for idea in _ideas(scene):
        if idea.what not in {cause.what for cause in causes}:
            causes.append(_confirmed(scene, idea))
        if len(causes) == MOST or (causes and causes[-1].restored and not causes[-1].put):
            break
    return sorted(causes, key=lambda cause: (not cause.restored, cause.put, not cause.tried))


def _unmet(comparison: Comparison, difference: Difference) -> Iterator[Cause]:
    for names in difference.untied:
        what = f"{' and '.join(names)} are no longer one array: the tie is broken"
        cause = Cause(what, "they share one again")
        model = comparison.matching.model
        other, owner = (name.rpartition(".") for name in names)
        array = model.get_submodule(owner[0])._parameters[owner[2]]
        parameters = model.get_submodule(other[0])._parameters
        kept, parameters[other[2]] = parameters[other[2]], array
        try:
            restored = names not in comparison.again(model, difference.healed, ()).untied
        finally:
            parameters[other[2]] = kept
        yield replace(cause, tried=restored, restored=restored and len(difference.untied) == 1)
    for name in difference.idle:
        yield Cause(f"{name} does not run here, and does in the other model")


def _ideas(scene: Scene) -> Iterator[Hypothesis]:
    """The surest first; what little is known of a difference, only where no more is."""
    if ideas := list(reruns.restless(scene)):
        yield from ideas
        return
    sure = False
    for idea in _sure(scene):
        sure = True
        yield idea
    if sure:
        yield from config.tried(scene, flags=True)
        return
    yield from reruns.rounding(scene)
    yield from reruns.alone(scene)
    yield from reruns.whole(scene)
    yield from config.tried(scene)


def _sure(scene: Scene) -> Iterator[Hypothesis]:
    yield from config.read_again(scene)
    yield from reruns.padding(scene)
    if scene.side == "in":
        yield from parameters.unseen(scene)
    if scene.side == "in" and not scene.name.endswith(".out"):
        yield from catalogue.ideas(scene)
    if scene.side == "out":
        yield from layer.ideas(scene) if scene.name else reruns.outputs(scene)
        yield from experts.ideas(scene)
    elif scene.name.rpartition(".")[2] in ("q", "k", "v", "out"):
        yield from attention.ideas(scene)
    elif scene.name.endswith(".down"):
        yield from mlp.ideas(scene)
    if scene.side == "in":
        yield from residual.ideas(scene)


def _confirmed(scene: Scene, idea: Hypothesis) -> Cause:
    """What became of it, and of the other model's numbers in its place where it undoes nothing."""
    lone = Cause(idea.what, idea.fix, spec_lines.advice(scene, idea), fault=idea.fault)
    if scene.difference.back and not idea.undoes:
        return lone
    but = idea.touched if idea.undoes else {scene.name}
    tried = _tried(scene, lone, applied(scene.model, idea, scene), but)
    if tried.restored or idea.parameters or scene.difference.back:
        return tried
    places = scene.everywhere()
    names = {name for name, _, _ in places}
    put_there = replace(lone, fix=THERE if len(names) > 1 else "", change="", put=True)
    again = _tried(scene, put_there, put(scene.model, scene, places), names)
    return again if again.restored else tried


def _tried(
    scene: Scene, cause: Cause, changed: AbstractContextManager[Model], but: Collection[str]
) -> Cause:
    try:
        with changed as model:
            healed, back = scene.difference.healed, scene.difference.back
            again = scene.comparison.again(model, healed, but, back)
    except (RuntimeError, ZooError):
        return cause
    if again.first is None:
        return replace(cause, tried=True, restored=True)
    if scene.later(again):
        return replace(cause, tried=True, after=str(again.first.measurement))
    return cause
