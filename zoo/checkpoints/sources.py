"""Turn a reference (a registry name, hf:org/repo@rev, or a path) into a local directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from zoo.checkpoints.adapters import base_of
from zoo.checkpoints.config_file import ConfigFile
from zoo.checkpoints.file_names import ADAPTER
from zoo.checkpoints.path_reference import local_path
from zoo.errors import AmbiguousCheckpoint, UsageError, option
from zoo.registry import CheckpointEntry, named

Ref = str | os.PathLike[str]  # a registry's name, hf:org/repo@revision, or a path


class Source(NamedTuple):
    """The local files of a reference, and the repository they came from."""

    directory: Path
    ref: str
    checkpoint: CheckpointEntry | None = None
    repo: str | None = None
    revision: str | None = None  # the commit
    file: Path | None = None  # a file in the directory, where one was asked for
    config: ConfigFile | None = None  # if it was read to decide what to download


def resolve(
    ref: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    weights: bool = True,
    config: bool = True,
    progress: bool = True,
    adapter: bool = False,
) -> Source:
    """Return the local directory of a reference, downloaded if need be.

    Only names and hf: references may use the network. A registry name wins over a directory of the
    same name: write ./gpt2, or pass a Path, for that. `weights=False` leaves the weights where they
    are; `config=False` takes a directory that holds no config; `progress` shows only on a terminal.
    `adapter=True` downloads the adapter that a repository of weights holds too.
    """
    if revision is not None:
        _check_revision(revision)
    entry = named(ref)
    if entry is None and not (isinstance(ref, str) and ref.startswith("hf:")):
        return _local(ref, revision, config)
    from zoo.checkpoints.hub import Hub, check_client, parse_hub

    check_client()
    if entry is not None:
        repo, file, revision = entry.repo, entry.file or None, revision or entry.revision
    else:
        repo, file, revision = parse_hub(str(ref), revision)
    cache = None if cache_dir is None else Path(os.fsdecode(cache_dir))
    hub = Hub(repo, revision or "main", token, cache, local_files_only, progress, adapter)
    directory, itself = hub.fetch_checkpoint(weights, file)
    return Source(directory, os.fsdecode(ref), entry, repo, hub.revision, itself, hub.config)


def _local(ref: str | os.PathLike[str], revision: str | None, config: bool) -> Source:
    if not isinstance(ref, str | os.PathLike):
        kind = type(ref).__name__
        raise UsageError(f"expected a name, hf:org/repo@rev or a path, found {kind} {ref!r}")
    path = local_path(ref, revision, config)
    if path.is_dir():
        return Source(path, os.fsdecode(ref))
    return Source(path.parent, os.fsdecode(ref), file=path)


def _check_revision(revision: str) -> None:
    from zoo.checkpoints.hub import is_revision

    if not is_revision(revision):
        raise UsageError(f"revision={revision!r}: expected a branch, a tag or a commit")


def check_no_adapter(source: Source, applied: bool = True) -> None:
    """Refuse weights with an adapter beside them: only the caller knows if it is merged in.

    `applied`: the caller can apply it, and not only ignore it.
    """
    place = source.directory
    if not os.path.lexists(place / ADAPTER):
        return
    ways = [option("adapter")] * applied
    ways += [f"`zoo convert {source.ref} --adapter --to hf --out DIR`, and then DIR"]
    raise AmbiguousCheckpoint(
        f"{place}: holds weights and an adapter ({ADAPTER}{base_of(place)[0]}), and nothing says "
        f"whether the weights have it merged in already. To apply it: {', or '.join(ways)}. "
        f"If it is merged already: {option('adapter', False)}, or move its file away"
    )
