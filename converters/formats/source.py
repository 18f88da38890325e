"""A file's bytes as tensors: views of a private map or copies in memory; never written back."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import threading
import weakref
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from converters.formats import itemsize, open_regular, torch_dtype
from zoo.errors import SourceChanged

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converters.lazy import Read

# A private mapping is charged to the machine's memory as if all of it were to be written, and one
# larger than that memory is refused. Weights are only read, so they ask for no reservation.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

_CHUNK = 256 << 10  # bytes read at a time if they are not kept: a size that stays in the cache

_GAP = 16 << 10  # a gap of so many bytes is read over: faster than a second call

Stamp = tuple[int, int, int, int]


def stamp(status: os.stat_result) -> Stamp:
    """Return what distinguishes a file from any other, and from itself after a write."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class SourceFile:
    """A regular file in the state in which its header was read through `fd`.

    If it is mapped, its tensors are views of the map: a write to them stays in this process, but a
    process that truncates the file takes the bytes away. Otherwise each tensor is read into memory
    of its own when it is asked for.
    """

    def __init__(self, path: Path, fd: int, mapped: bool) -> None:
        self.path, self.mapped = path, mapped
        self.stamp = stamp(os.fstat(fd))
        self.size = self.stamp[2]
        self._mapping: mmap.mmap | None = None
        self._fd: int | None = None
        self._opening = threading.Lock()

    def bytes(self, start: int, end: int) -> Tensor:
        """Return the bytes from `start` to `end` as a (end - start,) tensor; never empty."""
        import torch

        if self.mapped:
            return torch.frombuffer(self.data, dtype=torch.uint8, count=end - start, offset=start)
        return self.tensor(start, "U8", (end - start,))

    def tensor(self, start: int, dtype: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor of this shape: a view of the map, or a copy where it is not aligned."""
        import torch

        kind, size, count = torch_dtype(dtype), itemsize(dtype), math.prod(shape)
        if not count or not self.mapped:
            out = torch.empty(shape, dtype=kind)
            self._read(start, memory_of(out))
            return out
        if start % size:  # kernels may assume alignment, so this tensor alone is copied
            return self.bytes(start, start + count * size).clone().view(kind).view(shape)
        flat = torch.frombuffer(self.data, dtype=kind, count=count, offset=start)
        return flat.view(shape)

    def box(
        self, start: int, dtype: str, shape: tuple[int, ...], rows: slice, columns: slice
    ) -> Tensor:
        """Return (rows, columns) of a tensor, with all axes but the last flattened into rows.

        Only these bytes are kept in memory.
        """
        width = shape[-1] if shape else 1
        if self.mapped:
            return self.tensor(start, dtype, shape).view(-1, width)[rows, columns]
        height, across = rows.stop - rows.start, columns.stop - columns.start
        size, row = itemsize(dtype), width * itemsize(dtype)
        start += rows.start * row
        out = _apart(height, across, torch_dtype(dtype))
        memory, wide = memory_of(out), across * size
        if across == width:
            self._read(start, memory)
            return out
        if row - wide <= _GAP:
            step = min(height, max(1, _CHUNK // row))
            whole = _apart(step, width, out.dtype)
            room = memory_of(whole)
            for top in range(0, height, step):
                count = min(step, height - top)
                self._read(start + top * row, room[: count * row])
                out[top : top + count] = whole[:count, columns]
            return out
        start += columns.start * size
        for at in range(0, height * wide, wide):
            self._read(start, memory[at : at + wide])
            start += row
        return out

    def boxes(self, start: int, dtype: str, shape: tuple[int, ...]) -> Read | None:
        """Return `box` for one tensor; None if a view of the map shows all of it."""
        return None if self.mapped else partial(self.box, start, dtype, shape)

    def crc32(self, start: int, end: int) -> int:
        """Return the CRC-32 of the bytes from `start` to `end`."""
        crc = 0
        for chunk in self.chunks(start, end):
            crc = zlib.crc32(chunk, crc)
        return crc

    def chunks(self, start: int, end: int) -> Iterator[memoryview]:
        """Yield the bytes in order; each chunk may be overwritten by the next."""
        if self.mapped:
            with memoryview(self.data) as view:
                for at in range(start, end, _CHUNK):
                    yield view[at : min(at + _CHUNK, end)]
            return
        room = memoryview(bytearray(min(_CHUNK, end - start)))
        for at in range(start, end, _CHUNK):
            piece = room[: min(_CHUNK, end - at)]
            self._read(at, piece)
            yield piece

    def _read(self, start: int, out: memoryview) -> None:
        with self._opening:  # a conversion reads in several threads
            if self._fd is None:
                self._fd = self._opened()
                weakref.finalize(self, os.close, self._fd)
        while len(out):
            count = os.preadv(self._fd, [out], start)
            if not count:
                raise SourceChanged(f"{self.path}: became shorter while it was read. Load it again")
            out, start = out[count:], start + count

    @property
    def data(self) -> mmap.mmap:
        """The whole file, mapped."""
        if self._mapping is None:
            fd = self._opened()
            try:
                flags, protection = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                self._mapping = mmap.mmap(fd, 0, flags=flags, prot=protection)
            finally:
                os.close(fd)
        return self._mapping

    def _opened(self) -> int:
        fd = open_regular(self.path)
        if stamp(os.fstat(fd)) != self.stamp:
            os.close(fd)
            raise SourceChanged(f"{self.path}: changed after its header was read. Load it again")
        return fd


def _apart(height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return a matrix whose memory goes back to the system with it.

    An allocator keeps freed blocks for the next request. With blocks of a few megabytes that
    several threads take and free in turn, it keeps several times as much.
    """
    import torch

    size = height * width * dtype.itemsize
    if size < _CHUNK // 2:
        return torch.empty(height, width, dtype=dtype)
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(room, dtype=dtype).view(height, width)


def memory_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor for writing, valid while the tensor exists."""
    if not tensor.nbytes:
        return memoryview(b"")
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(memory).cast("B")


__all__ = ["SourceFile", "Stamp", "memory_of", "stamp"]
