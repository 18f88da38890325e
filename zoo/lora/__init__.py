"""LoRA adapters of peft's: apart from a native model's weights or merged into them, and back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from converters.lazy import Lazy
from zoo.checkpoints.build import native_of
from zoo.checkpoints.finite import first_where
from zoo.checkpoints.local import expanded
from zoo.components.model import Model
from zoo.errors import OverflowOnCast, UsageError, did_you_mean, listing
from zoo.lora import files as peft
from zoo.lora.files import Factors, Files, Settings
from zoo.lora.layers import Lora, put, take_off
from zoo.lora.merging import Changes, Low, Part, changes, untied, wide_dtype
from zoo.lora.places import Places

__all__ = [
    "Adapter",
    "Lora",
    "add_adapter",
    "load_adapter",
    "merge_adapter",
    "remove_adapter",
]


class Piece(NamedTuple):
    """Factors as they are trained, beside a native matrix."""

    part: Part
    low: Lora


@dataclass(frozen=True)
class Adapter:
    """What stands beside a model's weights, and how it goes back to where it came from."""

    files: Files
    changes: Changes
    pieces: dict[str, list[Piece]]  # by the reference's module
    before: dict[str, nn.Parameter]  # native parameters that others replaced
    hooks: list[Any] = field(repr=False)
    frozen: dict[str, bool] = field(repr=False)  # native parameters -> whether they were trained

    def factors(self, module: str) -> Factors:
        """As they are now, as the reference has them."""
        was = self.files.factors[module]
        first = self.pieces[module][0].low
        a, b = first.a.new_empty(was.a.shape), first.b.new_empty(was.b.shape)
        for (_, rows, columns), low in self.pieces[module]:
            a[:, columns], b[rows] = low.a.detach(), low.b.detach()
        return was._replace(a=a, b=b)


def load_adapter(model: Model, directory: str | PathLike[str]) -> Model:
    """A LoRA directory of peft's beside the model's weights, which stay as they are.

    The factors are trained from here on, and nothing else is. `merge_adapter` adds them to the
    weights, `save_adapter` writes them.
    """
    return attach(model, peft.read(expanded(directory)))


def add_adapter(
    model: Model,
    targets: Collection[str],
    *,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    rslora: bool = False,
) -> Model:
    """A new one, which changes nothing yet, on the reference's modules so called.

    `targets` are ends of their names, as peft's target_modules are: ("q_proj", "v_proj").
    """
    if isinstance(targets, str) or not isinstance(targets, Collection) or not targets:
        raise UsageError(f"targets={targets!r}: expected several names")
    _check(model)
    settings = Settings(r, alpha, dropout, rslora)
    text = peft.config_text(settings, sorted(targets))
    places, like = Places(model, native_of(model)), next(model.parameters())
    factors, known = dict[str, Factors](), set[str]()
    for name, info in places.header().items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(info.shape) != 2:
            continue
        known.add(module.rpartition(".")[2])
        if any(module == end or module.endswith(f".{end}") for end in targets):
            looked_up = isinstance(_owner(model, places.first(name).native)[0], nn.Embedding)
            out, into = info.shape
            if looked_up or places.first(name).rows[0]:  # kernels that lie (in, out)
                out, into = into, out
            a, b = like.new_empty(r, into), like.new_zeros(out, r)
            nn.init.kaiming_uniform_(a, 5**0.5)
            factors[module] = Factors(a, b, settings.scale_of(module, r), looked_up)
    if odd := [t for t in targets if not any(m == t or m.endswith(f".{t}") for m in factors)]:
        near = did_you_mean(odd[0], known)
        raise UsageError(f"targets: no module is called {listing(odd)}.{near}")
    return attach(model, Files("a new adapter", text, settings, factors, {}))


def attach(model: Model, files: Files) -> Model:
    _check(model)
    own = dict(own_parameters(model))
    found = changes(model, native_of(model), files, lambda name: Lazy.of(own[name].detach()))
    frozen = {name: parameter.requires_grad for name, parameter in own.items()}
    adapter = Adapter(files, found, {}, {}, [], frozen)
    for parameter in own.values():
        parameter.requires_grad_(False)
    for module, parts in found.parts.items():
        adapter.pieces[module] = list(_put(model, adapter, files.factors[module], parts))
    ties = {} if found.apart else found.places.native.ties
    for name, array in found.whole.items():
        tensor = array.whole()
        new = nn.Parameter(tensor.to(own[name].device, copy=True))
        for each in (name, *(other for other, of in ties.items() if of == name)):
            owner, leaf = _owner(model, each)
            adapter.before[each], owner._parameters[leaf] = own[each], new
    model.adapter = adapter
    return model


@torch.no_grad()
def merge_adapter(model: Model) -> Model:
    """Its factors added to the weights; what is left is a model like any other.

    Names of one array that the adapter tells apart, an embedding's and a head's, have an array
    each from here on.
    """
    adapter, found = adapter_of(model), adapter_of(model).changes
    if found.apart:
        ties = found.places.native.ties
        model.config, before = untied(model, ties), dict(own_parameters(model))
        for name, of in ties.items():
            if before[name] is before[of]:
                owner, leaf = _owner(model, name)
                owner._parameters[leaf] = nn.Parameter(before[of].detach().clone())
                adapter.frozen.setdefault(name, before[of].requires_grad)
    for name, index, matrix, merged in _merged(model, adapter):  # before anything is changed
        if (at := first_where(merged)) is not None:
            at = at if index is None else [index, *at]
            cause = "is too large for" if matrix[tuple(at[-2:])].isfinite() else "is not finite in"
            raise OverflowOnCast(
                f"{adapter.files.where}: merged, {name}{at} {cause} {merged.dtype}. "
                "Is lora_alpha or a factor too large? Load the base wider, or another adapter"
            )
    for _, _, matrix, merged in _merged(model, adapter):
        matrix.copy_(merged)
    _leave(model, adapter)
    return model


def _merged(model: Model, adapter: Adapter) -> Iterator[tuple[str, int | None, Tensor, Tensor]]:
    """(native name, which of a stack, the matrix, the matrix with the factors added)"""
    own = dict(own_parameters(model))
    for module, pieces in adapter.pieces.items():
        factors = adapter.factors(module)
        for part, _ in pieces:
            weight, index = own[part.place.native].detach(), part.place.at
            matrix = weight if index is None else weight[index]
            yield (
                part.place.native,
                index,
                matrix,
                (matrix + Low(part, factors).whole()).to(matrix.dtype),
            )


def remove_adapter(model: Model) -> Model:
    """The model as it was before."""
    adapter = adapter_of(model)
    for name, parameter in adapter.before.items():
        owner, leaf = _owner(model, name)
        owner._parameters[leaf] = parameter
    _leave(model, adapter)
    return model


def _put(model: Model, adapter: Adapter, factors: Factors, parts: list[Part]) -> Iterator[Piece]:
    """Layers that hold the factors; what several have alike is one parameter of all of them."""
    held: dict[tuple[int, tuple[int, ...]], nn.Parameter] = {}

    def of(side: int, part: Tensor, like: Tensor) -> nn.Parameter:
        key = side, tuple(part.tolist())
        if key not in held:
            # as peft trains them: in fp32 at least
            cut = factors.b[part] if side else factors.a[:, part]
            dtype = wide_dtype(factors, like.dtype)
            held[key] = nn.Parameter(cut.to(like.device, dtype, copy=True))
        return held[key]

    for part in parts:
        place, rows, columns = part
        owner, leaf = _owner(model, place.native)
        like = owner.get_parameter(leaf)
        a, b = of(0, columns, like), of(1, rows, like)
        low = Lora(a, b, factors.scale, adapter.files.settings.dropout)
        adapter.hooks.extend(put(owner, leaf, place.at, low))
        yield Piece(part, low)


# --- the model's own -----------------------------------------------------------------------------


def _check(model: Model) -> None:
    if not isinstance(model, Model):
        raise UsageError(f"expected a model of zoo's, found {type(model).__name__}")
    if model.is_prepared:
        raise UsageError("a prepared model takes no adapter: load it again, and prepare it merged")
    if model.adapter is not None:
        raise UsageError(
            f"an adapter is there already ({model.adapter.files.where}): merge it first"
        )


def adapter_of(model: Model) -> Adapter:
    """Return the adapter beside a model's weights; refuse a model that has none."""
    if model.adapter is None:
        raise UsageError("the model has no adapter: load_adapter puts one beside it")
    adapter: Adapter = model.adapter
    return adapter


def own_parameters(model: Model) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters without those of adapters."""
    lows = {id(p) for m in model.modules() if isinstance(m, Lora) for p in m.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return ((n, p) for n, p in named if id(p) not in lows)


def _owner(model: Model, name: str) -> tuple[nn.Module, str]:
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf


def _leave(model: Model, adapter: Adapter) -> None:
    for hook in adapter.hooks:
        hook.remove()
    for pieces in adapter.pieces.values():
        for piece in pieces:
            owner, leaf = _owner(model, piece.part.place.native)
            take_off(owner, leaf)
    model.adapter = None
    for name, parameter in own_parameters(model):
        parameter.requires_grad_(adapter.frozen[name])
