"""Causes that need another run of the model: dropout, padding, outputs in another order."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations

import torch
from torch import Tensor, nn

from zoo.components.activations import ACTIVATIONS
from zoo.diagnosis.diff.causes.scene import Scene, error, first, fits
from zoo.diagnosis.edits import Hypothesis, stars
from zoo.parity.checks import call, real

NARROW = (torch.bfloat16, torch.float16, torch.float32)


def restless(scene: Scene) -> Iterator[Hypothesis]:
    """Two runs of the native model that are not the same."""
    again = scene.error_of(scene.model)
    if abs(again - scene.measurement.error) > 1e-6 * scene.measurement.error:
        training = [n for n, m in scene.model.named_modules() if m.training and n]
        which = f", such as {training[0]}" if training else ""
        yield Hypothesis(
            f"two runs of this model differ: dropout is active{which}",
            "the model is put to eval()",
            settings={name: {"training": False} for name in training},
        )


def padding(scene: Scene) -> Iterator[Hypothesis]:
    """Other tokens where padding stands must change nothing."""
    inputs = scene.comparison.way.inputs
    if scene.comparison.way.name != "padded" or inputs.mask is None:
        return
    vocab = scene.model.config.vocab
    for what, question in (
        ("padding", inputs),
        ("the padding of what it answers to", inputs.answer),
    ):
        if question is None or question.mask is None:
            continue
        hidden = torch.where(question.mask.bool(), question.ids, (question.ids + 1) % vocab)
        other = replace(question, ids=hidden)
        changed = other if question is inputs else replace(inputs, answer=other)
        with torch.no_grad():
            a, b = (call(scene.model, each) for each in (inputs, changed))
        rows = range(len(inputs.ids))
        if any(
            not torch.equal(real(x, inputs, n), real(y, inputs, n))
            for x, y in zip(a, b, strict=True)
            for n in rows
        ):
            of = (
                "the question's padding"
                if inputs.answer is not None and question is inputs
                else what
            )
            yield Hypothesis(f"{of} is looked at: other tokens there change what real tokens get")
            return


def alone(scene: Scene) -> Iterator[Hypothesis]:
    """Rows that are right by themselves, and not beside padding."""
    way, there = scene.comparison.way, scene.comparison.theirs()[0].outputs
    if way.name != "padded":
        return
    with torch.no_grad():
        rows = [call(scene.model, row) for row in way.other()]
    if all(
        fits(x, y)
        for ours, theirs in zip(rows, there, strict=True)
        for x, y in zip(ours, theirs, strict=True)
    ):
        yield Hypothesis(
            f"padding is read on the way to {scene.name}: a row alone gives what it should"
        )


def whole(scene: Scene) -> Iterator[Hypothesis]:
    """Tokens that are right at once, and not in parts."""
    comparison, way = scene.comparison, scene.comparison.way
    if way.name == "cached":
        at_once = replace(comparison, way=replace(way, name="whole"), flows={}, _there={})
        if at_once.again(scene.model, scene.difference.healed, ()).ok:
            yield Hypothesis(
                f"tokens that come at once get what they should at {scene.name}, and in parts they "
                "do not: what is kept, or where what comes later stands"
            )


def outputs(scene: Scene) -> Iterator[Hypothesis]:
    """The models' own outputs, or what comes out of the last layer on its way to them."""
    if scene.name:
        return
    flows = {place[2]: f for place, f in scene.comparison.flows.items() if not place[0]}
    for k, other in permutations(flows, 2):
        ours, theirs = flows[k].ours, flows[other].theirs
        if ours is not None and theirs is not None and fits(ours, theirs):
            yield Hypothesis(
                f"outputs are exchanged: number {k + 1} here is number {other + 1} there"
            )
            return
    flow = scene.flow
    if flow.ours is None or flow.theirs is None or flow.ours.shape != flow.theirs.shape:
        return
    ratio = (flow.ours * flow.theirs).sum() / flow.theirs.square().sum()
    if fits(flow.ours, flow.theirs * ratio):
        yield Hypothesis(f"outputs are {ratio:.6g} times what they are there")
    for (name, side, _), before in reversed(scene.agreed.items()):
        if side != "out" or before.ours is None or before.ours.numel() != flow.ours.numel():
            continue
        plain = before.ours.reshape(flow.ours.shape)
        here, there = (first(_ways(scene, plain), x) for x in (flow.ours, flow.theirs))
        if here and there and here != there:
            yield Hypothesis(f"what comes out of {name} {here} here, and {there} there")
            return


def _ways(scene: Scene, plain: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What may be done to the last layer's output."""
    yield "is given as it is", plain
    yield from (
        (f"is softly capped at {cap:g}", (plain / cap).tanh() * cap)
        for cap in scene.numbers
        if cap > 1
    )
    for act, function in ACTIVATIONS.items():
        if act != "linear":
            yield f"goes through {act}", function(plain)


def rounding(scene: Scene) -> Iterator[Hypothesis]:
    """What is computed in less than it should be."""
    ours, theirs, source = scene.flow.ours, scene.flow.theirs, scene.flow_at(scene.name, "in")
    where, off = stars(scene.name), scene.measurement.error
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return
    flows = "comes out of" if scene.side == "out" else "goes into"
    for dtype in NARROW:
        if held_in(ours, dtype) and not held_in(theirs, dtype):
            yield Hypothesis(f"what {flows} {where} is rounded to {str(dtype)[6:]} here")
            return
    if scene.side == "out" and source is not None and isinstance(scene.module, nn.Module):
        module = scene.fresh.get_submodule(scene.name)
        for dtype in (torch.float64, *reversed(NARROW)):
            try:
                with torch.no_grad():
                    made = copy.deepcopy(module).to(dtype)(source.ours.to(dtype))  # type: ignore[union-attr]
            except (RuntimeError, TypeError):
                continue
            if not isinstance(made, Tensor) or error(made, ours) > off / 3:
                continue
            if dtype is not torch.float64:  # else the class is so: of its dtype nothing is told
                yield Hypothesis(f"{where} is computed in {str(dtype)[6:]} here")
                return
            break
    if off < 8 * torch.finfo(torch.float32).eps:
        size = "by no more than float32 rounds: something on the way to it is computed in float32"
        yield Hypothesis(f"what {flows} {where} differs {size}")


def held_in(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether all numbers are exact in a dtype."""
    return torch.equal(x.to(dtype).to(x.dtype), x)
