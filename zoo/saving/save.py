"""`zoo.save`: write a model as a directory that the reference loads, or in another dialect."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from converters.formats import TensorInfo, dtype_code
from converters.formats.gguf import GGUFReader, open_gguf
from converters.lazy import Lazy
from converters.output import Item, Output, Shard, index_of
from converters.plan import Plan, PlanStep
from converters.spec import load_spec
from converters.weight_files import SINGLE
from zoo.checkpoints.build import native_of
from zoo.checkpoints.file_names import CONFIG, MODULE_WEIGHTS, NATIVE_FILE
from zoo.checkpoints.provenance import check_sources
from zoo.checkpoints.publish import checked_destination, write
from zoo.checkpoints.sentences import SentenceModel
from zoo.checkpoints.sources import Ref
from zoo.components.model import Model
from zoo.errors import UsageError, listing
from zoo.lora.layers import Lora
from zoo.saving.checks import OWN_FILES, check_dialect, check_graph, check_no_layout, check_whole
from zoo.saving.companions import companions_of, exported_files, is_of_a_step, unpacked
from zoo.saving.export import export, with_zeros
from zoo.saving.graphs import GRAPHS
from zoo.saving.origin import (
    entry_of,
    export_plan,
    lossy_of,
    native_record,
    origin_of,
    quantized_of,
    said_of,
)
from zoo.saving.outputs import graph_files, in_order, item_of, split


def save(
    model: Model,
    dst: Ref,
    *,
    to: str = "hf",
    force: bool = False,
    max_shard_size: int | None = None,
    layout: Mapping[str, Any] | None = None,
    allow_nonfinite: bool = False,
) -> Path:
    """Write a model to a directory.

    A model that has not changed since it was loaded keeps the names, dtypes, bytes and split of its
    source. A model may be saved again over its own earlier output, unless that has been changed.

    Args:
        model: A model of zoo's, not prepared and without an adapter beside its weights.
        dst: The directory to write. Files in it that are no checkpoint's are kept.
        to: "hf" for a directory that `transformers` loads, "native" for zoo's own layout, another
            dialect of the architecture such as "gguf", "meta" or "llama2c", or a graph that runs
            without zoo, "onnx" or "pt2".
        force: Whether to replace any checkpoint at `dst`.
        max_shard_size: Bytes of a file of weights; by default the source's split, or 5 GB.
        layout: Options of the dialect, such as {"shards": 2} or {"version": 1}.
        allow_nonfinite: Whether to write NaN and infinity instead of refusing them.

    Returns:
        The directory.

    Raises:
        UsageError: If the model or an argument does not fit.
        LossyExport: If the dialect cannot express the model.
        OutputExists: If something else is at `dst`.
        NonFinite: If a weight is NaN or infinite.

    Example:
        >>> import tempfile, zoo
        >>> from zoo.models.gpt2 import Config, Model
        >>> model = Model(Config(vocab=11, dim=8, layers=1, heads=2, positions=16)).eval()
        >>> directory = zoo.save(model, tempfile.mkdtemp() + "/tiny")
        >>> sorted(path.name for path in directory.iterdir())
        ['config.json', 'model.safetensors', 'zoo-manifest.json']
    """
    check_dialect(to)
    if not isinstance(model, Model):
        raise UsageError(f"expected a model of zoo's, found {type(model).__name__}")
    if model.is_prepared:
        raise UsageError(
            "a prepared model has its weights in the layout of this machine's kernels, and no file "
            "has: save the model from before zoo.prepare, or load it again"
        )
    if any(isinstance(part, Lora) for part in model.modules()):
        raise UsageError(
            "the model has an adapter: merge_adapter() adds it to the weights, save_adapter() "
            "writes it by itself, remove_adapter() removes it"
        )
    if max_shard_size is not None and (type(max_shard_size) is not int or max_shard_size < 1):
        raise UsageError(f"max_shard_size={max_shard_size!r}: expected a number of bytes")
    check_sources(model)
    destination = checked_destination(dst, None, force)
    if to in GRAPHS:
        check_graph(to, destination, layout, max_shard_size)
    output = output_of(model, to, max_shard_size, layout)
    write(output, destination, force, allow_nonfinite)
    if model.provenance is not None:
        model.provenance.renew(destination)
    return destination


def _graph_output(model: Model, to: str) -> Output:
    items = {name: item_of(name, p.detach()) for name, p in model.named_parameters()}
    shard, texts = graph_files(model, to, items)
    model = model.model if isinstance(model, SentenceModel) else model
    carried = {name: path for name, path in _carried(model).items() if not is_of_a_step(name)}
    notes = _notes(model, to)
    if (values := _values_within(model)) is not None:
        carried, more = unpacked(values, carried, notes)
        texts |= more
    return Output((shard,), texts, carried, notes=notes)


def _check_values(model: Model) -> None:
    if without := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
        raise UsageError(f"{listing(without)}: on the meta device, where no values are")


def output_of(
    model: Model,
    to: str = "hf",
    max_shard_size: int | None = None,
    layout: Mapping[str, Any] | None = None,
) -> Output:
    """Return the files, headers and sources of a model in memory."""
    if to in GRAPHS:
        _check_values(model)
        return _graph_output(model, to)
    steps: dict[str, nn.Module] = {}
    if isinstance(model, SentenceModel):
        steps, model = dict(zip(model.folders, model.steps, strict=True)), model.model
    _check_values(model)
    state = {name: p.detach() for name, p in model.named_parameters()}
    if to not in OWN_FILES:
        check_whole(to, max_shard_size)
        return _exported_output(model, state, to, layout)
    check_no_layout(to, layout)
    if to == "hf":
        model, state = _with_zeros(model, state, to)
    if to == "native":
        texts = {NATIVE_FILE: native_record(model, state)}
        coarse = quantized_of(model)
        items = [item_of(name, tensor, name in coarse) for name, tensor in state.items()]
        metadata, where = {"format": "pt"}, {}
    else:
        origin = origin_of(model, state)
        texts = {CONFIG: origin.config.encode()}
        plan = export_plan(model, origin)
        items = in_order(_exported(plan, state, quantized_of(model)), plan)
        metadata, where = dict(origin.metadata), dict(origin.where)
    shards = split(items, where if max_shard_size is None else {}, metadata, max_shard_size)
    texts |= index_of(shards)
    carried, notes = _carried(model), _notes(model, to)
    if (inside := _values_within(model)) is not None:
        carried, more = unpacked(inside, carried, notes)
        texts |= more
    for folder, step in steps.items():  # a sentence model's own layers, as they are now
        if step_items := [item_of(name, p.detach()) for name, p in step.named_parameters()]:
            for name in MODULE_WEIGHTS:
                carried.pop(f"{folder}/{name}", None)
            shards.append(Shard.of(f"{folder}/{SINGLE}", step_items, {"format": "pt"}))
    return Output(tuple(shards), texts, carried, notes=notes)


def _exported_output(
    model: Model, state: Mapping[str, Tensor], to: str, layout: Mapping[str, Any] | None
) -> Output:
    spec = load_spec(entry_of(model).spec)
    model, state = _with_zeros(model, state, to)
    dtypes = {name: dtype_code(tensor.dtype) for name, tensor in state.items()}
    origin = model.provenance.origin if model.provenance is not None else None
    published = json.loads(origin.config) if origin is not None and origin.dialect == to else None
    made = export(spec, to, model.config, native_of(model), dtypes, layout, published)
    exported = _exported(made.plan, state, quantized_of(model))
    items = [item.cast(made.plan.header[item.name].dtype) for item in exported]
    carried, inside, notes = _carried(model), _values_within(model), _notes(model, to)
    shards, texts, carried = exported_files(made, items, carried, inside, notes, model.config.vocab)
    return Output(tuple(shards), texts, carried, notes=notes)


def _with_zeros(
    model: Model, state: Mapping[str, Tensor], to: str
) -> tuple[Model, dict[str, Tensor]]:
    """Return (a model that the dialect can express, its tensors): additional ones hold zeros."""
    dialect = load_spec(entry_of(model).spec).dialects.get(to)
    if dialect is None:
        return model, dict(state)
    model, shapes = with_zeros(model, dialect)
    like = next(iter(state.values()))
    return model, {**state, **{name: like.new_zeros(shape) for name, shape in shapes.items()}}


def _carried(model: Model) -> dict[str, Path]:
    if (provenance := model.provenance) is None:
        return {}
    if not (place := provenance.file or provenance.directory).exists():
        fault = "gone since the model was loaded. Weights and config are written, no tokenizer"
        warnings.warn(f"{place}: {fault}", stacklevel=4)
        return {}
    dialect = load_spec(entry_of(model).spec).dialects.get(provenance.origin.dialect)
    container = None if dialect is None else dialect.container
    return companions_of(provenance.directory, provenance.file, container)


def _values_within(model: Model) -> GGUFReader | None:
    """Return the GGUF file that a model was loaded from, or the first of several."""
    if (provenance := model.provenance) is None or provenance.origin.dialect != "gguf":
        return None
    return next(iter(open_gguf(provenance.files[0]).values()))


def _notes(model: Model, to: str) -> dict[str, Any]:
    entry = entry_of(model)
    notes = {**said_of(entry.name, to, load_spec(entry.spec)), **lossy_of(model.provenance)}
    return {**notes, "writer": "zoo.save"}


def _exported(
    plan: Plan, state: Mapping[str, Tensor], quantized: Collection[str]
) -> Iterator[Item]:
    """Yield the tensors of the model under their names on disk."""

    def made(step: PlanStep, n: int) -> Lazy:
        tensors = [state[name] for name in step.targets]
        if step.transform is None:
            return Lazy.of(tensors[n])
        return step.transform.sources_of(tensors)[n]

    for step in plan.steps:
        dtype = dtype_code(state[step.targets[0]].dtype)
        coarse = any(name in quantized for name in step.targets)
        for names in (step.sources, *step.also):
            for n, name in enumerate(names):
                info = TensorInfo(plan.modern.get(name, name), plan.header[name].shape, dtype)
                source = f"the model's {listing(step.targets)}"
                make = partial(made, step, n)
                yield Item(info, str(step.rule), make, decoded=coarse, source=source)
