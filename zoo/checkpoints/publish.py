"""Write a model in memory to its destination."""

from __future__ import annotations

import platform
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from converters.manifest import finish
from converters.output import Output
from converters.staging.destination import check_place
from converters.staging.stage import Stage, staged
from converters.weight_files import MANIFEST
from converters.writer import WriteOptions, WriteReport, run
from zoo.checkpoints.destination import Replacing
from zoo.checkpoints.path_reference import expanded, is_path
from zoo.errors import (
    OutputExists,
    UsageError,
)
from zoo.version import VERSION


def checked_destination(dst: str | PathLike[str], source: Path | None, force: bool) -> Path:
    """Return where to write.

    Raises:
        UsageError: If `dst` is not a path.
        OutputExists: If it is never replaced, or holds the source.
    """
    if not is_path(dst):
        raise UsageError(f"expected a directory to write, found {dst!r}")
    place = expanded(dst)
    check_place(place)
    if not force or not place.is_dir() or place.is_symlink():
        return place
    # output beside a source file, or in its directory, is not read
    read = [] if source is None else [source, *source.iterdir()]
    read = [path for path in read if not (path / MANIFEST).is_file() or path == source]
    if any(path.resolve().is_relative_to(place.resolve()) for path in read):
        raise OutputExists(f"{place}: contains the source, {source}. Write elsewhere")
    return place


def write(output: Output, place: Path, force: bool, allow_nonfinite: bool = False) -> Path:
    """Write an output; keep files that other programs put into the directory."""
    output = Replacing(output, force).without_kept(place)
    with staged(place, Replacing(output, force), restart=force, size=output.size) as stage:
        options = WriteOptions(sha256=False, allow_nonfinite=allow_nonfinite)
        finish(output, stage, run(output, Stage(stage), options), versions())
    return place


def finished(output: Output, directory: Path, report: WriteReport) -> dict[str, Any]:
    """Complete a directory and return the event that reports it."""
    finish(output, directory, report, versions())
    seen = {"zeros": report.zeros, "duplicates": report.duplicates}
    seen["left"] = [f"{what}: {why}" for what, why in output.notes.get("left", {}).items()]
    return {"event": "done", "resumed": report.resumed, **seen}


def versions() -> dict[str, str]:
    """Return the versions that a manifest names."""
    return {
        "zoo": VERSION,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
