"""YAML files as pydantic models, whose errors list every problem with its line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import yaml

from converters.strict_yaml import collector_paused
from zoo.errors import did_you_mean

with collector_paused():  # collecting garbage doubles the time of this import
    from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

__all__ = ["AfterValidator", "Entry", "Field", "Problem", "ValidationError", "line_of", "problems"]


class Entry(BaseModel):
    """A part of a file. The `title` of a field says what it expects; messages quote it."""

    # a schema is built when it is used first
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


class Problem(NamedTuple):
    """What is wrong with a value, and the keys under which it stands."""

    path: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}: {self.text}" if self.path else self.text


def problems(model: type[Entry], error: ValidationError, kind: str) -> Iterator[Problem]:
    """One problem per value, in our words; `kind` is what the file calls a field."""
    seen = set[tuple[str, ...]]()
    for each in error.errors():
        problem = _problem(model, tuple(map(str, each["loc"])), each, kind)
        if not problem.path or problem.path not in seen:
            seen.add(problem.path)
            yield problem


def _problem(model: type[Entry], keys: tuple[str, ...], error: Any, kind: str) -> Problem:
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    if not keys:
        return Problem((), f"expected a mapping, found {error['input']!r}")
    first, *below = keys
    if not below and error["type"] == "extra_forbidden":
        return Problem((), f"unknown {kind} {first}.{did_you_mean(first, fields)}")
    if not below and error["type"] == "missing":
        return Problem((), f"{first} is missing")
    inner = [part for part in get_args(fields[first].annotation) if _is_entry(part)]
    if below and inner:
        problem = _problem(inner[0], tuple(below), error, "field")
        return Problem((first, *problem.path), problem.text)
    return Problem(keys[:2], f"expected {fields[first].title}, found {error['input']!r}")


def _is_entry(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, Entry)


def line_of(text: str, path: tuple[str, ...]) -> int | None:
    """The line of a YAML text in which the value under these keys begins."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    line = None
    for name in path:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        pair = next((pair for pair in pairs if pair[0].value == name), None)
        if pair is None:
            return None
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line
