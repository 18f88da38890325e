"""Stages that one process fills: new directories and files, and directories that can be resumed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from converters.staging.destination import (
    Replaces,
    absolute,
    check_free_space,
    check_replaceable,
    is_directory,
    refuse_all,
    remove,
    replaced_files,
    resolved,
    side_path,
    unlink_links,
)
from converters.staging.journal import (
    Lock,
    clear_parts,
    is_begun,
    locked,
    part_journals,
    refuse_begun,
)
from converters.staging.publishing import is_published, publish, recover, sync_parent, sync_tree
from zoo.errors import OutputExists, SourceChanged, ZooError

# errors that the same command may get past: its work so far is kept
RESUMED = (KeyboardInterrupt, OSError, MemoryError, OutputExists, SourceChanged)


@contextmanager
def staged(
    destination: str | os.PathLike[str],
    replaces: Replaces = refuse_all,
    *,
    restart: bool = False,
    size: int = 0,
) -> Iterator[Path]:
    """Yield a new directory to fill; on exit it becomes `destination`, on an error it is removed.

    What is there is replaced in one step, except the files that `replaces` does not name. A link
    is replaced, never followed. An empty directory counts as absent.

    Args:
        destination: Where the directory goes.
        replaces: Which files at `destination` may be replaced; by default none.
        restart: Discard an unfinished conversion instead of refusing to write over it.
        size: Bytes that have to be free before anything is written.

    Raises:
        OutputExists: If `destination` may not be replaced or another process is writing it.
        ZooError: If the system refuses a write.

    Example:
        >>> import os, tempfile
        >>> place = os.path.join(tempfile.mkdtemp(), "model")
        >>> with staged(place) as stage:
        ...     _ = (stage / "config.json").write_text("{}")
        >>> os.listdir(place)
        ['config.json']
    """
    place, made = resolved(destination), list[Path]()
    with DestinationErrors(place), missing_parents(place, made), locked(place) as lock:
        partial = _begin(place, lock, replaces, restart, size)
        os.mkdir(partial)
        try:
            yield partial
            sync_tree(partial)
            publish(partial, place, lock, replaces)
        except BaseException:
            _give_up(partial, place, lock)
            raise
        made.clear()


@contextmanager
def staged_file(
    destination: str | os.PathLike[str], replaces: Replaces = refuse_all, *, size: int = 0
) -> Iterator[BinaryIO]:
    """Yield a new file to write; on exit it becomes `destination`, on an error it is removed.

    It replaces what is there unless `replaces` refuses. See `staged` for arguments and errors.
    """
    if is_directory(absolute(destination)):
        raise OutputExists(f"{absolute(destination)}: is a directory. Name a file in it")
    place, made = resolved(destination), list[Path]()
    with DestinationErrors(place), missing_parents(place, made), locked(place) as lock:
        partial = _begin(place, lock, replaces, False, size)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(partial, flags, 0o666), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            replaced_files(place, replaces)
            os.rename(partial, place)
        except BaseException:
            remove(partial)
            raise
        made.clear()
        lock.done = True
        sync_parent(place)


def _begin(place: Path, lock: Lock, replaces: Replaces, restart: bool, size: int) -> Path:
    """Return the empty path to write to, once the destination is known to be replaceable."""
    entries = lock.read()
    lock.keep = is_begun(entries)
    recover(place, entries)
    side_path(place, "publish").unlink(missing_ok=True)  # left by parts; none is running now
    check_replaceable(place, replaces)
    if not restart:
        refuse_begun(place, lock.keep)
    partial = side_path(place, "partial")
    remove(partial)  # its writer is dead, since the lock is ours
    lock.restart_empty()
    lock.keep = False
    check_free_space(place, size)
    return partial


class Stage:
    """A directory being filled, and the journal of what is finished in it."""

    def __init__(
        self, path: Path, lock: Lock | None = None, records: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.path, self._lock = path, lock  # without a lock, nothing can be resumed
        self.records = records  # of a run that was killed; empty in a run from the start
        self.published = False  # a killed run had finished, nothing is left to do
        self.discarded = False  # unfinished work of another job was removed

    def record(self, entry: dict[str, Any]) -> None:
        """Append a record of finished work to the journal."""
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
    """Like `staged`, but an interrupted run leaves its work for the next run of the same `job`.

    A run that is killed, interrupted or stopped by a full disk leaves its stage and journal. The
    next run of the same `job` gets both. If a run was killed after publishing, the next one has
    nothing to do, provided that its `sources` are the same. A run that is refused removes nothing.
    """
    place, made, errors = (
        resolved(destination),
        list[Path](),
        DestinationErrors(resolved(destination)),
    )
    partial, of = side_path(place, "partial"), f"{job} {sources}"
    with errors, missing_parents(place, made), locked(place) as lock:
        entries = lock.read()
        lock.keep = is_begun(entries)
        recover(place, entries)
        side_path(place, "publish").unlink(missing_ok=True)  # left by parts; none is running now
        if is_published(place, entries):  # killed after the last rename
            remove(partial)
            if entries[-1].get("of") == of:
                stage = Stage(place, lock, entries)
                stage.published = lock.done = True
                yield stage
                return
            entries = []  # a finished job that is not this one
        check_replaceable(place, replaces)
        clear_parts(place, part_journals(place), restart)
        mine = not restart and bool(entries) and entries[0].get("job") == job
        mine = mine and is_directory(partial)
        if not mine:
            remove(partial)
            check_free_space(place, size)
            lock.restart({"job": job})
            os.mkdir(partial)
        lock.keep = errors.resumes = True
        unlink_links(partial)
        stage = Stage(partial, lock, entries[1:] if mine else [])
        stage.discarded = is_begun(entries) and not mine and not restart
        made.clear()
        try:
            yield stage
            sync_tree(partial)
            publish(partial, place, lock, replaces, of)
        except RESUMED:
            raise
        except BaseException:  # the same command would fail again
            _give_up(partial, place, lock)
            raise


def _give_up(partial: Path, place: Path, lock: Lock) -> None:
    """Remove a stage; leave what was replaced and could not be removed to the next run."""
    if not is_published(place, lock.read()):
        remove(partial)
        lock.keep = False


class DestinationErrors:
    """Turn a system's error into a ZooError that names the destination."""

    def __init__(self, place: Path) -> None:
        self.place, self.resumes = place, False  # whether work to resume from is kept

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, OSError) or isinstance(error, BrokenPipeError):
            return
        file = f" ({error.filename})" if error.filename else ""
        again = " The same command resumes where this one stopped." if self.resumes else ""
        fault = f"{self.place}: not written: {error.strerror or error}{file}."
        raise ZooError(f"{fault} What was there is untouched.{again}") from error


@contextmanager
def missing_parents(place: Path, made: list[Path]) -> Iterator[None]:
    """Make missing parent directories; remove them again unless `made` is emptied."""
    try:
        _make_parents(place.parent, made)
        yield
    finally:
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()


def _make_parents(parent: Path, made: list[Path]) -> None:
    """Make missing directories, outermost first, and append each to `made`."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another writer was faster
            os.mkdir(path)
            made.append(path)
