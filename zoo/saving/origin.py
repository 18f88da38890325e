"""The config and header that a model is written with: those of its source, or new ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from converters.formats import TensorInfo, dtype_code
from converters.output import digest
from converters.plan import Plan, make_plan, target_names
from converters.spec import Spec, load_spec
from zoo import registry
from zoo.checkpoints.build import native_of
from zoo.checkpoints.provenance import Origin, Provenance
from zoo.components.model import Model
from zoo.errors import (
    LossyExport,
)
from zoo.saving.export import same_config


def origin_of(model: Model, state: Mapping[str, Tensor]) -> Origin:
    """Return the config and header to write: those of the source while they still fit.

    A model whose config changed gets those of a checkpoint that the reference would save.
    """
    entry = entry_of(model)
    named = class_for_head(entry, model.config.head)
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


def export_plan(model: Model, origin: Origin) -> Plan:
    """Return the plan that reads `origin` into the model; its inverse writes it."""
    spec = load_spec(entry_of(model).spec)
    fields, native = model.config.to_dict(), native_of(model)
    return make_plan(spec, origin.dialect, fields, native, origin.header, "export")


def native_record(model: Model, state: Mapping[str, Tensor]) -> bytes:
    """Return zoo.json: the config of a native directory, and its origin as an HF directory."""
    try:
        origin = origin_of(model, state)
    except LossyExport:  # the reference cannot express it; other dialects can
        named = class_for_head(entry_of(model), model.config.head)
        origin = Origin("none", named, "{}", {}, {}, {})
    record = {
        "architecture": entry_of(model).name,
        "config": model.config.to_dict(),
        "origin": origin.to_json(),
    }
    if quantized := quantized_of(model):
        record["quantised"] = dict(sorted(quantized.items()))
    return _json(record).encode()


def _recast(origin: Origin, model: Model, state: Mapping[str, Tensor], dtype: str | None) -> Origin:
    """Return the same files with each tensor in the dtype that the model has now."""
    plan = export_plan(model, origin)
    header = dict(origin.header)
    changed = False
    for step in plan.steps:
        code = dtype_code(state[step.targets[0]].dtype)
        if header[step.sources[0]].dtype == code:
            continue  # unchanged; another name of it may be wider, and stays so
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
    """Return a checkpoint as the reference itself would save it."""
    spec = load_spec(entry.spec)
    fields = model.config.to_dict()
    # without a value the reference would use its class's default, and zoo uses none
    config: dict[str, Any] = {"eos_token_id": None}
    origin = model.provenance.origin if model.provenance is not None else None
    if origin is not None and origin.dialect == "hf":  # keep fields that do not change inference
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


def class_for_head(entry: registry.Architecture, head: str) -> str:
    """Return the reference class with this head."""
    return next(name for name, heads in entry.heads.items() if head in heads)


def entry_of(model: Model) -> registry.Architecture:
    """Return the registry entry of a model."""
    entries = registry.architectures()
    if model.architecture:  # several may share a class
        return entries[model.architecture]
    return next(entry for entry in entries.values() if entry.model is type(model))


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def said_of(architecture: str, to: str, spec: Spec) -> dict[str, Any]:
    """Return the fields of a manifest that describe a conversion."""
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
    """Return the fields of a manifest about dequantized weights, whose source cannot be restored.

    "quantised" lists those of the model that are no more precise than what they were stored in.
    """
    if provenance is None or not provenance.quantized:
        return {}
    named = dict(sorted(provenance.quantized.items()))
    return {"lossy": f"dequantized: {provenance.lossy}", "quantised": named}


def quantized_of(model: Model) -> Mapping[str, str]:
    """Return native name -> type that a weight was stored in."""
    return {} if model.provenance is None else model.provenance.quantized
