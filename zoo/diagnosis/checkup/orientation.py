"""The residual stream's axis of each matrix: what reads the stream and what writes is alike.

The products of a stream's features over a matrix's rows (its Gram matrix) resemble those of all
others along the axis that lies in the stream, and none along the other one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from math import isqrt, sqrt
from statistics import median

import torch
from torch import Tensor

from converters.lazy import Lazy
from zoo.diagnosis.checkup.opened import Opened, group
from zoo.diagnosis.checkup.statistics import Numbers

WRITES = ("out", "down")  # to the stream: rows are its features; all others read
_ROWS = 128  # of all arrays of a family together
_MOST_ROWS, _WORK = 1024, 1 << 28  # where more of them are compared; products that one takes
_MOST = 0.6  # of the matrices of layers
_OTHER = ("pooler", "head.", "summary", "nsp", "span")
# Resemblance of independent numbers, in units of chance: 0.8 to 1, nine times in ten below 2.1; of
# the least trained ones 2.3.
_RANDOM, _OF_USUAL = 2.2, 0.005


class Stream:
    """What stands along the residual stream in every matrix, and how alike that is.

    Where no rule says what a matrix does, its shape does, or what most of its family resemble.
    """

    def __init__(self, contents: Opened, numbers: Sequence[Numbers]) -> None:
        self.dim: int = getattr(contents.config, "dim", 0) or _width(numbers)
        self.numbers = {n.name: n for n in numbers if self.dim and _is_known(n, self.dim)}
        families = group(self.numbers.values(), lambda n: n.array.family)
        self.writing = {f for f, each in families.items() if _writes(each[0], self.dim)}
        self.families = {f: each for f, each in families.items() if self.side(each[0]) is not None}
        self._by_family = {f: self._products(each) for f, each in self.families.items()}
        unsure = [f for f, each in self.families.items() if not each[0].array.native]
        for f in unsure:
            square = [n for n in self.families[f] if n in self.square]
            right, wrong = (
                sum(self.resembles(n, self.side(n, across), family=False) for n in square)
                for across in (False, True)
            )
            if right < wrong:
                self.writing.add(f)
                self._by_family[f] = self._products(self.families[f])

    @property
    def square(self) -> list[Numbers]:
        """Those of the layers that have a side of the same length across."""
        layers = (n for each in self.families.values() for n in each if n.array.layer is not None)
        return [n for n in layers if set(n.array.shape) == {self.dim}]

    def resembles(self, n: Numbers, side: Tensor | None = None, *, family: bool = True) -> float:
        """How alike it is to all others, in units of chance; `family`: to its own too.

        By a `side` of its own, if one is given.
        """
        own, side = n.array.family, self.side(n) if side is None else side
        if own not in self.families or side is None:
            return 0.0
        mine = Products(side)
        against = [products for f, products in self._by_family.items() if f != own]
        if family and (others := [m for m in self.families[own] if m is not n]):
            against.append(self._products(others))
        if not against:
            return 0.0
        return sum(self.chances(mine, each) for each in against) / len(against)

    def chances(self, a: Products, b: Products) -> float:
        """How alike they are, in units of chance."""
        return a.alike(b) ** 2 * self.dim**2 / 2

    def knows(self, n: Numbers) -> bool:
        """Whether a matrix reads or writes the residual stream."""
        return n.array.family in self.families

    def is_like_none(self, n: Numbers) -> bool:
        """Whether it resembles the others no more than chance would have it."""
        return self.resembles(n) < max(_RANDOM, _OF_USUAL * self._usual)

    @cached_property
    def _usual(self) -> float:
        every = [self.resembles(n) for each in self.families.values() for n in each]
        return median(every) if every else 0.0

    def writes(self, n: Numbers) -> bool:
        """Whether a matrix writes to the residual stream."""
        return n.array.family in self.writing

    @property
    def _many(self) -> int:
        return max(_ROWS, min(_MOST_ROWS, isqrt(_WORK // self.dim)))

    def side(self, n: Numbers, across: bool = False) -> Tensor | None:
        """(rows, dim) along the axis that lies in the stream, or across it; None where it does not.

        Features are brought to one size.
        """
        return self._scaled(n.some_rows if self.writes(n) == across else n.some_columns)

    def side_of(self, n: Numbers, other: Lazy) -> Tensor | None:
        """The same of another matrix in its place."""
        matrix = other.whole()
        matrix = matrix.mT if self.writes(n) else matrix
        return self._scaled(_thinned(matrix, self._many))

    def _scaled(self, rows: Tensor) -> Tensor | None:
        if rows.shape[-1] != self.dim or not len(rows):
            return None
        rows = rows.float()
        return rows / rows.square().mean(0).sqrt().clamp_min(1e-30)

    def _products(self, each: Sequence[Numbers]) -> Products:
        """Of some rows of them all."""
        return self.pooled([side for n in each if (side := self.side(n)) is not None])

    def pooled(self, sides: Sequence[Tensor], many: bool = False) -> Products:
        """Of some rows of each, or of many."""
        most = max(1, (self._many if many else _ROWS) // len(sides))
        return Products(torch.cat([_thinned(rows, most) for rows in sides]))


def _thinned(rows: Tensor, most: int) -> Tensor:
    return rows[:: -(-len(rows) // most)]


def _width(numbers: Sequence[Numbers]) -> int:
    """The length that most matrices of layers have along an axis."""
    shapes = [n.array.shape for n in numbers if n.array.layer is not None and n.matrix]
    lengths = Counter(length for shape in shapes for length in set(shape))
    best, count = max(lengths.items(), key=lambda each: each[1], default=(0, 0))
    return best if count >= _MOST * len(shapes) else 0


def _is_known(n: Numbers, dim: int) -> bool:
    """Of attention to another stream and of heads' own layers nothing is known."""
    if len(n.array.shape) != 2 or not n.finite or n.constant or dim not in n.array.shape:
        return False
    return ".cross." not in n.name and not n.name.startswith(_OTHER)


def _writes(n: Numbers, dim: int) -> bool:
    if n.array.native:
        return n.name.removesuffix(".weight").rpartition(".")[2] in WRITES
    return n.array.shape[-1] != dim


class Products:
    """Of some features over rows: the off-diagonal ones, which are compared and never made."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.diagonal = rows.square().sum(0).double()
        self.sum = float(rows.sum(1).double().square().sum() - self.diagonal.sum())
        self.size = sqrt(max(self._inner(self), 1e-30))

    def alike(self, other: Products) -> float:
        """Their correlation."""
        return self._inner(other) / (self.size * other.size)

    def _inner(self, other: Products) -> float:
        whole = float((self.rows @ other.rows.T).square().sum(dtype=torch.float64))
        count = self.rows.shape[1] * (self.rows.shape[1] - 1)
        # each around its mean: numbers that are not zero on average would all be alike
        return whole - float(self.diagonal @ other.diagonal) - self.sum * other.sum / count
