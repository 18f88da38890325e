"""Find the line of a spec that holds a rule or reads a config field."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from converters.language import parse_rule
from converters.spec import Spec
from converters.spec_files import chain
from zoo.errors import SpecError

RULE_SECTIONS = ("weights", "heads", "when", "alternatives")


def field_line(spec: Spec, name: str, dialect: str = "hf", section: str = "config") -> str:
    """Where a config field is read: `line 30 of converters/specs/x/hf.yaml: eps: …`, or ""."""
    for file, part in _files(spec, dialect):
        for key, value in _pairs(_child(part, section)):
            if key.value == name and value.value != "null":
                return f"line {key.start_mark.line + 1} of {file}: {name}: {value.value}"
    return ""


def rule_line(spec: Spec, native: str, dialect: str = "hf") -> str:
    """The rule of a native parameter: `line 14 of converters/specs/x/hf.yaml: …`, or ""."""
    for file, section in _files(spec, dialect):
        for place in RULE_SECTIONS:
            for key, value in _rules(_child(section, place)):
                targets = _targets(value)
                if _makes(key.value, targets, native):
                    shown = targets[0] if len(targets) == 1 else f"[{', '.join(targets)}]"
                    return f"line {key.start_mark.line + 1} of {file}: {key.value}: {shown}"
    return ""


def _makes(source: str, targets: list[str], native: str) -> bool:
    try:
        rule = parse_rule(source, targets[0] if len(targets) == 1 else targets)
    except (SpecError, IndexError):
        return False
    return any(target.name.match(native) is not None for target in rule.targets)


def _targets(value: yaml.Node) -> list[str]:
    nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
    return [node.value for node in nodes if isinstance(node, yaml.ScalarNode)]


def _rules(node: yaml.Node | None) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Yield every pair below, those under conditions too."""
    for key, value in _pairs(node):
        if isinstance(value, yaml.MappingNode):
            yield from _rules(value)
        else:
            yield key, value


def _pairs(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    return node.value if isinstance(node, yaml.MappingNode) else []


def _child(node: yaml.Node | None, name: str) -> yaml.Node | None:
    return next((value for key, value in _pairs(node) if key.value == name), None)


def _files(spec: Spec, dialect: str) -> Iterator[tuple[str, yaml.Node | None]]:
    """A dialect's file, and those that it is laid over."""
    for name, text in chain(f"{spec.name}/{dialect}"):
        yield f"converters/specs/{name}.yaml", yaml.compose(text, Loader=yaml.SafeLoader)
