"""CRC-32C (Castagnoli) at the speed of memory, with nothing but torch's exclusive or.

A checksum is the remainder of the data, read as a polynomial over GF(2), by one of degree 32. Any
multiple of that polynomial may be taken away from the data first, and

    y^5685 + y^1362 + y^426 + 1    where y stands for one byte, x^8

is such a multiple, found by search. Taking it away clears the first byte and changes those 4323,
5259 and 5685 bytes behind it; so 4323 bytes go at a time, by three exclusive ors of whole ranges.
Squaring doubles every exponent over GF(2): rows of 2, 4, 8 ... bytes fold like single ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_AT = (4323, 5259, 5685)  # rows behind the folded one
_STEP, _, _KEPT = _AT
_ROW = 7  # log2 of the longest row: 0.7 MB are folded together, what a core's cache holds
_PIECE = (_KEPT + 4 * _STEP) << _ROW
_SHORT = 4096  # up to so many bytes the table is as fast


def _table() -> list[int]:
    rows = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        rows.append(byte)
    return rows


_TABLE = _table()


def crc32c(data: bytes | torch.Tensor) -> int:
    """Return the checksum of bytes, or of a flat tensor of bytes, which is not changed."""
    if isinstance(data, bytes):
        if len(data) <= _SHORT:
            return _finish(data, 0xFFFFFFFF)
        import torch

        data = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    flat = data
    return crc32c_read(len(flat), lambda start, end: flat[start:end])


def crc32c_read(size: int, read: Callable[[int, int], torch.Tensor]) -> int:
    """Return the checksum of `size` bytes; `read` returns a range of them as a flat tensor."""
    import torch

    if size <= _SHORT:
        return _finish(bytes(read(0, size).tolist()), 0xFFFFFFFF)
    piece = torch.empty(min(_PIECE, size), dtype=torch.uint8)
    kept = position = 0  # bytes that the last fold left, bytes read
    while position < size:
        more = min(len(piece) - kept, size - position)
        piece[kept : kept + more] = read(position, position + more)
        if not position:
            piece[:4].bitwise_not_()  # the register starts with ones
        position += more
        rest = _fold(piece[: kept + more], _ROW)
        kept = len(rest)
        piece[:kept] = rest.clone()
    rest = piece[:kept]
    for row in range(_ROW - 1, -1, -1):
        rest = _fold(rest, row)
    return _finish(bytes(rest.tolist()), 0)


def _fold(data: torch.Tensor, row: int) -> torch.Tensor:
    """Fold into the last `_KEPT` rows or fewer, which keep the remainder of all the data."""
    start, kept = 0, _KEPT << row
    while (left := len(data) - start - kept) > 0:
        width = min(_STEP << row, left)
        head = data[start : start + width]
        for at in _AT:
            begin = start + (at << row)
            data[begin : begin + width].bitwise_xor_(head)
        start += width
    return data[start:]


def _finish(data: bytes, crc: int) -> int:
    table = _TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """Mask a checksum as such files store it: rotated by 15 bits, plus a constant."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
