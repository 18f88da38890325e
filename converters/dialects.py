"""Which dialect of which architecture a file's names are, and what its config says."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from converters.checkpoint import Checkpoint, confined
from converters.containers import FORMATS, Opened, open_place
from converters.formats import TensorInfo
from converters.language import NUMBER_WORDS, Rule, Sizes, solve
from converters.spec import Container, Dialect, Spec, load_spec, spec_names
from converters.strict_json import read_json
from zoo.errors import AmbiguousCheckpoint, ConfigError, NotACheckpoint, listing


class Found(NamedTuple):
    """A checkpoint, the dialect that its names are, and its config in that dialect's words."""

    spec: Spec
    dialect: Dialect
    container: Container
    checkpoint: Checkpoint
    reference: dict[str, Any]
    shards: int
    config_from: str  # for messages
    reader: Any  # of the first file, which may say more than tensors and a config

    def fields(self, ignore: Iterable[str] = ()) -> tuple[dict[str, Any], list[str]]:
        """Native fields that config, shapes and names tell; everything wrong with the config."""
        fields, problems = self.dialect.read_config(self.reference, ignore)
        header, shared = self.checkpoint.tensors, self.checkpoint.shared
        told = infer(self.spec, self.dialect, fields, header, self.shards, shared)
        return {**fields, **told}, problems

    @property
    def heads(self) -> tuple[str, ...]:
        """The head that its tensors are of; several where they may be any one of these."""
        if not self.spec.head:
            return ("lm",)
        there = _there(self.dialect, self.checkpoint.tensors, self.shards, self.checkpoint.shared)
        return next((heads for heads, name in self.spec.head if name in there), ("none",))


def every_dialect() -> list[tuple[Spec, Dialect, Container]]:
    """All of them that have files of their own kind."""
    return [
        (spec, dialect, dialect.container)
        for spec in map(load_spec, spec_names())
        for dialect in spec.dialects.values()
        if dialect.container is not None
    ]


def find(place: Path, mmap: bool | None = None) -> Found | None:
    """What a file or directory holds; None where no file in it is of a known format."""
    opened = open_place(place, mmap)
    if opened is None:
        return None
    fits: list[Found] = []
    looked: list[str] = []
    for spec, dialect, container in every_dialect():
        if container.format != opened.kind:
            continue
        checkpoint = opened.checkpoint(container)
        name = f"{spec.name} of {container.about or dialect.name}"
        if checkpoint is None:
            looked.append(f"{name}: nothing below {' or '.join(filter(None, container.within))}")
            continue
        odd = _unknown(dialect, container, checkpoint)
        values = opened.values
        wrong = [k for k, allowed in dialect.detect.items() if values.get(k) not in allowed]
        if not odd and not wrong and checkpoint.tensors:
            reference, said = _reference(container, opened, checkpoint)
            shards = len(opened.readers) if container.sharded else 1
            first = opened.readers[0][1]
            fits.append(Found(spec, dialect, container, checkpoint, reference, shards, said, first))
        elif wrong:
            looked.append(f"{name}: {listing(f'{k} is {values.get(k)!r}' for k in wrong)}")
        else:
            count = len(checkpoint.tensors)
            looked.append(f"{name}: knows {count - len(odd)} of {count} names; not {odd[:1]}")
    if len(fits) == 1:
        return fits[0]
    if fits:
        named = listing(f"{found.spec.name} of {found.container.about}" for found in fits)
        raise AmbiguousCheckpoint(f"{place}: its names are those of {named}, and nothing tells")
    lines = "\n  ".join(looked) or f"no dialect has files of format {opened.kind}"
    raise NotACheckpoint(
        f"{place}: {FORMATS[opened.kind].about} whose names fit no dialect, and no config.json:\n"
        f"  {lines}"
    )


def _unknown(dialect: Dialect, container: Container, checkpoint: Checkpoint) -> list[str]:
    """Names that the dialect says nothing of; files of the same names are looked at once."""
    first = (
        {n[2:] for n in checkpoint.tensors if n.startswith("0/")} if container.sharded else set()
    )
    known = {name for name in first if dialect.knows(f"0/{name}")}
    return [
        name
        for name in checkpoint.tensors
        if name.partition("/")[2] not in known and not dialect.knows(name)
    ]


def _reference(
    container: Container, opened: Opened, checkpoint: Checkpoint
) -> tuple[dict[str, Any], str]:
    """(the config in the dialect's own words, where it lies); empty where there is none."""
    values, file = opened.values, opened.readers[0][0]
    if container.config == ".":
        return nested(values), f"{file}: header"
    if container.config.startswith("{"):
        above = f"{values.get(container.config[1:-1])}."
        about = {k: v for k, v in values.items() if k.partition(".")[0] not in container.beside}
        # a config's arrays are short; long ones are of a format's own class, and no plain data
        long = [k for k, v in about.items() if isinstance(v, Iterable) and not _plain(v)]
        if long:
            raise ConfigError(f"{file}: {listing(long)}: longer than anything that a config says")
        return nested({k.removeprefix(above): v for k, v in about.items()}), f"{file}: header"
    if container.config.endswith(".json"):
        path = checkpoint.root / container.config
        if not os.path.lexists(path):
            return {}, f"{path}, which is not there,"
        return read_json(confined(checkpoint.root, container.config)), str(path)
    said = values.get(container.config)
    return (said if isinstance(said, dict) else {}), f"{file}: {container.config or 'no config'}"


def _plain(value: Any) -> bool:
    return isinstance(value, str | list | dict)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`, which is how a spec's paths look."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        *above, last = key.split(".")
        place = out
        for name in above:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{key}: {name} is a value and holds others")
        place[last] = value
    return out


# --- what shapes and names tell ------------------------------------------------------------------


def infer(
    spec: Spec,
    dialect: Dialect,
    fields: Mapping[str, Any],
    header: Mapping[str, TensorInfo],
    shards: int = 1,
    shared: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Native fields that the config leaves open and the files tell: of several, the first."""
    if shards > 1:
        header = {name: info for name, info in header.items() if name.startswith("0/")}
    arrays = list(_arrays(dialect.rules, dialect.prefix, header, shards))
    told: dict[str, Any] = {}
    for line in spec.shapes:
        for name, shape in arrays:
            if (numbers := line.name.match(name)) is None or line.pattern is None:
                continue
            sizes: Sizes = {k: v for k, v in {**fields, **told}.items() if type(v) is int}
            if solve(line.pattern, shape, sizes) is None:
                told.update({a: sizes[a] for a in line.pattern.axes if fields.get(a) is None})
            for axis, number in numbers.items():
                if fields.get(axis) is None:
                    told[axis] = max(told.get(axis, 0), number + 1)
    names = _there(dialect, header, shards, shared or {})
    for condition, name in spec.present.items():
        field = condition.removeprefix("not ")
        if fields.get(field) is None:
            told[field] = (name in names) == (field == condition)
    return told


def _there(
    dialect: Dialect, header: Mapping[str, TensorInfo], shards: int, without: Mapping[str, str]
) -> set[str]:
    """Native names of what is on disk and no second name."""
    arrays = _arrays(dialect.rules, dialect.prefix, header, shards, without)
    return {name for name, _ in arrays}


def _arrays(
    rules: Iterable[Rule],
    prefix: str,
    header: Mapping[str, TensorInfo],
    shards: int,
    without: Mapping[str, str] | None = None,
) -> Iterable[tuple[str, tuple[int, ...]]]:
    """(native name, its shape) as far as rules give one without a config."""
    rules = tuple(rules)
    for disk, info in header.items():
        if without and disk in without:
            continue
        for rule in rules:
            for canonical in {disk.removeprefix(prefix), disk}:
                if (binding := rule.source.name.match(canonical)) is None:
                    continue
                sizes: Sizes = {**NUMBER_WORDS, "shard": shards}
                listed = [rule.spread(target) for target in rule.targets]
                sizes |= {n: len(p.values) for each in listed for n, p in each.items() if p.values}
                problem = rule.source.pattern and solve(rule.source.pattern, info.shape, sizes)
                for target, spread in zip(rule.targets, listed, strict=True):
                    if problem or not all(p.values for p in spread.values()):
                        continue  # as many as the config says
                    shape = info.shape
                    if target.pattern is not None:
                        if not target.pattern.axes - {"1"} <= sizes.keys():
                            continue
                        shape = target.pattern.shape(sizes)
                    for point in product(*(range(sizes[n]) for n in spread)):
                        here = {**binding, **dict(zip(spread, point, strict=True))}
                        yield target.name.format(here), shape
