"""What cannot be saved or converted is refused before anything is read or written."""

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
    if to not in OWN_FILES and to not in (names := dialects()):
        read = {d.name: f"{c.about} is read, and not written; " for _, d, c in every_dialect()}
        why = read.get(str(to), "")
        near = did_you_mean(str(to), names)
        raise UsageError(f"to={to!r}: {why}one of {', '.join(names)}.{near}")


def check_graph(
    to: str, place: Path, layout: Mapping[str, Any] | None, max_shard_size: int | None
) -> None:
    """What writing a graph needs is there, and it leaves to choose what is asked for."""
    check_no_layout(to, layout)
    if max_shard_size is not None:
        raise UsageError(
            f"max_shard_size: to={to!r} leaves that not to choose: its weights are one file"
        )
    graphs.check(to)
    graphs.check_file(place)


def check_whole(to: str, max_shard_size: int | None) -> None:
    """Other programs look for the files that they know."""
    if max_shard_size is not None:
        raise UsageError(
            f"max_shard_size: to={to!r} leaves that not to choose: its files are those that its "
            "programs look for. layout= has what they let be chosen"
        )


def check_no_layout(to: str, layout: Mapping[str, Any] | None) -> None:
    if layout:
        raise UsageError(f"layout: {to} leaves nothing to choose, found {listing(layout)}")
