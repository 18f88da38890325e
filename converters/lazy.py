"""Arrays whose parts lie elsewhere: made whole, or a bounded piece at a time in row-major order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Box = tuple[slice, ...]  # a range on every axis


class Part(NamedTuple):
    """What stands in a box of an array: a view of another."""

    box: Box
    view: Tensor


class Lazy:
    """An array of `shape`, its parts laid out in a `space` of as many numbers and often more axes.

    Axes that a shape merges are apart in the space, so that a part stays a view however it is
    turned; row by row both hold the same numbers in the same order.
    """

    def __init__(self, shape: Sequence[int], space: Sequence[int], parts: Sequence[Part]) -> None:
        self.shape, self.space, self.parts = tuple(shape), tuple(space), tuple(parts)
        self._make: Callable[[int], Tensor] | None = None
        self._made: dict[int, Tensor] = {}
        rows = sorted((part.box[0].start, part.box[0].stop) for part in self.parts if part.box)
        self._in_turn = all(a[1] <= b[0] for a, b in pairwise(rows))

    def later(self, make: Callable[[int], Tensor]) -> Lazy:
        """The same with parts that are made when they are looked at.

        One is held where they stand one behind the other; where rows mix them, all are.
        """
        found = Lazy(self.shape, self.space, self.parts)
        found._make = make
        return found

    def _view(self, part: int) -> Tensor:
        if self._make is None:
            return self.parts[part].view
        if part not in self._made:
            if self._in_turn:
                self._made.clear()  # before the next one is there
            self._made[part] = self._make(part)
        return self._made[part]

    @classmethod
    def of(cls, tensor: Tensor) -> Lazy:
        return cls(tensor.shape, tensor.shape, [Part(_whole(tensor.shape), tensor)])

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].view.dtype

    def whole(self) -> Tensor:
        """A view where there is one part and its axes merge; else a tensor of its own."""
        return self.region(_whole(self.space)).reshape(self.shape)

    def pieces(self, limit: int) -> Iterator[Tensor]:
        """Of at most `limit` bytes each, or one number, one behind the other in row-major order."""
        width = self.parts[0].view.element_size() if self.parts else 1
        axis, rest = 0, prod(self.space) * width
        while axis < len(self.space) and rest > limit:
            rest //= max(1, self.space[axis])
            axis += 1
        if not axis:
            yield self.region(_whole(self.space))
            return
        # `axis` is the first that is whole in every piece; the one before it goes in steps
        step = max(1, limit // max(1, rest))
        for start in _corners(self.space[: axis - 1]):
            for row in range(0, self.space[axis - 1], step):
                end = min(row + step, self.space[axis - 1])
                outer = tuple(slice(n, n + 1) for n in start)
                yield self.region((*outer, slice(row, end), *_whole(self.space[axis:])))

    def region(self, box: Box) -> Tensor:
        """What stands in a box: a view if it is one part's, else gathered."""
        import torch

        boxes = [_overlap(part.box, box) for part in self.parts]
        found = [(common, n) for n, common in enumerate(boxes) if common is not None]
        if len(found) == 1 and found[0][0] == box:
            return self._inside(found[0][1], box)
        out = torch.empty([axis.stop - axis.start for axis in box], dtype=self.dtype)
        for common, n in found:
            out[_relative(common, box)] = self._inside(n, common)
        return out

    def _inside(self, n: int, box: Box) -> Tensor:
        view, mine = self._view(n), self.parts[n].box
        return view if mine == box else view[_relative(box, mine)]


class Decoded(Lazy):
    """An array that is made of other numbers, from `start` to `end` in row-major order."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, read: Callable[[int, int], Tensor]
    ) -> None:
        super().__init__(shape, shape, ())
        self._dtype, self._read = dtype, read

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def whole(self) -> Tensor:
        return self._read(0, prod(self.shape)).view(self.shape)

    def pieces(self, limit: int) -> Iterator[Tensor]:
        count, step = prod(self.shape), max(1, limit // self._dtype.itemsize)
        for start in range(0, count, step):
            yield self._read(start, min(start + step, count))


def _whole(shape: Sequence[int]) -> Box:
    return tuple(slice(0, size) for size in shape)


def _corners(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    from itertools import product

    return product(*(range(size) for size in shape))


def _overlap(a: Box, b: Box) -> Box | None:
    common = []
    for x, y in zip(a, b, strict=True):
        start, stop = max(x.start, y.start), min(x.stop, y.stop)
        if start >= stop and x.start < x.stop and y.start < y.stop:
            return None
        common.append(slice(start, max(start, stop)))
    return tuple(common)


def _relative(box: Box, origin: Box) -> Box:
    return tuple(
        slice(x.start - y.start, x.stop - y.start) for x, y in zip(box, origin, strict=True)
    )
