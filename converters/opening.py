"""Open a directory of weights from its headers, whatever files the weights are spread over."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from converters.checkpoint import Checkpoint, Reader
from converters.containers import known_files
from converters.formats.safetensors import SafetensorsReader
from converters.paths import confined, located, raise_all
from converters.strict_json import read_json
from converters.weight_files import LAYOUTS
from zoo.errors import (
    AmbiguousCheckpoint,
    BadIndex,
    CheckpointError,
    DuplicateTensor,
    NotACheckpoint,
    listing,
)

_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")


def open_checkpoint(directory: str | os.PathLike[str], mmap: bool | None = None) -> Checkpoint:
    """Open the weights in a directory; read their headers only.

    Args:
        directory: A directory with `model.safetensors`, `pytorch_model.bin` or indexed shards.
        mmap: Whether files are mapped or read when a tensor is used; None leaves it to the format.

    Returns:
        A `Checkpoint`, which reads a tensor when it is asked for.

    Raises:
        NotACheckpoint: If there are no weights in the directory.
        CheckpointError: For damaged files or a wrong index; one error lists all faults of a kind.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> directory = tempfile.mkdtemp()
        >>> save_file({"embed.weight": torch.zeros(5, 2)}, f"{directory}/model.safetensors")
        >>> open_checkpoint(directory).tensors["embed.weight"].shape
        (5, 2)
    """
    root = Path(directory)
    names = _names(root)
    for kind, (single, index) in LAYOUTS.items():
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
    wanted = [name for layout in LAYOUTS.values() for name in layout]
    if shards := sorted(name for name in names if _SHARD.fullmatch(name)):
        raise BadIndex(
            f"{root}: holds the shards {listing(shards)} and no index that names them; "
            f"looked for {wanted[1]} and {wanted[3]}"
        )
    here = listing(sorted(names), 10) or "nothing"
    fault = f"{root}: no weights. Looked for {', '.join(wanted)}; found {here}"
    if others := known_files(root):
        fault += f". Without a config.json they could be those of {listing(others)}: give that file"
    raise NotACheckpoint(fault)


def _names(root: Path) -> set[str]:
    try:
        return set(os.listdir(root))
    except OSError as error:
        single = LAYOUTS["safetensors"][0]
        hint = "; give the directory that contains it" if error.errno == errno.ENOTDIR else ""
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
    paths = located(root, files)
    readers: dict[str, Reader] = {}
    problems: list[CheckpointError] = []
    for name, path in paths.items():
        try:
            readers[name] = _reader(kind, path, mmap)
        except CheckpointError as error:
            problems.append(error)
    if problems:
        raise_all(problems)
    where: dict[str, str] = {}
    twice: list[str] = []
    for name, reader in readers.items():
        for tensor in reader.tensors:
            if where.setdefault(tensor, name) != name:
                twice.append(f"{tensor} ({where[tensor]} and {name})")
    if twice:
        raise DuplicateTensor(f"{root}: tensors in two shards: {listing(twice)}")
    if weight_map is not None:
        _check_index(root / LAYOUTS[kind][1], weight_map, where)
    first = next(iter(readers.values()))
    stem = LAYOUTS[kind][0].partition(".")[0]
    suffix = LAYOUTS[kind][0].rpartition(".")[2]
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
    if metadata is None:  # some writers leave it out, and nothing depends on it
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
