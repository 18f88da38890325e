"""A model goes back to files: a directory that the reference loads as it is, or a native one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from converters.checkpoint import confined, shard, write_index
from converters.execute import invert
from converters.formats import TensorInfo, dtype_code
from converters.formats.safetensors import SafetensorsWriter
from converters.plan import Plan, make_plan, target_names
from converters.spec import load_spec
from converters.store import staged
from zoo import registry
from zoo.components.model import Model
from zoo.errors import OutputExists, UsageError, listing
from zoo.prepared import is_prepared
from zoo.pretrained import Origin, Ref, native_of
from zoo.sentences import SentenceModel
from zoo.sources import CONFIG, MODULE_WEIGHTS, MODULES, NATIVE_FILE, module_folders

DIALECTS = ("hf", "native")
SHARD_BYTES = 5 * 10**9
# what belongs to a checkpoint beside config and weights, and is carried along untouched
COMPANIONS = (
    *("*.json", "*.txt", "*.bpe", "*.model", "*.jinja", "*.tiktoken"),
    *("LICENSE*", "NOTICE*"),
)
NOT_CARRIED = ("config.json", NATIVE_FILE, "*.index.json", "zoo-manifest.json")


def save(
    model: Model,
    dst: Ref,
    *,
    to: str = "hf",
    force: bool = False,
    max_shard_size: int | None = None,
) -> Path:
    """Write a model: to="hf" for a directory that `transformers` loads, "native" for zoo's own.

    A model still as it was loaded keeps its source's split over files; `max_shard_size` (bytes)
    makes a new one.
    """
    check_dialect(to)
    if not isinstance(model, Model):
        raise UsageError(f"expected a model of zoo's, found {type(model).__name__}")
    if is_prepared(model):
        raise UsageError(
            "a prepared model holds its weights as this machine's kernels want them, and no file "
            "does: save the model as it was before zoo.prepare, or load it again"
        )
    if max_shard_size is not None and (type(max_shard_size) is not int or max_shard_size < 1):
        raise UsageError(f"max_shard_size={max_shard_size!r}: expected a number of bytes")
    destination = checked_destination(dst, None, force)
    steps: dict[str, nn.Module] = {}
    if isinstance(model, SentenceModel):
        steps, model = dict(zip(model.folders, model.steps, strict=True)), model.model
    state = {name: p.detach() for name, p in model.named_parameters()}
    origin = origin_of(model, state)
    with staged(destination, force=force) as stage:
        if to == "native":
            (stage / NATIVE_FILE).write_bytes(native_record(model, origin))
            _write_weights(stage, state, {}, {"format": "pt"}, max_shard_size)
        else:
            (stage / "config.json").write_text(origin.config, encoding="utf-8")
            plan = export_plan(model, origin)
            tensors = invert(plan, state)
            where = origin.where if max_shard_size is None else {}
            _write_weights(stage, tensors, where, origin.metadata, max_shard_size)
        if model.provenance is not None:
            _carry(model.provenance.directory, stage)
        for folder, step in steps.items():
            _write_step(stage / folder, step)
    return destination


def native_record(model: Model, origin: Origin) -> bytes:
    """zoo.json: what a native directory holds, and what it was."""
    record = {
        "architecture": _entry(model).name,
        "config": model.config.to_dict(),
        "origin": origin.to_json(),
    }
    return _json(record).encode()


def checked_destination(dst: Ref, source: Path | None, force: bool) -> Path:
    """Where to write; no force replaces the source, or a directory of checkpoints."""
    if not isinstance(dst, str | PathLike) or not os.fspath(dst):
        raise UsageError(f"expected a directory to write, found {dst!r}")
    place = Path(os.fsdecode(dst))
    if not force or not place.is_dir() or place.is_symlink():
        return place
    if source is not None and source.resolve().is_relative_to(place.resolve()):
        raise OutputExists(f"{place}: holds what is to be read, {source}. Write elsewhere")
    inside = [p.parent for name in (CONFIG, NATIVE_FILE) for p in place.glob(f"*/{name}")]
    if inside and not (place / MODULES).exists():
        held = listing(map(str, sorted(inside)), 5)
        raise OutputExists(f"{place}: holds checkpoints of its own, {held}. Write elsewhere")
    return place


def check_dialect(to: str) -> None:
    if to not in DIALECTS:
        raise UsageError(f"to={to!r}: one of {', '.join(DIALECTS)}")


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
    if provenance is not None and model.config == provenance.config:
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
    return Origin(
        origin.dialect, origin.reference_class, text, header, origin.where, origin.metadata
    )


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
    config: dict[str, Any] = {}
    if model.provenance is not None:  # fields that do not change inference stay as they were
        config = json.loads(model.provenance.origin.config)
    config.update(spec.dialect("hf").write_config(fields))
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


def _write_weights(
    stage: Path,
    tensors: Mapping[str, Tensor],
    where: Mapping[str, str],
    metadata: Mapping[str, str],
    max_shard_size: int | None,
) -> None:
    """One file, or the shards that `where` names, or new ones where it is too large for one."""
    infos = [
        TensorInfo(name, tuple(tensor.shape), dtype_code(tensor.dtype))
        for name, tensor in tensors.items()
    ]
    shards = as_before(infos, where) or shard(infos, max_shard_size or SHARD_BYTES)
    for name, members in shards:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        with SafetensorsWriter(stage / name, members, metadata=dict(metadata)) as writer:
            for info in members:
                writer.write(info.name, tensors[info.name])
    if len(shards) > 1:
        write_index(stage, shards)


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


def _write_step(folder: Path, step: nn.Module) -> None:
    """A sentence model's own layer, as it is now."""
    state = {name: p.detach() for name, p in step.named_parameters()}
    if state:
        for name in MODULE_WEIGHTS:
            (folder / name).unlink(missing_ok=True)
        _write_weights(folder, state, {}, {"format": "pt"}, None)


def companions(source: Path) -> dict[str, Path]:
    """What belongs to a checkpoint beside its weights, and what its modules' folders hold."""
    names = [
        path.name
        for path in sorted(source.iterdir())
        if any(fnmatch(path.name, pattern) for pattern in COMPANIONS)
        and not any(fnmatch(path.name, pattern) for pattern in NOT_CARRIED)
        and not path.is_dir()
    ]
    for _, folder in module_folders(source) if (source / MODULES).is_file() else ():
        files = (f"{folder}/{name}" for name in (CONFIG, *MODULE_WEIGHTS))
        names += [name for name in files if (source / name).exists()]
    return {name: confined(source, name) for name in names}


def _carry(source: Path, stage: Path) -> None:
    for name, path in companions(source).items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, stage / name)


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
