"""`Located`: a checkpoint whose config was read and whose weights are not opened yet."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from converters.checkpoint import Checkpoint
from converters.opening import open_checkpoint
from converters.spec import Dialect, Spec
from zoo.checkpoints.downloads import naming_damaged_blobs
from zoo.checkpoints.sources import Source
from zoo.errors import ConfigError, ResourceLimit, listing, option
from zoo.registry import Architecture

if TYPE_CHECKING:
    from converters.dialects import DialectMatch
    from converters.quantized.settings import Quantization


class Located(NamedTuple):
    """A checkpoint whose config was read into native fields; `checkpoint()` opens its files."""

    source: Source
    entry: Architecture
    spec: Spec
    heads: tuple[str, ...]  # heads to try: the first that the weights fill is built
    fields: Mapping[str, Any]  # native config fields
    reference_class: str | None
    config_text: str
    native: Mapping[str, Any] | None = None  # zoo.json, where the checkpoint is a native one
    foreign: DialectMatch | None = None  # self-describing files, without config.json
    quantized: Quantization | None = None  # of the matrices, if they are quantized
    configs: Mapping[str, Any] = {}  # head -> its Config
    opened: Checkpoint | None = None  # its files, if the config alone did not suffice
    # adds an adapter's own tensors to those of the files
    extend: Callable[[Checkpoint], Checkpoint] | None = None
    mmap: bool | None = None  # whether weights are mapped; None: if their format is
    ignore_config: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The file or directory, for messages."""
        return str(self.source.file or self.source.directory)

    @property
    def dialect(self) -> str:
        """The name of the dialect that the files are in: native, hf, gguf …"""
        if self.native is not None:
            return "native"
        return "hf" if self.foreign is None else self.foreign.dialect.name

    def checkpoint(self) -> Checkpoint:
        """Open the files: names, shapes and dtypes of all tensors, without their numbers."""
        checkpoint = self._open() if self.opened is None else self.opened
        return checkpoint if self.extend is None else self.extend(checkpoint)

    def _open(self) -> Checkpoint:
        if self.foreign is not None:
            return self.foreign.checkpoint
        with naming_damaged_blobs(self.source.directory):
            checkpoint = open_checkpoint(self.source.directory, self.mmap)
        if self.quantized is None:
            return checkpoint
        from converters.quantized.dequantize import DTYPES, dequantize_checkpoint, has_inputs_first

        config = json.loads(self.config_text)
        dtype = str(config.get("torch_dtype") or config.get("dtype")).removeprefix("torch.")
        transposed = partial(has_inputs_first, self.spec.dialect("hf"))
        return dequantize_checkpoint(checkpoint, self.quantized, transposed, DTYPES.get(dtype))

    def config(self, head: str, changes: Mapping[str, Any] | None = None) -> Any:
        """Return the native Config for a head, with `changes`; cached without any."""
        if not changes and head in self.configs:
            return self.configs[head]
        kind = self.entry.config_class
        if self.foreign is None:
            return kind(**{**self.fields, **(changes or {}), "head": head})
        return self._foreign_config(self.foreign, head, changes or {})

    def _foreign_config(self, foreign: DialectMatch, head: str, changes: Mapping[str, Any]) -> Any:
        """The Config of files that may leave fields open; problems use the dialect's names."""
        kind, dialect = self.entry.config_class, foreign.dialect
        fields = {**self.fields, **dialect.native_names(changes, kind.model_fields)}
        if missing := [name for name in dialect.required if fields.get(name) is None]:
            words = [dialect.reference_field(name) for name in missing]
            unknown = sorted(fields.keys() - kind.model_fields.keys())
            raise ConfigError(
                f"{self.where}: {dialect.container.about if dialect.container else dialect.name}: "
                f"nothing says {listing(words)} (looked in {foreign.config_from} and at the "
                f"shapes of the tensors). Pass {option('config', dict.fromkeys(words, ...))}"
                f"{f', and not {listing(unknown)}' if unknown else ''}"
            )
        try:
            return kind(**{**fields, "head": head})
        except ConfigError as error:
            problems = [as_published(dialect, problem) for problem in error.problems]
            where = foreign.config_from if Path(foreign.config_from).is_file() else self.where
            raise ConfigError("\n  ".join([f"{where}:", *problems]), problems) from None
        except ResourceLimit as error:
            raise ResourceLimit(f"{self.where}: {as_published(dialect, str(error))}") from None


def as_published(dialect: Dialect, problem: str) -> str:
    """Replace the native field's name in a problem by the dialect's."""
    name, _, text = problem.partition(": ")
    return f"{dialect.reference_field(name)}: {text}" if text else problem
