"""zoo.json, the record of a native directory: check it, and read it into a `Located`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from converters.formats import BITS
from converters.paths import is_plain
from converters.spec import load_spec
from converters.strict_json import parse_json, read_json
from zoo import registry
from zoo.checkpoints.former_fields import current_fields
from zoo.checkpoints.handle import Located
from zoo.checkpoints.sources import Source
from zoo.errors import ConfigError


def read_native(source: Source, path: Path, head: str | None) -> Located:
    """Read a native directory by its zoo.json; an error lists every problem."""
    data = read_json(path, ConfigError)
    if problems := list(_native_problems(data)):
        raise ConfigError("\n  ".join([f"{path}: not what zoo writes:", *problems]))
    entry = registry.architectures()[data["architecture"]]
    fields = current_fields(data["config"])
    own_head, origin = fields.pop("head"), data["origin"]
    heads, spec = (head or own_head,), load_spec(entry.spec)
    text, named = origin["config"], origin["class"]
    located = Located(source, entry, spec, heads, fields, named, text, native=data)
    return located._replace(configs={heads[0]: located.config(heads[0])})


def _native_problems(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield every problem of a zoo.json."""
    if data.get("architecture") not in registry.architectures():
        yield f"architecture: {data.get('architecture')!r} is not known"
    config, origin, quantized = (data.get(name) for name in ("config", "origin", "quantised"))
    if quantized is not None and not (
        isinstance(quantized, dict) and all(isinstance(kind, str) for kind in quantized.values())
    ):
        yield f"quantized: expected words by name, found {quantized!r}"
    if not isinstance(config, dict) or not isinstance(config.get("head"), str):
        yield "config: expected an object with a head"
    if not isinstance(origin, dict):
        yield "origin: expected an object"
        return
    if not isinstance(origin.get("class"), str | None):
        yield f"origin.class: expected a name, found {origin['class']!r}"
    if origin.get("dialect") not in ("hf", "none"):
        yield f"origin.dialect: {origin.get('dialect')!r} is not known"
    metadata, text, tensors = (origin.get(name) for name in ("metadata", "config", "tensors"))
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        yield "origin.metadata: expected words by name"
    try:
        parse_json(str(text).encode(), "origin.config")
    except ConfigError as error:
        yield str(error)
    if not isinstance(tensors, dict):
        yield "origin.tensors: expected an object"
        return
    for name, entry in tensors.items():
        if (
            not isinstance(entry, list)
            or len(entry) != 3
            or entry[0] not in BITS
            or not isinstance(entry[1], list)
            or not all(type(n) is int and n >= 0 for n in entry[1])
            or not isinstance(entry[2], str)
            or not is_plain(entry[2])
        ):
            yield f"origin.tensors.{name}: expected dtype, shape and file, found {entry!r}"
