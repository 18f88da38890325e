"""A hypothesis, an edit of the native model, and the parts of a model that it is about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from zoo.components.attention import Attention
from zoo.components.model import Model
from zoo.diagnosis.edits import Changes, Edit, block_of, stars

Made = Callable[[], Tensor]


@dataclass(frozen=True)
class Hypothesis:
    """`fix` ends the sentence "the text is likelier if …"; parameters are made when it is tried."""

    what: str
    fix: str
    parameters: Mapping[str, Made] = field(default_factory=dict)
    config: Changes = field(default_factory=dict)
    settings: Mapping[str, Changes] = field(default_factory=dict)
    across: bool = False  # in all blocks or in none: it is not tried in one alone

    def edit(self) -> Edit:
        made = {name: make() for name, make in self.parameters.items()}
        return Edit(parameters=made, config=self.config, settings=self.settings)

    def within(self, block: str) -> Hypothesis | None:
        """The same of one block alone."""
        inside = {n: make for n, make in self.parameters.items() if block_of(n) == block}
        if self.across or not inside or len(inside) == len(self.parameters):
            return None
        what, fix = (text.replace(stars(block), block) for text in (self.what, self.fix))
        return Hypothesis(what, fix, inside) if what != self.what else None


@dataclass(frozen=True)
class Kind:
    """Modules of one name but for the layer's number, and their parameters."""

    name: str  # blocks.*.attn
    modules: Mapping[str, Any]  # blocks.0.attn -> module
    held: Mapping[str, nn.Parameter]

    @property
    def first(self) -> Any:
        return next(iter(self.modules.values()))

    def has(self, leaf: str) -> bool:
        return f"{next(iter(self.modules))}.{leaf}" in self.held

    def shape(self, leaf: str) -> tuple[int, ...]:
        return tuple(self.held[f"{next(iter(self.modules))}.{leaf}"].shape)

    def each(self, leaf: str, change: Callable[[Tensor], Tensor]) -> dict[str, Made]:
        """One parameter of every module, changed."""

        names = [f"{name}.{leaf}" for name in self.modules]
        return {name: self.taken(name, change) for name in names if name in self.held}

    def all(self, leaves: Iterable[str], change: Callable[[Tensor], Tensor]) -> dict[str, Made]:
        return {n: made for leaf in leaves for n, made in self.each(leaf, change).items()}

    def moved(self, places: Mapping[str, str]) -> dict[str, Made]:
        """Each parameter below a key read from where its value says; empty if one does not fit."""
        found = dict[str, Made]()
        for name in self.modules:
            for to, source in places.items():
                for leaf in (".weight", ".bias", ""):
                    a, b = (f"{name}.{part}{leaf}" for part in (to, source))
                    if (a in self.held) != (b in self.held):
                        return {}
                    if a in self.held:
                        if self.held[a].shape != self.held[b].shape:
                            return {}
                        found[a] = self.taken(b)
        return found

    def taken(self, name: str, change: Callable[[Tensor], Tensor] = lambda x: x) -> Made:
        return lambda: change(self.held[name].data)


def kinds(model: Model, *types: type[nn.Module]) -> list[Kind]:
    held = dict(model.named_parameters(remove_duplicate=False))
    found = dict[str, dict[str, nn.Module]]()
    for name, module in model.named_modules():
        if isinstance(module, types):
            found.setdefault(stars(name), {})[name] = module
    return [Kind(name, modules, held) for name, modules in found.items()]


def attentions(model: Model) -> list[Kind]:
    """Those whose projections are plain: no adapter stands beside them."""
    every = kinds(model, Attention)
    return [k for k in every if all(k.has(f"{p}.weight") for p in ("q", "k", "v", "out"))]


def norms(model: Model) -> list[Kind]:
    """Whatever has a weight of one axis."""
    every = kinds(model, nn.Module)
    return [k for k in every if k.has("weight") and len(k.shape("weight")) == 1]


def blocks(model: Model) -> list[Kind]:
    """The layers of each stack."""
    every = kinds(model, nn.Module)
    return [k for k in every if k.name.endswith("blocks.*")]
