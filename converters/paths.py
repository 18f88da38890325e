"""Names of files in a checkpoint, confined to its directory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NoReturn

from zoo.errors import CheckpointError, MissingShard, UnsafePath, listing


def is_plain(name: str) -> bool:
    """Return whether a file's name, as text, stays below the directory it is joined to.

    >>> is_plain("model.safetensors"), is_plain("../model.safetensors")
    (True, False)
    """
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and "/".join(parts) == name
        and not name.startswith("/")
        and ".." not in parts
        and "\\" not in name
        and ":" not in parts[0]
        and name.isprintable()
    )


def confined(root: Path, name: str) -> Path:
    """Return the path of the file `name` in `root`, if it is there once links are resolved.

    A snapshot in the hub's cache is the exception: its links may lead to its repository's blobs.

    Raises:
        UnsafePath: If the file is outside `root` or is not a regular file.
        MissingShard: If it is missing.
    """
    path = root / name
    if not is_plain(name):
        raise UnsafePath(f"{root}: {name!r} is not a plain relative path")
    try:
        real = Path(os.path.realpath(path, strict=True))
    except (OSError, ValueError) as error:
        linked = " is a link to nothing" if os.path.islink(path) else " is not there"
        raise MissingShard(f"{path}{linked} ({getattr(error, 'strerror', error)})") from None
    home = Path(os.path.realpath(root))
    homes = [home]
    for above in home.parents[:2]:  # a snapshot, or a folder in it
        if above.name == "snapshots":
            homes.append(above.parent / "blobs")
    if not any(real.is_relative_to(allowed) for allowed in homes):
        raise UnsafePath(f"{path}: links to {real}, out of its directory. Copy the file there.")
    if not real.is_file():
        raise UnsafePath(f"{path}: is not a regular file, so it was not opened")
    return path


def located(root: Path, files: Iterable[str]) -> dict[str, Path]:
    """Return the paths of all files, or report every unsafe one, or every missing one."""
    paths: dict[str, Path] = {}
    unsafe: list[CheckpointError] = []
    missing: list[str] = []
    for name in files:
        try:
            paths[name] = confined(root, name)
        except UnsafePath as error:
            unsafe.append(error)
        except MissingShard:
            missing.append(f"{name} (a broken link)" if os.path.islink(root / name) else name)
    if unsafe:
        raise_all(unsafe)
    if missing:
        raise MissingShard(
            f"{root}: {len(missing)} of {len(missing) + len(paths)} files are missing: "
            f"{listing(missing)}. Download them again."
        )
    return paths


def raise_all(problems: Sequence[CheckpointError]) -> NoReturn:
    """Raise one error for several files: the class of the first, the messages of all."""
    if len(problems) == 1:
        raise problems[0]
    raise type(problems[0])("\n".join(str(problem) for problem in problems))
