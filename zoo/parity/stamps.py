"""A digest of all that a measurement of an architecture depends on: code, spec, registry entry.

The code is what the measuring module imports, at any depth and in functions too. It is digested as
a syntax tree, so that comments, docstrings and layout do not count; YAML is digested as data.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import zoo
from converters.spec import SPECS
from converters.strict_yaml import read_yaml
from zoo.errors import RecordError
from zoo.registry import Architecture

_ROOT = Path(__file__).parents[2]  # zoo and converters lie side by side, installed or not
# they write down what was measured, and do not measure
_LEFT_OUT = {"zoo.evidence", "zoo.parity.stamps"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def digest(measuring: str, entry: Architecture) -> str:
    """12 hexadecimal digits for one architecture as the module `measuring` sees it."""
    formats = (
        f"converters.formats.{path.stem}" for path in SPECS.with_name("formats").glob("*.py")
    )
    loading = ("zoo.loading", f"zoo.models.{entry.module}", *formats)  # by name, so no imports
    modules = reached([measuring, *(name for name in loading if _path(name))]) - _LEFT_OUT
    parts = [f"{name} {_code(name)}" for name in sorted(modules)]
    parts += [_data(SPECS / f"{name}.yaml") for name in _specs(entry.spec)]
    parts += [_data(path) for path in sorted(SPECS.glob("common/*.yaml"))]
    parts.append(json.dumps([entry._asdict(), entry.variants], sort_keys=True, default=list))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def reached(modules: Iterable[str]) -> set[str]:
    """These modules and what they import of zoo and converters, at any depth."""
    found, left = set[str](), list(modules)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += _imports(name)
    return found


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
def _imports(module: str) -> frozenset[str]:
    names = set[str]()
    for node in _run(_tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and not node.level, f"{module}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "zoo":
            names.add(zoo._HOMES.get(node.attr, ("zoo",))[0])  # public names load lazily
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


def _specs(name: str) -> list[str]:
    """The files of a spec, and those that they are laid over."""
    names = [f"{name}/{path.stem}" for path in sorted((SPECS / name).glob("*.yaml"))]
    for file in names:
        if (below := _yaml(SPECS / f"{file}.yaml").get("like", "")) not in ("", *names):
            names.append(below)
    return names


@cache
def _yaml(path: Path) -> Mapping[str, Any]:
    data: Mapping[str, Any] = read_yaml(path, RecordError)
    return data


def _data(path: Path) -> str:
    return f"{path.parent.name}/{path.name} {json.dumps(_yaml(path), default=str)}"
