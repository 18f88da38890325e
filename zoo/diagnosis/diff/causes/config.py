"""Config fields: rebuild the model with another value and compare at the same module."""

from __future__ import annotations

from collections.abc import Iterator

from converters.strict_json import parse_json
from zoo.checkpoints.plan_by_names import spec_of
from zoo.diagnosis.diff.causes.scene import Scene
from zoo.diagnosis.edits import Changes, Hypothesis
from zoo.diagnosis.variants import NOT_TRIED, config_hypothesis, plain, values
from zoo.errors import ConfigError, ZooError


def read_again(scene: Scene) -> Iterator[Hypothesis]:
    """What the spec reads in the config that lies with the weights, and the model has not."""
    for changes in _unlike(scene):
        if scene.steady and _heals(scene, changes):
            yield config_hypothesis(scene.model.config, **changes)


def tried(scene: Scene, flags: bool = False) -> Iterator[Hypothesis]:
    """Every field, one after the other, with each value that it may have meant; or flags alone."""
    if not scene.steady:
        return
    config = scene.model.config
    for name in type(config).model_fields:
        if name in NOT_TRIED or "dropout" in name:
            continue
        if flags and not isinstance(getattr(config, name), bool):
            continue
        for value in values(config, name, scene.numbers):
            if _heals(scene, {name: value}):
                yield config_hypothesis(config, **{name: value})
                break


def _heals(scene: Scene, changes: Changes) -> bool:
    try:
        return scene.error_of(scene.rebuilt(changes)) <= scene.measurement.limit
    except (RuntimeError, ZooError, ValueError, IndexError, TypeError, ZeroDivisionError):
        return False


def _unlike(scene: Scene) -> Iterator[Changes]:
    provenance = scene.model.provenance
    if provenance is None or provenance.origin.dialect != "hf" or not provenance.origin.config:
        return
    dialect = spec_of(scene.model).dialect("hf")
    read, _ = dialect.read_config(parse_json(provenance.origin.config.encode(), "config.json"))
    config = scene.model.config
    try:
        there = type(config)(**{**read, "head": config.head})
    except ConfigError:
        return
    unlike = {
        name: plain(getattr(there, name))
        for name in type(config).model_fields
        if name != "labels" and getattr(there, name) != getattr(config, name)
    }
    yield from ({name: value} for name, value in unlike.items())
    if len(unlike) > 1:
        yield unlike
