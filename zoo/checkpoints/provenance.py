"""Where a model's weights came from, by which rules, and whether those files have changed since."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from converters.checkpoint import SINGLE, Checkpoint
from converters.formats import TensorInfo, open_regular
from converters.formats.source import Stamp, stamp
from converters.paths import is_plain
from converters.plan import Plan
from converters.weight_files import MANIFEST
from zoo.checkpoints.handle import Located
from zoo.components.model import Model
from zoo.errors import SourceChanged, listing, option


class Origin(NamedTuple):
    """A checkpoint before its conversion: enough to restore it byte for byte."""

    dialect: str
    reference_class: str | None
    config: str  # config.json, verbatim
    header: Mapping[str, TensorInfo]
    where: Mapping[str, str]  # tensor -> file
    metadata: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return what zoo.json records; `from_json` reads it."""
        tensors = {
            name: [info.dtype, list(info.shape), self.where.get(name, SINGLE)]
            for name, info in self.header.items()
        }
        return {
            "dialect": self.dialect,
            "class": self.reference_class,
            "config": self.config,
            "metadata": dict(self.metadata),
            "tensors": tensors,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Origin:
        """Read what `to_json` wrote; a ValueError refuses file names that are not plain."""
        tensors = data["tensors"]
        return cls(
            dialect=data["dialect"],
            reference_class=data["class"],
            config=data["config"],
            header={n: TensorInfo(n, tuple(s), d) for n, (d, s, _) in tensors.items()},
            where={n: _plain(file) for n, (_, _, file) in tensors.items()},
            metadata=data["metadata"],
        )


def _plain(file: str) -> str:
    if not is_plain(file):
        raise ValueError(f"{file!r} is no file's name")
    return file


@dataclass(frozen=True)
class Provenance:
    """The files and the plan that a model's weights were loaded by."""

    ref: str
    directory: Path
    architecture: str
    files: tuple[Path, ...]
    plan: Plan
    origin: Origin
    config: Any = field(repr=False)  # as the source has it
    dtype: torch.dtype | None = None  # a cast asked for at loading
    repo: str | None = None
    revision: str | None = None
    file: Path | None = None  # the file of weights, if the reference was a file
    ignore_config: tuple[str, ...] = ()  # as it was loaded with
    # native name -> the quantization it was decoded from, now or in an earlier conversion
    quantized: Mapping[str, str] = field(default_factory=dict)
    stamps: dict[Path, Stamp] = field(
        default_factory=dict, repr=False
    )  # of the files when they were loaded

    @property
    def lossy(self) -> str:
        """The quantizations that weights were decoded from; empty if none.

        The original bytes cannot be restored then.
        """
        return listing(sorted(set(self.quantized.values())))

    @property
    def rules(self) -> dict[str, str]:
        """Native name -> the rule that it was loaded by."""
        return self.plan.rule_of()

    @property
    def tokenizer_at(self) -> Path:
        """The file that holds a tokenizer beside the weights, else the directory."""
        return self.files[0] if self.origin.dialect == "gguf" else self.directory

    @property
    def dropped(self) -> Mapping[str, str]:
        """Name on disk -> why it was dropped."""
        return self.plan.dropped

    @cached_property
    def hashes(self) -> dict[str, str]:
        """File -> sha256; read when first asked for, since hashing costs more than loading."""
        digests = {}
        for path in self.files:
            fd = open_regular(path)
            with open(fd, "rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        self.check()  # what was hashed is what was loaded
        return digests

    def changes(self) -> list[str]:
        """List the files that changed since they were loaded; deleted files do not count."""
        changes = list[str]()
        for path, before in self.stamps.items():
            try:
                if (now := stamp(os.stat(path))) != before:
                    changes.append(f"{path}: {_difference(before, now)}")
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:
                changes.append(f"{path}: cannot be looked at any more ({error.strerror})")
        return changes

    def check(self) -> None:
        """Raise SourceChanged if a file changed since it was loaded."""
        if changes := self.changes():
            raise SourceChanged(
                f"{listing(changes)}. The model was loaded from it as it was before: load it again"
            )

    def renew(self, directory: Path) -> None:
        """Take a new stamp of files in a directory, after the model was saved there."""
        real = Path(os.path.realpath(directory))
        for path in list(self.stamps):
            if Path(os.path.realpath(path.parent)).is_relative_to(real):
                del self.stamps[path]
                with suppress(OSError):
                    self.stamps[path] = stamp(os.stat(path))
                self.__dict__.pop("hashes", None)


def _difference(before: Stamp, now: Stamp) -> str:
    """Say how two stamps differ."""
    if before[:2] != now[:2]:
        return "was replaced by another file"
    if before[2] != now[2]:
        return f"was {before[2]} bytes, and is {now[2]}"
    return "was written to"


def check_sources(model: Model) -> None:
    """Refuse to compute with mapped weights where one of the model's files has changed.

    Reading a map beyond the end of a file that was cut kills the process. A file that is gone is no
    change: the map keeps its pages. Without a change this takes one stat a file.
    """
    if model.provenance is None or not (changes := model.provenance.changes()):
        return
    if any(_is_mapped(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise SourceChanged(
            f"{listing(changes)}, while the model's weights are views of it. Load it again; "
            f"{option('mmap', False)} reads weights into memory, and then a file may change"
        )


def _is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor is a view of a mapped file, whose memory is not an allocator's."""
    return tensor.device.type == "cpu" and not tensor.untyped_storage().resizable()


# --- made from a checkpoint and its plan ---------------------------------------------------------


def provenance_of(
    located: Located,
    checkpoint: Checkpoint,
    model: Model,
    plan: Plan,
    dtype: torch.dtype | None = None,
) -> Provenance:
    """Record the files and the plan of a model's weights."""
    return Provenance(
        ref=str(located.source.ref),
        directory=located.source.directory,
        architecture=located.entry.name,
        files=checkpoint.files,
        plan=plan,
        origin=_origin(located, checkpoint, plan),
        # a self-describing file may leave fields open; the file is read again for writing
        config=model.config if located.foreign else located.config(model.config.head),
        dtype=dtype,
        repo=located.source.repo,
        revision=located.source.revision,
        file=located.source.file,
        ignore_config=located.ignore_config,
        quantized=_quantized(located, checkpoint, plan),
        stamps={path: stamp(os.stat(path)) for path in checkpoint.files},
    )


def _quantized(located: Located, checkpoint: Checkpoint, plan: Plan) -> dict[str, str]:
    """Native name -> the quantization it was decoded from, by its files or their manifest."""
    if located.native is not None:
        return dict(located.native.get("quantised") or {})
    kinds_of = dict[str, str]()
    if (located.source.directory / MANIFEST).is_file():
        from converters.manifest import decoded

        kinds_of = decoded(located.source.directory, checkpoint.files)
    for step in plan.steps:
        of_sources = [checkpoint.quantized.get(name, "") for name in step.sources]
        for n, target in enumerate(step.targets):
            mine = of_sources[n : n + 1] if step.transform is None else of_sources
            if kinds := sorted({*mine} - {""}):
                kinds_of[target] = listing(kinds)
    return kinds_of


def _origin(located: Located, checkpoint: Checkpoint, plan: Plan) -> Origin:
    if located.native is not None:
        return Origin.from_json(located.native["origin"])
    left_out = checkpoint.biases & plan.dropped.keys()
    tensors = {n: info for n, info in checkpoint.tensors.items() if n not in left_out}
    modern = {name: plan.modern.get(name, name) for name in tensors}
    # a file may be several times as large when dequantized
    files = checkpoint.where if checkpoint.split is None else checkpoint.split
    return Origin(
        dialect=located.dialect,
        reference_class=located.reference_class,
        config=located.config_text,
        header={modern[name]: info for name, info in tensors.items()},
        where={modern[name]: files[name] for name in tensors},
        # other formats are written as safetensors, with the metadata that the reference expects
        metadata=checkpoint.metadata if checkpoint.format == "safetensors" else {"format": "pt"},
    )
