"""Which files a new checkpoint replaces at its destination: those of a checkpoint, no others."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from filecmp import cmp
from functools import lru_cache
from importlib import import_module
from json import dumps, loads
from pathlib import Path, PurePosixPath
from typing import Any

from converters import manifest
from converters.containers import FORMATS, kind_of
from converters.formats.safetensors import SafetensorsReader
from converters.output import Identity, Output, identity
from converters.paths import is_plain
from converters.staging.destination import files_below
from converters.strict_json import read_json
from converters.weight_files import MANIFEST
from zoo.checkpoints.file_names import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    COMPANIONS,
    CONFIG,
    MODULE_WEIGHTS,
    MORE_TEMPLATES,
    NATIVE_FILE,
    PUBLISHED,
    SENTENCE_FILES,
    WEIGHTS,
    module_folders,
)
from zoo.errors import OutputExists, ZooError, listing, option

_WEIGHTS = re.compile(rf"({PUBLISHED.pattern})(\.index\.json)?")
_INDEXES = [index for _, index in WEIGHTS]
_CONFIGS = {CONFIG: ("model_type", "architectures"), NATIVE_FILE: ("architecture",)}  # with a key
_USUAL = {*_CONFIGS, ADAPTER, MANIFEST, *COMPANIONS, *SENTENCE_FILES}


def _exists(what: str) -> OutputExists:
    way_out = f"Use {option('force')} to replace the checkpoint; other files are kept"
    return OutputExists(f"{what}. {way_out}")


@dataclass(frozen=True)
class Replacing:
    """The files of a directory that an output replaces: a `Replaces` of converters.staging.

    With `force`: what a manifest or an index there names, and what has a checkpoint's usual names.
    Without: the writer's own earlier output, if every file of it still has the bytes that were
    written. All other files are kept, and one that would be both kept and written is refused.
    """

    output: Output
    force: bool

    def __call__(self, place: Path) -> frozenset[str]:
        if place.is_symlink() or not place.is_dir():
            self._check_single(place)
            return frozenset()
        below = {name for name, is_directory in files_below(place) if not is_directory}
        self._check_kind(place, below)
        replaced = self._forced(place, below) if self.force else self._own(place, below)
        replaced |= {name for name in below & self._names - replaced if self._is_same(place, name)}
        self._check_names(place, below - replaced)
        return frozenset(below & replaced)

    def without_kept(self, place: Path) -> Output:
        """Return the output without copies whose place holds a file of others, or a changed one."""
        if self.force or place.is_symlink() or not place.is_dir():
            return self.output
        listed = _listed(place)
        carried = {
            name: path
            for name, path in self.output.carried.items()
            if not os.path.lexists(place / name) or _is_intact(place, name, listed)
        }
        return replace(self.output, carried=carried)

    @property
    def _made(self) -> set[str]:
        return {shard.name for shard in self.output.shards} | self.output.texts.keys()

    @property
    def _names(self) -> set[str]:
        return {MANIFEST, *self._made, *self.output.carried}

    def _check_single(self, place: Path) -> None:
        if not self.force:
            raise _exists(f"{place}: exists already")
        if not place.is_symlink() and not is_checkpoint_file(place):
            raise OutputExists(
                f"{place}: a file that is no whole checkpoint, which is never replaced. Move it "
                "away, or write elsewhere"
            )

    def _check_kind(self, place: Path, below: set[str]) -> None:
        """Refuse to write an adapter into a model's directory, or a model into an adapter's."""
        if any(name in ADAPTER_WEIGHTS for name in self._made):
            what, other = "a model", {name for name in below if _WEIGHTS.fullmatch(name)}
            other |= below & {NATIVE_FILE}
        else:
            what, other = "an adapter", below & {ADAPTER, *ADAPTER_WEIGHTS}
        if other:
            raise OutputExists(
                f"{place}: holds {what}, which this does not replace: {listing(sorted(other))}. "
                "Write to another directory, or move it away"
            )

    def _check_names(self, place: Path, kept: set[str]) -> None:
        names = self._names
        above = {str(folder) for name in names for folder in PurePosixPath(name).parents}
        clashes = [
            name
            for name in sorted(kept)
            if name in names or name in above or names & set(map(str, PurePosixPath(name).parents))
        ]
        if clashes:
            raise OutputExists(
                f"{place}: would overwrite files that are not known to be a checkpoint's: "
                f"{listing(clashes)}. Move them away, or write elsewhere"
            )

    def _own(self, place: Path, below: set[str]) -> set[str]:
        """The unchanged files of this writer's earlier output; refuse changed weights."""
        summary, listed = self.output.notes, _listed(place)
        written = manifest.read(place) if listed else {}
        if "writer" not in summary or any(
            written.get(key) != summary.get(key) for key in ("writer", "to", "architecture")
        ):
            raise _exists(f"{place}: exists already")
        changed = {n for n in below & listed.keys() if not _is_intact(place, n, listed)}
        weights = {n for n in listed if "tensors" in listed[n]} | self._made
        problems = [f"{name} was changed since" for name in sorted(changed & weights)]
        if any(_WEIGHTS.fullmatch(name) for name in weights):
            loaded = {name for name in below if _WEIGHTS.fullmatch(name) or name in _CONFIGS}
            more = sorted(loaded - listed.keys())
            problems += [f"{name} was not written with the others" for name in more]
        if problems:
            raise _exists(f"{place}: not as {summary['writer']} left it: {listing(problems)}")
        return {MANIFEST, *listed} - changed

    def _forced(self, place: Path, below: set[str]) -> set[str]:
        """The files of a checkpoint; where there is none, not even config.json counts."""
        listed = _listed(place)
        kinds = [re.sub(r"\d+", r"\\d+", re.escape(s.name)) for s in self.output.shards]
        loaded = any(_WEIGHTS.fullmatch(shard.name) for shard in self.output.shards)
        if loaded or not listed:
            kinds.append(_WEIGHTS.pattern)
        named = {name for name in below if any(re.fullmatch(kind, name) for kind in kinds)}
        weights = {name for name in named if name in listed or _is_of_weights(place / name)}
        usual = weights | (self._made - named) | _USUAL | _of_modules(place)
        if CONFIG not in listed and not _is_config(place, CONFIG):  # another program's
            usual -= {CONFIG}
        usual |= {name for name in below if re.fullmatch(rf"{MORE_TEMPLATES}/[^/]+\.jinja", name)}
        replaced = {MANIFEST, *weights, *_indexed(place)}
        replaced |= {
            name
            for name in listed
            if name in usual or "tensors" in listed[name] or _is_intact(place, name, listed)
        }
        if (
            listed
        ):  # files put beside the listed ones stay, unless a load would read them with the new ones
            return replaced | (usual & self._names) | (usual & {*_CONFIGS} if loaded else set())
        is_one = bool(weights) or any(_is_config(place, name) for name in _CONFIGS)
        return replaced | usual if is_one else replaced

    def _is_same(self, place: Path, name: str) -> bool:
        """Whether the bytes to be written are there already."""
        path = place / name
        if path.is_symlink() or not path.is_file():
            return False
        if (text := self.output.texts.get(name)) is not None:
            return path.stat().st_size == len(text) and path.read_bytes() == text
        source = self.output.carried.get(name)
        return source is not None and cmp(path, source, shallow=False)


def is_checkpoint_file(path: Path) -> bool:
    """Whether a single file is weights in a format that is read here, whole by its headers."""
    with suppress(ZooError, OSError):
        if (kind := kind_of(path)) not in (None, "llama2c"):  # llama2.c has no magic bytes
            form = FORMATS[kind]
            return bool(form.open(import_module(f"converters.formats.{form.module}"), path, None))
        return bool(SafetensorsReader(path).tensors)
    return False


def _listed(place: Path) -> dict[str, dict[str, Any]]:
    """The files that the manifest in a directory names; empty without a valid manifest."""
    with suppress(ZooError):
        files: dict[str, dict[str, Any]] = manifest.read(place)["files"]
        if all(map(is_plain, files)):
            return files
    return {}


def _is_intact(place: Path, name: str, listed: dict[str, dict[str, Any]]) -> bool:
    """Whether a file has the bytes that the manifest says; each state of a file is read once."""
    path = place / name
    if name not in listed or path.is_symlink() or not path.is_file():
        return False
    return _has_bytes(place, name, dumps(listed[name]), identity(path.stat()))


@lru_cache(maxsize=4096)
def _has_bytes(place: Path, name: str, record: str, seen: Identity) -> bool:
    return not any(manifest.check_file(place, name, loads(record)))


def _indexed(place: Path) -> set[str]:
    """The files of weights that an index in a directory names."""
    names = set[str]()
    for index in _INDEXES:
        with suppress(ZooError):
            weight_map = read_json(place / index).get("weight_map")
            values = weight_map.values() if isinstance(weight_map, dict) else ()
            plain = {name for name in values if isinstance(name, str) and is_plain(name)}
            names |= {name for name in plain if name.endswith((".safetensors", ".bin"))}
    return names


def _is_of_weights(path: Path) -> bool:
    """Whether a file with the name of weights, or of their index, holds what its name says."""
    if path.name in _INDEXES:
        with suppress(ZooError):
            return "weight_map" in read_json(path)
        return False
    return is_checkpoint_file(path)


def _is_config(place: Path, name: str) -> bool:
    with suppress(ZooError):
        return bool(read_json(place / name).keys() & set(_CONFIGS[name]))
    return False


def _of_modules(place: Path) -> set[str]:
    """The files of a sentence model's other modules."""
    with suppress(ZooError):
        folders = [folder for _, folder in module_folders(place)]
        return {f"{f}/{name}" for f in folders if f for name in (CONFIG, *MODULE_WEIGHTS)}
    return set()
