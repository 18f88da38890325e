"""Lazy arrays: their parts are elsewhere; made whole, or a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Box = tuple[slice, ...]  # a range on every axis
Read = Callable[[slice, slice], "Tensor"]  # rows and columns of a matrix

_PIECE = 1 << 16  # numbers decoded at a time: intermediate results stay in the cache
_ENOUGH = 1 << 14  # decoding so many takes longer than a call
_Axis = tuple[int, int, int]  # stride, size, number of the axis


class Patch(NamedTuple):
    """One box of a lazy array, filled by a view of another array."""

    box: Box
    view: Tensor  # on meta if `of` still has to be decoded or read
    of: Lazy | None = None  # the array that `view` shows


class Lazy:
    """An array of `shape` whose patches are laid out in a `space` of as many numbers.

    The space often has more axes: axes that the shape merges are separate in it, so that a patch
    stays a view under any permutation. Row by row, both hold the same numbers in the same order.
    """

    def __init__(self, shape: Sequence[int], space: Sequence[int], parts: Sequence[Patch]) -> None:
        self.shape, self.space, self.parts = tuple(shape), tuple(space), tuple(parts)

    @classmethod
    def of(cls, tensor: Tensor) -> Lazy:
        """Return a tensor as a lazy array."""
        return cls(tensor.shape, tensor.shape, [Patch(_whole(tensor.shape), tensor)])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its numbers."""
        return self.parts[0].view.dtype

    @property
    def width(self) -> int:
        """Size of the last axis."""
        return self.shape[-1] if self.shape else 1

    @property
    def plain(self) -> Tensor | None:
        """The tensor, if the array is one tensor and nothing else."""
        if len(self.parts) != 1 or self.space != self.shape or self.parts[0].of is not None:
            return None
        return self.parts[0].view

    def whole(self) -> Tensor:
        """Return a tensor: a view if there is one patch whose axes merge, otherwise a copy."""
        return self.region(_whole(self.space)).reshape(self.shape)

    def pieces(self, limit: int) -> Iterator[Tensor]:
        """Yield tensors of at most `limit` bytes (or one number) in row-major order."""
        width = self.dtype.itemsize
        axis, rest = 0, prod(self.space) * width
        while axis < len(self.space) and rest > limit:
            rest //= max(1, self.space[axis])
            axis += 1
        if not axis:
            yield self.region(_whole(self.space))
            return
        # `axis` is the first that is whole in every piece; the one before it advances in steps
        step = max(1, limit // max(1, rest))
        for start in _corners(self.space[: axis - 1]):
            for row in range(0, self.space[axis - 1], step):
                end = min(row + step, self.space[axis - 1])
                outer = tuple(slice(n, n + 1) for n in start)
                yield self.region((*outer, slice(row, end), *_whole(self.space[axis:])))

    def region(self, box: Box) -> Tensor:
        """Return the numbers in a box: a view if one patch covers it, otherwise a copy."""
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
        """Return (rows, columns), with all axes but the last flattened into rows."""
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
        """Return the numbers that `view` shows, a view of a meta tensor in the place of this array.

        They are taken from the matrix around them, or from several if most of it would be gaps.
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
    """An array that is decoded from other numbers: `read` decodes a part of its rows."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, read: Read) -> None:
        super().__init__(shape, shape, ())
        self._dtype, self._read = dtype, read

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its numbers."""
        return self._dtype

    def region(self, box: Box) -> Tensor:
        """Return the numbers in a box."""
        import torch

        return self.window(torch.empty(self.shape, device="meta")[box])

    def matrix(self, rows: slice, columns: slice) -> Tensor:
        """Decode (rows, columns), a bounded piece at a time."""
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
    """An array in a file: `read` reads what is asked for directly."""

    def matrix(self, rows: slice, columns: slice) -> Tensor:
        """Read (rows, columns)."""
        return self._read(rows, columns)


def equal(a: Lazy, b: Lazy) -> bool:
    """Return whether both arrays hold the same numbers, comparing bounded pieces."""
    import torch

    pieces = (array.pieces(_PIECE * array.dtype.itemsize) for array in (a, b))
    return a.shape == b.shape and all(torch.equal(x, y) for x, y in zip(*pieces, strict=True))


def moved(
    move: Callable[[Sequence[Tensor]], list[Lazy]], arrays: Sequence[Tensor | Lazy]
) -> list[Lazy]:
    """Apply `move`, which makes arrays from tensors by views, to arrays.

    No more of lazy arrays is decoded or read than is used of the results.
    """
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
        return move([array.whole() for array in lazies])  # joined in a way that no view expresses
    return [Lazy(m.shape, m.space, each) for m, each in zip(made, parts, strict=True)]


def _base(view: Tensor) -> int:
    return id(view if view._base is None else view._base)


def _reach(view: Tensor, width: int) -> tuple[list[_Axis], list[_Axis]]:
    """Return a view's axes along a matrix's rows, and those along its columns."""
    axes = [(s, n, at) for at, (n, s) in enumerate(zip(view.shape, view.stride(), strict=True))]
    high = [(s // width, n, at) for s, n, at in axes if n > 1 and s >= width]
    return high, [(s, n, at) for s, n, at in axes if n > 1 and s < width]


def _in_rows(view: Tensor, width: int) -> bool:
    """Return whether each axis of a view is along rows or columns and stays inside a row."""
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
    """Yield a range of positions in row-major order as consecutive boxes."""
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
