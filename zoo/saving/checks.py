"""Refuse what cannot be saved or converted, before anything is read or written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.dialects import every_dialect
from zoo.errors import (
    UsageError,
    did_you_mean,
    listing,
)
from zoo.saving import graphs
from zoo.saving.export import dialects

OWN_FILES = ("hf", "native")  # written as safetensors


def check_dialect(to: str) -> None:
    """Check that `to` is a dialect or a graph that can be written.

    Raises:
        UsageError: With the names that are, and the nearest.
    """
    if to not in OWN_FILES and to not in (names := dialects()):
        read = {d.name: f"{c.about} can be read, not written; " for _, d, c in every_dialect()}
        why = read.get(str(to), "")
        near = did_you_mean(str(to), names)
        raise UsageError(f"to={to!r}: {why}one of {', '.join(names)}.{near}")


def check_graph(
    to: str, place: Path, layout: Mapping[str, Any] | None, max_shard_size: int | None
) -> None:
    """Check that a graph can be written here, and that no option is given that it lacks."""
    check_no_layout(to, layout)
    if max_shard_size is not None:
        raise UsageError(f"max_shard_size: to={to!r} does not support it: its weights are one file")
    graphs.check(to)
    graphs.check_file(place)


def check_whole(to: str, max_shard_size: int | None) -> None:
    """Refuse `max_shard_size` for a dialect whose programs look for fixed files."""
    if max_shard_size is not None:
        raise UsageError(
            f"max_shard_size: to={to!r} does not support it: its programs look for "
            "fixed files. layout= has the options that they support"
        )


def check_no_layout(to: str, layout: Mapping[str, Any] | None) -> None:
    """Refuse options for a layout that has none."""
    if layout:
        raise UsageError(f"layout: {to} has no options, found {listing(layout)}")
