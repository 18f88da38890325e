"""Limit torch's threads, a setting of the process and not of a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_within, _before = 0, 1  # callers inside, and the number of threads before the first entered


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Run each torch operation in one thread; the last to leave restores the setting."""
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
