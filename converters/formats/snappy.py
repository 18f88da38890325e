"""Decompress Snappy's raw blocks within a limit known before anything is allocated."""

from __future__ import annotations

from converters.formats.wire import Malformed, varint

MAX_RATIO = 22  # the densest element: 3 bytes copy 64


def unpacked_size(data: bytes) -> int:
    """Return the size that a block declares; refuse a size that its bytes cannot produce."""
    size, at = varint(data, 0, 32)
    if size > MAX_RATIO * (len(data) - at):
        raise Malformed(f"{len(data)} bytes of snappy cannot unpack into {size}")
    return size


def unpack(data: bytes) -> bytes:
    """Decompress a block."""
    size, at = varint(data, 0, 32)
    out = bytearray()
    while at < len(data):
        tag = data[at]
        kind, length = tag & 3, (tag >> 2) + 1
        at += 1
        if kind == 0:
            if length > 60:  # 61..64: the length less one follows in 1..4 bytes
                width = length - 60
                length = int.from_bytes(data[at : at + width], "little") + 1
                at += width
            if length > len(data) - at:
                raise Malformed(f"snappy: {length} literal bytes at byte {at} of {len(data)}")
            out += data[at : at + length]
            at += length
        else:
            width = (0, 1, 2, 4)[kind]
            back = int.from_bytes(data[at : at + width], "little")
            if kind == 1:
                back |= tag >> 5 << 8
                length = (tag >> 2 & 7) + 4
            at += width
            if at > len(data) or not 0 < back <= len(out):
                raise Malformed(f"snappy: a copy from {back} bytes back, {len(out)} are there")
            start = len(out) - back
            copy = out[start : start + length]
            if back < length:  # the copy overlaps its output: a pattern repeats
                copy = (copy * (length // back + 1))[:length]
            out += copy
        if len(out) > size:
            raise Malformed(f"snappy: more than the {size} bytes that it claims")
    if len(out) != size:
        raise Malformed(f"snappy: {len(out)} bytes where it claims {size}")
    return bytes(out)
