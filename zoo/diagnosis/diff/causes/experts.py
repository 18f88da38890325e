"""Mixture of experts: how many experts a token uses, their shares, and gate against up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.components.moe import Experts
from zoo.diagnosis.diff.causes.scene import Scene, first
from zoo.diagnosis.edits import Hypothesis, stars

SHARES: dict[str, Callable[[Tensor], Tensor]] = {
    "are made to sum to one": lambda s: s / s.sum(-1, keepdim=True),
    "are the router's own": lambda s: s,
    "are all alike": lambda s: torch.ones_like(s) / s.shape[-1],
}


@dataclass(frozen=True)
class Mixed:
    """A mixture that fits: experts for each token, their shares, and what is activated."""

    chosen: int
    shares: str
    on: str  # what the activation is of


def ideas(scene: Scene) -> Iterator[Hypothesis]:
    """Each side is a known mixture of the same experts, or there is no idea."""
    module, name = scene.module, scene.name
    source = scene.flow_at(name, "in") or scene.flow_at(f"{name}.router", "in")
    if not isinstance(module, Experts) or source is None or source.ours is None:
        return
    if scene.flow.ours is None or scene.flow.theirs is None:
        return
    ours, theirs = (
        first(_mixtures(module, source.ours), y) for y in (scene.flow.ours, scene.flow.theirs)
    )
    if ours is None or theirs is None:
        return
    name = stars(name)
    if ours.chosen != theirs.chosen:
        what = f"{name}: {ours.chosen} experts are chosen here, and {theirs.chosen} there"
        settings = {n: {"experts_per_token": theirs.chosen} for n in scene.alike()}
        config = {"experts_per_token": theirs.chosen} if scene.steady else {}
        fix = f"experts_per_token is {theirs.chosen}"
        yield Hypothesis(what, fix, config=config, settings={} if config else settings)
    if ours.shares != theirs.shares:
        yield Hypothesis(
            f"{name}: shares of the chosen {ours.shares} here, and {theirs.shares} there"
        )
    if ours.on != theirs.on:
        yield Hypothesis(
            f"{name}: the activation is on {ours.on} here, and on {theirs.on} there: "
            "gate and up are exchanged"
        )


def _mixtures(module: Experts, x: Tensor) -> Iterator[tuple[Mixed, Tensor]]:
    """Every number of experts, with each kind of shares, and either order of gate and up."""
    # (experts, tokens, hidden), and their outputs for either order
    gate, up = (torch.einsum("td,xfd->xtf", x, w) for w in (module.gate, module.up))
    made = {
        on: torch.einsum("xtf,xdf->txd", module.act(a) * b, module.down)
        for on, a, b in (("gate", gate, up), ("up", up, gate))
    }
    scores = module.router(x).softmax(-1)
    for chosen in (module.experts_per_token, *range(1, module.experts + 1)):
        top, index = scores.topk(chosen, -1)
        for shares, share in SHARES.items():
            weights = torch.zeros_like(scores).scatter(-1, index, share(top))
            for on, outs in made.items():
                yield Mixed(chosen, shares, on), torch.einsum("tx,txd->td", weights, outs)
