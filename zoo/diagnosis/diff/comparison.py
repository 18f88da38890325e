"""Where two models part: the first module, in the order of execution, that leaves the noise.

Both run on the same tokens; what goes into and comes out of each module that holds parameters is
compared with what flows through the one of the other model that holds the same numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from zoo.components.model import Model
from zoo.diagnosis.diff.difference import EXACT, Difference, Measurement, measured
from zoo.diagnosis.diff.flows import (
    Flow,
    Heard,
    Place,
    Rows,
    Way,
    flows,
    learnt,
    listen,
    outputs_of,
    pulled,
)
from zoo.diagnosis.diff.hooks import SIDES, Record, Side
from zoo.diagnosis.diff.matching import Match, Matching
from zoo.diagnosis.diff.residual_sums import summed
from zoo.diagnosis.diff.sides import Other
from zoo.parity.checks import call, rms

SHAKEN = 4  # runs of the other model that tell how far rounding goes where a gradient has steps
NEAR = 4  # times the limit: what is so little above it may be noise
AFTER = 12  # places are looked at for what becomes of a factor


@dataclass
class Comparison:
    """A native model and another one, run on the same tokens in the same way."""

    matching: Matching
    other: Other
    way: Way
    dtype: torch.dtype  # the model's
    flows: dict[Place, Flow] = field(default_factory=dict)  # of the last run
    _here: Heard | None = None  # likewise
    _there: dict[bool, list[Heard]] = field(default_factory=dict)  # it stays what it is

    @property
    def heard(self) -> Record:
        """What flowed through the native model in the last run, in its last part."""
        return {} if self._here is None else self._here.records[-1]

    def again(
        self, model: Model, healed: Collection[Place], but: Collection[str], back: bool = False
    ) -> Difference:
        """Another native model in the place of this one, but for what some of its modules hold."""
        again = replace(self, matching=self.matching.of(model), flows={})
        difference = again._run(back)
        difference.readings = [r for r in difference.readings if r.match.native not in but]
        difference.healed |= set(healed)
        if not back:
            again._heal(difference)
        return difference

    def theirs(self, back: bool = False) -> list[Heard]:
        """The other model, and after it the same in a narrower dtype where there is one."""
        if back not in self._there:
            sides = [self.other] + ([] if self.other.narrow is None else [self.other.narrow])
            self._there[back] = [self._listened(side, back) for side in sides]
        return self._there[back]

    def _listened(self, side: Other, back: bool) -> Heard:
        turns = [partial(side, row) for row in self.way.other()]
        return listen(side.module, self._heeded, turns, pulled if back else None)

    @property
    def _heeded(self) -> list[str]:
        """The other model's modules that are compared."""
        matches = self.matching.matches.values()
        return list(dict.fromkeys(name for match in matches for name in match.others))

    def run(self, back: bool = False) -> Difference:
        """Gradients are taken where all values agree: else the first that does not is told."""
        difference = self._run(back=False)
        self._heal(difference)
        if not back or not difference.ok:
            return difference
        healed, difference = difference.healed, self._run(back=True)
        difference.healed |= healed
        for seed in range(SHAKEN if self.other.narrow is not None and not difference.ok else 0):
            measured = self._run(back=True, shaken=seed).readings
            difference.readings = [
                replace(r, limit=max(r.limit, other.limit))
                for r, other in zip(difference.readings, measured, strict=True)
            ]
        return difference

    def _shaken(self, seed: int) -> Heard:
        """The other model in the narrower dtype, every output off by a rounding.

        Where a gradient has a step (relu's) or a choice (of experts), rounding decides on which
        side of it a number lies, and one run does not tell how far that goes.
        """
        narrow = self.other.narrow
        assert narrow is not None
        random = torch.Generator().manual_seed(seed)

        def shake(_: nn.Module, args: Any, out: Any) -> Any:
            x = out if isinstance(out, Tensor) else out[0]
            by = torch.finfo(x.dtype).eps * (torch.rand(x.shape, generator=random) - 0.5)
            x = x + (x.detach() * by).to(x.dtype)
            return x if isinstance(out, Tensor) else (x, *out[1:])

        modules = dict(narrow.module.named_modules())
        with ExitStack() as stack:
            for name in self._heeded:
                stack.enter_context(modules[name].register_forward_hook(shake))
            return self._listened(narrow, back=True)

    def _run(self, back: bool, shaken: int | None = None) -> Difference:
        matches, way = self.matching.matches, self.way
        there, *below = self.theirs(back)
        if shaken is not None:
            below = [self._shaken(shaken)]
        here = self._ours((lambda parts: pulled(way.by_row(parts))) if back else None)
        self._here = here
        narrow = below[0] if below else Heard([], [])
        flowing = flows(self.matching, way, here.records, there.records, narrow.records, back)
        if not back:
            flowing += outputs_of(way.by_row(here.outputs), there.outputs, narrow.outputs)
        else:
            flowing += learnt(self.matching, here.gradients, there.gradients, narrow.gradients)
        self.flows = {f.place: f for f in flowing}
        return Difference(
            (self.matching.model.architecture, self.other.name),
            way.name,
            self.dtype,
            back,
            [measured(flow, self.dtype) for flow in flowing],
            _idle(matches.values(), here.records[0], there.records[0]),
            _untied(self.matching),
            set(),
        )

    def _ours(self, pull: Callable[[Rows], Tensor] | None = None) -> Heard:
        model = self.matching.model
        names = [name for name, _ in model.named_modules() if name in self.matching.matches]
        turns = [partial(call, model, inputs, **more) for inputs, more in self.way.native()]
        return listen(model, names, turns, pull)

    def _heal(self, difference: Difference) -> None:
        """Leave out what differs where all that is made of it agrees."""
        in_full: set[Place] | None = None
        while (first := difference.first) is not None:
            place = first.measurement.place
            later = difference.readings[difference.readings.index(first.measurement) + 1 :]
            if not any(r.ok for r in later) and not self._multiple(place):
                return
            after = self._reached_by(*place) & {r.place for r in difference.readings}
            reached = [r for r in difference.readings if r.place in after]
            if not reached or not (reached[0].ok or self._made_up_for(place, reached)):
                return
            # what is lost in the noise of a narrower dtype is lost; what is lost, in float64 too
            if (
                first.measurement.error > NEAR * first.measurement.limit
                and self.dtype != torch.float64
            ):
                in_full = self._healed_in_full() if in_full is None else in_full
                if place not in in_full:
                    return
            difference.healed.add(place)

    def _healed_in_full(self) -> set[Place]:
        """What makes no difference where nothing is rounded."""
        model = self.matching.model
        wide = copy.deepcopy(model, {id(model.provenance): model.provenance}).to(torch.float64)
        other, there = replace(self.other, narrow=None), {False: self.theirs(False)[:1]}
        matching = self.matching.of(wide)
        return Comparison(matching, other, self.way, torch.float64, _there=there).run().healed

    def _multiple(self, place: Place) -> float | None:
        """How many times ours what the other has at a place is; None where it is no multiple."""
        flow = self.flows[place]
        if flow.side == "in" or not flow.comparable:
            return None
        ours, theirs = flow.ours.double(), flow.theirs.double()  # type: ignore[union-attr]
        factor = float((ours * theirs).sum() / ours.square().sum())
        return factor if (ours * factor - theirs).abs().max() <= EXACT * rms(theirs) else None

    def _made_up_for(self, place: Place, after: Sequence[Measurement]) -> bool:
        """A factor that is applied there at once, and here on the way to what it is summed into."""
        factor = self._multiple(place)
        if factor is None:
            return False
        inward = [self.flows[r.place] for r in after if r.side == "in"]
        for later in (f for f in inward[:AFTER] if f.ours is not None):
            outs = {
                str(at): f.ours
                for at, f in self.flows.items()
                if f.side == "out" and f.at < later.at and f.ours is not None
                if f.ours.shape == later.ours.shape  # type: ignore[union-attr]
            }
            total = summed(outs, later.ours)  # type: ignore[arg-type]
            if total and math.isclose(total.parts.get(str(place), 0), factor, rel_tol=1e-5):
                return True
        return False

    def _reached_by(self, name: str, side: Side, number: int) -> set[Place]:
        """Every place whose values follow from those at this one: found by changing these."""
        if not name:
            return set()
        calls = count()

        def change(x: Any) -> Any:
            if next(calls) != number:
                return None
            first = x[0] if isinstance(x, tuple) else x
            other = first * 1.5 + 0.5 if first.is_floating_point() else first
            return (other, *x[1:]) if isinstance(x, tuple) else other

        before, module = self._here or self._ours(), self.matching.model.get_submodule(name)
        if side == "in":
            handle = module.register_forward_pre_hook(lambda _, args: change(args))
        else:
            handle = module.register_forward_hook(lambda _, args, out: change(out))
        with handle:
            after = self._ours()
        places: set[Place] = {
            (each, at, k)
            for old, new in zip(before.records, after.records, strict=True)
            for each in old
            for k, (a, b) in enumerate(zip(old[each], new[each], strict=True))
            for at in SIDES
            if not torch.equal(a.values[at], b.values[at])
        }
        return places - {(name, side, number)}


def _idle(matches: Collection[Match], ours: Record, theirs: Record) -> list[str]:
    return [
        match.native
        for match in matches
        if match.plain and not ours.get(match.native) and any(theirs[n] for n in match.others)
    ]


def _untied(matching: Matching) -> list[tuple[str, str]]:
    """Names that should share an array and have one each."""
    parameters = dict(matching.model.named_parameters(remove_duplicate=False))
    ties = matching.plan.native.ties.items()
    return [(a, b) for a, b in ties if a in parameters and parameters[a] is not parameters.get(b)]
