"""A layer whose input agrees and whose output differs: its parameters, or what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.diagnosis.diff.causes import catalogue, parameters, reruns
from zoo.diagnosis.diff.causes.scene import FITS, Scene, best, error, fits
from zoo.diagnosis.diff.residual_sums import summed
from zoo.diagnosis.edits import Hypothesis, block_of, stars

PER_TOKEN = "another number for each token, near these or not"
AFTER = 12  # places are looked at for where a norm has gone


def ideas(scene: Scene) -> Iterator[Hypothesis]:
    """Explain what comes out of a layer whose input agrees."""
    yield from parameters.ideas(scene)
    yield from catalogue.ideas(scene)
    flow = scene.flow
    if flow.theirs is None or flow.ours is None or flow.ours.shape != flow.theirs.shape:
        return
    weight = scene.parameters.get(f"{scene.name}.weight")
    if weight is None:
        weight = scene.matching.expected(f"{scene.name}.weight")
    source = scene.flow_at(scene.name, "in")
    if weight is None:
        return
    yield from _factor(scene)
    if isinstance(scene.module, nn.Embedding):
        yield from _rows(scene, weight)
    elif source is not None and weight.dim() == 1:
        yield from _norm(scene, source.ours, weight)  # type: ignore[arg-type]
    elif source is not None and weight.dim() == 2:
        yield from _product(scene, source.ours, weight)  # type: ignore[arg-type]


# --- what they do --------------------------------------------------------------------------------


def _rows(scene: Scene, table: Tensor) -> Iterator[Hypothesis]:
    """Which rows of a table were looked up."""
    ours, theirs = (_looked_up(table, x) for x in (scene.flow.ours, scene.flow.theirs))
    name = scene.name
    if ours is None or theirs is None:
        return
    by = ours - theirs
    if len(by.unique()) == 1:
        yield Hypothesis(f"{name}: every row that is looked up is off by {int(by[0]):+d}")
    elif len(ours.unique()) == 1:
        yield Hypothesis(
            f"{name}: row {int(ours[0])} is taken everywhere: what says which is ignored"
        )
    elif len(theirs.unique()) == 1:
        reason = "what says which is ignored there"
        yield Hypothesis(
            f"{name}: row {int(theirs[0])} is taken everywhere in the other model: {reason}"
        )
    elif scene.comparison.way.name == "cached" and len(by[by != 0].unique()) == 1:
        first = int((by != 0).nonzero()[0])
        off = f"off by {int(by[first]):+d} in what comes later"
        yield Hypothesis(f"{name}: from place {first} on every row that is looked up is {off}")
    elif scene.comparison.way.name == "padded":
        yield Hypothesis(f"{name}: places count the padding, and there only what is no padding")
    elif bool((by.abs() <= 1).all()) and bool((by != 0).float().mean() > 0.5):
        yield Hypothesis(
            f"{name}: nearly every row that is looked up is off by {int(by.sum().sign()):+d}"
        )
    else:
        yield Hypothesis(
            f"{name}: other rows are looked up, first {int(ours[0])} for {int(theirs[0])}"
        )


def _looked_up(table: Tensor, x: Tensor | None) -> Tensor | None:
    """(tokens,) the rows that these are; None if they are none."""
    if x is None or x.shape[-1] != table.shape[-1]:
        return None
    table, x = table.double(), x.double()
    near = (x @ table.T * 2 - table.square().sum(-1)).argmax(-1)
    return near if fits(table[near], x) else None


def _norm(scene: Scene, x: Tensor, weight: Tensor) -> Iterator[Hypothesis]:
    bias = scene.parameters.get(f"{scene.name}.bias")
    if bias is None and f"{scene.name}.bias" in scene.measurement.match.parameters:
        bias = scene.matching.expected(f"{scene.name}.bias")
    ours, theirs = (
        normed(x, y, weight, bias)  # type: ignore[arg-type]
        for y in (scene.flow.ours, scene.flow.theirs)
    )
    if ours is None or theirs is None or ours == theirs:
        return
    name = stars(scene.name)
    if None in (ours.by, theirs.by):
        where = "here" if ours.by is None else "in the other model"
        moved = _norm_moved(scene) if ours.by is None else None
        yield Hypothesis(
            f"{scene.name}: nothing is normed {where}: the norm is "
            + (f"moved: {moved} goes through it" if moved else "missing")
        )
    elif ours.centered != theirs.centered:
        here = "centered" if ours.centered else "not centered"
        yield Hypothesis(f"{name}: what goes into the norm is {here} here, and not so there")
    elif ours.offset != theirs.offset:
        yield Hypothesis(
            f"{name}: the scale is the weight {ours.offset:+d}, there {theirs.offset:+d}"
        )
    elif ours.by == PER_TOKEN and (rounded := list(reruns.rounding(scene))):
        yield from rounded
    elif ours.by != theirs.by:
        yield Hypothesis(f"{name}: it divides by {ours.by} here, and by {theirs.by} there")
    elif not _close(ours.eps, theirs.eps):
        what = f"{name}: eps is {ours.eps:.3g} here and {theirs.eps:.3g} there"
        config, eps = scene.model.config, _near(scene, theirs.eps)
        fields = [n for n, v in vars(config).items() if "eps" in n and _close(v, ours.eps)]
        if scene.steady and len(fields) == 1:
            yield Hypothesis(what, f"{fields[0]} is {eps:g}", config={fields[0]: eps})
        else:
            settings = {n: {"eps": eps} for n in scene.alike()}
            yield Hypothesis(what, f"eps of {name} is {eps:g}", settings=settings)


def _norm_moved(scene: Scene) -> str | None:
    """The layer whose output goes through this norm instead, on its way to a sum."""
    norm, flows = scene.fresh.get_submodule(scene.name), scene.comparison.flows
    width = scene.flow.ours.shape[-1]  # type: ignore[union-attr]
    outs = {n: f.ours for (n, side, _), f in flows.items() if side == "out" and f.ours is not None}
    later = sorted((f for f in flows.values() if f.at > scene.flow.at), key=lambda f: f.at)
    for flow in [f for f in later if f.side == "in" and f.ours is not None][:AFTER]:
        wanted: Tensor = flow.ours  # type: ignore[assignment]
        parts = {
            n: x
            for n, x in outs.items()
            if x.shape == wanted.shape and flows[n, "out", 0].at < flow.at
        }
        for name, x in parts.items():
            if x.shape[-1] != width or block_of(name) != block_of(scene.name) or name == scene.name:
                continue
            with torch.no_grad():
                normed = norm(x)
            total = summed({**parts, name: normed}, wanted)
            if total is not None and total.parts.get(name) == 1:
                return name
    return None


def _near(scene: Scene, value: float) -> float:
    """The number that a config says, where one is so near."""
    usual = (1e-5, 1e-6, 1e-12, 1e-8)
    return next((n for n in (*scene.numbers, *usual) if _close(n, value)), float(f"{value:.3g}"))


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-3 * abs(b)


@dataclass(frozen=True)
class Normed:
    """What a norm did; `by` None: nothing."""

    by: str | None
    centered: bool = False
    offset: int = 0
    eps: float = 0.0


def normed(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Normed | None:
    """Found from what it was given and gave."""
    x, y = x.double(), y.double()
    return Normed(None) if fits(x, y) else best(_norms(x, y, weight, bias), y, 100 * FITS)


def _norms(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[Normed, Tensor]]:
    """Each norm of x, the likelier ones first; what y was divided by is solved for."""
    shift = 0 if bias is None else bias.double()
    for centered in (True, False):
        z = x - x.mean(-1, keepdim=True) if centered else x
        for offset in (0, 1, -1):
            a = z * (weight.double() + offset)
            # y = a r + shift, so r of each token by least squares
            r = ((y - shift) * a).sum(-1) / a.square().sum(-1)
            for by, eps, made in _divisors(z, r):
                yield Normed(by, centered, offset, eps), a * made[:, None] + shift


def _divisors(z: Tensor, r: Tensor) -> Iterator[tuple[str, float, Tensor]]:
    """What tokens may have been divided by, with the eps that fits; (tokens,) factors of each."""
    square, n = z.square().mean(-1), z.shape[-1]
    kinds = {"the root of the mean square": square, "the root of the summed squares": square * n}
    kinds["the root of the unbiased variance"] = square * n / max(n - 1, 1)
    for by, inside in kinds.items():
        eps = float((r**-2 - inside).median())
        yield f"{by} and eps", eps, torch.rsqrt(inside + eps)
    for by, inside in kinds.items():
        eps = float((1 / r - inside.sqrt()).median())
        yield f"{by}, and eps beside it", eps, 1 / (inside.sqrt() + eps)
    yield PER_TOKEN, 0.0, r


def _product(scene: Scene, x: Tensor, weight: Tensor) -> Iterator[Hypothesis]:
    """A matrix that is what it should be by the rules, and the other multiplies by another."""
    parameters, name = scene.parameters, scene.name
    bias = parameters.get(f"{name}.bias")
    shift = torch.zeros(()) if bias is None else bias
    y: Tensor = scene.flow.theirs  # type: ignore[assignment]
    own = scene.flow.ours - x @ weight.T  # type: ignore[operator]
    for times, often in ((2, "is added twice"), (0, "is not added")):
        if bias is not None and bias.any() and error(own, (times * bias).expand_as(own)) <= FITS:
            yield Hypothesis(f"{stars(name)}.bias {often} here")
    rest = y - x @ weight.T
    if (rest - rest[0]).abs().max() > FITS * y.abs().max():
        return
    if fits(shift.expand_as(rest[0]), rest[0]):
        yield Hypothesis(
            f"{name}: what comes out here is not what its parameters make of what goes in"
        )
    else:
        yield Hypothesis(f"{name}.bias: what is added is another vector there than here")


def _factor(scene: Scene) -> Iterator[Hypothesis]:
    ours, theirs = scene.flow.ours, scene.flow.theirs
    ratio = float((ours * theirs).sum() / theirs.square().sum())  # type: ignore[operator, union-attr]
    if fits(ours, theirs * ratio):  # type: ignore[arg-type, operator]
        yield Hypothesis(f"what comes out of {scene.name} is {ratio:.6g} times what it is there")
