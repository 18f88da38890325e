"""What goes into `down` of an MLP: gate, up and the activation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zoo.components.activations import ACTIVATIONS
from zoo.diagnosis.diff.causes.scene import Scene, best
from zoo.diagnosis.edits import Hypothesis, stars

PLAIN = "linear"  # the activation that is none


@dataclass(frozen=True)
class Made:
    """A function of gate and up that fits: the activation, and what it is applied to."""

    act: str
    of: str  # what it is applied to


def ideas(scene: Scene) -> Iterator[Hypothesis]:
    """Each side is a known function of `gate` and `up`, or there is no idea."""
    name = scene.name.rpartition(".")[0]
    gate, up = (scene.flow_at(f"{name}.{part}") for part in ("gate", "up"))
    if up is None or scene.flow.ours is None or scene.flow.theirs is None:
        return
    parts: dict[str, Any] = {"up": up.ours} | ({} if gate is None else {"gate": gate.ours})
    with torch.no_grad():
        ours, theirs = (best(_forms(scene, parts), x) for x in (scene.flow.ours, scene.flow.theirs))
    if theirs is None or ours is None or ours == theirs:
        return
    here = [n.rpartition(".")[0] for n in scene.alike()]
    if PLAIN in (ours.act, theirs.act) and {ours.of, theirs.of} == {"gate", "up"}:
        # a product without any is the same whichever it is on
        ours, theirs = (replace(x, of="gate") for x in (ours, theirs))
    if {ours.of, theirs.of} == {"gate", "up"}:
        what = f"{stars(name)}: the other model's activation is on {theirs.of}, here on {ours.of}"
        yield Hypothesis(what)
    elif ours.of != theirs.of:
        yield Hypothesis(
            f"{stars(name)}: the activation is taken of {ours.of} here, and of {theirs.of} there"
        )
    else:
        what = f"{stars(name)}: the activation is {ours.act} here and {theirs.act} there"
        configured = ACTIVATIONS.get(getattr(scene.model.config, "act", ""))
        if scene.steady and configured is ACTIVATIONS.get(ours.act, ""):
            yield Hypothesis(what, f"act is {theirs.act}", config={"act": theirs.act})
        elif theirs.act in ACTIVATIONS:
            settings = {one: {"act": ACTIVATIONS[theirs.act]} for one in here}
            yield Hypothesis(what, f"{stars(name)} takes {theirs.act}", settings=settings)
        else:
            yield Hypothesis(what)


def _forms(scene: Scene, parts: dict[str, Tensor]) -> Iterator[tuple[Made, Tensor]]:
    """Each known activation, of each of the parts."""
    configured = getattr(scene.model.config, "act", "")
    acts = {a: f for a, f in ACTIVATIONS.items() if a == configured} | ACTIVATIONS
    own = getattr(scene.fresh.get_submodule(scene.name.rpartition(".")[0]), "act", None)
    if own is not None and own not in ACTIVATIONS.values():
        acts["the class's own"] = own
    up, gate = parts["up"], parts.get("gate")
    for name, act in acts.items():
        if gate is None:
            yield Made(name, "up"), act(up)
            continue
        yield Made(name, "gate"), act(gate) * up
        yield Made(name, "up"), act(up) * gate
        yield Made(name, "the product of gate and up"), act(gate * up)
        yield Made(name, "gate, and up is added"), act(gate) + up
        yield Made(name, "up, and gate is added"), act(up) + gate
        yield Made(name, "gate, and up is not used"), act(gate)
        yield Made(name, "up, and gate is not used"), act(up)
