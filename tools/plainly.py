"""Headers read a second time, by their formats' own words and nothing else: slow and short."""

from __future__ import annotations

import json
import struct
from typing import Any

from converters.formats import BITS
from converters.quantized.blocks import KINDS


def sound_safetensors(data: bytes) -> bool:
    """Whether a file keeps to the format."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({k for k, _ in pairs}) != len(pairs):
            raise ValueError
        return dict(pairs)

    def never(word: str) -> None:
        raise ValueError(word)

    if len(data) < 8:
        return False
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8 or length > 100_000_000:
        return False
    try:
        text = data[8 : 8 + length].decode()
        header = json.loads(text, object_pairs_hook=unique, parse_constant=never)
    except (ValueError, RecursionError):
        return False
    if not isinstance(header, dict) or not text.startswith("{"):
        return False
    meta = header.pop("__metadata__", {})
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        return False
    spans = []
    for entry in header.values():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            return False
        shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
        whole = (
            [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [""]
        )
        if any(type(n) is not int or n < 0 for n in whole) or len(offsets) != 2:
            return False
        if not isinstance(dtype, str) or dtype not in BITS:
            return False
        size = BITS[dtype]
        for n in shape:
            size *= n
        if size != (offsets[1] - offsets[0]) * 8:
            return False
        spans.append(tuple(offsets))
    reached = 0
    for start, end in sorted(spans):
        if start != reached:
            return False
        reached = end
    return reached == len(data) - 8 - length


def sound_gguf(data: bytes) -> bool:
    """Likewise."""
    at = 0

    def take(code: str) -> Any:
        nonlocal at
        items = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(f"<{code}")
        return items[0] if len(items) == 1 else list(items)

    def text() -> str:
        return str(take(f"{take('Q')}s"), "utf-8")

    def value(kind: int, count: int = 1) -> Any:
        if kind == 8:
            return [text() for _ in range(count)][-1]
        return take(f"{count}" + "BbHhIif?..Qqd"[kind])  # a dot is no code of struct's

    try:
        if take("4s") != b"GGUF" or take("I") not in (2, 3):
            return False
        tensors, keys = take("Q"), take("Q")
        values: dict[str, Any] = {}
        for _ in range(keys):
            key, kind = text(), take("I")
            if key in values:
                return False
            if kind == 9:
                kind, count = take("I"), take("Q")
                values[key] = value(kind, count) if count else []
            else:
                values[key] = value(kind)
        spans: dict[str, tuple[int, int]] = {}
        alignment = values.get("general.alignment", 32)
        for _ in range(tensors):
            name, dims = text(), [take("Q") for _ in range(take("I"))]
            kind, offset = KINDS[take("I")], take("Q")
            numbers = 1
            for n in dims:
                numbers *= n
            row = dims[0] if dims else 1
            if name in spans or not numbers or row % kind.block or offset % alignment:
                return False
            spans[name] = offset, offset + numbers // kind.block * kind.size
    except (struct.error, UnicodeDecodeError, LookupError):
        return False
    start = -(-at // alignment) * alignment
    reached = 0
    for first, last in sorted(spans.values()):
        if first != -(-reached // alignment) * alignment:
            return False
        reached = last
    return start + reached <= len(data) or (not spans and at <= len(data))
