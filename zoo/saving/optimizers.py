"""Convert an optimizer's state along with the weights, by the rules of the spec."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from converters.carry_out import backward, forward
from converters.formats import TensorInfo
from converters.plan import Plan, PlanStep
from zoo.checkpoints import finite
from zoo.checkpoints.build import native_of
from zoo.checkpoints.plan_by_names import plan_by_names
from zoo.components.model import Model
from zoo.errors import NonFinite, PlanError, UsageError, listing

Weights = nn.Module | Mapping[str, Tensor]
State = dict[str, Any]  # state of one parameter: exp_avg, exp_avg_sq, step …
NAMES = "param_names"  # torch's key for the names in a group
# torch's names of what is kept for each number of a parameter
MOMENTS = (
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
    *("square_avg", "grad_avg", "acc_delta", "sum"),
)
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


@dataclass(frozen=True)
class _Side:
    """A module's parameters, or the tensors of its state_dict, in order."""

    what: str
    owners: Mapping[str, str]  # every name -> the first one of the same array
    shapes: Mapping[str, tuple[int, ...]]  # by first name
    trained: tuple[str, ...]
    by_alphabet: bool  # the order of names in safetensors, not that of a module

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
            # a state_dict's tensors are not the parameters: tied ones share memory
            whole = isinstance(tensor, nn.Parameter) or tensor.is_meta or not tensor.numel()
            key = id(tensor) if whole else (tensor.data_ptr(), tuple(tensor.shape))
            owners[name] = first.setdefault(key, name)
            shapes.setdefault(owners[name], tuple(tensor.shape))
        trained = tuple(n for n, x in named if owners[n] == n and x.requires_grad)
        names = [name for name, _ in named]
        sorted_ = isinstance(weights, Mapping) and len(names) > 2 and names == sorted(names)
        return cls(type(weights).__name__, owners, shapes, trained, sorted_)

    def check_order(self) -> None:
        if self.by_alphabet:
            raise UsageError(
                f"{self.what}: its names are in alphabetical order, as in safetensors files, and "
                "an optimizer numbers parameters in the order of their module. Pass the module"
            )

    def orders(self, converted: Iterable[str], sizes: Sequence[int]) -> Iterator[tuple[str, ...]]:
        """Yield the orders in which an optimizer may have been given parameters.

        With one group, the order of the module. With two, those that decay come first: matrices.
        The reference's trainer also goes by names: relative biases are matrices that do not decay.
        """
        every = tuple(name for name in self.shapes if name in set(converted))
        for names in (every, tuple(n for n in every if n in set(self.trained))):
            if len(sizes) == 1:
                yield names
            for rest in (self._is_vector, self._does_not_decay) if len(sizes) == 2 else ():
                if sum(map(rest, names)) == sizes[1]:
                    yield tuple(sorted(names, key=rest))

    def _is_vector(self, name: str) -> bool:
        return len(self.shapes[name]) < 2

    def _does_not_decay(self, name: str) -> bool:
        return self._is_vector(name) or _UNDECAYED.search(name.lower()) is not None


def convert_optimizer(
    state: Mapping[str, Any],
    source: Weights,
    target: Weights,
    *,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Convert a torch optimizer's state_dict from one layout of a model's weights to another.

    One side is a model of zoo's. The other is any module whose parameters a dialect of its spec
    names, or its state_dict: the reference's, nanoGPT's. Moments follow the weights' rules: they
    are permuted, split and stacked like the weights.

    Args:
        state: The optimizer's state_dict.
        source: The model, module or state_dict that the optimizer was made for.
        target: The other side.
        names: The parameters of `source` in the order that its optimizer was given. They are needed
            if it is neither the order of the module in one group nor matrices first in two.

    Returns:
        A state_dict for an optimizer over `target`'s parameters; `param_names` in each group lists
        them.

    Raises:
        UsageError: If `state` is no state_dict of an optimizer, or its order is ambiguous.
        PlanError: If the weights do not match or parts of one array were treated differently.
        NonFinite: If the state holds NaN or infinity.

    Example:
        >>> import tempfile, torch, zoo
        >>> from zoo.models.gpt2 import Config, Model
        >>> tiny = Model(Config(vocab=11, dim=8, layers=1, heads=2, positions=16))
        >>> model = zoo.load(zoo.save(tiny, tempfile.mkdtemp() + "/tiny"))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.tensor([[1, 2]])).square().sum().backward()
        >>> optimizer.step()
        >>> from converters.carry_out import invert
        >>> from zoo.saving.origin import export_plan, origin_of
        >>> weights = dict(model.named_parameters())
        >>> inverse = invert(export_plan(model, origin_of(model, weights)), weights)
        >>> hf_weights = dict(reversed(inverse.items()))  # like a module, not sorted by name
        >>> converted = zoo.convert_optimizer(optimizer.state_dict(), model, hf_weights)
        >>> converted["param_groups"][0]["param_names"][:2]
        ['transformer.wte.weight', 'transformer.wpe.weight']
    """
    if isinstance(source, Model) == isinstance(target, Model):
        raise UsageError("one of source and target is a model of zoo's, and the other is not")
    model: Any = source if isinstance(source, Model) else target
    mine, other = _Side.of(model), _Side.of(target if model is source else source)
    (other if model is source else mine).check_order()
    header = {n: TensorInfo(n, other.shapes[of], "F32") for n, of in other.owners.items()}
    plan = plan_by_names(model, native_of(model), header, other.what)
    uses = _uses(plan, mine, other)
    here, there = (mine, other) if model is source else (other, mine)
    inward = model is target
    converted = [name for use in uses for name in (use.disk if inward else use.native)]
    check_state(state)
    states, groups = _read(state, here, converted, names)
    _check_finite(states)
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
            moved |= zip(after, _moved(use, before, after, states, here, inward), strict=True)
            group_of |= dict.fromkeys(after, belongs.pop())
        except _Apart as error:
            problems.append(f"{listing(before)}: {error}")
    if problems:
        raise PlanError("\n  ".join(["the optimizer's state does not convert:", *problems]))
    return _written(state, there, moved, group_of)


def check_state(state: Any, where: str = "") -> None:
    """Refuse what is not a state_dict of a torch optimizer; `where` begins each message."""

    def refuse(what: str) -> NoReturn:
        raise UsageError(f"{where}not a state_dict of a torch optimizer: {what}")

    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= state.keys():
        refuse("expected a dict with state and param_groups")
    kept, groups = state["state"], state["param_groups"]
    if not isinstance(kept, Mapping):
        refuse(f"state is a {type(kept).__name__}, expected a dict")
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        refuse("param_groups is no list of dicts")
    numbers = list[int | str]()
    for at, group in enumerate(groups):
        params, names = group.get("params"), group.get(NAMES, [])
        if not isinstance(params, list | tuple) or any(type(n) not in (int, str) for n in params):
            refuse(f"param_groups[{at}]: params is no list of numbers or names")
        if not isinstance(names, list | tuple) or any(type(name) is not str for name in names):
            refuse(f"param_groups[{at}]: {NAMES} is no list of names")
        if names and len(names) != len(params):
            refuse(f"param_groups[{at}]: {len(names)} names of {len(params)} parameters")
        numbers += params
    if not numbers:
        refuse("no group has a parameter")
    if twice := [str(n) for n, count in Counter(numbers).items() if count > 1]:
        refuse(f"parameters that are in the groups twice: {listing(twice)}")
    if strays := [repr(n) for n in kept if n not in set(numbers)]:
        refuse(f"state of parameters that no group has: {listing(strays)}")
    for number, entry in kept.items():
        if not isinstance(entry, Mapping):
            refuse(f"state[{number!r}] is a {type(entry).__name__}, expected a dict")
        for key, value in entry.items():
            if not isinstance(value, Tensor | int | float | str | None):
                refuse(f"state[{number!r}][{key!r}] is a {type(value).__name__}")
            shape = value.shape if isinstance(value, Tensor) else ()
            if key in MOMENTS and not shape and not (value is None and key == "momentum_buffer"):
                refuse(f"state[{number!r}][{key!r}] is no array of numbers, as a moment is")


def check_names(names: Any) -> None:
    """Refuse what is not a list of different names."""
    if not isinstance(names, list | tuple) or any(type(name) is not str for name in names):
        raise UsageError(f"names: expected a list of parameters' names, found {names!r:.80}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"names: {listing(twice)}: more than once")


def _check_finite(states: Mapping[str, State]) -> None:
    faults = list[str]()
    for name, entry in states.items():
        for key, value in entry.items():
            if isinstance(value, float) and not isfinite(value):
                faults.append(f"{name}: {key} is {value}")
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            if (index := finite.first_where(value)) is not None:
                faults.append(f"{name}: {key}{finite.at(value, index)}")
    if faults:
        raise NonFinite(f"the optimizer's state is not finite: {listing(faults)}")


class _Apart(Exception):
    """Parts of one array that an optimizer treated differently."""


@dataclass(frozen=True)
class _Use:
    step: PlanStep
    native: tuple[str, ...]  # first names of parameters, in the step's order
    disk: tuple[str, ...]


def _uses(plan: Plan, mine: _Side, other: _Side) -> list[_Use]:
    uses, seen, problems = list[_Use](), dict[str, str](), list[str]()
    for step in plan.steps:
        native = tuple(mine.owners[name] for name in step.targets)
        disk = tuple(other.owners[name] for name in step.sources)
        for names in step.also:
            if tuple(other.owners[name] for name in names) != disk:
                names_tied = f"{listing(names)} and {listing(step.sources)}"
                problems.append(f"{names_tied}: two arrays there, and one here")
        for name in disk:
            if name in seen:
                problems.append(f"{name}: one array there, and here {seen[name]} and {native[0]}")
            seen[name] = native[0]
        uses.append(_Use(step, native, disk))
    if problems:
        raise PlanError("\n  ".join(["weights are tied on one side only:", *problems]))
    return uses


def _read(
    state: Mapping[str, Any],
    side: _Side,
    converted: Sequence[str],
    names: Sequence[str] | None,
) -> tuple[dict[str, State], dict[str, int]]:
    """Return (what is kept of each parameter, the group of each)."""
    kept, groups = state["state"], state["param_groups"]
    numbers = [n for group in groups for n in group["params"]]
    recorded = [name for group in groups for name in group.get(NAMES, ())]
    for entry in kept.values():
        arrays = {k: x for k, x in entry.items() if isinstance(x, Tensor) and x.dim()}
        if any(not x.is_floating_point() or x.dtype.itemsize < 2 for x in arrays.values()):
            raise UsageError(
                "the optimizer keeps whole numbers of its weights, as those of eight bits do: "
                "their blocks run across rows, and no rule permutes them. Start with a new one"
            )
        if len({x.shape for x in arrays.values()}) > 1:
            raise UsageError(
                f"the optimizer keeps {listing(arrays)} in several shapes for one weight, as "
                "Adafactor does, and no rule permutes them. Start with a new one"
            )
    if names is None and len(recorded) == len(numbers):
        names = recorded
    if names is None and numbers and all(isinstance(n, str) for n in numbers):
        names = numbers  # a gathered distributed checkpoint of torch
    if names is not None:
        check_names(names)
        if len(names) != len(numbers):
            raise UsageError(f"names: {len(names)} of the optimizer's {len(numbers)} parameters")
        if strays := [name for name in names if side.owners.get(name) not in set(converted)]:
            raise UsageError(f"names: {listing(strays)}: no parameter of {side.what} that converts")
        orders: Iterable[tuple[str, ...]] = [tuple(side.owners[name] for name in names)]
    else:
        side.check_order()
        orders = side.orders(converted, [len(group["params"]) for group in groups])

    def fits_one(name: str, number: object) -> bool:
        tensors = (x for x in kept.get(number, {}).values() if isinstance(x, Tensor))
        shape = side.shapes[side.owners[name]]
        return all(x.dim() == 0 or tuple(x.shape) == shape for x in tensors)

    def fits(order: tuple[str, ...]) -> bool:
        if len(order) != len(numbers):
            return False
        return all(fits_one(*pair) for pair in zip(order, numbers, strict=True))

    fitting = list(dict.fromkeys(each for each in orders if fits(each)))
    if names is not None and not fitting:
        strays = [name for name in names if not fits_one(name, numbers[list(names).index(name)])]
        raise UsageError(f"names: the optimizer keeps other shapes of {listing(strays)}")
    if len(fitting) != 1:
        why = f"are {side.what}'s in more than one order"
        if not fitting:
            why = f"are not {side.what}'s, neither as they come nor matrices first in two groups"
        raise UsageError(
            f"the optimizer's {len(numbers)} parameters {why}. Pass names= in the order in which "
            "it was given them"
        )
    (order,) = fitting
    by_number = dict(zip(numbers, order, strict=True))
    states = {by_number[n]: dict(entry) for n, entry in kept.items() if n in by_number}
    belongs = {by_number[n]: k for k, group in enumerate(groups) for n in group["params"]}
    return states, belongs


def _moved(
    use: _Use,
    before: tuple[str, ...],
    after: tuple[str, ...],
    states_by_name: Mapping[str, State],
    here: _Side,
    inward: bool,
) -> list[State]:
    states = [states_by_name.get(name, {}) for name in before]
    if any(state.keys() != states[0].keys() for state in states):
        raise _Apart("one array there, and the optimizer kept other things of each part")
    out: list[State] = [{} for _ in after]
    for key in states[0]:
        values = [state[key] for state in states]
        if all(
            isinstance(x, Tensor) and tuple(x.shape) == here.shapes[name]
            for x, name in zip(values, before, strict=True)
        ):
            if len({x.dtype for x in values}) > 1:
                raise _Apart(f"{key}: one array there, and several dtypes here")
            made = _through(use.step, values, inward)
        elif all(not isinstance(x, Tensor) or x.dim() == 0 for x in values):
            if not all(_is_equal(x, values[0]) for x in values):
                raise _Apart(f"{key}: one array there, and {listing(map(str, values))} here")
            made = [x.clone() if isinstance(x, Tensor) else x for x in values[:1] * len(after)]
        else:
            raise _Apart(f"{key}: neither a number nor shaped as its weight")
        for entry, value in zip(out, made, strict=True):
            entry[key] = value
    return out


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.equal(other)
    return type(one) is type(other) and bool(one == other)


def _through(step: PlanStep, values: list[Tensor], inward: bool) -> list[Tensor]:
    way: Callable[..., Sequence[Tensor]] = forward if inward else backward
    names = step.sources if inward else step.targets
    tensors = dict(zip(names, values, strict=True))
    results = way(step._replace(also=()), tensors.__getitem__ if inward else tensors)
    return [x.clone(memory_format=torch.contiguous_format) for x in results]


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
