"""Models without weights from files: on the meta device, or with random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from converters.memory import enough
from converters.plan import Native, target_names
from zoo.checkpoints.handle import Located
from zoo.components.model import Model
from zoo.errors import ResourceLimit, UsageError, did_you_mean

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype that a name such as "bfloat16" stands for; None stays None."""
    names = [str(kind).removeprefix("torch.") for kind in DTYPES]
    if isinstance(dtype, str):
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype):
            near = did_you_mean(dtype, names)
            raise UsageError(f"dtype={dtype!r}: one of {', '.join(names)}.{near}")
        dtype = named
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype={dtype!r}: one of {', '.join(names)}")
    return dtype


def on_meta(located: Located, config: Any) -> Model:
    """Build the model on the meta device: names and shapes, no memory."""
    try:
        with torch.device("meta"):
            model: Model = located.entry.model(config)
    except RuntimeError as error:  # an array whose bytes 64 bits cannot count
        reason = str(error).partition("\n")[0]
        raise ResourceLimit(f"{located.where}: sizes that no array can have: {reason}") from None
    model.architecture = located.entry.name
    return model


def skeleton_of(located: Located, changes: Mapping[str, Any] | None = None) -> Model:
    """Build the model of a located checkpoint on the meta device, for its first head."""
    return on_meta(located, located.config(located.heads[0], changes))


def native_of(model: nn.Module) -> Native:
    """Return names and shapes of a model's arrays; names that share one are ties."""
    shapes: dict[str, tuple[int, ...]] = {}
    ties: dict[str, str] = {}
    owner: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (first := owner.setdefault(id(parameter), name)) == name:
            shapes[name] = tuple(parameter.shape)
        else:
            ties[name] = first
    return Native(shapes, ties)


def names_on_disk(located: Located, model: Model, native: Native) -> set[str]:
    """Return what the files of such a model call its tensors, with and without the prefix."""
    dialect = located.spec.dialects[located.dialect]
    names = target_names(located.spec, located.dialect, model.config.to_dict(), native, bare=True)
    return {*names, *(dialect.prefix + name for name in names)}


def build_random(
    located: Located,
    changes: Mapping[str, Any],
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> Model:
    """Build the model with random weights, as the original initializes them."""
    config = located.config(located.heads[0], changes)
    with (
        enough(f"{located.where}: random weights", "Take a smaller config or a narrower dtype"),
        torch.device(device),
        _FloatDtype(dtype or torch.get_default_dtype()),
    ):
        model: Model = located.entry.model(config)
    model.architecture = located.entry.name
    return model.eval()


class _FloatDtype(TorchFunctionMode):
    """Create floats in one dtype, in this thread only: torch's default dtype is the process's."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in _FLOATS and named.get("dtype") is None:
            named["dtype"] = self.dtype
        return func(*args, **named)


# factories whose result is of floats where no dtype is named
_FLOATS = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
