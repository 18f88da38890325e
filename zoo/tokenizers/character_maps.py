"""Checks of SentencePiece's precompiled character maps, before `tokenizers` reads them.

A map is a Darts double array, followed by texts that each end with a zero. `tokenizers` allocates
as much memory as the map claims, and aborts the process where there is not as much. sentencepiece
checks its maps itself.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from typing import Any

_BLOCK = 256  # units, one for each value of a byte


def check_replacements(table: bytes) -> None:
    """Raise ValueError if a map points outside itself; an empty map replaces nothing."""
    if not table:
        return
    size = int.from_bytes(table[:4], "little")
    texts = table[4 + size :]
    if len(table) < 4 or size % (4 * _BLOCK) or not size or not texts.endswith(b"\0"):
        raise ValueError(
            f"a character map of {len(table)} bytes whose header claims {size} bytes of units"
        )
    units = struct.unpack(f"<{size // 4}I", table[4 : 4 + size])
    for at, unit in enumerate(units):
        if unit >> 31:  # where a text begins
            sound = unit & 0x7FFFFFFF < len(texts)
        else:
            below = at ^ (unit >> 10 << (unit >> 6 & 8))
            sound = below < len(units) and (not unit >> 8 & 1 or bool(units[below] >> 31))
        if not sound:
            raise ValueError(f"a character map whose unit {at} points outside it")


def tables_in(data: Any) -> Iterator[bytes]:
    """The character maps in a tokenizer.json."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        if key == "precompiled_charsmap" and isinstance(value, str):
            yield base64.b64decode(value)
        elif isinstance(value, dict | list):
            yield from tables_in(value)
