"""Where a directory or file may be written, and which files there are replaced or kept."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pwd
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

from zoo.errors import OutputExists, UsageError, listing, option

# A function from a destination to the files in it that a new directory replaces, by their paths in
# it. All others are kept. It raises OutputExists where nothing may be written.
Replaces = Callable[[Path], Collection[str]]


def refuse_all(place: Path) -> Collection[str]:
    """Refuse any existing destination: the `Replaces` of one that has to be new."""
    raise OutputExists(f"{place}: exists already. Use {option('force')} to replace it.")


def check_place(destination: str | os.PathLike[str]) -> None:
    """Refuse what is never replaced: roots, mounts, home and working directories, repositories.

    Raises:
        OutputExists: If `destination` is one of these, or contains one, under any path.
    """
    place = absolute(destination)
    real = os.path.realpath(place)
    inside = f"Give a directory inside it, such as {os.path.join(place, 'model')}"
    if os.path.dirname(real) == real:
        raise OutputExists(f"{place}: the root of a file system cannot be replaced. {inside}")
    if os.path.ismount(real):
        raise OutputExists(f"{place}: a file system is mounted here. {inside}")
    for what, path in _protected_directories():
        if os.path.commonpath([real, path]) == real:
            of = "is" if real == path else f"holds {path},"
            raise OutputExists(f"{place}: {of} {what}, and is never replaced. {inside}")
    if os.path.isdir(real) and os.path.lexists(os.path.join(real, ".git")):
        raise OutputExists(f"{place}: holds .git, so it is never replaced. {inside}")


def resolved(destination: str | os.PathLike[str]) -> Path:
    """Return the absolute destination, once it is one that may be written."""
    check_place(destination)
    place = absolute(destination)
    if len(os.fsencode(place.name)) > 255:
        raise UsageError(f"{place}: a name of more than 255 bytes, which no file system takes")
    return place


def absolute(destination: str | os.PathLike[str]) -> Path:
    """The path with its parents resolved; a link at the destination itself stays a link."""
    path = Path(destination)
    try:
        if path.name in ("", ".."):
            return Path(os.path.realpath(path))
        return Path(os.path.realpath(path.parent), path.name)
    except FileNotFoundError:
        raise UsageError(f"{destination}: the working directory is gone: cd to another") from None


def _protected_directories() -> Iterator[tuple[str, str]]:
    with contextlib.suppress(OSError):
        yield "the working directory", os.path.realpath(os.getcwd())
    homes = [os.environ.get("HOME", "")]
    with contextlib.suppress(KeyError):  # a user that no table lists
        homes.append(pwd.getpwuid(os.getuid()).pw_dir)
    for home in homes:
        if os.path.isabs(home):
            yield "the home directory", os.path.realpath(home)


def check_replaceable(place: Path, replaces: Replaces) -> None:
    """Refuse a destination that could not be replaced later, before hours of work.

    Each file to keep is linked once beside the destination to prove that it can be.
    """
    if not is_directory(place):
        replaced_files(place, replaces)
        return
    trial, problems = side_path(place, "trial"), list[str]()
    trial.unlink(missing_ok=True)
    for name, is_folder in kept_files(place, replaced_files(place, replaces)):
        path = place / name
        try:
            if is_folder:
                status = os.lstat(path)
                if status.st_uid != os.geteuid() and not os.access(path, os.W_OK | os.X_OK):
                    raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            elif os.lstat(path).st_nlink == 1:  # otherwise it can be linked, and may be a source,
                os.link(path, trial, follow_symlinks=False)  # whose ctime a link would move
                os.unlink(trial)
        except OSError as error:
            problems.append(f"{name} ({error.strerror})")
    if problems:
        raise OutputExists(
            f"{place}: holds files that are no checkpoint's and that cannot be kept when it is "
            f"replaced: {listing(problems)}. Move them away, or write elsewhere"
        )


def replaced_files(place: Path, replaces: Replaces) -> frozenset[str]:
    """Return the files at `place` that `replaces` names; none where nothing is there."""
    check_place(place)
    if not os.path.lexists(place) or is_empty(place):
        return frozenset()
    return frozenset(replaces(place))


def files_below(directory: Path) -> Iterator[tuple[str, bool]]:
    """Yield (path relative to `directory`, whether it is a directory), outer ones first.

    Links are not followed.
    """
    device, folders = os.lstat(directory).st_dev, [""]
    while folders:
        above = folders.pop()
        with os.scandir(directory / above) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name, is_folder = f"{above}{entry.name}", entry.is_dir(follow_symlinks=False)
                if is_folder:
                    if entry.stat(follow_symlinks=False).st_dev != device:
                        raise OutputExists(f"{directory}: a file system is mounted at {name}")
                    folders.append(f"{name}/")
                yield name, is_folder


def kept_files(directory: Path, replaced: Collection[str]) -> list[tuple[str, bool]]:
    """List what stays when `replaced` files go: a folder only of replaced files goes with them."""
    below, emptied = list(files_below(directory)), parent_paths(replaced)
    kept = {name for name, is_folder in below if name not in (emptied if is_folder else replaced)}
    kept |= parent_paths(kept)
    return [(name, is_folder) for name, is_folder in below if name in kept]


def parent_paths(names: Iterable[str]) -> set[str]:
    """Return every directory above any of these relative paths."""
    return {str(parent) for name in names for parent in PurePosixPath(name).parents}


def check_free_space(place: Path, size: int) -> None:
    """Raise OSError (no space) unless `size` bytes are free beside `place`."""
    free = shutil.disk_usage(place.parent).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{size} bytes needed, {free} free")


def prune(directory: Path, wanted: Collection[str]) -> None:
    """Remove every file below `directory` but `wanted` (relative paths), and empty directories."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            path = Path(folder, name)
            if path.relative_to(directory).as_posix() not in wanted:
                path.unlink()
        if Path(folder) != directory:
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(folder)


def unlink_links(directory: Path) -> None:
    """Remove links, and files with a second name, so that writing here changes nothing else."""
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(folder, name)
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                path.unlink()


def side_path(place: Path, role: str) -> Path:
    """Return `.NAME.zoo-ROLE` in the same directory, hence on the same file system."""
    name = place.name
    if len(os.fsencode(name)) > 200:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return place.with_name(f".{name}.zoo-{role}")


def is_directory(path: Path) -> bool:
    """Return whether `path` is a directory and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def is_empty(place: Path) -> bool:
    """Return whether `place` is a directory without entries."""
    if place.is_symlink() or not place.is_dir():
        return False
    with os.scandir(place) as entries:
        return next(entries, None) is None


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
