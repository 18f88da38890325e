"""LevelDB tables, the format of TensorFlow's indices: sorted keys in blocks, each with a CRC."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from converters.formats import open_regular
from converters.formats.crc32c import crc32c, masked
from converters.formats.snappy import unpack, unpacked_size
from converters.formats.wire import Malformed, varint
from zoo.errors import CorruptCheckpoint, ResourceLimit

MAX_TABLE = 2 << 20  # bytes of a file, and half of what may be decompressed; BERT has 10 kB
MAX_ENTRIES = 1 << 15
_FOOTER = 48
_MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
_TRAILER = struct.Struct("<BI")  # compression; CRC of the compressed bytes and of this byte
_PLAIN, _SNAPPY = 0, 1


class _Handle(NamedTuple):
    start: int
    size: int

    @property
    def end(self) -> int:
        """End of the block."""
        return self.start + self.size + _TRAILER.size


class _Table:
    """The bytes of the file, and how much may still be decompressed."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data = path, data
        self.budget = self.entries = 0
        self.handles: list[_Handle] = []

    def spend(self, size: int) -> None:
        """Count decompressed bytes against the limit."""
        self.budget += size
        if self.budget > 2 * MAX_TABLE:
            raise ResourceLimit(
                f"{self.path}: unpacks into more than {2 * MAX_TABLE} bytes; no more are read"
            )

    def handle(self, data: bytes, at: int = 0) -> tuple[_Handle, int]:
        """Return (the position of a block inside the file, the end of its handle)."""
        start, at = varint(data, at)
        size, at = varint(data, at)
        handle, end = _Handle(start, size), len(self.data) - _FOOTER
        if handle.end > end:
            raise Malformed(f"a block of {size} bytes at byte {start}, the footer begins at {end}")
        self.handles.append(handle)
        return handle, at

    def check_cover(self) -> None:
        """Check that blocks do not overlap and cover the file, so that every byte has a CRC."""
        reached = 0
        for handle in [*sorted(self.handles), _Handle(len(self.data) - _FOOTER, 0)]:
            if handle.start != reached:
                fault = "overlaps the one before" if handle.start < reached else "leaves a hole"
                raise Malformed(
                    f"the block at byte {handle.start} {fault}, which ends at {reached}"
                )
            reached = handle.end

    def block(self, handle: _Handle) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) of a block whose CRC is right."""
        end = handle.start + handle.size
        kind, wanted = _TRAILER.unpack_from(self.data, end)
        actual = masked(crc32c(self.data[handle.start : end + 1]))
        if actual != wanted:
            raise Malformed(f"CRC {actual:08x}, expected {wanted:08x}")
        data = self.data[handle.start : end]
        if kind == _SNAPPY:
            self.spend(unpacked_size(data))
            data = unpack(data)
        elif kind == _PLAIN:
            self.spend(len(data))
        else:
            raise Malformed(
                f"packed in way {kind}; {_PLAIN} (not) and {_SNAPPY} (snappy) are known"
            )
        return self.pairs(data)

    def pairs(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value); each key stores how much it shares with the one before."""
        count = int.from_bytes(data[-4:], "little")
        end = len(data) - 4 - 4 * count
        if len(data) < 4 or end < 0:
            raise Malformed(f"{len(data)} bytes cannot hold {count} restarts")
        met, at, key = 0, 0, b""
        restart = _restart(data, end, met, count)
        while at < end:
            begin = at
            shared, at = varint(data, at, 32)
            fresh, at = varint(data, at, 32)
            size, at = varint(data, at, 32)
            if fresh + size > end - at:
                raise Malformed(f"an entry of {fresh + size} bytes at byte {at} of {end}")
            if shared > len(key):
                raise Malformed(f"an entry shares {shared} bytes with a key of {len(key)}")
            if begin == restart:
                met += 1
                restart = _restart(data, end, met, count)
                if shared:
                    raise Malformed(f"the entry at restart {begin} shares {shared} bytes")
            self.entries += 1
            if self.entries > MAX_ENTRIES:
                raise ResourceLimit(f"{self.path}: more than {MAX_ENTRIES} entries")
            self.spend(shared + fresh)
            key = key[:shared] + data[at : at + fresh]
            at += fresh
            yield key, data[at : at + size]
            at += size
        if restart is not None and (restart, end, count) != (0, 0, 1):  # a block may be empty
            raise Malformed(f"restart {met} of {count} is byte {restart}, where no entry begins")


def _restart(data: bytes, end: int, number: int, count: int) -> int | None:
    if number == count:
        return None
    at = end + 4 * number
    return int.from_bytes(data[at : at + 4], "little")


def read_table(path: Path) -> list[tuple[bytes, bytes]]:
    """Return (key, value) of all entries, in ascending order of keys.

    Raises:
        CorruptCheckpoint: If the table is damaged or its blocks do not cover the file.
    """
    table = _Table(path, _read(path))
    footer = table.data[-_FOOTER:]
    pairs: list[tuple[bytes, bytes]] = []
    place = "footer"
    try:
        meta, at = table.handle(footer)
        index, at = table.handle(footer, at)
        if any(footer[at : -len(_MAGIC)]):
            raise Malformed("extra bytes between its handles and its magic number")
        place = "meta block"
        if list(table.block(meta)):
            raise Malformed("names filters, which tensor bundles have not")
        place = "index block"
        blocks: list[tuple[bytes, _Handle]] = []
        for bound, value in table.block(index):
            if blocks and bound <= blocks[-1][0]:
                raise Malformed(f"key {_text(bound)} does not come after {_text(blocks[-1][0])}")
            blocks.append((bound, table.handle(value)[0]))
        table.check_cover()
        before: bytes | None = None
        for bound, handle in blocks:
            place = f"block at byte {handle.start}"
            for key, value in table.block(handle):
                if before is not None and key <= before:
                    raise Malformed(f"key {_text(key)} does not come after {_text(before)}")
                if key > bound:
                    raise Malformed(f"key {_text(key)} is greater than the index's {_text(bound)}")
                before = key
                pairs.append((key, value))
            before = bound
    except Malformed as error:
        raise CorruptCheckpoint(
            f"{path}: {place}: {error}. Download or copy the file again."
        ) from None
    return pairs


def _read(path: Path) -> bytes:
    """Return the whole file, if its size is that of an index and its end that of a table."""
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > MAX_TABLE:
            raise ResourceLimit(f"{path}: {size} bytes; an index of at most {MAX_TABLE} is read")
        data = os.pread(fd, size, 0)
    finally:
        os.close(fd)
    if len(data) < _FOOTER or not data.endswith(_MAGIC):
        lfs = data.startswith(b"version https://git-lfs")
        raise CorruptCheckpoint(
            f"{path}: {size} bytes that do not end as a table's {_FOOTER} bytes of footer do, with "
            f"{_MAGIC.hex()}; found {data[-8:].hex() or 'nothing'}. "
            + ("A Git LFS pointer: fetch" if lfs else "Truncated, or no tensor bundle? Download")
            + " the file itself."
        )
    return data


def _text(key: bytes) -> str:
    text = repr(key)[1:]
    return text if len(text) <= 60 else text[:57] + "..."
