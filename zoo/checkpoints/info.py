"""`zoo.list` and `zoo.info`: describe checkpoints without loading them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import registry
from zoo.checkpoints import sources
from zoo.checkpoints.adapters import adapter_beside
from zoo.checkpoints.file_names import CONFIG, NATIVE_FILE
from zoo.checkpoints.former_fields import current_fields
from zoo.errors import (
    ConfigError,
    NotACheckpoint,
    UsageError,
    ZooError,
    did_you_mean,
    listing,
)

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint


def list_checkpoints(*, verified: bool = False) -> list[registry.CheckpointEntry]:
    """List every checkpoint that has a name.

    Args:
        verified: list only those whose published weights were compared with the reference.

    Returns:
        The registry's entries: name, architecture, repository, license, number of parameters …

    Example:
        >>> import zoo
        >>> "gpt2" in [entry.name for entry in zoo.list()]
        True
    """
    entries = list(registry.checkpoints().values())
    if not verified:
        return entries
    from zoo import evidence  # slow: it reads source files

    names = evidence.verified_checkpoints()
    return [entry for entry in entries if entry.name in names]


@dataclass(frozen=True)
class Stored:
    """What the headers of a checkpoint's files say."""

    format: str
    about: str  # a description of the format
    files: tuple[str, ...]
    size: int  # of the files
    tensors: int
    dtypes: Mapping[str, int]  # dtype -> number of values
    dtype_bytes: Mapping[str, int]  # dtype -> bytes

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.dtype_bytes.values())


@dataclass(frozen=True)
class Info:
    """A checkpoint's description: of a named one its registry entry, of a directory its files."""

    ref: str
    architecture: str
    reference_class: str | None
    head: str | None  # None where the config names no class
    heads: tuple[str, ...]
    config: Mapping[str, Any]  # as the checkpoint has it
    parameters: int | None = None  # None: not counted
    license: str | None = None
    repo: str | None = None
    revision: str | None = None
    pinned: bool | None = None
    directory: str | None = None
    stored: Stored | None = None
    dialect: str | None = None  # of the files; None for a registry entry
    about: str = ""  # a description of such files
    quantized: str = ""  # the quantization of the matrices, which are dequantized when read
    inferred: Mapping[str, Any] = field(
        default_factory=dict
    )  # native fields, from shapes and names
    adapter: str = ""  # the adapter beside the weights
    mismatch: tuple[str, ...] = ()  # how the files differ from the registry entry

    def to_json(self) -> dict[str, Any]:
        """Return the description as plain JSON types."""
        return asdict(self)


def info(
    ref: str | os.PathLike[str],
    *,
    head: str | None = None,
    config: Mapping[str, Any] | None = None,
    ignore_config: Sequence[str] = (),
    **where: Any,
) -> Info:
    """Describe a checkpoint from its config and its headers; no weights are read.

    A registry name is answered from the registry, offline, unless an option says where to look.

    Args:
        ref: a registry name, `hf:org/repo@revision`, a directory, or a file such as a GGUF file.
        head: the head to describe, instead of the one that the checkpoint names.
        config: native config fields to change; the number of parameters follows.
        ignore_config: unknown fields of config.json that may be ignored.
        where: those options of `zoo.load` that say where the files are: revision, token, cache_dir
            and local_files_only.

    Returns:
        Architecture, heads, config, number of parameters, and what the files hold.

    Raises:
        UsageError: the architecture has no such head.
        ConfigError: the config is not understood; every problem is in the message.
        NotACheckpoint: nothing there is a checkpoint.

    Example:
        >>> import zoo
        >>> zoo.info("gpt2").parameters
        124439808
    """
    if (entry := registry.named(ref)) is not None and not where:
        description = _of_entry(entry)
    else:
        description = _of_directory(sources.resolve(ref, weights=False, **where), ignore_config)
    if head is not None and head not in description.heads:
        near = did_you_mean(head, description.heads)
        raise UsageError(
            f"head={head!r}: {description.architecture} has {listing(description.heads)}.{near}"
        )
    description = replace(description, head=head or description.head)
    if not config:
        return description
    from zoo.checkpoints.locate import skeleton

    # unknown fields are refused here, and the others may change the number of parameters
    model = skeleton(ref, head=head, config=config, ignore_config=ignore_config, **where)
    count = sum(parameter.numel() for parameter in model.parameters())
    return replace(description, config={**description.config, **config}, parameters=count)


def _of_entry(entry: registry.CheckpointEntry) -> Info:
    architecture = registry.architectures()[entry.architecture]
    return Info(
        ref=entry.name,
        architecture=entry.architecture,
        reference_class=entry.reference_class,
        head=architecture.heads[entry.reference_class][0],
        heads=_heads(architecture),
        config=entry.reference_config,
        parameters=entry.parameters,
        license=entry.license,
        repo=entry.repo,
        revision=entry.revision,
        pinned=entry.pinned,
        mismatch=_cached_mismatch(entry),
    )


def _cached_mismatch(entry: registry.CheckpointEntry) -> tuple[str, ...]:
    """How the files in the hub's cache differ from the entry; empty where there are none."""
    from zoo.checkpoints.hub import is_cached

    try:
        if not is_cached(entry.repo):  # cheap: imports only a part of the hub's client
            return ()
        source = sources.resolve(entry.name, weights=False, local_files_only=True)
    except ZooError:
        return ()
    return _mismatch(source)


def _mismatch(source: sources.Source) -> tuple[str, ...]:
    if source.checkpoint is None:
        return ()
    from zoo.checkpoints.locate import read  # torch comes with it
    from zoo.checkpoints.registry_name import name_problems

    try:
        return tuple(name_problems(read(source), source.checkpoint))
    except ConfigError as error:
        return tuple(error.problems)


def _of_directory(source: sources.Source, ignore: Sequence[str] = ()) -> Info:
    from converters import manifest
    from converters.opening import open_checkpoint
    from converters.strict_json import read_json
    from zoo.checkpoints.config_file import read_config

    native = source.directory / NATIVE_FILE
    if source.file is not None or not (native.exists() or (source.directory / CONFIG).exists()):
        return _of_files(source, ignore)
    dialect = "native" if native.is_file() else "hf"
    quantized = ""
    if native.is_file():
        data = read_json(native)
        try:
            architecture = registry.architectures()[data["architecture"]]
            config, named = current_fields(data["config"]), data["origin"]["class"]
            head = config.pop("head")
            quantized = _decoded(data.get("quantised") or {})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{native}: not what zoo writes: {error!r}") from None
    else:
        file = source.config or read_config(source.directory)
        config, architecture, named = file.reference, file.architecture, file.reference_class
        head = architecture.heads[named][0] if named else None
        quantized = _quantized(config, source.directory)
    entry = source.checkpoint
    mismatch = _mismatch(source)
    checkpoint = None if source.repo else open_checkpoint(source.directory)
    if checkpoint is not None and not quantized:
        quantized = _decoded(manifest.decoded(source.directory, checkpoint.files))
    return Info(
        ref=source.ref,
        architecture=architecture.name,
        reference_class=named,
        head=head,
        heads=_heads(architecture),
        config=config,
        parameters=entry.parameters if entry and not mismatch else None,
        license=entry.license if entry else None,
        repo=source.repo,
        revision=source.revision,
        pinned=entry.pinned if entry else None,
        directory=str(source.directory),
        stored=None if checkpoint is None else _stored(checkpoint),
        dialect=dialect,
        quantized=quantized,
        adapter=adapter_beside(source.directory),
        mismatch=mismatch,
    )


def _decoded(quantized: Mapping[str, str]) -> str:
    kinds = listing(sorted(set(quantized.values())))
    return f"it was, and is decoded: {kinds}" if kinds else ""


def _quantized(config: Mapping[str, Any], directory: Path) -> str:
    """The quantization that a config, or a file beside it, declares."""
    from converters.quantized.settings import FIELD, beside, read_config

    settings = config.get(FIELD)
    if settings is None and (file := beside(directory)) is not None:
        _, settings = file
    if settings is None:
        return ""
    quantization, problems = read_config(settings)
    return f"not read: {'; '.join(problems)}" if quantization is None else quantization.about


def _of_files(source: sources.Source, ignore: Sequence[str]) -> Info:
    """Describe self-describing files, which have no config.json."""
    from converters import manifest
    from converters.dialects import find

    place = source.file or source.directory
    foreign = find(place)
    if foreign is None:
        raise NotACheckpoint(f"{place}: no file of a known format in it")
    fields, problems = foreign.fields(ignore)
    if problems:
        raise ConfigError("\n  ".join([f"{foreign.config_from}:", *problems]))
    in_config, _ = foreign.dialect.read_config(foreign.reference)
    entries = registry.architectures().values()
    architecture = next(entry for entry in entries if entry.spec == foreign.spec.name)
    checkpoint = foreign.checkpoint
    arrays = [
        info
        for name, info in checkpoint.tensors.items()
        if name not in checkpoint.shared and foreign.dialect.dropped(name) is None
    ]
    return Info(
        ref=source.ref,
        architecture=architecture.name,
        reference_class=None,
        head=" or ".join(foreign.heads),
        heads=_heads(architecture),
        config=foreign.reference,
        parameters=sum(info.numel for info in arrays) if foreign.shards == 1 else None,
        directory=str(source.directory),
        stored=_stored(checkpoint),
        dialect=foreign.dialect.name,
        about=foreign.container.about,
        quantized=listing(sorted(set(checkpoint.quantized.values())))
        or _decoded(manifest.decoded(source.directory, checkpoint.files)),
        inferred={name: value for name, value in fields.items() if name not in in_config},
    )


def _stored(checkpoint: Checkpoint) -> Stored:
    from converters.containers import FORMATS

    values, sizes = Counter[str](), Counter[str]()
    for name, tensor in checkpoint.tensors.items():
        if name in checkpoint.shared:  # a second name of what is counted
            continue
        kind = checkpoint.quantized.get(name, tensor.dtype)
        values[kind] += tensor.numel
        sizes[kind] += _size(checkpoint, name)
    form = FORMATS.get(checkpoint.format)
    return Stored(
        format=checkpoint.format,
        about=form.about if form else checkpoint.format,
        files=tuple(path.name for path in checkpoint.files),
        size=sum(path.stat().st_size for path in checkpoint.files),
        tensors=len(checkpoint.tensors),
        dtypes=dict(values),
        dtype_bytes=dict(sizes),
    )


def _size(checkpoint: Checkpoint, name: str) -> int:
    """Bytes of a tensor in its file."""
    reader: Any = checkpoint.readers[checkpoint.where[name]]
    return int(reader.size(name)) if hasattr(reader, "size") else checkpoint.tensors[name].nbytes


def _heads(architecture: registry.Architecture) -> tuple[str, ...]:
    return tuple(dict.fromkeys(head for heads in architecture.heads.values() for head in heads))


# --- the module tree -----------------------------------------------------------------------------


def tree(model: Any) -> list[str]:
    """List a model's modules with the shapes of their parameters; equal layers share a line."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        first.setdefault(id(parameter), name)
    total = sum(parameter.numel() for parameter in model.parameters())
    return [f"{type(model).__module__}.Model  {total:,} parameters", *_branches(model, "", first)]


def _branches(module: Any, path: str, first: Mapping[int, str]) -> list[str]:
    lines = []
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        owner = first[id(parameter)]
        shape = " ".join(map(str, parameter.shape))
        lines.append(f"  {name} [{shape}]" if owner == path + name else f"  {name} = {owner}")
    groups: list[tuple[list[str], list[str], bool]] = []  # names, what is below each, is it a leaf
    for name, child in module.named_children():
        below = _branches(child, f"{path}{name}.", first)
        if groups and name.isdigit() and groups[-1][1] == below:
            groups[-1][0].append(name)
        else:
            groups.append(([name], below, next(child.children(), None) is None))
    for names, below, leaf in groups:
        label = "  " + (names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}")
        if leaf and below:
            lines.append(f"{label}: {', '.join(line.strip() for line in below)}")
        else:
            lines += [label, *("  " + line for line in below)]
    return lines
