"""TensorFlow's tensor bundles (`X.index`, `X.data-00000-of-0000N`), read without TensorFlow."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from converters.formats import BITS, TensorInfo, check_names, open_regular, torch_dtype
from converters.formats.crc32c import crc32c_read, masked
from converters.formats.source import SourceFile
from converters.formats.sstable import read_table
from converters.formats.wire import BYTES, FIXED32, Field, Malformed, message, signed
from converters.paths import confined, is_plain
from zoo.errors import (
    AmbiguousCheckpoint,
    CorruptCheckpoint,
    MissingShard,
    MissingTensors,
    NotACheckpoint,
    ResourceLimit,
    UnsafePath,
    UnsupportedFormat,
    did_you_mean,
    listing,
)

if TYPE_CHECKING:
    import torch

    from converters.lazy import Read

INDEX = ".index"
MAX_SHARDS = 10_000  # and slices of one tensor
MAX_RANK = 8  # the limit of TensorFlow's operations
_MAX_POINTER = 1 << 20
_VERSION = 1  # of bundles read here; a file names the lowest version that reads it

# TensorFlow's number: dtype code, or a description of a type that is not read
DTYPES = {
    1: "F32",
    2: "F64",
    3: "I32",
    4: "U8",
    5: "I16",
    6: "I8",
    8: "C64",
    9: "I64",
    10: "BOOL",
    14: "BF16",
    17: "U16",
    19: "F16",
    22: "U32",
    23: "U64",
    24: "F8_E5M2",
    25: "F8_E4M3",
    26: "F8_E4M3FNUZ",
    28: "F8_E5M2FNUZ",
}
_OTHERS = {
    7: "text",
    11: "qint8",
    12: "quint8",
    13: "qint32",
    15: "qint16",
    16: "quint16",
    18: "complex128",
    20: "a resource",
    21: "a variant",
    27: "float8_e4m3b11fnuz",
    29: "int4",
    30: "uint4",
    31: "int2",
    32: "uint2",
}
_ALL = -1  # length of a slice that covers its axis
_COUNTER = "save_counter/.ATTRIBUTES/VARIABLE_VALUE"

_HEADER = {1: Field("num_shards"), 2: Field("endianness"), 3: Field("version", BYTES)}
_VERSIONS = {
    1: Field("producer"),
    2: Field("min_consumer"),
    3: Field("bad_consumers", most=MAX_SHARDS),
}
_ENTRY = {
    1: Field("dtype"),
    2: Field("shape", BYTES),
    3: Field("shard_id"),
    4: Field("offset"),
    5: Field("size"),
    6: Field("crc32c", FIXED32),
    7: Field("slices", BYTES, most=MAX_SHARDS),
}
_SHAPE = {2: Field("dim", BYTES, most=MAX_RANK), 3: Field("unknown_rank")}
_DIM = {1: Field("size"), 2: Field("name", BYTES)}
_SLICE = {1: Field("extent", BYTES, most=MAX_RANK)}
_EXTENT = {1: Field("start"), 2: Field("length")}


class _Part(NamedTuple):
    """A range of bytes in a shard, and their expected CRC."""

    shard: int
    start: int
    end: int
    crc: int


class _Entry(NamedTuple):
    """A key's entry in the index; a sliced tensor has slices instead of bytes."""

    dtype: int
    shape: tuple[int, ...]
    part: _Part
    slices: list[bytes]


class _Piece(NamedTuple):
    """Where some of a tensor's rows along an axis are."""

    axis: int
    first: int
    shape: tuple[int, ...]
    part: _Part


class TFBundleReader:
    """A TensorFlow bundle: index and sizes are checked when opened, CRCs when a tensor is read.

    `skipped` holds why a key is not a tensor: text, TensorFlow's own records. Files are mapped only
    on request, since a saver overwrites them under the same names.
    """

    def __init__(self, path: Path, mmap: bool | None = None) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        entries, shards = _entries(path)
        self._shards = _open_shards(path, shards, mmap is True)
        self.files = (path, *(shard.path for shard in self._shards))
        self.skipped: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        self._sort_out(entries)
        check_names(path, self.tensors)
        self._unchecked = {piece.part for pieces in self._pieces.values() for piece in pieces}

    def tensor(self, name: str) -> torch.Tensor:
        """Return a view of the map or a copy; slices are joined in memory."""
        if name in self.skipped:
            raise MissingTensors(f"{self.path}: {name} is no tensor: {self.skipped[name]}")
        info = self.tensors.get(name)
        if info is None:
            near = did_you_mean(name, self.tensors)
            raise MissingTensors(f"{self.path}: has no tensor {name}.{near}")
        pieces = self._pieces[name]
        for piece in pieces:
            self._check(name, piece.part)
        if len(pieces) == 1:
            return self._view(info.dtype, pieces[0])
        import torch

        return torch.cat([self._view(info.dtype, piece) for piece in pieces], pieces[0].axis)

    def decoder(self, name: str) -> Read | None:
        """Return what reads a box of a tensor; None if `tensor` is a view of a map."""
        pieces, (_, shape, dtype) = self._pieces[name], self.tensors[name]
        for piece in pieces:
            self._check(name, piece.part)
        if self._shards[pieces[0].part.shard].mapped:
            return None
        if len(pieces) == 1:
            return self._boxes(dtype, pieces[0])
        import torch

        from converters.lazy import FileBacked, Lazy, Patch

        parts = list[Patch]()
        for piece in pieces:
            box = [slice(0, size) for size in shape]
            box[piece.axis] = slice(piece.first, piece.first + piece.shape[piece.axis])
            of = FileBacked(piece.shape, torch_dtype(dtype), self._boxes(dtype, piece))
            view = torch.empty(piece.shape, dtype=torch_dtype(dtype), device="meta")
            parts.append(Patch(tuple(box), view, of))
        return Lazy(shape, shape, parts).matrix

    def _boxes(self, dtype: str, piece: _Piece) -> Read:
        return partial(self._shards[piece.part.shard].box, piece.part.start, dtype, piece.shape)

    def _view(self, dtype: str, piece: _Piece) -> torch.Tensor:
        return self._shards[piece.part.shard].tensor(piece.part.start, dtype, piece.shape)

    def _check(self, name: str, part: _Part) -> None:
        if part not in self._unchecked or part.start == part.end:
            return
        shard = self._shards[part.shard]
        size, read = part.end - part.start, shard.bytes
        actual = masked(crc32c_read(size, lambda a, b: read(part.start + a, part.start + b)))
        if actual != part.crc:
            raise CorruptCheckpoint(
                f"{shard.path}: tensor {name}, bytes {part.start} to {part.end}: CRC {actual:08x}, "
                f"expected {part.crc:08x}. Download or copy the file again."
            )
        self._unchecked.discard(part)  # another thread may have checked it too

    def _sort_out(self, entries: dict[bytes, _Entry]) -> None:
        """Separate tensors from other entries; a slice's key begins with a zero byte."""
        problems = _span_problems(entries, self._shards)
        unclaimed = {key for key in entries if key.startswith(b"\0")}
        for key, entry in entries.items():
            if key.startswith(b"\0"):
                continue
            try:
                name = key.decode()
                if reason := _no_tensor(name, entry.dtype):
                    self.skipped[name] = reason
                    continue
                pieces = (
                    _slices(self.path, key, entry, entries)
                    if entry.slices
                    else {key: _Piece(0, 0, entry.shape, entry.part)}
                )
            except (Malformed, UnicodeDecodeError) as error:
                problems.append(f"tensor {_shown(key)}: {error}")
                continue
            unclaimed -= pieces.keys()
            self.tensors[name] = TensorInfo(name, entry.shape, DTYPES[entry.dtype])
            self._pieces[name] = sorted(pieces.values(), key=lambda piece: piece.first)
        problems += [f"{_shown(key)} is a slice of no tensor" for key in sorted(unclaimed)]
        if problems:
            raise CorruptCheckpoint(f"{self.path}: {listing(problems)}")


def _shown(key: bytes) -> str:
    text = key.decode(errors="backslashreplace")
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else text[:197] + "..."


def _no_tensor(name: str, dtype: int) -> str | None:
    """Return why an entry is not a tensor; None if it is."""
    if dtype in _OTHERS:
        return f"holds {_OTHERS[dtype]}"
    return "how often TensorFlow's saver had run" if name == _COUNTER else None


# --- the index -----------------------------------------------------------------------------------


def _entries(path: Path) -> tuple[dict[bytes, _Entry], int]:
    """Return (key -> entry, number of shards)."""
    if not path.name.endswith(INDEX):
        raise NotACheckpoint(f"{path}: a tensor bundle is opened by its {INDEX} file")
    table = read_table(path)
    if not table or table[0][0] != b"":
        raise CorruptCheckpoint(f"{path}: a table, but no tensor bundle's: it has no header")
    try:
        shards = _header(path, table[0][1])
    except Malformed as error:
        raise CorruptCheckpoint(f"{path}: header: {error}") from None
    entries: dict[bytes, _Entry] = {}
    problems: list[str] = []
    for key, value in table[1:]:
        try:
            entries[key] = _entry(value, shards)
        except Malformed as error:
            problems.append(f"tensor {_shown(key)}: {error}")
    if problems:
        raise CorruptCheckpoint(f"{path}: {listing(problems)}")
    return entries, shards


def _header(path: Path, value: bytes) -> int:
    """Return the number of shards, if this is a bundle that can be read."""
    header = message(value, _HEADER)
    versions = message(header.get("version", b""), _VERSIONS)
    least, bad = versions.get("min_consumer", 0), versions.get("bad_consumers", [])
    if least > _VERSION or _VERSION in bad:
        raise UnsupportedFormat(
            f"{path}: wants a reader of version {least} and none of {bad or 'others'}; "
            f"this one has {_VERSION}. Save it again with an older TensorFlow."
        )
    if header.get("endianness", 0) != 0:
        raise UnsupportedFormat(
            f"{path}: saved in big-endian byte order; only little-endian is read. "
            "Save it again on the machine that it will be used on."
        )
    shards: int = header.get("num_shards", 0)
    if not shards:
        raise Malformed("says that there are 0 shards")
    if shards > MAX_SHARDS:
        raise ResourceLimit(f"{path}: {shards} shards; at most {MAX_SHARDS} are read")
    return shards


def _entry(value: bytes, shards: int) -> _Entry:
    entry = message(value, _ENTRY)
    dtype, slices = entry.get("dtype", 0), entry.get("slices", [])
    if dtype not in DTYPES and dtype not in _OTHERS:
        raise Malformed(f"dtype {dtype} is none that TensorFlow saves")
    shape = _shape(entry.get("shape", b""))
    shard, crc = entry.get("shard_id", 0), entry.get("crc32c", 0)
    start, size = signed(entry.get("offset", 0)), signed(entry.get("size", 0))
    if shard >= shards:
        raise Malformed(f"is in shard {shard} of {shards}")
    if start < 0 or size < 0:
        raise Malformed(f"{size} bytes at byte {start}")
    if slices and (start or size):
        raise Malformed("has slices, and bytes of its own")
    if dtype in DTYPES and not slices:
        wanted = math.prod(shape) * BITS[DTYPES[dtype]] // 8
        if size != wanted:
            fault = f"shape {_dims(shape)} of {DTYPES[dtype]} takes {wanted} bytes"
            raise Malformed(f"{fault}, the index says {size}")
    return _Entry(dtype, shape, _Part(shard, start, start + size, crc), slices)


def _shape(value: bytes) -> tuple[int, ...]:
    shape = message(value, _SHAPE)
    if shape.get("unknown_rank"):
        raise Malformed("says that its rank is not known")
    sizes = tuple(signed(message(dim, _DIM).get("size", 0)) for dim in shape.get("dim", []))
    if any(size < 0 for size in sizes):
        raise Malformed(f"shape {_dims(sizes)} has a negative size")
    # an empty tensor's other axes may not overflow either
    if math.prod(size or 1 for size in sizes) >> 56:
        raise Malformed(f"shape {_dims(sizes)} overflows 64 bits")
    return sizes


def _dims(shape: Iterable[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


# --- slices --------------------------------------------------------------------------------------


def _slices(
    path: Path, key: bytes, whole: _Entry, entries: dict[bytes, _Entry]
) -> dict[bytes, _Piece]:
    """Return the pieces of a tensor that was saved in slices along one axis, each under its key."""
    pieces: dict[bytes, _Piece] = {}
    cut: set[int] = set()
    for value in whole.slices:
        extents = [message(extent, _EXTENT) for extent in message(value, _SLICE).get("extent", [])]
        if len(extents) != len(whole.shape):
            raise Malformed(f"a slice has {len(extents)} axes, the tensor {len(whole.shape)}")
        axis, first, shape = 0, 0, list(whole.shape)
        spans: list[tuple[int, int]] = []
        for at, (extent, size) in enumerate(zip(extents, whole.shape, strict=True)):
            start = signed(extent.get("start", 0))
            length = signed(extent["length"]) if "length" in extent else _ALL
            spans.append((start, length))
            if length == _ALL and start == 0:
                continue
            if start < 0 or length < 0 or start + length > size:
                raise Malformed(f"a slice has {length} from {start} on axis {at} of {size}")
            if length < size:
                cut.add(at)
                axis, first, shape[at] = at, start, length
        name = slice_key(key, spans)
        part = entries.get(name)
        where = f"its slice from {first} on axis {axis}"
        if part is None or name in pieces:
            fault = "occurs twice" if name in pieces else "is not in the index"
            raise Malformed(f"{where} {fault}")
        if part.shape != tuple(shape) or part.dtype != whole.dtype or part.slices:
            actual = f"{_dims(part.shape)} of dtype {part.dtype}"
            raise Malformed(f"{where} is {actual}, not {_dims(shape)} of {whole.dtype}")
        pieces[name] = _Piece(axis, first, part.shape, part.part)
    if len(cut) > 1:
        raise UnsupportedFormat(
            f"{path}: tensor {_shown(key)} is saved in slices along axes "
            f"{listing(map(str, sorted(cut)))}; those along one are joined. Save it whole."
        )
    _check_tiling(whole.shape, pieces.values(), cut)
    return pieces


def _check_tiling(shape: tuple[int, ...], pieces: Iterable[_Piece], cut: set[int]) -> None:
    """Check that the pieces cover the tensor without overlap."""
    ordered = sorted(pieces, key=lambda piece: piece.first)
    if not cut:
        if len(ordered) != 1:
            raise Malformed(f"is saved whole {len(ordered)} times")
        return
    (axis,) = cut
    reached = 0
    for piece in ordered:
        if piece.first != reached:
            fault = f"reach {reached} of axis {axis} and go on at {piece.first}"
            raise Malformed(f"its slices {fault}")
        reached += piece.shape[axis]
    if reached != shape[axis]:
        raise Malformed(f"its slices end at {reached} of axis {axis}, which has {shape[axis]}")


def slice_key(name: bytes, spans: Iterable[tuple[int, int]]) -> bytes:
    """Return the key of a slice in the index; its bytes sort like its numbers and text.

    The key is a zero; the name, with 0 and 255 escaped; the rank; start and length for each axis.
    """
    escapes = {b"\0": b"\0\xff", b"\xff": b"\xff\0"}
    text = re.sub(b"[\0\xff]", lambda match: escapes[match[0]], name)
    spans = list(spans)
    rank = bytes((1, len(spans))) if spans else b"\0"
    return b"\0" + text + b"\0\1" + rank + b"".join(_number(n) for span in spans for n in span)


def _number(value: int) -> bytes:
    """Encode a signed number: leading ones count its bytes; a negative one is inverted."""
    size = (~value if value < 0 else value).bit_length() // 7 + 1
    ones = ((1 << size) - 1) << 7 * size
    return ((value & ((1 << 8 * size) - 1)) ^ ones).to_bytes(size, "big")


# --- the shards ----------------------------------------------------------------------------------


def _open_shards(path: Path, count: int, mapped: bool) -> list[SourceFile]:
    """Open all shards, or report all unsafe ones, or all missing ones."""
    stem = path.name.removesuffix(INDEX)
    shards: list[SourceFile] = []
    missing: list[str] = []
    unsafe: list[str] = []
    for number in range(count):
        name = f"{stem}.data-{number:05d}-of-{count:05d}"
        try:
            place = confined(path.parent, name)
            fd = open_regular(place)
        except (MissingShard, NotACheckpoint):
            missing.append(name)
        except UnsafePath as error:
            unsafe.append(str(error))
        else:
            try:
                shards.append(SourceFile(place, fd, mapped))
            finally:
                os.close(fd)
    if unsafe:
        raise UnsafePath("\n".join(unsafe))
    if missing:
        raise MissingShard(
            f"{path}: {len(missing)} of its {count} shards are missing: {listing(missing)}. "
            "Download them again."
        )
    return shards


def _span_problems(entries: dict[bytes, _Entry], shards: list[SourceFile]) -> list[str]:
    """List bytes outside their shard, shared by two tensors, or unused at the end."""
    parts = sorted((e.part, key) for key, e in entries.items() if not e.slices)
    problems: list[str] = []
    reached = [(0, "its start")] * len(shards)
    for part, key in parts:
        shard, name = shards[part.shard], _shown(key)
        end, before = reached[part.shard]
        fault = f"tensor {name}: bytes {part.start} to {part.end} of {shard.path.name}"
        if part.end > shard.size:
            problems.append(f"{fault}, which has {shard.size}: truncated?")
        elif part.start < end and part.start < part.end:
            problems.append(f"{fault} overlap {before}, which ends at {end}")
        if part.end > end:
            reached[part.shard] = part.end, name
    for shard, (end, before) in zip(shards, reached, strict=True):
        if end < shard.size:
            fault = f"{shard.size} bytes, and {before} ends at {end}"
            problems.append(f"trailing bytes in {shard.path.name}: {fault}")
    return problems


# --- which bundle --------------------------------------------------------------------------------


def find_bundle(path: Path) -> Path:
    """Return the index of a bundle from its path, its prefix or its directory."""
    if path.name.endswith(INDEX) and not path.is_dir():
        return path
    beside = path.with_name(path.name + INDEX) if path.name else path
    inside = _in_directory(path) if path.is_dir() else None
    if inside and path.name and beside.is_file():
        raise AmbiguousCheckpoint(f"{path}: {beside} and {inside}, both bundles. Name one.")
    if inside or (path.name and beside.is_file()):
        return inside or beside
    raise NotACheckpoint(
        f"{path}: no tensor bundle. Looked for {beside.name}, and a directory with one {INDEX}"
    )


def _in_directory(root: Path) -> Path | None:
    """Return the index that the file `checkpoint` names, or the only one in the directory."""
    try:
        here = sorted(name for name in os.listdir(root) if name.endswith(INDEX))
    except OSError as error:
        raise NotACheckpoint(f"{root}: {error.strerror}") from None
    named = _named(root / "checkpoint") if (root / "checkpoint").exists() else None
    if named:
        if named not in here:
            raise MissingShard(
                f"{root / 'checkpoint'}: names {named}, found {listing(here) or 'no index'}. "
                f"Name the {INDEX} file that is meant."
            )
        return root / named
    if len(here) > 1:
        raise AmbiguousCheckpoint(
            f"{root}: holds {listing(here)}, and no file `checkpoint` says which. Name one."
        )
    return root / here[0] if here else None


def _named(pointer: Path) -> str | None:
    """Return the index that TensorFlow's file `checkpoint` names; None if it is another file.

    It may name an absolute path on another machine: only the file's name is used, in this
    directory.
    """
    fd = open_regular(pointer)
    try:
        text = os.pread(fd, _MAX_POINTER, 0).decode(errors="backslashreplace")
    finally:
        os.close(fd)
    names = re.findall(r'^\s*model_checkpoint_path:\s*"(.*)"\s*$', text, re.MULTILINE)
    if len(names) != 1:
        return None
    name: str = names[0]
    name = name.rpartition("/")[2] if name.startswith("/") else name.removeprefix("./")
    if "/" in name or not is_plain(name):
        raise UnsafePath(
            f"{pointer}: names {name!r}, which is no file beside it. Name the {INDEX} file."
        )
    return name + INDEX
