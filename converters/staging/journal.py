"""Locks beside a destination, and the journals in them: one JSON record a line."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from converters.staging.destination import side_path
from zoo.errors import OutputExists, option


class Lock:
    """A locked file whose content is a journal: one JSON record a line."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd, self.path = fd, path
        self.end = 0  # of the last whole line
        self.keep = self.done = False

    def read(self) -> list[dict[str, Any]]:
        """Return every whole record; cut off a torn last line."""
        with os.fdopen(os.dup(self.fd), "rb") as file:
            file.seek(0)
            entries, self.end = _parse_entries(file)
        os.ftruncate(self.fd, self.end)
        return entries

    def restart(self, entry: dict[str, Any]) -> None:
        """Begin the journal again with one record."""
        self.restart_empty()
        self.append(entry)

    def restart_empty(self) -> None:
        """Remove every record."""
        os.ftruncate(self.fd, 0)
        self.end = 0

    def append(self, entry: dict[str, Any]) -> None:
        """Write one record behind the last."""
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        self.end += os.pwrite(self.fd, line, self.end)


@contextmanager
def locked(
    place: Path, role: str = "lock", how: int = fcntl.LOCK_EX | fcntl.LOCK_NB
) -> Iterator[Lock]:
    """Hold a lock beside `place`: one writer a destination. The lock dies with its process.

    Raises:
        OutputExists: If another process holds it.
    """
    path = side_path(place, role)
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
    lock = Lock(fd, path)
    try:
        yield lock
    finally:
        if lock.done or not lock.keep:
            with contextlib.suppress(OSError):
                if how & fcntl.LOCK_SH:  # others may share it: the last one removes it
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False)):
                    os.unlink(path)
        os.close(fd)


def _parse_entries(lines: Iterable[bytes]) -> tuple[list[dict[str, Any]], int]:
    """Return the records before the first broken line, and their size in bytes."""
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


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the records of a journal that this process has not locked."""
    try:
        with path.open("rb") as file:
            return _parse_entries(file)[0]
    except FileNotFoundError:
        return []


def is_begun(entries: list[dict[str, Any]]) -> bool:
    """Return whether a journal records work that can be resumed."""
    return any("job" in entry for entry in entries)


def refuse_begun(place: Path, begun: bool) -> None:
    """Raise OutputExists if an unfinished conversion of the whole is recorded."""
    if begun:
        raise OutputExists(
            f"{place}: a conversion of the whole was begun here and not finished. Finish it with "
            f"the same command, or give it up with {option('restart')}"
        )


def part_role(part: int, parts: int) -> str:
    """Return the role of a part's journal, `part-3-of-16`, for `side_path`."""
    return f"part-{part}-of-{parts}"


def part_journals(place: Path) -> list[Path]:
    """Return the journals of parts, whatever their number."""
    head = side_path(place, "part-").name
    try:
        names = os.listdir(place.parent)
    except FileNotFoundError:
        return []
    return [place.with_name(name) for name in sorted(names) if name.startswith(head)]


def clear_parts(place: Path, journals: list[Path], restart: bool) -> None:
    """Refuse journals of parts that this run cannot share the stage with, or remove them.

    Raises:
        OutputExists: Without `restart`, if there is any; with it, if its part is running.
    """
    if not journals:
        return
    if not restart:
        names = ", ".join(path.name.partition("zoo-")[2] for path in journals[:5])
        raise OutputExists(
            f"{place}: {names} were begun from another source, spec, options or number of parts. "
            f"Finish those, or give them up with {option('restart')}"
        )
    for path in journals:
        with locked(place, path.name.partition("zoo-")[2]) as lock:  # refused while it runs
            lock.done = True
