"""What goes into a norm or a branch: which of the outputs before it each model added up."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from zoo.components.activations import ACTIVATIONS
from zoo.diagnosis.diff.causes.scene import FITS, Scene, fits
from zoo.diagnosis.diff.matching import Match
from zoo.diagnosis.diff.residual_sums import Sum, summed
from zoo.diagnosis.edits import Hypothesis, block_of, stars


def ideas(scene: Scene) -> Iterator[Hypothesis]:
    yield from _order(scene)
    flow = scene.flow
    if flow.ours is None or flow.theirs is None or flow.ours.shape != flow.theirs.shape:
        return
    yield from _picked(scene)
    yield from _constant(scene)
    outs = _outputs(scene)
    if not outs:
        return
    ours, theirs = (summed(outs, x) for x in (flow.ours, flow.theirs))
    yield from _explained(scene, outs, ours, theirs)


def _outputs(scene: Scene) -> dict[str, Tensor]:
    """What came before and may be summed, by where it came from."""
    wanted, outputs = scene.flow.ours, dict[str, Tensor]()
    assert wanted is not None
    for (name, side, call), flow in scene.agreed.items():
        x = flow.ours
        again = f", time {call + 1}" if call else ""
        if x is not None and side == "out" and x.shape[-1] == wanted.shape[-1]:
            if len(x) == len(wanted):
                outputs[name + again] = x
            elif len(x) and not len(wanted) % len(x):  # the same for all rows
                outputs[name + again] = x.repeat(len(wanted) // len(x), 1)
    return outputs


def _explained(
    scene: Scene, outs: dict[str, Tensor], ours: Sum | None, theirs: Sum | None
) -> Iterator[Hypothesis]:
    place = f"what goes into {scene.name}"
    if ours is not None and theirs is not None:
        names = [n for n in outs if ours.parts.get(n, 0) != theirs.parts.get(n, 0)]
        ratios = {ours.parts.get(n, 0) / theirs.parts[n] for n in names if theirs.parts.get(n)}
        least, most = min(ratios, default=0), max(ratios, default=0)
        if least and len(names) == len(theirs.parts) and math.isclose(least, most, rel_tol=1e-6):
            what = f"{place} is {least:.6g} times what it is there"
            yield _weighed(scene, what, dict.fromkeys(names, 1 / least))
            return
        counts = (
            f"{n} is in it {_times(ours.parts.get(n, 0))} here "
            f"and {_times(theirs.parts.get(n, 0))} there"
            for n in names
        )
        what = f"{place}: {', '.join(counts)}"
        if all(ours.parts.get(n) and theirs.parts.get(n) for n in names):
            by = {n: theirs.parts[n] / ours.parts[n] for n in names}
            yield _weighed(scene, what, {n: by[n] for n in names if ", time" not in n})
        yield Hypothesis(what)
        return
    for side, value, other in (
        ("here", scene.flow.ours, theirs),
        ("there", scene.flow.theirs, ours),
    ):
        assert value is not None
        if (how := _bent(scene, outs, value, other)) is not None:
            yield Hypothesis(f"{place}: {how} {side}, and not in the other model")
    if ours is not None:
        yield Hypothesis(f"{place} is {ours} here, and there it is no sum of what came before")
    if theirs is not None:
        yield Hypothesis(f"{place} is {theirs} there, and here it is no sum of what came before")


def _weighed(scene: Scene, what: str, factors: Mapping[str, float]) -> Hypothesis:
    """What is added up, each in its part; in every layer alike."""
    weights = ", ".join(
        f"{stars(name)} counts {by:.6g} times as much" for name, by in factors.items()
    )
    every = {each: by for name, by in factors.items() for each in scene.alike(name)}
    return Hypothesis(what, weights, factors=every)


def _times(weight: float) -> str:
    whole = int(weight) if weight == int(weight) else -1
    return {0: "not at all", 1: "once", 2: "twice"}.get(whole, f"{weight:.6g} times")


def _bent(scene: Scene, outs: dict[str, Tensor], value: Tensor, other: Sum | None) -> str | None:
    """What was done to a sum on its way."""
    if other is not None:
        plain = torch.stack([w * outs[n] for n, w in other.parts.items()]).sum(0)
        if fits(plain - plain.mean(-1, keepdim=True), value):
            return "it is centered: its mean is taken away"
        if (how := _normed(scene, outs, value, other)) is not None:
            return how
        for act, function in ACTIVATIONS.items():
            if act != "linear" and fits(function(plain), value):
                return f"it goes through {act}"
        rows = scene.rows(plain)
        for by in (1, -1):
            if rows and fits(torch.cat([row.roll(by, 0) for row in rows]), value):
                return "it is moved by a place"
        ratio = value / plain
        kept = ratio[(ratio != 0) & plain.abs().gt(1e-6)]
        if (
            len(kept) < 0.99 * ratio.numel()
            and len(kept)
            and bool((kept - kept[0]).abs().max() < 1e-6)
        ):
            return "some of it is zero: dropout is active"
    return None


def _normed(scene: Scene, outs: dict[str, Tensor], value: Tensor, other: Sum) -> str | None:
    """A norm of the same block that one of the parts, or all of it, went through."""
    plain = torch.stack([w * outs[n] for n, w in other.parts.items()]).sum(0)
    norms = {
        name: module
        for name, module in scene.fresh.named_modules()
        if block_of(name) == block_of(scene.name)
        and len(getattr(module, "weight", plain).shape) == 1
    }
    with torch.no_grad():
        for norm, module in norms.items():
            if fits(module(plain), value):
                return f"it goes through {norm}"
            for name in other.parts:
                if fits(plain - outs[name] + module(outs[name]), value):
                    return f"{name} goes through {norm} on its way: the norm is moved"
    return None


def _constant(scene: Scene) -> Iterator[Hypothesis]:
    """A vector that is added to every token on one side alone: a bias, or two of them."""
    flow = scene.flow
    delta = (flow.ours - flow.theirs).double()  # type: ignore[operator]
    if (delta - delta[0]).abs().max() > FITS * flow.theirs.abs().max():  # type: ignore[union-attr]
        return
    own = {n: p.data.double() for n, p in scene.model.named_parameters()}
    biases = {n: b for n, b in own.items() if n.endswith("bias") and b.shape == delta[0].shape}
    for name, bias in biases.items():
        for sign, side in ((1, "here"), (-1, "there")):
            if fits(sign * bias, delta[0]):
                yield Hypothesis(f"{name} is added {side} alone")


def _picked(scene: Scene) -> Iterator[Hypothesis]:
    """One place of each row, and which."""
    ours, theirs = scene.flow.ours, scene.flow.theirs
    assert ours is not None and theirs is not None
    for (name, side, _), flow in reversed(scene.agreed.items()):
        x = flow.ours
        if side != "out" or x is None or x.shape[-1] != ours.shape[-1] or len(x) <= len(ours):
            continue
        rows = scene.rows(x)
        if rows is None or len(rows) != len(ours):
            continue
        places = {"first": 0, "last": -1, "second": 1, "last but one": -2}
        positions = [
            next((w for w, n in places.items() if fits(torch.stack([r[n] for r in rows]), y)), None)
            for y in (ours, theirs)
            if all(len(r) > 1 for r in rows)
        ]
        if len(positions) == 2 and positions[0] != positions[1]:
            here, there = (w or "another" for w in positions)
            yield Hypothesis(
                f"what goes into {scene.name}: the {here} token of {name} here, the {there} there"
            )
            return


# --- modules in each other's place ---------------------------------------------------------------


def _order(scene: Scene) -> Iterator[Hypothesis]:
    """The other model runs what should be the same modules in another order."""
    ours, theirs = _sequence(scene)
    there = {name for name, _ in scene.model.named_modules()}
    missing = [*scene.difference.idle, *(name for name in theirs if name not in there)]
    for name in dict.fromkeys(_whole(scene, missing, name) for name in missing):
        yield Hypothesis(f"{name} does not run here, and does in the other model")
    idle = [n for n, match in scene.matching.matches.items() if _runs_here_alone(scene, match)]
    for name in dict.fromkeys(_whole(scene, idle, name) for name in idle):
        yield Hypothesis(f"{name} runs here, and not in the other model")
    if scene.flow.theirs is None:
        yield from _times_run(scene)
    a, b = _blocks(ours), _blocks(theirs)
    moved = {x: y for x, y in zip(a, b, strict=False) if x != y}
    if not moved or sorted(a) != sorted(b) or any(stars(x) != stars(y) for x, y in moved.items()):
        return
    own = dict(scene.model.named_parameters())
    made = {
        name: own[to + name[len(block) :]].data
        for block, to in moved.items()
        for name in own
        if name.startswith(f"{block}.") and to + name[len(block) :] in own
    }
    if all(made[n].shape == own[n].shape for n in made):
        fix = ", ".join(f"{x} is read as {y}" for x, y in moved.items())
        what = "layers are in each other's place: the other model runs them in another order"
        yield Hypothesis(what, fix, parameters=made, where=_first(made), moved=True)


def _runs_here_alone(scene: Scene, match: Match) -> bool:
    there = scene.comparison.theirs()[0].records[0]
    runs = bool(scene.comparison.heard.get(match.native))
    return match.plain and runs and not any(there[name] for name in match.others)


def _whole(scene: Scene, missing: Collection[str], name: str) -> str:
    """A layer, if none of it runs; else the module in every layer that has it."""
    block = block_of(name)
    inside = [n for n in scene.matching.matches if n.startswith(f"{block}.")]
    return block if inside and all(n in missing for n in inside) else stars(name)


def _times_run(scene: Scene) -> Iterator[Hypothesis]:
    record = scene.comparison.theirs()[0].records[0]
    here = sum(name == scene.name and side == "in" for name, side, _ in scene.comparison.flows)
    there = sum(len(record[name]) for name in scene.measurement.match.others[:1])
    if here != there and here and there:
        block = block_of(scene.name)
        most = [k for n, _, k in scene.comparison.flows if n.startswith(f"{block}.attn.")]
        name = block if here == 1 + max(most, default=0) else stars(scene.name)
        yield Hypothesis(f"{name} runs {_often(here)} here and {_often(there)} in the other model")


def _often(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _first(parameters: dict[str, Tensor]) -> tuple[str, ...]:
    """One of each kind."""
    kinds = dict[str, str]()
    for name in parameters:
        kinds.setdefault(stars(name), name)
    return tuple(kinds.values())


def _sequence(scene: Scene) -> tuple[list[str], list[str]]:
    """The native names of matched modules, as each model ran them the first time."""
    ours = sorted(
        (f.at, name)
        for (name, side, call), f in scene.comparison.flows.items()
        if not call and name
    )
    record = scene.comparison.theirs()[0].records[0]
    begun = [
        (min(one.begun for n in match.others for one in record[n]), match.native)
        for match in scene.matching.matches.values()
        if any(record[n] for n in match.others)
    ]
    return list(dict.fromkeys(n for _, n in ours)), [n for _, n in sorted(begun)]


def _blocks(names: list[str]) -> list[str]:
    return list(dict.fromkeys(b for n in names if (b := block_of(n)) != n))
