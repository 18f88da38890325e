"""registry.yaml: the architectures that zoo implements, and the checkpoints that have a name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple, TypeVar

from converters.strict_yaml import parse_yaml
from converters.validation import (
    AfterValidator,
    Entry,
    Field,
    ValidationError,
    line_of,
)
from converters.validation import problems as problems_of
from zoo.errors import (
    ConfigError,
    UnknownName,
    UnsupportedArchitecture,
    ZooError,
    did_you_mean,
    listing,
)

_SECTIONS = ("architectures", "checkpoints", "variants")
_NOT_IN_NAMES = ("/", "\\", ":")  # a reference with one of them is a path or a URL
_COMMIT = re.compile(r"[0-9a-f]{40}")


class RegistryError(ZooError):
    """registry.yaml does not parse or contradicts itself."""


def _is_within(path: str) -> str:
    if not path.strip() or {"", ".", ".."} & {*path.split("/")} or "\\" in path:
        raise ValueError
    return path


class Architecture(NamedTuple):
    """An architecture: its model file, its spec, and the head of each reference class."""

    name: str
    model_type: str
    heads: Mapping[str, tuple[str, ...]]  # of several, the first whose tensors are there
    module: str
    spec: str
    oracle: Mapping[str, Any] = {}  # what the reference library has instead of it
    # of code that is older than the reference: model types with their defaults, and classes
    former_types: Mapping[str, Mapping[str, Any]] = {}
    former_classes: Mapping[str, str] = {}

    def modern(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config in which a former model type and its defaults are today's."""
        assumed = self.former_types.get(str(config.get("model_type")), {})
        return {**assumed, **config, "model_type": self.model_type}

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        """The tiny configs that parity is proven with, by name: `class` and `config`."""
        return variants().get(self.name, {})

    @property
    def _module(self) -> ModuleType:
        return import_module(f"zoo.models.{self.module}")

    @property
    def model(self) -> Any:
        """The class `Model` of the architecture's module."""
        return self._module.Model

    @property
    def config_class(self) -> Any:
        """The class `Config` of the architecture's module."""
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
        """Whether the revision is a commit, which cannot move."""
        return _COMMIT.fullmatch(self.revision) is not None

    @property
    def reference_config(self) -> dict[str, Any]:
        """The part of the repository's config.json that the model depends on."""
        model_type = architectures()[self.architecture].model_type
        return {
            "model_type": model_type,
            "architectures": [self.reference_class],
            **self.config,
        }

    def to_json(self) -> dict[str, Any]:
        """What `zoo list --json` prints of it."""
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
    """Every architecture by name."""
    return parse_architectures(_section("architectures"), _text())


@cache
def checkpoints() -> dict[str, CheckpointEntry]:
    """Every published checkpoint by name."""
    return parse_checkpoints(_section("checkpoints"), architectures(), _text())


@cache
def variants() -> dict[str, dict[str, dict[str, Any]]]:
    """Tiny configs by architecture and name."""
    return parse_variants(_section("variants"), architectures(), _text())


def named(ref: Any) -> CheckpointEntry | None:
    """The checkpoint that `ref` names, or None. Nothing is parsed for a path."""
    if not isinstance(ref, str) or any(mark in ref for mark in _NOT_IN_NAMES):
        return None
    return checkpoints().get(ref)


def find(name: str) -> CheckpointEntry:
    """The checkpoint of this name; an UnknownName suggests others."""
    names = checkpoints()
    if name not in names:
        near = did_you_mean(name.lower(), names) or " `zoo list` shows all of them."
        raise UnknownName(f"no checkpoint is called {name!r}.{near}")
    return names[name]


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
    implemented = architectures()
    if model_type is None:
        # configs of the first years name only the class
        entry = next((a for a in implemented.values() if reference_class in a.heads), None)
    else:
        entry = next(
            (a for a in implemented.values() if model_type in (a.model_type, *a.former_types)), None
        )
    if entry is None:
        asked = f"model_type {model_type!r}" if model_type else "no model_type"
        if reference_class:
            asked += f" and class {reference_class}"
        types = sorted(a.model_type for a in implemented.values())
        near = did_you_mean(model_type or "", types)
        raise UnsupportedArchitecture(f"{where}: {asked}; zoo implements {', '.join(types)}.{near}")
    reference_class = entry.former_classes.get(reference_class or "", reference_class)
    if reference_class is not None and reference_class not in entry.heads:
        raise UnsupportedArchitecture(
            f"{where}: architectures: {reference_class} is not implemented for "
            f"{entry.model_type}; there is {listing(entry.heads)}."
            f"{did_you_mean(reference_class, entry.heads)}"
        )
    return entry, reference_class


# --- what the file may hold ----------------------------------------------------------------------

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]


class Former(Entry):
    """Model types and classes of code that was published before the reference had it."""

    types: dict[str, dict[str, Any]] = Field(
        title="`model type: fields` lines",
        description="Former model types, each with the fields that such configs take for granted",
    )
    classes: dict[str, str] = Field(
        title="`former class: class` lines", description="Former names of reference classes"
    )


class ArchitectureFields(Entry):
    """An entry of `architectures`."""

    model_type: Text = Field(title="some text", description="`model_type` in config.json")
    heads: Annotated[
        dict[str, Text | Annotated[list[Text], Field(min_length=1)]], Field(min_length=1)
    ] = Field(
        title="reference classes, each with a head or a list of heads",
        description="The head of each class; of several, the first whose tensors are there",
    )
    model: Text | None = Field(
        default=None,
        title="some text",
        description="The module in zoo/models; default: the entry's name",
    )
    spec: Text | None = Field(
        default=None,
        title="some text",
        description="The folder of specs; default: the entry's name",
    )
    oracle: dict[str, Any] = Field(
        default_factory=dict,
        title="a mapping",
        description="What the reference library has instead of an architecture that it lacks",
    )
    former: Former | None = Field(
        default=None, title="types: with their fields, and classes:", description=Former.__doc__
    )


class CheckpointFields(Entry):
    """An entry of `checkpoints`."""

    architecture: Text = Field(title="some text", description="An entry of `architectures`")
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] = Field(
        title="org/name", description="The repository on the hub"
    )
    revision: Text = Field(
        title="some text", description="A commit, or `main` if none is known: it may move"
    )
    license: Text = Field(title="some text", description="The license of the weights")
    parameters: Annotated[int, Field(gt=0)] = Field(
        title="a positive whole number", description="Parameters of the class; tied ones count once"
    )
    reference_class: Text = Field(
        alias="class", title="some text", description="The reference class that config.json names"
    )
    config: dict[str, Any] = Field(
        title="a mapping", description="The fields of config.json that shape the model"
    )
    file: Annotated[str, AfterValidator(_is_within)] = Field(
        default="",
        title="a path within",
        description="The file of a repository of several that is this checkpoint",
    )
    golden: Annotated[str, AfterValidator(_is_within)] = Field(
        default="",
        title="a path within",
        description="Published outputs: a file in zoo/parity/golden",
    )


class VariantFields(Entry):
    """A tiny config that parity is proven with."""

    reference_class: Text = Field(alias="class", title="some text", description="Reference class")
    config: dict[str, Any] = Field(
        title="a mapping", description="Fields over the reference's own defaults"
    )
    untied: bool = Field(
        default=False,
        title="true or false",
        description="The reference is made without tying its weights",
    )


class RegistryFile(Entry):
    """registry.yaml: what zoo implements, and the checkpoints that have a name."""

    architectures: dict[str, ArchitectureFields]
    checkpoints: dict[str, CheckpointFields]
    variants: dict[str, dict[str, VariantFields]]


def parse_architectures(data: Any, text: str = "") -> dict[str, Architecture]:
    """Check the section `architectures`.

    Args:
        data: The section as plain data.
        text: The YAML text that it comes from, to name lines in messages.

    Returns:
        The architectures by name.

    Raises:
        RegistryError: Entries are wrong; the message lists every problem.
    """
    entries = _entries("architectures", data, ArchitectureFields, text)
    return {
        name: Architecture(
            name,
            entry.model_type,
            {c: (h,) if isinstance(h, str) else tuple(h) for c, h in entry.heads.items()},
            module=entry.model or name,
            spec=entry.spec or name,
            oracle=entry.oracle,
            former_types=entry.former.types if entry.former else {},
            former_classes=entry.former.classes if entry.former else {},
        )
        for name, entry in entries.items()
    }


def parse_checkpoints(
    data: Any, implemented: Mapping[str, Architecture], text: str = ""
) -> dict[str, CheckpointEntry]:
    """Check the section `checkpoints` against the architectures.

    Args:
        data: The section as plain data.
        implemented: The architectures by name.
        text: The YAML text that it comes from, to name lines in messages.

    Returns:
        The checkpoints by name.

    Raises:
        RegistryError: Entries are wrong; the message lists every problem.
    """
    entries = _entries("checkpoints", data, CheckpointFields, text)
    problems = list[Problem]()
    for name, entry in entries.items():
        path = ("checkpoints", name)
        if any(mark in name for mark in _NOT_IN_NAMES):
            problems.append((path, f"{'.'.join(path)}: a name with / or : would be read as a path"))
        problems += _class_problems(path, entry.architecture, entry.reference_class, implemented)
    _refuse(problems, text)
    return {name: CheckpointEntry(name, **dict(entry)) for name, entry in entries.items()}


def parse_variants(
    data: Any, implemented: Mapping[str, Architecture], text: str = ""
) -> dict[str, dict[str, dict[str, Any]]]:
    """Check the section `variants` against the architectures.

    Args:
        data: The section as plain data.
        implemented: The architectures by name.
        text: The YAML text that it comes from, to name lines in messages.

    Returns:
        The section: tiny configs by architecture and name.

    Raises:
        RegistryError: Entries are wrong; the message lists every problem.
    """
    if not isinstance(data, dict):
        raise RegistryError("registry.yaml: variants: expected a mapping by architecture")
    problems = list[Problem]()
    for architecture, variants in data.items():
        section = f"variants.{architecture}"
        for name, entry in _entries(section, variants, VariantFields, text).items():
            path = ("variants", str(architecture), name)
            problems += _class_problems(path, architecture, entry.reference_class, implemented)
    _refuse(problems, text)
    return data


Fields = TypeVar("Fields", bound=Entry)
Keys = tuple[str, ...]
Problem = tuple[Keys, str]  # the keys under which a value stands, what is wrong with it


def _entries(section: str, data: Any, model: type[Fields], text: str) -> dict[str, Fields]:
    """Each entry as a model, once all of them are valid."""
    if not isinstance(data, dict):
        raise RegistryError(f"registry.yaml: {section}: expected a mapping by name")
    entries, problems = dict[str, Fields](), list[Problem]()
    for name, entry in data.items():
        path = (*section.split("."), str(name))
        if type(name) is not str:
            problems.append((path, f"{'.'.join(path)}: expected a name"))
        try:
            entries[name] = model.model_validate(entry)
        except ValidationError as error:
            problems += [
                ((*path, *each.path), f"{'.'.join(path)}: {each}")
                for each in problems_of(model, error, "field")
            ]
    _refuse(problems, text)
    return entries


def _class_problems(
    path: Keys, architecture: str, reference_class: str, implemented: Mapping[str, Architecture]
) -> list[Problem]:
    where = ".".join(path)
    if architecture not in implemented:
        near = did_you_mean(architecture, implemented)
        return [(path, f"{where}: no architecture is called {architecture!r}.{near}")]
    if reference_class not in implemented[architecture].heads:
        near = did_you_mean(reference_class, implemented[architecture].heads)
        return [(path, f"{where}: {architecture} has no class {reference_class!r}.{near}")]
    return []


def _refuse(problems: Iterable[Problem], text: str) -> None:
    """Raise an error that lists the problems, if there are any, with their lines in the text."""
    messages = [
        f"line {line}: {message}" if text and (line := line_of(text, path)) else message
        for path, message in problems
    ]
    if messages:
        raise RegistryError("registry.yaml: " + "; ".join(messages))


# --- reading -------------------------------------------------------------------------------------


def beside(name: str) -> Path:
    """The path of a data file: beside this file if installed, at the root in a checkout."""
    here = Path(__file__).with_name(name)
    return here if here.is_file() else here.parents[1] / here.name


def _section(name: str) -> Any:
    return parse_section(_text(), name)


@cache
def _text() -> str:
    return beside("registry.yaml").read_text(encoding="utf-8")


def parse_section(text: str, name: str) -> Any:
    """Parse what is under one top-level key, and nothing else: loading needs no variants."""
    starts = [*re.finditer(r"(?m)^(?![\s#]|---)([^:\n]+)", text)]
    keys = [match[1] for match in starts]
    if unknown := [key for key in keys if key not in _SECTIONS]:
        near = did_you_mean(unknown[0], _SECTIONS)
        raise RegistryError(f"registry.yaml: unknown section {unknown[0]!r}.{near}")
    if keys.count(name) != 1:
        raise RegistryError(
            f"registry.yaml: section {name!r} stands {keys.count(name)} times in it"
        )
    at = keys.index(name)
    first = starts[at].start()
    last = starts[at + 1].start() if at + 1 < len(starts) else len(text)
    # empty lines instead of the sections above keep line numbers right
    alone = "\n" * text.count("\n", 0, first) + text[first:last]
    return parse_yaml(alone, "registry.yaml", RegistryError)[name]
