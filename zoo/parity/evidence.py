"""What was measured of every architecture, when and with what: for a page, and for later."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from converters.spec import load_spec
from zoo import registry
from zoo.parity.diff import diff
from zoo.parity.drawing import Node, layers_joined, wiring
from zoo.parity.fixtures import hot_checkpoint
from zoo.parity.mutants import MUTANTS, Bench, hunt
from zoo.parity.report import Report, Row
from zoo.parity.trips import targets, travel
from zoo.pretrained import load
from zoo.registry import Architecture

DTYPES = ("float64", "float32", "bfloat16")
_LAYER = re.compile(r"^(.*blocks\.\d+)\.")


@dataclass(frozen=True)
class Measured:
    """The worst of one check over all variants."""

    shown: str
    value: float | None
    limit: float
    variant: str
    count: int
    failed: tuple[str, ...] = ()


@dataclass
class Evidence:
    """One architecture."""

    name: str
    variants: int
    checks: dict[str, Measured]
    # dtype -> part of the model -> (error, limit), each the worst in that part
    heat: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    drawings: dict[str, list[Node]] = field(default_factory=dict)  # of what, in the order it ran
    rules: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # of each dialect
    trips: dict[str, dict[str, str]] = field(default_factory=dict)  # from, to, what came of it
    wrong: tuple[str, ...] = ()  # of these trips
    mutants: dict[str, str] = field(default_factory=dict)  # bug -> killed, n.a., SURVIVED
    parameters: int = 0
    largest: str = ""
    seconds: float = 0.0
    slowest: str = ""

    @property
    def ok(self) -> bool:
        survived = "SURVIVED" in self.mutants.values()
        failed = any(check.failed for check in self.checks.values())
        return not (survived or failed or self.wrong)


@dataclass
class Run:
    date: str
    versions: dict[str, str]
    architectures: list[Evidence]

    @property
    def ok(self) -> bool:
        return all(each.ok for each in self.architectures)

    def to_json(self) -> dict[str, Any]:
        drawn = ("drawings", "rules")  # these follow from the code, and are no measurements
        told = [
            {"ok": each.ok, **{n: v for n, v in asdict(each).items() if n not in drawn}}
            for each in self.architectures
        ]
        return {"date": self.date, "versions": self.versions, "architectures": told}


def gather(report: Report, *, mutants: bool = True, tell: Callable[[str], object] = str) -> Run:
    """All that a page shows; `report` is verify's of these architectures."""
    entries = registry.architectures()
    names = list(dict.fromkeys(row.subject.partition("/")[0] for row in report.rows))
    found = []
    for name in names:
        tell(name)
        rows = [row for row in report.rows if row.subject.partition("/")[0] == name]
        found.append(_evidence(entries[name], rows, report.seconds, mutants))
    used = {n: version(n) for n in ("torch", "transformers", "safetensors", "numpy")}
    used |= {"python": platform.python_version()}
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return Run(date, used, found)


def _evidence(
    entry: Architecture, rows: list[Row], seconds: Mapping[str, float], mutants: bool
) -> Evidence:
    variants = list(dict.fromkeys(row.subject.partition("/")[2] for row in rows))
    checks = dict.fromkeys(row.check for row in rows)
    took = {v: seconds[f"{entry.name}/{v}"] for v in variants if f"{entry.name}/{v}" in seconds}
    found = Evidence(
        entry.name,
        len(variants),
        {check: _worst(row for row in rows if row.check == check) for check in checks},
        seconds=sum(took.values()),
        slowest=max(took, key=lambda v: took[v], default=""),
    )
    spec = load_spec(entry.spec)
    for name, dialect in spec.dialects.items():
        rules = [*dialect.weights, *dialect.heads]
        found.rules[name] = [(str(r.source), ", ".join(map(str, r.targets))) for r in rules]
    _travel(found, entry)
    with TemporaryDirectory(prefix="zoo-evidence-") as scratch:
        directory = Path(scratch, "first")
        hot_checkpoint(entry, variants[0], directory)
        for dtype in DTYPES:
            found.heat[dtype] = _by_layer(diff(directory, dtype=dtype).readings)
        _look_at(found, directory)
        if mutants:
            bench = Bench(entry, Path(scratch))
            found.mutants = {bug.name: hunt(bench, bug).status for bug in MUTANTS.values()}
    return found


def _travel(found: Evidence, entry: Architecture) -> None:
    """Each dialect that is written to each other, and back."""
    for there, to in product(targets(entry), repeat=2):
        with TemporaryDirectory(prefix="zoo-evidence-") as scratch:
            trip = travel(entry, there, to, Path(scratch), {})
        found.trips.setdefault(trip.source, {})[trip.to] = trip.shown
        if not trip.ok:
            found.wrong += (f"{trip.source} to {trip.to}",)


def _worst(rows: Iterable[Row]) -> Measured:
    """Next to its limit; where the limit is none at all, the last."""
    rows = list(rows)
    row = max(rows, key=_share)
    failed = tuple(r.subject.partition("/")[2] for r in rows if not r.ok)
    value = row.value if math.isfinite(row.value) else None
    return Measured(row.shown, value, row.limit, row.subject.partition("/")[2], len(rows), failed)


def _share(row: Row) -> float:
    if not row.ok:
        return math.inf
    return row.value / row.limit if row.limit else 0.0


def _by_layer(readings: Iterable[Any]) -> dict[str, tuple[float, float]]:
    worst: dict[str, tuple[float, float]] = {}
    for reading in readings:
        name = reading.match.native
        layer = _LAYER.match(name)
        part = layer[1] if layer else name.partition(".")[0] or "output"
        error, limit = worst.get(part, (0.0, 1.0))
        if reading.limit and reading.error / reading.limit >= error / limit:
            worst[part] = (reading.error, reading.limit)
    return worst


def _look_at(found: Evidence, directory: Path) -> None:
    """Its wiring, and the largest of what it holds."""
    model = load(directory, modules=False)
    ids = torch.full((1, 5), model.config.vocab - 1)
    more = {"decoder_input_ids": ids} if hasattr(model.config, "start") else {}

    def run() -> object:
        return model(ids, **more)

    found.drawings["the model"] = layers_joined(wiring(model, model, run))
    for name, part in model.named_modules():
        if name.endswith("blocks.0"):
            found.drawings[name.removesuffix(".0")] = wiring(model, part, run)
    held = dict(model.named_parameters())
    found.parameters = sum(p.numel() for p in held.values())
    largest = max(held, key=lambda name: held[name].numel())
    found.largest = f"{largest} {'×'.join(map(str, held[largest].shape))}"
