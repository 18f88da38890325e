"""A small model of any architecture: config fields from a depth, a width and a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.spec import load_spec
from zoo.components.model import Model
from zoo.errors import UsageError, did_you_mean
from zoo.registry import Architecture, architectures

LAYERS, DIM, HEAD_DIM = 4, 128, 32  # of a model from scratch, where nothing else is asked for
DROPOUTS = ("dropout", "attn_dropout", "embed_dropout")


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
    context: int,
    asked: Mapping[str, Any],
    dropout: float | None = 0.0,
) -> dict[str, Any]:
    """Config fields of a small model that reads `context` tokens.

    `asked` ones, the vocabulary's size among them, come first. What no size is follows the
    architecture's first tiny config, which its reference class can express.
    """
    variant = next(iter(entry.variants.values()))
    fields, _ = load_spec(entry.spec).dialect("hf").read_config(entry.modern(variant["config"]))
    dim = int(asked.get("dim", DIM))
    heads = int(asked.get("heads", max(1, dim // HEAD_DIM)))
    layers = int(asked.get("layers", LAYERS))
    sizes: dict[str, Any] = {
        "dim": dim,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": dim // heads,
        "query_scale": dim // heads,
        "layers": layers,
        "decoder_layers": layers,
        "hidden": 4 * dim,
        "positions": context,
        "window": context,
    }
    fields |= {name: value for name, value in sizes.items() if name in fields}
    if dropout is not None:
        named = (name for name in entry.config_class.model_fields if name in DROPOUTS)
        fields |= dict.fromkeys(named, dropout)
    fields |= asked
    if fields.get("positions_after_pad") and "positions" not in asked:
        fields["positions"] = context + fields["pad"] + 1
    return fields


def build(entry: Architecture, fields: Mapping[str, Any], head: str | None = None) -> Model:
    """A model with new weights, as the original initializes them."""
    values = dict(fields) | ({} if head is None else {"head": head})
    config = entry.config_class(**values)
    model: Model = entry.model(config)
    model.architecture = entry.name
    return model
