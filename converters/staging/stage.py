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

# what the same command may get past, so that what there is of its work is kept
RESUMED = (KeyboardInterrupt, OSError, MemoryError, OutputExists, SourceChanged)


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
    """A fresh file to write, likewise; it replaces what is there if `replaces` does not refuse."""
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
    """Where to write, with nothing there, once it is clear that the destination may be replaced."""
    entries = lock.read()
    lock.keep = is_begun(entries)
    recover(place, entries)
    side_path(place, "publish").unlink(missing_ok=True)  # of parts, of which none runs now
    check_replaceable(place, replaces)
    if not restart:
        refuse_begun(place, lock.keep)
    partial = side_path(place, "partial")
    remove(partial)  # whoever left it is dead: the lock is ours
    lock.restart_empty()
    lock.keep = False
    check_free_space(place, size)
    return partial


class Stage:
    """A directory being filled, and the journal of what is in it for good."""

    def __init__(
        self, path: Path, lock: Lock | None = None, records: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.path, self._lock = path, lock  # without one, nothing can be taken up again
        self.records = records  # records of a run that was killed; none of a run from the start
        self.published = False  # all was done already, but for saying so
        self.discarded = False  # what was there belongs to another job, and is gone

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
        side_path(place, "publish").unlink(missing_ok=True)  # of parts, of which none runs now
        if is_published(place, entries):  # killed after the last rename
            remove(partial)
            if entries[-1].get("of") == of:
                stage = Stage(place, lock, entries)
                stage.published = lock.done = True
                yield stage
                return
            entries = []  # of another job, which is done
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
    """Remove a stage; what was replaced and could not be removed is left to the next run."""
    if not is_published(place, lock.read()):
        remove(partial)
        lock.keep = False


class DestinationErrors:
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
        fault = f"{self.place}: not written: {error.strerror or error}{file}."
        raise ZooError(f"{fault} What was there is untouched.{again}") from error


@contextmanager
def missing_parents(place: Path, made: list[Path]) -> Iterator[None]:
    """Directories that were missing, gone again unless `made` is emptied."""
    try:
        _make_parents(place.parent, made)
        yield
    finally:
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()


def _make_parents(parent: Path, made: list[Path]) -> None:
    """The directories that are missing, outermost first; each that is made is noted in `made`."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another writer was faster
            os.mkdir(path)
            made.append(path)
