"""One stage that several processes fill, each with a journal of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from converters.staging.destination import (
    Replaces,
    check_free_space,
    check_replaceable,
    is_directory,
    refuse_all,
    remove,
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
    part_role,
    read_journal,
    refuse_begun,
)
from converters.staging.publishing import is_published, publish, recover, sync_tree
from converters.staging.stage import RESUMED, DestinationErrors, Stage, missing_parents
from zoo.errors import OutputExists, ZooError

Verify = Callable[[int, list[dict[str, Any]]], None]


class SharedStage(Stage):
    """A stage that several processes fill, on one machine or many, each with its own journal."""

    def __init__(
        self, place: Path, lock: Lock, records: list[dict[str, Any]], part: int, parts: int
    ) -> None:
        super().__init__(side_path(place, "partial"), lock, records)
        self.place, self.part, self.parts = place, part, parts
        self.finished = False  # this part's share

    @contextmanager
    def publishing(
        self, job: str, replaces: Replaces, verify: Verify
    ) -> Iterator[list[list[dict[str, Any]]]]:
        """Yield the records of all parts to the part that finishes last, which then publishes.

        The others get an empty list. `verify` checks what each other part wrote. If it raises, that
        part's journal is removed, so that the part starts again.
        """
        self.finished = True
        with locked(self.place, "publish", fcntl.LOCK_EX) as publish_lock:
            numbers = range(1, self.parts + 1)
            journals = [side_path(self.place, part_role(n, self.parts)) for n in numbers]
            records = [read_journal(journal) for journal in journals]
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
            sync_tree(self.path)
            publish_lock.keep = True
            try:
                publish(self.path, self.place, publish_lock, replaces, job)
            except OutputExists:
                publish_lock.keep = False
                raise
            except BaseException:
                publish_lock.done, publish_lock.keep = False, True
                raise
            if publish_lock.done:
                publish_lock.done, publish_lock.keep = (
                    False,
                    True,
                )  # until the journals of all parts are gone
                _remove_part_files(self.place, [])
                publish_lock.done = True


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
) -> Iterator[SharedStage]:
    """Like `resumable`, for one of several `parts` that fill the same stage independently.

    `same` returns whether a directory is already what this job publishes.
    """
    place, made, errors = (
        resolved(destination),
        list[Path](),
        DestinationErrors(resolved(destination)),
    )
    with (
        errors,
        missing_parents(place, made),
        locked(place, how=fcntl.LOCK_SH | fcntl.LOCK_NB) as whole,
        locked(place, part_role(part, parts)) as lock,
    ):
        entries = lock.read()
        lock.keep, whole.keep = is_begun(entries), is_begun(whole.read())
        stage = SharedStage(place, lock, [], part, parts)
        with locked(place, "publish", fcntl.LOCK_EX) as publish_lock:
            begun = publish_lock.read()
            publish_lock.keep = bool(begun)
            if is_published(place, begun) and begun[-1].get("of") == job:  # killed after it
                _remove_part_files(place, begun)
                stage.published = whole.done = lock.done = True
            elif not restart and same(place):
                stage.published = True
            else:
                recover(place, whole.read())
                mine = _begin_part(place, whole, lock, entries, job, parts, replaces, restart, size)
                stage.records = entries[1:] if mine else []
                stage.discarded = is_begun(entries) and not mine and not restart
            publish_lock.done = True
        if stage.published:
            yield stage
            return
        lock.keep = errors.resumes = True
        made.clear()
        try:
            yield stage
        except RESUMED:
            raise
        except BaseException:
            lock.keep = stage.finished
            raise
        lock.keep = lock.path.exists()  # gone with all others once they are published


def _begin_part(
    place: Path,
    whole: Lock,
    lock: Lock,
    entries: list[dict[str, Any]],
    job: str,
    parts: int,
    replaces: Replaces,
    restart: bool,
    size: int,
) -> bool:
    """Prepare the stage; return whether this part resumes (otherwise it starts from nothing).

    The caller holds the publishing lock, so no other part starts meanwhile.
    """
    partial = side_path(place, "partial")
    check_replaceable(place, replaces)
    if whole.keep:
        refuse_begun(place, not restart)
        whole.restart_empty()
        whole.keep = False
        remove(partial)
    others = [path for path in part_journals(place) if path != lock.path]
    of = f"-of-{parts}"
    foreign = [p for p in others if not p.name.endswith(of) or _job_of(p) not in (job, None)]
    clear_parts(place, foreign, restart)
    mine = not restart and bool(entries) and entries[0].get("job") == job
    mine = mine and is_directory(partial)
    if not mine:
        if len(foreign) == len(others) or not is_directory(partial):
            remove(partial)
        check_free_space(place, size)
        lock.restart({"job": job})
    with contextlib.suppress(FileExistsError):
        os.mkdir(partial)
    if len(foreign) == len(others):
        unlink_links(partial)
    return mine


def _job_of(path: Path) -> Any:
    """The job of a part's journal; None if that part has not begun."""
    records = read_journal(path)
    return records[0].get("job") if records else None


def _remove_part_files(place: Path, entries: list[dict[str, Any]]) -> None:
    """Remove what parts leave beside a published directory."""
    recover(place, entries)
    remove(side_path(place, "partial"))
    for path in (*part_journals(place), side_path(place, "lock")):
        path.unlink(missing_ok=True)
