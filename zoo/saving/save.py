"""A model goes back to files: a directory that the reference loads as it is, or a native one."""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from converters.checkpoint import MANIFEST, SHARD_BYTES, confined, shard
from converters.dialects import every_dialect
from converters.formats import TensorInfo, dtype_code, torch_dtype
from converters.formats.gguf import GGUFReader, Value, open_gguf
from converters.lazy import Lazy
from converters.manifest import finish
from converters.output import SINGLE, Item, Output, Shard, digest, index_of
from converters.plan import Plan, Step, make_plan, target_names
from converters.spec import Container, Spec, load_spec
from converters.store import Stage, check_place, staged
from converters.writer import Options, Report, run
from zoo import registry
from zoo.checkpoints.destination import Replacing
from zoo.checkpoints.sentences import SentenceModel
from zoo.checkpoints.sources import (
    ADAPTER,
    CONFIG,
    MODULE_WEIGHTS,
    MODULES,
    MORE_TEMPLATES,
    NATIVE_FILE,
    expanded,
    is_path,
    module_folders,
)
from zoo.components.model import Model
from zoo.errors import (
    BadTokenizer,
    LossyExport,
    OutputExists,
    UsageError,
    did_you_mean,
    listing,
)
from zoo.loading import Origin, Provenance, Ref, native_of
from zoo.lora.layers import Lora
from zoo.prepared.prepare import is_prepared
from zoo.saving import graphs
from zoo.saving.export import Export, dialects, export, same_config, with_zeros
from zoo.saving.graphs import GRAPHS
from zoo.text.inference import check_sources

OWN_FILES = ("hf", "native")  # written as safetensors
# what belongs to a checkpoint beside config and weights, and is carried along untouched
COMPANIONS = (
    *("*.json", "*.txt", "*.bpe", "*.model", "*.jinja", "*.tiktoken"),
    *("LICENSE*", "NOTICE*"),
)
LICENCES = ("LICENSE*", "NOTICE*")
# what a GGUF file says of itself, and not of what it holds
OWN_VALUES = ("architecture", "alignment", "file_type", "quantization_version", "type")
NOT_CARRIED = (
    *("config.json", NATIVE_FILE, "*.index.json", MANIFEST),
    *("quantize_config.json", "quant_config.json"),  # no weights are written as these say
    ADAPTER,  # merged in, or said to be: it would be applied a second time
)
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")  # whatever else they are called


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
    """Write a model: to="hf" for a directory that `transformers` loads, "native" for zoo's own.

    Other dialects are those of its spec, such as "meta" or "llama2c"; `layout` is what they offer
    to choose: {"shards": 2}, {"version": 1}. "onnx" and "pt2" (torch.export's) are graphs that run
    without zoo, for any batch and length; they are not read again. A model still as it was loaded
    keeps its source's split over files; `max_shard_size` (bytes) makes a new one. What is not
    finite is refused, unless `allow_nonfinite`.

    A model may be saved again over its own earlier output while nobody changed that one's weights
    and config. `force` replaces any checkpoint. Both keep all other files of the directory.
    """
    check_dialect(to)
    if not isinstance(model, Model):
        raise UsageError(f"expected a model of zoo's, found {type(model).__name__}")
    if is_prepared(model):
        raise UsageError(
            "a prepared model holds its weights as this machine's kernels want them, and no file "
            "does: save the model as it was before zoo.prepare, or load it again"
        )
    if any(isinstance(part, Lora) for part in model.modules()):
        raise UsageError(
            "an adapter stands beside the weights: merge_adapter() adds it to them, save_adapter() "
            "writes it alone, remove_adapter() leaves it away"
        )
    if max_shard_size is not None and (type(max_shard_size) is not int or max_shard_size < 1):
        raise UsageError(f"max_shard_size={max_shard_size!r}: expected a number of bytes")
    check_sources(model)
    destination = checked_destination(dst, None, force)
    if to in GRAPHS:
        check_graph(to, destination, layout, max_shard_size)
    output = _output(model, to, max_shard_size, layout)
    write(output, destination, force, allow_nonfinite)
    if model.provenance is not None:
        model.provenance.renew(destination)
    return destination


def write(output: Output, place: Path, force: bool, allow_nonfinite: bool = False) -> Path:
    """Publish what is made of a model in memory, beside files that somebody else has put there."""
    output = Replacing(output, force).without_kept(place)
    with staged(place, Replacing(output, force), restart=force, size=output.size) as stage:
        options = Options(sha256=False, allow_nonfinite=allow_nonfinite)
        finish(output, stage, run(output, Stage(stage), options), versions())
    return place


def finished(output: Output, directory: Path, report: Report) -> dict[str, Any]:
    """The directory made whole; what there is to tell of it."""
    finish(output, directory, report, versions())
    seen = {"zeros": report.zeros, "duplicates": report.duplicates}
    seen["left"] = [f"{what}: {why}" for what, why in output.said.get("left", {}).items()]
    return {"event": "done", "resumed": report.resumed, **seen}


def _graph_output(model: Model, to: str) -> Output:
    items = {name: item_of(name, p.detach()) for name, p in model.named_parameters()}
    shard, texts = graph_files(model, to, items)
    model = model.model if isinstance(model, SentenceModel) else model
    carried = {name: path for name, path in _carried(model).items() if not is_of_a_step(name)}
    said = _said(model, to)
    if (values := _values_within(model)) is not None:
        carried, more = unpacked(values, carried, said)
        texts |= more
    return Output((shard,), texts, carried, said=said)


def graph_files(model: Model, to: str, items: Mapping[str, Item]) -> tuple[Shard, dict[str, bytes]]:
    """(weights, the graph and an HF config); `items` are all arrays of the model."""
    shard, texts = graphs.files(model, to, items)
    inner, prefix = (model.model, "model.") if isinstance(model, SentenceModel) else (model, "")
    held = dict[str, Tensor]()
    for name, _ in inner.named_parameters():
        info = items[f"{prefix}{name}"].info
        held[name] = torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta")
    with suppress(LossyExport):  # nothing that the reference could say
        texts[CONFIG] = origin_of(inner, held).config.encode()
    return shard, texts


def is_of_a_step(name: str) -> bool:
    """Whether a file is of a sentence model's further layers, which are in its graph."""
    return name == MODULES or ("/" in name and not name.startswith(f"{MORE_TEMPLATES}/"))


def _check_values(model: Model) -> None:
    if without := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
        raise UsageError(f"{listing(without)}: on the meta device, where no values are")


def _output(
    model: Model, to: str, max_shard_size: int | None, layout: Mapping[str, Any] | None
) -> Output:
    """Files, headers and recipes of a model as it is."""
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
        coarse = _quantized(model)
        items = [item_of(name, tensor, name in coarse) for name, tensor in state.items()]
        metadata, where = {"format": "pt"}, {}
    else:
        origin = origin_of(model, state)
        texts = {CONFIG: origin.config.encode()}
        plan = export_plan(model, origin)
        items = in_order(_exported(plan, state, _quantized(model)), plan)
        metadata, where = dict(origin.metadata), dict(origin.where)
    shards = split(items, where if max_shard_size is None else {}, metadata, max_shard_size)
    texts |= index_of(shards)
    carried, said = _carried(model), _said(model, to)
    if (inside := _values_within(model)) is not None:
        carried, more = unpacked(inside, carried, said)
        texts |= more
    for folder, step in steps.items():  # a sentence model's own layers, as they are now
        if held := [item_of(name, p.detach()) for name, p in step.named_parameters()]:
            for name in MODULE_WEIGHTS:
                carried.pop(f"{folder}/{name}", None)
            shards.append(Shard.of(f"{folder}/{SINGLE}", held, {"format": "pt"}))
    return Output(tuple(shards), texts, carried, said=said)


def _exported_output(
    model: Model, state: Mapping[str, Tensor], to: str, layout: Mapping[str, Any] | None
) -> Output:
    spec = load_spec(_entry(model).spec)
    model, state = _with_zeros(model, state, to)
    dtypes = {name: dtype_code(tensor.dtype) for name, tensor in state.items()}
    origin = model.provenance.origin if model.provenance is not None else None
    said = json.loads(origin.config) if origin is not None and origin.dialect == to else None
    made = export(spec, to, model.config, native_of(model), dtypes, layout, said)
    exported = _exported(made.plan, state, _quantized(model))
    items = [item.cast(made.plan.header[item.name].dtype) for item in exported]
    carried, inside, told = _carried(model), _values_within(model), _said(model, to)
    shards, texts, carried = exported_files(made, items, carried, inside, told, model.config.vocab)
    return Output(tuple(shards), texts, carried, said=told)


def _with_zeros(
    model: Model, state: Mapping[str, Tensor], to: str
) -> tuple[Model, dict[str, Tensor]]:
    """The model that a dialect can say, and its tensors: those that it has more hold zeros."""
    dialect = load_spec(_entry(model).spec).dialects.get(to)
    if dialect is None:
        return model, dict(state)
    model, shapes = with_zeros(model, dialect)
    like = next(iter(state.values()))
    return model, {**state, **{name: like.new_zeros(shape) for name, shape in shapes.items()}}


def _carried(model: Model) -> dict[str, Path]:
    if (provenance := model.provenance) is None:
        return {}
    if not (place := provenance.file or provenance.directory).exists():
        told = "gone since the model was loaded. Weights and config are written, no tokenizer"
        warnings.warn(f"{place}: {told}", stacklevel=4)
        return {}
    dialect = load_spec(_entry(model).spec).dialects.get(provenance.origin.dialect)
    container = None if dialect is None else dialect.container
    return companions_of(provenance.directory, provenance.file, container)


def _values_within(model: Model) -> GGUFReader | None:
    """The GGUF file that a model is of, or the first of several."""
    if (known := model.provenance) is None or known.origin.dialect != "gguf":
        return None
    return next(iter(open_gguf(known.files[0]).values()))


def _said(model: Model, to: str) -> dict[str, Any]:
    entry = _entry(model)
    said = {**said_of(entry.name, to, load_spec(entry.spec)), **lossy_of(model.provenance)}
    return {**said, "writer": "zoo.save"}


def unpacked(
    inside: GGUFReader, carried: Mapping[str, Path], said: dict[str, Any]
) -> tuple[dict[str, Path], dict[str, bytes]]:
    """(files to carry along, files made of the vocabulary in a GGUF file).

    Of a vocabulary that no other file can say, `said` gets the reason.
    """
    from zoo.tokenizers import gguf

    if not gguf.has_vocabulary(inside.said):
        return dict(carried), {}
    try:
        made = gguf.files(inside.said, Path(inside.path.name))
    except BadTokenizer as error:
        said["left"], made = {"tokenizer": str(error)}, {}
    return licences(carried), made


def licences(carried: Mapping[str, Path]) -> dict[str, Path]:
    return {n: p for n, p in carried.items() if any(fnmatch(n, each) for each in LICENCES)}


def exported_files(
    made: Export,
    items: Iterable[Item],
    carried: Mapping[str, Path],
    inside: GGUFReader | None,
    said: dict[str, Any],
    vocab: int,
    **how: Any,
) -> tuple[list[Shard], dict[str, bytes], dict[str, Path]]:
    """(files of tensors, texts, files to carry along), each with the vocabulary it should hold."""
    from zoo.tokenizers import gguf, gguf_values, llama2c

    if made.container.format == "gguf":
        if MODULES in carried:
            told = "GGUF holds the model alone, and not what is made of its output"
            said["left"] = {MODULES: told}
        values: dict[str, Any] = {"tokenizer.ggml.model": "no_vocab"}
        own = inside is not None and gguf.has_vocabulary(inside.said)
        if inside is not None:
            skipped = {f"general.{name}" for name in OWN_VALUES}
            values |= {
                key: Value(inside.kinds[key], value)
                for key, value in inside.said.items()
                if key.partition(".")[0] in ("general", "tokenizer") and key not in skipped
            }
        if not made.options.get("vocabulary", 1):
            values = {k: v for k, v in values.items() if not k.startswith("tokenizer.")}
            values["tokenizer.ggml.model"] = "no_vocab"
        elif not own:
            values |= gguf_values.values_of(carried, vocab)
        shards, texts = made.files(items, values=values, **how)
        return shards, texts, licences(carried)
    shards, texts = made.files(items, **how)
    kept = dict(carried)
    if inside is not None:
        kept, more = unpacked(inside, carried, said)
        texts |= more
    if made.container.format == "llama2c" and llama2c.FILE not in kept:
        text = llama2c.from_sentencepiece(kept)
        texts |= {} if text is None else {llama2c.FILE: text}
    return shards, texts, kept


def item_of(name: str, tensor: Tensor, decoded: bool = False) -> Item:
    info = TensorInfo(name, tuple(tensor.shape), dtype_code(tensor.dtype))
    return Item(info, "", partial(Lazy.of, tensor), decoded=decoded)


def _exported(
    plan: Plan, state: Mapping[str, Tensor], quantized: Collection[str]
) -> Iterator[Item]:
    """Tensors under their names on disk, from those of the model."""

    def made(step: Step, n: int) -> Lazy:
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


def in_order(items: Iterable[Item], plan: Plan) -> list[Item]:
    """As the files that the plan is of have them."""
    order = {plan.modern.get(name, name): n for n, name in enumerate(plan.header)}
    return sorted(items, key=lambda item: order[item.name])


def split(
    items: list[Item], where: Mapping[str, str], metadata: Mapping[str, str], most: int | None
) -> list[Shard]:
    """Over the files that `where` names, or over new ones of `most` bytes."""
    by_name = {item.name: item for item in items}
    infos = [item.info for item in items]
    held = as_before(infos, where) or shard(infos, most or SHARD_BYTES)
    return [Shard.of(name, [by_name[i.name] for i in infos], metadata) for name, infos in held]


def said_of(architecture: str, to: str, spec: Spec) -> dict[str, Any]:
    """What a manifest names of how its files came to be."""
    rules = {
        name: [[str(rule) for rule in d.rules], {k: list(v) for k, v in d.config.items()}]
        for name, d in spec.dialects.items()
    }
    return {
        "architecture": architecture,
        "to": to,
        "spec": {"name": spec.name, "sha256": digest(rules)},
    }


def lossy_of(provenance: Provenance | None) -> dict[str, Any]:
    """What a manifest says of weights that were decoded: no conversion gives their source back.

    "quantised" names those of the model that are no more exact than what they stood in.
    """
    if provenance is None or not provenance.quantized:
        return {}
    named = dict(sorted(provenance.quantized.items()))
    return {"lossy": f"dequantized: {provenance.lossy}", "quantised": named}


def _quantized(model: Model) -> Mapping[str, str]:
    return {} if model.provenance is None else model.provenance.quantized


def versions() -> dict[str, str]:
    return {
        "zoo": zoo.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def native_record(model: Model, state: Mapping[str, Tensor]) -> bytes:
    """zoo.json: what a native directory holds, and what it was, or would be as an HF directory."""
    try:
        origin = origin_of(model, state)
    except LossyExport:  # nothing that the reference could say; other dialects can
        named = _class_of(_entry(model), model.config.head)
        origin = Origin("none", named, "{}", {}, {}, {})
    record = {
        "architecture": _entry(model).name,
        "config": model.config.to_dict(),
        "origin": origin.to_json(),
    }
    if quantized := _quantized(model):
        record["quantised"] = dict(sorted(quantized.items()))
    return _json(record).encode()


def checked_destination(dst: Ref, source: Path | None, force: bool) -> Path:
    """Where to write: nowhere that is never replaced, and not over the source."""
    if not is_path(dst):
        raise UsageError(f"expected a directory to write, found {dst!r}")
    place = expanded(dst)
    check_place(place)
    if not force or not place.is_dir() or place.is_symlink():
        return place
    # what was written beside a file, or within its directory, is nothing that is read
    read = [] if source is None else [source, *source.iterdir()]
    read = [path for path in read if not (path / MANIFEST).is_file() or path == source]
    if any(path.resolve().is_relative_to(place.resolve()) for path in read):
        raise OutputExists(f"{place}: holds what is to be read, {source}. Write elsewhere")
    return place


def check_dialect(to: str) -> None:
    if to not in OWN_FILES and to not in (known := dialects()):
        read = {d.name: f"{c.about} is read, and not written; " for _, d, c in every_dialect()}
        why = read.get(str(to), "")
        near = did_you_mean(str(to), known)
        raise UsageError(f"to={to!r}: {why}one of {', '.join(known)}.{near}")


def check_graph(
    to: str, place: Path, layout: Mapping[str, Any] | None, max_shard_size: int | None
) -> None:
    """What writing a graph needs is there, and it leaves to choose what is asked for."""
    check_no_layout(to, layout)
    if max_shard_size is not None:
        raise UsageError(
            f"max_shard_size: to={to!r} leaves that not to choose: its weights are one file"
        )
    graphs.check(to)
    graphs.check_file(place)


def check_whole(to: str, max_shard_size: int | None) -> None:
    """Other programs look for the files that they know."""
    if max_shard_size is not None:
        raise UsageError(
            f"max_shard_size: to={to!r} leaves that not to choose: its files are those that its "
            "programs look for. layout= has what they let be chosen"
        )


def check_no_layout(to: str, layout: Mapping[str, Any] | None) -> None:
    if layout:
        raise UsageError(f"layout: {to} leaves nothing to choose, found {listing(layout)}")


def _entry(model: Model) -> registry.Architecture:
    known = registry.architectures()
    if model.architecture:  # several may share one model's class
        return known[model.architecture]
    return next(entry for entry in known.values() if entry.model is type(model))


def export_plan(model: Model, origin: Origin) -> Plan:
    """The plan that reads `origin` into the model; its inverse writes it."""
    spec = load_spec(_entry(model).spec)
    fields, native = model.config.to_dict(), native_of(model)
    return make_plan(spec, origin.dialect, fields, native, origin.header, "export")


def origin_of(model: Model, state: Mapping[str, Tensor]) -> Origin:
    """What the export looks like: as the source did, while the model still is that model."""
    entry = _entry(model)
    named = _class_of(entry, model.config.head)
    dtypes = {dtype_code(tensor.dtype) for tensor in state.values()}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else None
    provenance = model.provenance
    foreign = provenance is not None and provenance.origin.dialect != "hf"
    if provenance is not None and model.config == provenance.config and not foreign:
        origin: Origin = provenance.origin
        if origin.reference_class is not None and model.config.head in entry.heads.get(
            origin.reference_class, ()
        ):
            return _recast(origin, model, state, dtype)
    return _fresh(model, state, entry, named, dtype)


def _class_of(entry: registry.Architecture, head: str) -> str:
    return next(name for name, heads in entry.heads.items() if head in heads)


def _recast(origin: Origin, model: Model, state: Mapping[str, Tensor], dtype: str | None) -> Origin:
    """The same files, with each tensor in the dtype that the model holds it in."""
    plan = export_plan(model, origin)
    header = dict(origin.header)
    changed = False
    for step in plan.steps:
        code = dtype_code(state[step.targets[0]].dtype)
        if header[step.sources[0]].dtype == code:
            continue  # as it was; another name of it may be wider, and stays so
        for name in (*step.sources, *(n for names in step.also for n in names)):
            if header[name].dtype != code:
                header[name] = TensorInfo(name, header[name].shape, code)
                changed = True
    if not changed:
        return origin
    config = json.loads(origin.config)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = _DTYPE_NAMES.get(dtype or "", config.get(key))
    text = _json({k: v for k, v in config.items() if v is not None or k != key})
    return origin._replace(config=text, header=header)


_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _fresh(
    model: Model,
    state: Mapping[str, Tensor],
    entry: registry.Architecture,
    named: str,
    dtype: str | None,
) -> Origin:
    """A checkpoint as the reference itself would save it."""
    spec = load_spec(entry.spec)
    fields = model.config.to_dict()
    # with no end said, the reference would take its class's own, and zoo takes none
    config: dict[str, Any] = {"eos_token_id": None}
    origin = model.provenance.origin if model.provenance is not None else None
    if origin is not None and origin.dialect == "hf":  # what changes no inference stays as it was
        config = json.loads(origin.config)
    config.update(spec.dialect("hf").write_config(fields))
    read, _ = spec.dialect("hf").read_config(config)
    same_config(spec.dialect("hf"), model.config, {**read, "head": model.config.head})
    config["architectures"] = [named]
    config["model_type"] = entry.model_type
    if dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = _DTYPE_NAMES[dtype]
    native = native_of(model)
    bare = model.config.head in ("none", "pooler")
    wanted = target_names(spec, "hf", fields, native, bare=bare)
    plan = make_plan(spec, "hf", fields, native, wanted, "export")
    for step in plan.steps:
        code = dtype_code(state[step.targets[0]].dtype)
        for name in step.sources:
            wanted[name] = TensorInfo(name, wanted[name].shape, code)
    text = _json(config)
    return Origin("hf", named, text, wanted, {}, {"format": "pt"})


def as_before(
    infos: Iterable[TensorInfo], where: Mapping[str, str]
) -> list[tuple[str, list[TensorInfo]]]:
    """The source's own split over files, under the names that safetensors have."""
    files: dict[str, list[TensorInfo]] = {}
    for info in infos:
        if info.name not in where:
            return []
        name = where[info.name]
        if not name.endswith(".safetensors"):
            name = f"{Path(name).stem.replace('pytorch_model', 'model')}.safetensors"
        files.setdefault(name, []).append(info)
    return sorted(files.items())


def companions(source: Path) -> dict[str, Path]:
    """What belongs to a checkpoint beside its weights, and what its modules' folders hold."""
    names = [
        path.name
        for path in sorted(source.iterdir())
        if any(fnmatch(path.name, pattern) for pattern in COMPANIONS)
        and not any(fnmatch(path.name, pattern) for pattern in (*NOT_CARRIED, *WEIGHTS))
        and not path.is_dir()
    ]
    for _, folder in module_folders(source) if (source / MODULES).is_file() else ():
        files = (f"{folder}/{name}" for name in (CONFIG, *MODULE_WEIGHTS))
        names += [name for name in files if (source / name).exists()]
    names += [
        f"{MORE_TEMPLATES}/{p.name}" for p in sorted(source.glob(f"{MORE_TEMPLATES}/*.jinja"))
    ]
    return {name: confined(source, name) for name in names}


def companions_of(
    directory: Path, file: Path | None, container: Container | None
) -> dict[str, Path]:
    """Likewise of a checkpoint in any dialect; of a file that was given alone, its tokenizer."""
    from zoo.tokenizers.load import beside

    if file is None:
        held = companions(directory)
        configs = {c.config for _, _, c in every_dialect()} - {""}
        held = {name: path for name, path in held.items() if name not in configs}
    else:
        held = beside(file)
    others = container.names if container is not None else {}
    if any(other in held for other in others.values()):
        return held
    return {others.get(name, name): path for name, path in held.items()}


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
