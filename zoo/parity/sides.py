"""What a model is held against: the reference, another native model, or a module of one's own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from converters.plan import Native, Plan, identity_plan, make_plan
from converters.formats import TensorInfo
from converters.spec import Spec
from zoo.components.model import Model
from zoo.errors import PlanError, UsageError, listing
from zoo.parity.compare import call
from zoo.parity.matching import Fold, Planned
from zoo.parity.reference import Reference
from zoo.parity.truth import Inputs
from zoo.pretrained import native_of

Header = Mapping[str, TensorInfo]


@dataclass
class Other:
    """Another model: how it is called, and what its parameters are called in the files of whom."""

    name: str
    module: nn.Module
    run: Callable[[Inputs], list[Tensor]]
    planned: Planned
    fold: Fold = str
    narrow: Other | None = None  # itself in a narrower dtype, where that is what is asked

    def __call__(self, inputs: Inputs) -> list[Tensor]:
        return self.run(inputs)


def reference(
    model: Model, spec: Spec, directory: Path, reference_class: str, dtype: torch.dtype
) -> Other:
    """In fp64 throughout; and in `dtype` too, for the same weights."""
    native = native_of(model) if model.provenance is None else model.provenance.plan.native

    def planned(header: Header) -> Plan:
        return make_plan(spec, "hf", model.config.to_dict(), native, header, reference_class)

    def side(it: Reference) -> Other:
        name = f"{reference_class} of transformers"
        return Other(
            name,
            it.model,
            lambda inputs: list(it(inputs.named).values()),
            planned,
            it.oracle.fold(directory),
        )

    lifted = Reference(directory, reference_class, torch.float64, lifted=True)
    found = side(lifted)
    if dtype is not torch.float64:
        with torch.no_grad():
            for p in lifted.model.parameters():
                p.copy_(p.to(dtype))
        found.narrow = side(Reference(directory, reference_class, dtype))
    return found
