"""LoRA adapters of peft: loaded beside a model's weights, trained, merged into them, and saved."""

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
from zoo.checkpoints.path_reference import expanded
from zoo.components.model import Model
from zoo.errors import OverflowOnCast, UsageError, did_you_mean, listing
from zoo.lora import files as peft
from zoo.lora.files import AdapterSettings, Factors, Files
from zoo.lora.layers import Lora, attach_factors, detach_factors
from zoo.lora.merging import Changes, FactorSlice, LowRankUpdate, changes, untied, wide_dtype
from zoo.lora.targets import TargetIndex

__all__ = [
    "Adapter",
    "Lora",
    "add_adapter",
    "load_adapter",
    "merge_adapter",
    "remove_adapter",
]


class AdapterLayer(NamedTuple):
    """A trainable module of low-rank factors beside a native matrix."""

    part: FactorSlice
    low: Lora


@dataclass(frozen=True)
class Adapter:
    """The adapter beside a model's weights, and what is needed to remove and save it."""

    files: Files
    changes: Changes
    pieces: dict[str, list[AdapterLayer]]  # by the reference's module
    before: dict[str, nn.Parameter]  # native parameters that the adapter replaced
    hooks: list[Any] = field(repr=False)
    frozen: dict[str, bool] = field(repr=False)  # native parameters -> their requires_grad before

    def factors(self, module: str) -> Factors:
        """The current factors of one of the reference's modules."""
        was = self.files.factors[module]
        first = self.pieces[module][0].low
        a, b = first.a.new_empty(was.a.shape), first.b.new_empty(was.b.shape)
        for (_, rows, columns), low in self.pieces[module]:
            a[:, columns], b[rows] = low.a.detach(), low.b.detach()
        return was._replace(a=a, b=b)


def load_adapter(model: Model, directory: str | PathLike[str]) -> Model:
    """Load a LoRA adapter of peft beside the model's weights, which do not change.

    From here on the factors are trained and nothing else is. `merge_adapter` adds them to the
    weights, `save_adapter` writes them, `remove_adapter` restores the model.

    Args:
        model: a model, as zoo.load returns it.
        directory: a directory with adapter_config.json and the adapter's weights.

    Returns:
        The same model.

    Raises:
        NotACheckpoint: the directory holds no adapter.
        ConfigError: adapter_config.json asks for something that is not implemented.
        ShapeMismatch: the factors do not fit the model.
        UsageError: the model is prepared, or has an adapter already.

    Example:
        >>> model = zoo.load("tiny-llama")
        >>> _ = model.add_adapter(["q_proj"], r=2).save_adapter("adapter")
        >>> model = zoo.load("tiny-llama").load_adapter("adapter")
        >>> model.adapter.files.settings.rank
        2
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
    """Add a new LoRA adapter, which does not change the model's output before it is trained.

    Args:
        model: a model, as zoo.load returns it.
        targets: the reference's modules that get factors, by the ends of their names, like peft's
            target_modules: ("q_proj", "v_proj").
        r: the rank of the factors.
        alpha: their product is scaled by alpha / r.
        dropout: of the adapter's inputs, in training.
        rslora: scale by alpha / sqrt(r) instead.

    Returns:
        The same model.

    Raises:
        UsageError: no module has such a name, a number is out of range, the model is prepared, or
            it has an adapter already.

    Example:
        >>> model = zoo.load("tiny-llama").add_adapter(["q_proj", "v_proj"], r=4)
        >>> sorted({name.rpartition(".")[2] for name, p in model.named_parameters()
        ...         if p.requires_grad})
        ['a', 'b']
    """
    if isinstance(targets, str) or not isinstance(targets, Collection) or not targets:
        raise UsageError(f"targets={targets!r}: expected a list of names")
    _check(model)
    settings = AdapterSettings(r, alpha, dropout, rslora)
    text = peft.config_text(settings, sorted(targets))
    index, like = TargetIndex(model, native_of(model)), next(model.parameters())
    factors, leaves = dict[str, Factors](), set[str]()
    for name, info in index.header().items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(info.shape) != 2:
            continue
        leaves.add(module.rpartition(".")[2])
        if any(module == end or module.endswith(f".{end}") for end in targets):
            looked_up = isinstance(_owner(model, index.first(name).native)[0], nn.Embedding)
            out, into = info.shape
            if looked_up or index.first(name).rows[0]:  # weights that are stored (in, out)
                out, into = into, out
            a, b = like.new_empty(r, into), like.new_zeros(out, r)
            nn.init.kaiming_uniform_(a, 5**0.5)
            factors[module] = Factors(a, b, settings.scale_of(module, r), looked_up)
    if unmatched := [t for t in targets if not any(m == t or m.endswith(f".{t}") for m in factors)]:
        near = did_you_mean(unmatched[0], leaves)
        raise UsageError(f"targets: no module is called {listing(unmatched)}.{near}")
    return attach(model, Files("a new adapter", text, settings, factors, {}))


def attach(model: Model, files: Files) -> Model:
    """Put an adapter's factors beside the model's weights, and freeze everything else."""
    _check(model)
    own = dict(own_parameters(model))
    result = changes(model, native_of(model), files, lambda name: Lazy.of(own[name].detach()))
    frozen = {name: parameter.requires_grad for name, parameter in own.items()}
    adapter = Adapter(files, result, {}, {}, [], frozen)
    for parameter in own.values():
        parameter.requires_grad_(False)
    for module, parts in result.parts.items():
        adapter.pieces[module] = list(_put(model, adapter, files.factors[module], parts))
    ties = {} if result.apart else result.index.native.ties
    for name, array in result.whole.items():
        tensor = array.whole()
        new = nn.Parameter(tensor.to(own[name].device, copy=True))
        for each in (name, *(other for other, of in ties.items() if of == name)):
            owner, leaf = _owner(model, each)
            adapter.before[each], owner._parameters[leaf] = own[each], new
    model.adapter = adapter
    return model


@torch.no_grad()
def merge_adapter(model: Model) -> Model:
    """Add the adapter's factors to the weights; the model then has no adapter.

    If the adapter changes only one of two tied weights, such as an embedding and a head, they are
    untied.

    Args:
        model: a model with an adapter.

    Returns:
        The same model.

    Raises:
        UsageError: the model has no adapter.
        OverflowOnCast: a sum is not finite in the weight's dtype; nothing was changed.

    Example:
        >>> model = zoo.load("tiny-llama").add_adapter(["q_proj"], r=2)
        >>> model.merge_adapter().adapter is None
        True
    """
    adapter, changes = adapter_of(model), adapter_of(model).changes
    if changes.apart:
        ties = changes.index.native.ties
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
    """(native name, index in a stack, the matrix, the matrix with the factors added)"""
    own = dict(own_parameters(model))
    for module, pieces in adapter.pieces.items():
        factors = adapter.factors(module)
        for part, _ in pieces:
            weight, index = own[part.target.native].detach(), part.target.at
            matrix = weight if index is None else weight[index]
            yield (
                part.target.native,
                index,
                matrix,
                (matrix + LowRankUpdate(part, factors).whole()).to(matrix.dtype),
            )


def remove_adapter(model: Model) -> Model:
    """Remove the adapter: the model is as it was before.

    Args:
        model: a model with an adapter.

    Returns:
        The same model.

    Raises:
        UsageError: the model has no adapter.

    Example:
        >>> model = zoo.load("tiny-llama").add_adapter(["q_proj"], r=2)
        >>> model.remove_adapter().adapter is None
        True
    """
    adapter = adapter_of(model)
    for name, parameter in adapter.before.items():
        owner, leaf = _owner(model, name)
        owner._parameters[leaf] = parameter
    _leave(model, adapter)
    return model


def _put(
    model: Model, adapter: Adapter, factors: Factors, parts: list[FactorSlice]
) -> Iterator[AdapterLayer]:
    """Put modules with the factors beside each part; parts of the same rows share a parameter."""
    parameters: dict[tuple[int, tuple[int, ...]], nn.Parameter] = {}

    def of(side: int, part: Tensor, like: Tensor) -> nn.Parameter:
        key = side, tuple(part.tolist())
        if key not in parameters:
            # as peft trains them: in fp32 at least
            cut = factors.b[part] if side else factors.a[:, part]
            dtype = wide_dtype(factors, like.dtype)
            parameters[key] = nn.Parameter(cut.to(like.device, dtype, copy=True))
        return parameters[key]

    for part in parts:
        target, rows, columns = part
        owner, leaf = _owner(model, target.native)
        like = owner.get_parameter(leaf)
        a, b = of(0, columns, like), of(1, rows, like)
        low = Lora(a, b, factors.scale, adapter.files.settings.dropout)
        adapter.hooks.extend(attach_factors(owner, leaf, target.at, low))
        yield AdapterLayer(part, low)


# --- the model's own -----------------------------------------------------------------------------


def _check(model: Model) -> None:
    if not isinstance(model, Model):
        raise UsageError(f"expected a model of zoo's, found {type(model).__name__}")
    if model.is_prepared:
        raise UsageError(
            "a prepared model takes no adapter: load it again, merge the adapter, then prepare it"
        )
    if model.adapter is not None:
        raise UsageError(
            f"the model has an adapter already ({model.adapter.files.where}): merge it first"
        )


def adapter_of(model: Model) -> Adapter:
    """Return the adapter beside a model's weights; refuse a model that has none."""
    if model.adapter is None:
        raise UsageError("the model has no adapter: load_adapter puts one beside it")
    adapter: Adapter = model.adapter
    return adapter


def own_parameters(model: Model) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's own parameters, without the adapter's."""
    updates = {id(p) for m in model.modules() if isinstance(m, Lora) for p in m.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return ((n, p) for n, p in named if id(p) not in updates)


def _owner(model: Model, name: str) -> tuple[nn.Module, str]:
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf


def _leave(model: Model, adapter: Adapter) -> None:
    for hook in adapter.hooks:
        hook.remove()
    for pieces in adapter.pieces.values():
        for piece in pieces:
            owner, leaf = _owner(model, piece.part.target.native)
            detach_factors(owner, leaf)
    model.adapter = None
    for name, parameter in own_parameters(model):
        parameter.requires_grad_(adapter.frozen[name])
