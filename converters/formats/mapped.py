"""A file's bytes as tensors: mapped, never read into memory, never written back."""

from __future__ import annotations

import math
import mmap
import os
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from converters.formats import itemsize, open_regular, torch_dtype
from zoo.errors import CorruptCheckpoint

if TYPE_CHECKING:
    import torch

# A private mapping is charged to the machine's memory as if all of it were to be written, and one
# larger than that memory is refused. Weights are only read, so they ask for no reservation.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

_CHUNK = 16 << 20


class MappedFile:
    """One regular file, as it was when its header was read through `fd`; mapped when first asked.

    What is written to its tensors stays in this process.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.size = os.fstat(fd).st_size
        self._identity = _identity(fd)
        self._mapping: mmap.mmap | None = None

    def bytes(self, start: int, end: int) -> torch.Tensor:
        """(end - start,) bytes of the file, a view; never none at all."""
        import torch

        return torch.frombuffer(self.data, dtype=torch.uint8, count=end - start, offset=start)

    def tensor(self, start: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A view of the file in this shape; a copy where the file does not align it."""
        import torch

        kind, size, count = torch_dtype(dtype), itemsize(dtype), math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=kind)
        if start % size:  # kernels may assume alignment, so this tensor alone is copied
            return self.bytes(start, start + count * size).clone().view(kind).view(shape)
        flat = torch.frombuffer(self.data, dtype=kind, count=count, offset=start)
        return flat.view(shape)

    def crc32(self, start: int, end: int) -> int:
        with memoryview(self.data) as held:
            crc = 0
            for at in range(start, end, _CHUNK):
                crc = zlib.crc32(held[at : min(at + _CHUNK, end)], crc)
        return crc

    @property
    def data(self) -> mmap.mmap:
        if self._mapping is None:
            fd = open_regular(self.path)
            try:
                if _identity(fd) != self._identity:
                    raise CorruptCheckpoint(
                        f"{self.path}: changed after its header was read; open it again"
                    )
                flags, protection = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                self._mapping = mmap.mmap(fd, 0, flags=flags, prot=protection)
            finally:
                os.close(fd)
        return self._mapping


def _identity(fd: int) -> tuple[int, int, int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
