"""What an adapter makes of a model's arrays: added to them, or in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from converters.lazy import Decoded, Lazy
from converters.plan import PlanStep
from zoo.checkpoints.foreign import spec_of
from zoo.components.moe import Experts
from zoo.errors import PlanError, ShapeMismatch, UsageError, listing
from zoo.lora.files import Factors, Files
from zoo.lora.places import Place, Places

Own = Callable[[str], Lazy]  # a native array of the model's own, by any of its names
# What cuts a product into tiles of which each has the whole product's bits: sums run along the
# rank alone, and kernels of BLAS take other orders only for what is smaller than this.
_HIGH, _WIDE = 64, 384
# fields of the reference's that say of two arrays that they are one, and nothing else
_TIES = {"tie_word_embeddings", "share_embedding"}


class Part(NamedTuple):
    """What a native matrix has of a module's factors: rows of b, columns of a."""

    place: Place
    rows: Tensor
    columns: Tensor


class Low(NamedTuple):
    """b @ a, times scale, is added to a native matrix, or to one of several in a stack."""

    part: Part
    factors: Factors

    def whole(self) -> Tensor:
        """All that is added, at once."""
        a, b, scale, embedding = self.factors
        delta = (b @ a)[self.part.rows][:, self.part.columns] * scale
        return delta.mT if embedding else delta

    def block(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """(rows, columns) of it."""
        a, b, scale, embedding = self.factors
        a, b = a.to(dtype), b.to(dtype)
        if embedding:  # tokens are the rows
            return (product(b, a, self.part.rows[columns], self.part.columns[rows]) * scale).mT
        return product(b, a, self.part.rows[rows], self.part.columns[columns]) * scale


def product(b: Tensor, a: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(rows, columns) of b @ a, with the bits that they have in the whole of it."""
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


_Places = slice | Tensor


def _tiles(numbers: Tensor, length: int, size: int) -> Iterator[tuple[slice, _Places, _Places]]:
    """(a tile, which of its own are asked for, at which places they are asked for)."""
    ends = [*range(size, length - size + 1, size), length]  # what is left is no tile of its own
    first, count = int(numbers[0]) if len(numbers) else 0, len(numbers)
    in_order = bool((numbers == torch.arange(first, first + count)).all())
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        if in_order:
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                inside, there = slice(low - start, high - start), slice(low - first, high - first)
                yield slice(start, stop), inside, there
        elif len(places := ((numbers >= start) & (numbers < stop)).nonzero()[:, 0]):
            yield slice(start, stop), numbers[places] - start, places


class Merged(Decoded):
    """An array with what factors add to it, in the array's own dtype: rounded once, at the end."""

    def __init__(self, array: Lazy, lows: Sequence[Low]) -> None:
        super().__init__(array.shape, array.dtype, self.matrix)
        self.array, self.lows = array, lows

    def matrix(self, rows: slice, columns: slice) -> Tensor:
        out = self.array.matrix(rows, columns)
        for low in self.lows:
            height = self.shape[-2]
            first = (low.part.place.at or 0) * height
            start, stop = max(rows.start, first), min(rows.stop, first + height)
            if start < stop:
                held = out[start - rows.start : stop - rows.start]
                wide = wide_dtype(low.factors, out.dtype)
                block = low.block(slice(start - first, stop - first), columns, wide)
                held.copy_(held + block)
        return out


def wide_dtype(factors: Factors, own: torch.dtype) -> torch.dtype:
    """What peft trains and multiplies them in: fp32 at least, and no less than the weight's."""
    wide = torch.promote_types(factors.a.dtype, own)
    return torch.promote_types(wide, torch.float32)


# --- where it all goes ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Changes:
    """What becomes of a model's arrays, by native names."""

    places: Places
    parts: Mapping[str, list[Part]]  # by the reference's module
    lows: Mapping[str, list[Low]]
    whole: Mapping[str, Lazy]
    apart: bool  # whether names that were one array's are no longer

    def _name(self, name: str) -> str:
        return name if self.apart else self.places.native.ties.get(name, name)

    def changed(self, name: str) -> bool:
        return self._name(name) in self.lows or self._name(name) in self.whole

    def made(self, name: str, array: Lazy) -> Lazy:
        """What an array becomes that the model has under this name."""
        name = self._name(name)
        array = self.whole.get(name, array)
        return Merged(array, self.lows[name]) if name in self.lows else array


def changes(model: Any, native: Any, files: Files, own: Own) -> Changes:
    """Everything that does not fit is said at once."""
    places, problems = Places(model, native), list[str]()
    parts, lows = dict[str, list[Part]](), dict[str, list[Low]]()
    taken = dict[tuple[str, int | None], str]()
    for module, factors in files.factors.items():
        try:
            parts[module] = list(_parts(model, places, module, factors))
        except PlanError as error:
            problems.append(str(error))
            continue
        for part in parts[module]:
            key = part.place.native, part.place.at
            if (other := taken.setdefault(key, module)) != module:
                problems.append(f"{other} and {module}: two modules there, and one here, {key[0]}")
            lows.setdefault(key[0], []).append(Low(part, factors))
    replaced = _replaced(places, files, own, problems)
    if problems:
        raise ShapeMismatch("\n  ".join([f"{files.where}:", *problems]))
    whole, apart = _untied(native.ties, lows, replaced, own)
    return Changes(places, parts, lows, whole, apart)


def _parts(model: Any, places: Places, module: str, factors: Factors) -> Iterator[Part]:
    name = f"{module}.weight"
    if places.is_shared(name):
        raise PlanError(
            f"{module}: an array that several modules read there, and the factors of one of them "
            "change nothing for the others. It stays in peft"
        )
    info, step, n = places.find(name)
    if len(info.shape) != 2:
        raise PlanError(f"{module}: its weight is {list(info.shape)}, and no matrix")
    for place in places.places(step, n, info.shape):
        owner = model.get_submodule(place.native.rpartition(".")[0])
        if not isinstance(owner, nn.Linear | nn.Embedding | Experts):
            kind = type(owner).__name__
            raise PlanError(f"{module}: {place.native} is of {kind}, beside which no factors go")
        looked_up = isinstance(owner, nn.Embedding)
        if looked_up and place.native.count(".") > 1:  # what tokens are looked up in is the model's
            raise PlanError(
                f"{module}: {place.native} is read as it lies, and factors beside it change nothing"
            )
        if looked_up != factors.embedding:
            raise PlanError(
                f"{module}: factors of {'a linear layer' if looked_up else 'an embedding'}"
            )
        out, into = (place.columns, place.rows) if looked_up else (place.rows, place.columns)
        found = [factors.b.shape[0], factors.a.shape[1]]
        if found != (wanted := [info.shape[out[0]], info.shape[into[0]]]):
            raise PlanError(
                f"{module}: factors for {found}, expected {wanted} (out, in). Another base?"
            )
        yield Part(place, out[1], into[1])


def _replaced(places: Places, files: Files, own: Own, problems: list[str]) -> dict[str, Lazy]:
    """Native arrays in the place of the model's own."""
    steps, given = dict[tuple[str, ...], PlanStep](), dict[tuple[str, ...], dict[int, Tensor]]()
    for name, tensor in files.whole.items():
        try:
            info, step, n = places.find(name)
        except PlanError as error:
            problems.append(str(error))
            continue
        if info.shape != tuple(tensor.shape):
            more = ""
            if info.shape[1:] == tuple(tensor.shape[1:]):
                more = ". If it was resized for training, resize the base likewise and save that"
            problems.append(f"{name}: {list(tensor.shape)}, expected {list(info.shape)}{more}")
            continue
        if (main := places.main(name)) is not None and main not in files.whole:
            now = _disk(step, own)[n].whole()
            if not now.equal(tensor.to(now.dtype)):
                problems.append(f"{name}: changed apart from {main}, and one array with it here")
            continue
        steps[step.targets] = step
        if not given.setdefault(step.targets, {}).setdefault(n, tensor).equal(tensor):
            problems.append(f"{name}: differs from another name's, and both are one array here")
    made = dict[str, Lazy]()
    for targets, tensors in given.items():
        step = steps[targets]
        arrays = _disk(step, own)
        for n, tensor in tensors.items():
            arrays[n] = Lazy.of(tensor.to(arrays[n].dtype))
        found = arrays if step.transform is None else step.transform.targets_of(arrays)
        made |= zip(targets, found, strict=True)
    return made


def _disk(step: PlanStep, own: Own) -> list[Lazy]:
    native = [own(name) for name in step.targets]
    return native if step.transform is None else step.transform.sources_of(native)


def _untied(
    ties: Mapping[str, str], lows: Mapping[str, Any], replaced: Mapping[str, Lazy], own: Own
) -> tuple[dict[str, Lazy], bool]:
    """(arrays in the place of others, whether names of one array part)."""
    groups, whole = dict[str, list[str]](), dict(replaced)
    for name, owner in ties.items():
        groups.setdefault(owner, [owner]).append(name)
    apart = False
    for owner, names in groups.items():
        there = [name for name in names if name in whole]
        before = own(owner).whole() if there else None
        for name in list(there):  # files hold what was not changed too
            if before is not None and whole[name].whole().equal(before):
                del whole[name]
                there.remove(name)
        alike = all(whole[name].whole().equal(whole[there[0]].whole()) for name in there)
        partly = bool(there) and (not alike or len(there) < len(names))
        apart = apart or partly or any(name in lows for name in names)
    if not apart:
        whole = {name: array for name, array in whole.items() if name not in ties}
    return whole, apart


def untied(model: Any, ties: Mapping[str, str]) -> Any:
    """The config of the same model with an array for each name."""
    said = spec_of(model).dialect("hf").config.get("tied", ())
    if getattr(model.config, "tied", False) and {*said} <= _TIES:
        return model.config.replace(tied=False)
    raise UsageError(
        f"{listing(sorted({*ties, *ties.values()}))}: one array, the adapter does not change all "
        f"that read it alike, and {model.architecture} with two computes another function. Keep "
        "the adapter apart"
    )
