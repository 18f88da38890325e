"""safetensors: a strictly checked JSON header, then bytes, mapped or read."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.formats import BITS, RANK, Layout, TensorInfo, check_names, open_regular
from converters.formats.source import SourceFile
from converters.strict_json import MAX_MEMORY, DuplicateKeys, memory_of, unique
from zoo.errors import (
    CorruptCheckpoint,
    DuplicateTensor,
    MissingTensors,
    ResourceLimit,
    did_you_mean,
    listing,
)

if TYPE_CHECKING:
    import torch

    from converters.lazy import Read

MAX_HEADER = 100_000_000  # the format's own limit
MAX_RANK = 64  # torch's
_FIELDS = {"dtype", "shape", "data_offsets"}
_LARGEST = (1 << 63) - 1


class SafetensorsReader:
    """A safetensors file: its header is checked when opened, tensors are mapped or read later."""

    def __init__(self, path: Path, mmap: bool | None = None) -> None:
        self.path = path
        fd = open_regular(path)
        try:
            self._file = SourceFile(path, fd, mmap is not False)
            self._start, header = _read_header(path, fd)
        finally:
            os.close(fd)
        self.metadata: dict[str, str]
        self.tensors: dict[str, TensorInfo]
        self.metadata, self.tensors, self._spans = _parse(
            path, header, self._file.size - self._start
        )
        check_names(path, self.tensors)

    def span(self, name: str) -> tuple[int, int]:
        """Return (start, end) of a tensor's bytes in the file."""
        start, end = self._spans[name]
        return self._start + start, self._start + end

    def tensor(self, name: str) -> torch.Tensor:
        """Return a view of the mapped file, or a copy; a write to it changes no file."""
        info = self.tensors.get(name)
        if info is None:
            near = did_you_mean(name, self.tensors)
            raise MissingTensors(f"{self.path}: has no tensor {name}.{near}")
        return self._file.tensor(self.span(name)[0], info.dtype, info.shape)

    def decoder(self, name: str) -> Read | None:
        """Return what reads a box of a tensor; None if `tensor` is a view of a map."""
        _, shape, dtype = self.tensors[name]
        return self._file.boxes(self.span(name)[0], dtype, shape)


def _read_header(path: Path, fd: int) -> tuple[int, bytes]:
    """Return (start of the tensors' bytes, header); check sizes before any allocation."""
    size = os.fstat(fd).st_size
    head = os.pread(fd, 8, 0)
    if len(head) < 8:
        raise CorruptCheckpoint(
            f"{path}: {size} bytes; a safetensors file has at least 8. "
            "Truncated? Download or copy it again."
        )
    (length,) = struct.unpack("<Q", head)
    if length > size - 8:
        pointer = b"version https://git-lfs"
        lfs = os.pread(fd, len(pointer), 0) == pointer
        raise CorruptCheckpoint(
            f"{path}: its header should have {length} bytes, and {size - 8} are there. "
            + ("It is a Git LFS pointer, not the weights: " if lfs else "Truncated, or no ")
            + ("fetch the file itself." if lfs else "safetensors file? Download or copy it again.")
        )
    if length > MAX_HEADER:
        raise ResourceLimit(f"{path}: a header of {length} bytes; at most {MAX_HEADER} are read")
    header = os.pread(fd, length, 8)
    if len(header) != length:
        raise CorruptCheckpoint(f"{path}: became shorter while its header was read")
    if (memory := memory_of(header)) > MAX_MEMORY:
        raise ResourceLimit(
            f"{path}: a header of {length} bytes that would take some {memory >> 20} MB of memory, "
            f"of at most {MAX_MEMORY >> 20} MB: fewer than 50000 tensors a file fit"
        )
    return 8 + length, header


def _parse(
    path: Path, header: bytes, available: int
) -> tuple[dict[str, str], dict[str, TensorInfo], dict[str, tuple[int, int]]]:
    """Return (metadata, tensors in the file's order, their spans) of a sound header."""
    entries = _load(path, header)
    problems: list[str] = []
    metadata = entries.pop("__metadata__", {})
    if type(metadata) is not dict or any(type(v) is not str for v in metadata.values()):
        problems.append("__metadata__: has to map text to text")
    spans: list[tuple[int, int, TensorInfo]] = []
    for name, entry in entries.items():
        problem = _entry_problem(entry)
        if problem is None:
            start, end = entry["data_offsets"]
            info = TensorInfo(name, tuple(entry["shape"]), entry["dtype"])
            spans.append((start, end, info))
        else:
            problems.append(f"tensor {name}: {problem}")
    if not problems:
        spans.sort(key=lambda span: span[:2])
        reached, before = 0, "the header"
        for start, end, info in spans:
            if start != reached:
                fault = "overlaps" if start < reached else "leaves a hole after"
                problems.append(
                    f"tensor {info.name}: starts at byte {start} and {fault} {before}, "
                    f"which ends at {reached}"
                )
            reached, before = max(reached, end), f"tensor {info.name}"
        if reached != available:
            fault = "truncated" if available < reached else "trailing bytes"
            problems.append(f"{fault}: {before} ends at byte {reached}, the file at {available}")
    if problems:
        raise CorruptCheckpoint(f"{path}: {listing(problems)}")
    tensors = {info.name: info for _, _, info in spans}
    return metadata, tensors, {info.name: (start, end) for start, end, info in spans}


def _load(path: Path, header: bytes) -> dict[str, Any]:
    """Return the header's JSON: UTF-8, starting with its object, no name twice."""
    try:
        text = header.decode()
    except UnicodeDecodeError as error:
        raise CorruptCheckpoint(f"{path}: its header is not UTF-8 at byte {error.start}") from None
    body = text.rstrip(" ")  # the only padding that the format allows
    if not (body.startswith("{") and body.endswith("}")):
        raise CorruptCheckpoint(f"{path}: its header is no JSON object padded with spaces")
    try:
        # JSON has -0, Python's int does not; the slower hook is only for headers that may hold one
        natural = _natural if "-" in body else None
        entries = json.loads(
            body, object_pairs_hook=unique, parse_int=natural, parse_constant=_no_constant
        )
        if "\\u" in body:
            json.dumps(
                entries, ensure_ascii=False
            ).encode()  # an escape may be half a surrogate pair
    except DuplicateKeys as error:
        raise CorruptCheckpoint(f"{path}: its header names {error} twice") from None
    except RecursionError:
        raise CorruptCheckpoint(f"{path}: its header is nested too deep") from None
    except ValueError as error:
        raise CorruptCheckpoint(f"{path}: its header is not JSON: {error}") from None
    if type(entries) is not dict:
        raise CorruptCheckpoint(f"{path}: its header is no JSON object")
    return entries


def _natural(text: str) -> int:
    if text.startswith("-"):
        raise ValueError(f"{text[:20]} is negative")
    return int(text)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _entry_problem(entry: Any) -> str | None:
    """Return what is wrong with one tensor's entry by itself; None if nothing is."""
    if type(entry) is not dict:
        return f"its entry is {type(entry).__name__} where an object is expected"
    if entry.keys() != _FIELDS:
        missing, unknown = sorted(_FIELDS - entry.keys()), sorted(entry.keys() - _FIELDS)
        parts = [f"lacks {listing(missing)}"] if missing else []
        parts += [f"has the unknown field {listing(unknown)}"] if unknown else []
        return " and ".join(parts)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        return f"dtype {_short(dtype)} is none of {', '.join(BITS)}"
    if type(shape) is not list or any(type(n) is not int or n < 0 for n in shape):
        return f"shape {_short(shape)} is no list of natural numbers"
    if type(offsets) is not list or len(offsets) != 2 or any(type(n) is not int for n in offsets):
        return f"data_offsets {_short(offsets)} are not two whole numbers"
    if len(shape) > MAX_RANK:
        return f"has {len(shape)} axes; at most {MAX_RANK} can be read"
    size = math.prod(shape)
    # an empty tensor's other axes may not overflow either
    if max(size, math.prod(n or 1 for n in shape) if size == 0 else 0) * bits > _LARGEST:
        return f"shape {_short(shape)} overflows 64 bits"
    start, end = offsets
    if start < 0 or start > end:
        return f"data_offsets {_short(offsets)} do not ascend from 0"
    if (end - start) * 8 != size * bits:
        return (
            f"shape {_short(shape)} of {dtype} takes {size * bits / 8:g} bytes, "
            f"data_offsets {_short(offsets)} hold {end - start}"
        )
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def header_order(infos: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Return tensors in file order: wide dtypes first, so that each is aligned; then by name."""
    return sorted(infos, key=lambda info: (-RANK[info.dtype], info.name))


def lay_out(infos: Iterable[TensorInfo], metadata: Mapping[str, str] | None, where: Any) -> Layout:
    """Lay out a file of these tensors, in the order of `header_order`.

    Args:
        infos: The tensors, in any order.
        metadata: Text by key, or None.
        where: What the file is called in messages.

    Raises:
        ResourceLimit: If the header would exceed the format's limit.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    starts: dict[str, int] = {}
    reached = 0
    for info in header_order(infos):
        if info.name in header or info.name == "__metadata__":
            raise DuplicateTensor(f"{where}: {info.name} would occur twice in the header")
        end = reached + info.nbytes
        header[info.name] = {
            "dtype": info.dtype,
            "shape": info.shape,
            "data_offsets": [reached, end],
        }
        starts[info.name], reached = reached, end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        fault = f"a header of {len(text)} bytes; the format has {MAX_HEADER}"
        raise ResourceLimit(f"{where}: {fault}")
    return Layout(struct.pack("<Q", len(text)) + text, starts, reached)
