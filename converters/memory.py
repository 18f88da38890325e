"""Out of memory, in one line that says how much was asked for and what to do."""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zoo.errors import ResourceLimit

# what torch's allocators say, each in a RuntimeError
_REFUSED = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)
_ASKED = re.compile(r"allocate ([\d.]+ ?(?:bytes|[KMGT]iB))")


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that there was no more memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return _REFUSED.search(str(error)) is not None
    return isinstance(error, MemoryError)


@contextmanager
def enough(task: str | Callable[[], str], way_out: str) -> Iterator[None]:
    """A shortage of memory within becomes ResourceLimit: what `task` says, sizes, the way out."""
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
    """Bytes as a person reads them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _available() -> int | None:
    """Bytes that the machine has left, or this process may still ask for."""
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
