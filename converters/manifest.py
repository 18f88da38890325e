"""zoo-manifest.json: what a directory was made from, and digests of every part of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from converters.formats.safetensors import SafetensorsReader
from converters.output import Item, Output, Shard, digest
from converters.paths import confined
from converters.staging.destination import prune
from converters.strict_json import read_json
from converters.weight_files import MANIFEST
from converters.writer import WriteReport, write_small_files
from zoo.errors import CheckpointError, ConfigError, NotACheckpoint, listing

NAME = MANIFEST
FORMAT = 1
_LOADED = ("*.safetensors", "*.bin", "*.index.json", "config.json", "zoo.json")
_CHUNK = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Damage(NamedTuple):
    """A file, the tensor in it if there is one, and what is wrong."""

    file: str
    tensor: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {f'{self.tensor}: ' if self.tensor else ''}{self.what}"


def manifest(output: Output, report: WriteReport, versions: dict[str, str]) -> bytes:
    """Return the manifest. It has no times or paths: the same conversion gives the same bytes."""
    files: dict[str, Any] = {}
    for shard in output.shards:
        seen = report.tensors.get(shard.name, {})
        files[shard.name] = {
            "size": shard.size,
            "sha256": report.files.get(shard.name),
            "header": report.rest[shard.name],
            "tensors": {
                item.name: {
                    "xxh3": seen[item.name],
                    **_place(shard, item),
                    "rule": item.rule,
                    **({"cast": f"{item.stored} -> {_kind(item)}"} if item.stored else {}),
                    **({"lossy": True} if item.lossy or item.decoded else {}),
                }
                for item in shard.items
            },
        }
    sizes = {name: len(text) for name, text in output.texts.items()}
    sizes |= {name: path.stat().st_size for name, path in output.carried.items()}
    files |= {name: {"size": size, "sha256": report.files[name]} for name, size in sizes.items()}
    data = {
        "format": FORMAT,
        "job": output.job(),
        "versions": versions,
        **output.notes,
        "sources": {
            path.name: {"size": path.stat().st_size, "sha256": report.sources.get(path.name)}
            for path in output.sources
        },
        "files": dict(sorted(files.items())),
    }
    return (json.dumps({**data, "digest": digest(data)}, indent=2) + "\n").encode()


def _kind(item: Item) -> str:
    return item.coding.name if item.coding is not None else item.info.dtype


def _place(shard: Shard, item: Item) -> dict[str, Any]:
    """Return a tensor's position, for files other than safetensors."""
    if shard.name.endswith(".safetensors"):
        return {}
    return {"at": [shard.start(item), item.nbytes]}


def finish(output: Output, directory: Path, report: WriteReport, versions: dict[str, str]) -> None:
    """Complete a directory: remove other files, write those without tensors, the manifest last."""
    names = [shard.name for shard in output.shards] + [*output.texts, *output.carried]
    prune(directory, names)
    write_small_files(output, directory, report)
    with (directory / NAME).open("xb") as file:
        file.write(manifest(output, report, versions))


def read(directory: Path) -> dict[str, Any]:
    """Return the manifest of a directory.

    Raises:
        NotACheckpoint: If there is none.
        ConfigError: If it is damaged or of another version.
    """
    path = directory / NAME
    if not path.exists():
        raise NotACheckpoint(f"{directory}: no {NAME} in it, so there is nothing to check against")
    data = read_json(confined(directory, NAME), ConfigError)
    own = data.pop("digest", None)
    if own != digest(data):
        raise ConfigError(f"{path}: differs from the digest of itself")
    if problem := _problem(data):
        raise ConfigError(f"{path}: not what zoo writes: {problem}")
    return data


def decoded(directory: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return native name -> type it was stored in, by the manifest written with `files`."""
    # a missing manifest records nothing; a damaged one is reported by `check`
    with suppress(ConfigError, CheckpointError, NotACheckpoint):
        data = read(directory)
        names = data.get("quantised", {})
        is_complete = {path.name for path in files} <= data["files"].keys()
        if is_complete and all(isinstance(kind, str) for kind in names.values()):
            return dict(names)
    return {}


def _problem(data: dict[str, Any]) -> str:
    """Return the first thing in a manifest that no writer of this format writes."""
    if data.get("format") != FORMAT:
        return f"format {data.get('format')!r}, and this zoo reads {FORMAT}"
    files = data.get("files")
    if not isinstance(files, dict) or not files:
        return "no files"
    adapter = data.get("adapter", {})
    if not isinstance(adapter, dict) or not all(isinstance(d, str) for d in adapter.values()):
        return "adapter: no digests by names"
    for name, entry in files.items():
        if not isinstance(entry, dict) or type(entry.get("size")) is not int:
            return f"files.{name}: no size"
        if not isinstance(entry.get("sha256"), str | None):
            return f"files.{name}: no sha256"
        if "tensors" not in entry:
            if entry.get("sha256") is None:
                return f"files.{name}: no sha256"
            continue
        tensors = entry["tensors"]
        if not isinstance(entry.get("header"), str) or not isinstance(tensors, dict):
            return f"files.{name}: no header or no tensors"
        for tensor, one in tensors.items():
            if not isinstance(one, dict) or not isinstance(one.get("xxh3"), str):
                return f"files.{name}: {tensor}: no digest"
        if not name.endswith(".safetensors") and not _tiles(tensors, entry["size"]):
            return f"files.{name}: its tensors overlap or exceed the file"
    return ""


def _tiles(tensors: dict[str, Any], size: int) -> bool:
    """Return whether every tensor has a position in the file and none overlap."""
    places = [one.get("at") for one in tensors.values()]
    if not all(
        isinstance(p, list) and len(p) == 2 and all(type(n) is int and n >= 0 for n in p)
        for p in places
    ):
        return False
    reached = 0
    for start, length in sorted(places):
        if start < reached:
            return False
        reached = start + length
    return bool(reached <= size)


def check(directory: Path, *, sha256: bool = False) -> Iterator[Damage]:
    """Yield every difference between a directory and its manifest.

    Args:
        directory: A directory with a manifest.
        sha256: Whether to compare each file's SHA-256 too, besides the digests of its tensors.
    """
    files = read(directory)["files"]
    for path in sorted(directory.iterdir()):
        if path.name not in files and any(fnmatch(path.name, pattern) for pattern in _LOADED):
            yield Damage(path.name, "", "not written with the others, and would be loaded")
    for name in files:
        yield from check_file(directory, name, files[name], sha256=sha256)


def check_file(
    directory: Path, name: str, entry: dict[str, Any], *, sha256: bool = False
) -> Iterator[Damage]:
    """Yield the differences between a file and its entry in the manifest."""
    try:
        path = confined(directory, name)
        size = path.stat().st_size
    except CheckpointError as error:
        yield Damage(name, "", str(error))
        return
    if size != entry["size"]:
        yield Damage(name, "", f"{size} bytes, and {entry['size']} were written")
    elif "tensors" in entry:
        look = _check_tensors if name.endswith(".safetensors") else _check_places
        damages = list(look(path, name, entry))
        yield from damages
        if sha256 and not damages and entry["sha256"]:
            yield from _check_file(path, name, entry["sha256"])
    else:
        yield from _check_file(path, name, entry["sha256"])


def named_by_digest(directory: Path) -> list[Damage] | None:
    """Return damaged files of a hub's cache, whose blobs are named by their SHA-256.

    The result is None if no file is such a link.
    """
    blobs = {
        path: path.resolve().name
        for path in sorted(directory.iterdir())
        if path.is_symlink() and _DIGEST.fullmatch(path.resolve().name)
    }
    if not blobs:
        return None
    return [d for path, wanted in blobs.items() for d in _check_file(path, path.name, wanted)]


def _check_file(path: Path, name: str, wanted: str) -> Iterator[Damage]:
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
            yield Damage(name, "", "differs from what was written (sha256)")


def _check_tensors(path: Path, name: str, entry: dict[str, Any]) -> Iterator[Damage]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(0)
        head = file.read(8 + min(length, entry["size"]))
        if xxhash.xxh3_128_hexdigest(head) != entry["header"]:
            yield Damage(name, "", "its header differs from what was written")
            return
        reader = SafetensorsReader(path)
        if difference := reader.tensors.keys() ^ entry["tensors"].keys():
            yield Damage(
                name, "", f"its tensors are not those of the manifest: {listing(difference)}"
            )
            return
        for tensor, one in entry["tensors"].items():
            start, end = reader.span(tensor)
            file.seek(start)
            state, left = xxhash.xxh3_128(), end - start
            while left and (piece := file.read(min(left, _CHUNK))):
                state.update(piece)
                left -= len(piece)
            if state.hexdigest() != one["xxh3"]:
                yield Damage(name, tensor, "differs from what was written (xxh3-128)")


def _check_places(path: Path, name: str, entry: dict[str, Any]) -> Iterator[Damage]:
    """Check a file of any format: each tensor at its position, and all bytes between."""
    rest, reached = xxhash.xxh3_128(), 0
    with path.open("rb") as file:

        def consume(state: xxhash.xxh3_128, size: int) -> xxhash.xxh3_128:
            left = size
            while left and (piece := file.read(min(left, _CHUNK))):
                state.update(piece)
                left -= len(piece)
            return state

        for tensor, one in sorted(entry["tensors"].items(), key=lambda pair: pair[1]["at"]):
            start, size = one["at"]
            consume(rest, start - reached)
            if consume(xxhash.xxh3_128(), size).hexdigest() != one["xxh3"]:
                yield Damage(name, tensor, "differs from what was written (xxh3-128)")
            reached = start + size
        consume(rest, entry["size"] - reached)
    if rest.hexdigest() != entry["header"]:
        yield Damage(name, "", "bytes outside its tensors differ from what was written")
