"""evidence.json: what was measured last of each architecture, when, with what and on which code.

A section is what one command measures: `parity` by make report, `bugs` by make diagnosis, `trips`
by make formats, all of them on tiny models of random weights, by architecture; `checkpoints` by
zoo verify NAME --record on published weights, by checkpoint. Each entry has a stamp of its own.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from converters.strict_json import read_json
from zoo import registry
from zoo.errors import RecordError, listing
from zoo.parity import stamps
from zoo.registry import Architecture

# section -> the command that measures it, and the module that does
SECTIONS = {
    "parity": "make report",
    "bugs": "make diagnosis",
    "trips": "make formats",
    "checkpoints": "zoo verify NAME --record",
}
MEASURED_BY = {
    "parity": "zoo.parity",
    "bugs": "zoo.diagnosis.diff.planted",
    "trips": "zoo.parity.gates.formats",
    "checkpoints": "zoo.parity",
}
STAMP = {"date": str, "versions": dict, "code": str}
FIELDS: Mapping[str, Mapping[str, type]] = {
    "parity": {**STAMP, "ok": bool, "variants": int, "checks": dict, "heat": dict},
    "bugs": {**STAMP, "bugs": dict},
    "trips": {**STAMP, "counts": dict, "trips": dict, "wrong": dict},
    "checkpoints": {**STAMP, "ok": bool, "repo": str, "revision": str, "checks": dict},
}
NESTED = ("checks", "heat", "bugs", "trips")  # hold an object for each of something
_AGAIN = f"Run: {', '.join(SECTIONS[name] for name in ('parity', 'bugs', 'trips'))}"
_PACKAGES = ("torch", "transformers", "safetensors", "numpy")
_DECISIVE = ("torch", "transformers")  # both sides of a comparison compute with these

Section = Mapping[str, Mapping[str, Any]]  # by architecture, or by checkpoint


def place() -> Path:
    """Return the path of evidence.json, which lies beside this file."""
    return Path(__file__).with_name("evidence.json")


def read(path: Path | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Section -> name -> what was measured; a section that was never run is empty."""
    path = path or place()
    if not path.is_file():
        return {name: {} for name in SECTIONS}
    data = read_json(path, RecordError)
    if problems := [*_problems(data)]:
        raise RecordError(
            f"{path}: damaged, or written by another version: {listing(problems, 5)}. Restore it, "
            f"or delete it. {_AGAIN}"
        )
    return {name: data.get(name, {}) for name in SECTIONS}


def _problems(data: Mapping[str, Any]) -> Iterator[str]:
    for section, entries in data.items():
        if section not in FIELDS:
            yield f"{section} is no section"
            continue
        for name, entry in entries.items() if isinstance(entries, dict) else [("*", None)]:
            if not isinstance(entry, dict):
                yield f"{section}.{name}: expected an object"
                continue
            for field, kind in FIELDS[section].items():
                value = entry.get(field)
                inner = value.values() if field in NESTED and isinstance(value, dict) else ()
                if not isinstance(value, kind) or not all(isinstance(v, dict) for v in inner):
                    yield f"{section}.{name}.{field}: missing or malformed"


def proven() -> dict[str, dict[str, Any]]:
    """Architecture -> what the last run of the parity protocol measured, where all of it held."""
    if not place().is_file():
        raise RecordError(f"{place()}: not there, so nothing is known to be verified. {_AGAIN}")
    return {name: entry for name, entry in read()["parity"].items() if entry["ok"]}


def verified_checkpoints() -> dict[str, dict[str, Any]]:
    """Name -> what was measured on the weights that the registry means, where all of it held."""
    if not place().is_file():
        raise RecordError(f"{place()}: not there, so nothing is known to be verified. {_AGAIN}")
    found: dict[str, dict[str, Any]] = {}
    for name, entry in read()["checkpoints"].items():
        known = registry.checkpoints().get(name)
        if known is None or not entry["ok"] or entry["repo"] != known.repo:
            continue
        if entry["revision"] == known.revision or not known.pinned:
            found[name] = entry
    return found


def update(section: str, found: Section, path: Path | None = None) -> None:
    """What was measured now, in the place of what was recorded under the same names."""
    path = path or place()
    record = read(path)
    record[section] |= {name: dict(entry) for name, entry in found.items()}
    ordered = {s: {n: by[n] for n in _names(s) if n in by} for s, by in record.items()}
    write({s: by for s, by in ordered.items() if by or s != "checkpoints"}, path)


def _names(section: str) -> Iterable[str]:
    """All that a section may hold, in the order of the registry."""
    return registry.checkpoints() if section == "checkpoints" else registry.architectures()


def write(record: Mapping[str, Section], path: Path) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def stamp(section: str, entry: Architecture | None) -> dict[str, Any]:
    """When, with what and on which code a section of this architecture is measured now."""
    used = {name: found for name in _PACKAGES if (found := _version(name))}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": used | {"python": platform.python_version()},
        "code": "" if entry is None else stamps.digest(MEASURED_BY[section], entry),
    }


def changes(section: str, name: str, entry: Mapping[str, Any]) -> list[str]:
    """What differs now from what an entry was measured on: "code", "torch", "transformers"."""
    if section == "checkpoints":
        known = registry.checkpoints().get(name)
        name = known.architecture if known is not None else ""
    architecture = registry.architectures().get(name)
    changed: list[str] = []
    if architecture is not None and entry["code"]:
        now = stamps.digest(MEASURED_BY[section], architecture)
        changed += ["code"] if entry["code"] != now else []
    for package in _DECISIVE:
        before, now = entry["versions"].get(package, ""), _version(package)
        # +cpu and +cu130 are builds of one version; who only loads has no reference to compare with
        if now and before.partition("+")[0] != now.partition("+")[0]:
            changed.append(package)
    return changed


def when(section: str, name: str, entry: Mapping[str, Any] | None) -> str:
    """The date, and what changed since; or that it was not run."""
    if entry is None:
        return "not run"
    changed = changes(section, name, entry)
    date = str(entry["date"])
    return f"{date}, changed since: {', '.join(changed)}" if changed else date


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
