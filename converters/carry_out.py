"""Carry out a plan: tensors on disk to tensors of the model, and back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from converters.lazy import Lazy, equal
from converters.plan import Plan, PlanStep
from zoo.errors import MissingTensors, TieConflict, listing

if TYPE_CHECKING:
    from torch import Tensor

Read = Callable[[str], "Tensor"]


def carry_out(
    plan: Plan, read: Read, *, trust: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Yield (native name, tensor), step by step.

    Steps that only rename or change strides yield views.

    Args:
        plan: A proven plan.
        read: Returns a tensor by its name on disk.
        trust: Names on disk that win where tied names hold different values.

    Raises:
        TieConflict: If tied names hold different values and none is trusted.
    """
    for step in plan.steps:
        yield from zip(step.targets, forward(step, read, trust), strict=True)


def forward(step: PlanStep, read: Read, trust: Collection[str] = ()) -> Sequence[Tensor]:
    """Return the native tensors of one step."""
    cache: dict[str, Tensor] = {}  # no name is read twice

    def once(name: str) -> Tensor:
        if name not in cache:
            cache[name] = read(name)
        return cache[name]

    names = agreed(step, lambda name: Lazy.of(once(name)), trust)
    tensors = [once(name) for name in names]
    return tensors if step.transform is None else step.transform.forward(tensors)


def agreed(step: PlanStep, read: Callable[[str], Lazy], trust: Collection[str]) -> tuple[str, ...]:
    """Return the names to read where several hold one array.

    They are the ones in `trust`, or the first if all are equal.

    Raises:
        TieConflict: If they differ and none is trusted.
    """
    if not step.also:
        return step.sources
    for names in (step.sources, *step.also):
        if set(names) <= set(trust):
            return names
    differ = [
        other
        for names in step.also
        for mine, other in zip(step.sources, names, strict=True)
        if not equal(read(mine), read(other))
    ]
    if differ:
        raise TieConflict(
            f"{listing(step.sources)} and {listing(differ)} are one array by the config and differ "
            f"on disk. Say which to believe: trust=({step.sources[0]!r},)"
        )
    return step.sources


def invert(plan: Plan, native: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by their names on disk, from those of the model.

    Raises:
        MissingTensors: If a native tensor is missing.
    """
    if missing := [t for step in plan.steps for t in step.targets if t not in native]:
        raise MissingTensors(f"{len(missing)} native tensors missing: {listing(missing)}")
    out: dict[str, Tensor] = {}
    for step in plan.steps:
        for name, tensor in zip(step.sources, backward(step, native), strict=True):
            out[name] = tensor
        for names in step.also:
            out.update({other: out[mine] for mine, other in zip(step.sources, names, strict=True)})
    order = [name for name in plan.header if name in out]
    return {plan.modern.get(name, name): out[name] for name in order}


def backward(step: PlanStep, native: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """Return the tensors on disk of one step."""
    tensors = [native[name] for name in step.targets]
    return tensors if step.transform is None else step.transform.backward(tensors)
