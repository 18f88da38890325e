"""What an optimizer keeps of each weight goes the way that the weight goes: by the spec's rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from converters.execute import backward, forward
from converters.formats import TensorInfo
from converters.plan import Plan, Step
from zoo.components.model import Model
from zoo.errors import PlanError, UsageError, listing
from zoo.fitting import fitted
from zoo.pretrained import native_of

Weights = nn.Module | Mapping[str, Tensor]
State = dict[str, Any]  # of one parameter: exp_avg, exp_avg_sq, step …
NAMES = "param_names"  # what torch calls them in a group


@dataclass(frozen=True)
class _Side:
    """A module's parameters, or the tensors of its state_dict, in order."""

    what: str
    owners: Mapping[str, str]  # every name -> the first one of the same array
    shapes: Mapping[str, tuple[int, ...]]  # by first names
    trained: tuple[str, ...]

    @classmethod
    def of(cls, weights: Weights) -> _Side:
        if isinstance(weights, nn.Module):
            named = list(weights.named_parameters(remove_duplicate=False))
        elif isinstance(weights, Mapping) and all(isinstance(x, Tensor) for x in weights.values()):
            named = list(weights.items())  # type: ignore[arg-type]
        else:
            kind = type(weights).__name__
            raise UsageError(f"expected a module or a state_dict of tensors, found {kind}")
        first, owners, shapes = dict[object, str](), dict[str, str](), dict[str, tuple[int, ...]]()
        for name, tensor in named:
            # a state_dict's tensors are not the parameters: what they share is their memory
            whole = isinstance(tensor, nn.Parameter) or tensor.is_meta or not tensor.numel()
            key = id(tensor) if whole else (tensor.data_ptr(), tuple(tensor.shape))
            owners[name] = first.setdefault(key, name)
            shapes.setdefault(owners[name], tuple(tensor.shape))
        trained = tuple(n for n, x in named if owners[n] == n and x.requires_grad)
        return cls(type(weights).__name__, owners, shapes, trained)

    def orders(self, known: Iterable[str]) -> Iterator[tuple[str, ...]]:
        """In which an optimizer may have been given parameters: as they come, or matrices first."""
        every = tuple(name for name in self.shapes if name in set(known))
        for names in (every, tuple(n for n in every if n in set(self.trained))):
            yield names
            yield tuple(sorted(names, key=lambda name: len(self.shapes[name]) < 2))


def convert_optimizer(
    state: Mapping[str, Any],
    source: Weights,
    target: Weights,
    *,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """A torch optimizer's state_dict over `source`'s parameters, as one over `target`'s.

    One of the two is a model of zoo's; the other is any module whose parameters a dialect of its
    spec names, or their state_dict: the reference's, nanoGPT's. Adam's moments follow the weights'
    rules: they are turned, split and stacked as these are. `names` are those of `source`'s
    parameters in the order in which its optimizer was given them, where it was neither that of
    the module nor matrices first. In the result each group's parameters stand as `target` has
    them, and `param_names` says which they are.
    """
    if isinstance(source, Model) == isinstance(target, Model):
        raise UsageError("one of source and target is a model of zoo's, and the other is not")
    model: Any = source if isinstance(source, Model) else target
    mine, other = _Side.of(model), _Side.of(target if model is source else source)
    header = {n: TensorInfo(n, other.shapes[of], "F32") for n, of in other.owners.items()}
    plan = fitted(model, native_of(model), header, other.what)
    uses = _uses(plan, mine, other)
    here, there = (mine, other) if model is source else (other, mine)
    inward = model is target
    known = [name for use in uses for name in (use.disk if inward else use.native)]
    held, groups = _read(state, here, known, names)
    moved, group_of = dict[str, State](), dict[str, int]()
    problems = list[str]()
    for use in uses:
        before, after = (use.disk, use.native) if inward else (use.native, use.disk)
        belongs = {groups[name] for name in before if name in groups}
        if not belongs:
            continue  # frozen
        try:
            if len(belongs) > 1 or not all(name in groups for name in before):
                raise _Apart("one array there, and not one group of the optimizer here")
            moved |= zip(after, _moved(use, before, after, held, here, inward), strict=True)
            group_of |= dict.fromkeys(after, belongs.pop())
        except _Apart as error:
            problems.append(f"{listing(before)}: {error}")
    if problems:
        raise PlanError("\n  ".join(["the optimizer's state does not convert:", *problems]))
    return _written(state, there, moved, group_of)


class _Apart(Exception):
    """Parts of one array that an optimizer treated otherwise than each other."""


@dataclass(frozen=True)
class _Use:
    step: Step
    native: tuple[str, ...]  # first names of parameters, in the step's order
    disk: tuple[str, ...]


def _uses(plan: Plan, mine: _Side, other: _Side) -> list[_Use]:
    uses, seen, problems = list[_Use](), dict[str, str](), list[str]()
    for step in plan.steps:
        native = tuple(mine.owners[name] for name in step.targets)
        disk = tuple(other.owners[name] for name in step.sources)
        for names in step.also:
            if tuple(other.owners[name] for name in names) != disk:
                told = f"{listing(names)} and {listing(step.sources)}"
                problems.append(f"{told}: two arrays there, and one here")
        for name in disk:
            if name in seen:
                problems.append(f"{name}: one array there, and here {seen[name]} and {native[0]}")
            seen[name] = native[0]
        uses.append(_Use(step, native, disk))
    if problems:
        raise PlanError("\n  ".join(["weights are tied on one side alone:", *problems]))
    return uses


def _read(
    state: Mapping[str, Any], side: _Side, known: Sequence[str], names: Sequence[str] | None
) -> tuple[dict[str, State], dict[str, int]]:
    """(what is kept of each parameter, the group of each)."""
    try:
        kept, groups = state["state"], state["param_groups"]
        numbers = [n for group in groups for n in group["params"]]
        told = [name for group in groups for name in group.get(NAMES, ())]
    except (KeyError, TypeError) as error:
        raise UsageError(f"no state_dict of a torch optimizer: {error!r}") from None
    if names is None and len(told) == len(numbers):
        names = told
    if names is not None:
        if len(names) != len(numbers):
            raise UsageError(f"names: {len(names)} of the optimizer's {len(numbers)} parameters")
        if odd := [name for name in names if side.owners.get(name) not in set(known)]:
            raise UsageError(f"names: {listing(odd)}: no parameter of {side.what} that converts")
        orders: Iterable[tuple[str, ...]] = [tuple(side.owners[name] for name in names)]
    else:
        orders = side.orders(known)

    def fits(order: tuple[str, ...]) -> bool:
        return len(order) == len(numbers) and all(
            not isinstance(x, Tensor) or x.dim() == 0 or tuple(x.shape) == side.shapes[name]
            for n, name in zip(numbers, order, strict=True)
            for x in kept.get(n, {}).values()
        )

    order = next((each for each in orders if fits(each)), None)
    if order is None:
        raise UsageError(
            f"the optimizer's {len(numbers)} parameters are not {side.what}'s, neither in their "
            "order nor matrices first. Pass names= in the order in which it was given them"
        )
    by_number = dict(zip(numbers, order, strict=True))
    held = {by_number[n]: dict(entry) for n, entry in kept.items() if n in by_number}
    found = {by_number[n]: k for k, group in enumerate(groups) for n in group["params"]}
    return held, found


def _moved(
    use: _Use,
    before: tuple[str, ...],
    after: tuple[str, ...],
    held: Mapping[str, State],
    here: _Side,
    inward: bool,
) -> list[State]:
    states = [held.get(name, {}) for name in before]
    if any(state.keys() != states[0].keys() for state in states):
        raise _Apart("one array there, and the optimizer kept other things of each part")
    out: list[State] = [{} for _ in after]
    for key in states[0]:
        values = [state[key] for state in states]
        if all(
            isinstance(x, Tensor) and tuple(x.shape) == here.shapes[name]
            for x, name in zip(values, before, strict=True)
        ):
            made = _through(use.step, values, inward)
        elif all(not isinstance(x, Tensor) or x.dim() == 0 for x in values):
            if any(x != values[0] for x in values):
                raise _Apart(f"{key}: one array there, and {listing(map(str, values))} here")
            made = [x.clone() if isinstance(x, Tensor) else x for x in values[:1] * len(after)]
        else:
            raise _Apart(f"{key}: neither a number nor shaped as its weight")
        for entry, value in zip(out, made, strict=True):
            entry[key] = value
    return out


def _through(step: Step, values: list[Tensor], inward: bool) -> list[Tensor]:
    way: Callable[..., Sequence[Tensor]] = forward if inward else backward
    names = step.sources if inward else step.targets
    held = dict(zip(names, values, strict=True))
    found = way(step._replace(also=()), held.__getitem__ if inward else held)
    return [x.clone(memory_format=torch.contiguous_format) for x in found]


def _written(
    state: Mapping[str, Any],
    side: _Side,
    moved: Mapping[str, State],
    group_of: Mapping[str, int],
) -> dict[str, Any]:
    groups, kept, number = list[dict[str, Any]](), dict[int, State](), 0
    for n, group in enumerate(state["param_groups"]):
        names = [name for name in side.shapes if group_of.get(name) == n]
        numbers = list(range(number, number + len(names)))
        number += len(names)
        kept |= {k: moved[name] for k, name in zip(numbers, names, strict=True) if moved[name]}
        groups.append({**group, "params": numbers, NAMES: names})
    return {"state": kept, "param_groups": groups}


__all__ = ["convert_optimizer"]
