"""A checkpoint: named tensors in the files of a directory, and how to split them over files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from converters.formats import TensorInfo, torch_dtype
from converters.lazy import Decoded, FileBacked, Lazy, Read
from converters.weight_files import SINGLE
from zoo.errors import MissingTensors, did_you_mean

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5 * 10**9


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
        kind = Decoded if name in self.quantized else FileBacked
        return kind(info.shape, torch_dtype(info.dtype), read)


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
        (f"{stem}-{n:05d}-of-{len(files):05d}.{suffix}", infos_of_file)
        for n, infos_of_file in enumerate(files, 1)
    ]
