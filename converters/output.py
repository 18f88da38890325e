"""What a conversion is to write: files, their headers, and where each tensor's bytes come from."""

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

_EXACT = {  # what a dtype's numbers can all be written in
    "F16": ("F16", "F32", "F64"),
    "BF16": ("BF16", "F32", "F64"),
    "F32": ("F32", "F64"),
    "F64": ("F64",),
}


ZEROS = "zeros"  # the rule of what is there only because its dialect has no word for without
Identity = tuple[int, int, int, int, int]


class FileSpan(NamedTuple):
    """Bytes that lie in one piece in a file."""

    path: Path
    start: int


@dataclass(frozen=True)
class Item:
    """A tensor of the output: what `make` gives, and the bytes of `span` where they lie as such."""

    info: TensorInfo
    rule: str
    make: Callable[[], Lazy]
    span: FileSpan | None = None
    stored: str = ""  # the dtype it had, where it is cast
    coding: Coding | None = None  # how the file holds its numbers, if not as they are
    decoded: bool = False  # from numbers that the source holds in fewer bits
    source: str = ""  # the file and the tensors in it that it is made of, for messages

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def nbytes(self) -> int:
        """In the file."""
        return self.coding.nbytes(self.info.numel) if self.coding else self.info.nbytes

    @property
    def lossy(self) -> bool:
        if self.coding is not None:
            return True
        return bool(self.stored) and self.info.dtype not in _EXACT[self.stored]

    def cast(self, dtype: str) -> Item:
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
        items = list(items)
        by_name = {item.name: item for item in items}
        layout = lay_out([item.info for item in items], metadata, name)
        return cls(name, tuple(by_name[n] for n in layout.starts), layout)

    def start(self, item: Item) -> int:
        return len(self.layout.head) + self.layout.starts[item.name]

    @property
    def size(self) -> int:
        return len(self.layout.head) + self.layout.size


@dataclass(frozen=True)
class Output:
    """All files of a directory, and what they are made of."""

    shards: tuple[Shard, ...]
    texts: Mapping[str, bytes] = field(default_factory=dict)  # written as they are
    carried: Mapping[str, Path] = field(default_factory=dict)  # copied as they are
    sources: tuple[Path, ...] = ()
    hashed: tuple[Path, ...] | None = None  # those of them that are: all
    notes: Mapping[str, Any] = field(default_factory=dict)  # spec, options: what the manifest names
    seen: Mapping[Path, Identity] = field(default_factory=dict)  # sources as they were planned with

    def part(self, number: int, parts: int) -> Output:
        """A share of the files: the largest first, each to whoever has least."""
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
        """file -> bytes"""
        sizes = {shard.name: shard.size for shard in self.shards}
        sizes |= {name: len(text) for name, text in self.texts.items()}
        return sizes | {name: path.stat().st_size for name, path in self.carried.items()}

    @property
    def size(self) -> int:
        return sum(self.sizes().values())

    def job(self) -> str:
        """What tells this output from any other, as far as can be known without reading weights."""
        shards = [
            [s.name, s.layout.head.hex(), [_job_row(item) for item in s.items]] for s in self.shards
        ]
        texts = {name: hashlib.sha256(text).hexdigest() for name, text in self.texts.items()}
        carried = {name: hash_file(path) for name, path in self.carried.items()}
        return digest([shards, texts, carried, self.notes])

    def identity(self) -> list[list[Any]]:
        """Without the device, whose number is another on another machine."""
        return [[path.name, *seen[1:]] for path, seen in self.seen.items()]


def _job_row(item: Item) -> list[str]:
    row = [item.name, item.rule, item.stored]
    return [*row, item.coding.name] if item.coding is not None else row


def identity(status: os.stat_result) -> Identity:
    """What says whether a file is still the one that it was: a change of any kind moves ctime."""
    s = status
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def digest(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def index_of(shards: Sequence[Shard]) -> dict[str, bytes]:
    """model.safetensors.index.json, where there is more than the one file of the usual name."""
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
