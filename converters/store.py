"""A directory that appears whole or not at all: staged beside its place, then renamed into it.

The lock of a destination is a file beside it, which also holds the journal of a conversion that can
be taken up again. It is the last thing to go.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoo.errors import OutputExists, ZooError

_AT_FDCWD = -100
_EXCHANGE = 2  # renameat2's flag


@contextmanager
def staged(
    destination: str | os.PathLike[str], *, force: bool = False, size: int = 0
) -> Iterator[Path]:
    """A fresh directory to fill; on leaving it becomes `destination`, on an error it is gone.

    `force` replaces what is there, in one step. A link is replaced, never followed. An empty
    directory counts as nothing. `size` bytes have to be free before anything is written.
    """
    place, made = _place(destination), list[Path]()
    with _said(place), _parents(place, made), _locked(place) as lock:
        partial, aside = _put_right(place)
        _refuse(place, force)
        _remove(partial)  # whoever left it is dead: the lock is ours
        _check_free(place, size)
        os.mkdir(partial)
        try:
            yield partial
            _sync(partial)
            _refuse(place, force)
            _publish(partial, place, aside)
        except BaseException:
            _remove(partial)
            raise
        made.clear()
        lock.done = True


class Stage:
    """A directory being filled, and the journal of what is in it for good."""

    def __init__(self, path: Path, lock: _Lock, found: list[dict[str, Any]]) -> None:
        self.path, self._lock = path, lock
        self.found = found  # records of a run that was killed; none of a run from the start
        self.published = False  # all was done already, but for saying so
        self.anew = False  # what was there belongs to another job, and is gone

    def record(self, entry: dict[str, Any]) -> None:
        self._lock.append(entry)


@contextmanager
def resumable(
    destination: str | os.PathLike[str],
    job: str,
    *,
    force: bool = False,
    restart: bool = False,
    size: int = 0,
    same: Callable[[Path], bool] = lambda place: False,
) -> Iterator[Stage]:
    """As `staged`, but a run that is killed or interrupted or whose disk fails leaves what it has.

    The next run of the same `job` is given it. `same` tells of a directory that this job published.
    """
    place, made = _place(destination), list[Path]()
    with _said(place, resumes=True), _parents(place, made), _locked(place) as lock:
        partial, aside = _put_right(place)
        entries = [] if restart else lock.read()
        mine = bool(entries) and entries[0].get("job") == job
        if mine and same(place):  # killed after the last rename: what is left is to tidy up
            _remove(partial)
            stage = Stage(place, lock, entries)
            stage.published = lock.done = True
            yield stage
            return
        mine = mine and partial.is_dir()
        _refuse(place, force)
        if not mine:
            _remove(partial)
            _check_free(place, size)
            lock.restart({"job": job})
            os.mkdir(partial)
        lock.keep = True
        stage = Stage(partial, lock, entries[1:] if mine else [])
        stage.anew = bool(entries) and not mine
        made.clear()
        try:
            yield stage
            _sync(partial)
            _refuse(place, force)
            _publish(partial, place, aside)
        except (KeyboardInterrupt, OSError):
            raise
        except BaseException:
            lock.keep = False  # the same command would fail again
            _remove(partial)
            raise
        lock.done = True


def _place(destination: str | os.PathLike[str]) -> Path:
    # absolute, yet not resolved: a link as destination stays a link
    place = Path(os.path.abspath(destination))
    if not place.name:
        raise OutputExists(f"{place}: the root of a file system cannot be replaced")
    return place


@contextmanager
def _said(place: Path, resumes: bool = False) -> Iterator[None]:
    """A system's error in words that name the destination."""
    try:
        yield
    except OSError as error:
        file = f" ({error.filename})" if error.filename else ""
        again = " The same command goes on where this one stopped." if resumes else ""
        told = (
            f"{place}: not written: {error.strerror or error}{file}. What was there is untouched."
        )
        raise ZooError(told + again) from error


@contextmanager
def _parents(place: Path, made: list[Path]) -> Iterator[None]:
    """Directories that were missing, gone again unless `made` is emptied."""
    try:
        _make_parents(place.parent, made)
        yield
    finally:
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()


def _put_right(place: Path) -> tuple[Path, Path]:
    """(partial, aside), after a kill between the two renames of a replacement."""
    partial, aside = _beside(place, "partial"), _beside(place, "replaced")
    if aside.exists() and not os.path.lexists(place):
        os.rename(aside, place)
    _remove(aside)
    return partial, aside


def _check_free(place: Path, size: int) -> None:
    free = shutil.disk_usage(place.parent).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{size} bytes needed, {free} free")


def _refuse(place: Path, force: bool) -> None:
    if os.path.ismount(place):
        raise OutputExists(f"{place}: a file system is mounted here; give a directory inside it")
    if force or not os.path.lexists(place) or _is_empty(place):
        return
    raise OutputExists(f"{place}: exists already. Use force (--force) to replace it.")


def _is_empty(place: Path) -> bool:
    if place.is_symlink() or not place.is_dir():
        return False
    with os.scandir(place) as entries:
        return next(entries, None) is None


def _beside(place: Path, role: str) -> Path:
    """`.NAME.zoo-ROLE` in the same directory, so in the same file system."""
    name = place.name
    if len(os.fsencode(name)) > 200:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return place.with_name(f".{name}.zoo-{role}")


def _make_parents(parent: Path, made: list[Path]) -> None:
    """The directories that are missing, outermost first; each that is made is noted in `made`."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another writer was faster
            os.mkdir(path)
            made.append(path)


class _Lock:
    """A file that is locked; what is in it is a journal, a line a record."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.end = 0  # of the last whole line
        self.keep = self.done = False

    def read(self) -> list[dict[str, Any]]:
        """Every whole line; a torn one ends it, and is cut off."""
        entries: list[dict[str, Any]] = []
        with os.fdopen(os.dup(self.fd), "rb") as file:
            file.seek(0)
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n") or not isinstance(entry, dict):
                    break
                entries.append(entry)
                self.end += len(line)
        os.ftruncate(self.fd, self.end)
        return entries

    def restart(self, entry: dict[str, Any]) -> None:
        os.ftruncate(self.fd, 0)
        self.end = 0
        self.append(entry)

    def append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        self.end += os.pwrite(self.fd, line, self.end)


@contextmanager
def _locked(
    place: Path, role: str = "lock", how: int = fcntl.LOCK_EX | fcntl.LOCK_NB
) -> Iterator[_Lock]:
    """One writer a destination; the lock dies with its process."""
    path = _beside(place, role)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, how)
            try:
                same = os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
            except FileNotFoundError:
                same = False
            if same:
                break
        except BlockingIOError:
            os.close(fd)
            raise OutputExists(f"{place}: another process is writing it right now") from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its last owner removed it between our open and our lock
    lock = _Lock(fd)
    try:
        yield lock
    finally:
        if lock.done or not lock.keep:
            with contextlib.suppress(OSError):
                os.unlink(path)
        os.close(fd)


# --- parts ---------------------------------------------------------------------------------------


class Shared(Stage):
    """A stage that several processes fill, on one machine or many, each with its own journal."""

    def __init__(self, place: Path, lock: _Lock, found: list[dict[str, Any]], parts: int) -> None:
        super().__init__(_beside(place, "partial"), lock, found)
        self.place, self.parts = place, parts

    @contextmanager
    def publishing(
        self, job: str, force: bool, same: Callable[[Path], bool]
    ) -> Iterator[list[list[dict[str, Any]]]]:
        """Every part's records, for the one that is last to finish; none for the others."""
        with _locked(self.place, "publish", fcntl.LOCK_EX):
            if same(self.place):
                yield []
                return
            records = [_records(_beside(self.place, _role(n, self.parts))) for n in self._numbers]
            finished = [r and r[0].get("job") == job and "finished" in r[-1] for r in records]
            if not all(finished):
                yield []
                return
            yield records
            _sync(self.path)
            _refuse(self.place, force)
            _publish(self.path, self.place, _beside(self.place, "replaced"))
            for role in ["lock", *(_role(n, self.parts) for n in self._numbers)]:
                _beside(self.place, role).unlink(missing_ok=True)

    @property
    def _numbers(self) -> range:
        return range(1, self.parts + 1)


@contextmanager
def shared(
    destination: str | os.PathLike[str],
    job: str,
    part: int,
    parts: int,
    *,
    force: bool = False,
    restart: bool = False,
    size: int = 0,
    same: Callable[[Path], bool] = lambda place: False,
) -> Iterator[Shared]:
    """As `resumable`, for one of `parts` that fill one stage and know no more of each other."""
    place, made = _place(destination), list[Path]()
    with (
        _said(place, resumes=True),
        _parents(place, made),
        _locked(place, how=fcntl.LOCK_SH | fcntl.LOCK_NB) as whole,
        _locked(place, _role(part, parts)) as lock,
    ):
        whole.keep = True  # other parts rely on it: the last of them removes it
        partial = _beside(place, "partial")
        if same(place):
            stage = Shared(place, lock, [], parts)
            stage.published = whole.done = True
            yield stage
            return
        _refuse(place, force)
        entries = [] if restart else lock.read()
        mine = bool(entries) and entries[0].get("job") == job and partial.is_dir()
        if not mine:
            _refuse_strangers(place, job, parts)
            _check_free(place, size)
            lock.restart({"job": job})
        with contextlib.suppress(FileExistsError):
            os.mkdir(partial)
        lock.keep = True
        made.clear()
        try:
            yield Shared(place, lock, entries[1:] if mine else [], parts)
        except (KeyboardInterrupt, OSError):
            raise
        except BaseException:
            lock.keep = False
            raise
        whole.done = same(place)
        lock.keep = not whole.done


def _role(part: int, parts: int) -> str:
    return f"part-{part}-of-{parts}"


def _refuse_strangers(place: Path, job: str, parts: int) -> None:
    """A stage that holds another job's parts is nothing to go on with."""
    for n in range(1, parts + 1):
        found = _records(_beside(place, _role(n, parts)))
        if found and found[0].get("job") != job:
            raise OutputExists(
                f"{place}: part {n} of {parts} was begun from another source, spec or options. "
                "Finish that, or remove what lies beside the destination"
            )


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            lines = file.read().split(b"\n")[:-1]
        return [json.loads(line) for line in lines]
    except (FileNotFoundError, ValueError):
        return []


def _sync(directory: Path) -> None:
    """Every file and directory below, innermost first, on the disk."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            path = os.path.join(folder, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                _fsync(path)
        _fsync(folder)


def _fsync(path: str | os.PathLike[str]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _publish(partial: Path, place: Path, aside: Path) -> None:
    if not os.path.lexists(place) or _is_empty(place):
        os.rename(partial, place)
    elif _exchange(partial, place):
        # the new one is in place; the old one lies at the partial's name
        with contextlib.suppress(OSError):
            _remove(partial)
    else:
        os.rename(place, aside)
        try:
            os.rename(partial, place)
        except BaseException:
            os.rename(aside, place)
            raise
        with contextlib.suppress(OSError):
            _remove(aside)
    try:
        _fsync(place.parent)
    except OSError as error:
        raise ZooError(f"{place}: in place, but perhaps not on the disk: {error}") from error


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
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


def _remove(path: Path) -> None:
    """A file, a link or a whole directory; nothing if there is nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
