"""What goes into `down`: what was made of the projections before it, which agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.components.activations import ACTIVATIONS
from zoo.otherwise import stars
from zoo.parity.causes.scene import Idea, Scene, fits

Made = tuple[str, str]  # the activation, and what it is applied to


def ideas(scene: Scene) -> Iterator[Idea]:
    """Each side is a known function of `gate` and `up`, or there is no idea."""
    name = scene.name.rpartition(".")[0]
    gate, up = (scene.known(f"{name}.{part}") for part in ("gate", "up"))
    if up is None or scene.flow.ours is None or scene.flow.theirs is None:
        return
    parts = {"up": up.ours} | ({} if gate is None else {"gate": gate.ours})
    own = _own(scene)
    ours, theirs = (
        _fitted(parts, x, own, getattr(scene.model.config, "act", ""))  # type: ignore[arg-type]
        for x in (scene.flow.ours, scene.flow.theirs)
    )
    if theirs is None or ours is None or ours == theirs:
        return
    here = [n.rpartition(".")[0] for n in scene.alike()]
    if ours[1] != theirs[1]:
        what = f"{stars(name)}: the other model's activation is on {theirs[1]}, here on {ours[1]}"
        held = dict(scene.model.named_parameters())
        exchanged = {
            f"{one}.{a}.{leaf}": held[f"{one}.{b}.{leaf}"].data
            for one in here
            for a, b in (("gate", "up"), ("up", "gate"))
            for leaf in ("weight", "bias")
            if f"{one}.{a}.{leaf}" in held
        }
        where = tuple(n for n in exchanged if n.startswith(f"{name}."))
        if gate is not None and ours[0] == theirs[0]:
            fix = f"{stars(name)}.gate and {stars(name)}.up are exchanged"
            yield Idea(what, fix, parameters=exchanged, where=where, moved=True)
        return
    what = f"{stars(name)}: the activation is {ours[0]} here and {theirs[0]} there"
    config = scene.model.config
    if scene.steady and ACTIVATIONS.get(getattr(config, "act", "")) is ACTIVATIONS.get(ours[0]):
        yield Idea(what, f"act is {theirs[0]}", config={"act": theirs[0]})
    elif theirs[0] in ACTIVATIONS:
        settings = {one: {"act": ACTIVATIONS[theirs[0]]} for one in here}
        yield Idea(what, f"{stars(name)} takes {theirs[0]}", settings=settings)


def _own(scene: Scene) -> Any:
    return getattr(scene.fresh.get_submodule(scene.name.rpartition(".")[0]), "act", None)


def _fitted(parts: dict[str, Tensor], wanted: Tensor, own: Any, said: str) -> Made | None:
    acts = {"as the class has it": own} if own else {}
    names = {a: f for a, f in ACTIVATIONS.items() if a == said} | ACTIVATIONS | acts
    with torch.no_grad():
        for name, act in names.items():
            for on, x in parts.items():
                rest = [y for other, y in parts.items() if other != on]
                made = act(x) if not rest else act(x) * rest[0]
                if fits(made, wanted):
                    return name, on
    return None
