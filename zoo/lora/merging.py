"""Merging an adapter: native arrays with low-rank updates added, and arrays that are replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from converters.lazy import Decoded, Lazy
from converters.plan import PlanStep
from zoo.checkpoints.plan_by_names import spec_of
from zoo.components.moe import Experts
from zoo.errors import PlanError, ShapeMismatch, UsageError, listing
from zoo.lora.files import Factors, Files
from zoo.lora.targets import TargetIndex, TargetMatrix

Own = Callable[[str], Lazy]  # a native array of the model's own, by any of its names
# Tiles of at least this size have the same bits as in the whole product: sums run along the rank
# only, and BLAS kernels choose another order only for smaller matrices.
_HIGH, _WIDE = 64, 384
# fields of the reference that only tie two arrays
_TIES = {"tie_word_embeddings", "share_embedding"}


class FactorSlice(NamedTuple):
    """The part of a module's factors that belongs to a native matrix: rows of b, columns of a."""

    target: TargetMatrix
    rows: Tensor
    columns: Tensor


class LowRankUpdate(NamedTuple):
    """scale * b @ a, which is added to a native matrix, or to one matrix of a stack."""

    part: FactorSlice
    factors: Factors

    def whole(self) -> Tensor:
        """The whole update."""
        a, b, scale, embedding = self.factors
        delta = (b @ a)[self.part.rows][:, self.part.columns] * scale
        return delta.mT if embedding else delta

    def block(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """(rows, columns) of the update."""
        a, b, scale, embedding = self.factors
        a, b = a.to(dtype), b.to(dtype)
        if embedding:  # tokens are the rows
            return (product(b, a, self.part.rows[columns], self.part.columns[rows]) * scale).mT
        return product(b, a, self.part.rows[rows], self.part.columns[columns]) * scale


def product(b: Tensor, a: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(rows, columns) of b @ a, with the same bits as in the whole product."""
    out = a.new_empty(len(rows), len(columns))
    beside = list(_tiles(columns, a.shape[1], _WIDE))
    for high, inside, there in _tiles(rows, b.shape[0], _HIGH):
        for wide, within, here in beside:
            tile = (b[high] @ a[:, wide])[inside][:, within]
            if isinstance(there, slice):
                out[there][:, here] = tile
            elif isinstance(here, slice):
                out[:, here][there] = tile
            else:
                out[there[:, None], here] = tile
    return out


_Indices = slice | Tensor


def _tiles(numbers: Tensor, length: int, size: int) -> Iterator[tuple[slice, _Indices, _Indices]]:
    """(tile, indices within the tile, indices in `numbers`) of each tile with any of `numbers`."""
    ends = [*range(size, length - size + 1, size), length]  # the rest belongs to the last tile
    first, count = int(numbers[0]) if len(numbers) else 0, len(numbers)
    in_order = bool((numbers == torch.arange(first, first + count)).all())
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        if in_order:
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                inside, there = slice(low - start, high - start), slice(low - first, high - first)
                yield slice(start, stop), inside, there
        elif len(index := ((numbers >= start) & (numbers < stop)).nonzero()[:, 0]):
            yield slice(start, stop), numbers[index] - start, index


class Merged(Decoded):
    """An array with low-rank updates added, in the array's own dtype: rounded once, at the end."""

    def __init__(self, array: Lazy, updates: Sequence[LowRankUpdate]) -> None:
        super().__init__(array.shape, array.dtype, self.matrix)
        self.array, self.updates = array, updates

    def matrix(self, rows: slice, columns: slice) -> Tensor:
        """(rows, columns) of the merged array."""
        out = self.array.matrix(rows, columns)
        for low in self.updates:
            height = self.shape[-2]
            first = (low.part.target.at or 0) * height
            start, stop = max(rows.start, first), min(rows.stop, first + height)
            if start < stop:
                block = out[start - rows.start : stop - rows.start]
                wide = wide_dtype(low.factors, out.dtype)
                update = low.block(slice(start - first, stop - first), columns, wide)
                block.copy_(block + update)
        return out


def wide_dtype(factors: Factors, own: torch.dtype) -> torch.dtype:
    """The dtype in which peft trains and multiplies factors: fp32 at least, or the weight's."""
    wide = torch.promote_types(factors.a.dtype, own)
    return torch.promote_types(wide, torch.float32)


# --- where it all goes ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Changes:
    """The changes of an adapter to a model's arrays, by native names."""

    index: TargetIndex
    parts: Mapping[str, list[FactorSlice]]  # by the reference's module
    updates: Mapping[str, list[LowRankUpdate]]
    whole: Mapping[str, Lazy]
    apart: bool  # whether tied names become separate arrays

    def _name(self, name: str) -> str:
        return name if self.apart else self.index.native.ties.get(name, name)

    def changed(self, name: str) -> bool:
        """Whether the adapter changes this array."""
        return self._name(name) in self.updates or self._name(name) in self.whole

    def made(self, name: str, array: Lazy) -> Lazy:
        """The array of this name with the adapter merged."""
        name = self._name(name)
        array = self.whole.get(name, array)
        return Merged(array, self.updates[name]) if name in self.updates else array


def changes(model: Any, native: Any, files: Files, own: Own) -> Changes:
    """Find the native matrices of an adapter's factors; list everything that does not fit."""
    index, problems = TargetIndex(model, native), list[str]()
    parts, updates = dict[str, list[FactorSlice]](), dict[str, list[LowRankUpdate]]()
    owners = dict[tuple[str, int | None], str]()
    for module, factors in files.factors.items():
        try:
            parts[module] = list(_parts(model, index, module, factors))
        except PlanError as error:
            problems.append(str(error))
            continue
        for part in parts[module]:
            key = part.target.native, part.target.at
            if (other := owners.setdefault(key, module)) != module:
                problems.append(
                    f"{other} and {module}: two modules of the reference, and one here, {key[0]}"
                )
            updates.setdefault(key[0], []).append(LowRankUpdate(part, factors))
    replaced = _replaced(index, files, own, problems)
    if problems:
        raise ShapeMismatch("\n  ".join([f"{files.where}:", *problems]))
    whole, apart = _untied(native.ties, updates, replaced, own)
    return Changes(index, parts, updates, whole, apart)


def _parts(model: Any, index: TargetIndex, module: str, factors: Factors) -> Iterator[FactorSlice]:
    name = f"{module}.weight"
    if index.is_shared(name):
        raise PlanError(
            f"{module}: several modules share this array, and the factors of one of them do not "
            "change the others. Such an adapter works in peft only"
        )
    info, step, n = index.find(name)
    if len(info.shape) != 2:
        raise PlanError(f"{module}: expected a matrix, found a weight {list(info.shape)}")
    for target in index.matrices(step, n, info.shape):
        owner = model.get_submodule(target.native.rpartition(".")[0])
        if not isinstance(owner, nn.Linear | nn.Embedding | Experts):
            kind = type(owner).__name__
            raise PlanError(
                f"{module}: {target.native} belongs to {kind}; factors are implemented for linear "
                "layers, embeddings and experts"
            )
        looked_up = isinstance(owner, nn.Embedding)
        # token embeddings belong to the model itself; others are tables that are read directly
        if looked_up and target.native.count(".") > 1:
            raise PlanError(
                f"{module}: {target.native} is read directly, and factors beside it have no effect"
            )
        if looked_up != factors.embedding:
            raise PlanError(
                f"{module}: expected factors of {'an embedding' if looked_up else 'a linear layer'}"
                f", found those of {'a linear layer' if looked_up else 'an embedding'}"
            )
        out, into = (target.columns, target.rows) if looked_up else (target.rows, target.columns)
        sizes = [factors.b.shape[0], factors.a.shape[1]]
        if sizes != (expected := [info.shape[out[0]], info.shape[into[0]]]):
            raise PlanError(
                f"{module}: expected factors for {expected} (out, in), found {sizes}. Is the "
                "adapter for another base?"
            )
        yield FactorSlice(target, out[1], into[1])


def _replaced(index: TargetIndex, files: Files, own: Own, problems: list[str]) -> dict[str, Lazy]:
    """Native arrays that replace the model's own."""
    steps, tensors_of = (
        dict[tuple[str, ...], PlanStep](),
        dict[tuple[str, ...], dict[int, Tensor]](),
    )
    for name, tensor in files.whole.items():
        try:
            info, step, n = index.find(name)
        except PlanError as error:
            problems.append(str(error))
            continue
        if info.shape != tuple(tensor.shape):
            more = ""
            if info.shape[1:] == tuple(tensor.shape[1:]):
                more = ". If it was resized for training, resize the base likewise and save that"
            problems.append(
                f"{name}: expected {list(info.shape)}, found {list(tensor.shape)}{more}"
            )
            continue
        if (main := index.main(name)) is not None and main not in files.whole:
            now = _disk(step, own)[n].whole()
            if not now.equal(tensor.to(now.dtype)):
                problems.append(f"{name}: differs from {main}, and both are one array here")
            continue
        steps[step.targets] = step
        if not tensors_of.setdefault(step.targets, {}).setdefault(n, tensor).equal(tensor):
            problems.append(f"{name}: differs from another name's, and both are one array here")
    made = dict[str, Lazy]()
    for targets, tensors in tensors_of.items():
        step = steps[targets]
        arrays = _disk(step, own)
        for n, tensor in tensors.items():
            arrays[n] = Lazy.of(tensor.to(arrays[n].dtype))
        native = arrays if step.transform is None else step.transform.targets_of(arrays)
        made |= zip(targets, native, strict=True)
    return made


def _disk(step: PlanStep, own: Own) -> list[Lazy]:
    native = [own(name) for name in step.targets]
    return native if step.transform is None else step.transform.sources_of(native)


def _untied(
    ties: Mapping[str, str], updates: Mapping[str, Any], replaced: Mapping[str, Lazy], own: Own
) -> tuple[dict[str, Lazy], bool]:
    """(arrays that replace others, whether tied names become separate arrays)."""
    groups, whole = dict[str, list[str]](), dict(replaced)
    for name, owner in ties.items():
        groups.setdefault(owner, [owner]).append(name)
    apart = False
    for owner, names in groups.items():
        there = [name for name in names if name in whole]
        before = own(owner).whole() if there else None
        for name in list(there):  # adapters save unchanged arrays too
            if before is not None and whole[name].whole().equal(before):
                del whole[name]
                there.remove(name)
        alike = all(whole[name].whole().equal(whole[there[0]].whole()) for name in there)
        partly = bool(there) and (not alike or len(there) < len(names))
        apart = apart or partly or any(name in updates for name in names)
    if not apart:
        whole = {name: array for name, array in whole.items() if name not in ties}
    return whole, apart


def untied(model: Any, ties: Mapping[str, str]) -> Any:
    """The config of the same model with a separate array for each tied name."""
    tied = spec_of(model).dialect("hf").config.get("tied", ())
    if getattr(model.config, "tied", False) and {*tied} <= _TIES:
        return model.config.replace(tied=False)
    raise UsageError(
        f"{listing(sorted({*ties, *ties.values()}))}: one array, which the adapter does not change "
        f"alike for all its readers, and {model.architecture} with separate arrays computes "
        "another function. Use the adapter without merging it"
    )
