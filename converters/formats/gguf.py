"""GGUF: typed key/values and tensors; the header is checked completely before use."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from converters.formats import Layout, TensorInfo, check_names, open_regular
from converters.formats.source import SourceFile
from converters.paths import confined
from converters.quantized.blocks import KINDS, UNREAD, WRITTEN, BlockType, dequantize
from zoo.errors import (
    BadIndex,
    CorruptCheckpoint,
    DuplicateTensor,
    LossyExport,
    MissingShard,
    MissingTensors,
    ResourceLimit,
    UnsupportedFormat,
    did_you_mean,
    listing,
)

if TYPE_CHECKING:
    from mmap import mmap as Map

    from torch import Tensor

    from converters.lazy import Read

MAX_HEADER = 100_000_000
# Limits of what is read in a second. Real files have a hundred keys, two thousand tensors and 1.3
# million array elements: a large vocabulary with its scores, types and merges.
MAX_KEYS = 1 << 10
MAX_TENSORS = 1 << 14
MAX_ELEMENTS = 1 << 21
MAX_TEXT = 12 << 20  # bytes of text decoded on opening, which may take six times as much memory
MAX_AXES = 4  # ggml's
MAX_NAME = 63  # ggml's, in bytes; a limit for writing only
MAX_KEY = 65535
_SMALL = 1024  # arrays of up to so many elements are decoded on opening
_LARGEST = (1 << 63) - 1
_MAGIC, _VERSIONS, _VERSION = b"GGUF", (2, 3), 3
_ALIGNMENT = "general.alignment"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

# types of values: number in the file, name here, struct's code
_STR, _ARRAY = 8, 9
_NUMBERS = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    7: ("bool", "?"),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}
_NAMES = {number: name for number, (name, _) in _NUMBERS.items()} | {_STR: "str"}
_CODES = dict(_NUMBERS.values())
_IDS = {name: number for number, name in _NAMES.items()}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class MetadataArray:
    """A long array in the metadata, decoded only when it is iterated."""

    def __init__(
        self, path: Path, key: str, kind: str, count: int, data: Map | bytes, start: int
    ) -> None:
        self.path, self.key, self.kind = path, key, kind
        self._count, self._data, self._start = count, data, start

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"<{self._count} {self.kind} of {self.key}>"

    def __iter__(self) -> Iterator[Any]:
        return self._texts() if self.kind == "str" else self._numbers()

    def _texts(self) -> Iterator[str]:
        at = self._start
        for n in range(self._count):
            (length,) = _U64.unpack_from(self._data, at)
            at += 8 + length
            yield _decoded(self._data[at - length : at], self.path, f"{self.key}[{n}]")

    def _numbers(self) -> Iterator[Any]:
        code = _CODES[self.kind]
        width = struct.calcsize(code)
        for done in range(0, self._count, _SMALL):
            count, start = min(_SMALL, self._count - done), self._start + done * width
            if self.kind == "bool":
                raw = self._data[start : start + count]
                if (largest := max(raw)) > 1:
                    where = f"{self.key}[{done + raw.index(largest)}]"
                    raise CorruptCheckpoint(f"{self.path}: {where} is {largest}, neither 0 nor 1")
            yield from struct.unpack_from(f"<{count}{code}", self._data, start)


class GGUFReader:
    """A GGUF file: its header is checked when it is opened, its tensors are read when asked for.

    Tensors are views of the mapped file, or copies; quantized ones are dequantized to F32.
    `tensors` holds the dtypes that are returned, `quantized` the stored type where it differs.

    One file of a split checkpoint is opened with `part=True`; `open_gguf` opens all of them.
    """

    def __init__(self, path: Path, mmap: bool | None = None, *, part: bool = False) -> None:
        self.path = path
        fd = open_regular(path)
        try:
            _check_magic(path, os.pread(fd, 24, 0), os.fstat(fd).st_size)
            self._file = SourceFile(path, fd, mmap is not False)
        finally:
            os.close(fd)
        header = _read_header(self._file)
        self.version: int = header.version
        self.values: dict[str, Any] = header.values
        self.kinds: dict[str, str] = header.kinds  # of each value: u32, str, [f32] …
        self.metadata = {key: text for key, text in self.values.items() if type(text) is str}
        self.alignment = _alignment(path, header)
        self.split = _split(path, header)
        if self.split is not None and not part:
            number, count = self.split
            raise MissingShard(
                f"{path}: is file {number + 1} of {count}, and the other files have tensors too. "
                "Open them together, with open_gguf."
            )
        self._places = _places(path, header, self.alignment, self._file.size)
        self.tensors = {
            name: TensorInfo(name, place.shape, place.kind.dtype)
            for name, place in self._places.items()
        }
        check_names(path, self.tensors)
        self.quantized = {n: p.kind.name for n, p in self._places.items() if p.kind.decode}

    def span(self, name: str) -> tuple[int, int]:
        """Return (start, end) of a tensor's bytes in the file, quantized or not."""
        place = self._places[name]
        return place.start, place.end

    def size(self, name: str) -> int:
        """Return the bytes that a tensor takes in the file."""
        start, end = self.span(name)
        return end - start

    def tensor(self, name: str) -> Tensor:
        """Return a view of the mapped file, a copy, or the dequantized numbers in F32."""
        import torch

        place, info = self._place(name), self.tensors[name]
        if place.kind.decode is None:
            return self._file.tensor(place.start, info.dtype, info.shape)
        out = torch.empty(info.numel)
        dequantize(place.kind, self._file.bytes(place.start, place.end), out)
        return out.view(info.shape)

    def decoder(self, name: str) -> Read | None:
        """Return what reads or decodes a box of a tensor; None if `tensor` is a view of a map."""
        place, info = self._place(name), self.tensors[name]
        if place.kind.decode is not None:
            return partial(self.numbers, name)
        return self._file.boxes(place.start, info.dtype, info.shape)

    def numbers(self, name: str, rows: slice, columns: slice) -> Tensor:
        """Return (rows, columns) of a quantized tensor, all axes but the last as rows."""
        import torch

        place, info = self._place(name), self.tensors[name]
        width = info.shape[-1] if info.shape else 1
        block, size = place.kind.block, place.kind.size
        first, last = columns.start // block, -(-columns.stop // block)
        shape = info.numel // width, width // block * size
        raw = self._file.box(place.start, "U8", shape, rows, slice(first * size, last * size))
        out = torch.empty(len(raw), (last - first) * block)
        dequantize(place.kind, raw.reshape(-1), out.view(-1))
        return out[:, columns.start - first * block : columns.stop - first * block]

    def _place(self, name: str) -> _Place:
        place = self._places.get(name)
        if place is None:
            near = did_you_mean(name, self.tensors)
            raise MissingTensors(f"{self.path}: has no tensor {name}.{near}")
        return place


def open_gguf(path: Path, mmap: bool | None = None) -> dict[str, GGUFReader]:
    """Open a GGUF file, or all files of a split from any of them.

    Returns:
        File name -> reader, in order. The first holds the metadata of all.

    Raises:
        CorruptCheckpoint: If a file is damaged.
        BadIndex: If a file is not named as its position in the split requires.
        MissingShard: If files of a split are missing.
    """
    opened = GGUFReader(path, mmap, part=True)
    if opened.split is None:
        return {path.name: opened}
    number, count = opened.split
    match = _PART.fullmatch(path.name)
    wanted = f"-{number + 1:05d}-of-{count:05d}.gguf"
    if match is None or not path.name.endswith(wanted):
        raise BadIndex(
            f"{path}: says that it is file {number + 1} of {count}, so its name should end in "
            f"{wanted}. The others are found by their names: give them back the ones they had."
        )
    names = [f"{match[1]}-{n + 1:05d}-of-{count:05d}.gguf" for n in range(count)]
    readers = _read_all(path.parent, names, {path.name: opened}, mmap)
    problems = [
        f"{name} says {_split_label(reader.split)}, expected {_split_label((n, count))}"
        for n, (name, reader) in enumerate(readers.items())
        if reader.split != (n, count)
    ]
    tensors = sum(len(reader.tensors) for reader in readers.values())
    expected = readers[names[0]].values.get("split.tensors.count", tensors)
    if expected != tensors:
        problems.append(f"split.tensors.count is {expected}, and the files hold {tensors} tensors")
    if problems:
        raise BadIndex(f"{path.parent}: {listing(problems)}. Parts of different checkpoints?")
    where: dict[str, str] = {}
    twice = [
        f"{tensor} ({where[tensor]} and {name})"
        for name, reader in readers.items()
        for tensor in reader.tensors
        if where.setdefault(tensor, name) != name
    ]
    if twice:
        raise DuplicateTensor(f"{path.parent}: tensors in two files of a split: {listing(twice)}")
    return readers


def _split_label(split: tuple[int, int] | None) -> str:
    return f"file {split[0] + 1} of {split[1]}" if split else "that it is whole"


def _read_all(
    root: Path, names: list[str], read: dict[str, GGUFReader], mmap: bool | None
) -> dict[str, GGUFReader]:
    """Open all files of a split; report all that are missing, or the first that is damaged."""
    others = [name for name in names if name not in read]
    missing = [name for name in others if not (root / name).exists()]
    if missing:
        raise MissingShard(
            f"{root}: {len(missing)} of {len(names)} files are missing: {listing(missing)}. "
            "Download them again."
        )
    readers = {name: GGUFReader(confined(root, name), mmap, part=True) for name in others}
    read = {**read, **readers}
    return {name: read[name] for name in names}


# --- the header -----------------------------------------------------------------------------------


def _check_magic(path: Path, head: bytes, size: int) -> None:
    if size < 24:
        raise CorruptCheckpoint(
            f"{path}: {size} bytes; a GGUF file has at least 24. "
            "Truncated? Download or copy it again."
        )
    if head[:4] != _MAGIC:
        if head.startswith(b"version https://git-lfs"):
            hint = "It is a Git LFS pointer, not the weights: fetch the file itself."
        elif head[:4] in (b"lmgg", b"tjgg", b"fmgg", b"algg"):
            hint = "It is of a format from before GGUF: convert it with llama.cpp's scripts."
        else:
            hint = "No GGUF file, or a damaged one."
        raise CorruptCheckpoint(f"{path}: begins with {head[:4]!r}, expected {_MAGIC!r}. {hint}")
    (version,) = _U32.unpack_from(head, 4)
    if version in _VERSIONS:
        return
    if int.from_bytes(head[4:8], "big") in _VERSIONS:
        raise UnsupportedFormat(
            f"{path}: is big-endian; only little-endian files are read. "
            "Convert it with the gguf package: gguf-convert-endian."
        )
    if version == 1:
        raise UnsupportedFormat(
            f"{path}: is of version 1, which held sizes in 32 bits; 2 and 3 are read. "
            "Convert the model again."
        )
    raise UnsupportedFormat(f"{path}: is of version {version}; 2 and 3 are read")


def _decoded(raw: bytes, path: Path, what: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise CorruptCheckpoint(f"{path}: {what} is not UTF-8 at byte {error.start}") from None


def _short(name: str) -> str:
    return name if len(name) <= 80 and name.isprintable() else repr(name[:77]) + "..."


class _Entry(NamedTuple):
    """A tensor's entry in the header."""

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int


def _read_header(file: SourceFile) -> _Header:
    """Parse the header, from a map or from as many bytes as it turns out to have."""
    if file.mapped:
        return _Header(file.path, file.data, file.size)
    length = 1 << 20
    while True:
        data = b"".join(map(bytes, file.chunks(0, min(length, file.size))))
        try:
            return _Header(file.path, data, file.size)
        except _Longer:
            length *= 8


class _Longer(Exception):
    """The header continues behind the bytes that were read."""


class _Header:
    """A parsed header of sound structure; limits are checked before what they limit is read."""

    def __init__(self, path: Path, data: Map | bytes, size: int) -> None:
        self.path, self.data, self.size = path, data, size  # the size is the file's
        self.at, self.end = 4, min(len(data), MAX_HEADER)
        self.text_left, self.elements_left = MAX_TEXT, MAX_ELEMENTS
        self.version = self._u32("the version")
        tensors = self._count("tensors", MAX_TENSORS, 24)
        keys = self._count("key/values", MAX_KEYS, 13)
        self.values: dict[str, Any] = {}
        self.kinds: dict[str, str] = {}
        for n in range(keys):
            self._key_value(n)
        self.entries = [self._tensor(n) for n in range(tensors)]

    def _take(self, size: int, what: str) -> int:
        """Return the position of the next `size` bytes, all of which are there."""
        start = self.at
        if size > self.end - start:
            if len(self.data) < min(self.size, MAX_HEADER):
                raise _Longer
            if start + size <= self.size:
                raise ResourceLimit(
                    f"{self.path}: {what} ends at byte {start + size} of the header; "
                    f"at most {MAX_HEADER} are read"
                )
            raise CorruptCheckpoint(
                f"{self.path}: {what} takes {size} bytes from byte {start} on, and the file has "
                f"{self.size}. Truncated or damaged: download or copy it again."
            )
        self.at += size
        return start

    def _u32(self, what: str) -> int:
        number: int = _U32.unpack_from(self.data, self._take(4, what))[0]
        return number

    def _u64(self, what: str) -> int:
        number: int = _U64.unpack_from(self.data, self._take(8, what))[0]
        return number

    def _count(self, what: str, limit: int, least: int) -> int:
        count = self._u64(f"the number of {what}")
        if count * least > self.size:
            raise CorruptCheckpoint(
                f"{self.path}: {count} {what} take {count * least} bytes or more, "
                f"and the file has {self.size}. Truncated or damaged."
            )
        if count > limit:
            raise ResourceLimit(f"{self.path}: {count} {what}; at most {limit} are read")
        return count

    def _text(self, what: str) -> str:
        length = self._u64(f"the length of {what}")
        start = self._take(length, what)
        self.text_left -= length
        if self.text_left < 0:
            raise ResourceLimit(
                f"{self.path}: {what} and all text before it take more than {MAX_TEXT} bytes"
            )
        return _decoded(self.data[start : start + length], self.path, what)

    def _key_value(self, n: int) -> None:
        key = self._text(f"key {n}")
        what = _short(key)
        if key in self.values:
            raise CorruptCheckpoint(f"{self.path}: key {what} occurs twice")
        kind = self._u32(f"the type of {what}")
        if kind == _ARRAY:
            array = self._array(what)
            self.kinds[key] = f"[{array.kind}]"
            size = self.at - array._start
            small = len(array) <= _SMALL and size <= self.text_left
            self.text_left -= size if small else 0
            self.values[key] = list(array) if small else array
        else:
            self.kinds[key] = self._name(kind, what)
            self.values[key] = self._scalar(kind, what)

    def _name(self, kind: int, what: str) -> str:
        name = _NAMES.get(kind)
        if name is None:
            types = ", ".join(f"{n} ({_NAMES.get(n, 'array')})" for n in range(13))
            raise CorruptCheckpoint(f"{self.path}: {what} is of type {kind}, none of {types}")
        return name

    def _scalar(self, kind: int, what: str) -> Any:
        if kind == _STR:
            return self._text(what)
        name, code = _NUMBERS[kind]
        start = self._take(struct.calcsize(code), what)
        if name == "bool" and (byte := self.data[start]) > 1:
            raise CorruptCheckpoint(f"{self.path}: {what} is {byte}, neither 0 nor 1")
        (value,) = struct.unpack_from(f"<{code}", self.data, start)
        return _shortest(value) if name == "f32" else value

    def _array(self, what: str) -> MetadataArray:
        kind = self._u32(f"the type of {what}'s elements")
        if kind == _ARRAY:
            raise UnsupportedFormat(f"{self.path}: {what} is an array of arrays; none is read")
        name = self._name(kind, f"an element of {what}")
        count = self._u64(f"the length of {what}")
        width = 8 if kind == _STR else struct.calcsize(_NUMBERS[kind][1])
        start = self._take(count * width, what)  # for texts, the least that they can take
        self.elements_left -= count
        if self.elements_left < 0:
            raise ResourceLimit(
                f"{self.path}: {what} and the arrays before it have more than "
                f"{MAX_ELEMENTS} elements"
            )
        if kind == _STR:
            self.at = start
            self._skip_texts(count, what)
        return MetadataArray(self.path, what, name, count, self.data, start)

    def _skip_texts(self, count: int, what: str) -> None:
        data, at, last, length_at = self.data, self.at, self.end - 8, _U64.unpack_from
        for n in range(count):
            if at > last:
                self._take(at - self.at, f"{what}[{n - 1}]")
                self._take(8, f"the length of {what}[{n}]")
            self.at = (
                at  # start of this text; its end is checked with the next text, or after the last
            )
            at += 8 + length_at(data, at)[0]
        self._take(at - self.at, f"{what}[{count - 1}]")

    def _tensor(self, n: int) -> _Entry:
        name = self._text(f"the name of tensor {n}")
        what = f"tensor {_short(name)}"
        axes = self._u32(f"the number of axes of {what}")
        if axes > MAX_AXES:
            raise CorruptCheckpoint(
                f"{self.path}: {what} has {axes} axes; GGUF has at most {MAX_AXES}"
            )
        fields = struct.Struct(f"<{axes}QIQ")
        *dims, kind, offset = fields.unpack_from(self.data, self._take(fields.size, what))
        return _Entry(name, tuple(dims), kind, offset)


def _shortest(value: float) -> float:
    """Return the shortest decimal that is this single-precision number.

    1e-05, not 9.99999974737875e-06: its writer meant that, and rounding gives the same number.
    """
    for digits in range(6, 10):
        short = float(f"{value:.{digits}g}")
        if abs(short) < 3.4e38 and struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def as_read(value: Any) -> Any:
    """Return a plain value as it is after writing and reading: floats in single precision.

    >>> as_read(0.1), as_read(0.123456789)
    (0.1, 0.12345679)
    """
    if type(value) is not float or not -3.4e38 < value < 3.4e38:
        return value
    return _shortest(struct.unpack("<f", struct.pack("<f", value))[0])


def _alignment(path: Path, header: _Header) -> int:
    value = header.values.get(_ALIGNMENT, 32)
    kind = header.kinds.get(_ALIGNMENT, "u32")
    if kind != "u32" or value < 1 or value & (value - 1):
        raise CorruptCheckpoint(
            f"{path}: {_ALIGNMENT} is {value} ({kind}); expected a power of two (u32)"
        )
    alignment: int = value
    return alignment


def _split(path: Path, header: _Header) -> tuple[int, int] | None:
    """Return (number from 0, count) if the checkpoint is in several files."""
    number, count = (header.values.get(f"split.{name}") for name in ("no", "count"))
    if number is None and count is None:
        return None
    if type(number) is not int or type(count) is not int or not 0 <= number < max(1, count):
        raise CorruptCheckpoint(
            f"{path}: split.no is {number!r} and split.count {count!r}; "
            "expected a number below a count"
        )
    return (number, count) if count > 1 else None


class _Place(NamedTuple):
    """The range of a tensor's bytes in the file, with its shape and type."""

    shape: tuple[int, ...]
    kind: BlockType
    start: int
    end: int


def _padded(size: int, alignment: int) -> int:
    return size + -size % alignment


def _places(path: Path, header: _Header, alignment: int, size: int) -> dict[str, _Place]:
    """Return each tensor's place; in the file there are no gaps between tensors but padding."""
    base = _padded(header.at, alignment)
    problems: list[str] = []
    unread: list[str] = []
    places: dict[str, _Place] = {}
    for entry in header.entries:
        what = f"tensor {_short(entry.name)}"
        if entry.name in places:
            problems.append(f"{what} occurs twice")
        kind = KINDS.get(entry.kind)
        if kind is None:
            name = UNREAD.get(entry.kind)
            where = problems if name is None else unread
            where.append(
                f"{what}: type {entry.kind} is unknown" if name is None else f"{what} is {name}"
            )
            places[entry.name] = _Place((), KINDS[0], 0, 0)
            continue
        if problem := _entry_problem(entry, kind, alignment):
            problems.append(f"{what}: {problem}")
        shape = entry.dims[::-1]  # GGUF lists the fastest axis first
        start = base + entry.offset
        places[entry.name] = _Place(shape, kind, start, start + kind.nbytes(shape))
    if not problems and not unread:
        problems = _layout_problems(places, header.at, base, alignment, size)
    if problems:
        raise CorruptCheckpoint(f"{path}: {listing(problems)}")
    if unread:
        raise UnsupportedFormat(
            f"{path}: has types that are not decoded: {listing(unread)}. "
            "Quantize the model to another, or take one that is not quantized."
        )
    return places


def _entry_problem(entry: _Entry, kind: BlockType, alignment: int) -> str | None:
    """Return what is wrong with one entry by itself; None if nothing is."""
    shape, dims = list(entry.dims[::-1]), entry.dims
    if 0 in dims:
        return f"shape {shape} has an axis of 0"
    if kind.nbytes(dims) > _LARGEST or max(dims, default=0) > _LARGEST:
        return f"shape {shape} overflows 64 bits"
    if (dims[0] if dims else 1) % kind.block:
        return f"shape {shape}: its rows do not divide into the {kind.block} numbers of {kind.name}"
    if entry.offset % alignment:
        return f"offset {entry.offset} is no multiple of the alignment, {alignment}"
    return None


def _layout_problems(
    places: Mapping[str, _Place], header: int, base: int, alignment: int, size: int
) -> list[str]:
    problems: list[str] = []
    reached, end, before = base, header, "the header"
    for name, place in sorted(places.items(), key=lambda item: item[1].start):
        what = f"tensor {_short(name)}"
        if place.start != reached:
            fault = "overlaps" if place.start < end else "leaves a hole after"
            problems.append(
                f"{what}: starts at byte {place.start} and {fault} {before}, "
                f"which ends at {end}; expected {reached}"
            )
        end, before = place.end, what
        reached = _padded(end, alignment)
    if not end <= size <= reached:
        fault = "truncated" if size < end else "trailing bytes"
        problems.append(f"{fault}: {before} ends at byte {end}, the file at {size}")
    return problems


# --- writing --------------------------------------------------------------------------------------


class Value(NamedTuple):
    """A value with an explicit type, if it is not the usual one: Value("[i32]", [1, 3])."""

    kind: str
    value: Any


def lay_out(infos: Iterable[TensorInfo], values: Mapping[str, Any], where: Any) -> Layout:
    """Lay out a file of these tensors and key/values, both in the given order.

    Args:
        infos: The tensors. A dtype is one of F32, F16, BF16 and Q8_0.
        values: The metadata. A value is a `Value`, or text, a bool, an int (written as u32), a
            float (f32) or a list of one of these.
        where: What the file is called in messages.

    Returns:
        The layout; bytes between tensors are zeros.

    Raises:
        LossyExport: If GGUF cannot hold a tensor or a value.
        ResourceLimit: If the header would be too large to be read again.
    """
    infos = list(infos)
    problems: list[str] = []
    alignment = values.get(_ALIGNMENT, 32)
    if isinstance(alignment, Value) and alignment.kind == "u32":
        alignment = alignment.value
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise LossyExport(f"{where}: {_ALIGNMENT} is {alignment!r}, no power of two (u32)")
    head = bytearray(_MAGIC + struct.pack("<IQQ", _VERSION, len(infos), len(values)))
    for key, value in values.items():
        try:
            head += _packed_text(key) + _packed(value)
            if not 0 < len(key.encode()) <= MAX_KEY:
                problems.append(f"key {_short(key)}: keys have 1 to {MAX_KEY} bytes")
        except (ValueError, TypeError, OverflowError, struct.error) as error:
            problems.append(f"{_short(key)}: {error}")
    starts: dict[str, int] = {}
    reached = 0
    for info in infos:
        if info.name in starts:
            raise DuplicateTensor(f"{where}: {info.name} would occur twice in the header")
        starts[info.name] = reached
        if problem := _unwritable(info):
            problems.append(f"tensor {_short(info.name)}: {problem}")
            continue
        dims = info.shape[::-1]
        place = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, WRITTEN[info.dtype], reached)
        head += _packed_text(info.name) + place
        reached = _padded(reached + stored_bytes(info), alignment)
    if problems:
        raise LossyExport(f"{where}: GGUF cannot hold {listing(problems)}")
    head += bytes(-len(head) % alignment)
    for count, limit, what in (
        (len(head), MAX_HEADER, "bytes of header"),
        (len(values), MAX_KEYS, "key/values"),
        (len(infos), MAX_TENSORS, "tensors"),
    ):
        if count > limit:
            raise ResourceLimit(f"{where}: {count} {what}; at most {limit} can be read again")
    return Layout(bytes(head), starts, reached)


def stored_bytes(info: TensorInfo) -> int:
    """Return the bytes that a tensor takes in the file, without padding."""
    return KINDS[WRITTEN[info.dtype]].nbytes(info.shape)


def _unwritable(info: TensorInfo) -> str | None:
    number = WRITTEN.get(info.dtype)
    if number is None:
        return f"{info.dtype} is none of {', '.join(WRITTEN)}"
    try:
        length = len(info.name.encode())
    except UnicodeEncodeError:
        return "its name is no text"
    if not 0 < length <= MAX_NAME:
        return f"its name does not have 1 to {MAX_NAME} bytes"
    if len(info.shape) > MAX_AXES:
        return f"it has {len(info.shape)} axes, and {MAX_AXES} are possible"
    return _entry_problem(_Entry(info.name, info.shape[::-1], number, 0), KINDS[number], 1)


def _packed_text(text: Any) -> bytes:
    if type(text) is not str:
        raise TypeError(f"{text!r} is no text")
    raw = text.encode()
    return _U64.pack(len(raw)) + raw


def _packed(value: Any) -> bytes:
    """Return the type and the bytes of a value."""
    kind, plain = _typed(value)
    element = kind[1:-1] if kind.startswith("[") else kind
    if element not in _IDS:
        raise TypeError(f"type {kind} is none of {', '.join(_IDS)}, nor [ ] around one")
    if element == kind:
        return _U32.pack(_IDS[kind]) + _packed_element(kind, plain)
    if type(plain) is str:
        raise TypeError(f"{plain!r} is no array")
    plain = list(plain)
    head = struct.pack("<IIQ", _ARRAY, _IDS[element], len(plain))
    return head + b"".join(_packed_element(element, each) for each in plain)


def _packed_element(kind: str, value: Any) -> bytes:
    if kind == "str":
        return _packed_text(value)
    if (kind == "bool") is not (type(value) is bool):
        raise TypeError(f"{value!r} is no {kind}")
    try:
        return struct.pack(f"<{_CODES[kind]}", value)
    except (struct.error, OverflowError):
        raise ValueError(f"{value!r} is no {kind}") from None


def _typed(value: Any) -> Value:
    return value if isinstance(value, Value) else Value(_usual(value), value)


def _usual(value: Any) -> str:
    if isinstance(value, list | tuple) and value:
        return f"[{_usual(value[0])}]"
    if isinstance(value, MetadataArray):
        return f"[{value.kind}]"
    for kind, python in (("bool", bool), ("u32", int), ("f32", float), ("str", str)):
        if isinstance(value, python):
            return kind
    raise TypeError(f"{value!r} has no usual type; say which, as in Value('[u32]', [])")
