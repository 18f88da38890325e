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
    """What the export looks like: as the source did, while the model still is that model."""
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
    """The plan that reads `origin` into the model; its inverse writes it."""
    spec = load_spec(entry_of(model).spec)
    fields, native = model.config.to_dict(), native_of(model)
    return make_plan(spec, origin.dialect, fields, native, origin.header, "export")


def native_record(model: Model, state: Mapping[str, Tensor]) -> bytes:
    """zoo.json: what a native directory holds, and what it was, or would be as an HF directory."""
    try:
        origin = origin_of(model, state)
    except LossyExport:  # nothing that the reference could say; other dialects can
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


def class_for_head(entry: registry.Architecture, head: str) -> str:
    return next(name for name, heads in entry.heads.items() if head in heads)


def entry_of(model: Model) -> registry.Architecture:
    entries = registry.architectures()
    if model.architecture:  # several may share one model's class
        return entries[model.architecture]
    return next(entry for entry in entries.values() if entry.model is type(model))


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


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


def quantized_of(model: Model) -> Mapping[str, str]:
    return {} if model.provenance is None else model.provenance.quantized
