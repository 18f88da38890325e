"""Varints, and protobuf messages of a schema: unknown fields are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_WIDTH = {FIXED64: 8, FIXED32: 4}


class Malformed(ValueError):
    """What is wrong with some bytes; the reader that catches it names the file."""


class Field(NamedTuple):
    """One field of a message; `most` is how often it may occur, as a list if more than once."""

    name: str
    wire: int = VARINT
    most: int = 1


def varint(data: bytes, at: int, bits: int = 64) -> tuple[int, int]:
    """Return (the number at a position, the position behind it)."""
    if at < len(data) and data[at] < 128:  # most are one byte
        return data[at], at + 1
    value = shift = 0
    while at < len(data) and shift < bits:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if not byte:
                raise Malformed(f"a number ends with bytes of nothing at byte {at}")
            if value >> bits:
                raise Malformed(f"a number of more than {bits} bits ends at byte {at}")
            return value, at
        shift += 7
    why = f"continues after {bits} bits" if at < len(data) else "is cut off"
    raise Malformed(f"a number {why} at byte {at}")


def signed(value: int) -> int:
    """Interpret a 64-bit varint as protobuf's int32 and int64."""
    return value - (1 << 64) if value >> 63 else value


def message(data: bytes, schema: Mapping[int, Field]) -> dict[str, Any]:
    """Return field name -> number or bytes; a list where a field may repeat."""
    fields: dict[str, Any] = {}
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        field = schema.get(key >> 3)
        if field is None or field.wire != key & 7:
            raise Malformed(f"field {key >> 3} of wire type {key & 7} has no place here")
        value: int | bytes
        if field.wire == VARINT:
            value, at = varint(data, at)
        else:
            size = _WIDTH.get(field.wire)
            if size is None:
                size, at = varint(data, at)
            if size > len(data) - at:
                raise Malformed(f"field {field.name} has {size} bytes, {len(data) - at} are there")
            value = data[at : at + size]
            at += size
            if field.wire != BYTES:
                value = int.from_bytes(value, "little")
        if field.most == 1:
            if field.name in fields:
                raise Malformed(f"field {field.name} occurs twice")
            fields[field.name] = value
        else:
            values = fields.setdefault(field.name, [])
            if len(values) == field.most:
                raise Malformed(f"field {field.name} occurs more than {field.most} times")
            values.append(value)
    return fields
