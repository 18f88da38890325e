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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoo.errors import OutputExists, SourceChanged, UsageError, ZooError

# what the same command may get past, so that what there is of its work is kept
RESUMED = (KeyboardInterrupt, OSError, MemoryError, SourceChanged)
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
    with _Said(place), _parents(place, made), _locked(place) as lock:
        lock.keep = _begun(lock.read())
        partial, aside = _put_right(place)
        _refuse(place, force)
        if not force:
            _refuse_begun(place, lock.keep)
        lock.restart_empty()
        lock.keep = False
        _remove(partial)  # whoever left it is dead: the lock is ours
        _check_free(place, size)
        os.mkdir(partial)
        try:
            yield partial
            _sync(partial)
            _refuse(place, force)
            _publish(partial, place, aside, lock)
        except BaseException:
            _remove(partial)
            raise
        made.clear()
        lock.done = True


class Stage:
    """A directory being filled, and the journal of what is in it for good."""

    def __init__(
        self, path: Path, lock: _Lock | None = None, found: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.path, self._lock = path, lock  # without one, nothing can be taken up again
        self.found = found  # records of a run that was killed; none of a run from the start
        self.published = False  # all was done already, but for saying so
        self.anew = False  # what was there belongs to another job, and is gone

    def record(self, entry: dict[str, Any]) -> None:
        if self._lock is not None:
            self._lock.append(entry)


@contextmanager
def resumable(
    destination: str | os.PathLike[str],
    job: str,
    *,
    force: bool = False,
    restart: bool = False,
    size: int = 0,
) -> Iterator[Stage]:
    """As `staged`, but a run that is killed or interrupted or whose disk fails leaves what it has.

    The next run of the same `job` is given it. A run that is refused leaves what others have.
    """
    place, made, said = _place(destination), list[Path](), _Said(_place(destination))
    with said, _parents(place, made), _locked(place) as lock:
        partial, aside = _put_right(place)
        entries = lock.read()
        lock.keep = _begun(entries)
        if _is_published(
            place, entries
        ):  # killed after the last rename: what is left is to tidy up
            _remove(partial)
            stage = Stage(place, lock, entries)
            stage.published = lock.done = True
            yield stage
            return
        _refuse(place, force)
        _clear_parts(place, _journals(place), restart)
        mine = not restart and bool(entries) and entries[0].get("job") == job
        mine = mine and _is_directory(partial)
        if not mine:
            _remove(partial)
            _check_free(place, size)
            lock.restart({"job": job})
            os.mkdir(partial)
        lock.keep = said.resumes = True
        _unlink_links(partial)
        stage = Stage(partial, lock, entries[1:] if mine else [])
        stage.anew = _begun(entries) and not mine and not restart
        made.clear()
        try:
            yield stage
            _sync(partial)
            _refuse(place, force)
            _publish(partial, place, aside, lock)
        except RESUMED:
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
    if len(os.fsencode(place.name)) > 255:
        raise UsageError(f"{place}: a name of more than 255 bytes, which no file system takes")
    return place


class _Said:
    """A system's error in words that name the destination."""

    def __init__(self, place: Path) -> None:
        self.place, self.resumes = place, False  # whether something to go on from is kept

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, OSError) or isinstance(error, BrokenPipeError):
            return
        file = f" ({error.filename})" if error.filename else ""
        again = " The same command goes on where this one stopped." if self.resumes else ""
        told = f"{self.place}: not written: {error.strerror or error}{file}."
        raise ZooError(f"{told} What was there is untouched.{again}") from error


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
    return _beside(place, "partial"), _put_aside_back(place)


def _put_aside_back(place: Path) -> Path:
    aside = _beside(place, "replaced")
    if os.path.lexists(aside) and not os.path.lexists(place):
        os.rename(aside, place)
    _remove(aside)
    return aside


def _check_free(place: Path, size: int) -> None:
    free = shutil.disk_usage(place.parent).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{size} bytes needed, {free} free")


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _unlink_links(directory: Path) -> None:
    """A stage is written to through no name but its own."""
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(folder, name)
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                path.unlink()


def prune(directory: Path, wanted: Collection[str]) -> None:
    """Nothing but these files, named by their paths in it, and the directories on the way."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            path = Path(folder, name)
            if path.relative_to(directory).as_posix() not in wanted:
                path.unlink()
        if Path(folder) != directory:
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(folder)


def _begun(entries: list[dict[str, Any]]) -> bool:
    """Whether a journal holds work that can be taken up."""
    return any("job" in entry for entry in entries)


def _is_published(place: Path, entries: list[dict[str, Any]]) -> bool:
    """Whether the directory that a journal was about to rename is in its place."""
    said = [entry["publishing"] for entry in entries if "publishing" in entry]
    if not said or not _is_directory(place):
        return False
    status = place.lstat()
    return bool(said[-1] == status.st_ino)


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

    def __init__(self, fd: int, path: Path) -> None:
        self.fd, self.path = fd, path
        self.end = 0  # of the last whole line
        self.keep = self.done = False

    def read(self) -> list[dict[str, Any]]:
        """Every whole line; a torn one ends it, and is cut off."""
        with os.fdopen(os.dup(self.fd), "rb") as file:
            file.seek(0)
            entries, self.end = _entries(file)
        os.ftruncate(self.fd, self.end)
        return entries

    def restart(self, entry: dict[str, Any]) -> None:
        self.restart_empty()
        self.append(entry)

    def restart_empty(self) -> None:
        os.ftruncate(self.fd, 0)
        self.end = 0

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
    lock = _Lock(fd, path)
    try:
        yield lock
    finally:
        if lock.done or not lock.keep:
            with contextlib.suppress(OSError):
                if how & fcntl.LOCK_SH:  # others may hold it too: whoever is last removes it
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False)):
                    os.unlink(path)
        os.close(fd)


def _entries(lines: Iterable[bytes]) -> tuple[list[dict[str, Any]], int]:
    """Records up to the first line that is none, and how many bytes they take."""
    entries: list[dict[str, Any]] = []
    size = 0
    for line in lines:
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict) or not (entries or entry.keys() & {"job", "publishing"}):
            break
        entries.append(entry)
        size += len(line)
    return entries, size


# --- parts ---------------------------------------------------------------------------------------

Verify = Callable[[int, list[dict[str, Any]]], None]


class Shared(Stage):
    """A stage that several processes fill, on one machine or many, each with its own journal."""

    def __init__(
        self, place: Path, lock: _Lock, found: list[dict[str, Any]], part: int, parts: int
    ) -> None:
        super().__init__(_beside(place, "partial"), lock, found)
        self.place, self.part, self.parts = place, part, parts
        self.finished = False  # its own share

    @contextmanager
    def publishing(
        self, job: str, force: bool, verify: Verify
    ) -> Iterator[list[list[dict[str, Any]]]]:
        """Every part's records, for the one that is last to finish; none for the others.

        `verify` raises where what another part wrote is no longer so; that part begins anew.
        """
        self.finished = True
        with _locked(self.place, "publish", fcntl.LOCK_EX) as publish:
            numbers = range(1, self.parts + 1)
            journals = [_beside(self.place, _role(n, self.parts)) for n in numbers]
            records = [_records(journal) for journal in journals]
            finished = [r and r[0].get("job") == job and "finished" in r[-1] for r in records]
            if not all(finished):
                yield []
                return
            for n, record in zip(numbers, records, strict=True):
                try:
                    if n != self.part:
                        verify(n, record)
                except ZooError:
                    journals[n - 1].unlink(missing_ok=True)
                    raise
            yield records
            _sync(self.path)
            _refuse(self.place, force)
            publish.keep = True
            _publish(self.path, self.place, _beside(self.place, "replaced"), publish)
            _tidy(self.place)
            publish.done = True


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
    """As `resumable`, for one of `parts` that fill one stage and know no more of each other.

    `same` tells of a directory that is what this job publishes.
    """
    place, made, said = _place(destination), list[Path](), _Said(_place(destination))
    with (
        said,
        _parents(place, made),
        _locked(place, how=fcntl.LOCK_SH | fcntl.LOCK_NB) as whole,
        _locked(place, _role(part, parts)) as lock,
    ):
        entries = lock.read()
        lock.keep, whole.keep = _begun(entries), _begun(whole.read())
        stage = Shared(place, lock, [], part, parts)
        with _locked(place, "publish", fcntl.LOCK_EX) as publish:
            begun = publish.read()
            publish.keep = bool(begun)
            if _is_published(place, begun):  # killed after the last rename
                _tidy(place)
                stage.published = whole.done = lock.done = True
            elif not restart and same(place):
                stage.published = True
            else:
                mine = _take_up(place, whole, lock, entries, job, parts, force, restart, size)
                stage.found = entries[1:] if mine else []
                stage.anew = _begun(entries) and not mine and not restart
            publish.done = True
        if stage.published:
            yield stage
            return
        lock.keep = said.resumes = True
        made.clear()
        try:
            yield stage
        except RESUMED:
            raise
        except BaseException:
            lock.keep = stage.finished
            raise
        lock.keep = lock.path.exists()  # gone with all others once they are published


def _take_up(
    place: Path,
    whole: _Lock,
    lock: _Lock,
    entries: list[dict[str, Any]],
    job: str,
    parts: int,
    force: bool,
    restart: bool,
    size: int,
) -> bool:
    """Whether this part goes on; else it is ready to begin. Nobody else begins meanwhile."""
    partial, _ = _beside(place, "partial"), _put_aside_back(place)
    _refuse(place, force)
    if whole.keep:
        _refuse_begun(place, not restart)
        whole.restart_empty()
        whole.keep = False
        _remove(partial)
    others = [path for path in _journals(place) if path != lock.path]
    of = f"-of-{parts}"
    odd = [p for p in others if not p.name.endswith(of) or _job(p) not in (job, None)]
    _clear_parts(place, odd, restart)
    mine = not restart and bool(entries) and entries[0].get("job") == job
    mine = mine and _is_directory(partial)
    if not mine:
        if len(odd) == len(others) or not _is_directory(partial):
            _remove(partial)
        _check_free(place, size)
        lock.restart({"job": job})
    with contextlib.suppress(FileExistsError):
        os.mkdir(partial)
    if len(odd) == len(others):
        _unlink_links(partial)
    return mine


def _job(path: Path) -> Any:
    """What a part's journal is of; None of one that has not begun."""
    records = _records(path)
    return records[0].get("job") if records else None


def _journals(place: Path) -> list[Path]:
    """Of parts, whatever their number."""
    head = _beside(place, "part-").name
    try:
        names = os.listdir(place.parent)
    except FileNotFoundError:
        return []
    return [place.with_name(name) for name in sorted(names) if name.startswith(head)]


def _clear_parts(place: Path, journals: list[Path], restart: bool) -> None:
    """Journals of parts that another run cannot go on beside: refused, or removed if asked."""
    if not journals:
        return
    if not restart:
        names = ", ".join(path.name.partition("zoo-")[2] for path in journals[:5])
        raise OutputExists(
            f"{place}: {names} were begun from another source, spec, options or number of parts. "
            "Finish those, or give them up with restart (--restart)"
        )
    for path in journals:
        with _locked(place, path.name.partition("zoo-")[2]) as lock:  # refused while it runs
            lock.done = True


def _refuse_begun(place: Path, begun: bool) -> None:
    if begun:
        raise OutputExists(
            f"{place}: a conversion of the whole was begun here and not finished. Finish it with "
            "the same command, or give it up with restart (--restart)"
        )


def _tidy(place: Path) -> None:
    """What parts leave beside what they published."""
    _remove(_beside(place, "partial"))
    _remove(_beside(place, "replaced"))
    for path in (*_journals(place), _beside(place, "lock")):
        path.unlink(missing_ok=True)


def _role(part: int, parts: int) -> str:
    return f"part-{part}-of-{parts}"


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            return _entries(file)[0]
    except FileNotFoundError:
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


def _publish(partial: Path, place: Path, aside: Path, lock: _Lock) -> None:
    """`lock` notes which directory it is, so that a run after a kill knows it by that."""
    lock.append({"publishing": partial.lstat().st_ino})
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
