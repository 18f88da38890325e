"""Detect NaN and infinity in a model's outputs, and trace them to the tensor they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from converters.carry_out import carry_out
from converters.checkpoint import Checkpoint
from converters.plan import Plan
from zoo.checkpoints.locate import locate
from zoo.components.model import Model
from zoo.errors import NonFinite, ZooError, listing

Bad = Callable[[Tensor], Tensor]  # gives a mask of the values to search for
_BLOCK = 1 << 20  # values checked at once
_UNOPENED = "The files that the model was loaded from could not be opened again"
_AGAIN = "The file is damaged, or was saved by a training run that diverged: take another one"


def nonfinite(x: Tensor) -> Tensor:
    """True where a value is NaN or infinite."""
    return ~x.isfinite()


def first_where(x: Tensor, bad: Bad = nonfinite) -> list[int] | None:
    """Return the index of the first such value; reads in blocks, since files may be mapped."""
    if x.dim() == 0:
        return [] if bool(bad(x)) else None
    rows = max(1, _BLOCK * len(x) // max(1, x.numel()))
    for start in range(0, len(x), rows):
        mask = bad(x[start : start + rows])
        if bool(mask.any()):
            first, *rest = mask.nonzero()[0].tolist()
            return [start + first, *rest]
    return None


def at(x: Tensor, index: list[int]) -> str:
    """Spell a value: "[3, 7] is nan", or "is nan" for a scalar."""
    return f"{index or ''} is {x[tuple(index)].item():g}"


def source_of(plan: Plan, checkpoint: Checkpoint, name: str, bad: Bad = nonfinite) -> str:
    """Name the file, the tensor in it and the index that such a value of a native array is from."""
    name = plan.native.ties.get(name, name)
    step = next(step for step in plan.steps if name in step.targets)
    names = [*step.sources, *(other for names in step.also for other in names)]
    if step.transform is None:
        names = names[step.targets.index(name) :: len(step.targets)]
    for source in names:
        if (index := first_where(tensor := checkpoint.tensor(source), bad)) is not None:
            return f"{checkpoint.where[source]}: {source}{at(tensor, index)}"
    return f"{checkpoint.where[names[0]]}: {listing(names)}"


def faults_of(plan: Plan, checkpoint: Checkpoint) -> Iterator[str]:
    """Describe every native array with a value that is not finite, and where it comes from."""
    for name, tensor in carry_out(plan, checkpoint.tensor, trust=tuple(checkpoint.tensors)):
        if (index := first_where(tensor)) is not None:
            yield f"{source_of(plan, checkpoint, name)} (here {name}{index})"


def check_finite(
    model: Model,
    values: Tensor,
    what: str = "logits",
    row: Callable[[int], int | None] = lambda n: n,
    again: Callable[[], Any] | None = None,
) -> None:
    """Raise NonFinite, naming the cause, where a model gave values that are not finite.

    `row` maps a row of `values` to the caller's number for it; `again` repeats the computation.
    Weights are searched only after a failure: a passing check costs one pass over `values`.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    # a sum is finite if all of its terms are, but for a few that are too large together
    if values.is_meta or bool(values.sum(dtype=wide).isfinite()) or bool(values.isfinite().all()):
        return
    n = first_where(values)
    number = row(n[0]) if n else None
    of = "" if number is None else f" of row {number}"
    raise NonFinite(f"{what}{of} not finite: {_cause(model, values.dtype, again)}")


@contextmanager
def watched(model: Model) -> Iterator[None]:
    """Raise NonFinite if a weight in use is not finite, even if the outputs are.

    torch's fused attention turns a row of NaN into zeros: with NaN in q or k, logits may be finite
    and wrong. So the output of each layer is summed, which costs little beside computing it.
    Compiled models are not watched: hooks would compile them again.
    """
    sums: list[Tensor] = []

    def add(_: nn.Module, inputs: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.is_floating_point() and not out.is_meta:
            sums.append(out.sum(dtype=torch.promote_types(out.dtype, torch.float32)))

    compiled = getattr(model, "_compiled_call_impl", None) is not None
    layers = [] if compiled else filter(_is_layer, model.modules())
    hooks = [layer.register_forward_hook(add) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if all(bool(total.isfinite()) for total in sums):
        return
    try:
        fault = _fault(model)
    except (
        ZooError,
        OSError,
    ):  # prepared, and its files are gone: what it gives counts
        return
    if fault:
        raise NonFinite(f"a weight is not finite: {fault}")


def _is_layer(module: nn.Module) -> bool:
    """Whether it holds weights of its own, and no other modules."""
    tensors = (module.parameters(recurse=False), module.buffers(recurse=False))
    has_weights = any(next(each, None) is not None for each in tensors) or hasattr(module, "packed")
    return has_weights and next(module.children(), None) is None


def _fault(model: Model) -> str:
    """The first weight that is not finite, and its source; empty if all are finite."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and (index := first_where(tensor)) is not None:
            try:
                return _traced(model, name, tensor, index)
            except (ZooError, OSError) as error:
                return f"{name}{at(tensor, index)}. {_UNOPENED}: {error}"
    packed = _opened(model) if model.is_prepared else None
    if packed is not None and (fault := next(faults_of(*packed), None)) is not None:
        return f"{packed[1].root}: {fault}. {_AGAIN}"
    return ""


def _cause(model: Model, dtype: torch.dtype, again: Callable[[], Any] | None) -> str:
    try:
        if fault := _fault(model):
            return fault
    except (ZooError, OSError) as error:
        return f"either a weight is not, or the model overflows. {_UNOPENED}: {error}"
    first = _first_module(model, again) if again is not None else ""
    first = f"; the first module to give such values is {first}" if first else ""
    wider = {torch.float16: "bfloat16' or 'float32"}.get(dtype, "float64")
    return (
        f"all weights are finite, so the model overflows in {str(dtype).removeprefix('torch.')}"
        f"{first}. Load it with dtype='{wider}'"
    )


def _traced(model: Model, name: str, tensor: Tensor, index: list[int]) -> str:
    here = f"{name}{at(tensor, index)}"
    if model.adapter is not None:
        for module, pieces in model.adapter.pieces.items():
            for piece in pieces:
                if tensor is piece.low.a or tensor is piece.low.b:
                    factor = "lora_A" if tensor is piece.low.a else "lora_B"
                    return f"{model.adapter.files.where}: {factor} of {module} (here {here})"
    native = name if model.architecture == "" else name.removeprefix("model.")
    if (opened := _opened(model)) is None:
        return f"{here}. It is of no checkpoint: training or a change in memory made it so"
    plan, checkpoint = opened
    owner = plan.native.ties.get(native, native)
    if not any(owner in step.targets for step in plan.steps):
        return here
    source = source_of(plan, checkpoint, native)
    if not source.endswith(("nan", "inf")):
        return f"{here}, and finite in {source}: training or a change in memory made it so"
    return f"{checkpoint.root}: {source} (here {here}). {_AGAIN}"


def _opened(model: Model) -> tuple[Plan, Checkpoint] | None:
    """The plan that a model was loaded by, and its files, opened again as they were then.

    None for a model without files; an error if they are gone or changed.
    """
    if (provenance := model.provenance) is None:
        return None
    provenance.check()
    located = locate(
        provenance.file or provenance.directory,
        head=model.config.head,
        ignore_config=provenance.ignore_config,
        adapter=False,  # its factors are checked in memory
    )
    return provenance.plan, located.checkpoint()


def _first_module(model: Model, again: Callable[[], Any]) -> str:
    """The first module whose output is not finite; inner modules end before outer ones."""
    names: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, inputs: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.is_floating_point() and not out.isfinite().all():
                names.append(name)

        return hook

    hooks = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if n]
    try:
        with torch.no_grad():
            again()
    except ZooError:
        return ""
    finally:
        for hook in hooks:
            hook.remove()
    return names[0] if names else ""
