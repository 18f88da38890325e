"""Files of weights without an index: recognized by their bytes, and grouped into checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from converters.checkpoint import Checkpoint, Reader
from converters.formats import TensorInfo, open_regular
from converters.paths import confined
from zoo.errors import (
    AmbiguousCheckpoint,
    CheckpointError,
    MissingShard,
    SourceError,
    listing,
)

if TYPE_CHECKING:
    import torch

    from converters.lazy import Read
    from converters.spec import Container

_SHARD = re.compile(r"(.*\.)(\d\d)(\.\w+)")
_DATA = re.compile(r"\.data-\d{5}-of-\d{5}$")  # of a bundle
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.")


class Format(NamedTuple):
    """A format that is recognized by a file's bytes.

    `open` returns the readers of a file and of those that belong to it. Besides the methods of
    every `Reader` they may have `values` (metadata), `span` (where a tensor's bytes are in the
    file; None if they are not contiguous), `quantized` (tensor -> type it is stored in), `size`
    (bytes of a tensor), `place` (equal for two names of one array) and `files` (all files that
    they read).
    """

    module: str
    open: Callable[[Any, Path, bool | None], list[tuple[Path, Any]]]
    about: str
    is_: Callable[[bytes, bytes, int], bool]  # of its first and last bytes and its size
    meant: Callable[[Any, Path], Path] | None = None  # the file that a directory names as current


def _is_llama2c(head: bytes, tail: bytes, size: int) -> bool:
    from converters.formats.llama2c import recognizes

    return recognizes(head, size)


FORMATS: dict[str, Format] = {
    "torch": Format(
        "torch_zip",
        lambda module, path, mmap: [(path, module.TorchZipReader(path, mmap, nested=True))],
        "a file of torch.save",
        lambda head, tail, size: head.startswith((b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF")),
    ),
    "gguf": Format(
        "gguf",
        lambda module, path, mmap: [
            (path.parent / name, reader) for name, reader in module.open_gguf(path, mmap).items()
        ],
        "GGUF",
        lambda head, tail, size: head.startswith(b"GGUF"),
    ),
    "tf": Format(
        "tf_bundle",
        lambda module, path, mmap: [(path, module.TFBundleReader(path, mmap))],
        "TensorFlow's bundle (.index)",
        lambda head, tail, size: tail.endswith(bytes.fromhex("57fb808b247547db")),
        lambda module, place: module.find_bundle(place),
    ),
    # no magic number, so it is tried last
    "llama2c": Format(
        "llama2c",
        lambda module, path, mmap: [(path, module.Llama2cReader(path, mmap))],
        "llama2.c's .bin",
        _is_llama2c,
    ),
}


def index_of(path: Path) -> Path | None:
    """Return the index of a TensorFlow bundle from its prefix or one of its data files."""
    if path.name:
        index = path.with_name(_DATA.sub("", path.name) + ".index")
        if os.path.isfile(index) and kind_of(index) == "tf":
            return index
    return None


def kind_of(path: Path) -> str | None:
    """Return the format of a file by its bytes; None if it is unknown."""
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        head, tail = os.pread(fd, 512, 0), os.pread(fd, 512, max(0, size - 512))
    finally:
        os.close(fd)
    return next((name for name, form in FORMATS.items() if form.is_(head, tail, size)), None)


class FileSet(NamedTuple):
    """Files of one format that form one checkpoint."""

    kind: str
    readers: tuple[tuple[Path, Any], ...]

    @property
    def values(self) -> Mapping[str, Any]:
        """Metadata of the first file."""
        values: Mapping[str, Any] = getattr(self.readers[0][1], "values", {})
        return values

    def checkpoint(self, container: Container) -> Checkpoint | None:
        """Return the tensors under the names of a dialect.

        The result is None if the key above them in the file is missing.
        """
        tensors: dict[str, TensorInfo] = {}
        where: dict[str, str] = {}
        shared: dict[str, str] = {}
        outside: dict[str, str] = {}
        readers: dict[str, Reader] = {}
        quantized: dict[str, str] = {}
        for number, (path, reader) in enumerate(self.readers):
            key = _key(container.within, reader.tensors)
            if key is None:
                return None
            above = f"{key}/" if key else ""
            before = f"{number}/" if container.sharded else ""
            names = {
                before + name[len(above) :]: name
                for name in reader.tensors
                if name.startswith(above)
            }
            for name in reader.tensors:
                if not name.startswith(above):
                    outside[name.partition("/")[0]] = f"not below '{key}'"
            readers[path.name] = _Renamed(reader, names)
            for name, inner in names.items():
                info = reader.tensors[inner]
                tensors[name] = TensorInfo(name, info.shape, info.dtype)
                where[name] = path.name
            coarse = getattr(reader, "quantized", {})
            quantized |= {name: coarse[inner] for name, inner in names.items() if inner in coarse}
            shared |= _shared(reader, names)
        return Checkpoint(
            root=self.readers[0][0].parent,
            format=self.kind,
            files=tuple(f for path, reader in self.readers for f in _files(path, reader)),
            tensors=tensors,
            where=where,
            metadata={},
            readers=readers,
            shared=shared,
            outside=outside,
            quantized=quantized,
        )


def _files(path: Path, reader: Any) -> tuple[Path, ...]:
    files: tuple[Path, ...] = getattr(reader, "files", (path,))
    return files


def _key(within: tuple[str, ...], names: Mapping[str, Any]) -> str | None:
    return next(
        (key for key in within if not key or any(n.startswith(f"{key}/") for n in names)), None
    )


def _shared(reader: Any, names: Mapping[str, str]) -> dict[str, str]:
    """Return name -> an earlier name of the same array."""
    if not hasattr(reader, "place"):
        return {}
    first: dict[object, str] = {}
    owners = {name: first.setdefault(reader.place(inner), name) for name, inner in names.items()}
    return {name: owner for name, owner in owners.items() if name != owner}


class _Renamed:
    """A reader whose tensors have a dialect's names."""

    def __init__(self, reader: Any, names: Mapping[str, str]) -> None:
        self.path: Path = reader.path
        self.metadata: dict[str, str] = {}
        self._reader, self._names = reader, names
        self.tensors = {
            name: TensorInfo(name, *reader.tensors[inner][1:]) for name, inner in names.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        tensor: torch.Tensor = self._reader.tensor(self._names[name])
        return tensor

    def decoder(self, name: str) -> Read | None:
        """Return what reads or decodes a box of a tensor."""
        read: Read | None = self._reader.decoder(self._names[name])
        return read

    def size(self, name: str) -> int:
        """Return the bytes of a tensor in the file."""
        size = getattr(self._reader, "size", None)
        return self.tensors[name].nbytes if size is None else int(size(self._names[name]))

    def span(self, name: str) -> tuple[int, int] | None:
        """Return where a tensor's bytes are, if they are contiguous and plain."""
        span = getattr(self._reader, "span", None)
        if self._names[name] in getattr(self._reader, "quantized", ()):
            return None
        span_in_file: tuple[int, int] | None = span(self._names[name]) if span is not None else None
        return span_in_file


# --- one dtype for all --------------------------------------------------------------------------


def alike(checkpoint: Checkpoint, wide: tuple[str, ...]) -> Checkpoint:
    """Return the checkpoint with all tensors in one dtype.

    Some files hold vectors, and the tensors in `wide`, in F32 by convention. The common dtype is
    that of the others if every number of the vectors is exact in it, otherwise F32.
    """
    from converters.formats import torch_dtype

    tensors = checkpoint.tensors
    kinds = {info.dtype for info in tensors.values()}
    narrow = kinds - {"F32"}
    if len(kinds) == 1 or not kinds <= {"F32", "F16", "BF16"}:
        return checkpoint
    singles = {name: info for name, info in tensors.items() if info.dtype == "F32"}
    kind = next(iter(narrow))
    if len(narrow) > 1 or any(len(i.shape) > 1 and n not in wide for n, i in singles.items()):
        kind = "F32"
    for name in singles if kind != "F32" else ():
        numbers = checkpoint.tensor(name)
        if not bool((numbers.to(torch_dtype(kind)).float() == numbers).all()):
            kind = "F32"
            break
    casts: dict[str, Reader] = {
        path: _Cast(reader, kind) for path, reader in checkpoint.readers.items()
    }
    infos = {name: TensorInfo(name, info.shape, kind) for name, info in tensors.items()}
    return replace(checkpoint, tensors=infos, readers=casts)


class _Cast:
    """A reader whose tensors all have one dtype."""

    def __init__(self, reader: Any, dtype: str) -> None:
        self.path: Path = reader.path
        self.metadata: dict[str, str] = reader.metadata
        self._reader, self._dtype = reader, dtype
        self.tensors = {n: TensorInfo(n, i.shape, dtype) for n, i in reader.tensors.items()}

    def _is_stored_so(self, name: str) -> bool:
        code: str = self._reader.tensors[name].dtype
        return code == self._dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, cast."""
        from converters.formats import torch_dtype

        tensor: torch.Tensor = self._reader.tensor(name)
        return tensor.to(torch_dtype(self._dtype))

    def decoder(self, name: str) -> Read | None:
        """Return what reads a box of a tensor, cast."""
        from converters.formats import torch_dtype

        read: Read | None = self._reader.decoder(name)
        if read is None or self._is_stored_so(name):
            return read
        box, kind = read, torch_dtype(self._dtype)
        return lambda rows, columns: box(rows, columns).to(kind)

    def span(self, name: str) -> tuple[int, int] | None:
        """Return where a tensor's bytes are, if no cast is needed."""
        span: tuple[int, int] | None = self._reader.span(name) if self._is_stored_so(name) else None
        return span


def known_files(root: Path) -> dict[str, str]:
    """Return name -> format of the files in a directory that are recognized."""
    kinds: dict[str, str] = {}
    for name in sorted(os.listdir(root)):
        if name.startswith("."):
            continue
        try:
            kind = kind_of(confined(root, name))
        except (CheckpointError, SourceError):
            continue  # a folder or a link out of this directory
        if kind is not None:
            kinds[name] = kind
    return kinds


def open_place(place: Path, mmap: bool | None = None) -> FileSet | None:
    """Open the checkpoint that a file belongs to or a directory holds.

    Args:
        place: A file or a directory.
        mmap: Whether files are mapped or read when a tensor is used; None leaves it to the format.

    Returns:
        The files, or None if none is recognized.

    Raises:
        AmbiguousCheckpoint: If a directory holds several checkpoints.
        MissingShard: If one of several files is missing.
    """
    single = not place.is_dir()
    root = place.parent if single else place
    kinds = known_files(root)
    if single:
        kind = kind_of(confined(root, place.name))
        kinds = {} if kind is None else {place.name: kind}
    if not kinds:
        return None
    kind, first = next(iter(kinds.values())), next(iter(kinds))
    form = FORMATS[kind]
    module = import_module(f"converters.formats.{form.module}")
    if set(kinds.values()) == {kind} and _SPLIT.search(
        first
    ):  # a split names its other files itself
        together = form.open(module, confined(root, first), mmap)
        if kinds.keys() <= {path.name for path, _ in together}:
            return FileSet(kind, tuple(together))
    if form.meant is not None and set(kinds.values()) == {kind}:
        names = [form.meant(module, place).name]
    else:
        names = _shards(root, sorted(kinds))
    every = [pair for name in names for pair in form.open(module, confined(root, name), mmap)]
    return FileSet(kind, tuple(every))


def _shards(root: Path, names: list[str]) -> list[str]:
    """Return the files of one checkpoint in order: one, or all that are numbered from 00 on."""
    matches = [_SHARD.fullmatch(name) for name in names]
    stems = {match.group(1, 3) for match in matches if match is not None}
    if None in matches or len(stems) != 1:
        if len(names) > 1:
            raise AmbiguousCheckpoint(
                f"{root}: several files of weights, {listing(names)}, and nothing says which is "
                "meant: give that file"
            )
        return names
    before, after = next(iter(stems))
    alike = [m for name in os.listdir(root) if (m := _SHARD.fullmatch(name))]
    there = {int(m.group(2)) for m in alike if m.group(1, 3) == (before, after)}
    every = [f"{before}{n:02}{after}" for n in range(max(there) + 1)]
    if missing := [name for n, name in enumerate(every) if n not in there]:
        raise MissingShard(
            f"{root}: {len(missing)} of {len(every)} files are missing: {listing(missing)}"
        )
    return every


def known_formats() -> str:
    """Return the names of all formats, for messages."""
    return ", ".join(form.about for form in FORMATS.values())
