"""A finished stage takes the place of its destination in one rename, and survives a kill."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from converters.staging.destination import (
    Replaces,
    files_below,
    is_directory,
    is_empty,
    kept_files,
    parent_paths,
    replaced_files,
    side_path,
)
from converters.staging.journal import Lock, read_journal
from zoo.errors import OutputExists, ZooError, listing

_AT_FDCWD = -100
_EXCHANGE = 2  # renameat2's flag


def publish(partial: Path, place: Path, lock: Lock, replaces: Replaces, of: str = "") -> None:
    """Move a finished stage to its destination; keep the files there that `replaces` does not name.

    The journal in `lock` first records which directories change places, so that a run after a
    kill can tell what happened.
    """
    replaced, aside = replaced_files(place, replaces), side_path(place, "replaced")
    if is_directory(place):
        _link_kept(place, partial, replaced)
    old = place.lstat().st_ino if os.path.lexists(place) else None
    note = {"publishing": partial.lstat().st_ino, "old": old, "replaced": sorted(replaced)}
    lock.append({**note, "of": of})
    os.fsync(lock.fd)
    lock.keep = True
    if not os.path.lexists(place) or is_empty(place):
        os.rename(partial, place)
    elif _exchange(partial, place):
        aside = partial  # the new one is in place; the old one lies at the partial's name
    else:
        os.rename(place, aside)
        try:
            os.rename(partial, place)
        except BaseException:
            os.rename(aside, place)
            raise
    with contextlib.suppress(OSError):
        if os.path.lexists(aside):
            _retire(aside, place, replaced)
    lock.done = not os.path.lexists(aside)
    lock.keep = not lock.done  # the next run removes what could not be removed, by the journal
    sync_parent(place)


def is_published(place: Path, entries: list[dict[str, Any]]) -> bool:
    """Return whether the directory that a journal was about to rename is at the destination."""
    inodes = [entry["publishing"] for entry in entries if "publishing" in entry]
    if not inodes or not is_directory(place):
        return False
    status = place.lstat()
    return bool(inodes[-1] == status.st_ino)


def recover(place: Path, entries: list[dict[str, Any]]) -> None:
    """Finish a replacement that was killed after its rename; undo one that was killed before."""
    notes = [*entries, *read_journal(side_path(place, "publish"))]
    last: dict[str, Any] = next((entry for entry in reversed(notes) if "publishing" in entry), {})
    aside = side_path(place, "replaced")
    for old in (side_path(place, "partial"), aside):
        if not os.path.lexists(old):
            continue
        if old.lstat().st_ino == last.get("old"):
            if os.path.lexists(place):
                _retire(old, place, last["replaced"])
            else:
                os.rename(old, place)
        elif old == aside and not os.path.lexists(place):
            os.rename(aside, place)
        if old == aside and os.path.lexists(aside):
            raise OutputExists(
                f"{aside}: a directory that was replaced, with files that may exist nowhere "
                "else. Move it away, or delete it"
            )


def _link_kept(place: Path, stage: Path, replaced: Collection[str]) -> None:
    """Hard-link the files that are kept into the stage, with their directories and modes."""
    kept = kept_files(place, replaced)
    folders = [(place / name, stage / name) for name, is_folder in kept if is_folder]
    problems = list[str]()
    for name, is_folder in kept:
        try:
            if not is_folder:
                os.link(place / name, stage / name, follow_symlinks=False)
            elif not is_directory(stage / name):
                os.mkdir(stage / name, 0o700)
        except FileNotFoundError:  # gone since it was listed
            if os.path.lexists(place / name):
                raise
        except OSError as error:
            problems.append(f"{name} ({error.strerror})")
    if problems:
        raise OutputExists(f"{place}: files that cannot be kept: {listing(problems)}. Move them")
    if kept:
        for old, new in ((place, stage), *reversed(folders)):
            shutil.copystat(old, new)
            status = old.lstat()
            with contextlib.suppress(PermissionError):
                os.chown(new, status.st_uid, status.st_gid)
            _fsync(new)


def _retire(old: Path, place: Path, replaced: Collection[str]) -> None:
    """Remove a replaced directory; files that appeared in it late are moved to `place`."""
    if not is_directory(old):
        old.unlink()
        return
    emptied, moved = parent_paths(replaced), list[str]()
    _make_writable(old)
    below = list(files_below(old))
    for name, is_folder in below:
        if is_folder:
            _make_writable(old / name)
            if name not in emptied:
                (place / name).mkdir(parents=True, exist_ok=True)
    for name, is_folder in reversed(below):
        path, new = old / name, place / name
        if is_folder:
            path.rmdir()
        elif name in replaced or (os.path.lexists(new) and os.path.samestat(*_stats(path, new))):
            path.unlink()
        else:
            new.parent.mkdir(parents=True, exist_ok=True)
            target, number = new, 0
            while os.path.lexists(target):
                number += 1
                target = new.with_name(f"{new.name}.zoo-kept-{number}")
            os.rename(path, target)
            moved.append(str(target.relative_to(place)))
    old.rmdir()
    if moved:
        warnings.warn(
            f"{place}: changed while it was replaced; kept: {listing(moved)}", stacklevel=2
        )


def _stats(one: Path, other: Path) -> tuple[os.stat_result, os.stat_result]:
    return one.lstat(), other.lstat()


def _make_writable(directory: Path) -> None:
    with contextlib.suppress(OSError):
        os.chmod(directory, directory.lstat().st_mode | 0o700)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(other))


def sync_tree(directory: Path) -> None:
    """Flush every file and directory below to the disk, innermost first."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            path = os.path.join(folder, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                _fsync(path)
        _fsync(folder)


def sync_parent(place: Path) -> None:
    """Flush the directory that holds `place`, so that the rename is on the disk."""
    try:
        _fsync(place.parent)
    except OSError as error:
        raise ZooError(f"{place}: in place, but perhaps not on the disk: {error}") from error


def _fsync(path: str | os.PathLike[str]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
