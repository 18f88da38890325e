"""The plan of a conversion: files to write, their headers, and where each tensor comes from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from converters.formats import Layout, TensorInfo
from converters.formats.safetensors import lay_out
from converters.weight_files import INDEX, SINGLE

if TYPE_CHECKING:
    from converters.block_codes import Coding
    from converters.lazy import Lazy

_EXACT = {  # dtypes that hold every number of a dtype
    "F16": ("F16", "F32", "F64"),
    "BF16": ("BF16", "F32", "F64"),
    "F32": ("F32", "F64"),
    "F64": ("F64",),
}


ZEROS = "zeros"  # the rule of a tensor that exists only because the dialect requires it
Identity = tuple[int, int, int, int, int]


class FileSpan(NamedTuple):
    """Bytes that are contiguous in a file."""

    path: Path
    start: int


@dataclass(frozen=True)
class Item:
    """A tensor to write: what `make` returns, or the bytes at `span` if they can be copied."""

    info: TensorInfo
    rule: str
    make: Callable[[], Lazy]
    span: FileSpan | None = None
    stored: str = ""  # its dtype before a cast
    coding: Coding | None = None  # how the file encodes its numbers, if at all
    decoded: bool = False  # the source stores it in fewer bits
    source: str = ""  # file and tensors that it is made from, for messages

    @property
    def name(self) -> str:
        """Its name in the file."""
        return self.info.name

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return self.coding.nbytes(self.info.numel) if self.coding else self.info.nbytes

    @property
    def lossy(self) -> bool:
        """Whether the file holds less precision than the source."""
        if self.coding is not None:
            return True
        return bool(self.stored) and self.info.dtype not in _EXACT[self.stored]

    def cast(self, dtype: str) -> Item:
        """Return the item in another dtype."""
        if dtype == self.info.dtype:
            return self
        info = TensorInfo(self.info.name, self.info.shape, dtype)
        return replace(self, info=info, span=None, stored=self.info.dtype)


@dataclass(frozen=True, eq=False)
class Shard:
    """A file of tensors, in the order of their bytes."""

    name: str
    items: tuple[Item, ...]
    layout: Layout

    @classmethod
    def of(cls, name: str, items: Iterable[Item], metadata: Mapping[str, str] | None) -> Shard:
        """Lay out a safetensors file of these tensors."""
        items = list(items)
        by_name = {item.name: item for item in items}
        layout = lay_out([item.info for item in items], metadata, name)
        return cls(name, tuple(by_name[n] for n in layout.starts), layout)

    def start(self, item: Item) -> int:
        """Return the position of a tensor's bytes in the file."""
        return len(self.layout.head) + self.layout.starts[item.name]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.layout.head) + self.layout.size


@dataclass(frozen=True)
class Output:
    """All files of a directory, and what they are made from."""

    shards: tuple[Shard, ...]
    texts: Mapping[str, bytes] = field(default_factory=dict)  # file -> content
    carried: Mapping[str, Path] = field(default_factory=dict)  # file -> source
    sources: tuple[Path, ...] = ()
    hashed: tuple[Path, ...] | None = None  # sources to hash; None: all
    notes: Mapping[str, Any] = field(default_factory=dict)  # fields of the manifest: spec, options
    seen: Mapping[Path, Identity] = field(default_factory=dict)  # the sources at planning

    def part(self, number: int, parts: int) -> Output:
        """Return one share of the files: the largest first, each to the share with least."""
        shares: list[list[Shard]] = [[] for _ in range(parts)]
        loads = [0] * parts
        for shard in sorted(self.shards, key=lambda s: (-s.size, s.name)):
            least = loads.index(min(loads))
            shares[least].append(shard)
            loads[least] += shard.size
        mine = set(shares[number - 1])
        hashed = self.sources[number - 1 :: parts]
        shards = tuple(shard for shard in self.shards if shard in mine)
        return replace(self, shards=shards, hashed=hashed, texts={}, carried={})

    def sizes(self) -> dict[str, int]:
        """Return file -> bytes."""
        sizes = {shard.name: shard.size for shard in self.shards}
        sizes |= {name: len(text) for name, text in self.texts.items()}
        return sizes | {name: path.stat().st_size for name, path in self.carried.items()}

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes().values())

    def job(self) -> str:
        """Return a digest of this output, as far as it is determined without reading weights."""
        shards = [
            [s.name, s.layout.head.hex(), [_job_row(item) for item in s.items]] for s in self.shards
        ]
        texts = {name: hashlib.sha256(text).hexdigest() for name, text in self.texts.items()}
        carried = {name: hash_file(path) for name, path in self.carried.items()}
        return digest([shards, texts, carried, self.notes])

    def identity(self) -> list[list[Any]]:
        """Return the identities of the sources without the device, which differs by machine."""
        return [[path.name, *seen[1:]] for path, seen in self.seen.items()]


def _job_row(item: Item) -> list[str]:
    row = [item.name, item.rule, item.stored]
    return [*row, item.coding.name] if item.coding is not None else row


def identity(status: os.stat_result) -> Identity:
    """Return what shows whether a file was changed: any change moves its ctime."""
    s = status
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def digest(data: Any) -> str:
    """Return the SHA-256 of data as canonical JSON."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def index_of(shards: Sequence[Shard]) -> dict[str, bytes]:
    """Return model.safetensors.index.json, unless there is only one file of the usual name."""
    if [shard.name for shard in shards] == [SINGLE]:
        return {}
    infos = [item.info for shard in shards for item in shard.items]
    sizes = {
        "total_parameters": sum(info.numel for info in infos),
        "total_size": sum(info.nbytes for info in infos),
    }
    weight_map = {item.name: shard.name for shard in shards for item in shard.items}
    data = {"metadata": sizes, "weight_map": weight_map}
    return {INDEX: (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()}
