"""The first difference: what both models made there, and of what; edits are tried on it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zoo.components.model import Model
from zoo.diagnosis import edits
from zoo.diagnosis.diff.comparison import Comparison
from zoo.diagnosis.diff.difference import Difference
from zoo.diagnosis.diff.flows import Flow, Place, Way
from zoo.diagnosis.diff.hooks import Side
from zoo.diagnosis.diff.matching import Matching
from zoo.diagnosis.edits import Changes, Hypothesis, block_of, rebuilt
from zoo.diagnosis.faults import hypotheses
from zoo.errors import ZooError
from zoo.parity.checks import call, rms

# What a fit may be off by, in units of the root mean square: its inputs agree to 1e-10 only.
FITS = 1e-8
T = TypeVar("T")


class Reached(Exception):
    """Nothing after this place is needed."""


@dataclass
class Scene:
    """The first place that differs, what both made there, and what they had to make it of."""

    comparison: Comparison
    difference: Difference

    def __post_init__(self) -> None:
        first = self.difference.first
        assert first is not None
        self.first, self.measurement = first, first.measurement
        self.model: Model = self.comparison.matching.model
        self.flow = by_tokens(
            self.comparison.flows[self.measurement.place], self.model, self.module
        )

    @property
    def name(self) -> str:
        """The native module at the place."""
        return self.measurement.match.native

    @property
    def side(self) -> Side:
        """Whether what goes in or what comes out differs."""
        return self.measurement.side

    @property
    def matching(self) -> Matching:
        """Which modules of both models hold the same."""
        return self.comparison.matching

    @cached_property
    def module(self) -> nn.Module | None:
        """The one at the place; None where the model has none of that name."""
        return dict(self.model.named_modules()).get(self.name)

    @cached_property
    def above(self) -> nn.Module:
        """The one that holds it."""
        return self.model.get_submodule(self.name.rpartition(".")[0])

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """The native model's parameters, tied ones by each of their names."""
        named = self.model.named_parameters(remove_duplicate=False)
        return {name: p.data for name, p in named}

    @cached_property
    def hypotheses(self) -> list[Hypothesis]:
        """What the catalogue knows to undo in the native model, by the rules of both models."""
        return [h for h in hypotheses(self.model, self.matching.plan.rule_of()) if h.parameters]

    @cached_property
    def unseen(self) -> list[str]:
        """Modules whose outputs were not compared, in the same block or in none."""
        seen = {name for name, side, _ in self.comparison.flows if side == "out"}
        here = block_of(self.name)
        modules = dict.fromkeys(n.rpartition(".")[0] for n in self.matching.plan.native.shapes)
        near = (n for n in modules if block_of(f"{n}.weight") in (here, f"{n}.weight"))
        return [n for n in near if n not in seen]

    @cached_property
    def fresh(self) -> Model:
        """What its class makes of its config, with the same parameters."""
        return self.rebuilt({})

    def rebuilt(self, changes: Changes) -> Model:
        """With other config fields; ConfigError or RuntimeError where they do not fit."""
        model = rebuilt(self.model, changes, self.matching.expected)
        return model.requires_grad_(self.difference.back)

    @cached_property
    def steady(self) -> bool:
        """Whether a new model of the class parts from the other just here, as this one does."""
        try:
            error = self.error_of(self.fresh)
        except (RuntimeError, ZooError):
            return False
        before = self.measurement.error
        return error == before or abs(error - before) <= 1e-6 * before

    @cached_property
    def other_config(self) -> dict[str, Any]:
        """The other model's own config, where it has one."""
        config: Any = getattr(self.comparison.other.module, "config", None)
        return config.to_dict() if hasattr(config, "to_dict") else {}

    @cached_property
    def numbers(self) -> list[float]:
        """Every number in it."""
        return list(
            dict.fromkeys(float(x) for x in _leaves(self.other_config) if type(x) in (int, float))
        )

    @cached_property
    def scalings(self) -> list[dict[str, Any]]:
        """Every scaling of a rope in it."""
        mappings = [value for value in self.other_config.values() if isinstance(value, dict)]
        return [value for value in mappings if {"type", "rope_type"} & value.keys()]

    def flow_at(self, name: str, side: Side = "out", call: int | None = None) -> Flow | None:
        """What flowed there, where it agrees."""
        place = (name, side, self.measurement.call if call is None else call)
        return self.agreed.get(place)

    def made(self, name: str) -> Tensor | None:
        """What this model gave there: it agrees, or there is nothing to compare it with."""
        place = (name, "out", self.measurement.call)
        if place in self.comparison.flows:
            return None if (flow := self.flow_at(name)) is None else flow.ours
        calls = self.comparison.heard.get(name, [])
        if len(calls) <= self.measurement.call:
            return None
        return self.comparison.way.tokens(
            [calls[self.measurement.call].values["out"]], self.flow.counts
        )

    @cached_property
    def agreed(self) -> dict[Place, Flow]:
        """What flowed before the place, and agrees."""
        flows = dict[Place, Flow]()
        for measurement in self.difference.readings:
            if measurement.place == self.measurement.place:
                break
            # of what is healed, one is a multiple of the other
            fine = measurement.ok or measurement.place in self.difference.healed
            if fine and self.comparison.flows[measurement.place].comparable:
                flows[measurement.place] = self.comparison.flows[measurement.place]
        return flows

    def error_of(self, model: Model) -> float:
        """What the place's error is in another native model; it runs no further than that."""
        comparison, module = self.comparison, dict(model.named_modules()).get(self.name)
        if self.flow.theirs is None:
            again = comparison.again(model, self.difference.healed, ())
            return 0.0 if again.first is None or self.later(again) else float("inf")
        if module is None or not self.flow.counts or comparison.way.name == "cached":
            return self.comparison.again(model, self.difference.healed, ()).error(
                self.measurement.place
            )
        values = list[Tensor]()
        left = self.measurement.call

        def hear(_: nn.Module, args: Any, out: Any = None) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                x = out if self.side == "out" else args[0]
                values.append(x if isinstance(x, Tensor) else next(iter(x)))
                raise Reached

        handle = (
            module.register_forward_hook(hear)
            if self.side == "out"
            else module.register_forward_pre_hook(hear)
        )
        with handle, suppress(Reached), torch.no_grad():
            for inputs, more in comparison.way.native():
                call(model, inputs, **more)
        ours = comparison.way.tokens(values, self.flow.counts) if values else None
        theirs = comparison.flows[self.measurement.place].theirs
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return float("inf")
        return error(ours, theirs)

    def error_with(self, idea: Hypothesis) -> float:
        """Likewise once it is undone."""
        try:
            with applied(self.model, idea, self) as model:
                return self.error_of(model)
        except (RuntimeError, ZooError):
            return float("inf")

    def later(self, again: Difference) -> bool:
        """Whether another run parts later than this one did."""
        assert again.first is not None
        flow = self.comparison.flows.get(again.first.measurement.place)
        return flow is not None and flow.at > self.flow.at

    def restores(self, idea: Hypothesis) -> bool:
        """Whether nothing differs once it is undone."""
        with applied(self.model, idea, self) as model:
            return self.comparison.again(model, self.difference.healed, idea.touched).first is None

    def alike(self, name: str | None = None) -> list[str]:
        """Every module whose name is this one's but for the layer's number."""
        kind = re.sub(r"\.\d+\.", r".\\d+.", re.escape(name or self.name).replace(r"\.", "."))
        return [n for n, _ in self.model.named_modules() if re.fullmatch(kind, n)]

    def everywhere(self) -> list[Place]:
        """This place wherever the same code runs; of a norm's output, that of every such norm."""
        modules = dict(self.model.named_modules())
        weight = getattr(self.module, "weight", None)
        norm = self.side == "out" and weight is not None and weight.dim() == 1

        def done_by(name: str) -> tuple[Any, str]:
            above, _, leaf = name.rpartition(".")
            return type(modules.get(above)), leaf

        return [
            (name, side, call)
            for (name, side, call), flow in self.comparison.flows.items()
            if side == self.side and flow.comparable and name
            if done_by(name) == done_by(self.name)
            or (norm and type(modules.get(name)) is type(self.module))
        ]

    def rows(self, x: Tensor) -> list[Tensor] | None:
        """(s, features) of each row, of (tokens, features); None if they are no tokens."""
        for inputs in (self.comparison.way.inputs, self.comparison.way.inputs.answer):
            if inputs is None:
                continue
            mask = torch.ones_like(inputs.ids) if inputs.mask is None else inputs.mask
            counts = mask.sum(1).tolist()
            if sum(counts) == len(x):
                return list(x.split(counts))
        return None


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner)
    else:
        yield value


def by_tokens(flow: Flow, model: Model, module: nn.Module | None) -> Flow:
    """What a convolution is given as (b, d, s) lies there as (b d, s): here it is (b s, d)."""
    dim = model.config.dim
    if not isinstance(module, nn.Conv1d) or not flow.comparable:
        return flow
    values = (x.unflatten(0, (-1, dim)).mT.flatten(0, 1) for x in (flow.ours, flow.theirs))  # type: ignore[union-attr]
    return replace(flow, **dict(zip(("ours", "theirs"), values, strict=True)))


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the root mean square of theirs."""
    scale = rms(theirs).clamp(min=torch.finfo(torch.float64).tiny)
    return float((ours.detach().double() - theirs.detach().double()).abs().max() / scale)


def fits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors agree as far as their inputs do."""
    return ours.shape == theirs.shape and error(ours, theirs) <= FITS


def first(candidates: Iterable[tuple[T, Tensor]], wanted: Tensor) -> T | None:
    """The first candidate whose tensor agrees with what is wanted."""
    return next((what for what, made in candidates if fits(made, wanted)), None)


def best(candidates: Iterable[tuple[T, Tensor]], wanted: Tensor, limit: float = FITS) -> T | None:
    """The candidate that fits best, where some differ by little; the likelier ones stand first."""
    least, fit = limit, None
    for what, made in candidates:
        if (off := error(made, wanted)) <= least and (fit is None or off < least / 2):
            least, fit = off, what
    return fit


@contextmanager
def applied(model: Model, idea: Hypothesis, scene: Scene) -> Iterator[Model]:
    """The model with what undoes a cause: changed for as long as it is looked at."""
    if idea.config:
        yield scene.rebuilt(idea.config)
        return
    with ExitStack() as stack:
        if idea.undoes:
            stack.enter_context(edits.applied(model, idea))
        else:
            stack.enter_context(put(model, scene, [scene.measurement.place]))
        yield model


@contextmanager
def put(model: Model, scene: Scene, places: Sequence[Place]) -> Iterator[Model]:
    """The model with what the other has at these places, instead of what this one made."""
    if not places:
        raise RuntimeError("no place to put it")
    with ExitStack() as stack:
        for name, side, number in places:
            module, theirs = model.get_submodule(name), scene.comparison.flows[name, side, number]
            if theirs.theirs is None or not name:
                raise RuntimeError("nothing to put there")
            hook = _Put(scene.comparison.way, theirs.theirs, number)
            stack.enter_context(
                module.register_forward_hook(lambda _, args, out, hook=hook: hook(out))
                if side == "out"
                else module.register_forward_pre_hook(lambda _, args, hook=hook: hook(args[0]))
            )
        yield model


@dataclass
class _Put:
    """(tokens, features) in the place of what a module is given, or gives, the k-th time."""

    way: Way
    theirs: Tensor
    left: int
    before: int = 0  # tokens of each row that came in an earlier part

    def __call__(self, value: Any) -> Any:
        if self.way.name != "cached":  # there each part is given once
            self.left -= 1
            if self.left != -1:
                return None
        if isinstance(value, Tensor):
            return self.changed(value)
        return (self.changed(value[0]), *value[1:])

    def changed(self, x: Tensor) -> Tensor:
        theirs, mask = self.theirs, self.way.inputs.mask
        if x.numel() == theirs.numel():
            return theirs.reshape(x.shape).to(x.dtype)
        if self.way.name == "cached" and x.dim() == 3 and not len(theirs) % len(x):
            rows = theirs.reshape(len(x), -1, x.shape[-1])[:, self.before :][:, : x.shape[1]]
            self.before += x.shape[1]
            return rows.reshape(x.shape).to(x.dtype)
        if mask is None or mask.numel() != x.shape[:-1].numel() or int(mask.sum()) != len(theirs):
            raise RuntimeError("another shape")
        return x.masked_scatter(mask.bool()[..., None], theirs.to(x.dtype))
