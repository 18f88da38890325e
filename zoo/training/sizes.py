"""A small model of any architecture: config fields from a depth, a width and a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.components.model import Model
from zoo.errors import UsageError, did_you_mean
from zoo.registry import Architecture, architectures

LAYERS, DIM, HEAD_DIM = 4, 128, 32  # of a model from scratch, where nothing else is asked for


def architecture(name: str) -> Architecture:
    """The architecture of this name.

    Raises:
        UsageError: There is none, with those that are near.
    """
    entries = architectures()
    if name not in entries:
        near = did_you_mean(name, entries)
        raise UsageError(f"arch: {name!r} is not one of {', '.join(entries)}.{near}")
    return entries[name]


def small(
    entry: Architecture,
    vocab: int,
    context: int,
    asked: Mapping[str, Any],
    dropout: float | None = 0.0,
) -> dict[str, Any]:
    """Config fields of a small model that reads `context` tokens; `asked` ones come first.

    Heads follow from the width and widths from the heads, whichever was asked for.
    """
    fields = entry.config_class.model_fields
    dim = int(asked.get("dim", DIM))
    heads = int(asked.get("heads", max(1, dim // HEAD_DIM)))
    layers = int(asked.get("layers", LAYERS))
    defaults: dict[str, Any] = {
        "vocab": vocab,
        "dim": dim,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": dim // heads,
        "layers": layers,
        "decoder_layers": layers,
        "hidden": 4 * dim,
        "positions": context,
        "query_scale": dim // heads,
    }
    values = {name: value for name, value in defaults.items() if name in fields}
    if dropout is not None:
        values |= {name: dropout for name in fields if "dropout" in name}
    return {**values, **asked}


def build(entry: Architecture, fields: Mapping[str, Any], head: str | None = None) -> Model:
    """A model with new weights, as the original initializes them."""
    values = dict(fields) | ({} if head is None else {"head": head})
    config = entry.config_class(**values)
    model: Model = entry.model(config)
    model.architecture = entry.name
    return model
