"""What is told of two models' flows: which leave the noise, and the first that does."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from zoo.diagnosis.diff.flows import Flow, Place
from zoo.diagnosis.diff.hooks import Side
from zoo.diagnosis.diff.matching import Match
from zoo.parity.checks import rms
from zoo.terminal import BOLD, GREEN, RED, paint

# What a difference may be at most, in units of the truth's root mean square. fp64: sums in two
# orders, which made 1e-13 at most of healthy models. In a narrower dtype, as a multiple of the
# other model's own error there: 1.0 to 1.1 was measured.
EXACT = 1e-10
NOISE = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}
# A parameter's gradient is a sum over tokens, rounded after each row there and once here: 2.5 times
# the other's error was measured in healthy models.
SUMMED = 8.0


@dataclass(frozen=True)
class Measurement:
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


def measured(flow: Flow, dtype: torch.dtype) -> Measurement:
    ours, theirs = flow.ours, flow.theirs
    measurement = partial(Measurement, flow.match, flow.side, flow.call)
    if ours is None and theirs is not None:
        return measurement(math.inf, 0.0, why="it does not come here, and does in the other model")
    if ours is None or theirs is None:
        return measurement(math.inf, 0.0, why="the other model has nothing to compare it with")
    shapes = tuple(ours.shape), tuple(theirs.shape)
    if ours.shape != theirs.shape:
        return measurement(math.inf, 0.0, shapes, "the other model's is of another shape")
    scale = rms(theirs).clamp(min=torch.finfo(torch.float64).tiny)
    if flow.floor is None:
        error = ((ours.double() - theirs).abs().max() / scale).item()
        return measurement(error, EXACT, shapes)
    mine, least = (float(rms(x.double() - theirs) / scale) for x in (ours, flow.floor))
    noise = SUMMED if flow.match.native in flow.match.parameters else NOISE[dtype]
    # what is exact in the other may be off by a rounding here
    return measurement(mine, noise * max(least, torch.finfo(dtype).eps / 4), shapes)


@dataclass(frozen=True)
class Divergence:
    """The first place that leaves the noise."""

    measurement: Measurement
    before: tuple[str, ...]  # the modules whose outputs were equal just before, the last one last
    back: bool = False

    @property
    def place(self) -> str:
        """The module at fault: the one that gave it, or the one in which all that led to it is."""
        mine, match = self.measurement.match.native.split("."), self.measurement.match
        if match.native in match.parameters or (self.measurement.side == "in") == self.back:
            return ".".join(mine)
        last = self.before[-1].split(".") if self.before else []
        shared = 0  # names that both begin with
        while shared < min(len(mine) - 1, len(last)) and mine[shared] == last[shared]:
            shared += 1
        return ".".join(mine[:shared])

    def lines(self, back: bool, color: bool) -> list[str]:
        """What is known of it, for a person."""
        measurement, match = self.measurement, self.measurement.match
        what = "gradient of what" if back else "what"
        where = f"{what} {'comes out of' if measurement.side == 'out' else 'goes into'}"
        if back and match.native in match.parameters:
            where = "gradient of"
        size = measurement.why or f"error {measurement.error:.1e}, limit {measurement.limit:.1e}"
        lines = [
            paint(
                f"first difference in {self.place or 'the model'}: {where} {measurement}",
                RED,
                color,
            ),
            f"  there: {', '.join(match.others)}",
            f"  {size}",
        ]
        if measurement.shapes:
            lines.append(
                f"  shape: {' and '.join(map(str, measurement.shapes))}, of tokens and features"
            )
        if self.before:
            lines.append(f"  equal just before: {', '.join(self.before)}")
        for name, theirs in match.parameters.items():
            lines.append(f"  fed by {name}: {', '.join(theirs)}")
        return [*lines, *(f"  rule: {rule}" for rule in match.rules)]

    def to_json(self) -> dict[str, Any]:
        match = self.measurement.match
        return {
            **self.measurement.to_json(),
            "place": self.place,
            "before": list(self.before),
            "others": list(match.others),
            "parameters": {name: list(theirs) for name, theirs in match.parameters.items()},
            "rules": list(match.rules),
        }


@dataclass(frozen=True)
class Cause:
    """Something that explains a difference, and what became of it when it was undone."""

    what: str
    fix: str = ""  # parity is restored if …
    change: str = ""  # a line of a file
    tried: bool = False
    restored: bool = False
    after: str = ""  # where the models part then
    put: bool = False  # tried by putting the other model's numbers there, and no more
    fault: str = ""  # its name in the catalogue of faults

    def __str__(self) -> str:
        parts = [self.what + "."]
        done = self.fix or "the other model's numbers are put there"
        if self.restored:
            parts.append(f"Parity is restored if {done}.")
        elif self.tried:
            parts.append(f"If {done}, the first difference moves on to {self.after}.")
        elif self.fix:
            parts.append(f"Not confirmed: {self.fix}.")
        if self.change:
            parts.append(self.change)
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "fix": self.fix,
            "change": self.change,
            "tried": self.tried,
            "restored": self.restored,
            "after": self.after,
            "fault": self.fault,
            "text": str(self),
        }


@dataclass
class Difference:
    """What two models told, run on the same tokens."""

    names: tuple[str, str]
    way: str
    dtype: torch.dtype
    back: bool
    readings: list[Measurement]
    idle: list[str]  # modules that run in the other model alone
    untied: list[tuple[str, str]]  # names that should share an array
    healed: set[Place]  # what differs there makes no difference: one scales before, one after
    causes: list[Cause] = field(default_factory=list)  # the most likely first

    @property
    def first(self) -> Divergence | None:
        before: list[str] = []
        for measurement in self.readings:
            if not measurement.ok and measurement.place not in self.healed:
                return Divergence(measurement, tuple(dict.fromkeys(before[-4:])), self.back)
            if measurement.side == ("in" if self.back else "out"):
                before.append(measurement.match.native)
        return None

    @property
    def ok(self) -> bool:
        return self.first is None and not self.idle and not self.untied

    def error(self, place: Place) -> float:
        """What it is there; none where nothing is compared."""
        return next((r.error for r in self.readings if r.place == place), math.inf)

    def to_text(self, color: bool = False) -> str:
        head = f"{self.names[0]} against {self.names[1]}, {str(self.dtype)[6:]}, {self.way}"
        lines = [paint(head + (", gradients" if self.back else ""), BOLD, color)]
        count = len(self.readings)
        if self.ok:
            worst = max(self.readings, key=lambda r: r.error / r.limit)
            summary = f"no difference: {count} places agree; most at {worst}: {worst.error:.1e}"
            return "\n".join([*lines, paint(summary, GREEN, color)])
        if (first := self.first) is not None:
            lines += first.lines(self.back, color)
        lines += [f"runs in the other model alone: {name}" for name in self.idle]
        lines += [f"no longer one array: {' and '.join(names)}" for names in self.untied]
        lines += [paint(f"cause: {cause}", BOLD, color) for cause in self.causes[:1]]
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
            "untied": [" and ".join(names) for names in self.untied],
            "causes": [cause.to_json() for cause in self.causes],
            "readings": [each.to_json() for each in self.readings],
        }
