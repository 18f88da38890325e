"""A reference becomes a model: locate, read the config, prove the plan, build, stream in."""

from __future__ import annotations

import gc
import json
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from converters.carry_out import carry_out
from converters.checkpoint import (
    MANIFEST,
    SINGLE,
    Checkpoint,
    confined,
    is_plain,
    open_checkpoint,
    read_json,
)
from converters.containers import alike
from converters.dialects import Found, find
from converters.formats import BITS, TensorInfo, open_regular
from converters.formats.source import Stamp, stamp
from converters.memory import enough, size
from converters.plan import Native, Plan, identity_plan, make_plan, target_names
from converters.quantized import settings
from converters.quantized.dequantize import DTYPES as CONFIG_DTYPES
from converters.quantized.dequantize import dequantized, stands_turned
from converters.quantized.settings import FIELD as QUANTISED
from converters.quantized.settings import Quantization
from converters.spec import Dialect, Spec, load_spec
from converters.strict_json import parse_json
from zoo import registry
from zoo.checkpoints import sources
from zoo.checkpoints.finite import first_where, source_of
from zoo.checkpoints.former import current_fields
from zoo.checkpoints.sources import NATIVE_FILE
from zoo.components.model import Model
from zoo.components.rotary import Llama3
from zoo.errors import (
    ChecksumMismatch,
    ConfigError,
    MissingShard,
    MissingTensors,
    NonFinite,
    NotACheckpoint,
    OverflowOnCast,
    ResourceLimit,
    ShapeMismatch,
    SourceChanged,
    UnsupportedArchitecture,
    UnusedFieldsWarning,
    UsageError,
    did_you_mean,
    listing,
    option,
)
from zoo.registry import Architecture

if TYPE_CHECKING:
    from zoo.lora.files import Files

Ref = str | PathLike[str]
CHECKS = ("finite",)  # what load can be asked to look for in all weights
FAULTS = 20  # that a message lists
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Origin(NamedTuple):
    """What a checkpoint was before it was converted: enough to give it back byte for byte."""

    dialect: str
    reference_class: str | None
    config: str  # config.json, verbatim
    header: Mapping[str, TensorInfo]
    where: Mapping[str, str]  # tensor -> file
    metadata: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
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
    """Where a model's weights come from, and by which rule each of them came."""

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
    file: Path | None = None  # where one was given and not its directory
    ignore_config: tuple[str, ...] = ()  # as it was loaded with
    # native name -> what its numbers stood in before they were decoded, here or in an earlier round
    quantized: Mapping[str, str] = field(default_factory=dict)
    stamps: dict[Path, Stamp] = field(default_factory=dict, repr=False)  # of files, as they were

    @property
    def lossy(self) -> str:
        """The quantizations that weights were decoded from; empty where all are as published.

        Their bytes cannot be given back.
        """
        return listing(sorted(set(self.quantized.values())))

    @property
    def rules(self) -> dict[str, str]:
        """Native name -> the rule it came by."""
        return self.plan.rule_of()

    @property
    def tokenizer_at(self) -> Path:
        """A file that holds one beside the weights, else the directory."""
        return self.files[0] if self.origin.dialect == "gguf" else self.directory

    @property
    def dropped(self) -> Mapping[str, str]:
        """Name on disk -> why it was not wanted."""
        return self.plan.dropped

    @cached_property
    def hashes(self) -> dict[str, str]:
        """File -> sha256; read when first asked for, since hashing costs more than loading."""
        import hashlib

        out = {}
        for path in self.files:
            fd = open_regular(path)
            with open(fd, "rb") as file:
                out[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        self.check()  # what was hashed is what was loaded
        return out

    def changes(self) -> list[str]:
        """What is no longer as it was loaded, by file; one that is gone is none of these."""
        found = list[str]()
        for path, before in self.stamps.items():
            try:
                if (now := stamp(os.stat(path))) != before:
                    found.append(f"{path}: {_difference(before, now)}")
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:
                found.append(f"{path}: cannot be looked at any more ({error.strerror})")
        return found

    def check(self) -> None:
        """Refuse to go on where a file is another than the one that was loaded."""
        if changes := self.changes():
            raise SourceChanged(
                f"{listing(changes)}. The model was loaded from it as it was before: load it again"
            )

    def renew(self, directory: Path) -> None:
        """Take the files in a directory for those that the model is of: it was saved there."""
        real = Path(os.path.realpath(directory))
        for path in list(self.stamps):
            if Path(os.path.realpath(path.parent)).is_relative_to(real):
                del self.stamps[path]
                with suppress(OSError):
                    self.stamps[path] = stamp(os.stat(path))
                self.__dict__.pop("hashes", None)


def _difference(before: Stamp, now: Stamp) -> str:
    """In words, of two stamps that differ."""
    if before[:2] != now[:2]:
        return "was replaced by another file"
    if before[2] != now[2]:
        return f"was {before[2]} bytes, and is {now[2]}"
    return "was written to"


class Located(NamedTuple):
    """A checkpoint whose config is understood, before its weights are opened."""

    source: sources.Source
    entry: Architecture
    spec: Spec
    heads: tuple[str, ...]  # heads to try, the first that the weights fill wins
    fields: Mapping[str, Any]  # native config fields
    reference_class: str | None
    config_text: str
    native: Mapping[str, Any] | None = None  # zoo.json, where the checkpoint is a native one
    foreign: Found | None = None  # files of a dialect that has no config.json
    quantized: Quantization | None = None  # how matrices are held, if not as they are
    adapter: Files | None = None  # what its arrays are changed by
    brought: Mapping[str, Tensor] = {}  # tensors of the adapter's that the files lack
    mmap: bool | None = None  # whether weights are mapped; None: as their format is
    ignore_config: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return str(self.source.file or self.source.directory)

    @property
    def dialect(self) -> str:
        if self.native is not None:
            return "native"
        return "hf" if self.foreign is None else self.foreign.dialect.name

    def checkpoint(self) -> Checkpoint:
        found = self._checkpoint()
        if not self.brought:
            return found
        from zoo.lora.bases import extended

        return extended(found, self.brought)

    def _checkpoint(self) -> Checkpoint:
        if self.foreign is not None:
            return self.foreign.checkpoint
        with sources.naming_damaged_blobs(self.source.directory):
            found = open_checkpoint(self.source.directory, self.mmap)
        if self.quantized is None:
            return found
        config = json.loads(self.config_text)
        said = str(config.get("torch_dtype") or config.get("dtype")).removeprefix("torch.")
        turns = partial(stands_turned, self.spec.dialect("hf"))
        return dequantized(found, self.quantized, turns, CONFIG_DTYPES.get(said))

    def config(self, head: str, changes: Mapping[str, Any]) -> Any:
        kind = self.entry.config_class
        if self.foreign is None:
            return kind(**{**self.fields, **changes, "head": head})
        dialect = self.foreign.dialect
        given = {**self.fields, **dialect.native_names(changes, kind.model_fields)}
        if lacking := [name for name in dialect.required if given.get(name) is None]:
            words = [dialect.reference_field(name) for name in lacking]
            odd = sorted(given.keys() - kind.model_fields.keys())
            raise ConfigError(
                f"{self.where}: {dialect.container.about if dialect.container else dialect.name}: "
                f"nothing says {listing(words)} (looked in {self.foreign.config_from} and at the "
                f"shapes of the tensors). Pass {option('config', dict.fromkeys(words, ...))}"
                f"{f', and not {listing(odd)}' if odd else ''}"
            )
        try:
            return kind(**{**given, "head": head})
        except ConfigError as error:
            problems = [_as_published(dialect, problem) for problem in error.problems]
            said = self.foreign.config_from
            where = said if Path(said).is_file() else self.where
            raise ConfigError("\n  ".join([f"{where}:", *problems]), problems) from None
        except ResourceLimit as error:
            raise ResourceLimit(f"{self.where}: {_as_published(dialect, str(error))}") from None


def load(
    ref: Ref,
    *,
    head: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    weights: Literal["checkpoint", "random"] = "checkpoint",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Ref | None = None,
    local_files_only: bool = False,
    config: Mapping[str, Any] | None = None,
    ignore_config: Sequence[str] = (),
    trust: Collection[str] = (),
    expect: type[Model] | None = None,
    modules: bool = True,
    verify: bool = False,
    check: Literal["finite"] | None = None,
    prepare: bool = False,
    adapter: Ref | bool | None = None,
    merge: bool = False,
    mmap: bool | None = None,
) -> Model:
    """The model behind a registry name, `hf:org/repo@revision` or a directory, ready for inference.

    `head` replaces the head that the checkpoint names ("none": hidden states). `config` changes
    native fields, `ignore_config` lets unknown fields of config.json pass, `trust` names tensors
    on disk that win where tied ones differ. `weights="random"` initializes as the original does.
    A checkpoint with a modules.json gives sentence embeddings; `modules=False` or a `head` gives
    the model alone. `verify` reads every byte and compares it with its recorded digest first.
    `check="finite"` refuses NaN and infinity among the weights, naming file and tensor; so does
    `verify`.
    `prepare` makes it fast for inference and for nothing else, as `zoo.prepare` does. `adapter` is
    a LoRA directory of peft's: it stands beside the weights, to be trained on, or is added to them
    with `merge`. True is the adapter that lies in the checkpoint's own directory, and False says
    that the weights there have it merged in already; one of both has to be said where there is one.
    `mmap` says whether weights stay views of their file, which then may not be written to, or are
    read into memory: None maps safetensors and GGUF alone.
    """
    check_adapter(adapter)
    _check_arguments(head, device, config, ignore_config, trust)
    if mmap not in (None, True, False):
        raise UsageError(f"mmap={mmap!r}: True, False or None")
    if weights not in ("checkpoint", "random"):
        raise UsageError(f"weights={weights!r}: either 'checkpoint' or 'random'")
    if check not in (None, *CHECKS):
        near = did_you_mean(str(check), CHECKS)
        raise UsageError(f"check={check!r}: None or one of {', '.join(CHECKS)}.{near}")
    if merge and adapter in (None, False):
        raise UsageError("merge=True: there is no adapter to merge")
    if adapter is True and weights == "random":
        raise UsageError("adapter=True: random weights lie nowhere; give the adapter's directory")
    if prepare and adapter not in (None, False) and not merge:
        raise UsageError("prepare=True: an adapter beside the weights is not prepared. merge=True")
    kind, finite = dtype_of(dtype), verify or check == "finite"
    with _uncollected(), enough(str(ref), _ways_out()):
        found = locate(
            ref,
            head=head,
            weights=weights == "checkpoint",
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            ignore_config=ignore_config,
            expect=expect,
            adapter=adapter,
            mmap=mmap,
        )
        files = adapter_files(found, adapter)
        adapted = partial(_adapted, files=files, merge=merge)
        directory, given = found.source.directory, config or {}
        if files is not None and weights == "checkpoint":
            from zoo.lora.bases import based

            found, given = based(found, files, given, asked=head is not None)
        if verify and weights == "checkpoint":
            _verify(directory)
        if weights == "random":
            model = adapted(_random(found, given, kind, device))
        elif modules and head is expect is None and (directory / sources.MODULES).is_file():
            from zoo.checkpoints.sentences import headless, with_steps

            alone = found._replace(heads=headless(found.heads, found.entry.model))
            how: dict[str, Any] = {"dtype": kind, "device": device, "trust": trust}
            inner = fill(alone, config=given, finite=finite, **how)
            model = with_steps(adapted(inner), directory, finite=finite)
        else:
            how = {"dtype": kind, "device": device, "trust": trust}
            model = adapted(fill(found, config=given, finite=finite, **how))
    if prepare:
        from zoo.prepared.prepare import prepare as make_fast

        return make_fast(model)
    return model


def check_adapter(adapter: Any) -> None:
    if not isinstance(adapter, str | PathLike | bool | None):
        raise UsageError(f"adapter={adapter!r}: expected a directory, True or False")


def adapter_files(found: Located, adapter: Ref | bool | None) -> Files | None:
    """The adapter that was asked for: one of its own directory, or the one beside the weights."""
    if adapter is None or adapter is False:
        return None
    from zoo.lora.files import read

    return read(found.source.directory if adapter is True else sources.expanded(adapter))


def _adapted(model: Model, files: Files | None, merge: bool) -> Model:
    if files is None:
        return model
    from zoo.lora import attach

    attach(model, files)
    return model.merge_adapter() if merge else model


def _check_arguments(head: Any, device: Any, config: Any, ignore: Any, trust: Any) -> None:
    """What torch or Python would say of them, in words of the call."""
    if not isinstance(head, str | None):
        raise UsageError(f"head={head!r}: expected a name")
    if not isinstance(config, Mapping | None):
        raise UsageError(f"config={config!r}: expected native fields by name")
    for name, value in (("ignore_config", ignore), ("trust", trust)):
        if isinstance(value, str) or not isinstance(value, Collection):
            raise UsageError(f"{name}={value!r}: expected several names")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        told = str(error).partition("\n")[0]
        raise UsageError(f"device={device!r}: {told}") from None


def _verify(directory: Path) -> None:
    """Against convert's manifest, or the digests by which a hub's cache names its files."""
    from converters import manifest

    if (directory / manifest.NAME).exists():
        damages = [str(damage) for damage in manifest.check(directory)]
    elif (found := manifest.named_by_digest(directory)) is not None:
        damages = [str(damage) for damage in found]
    else:
        raise NotACheckpoint(
            f"{directory}: neither {manifest.NAME} nor files that a hub's cache names by their "
            "digests, so there is nothing to verify against"
        )
    if damages:
        raise ChecksumMismatch("\n  ".join([f"{directory}:", *damages]))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Loading leaves no cycles behind, and one collection walks all of torch: four times a load."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def load_directory(
    directory: Ref, entry: Architecture, *, spec: Spec | None = None, **changes: Any
) -> Model:
    """A local HF directory of a known architecture, through the caller's own spec if given."""
    source = sources.resolve(Path(directory))
    found = _read(source)
    return fill(found._replace(entry=entry, spec=spec or found.spec), **changes)


def skeleton(
    ref: Ref,
    *,
    head: str | None = None,
    config: Mapping[str, Any] | None = None,
    **where: Any,
) -> Model:
    """The model on the meta device: names and shapes, no weights."""
    return skeleton_of(locate(ref, head=head, weights=False, **where), config)


def skeleton_of(found: Located, changes: Mapping[str, Any] | None = None) -> Model:
    return on_meta(found, found.config(found.heads[0], changes or {}))


# --- locating ------------------------------------------------------------------------------------


def locate(
    ref: Ref,
    *,
    head: str | None = None,
    weights: bool = True,
    ignore_config: Sequence[str] = (),
    expect: type[Model] | None = None,
    adapter: Ref | bool | None = None,
    mmap: bool | None = None,
    **where: Any,
) -> Located:
    """The directory behind a reference, and what its config says."""
    known = registry.named(ref) if isinstance(ref, str) else None
    if known is not None and known.config and not weights:
        found = _from_registry(known, head)
    else:
        source = sources.resolve(ref, weights=weights, adapter=adapter is True, **where)
        if weights and adapter is None:
            sources.check_no_adapter(source)
        found = _read(source, head, ignore_config, mmap)
        found = found._replace(mmap=mmap, ignore_config=tuple(ignore_config))
        _check_name(found, head)
    if expect is not None and not issubclass(found.entry.model, expect):
        raise UnsupportedArchitecture(
            f"{ref}: a {found.entry.name} checkpoint, and {expect.__module__}.Model was asked for. "
            f"Use zoo.load, or {found.entry.model.__module__}.Model"
        )
    return found


def _from_registry(known: registry.CheckpointEntry, head: str | None) -> Located:
    """Named checkpoints carry their published config, so that their shape is known offline."""
    entry = registry.architectures()[known.architecture]
    source = sources.Source(directory=Path(), ref=known.name, checkpoint=known)
    reference = {"architectures": [known.reference_class], **known.config}
    text = json.dumps({"model_type": entry.model_type, **reference}, indent=2)
    return _understand(source, entry, reference, text, head, (), "registry.yaml")


def name_problems(source: sources.Source) -> list[str]:
    """How a checkpoint under a registry name differs from the registry's entry."""
    if source.checkpoint is None:
        return []
    return list(_name_problems(_read(source), source.checkpoint, None))


def _check_name(found: Located, head: str | None) -> None:
    """Refuse a checkpoint under a registry name whose config the registry's entry contradicts."""
    known = found.source.checkpoint
    if known is not None and (problems := list(_name_problems(found, known, head))):
        raise _not_the_named(found, known, problems)


NO_SIZES = ("pad", "positions", "window")  # where positions are learned, the count shows them


def _name_problems(
    found: Located, known: registry.CheckpointEntry, head: str | None
) -> Iterator[str]:
    """Each size that differs, of those that the registry has: expected and found."""
    entry = registry.architectures()[known.architecture]
    if found.entry.name != entry.name:
        yield f"architecture: expected {entry.name}, found {found.entry.name}"
        return
    heads = entry.heads[known.reference_class]
    if head is None and found.reference_class is not None and not {*heads} & {*found.heads}:
        yield f"architectures: expected {known.reference_class}, found {found.reference_class}"
    try:
        actual = found.config(found.heads[0], {})
    except ConfigError:
        return  # the files do not say all of it; config= does, and may say what it likes
    dialect = load_spec(entry.spec).dialect("hf")
    published, _ = dialect.read_config(known.config)
    expected = entry.config_class(**published, head=found.heads[0])
    for name, paths in dialect.config.items():
        if not any(path.partition(".")[0] in known.config for path in paths):
            continue
        wanted, value = getattr(expected, name), getattr(actual, name)
        if name == "labels":  # the registry has their number
            wanted, value = len(wanted), len(value)
        if type(wanted) is not int or name in NO_SIZES:
            continue  # an eps or a theta may be said more exactly there than here
        if wanted != value:
            yield f"{dialect.reference_field(name)}: expected {wanted!r}, found {value!r}"


def _check_count(found: Located, model: Model, changes: Mapping[str, Any]) -> None:
    """Refuse a named checkpoint whose model has not the parameters that its name stands for."""
    known = found.source.checkpoint
    if known is None or changes:
        return
    heads = registry.architectures()[known.architecture].heads[known.reference_class]
    count = sum(parameter.numel() for parameter in model.parameters())
    if model.config.head == heads[0] and count != known.parameters:
        problem = f"parameters: expected {known.parameters:,}, found {count:,}"
        raise _not_the_named(found, known, [problem])


def _not_the_named(
    found: Located, known: registry.CheckpointEntry, problems: Sequence[str]
) -> ConfigError:
    ref = f"hf:{known.repo}{f'/{known.file}' if known.file else ''}"
    lines = [
        f"{found.where}: not the checkpoint that is called {known.name}:",
        *problems,
        f"To load what is there nonetheless: {ref}, or its directory",
    ]
    return ConfigError("\n  ".join(lines), problems)


def _read(
    source: sources.Source,
    head: str | None = None,
    ignore: Sequence[str] = (),
    mmap: bool | None = None,
) -> Located:
    directory = source.directory
    if source.file is not None:
        return _read_foreign(source, source.file, head, ignore, mmap)
    if os.path.lexists(directory / NATIVE_FILE):
        return _read_native(source, confined(directory, NATIVE_FILE), head)
    path = directory / "config.json"
    if not os.path.lexists(path):
        return _read_foreign(source, directory, head, ignore, mmap)
    reference = read_json(confined(directory, path.name), ConfigError)
    entry, _ = registry.architecture_for(reference, str(path))
    reference = entry.modern(reference)
    text, where = path.read_text(encoding="utf-8"), str(path)
    if reference.get(QUANTISED) is None and (found := settings.beside(directory)) is not None:
        where, reference[QUANTISED] = f"{where} and {found[0]}", found[1]
    return _understand(source, entry, reference, text, head, ignore, where)


def _understand(
    source: sources.Source,
    entry: Architecture,
    reference: dict[str, Any],
    text: str,
    head: str | None,
    ignore: Sequence[str],
    where: str,
) -> Located:
    """Native fields, or everything that is wrong with a config at once."""
    spec = load_spec(entry.spec)
    _, named = registry.architecture_for({"model_type": entry.model_type, **reference}, where)
    heads = _heads(entry, named, head)
    quantized, more = None, list[str]()
    if reference.get(QUANTISED) is not None:  # what is read from now on, and written, are weights
        quantized, more = settings.read_config(reference[QUANTISED], ignore)
        reference = {name: value for name, value in reference.items() if name != QUANTISED}
        text = json.dumps(reference, indent=2) + "\n"
    fields, problems = spec.dialect("hf").read_config(reference, ignore)
    problems += more
    found = Located(source, entry, spec, heads, fields, named, text, quantized=quantized)
    as_published = partial(_as_published, spec.dialect("hf"))
    for name in heads:
        try:
            found.config(name, {})
        except ConfigError as error:
            if name == heads[0]:
                problems[:0] = map(as_published, error.problems)
            found = found._replace(heads=tuple(other for other in found.heads if other != name))
        except ResourceLimit as error:
            raise ResourceLimit(f"{where}: {as_published(str(error))}") from None
    if problems:
        raise ConfigError("\n  ".join([f"{where}:", *problems]))
    if unused := spec.dialect("hf").unused(reference, ignore):
        told = f"{where}: fields that the reference never reads, so that they change nothing:"
        warnings.warn(
            f"{told} {listing(name[:100] for name in unused)}", UnusedFieldsWarning, stacklevel=2
        )
    if named is None and head is None:
        named = _class_by_tensors(found, where)
        return found._replace(heads=entry.heads[named], reference_class=named)
    return found


def _class_by_tensors(found: Located, where: str) -> str:
    """The reference class that most of the tensors are of, where a config names none."""
    told = f"{where}: 'architectures' names no class"
    asked = f"{option('head', ...)} with one of {listing(found.heads)}"
    try:
        tensors = found.checkpoint().tensors.keys()
    except NotACheckpoint:
        raise ConfigError(f"{told}, and there are no tensors to tell. Pass {asked}") from None
    scores = {}
    for head in found.heads:
        model = on_meta(found, found.config(head, {}))
        names = _names(found, model, native_of(model))
        scores[head] = (len(names & tensors), -len(names))
    classes = {
        name: max(scores[head] for head in heads if head in scores)
        for name, heads in found.entry.heads.items()
        if scores.keys() & {*heads}
    }
    best = [name for name, score in classes.items() if score == max(classes.values())]
    hidden = {*found.entry.model.headless, "pooler"}
    # a tied head has no tensor of its own, and does more than the class without it
    best = [name for name in best if not hidden >= {*found.entry.heads[name]}] or best
    if len(best) > 1:
        raise ConfigError(
            f"{told}, and the tensors are those of {' and '.join(best)}. Pass {asked}"
        )
    return best[0]


def _as_published(dialect: Dialect, problem: str) -> str:
    """A problem of a native field under the name that the dialect has for it."""
    name, _, text = problem.partition(": ")
    return f"{dialect.reference_field(name)}: {text}" if text else problem


def _read_foreign(
    source: sources.Source,
    place: Path,
    head: str | None,
    ignore: Sequence[str],
    mmap: bool | None,
) -> Located:
    """A file, or the one checkpoint in a directory, whose dialect shows by its content."""
    with sources.naming_damaged_blobs(source.directory):
        found = find(place, mmap)
    if found is None:
        raise NotACheckpoint(f"{place}: no config.json and no {NATIVE_FILE} in it")
    if found.container.wide:  # by custom; elsewhere what was stored in F32 was meant so
        found = found._replace(checkpoint=alike(found.checkpoint, found.container.wide))
    entry = next(e for e in registry.architectures().values() if e.spec == found.spec.name)
    if head is None and len(found.heads) > 1:
        raise ConfigError(
            f"{place} ({entry.name} of {found.container.about}): its tensors are those of a "
            f"{' or a '.join(found.heads)} head, and nothing tells. Pass {option('head', ...)}"
        )
    heads = _heads(entry, None, head or found.heads[0])
    named = next((c for c, each in entry.heads.items() if heads[0] in each), None)
    fields, problems = found.fields(ignore)
    try:
        fields |= told_by_tables(
            found.dialect, fields, found.checkpoint.tensor, found.checkpoint.tensors
        )
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n  ".join([f"{found.config_from}:", *problems]))
    text = json.dumps(found.reference)
    return Located(source, entry, found.spec, heads, fields, named, text, None, found)


def told_by_tables(
    dialect: Dialect,
    fields: Mapping[str, Any],
    tensor: Callable[[str], Tensor],
    there: Collection[str],
) -> dict[str, Any]:
    """Native fields that small arrays tell: how rotary frequencies are scaled."""
    told: dict[str, Any] = {}
    for name, field_ in dialect.field_tensors.items():
        if name not in there:
            continue
        numbers = tensor(name)
        base = fields.get("rope_base", 10000.0)
        if numbers.dim() != 1 or not 0 < len(numbers) <= 4096 or type(base) is not float:
            raise ConfigError(f"{name}: expected a factor for each pair of a head")
        if fields.get(field_) not in (None, {"rope_type": "default"}):
            raise ConfigError(f"{name}: scales frequencies, and so does the config")
        try:
            told[field_] = Llama3.from_factors(numbers, base).to_json()
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return told


def _heads(entry: Architecture, named: str | None, asked: str | None) -> tuple[str, ...]:
    known = entry.model.heads
    if asked is not None:
        if asked not in known:
            near = did_you_mean(asked, known)
            raise UsageError(f"head={asked!r}: {entry.name} has {', '.join(known)}.{near}")
        return (asked,)
    if named is None:  # the tensors tell
        return tuple(dict.fromkeys(head for heads in entry.heads.values() for head in heads))
    return entry.heads[named]


def _read_native(source: sources.Source, path: Path, head: str | None) -> Located:
    data = read_json(path, ConfigError)
    if problems := list(_native_problems(data)):
        raise ConfigError("\n  ".join([f"{path}: not what zoo writes:", *problems]))
    entry = registry.architectures()[data["architecture"]]
    fields = current_fields(data["config"], entry.config_class.model_fields)
    named, origin = fields.pop("head"), data["origin"]
    heads = (head or named,)
    spec = load_spec(entry.spec)
    return Located(source, entry, spec, heads, fields, origin["class"], origin["config"], data)


def _native_problems(data: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a zoo.json."""
    known = registry.architectures()
    if data.get("architecture") not in known:
        yield f"architecture: {data.get('architecture')!r} is not known"
    config, origin, quantized = (data.get(name) for name in ("config", "origin", "quantised"))
    if quantized is not None and not (
        isinstance(quantized, dict) and all(isinstance(kind, str) for kind in quantized.values())
    ):
        yield f"quantized: expected words by name, found {quantized!r}"
    if not isinstance(config, dict) or not isinstance(config.get("head"), str):
        yield "config: expected an object with a head"
    if not isinstance(origin, dict):
        yield "origin: expected an object"
        return
    if not isinstance(origin.get("class"), str | None):
        yield f"origin.class: expected a name, found {origin['class']!r}"
    if origin.get("dialect") not in ("hf", "none"):
        yield f"origin.dialect: {origin.get('dialect')!r} is not known"
    metadata, text, tensors = (origin.get(name) for name in ("metadata", "config", "tensors"))
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        yield "origin.metadata: expected words by name"
    try:
        parse_json(str(text).encode(), "origin.config")
    except ConfigError as error:
        yield str(error)
    if not isinstance(tensors, dict):
        yield "origin.tensors: expected an object"
        return
    for name, said in tensors.items():
        if (
            not isinstance(said, list)
            or len(said) != 3
            or said[0] not in BITS
            or not isinstance(said[1], list)
            or not all(type(n) is int and n >= 0 for n in said[1])
            or not isinstance(said[2], str)
            or not is_plain(said[2])
        ):
            yield f"origin.tensors.{name}: expected dtype, shape and file, found {said!r}"


# --- building ------------------------------------------------------------------------------------


def fill(
    found: Located,
    *,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust: Collection[str] = (),
    finite: bool = False,
) -> Model:
    """The proven plan, then the weights; nothing is returned half-loaded.

    `finite`: all of them are looked at, and NaN and infinity are refused.
    """
    checkpoint = found.checkpoint()
    check_trust(trust, checkpoint)
    model, plan = prove(found, checkpoint, config or {})
    modules = dict(model.named_modules())
    names: dict[str, list[str]] = {name: [name] for name in plan.native.shapes}
    for other, owner in plan.native.ties.items():
        names[owner].append(other)
    provenance = model.provenance = provenance_of(found, checkpoint, model, plan, dtype)
    faults: list[str] = []
    with enough(partial(_task, found, checkpoint, dtype), _ways_out()):
        for name, tensor in carry_out(plan, checkpoint.tensor, trust=trust):
            origin = partial(source_of, plan, checkpoint, name)
            if finite and (index := first_where(tensor)) is not None:
                faults.append(f"{origin()} (here {name}{index})")
            parameter = nn.Parameter(_placed(name, tensor, dtype, device, origin))
            for each in names[name]:
                owner, _, leaf = each.rpartition(".")
                modules[owner]._parameters[leaf] = parameter
    provenance.check()  # nothing of it was read while it changed
    if faults:
        raise NonFinite("\n  ".join([f"{found.where}: not finite:", *faults[:FAULTS]]))
    return model.eval()


def _ways_out() -> str:
    return (
        f"{option('mmap')} leaves weights in their file; else take a narrower dtype, a smaller "
        "model or another machine"
    )


def _task(found: Located, checkpoint: Checkpoint, dtype: torch.dtype | None) -> str:
    count = sum(info.numel for info in checkpoint.tensors.values())
    held = sum(info.nbytes for info in checkpoint.tensors.values())
    cast = "" if dtype is None else f", {size(count * dtype.itemsize)} as {dtype}"
    return f"{found.where}: weights of {size(held)}{cast}"


def check_trust(trust: Collection[str], checkpoint: Checkpoint) -> None:
    if isinstance(trust, str) or not isinstance(trust, Collection):
        raise UsageError(f"trust={trust!r}: expected several names")
    for name in trust:
        if name not in checkpoint.tensors:
            near = did_you_mean(str(name), checkpoint.tensors)
            raise UsageError(f"trust: no tensor {name!r} in {checkpoint.root}.{near}")


def provenance_of(
    found: Located,
    checkpoint: Checkpoint,
    model: Model,
    plan: Plan,
    dtype: torch.dtype | None = None,
) -> Provenance:
    return Provenance(
        ref=str(found.source.ref),
        directory=found.source.directory,
        architecture=found.entry.name,
        files=checkpoint.files,
        plan=plan,
        origin=_origin(found, checkpoint, plan),
        # a foreign file may not say all of it; what it says is read again when it is written
        config=model.config if found.foreign else found.config(model.config.head, {}),
        dtype=dtype,
        repo=found.source.repo,
        revision=found.source.revision,
        file=found.source.file,
        ignore_config=found.ignore_config,
        quantized=_quantized(found, checkpoint, plan),
        stamps={path: stamp(os.stat(path)) for path in checkpoint.files},
    )


def _quantized(found: Located, checkpoint: Checkpoint, plan: Plan) -> dict[str, str]:
    """What each native array's numbers stood in, by its files or a manifest beside them."""
    if found.native is not None:
        return dict(found.native.get("quantised") or {})
    known = dict[str, str]()
    if (found.source.directory / MANIFEST).is_file():
        from converters.manifest import decoded

        known = decoded(found.source.directory, checkpoint.files)
    for step in plan.steps:
        held = [checkpoint.quantized.get(name, "") for name in step.sources]
        for n, target in enumerate(step.targets):
            mine = held[n : n + 1] if step.transform is None else held
            if kinds := sorted({*mine} - {""}):
                known[target] = listing(kinds)
    return known


def prove(found: Located, checkpoint: Checkpoint, changes: Mapping[str, Any]) -> tuple[Model, Plan]:
    """A model on meta and the plan that fills it, for the first head that the weights fill."""
    where = found.where
    lacking: list[MissingTensors] = []
    wanted = set[str]()  # what heads before this one need
    for head in found.heads:
        model = on_meta(found, found.config(head, changes))
        _check_count(found, model, changes)
        native = native_of(model)
        if lacking and (wanted - _names(found, model, native)) & checkpoint.tensors.keys():
            continue  # of an earlier head that is there in part: it is damaged, not another
        try:
            if found.native is not None:
                return model, identity_plan(native, checkpoint.tensors, where)
            fields = model.config.to_dict()
            if found.foreign is not None:
                return model, _foreign_plan(found.foreign, fields, native, where)
            said = f"{where} ({found.spec.name})"
            plan = make_plan(
                found.spec, "hf", fields, native, checkpoint.tensors, said, checkpoint.spare
            )
            return model, replace(plan, dropped={**plan.dropped, **checkpoint.outside})
        except MissingTensors as error:
            lacking.append(error)
            if len(found.heads) > 1:
                wanted |= _names(found, model, native)
    least = min(lacking, key=lambda error: len(str(error)))  # of the head that lacks least
    if not checkpoint.unlisted:
        raise least
    told = f"{listing(checkpoint.unlisted)} lie there too, and the index does not name them"
    raise MissingTensors(f"{least}\n  {told}")


def _names(found: Located, model: Model, native: Native) -> set[str]:
    """What the files of such a model call its tensors, with and without the prefix."""
    dialect = found.spec.dialects[found.dialect]
    names = target_names(found.spec, found.dialect, model.config.to_dict(), native, bare=True)
    return {*names, *(dialect.prefix + name for name in names)}


def _foreign_plan(foreign: Found, fields: Mapping[str, Any], native: Native, where: str) -> Plan:
    checkpoint, name = foreign.checkpoint, foreign.dialect.name
    said = f"{where} ({foreign.spec.name}, {foreign.container.about or name})"
    fields = {**fields, "shards": foreign.shards}
    try:
        plan = make_plan(foreign.spec, name, fields, native, checkpoint.tensors, said)
    except ShapeMismatch as error:
        if foreign.container.sharded and (times := _times_too_small(foreign, native)) > 1:
            wanted = times * foreign.shards
            told = listing(path.name for path in checkpoint.files)
            raise MissingShard(
                f"{where}: {foreign.shards} of {wanted} files are there ({told}): tensors have "
                f"one in {times} of the numbers that {foreign.config_from} makes them have"
            ) from error
        raise
    return replace(plan, dropped={**plan.dropped, **checkpoint.outside})


def _times_too_small(foreign: Found, native: Native) -> int:
    """How many times the files there are would make a whole model; 1 where none would.

    What only shapes tell is taken from too few files, and fits them.
    """
    times = {1}
    for rule in foreign.dialect.weights:
        if "shard" not in rule.stacked:
            continue
        here = set[int]()
        for name, info in foreign.checkpoint.tensors.items():
            if (binding := rule.source.name.match(name)) is not None and info.numel:
                whole = prod(native.shapes.get(rule.targets[0].name.format(binding), ()))
                here.add(whole // (info.numel * foreign.shards))
        if len(here) > 1:  # one layer's alone is too small, which no missing file makes it
            return 1
        times |= here
    return max(times) if len(times) == 2 and 0 not in times else 1


def native_of(model: nn.Module) -> Native:
    """Names and shapes of a model's arrays; names that share one are ties."""
    shapes: dict[str, tuple[int, ...]] = {}
    ties: dict[str, str] = {}
    owner: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (first := owner.setdefault(id(parameter), name)) == name:
            shapes[name] = tuple(parameter.shape)
        else:
            ties[name] = first
    return Native(shapes, ties)


def on_meta(found: Located, config: Any) -> Model:
    try:
        with torch.device("meta"):
            model = found.entry.model(config)
    except RuntimeError as error:  # an array whose bytes 64 bits cannot count
        told = str(error).partition("\n")[0]
        raise ResourceLimit(f"{found.where}: sizes that no array can have: {told}") from None
    model.architecture = found.entry.name
    return model


def _random(
    found: Located,
    changes: Mapping[str, Any],
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> Model:
    config = found.config(found.heads[0], changes)
    with (
        enough(f"{found.where}: random weights", "Take a smaller config or a narrower dtype"),
        torch.device(device),
        _Dtype(dtype or torch.get_default_dtype()),
    ):
        model = found.entry.model(config)
    model.architecture = found.entry.name
    return model.eval()


class _Dtype(TorchFunctionMode):
    """What this thread makes of floats is of one dtype; torch's own default is the process's."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in _FLOATS and named.get("dtype") is None:
            named["dtype"] = self.dtype
        return func(*args, **named)


# factories whose result is of floats where no dtype is named
_FLOATS = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)


def _placed(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype | None,
    device: str | torch.device,
    origin: Callable[[Callable[[Tensor], Tensor]], str],
) -> Tensor:
    """On its device and in its dtype; the very same memory where that is where it is."""
    if dtype is None or dtype == tensor.dtype:
        return tensor.to(device)
    cast = tensor.to(device=device, dtype=dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and (torch.isinf(cast) & torch.isfinite(tensor).to(cast.device)).any():
        too_large = partial(_overflows, dtype=dtype)
        raise OverflowOnCast(
            f"{origin(too_large)}, which is beyond {dtype} (here "
            f"{name}{first_where(tensor, too_large)}); load it wider"
        )
    return cast


def _overflows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.isfinite() & x.to(dtype).isinf()


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        named = getattr(torch, dtype, None)
        dtype = named if isinstance(named, torch.dtype) else _bad_dtype(dtype)
    if dtype is not None and dtype not in DTYPES:
        known = ", ".join(str(kind).removeprefix("torch.") for kind in DTYPES)
        raise UsageError(f"dtype={dtype!r}: one of {known}")
    return dtype


def _bad_dtype(text: str) -> torch.dtype:
    known = [str(kind).removeprefix("torch.") for kind in DTYPES]
    near = did_you_mean(text, known)
    raise UsageError(f"dtype={text!r}: one of {', '.join(known)}.{near}")


def _origin(found: Located, checkpoint: Checkpoint, plan: Plan) -> Origin:
    if found.native is not None:
        return Origin.from_json(found.native["origin"])
    left_out = checkpoint.biases & plan.dropped.keys()
    held = {n: info for n, info in checkpoint.tensors.items() if n not in left_out}
    modern = {name: plan.modern.get(name, name) for name in held}
    # decoded, a file may be several times as large
    files = checkpoint.where if checkpoint.split is None else checkpoint.split
    return Origin(
        dialect=found.dialect,
        reference_class=found.reference_class,
        config=found.config_text,
        header={modern[name]: info for name, info in held.items()},
        where={modern[name]: files[name] for name in held},
        # what is not safetensors comes back as safetensors, labelled as the reference expects
        metadata=checkpoint.metadata if checkpoint.format == "safetensors" else {"format": "pt"},
    )
