"""evidence.json: what was measured last of each architecture, when, with what and on which code.

A section is what one command measures: `parity` by make report, `bugs` by make diagnosis, `trips`
by make formats. Each architecture in it has a date of its own.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from converters.spec import SPECS
from converters.strict_json import read_json
from zoo import registry
from zoo.errors import RecordError, listing
from zoo.registry import Architecture

SECTIONS = {"parity": "make report", "bugs": "make diagnosis", "trips": "make formats"}
STAMP = {"date": str, "versions": dict, "code": str}
FIELDS: Mapping[str, Mapping[str, type]] = {
    "parity": {**STAMP, "ok": bool, "variants": int, "checks": dict, "heat": dict},
    "bugs": {**STAMP, "bugs": dict},
    "trips": {**STAMP, "counts": dict, "trips": dict, "wrong": dict},
}
NESTED = ("checks", "heat", "bugs", "trips")  # hold an object for each of something
_AGAIN = f"Run: {', '.join(SECTIONS.values())}"
_PACKAGES = ("torch", "transformers", "safetensors", "numpy")

Section = Mapping[str, Mapping[str, Any]]  # by architecture


def place() -> Path:
    return registry.beside("evidence.json")


def read(path: Path | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Section -> architecture -> what was measured; a section that was never run is empty."""
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


def update(section: str, found: Section, path: Path | None = None) -> None:
    """What was found of these architectures, in the place of what was known of them."""
    path = path or place()
    record, known = read(path), registry.architectures()
    record[section] |= {name: dict(entry) for name, entry in found.items()}
    write({s: {n: by[n] for n in known if n in by} for s, by in record.items()}, path)


def write(record: Mapping[str, Section], path: Path) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def stamp(entry: Architecture | None) -> dict[str, Any]:
    """When, with what and on which code something is measured now."""
    used = {name: found for name in _PACKAGES if (found := _version(name))}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": used | {"python": platform.python_version()},
        "code": "" if entry is None else code(entry),
    }


def code(entry: Architecture) -> str:
    """A sum of the files that are this architecture's own, and of its variants."""
    module = Path(__file__).with_name("models") / f"{entry.module}.py"
    texts, spec = [module.read_text(encoding="utf-8")], entry.spec
    while spec:
        texts.append((SPECS / f"{spec}.yaml").read_text(encoding="utf-8"))
        below = re.search(r"(?m)^like: (\S+)", texts[-1])
        spec = below[1] if below else ""
    texts.append(json.dumps(entry.variants, sort_keys=True))
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def when(entry: Mapping[str, Any] | None, name: str) -> str:
    """The date, and whether the architecture changed since; or that it was not run."""
    if entry is None:
        return "not run"
    known = registry.architectures().get(name)
    if known is None or not entry["code"] or code(known) == entry["code"]:
        return str(entry["date"])
    return f"{entry['date']}, changed since"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
