"""evidence.json: what was measured last of each architecture, when, with what and on which code.

A section is what one command measures: `parity` by make report, `bugs` by make diagnosis, `trips`
by make formats, all of them on tiny models of random weights, by architecture; `checkpoints` by
zoo verify NAME --record on published weights, by checkpoint. Each entry has a stamp of its own.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from converters.spec import SPECS
from converters.strict_json import read_json
from converters.strict_yaml import read_yaml
from zoo import registry
from zoo.errors import RecordError, listing
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
    """Return section -> name -> what was measured; a section that was never run is empty."""
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
    """Return the architectures of which the last run of the parity protocol held in all."""
    if not place().is_file():
        raise RecordError(f"{place()}: not there, so nothing is known to be verified. {_AGAIN}")
    return {name: entry for name, entry in read()["parity"].items() if entry["ok"]}


def verified_checkpoints() -> dict[str, dict[str, Any]]:
    """Return the named checkpoints whose own weights were measured, where all of it held."""
    if not place().is_file():
        raise RecordError(f"{place()}: not there, so nothing is known to be verified. {_AGAIN}")
    verified: dict[str, dict[str, Any]] = {}
    for name, entry in read()["checkpoints"].items():
        named = registry.checkpoints().get(name)
        if named is None or not entry["ok"] or entry["repo"] != named.repo:
            continue
        if entry["revision"] == named.revision or not named.pinned:
            verified[name] = entry
    return verified


def update(section: str, measured: Section, path: Path | None = None) -> None:
    """Write what was measured now in the place of what was recorded under the same names."""
    path = path or place()
    record = read(path)
    record[section] |= {name: dict(entry) for name, entry in measured.items()}
    ordered = {s: {n: by[n] for n in _names(s) if n in by} for s, by in record.items()}
    write({s: by for s, by in ordered.items() if by or s != "checkpoints"}, path)


def _names(section: str) -> Iterable[str]:
    """All that a section may hold, in the order of the registry."""
    return registry.checkpoints() if section == "checkpoints" else registry.architectures()


def write(record: Mapping[str, Section], path: Path) -> None:
    """Replace the file by this record, all of it or nothing."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def stamp(section: str, entry: Architecture | None) -> dict[str, Any]:
    """Return when, with what and on which code a section of this architecture is measured now."""
    versions = {name: number for name in _PACKAGES if (number := _version(name))}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": versions | {"python": platform.python_version()},
        "code": "" if entry is None else digest(MEASURED_BY[section], entry),
    }


def changes(section: str, name: str, entry: Mapping[str, Any]) -> list[str]:
    """List what differs now from what an entry was measured on: "code", "torch", "transformers"."""
    if section == "checkpoints":
        named = registry.checkpoints().get(name)
        name = named.architecture if named is not None else ""
    architecture = registry.architectures().get(name)
    changed: list[str] = []
    if architecture is not None and entry["code"]:
        now = digest(MEASURED_BY[section], architecture)
        changed += ["code"] if entry["code"] != now else []
    for package in _DECISIVE:
        before, now = entry["versions"].get(package, ""), _version(package)
        # +cpu and +cu130 are builds of one version; who only loads has no reference to compare with
        if now and before.partition("+")[0] != now.partition("+")[0]:
            changed.append(package)
    return changed


def when(section: str, name: str, entry: Mapping[str, Any] | None) -> str:
    """Say the date and what changed since, or that it was not run."""
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


# --- what a measurement depends on ---------------------------------------------------------------

_ROOT = Path(__file__).parents[1]  # zoo and converters lie side by side, installed or not
_LEFT_OUT = {"zoo.evidence"}  # it writes down what was measured, and does not measure
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def digest(measuring: str, entry: Architecture) -> str:
    """Digest all that a measurement of an architecture by a module depends on: 12 hex digits.

    That is code, spec and registry entry. The code is what the measuring module imports, at any
    depth and in functions too. It is digested as a syntax tree, so that comments, docstrings and
    layout do not count; YAML is digested as data.
    """
    formats = (
        f"converters.formats.{path.stem}" for path in SPECS.with_name("formats").glob("*.py")
    )
    loading = ("zoo.loading", f"zoo.models.{entry.module}", *formats)  # by name, so no imports
    modules = reached([measuring, *(name for name in loading if _path(name))]) - _LEFT_OUT
    parts = [f"{name} {_code(name)}" for name in sorted(modules)]
    parts += [_data(SPECS / f"{name}.yaml") for name in _specs(entry.spec)]
    parts += [_data(path) for path in sorted(SPECS.glob("common.*.yaml"))]
    parts.append(json.dumps([entry._asdict(), entry.variants], sort_keys=True, default=list))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def reached(modules: Iterable[str]) -> set[str]:
    """Return these modules and what they import of zoo and converters, at any depth."""
    reached_modules, left = set[str](), list(modules)
    while left:
        name = left.pop()
        if name not in reached_modules:
            reached_modules.add(name)
            left += _imports(name)
    return reached_modules


@cache
def _path(module: str) -> Path | None:
    """Its file; None where no module of ours has this name."""
    if module.partition(".")[0] not in ("zoo", "converters"):
        return None
    path = _ROOT.joinpath(*module.split("."))
    files = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)


@cache
def _tree(module: str) -> ast.Module:
    path = _path(module)
    assert path is not None, module
    return ast.parse(path.read_bytes())


@cache
def _table(name: str) -> dict[str, str]:
    """Public names or verbs -> the module of each, by the table in zoo/__init__.py."""
    for node in _tree("zoo").body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            targets: dict[str, str] = ast.literal_eval(node.value)
            return {name: t.strip("@").partition(":")[0] for name, t in targets.items()}
    raise AssertionError(f"zoo/__init__.py: no table {name}")


@cache
def _imports(module: str) -> frozenset[str]:
    names = set[str]()
    for node in _run(_tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and not node.level, f"{module}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "zoo":
            names.add(_table("PUBLIC").get(node.attr, "zoo"))  # public names load lazily
    if "zoo.verbs" in names and module != "zoo":  # its class has the verbs, which are strings
        names |= {*_table("VERBS").values()}
    names |= {name[:at] for name in names for at, c in enumerate(name) if c == "."}  # packages
    return frozenset(name for name in names if _path(name) is not None)


def _run(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node but those that only a type checker sees."""
    left: list[ast.AST] = [tree]
    while left:
        node = left.pop()
        yield node
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            left += node.orelse
        else:
            left += ast.iter_child_nodes(node)


@cache
def _code(module: str) -> str:
    parts = list[str]()
    _write(_tree(module), parts)
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _write(node: object, parts: list[str]) -> None:
    """A syntax tree, the same in each version of Python: fields that hold nothing are left out."""
    if isinstance(node, ast.AST):
        parts.append(type(node).__name__)
        for name in node._fields:
            value: Any = getattr(node, name, None)
            if name == "body" and isinstance(node, _DOCUMENTED) and value and _is_text(value[0]):
                value = value[1:]
            if value is not None and value != [] and name != "ctx":
                parts.append(name)
                _write(value, parts)
    elif isinstance(node, list):
        parts.append(str(len(node)))
        for each in node:
            _write(each, parts)
    else:
        parts.append(repr(node))


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(
        getattr(statement.value, "value", None), str
    )


def _specs(name: str) -> Iterator[str]:
    """A spec and those that it is laid over."""
    while name:
        yield name
        name = _yaml(SPECS / f"{name}.yaml").get("like", "")


@cache
def _yaml(path: Path) -> Mapping[str, Any]:
    data: Mapping[str, Any] = read_yaml(path, RecordError)
    return data


def _data(path: Path) -> str:
    return f"{path.name} {json.dumps(_yaml(path), default=str)}"
