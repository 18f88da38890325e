"""Arrays whose parts lie elsewhere: made whole, or a bounded piece at a time in row-major order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Box = tuple[slice, ...]  # a range on every axis
Read = Callable[[slice, slice], "Tensor"]  # rows and columns of a matrix

_PIECE = 1 << 16  # numbers decoded at a time: what is made on the way stays in the cache
_ENOUGH = 1 << 14  # so many take longer to decode than to ask for
_Axis = tuple[int, int, int]  # how far apart, how many, which one


class Patch(NamedTuple):
    """What stands in a box of an array: a view of another."""

    box: Box
    view: Tensor  # on meta where the other's numbers are still to be made
    of: Lazy | None = None  # which is this one then


class Lazy:
    """An array of `shape`, its parts laid out in a `space` of as many numbers and often more axes.

    Axes that a shape merges are apart in the space, so that a part stays a view however it is
    turned; row by row both hold the same numbers in the same order.
    """

    def __init__(self, shape: Sequence[int], space: Sequence[int], parts: Sequence[Patch]) -> None:
        self.shape, self.space, self.parts = tuple(shape), tuple(space), tuple(parts)

    @classmethod
    def of(cls, tensor: Tensor) -> Lazy:
        return cls(tensor.shape, tensor.shape, [Patch(_whole(tensor.shape), tensor)])

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].view.dtype

    @property
    def width(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def plain(self) -> Tensor | None:
        """The tensor that it is, if it is one and no more."""
        if len(self.parts) != 1 or self.space != self.shape or self.parts[0].of is not None:
            return None
        return self.parts[0].view

    def whole(self) -> Tensor:
        """A view where there is one part and its axes merge; else a tensor of its own."""
        return self.region(_whole(self.space)).reshape(self.shape)

    def pieces(self, limit: int) -> Iterator[Tensor]:
        """Of at most `limit` bytes each, or one number, one behind the other in row-major order."""
        width = self.dtype.itemsize
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
        pairs = zip(boxes, self.parts, strict=True)
        overlaps = [(common, part) for common, part in pairs if common is not None]
        if len(overlaps) == 1 and overlaps[0][0] == box:
            return _inside(overlaps[0][1], box)
        out = torch.empty([axis.stop - axis.start for axis in box], dtype=self.dtype)
        for common, part in overlaps:
            out[_relative(common, box)] = _inside(part, common)
        return out

    def matrix(self, rows: slice, columns: slice) -> Tensor:
        """(rows, columns) of it, all axes but the last counted as one."""
        import torch

        axis = len(self.space)
        while axis and prod(self.space[axis:]) < self.width:
            axis -= 1
        out = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=self.dtype)
        down = 0
        for high in _boxes(rows.start, rows.stop, self.space[:axis]):
            height, across = _size(high), 0
            for wide in _boxes(columns.start, columns.stop, self.space[axis:]):
                width = _size(wide)
                place = out[down : down + height, across : across + width]
                place.copy_(self.region((*high, *wide)).reshape(height, width))
                across += width
            down += height
        return out

    def window(self, view: Tensor) -> Tensor:
        """The numbers that a view of an array on meta, which stands for this one, would show.

        They are taken out of the matrix around them; of several where gaps would be most of it.
        """
        plain = self.plain
        if plain is not None and plain.is_contiguous():
            offset = plain.storage_offset() + view.storage_offset()
            return plain.as_strided(view.shape, view.stride(), offset)
        import torch

        row, column = divmod(int(view.storage_offset()), self.width)
        high, wide = _reach(view, self.width)
        height, breadth = (1 + sum((n - 1) * s for s, n, _ in side) for side in (high, wide))
        if height * breadth > view.numel():  # the rows or columns that are farthest apart
            _, n, axis = max(high if height > prod(n for _, n, _ in high) else wide)
            if height * breadth > 2 * view.numel() or view.numel() > n * _ENOUGH:
                out = torch.empty(view.shape, dtype=self.dtype)
                for at in range(n):
                    out.select(axis, at).copy_(self.window(view.select(axis, at)))
                return out
        block = self.matrix(slice(row, row + height), slice(column, column + breadth))
        strides = [s // self.width * breadth if s >= self.width else s for s in view.stride()]
        return block.as_strided(view.shape, strides)


class Decoded(Lazy):
    """An array that is made of other numbers: `read` makes those of a part of its rows."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, read: Read) -> None:
        super().__init__(shape, shape, ())
        self._dtype, self._read = dtype, read

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def region(self, box: Box) -> Tensor:
        import torch

        return self.window(torch.empty(self.shape, device="meta")[box])

    def matrix(self, rows: slice, columns: slice) -> Tensor:
        import torch

        height, width = rows.stop - rows.start, columns.stop - columns.start
        out = torch.empty(height, width, dtype=self._dtype)
        across = min(width, _PIECE)
        down = max(1, _PIECE // max(1, across))
        for top in range(0, height, down):
            for left in range(0, width, across):
                place = out[top : top + down, left : left + across]
                first, second = rows.start + top, columns.start + left
                read = slice(first, first + len(place)), slice(second, second + place.shape[1])
                place.copy_(self._read(*read))
        return out


class FileBacked(Decoded):
    """An array that lies in a file: `read` reads what is asked for, straight into its place."""

    def matrix(self, rows: slice, columns: slice) -> Tensor:
        return self._read(rows, columns)


def equal(a: Lazy, b: Lazy) -> bool:
    """Whether both hold the same numbers, a bounded piece at a time."""
    import torch

    pieces = (array.pieces(_PIECE * array.dtype.itemsize) for array in (a, b))
    return a.shape == b.shape and all(torch.equal(x, y) for x, y in zip(*pieces, strict=True))


def moved(
    move: Callable[[Sequence[Tensor]], list[Lazy]], arrays: Sequence[Tensor | Lazy]
) -> list[Lazy]:
    """What `move` makes of arrays by views, with no more of them made than is looked at."""
    import torch

    lazies = [array if isinstance(array, Lazy) else Lazy.of(array) for array in arrays]
    plain = [array.plain for array in lazies]
    tensors = [tensor for tensor in plain if tensor is not None]
    if len(tensors) == len(lazies):
        return move(tensors)
    metas = [torch.empty(array.shape, dtype=array.dtype, device="meta") for array in lazies]
    made = move(metas)
    of = {id(meta): array for meta, array in zip(metas, lazies, strict=True)}
    parts = [[part._replace(of=of.get(_base(part.view))) for part in m.parts] for m in made]
    if any(p.of is None or not _in_rows(p.view, p.of.width) for each in parts for p in each):
        return move([array.whole() for array in lazies])  # joined in a way that no view shows
    return [Lazy(m.shape, m.space, each) for m, each in zip(made, parts, strict=True)]


def _base(view: Tensor) -> int:
    return id(view if view._base is None else view._base)


def _reach(view: Tensor, width: int) -> tuple[list[_Axis], list[_Axis]]:
    """A view's axes that go along a matrix's rows, and those that go along its columns."""
    axes = [(s, n, at) for at, (n, s) in enumerate(zip(view.shape, view.stride(), strict=True))]
    high = [(s // width, n, at) for s, n, at in axes if n > 1 and s >= width]
    return high, [(s, n, at) for s, n, at in axes if n > 1 and s < width]


def _in_rows(view: Tensor, width: int) -> bool:
    """Whether each of a view's axes goes along rows or along columns, and ends where these do."""
    _, wide = _reach(view, width)
    end = view.storage_offset() % width + sum((n - 1) * s for s, n, _ in wide)
    strides = [s for s, n in zip(view.stride(), view.shape, strict=True) if n > 1 and s > width]
    return end < width and not any(s % width for s in strides)


def _inside(part: Patch, box: Box) -> Tensor:
    view = part.view if part.box == box else part.view[_relative(box, part.box)]
    return view if part.of is None else part.of.window(view)


def _whole(shape: Sequence[int]) -> Box:
    return tuple(slice(0, size) for size in shape)


def _size(box: Box) -> int:
    return prod(axis.stop - axis.start for axis in box)


def _boxes(start: int, stop: int, space: Sequence[int]) -> Iterator[Box]:
    """What lies from one place to another in row-major order, as boxes one behind the other."""
    if not space:
        yield ()
        return
    below = prod(space[1:])
    while start < stop:
        at, rest = divmod(start, below)
        if rest or stop - start < below:
            end = min(stop, (at + 1) * below)
            for box in _boxes(rest, end - at * below, space[1:]):
                yield (slice(at, at + 1), *box)
            start = end
        else:
            count = (stop - start) // below
            yield (slice(at, at + count), *_whole(space[1:]))
            start += count * below


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
