"""The modules of a model by kind: what is called `blocks.*.attn` in every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zoo.components.attention import Attention
from zoo.components.model import Model
from zoo.diagnosis.edits import Make, stars


@dataclass(frozen=True)
class ModuleKind:
    """Modules whose names differ in the layer's number alone, and the model's parameters."""

    name: str  # blocks.*.attn; empty: the model itself
    modules: Mapping[str, Any]  # blocks.0.attn -> module
    parameters: Mapping[str, nn.Parameter]

    @property
    def first(self) -> Any:
        return next(iter(self.modules.values()))

    def called(self, leaf: str, module: str | None = None) -> str:
        """The full name of something below each module, or below one of them."""
        name = self.name if module is None else module
        return ".".join(part for part in (name, leaf) if part)

    def has(self, leaf: str) -> bool:
        return self.called(leaf, next(iter(self.modules))) in self.parameters

    def shape(self, leaf: str) -> tuple[int, ...]:
        return tuple(self.parameters[self.called(leaf, next(iter(self.modules)))].shape)

    def is_square(self, leaf: str) -> bool:
        return self.has(leaf) and len(self.shape(leaf)) == 2 and len(set(self.shape(leaf))) == 1

    def each(self, leaf: str, change: Callable[[Tensor], Tensor]) -> dict[str, Make]:
        """One parameter of every module, changed."""
        names = [self.called(leaf, module) for module in self.modules]
        return {name: self.made(name, change) for name in names if name in self.parameters}

    def all(self, leaves: Iterable[str], change: Callable[[Tensor], Tensor]) -> dict[str, Make]:
        """Several parameters of every module, changed alike."""
        return {n: make for leaf in leaves for n, make in self.each(leaf, change).items()}

    def moved(self, sources: Mapping[str, str]) -> dict[str, Make]:
        """Each parameter below a key taken from below its value; empty if one does not fit."""
        moved = dict[str, Make]()
        for module in self.modules:
            for to, source in sources.items():
                for leaf in (".weight", ".bias", ""):
                    a, b = (self.called(f"{part}{leaf}", module) for part in (to, source))
                    if (a in self.parameters) != (b in self.parameters):
                        return {}
                    if a in self.parameters:
                        if self.parameters[a].shape != self.parameters[b].shape:
                            return {}
                        moved[a] = self.made(b)
        return moved

    def made(self, name: str, change: Callable[[Tensor], Tensor] = lambda x: x) -> Make:
        """What makes a parameter's new value when it is needed."""
        return lambda: change(self.parameters[name].data)


def kinds(model: Model, *types: type[nn.Module]) -> list[ModuleKind]:
    """All modules of some types, by kind."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    named = dict[str, dict[str, nn.Module]]()
    for name, module in model.named_modules():
        if isinstance(module, types or nn.Module):
            named.setdefault(stars(name), {})[name] = module
    return [ModuleKind(name, modules, parameters) for name, modules in named.items()]


def attentions(model: Model) -> list[ModuleKind]:
    """Attentions whose projections are plain: no adapter stands beside them."""
    every = kinds(model, Attention)
    return [k for k in every if all(k.has(f"{p}.weight") for p in ("q", "k", "v", "out"))]


def norms(model: Model) -> list[ModuleKind]:
    """Modules whose weight has one axis."""
    return [k for k in kinds(model) if k.has("weight") and len(k.shape("weight")) == 1]


def blocks(model: Model) -> list[ModuleKind]:
    """The layers of each stack."""
    return [k for k in kinds(model) if k.name.endswith("blocks.*")]
