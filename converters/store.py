"""A directory that appears whole or not at all: staged beside its place, then renamed into it.

The lock of a destination is a file beside it, which also holds the journal of a conversion that can
be taken up again. It is the last thing to go.

Who replaces a directory says which of its files go. All others are hard links in the stage before
the two directories change places, so that no kill can lose one; then the old names are removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import pwd
import shutil
import stat
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from zoo.errors import OutputExists, SourceChanged, UsageError, ZooError, listing, option

# what the same command may get past, so that what there is of its work is kept
RESUMED = (KeyboardInterrupt, OSError, MemoryError, OutputExists, SourceChanged)
_AT_FDCWD = -100
_EXCHANGE = 2  # renameat2's flag

# Given what is at a destination: the files that a new directory replaces, by their paths in it. All
# others are kept. Raises OutputExists where nothing may be written.
Replaces = Callable[[Path], Collection[str]]


def refuse_all(place: Path) -> Collection[str]:
    """The `Replaces` of a destination that has to be new."""
    raise OutputExists(f"{place}: exists already. Use {option('force')} to replace it.")


@contextmanager
def staged(
    destination: str | os.PathLike[str],
    replaces: Replaces = refuse_all,
    *,
    restart: bool = False,
    size: int = 0,
) -> Iterator[Path]:
    """A fresh directory to fill; on leaving it becomes `destination`, on an error it is gone.

    What is there is replaced in one step, but for the files that `replaces` does not name. A link
    is replaced, never followed. An empty directory counts as nothing. `size` bytes have to be free
    before anything is written. `restart` gives up a conversion that was begun and not finished.
    """
    place, made = _place(destination), list[Path]()
    with _Said(place), _parents(place, made), _locked(place) as lock:
        partial = _begin_alone(place, lock, replaces, restart, size)
        os.mkdir(partial)
        try:
            yield partial
            _sync(partial)
            _publish(partial, place, lock, replaces)
        except BaseException:
            _give_up(partial, place, lock)
            raise
        made.clear()


@contextmanager
def staged_file(
    destination: str | os.PathLike[str], replaces: Replaces = refuse_all, *, size: int = 0
) -> Iterator[BinaryIO]:
    """A fresh file to write, likewise; it replaces what is there if `replaces` does not refuse."""
    if _is_directory(_absolute(destination)):
        raise OutputExists(f"{_absolute(destination)}: is a directory. Name a file in it")
    place, made = _place(destination), list[Path]()
    with _Said(place), _parents(place, made), _locked(place) as lock:
        partial = _begin_alone(place, lock, replaces, False, size)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(partial, flags, 0o666), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _replaced(place, replaces)
            os.rename(partial, place)
        except BaseException:
            _remove(partial)
            raise
        made.clear()
        lock.done = True
        _sync_parent(place)


def _begin_alone(place: Path, lock: _Lock, replaces: Replaces, restart: bool, size: int) -> Path:
    """Where to write, with nothing there, once it is clear that the destination may be replaced."""
    entries = lock.read()
    lock.keep = _begun(entries)
    _put_right(place, entries)
    _beside(place, "publish").unlink(missing_ok=True)  # of parts, of which none runs now
    _check_replaced(place, replaces)
    if not restart:
        _refuse_begun(place, lock.keep)
    partial = _beside(place, "partial")
    _remove(partial)  # whoever left it is dead: the lock is ours
    lock.restart_empty()
    lock.keep = False
    _check_free(place, size)
    return partial


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
    replaces: Replaces = refuse_all,
    *,
    sources: str = "",
    restart: bool = False,
    size: int = 0,
) -> Iterator[Stage]:
    """As `staged`, but a run that is killed or interrupted or whose disk fails leaves what it has.

    The next run of the same `job` is given it. Where that was killed after it published, it is
    done if its `sources` are the same too. A run that is refused leaves what others have.
    """
    place, made, said = _place(destination), list[Path](), _Said(_place(destination))
    partial, of = _beside(place, "partial"), f"{job} {sources}"
    with said, _parents(place, made), _locked(place) as lock:
        entries = lock.read()
        lock.keep = _begun(entries)
        _put_right(place, entries)
        _beside(place, "publish").unlink(missing_ok=True)  # of parts, of which none runs now
        if _is_published(place, entries):  # killed after the last rename
            _remove(partial)
            if entries[-1].get("of") == of:
                stage = Stage(place, lock, entries)
                stage.published = lock.done = True
                yield stage
                return
            entries = []  # of another job, which is done
        _check_replaced(place, replaces)
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
            _publish(partial, place, lock, replaces, of)
        except RESUMED:
            raise
        except BaseException:  # the same command would fail again
            _give_up(partial, place, lock)
            raise


def _give_up(partial: Path, place: Path, lock: _Lock) -> None:
    """Remove a stage; what was replaced and could not be removed is left to the next run."""
    if not _is_published(place, lock.read()):
        _remove(partial)
        lock.keep = False


def _place(destination: str | os.PathLike[str]) -> Path:
    check_place(destination)
    place = _absolute(destination)
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


def check_place(destination: str | os.PathLike[str]) -> None:
    """Refuse what no command replaces, full or empty, by whatever path it is named."""
    place = _absolute(destination)
    real = os.path.realpath(place)
    inside = f"Give a directory inside it, such as {os.path.join(place, 'model')}"
    if os.path.dirname(real) == real:
        raise OutputExists(f"{place}: the root of a file system cannot be replaced. {inside}")
    if os.path.ismount(real):
        raise OutputExists(f"{place}: a file system is mounted here. {inside}")
    for what, path in _living_places():
        if os.path.commonpath([real, path]) == real:
            of = "is" if real == path else f"holds {path},"
            raise OutputExists(f"{place}: {of} {what}, and is never replaced. {inside}")
    if os.path.isdir(real) and os.path.lexists(os.path.join(real, ".git")):
        raise OutputExists(f"{place}: holds .git, so it is never replaced. {inside}")


def _absolute(destination: str | os.PathLike[str]) -> Path:
    """Where the system would make it: parents resolved, while a link as destination stays one."""
    path = Path(destination)
    try:
        if path.name in ("", ".."):
            return Path(os.path.realpath(path))
        return Path(os.path.realpath(path.parent), path.name)
    except FileNotFoundError:
        raise UsageError(f"{destination}: the working directory is gone: cd to another") from None


def _living_places() -> Iterator[tuple[str, str]]:
    with contextlib.suppress(OSError):
        yield "the working directory", os.path.realpath(os.getcwd())
    homes = [os.environ.get("HOME", "")]
    with contextlib.suppress(KeyError):  # a user that no table lists
        homes.append(pwd.getpwuid(os.getuid()).pw_dir)
    for home in homes:
        if os.path.isabs(home):
            yield "the home directory", os.path.realpath(home)


def _put_right(place: Path, entries: list[dict[str, Any]]) -> None:
    """Finish a replacement that was killed after it was published; undo one killed before that."""
    notes = [*entries, *_records(_beside(place, "publish"))]
    last: dict[str, Any] = next((entry for entry in reversed(notes) if "publishing" in entry), {})
    aside = _beside(place, "replaced")
    for old in (_beside(place, "partial"), aside):
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
                f"{aside}: a directory that was replaced, with files that nobody may have "
                "elsewhere. Move it away, or delete it"
            )


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


def _check_replaced(place: Path, replaces: Replaces) -> None:
    """Everything that could keep a destination from being replaced, before hours of work."""
    if not _is_directory(place):
        _replaced(place, replaces)
        return
    trial, problems = _beside(place, "trial"), list[str]()
    trial.unlink(missing_ok=True)
    for name, is_directory in _kept(place, _replaced(place, replaces)):
        path = place / name
        try:
            if is_directory:
                status = os.lstat(path)
                if status.st_uid != os.geteuid() and not os.access(path, os.W_OK | os.X_OK):
                    raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            elif os.lstat(path).st_nlink == 1:  # else it can be linked, and may be a source too,
                os.link(path, trial, follow_symlinks=False)  # whose ctime a link would move
                os.unlink(trial)
        except OSError as error:
            problems.append(f"{name} ({error.strerror})")
    if problems:
        raise OutputExists(
            f"{place}: holds files that are no checkpoint's and that cannot be kept when it is "
            f"replaced: {listing(problems)}. Move them away, or write elsewhere"
        )


def _replaced(place: Path, replaces: Replaces) -> frozenset[str]:
    check_place(place)
    if not os.path.lexists(place) or _is_empty(place):
        return frozenset()
    return frozenset(replaces(place))


def files_below(directory: Path) -> Iterator[tuple[str, bool]]:
    """(path in it, whether it is a directory), outer ones first; links are followed nowhere."""
    device, folders = os.lstat(directory).st_dev, [""]
    while folders:
        above = folders.pop()
        with os.scandir(directory / above) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name, is_directory = f"{above}{entry.name}", entry.is_dir(follow_symlinks=False)
                if is_directory:
                    if entry.stat(follow_symlinks=False).st_dev != device:
                        raise OutputExists(f"{directory}: a file system is mounted at {name}")
                    folders.append(f"{name}/")
                yield name, is_directory


def _kept(directory: Path, replaced: Collection[str]) -> list[tuple[str, bool]]:
    """What stays when a directory is replaced: no folder that held replaced files alone."""
    below, emptied = list(files_below(directory)), _above(replaced)
    kept = {
        name for name, is_directory in below if name not in (emptied if is_directory else replaced)
    }
    kept |= _above(kept)
    return [(name, is_directory) for name, is_directory in below if name in kept]


def _above(names: Iterable[str]) -> set[str]:
    return {str(parent) for name in names for parent in PurePosixPath(name).parents}


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
        self, job: str, replaces: Replaces, verify: Verify
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
            publish.keep = True
            try:
                _publish(self.path, self.place, publish, replaces, job)
            except OutputExists:
                publish.keep = False
                raise
            except BaseException:
                publish.done, publish.keep = False, True
                raise
            if publish.done:
                publish.done, publish.keep = False, True  # until the journals of all parts are gone
                _tidy(self.place, [])
                publish.done = True


@contextmanager
def shared(
    destination: str | os.PathLike[str],
    job: str,
    part: int,
    parts: int,
    replaces: Replaces = refuse_all,
    *,
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
            if _is_published(place, begun) and begun[-1].get("of") == job:  # killed after it
                _tidy(place, begun)
                stage.published = whole.done = lock.done = True
            elif not restart and same(place):
                stage.published = True
            else:
                _put_right(place, whole.read())
                mine = _take_up(place, whole, lock, entries, job, parts, replaces, restart, size)
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
    replaces: Replaces,
    restart: bool,
    size: int,
) -> bool:
    """Whether this part goes on; else it is ready to begin. Nobody else begins meanwhile."""
    partial = _beside(place, "partial")
    _check_replaced(place, replaces)
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
            f"Finish those, or give them up with {option('restart')}"
        )
    for path in journals:
        with _locked(place, path.name.partition("zoo-")[2]) as lock:  # refused while it runs
            lock.done = True


def _refuse_begun(place: Path, begun: bool) -> None:
    if begun:
        raise OutputExists(
            f"{place}: a conversion of the whole was begun here and not finished. Finish it with "
            f"the same command, or give it up with {option('restart')}"
        )


def _tidy(place: Path, entries: list[dict[str, Any]]) -> None:
    """What parts leave beside what they published."""
    _put_right(place, entries)
    _remove(_beside(place, "partial"))
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


def _publish(partial: Path, place: Path, lock: _Lock, replaces: Replaces, of: str = "") -> None:
    """`lock` notes which directories change places, so that a run after a kill knows them."""
    replaced, aside = _replaced(place, replaces), _beside(place, "replaced")
    if _is_directory(place):
        _link_kept(place, partial, replaced)
    old = place.lstat().st_ino if os.path.lexists(place) else None
    note = {"publishing": partial.lstat().st_ino, "old": old, "replaced": sorted(replaced)}
    lock.append({**note, "of": of})
    os.fsync(lock.fd)
    lock.keep = True
    if not os.path.lexists(place) or _is_empty(place):
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
    _sync_parent(place)


def _sync_parent(place: Path) -> None:
    try:
        _fsync(place.parent)
    except OSError as error:
        raise ZooError(f"{place}: in place, but perhaps not on the disk: {error}") from error


def _link_kept(place: Path, stage: Path, replaced: Collection[str]) -> None:
    """The files that are not replaced, in the stage too; directories are made as they are there."""
    kept = _kept(place, replaced)
    folders = [(place / name, stage / name) for name, is_directory in kept if is_directory]
    problems = list[str]()
    for name, is_directory in kept:
        try:
            if not is_directory:
                os.link(place / name, stage / name, follow_symlinks=False)
            elif not _is_directory(stage / name):
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
    """Remove what was replaced; what is in it alone, because it appeared late, goes to `place`."""
    if not _is_directory(old):
        old.unlink()
        return
    emptied, moved = _above(replaced), list[str]()
    _make_writable(old)
    below = list(files_below(old))
    for name, is_directory in below:
        if is_directory:
            _make_writable(old / name)
            if name not in emptied:
                (place / name).mkdir(parents=True, exist_ok=True)
    for name, is_directory in reversed(below):
        path, new = old / name, place / name
        if is_directory:
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
