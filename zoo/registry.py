"""registry.yaml, read and checked: what zoo implements, and the checkpoints that have a name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from converters.strict_yaml import parse_yaml
from zoo.errors import (
    ConfigError,
    UnknownName,
    UnsupportedArchitecture,
    ZooError,
    did_you_mean,
    listing,
)

_SECTIONS = ("architectures", "checkpoints", "variants")
_NOT_IN_NAMES = ("/", "\\", ":")  # such a reference is a path or an address
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


class RegistryError(ZooError):
    """registry.yaml does not parse or contradicts itself."""


class Architecture(NamedTuple):
    """One file in zoo/models, one spec, and which of its heads each reference class stands for."""

    name: str
    model_type: str
    heads: Mapping[str, tuple[str, ...]]  # several: the first whose tensors are there
    module: str
    spec: str
    oracle: Mapping[str, Any] = {}  # what the reference library has instead of it
    # of code from before the reference had it: model types with their own defaults, and classes
    former_types: Mapping[str, Mapping[str, Any]] = {}
    former_classes: Mapping[str, str] = {}

    def modern(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config as the reference's own class has it; the names of fields are the spec's."""
        assumed = self.former_types.get(str(config.get("model_type")), {})
        return {**assumed, **config, "model_type": self.model_type}

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        """Tiny configs that parity is proven with, by name: `class` and `config`."""
        return variants().get(self.name, {})

    @property
    def _module(self) -> ModuleType:
        return import_module(f"zoo.models.{self.module}")

    @property
    def model(self) -> Any:
        return self._module.Model

    @property
    def config_class(self) -> Any:
        return self._module.Config


class CheckpointEntry(NamedTuple):
    """A published checkpoint; `config` holds the fields of its config.json that shape the model."""

    name: str
    architecture: str
    repo: str
    revision: str
    license: str
    parameters: int
    reference_class: str
    config: Mapping[str, Any]
    file: str = ""  # in a repository of several: the one that is this checkpoint
    golden: str = ""  # a file in zoo/parity/golden: published outputs

    @property
    def pinned(self) -> bool:
        return _COMMIT.fullmatch(self.revision) is not None

    @property
    def reference_config(self) -> dict[str, Any]:
        """What the repository's config.json says, as far as the model depends on it."""
        model_type = architectures()[self.architecture].model_type
        return {
            "model_type": model_type,
            "architectures": [self.reference_class],
            **self.config,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "license": self.license,
            "repo": self.repo,
            "revision": self.revision,
            "pinned": self.pinned,
        }


# --- look-ups ------------------------------------------------------------------------------------


@cache
def architectures() -> dict[str, Architecture]:
    return parse_architectures(_section("architectures"))


@cache
def checkpoints() -> dict[str, CheckpointEntry]:
    return parse_checkpoints(_section("checkpoints"), architectures())


@cache
def variants() -> dict[str, dict[str, dict[str, Any]]]:
    return parse_variants(_section("variants"), architectures())


def named(ref: Any) -> CheckpointEntry | None:
    """The checkpoint that `ref` names, if it is a name. A path is none, and costs no parsing."""
    if not isinstance(ref, str) or any(mark in ref for mark in _NOT_IN_NAMES):
        return None
    return checkpoints().get(ref)


def find(name: str) -> CheckpointEntry:
    known = checkpoints()
    if name not in known:
        near = did_you_mean(name.lower(), known) or " `zoo list` shows all of them."
        raise UnknownName(f"no checkpoint is called {name!r}.{near}")
    return known[name]


def architecture_for(config: Mapping[str, Any], where: str) -> tuple[Architecture, str | None]:
    """The architecture and the reference class that a config.json asks for."""
    model_type, classes = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str | None):
        raise ConfigError(f"{where}: model_type: expected a string, found {model_type!r}")
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(c, str) for c in classes)
    ):
        raise ConfigError(f"{where}: architectures: expected class names, found {classes!r}")
    reference_class = classes[0] if classes else None
    known = architectures()
    if model_type is None:
        # configs of the first years name only the class
        found = next((a for a in known.values() if reference_class in a.heads), None)
    else:
        found = next(
            (a for a in known.values() if model_type in (a.model_type, *a.former_types)), None
        )
    if found is None:
        asked = f"model_type {model_type!r}" if model_type else "no model_type"
        if reference_class:
            asked += f" and class {reference_class}"
        types = sorted(a.model_type for a in known.values())
        near = did_you_mean(model_type or "", types)
        raise UnsupportedArchitecture(f"{where}: {asked}; zoo implements {', '.join(types)}.{near}")
    reference_class = found.former_classes.get(reference_class or "", reference_class)
    if reference_class is not None and reference_class not in found.heads:
        raise UnsupportedArchitecture(
            f"{where}: architectures: {reference_class} is not implemented for "
            f"{found.model_type}; there is {listing(found.heads)}."
            f"{did_you_mean(reference_class, found.heads)}"
        )
    return found, reference_class


# --- schema --------------------------------------------------------------------------------------

_Check = tuple[Callable[[Any], bool], str]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_heads(value: Any) -> bool:
    heads = value.values() if _is_mapping(value) else ()
    return bool(heads) and all(
        _is_text(h) or (isinstance(h, list) and bool(h) and all(map(_is_text, h))) for h in heads
    )


_TEXT: _Check = (_is_text, "some text")
_MAPPING: _Check = (_is_mapping, "a mapping")
_HEADS: _Check = (_is_heads, "reference classes, each with a head or a list of heads")
_REPO_ID: _Check = (lambda v: _is_text(v) and bool(_REPO.fullmatch(v)), "org/name")
_PLAIN: _Check = (
    lambda v: _is_text(v) and not {"", ".", ".."} & {*v.split("/")} and "\\" not in v,
    "a path within",
)
_COUNT: _Check = (lambda v: type(v) is int and v > 0, "a positive whole number")
_FLAG: _Check = (lambda v: type(v) is bool, "true or false")

_ARCHITECTURE = {
    "model_type": _TEXT,
    "heads": _HEADS,
    "model": _TEXT,
    "spec": _TEXT,
    "oracle": _MAPPING,
    "former": (
        lambda v: (
            _is_mapping(v)
            and v.keys() == {"types", "classes"}
            and all(map(_is_mapping, v.values()))
        ),
        "types: with their fields, and classes:",
    ),
}
_CHECKPOINT = {
    "architecture": _TEXT,
    "repo": _REPO_ID,
    "revision": _TEXT,
    "license": _TEXT,
    "parameters": _COUNT,
    "class": _TEXT,
    "config": _MAPPING,
    "file": _PLAIN,
    "golden": _PLAIN,
}
_VARIANT = {"class": _TEXT, "config": _MAPPING, "untied": _FLAG}


def parse_architectures(data: Any) -> dict[str, Architecture]:
    entries = _entries(
        "architectures", data, _ARCHITECTURE, optional=("model", "spec", "oracle", "former")
    )
    return {
        name: Architecture(
            name,
            entry["model_type"],
            {c: (h,) if isinstance(h, str) else tuple(h) for c, h in entry["heads"].items()},
            module=entry.get("model", name),
            spec=entry.get("spec", name),
            oracle=entry.get("oracle", {}),
            former_types=entry.get("former", {}).get("types", {}),
            former_classes=entry.get("former", {}).get("classes", {}),
        )
        for name, entry in entries.items()
    }


def parse_checkpoints(data: Any, known: Mapping[str, Architecture]) -> dict[str, CheckpointEntry]:
    entries = _entries("checkpoints", data, _CHECKPOINT, optional=("file", "golden"))
    problems = []
    for name, entry in entries.items():
        where = f"checkpoints.{name}"
        if any(mark in name for mark in _NOT_IN_NAMES):
            problems.append(f"{where}: a name with / or : would be read as a path")
        problems += _class_problems(where, entry["architecture"], entry["class"], known)
    _raise(problems)
    return {
        name: CheckpointEntry(
            name,
            entry["architecture"],
            entry["repo"],
            entry["revision"],
            entry["license"],
            entry["parameters"],
            reference_class=entry["class"],
            config=entry["config"],
            file=entry.get("file", ""),
            golden=entry.get("golden", ""),
        )
        for name, entry in entries.items()
    }


def parse_variants(
    data: Any, known: Mapping[str, Architecture]
) -> dict[str, dict[str, dict[str, Any]]]:
    if not _is_mapping(data):
        raise RegistryError("registry.yaml: variants: expected a mapping by architecture")
    parsed = {
        architecture: _entries(f"variants.{architecture}", entries, _VARIANT, optional=("untied",))
        for architecture, entries in data.items()
    }
    _raise(
        problem
        for architecture, entries in parsed.items()
        for name, entry in entries.items()
        for problem in _class_problems(
            f"variants.{architecture}.{name}", architecture, entry["class"], known
        )
    )
    return parsed


def _entries(
    where: str, data: Any, schema: Mapping[str, _Check], optional: tuple[str, ...] = ()
) -> dict[str, dict[str, Any]]:
    """`data` as it came, once every field of every entry is known, present and of its kind."""
    if not _is_mapping(data):
        raise RegistryError(f"registry.yaml: {where}: expected a mapping by name")
    problems = []
    for name, entry in data.items():
        at = f"{where}.{name}"
        if not _is_mapping(entry):
            problems.append(f"{at}: expected a mapping, found {entry!r}")
            continue
        for field in schema:
            if field not in entry and field not in optional:
                problems.append(f"{at}: {field} is missing")
        for field, value in entry.items():
            if field not in schema:
                problems.append(f"{at}: unknown field {field}.{did_you_mean(field, schema)}")
            elif not schema[field][0](value):
                problems.append(f"{at}: {field}: expected {schema[field][1]}, found {value!r}")
    _raise(problems)
    return data


def _class_problems(
    where: str, architecture: str, reference_class: str, known: Mapping[str, Architecture]
) -> list[str]:
    if architecture not in known:
        near = did_you_mean(architecture, known)
        return [f"{where}: no architecture is called {architecture!r}.{near}"]
    if reference_class not in known[architecture].heads:
        near = did_you_mean(reference_class, known[architecture].heads)
        return [f"{where}: {architecture} has no class {reference_class!r}.{near}"]
    return []


def _raise(problems: Any) -> None:
    if problems := list(problems):
        raise RegistryError("registry.yaml: " + "; ".join(problems))


# --- reading -------------------------------------------------------------------------------------


def beside(name: str) -> Path:
    """Beside this file in an installed package, at the root in a checkout."""
    here = Path(__file__).with_name(name)
    return here if here.is_file() else here.parents[1] / here.name


def _section(name: str) -> Any:
    return parse_section(_text(), name)


@cache
def _text() -> str:
    return beside("registry.yaml").read_text(encoding="utf-8")


def parse_section(text: str, name: str) -> Any:
    """What stands under one top-level key. Only that is parsed: loading needs no variants."""
    starts = [*re.finditer(r"(?m)^(?![\s#]|---)([^:\n]+)", text)]
    keys = [match[1] for match in starts]
    if odd := [key for key in keys if key not in _SECTIONS]:
        near = did_you_mean(odd[0], _SECTIONS)
        raise RegistryError(f"registry.yaml: unknown section {odd[0]!r}.{near}")
    if keys.count(name) != 1:
        raise RegistryError(
            f"registry.yaml: section {name!r} stands {keys.count(name)} times in it"
        )
    at = keys.index(name)
    first = starts[at].start()
    last = starts[at + 1].start() if at + 1 < len(starts) else len(text)
    # the lines above stay, empty, so that an error points at the right one
    alone = "\n" * text.count("\n", 0, first) + text[first:last]
    return parse_yaml(alone, "registry.yaml", RegistryError)[name]
