"""What goes into a norm or a branch: which outputs each model added up before it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from zoo.components.activations import ACTIVATIONS
from zoo.diagnosis.diff.causes.scene import FITS, Scene, first, fits
from zoo.diagnosis.diff.matching import Match
from zoo.diagnosis.diff.residual_sums import Sum, summed
from zoo.diagnosis.edits import Hypothesis, block_of, stars


def ideas(scene: Scene) -> Iterator[Hypothesis]:
    """Explain what goes into a norm or a branch by what each model added up."""
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
    if other is None:
        return None
    plain = torch.stack([w * outs[n] for n, w in other.parts.items()]).sum(0)
    if (how := first(_ways(scene, outs, plain, other), value)) is not None:
        return how
    ratio = value / plain
    kept = ratio[(ratio != 0) & plain.abs().gt(1e-6)]
    dropped = 0 < len(kept) < 0.99 * ratio.numel()
    if dropped and bool((kept - kept[0]).abs().max() < 1e-6):
        return "some of it is zero: dropout is active"
    return None


def _ways(
    scene: Scene, outs: dict[str, Tensor], plain: Tensor, other: Sum
) -> Iterator[tuple[str, Tensor]]:
    """What may be done to a sum: it or a part through a norm of the block, an activation, moved."""
    yield "it is centered: its mean is taken away", plain - plain.mean(-1, keepdim=True)
    for norm, module in scene.fresh.named_modules():
        inside = block_of(norm) == block_of(scene.name)
        if inside and len(getattr(module, "weight", plain).shape) == 1:
            yield f"it goes through {norm}", module(plain)
            for name in other.parts:
                how = f"{name} goes through {norm} on its way: the norm is moved"
                yield how, plain - outs[name] + module(outs[name])
    for act, function in ACTIVATIONS.items():
        if act != "linear":
            yield f"it goes through {act}", function(plain)
    if rows := scene.rows(plain):
        for by in (1, -1):
            yield "it is moved by a place", torch.cat([row.roll(by, 0) for row in rows])


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
        if any(len(row) < 2 for row in rows):
            continue
        places = {"first": 0, "last": -1, "second": 1, "last but one": -2}
        picked = [(which, torch.stack([row[n] for row in rows])) for which, n in places.items()]
        positions = [first(picked, y) for y in (ours, theirs)]
        if positions[0] != positions[1]:
            here, there = (w or "another" for w in positions)
            yield Hypothesis(
                f"what goes into {scene.name}: the {here} token of {name} here, the {there} there"
            )
            return


# --- modules in each other's place ---------------------------------------------------------------


def _order(scene: Scene) -> Iterator[Hypothesis]:
    """Modules that run in one of the two models alone, or another number of times."""
    here = {name for name, _ in scene.model.named_modules()}
    record, matches = scene.comparison.theirs()[0].records[0], scene.matching.matches.values()
    there = [match.native for match in matches if any(record[name] for name in match.others)]
    missing = [*scene.difference.idle, *(name for name in there if name not in here)]
    for name in dict.fromkeys(_whole(scene, missing, name) for name in missing):
        yield Hypothesis(f"{name} does not run here, and does in the other model")
    idle = [n for n, match in scene.matching.matches.items() if _runs_here_alone(scene, match)]
    for name in dict.fromkeys(_whole(scene, idle, name) for name in idle):
        yield Hypothesis(f"{name} runs here, and not in the other model")
    if scene.flow.theirs is None:
        yield from _times_run(scene)


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
