"""Where two models part: the first module, in the order of execution, that leaves the noise.

Both run on the same tokens; what goes into and comes out of each module that holds parameters is
compared with what flows through the one of the other model that holds the same numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.components.cache import Cache
from zoo.components.model import Model
from zoo.parity.compare import SYMMETRIC, call, part, real, rms
from zoo.parity.matching import Match, Matching
from zoo.parity.sides import Other
from zoo.parity.sums import summed
from zoo.parity.taps import SIDES, Call, Record, Side, recorded
from zoo.parity.truth import Inputs
from zoo.terminal import BOLD, GREEN, RED, paint

if TYPE_CHECKING:
    from zoo.parity.diagnosis import Cause

# What a difference may be at most, in units of the truth's root mean square. fp64: sums in two
# orders, which made 1e-13 at most of healthy models. In a narrower dtype, as a multiple of the
# other model's own error there: 1.0 to 1.1 was measured.
EXACT = 1e-10
NOISE = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}
# A parameter's gradient is a sum over tokens, rounded after each row there and once here: 2.5 times
# the other's error was measured in healthy models.
SUMMED = 8.0
SHAKEN = 4  # runs of the other model that tell how far rounding goes where a gradient has steps
NEAR = 4  # times the limit: what is so little above it may be noise
AFTER = 12  # places are looked at for what becomes of a factor
OUTPUT = Match("", ("",), {}, ())

Place = tuple[str, Side, int]  # a native module, a side of it, and which of its calls
Rows = list[list[Tensor]]  # of each row without its padding, every output
# at once, behind a mask, in parts, and with padding tokens that no mask hides
WAYS = ("whole", "padded", "cached", "unmasked")


# --- two models on the same tokens ---------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How the tokens are fed to the native model: at once, padded, or in parts with a cache."""

    name: str  # one of WAYS
    inputs: Inputs

    def native(self) -> list[tuple[Inputs, dict[str, Any]]]:
        """What it is given in turn."""
        if self.name != "cached":
            return [(self.inputs, {})]
        tokens = self.inputs.places.ids.shape[1]
        cut, more = self.cut, {"cache": Cache(tokens)}
        return [(part(self.inputs, *ends), more) for ends in ((0, cut), (cut, tokens))]

    @property
    def cut(self) -> int:
        """How many tokens come first where they come in two parts."""
        return 2 * self.inputs.places.ids.shape[1] // 3

    def other(self) -> list[Inputs]:
        """What the other model is given in turn: a row at a time, and no padding."""
        return [self.inputs.row(n) for n in range(len(self.inputs.ids))]

    def by_row(self, parts: Rows) -> Rows:
        """The native model's outputs, part by part, as the other's come."""
        # what has no places is read at the last one
        whole = [
            torch.cat(xs, dim=1) if xs[0].dim() > 2 else xs[-1] for xs in zip(*parts, strict=True)
        ]
        if self.name == "padded":
            return [[real(x, self.inputs, n) for x in whole] for n in range(len(self.inputs.ids))]
        return [[x[n : n + 1] for x in whole] for n in range(len(self.inputs.ids))]

    def tokens(self, parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor | None:
        """(tokens, features) of those that are no padding: so many a row; None if unknown."""
        batch, total = len(self.inputs.ids), sum(counts)
        if self.name == "padded":
            for inputs in (self.inputs, self.inputs.answer):
                mask = None if inputs is None else inputs.mask
                if mask is None or mask.sum(1).tolist() != list(counts):
                    continue
                if parts[0].numel() == mask.numel() * parts[0].shape[-1]:
                    return parts[0].reshape(*mask.shape, -1)[mask.bool()]
        elif len(parts) > 1 and sum(len(flat(x)) for x in parts) == total:
            whole = [x.reshape(batch, -1, x.shape[-1]) for x in parts]
            return flat(torch.cat(whole, dim=1))
        elif len(parts) > 1 and sum(len(flat(x)) for x in parts) == counts[0]:
            return torch.cat([flat(x) for x in parts])  # one for all rows
        last = flat(parts[-1])
        return last if len(last) in (total, batch, counts[0]) else None


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class Heard:
    """One model run in turns: what flowed through its modules, and its outputs."""

    records: list[Record]
    outputs: Rows
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of parameters


def listen(
    module: nn.Module,
    names: Sequence[str],
    turns: Sequence[Callable[[], list[Tensor]]],
    pull: Callable[[Rows], Tensor] | None = None,
) -> Heard:
    """`pull` makes of all outputs the number whose gradients are taken."""
    records, outputs = list[Record](), Rows()
    with nullcontext() if pull else torch.no_grad():
        for turn in turns:
            with recorded(module, names, backward=pull is not None) as record:
                outputs.append(turn())
            records.append(record)
    if pull is not None:
        pull(outputs).backward()
        named = module.named_parameters(remove_duplicate=False)
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}
        module.zero_grad(set_to_none=True)
        return Heard(records, outputs, gradients)
    return Heard(records, outputs)


def pulled(rows: Rows) -> Tensor:
    """A number that every output has its part in, the same for equal outputs."""
    random = torch.Generator().manual_seed(5)
    draw = partial(torch.randn, generator=random, dtype=torch.float64)
    parts = [(x * draw(x.shape).to(x.dtype)).sum() for row in rows for x in row]
    return torch.stack(parts).sum()


# --- what flows ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flow:
    """What flows at one place through both: (tokens, features), theirs in the order of ours."""

    at: float  # when, in the native model
    match: Match
    side: Side
    call: int  # of how often the module ran
    ours: Tensor | None = None
    theirs: Tensor | None = None
    floor: Tensor | None = None  # theirs in the narrower dtype
    counts: tuple[int, ...] = ()  # tokens of each row there

    @property
    def place(self) -> Place:
        return self.match.native, self.side, self.call

    @property
    def shared(self) -> bool:
        """Whether it is one for all rows."""
        count = None if self.ours is None else len(self.ours)
        return count is not None and count not in (sum(self.counts), len(self.counts))

    @property
    def comparable(self) -> bool:
        there = self.ours is not None and self.theirs is not None
        return there and self.ours.shape == self.theirs.shape  # type: ignore[union-attr]


def flows(
    matching: Matching,
    way: Way,
    ours: Sequence[Record],
    theirs: Sequence[Record],
    floor: Sequence[Record],
    back: bool,
) -> list[Flow]:
    """All that can be compared, in the order in which the native model ran; or its gradients."""
    found: list[Flow] = []
    ran = dict[Place, int]()  # when, forward
    for match in matching.matches.values():
        parts = [record.get(match.native, []) for record in ours]
        looks, count = {one.looked_up for one in parts[0]}, len(parts[0])
        others = [[_of(match, record, looks) for record in records] for records in (theirs, floor)]
        for k, first in enumerate(parts[0]):
            # of an encoder nothing runs in a later part
            mine = [p[k - count] for p in parts if count - k <= len(p)]
            for side in SIDES:
                if (first.looked_up and side == "in") or not (match.whole or side == "in"):
                    continue
                calls = (mine, _kth(others[0], k), _kth(others[1], k))
                here, there, below = (
                    [None if one is None else one.what(side, back) for one in ones]
                    for ones in calls
                )
                if back and all(x is None for x in (*here, *there)):
                    continue
                flow = Flow(first.when(side, back), match, side, k)
                if all(x is not None for x in (*here, *there, *below)):
                    flow = _flow(flow, way, here, there, below, back)
                    if flow.ours is None or (back and flow.shared and not first.looked_up):
                        continue  # rows of a table, of which each takes what it needs
                elif back and not _alike(flow, way, *calls):
                    continue
                if match.plain or flow.comparable:
                    found.append(flow)
                    ran[flow.place] = first.when(side, back=False)
    return sorted(_dated(found, ran) if back else found, key=lambda flow: flow.at)


def _dated(found: list[Flow], ran: Mapping[Place, int]) -> list[Flow]:
    """A gradient that never came stands where it was due: before those of all that ran sooner."""
    came = [(ran[flow.place], flow.at) for flow in found if flow.at]
    found.sort(key=lambda flow: -ran[flow.place])
    due = (min((at for n, at in came if n < ran[f.place]), default=math.inf) - 0.5 for f in found)
    return [f if f.at else replace(f, at=at) for f, at in zip(found, due, strict=True)]


def _alike(flow: Flow, way: Way, *calls: Sequence[Call | None]) -> bool:
    """Whether values can be compared there, where gradients of one side did not come."""
    here, there, below = (
        [one.values[flow.side] for one in ones if one is not None] for ones in calls
    )
    return not (here and there) or _flow(flow, way, here, there, below, False).ours is not None


def _of(match: Match, record: Record, looks: Collection[bool]) -> list[Call]:
    """The other's calls of the same kind: a tied array may be looked up here and multiply there."""
    calls = [one for name in match.others for one in record[name] if one.looked_up in looks]
    return sorted(calls, key=lambda one: one.begun)


def _kth(rows: Sequence[Sequence[Call]], k: int) -> list[Call | None]:
    return [calls[k] if k < len(calls) else None for calls in rows]


def _flow(
    flow: Flow, way: Way, here: list[Any], there: list[Any], below: list[Any], back: bool
) -> Flow:
    order = flow.match.into if flow.side == "in" else flow.match.out
    counts = [len(flat(x)) for x in there]
    ours = way.tokens(here, counts)
    theirs, floor = [flat(x) for x in there], [flat(x) for x in below]
    if len({x.shape[-1] for x in theirs}) > 1:  # tokens are no rows of it
        return flow
    if ours is not None and len(ours) < sum(counts) and way.name == "unmasked":
        return flow  # some token of each row, and which is to be seen by what comes of it
    if ours is not None and len(ours) == len(counts) < sum(counts):  # it reads the last token alone
        theirs, floor = [x[-1:] for x in theirs], [x[-1:] for x in floor]
    elif ours is not None and len(ours) == counts[0] < sum(counts):  # it is the same for all rows
        if back and len(set(counts)) > 1:
            return flow  # of a table each row takes what it needs
        theirs, floor = (
            [torch.stack(xs).sum(0)] if back and xs else xs[:1] for xs in (theirs, floor)
        )
    ordered = [
        torch.cat(xs if order is None else [x[:, order] for x in xs]) if xs else None
        for xs in (theirs, floor)
    ]
    return replace(flow, ours=ours, theirs=ordered[0], floor=ordered[1], counts=tuple(counts))


def _outputs(ours: Rows, theirs: Rows, floor: Rows) -> list[Flow]:
    """The models' own."""
    found = []
    for k in range(max(len(ours[0]), len(theirs[0]))):
        flow = Flow(math.inf, OUTPUT, "out", k)
        if k < len(ours[0]) and k < len(theirs[0]):
            here, there, below = (
                torch.cat([row[k].flatten() for row in rows])[None] if rows else None
                for rows in (ours, theirs, floor)
            )
            flow = replace(flow, ours=here, theirs=there, floor=below)
        found.append(flow)
    return found


def _learnt(
    matching: Matching,
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    floor: Mapping[str, Tensor],
) -> list[Flow]:
    """The gradients of parameters, each once."""
    found, held = [], {n: match.parameters for n, match in matching.matches.items()}
    for name, _ in matching.model.named_parameters():
        expected = matching.expected(name, theirs.__getitem__)
        below = matching.expected(name, floor.__getitem__) if floor else None
        if expected is None or expected.shape != ours[name].shape:
            continue
        others = tuple(held.get(name.rpartition(".")[0], {}).get(name, ()))
        match = Match(name, others, {name: others}, ())
        mine, there, narrow = (
            None if x is None else x.reshape(-1, x.shape[-1]) for x in (ours[name], expected, below)
        )
        found.append(Flow(math.inf, match, "out", 0, mine, there, narrow))
    # what is zero by symmetry holds rounding alone
    sizes = [0.0 if f.theirs is None else float(f.theirs.abs().max()) for f in found]
    least = SYMMETRIC * max(sizes, default=0)
    return [f for f, size in zip(found, sizes, strict=True) if size > least]


# --- where they part -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """A flow, measured: it leaves the noise where `error` is over `limit`."""

    match: Match
    side: Side
    call: int
    error: float
    limit: float
    shapes: tuple[tuple[int, ...], ...] = ()
    why: str = ""  # where no number says it

    @property
    def ok(self) -> bool:
        return self.error <= self.limit

    @property
    def place(self) -> Place:
        return self.match.native, self.side, self.call

    def __str__(self) -> str:
        again = f", time {self.call + 1}" if self.call else ""
        return f"{self.match.native or 'the model'}{again}"

    def to_json(self) -> dict[str, Any]:
        return {
            "module": self.match.native,
            "side": self.side,
            "call": self.call,
            "error": self.error if math.isfinite(self.error) else None,
            "limit": self.limit,
            "shapes": [list(shape) for shape in self.shapes],
            "why": self.why,
        }


def measured(flow: Flow, dtype: torch.dtype) -> Reading:
    ours, theirs = flow.ours, flow.theirs
    reading = partial(Reading, flow.match, flow.side, flow.call)
    if ours is None and theirs is not None:
        return reading(math.inf, 0.0, why="it does not come here, and does in the other model")
    if ours is None or theirs is None:
        return reading(math.inf, 0.0, why="the other model has nothing to compare it with")
    shapes = tuple(ours.shape), tuple(theirs.shape)
    if ours.shape != theirs.shape:
        return reading(math.inf, 0.0, shapes, "the other model's is of another shape")
    scale = rms(theirs).clamp(min=torch.finfo(torch.float64).tiny)
    if flow.floor is None:
        error = ((ours.double() - theirs).abs().max() / scale).item()
        return reading(error, EXACT, shapes)
    mine, least = (float(rms(x.double() - theirs) / scale) for x in (ours, flow.floor))
    noise = SUMMED if flow.match.native in flow.match.parameters else NOISE[dtype]
    # what is exact in the other may be off by a rounding here
    return reading(mine, noise * max(least, torch.finfo(dtype).eps / 4), shapes)


@dataclass(frozen=True)
class Divergence:
    """The first place that leaves the noise."""

    reading: Reading
    before: tuple[str, ...]  # the modules whose outputs were equal just before, the last one last
    back: bool = False

    @property
    def place(self) -> str:
        """The module at fault: the one that gave it, or the one in which all that led to it is."""
        mine, match = self.reading.match.native.split("."), self.reading.match
        if match.native in match.parameters or (self.reading.side == "in") == self.back:
            return ".".join(mine)
        last = self.before[-1].split(".") if self.before else []
        shared = 0  # names that both begin with
        while shared < min(len(mine) - 1, len(last)) and mine[shared] == last[shared]:
            shared += 1
        return ".".join(mine[:shared])

    def lines(self, back: bool, count: int, colour: bool) -> list[str]:
        """What is known of it, for a person."""
        reading, match = self.reading, self.reading.match
        what = "gradient of what" if back else "what"
        where = f"{what} {'comes out of' if reading.side == 'out' else 'goes into'}"
        if back and match.native in match.parameters:
            where = "gradient of"
        told = reading.why or f"error {reading.error:.1e}, limit {reading.limit:.1e}"
        lines = [
            paint(
                f"first difference in {self.place or 'the model'}: {where} {reading}", RED, colour
            ),
            f"  there: {', '.join(match.others)}",
            f"  {told}",
        ]
        if reading.shapes:
            lines.append(
                f"  shape: {' and '.join(map(str, reading.shapes))}, of tokens and features"
            )
        if self.before:
            lines.append(f"  equal just before: {', '.join(self.before)}")
        for name, theirs in match.parameters.items():
            lines.append(f"  fed by {name}: {', '.join(theirs)}")
        return [*lines, *(f"  rule: {rule}" for rule in match.rules)]

    def to_json(self) -> dict[str, Any]:
        match = self.reading.match
        return {
            **self.reading.to_json(),
            "place": self.place,
            "before": list(self.before),
            "others": list(match.others),
            "parameters": {name: list(theirs) for name, theirs in match.parameters.items()},
            "rules": list(match.rules),
        }


@dataclass
class Difference:
    """What two models told, run on the same tokens."""

    names: tuple[str, str]
    way: str
    dtype: torch.dtype
    back: bool
    readings: list[Reading]
    idle: list[str]  # modules that run in the other model alone
    untied: list[str]
    healed: set[Place]  # what differs there makes no difference: one scales before, one after
    causes: list[Cause] = field(default_factory=list)  # the most likely first

    @property
    def first(self) -> Divergence | None:
        before: list[str] = []
        for reading in self.readings:
            if not reading.ok and reading.place not in self.healed:
                return Divergence(reading, tuple(dict.fromkeys(before[-4:])), self.back)
            if reading.side == ("in" if self.back else "out"):
                before.append(reading.match.native)
        return None

    @property
    def ok(self) -> bool:
        return self.first is None and not self.idle and not self.untied

    def error(self, place: Place) -> float:
        """What it is there; none where nothing is compared."""
        return next((r.error for r in self.readings if r.place == place), math.inf)

    def to_text(self, colour: bool = False) -> str:
        head = f"{self.names[0]} against {self.names[1]}, {str(self.dtype)[6:]}, {self.way}"
        lines = [paint(head + (", gradients" if self.back else ""), BOLD, colour)]
        count = len(self.readings)
        if self.ok:
            worst = max(self.readings, key=lambda r: r.error / r.limit)
            told = f"no difference: {count} places agree; most at {worst}: {worst.error:.1e}"
            return "\n".join([*lines, paint(told, GREEN, colour)])
        if (first := self.first) is not None:
            lines += first.lines(self.back, count, colour)
        lines += [f"runs in the other model alone: {name}" for name in self.idle]
        lines += [f"no longer one array: {names}" for names in self.untied]
        lines += [paint(f"cause: {cause}", BOLD, colour) for cause in self.causes[:1]]
        lines += [f"or: {cause}" for cause in self.causes[1:]]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        first = self.first
        return {
            "ok": self.ok,
            "ours": self.names[0],
            "theirs": self.names[1],
            "way": self.way,
            "dtype": str(self.dtype)[6:],
            "backward": self.back,
            "first": None if first is None else first.to_json(),
            "idle": self.idle,
            "untied": self.untied,
            "causes": [cause.to_json() for cause in self.causes],
            "readings": [reading.to_json() for reading in self.readings],
        }


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
            found, pull = self.matching.matches, pulled if back else None
            names = list(dict.fromkeys(name for match in found.values() for name in match.others))
            sides = [self.other] + ([] if self.other.narrow is None else [self.other.narrow])
            self._there[back] = [
                listen(side.module, names, [partial(side, row) for row in self.way.other()], pull)
                for side in sides
            ]
        return self._there[back]

    def run(self, back: bool = False) -> Difference:
        """Gradients are taken where all values agree: else the first that does not is told."""
        difference = self._run(back=False)
        self._heal(difference)
        if not back or not difference.ok:
            return difference
        healed, difference = difference.healed, self._run(back=True)
        difference.healed |= healed
        for seed in range(SHAKEN if self.other.narrow is not None and not difference.ok else 0):
            told = self._run(back=True, shaken=seed).readings
            difference.readings = [
                replace(r, limit=max(r.limit, other.limit))
                for r, other in zip(difference.readings, told, strict=True)
            ]
        return difference

    def _shaken(self, seed: int) -> Heard:
        """The other model in the narrower dtype, every output off by a rounding.

        Where a gradient has a step (relu's) or a choice (of experts), rounding decides on which
        side of it a number lies, and one run does not tell how far that goes.
        """
        narrow, found = self.other.narrow, self.matching.matches
        assert narrow is not None
        names = list(dict.fromkeys(name for match in found.values() for name in match.others))
        random = torch.Generator().manual_seed(seed)

        def shake(_: nn.Module, args: Any, out: Any) -> Any:
            x = out if isinstance(out, Tensor) else out[0]
            by = torch.finfo(x.dtype).eps * (torch.rand(x.shape, generator=random) - 0.5)
            x = x + (x.detach() * by).to(x.dtype)
            return x if isinstance(out, Tensor) else (x, *out[1:])

        modules = dict(narrow.module.named_modules())
        handles = [modules[name].register_forward_hook(shake) for name in names]
        try:
            turns = [partial(narrow, row) for row in self.way.other()]
            return listen(narrow.module, names, turns, pulled)
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, back: bool, shaken: int | None = None) -> Difference:
        found, way = self.matching.matches, self.way
        there, *below = self.theirs(back)
        if shaken is not None:
            below = [self._shaken(shaken)]
        here = self._ours((lambda parts: pulled(way.by_row(parts))) if back else None)
        self._here = here
        narrow = below[0] if below else Heard([], [])
        flowing = flows(self.matching, way, here.records, there.records, narrow.records, back)
        if not back:
            flowing += _outputs(way.by_row(here.outputs), there.outputs, narrow.outputs)
        else:
            flowing += _learnt(self.matching, here.gradients, there.gradients, narrow.gradients)
        self.flows = {f.place: f for f in flowing}
        return Difference(
            (self.matching.model.architecture, self.other.name),
            way.name,
            self.dtype,
            back,
            [measured(flow, self.dtype) for flow in flowing],
            _idle(found.values(), here.records[0], there.records[0]),
            _untied(self.matching),
            set(),
        )

    def _ours(self, pull: Callable[[Rows], Tensor] | None = None) -> Heard:
        model = self.matching.model
        names = [name for name, _ in model.named_modules() if name in self.matching.matches]
        turns = [partial(call, model, given, **more) for given, more in self.way.native()]
        return listen(model, names, turns, pull)

    def _heal(self, difference: Difference) -> None:
        """Leave out what differs where all that is made of it agrees."""
        in_full: set[Place] | None = None
        while (first := difference.first) is not None:
            place = first.reading.place
            later = difference.readings[difference.readings.index(first.reading) + 1 :]
            if not any(r.ok for r in later) and not self._multiple(place):
                return
            after = self._reached_by(*place) & {r.place for r in difference.readings}
            told = [r for r in difference.readings if r.place in after]
            if not told or not (told[0].ok or self._made_up_for(place, told)):
                return
            # what is lost in the noise of a narrower dtype is lost; what is lost, in float64 too
            if first.reading.error > NEAR * first.reading.limit and self.dtype != torch.float64:
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

    def _made_up_for(self, place: Place, after: Sequence[Reading]) -> bool:
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
            found = summed(outs, later.ours)  # type: ignore[arg-type]
            if found and math.isclose(found.parts.get(str(place), 0), factor, rel_tol=1e-5):
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
        try:
            after = self._ours()
        finally:
            handle.remove()
        found: set[Place] = {
            (each, at, k)
            for old, new in zip(before.records, after.records, strict=True)
            for each in old
            for k, (a, b) in enumerate(zip(old[each], new[each], strict=True))
            for at in SIDES
            if not torch.equal(a.values[at], b.values[at])
        }
        return found - {(name, side, number)}


def _idle(matches: Collection[Match], ours: Record, theirs: Record) -> list[str]:
    return [
        match.native
        for match in matches
        if match.plain and not ours.get(match.native) and any(theirs[n] for n in match.others)
    ]


def _untied(matching: Matching) -> list[str]:
    """Names that should share an array and have one each."""
    held = dict(matching.model.named_parameters(remove_duplicate=False))
    ties = matching.plan.native.ties.items()
    return [f"{a} and {b}" for a, b in ties if a in held and held[a] is not held.get(b)]
