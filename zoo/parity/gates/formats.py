"""The report of round trips: tables, JSON, and the page docs/formats.md."""

from __future__ import annotations

import json
import platform
import sys
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from zoo import evidence, registry
from zoo.errors import did_you_mean
from zoo.parity.gates.trips import OWN, Trip, run, sources
from zoo.terminal import GREEN, RED, has_color, paint, passing
from zoo.version import VERSION

LEGEND = """\
Each cell: files in the row's dialect are converted to the column's dialect, loaded, and converted
back.

- **bytes**: every file is the same, byte for byte. **weights**: the weight files are the same, and
  the config is equivalent. **values**: tensors and logits are equal, the bytes are not; also where
  nothing can be converted back, because the dialect is only read (openai, google).
- *without* …: fields that the dialect cannot represent and that inference does not need, or a head
  that it cannot represent.
- **a number**: the root mean square error of the logits relative to their root mean square, and the
  type to which numbers were rounded: eight bits with a scale for each 32 (Q8_0) or group (int8).
- **no**: refused before anything was written; the fields or tensors that the dialect cannot
  represent.

Models are small, and all their parameters are random. From row to column, the config is one that
both dialects can represent; the rows "hf: …" are variants as the reference writes them.
"""


def markdown(trips: Iterable[Trip]) -> str:
    """Return a table for each architecture, and one for all that only have hf and native."""
    trips, parts = list(trips), [LEGEND]
    few = []
    for name in dict.fromkeys(trip.architecture for trip in trips):
        mine = [trip for trip in trips if trip.architecture == name]
        if {trip.to for trip in mine} <= {*OWN}:
            few.append([name, *map(_counted, _by_way(mine))])
            continue
        parts.append(f"## {name}\n\n{_table(mine)}")
    if few:
        head = ["", *WAYS]
        parts.append(f"## hf and native alone\n\n{_aligned([head, *few])}")
    return "\n".join(parts)


WAYS = ("hf to native", "native to hf", "variants, hf to hf", "variants, hf to native")


def _by_way(trips: list[Trip]) -> Iterator[list[Trip]]:
    for way in (("hf", "native"), ("native", "hf")):
        yield [trip for trip in trips if (trip.source, trip.to) == way]
    for to in OWN:
        yield [trip for trip in trips if trip.source.startswith("hf: ") and trip.to == to]


def _counted(trips: list[Trip]) -> str:
    counts = Counter(trip.shown for trip in trips)
    return ", ".join(f"{n} × {shown}" if n > 1 else shown for shown, n in counts.items())


def _table(trips: list[Trip]) -> str:
    """Return a table with a row for each source and a column for each target."""
    cells = {(trip.source, trip.to): trip.shown for trip in trips}
    targets = list(dict.fromkeys(trip.to for trip in trips))
    rows = dict.fromkeys(trip.source for trip in trips)
    lines = [[row, *(cells.get((row, to), "") for to in targets)] for row in rows]
    return _aligned([["from, to", *targets], *lines])


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *rest = (
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    )
    return "\n".join([head, "|" + "|".join("-" * (w + 2) for w in widths) + "|", *rest]) + "\n"


def summary(trips: Iterable[Trip]) -> str:
    """Return one line with the number of trips by result."""
    trips = list(trips)
    counts = Counter(trip.result for trip in trips)
    counted = ", ".join(f"{n} {result}" for result, n in counts.most_common())
    architectures = len({trip.architecture for trip in trips})
    return f"{len(trips)} round trips of {architectures} architectures: {counted}"


def to_record(trips: Iterable[Trip]) -> dict[str, dict[str, Any]]:
    """Map each architecture to its results, for zoo/evidence.json."""
    trips, architectures = list(trips), registry.architectures()
    record: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(trip.architecture for trip in trips):
        mine = [trip for trip in trips if trip.architecture == name]
        cells: dict[str, dict[str, str]] = {}
        for trip in mine:
            cells.setdefault(trip.source, {})[trip.to] = trip.shown
        record[name] = {
            **evidence.stamp("trips", architectures[name]),
            "counts": Counter("wrong" if not trip.ok else trip.result for trip in mine),
            "trips": cells,
            "wrong": {f"{trip.source} to {trip.to}": trip.detail for trip in mine if not trip.ok},
        }
    return record


def made_with() -> str:
    """Return the versions that a measurement depends on."""
    names = ("torch", "transformers")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    return f"zoo {VERSION}, {packages}, Python {platform.python_version()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `parity.py --formats`: measure, print, and write or record the results."""
    parser = ArgumentParser(prog="parity.py --formats", description=__doc__)
    parser.add_argument("names", metavar="ARCHITECTURE", nargs="*", help="(default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--write", metavar="FILE", type=Path, help="write the results to FILE as Markdown"
    )
    parser.add_argument("--record", action="store_true", help="update zoo/evidence.json")
    parser.add_argument(
        "--files",
        metavar="DIR",
        type=Path,
        help="directory with files of dialects that are only read",
    )
    options = parser.parse_args(arguments)
    architectures = registry.architectures()
    if unknown := [name for name in options.names if name not in architectures]:
        parser.error(
            f"no architecture is called {unknown[0]!r}.{did_you_mean(unknown[0], architectures)}"
        )
    if options.record:
        evidence.read()  # an invalid file raises before the measurement
    entries = [architectures[name] for name in options.names or architectures]
    torch.set_num_threads(1)  # threads slow down tiny tensors
    files = sources(options.files) if options.files else {}
    trips = list(run(entries, files, lambda name: passing(name, sys.stderr)))
    passing("", sys.stderr)
    ok = all(trip.ok for trip in trips)
    headline = f"{summary(trips)} ({made_with()}, {date.today()})"
    if options.json:
        print(
            json.dumps(
                {"ok": ok, "summary": headline, "trips": [asdict(t) for t in trips]}, indent=2
            )
        )
    else:
        print(markdown(trips))
        for trip in (trip for trip in trips if not trip.ok):
            line = f"WRONG {trip.architecture}, {trip.source} to {trip.to}: {trip.detail}"
            print(paint(line, RED, has_color(sys.stdout)))
        print(paint(headline, GREEN if ok else RED, has_color(sys.stdout)))
    if options.write:
        heading = f"# Formats: round trips\n\nMeasured by `make formats`: {headline}."
        text = f"{heading}\n\n{markdown(trips)}"
        options.write.write_text(text, encoding="utf-8")
    if options.record:
        evidence.update("trips", to_record(trips))
    return 0 if ok else 1
