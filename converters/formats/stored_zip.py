"""A zip as torch writes it: uncompressed records, each aligned for use as mapped."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

from converters.formats import Layout

MAGIC, END = b"PK\x03\x04", b"PK\x05\x06"
LOCAL = struct.Struct("<4s5H3L2H")
WIDE = 0xFFFFFFFF  # for a size or an offset that is in an extra field
_ALIGNMENT = 64  # torch's, so that mapped records can be used in place
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_TAIL = struct.Struct("<4s4H2LH")
_TAIL_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")


class _Entry:
    """A record to write: its local header, and its entry in the directory."""

    def __init__(self, name: str, size: int, at: int) -> None:
        self.name, self.size, self.at = name.encode(), size, at
        wide = struct.pack("<2H2Q", 1, 16, size, size) if size >= WIDE else b""
        pad = -(at + LOCAL.size + len(self.name) + len(wide) + 4) % _ALIGNMENT
        self.extra = wide + struct.pack("<2sH", b"FB", pad) + b"Z" * pad
        self.start = at + LOCAL.size + len(self.name) + len(self.extra)
        self.end = self.start + size

    def local(self, crc: int) -> bytes:
        """Return the header in front of the record."""
        size = min(self.size, WIDE)
        sizes = (crc, size, size, len(self.name), len(self.extra))
        return LOCAL.pack(MAGIC, 45, 0x800, 0, 0, 0x21, *sizes) + self.name + self.extra

    def central(self, crc: int) -> bytes:
        """Return the record's entry in the central directory."""
        size, at = min(self.size, WIDE), min(self.at, WIDE)
        wide = [self.size] * 2 if self.size >= WIDE else []
        wide += [self.at] if self.at >= WIDE else []
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        lengths = (len(self.name), len(extra), 0, 0, 0, 0, at)
        head = (b"PK\x01\x02", 45, 45, 0x800, 0, 0, 0x21, crc, size, size, *lengths)
        return _CENTRAL.pack(*head) + self.name + extra


def lay_out(
    root: str,
    before: Mapping[str, bytes],
    tensors: Mapping[str, tuple[str, int]],
    after: Mapping[str, bytes],
) -> Layout:
    """Lay out records below the folder `root`.

    Args:
        root: The folder in the archive.
        before: Records in front of the tensors.
        tensors: Tensor -> (record, bytes).
        after: Records behind the tensors.
    """
    head, first = _entries_like(root, before, 0)
    at, entries = len(head), dict[str, _Entry]()
    for tensor, (name, size) in tensors.items():
        entries[tensor] = _Entry(f"{root}/{name}", size, at)
        at = entries[tensor].end
    behind, last = _entries_like(root, after, at)

    def tail(crcs: Mapping[str, int]) -> bytes:
        records = [*first, *((entry, crcs[name]) for name, entry in entries.items()), *last]
        return behind + _directory(records, at + len(behind))

    def seal(crcs: Mapping[str, int]) -> list[tuple[int, bytes]]:
        headers = [(entry.at, entry.local(crcs[name])) for name, entry in entries.items()]
        return [*headers, (at, tail(crcs))]

    end = at + len(tail(dict.fromkeys(entries, 0)))
    starts = {name: entry.start - len(head) for name, entry in entries.items()}
    return Layout(head, starts, end - len(head), seal)


def _entries_like(
    root: str, contents: Mapping[str, bytes], at: int
) -> tuple[bytes, list[tuple[_Entry, int]]]:
    """Return (records one after the other from position `at`, each with its CRC)."""
    out, matches = b"", list[tuple[_Entry, int]]()
    for name, content in contents.items():
        entry, crc = _Entry(f"{root}/{name}", len(content), at + len(out)), zlib.crc32(content)
        out += entry.local(crc) + content
        matches.append((entry, crc))
    return out, matches


def _directory(records: list[tuple[_Entry, int]], place: int) -> bytes:
    """Return the end of the file: every entry, and where the list begins."""
    out = directory = b"".join(entry.central(crc) for entry, crc in records)
    count = len(records)
    if place >= WIDE or len(directory) >= WIDE or count >= 0xFFFF:
        counts = (count, count, len(directory), place)
        out += _TAIL_64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, *counts)
        out += _LOCATOR.pack(b"PK\x06\x07", 0, place + len(directory), 1)
    few = min(count, 0xFFFF)
    sizes = (min(len(directory), WIDE), min(place, WIDE))
    return out + _TAIL.pack(END, 0, 0, few, few, *sizes, 0)
