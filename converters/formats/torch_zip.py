"""torch's zip files (`.bin`, `.pth`): a pickle read as data, and records read or mapped."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from converters.formats import (
    Layout,
    TensorInfo,
    check_names,
    itemsize,
    named_dtype,
    open_regular,
    stored_zip,
    torch_legacy,
    torch_pickle,
)
from converters.formats.source import SourceFile, memory_of
from converters.formats.stored_zip import END, LOCAL, MAGIC, WIDE
from converters.formats.torch_pickle import Name, StoredArray
from zoo.errors import (
    CheckpointError,
    CorruptCheckpoint,
    DtypeMismatch,
    DuplicateTensor,
    MissingTensors,
    ResourceLimit,
    UnsafePath,
    UnsupportedZip,
    did_you_mean,
    listing,
)

if TYPE_CHECKING:
    import torch

    from converters.lazy import Read

MAX_PICKLE = 64 << 20  # names, shapes and strides: 100 bytes a tensor
MAX_RECORDS = 1 << 20
MAX_DEPTH, MAX_VALUES = 32, 1 << 20  # limits of a nested dict
_BOMB = 64 << 20, 100  # bytes and ratio above which a deflated record is refused


@dataclass(frozen=True, slots=True)
class _Record:
    name: str
    start: int
    size: int
    crc: int | None  # None before torch 1.6


class TorchZipReader:
    """A file of torch.save: structure and pickle are checked when opened, a CRC with its tensor.

    Listing a file therefore reads no weights and needs no torch; every tensor returned is checked.
    """

    def __init__(self, path: Path, mmap: bool | None = None, *, nested: bool = False) -> None:
        """Open a file.

        Args:
            path: The file.
                mmap: Whether to map it. By default it is read, since torch.save overwrites files in
                use.
            nested: Whether to accept nested dicts and plain values beside tensors, as trainers save
                them. A tensor's name is then its keys joined by `/`.
        """
        self.path = path
        self.metadata: dict[str, str] = {}
        fd = open_regular(path)
        with open(fd, "rb") as file:
            records, tree = _legacy(path, file) or _zipped(path, file)
            self._file = SourceFile(path, fd, mmap is True)
        if not isinstance(tree, dict):
            kind = "Tensor" if isinstance(tree, StoredArray) else type(tree).__name__
            raise CheckpointError(f"{path}: holds a {kind}; expected a dict of tensors")
        self.values: dict[str, Any] = {}
        self._tree = tree
        if nested:
            self._arrays, self.values = _flattened(path, tree)
        else:
            self._arrays = _only_tensors(path, tree)
        self.tensors = {name: _info(path, name, array) for name, array in self._arrays.items()}
        check_names(path, self.tensors)
        self._records = _pair(path, self._arrays, records)
        self._unchecked = {key for key, record in self._records.items() if record.crc is not None}
        names = Counter(array.storage.key for array in self._arrays.values())
        self._shared = {key for key, count in names.items() if count > 1}
        self._whole: dict[tuple[str, str], torch.Tensor] = {}

    @property
    def keys(self) -> set[Any]:
        """The keys of the outermost dict."""
        return set(self._tree)

    def tree(self) -> dict[Any, Any]:
        """Return everything in a nested file as it was saved, with its tensors."""

        def whole(value: Any, at: str) -> Any:
            if isinstance(value, StoredArray):
                return self.tensor(at)
            if isinstance(value, dict):
                return {key: whole(v, f"{at}/{key}") for key, v in value.items()}
            if type(value) in (list, tuple):
                return type(value)(whole(v, f"{at}/{n}") for n, v in enumerate(value))
            if value is None or type(value) in (bool, int, float, str):
                return value
            kind = value.text if isinstance(value, Name) else type(value).__name__
            raise CheckpointError(f"{self.path}: {at}: {kind.replace(' ', '.')} is no plain value")

        return {key: whole(value, str(key)) for key, value in self._tree.items()}

    def place(self, name: str) -> object:
        """Return a value that is equal for two names of one array."""
        array = self._arrays[name]
        return array.storage.key, array.offset, array.shape, array.stride

    def tensor(self, name: str) -> torch.Tensor:
        """Return a view of its storage; names that shared a storage still do."""
        array = self._arrays.get(name)
        if array is None:
            near = did_you_mean(name, self.tensors)
            raise MissingTensors(f"{self.path}: has no tensor {name}.{near}")
        whole = self._storage(array.storage.key, self.tensors[name].dtype)
        self._check(name, whole)
        return whole.as_strided(array.shape, array.stride, array.offset)

    def decoder(self, name: str) -> Read | None:
        """Return what reads a box of a tensor; None if `tensor` is a view of a map."""
        import torch

        array, (_, shape, dtype) = self._arrays[name], self.tensors[name]
        record = self._records.get(array.storage.key)
        if record is None or array.stride != torch.empty(shape, device="meta").stride():
            return None
        self._check(name)
        return self._file.boxes(record.start + array.offset * itemsize(dtype), dtype, shape)

    def _check(self, name: str, whole: torch.Tensor | None = None) -> None:
        """Check the CRC of a tensor's record, once."""
        key = self._arrays[name].storage.key
        if key in self._unchecked:
            record = self._records[key]
            if whole is None:
                actual = self._file.crc32(record.start, record.start + record.size)
            else:
                actual = zlib.crc32(memory_of(whole))
            if actual != record.crc:
                raise CorruptCheckpoint(
                    f"{self.path}: tensor {name} (record {record.name}): CRC {actual:08x}, "
                    f"expected {record.crc:08x}. Download or copy the file again."
                )
            self._unchecked.discard(key)  # another thread may have checked it too

    def _storage(self, key: str, dtype: str) -> torch.Tensor:
        """Return all numbers of a record; keep them if names share them or they are mapped."""
        if (cached := self._whole.get((key, dtype))) is not None:
            return cached
        record = self._records.get(key) or _Record("", 0, 0, 0)  # an empty tensor has no record
        size = itemsize(dtype)
        whole = self._file.tensor(record.start, dtype, (record.size // size,))
        # a repacked zip may lack torch's alignment; then a mapped record is copied
        if key in self._shared if not self._file.mapped else record.start % size == 0:
            self._whole[key, dtype] = whole
        return whole


def _legacy(path: Path, file: BinaryIO) -> tuple[dict[str, _Record], Any] | None:
    """Return (records with weights, the saved object) of a file from before torch 1.6."""
    if os.pread(file.fileno(), len(torch_legacy.MAGIC), 0) != torch_legacy.MAGIC:
        return None
    tree, places = torch_legacy.read(path, file)
    return {key: _Record(key, *place, None) for key, place in places.items()}, tree


def _zipped(path: Path, file: BinaryIO) -> tuple[dict[str, _Record], Any]:
    """Return (records with weights, the saved object) of a zip."""
    records, data = _records(path, file)
    return records, torch_pickle.read(path, data)


def _records(path: Path, file: BinaryIO) -> tuple[dict[str, _Record], bytes]:
    """Return (records with weights, the pickle), once everything about the zip is checked."""
    fd = file.fileno()
    size = os.fstat(fd).st_size
    _check_kind(path, file.read(len(MAGIC)), size)
    try:
        with zipfile.ZipFile(file) as archive:
            entries, comment = archive.infolist(), archive.comment
    except Exception as error:  # zipfile raises errors of several libraries
        raise CorruptCheckpoint(f"{path}: not a whole zip file: {error}") from None
    if comment or os.pread(fd, 4, size - 22) != END:
        raise CorruptCheckpoint(f"{path}: bytes trail behind its end record")
    _check_directory(path, size, entries)
    records = _check_records(path, fd, size, entries)
    root = _check_names(path, [record.name for record in records])
    above = f"{root}/data/"
    weights = {r.name[len(above) :]: r for r in records if r.name.startswith(above)}
    small = [record for record in records if not record.name.startswith(above)]
    read = {record.name: _checked(path, fd, root, record) for record in small}
    return weights, read[f"{root}/data.pkl"]


def _check_kind(path: Path, head: bytes, size: int) -> None:
    if not head.startswith(MAGIC) or size < 22:
        raise CorruptCheckpoint(
            f"{path}: {size} bytes that are no zip file of torch.save. Truncated, or a Git LFS "
            "pointer? Download or copy it again."
        )


def _check_directory(path: Path, size: int, entries: list[zipfile.ZipInfo]) -> None:
    """Check what the central directory claims before using any of it."""
    if len(entries) > MAX_RECORDS:
        raise ResourceLimit(f"{path}: {len(entries)} records; at most {MAX_RECORDS} are read")
    limit, ratio = _BOMB
    for entry in entries:
        name, parts = entry.filename, entry.filename.split("/")
        if {"", ".", ".."} & set(parts) or "\\" in name or not name.isprintable():
            raise UnsafePath(f"{path}: record {name!r} is not a plain relative path")
        if entry.flag_bits & 0x2041:
            raise UnsupportedZip(f"{path}: record {name} is encrypted")
        if entry.file_size > max(limit, ratio * entry.compress_size):
            raise ResourceLimit(
                f"{path}: record {name} claims to unpack {entry.compress_size} bytes "
                f"into {entry.file_size}"
            )
    if packed := [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]:
        raise UnsupportedZip(
            f"{path}: only stored records are read; compressed are {listing(packed, 5)}. "
            "Save it again with torch.save, or as safetensors."
        )
    if (total := sum(entry.file_size for entry in entries)) > size:
        raise ResourceLimit(f"{path}: its records claim {total} bytes in a file of {size}")
    counts = Counter(entry.filename for entry in entries)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise CorruptCheckpoint(f"{path}: duplicate records: {listing(twice)}")


def _check_records(path: Path, fd: int, size: int, entries: list[zipfile.ZipInfo]) -> list[_Record]:
    """Return where the bytes of each record are; no two overlap."""
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
    """Check one entry of the central directory against its local header."""
    name = entry.filename
    problem = CorruptCheckpoint(f"{path}: record {name}: its two headers disagree")
    local = os.pread(fd, LOCAL.size, entry.header_offset)
    if len(local) < LOCAL.size or entry.compress_size != entry.file_size:
        raise problem
    magic, _, flags, method, _, _, crc, packed, unpacked, name_size, extra = LOCAL.unpack(local)
    here = os.pread(fd, name_size, entry.header_offset + LOCAL.size)
    if magic != MAGIC or method != zipfile.ZIP_STORED or here != name.encode():
        raise problem
    if not flags & 8 and (crc != entry.CRC or {packed, unpacked} - {entry.file_size, WIDE}):
        raise problem  # with flag 8 these three fields follow the data
    start = entry.header_offset + LOCAL.size + name_size + extra
    return _Record(name, start, entry.file_size, entry.CRC)


def _check_names(path: Path, names: list[str]) -> str:
    """Return the folder of all records; refuse records that torch.save does not write."""
    roots = [name[: -len("/data.pkl")] for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0]:
        raise CorruptCheckpoint(f"{path}: a zip, but not torch.save's: no single data.pkl in it")
    root = roots[0]
    expected = re.compile(
        re.escape(root) + r"/(data\.pkl|data/\d+|version|byteorder|\.[\w.]+(/[\w.]+)?)"
    )
    if strange := [name for name in names if not expected.fullmatch(name)]:
        raise UnsupportedZip(
            f"{path}: records that no dict of tensors has: {listing(strange)}. "
            "A TorchScript archive? Save its state_dict() instead."
        )
    return root


def _checked(path: Path, fd: int, root: str, record: _Record) -> bytes:
    """Return a record without weights, once its CRC is right; check the byte order."""
    if record.size > MAX_PICKLE:
        raise ResourceLimit(
            f"{path}: record {record.name} has {record.size} bytes; at most {MAX_PICKLE} are read"
        )
    data = os.pread(fd, record.size, record.start)
    if zlib.crc32(data) != record.crc:
        raise CorruptCheckpoint(f"{path}: record {record.name}: wrong CRC. Download it again.")
    if record.name == f"{root}/byteorder" and data != b"little":
        raise UnsupportedZip(
            f"{path}: saved in byte order {data[:20]!r}; only little-endian is read"
        )
    return data


def _only_tensors(path: Path, tree: dict[Any, Any]) -> dict[str, StoredArray]:
    """Return the dict of tensors; refuse anything else with its likely cause."""
    strange = {k: v for k, v in tree.items() if not isinstance(v, StoredArray)}
    for key, value in strange.items():
        if isinstance(value, dict) and any(isinstance(v, StoredArray) for v in value.values()):
            raise MissingTensors(
                f"{path}: the tensors are nested under {key!r}, as a trainer leaves them. "
                f"Save that part alone: torch.save(checkpoint[{key!r}], ...)"
            )
    if strange:
        kinds = listing(f"{key} ({type(value).__name__})" for key, value in strange.items())
        raise CheckpointError(
            f"{path}: values that are no tensors: {kinds}. Save the others alone."
        )
    if names := [repr(key) for key in tree if not isinstance(key, str)]:
        raise CheckpointError(f"{path}: names that are no text: {listing(names)}")
    return tree


def _flattened(path: Path, tree: dict[Any, Any]) -> tuple[dict[str, StoredArray], dict[str, Any]]:
    """Return (tensors by the keys that lead to them, everything else as plain data)."""
    tensors: dict[str, StoredArray] = {}
    seen = 0

    def plain(value: Any, at: str, depth: int) -> Any:
        nonlocal seen
        seen += 1  # one object in a pickle's memo may occur in many places
        if depth > MAX_DEPTH or seen > MAX_VALUES:
            raise ResourceLimit(
                f"{path}: {at}: deeper than {MAX_DEPTH} levels, or over {MAX_VALUES} values"
            )
        if isinstance(value, StoredArray):
            if at in tensors:
                raise DuplicateTensor(f"{path}: two tensors are called {at}")
            tensors[at] = value
            return None
        if isinstance(value, dict):
            if strange := [repr(key)[:60] for key in value if type(key) not in (str, int)]:
                raise CheckpointError(f"{path}: {at}: names that are no text: {listing(strange)}")
            items = {str(k): plain(v, f"{at}/{k}", depth + 1) for k, v in value.items()}
            return {k: v for k, v in items.items() if f"{at}/{k}" not in tensors}
        if type(value) in (list, tuple):
            return [plain(v, f"{at}/{n}", depth + 1) for n, v in enumerate(value)]
        if value is None or type(value) in (bool, int, float, str):
            return value
        # torch.Size, a dtype: nothing that a config has
        return f"a {value.last if isinstance(value, Name) else type(value).__name__}"

    top = {str(key): plain(value, str(key), 1) for key, value in tree.items()}
    return tensors, {key: value for key, value in top.items() if key not in tensors}


def _info(path: Path, name: str, array: StoredArray) -> TensorInfo:
    code, storage_code = named_dtype(array.dtype), named_dtype(array.storage.dtype)
    if code is None or storage_code is None:
        dtype = array.dtype if code is None else array.storage.dtype
        fault = f"torch.{dtype}: no checkpoint format has a code for this dtype"
        raise DtypeMismatch(f"{path}: tensor {name}: {fault}")
    info, stored = TensorInfo(name, array.shape, code), array.storage.numel * itemsize(storage_code)
    if info.nbytes > stored:
        raise ResourceLimit(
            f"{path}: tensor {name} spreads {stored} stored bytes over shape {array.shape}"
        )
    last = array.offset + sum(
        (n - 1) * step for n, step in zip(array.shape, array.stride, strict=True)
    )
    if info.numel and (last + 1) * itemsize(code) > stored:
        raise CorruptCheckpoint(
            f"{path}: tensor {name}: shape {array.shape}, steps of {array.stride} from "
            f"{array.offset} on, reach beyond the {stored} bytes of its storage"
        )
    return info


def _pair(
    path: Path, arrays: Mapping[str, StoredArray], records: Mapping[str, _Record]
) -> dict[str, _Record]:
    """Return storage -> record: of the size in the pickle, and none unnamed."""
    sizes = {
        (array.storage.key, array.storage.numel * itemsize(named_dtype(array.storage.dtype) or ""))
        for array in arrays.values()
    }
    if {(k, n) for k, n in sizes if n} != {(k, r.size) for k, r in records.items() if r.size}:
        raise CorruptCheckpoint(
            f"{path}: its pickle and its records disagree on positions or sizes of tensors"
        )
    return {key: records[key] for key, size in sizes if size}


# --- writing -------------------------------------------------------------------------------------

_ROOT = "archive"
_STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
}


def lay_out(
    infos: Sequence[TensorInfo],
    names: Mapping[str, str],
    *,
    within: str = "",
    values: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Layout:
    """Lay out the file that torch.save would write of these tensors.

    Args:
        infos: The tensors.
        names: Tensor -> name in the file.
        within: The key that the dict of tensors is under, if any.
        values: Plain values beside it.
        aliases: Further name -> name in the file of the same array.
    """
    keys = {info.name: str(n) for n, info in enumerate(infos)}
    tensors = {names[info.name]: _Stub(keys[info.name], info) for info in infos}
    tensors |= {other: tensors[name] for other, name in (aliases or {}).items()}
    data = _pickled({within: tensors, **(values or {})} if within else tensors)
    return stored_zip.lay_out(
        _ROOT,
        {"data.pkl": data, "byteorder": b"little"},
        {info.name: (f"data/{keys[info.name]}", info.nbytes) for info in infos},
        {"version": b"3\n"},
    )


class _Storage:
    def __init__(self, key: str, info: TensorInfo) -> None:
        self.key, self.info = key, info


class _Stub:
    """A tensor without numbers that pickles like a tensor."""

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
    """Pickle without a memo: the bytes depend on the values only."""
    out = io.BytesIO()
    pickler = _Pickler(out, protocol=2)
    pickler.fast = True
    pickler.dump(data)
    return out.getvalue()
