"""The other side of a comparison: the reference, a native model, or a user's own module."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from converters.formats import TensorInfo
from converters.plan import Native, Plan, identity_plan, make_plan
from zoo.checkpoints.build import native_of
from zoo.checkpoints.plan_by_names import plan_by_names, spec_of
from zoo.components.model import Model
from zoo.diagnosis.diff.matching import Fold, Planned
from zoo.parity.checks import call
from zoo.parity.reference import Reference
from zoo.parity.truth import Inputs

Header = Mapping[str, TensorInfo]


@dataclass
class Other:
    """Another model: how it is called, and what its parameters are in files of some dialect."""

    name: str
    module: nn.Module
    run: Callable[[Inputs], list[Tensor]]
    planned: Planned
    fold: Fold = str
    narrow: Other | None = None  # itself in a narrower dtype, where that is what is asked
    trusted: bool = False  # the reference: where they differ, the native side is wrong

    def __call__(self, inputs: Inputs) -> list[Tensor]:
        return self.run(inputs)


def native_side(model: Model) -> Native:
    """What it should hold, also where it lacks something by now."""
    return native_of(model) if model.provenance is None else model.provenance.plan.native


def reference(model: Model, directory: Path, reference_class: str, dtype: torch.dtype) -> Other:
    """The reference's own reading of a directory: in fp64 throughout, and in `dtype` too."""
    lifted = Reference(directory, reference_class, torch.float64, lifted=True)
    other = read_by(model, lifted)
    if dtype is not torch.float64:
        _round(lifted.model, dtype)
        other.narrow = read_by(model, Reference(directory, reference_class, dtype))
    return other


def read_by(model: Model, it: Reference) -> Other:
    """A reference that is there already, for a native model of the same directory."""
    spec, native = spec_of(model), native_side(model)
    named = it.oracle.reference_class

    def planned(header: Header) -> Plan:
        return make_plan(spec, "hf", model.config.to_dict(), native, header, named)

    def run(inputs: Inputs) -> list[Tensor]:
        return list(it(inputs.named).values())

    name = f"{named} of transformers"
    return Other(name, it.model, run, planned, it.oracle.fold(it.directory), trusted=True)


def native(model: Model, other: Model, dtype: torch.dtype, name: str) -> Other:
    """Another model of the same architecture, its own truth in fp64."""
    names, ties = native_side(model), native_side(other).ties

    def planned(header: Header) -> Plan:
        return identity_plan(names, header, name)

    def side(it: Model) -> Other:
        return Other(name, it, lambda inputs: call(it, inputs), planned, lambda n: ties.get(n, n))

    return _with_floor(side, other, dtype)


def module(model: Model, other: nn.Module, dtype: torch.dtype) -> Other:
    """Anybody's code of the same architecture, in any dialect whose names its parameters have."""
    names, kind = native_side(model), type(other).__name__

    def planned(header: Header) -> Plan:
        return plan_by_names(model, names, header, kind)

    def side(it: nn.Module) -> Other:
        return Other(kind, it, lambda inputs: _called(it, inputs), planned)

    return _with_floor(side, other, dtype)


def _called(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    """By the arguments that it names, token ids first; everything that it gives is kept."""
    accepted = inspect.signature(module.forward).parameters
    out = module(
        inputs.ids, **{n: x for n, x in inputs.named.items() if n in accepted and n != "input_ids"}
    )
    values = out.values() if isinstance(out, Mapping) else out if isinstance(out, tuple) else [out]
    return [x for x in values if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0]


def _with_floor(side: Callable[[Any], Other], other: nn.Module, dtype: torch.dtype) -> Other:
    truth = _copied(other).to(torch.float64).eval()
    floor = side(truth)
    if dtype is not torch.float64:
        _round(truth, dtype)
        floor.narrow = side(_copied(other).to(dtype).eval())
    return floor


def _copied(module: nn.Module) -> nn.Module:
    """Its own parameters; where it comes from is not copied."""
    return copy.deepcopy(module, {id(getattr(module, "provenance", None)): None})


@torch.no_grad()
def _round(module: nn.Module, dtype: torch.dtype) -> None:
    for p in module.parameters():
        p.copy_(p.to(dtype))
