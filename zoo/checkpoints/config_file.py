"""config.json, read once: its text, its fields, and the architecture that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from zoo.checkpoints.file_names import CONFIG
from zoo.registry import Architecture, architecture_for


class ConfigFile(NamedTuple):
    """What a directory's config.json says of the model beside it."""

    path: Path
    text: str
    reference: dict[str, Any]  # the fields, as the file has them
    architecture: Architecture
    reference_class: str | None  # under its present name; None where none is named


def read_config(directory: Path, where: str = "") -> ConfigFile:
    """Read a directory's config.json and find its architecture.

    `where` replaces the file's path in the message that an architecture is not implemented.
    """
    from converters.paths import confined  # torch comes with these
    from converters.strict_json import parse_json, read_text

    path = confined(directory, CONFIG)
    text = read_text(path)
    reference = parse_json(text.encode(), str(path))
    architecture, reference_class = architecture_for(reference, where or str(path))
    return ConfigFile(path, text, reference, architecture, reference_class)
