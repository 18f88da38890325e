"""Matrices that hold the numbers of their transpose: in all layers at once, then one by one.

A square matrix is transposed then. A rectangular one keeps its shape: a buffer in column-major
order that was read in row-major order, or the reverse. The residual stream shows it: in the right
order a matrix resembles the others along it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from zoo.diagnosis.checkup.finding import Finding, called, files_of
from zoo.diagnosis.checkup.opened import Opened
from zoo.diagnosis.checkup.orientation import Products, Stream
from zoo.diagnosis.checkup.statistics import Numbers, numbers_of

# Resemblance in units of what chance makes of as many families. Of the wrong order of trained
# matrices it was 5 at most (once 8, where that of the right one was 480); of the right one mostly
# above 25, and less only in models of a width of 64.
_CHANCE, _CLEARLY, _ENOUGH = 5.0, 4.0, 25.0
_LAYERS = 8  # of a kind that are looked at together
_MOST = 1 << 28  # numbers of a matrix: more are not flipped


class Flip(NamedTuple):
    """A matrix before and after it is flipped, and how much it resembles the others then."""

    read: Numbers
    right: Numbers
    order: str
    before: float
    after: float

    @classmethod
    def of(cls, n: Numbers, way: int, before: float, after: float) -> Flip:
        """A matrix flipped in one way, with its resemblance before and after."""
        made = n.array.flips[way]
        right = numbers_of(replace(n.array, made=made, flips=()))
        return cls(n, right, made.keywords["order"], before, after)


def put_right(
    contents: Opened, numbers: Sequence[Numbers]
) -> tuple[list[Finding], list[Numbers], Stream]:
    """Return findings about flipped matrices, all numbers with them undone, and their stream."""
    stream, flips = Stream(contents, numbers), list[Flip]()
    for search in (_kinds, _single):
        new = {flip.read: flip for flip in search(stream)} if len(stream.families) > 2 else {}
        if new:
            flips += new.values()
            numbers = [new[n].right if n in new else n for n in numbers]
            stream = Stream(contents, numbers)
    return list(_findings(stream, flips)), list(numbers), stream


def _findings(stream: Stream, flips: Sequence[Flip]) -> Iterator[Finding]:
    if not flips:
        return
    first, arrays = flips[0], [flip.read for flip in flips]
    does = "writes to" if stream.writes(first.right) else "reads from"
    seen = (
        f"{first.read.name}: transposed, it {does} the residual stream as other matrices do "
        f"({first.after:.0f} times chance); as it is, it does not ({first.before:.1f})"
    )
    happened, fix = "transposed", f"transpose {'them' if len(flips) > 1 else 'it'}"
    if (long := next((f for f in flips if len(set(f.read.array.shape)) > 1), None)) is not None:
        (rows, columns), by_rows = long.read.array.shape, long.order == "rows"
        happened = "transposed and re-strided"
        how = "written" if by_rows else "read"
        seen += f". {long.read.name} has the right shape: its numbers were {how} column by column"
        other = f"its transpose's shape, here ({columns}, {rows}),"
        fix = f"reshape each to {other} and transpose that"
        if not by_rows:
            fix = f"transpose each and reshape that to its shape, here ({rows}, {columns})"
    inner = {n for each in stream.families.values() for n in each if n.array.layer is not None}
    what = called(arrays)
    if len(stream.families) > 2 and inner <= {flip.right for flip in flips}:
        outer = [n.name for n in arrays if n.array.layer is None]
        what = ", ".join(("all matrices of all layers", *outer))
    yield Finding(f"{happened}: {what}", files_of(arrays), seen, 0.96, fix)


def _ways(n: Numbers) -> range:
    return range(len(n.array.flips) if n.count <= _MOST else 0)


# --- a kind at once ------------------------------------------------------------------------------


class _Kind:
    """The same matrix of some layers: as it is read, and flipped in each way that there is."""

    def __init__(self, stream: Stream, arrays: Sequence[Numbers]) -> None:
        self.stream, self.arrays = stream, arrays
        self.some = arrays[:: -(-len(arrays) // _LAYERS)]
        # of a square matrix without a rule it is not known whether it reads or writes
        square = not arrays[0].array.native and len(set(arrays[0].array.shape)) == 1
        self.ways = range(0) if square else range(min(len(_ways(n)) for n in self.some))
        self._cache = dict[int | None, tuple[Products, float]]()

    def read(self, way: int | None) -> tuple[Products, float]:
        """The products of all layers, and how much one half of the layers resembles the other."""
        if way not in self._cache:
            sides, own = [_side(self.stream, n, way) for n in self.some], 0.0
            if len(sides) > 1:
                halves = (self.stream.pooled(sides[n::2], many=True) for n in range(2))
                own = self.stream.chances(next(halves), next(halves))
            self._cache[way] = self.stream.pooled(sides, many=True), own
        return self._cache[way]


def _side(stream: Stream, n: Numbers, way: int | None) -> Tensor:
    side = stream.side(n) if way is None else stream.side_of(n, n.array.flips[way]())
    assert side is not None
    return side


class _Choice(NamedTuple):
    """A kind that resembles the others better when it is flipped in some way."""

    after: float
    before: float
    family: str
    way: int


class _Search:
    """Which kinds are to be flipped so that all resemble each other."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.kinds = {family: _Kind(stream, each) for family, each in stream.families.items()}
        self.chosen = dict[str, _Choice]()
        self._cache = dict[frozenset[tuple[str, int | None]], float]()

    def resembles(self, family: str, way: int | None) -> float:
        """How much a kind resembles the others as they are chosen."""
        names = [name for name in self.kinds if name != family]
        ways = [self.chosen[name].way if name in self.chosen else None for name in names]
        pairs = ({(family, way), other} for other in zip(names, ways, strict=True))
        return sum(map(self._alike, map(frozenset, pairs))) / len(names)

    def _alike(self, pair: frozenset[tuple[str, int | None]]) -> float:
        if pair not in self._cache:
            a, b = (self.kinds[family].read(way)[0] for family, way in pair)
            self._cache[pair] = self.stream.chances(a, b)
        return self._cache[pair]

    def best(self) -> _Choice | None:
        """The kind that gains most in resemblance to the others by a flip."""
        choices = list[_Choice]()
        for family in self.kinds.keys() - self.chosen.keys():
            if (before := self.resembles(family, None)) > _ENOUGH:
                continue
            for way in self.kinds[family].ways:
                after = self.resembles(family, way)
                if after > max(_CHANCE, _CLEARLY * before):
                    choices.append(_Choice(after, before, family, way))
        return max(choices, default=None)

    def first(self) -> _Choice | None:
        """Where no kind resembles others: one whose layers resemble each other, and that leads on.

        Flipped, it must be what others resemble when they are flipped.
        """
        pairs = list[tuple[_Choice, _Choice]]()
        for family, kind in self.kinds.items():
            if family in self.chosen or self.resembles(family, None) > _CHANCE:
                continue
            before = kind.read(None)[1]
            for way in kind.ways:
                if (after := kind.read(way)[1]) > max(_ENOUGH, _CLEARLY * before):
                    choice = _Choice(after, before, family, way)
                    self.chosen[family] = choice
                    if (second := self.best()) is not None:
                        pairs.append((second, choice))
                    del self.chosen[family]
        return max(pairs)[1] if pairs else None


def _kinds(stream: Stream) -> Iterator[Flip]:
    """Matrices of one kind that resemble the rest if all of them are flipped."""
    search = _Search(stream)
    while (choice := search.best() or search.first()) is not None:
        search.chosen[choice.family] = choice
    for family, arrays in stream.families.items():
        if (choice := search.chosen.get(family)) is not None:
            yield from (Flip.of(n, choice.way, choice.before, choice.after) for n in arrays)


# --- one alone -----------------------------------------------------------------------------------


def _single(stream: Stream) -> Iterator[Flip]:
    """Matrices that resemble the rest, those of other layers too, if they are flipped."""
    kinds = {family: _Kind(stream, arrays) for family, arrays in stream.families.items()}
    for family, kind in kinds.items():
        others = [other.read(None)[0] for name, other in kinds.items() if name != family]
        for n in kind.arrays:
            if n.array.layer is None or stream.resembles(n) > _ENOUGH:
                continue
            against = list(others)
            if rest := [_side(stream, m, None) for m in kind.some if m is not n]:
                against.append(stream.pooled(rest, many=True))
            before = _resembles(stream, n, None, against)
            ways = ((_resembles(stream, n, way, against), way) for way in _ways(n))
            after, way = max(ways, default=(0.0, 0))
            if after > max(_CHANCE, _CLEARLY * before):
                yield Flip.of(n, way, before, after)


def _resembles(stream: Stream, n: Numbers, way: int | None, others: Sequence[Products]) -> float:
    mine = stream.pooled([_side(stream, n, way)], many=True)
    return sum(stream.chances(mine, other) for other in others) / len(others)
