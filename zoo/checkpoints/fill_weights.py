"""Read weights from files into a model by a proven plan: all of them, or raise an error."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn

from converters.carry_out import carry_out
from converters.checkpoint import Checkpoint
from converters.memory import enough, size
from converters.plan import Plan
from zoo.checkpoints.finite import first_where, source_of
from zoo.checkpoints.handle import Located
from zoo.checkpoints.provenance import provenance_of
from zoo.components.model import Model
from zoo.errors import NonFinite, OverflowOnCast, option

FAULTS = 20  # that a message lists


def fill(
    model: Model,
    plan: Plan,
    located: Located,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust: Collection[str] = (),
    finite: bool = False,
) -> Model:
    """Read every weight into a model on the meta device, by its proven plan.

    Args:
        model: the model that `prove` returned.
        plan: its plan.
        located: where the checkpoint lies.
        checkpoint: its open files.
        dtype: what to cast weights to; None keeps them.
        device: where they go.
        trust: tensors on disk that win where tied ones differ.
        finite: whether NaN and infinity are searched for and refused.
    """
    modules = dict(model.named_modules())
    names: dict[str, list[str]] = {name: [name] for name in plan.native.shapes}
    for other, owner in plan.native.ties.items():
        names[owner].append(other)
    provenance = model.provenance = provenance_of(located, checkpoint, model, plan, dtype)
    faults: list[str] = []
    with enough(partial(_memory_task, located, checkpoint, dtype), memory_advice()):
        for name, tensor in carry_out(plan, checkpoint.tensor, trust=trust):
            origin = partial(source_of, plan, checkpoint, name)
            if finite and (index := first_where(tensor)) is not None:
                faults.append(f"{origin()} (here {name}{index})")
            parameter = nn.Parameter(_placed(name, tensor, dtype, device, origin))
            for each in names[name]:
                owner, _, leaf = each.rpartition(".")
                modules[owner]._parameters[leaf] = parameter
    provenance.check()  # nothing of it was read while it changed
    if faults:
        raise NonFinite("\n  ".join([f"{located.where}: not finite:", *faults[:FAULTS]]))
    return model.eval()


def memory_advice() -> str:
    """The advice in a message when memory runs out."""
    return (
        f"{option('mmap')} leaves weights in their file; else take a narrower dtype, a smaller "
        "model or another machine"
    )


def _memory_task(located: Located, checkpoint: Checkpoint, dtype: torch.dtype | None) -> str:
    count = sum(info.numel for info in checkpoint.tensors.values())
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    cast = "" if dtype is None else f", {size(count * dtype.itemsize)} as {dtype}"
    return f"{located.where}: weights of {size(stored)}{cast}"


def _placed(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype | None,
    device: str | torch.device,
    origin: Callable[[Callable[[Tensor], Tensor]], str],
) -> Tensor:
    """Move a tensor to its device and dtype; without a copy where it has both."""
    if dtype is None or dtype == tensor.dtype:
        return tensor.to(device)
    cast = tensor.to(device=device, dtype=dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and (torch.isinf(cast) & torch.isfinite(tensor).to(cast.device)).any():
        too_large = partial(_overflows, dtype=dtype)
        raise OverflowOnCast(
            f"{origin(too_large)}, which is beyond {dtype} (here "
            f"{name}{first_where(tensor, too_large)}); load it wider"
        )
    return cast


def _overflows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.isfinite() & x.to(dtype).isinf()
