"""Collect the evidence of each architecture: for the page and for evidence.json."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from zoo import evidence, registry
from zoo.diagnosis.diff.diff import diff
from zoo.loading import load
from zoo.parity.fixtures import hot_checkpoint
from zoo.parity.result import Report, Row
from zoo.registry import Architecture
from zoo.report.wiring import Node, layers_joined, wiring

DTYPES = ("float64", "float32", "bfloat16")
HOT = ", hot"  # suffix of a checkpoint whose parameters were all redrawn
_LAYER = re.compile(r"^(.*blocks\.\d+)\.")


@dataclass(frozen=True)
class Measured:
    """The worst result of one check over all variants."""

    shown: str
    value: float | None  # None: not finite
    limit: float
    variant: str
    count: int
    failed: Mapping[str, str] = field(default_factory=dict)  # variant -> problem


@dataclass
class Evidence:
    """What was measured of one architecture or one checkpoint."""

    name: str
    stamp: Mapping[str, Any]
    variants: int
    checks: dict[str, Measured]
    # dtype -> part of the model -> the worst (error, limit) in that part; None: not finite
    heat: dict[str, dict[str, tuple[float | None, float]]] = field(default_factory=dict)
    drawings: dict[str, list[Node]] = field(
        default_factory=dict
    )  # title -> nodes in order of execution
    parameters: int = 0
    largest: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)  # by variant
    unseen: str = ""  # why there is no diagram and no heat map
    bugs: Mapping[str, Any] | None = None  # from evidence.json; None: not run
    trips: Mapping[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """Whether this run passed; recorded bugs and round trips have verdicts of their own."""
        return not self.unseen and not any(check.failed for check in self.checks.values())

    @property
    def loaded(self) -> int:
        """How many variants load, in zoo and in the reference."""
        broken = (self.checks[name].failed for name in ("reference", "load") if name in self.checks)
        return self.variants - sum(map(len, broken))

    def to_record(self) -> dict[str, Any]:
        """The entry of evidence.json."""
        fields = asdict(self)
        for name in ("name", "stamp", "bugs", "trips", "unseen"):
            del fields[name]
        del fields["drawings"]  # these follow from the code and are not measurements
        return _short({**self.stamp, "ok": self.ok, **fields})


@dataclass
class Run:
    """The evidence of all architectures of a page."""

    architectures: list[Evidence]

    @property
    def ok(self) -> bool:
        """Whether something was measured and all of it passed."""
        return bool(self.architectures) and all(each.ok for each in self.architectures)

    def to_record(self) -> dict[str, Any]:
        """In the form of evidence.json."""
        return {
            "parity": {each.name: each.to_record() for each in self.architectures},
            "bugs": {each.name: each.bugs for each in self.architectures if each.bugs},
            "trips": {each.name: each.trips for each in self.architectures if each.trips},
        }


def _short(x: Any) -> Any:
    """The same with numbers rounded to three digits."""
    if isinstance(x, dict):
        return {name: _short(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [*map(_short, x)]
    return float(f"{x:.3g}") if isinstance(x, float) else x


def gather(
    report: Report,
    record: Mapping[str, evidence.Section],
    tell: Callable[[str], object] = str,
) -> Run:
    """Everything that a page shows, from a report of `zoo.verify` and the recorded evidence."""
    entries, by_name = registry.architectures(), dict[str, list[Row]]()
    for row in report.rows:
        by_name.setdefault(_named(row.subject)[0], []).append(row)
    architectures = []
    for name, rows in by_name.items():
        tell(name)
        seconds = {_named(s)[1]: t for s, t in report.seconds.items() if _named(s)[0] == name}
        architectures.append(_evidence(name, entries.get(name), rows, seconds))
        architectures[-1].bugs = record.get("bugs", {}).get(name)
        architectures[-1].trips = record.get("trips", {}).get(name)
    return Run(architectures)


def of_checkpoints(report: Report) -> dict[str, dict[str, Any]]:
    """Name -> entry of evidence.json, for checkpoints that were verified on their own weights."""
    records: dict[str, dict[str, Any]] = {}
    for subject, published in report.published.items():
        rows = [row for row in report.rows if row.subject == subject]
        entry = registry.checkpoints()[published.name]
        checks = {
            row.check: {
                "shown": row.shown,
                "value": row.value if math.isfinite(row.value) else None,
                "limit": row.limit,
            }
            for row in rows
        }
        measured = {
            **evidence.stamp("checkpoints", registry.architectures()[entry.architecture]),
            "ok": bool(rows) and all(row.ok for row in rows),
            "repo": published.repo,
            "revision": published.revision,
            "checks": checks,
        }
        records[published.name] = _short(measured)
    return records


def _named(subject: str) -> tuple[str, str]:
    """(name, variant) of a subject. A checkpoint may have the name of its architecture."""
    name, slash, variant = subject.partition("/")
    if slash:
        return name, variant
    name = subject.removesuffix(HOT)
    also = ", the checkpoint" if name in registry.architectures() else ""
    return name + also, "redrawn" if subject.endswith(HOT) else "published"


def _evidence(
    name: str, entry: Architecture | None, rows: list[Row], seconds: Mapping[str, float]
) -> Evidence:
    variants = list(dict.fromkeys(_named(row.subject)[1] for row in rows))
    checks = dict.fromkeys(row.check for row in rows)
    result = Evidence(
        name,
        evidence.stamp("parity", entry),
        len(variants),
        {check: _worst(row for row in rows if row.check == check) for check in checks},
        seconds=seconds,
    )
    tiny = [variant for variant in variants if entry is not None and variant in entry.variants]
    if entry is None or not tiny:
        return result
    with TemporaryDirectory(prefix="zoo-evidence-") as scratch:
        directory = Path(scratch, "first")
        try:
            hot_checkpoint(entry, tiny[0], directory)
            _draw(result, directory)
            for dtype in DTYPES:
                result.heat[dtype] = _by_layer(diff(directory, dtype=dtype).readings)
        except Exception as error:  # the page shows failures
            result.unseen = f"{tiny[0]}: {type(error).__name__}: {error}"
    return result


def _worst(rows: Iterable[Row]) -> Measured:
    """The row closest to its limit."""
    rows = list(rows)
    row = max(rows, key=_share)
    failed = {_named(r.subject)[1]: r.detail or r.shown for r in rows if not r.ok}
    value = row.value if math.isfinite(row.value) else None
    return Measured(row.shown, value, row.limit, _named(row.subject)[1], len(rows), failed)


def _share(row: Row) -> float:
    if not row.ok:
        return math.inf
    return row.value / row.limit if row.limit else 0.0


def _by_layer(readings: Iterable[Any]) -> dict[str, tuple[float | None, float]]:
    worst: dict[str, tuple[float | None, float]] = {}
    for reading in readings:
        name = reading.match.native
        layer = _LAYER.match(name)
        part = layer[1] if layer else name.partition(".")[0] or "output"
        error, limit = worst.get(part, (0.0, 1.0))
        if not math.isfinite(reading.error):
            worst[part] = (None, reading.limit)
        elif error is not None and reading.limit and reading.error / reading.limit >= error / limit:
            worst[part] = (reading.error, reading.limit)
    return worst


def _draw(result: Evidence, directory: Path) -> None:
    """Fill in the wiring diagrams and the largest parameter."""
    model = load(directory, modules=False)
    ids = torch.full((1, 5), model.config.vocab - 1)
    more = {"decoder_input_ids": ids} if hasattr(model.config, "start") else {}

    def run() -> object:
        return model(ids, **more)

    result.drawings["the model"] = layers_joined(wiring(model, model, run))
    for name, part in model.named_modules():
        if name.endswith("blocks.0"):
            result.drawings[name.removesuffix(".0")] = wiring(model, part, run)
    parameters = dict(model.named_parameters())
    result.parameters = sum(p.numel() for p in parameters.values())
    largest = max(parameters, key=lambda name: parameters[name].numel())
    result.largest = f"{largest} {'×'.join(map(str, parameters[largest].shape))}"
