"""Where a rule, or a field of a config, stands in the file of its spec."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from converters.language import parse_rule
from converters.spec import SPECS, Spec
from converters.strict_yaml import read_yaml
from zoo.errors import SpecError


def field_line(spec: Spec, name: str, dialect: str = "hf") -> str:
    """Likewise, where a field of the config is read."""
    found = [(f, n, t) for f, n, t in _section(spec, dialect) if t.startswith(f"    {name}:")]
    return "" if not found else f"line {found[0][1]} of {found[0][0]}: {found[0][2].strip()}"


def rule_line(spec: Spec, native: str, dialect: str = "hf") -> str:
    """`line 14 of converters/specs/x.yaml: …`, the rule of a native parameter; empty if unknown."""
    for file, n, text in _section(spec, dialect):
        try:
            rule = parse_rule(*_pair(text))
        except (SpecError, ValueError, TypeError):
            continue
        if any(target.name.match(native) is not None for target in rule.targets):
            return f"line {n} of {file}: {text.strip()}"
    return ""


def _pair(line: str) -> tuple[str, Any]:
    """`key: value`, a line of YAML by itself."""
    try:
        data = yaml.safe_load(line.strip())
    except yaml.YAMLError as error:
        raise ValueError(line) from error
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError(line)
    return next(iter(data.items()))


def _section(spec: Spec, dialect: str) -> Iterator[tuple[str, int, str]]:
    """The lines of one dialect."""
    section = ""
    for file, n, text in _text(spec):
        if text and not text.startswith((" ", "#")):
            section = text.partition(":")[0]
        elif section == dialect:
            yield file, n, text


def _text(spec: Spec) -> Iterator[tuple[str, int, str]]:
    """Each line of a spec's file, and of those that it is laid over."""
    name = spec.name
    while name:
        path = SPECS / f"{name}.yaml"
        if not path.is_file():
            return
        data = read_yaml(path, SpecError)
        for n, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield f"converters/specs/{path.name}", n, text
        name = data.get("like", "") if isinstance(data, dict) else ""
