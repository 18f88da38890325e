"""torch's own zips (`.bin`, `.pth`): a distrusted pickle over records that stay mapped."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.formats import Layout, TensorInfo, dtype_code, open_regular
from zoo.errors import (
    CheckpointError,
    CorruptCheckpoint,
    DtypeMismatch,
    DuplicateTensor,
    MissingTensors,
    ResourceLimit,
    UnsafePath,
    UnsupportedZip,
    ZooError,
    did_you_mean,
    listing,
)

if TYPE_CHECKING:
    import torch

MAX_PICKLE = 64 << 20  # names, shapes and strides: 100 bytes a tensor
MAX_RECORDS = 1 << 20
MAX_DEPTH, MAX_VALUES = 32, 1 << 20  # of a nested dict
_BOMB = 64 << 20, 100  # bytes and ratio beyond which a deflated record is no mere recompression
_CHUNK = 16 << 20

# All that a dict of plain tensors needs. torch's restricted unpickler lets more through, among it
# `bytearray(n)`, which allocates what it is told to.
_NEEDED = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)"
    r"|torch (\w+Storage|Size|u?int\d+|float\d+\w*|bfloat16|complex\d+|bool)"
    r"|torch\.storage (Untyped|Typed)Storage"
)
# opcodes that name a class by what was pushed before, or by a number
_HIDDEN = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"}
_MAGIC = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before 1.6
_LOCAL = struct.Struct("<4s5H3L2H")
_END = b"PK\x05\x06"


@dataclass(frozen=True, slots=True)
class _Record:
    name: str
    start: int
    size: int
    crc: int


class TorchZipReader:
    """Structure and pickle are checked on opening, a record's CRC when its tensor is asked for.

    So listing a file costs no reading of weights, and no tensor leaves here unchecked.
    """

    def __init__(self, path: Path, *, nested: bool = False) -> None:
        """`nested` takes dicts in dicts, and plain values beside tensors, as trainers leave them.

        A tensor's name is then the keys that lead to it, joined by /.
        """
        self.path = path
        self.metadata: dict[str, str] = {}
        records = _records(path)
        found = _load(path)
        self.values: dict[str, Any] = {}
        if nested:
            self._values, self.values = _flattened(path, found)
        else:
            self._values = _only_tensors(path, found)
        self.tensors = {n: _info(path, n, t) for n, t in self._values.items()}
        self._unchecked = _pair(path, self._values, records)

    def place(self, name: str) -> object:
        """What two names have in common if they are one array."""
        value = self._values[name]
        return value.data_ptr(), tuple(value.shape), value.stride()

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the mapped file; names that shared a storage when saved still do."""
        value = self._values.get(name)
        if value is None:
            near = did_you_mean(name, self.tensors)
            raise MissingTensors(f"{self.path}: holds no tensor {name}.{near}")
        address = value.untyped_storage().data_ptr()
        if (record := self._unchecked.get(address)) is not None:
            found = _crc(value)
            if found != record.crc:
                raise CorruptCheckpoint(
                    f"{self.path}: tensor {name} (record {record.name}): CRC {found:08x}, "
                    f"expected {record.crc:08x}. Download or copy the file again."
                )
            self._unchecked.pop(address, None)  # another thread may have been as fast
        if value.data_ptr() % value.element_size():
            return value.clone()  # a repacked zip may have lost torch's alignment
        return value


def _records(path: Path) -> list[_Record]:
    """The records that hold weights, once everything about the zip and its pickle is checked."""
    fd = open_regular(path)
    with open(fd, "rb") as file:
        size = os.fstat(fd).st_size
        _check_kind(path, file.read(len(LEGACY)), size)
        try:
            with zipfile.ZipFile(file) as archive:
                entries, comment = archive.infolist(), archive.comment
        except Exception as error:  # zipfile lets struct's, its own and others through
            raise CorruptCheckpoint(f"{path}: not a whole zip file: {error}") from None
        if comment or os.pread(fd, 4, size - 22) != _END:
            raise CorruptCheckpoint(f"{path}: bytes trail behind its end record")
        _check_directory(path, size, entries)
        records = _check_records(path, fd, size, entries)
        root = _check_names(path, [record.name for record in records])
        weights = [record for record in records if record.name.startswith(f"{root}/data/")]
        for record in records:
            if not record.name.startswith(f"{root}/data/"):
                _check_small(path, fd, root, record)
    return weights


def _check_kind(path: Path, head: bytes, size: int) -> None:
    if head == LEGACY:
        raise UnsupportedZip(
            f"{path}: torch's format from before 1.6, which cannot be mapped. Load it once with "
            "torch.load(..., weights_only=True) and save it again as safetensors."
        )
    if not head.startswith(_MAGIC) or size < 22:
        raise CorruptCheckpoint(
            f"{path}: {size} bytes that are no zip file of torch.save. Truncated, or a Git LFS "
            "pointer? Download or copy it again."
        )


def _check_directory(path: Path, size: int, entries: list[zipfile.ZipInfo]) -> None:
    """What the central directory claims, before any of it is believed."""
    if len(entries) > MAX_RECORDS:
        raise ResourceLimit(f"{path}: {len(entries)} records; at most {MAX_RECORDS} are read")
    limit, ratio = _BOMB
    for entry in entries:
        name, parts = entry.filename, entry.filename.split("/")
        if {"", ".", ".."} & set(parts) or "\\" in name or not name.isprintable():
            raise UnsafePath(f"{path}: record {name!r} is no plain relative path")
        if entry.flag_bits & 0x2041:
            raise UnsupportedZip(f"{path}: record {name} is encrypted")
        if entry.file_size > max(limit, ratio * entry.compress_size):
            raise ResourceLimit(
                f"{path}: record {name} claims to unpack {entry.compress_size} bytes "
                f"into {entry.file_size}"
            )
    if packed := [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]:
        raise UnsupportedZip(
            f"{path}: only stored records can be mapped; compressed are {listing(packed, 5)}. "
            "Save it again with torch.save, or as safetensors."
        )
    if (total := sum(entry.file_size for entry in entries)) > size:
        raise ResourceLimit(f"{path}: its records claim {total} bytes in a file of {size}")
    counts = Counter(entry.filename for entry in entries)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise CorruptCheckpoint(f"{path}: records that stand twice: {listing(twice)}")


def _check_records(path: Path, fd: int, size: int, entries: list[zipfile.ZipInfo]) -> list[_Record]:
    """Where each record's bytes lie; no two overlap."""
    records: list[_Record] = []
    reached, before = 0, "the start of the file"
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < reached:
            raise CorruptCheckpoint(f"{path}: record {entry.filename} overlaps {before}")
        records.append(_check_entry(path, fd, entry))
        reached, before = records[-1].start + records[-1].size, entry.filename
        if reached > size:
            raise CorruptCheckpoint(
                f"{path}: record {entry.filename} ends at byte {reached}, the file at {size}"
            )
    return records


def _check_entry(path: Path, fd: int, entry: zipfile.ZipInfo) -> _Record:
    """One entry of the central directory, held against its local header."""
    name = entry.filename
    problem = CorruptCheckpoint(f"{path}: record {name}: its two headers disagree")
    local = os.pread(fd, _LOCAL.size, entry.header_offset)
    if len(local) < _LOCAL.size or entry.compress_size != entry.file_size:
        raise problem
    magic, _, flags, method, _, _, crc, packed, unpacked, name_size, extra = _LOCAL.unpack(local)
    here = os.pread(fd, name_size, entry.header_offset + _LOCAL.size)
    if magic != _MAGIC or method != zipfile.ZIP_STORED or here != name.encode():
        raise problem
    wide = 0xFFFFFFFF  # the sizes stand in an extra field
    if not flags & 8 and (crc != entry.CRC or {packed, unpacked} - {entry.file_size, wide}):
        raise problem  # with flag 8 these three follow the data
    start = entry.header_offset + _LOCAL.size + name_size + extra
    return _Record(name, start, entry.file_size, entry.CRC)


def _check_names(path: Path, names: list[str]) -> str:
    """The folder that all records lie in; only what torch.save writes may be there."""
    roots = [name[: -len("/data.pkl")] for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0]:
        raise CorruptCheckpoint(f"{path}: a zip, but not torch.save's: no single data.pkl in it")
    root = roots[0]
    known = re.compile(
        re.escape(root) + r"/(data\.pkl|data/\d+|version|byteorder|\.[\w.]+(/[\w.]+)?)"
    )
    if strange := [name for name in names if not known.fullmatch(name)]:
        raise UnsupportedZip(
            f"{path}: records that no dict of tensors has: {listing(strange)}. "
            "A TorchScript archive? Save its state_dict() instead."
        )
    return root


def _check_small(path: Path, fd: int, root: str, record: _Record) -> None:
    """Everything but weights is read whole: its CRC, the byte order, and what the pickle names."""
    if record.size > MAX_PICKLE:
        raise ResourceLimit(
            f"{path}: record {record.name} has {record.size} bytes; at most {MAX_PICKLE} are read"
        )
    data = os.pread(fd, record.size, record.start)
    if zlib.crc32(data) != record.crc:
        raise CorruptCheckpoint(f"{path}: record {record.name}: wrong CRC. Download it again.")
    if record.name == f"{root}/byteorder" and data != b"little":
        raise UnsupportedZip(f"{path}: saved in byte order {data[:20]!r}; only little is mapped")
    if record.name == f"{root}/data.pkl":
        _check_pickle(path, data)


def _check_pickle(path: Path, data: bytes) -> None:
    """Read as opcodes, not carried out: it may name nothing but what plain tensors need."""
    try:
        codes = [(code.name, arg) for code, arg, _ in pickletools.genops(data)]
    except Exception as error:  # any malformed operand
        raise CorruptCheckpoint(f"{path}: data.pkl is no pickle: {error}") from None
    if odd := sorted({name for name, _ in codes} & _HIDDEN):
        words = [str(arg) for name, arg in codes if "UNICODE" in name]
        raise CorruptCheckpoint(
            f"{path}: its pickle names what it needs by {', '.join(odd)}, as torch.save does not; "
            f"among its words: {listing(words, 5)}. Nothing was run. Save the bare state_dict() "
            "again with torch.save's own protocol"
        )
    named = {str(arg) for name, arg in codes if name == "GLOBAL"}
    if blocked := sorted(name for name in named if not _NEEDED.fullmatch(name)):
        names = listing(name.replace(" ", ".") for name in blocked)
        raise CorruptCheckpoint(
            f"{path}: its pickle asks for {names}, which weights do not need. Nothing was run. "
            "If you trust its author, save the bare state_dict() again from the original code."
        )


def _load(path: Path) -> dict[Any, Any]:
    """What the restricted unpickler makes of it, if that is a dict."""
    import torch

    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except ZooError:
        raise
    except Exception as error:  # the unpickler lets any kind through
        # the rest of its message is advice to read it unrestricted
        why = re.search(r"Unsupported [\w ]+ \S+|GLOBAL \S+", str(error))
        told = f": {why[0]}" if why else ""
        raise CorruptCheckpoint(
            f"{path}: torch's restricted unpickler refuses it{told}. Nothing was run."
        ) from None
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise CheckpointError(f"{path}: holds a {kind}; expected a dict of tensors")
    return found


def _only_tensors(path: Path, found: dict[Any, Any]) -> dict[str, torch.Tensor]:
    """The dict of tensors; anything else is refused, with the likely cause."""
    import torch

    strange = {k: v for k, v in found.items() if not isinstance(v, torch.Tensor)}
    for key, value in strange.items():
        if isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values()):
            raise MissingTensors(
                f"{path}: the tensors are nested under {key!r}, as a trainer leaves them. "
                f"Save that part alone: torch.save(checkpoint[{key!r}], ...)"
            )
    if strange:
        kinds = listing(f"{key} ({type(value).__name__})" for key, value in strange.items())
        raise CheckpointError(
            f"{path}: values that are no tensors: {kinds}. Save the others alone."
        )
    if names := [repr(key) for key in found if not isinstance(key, str)]:
        raise CheckpointError(f"{path}: names that are no text: {listing(names)}")
    return {name: value.detach() for name, value in found.items()}


def _flattened(path: Path, found: dict[Any, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors by the keys that lead to them, everything else as plain data)."""
    import torch

    tensors: dict[str, torch.Tensor] = {}
    seen = 0

    def plain(value: Any, at: str, depth: int) -> Any:
        nonlocal seen
        seen += 1  # what a pickle's memo holds once may stand in many places
        if depth > MAX_DEPTH or seen > MAX_VALUES:
            raise ResourceLimit(
                f"{path}: {at}: deeper than {MAX_DEPTH} levels, or over {MAX_VALUES} values"
            )
        if isinstance(value, torch.Tensor):
            if at in tensors:
                raise DuplicateTensor(f"{path}: two tensors are called {at}")
            tensors[at] = value.detach()
            return None
        if isinstance(value, dict):
            if odd := [repr(key)[:60] for key in value if type(key) not in (str, int)]:
                raise CheckpointError(f"{path}: {at}: names that are no text: {listing(odd)}")
            items = {str(k): plain(v, f"{at}/{k}", depth + 1) for k, v in value.items()}
            return {k: v for k, v in items.items() if f"{at}/{k}" not in tensors}
        if isinstance(value, list | tuple):
            return [plain(v, f"{at}/{n}", depth + 1) for n, v in enumerate(value)]
        if value is None or type(value) in (bool, int, float, str):
            return value
        return f"a {type(value).__name__}"  # torch.Size, a dtype: nothing that a config says

    top = {str(key): plain(value, str(key), 1) for key, value in found.items()}
    return tensors, {key: value for key, value in top.items() if key not in tensors}


def _info(path: Path, name: str, value: torch.Tensor) -> TensorInfo:
    stored = value.untyped_storage().nbytes()
    if value.numel() * value.element_size() > stored:
        raise ResourceLimit(
            f"{path}: tensor {name} spreads {stored} stored bytes over shape {tuple(value.shape)}"
        )
    try:
        return TensorInfo(name, tuple(value.shape), dtype_code(value.dtype))
    except DtypeMismatch as error:
        raise DtypeMismatch(f"{path}: tensor {name}: {error}") from None


def _pair(
    path: Path, values: dict[str, torch.Tensor], records: list[_Record]
) -> dict[int, _Record]:
    """Address -> record, for each storage.

    The pickle says how long each storage is, and mapping trusts it. Storages lie in memory as the
    records lie in the file, so if distances and lengths agree, each storage is its record.
    """
    storages = {value.untyped_storage() for value in values.values()}
    lengths = {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}
    ordered = sorted((r for r in records if r.size), key=lambda record: record.start)
    pairs = list(zip(sorted(lengths), ordered, strict=False))
    base = pairs[0][0] - pairs[0][1].start if pairs else 0
    agree = all(p - r.start == base and lengths[p] == r.size for p, r in pairs)
    if not agree or len(lengths) != len(ordered):
        raise CorruptCheckpoint(
            f"{path}: its pickle and its records disagree on where tensors lie or how long they are"
        )
    return dict(pairs)


def _crc(value: torch.Tensor) -> int:
    import torch

    raw = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy()
    crc = 0
    for start in range(0, len(raw), _CHUNK):
        crc = zlib.crc32(raw[start : start + _CHUNK].data, crc)
    return crc


# --- writing -------------------------------------------------------------------------------------

_ROOT = "archive"
_ALIGNMENT = 64  # as torch.save has it, so that what is mapped can be used as it lies
_WIDE = 0xFFFFFFFF
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_TAIL = struct.Struct("<4s4H2LH")
_TAIL_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
}


class _Entry:
    """A record to be: its header in front of it, and what the directory says of it."""

    def __init__(self, name: str, size: int, at: int, crc: int | None = None) -> None:
        self.name, self.size, self.at, self.crc = f"{_ROOT}/{name}".encode(), size, at, crc
        wide = struct.pack("<2H2Q", 1, 16, size, size) if size >= _WIDE else b""
        pad = -(at + _LOCAL.size + len(self.name) + len(wide) + 4) % _ALIGNMENT
        self.extra = wide + struct.pack("<2sH", b"FB", pad) + b"Z" * pad
        self.start = at + _LOCAL.size + len(self.name) + len(self.extra)
        self.end = self.start + size

    def local(self, crc: int) -> bytes:
        size = min(self.size, _WIDE)
        sizes = (crc, size, size, len(self.name), len(self.extra))
        return _LOCAL.pack(_MAGIC, 45, 0x800, 0, 0, 0x21, *sizes) + self.name + self.extra

    def central(self, crc: int) -> bytes:
        size, at = min(self.size, _WIDE), min(self.at, _WIDE)
        wide = [self.size] * 2 if self.size >= _WIDE else []
        wide += [self.at] if self.at >= _WIDE else []
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        lengths = (len(self.name), len(extra), 0, 0, 0, 0, at)
        head = (b"PK\x01\x02", 45, 45, 0x800, 0, 0, 0x21, crc, size, size, *lengths)
        return _CENTRAL.pack(*head) + self.name + extra


def lay_out(
    infos: Sequence[TensorInfo],
    names: Mapping[str, str],
    *,
    within: str = "",
    values: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Layout:
    """What torch.save would make of these tensors, below `within` and beside `values` if given.

    `names` are those in the file; `aliases` are further ones, of arrays that have a name already.
    """
    keys = {info.name: str(n) for n, info in enumerate(infos)}
    tensors = {names[info.name]: _Stub(keys[info.name], info) for info in infos}
    tensors |= {other: tensors[name] for other, name in (aliases or {}).items()}
    data = _pickled({within: tensors, **(values or {})} if within else tensors)
    head, at = b"", 0
    written: list[_Entry] = []
    for name, content in (("data.pkl", data), ("byteorder", b"little")):
        written.append(_Entry(name, len(content), at, zlib.crc32(content)))
        head += written[-1].local(zlib.crc32(content)) + content
        at = written[-1].end
    records: dict[str, _Entry] = {}
    for info in infos:
        records[info.name] = _Entry(f"data/{keys[info.name]}", info.nbytes, at)
        at = records[info.name].end
    version = _Entry("version", 2, at, zlib.crc32(b"3\n"))

    def tail(crcs: Mapping[str, int]) -> bytes:
        entries = [(e, e.crc or 0) for e in written]
        entries += [(entry, crcs[name]) for name, entry in records.items()]
        entries.append((version, version.crc or 0))
        directory = b"".join(entry.central(crc) for entry, crc in entries)
        out = version.local(version.crc or 0) + b"3\n" + directory
        place, count = version.end, len(entries)
        if place >= _WIDE or len(directory) >= _WIDE or count >= 0xFFFF:
            counts = (count, count, len(directory), place)
            out += _TAIL_64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, *counts)
            out += _LOCATOR.pack(b"PK\x06\x07", 0, place + len(directory), 1)
        few = min(count, 0xFFFF)
        sizes = (min(len(directory), _WIDE), min(place, _WIDE))
        return out + _TAIL.pack(_END, 0, 0, few, few, *sizes, 0)

    def seal(crcs: Mapping[str, int]) -> list[tuple[int, bytes]]:
        chunks = [(entry.at, entry.local(crcs[name])) for name, entry in records.items()]
        return [*chunks, (version.at, tail(crcs))]

    end = version.at + len(tail(dict.fromkeys(records, 0)))
    starts = {name: entry.start - len(head) for name, entry in records.items()}
    return Layout(head, starts, end - len(head), seal)


class _Storage:
    def __init__(self, key: str, info: TensorInfo) -> None:
        self.key, self.info = key, info


class _Stub:
    """A tensor without its numbers, which pickles as a tensor does."""

    def __init__(self, key: str, info: TensorInfo) -> None:
        self.storage = _Storage(key, info)

    def __reduce__(self) -> tuple[Any, ...]:
        import torch

        shape = tuple(self.storage.info.shape)
        stride = torch.empty(shape, device="meta").stride()
        none: dict[str, Any] = OrderedDict()  # hooks
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, stride, False, none)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        import torch

        if not isinstance(obj, _Storage):
            return None
        kind = getattr(torch, _STORAGES[obj.info.dtype])
        return "storage", kind, obj.key, "cpu", obj.info.numel


def _pickled(data: Any) -> bytes:
    """Without a memo: the bytes depend on the values and on nothing else."""
    out = io.BytesIO()
    pickler = _Pickler(out, protocol=2)
    pickler.fast = True
    pickler.dump(data)
    return out.getvalue()
