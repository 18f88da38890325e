"""A checkpoint opened as far as possible: why it does not load, and its arrays by name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from converters.checkpoint import Checkpoint
from converters.containers import open_place
from converters.formats import open_regular
from converters.formats.safetensors import SafetensorsReader
from converters.lazy import Lazy
from converters.opening import open_checkpoint
from converters.paths import confined
from converters.plan import FLOATS, Fitting, Plan, PlanStep, what_fits
from converters.spec import Container
from converters.weight_files import SINGLE
from zoo.checkpoints.build import native_of, skeleton_of
from zoo.checkpoints.handle import Located
from zoo.checkpoints.locate import locate
from zoo.checkpoints.path_reference import expanded
from zoo.checkpoints.plan import prove
from zoo.checkpoints.sources import Ref, check_no_adapter
from zoo.components.model import Model
from zoo.errors import (
    AmbiguousCheckpoint,
    CheckpointError,
    SourceError,
    UnsupportedArchitecture,
    UsageError,
    ZooError,
)

T = TypeVar("T")
K = TypeVar("K")
_NUMBER = re.compile(r"(?<=[^0-9A-Za-z])\d+(?![0-9A-Za-z])|(?<=[a-z]_)\d+|(?<=/h)\d+")


def family_of(name: str) -> str:
    """Replace the layer's number by a star."""
    return _NUMBER.sub("*", name, count=1)


def group(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Collect items by their key; keys and items keep their order."""
    groups = dict[K, list[T]]()
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


@dataclass(frozen=True)
class Array:
    """An array of the model, or of the file where no rule says what the model makes of it."""

    name: str
    files: tuple[str, ...]  # names in the files
    shape: tuple[int, ...]
    dtype: str
    made: partial[Lazy] = field(repr=False)
    native: bool = True
    coarse: str = ""  # what its numbers stand in, where they are decoded
    # the same, if the matrix in the file, or the one made of it, is transposed in its own shape
    flips: tuple[partial[Lazy], ...] = field(default=(), repr=False)

    @cached_property
    def family(self) -> str:
        """Its name with a star for the layer's number."""
        return family_of(self.name)

    @cached_property
    def layer(self) -> int | None:
        """The layer's number; None outside the layers."""
        match = _NUMBER.search(self.name)
        return None if match is None else int(match[0])


@dataclass(frozen=True)
class Opened:
    """`refused` says why the checkpoint does not load; empty if it does."""

    ref: Ref
    checkpoint: Checkpoint = field(repr=False)
    arrays: tuple[Array, ...] = field(repr=False)
    refused: str = ""
    unknown: bool = False  # what the model is, or all of its config, and no more is against it
    located: Located | None = field(default=None, repr=False)
    model: Model | None = field(default=None, repr=False)  # on meta, if its config is understood
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]] = field(default_factory=dict)
    also: tuple[tuple[tuple[str, ...], ...], ...] = ()  # names that must hold the same

    @property
    def architecture(self) -> str:
        """The architecture's name; empty where it is unknown."""
        return "" if self.located is None else self.located.entry.name

    @property
    def config(self) -> Any:
        """The model's config; None where it is not understood."""
        return None if self.model is None else self.model.config

    @property
    def place(self) -> Path:
        """Where the tokenizer is looked for."""
        if self.located is not None:
            return self.located.source.file or self.located.source.directory
        return self.checkpoint.root


def opened(ref: Ref, config: Mapping[str, Any], **where: Any) -> Opened:
    """Open a checkpoint from its headers alone; raise where no file can be read."""
    refused = ""
    try:
        # without an adapter that lies beside the weights: what lies in the files is looked at
        located = locate(ref, adapter=False, **where)
        checkpoint = located.checkpoint()
    except UsageError:
        raise
    except ZooError as error:
        bare = _bare(ref)
        if bare is None:
            raise
        unknown = isinstance(error, SourceError | UnsupportedArchitecture | AmbiguousCheckpoint)
        return Opened(ref, bare, tuple(_loose(bare, ())), str(error), unknown)
    plan: Plan | None = None
    try:
        check_no_adapter(located.source)
    except ZooError as error:
        refused = str(error)
    try:
        model, plan = prove(located, checkpoint, config)
    except ZooError as error:
        refused = str(error)
        try:
            model = skeleton_of(located, config)
        except ZooError:
            loose, silent = tuple(_loose(checkpoint, ())), _is_silent(located, config)
            return Opened(ref, checkpoint, loose, refused, silent, located)
    fitting = Fitting(plan.steps, {}) if plan is not None else _fitting(located, model, checkpoint)
    arrays = [array for step in fitting.steps for array in _of_step(step, checkpoint)]
    mapped = {n for s in fitting.steps for names in (s.sources, *s.also) for n in names}
    mapped |= plan.dropped.keys() if plan is not None else _dropped(located, checkpoint)
    return Opened(
        ref,
        checkpoint,
        (*arrays, *_loose(checkpoint, mapped)),
        refused,
        located=located,
        model=model,
        misshapen=fitting.misshapen,
        also=tuple((step.sources, *step.also) for step in fitting.steps if step.also),
    )


def _is_silent(located: Located, config: Mapping[str, Any]) -> bool:
    """Whether the files lack only config fields that the programs of their format hard-code."""
    if located.foreign is None:
        return False
    dialect = located.foreign.dialect
    fields = {**located.fields, **dialect.native_names(config, located.fields)}
    return any(fields.get(name) is None for name in dialect.required)


def _fitting(located: Located, model: Model, checkpoint: Checkpoint) -> Fitting:
    fields, native = model.config.to_dict(), native_of(model)
    if located.native is not None:
        return what_fits(None, "native", {}, native, checkpoint.tensors)
    if located.foreign is not None:
        fields = {**fields, "shards": located.foreign.shards}
    return what_fits(located.spec, located.dialect, fields, native, checkpoint.tensors)


def _dropped(located: Located, checkpoint: Checkpoint) -> set[str]:
    """Return the tensors that the spec drops."""
    if located.native is not None:
        return set()
    dialect = located.spec.dialect(located.dialect)
    short = {name: name.removeprefix(dialect.prefix) for name in checkpoint.tensors}
    return {n for n, s in short.items() if dialect.dropped(n) or dialect.dropped(s)}


def _of_step(step: PlanStep, checkpoint: Checkpoint) -> Iterator[Array]:
    kinds = {checkpoint.quantized.get(name, "") for name in step.sources}
    coarse = next((kind for kind in sorted(kinds) if kind), "")
    for n, target in enumerate(step.targets):
        files = step.sources if step.transform is not None else step.sources[n : n + 1]
        info = checkpoint.tensors[files[0]]
        if info.dtype not in FLOATS:
            continue
        shape = info.shape
        if step.transform is not None:
            shape = tuple(_shape_of(step, n))
        made, flips = partial(_made, step, checkpoint, n), tuple[partial[Lazy], ...]()
        if len(shape) == 2 and not coarse:
            flips = _flips(made, shape)
            if step.transform is not None:
                each = (partial(_made, step, checkpoint, n, **flip.keywords) for flip in flips)
                flips = (*each, *flips)
        yield Array(target, files, shape, info.dtype, made, True, coarse, flips)


def _shape_of(step: PlanStep, n: int) -> Sequence[int]:
    import torch

    transform = step.transform
    assert transform is not None
    metas = [torch.empty(transform.source_shape(), device="meta")] * len(step.sources)
    return transform.targets_of(metas)[n].shape


def _made(step: PlanStep, checkpoint: Checkpoint, n: int, order: str = "") -> Lazy:
    if step.transform is None:
        return checkpoint.lazy(step.sources[n])
    sources = [checkpoint.lazy(name) for name in step.sources]
    if order:
        sources = [_flipped(partial(checkpoint.lazy, name), order) for name in step.sources]
    return step.transform.targets_of(sources)[n]


def _flips(made: partial[Lazy], shape: Sequence[int]) -> tuple[partial[Lazy], ...]:
    """Return both ways to transpose; of a square matrix they are the same."""
    orders = ("rows", "columns") if shape[0] != shape[1] else ("rows",)
    return tuple(partial(_flipped, made, order=order) for order in orders)


def _flipped(made: partial[Lazy], order: str) -> Lazy:
    """Undo that matrices, of the last two axes, hold their transposes in their own shape.

    With "rows" the right matrix was written by columns; with "columns" it was read by columns.
    """
    array = made()
    x = array.whole()
    if x.dim() < 2:
        return array
    if order == "rows":
        return Lazy.of(x.reshape(x.mT.shape).mT)
    return Lazy.of(x.mT.reshape(x.shape))


def _loose(checkpoint: Checkpoint, mapped: Collection[str]) -> Iterator[Array]:
    """Arrays that no rule maps; integers are skipped: they are tables, not weights."""
    for name, info in checkpoint.tensors.items():
        if name not in mapped and name not in checkpoint.shared and info.dtype in FLOATS:
            coarse = checkpoint.quantized.get(name, "")
            made = partial(checkpoint.lazy, name)
            flips = () if coarse or len(info.shape) != 2 else _flips(made, info.shape)
            yield Array(name, (name,), info.shape, info.dtype, made, False, coarse, flips)


# --- without a config ----------------------------------------------------------------------------


def _bare(ref: Ref) -> Checkpoint | None:
    """Return the tensors of files of an unknown architecture; None if there are none.

    Damaged files of a known format raise an error.
    """
    path = expanded(ref)
    try:
        if not path.exists():
            return None
    except (OSError, ValueError):  # too long, not ours to see, or no path at all
        return None
    damages = list[CheckpointError]()
    for way in (_safetensors, open_checkpoint, _by_content):
        try:
            if (checkpoint := way(path)) is not None:
                return checkpoint
        except CheckpointError as error:
            damages.append(error)
        except SourceError:
            continue
    if damages:
        raise damages[0]
    return None


def _safetensors(path: Path) -> Checkpoint | None:
    """One file, or the only one in a directory, whatever it is called."""
    if path.is_dir():
        files = sorted(path.glob("[!.]*.safetensors"))
        if len(files) != 1 or (path / f"{SINGLE}.index.json").exists():
            return None
        path = confined(path, files[0].name)
    descriptor = open_regular(path)
    try:
        head = os.pread(descriptor, 9, 0)
    finally:
        os.close(descriptor)
    if head[8:] != b"{":
        return None
    reader = SafetensorsReader(path)
    return Checkpoint(
        root=path.parent,
        format="safetensors",
        files=(path,),
        tensors=dict(reader.tensors),
        where=dict.fromkeys(reader.tensors, path.name),
        metadata=reader.metadata,
        readers={path.name: reader},
    )


def _by_content(path: Path) -> Checkpoint | None:
    container = open_place(path)
    return None if container is None else container.checkpoint(Container(format=container.kind))
