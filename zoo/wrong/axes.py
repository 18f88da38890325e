"""Which way matrices stand in the residual stream: what reads it and what writes to it is alike.

The products of a stream's features over a matrix's rows (its Gram matrix) resemble those of all
others along the axis that lies in the stream, and none along the other one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import sqrt

import torch
from torch import Tensor

from zoo.wrong.finding import Finding
from zoo.wrong.numbers import Numbers
from zoo.wrong.opening import Opened
from zoo.wrong.values import called, files_of

WRITES = ("out", "down")  # to the stream: rows are its features; all others read
_ROWS = 128  # of all arrays of a family together
# Resemblance in units of what chance makes of as many families. Of the wrong axis of trained
# matrices it was 8 at most, where that of the right one was 480; of the right one mostly above 25.
_CHANCE, _CLEARLY = 5.0, 4.0
RANDOM = 2.0  # and of independent numbers 1


class Stream:
    """What stands along the residual stream in every matrix, and how alike that is."""

    def __init__(self, found: Opened, numbers: Sequence[Numbers]) -> None:
        self.dim = getattr(found.config, "dim", 0)
        self.held = {n.name: n for n in numbers if _side(n, self.dim) is not None}
        families = defaultdict[str, list[Numbers]](list)
        for n in self.held.values():
            families[n.array.family].append(n)
        self.families = families
        self._known = {f: _Products.of(each, self.dim) for f, each in families.items()}

    @property
    def square(self) -> list[Numbers]:
        """Those of the layers that have a side of the same length across."""
        found = (n for n in self.held.values() if n.array.layer is not None)
        return [n for n in found if _side(n, self.dim, across=True) is not None]

    def resembles(self, n: Numbers, *, across: bool = False, family: bool = True) -> float:
        """How alike it is to all others, in units of chance; `family`: to its own too."""
        side = _side(n, self.dim, across)
        if side is None:
            return 0.0
        mine, own = _Products(side), n.array.family
        against = [known for f, known in self._known.items() if f != own]
        if family and len(others := [m for m in self.families[own] if m is not n]) > 0:
            against.append(_Products.of(others, self.dim))
        if not against:
            return 0.0
        return sum(mine.alike(each) ** 2 for each in against) / len(against) * self.dim**2 / 2


class _Products:
    """Of some features over rows: the off-diagonal ones, which are compared and never made."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.size = sqrt(max(self._inner(self), 1e-30))

    @classmethod
    def of(cls, each: Sequence[Numbers], dim: int) -> _Products:
        """Of some rows of them all."""
        most = max(1, _ROWS // len(each))
        sides = [side for n in each if (side := _side(n, dim)) is not None]
        return cls(torch.cat([rows[:: -(-len(rows) // most)] for rows in sides]))

    def alike(self, other: _Products) -> float:
        """Their correlation."""
        return self._inner(other) / (self.size * other.size)

    def _inner(self, other: _Products) -> float:
        whole = float((self.rows @ other.rows.T).square().sum(dtype=torch.float64))
        diagonal = self.rows.square().sum(0).double() @ other.rows.square().sum(0).double()
        return whole - float(diagonal)


def transposed(stream: Stream) -> Iterator[Finding]:
    """Square matrices whose other axis is the one that lies in the stream."""
    if len(stream.families) < 3:
        return
    square = stream.square
    odd = list[Numbers]()
    for family in {n.array.family: None for n in square}:
        mine = [n for n in square if n.array.family == family]
        if _turned(stream, mine, family=False):
            odd += mine
    odd = odd or [n for n in square if _turned(stream, [n], family=True)]
    if odd:
        first = odd[0]
        does = "writes to" if writes(first) else "reads"
        right, wrong = (stream.resembles(first, across=across) for across in (False, True))
        seen = (
            f"{first.name}: turned round it {does} the residual stream as other matrices do "
            f"({wrong:.0f} times what chance makes of it), and as it is it does not ({right:.1f})"
        )
        what = f"Transposed: {called(odd)}"
        yield Finding(what, files_of(odd), seen, 0.95, "turn its axes round")


def _turned(stream: Stream, each: Sequence[Numbers], family: bool) -> bool:
    right, wrong = (
        sum(stream.resembles(n, across=across, family=family) for n in each) / len(each)
        for across in (False, True)
    )
    return wrong > _CHANCE and wrong > _CLEARLY * right


def writes(n: Numbers) -> bool:
    return n.name.removesuffix(".weight").rpartition(".")[2] in WRITES


def _side(n: Numbers, dim: int, across: bool = False) -> Tensor | None:
    """(rows, dim) along the axis that lies in the stream, or across it; None where it does not.

    Features are brought to one size. Of attention to another stream and of heads' own layers
    nothing is known.
    """
    if len(n.array.shape) != 2 or not n.array.native or not n.finite or n.constant:
        return None
    if ".cross." in n.name or n.name.startswith(("pooler", "head.", "summary", "nsp", "span")):
        return None
    rows = (n.some_rows if writes(n) == across else n.some_columns).float()
    if rows.shape[-1] != dim or not len(rows):
        return None
    return rows / rows.square().mean(0).sqrt().clamp_min(1e-30)
