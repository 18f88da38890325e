"""Which modules of two models hold the same numbers, and how their features lie: told by the rules.

A rule that maps a weight maps what flows out of it: what it does to a weight's rows it does to the
features that those rows give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from converters.formats import TensorInfo
from converters.language import Transform
from converters.plan import Plan, Step, make_plan
from converters.spec import Spec
from zoo.components.model import Model
from zoo.errors import PlanError
from zoo.pretrained import native_of

Fold = Callable[[str], str]  # a name of the module's -> that of the tensor that it comes from


@dataclass(frozen=True)
class Match:
    """A native module and those of the other model that hold the same parameters."""

    native: str
    others: tuple[str, ...]
    parameters: Mapping[str, tuple[str, ...]] = field(repr=False)  # ours -> theirs
    rules: tuple[str, ...] = field(repr=False)
    # (features,) of what goes in and comes out: which of theirs each of ours is; None: in order
    into: Tensor | None = field(default=None, repr=False)
    out: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Held:
    """What files of a dialect call the parameters of a module, and who holds each in memory."""

    header: Mapping[str, TensorInfo]
    parameters: Mapping[str, tuple[str, ...]]  # name on disk -> names in the module


def match(model: Model, other: nn.Module, spec: Spec, dialect: str, fold: Fold) -> list[Match]:
    """Every module of `model` that holds parameters, with those of `other`."""
    config, native = model.config.to_dict(), native_of(model)
    held = _in_memory(other, fold)
    try:
        plan = make_plan(spec, dialect, config, native, held.header, type(other).__name__)
    except PlanError:
        if not hasattr(other, "save_pretrained"):
            raise
        held = _as_saved(other, fold)  # its files call some tensors otherwise
        plan = make_plan(spec, dialect, config, native, held.header, type(other).__name__)
    return list(_matches(model, other, plan, held))


def _in_memory(other: nn.Module, fold: Fold) -> Held:
    header, parameters = dict[str, TensorInfo](), dict[str, tuple[str, ...]]()
    for name, p in other.named_parameters(remove_duplicate=False):
        disk = fold(name)
        header[disk] = TensorInfo(disk, tuple(p.shape), "F32")
        parameters[disk] = (*parameters.get(disk, ()), name)
    return Held(header, parameters)


def _as_saved(other: Any, fold: Fold) -> Held:
    """By its own writer, with each parameter's number in all of its places."""
    owners = list(other.named_parameters())
    kept = [p.data for _, p in owners]
    try:
        for number, (_, p) in enumerate(owners):
            p.data = torch.full(p.shape, float(number))
        with TemporaryDirectory(prefix="zoo-names-") as scratch:
            other.save_pretrained(scratch, max_shard_size="1TB")
            with safe_open(Path(scratch, "model.safetensors"), "pt") as file:
                saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    finally:
        for (_, p), data in zip(owners, kept, strict=True):
            p.data = data
    header, parameters = dict[str, TensorInfo](), dict[str, tuple[str, ...]]()
    for name, tensor in saved.items():
        disk = fold(name)
        numbers = tensor.unique().int().tolist()
        header[disk] = TensorInfo(disk, tuple(tensor.shape), "F32")
        parameters[disk] = (*parameters.get(disk, ()), *(owners[n][0] for n in numbers))
    return Held(header, parameters)


def _matches(model: Model, other: nn.Module, plan: Plan, held: Held) -> Iterator[Match]:
    steps = {target: step for step in plan.steps for target in step.targets}
    ours, theirs = _by_array(model), _by_array(other)
    carry = _Carrier(plan)
    for name, module in model.named_modules():
        parameters, rules = dict[str, tuple[str, ...]](), list[str]()
        into = out = None
        for parameter, p in module.named_parameters(prefix=name, recurse=False):
            target = next((n for n in ours[id(p)] if n in steps), None)
            if target is None:
                continue
            step = steps[target]
            memory = [m for disk in step.sources for m in held.parameters[disk]]
            arrays = dict.fromkeys(id(other.get_parameter(m)) for m in memory)
            parameters[parameter] = tuple(m for array in arrays for m in theirs[array])
            rules.append(str(step.rule))
            if parameter.endswith(".weight") and p.dim() <= 2:
                looks_up = isinstance(module, nn.Embedding)
                out = carry(step, target, 1 if looks_up else 0)
                into = None if looks_up else carry(step, target, p.dim() - 1)
        if parameters:
            owners = (m.rpartition(".")[0] for names in parameters.values() for m in names)
            found = tuple(dict.fromkeys(owners))
            yield Match(name, found, parameters, tuple(dict.fromkeys(rules)), into, out)


def _by_array(module: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, all of them where several share one."""
    names = dict[int, list[str]]()
    for name, p in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return names


class _Carrier:
    """Where on disk the features stand that are a parameter's along one of its axes.

    Found by carrying numbers through the step: along each axis on disk, its coordinates.
    """

    def __init__(self, plan: Plan) -> None:
        self.header = plan.header
        self._known = dict[tuple[int, int, int], Tensor | None]()

    def __call__(self, step: Step, target: str, axis: int) -> Tensor | None:
        """(features,), or None where they are in order."""
        if step.transform is None:
            return None
        place = step.targets.index(target)
        key = id(step.transform), place, axis
        if key not in self._known:
            self._known[key] = self._carried(step.transform, step.sources, place, axis)
        return self._known[key]

    def _carried(
        self, transform: Transform, sources: tuple[str, ...], place: int, axis: int
    ) -> Tensor | None:
        shape = self.header[sources[0]].shape
        for theirs, length in enumerate(shape):
            order = torch.arange(length, dtype=torch.int32)
            along = order.view([-1 if d == theirs else 1 for d in range(len(shape))])
            made = transform.forward([along.expand(shape)] * len(sources))[place]
            rows = made.movedim(axis, 0).reshape(made.shape[axis], -1)
            told = rows[:, 0]
            if bool((rows == told[:, None]).all()) and len(told.unique()) == len(told):
                return None if torch.equal(told, order) else told.long()
        return None
