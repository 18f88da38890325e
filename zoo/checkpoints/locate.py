"""Turn a reference into a `Located`: directory, architecture, config in native fields."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from converters.paths import confined
from converters.quantized import settings
from converters.quantized.settings import FIELD as QUANTIZED
from converters.spec import Dialect, load_spec
from zoo import registry
from zoo.checkpoints.build import names_on_disk, native_of, on_meta, skeleton_of
from zoo.checkpoints.config_file import read_config
from zoo.checkpoints.downloads import naming_damaged_blobs
from zoo.checkpoints.file_names import CONFIG, NATIVE_FILE
from zoo.checkpoints.handle import Located, as_published
from zoo.checkpoints.registry_name import check_name
from zoo.checkpoints.sources import Ref, Source, check_no_adapter, resolve
from zoo.checkpoints.zoo_json import read_native
from zoo.components.model import Model
from zoo.components.rotary import Llama3
from zoo.errors import (
    ConfigError,
    NotACheckpoint,
    ResourceLimit,
    UnsupportedArchitecture,
    UnusedFieldsWarning,
    UsageError,
    did_you_mean,
    listing,
    option,
)
from zoo.registry import Architecture


def locate(
    ref: Ref,
    *,
    head: str | None = None,
    weights: bool = True,
    ignore_config: Sequence[str] = (),
    expect: type[Model] | None = None,
    adapter: Ref | bool | None = None,
    mmap: bool | None = None,
    **where: Any,
) -> Located:
    """Find the directory behind a reference and understand its config; no weights are read.

    Arguments are those of `zoo.load`. `weights=False` downloads none, and takes the config of a
    registry name from the registry.
    """
    named = registry.named(ref) if isinstance(ref, str) else None
    if named is not None and named.config and not weights:
        located = _from_registry(named, head)
    else:
        source = resolve(ref, weights=weights, adapter=adapter is True, **where)
        if weights and adapter is None:
            check_no_adapter(source)
        located = read(source, head, ignore_config, mmap)
        check_name(located, head)
    if expect is not None and not issubclass(located.entry.model, expect):
        raise UnsupportedArchitecture(
            f"{ref}: a {located.entry.name} checkpoint, and {expect.__module__}.Model was asked "
            f"for. Use zoo.load, or {located.entry.model.__module__}.Model"
        )
    return located


def skeleton(
    ref: Ref,
    *,
    head: str | None = None,
    config: Mapping[str, Any] | None = None,
    **where: Any,
) -> Model:
    """Build the model of a reference on the meta device: names and shapes, no weights."""
    return skeleton_of(locate(ref, head=head, weights=False, **where), config)


def read(
    source: Source,
    head: str | None = None,
    ignore: Sequence[str] = (),
    mmap: bool | None = None,
) -> Located:
    """Read the config of a local checkpoint: zoo.json, config.json, or a self-describing file."""
    directory = source.directory
    if source.file is not None:
        located = _read_foreign(source, source.file, head, ignore, mmap)
    elif os.path.lexists(directory / NATIVE_FILE):
        located = read_native(source, confined(directory, NATIVE_FILE), head)
    elif os.path.lexists(directory / CONFIG):
        located = _read_published(source, head, ignore, mmap)
    else:
        located = _read_foreign(source, directory, head, ignore, mmap)
    return located._replace(mmap=mmap, ignore_config=tuple(ignore))


def _heads(entry: Architecture, named: str | None, asked: str | None) -> tuple[str, ...]:
    """The heads to try: the one asked for, or those of the reference class that is named."""
    heads = entry.model.heads
    if asked is not None:
        if asked not in heads:
            near = did_you_mean(asked, heads)
            raise UsageError(f"head={asked!r}: {entry.name} has {', '.join(heads)}.{near}")
        return (asked,)
    if named is None:  # the tensors decide
        return tuple(dict.fromkeys(head for heads in entry.heads.values() for head in heads))
    return entry.heads[named]


# --- with a config.json --------------------------------------------------------------------------


def _from_registry(named: registry.CheckpointEntry, head: str | None) -> Located:
    """Take the config from the registry, so that names and shapes are known offline."""
    entry = registry.architectures()[named.architecture]
    source = Source(directory=Path(), ref=named.name, checkpoint=named)
    reference = named.reference_config
    text = json.dumps(reference, indent=2)
    located = Located(source, entry, load_spec(entry.spec), (), {}, named.reference_class, text)
    return _understand(located, reference, head, (), "registry.yaml")


def _read_published(
    source: Source, head: str | None, ignore: Sequence[str], mmap: bool | None
) -> Located:
    file = source.config or read_config(source.directory)
    entry, reference, where = file.architecture, file.reference, str(file.path)
    reference = entry.modern(reference)
    says_quantized = reference.get(QUANTIZED) is not None
    if not says_quantized and (beside := settings.beside(source.directory)) is not None:
        where, reference[QUANTIZED] = f"{where} and {beside[0]}", beside[1]
    spec = load_spec(entry.spec)
    located = Located(source, entry, spec, (), {}, file.reference_class, file.text, mmap=mmap)
    return _understand(located, reference, head, ignore, where)


def _understand(
    located: Located,
    reference: dict[str, Any],
    head: str | None,
    ignore: Sequence[str],
    where: str,
) -> Located:
    """Add heads, native fields and their Configs; an error lists every problem at once."""
    dialect, problems = located.spec.dialect("hf"), list[str]()
    heads = _heads(located.entry, located.reference_class, head)
    if reference.get(QUANTIZED) is not None:  # weights are dequantized when they are read
        quantized, problems = settings.read_config(reference[QUANTIZED], ignore)
        reference = {name: value for name, value in reference.items() if name != QUANTIZED}
        text = json.dumps(reference, indent=2) + "\n"
        located = located._replace(quantized=quantized, config_text=text)
    fields, of_fields = dialect.read_config(reference, ignore)
    problems[:0] = of_fields
    located, configs = located._replace(fields=fields), dict[str, Any]()
    for name in heads:
        try:
            configs[name] = located.config(name)
        except ConfigError as error:
            if name == heads[0]:
                problems[:0] = [as_published(dialect, problem) for problem in error.problems]
        except ResourceLimit as error:
            raise ResourceLimit(f"{where}: {as_published(dialect, str(error))}") from None
    if problems:
        raise ConfigError("\n  ".join([f"{where}:", *problems]))
    _warn_of_unused(dialect, reference, ignore, where)
    located = located._replace(heads=tuple(configs), configs=configs)
    if located.reference_class is None and head is None:
        return _classed_by_tensors(located, where)
    return located


def _warn_of_unused(
    dialect: Dialect, reference: Mapping[str, Any], ignore: Sequence[str], where: str
) -> None:
    if unused := dialect.unused(reference, ignore):
        names = listing(name[:100] for name in unused)
        warnings.warn(
            f"{where}: fields that the reference never reads, so that they change nothing: {names}",
            UnusedFieldsWarning,
            stacklevel=3,
        )


def _classed_by_tensors(located: Located, where: str) -> Located:
    """Choose the reference class by the tensors, for a config that names none."""
    unnamed = f"{where}: 'architectures' names no class"
    way_out = f"{option('head', ...)} with one of {listing(located.heads)}"
    try:
        checkpoint = located.checkpoint()
    except NotACheckpoint:
        raise ConfigError(f"{unnamed}, and there are no tensors to tell. Pass {way_out}") from None
    scores = {}
    for head in located.heads:
        model = on_meta(located, located.config(head))
        names = names_on_disk(located, model, native_of(model))
        scores[head] = (len(names & checkpoint.tensors.keys()), -len(names))
    classes = {
        name: max(scores[head] for head in heads if head in scores)
        for name, heads in located.entry.heads.items()
        if scores.keys() & {*heads}
    }
    best = [name for name, score in classes.items() if score == max(classes.values())]
    hidden = {*located.entry.model.headless, "pooler"}
    # a tied head has no tensor of its own, and does more than the class without it
    best = [name for name in best if not hidden >= {*located.entry.heads[name]}] or best
    if len(best) > 1:
        raise ConfigError(
            f"{unnamed}, and the tensors are those of {' and '.join(best)}. Pass {way_out}"
        )
    heads = located.entry.heads[best[0]]
    return located._replace(heads=heads, reference_class=best[0], opened=checkpoint)


# --- self-describing files -----------------------------------------------------------------------


def _read_foreign(
    source: Source,
    place: Path,
    head: str | None,
    ignore: Sequence[str],
    mmap: bool | None,
) -> Located:
    """Read a file, or the only checkpoint in a directory, whose tensor names tell its dialect."""
    from converters.containers import alike
    from converters.dialects import find

    with naming_damaged_blobs(source.directory):
        foreign = find(place, mmap)
    if foreign is None:
        raise NotACheckpoint(f"{place}: no config.json and no {NATIVE_FILE} in it")
    if foreign.container.wide:  # vectors are F32 by convention: not a choice of dtype
        widened = alike(foreign.checkpoint, foreign.container.wide)
        foreign = foreign._replace(checkpoint=widened)
    entry = next(e for e in registry.architectures().values() if e.spec == foreign.spec.name)
    if head is None and len(foreign.heads) > 1:
        raise ConfigError(
            f"{place} ({entry.name} of {foreign.container.about}): its tensors are those of a "
            f"{' or a '.join(foreign.heads)} head, and nothing tells. Pass {option('head', ...)}"
        )
    heads = _heads(entry, None, head or foreign.heads[0])
    named = next((c for c, each in entry.heads.items() if heads[0] in each), None)
    fields, problems = foreign.fields(ignore)
    checkpoint = foreign.checkpoint
    try:
        fields |= fields_by_tables(foreign.dialect, fields, checkpoint.tensor, checkpoint.tensors)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n  ".join([f"{foreign.config_from}:", *problems]))
    text = json.dumps(foreign.reference)
    return Located(source, entry, foreign.spec, heads, fields, named, text, foreign=foreign)


def fields_by_tables(
    dialect: Dialect,
    fields: Mapping[str, Any],
    tensor: Callable[[str], Tensor],
    there: Collection[str],
) -> dict[str, Any]:
    """Return native fields that small tensors hold: the scaling of rotary frequencies."""
    by_tables: dict[str, Any] = {}
    for name, field in dialect.field_tensors.items():
        if name not in there:
            continue
        numbers = tensor(name)
        base = fields.get("rope_base", 10000.0)
        if numbers.dim() != 1 or not 0 < len(numbers) <= 4096 or type(base) is not float:
            raise ConfigError(f"{name}: expected a factor for each pair of a head")
        if fields.get(field) not in (None, {"rope_type": "default"}):
            raise ConfigError(f"{name}: scales frequencies, and so does the config")
        try:
            by_tables[field] = Llama3.from_factors(numbers, base).to_json()
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return by_tables
