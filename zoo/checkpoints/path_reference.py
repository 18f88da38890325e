"""A reference that is a path: a directory, or a self-describing file such as GGUF."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import NoReturn, TypeGuard

from zoo.checkpoints.adapters import REPO, adapter_alone
from zoo.checkpoints.file_names import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    CONFIG,
    NATIVE_FILE,
    PUBLISHED,
    RUN_CHECKPOINTS,
    RUN_RECIPE,
)
from zoo.errors import NotACheckpoint, UnknownName, UnsafePath, UsageError, ZooError, listing
from zoo.registry import find


def is_path(place: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether a value is a path that the file system could have."""
    if not isinstance(place, str | os.PathLike):
        return False
    try:
        return bool(name := os.fsencode(place)) and b"\0" not in name
    except UnicodeEncodeError:
        return False


def expanded(place: str | os.PathLike[str]) -> Path:
    """Return a path with the user's home for a leading ~, where there is such a user."""
    path = Path(os.fsdecode(place))
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def local_path(ref: str | os.PathLike[str], revision: str | None, config: bool) -> Path:
    """Return the directory or file that a path means; the error describes what is there instead.

    `config=False` takes a directory that holds no config.
    """
    text = os.fsdecode(ref)
    path = expanded(text)
    try:
        # a loop of links or a name too long counts as not there
        is_directory, exists = os.path.isdir(path), os.path.lexists(path)
        index = None if is_directory else _index(path)
    except ValueError:
        is_directory, exists, index = False, False, None
    if not text or not (is_directory or exists or index):
        _no_such(ref, text)
    if revision is not None:
        raise UsageError(f"{text}: a directory has no revisions; leave revision={revision!r} out")
    if not is_directory:
        if exists and _is_published(path):
            return path.parent
        if path.name in (ADAPTER, *ADAPTER_WEIGHTS) and os.path.lexists(path.parent / ADAPTER):
            raise adapter_alone(path.parent)
        if exists and _is_weights(path):
            return _real(path)
        if index is not None:
            return index
        raise NotACheckpoint(
            f"{text}: expected a directory with {CONFIG} and weights in it, or a file that says "
            f"what it is ({_formats()}); found {_content(path)}"
        )
    path = _of_run(path)
    named = (path / CONFIG).exists() or (path / NATIVE_FILE).exists()
    if config and not named and os.path.lexists(path / ADAPTER):
        raise adapter_alone(path)
    if config and not named and not any(map(_is_weights, sorted(path.glob("[!.]*")))):
        raise NotACheckpoint(
            f"{text}: no {CONFIG} (nor {NATIVE_FILE}) in it, and no file that says what it is "
            f"({_formats()}).{_nearby(path)}"
        )
    return path


def _of_run(path: Path) -> Path:
    """Of a training run's directory its best checkpoint, or its last one; else the same."""
    if (path / RUN_RECIPE).is_file() and not (path / CONFIG).exists():
        for name in RUN_CHECKPOINTS:
            if (path / name / CONFIG).exists():
                return path / name
    return path


def _is_published(path: Path) -> bool:
    """Whether a file has a usual name of weights, and a config beside it."""
    named = any((path.parent / name).exists() for name in (CONFIG, NATIVE_FILE))
    return named and PUBLISHED.fullmatch(path.name) is not None


def _is_weights(path: Path) -> bool:
    """Whether a file's bytes are of a self-describing format."""
    from converters.containers import kind_of

    try:
        return kind_of(path) is not None
    except ZooError:
        return False


def _real(path: Path) -> Path:
    """Resolve a link to a file: the rest of its checkpoint lies beside the target."""
    from converters.paths import confined

    try:
        return confined(path.parent, path.name)
    except UnsafePath:
        return Path(os.path.realpath(path))


def _content(path: Path) -> str:
    """Describe a file of another kind by its first bytes, with the next step."""
    from converters.formats import open_regular

    try:
        fd = open_regular(path)
    except ZooError as error:
        return f"nothing to read: {str(error).removeprefix(f'{path}: ')}"
    try:
        head = os.pread(fd, 16, 0)
    finally:
        os.close(fd)
    if head[8:9] == b"{":
        return f"what looks like safetensors: give the directory that it and its {CONFIG} are in"
    if head[:1] == b"{":
        return "what looks like JSON: give the directory that it is in"
    return f"a file that begins with {head[:8]!r}" if head else "an empty file"


def _index(path: Path) -> Path | None:
    """The index file of a checkpoint that is given by the prefix of its files' names."""
    from converters.containers import index_of

    try:
        return index_of(path)
    except ZooError:
        return None


def _formats() -> str:
    from converters.containers import known_formats

    return known_formats()


def _no_such(ref: str | os.PathLike[str], text: str) -> NoReturn:
    if not text.strip():
        raise UsageError("expected a name, hf:org/repo@rev or a path, found an empty string")
    near = near_path(text)
    near = near and f".{near}"
    if isinstance(ref, str):
        hub_url = re.fullmatch(r"(?:https?://[^/]+/|hf://)([\w.-]+/[\w.-]+).*", text)
        if hub_url:
            raise UsageError(f"{text!r}: write hf:{hub_url[1]}")
        if REPO.fullmatch(text) and not text.startswith("."):
            raise UsageError(
                f"{text!r} is no directory here; for the hub's repository write hf:{text}{near}"
            )
        if "/" not in text and os.sep not in text:
            try:
                find(text)
            except UnknownName as error:
                raise UnknownName(f"{error} (no directory of that name either{near})") from None
    raise NotACheckpoint(f"{text}: no such directory{near}")


def near_path(path: str | os.PathLike[str]) -> str:
    """` Did you mean models/gpt2?` for a path that does not exist, or nothing.

    The first part of it that does not exist is compared with what lies in that directory.
    """
    missing = expanded(path)
    try:
        while not missing.parent.exists():
            missing = missing.parent
        names = sorted(each.name for each in islice(missing.parent.iterdir(), 2000))
    except (OSError, ValueError):
        return ""
    near = get_close_matches(missing.name, names, cutoff=0.7)
    return f" Did you mean {', '.join(str(missing.parent / name) for name in near)}?" * bool(near)


def _nearby(path: Path) -> str:
    """Suggest checkpoints in directories below, else list what the directory holds."""
    below = sorted(
        p.parent for p in [*path.glob(f"*/{CONFIG}"), *path.glob(f"snapshots/*/{CONFIG}")]
    )
    if below:
        return f" There is one in {listing(map(str, below), limit=3)}."
    holds = sorted(p.name for p in path.iterdir())
    return f" It holds {listing(holds, limit=5)}." if holds else " It is empty."
