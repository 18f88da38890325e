"""Fields of a config: the model built anew with another value, and looked at in the same place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from converters.strict_json import parse_json
from zoo.checkpoints.foreign import spec_of
from zoo.diagnosis.diff.causes.scene import Idea, Scene
from zoo.diagnosis.edits import NOT_TRIED, Changes, values
from zoo.errors import ConfigError, ZooError


def read_again(scene: Scene) -> Iterator[Idea]:
    """What the spec reads in the config that lies with the weights, and the model has not."""
    for changes in _unlike(scene):
        if scene.steady and _heals(scene, changes):
            yield _idea(scene, changes)


def tried(scene: Scene, flags: bool = False) -> Iterator[Idea]:
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
                yield _idea(scene, {name: value})
                break


def _idea(scene: Scene, changes: Changes) -> Idea:
    config = scene.model.config
    now = {name: _plain(getattr(config, name)) for name in changes}
    said = {name: _plain(value) for name, value in changes.items()}
    what = " and ".join(f"config field {n} is {now[n]!r}, not {v!r}" for n, v in said.items())
    return Idea(what, " and ".join(f"{n} is {v!r}" for n, v in said.items()), config=changes)


def _plain(value: Any) -> Any:
    return value.to_json() if hasattr(value, "to_json") else value


def _heals(scene: Scene, changes: Changes) -> bool:
    try:
        return scene.error_of(scene.rebuilt(changes)) <= scene.reading.limit
    except (RuntimeError, ZooError, ValueError, IndexError, TypeError, ZeroDivisionError):
        return False


def _unlike(scene: Scene) -> Iterator[Changes]:
    known = scene.model.provenance
    if known is None or known.origin.dialect != "hf" or not known.origin.config:
        return
    dialect = spec_of(scene.model).dialect("hf")
    said, _ = dialect.read_config(parse_json(known.origin.config.encode(), "config.json"))
    config = scene.model.config
    try:
        there = type(config)(**{**said, "head": config.head})
    except ConfigError:
        return
    unlike = {
        name: _plain(getattr(there, name))
        for name in type(config).model_fields
        if name != "labels" and getattr(there, name) != getattr(config, name)
    }
    yield from ({name: value} for name, value in unlike.items())
    if len(unlike) > 1:
        yield unlike
