"""Find the line of a spec that holds a rule or reads a config field."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from converters.language import parse_rule
from converters.spec import SPECS, Spec
from converters.strict_yaml import read_yaml
from zoo.errors import SpecError

RULE_SECTIONS = ("weights", "heads", "when", "alternatives")


def field_line(spec: Spec, name: str, dialect: str = "hf", section: str = "config") -> str:
    """Return `line 30 of converters/specs/x.yaml: eps: …`, where a config field is read."""
    for file, part in _sections(spec, dialect):
        for key, value in _pairs(_child(part, section)):
            if key.value == name and value.value != "null":
                return f"line {key.start_mark.line + 1} of {file}: {name}: {value.value}"
    return ""


def rule_line(spec: Spec, native: str, dialect: str = "hf") -> str:
    """Return `line 14 of converters/specs/x.yaml: …`, the rule of a native parameter.

    The result is empty if no rule makes it.
    """
    for file, section in _sections(spec, dialect):
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


def _sections(spec: Spec, dialect: str) -> Iterator[tuple[str, yaml.Node | None]]:
    """Yield one dialect's section of a spec's file, then those of the specs it extends."""
    name = spec.name
    while name:
        path = SPECS / f"{name}.yaml"
        if not path.is_file():
            return
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        yield f"converters/specs/{path.name}", _child(root, dialect)
        data = read_yaml(path, SpecError)
        name = data.get("like", "") if isinstance(data, dict) else ""
