"""A directory of weights as one set of named tensors, whatever files it is spread over."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from converters.formats import TensorInfo, torch_dtype
from converters.formats.safetensors import SafetensorsReader
from converters.lazy import Decoded, Lazy, Read, Stored
from converters.strict_json import read_json
from zoo.errors import (
    AmbiguousCheckpoint,
    BadIndex,
    CheckpointError,
    DuplicateTensor,
    MissingShard,
    MissingTensors,
    NotACheckpoint,
    UnsafePath,
    did_you_mean,
    listing,
)

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
MANIFEST = "zoo-manifest.json"
SHARD_BYTES = 5 * 10**9
# format: its single file and its index. The first format that is there wins: published
# repositories hold the same weights in several.
_LAYOUTS = {
    "safetensors": (SINGLE, f"{SINGLE}.index.json"),
    "torch": ("pytorch_model.bin", "pytorch_model.bin.index.json"),
}
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")


class Reader(Protocol):
    """What every format offers."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    def tensor(self, name: str) -> torch.Tensor: ...

    def decoder(self, name: str) -> Read | None:
        """What makes or reads a box of a tensor; None where `tensor` is a view of a map."""


@dataclass(frozen=True)
class Checkpoint:
    """Names, shapes and dtypes of all tensors; their values are mapped or read when asked for."""

    root: Path
    format: str
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo] = field(repr=False)
    where: dict[str, str] = field(repr=False)  # tensor -> file name
    metadata: dict[str, str]
    unlisted: tuple[str, ...] = ()  # shards that lie there and the index does not name
    shared: dict[str, str] = field(default_factory=dict, repr=False)  # name -> earlier, same array
    outside: dict[str, str] = field(default_factory=dict)  # what of the files is no weights, why
    readers: dict[str, Reader] = field(default_factory=dict, repr=False)  # by file name
    quantized: dict[str, str] = field(default_factory=dict, repr=False)  # name -> what it stands in
    made_of: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)  # if of several
    split: dict[str, str] | None = field(default=None, repr=False)  # files to be; None: as it is
    biases: frozenset[str] = field(default=frozenset(), repr=False)  # of what is decoded

    def tensor(self, name: str) -> torch.Tensor:
        """A view of a mapped file, or memory of its own; writing to it changes no file."""
        if name not in self.where:
            near = did_you_mean(name, self.where)
            raise MissingTensors(f"{self.root}: holds no tensor {name}.{near}")
        return self.readers[self.where[name]].tensor(name)

    def spare(self, name: str) -> str:
        """Why a tensor that no rule maps may be left out; empty where it may not."""
        if name in self.biases and not self.tensor(name).any():
            return "zeros, which some programs write beside every quantized matrix"
        return ""

    def lazy(self, name: str) -> Lazy:
        """Likewise; where it has to be decoded or read, only what is looked at is."""
        read = self.readers[self.where[name]].decoder(name)
        if read is None:
            return Lazy.of(self.tensor(name))
        info = self.tensors[name]
        kind = Decoded if name in self.quantized else Stored
        return kind(info.shape, torch_dtype(info.dtype), read)


def open_checkpoint(directory: str | os.PathLike[str], mmap: bool | None = None) -> Checkpoint:
    """The weights in a directory, from headers alone; all faults of a kind are said at once.

    `mmap` says whether they are mapped or read when asked for; None leaves it to their format.
    """
    root = Path(directory)
    names = _names(root)
    for kind, (single, index) in _LAYOUTS.items():
        if index in names:
            weight_map = _read_index(confined(root, index))
            files = sorted(set(weight_map.values()))
            if single in names and files != [single]:
                raise AmbiguousCheckpoint(
                    f"{root}: holds both {single} and {index}, which names other files. "
                    "Remove the one that is not meant."
                )
            return _open(root, kind, files, weight_map, names, mmap)
        if single in names:
            return _open(root, kind, [single], None, names, mmap)
    from converters.containers import known_files

    wanted = [name for layout in _LAYOUTS.values() for name in layout]
    if shards := sorted(name for name in names if _SHARD.fullmatch(name)):
        raise BadIndex(
            f"{root}: holds the shards {listing(shards)} and no index that names them; "
            f"looked for {wanted[1]} and {wanted[3]}"
        )
    here = listing(sorted(names), 10) or "nothing"
    told = f"{root}: no weights. Looked for {', '.join(wanted)}; found {here}"
    if others := known_files(root):
        told += f". Without a config.json they could be those of {listing(others)}: give that file"
    raise NotACheckpoint(told)


def _names(root: Path) -> set[str]:
    try:
        return set(os.listdir(root))
    except OSError as error:
        single = _LAYOUTS["safetensors"][0]
        hint = "; give the directory it lies in" if error.errno == errno.ENOTDIR else ""
        raise NotACheckpoint(
            f"{root}: looked for a directory with {single}, its index or pytorch_model.bin: "
            f"{error.strerror}{hint}"
        ) from None


def _open(
    root: Path,
    kind: str,
    files: Sequence[str],
    weight_map: dict[str, str] | None,
    names: set[str],
    mmap: bool | None,
) -> Checkpoint:
    paths = _locate(root, files)
    readers: dict[str, Reader] = {}
    problems: list[CheckpointError] = []
    for name, path in paths.items():
        try:
            readers[name] = _reader(kind, path, mmap)
        except CheckpointError as error:
            problems.append(error)
    if problems:
        _raise_all(problems)
    where: dict[str, str] = {}
    twice: list[str] = []
    for name, reader in readers.items():
        for tensor in reader.tensors:
            if where.setdefault(tensor, name) != name:
                twice.append(f"{tensor} ({where[tensor]} and {name})")
    if twice:
        raise DuplicateTensor(f"{root}: tensors in two shards: {listing(twice)}")
    if weight_map is not None:
        _check_index(root / _LAYOUTS[kind][1], weight_map, where)
    first = next(iter(readers.values()))
    stem = _LAYOUTS[kind][0].partition(".")[0]
    suffix = _LAYOUTS[kind][0].rpartition(".")[2]
    unlisted = {
        n for n in names if _SHARD.fullmatch(n) and n.startswith(stem) and n.endswith(suffix)
    }
    return Checkpoint(
        root=root,
        format=kind,
        files=tuple(paths.values()),
        tensors={n: info for reader in readers.values() for n, info in reader.tensors.items()},
        where=where,
        metadata=first.metadata,
        unlisted=tuple(sorted(unlisted - paths.keys())),
        readers=readers,
    )


def _reader(kind: str, path: Path, mmap: bool | None) -> Reader:
    if kind == "safetensors":
        return SafetensorsReader(path, mmap)
    from converters.formats.torch_zip import TorchZipReader

    return TorchZipReader(path, mmap)


def _raise_all(problems: Sequence[CheckpointError]) -> NoReturn:
    """One error for several files: the kind of the first, the messages of all."""
    if len(problems) == 1:
        raise problems[0]
    raise type(problems[0])("\n".join(str(problem) for problem in problems))


# --- names and places ----------------------------------------------------------------------------


def is_plain(name: str) -> bool:
    """Whether a file's name stays below the directory it is joined to, as text."""
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and "/".join(parts) == name
        and not name.startswith("/")
        and ".." not in parts
        and "\\" not in name
        and ":" not in parts[0]
        and name.isprintable()
    )


def confined(root: Path, name: str) -> Path:
    """The file in `root`, through links too; UnsafePath if it lies elsewhere or is no regular file.

    The hub's cache is the exception: a snapshot is links into the blobs of its repository.
    """
    path = root / name
    if not is_plain(name):
        raise UnsafePath(f"{root}: {name!r} is no plain relative path")
    try:
        real = Path(os.path.realpath(path, strict=True))
    except (OSError, ValueError) as error:
        linked = " is a link to nothing" if os.path.islink(path) else " is not there"
        raise MissingShard(f"{path}{linked} ({getattr(error, 'strerror', error)})") from None
    home = Path(os.path.realpath(root))
    homes = [home]
    for above in home.parents[:2]:  # a snapshot, or a folder in it
        if above.name == "snapshots":
            homes.append(above.parent / "blobs")
    if not any(real.is_relative_to(allowed) for allowed in homes):
        raise UnsafePath(f"{path}: links to {real}, out of its directory. Copy the file there.")
    if not real.is_file():
        raise UnsafePath(f"{path}: is no regular file, so it was not opened")
    return path


def _locate(root: Path, files: Iterable[str]) -> dict[str, Path]:
    """All files, or everything that is unsafe, or everything that is missing."""
    found: dict[str, Path] = {}
    unsafe: list[CheckpointError] = []
    missing: list[str] = []
    for name in files:
        try:
            found[name] = confined(root, name)
        except UnsafePath as error:
            unsafe.append(error)
        except MissingShard:
            missing.append(f"{name} (a broken link)" if os.path.islink(root / name) else name)
    if unsafe:
        _raise_all(unsafe)
    if missing:
        raise MissingShard(
            f"{root}: {len(missing)} of {len(missing) + len(found)} files are missing: "
            f"{listing(missing)}. Download them again."
        )
    return found


# --- the index -----------------------------------------------------------------------------------


def _read_index(path: Path) -> dict[str, str]:
    data = read_json(path, BadIndex)
    problems: list[str] = []
    weight_map = data.get("weight_map")
    if not isinstance(weight_map, dict):
        problems.append(f"field weight_map is {_kind(weight_map)} where an object is expected")
    elif not weight_map:
        problems.append("field weight_map is empty")
    else:
        problems += [
            f"field weight_map.{name} is {_kind(file)} where a file's name is expected"
            for name, file in weight_map.items()
            if not isinstance(file, str) or not file
        ]
    metadata = data.get("metadata")
    if metadata is None:  # some writers leave it empty, and nothing depends on it
        metadata = {}
    if not isinstance(metadata, dict):
        problems.append(f"field metadata is {_kind(metadata)} where an object is expected")
    else:
        for name in ("total_size", "total_parameters"):
            total = metadata.get(name, 0)
            if type(total) not in (int, float) or total < 0:
                problems.append(f"field metadata.{name} is {_kind(total)}, no size")
    if problems:
        raise BadIndex(f"{path}: {listing(problems)}")
    assert isinstance(weight_map, dict)
    return weight_map


def _kind(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else type(value).__name__


def _check_index(path: Path, weight_map: dict[str, str], where: dict[str, str]) -> None:
    absent = [f"{n} (not in {file})" for n, file in weight_map.items() if where.get(n) != file]
    extra = [f"{n} (in {file})" for n, file in where.items() if n not in weight_map]
    problems = [f"names tensors that their shard lacks: {listing(absent)}"] if absent else []
    problems += [f"leaves out tensors that its shards hold: {listing(extra)}"] if extra else []
    if problems:
        raise BadIndex(f"{path}: {'; '.join(problems)}")


# --- writing -------------------------------------------------------------------------------------


def shard(infos: Iterable[TensorInfo], max_bytes: int) -> list[tuple[str, list[TensorInfo]]]:
    """(file name, tensors), filled in order: the split that `save_pretrained` makes.

    A tensor larger than a whole shard has a file of its own; the file being filled stays open.
    """
    files: list[list[TensorInfo]] = []
    filling: list[TensorInfo] = []
    size = 0
    for info in infos:
        if info.nbytes > max_bytes:
            files.append([info])
            continue
        if size + info.nbytes > max_bytes:
            files.append(filling)
            filling, size = [], 0
        filling.append(info)
        size += info.nbytes
    if filling or not files:
        files.append(filling)
    if len(files) == 1:
        return [(SINGLE, files[0])]
    stem, _, suffix = SINGLE.partition(".")
    return [
        (f"{stem}-{n:05d}-of-{len(files):05d}.{suffix}", held) for n, held in enumerate(files, 1)
    ]


__all__ = [
    "Checkpoint",
    "confined",
    "is_plain",
    "open_checkpoint",
    "read_json",
    "shard",
]
