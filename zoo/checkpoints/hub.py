"""A repository on the hub: which of its files a checkpoint needs, fetched into the cache."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any, Literal

from converters.weight_files import Group, groups
from zoo.checkpoints.adapters import base_of
from zoo.checkpoints.config_file import ConfigFile, read_config
from zoo.checkpoints.downloads import COMMIT, ask, damage, damaged_blob, fetch
from zoo.checkpoints.file_names import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    COMPANIONS,
    CONFIG,
    MODULE_WEIGHTS,
    MODULES,
    PUBLISHED,
    SENTENCE_FILES,
    WEIGHTS,
    module_folders,
)
from zoo.checkpoints.hub_errors import explain, is_absent, offline
from zoo.errors import (
    AmbiguousCheckpoint,
    BadIndex,
    MissingShard,
    NotACheckpoint,
    SourceError,
    UnsafePath,
    UsageError,
    ZooError,
    listing,
    printable,
)
from zoo.terminal import unescaped

_HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(/(?P<file>[^@\s]+))?(@(?P<revision>[^@\s]+))?")
_LONGEST = 1000  # characters of a file's name in a repository


def is_revision(revision: Any) -> bool:
    """Whether it could be the name of a branch, a tag or a commit."""
    from converters.paths import is_plain

    return isinstance(revision, str) and len(revision) <= 255 and is_plain(revision)


def is_cached(repo: str) -> bool:
    """Whether the hub's cache has a folder for the repository, whatever lies in it."""
    try:
        return repo_folder(repo).is_dir()
    except (
        ValueError
    ):  # a bad environment variable: check_client names it where the client is needed
        return False


def repo_folder(repo: str, cache: Path | None = None) -> Path:
    """Return the repository's folder in the hub's cache."""
    from huggingface_hub import constants

    return (cache or Path(constants.HF_HUB_CACHE)) / f"models--{repo.replace('/', '--')}"


def check_client() -> None:
    """Import the hub's client; name the environment variables whose values it refuses."""
    try:
        from huggingface_hub import constants, file_download  # noqa: F401
    except ValueError as error:
        variables = listing(sorted(name for name in os.environ if name.startswith("HF_")))
        raise SourceError(
            f"huggingface_hub cannot use the environment ({error}): check {variables}"
        ) from None


def parse_hub(ref: str, revision: str | None) -> tuple[str, str | None, str | None]:
    """Split `hf:org/repo/file@revision` into (repository, file in it, revision)."""
    from converters.paths import is_plain

    match = _HUB.fullmatch(ref)
    if (
        match is None
        or (match["file"] and not is_plain(match["file"]))
        or (match["revision"] and not is_revision(match["revision"]))
    ):
        raise UsageError(f"{ref!r}: expected hf:org/repo, hf:org/repo@revision or hf:org/repo/file")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(match["repo"])
    except HFValidationError:
        raise UsageError(
            f"{ref!r}: {match['repo']!r} is no name of a repository; expected hf:org/repo"
        ) from None
    if revision and match["revision"] and revision != match["revision"]:
        raise UsageError(f"{ref!r} asks for one revision and revision={revision!r} for another")
    return match["repo"], match["file"], revision or match["revision"]


@dataclass
class Hub:
    """One revision of a repository: chooses and downloads the files of a checkpoint."""

    repo: str
    revision: str
    token: str | bool | None
    cache_dir: Path | None
    local_files_only: bool
    progress: bool
    adapter: bool = False
    # requested first and by the branch's name: the answer tells the branch's commit
    first: str = CONFIG
    config: ConfigFile | None = None  # once it is downloaded

    _stopped: Event = field(default_factory=Event, repr=False)

    def fetch_checkpoint(self, weights: bool, file: str | None) -> tuple[Path, Path | None]:
        """Download a checkpoint; return its directory, and its file if that is self-describing.

        The config comes first, so that an unknown model costs no download.
        """
        if file and PUBLISHED.fullmatch(file):
            file = None  # the config beside it describes it
        config = None if file else self._config()
        if config is None:
            if file is None and (adapter := self._fetch(ADAPTER)) is not None:
                base, ref = base_of(adapter.parent)
                raise NotACheckpoint(
                    f"hf:{self.repo}: an adapter{base}, and no model. Download it (hf download "
                    f"{self.repo} --local-dir DIR), and load its base with it: "
                    f"zoo.load({ref!r}, adapter='DIR'), or `zoo convert {ref} --adapter DIR`"
                )
            return self._fetch_group(self._group(file), weights)
        directory, self.revision = config.parent, config.parent.name
        self.config = read_config(directory, f"hf:{self.repo}: {CONFIG}")
        if weights and not self._has_weights() and groups(self._names):
            return self._fetch_group(self._group(None), weights)
        for name in COMPANIONS:
            self._fetch(name)
        self._adapter_weights()
        if (directory / MODULES).is_file():
            self._modules(directory)
        if weights:
            self._weights()
        return directory, None

    # --- checkpoints without config.json, whose files are self-describing ---

    @cached_property
    def _names(self) -> list[str]:
        """The names of all files; empty if the server does not list them."""
        import huggingface_hub as hf

        from converters.paths import is_plain

        if self.unreachable:
            names = self._cached_names()
        else:
            try:
                api = hf.HfApi(endpoint=hf.constants.ENDPOINT, token=self.token)
                names = api.list_repo_files(self.repo, revision=self.revision)
            except Exception as error:
                if not is_absent(error):
                    raise explain(error, self) from None
                names = []  # a plain file server, not a hub
        return [n for n in names if isinstance(n, str) and len(n) <= _LONGEST and is_plain(n)]

    def _cached_names(self) -> list[str]:
        ref = self._folder / "refs" / self.revision
        commit = ref.read_text().strip() if ref.is_file() else self.revision
        snapshot = self._folder / "snapshots" / commit
        return [str(p.relative_to(snapshot)) for p in snapshot.rglob("*") if p.is_file()]

    def _group(self, file: str | None) -> Group:
        """The files of the checkpoint that `file` is part of, or of the only one there is."""
        candidates = groups(self._names)
        if file is not None:
            return next((g for g in candidates if file in g.files), Group((file,)))
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            refs = listing((f"hf:{self.repo}/{group.name}" for group in candidates), 30)
            raise AmbiguousCheckpoint(
                f"hf:{self.repo} holds {len(candidates)} checkpoints, and nothing says which is "
                f"meant. Name one (@revision comes behind it): {refs}"
            )
        names = ", ".join(name for pair in WEIGHTS for name in pair)
        nothing = f"hf:{self.repo}: no {CONFIG} in it, and no file that may be weights by its name"
        missing = f"{CONFIG} and weights, in one of {names}, or a file that says what it is"
        raise self._miss(NotACheckpoint(nothing), missing)

    def _fetch_group(self, group: Group, weights: bool) -> tuple[Path, Path | None]:
        """Download a checkpoint's files, and the config and vocabulary beside them."""
        from converters.dialects import every_dialect

        self.first = group.name
        before = f"{group.folder}/" if group.folder else ""
        if not weights and self._cached(group.name) is None:
            raise NotACheckpoint(
                f"hf:{self.repo}: {group.name} is not in the cache, and there is no config.json. "
                "zoo.load downloads it; or download it yourself, and pass its path"
            )
        path = self._fetch(group.name)
        if path is None:
            absent = NotACheckpoint(f"hf:{self.repo}: no {group.name} in it")
            raise self._miss(absent, group.name)
        directory = path.parent
        self.revision = (directory.parent if group.folder else directory).name
        boxes = [box for _, _, box in every_dialect()]
        wanted = {*COMPANIONS, "tokenizer.bin", "checkpoint"}
        wanted |= {box.config for box in boxes if box.config.endswith(".json")}
        wanted |= {name for box in boxes for name in box.names}
        self._need([name for name in group.files if name != group.name])
        self._need([before + name for name in sorted(wanted) if before + name in self._names])
        self._adapter_weights(before)
        return directory, path

    def _adapter_weights(self, before: str = "") -> None:
        if self.adapter:
            any(self._fetch(before + name) for name in ADAPTER_WEIGHTS)

    def _has_weights(self) -> bool:
        return any(self._has(name) for pair in WEIGHTS for name in pair)

    # --- checkpoints with config.json ---

    def _modules(self, directory: Path) -> None:
        for name in SENTENCE_FILES:
            self._fetch(name)
        for kind, folder in module_folders(directory):
            self._fetch(f"{folder}/{CONFIG}")
            if kind == "Dense":
                any(self._fetch(f"{folder}/{name}") for name in MODULE_WEIGHTS)

    def _config(self) -> Path | None:
        return (self._cached(CONFIG) if self._is_pinned else None) or self._fetch(CONFIG)

    @property
    def _is_pinned(self) -> bool:
        return COMMIT.fullmatch(self.revision) is not None

    def _miss(self, error: ZooError, missing: str) -> ZooError:
        """The error for a missing file: the hub is unreachable, or else `error`."""
        if self.unreachable is None:
            return error
        return type(self.unreachable)(f"{self.unreachable}. Missing: {missing}")

    @cached_property
    def unreachable(self) -> ZooError | None:
        """Why only the cache can be used, if so; the hub is asked once, without retries."""
        import huggingface_hub as hf

        if self.local_files_only:
            return offline(self, "local_files_only is set")
        try:
            url = hf.hf_hub_url(self.repo, CONFIG, revision=self.revision)
            hf.get_hf_file_metadata(url, token=self.token)
        except Exception as error:
            if isinstance(error, hf.errors.RevisionNotFoundError):
                raise explain(error, self) from None  # gone for good: the cache is out of date
            return None if is_absent(error) else explain(error, self)
        return None

    def _weights(self) -> None:
        for whole, index in WEIGHTS:
            has_whole, has_index = self._has(whole), self._has(index)
            if has_whole and has_index:
                raise AmbiguousCheckpoint(
                    f"hf:{self.repo} holds {whole} and {index}, and nothing says which is meant; "
                    "download one of them and pass its directory"
                )
            if has_whole:
                self._need([whole])
                return
            if has_index:
                path = self._need([index])[0]
                self._need(_shards(path, f"hf:{self.repo}: {index}"))
                return
        names = ", ".join(name for pair in WEIGHTS for name in pair)
        raise self._miss(
            NotACheckpoint(
                f"hf:{self.repo}: looked for {names}; other formats are not read from the hub"
            ),
            f"weights, in one of {names}",
        )

    def _need(self, names: list[str]) -> list[Path]:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(max_workers=4) as pool:
            try:
                paths = dict(zip(names, pool.map(self._fetch, names), strict=True))
            except BaseException:  # Ctrl-C does not wait for gigabytes
                self._stopped.set()
                raise
        if missing := [name for name, path in paths.items() if path is None]:
            lacking = f"the index names {listing(missing)}; the repository lacks them"
            raise self._miss(MissingShard(f"hf:{self.repo}: {lacking}"), listing(missing))
        return [path for path in paths.values() if path is not None]

    def _has(self, name: str) -> bool:
        return self._fetch(name, dry_run=True) is not None

    def _fetch(self, name: str, dry_run: bool = False) -> Path | None:
        """The file in the cache, downloaded if need be; None where the repository lacks it."""
        cacheable = self._is_pinned or name != self.first
        if cacheable and (cached := self._look_up(name)) is not None:
            return cached or None
        if self.unreachable:
            return self._cached(name)
        try:
            entry = ask(self.repo, name, self.revision, self._folder, self.token)
            if dry_run:
                return entry.pointer
            return fetch(entry, self.token, _bar(self.progress), self._stopped)
        except Exception as error:
            if is_absent(error):
                return None
            raise explain(error, self) from None

    @property
    def _folder(self) -> Path:
        """The repository's folder in the cache."""
        return repo_folder(self.repo, self.cache_dir)

    def _cached(self, name: str) -> Path | None:
        return self._look_up(name) or None

    def _look_up(self, name: str) -> Path | Literal[False] | None:
        """The cached file; False if the repository is known to lack it, None if unknown."""
        import huggingface_hub as hf

        try:
            cached = hf.try_to_load_from_cache(
                self.repo, name, cache_dir=self.cache_dir, revision=self.revision
            )
            if not isinstance(cached, str):
                return None if cached is None else False
            blob = damaged_blob(Path(cached))
            if blob is not None and self.unreachable is None:
                blob.unlink()  # it is downloaded again
                return None
        except (OSError, ValueError) as error:
            raise explain(error, self) from None
        if blob is not None:
            raise SourceError(f"{damage(blob)}. {self.unreachable}")
        return Path(cached)


def _shards(index: Path, where: str) -> list[str]:
    from converters.strict_json import read_json

    names = read_json(index, BadIndex).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise BadIndex(f"{where}: weight_map: expected tensor names with the file of each")
    shards = sorted(set(names.values()))
    if unsafe := [n for n in shards if PurePosixPath(n).name != n or n in ("", ".", "..")]:
        raise UnsafePath(f"{where}: expected plain file names, found {listing(map(repr, unsafe))}")
    return shards


def _bar(shown: bool) -> Any:
    """The class of the progress bars of downloads."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, desc: str | None = None, **kwargs: Any) -> None:
            kwargs["file"] = unescaped(sys.stderr)
            super().__init__(*args, desc=desc and printable(desc), **kwargs)

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return Bar if shown else Silent
