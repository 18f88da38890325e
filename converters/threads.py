"""How many threads torch takes, which is the process's and not a thread's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_within, _before = 0, 1  # how many are within, and what the first of them came upon


@contextmanager
def one_thread_each() -> Iterator[None]:
    """One thread for each operation; the last to leave, in whatever thread, restores the number."""
    global _within, _before
    import torch

    with _lock:
        if not _within:
            _before = torch.get_num_threads()
            torch.set_num_threads(1)
        _within += 1
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if not _within:
                torch.set_num_threads(_before)
