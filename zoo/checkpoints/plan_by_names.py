"""Plan tensors of another program, such as an optimizer's state, by the dialect their names fit."""

from __future__ import annotations

from collections.abc import Mapping

from converters.formats import TensorInfo
from converters.plan import Native, Plan, make_plan
from converters.spec import Spec, load_spec
from zoo import registry
from zoo.components.model import Model
from zoo.errors import PlanError, UsageError


def spec_of(model: Model) -> Spec:
    """Return the spec that a model was loaded by, mistakes and all; else its architecture's."""
    provenance = model.provenance
    if provenance is not None and "hf" in provenance.plan.spec.dialects:
        spec: Spec = provenance.plan.spec
        return spec
    return load_spec(registry.architectures()[model.architecture].spec)


def plan_by_names(
    model: Model, native: Native, header: Mapping[str, TensorInfo], what: str
) -> Plan:
    """Plan from tensors under these names to a model's own, by the first dialect that they fit.

    `native` has the names and shapes of the model's arrays, and `what` names the tensors in
    messages. Where no dialect fits, the message says of each dialect why.
    """
    spec, fields, reasons = spec_of(model), model.config.to_dict(), list[str]()
    for dialect in spec.dialects:
        try:
            return make_plan(spec, dialect, fields, native, header, what)
        except PlanError as error:
            reasons.append(f"{dialect}: {str(error).splitlines()[-1].strip()}")
    raise UsageError(
        "\n  ".join([f"{what}: its names fit no dialect of {model.architecture}:", *reasons])
    )
