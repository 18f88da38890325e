"""Find the dialect whose names a checkpoint's tensors have, and its config."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from converters.checkpoint import Checkpoint
from converters.containers import FORMATS, FileSet, open_place
from converters.formats import TensorInfo
from converters.language import NUMBER_WORDS, Rule, Sizes, solve
from converters.paths import confined
from converters.spec import Container, Dialect, Spec, load_spec, spec_names
from converters.strict_json import read_json
from zoo.errors import AmbiguousCheckpoint, ConfigError, NotACheckpoint, listing


class DialectMatch(NamedTuple):
    """A checkpoint, the dialect whose names it has, and its config in the dialect's terms."""

    spec: Spec
    dialect: Dialect
    container: Container
    checkpoint: Checkpoint
    reference: dict[str, Any]
    shards: int
    config_from: str  # for messages
    reader: Any  # of the first file, for metadata

    def fields(self, ignore: Iterable[str] = ()) -> tuple[dict[str, Any], list[str]]:
        """Return (native config fields, everything wrong with the config).

        Fields come from the config, and from shapes and names where it leaves them open.
        """
        fields, problems = self.dialect.read_config(self.reference, ignore)
        header, shared = self.checkpoint.tensors, self.checkpoint.shared
        inferred = infer(self.spec, self.dialect, fields, header, self.shards, shared)
        return {**fields, **inferred}, problems

    @property
    def heads(self) -> tuple[str, ...]:
        """The head that its tensors belong to; several if they fit any of these."""
        if not self.spec.head:
            return ("lm",)
        there = _there(self.dialect, self.checkpoint.tensors, self.shards, self.checkpoint.shared)
        return next((heads for heads, name in self.spec.head if name in there), ("none",))


def every_dialect() -> list[tuple[Spec, Dialect, Container]]:
    """Return all dialects with a file format of their own."""
    return [
        (spec, dialect, dialect.container)
        for spec in map(load_spec, spec_names())
        for dialect in spec.dialects.values()
        if dialect.container is not None
    ]


def find(place: Path, mmap: bool | None = None) -> DialectMatch | None:
    """Match a file or directory with the dialects of all specs.

    Returns:
        The match; None if no file in it has a known format.

    Raises:
        NotACheckpoint: If its names fit no dialect.
        AmbiguousCheckpoint: If they fit several.
    """
    opened = open_place(place, mmap)
    if opened is None:
        return None
    fits: list[DialectMatch] = []
    looked: list[str] = []
    for spec, dialect, container in every_dialect():
        if container.format != opened.kind:
            continue
        checkpoint = opened.checkpoint(container)
        name = f"{spec.name} of {container.about or dialect.name}"
        if checkpoint is None:
            looked.append(f"{name}: nothing below {' or '.join(filter(None, container.within))}")
            continue
        unmapped = _unknown(dialect, container, checkpoint)
        values = opened.values
        wrong = [k for k, allowed in dialect.is_.items() if values.get(k) not in allowed]
        if not unmapped and not wrong and checkpoint.tensors:
            reference, source = _reference(container, opened, checkpoint)
            shards = len(opened.readers) if container.sharded else 1
            first = opened.readers[0][1]
            fits.append(
                DialectMatch(spec, dialect, container, checkpoint, reference, shards, source, first)
            )
        elif wrong:
            looked.append(f"{name}: {listing(f'{k} is {values.get(k)!r}' for k in wrong)}")
        else:
            count = len(checkpoint.tensors)
            looked.append(
                f"{name}: knows {count - len(unmapped)} of {count} names; not {unmapped[:1]}"
            )
    if len(fits) == 1:
        return fits[0]
    if fits:
        named = listing(f"{match.spec.name} of {match.container.about}" for match in fits)
        raise AmbiguousCheckpoint(
            f"{place}: its names are those of {named}, and nothing in it decides which"
        )
    lines = "\n  ".join(looked) or f"no dialect has files of format {opened.kind}"
    raise NotACheckpoint(
        f"{place}: {FORMATS[opened.kind].about} whose names fit no dialect, and no config.json:\n"
        f"  {lines}"
    )


def _unknown(dialect: Dialect, container: Container, checkpoint: Checkpoint) -> list[str]:
    """Return the names that a dialect does not know; names repeated in shards count once."""
    first = (
        {n[2:] for n in checkpoint.tensors if n.startswith("0/")} if container.sharded else set()
    )
    mapped = {name for name in first if dialect.knows(f"0/{name}")}
    return [
        name
        for name in checkpoint.tensors
        if name.partition("/")[2] not in mapped and not dialect.knows(name)
    ]


def _reference(
    container: Container, opened: FileSet, checkpoint: Checkpoint
) -> tuple[dict[str, Any], str]:
    """Return (config in the dialect's terms, where it is); empty if there is none."""
    values, file = opened.values, opened.readers[0][0]
    if container.config == ".":
        return nested(values), f"{file}: header"
    if container.config.startswith("{"):
        above = f"{values.get(container.config[1:-1])}."
        about = {k: v for k, v in values.items() if k.partition(".")[0] not in container.beside}
        # a config's arrays are short; long ones have a class of the format and are no plain data
        long = [k for k, v in about.items() if isinstance(v, Iterable) and not _plain(v)]
        if long:
            raise ConfigError(f"{file}: {listing(long)}: longer than anything that a config says")
        return nested({k.removeprefix(above): v for k, v in about.items()}), f"{file}: header"
    if container.config.endswith(".json"):
        path = checkpoint.root / container.config
        if not os.path.lexists(path):
            return {}, f"{path}, which is not there,"
        return read_json(confined(checkpoint.root, container.config)), str(path)
    section = values.get(container.config)
    return (
        section if isinstance(section, dict) else {}
    ), f"{file}: {container.config or 'no config'}"


def _plain(value: Any) -> bool:
    return isinstance(value, str | list | dict)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys as nested dicts, the form of a spec's paths.

    >>> nested({"rope.base": 10000.0, "layers": 2})
    {'rope': {'base': 10000.0}, 'layers': 2}
    """
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


# --- fields from shapes and names -----------------------------------------------------------------


def infer(
    spec: Spec,
    dialect: Dialect,
    fields: Mapping[str, Any],
    header: Mapping[str, TensorInfo],
    shards: int = 1,
    shared: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return native fields that the config leaves open and shapes or names determine."""
    if shards > 1:
        header = {name: info for name, info in header.items() if name.startswith("0/")}
    arrays = list(_arrays(dialect.rules, dialect.prefix, header, shards))
    inferred: dict[str, Any] = {}
    for line in spec.shapes:
        for name, shape in arrays:
            if (numbers := line.name.match(name)) is None or line.pattern is None:
                continue
            sizes: Sizes = {k: v for k, v in {**fields, **inferred}.items() if type(v) is int}
            if solve(line.pattern, shape, sizes) is None:
                inferred.update({a: sizes[a] for a in line.pattern.axes if fields.get(a) is None})
            for axis, number in numbers.items():
                if fields.get(axis) is None:
                    inferred[axis] = max(inferred.get(axis, 0), number + 1)
    names = _there(dialect, header, shards, shared or {})
    for condition, name in spec.present.items():
        field = condition.removeprefix("not ")
        if fields.get(field) is None:
            inferred[field] = (name in names) == (field == condition)
    return inferred


def _there(
    dialect: Dialect, header: Mapping[str, TensorInfo], shards: int, without: Mapping[str, str]
) -> set[str]:
    """Return native names of the arrays on disk, without second names."""
    arrays = _arrays(dialect.rules, dialect.prefix, header, shards, without)
    return {name for name, _ in arrays}


def _arrays(
    rules: Iterable[Rule],
    prefix: str,
    header: Mapping[str, TensorInfo],
    shards: int,
    without: Mapping[str, str] | None = None,
) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Yield (native name, shape) as far as rules determine them without a config."""
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
                        continue  # their number is in the config alone
                    shape = info.shape
                    if target.pattern is not None:
                        if not target.pattern.axes - {"1"} <= sizes.keys():
                            continue
                        shape = target.pattern.shape(sizes)
                    for point in product(*(range(sizes[n]) for n in spread)):
                        here = {**binding, **dict(zip(spread, point, strict=True))}
                        yield target.name.format(here), shape
