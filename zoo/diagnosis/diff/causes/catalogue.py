"""Faults of the catalogue: what undoes each is tried where two models first differ."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch

from zoo.diagnosis.diff.causes.scene import Scene
from zoo.diagnosis.edits import Hypothesis, applied, block_of
from zoo.diagnosis.faults import FAULTS


def ideas(scene: Scene) -> Iterator[Hypothesis]:
    """Edits of parameters that make the two models agree at the place, in all layers or in one."""
    modules = _modules(scene)
    for every in scene.hypotheses:
        # numbers that are what the rules make of the other's are read wrong, or they are right
        if FAULTS[every.fault].kind != "mapping" and not _is_wrong(scene, every):
            continue
        if not any(name.rpartition(".")[0] in modules for name in every.parameters):
            continue
        alone = [each for leaf in ("weight", "bias") if (each := every.only(leaf)) is not None]
        for hypothesis in (every, *(alone if every.rows else ())):
            if not _mends(scene, hypothesis):
                continue
            yield from wider(scene, hypothesis)
            if (one := hypothesis.within(block_of(scene.name))) is not None:
                yield at_place(scene, one)


def _is_wrong(scene: Scene, hypothesis: Hypothesis) -> bool:
    """Whether one of its parameters is not what the rules make of the other model's."""
    expected = ((scene.parameters[n], scene.matching.expected(n)) for n in hypothesis.parameters)
    return any(x is not None and not torch.equal(own.to(x.dtype), x) for own, x in expected)


def _mends(scene: Scene, hypothesis: Hypothesis) -> bool:
    """Whether the models agree at the place; where it is not compared then, in the whole stack."""
    edited = replace(hypothesis, moved=True)
    if scene.side == "out" or scene.name not in edited.touched:
        return scene.error_with(hypothesis) <= scene.measurement.limit
    with applied(scene.model, hypothesis) as model:
        again = scene.comparison.again(model, scene.difference.healed, edited.touched)
    if again.first is None:
        return True
    stacks = [n.split(".")[0] for n in (scene.name, again.first.measurement.match.native)]
    return stacks == ["encoder", "decoder"]


def wider(scene: Scene, hypothesis: Hypothesis) -> Iterator[Hypothesis]:
    """An edit of one kind of module, and of every stack in which the same can be done."""
    yield at_place(scene, hypothesis)

    def bare(text: str) -> str:
        return re.sub(r"\b(encoder|decoder)\.|\bcross\b|\battn\b", "", text)

    same = [each for each in scene.hypotheses if bare(each.what) == bare(hypothesis.what)]
    if len(same) > 1:
        parameters = {n: make for each in same for n, make in each.parameters.items()}
        what = f"{hypothesis.what}, and likewise in each stack"
        fix = f"{hypothesis.fix}, and likewise in each stack"
        yield at_place(scene, replace(hypothesis, what=what, fix=fix, parameters=parameters))


def at_place(scene: Scene, hypothesis: Hypothesis) -> Hypothesis:
    """The rules to change are those of the place's own block; what is edited is not compared."""
    block = block_of(scene.name)
    where = tuple(n for n in hypothesis.parameters if n.startswith(f"{block}."))
    return replace(hypothesis, where=where or tuple(hypothesis.parameters), moved=True)


def _modules(scene: Scene) -> set[str]:
    """Modules at the place or beside it, the block's norms, and what is not compared."""
    beside, block = scene.name.rpartition(".")[0], block_of(scene.name)
    matches, shapes = scene.matching.matches, scene.matching.plan.native.shapes
    near = {n for n in matches if beside and n.rpartition(".")[0] == beside}
    near |= {n for n in matches if block_of(n) == block and len(shapes.get(f"{n}.weight", ())) == 1}
    split = {n for n, match in matches.items() if not match.whole}
    return {scene.name, *near, *split, *scene.unseen}
