"""A reference becomes a local directory: a name from the registry, hf:org/repo@rev, or a path."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any, Literal, NamedTuple, NoReturn, TypeGuard

from converters.listed import Group, groups
from zoo.checkpoints.downloads import COMMIT, ask, damaged_blob, fetch
from zoo.errors import (
    AmbiguousCheckpoint,
    BadIndex,
    ConfigError,
    CorruptCheckpoint,
    GatedRepo,
    MissingShard,
    NotACheckpoint,
    Offline,
    RepoNotFound,
    SourceError,
    UnknownName,
    UnsafePath,
    UsageError,
    ZooError,
    listing,
    option,
    printable,
)
from zoo.registry import CheckpointEntry, architecture_for, find, named
from zoo.terminal import unescaped

CONFIG = "config.json"
ADAPTER = "adapter_config.json"  # of peft's
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NATIVE_FILE = "zoo.json"  # what stands in its place in a native directory
MODULES = "modules.json"  # what makes sentence embeddings of a model's output
MORE_TEMPLATES = "additional_chat_templates"  # a folder: its files have templates by name
# what is fetched beside config and weights, where the repository has it
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "qwen.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    *("quantize_config.json", "quant_config.json"),  # of packed weights, by the first programs
    f"{MORE_TEMPLATES}/tool_use.jinja",  # the one that is taken unasked
    MODULES,
    ADAPTER,  # weights beside which it lies are not loaded without a decision
)
# and where it has modules; their weights lie in folders of their own
SENTENCE_FILES = ("sentence_bert_config.json", "config_sentence_transformers.json")
# (whole file, index of shards), the preferred format first
WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
MODULE_WEIGHTS = tuple(whole for whole, _ in WEIGHTS)
PUBLISHED = re.compile(  # files of weights by the names above, whole or a shard
    "|".join(r"{}(-\d+-of-\d+)?\.{}".format(*whole.split(".")) for whole, _ in WEIGHTS)
)
_HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(/(?P<file>[^@\s]+))?(@(?P<revision>[^@\s]+))?")
_REPO = re.compile(r"[\w.-]+/[\w.-]+")

_LONGEST = 1000  # characters of a file's name in a repository


class Source(NamedTuple):
    """Where the files of a reference are, and where they came from."""

    directory: Path
    ref: str
    checkpoint: CheckpointEntry | None = None
    repo: str | None = None
    revision: str | None = None  # the commit
    file: Path | None = None  # a file in the directory, where one was given


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
    """The directory of a reference. Only names and hf: references may use the network.

    A registry name wins over a directory of the same name: write ./gpt2, or pass a Path, for that.
    `weights=False` leaves the weights where they are; `config=False` takes a directory that holds
    no config; `progress` shows only on a terminal. `adapter=True` downloads the adapter that a
    repository of weights holds too.
    """
    file = None
    if revision is not None and not _is_revision(revision):
        raise UsageError(f"revision={revision!r}: expected a branch, a tag or a commit")
    if (entry := named(ref)) is not None:
        _check_client()
        repo, file, revision = entry.repo, entry.file or None, revision or entry.revision
    elif isinstance(ref, str) and ref.startswith("hf:"):
        _check_client()
        repo, file, revision = _parse_hub(ref, revision)
    elif isinstance(ref, str | os.PathLike):
        path = _local(ref, revision, config)
        if path.is_dir():
            return Source(path, os.fsdecode(ref))
        return Source(path.parent, os.fsdecode(ref), file=path)
    else:
        kind = type(ref).__name__
        raise UsageError(f"expected a name, hf:org/repo@rev or a path, found {kind} {ref!r}")
    cache = None if cache_dir is None else Path(os.fsdecode(cache_dir))
    hub = _Hub(repo, revision or "main", token, cache, local_files_only, progress, adapter)
    directory, itself = hub.fetch_checkpoint(weights, file)
    return Source(directory, os.fsdecode(ref), entry, repo, hub.revision, itself)


def _is_revision(revision: Any) -> bool:
    from converters.checkpoint import is_plain

    return isinstance(revision, str) and len(revision) <= 255 and is_plain(revision)


def is_cached(repo: str) -> bool:
    """Whether the hub's cache has a folder for the repository, whatever lies in it."""
    try:
        return _repo_folder(repo).is_dir()
    except ValueError:  # of the environment, which _check_client names where the client is needed
        return False


def _repo_folder(repo: str, cache: Path | None = None) -> Path:
    from huggingface_hub import constants

    return (cache or Path(constants.HF_HUB_CACHE)) / f"models--{repo.replace('/', '--')}"


def _check_client() -> None:
    """The hub's client reads the environment when it is imported, and trips over bad values."""
    try:
        from huggingface_hub import constants, file_download  # noqa: F401
    except ValueError as error:
        variables = listing(sorted(name for name in os.environ if name.startswith("HF_")))
        raise SourceError(
            f"huggingface_hub cannot use the environment ({error}): check {variables}"
        ) from None


def _parse_hub(ref: str, revision: str | None) -> tuple[str, str | None, str | None]:
    """(repository, file in it, revision)"""
    from converters.checkpoint import is_plain

    match = _HUB.fullmatch(ref)
    if (
        match is None
        or (match["file"] and not is_plain(match["file"]))
        or (match["revision"] and not _is_revision(match["revision"]))
    ):
        raise UsageError(f"{ref!r}: expected hf:org/repo, hf:org/repo@revision or hf:org/repo/file")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(match["repo"])
    except HFValidationError:
        told = f"{match['repo']!r} is no name of a repository; expected hf:org/repo"
        raise UsageError(f"{ref!r}: {told}") from None
    if revision and match["revision"] and revision != match["revision"]:
        raise UsageError(f"{ref!r} asks for one revision and revision={revision!r} for another")
    return match["repo"], match["file"], revision or match["revision"]


# --- directories ---------------------------------------------------------------------------------


def is_path(place: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether it is a path, and the system could have a file of that name."""
    if not isinstance(place, str | os.PathLike):
        return False
    try:
        return bool(name := os.fsencode(place)) and b"\0" not in name
    except UnicodeEncodeError:
        return False


def expanded(place: str | os.PathLike[str]) -> Path:
    """A path with the user's home for a leading ~, where there is such a user."""
    path = Path(os.fsdecode(place))
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def _local(ref: str | os.PathLike[str], revision: str | None, config: bool) -> Path:
    text = os.fsdecode(ref)
    path = expanded(text)
    try:
        # a loop of links or a name too long counts as not there
        is_directory, exists = os.path.isdir(path), os.path.lexists(path)
        index = None if is_directory else _index(path)
    except ValueError:
        is_directory, exists, index = False, False, None
    if not text or not (is_directory or exists or index):
        _no_such(ref, text)
    if revision is not None:
        raise UsageError(f"{text}: a directory has no revisions; leave revision={revision!r} out")
    if not is_directory:
        if exists and _is_published(path):
            return path.parent
        if path.name in (ADAPTER, *ADAPTER_WEIGHTS) and os.path.lexists(path.parent / ADAPTER):
            raise _adapter_alone(path.parent)
        if exists and _is_weights(path):
            return _real(path)
        if index is not None:
            return index
        raise NotACheckpoint(
            f"{text}: expected a directory with {CONFIG} and weights in it, or a file that says "
            f"what it is ({_formats()}); found {_found(path)}"
        )
    named = (path / CONFIG).exists() or (path / NATIVE_FILE).exists()
    if config and not named and os.path.lexists(path / ADAPTER):
        raise _adapter_alone(path)
    if config and not named and not any(map(_is_weights, sorted(path.glob("[!.]*")))):
        raise NotACheckpoint(
            f"{text}: no {CONFIG} (nor {NATIVE_FILE}) in it, and no file that says what it is "
            f"({_formats()}).{_nearby(path)}"
        )
    return path


def check_no_adapter(source: Source, applied: bool = True) -> None:
    """Refuse weights beside which an adapter lies, since only the caller knows if it is merged.

    `applied`: the caller can apply it, and not only ignore it.
    """
    place = source.directory
    if not os.path.lexists(place / ADAPTER):
        return
    ways = [option("adapter")] * applied
    ways += [f"`zoo convert {source.ref} --adapter --to hf --out DIR`, and then DIR"]
    raise AmbiguousCheckpoint(
        f"{place}: holds weights and an adapter ({ADAPTER}{_base_of(place)[0]}), and nothing says "
        f"whether the weights have it merged in already. To apply it: {', or '.join(ways)}. "
        f"If it is merged already: {option('adapter', False)}, or move its file away"
    )


def adapter_beside(place: Path) -> str:
    """The adapter that lies beside weights, in words; empty where there is none."""
    if not os.path.lexists(place / ADAPTER):
        return ""
    how = f"{option('adapter')} applies it, {option('adapter', False)} ignores it"
    return f"{ADAPTER}{_base_of(place)[0]}: {how}"


def _adapter_alone(place: Path) -> NotACheckpoint:
    base, ref = _base_of(place)
    return NotACheckpoint(
        f"{place}: an adapter{base}, and no model. Load its base with it: "
        f"zoo.load({ref!r}, adapter={str(place)!r}), or "
        f"`zoo convert {ref} --adapter {place} --to hf --out DIR`"
    )


def _base_of(place: Path) -> tuple[str, str]:
    """(" of …": the base that an adapter names, a reference that loads it)"""
    from converters.checkpoint import confined
    from converters.strict_json import read_json

    try:
        base = read_json(confined(place, ADAPTER)).get("base_model_name_or_path")
    except ZooError:
        base = None
    if not isinstance(base, str) or not base:
        return "", "BASE"
    base = base if len(base) <= _LONGEST else f"{base[:_LONGEST]}…"
    on_hub = _REPO.fullmatch(base) and not os.path.isdir(base)
    return f" of {base}", f"hf:{base}" if on_hub else base


def _is_published(path: Path) -> bool:
    """Whether a file is one of those that a config beside it is of."""
    named = any((path.parent / name).exists() for name in (CONFIG, NATIVE_FILE))
    return named and PUBLISHED.fullmatch(path.name) is not None


def _is_weights(path: Path) -> bool:
    """Whether a file is, by its bytes, of a format that is known without an index or a config."""
    from converters.containers import kind_of

    try:
        return kind_of(path) is not None
    except ZooError:
        return False


def _real(path: Path) -> Path:
    """Where a file lies that was given by a link: its checkpoint is there."""
    from converters.checkpoint import confined

    try:
        return confined(path.parent, path.name)
    except UnsafePath:
        return Path(os.path.realpath(path))


def _found(path: Path) -> str:
    """What a file is instead, and the next move, as far as its first bytes tell."""
    from converters.formats import open_regular

    try:
        fd = open_regular(path)
    except ZooError as error:
        return f"nothing to read: {str(error).removeprefix(f'{path}: ')}"
    try:
        head = os.pread(fd, 16, 0)
    finally:
        os.close(fd)
    if head[8:9] == b"{":
        return f"what looks like safetensors: give the directory that it and its {CONFIG} are in"
    if head[:1] == b"{":
        return "what looks like JSON: give the directory that it is in"
    return f"a file that begins with {head[:8]!r}" if head else "an empty file"


def _index(path: Path) -> Path | None:
    """Of what several files beginning alike hold, the one that says so."""
    from converters.containers import index_of

    try:
        return index_of(path)
    except ZooError:
        return None


def _formats() -> str:
    from converters.containers import known_formats

    return known_formats()


def _no_such(ref: str | os.PathLike[str], text: str) -> NoReturn:
    if not text.strip():
        raise UsageError("expected a name, hf:org/repo@rev or a path, found an empty string")
    near = near_path(text)
    if isinstance(ref, str):
        hub_url = re.fullmatch(r"(?:https?://[^/]+/|hf://)([\w.-]+/[\w.-]+).*", text)
        if hub_url:
            raise UsageError(f"{text!r}: write hf:{hub_url[1]}")
        if _REPO.fullmatch(text) and not text.startswith("."):
            raise UsageError(
                f"{text!r} is no directory here; for the hub's repository write hf:{text}"
                f"{near and '.' + near}"
            )
        if "/" not in text and os.sep not in text:
            try:
                find(text)
            except UnknownName as error:
                raise UnknownName(
                    f"{error} (no directory of that name either{near and '.' + near})"
                ) from None
    raise NotACheckpoint(f"{text}: no such directory{near and '.' + near}")


def near_path(path: str | os.PathLike[str]) -> str:
    """` Did you mean models/gpt2?` for a path that does not exist, or nothing.

    The first part of it that does not exist is compared with what lies in that directory.
    """
    missing = expanded(path)
    try:
        while not missing.parent.exists():
            missing = missing.parent
        names = sorted(each.name for each in islice(missing.parent.iterdir(), 2000))
    except (OSError, ValueError):
        return ""
    near = get_close_matches(missing.name, names, cutoff=0.7)
    return f" Did you mean {', '.join(str(missing.parent / name) for name in near)}?" * bool(near)


def _nearby(path: Path) -> str:
    """Where the checkpoint that was meant may be."""
    below = sorted(
        p.parent for p in [*path.glob(f"*/{CONFIG}"), *path.glob(f"snapshots/*/{CONFIG}")]
    )
    if below:
        return f" There is one in {listing(map(str, below), limit=3)}."
    holds = sorted(p.name for p in path.iterdir())
    return f" It holds {listing(holds, limit=5)}." if holds else " It is empty."


def module_folders(directory: Path) -> list[tuple[str, str]]:
    """(kind, folder) of each step that modules.json names after the model itself."""
    from converters.checkpoint import confined, is_plain
    from converters.strict_json import read_json_list

    path = confined(directory, MODULES)
    found = []
    for module in read_json_list(path):
        said = module if isinstance(module, dict) else {}
        kind, folder = said.get("type"), said.get("path")
        if not isinstance(kind, str) or not isinstance(folder, str):
            raise ConfigError(f"{path}: expected a type and a path, found {module!r}")
        if folder and not is_plain(folder):
            raise UnsafePath(f"{path}: {folder!r} is no plain relative path")
        found.append((kind.rpartition(".")[2], folder))
    if not found or found[0] != ("Transformer", ""):
        raise ConfigError(f"{path}: begins with {found[:1]} and not with a Transformer in its root")
    return found[1:]


# --- the hub -------------------------------------------------------------------------------------


@dataclass
class _Hub:
    """One revision of one repository, as far as a checkpoint needs it."""

    repo: str
    revision: str
    token: str | bool | None
    cache_dir: Path | None
    local_files_only: bool
    progress: bool
    adapter: bool = False
    # asked for by its branch, which records in the cache what commit that stands for
    first: str = CONFIG

    _stopped: Event = field(default_factory=Event, repr=False)

    def fetch_checkpoint(self, weights: bool, file: str | None) -> tuple[Path, Path | None]:
        """Its directory in the cache, and a file in it that says itself what it is.

        Config first, so that an unknown model costs no download.
        """
        if file and PUBLISHED.fullmatch(file):
            file = None  # its config says the same
        config = None if file else self._config()
        if config is None:
            if file is None and (adapter := self._fetch(ADAPTER)) is not None:
                base, ref = _base_of(adapter.parent)
                raise NotACheckpoint(
                    f"hf:{self.repo}: an adapter{base}, and no model. Download it (hf download "
                    f"{self.repo} --local-dir DIR), and load its base with it: "
                    f"zoo.load({ref!r}, adapter='DIR'), or `zoo convert {ref} --adapter DIR`"
                )
            return self._fetch_group(self._group(file), weights)
        directory, self.revision = config.parent, config.parent.name
        from converters.strict_json import read_json

        architecture_for(read_json(config), f"hf:{self.repo}: {CONFIG}")
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

    # --- files that no config.json is of ---

    @cached_property
    def _names(self) -> list[str]:
        """Of all files; none where nobody can say."""
        import huggingface_hub as hf

        from converters.checkpoint import is_plain

        if self.unreachable:
            names = self._cached_names()
        else:
            try:
                api = hf.HfApi(endpoint=hf.constants.ENDPOINT, token=self.token)
                names = api.list_repo_files(self.repo, revision=self.revision)
            except Exception as error:
                if not self._is_absent(error):
                    raise self._explain(error) from None
                names = []  # a server of files, and no hub
        return [n for n in names if isinstance(n, str) and len(n) <= _LONGEST and is_plain(n)]

    def _cached_names(self) -> list[str]:
        ref = self._folder / "refs" / self.revision
        commit = ref.read_text().strip() if ref.is_file() else self.revision
        snapshot = self._folder / "snapshots" / commit
        return [str(p.relative_to(snapshot)) for p in snapshot.rglob("*") if p.is_file()]

    def _group(self, file: str | None) -> Group:
        """The one checkpoint that its names tell, or that `file` is of."""
        found = groups(self._names)
        if file is not None:
            if (known := next((g for g in found if file in g.files), None)) is not None:
                return known
            return Group((file,))
        if len(found) == 1:
            return found[0]
        if found:
            refs = listing((f"hf:{self.repo}/{group.name}" for group in found), 30)
            raise AmbiguousCheckpoint(
                f"hf:{self.repo} holds {len(found)} checkpoints, and nothing says which is meant. "
                f"Name one (@revision comes behind it): {refs}"
            )
        names = ", ".join(name for pair in WEIGHTS for name in pair)
        told = f"hf:{self.repo}: no {CONFIG} in it, and no file that may be weights by its name"
        missing = f"{CONFIG} and weights, in one of {names}, or a file that says what it is"
        raise self._miss(NotACheckpoint(told), missing)

    def _fetch_group(self, group: Group, weights: bool) -> tuple[Path, Path | None]:
        """All of it, and what lies beside it that says its config or its vocabulary."""
        from converters.dialects import every_dialect

        self.first = group.name
        before = f"{group.folder}/" if group.folder else ""
        if not weights and self._cached(group.name) is None:
            raise NotACheckpoint(
                f"hf:{self.repo}: {group.name} says itself what it is, and is not here. "
                "zoo.load fetches it; or download it, and give its path"
            )
        path = self._fetch(group.name)
        if path is None:
            told = f"hf:{self.repo}: no {group.name} in it"
            raise self._miss(NotACheckpoint(told), group.name)
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

    # --- files that are ---

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

    def _miss(self, otherwise: ZooError, missing: str) -> ZooError:
        """Why something is not there: nobody could be asked, or the repository lacks it."""
        if self.unreachable is None:
            return otherwise
        return type(self.unreachable)(f"{self.unreachable}. Missing: {missing}")

    @cached_property
    def unreachable(self) -> ZooError | None:
        """Why only the cache can answer, if so: asked once, and without the client's retries."""
        import huggingface_hub as hf

        if self.local_files_only:
            return self._offline("local_files_only is set")
        try:
            url = hf.hf_hub_url(self.repo, CONFIG, revision=self.revision)
            hf.get_hf_file_metadata(url, token=self.token)
        except Exception as error:
            if isinstance(error, hf.errors.RevisionNotFoundError):
                raise self._explain(error) from None  # gone for good: the cache is out of date
            return None if self._is_absent(error) else self._explain(error)
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
            told = f"hf:{self.repo}: the index names {listing(missing)}; the repository lacks them"
            raise self._miss(MissingShard(told), listing(missing))
        return [path for path in paths.values() if path is not None]

    def _has(self, name: str) -> bool:
        return self._fetch(name, dry_run=True) is not None

    def _fetch(self, name: str, dry_run: bool = False) -> Path | None:
        """The file in the cache, downloaded if need be; None where the repository lacks it."""
        cacheable = self._is_pinned or name != self.first
        if cacheable and (known := self._look_up(name)) is not None:
            return known or None
        if self.unreachable:
            return self._cached(name)
        try:
            entry = ask(self.repo, name, self.revision, self._folder, self.token)
            if dry_run:
                return entry.pointer
            return fetch(entry, self.token, _bar(self.progress), self._stopped)
        except Exception as error:
            if self._is_absent(error):
                return None
            raise self._explain(error) from None

    @property
    def _folder(self) -> Path:
        """Of the repository, in the cache."""
        return _repo_folder(self.repo, self.cache_dir)

    def _cached(self, name: str) -> Path | None:
        return self._look_up(name) or None

    def _look_up(self, name: str) -> Path | Literal[False] | None:
        """In the cache; False if the repository is known to lack it, None if nothing is known."""
        import huggingface_hub as hf

        try:
            found = hf.try_to_load_from_cache(
                self.repo, name, cache_dir=self.cache_dir, revision=self.revision
            )
            if not isinstance(found, str):
                return None if found is None else False
            blob = damaged_blob(Path(found))
            if blob is not None and self.unreachable is None:
                blob.unlink()  # it is downloaded again
                return None
        except (OSError, ValueError) as error:
            raise self._explain(error) from None
        if blob is not None:
            raise SourceError(f"{_damage(blob)}. {self.unreachable}")
        return Path(found)

    # --- what the hub's answers mean ---

    @staticmethod
    def _is_absent(error: Exception) -> bool:
        from huggingface_hub import errors

        if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
            return False
        return isinstance(error, errors.RemoteEntryNotFoundError) or _status(error) == 404

    def _explain(self, error: Exception) -> ZooError:
        from huggingface_hub import constants, errors, get_token

        if isinstance(error, ZooError):
            return error
        page = f"{constants.ENDPOINT}/{self.repo}"
        if isinstance(error, errors.GatedRepoError):
            known = self.token if isinstance(self.token, str) else get_token()
            return GatedRepo(
                f"{self.repo} is gated: accept its license at {page}, then "
                + (
                    "use a token of the account that did"
                    if known
                    else "set HF_TOKEN or pass token="
                )
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return RepoNotFound(f"{self.repo} has no revision {self.revision!r}: see {page}")
        if isinstance(error, errors.RepositoryNotFoundError):
            return RepoNotFound(
                f"{self.repo}: no such repository, or a private one: check the spelling, "
                "or set HF_TOKEN to a token that may read it"
            )
        if isinstance(error, errors.HFValidationError):
            return RepoNotFound(f"{self.repo}: {error}")
        if isinstance(error, errors.OfflineModeIsEnabled):
            return self._offline("HF_HUB_OFFLINE is set")
        status = _status(error)
        if status in (401, 403):
            return RepoNotFound(
                f"{self.repo}: the hub refused the token ({status}): renew HF_TOKEN"
            )
        if status is not None:
            return self._offline(f"{constants.ENDPOINT} answered {status}")
        for cause in _causes(error):
            # the hub's HTTP client, and with it the root of its errors, changes with its version
            network = type(cause).__module__.startswith("httpx")
            if network or isinstance(cause, ConnectionError | TimeoutError):
                reason = " ".join(str(cause).split()) or type(cause).__name__
                return self._offline(f"{constants.ENDPOINT} cannot be reached ({reason})")
        if isinstance(error, OSError) and error.errno is not None:
            return SourceError(f"{self.repo}: the cache {self._cache()} cannot be used: {error}")
        # whatever else the client makes of an answer that is not as a hub's are
        told = " ".join(f"{type(error).__name__}: {error}".split())
        told = told if len(told) <= 300 else f"{told[:300]} …"
        return SourceError(
            f"{self.repo}: {constants.ENDPOINT} gave an answer that cannot be used ({told}). "
            "Run the command again; if HF_ENDPOINT is set, check that it is a model hub's address"
        )

    def _cache(self) -> Path:
        from huggingface_hub import constants

        return self.cache_dir or Path(constants.HF_HUB_CACHE)

    def _offline(self, reason: str) -> Offline:
        return Offline(
            f"{self.repo}@{self.revision} is not, or not wholly, in the cache {self._cache()}, "
            f"and {reason}: fetch it once with the network on, or pass a directory"
        )


@contextmanager
def naming_damaged_blobs(directory: Path) -> Iterator[None]:
    """Say of a corrupt checkpoint which files of the hub's cache are not what their names say."""
    try:
        yield
    except CorruptCheckpoint as error:
        blobs = [damaged_blob(path, whole=True) for path in sorted(directory.iterdir())]
        lines = [f"{_damage(blob)}, and load again" for blob in blobs if blob is not None]
        if not lines:
            raise
        raise CorruptCheckpoint("\n  ".join([str(error), *lines])) from None


def _damage(blob: Path) -> str:
    size = f"{blob.stat().st_size:,} bytes"
    return f"{blob} is damaged ({size}, which do not have the digest in its name): delete it"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of huggingface_hub, which may wrap one in another."""
    found = (getattr(cause, "response", None) for cause in _causes(error))
    return next((int(response.status_code) for response in found if response is not None), None)


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
