"""Tensor bundles, written plainly and in pieces, so that tests and fuzzing can make each wrong."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from converters.formats import dtype_code  # noqa: E402
from converters.formats.crc32c import crc32c, masked  # noqa: E402
from converters.formats.tf_bundle import DTYPES, slice_key  # noqa: E402

Pairs = Sequence[tuple[bytes, bytes]]
NUMBERS = {code: number for number, code in DTYPES.items()}
MAGIC = bytes.fromhex("57fb808b247547db")

# --- protobuf ------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def part(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def header(shards: int = 1, endianness: int = 0, producer: int = 1, least: int = 0) -> bytes:
    version = number(1, producer) + (number(2, least) if least else b"")
    order = number(2, endianness) if endianness else b""
    return number(1, shards) + order + part(3, version)


def shape(dims: Iterable[int]) -> bytes:
    return b"".join(part(2, number(1, dim)) for dim in dims)


def entry(dtype: int, dims: Iterable[int], data: bytes = b"", **changes: int) -> bytes:
    """`changes` are shard, offset, and what differs from the truth: size, crc."""
    fields = {"shard": 0, "offset": 0, "size": len(data), "crc": masked(crc32c(data)), **changes}
    text = number(1, dtype) + part(2, shape(dims)) + number(3, fields["shard"])
    text += number(4, fields["offset"]) + number(5, fields["size"])
    return text + varint(6 << 3 | 5) + struct.pack("<I", fields["crc"])


def slices(dtype: int, dims: Iterable[int], cuts: Iterable[Sequence[tuple[int, int]]]) -> bytes:
    """The entry of a tensor that lies in slices: (start, length) on each axis, -1 for all."""
    text = number(1, dtype) + part(2, shape(dims))
    for cut in cuts:
        extents = (
            (number(1, start) if start else b"") + (number(2, n) if n >= 0 else b"")
            for start, n in cut
        )
        text += part(7, b"".join(part(1, extent) for extent in extents))
    return text


# --- snappy --------------------------------------------------------------------------------------


def literal(data: bytes) -> bytes:
    size = len(data) - 1
    if size < 60:
        return bytes((size << 2,)) + data
    width = (size.bit_length() + 7) // 8
    return bytes(((59 + width) << 2,)) + size.to_bytes(width, "little") + data


def copied(back: int, size: int) -> bytes:
    """4 to 64 bytes from `back` bytes before: the shortest of the three ways to say so."""
    if size < 12 and back < 2048:
        return bytes((1 | (size - 4) << 2 | back >> 8 << 5, back & 255))
    if back < 1 << 16:
        return bytes((2 | (size - 1) << 2,)) + back.to_bytes(2, "little")
    return bytes((3 | (size - 1) << 2,)) + back.to_bytes(4, "little")


def snappy(data: bytes) -> bytes:
    out, seen, at, spent = bytearray(varint(len(data))), dict[bytes, int](), 0, 0
    while at < len(data):
        word = data[at : at + 4]
        before, seen[word] = seen.get(word), at
        if before is None or len(word) < 4:
            at += 1
            continue
        size = 4
        while size < 64 and at + size < len(data) and data[before + size] == data[at + size]:
            size += 1
        out += literal(data[spent:at]) if at > spent else b""
        out += copied(at - before, size)
        at = spent = at + size
    return bytes(out + (literal(data[spent:]) if at > spent else b""))


# --- tables --------------------------------------------------------------------------------------


def block(pairs: Pairs, interval: int = 16) -> bytes:
    out, restarts, before = bytearray(), [0], b""
    for place, (key, value) in enumerate(pairs):
        shared = 0
        if place % interval:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        elif place:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        before = key
    return bytes(out) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def sealed(contents: bytes, kind: int = 0) -> bytes:
    """A block with its trailer; snappy if kind is 1."""
    kept = contents + bytes((kind,))
    return kept + struct.pack("<I", masked(crc32c(kept)))


def table(blocks: Iterable[tuple[bytes, bytes, int]], kind: int = 0) -> bytes:
    """A file of blocks: the key that none of its own exceeds, contents, packed how."""
    out, index = bytearray(), []
    for bound, contents, packed in blocks:
        index.append((bound, varint(len(out)) + varint(len(contents))))
        out += sealed(contents, packed)
    handles = b""
    for contents in (block([]), block(index, 1)):
        contents = snappy(contents) if kind else contents
        handles += varint(len(out)) + varint(len(contents))
        out += sealed(contents, kind)
    return bytes(out) + handles.ljust(40, b"\0") + MAGIC


def index(pairs: Pairs, kind: int = 0, size: int = 64) -> bytes:
    """A file of (key, value), `size` to a block; a sound one has them sorted."""
    groups = [pairs[n : n + size] for n in range(0, len(pairs), size)]
    contents = ((group[-1][0], block(group)) for group in groups)
    return table([(k, snappy(c) if kind else c, kind) for k, c in contents], kind)


# --- bundles -------------------------------------------------------------------------------------


def bundle(
    prefix: Path,
    tensors: Mapping[str, Any],
    shards: int = 1,
    *,
    snappy: bool = False,
    cut: Mapping[str, tuple[int, Sequence[int]]] | None = None,
    extra: Pairs = (),
) -> Path:
    """Tensors dealt out to shards in turn; `cut` says along which axis, in which sizes."""
    pairs: list[tuple[bytes, bytes]] = [(b"", header(shards)), *extra]
    data = [bytearray() for _ in range(shards)]

    def add(key: bytes, tensor: Any) -> None:
        shard = len(pairs) % shards
        raw = bytes(tensor.contiguous().reshape(-1).view(dtype=_bytes()).tolist())
        dtype = NUMBERS[dtype_code(tensor.dtype)]
        pairs.append((key, entry(dtype, tensor.shape, raw, shard=shard, offset=len(data[shard]))))
        data[shard] += raw

    for name, tensor in tensors.items():
        key = name.encode()
        if cut is None or name not in cut:
            add(key, tensor)
            continue
        axis, sizes = cut[name]
        spans, start = [], 0
        for size in sizes:
            span = [(0, -1)] * tensor.dim()
            span[axis] = (start, size)
            add(slice_key(key, span), tensor.narrow(axis, start, size))
            spans.append(span)
            start += size
        pairs.append((key, slices(NUMBERS[dtype_code(tensor.dtype)], tensor.shape, spans)))
    for number, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{number:05d}-of-{shards:05d}").write_bytes(content)
    path = prefix.with_name(prefix.name + ".index")
    path.write_bytes(index(sorted(pairs), int(snappy)))
    return path


def _bytes() -> Any:
    import torch

    return torch.uint8
