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
    """What every format provides: the tensors of one file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor: a view of a mapped file, or a copy."""

    def decoder(self, name: str) -> Read | None:
        """Return what reads or decodes a box of a tensor; None if `tensor` is a view of a map."""


@dataclass(frozen=True)
class Checkpoint:
    """Names, shapes and dtypes of all tensors; values are mapped or read when asked for.

    `open_checkpoint` makes one from a directory.
    """

    root: Path
    format: str
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo] = field(repr=False)
    where: dict[str, str] = field(repr=False)  # tensor -> file name
    metadata: dict[str, str]
    unlisted: tuple[str, ...] = ()  # shards in the directory that the index does not name
    shared: dict[str, str] = field(
        default_factory=dict, repr=False
    )  # name -> earlier name of the same array
    outside: dict[str, str] = field(default_factory=dict)  # what in the files is not weights -> why
    readers: dict[str, Reader] = field(default_factory=dict, repr=False)  # by file name
    quantized: dict[str, str] = field(
        default_factory=dict, repr=False
    )  # name -> type it is stored in
    made_of: dict[str, tuple[str, ...]] = field(
        default_factory=dict, repr=False
    )  # tensors it is decoded from
    split: dict[str, str] | None = field(
        default=None, repr=False
    )  # tensor -> file to write; None: as read
    biases: frozenset[str] = field(default=frozenset(), repr=False)  # of quantized matrices

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor: a view of a mapped file, or a copy. A write to it changes no file.

        Raises:
            MissingTensors: If there is none of this name.
        """
        if name not in self.where:
            near = did_you_mean(name, self.where)
            raise MissingTensors(f"{self.root}: has no tensor {name}.{near}")
        return self.readers[self.where[name]].tensor(name)

    def spare(self, name: str) -> str:
        """Return why a tensor that no rule maps may be left out; empty if it may not."""
        if name in self.biases and not self.tensor(name).any():
            return "zeros, which some programs write beside every quantized matrix"
        return ""

    def lazy(self, name: str) -> Lazy:
        """Return a tensor as a lazy array: only the parts that are used are decoded or read."""
        read = self.readers[self.where[name]].decoder(name)
        if read is None:
            return Lazy.of(self.tensor(name))
        info = self.tensors[name]
        kind = Decoded if name in self.quantized else FileBacked
        return kind(info.shape, torch_dtype(info.dtype), read)


def shard(infos: Iterable[TensorInfo], max_bytes: int) -> list[tuple[str, list[TensorInfo]]]:
    """Split tensors over files in order, as `save_pretrained` does: (file name, tensors).

    A tensor larger than `max_bytes` gets a file of its own; the file being filled stays open.

    >>> infos = [TensorInfo(name, (4,), "F32") for name in ("a", "b", "c")]
    >>> [(file, [info.name for info in members]) for file, members in shard(infos, 32)]
    [('model-00001-of-00002.safetensors', ['a', 'b']), ('model-00002-of-00002.safetensors', ['c'])]
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
