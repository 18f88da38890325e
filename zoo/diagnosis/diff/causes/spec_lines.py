"""The line of a spec that has to be changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from converters.spec import Spec
from converters.spec_lines import field_line, rule_line
from converters.strict_json import parse_json
from zoo.checkpoints.plan_by_names import spec_of
from zoo.diagnosis.diff.causes.scene import Scene
from zoo.diagnosis.edits import Hypothesis

RULES = 3  # lines that are named


def advice(scene: Scene, idea: Hypothesis) -> str:
    """Where a rule or a field that is to be changed stands."""
    spec = spec_of(scene.model)
    if idea.config:
        return " ".join(_field(scene, spec, name, value) for name, value in idea.config.items())
    rules = dict.fromkeys(line for name in idea.where if (line := rule_line(spec, name)))
    # against somebody's code it may be either that is wrong
    advice = (
        "Change" if scene.comparison.other.trusted else "Or the other code is wrong: here it is"
    )
    return " ".join(f"{advice} {line}." for line in list(rules)[:RULES])


def _field(scene: Scene, spec: Spec, name: str, value: Any) -> str:
    """The line that reads a field, and what the config calls the number that it should be."""
    line, keys = field_line(spec, name), _keys(scene, value)
    read = f"It is read by {line}." if line else f"No line of {spec.where}/hf.yaml reads it."
    if not line and (line := field_line(spec, name, section="defaults")):
        read = f"It is a default, of {line}."
    if len(keys) != 1 or keys[0] in line:
        return read if line or keys else ""
    return f"{read} The config says that number as {keys[0]}."


def _keys(scene: Scene, value: Any) -> list[str]:
    """What the config that lies with the weights calls a number; flags and words are not told."""
    provenance = scene.model.provenance
    if type(value) not in (int, float) or provenance is None or not provenance.origin.config:
        return []
    fields = parse_json(provenance.origin.config.encode(), "config.json")
    return [key for key, x in _leaves(fields) if type(x) in (int, float) and x == value]


def _leaves(node: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items() if isinstance(node, Mapping) else ():
        yield f"{above}{key}", value
        yield from _leaves(value, f"{above}{key}.")
