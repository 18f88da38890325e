"""An adapter in a checkpoint's directory: its base model, and the options that apply it or not."""

from __future__ import annotations

import os
import re
from pathlib import Path

from zoo.checkpoints.file_names import ADAPTER
from zoo.errors import NotACheckpoint, ZooError, option

REPO = re.compile(r"[\w.-]+/[\w.-]+")
_LONGEST = 1000  # characters of a base's name


def adapter_beside(place: Path) -> str:
    """Describe the adapter that lies beside weights; empty where there is none."""
    if not os.path.lexists(place / ADAPTER):
        return ""
    how = f"{option('adapter')} applies it, {option('adapter', False)} ignores it"
    return f"{ADAPTER}{base_of(place)[0]}: {how}"


def adapter_alone(place: Path) -> NotACheckpoint:
    """Return the error that a directory holds an adapter and no model, with the command to type."""
    base, ref = base_of(place)
    return NotACheckpoint(
        f"{place}: an adapter{base}, and no model. Load its base with it: "
        f"zoo.load({ref!r}, adapter={str(place)!r}), or "
        f"`zoo convert {ref} --adapter {place} --to hf --out DIR`"
    )


def base_of(place: Path) -> tuple[str, str]:
    """Return (" of BASE", as an adapter names its base, a reference that loads that base)."""
    from converters.paths import confined
    from converters.strict_json import read_json

    try:
        base = read_json(confined(place, ADAPTER)).get("base_model_name_or_path")
    except ZooError:
        base = None
    if not isinstance(base, str) or not base:
        return "", "BASE"
    base = base if len(base) <= _LONGEST else f"{base[:_LONGEST]}…"
    on_hub = REPO.fullmatch(base) and not os.path.isdir(base)
    return f" of {base}", f"hf:{base}" if on_hub else base
