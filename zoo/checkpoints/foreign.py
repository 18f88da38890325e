"""By which dialect of a model's spec somebody else's tensors are named, and the plan of it."""

from __future__ import annotations

from collections.abc import Mapping

from converters.formats import TensorInfo
from converters.plan import Native, Plan, make_plan
from converters.spec import Spec, load_spec
from zoo import registry
from zoo.components.model import Model
from zoo.errors import PlanError, UsageError


def spec_of(model: Model) -> Spec:
    """By which the model was loaded; what is wrong in it is wrong here too, and shows."""
    known = model.provenance
    if known is not None and "hf" in known.plan.spec.dialects:
        return known.plan.spec
    return load_spec(registry.architectures()[model.architecture].spec)


def fitted(model: Model, native: Native, header: Mapping[str, TensorInfo], what: str) -> Plan:
    """From tensors so named to a model that holds `native`, by the first dialect that they fit."""
    spec, fields, why = spec_of(model), model.config.to_dict(), list[str]()
    for dialect in spec.dialects:
        try:
            return make_plan(spec, dialect, fields, native, header, what)
        except PlanError as error:
            why.append(f"{dialect}: {str(error).splitlines()[-1].strip()}")
    raise UsageError(
        "\n  ".join([f"{what}: its names fit no dialect of {model.architecture}:", *why])
    )
