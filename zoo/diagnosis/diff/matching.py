"""Match the modules of two models that hold the same numbers, and the order of their features.

A rule that maps a weight maps what flows out of it: what it does to a weight's rows it does to the
features that those rows give.
"""

from __future__ import annotations

import copy
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
from converters.plan import Native, Plan, PlanStep
from zoo.components.model import Model
from zoo.components.norm import RMSNorm
from zoo.errors import PlanError

Fold = Callable[[str], str]  # a name of the module's -> that of the tensor that it comes from
PLAIN = (nn.Linear, nn.Embedding, nn.LayerNorm, RMSNorm, nn.Identity)
Planned = Callable[[Mapping[str, TensorInfo]], Plan]


@dataclass(frozen=True)
class RowIndex:
    """(features,) where on disk a parameter's first axis stands, along an axis so long."""

    sources: tuple[str, ...]
    at: Tensor
    length: int


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
    plain: bool = True  # a layer of one kind everywhere: looks up, multiplies or norms
    whole: bool = True  # one module there holds all: what comes out is what comes out there
    rows: Mapping[str, RowIndex] = field(default_factory=dict, repr=False)  # of weight and bias

    @property
    def apart(self) -> bool:
        """Whether the rules of its weight and its bias take different features: one is wrong."""
        a, b = self.rows.get("weight"), self.rows.get("bias")
        if a is None or b is None or a.length != b.length:
            return False
        return a.at.shape == b.at.shape and not torch.equal(a.at, b.at)


@dataclass(frozen=True)
class OnDisk:
    """What files of a dialect call the parameters of a module, and who holds each in memory."""

    header: Mapping[str, TensorInfo]
    parameters: Mapping[str, tuple[str, ...]]  # name on disk -> names in the module


class Matching:
    """A model's modules and another's, by the tensors on disk that both were made of.

    `plan` makes the model's parameters of the other's; its native side is what the model should
    hold, so that one which lacks something can be looked at.
    """

    def __init__(self, model: Model, other: nn.Module, planned: Planned, fold: Fold = str) -> None:
        self.model, self.other = model, other
        self.on_disk = _in_memory(other, fold)
        try:
            self.plan = planned(self.on_disk.header)
        except PlanError:
            if isinstance(other, Model) or not hasattr(other, "save_pretrained"):
                raise
            self.on_disk = _as_saved(other, fold)  # its files have other names for some tensors
            self.plan = planned(self.on_disk.header)
        self.steps = {target: step for step in self.plan.steps for target in step.targets}
        self.matches = {each.native: each for each in self._matches(self.plan.native)}

    def of(self, model: Model) -> Matching:
        """The same for another model that holds the same."""
        other = copy.copy(self)
        other.model = model
        return other

    def expected(self, name: str, value: Callable[[str], Tensor] | None = None) -> Tensor | None:
        """What a native parameter is by the other model's; None if several make it.

        `value` gives what is taken of each of the other's parameters, by default itself; of its
        several that are one here, which run in turn, the sum.
        """
        step = self.steps.get(name) or self.steps.get(self.plan.native.ties.get(name, ""))
        if step is None:
            return None
        owners = [self.on_disk.parameters[disk] for disk in step.sources]
        if value is None:
            values = [self.other.get_parameter(names[0]).detach() for names in owners]
        else:
            values = [self._summed(names, value) for names in owners]
        if any(
            x.shape != self.plan.header[n].shape for x, n in zip(values, step.sources, strict=True)
        ):
            return None
        if step.transform is None:
            return values[0]
        place = step.targets.index(name if name in step.targets else self.plan.native.ties[name])
        return step.transform.forward(values)[place]

    def _summed(self, names: tuple[str, ...], value: Callable[[str], Tensor]) -> Tensor:
        """Over the arrays that go by these names, each once."""
        arrays = {id(self.other.get_parameter(name)): name for name in names}
        values = [value(name) for name in arrays.values()]
        alike = all(x.shape == values[0].shape for x in values)
        return torch.stack(values).sum(0) if alike else values[0]

    def _matches(self, native: Native) -> Iterator[Match]:
        theirs, carry = _by_array(self.other), _Carrier(native)
        modules = dict(self.model.named_modules())
        below = dict[str, list[str]]()
        for name in (*native.shapes, *native.ties):
            below.setdefault(name.rpartition(".")[0], []).append(name)
        for name, own in below.items():
            parameters, rules = dict[str, tuple[str, ...]](), list[str]()
            into = out = None
            read = dict[str, RowIndex]()
            for parameter in own:
                target = parameter if parameter in self.steps else native.ties.get(parameter, "")
                if (step := self.steps.get(target)) is None:
                    continue
                same = (step.sources, *step.also)
                memory = [m for names in same for n in names for m in self.on_disk.parameters[n]]
                arrays = dict.fromkeys(id(self.other.get_parameter(m)) for m in memory)
                parameters[parameter] = tuple(m for array in arrays for m in theirs[array])
                rules.append(str(step.rule))
                axes = len(native.shapes[target])
                if parameter.endswith(".weight") and axes <= 2:
                    looks_up = isinstance(modules.get(name), nn.Embedding)
                    out = carry(step, target, 1 if looks_up else 0)
                    into = None if looks_up else carry(step, target, axes - 1)
                leaf = parameter.rpartition(".")[2]
                if len(step.sources) == 1 and (index := carry.carried(step, target, 0)) is not None:
                    read[leaf] = RowIndex(tuple(step.sources), *index)
            if parameters:
                others, whole = _owners(parameters)
                plain = whole and isinstance(modules.get(name), PLAIN)
                texts = tuple(dict.fromkeys(rules))
                yield Match(name, others, parameters, texts, into, out, plain, whole, read)


def _in_memory(other: nn.Module, fold: Fold) -> OnDisk:
    header, parameters = dict[str, TensorInfo](), dict[str, tuple[str, ...]]()
    for name, p in other.named_parameters(remove_duplicate=False):
        disk = fold(name)
        header[disk] = TensorInfo(disk, tuple(p.shape), "F32")
        parameters[disk] = (*parameters.get(disk, ()), name)
    return OnDisk(header, parameters)


def _as_saved(other: Any, fold: Fold) -> OnDisk:
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
    return OnDisk(header, parameters)


def _owners(parameters: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, ...], bool]:
    """The modules that hold all of them, under any name; where none does, those of a weight."""
    ordered = sorted(parameters, key=lambda name: not name.endswith(".weight"))
    each = [dict.fromkeys(name.rpartition(".")[0] for name in parameters[mine]) for mine in ordered]
    common = [name for name in each[0] if all(name in owners for owners in each)]
    return tuple(common or each[0]), bool(common)


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

    def __init__(self, native: Native) -> None:
        self.native = native
        self._cache = dict[tuple[int, int, int], tuple[Tensor, int] | None]()

    def __call__(self, step: PlanStep, target: str, axis: int) -> Tensor | None:
        """(features,), or None where they are in order."""
        index = None if step.transform is None else self.carried(step, target, axis)
        if index is None or torch.equal(index[0], torch.arange(index[1])):
            return None
        return index[0]

    def carried(self, step: PlanStep, target: str, axis: int) -> tuple[Tensor, int] | None:
        """(features,), and how long the axis on disk is; None where they lie along several."""
        place = step.targets.index(target)
        if step.transform is None:
            length = self.native.shapes[target][axis]
            return torch.arange(length), length
        key = id(step.transform), place, axis
        if key not in self._cache:
            self._cache[key] = self._carried(step.transform, place, axis)
        return self._cache[key]

    def _carried(self, transform: Transform, place: int, axis: int) -> tuple[Tensor, int] | None:
        for theirs, length in enumerate(transform.source_shape()):
            made = transform.coordinates(theirs)[place]
            rows = made.movedim(axis, 0).reshape(made.shape[axis], -1)
            coordinates = rows[:, 0]
            if bool((rows == coordinates[:, None]).all()) and len(coordinates.unique()) == len(
                coordinates
            ):
                return coordinates.long(), length
        return None
