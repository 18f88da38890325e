"""Turn a shortage of memory into one message: how much was asked for and what to do."""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zoo.errors import ResourceLimit

# messages of torch's allocators, each in a RuntimeError
_REFUSED = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)
_ASKED = re.compile(r"allocate ([\d.]+ ?(?:bytes|[KMGT]iB))")


def is_shortage(error: BaseException) -> bool:
    """Return whether an error reports that memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return _REFUSED.search(str(error)) is not None
    return isinstance(error, MemoryError)


@contextmanager
def enough(task: str | Callable[[], str], way_out: str) -> Iterator[None]:
    """Turn a shortage of memory inside the block into ResourceLimit.

    The message is `task`, the sizes that were asked for and available, and `way_out`.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_shortage(error):
            raise
        named = task if isinstance(task, str) else task()
        raise ResourceLimit(f"{named}: out of memory{_sizes(error)}. {way_out}") from None


def _sizes(error: BaseException) -> str:
    asked, free = _ASKED.search(str(error)), _available()
    parts = [f"{_read(asked[1])} were asked for"] if asked else []
    parts += [f"{size(free)} are there"] if free is not None else []
    return f" ({', '.join(parts)})" if parts else ""


def _read(text: str) -> str:
    number, _, unit = text.partition(" ")
    return size(int(number)) if unit == "bytes" and number.isdigit() else text


def size(count: int) -> str:
    """Format a number of bytes for people.

    >>> size(250_000_000)
    '0.25 GB'
    """
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _available() -> int | None:
    """Return the bytes that the machine has free, or that this process may still allocate."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (left,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        left = min(left, max(0, limit - pages * resource.getpagesize()))
    return left


__all__ = ["enough", "is_shortage", "size"]
