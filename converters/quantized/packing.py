"""Matrices as GPTQ, AWQ and FP8 hold them: any box of their numbers, and no more than that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from converters.lazy import Decoded, Read
from converters.threads import one_thread_each

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_WORD = 32  # bits

# numbers and words that begin and end together
UNITS = {2: (16, 1), 3: (32, 3), 4: (8, 1), 8: (4, 1)}
# where in a word AWQ has the number of each place: its kernels take them out two at a time
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


class Matrix(NamedTuple):
    """A matrix as its name's readers expect it, made of other tensors a box at a time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    box: Read  # rows, columns: float32 of whatever strides
    parts: tuple[str, ...]  # names on disk

    def whole(self) -> Tensor:
        with one_thread_each():  # pieces are small: to share them takes several times as long
            return Decoded(self.shape, self.dtype, self.box).whole()


def turned(box: Read) -> Read:
    """The same matrix with its axes exchanged."""
    return lambda rows, columns: box(columns, rows).t()


@dataclass(frozen=True)
class Groups:
    """(inputs, outputs) of small whole numbers; a scale and a zero point each `group` inputs.

    `pack` is how numbers stand in words: those of GPTQ along the inputs, of AWQ along the outputs;
    zero points along the outputs with either.
    """

    bits: int
    group: int
    less_one: bool  # zero points are stored so
    shifts: tuple[int, ...]
    along_inputs: bool
    read: Callable[[str, slice, slice], Tensor]  # a box of qweight, qzeros, scales or g_idx
    ordered: bool  # g_idx says which group an input is of

    def __call__(self, inputs: slice, outputs: slice) -> Tensor:
        """(inputs, outputs) float32: what is rounded to any narrower dtype is rounded once."""
        if self.along_inputs:
            words = self.read("qweight", self._words(inputs), outputs)
            whole = unpacked(words, self.bits, self.shifts, inputs)
        else:
            whole = self._along_outputs("qweight", inputs, outputs)
        groups, place = self._groups(inputs)
        zero = self._along_outputs("qzeros", groups, outputs)
        if self.less_one:
            zero = zero + 1 & (1 << self.bits) - 1  # 0 is stored as the largest number
        whole = whole - zero[place]
        return whole.float().mul_(self.read("scales", groups, outputs).float()[place])

    def _along_outputs(self, part: str, rows: slice, outputs: slice) -> Tensor:
        words = self.read(part, rows, self._words(outputs))
        return unpacked(words.t(), self.bits, self.shifts, outputs).t()

    def _words(self, wanted: slice) -> slice:
        """Those that hold the numbers of `wanted` places."""
        count, width = UNITS[self.bits]
        return slice(wanted.start // count * width, -(-wanted.stop // count) * width)

    def _groups(self, inputs: slice) -> tuple[slice, Tensor]:
        """(all groups that these inputs are of, the place of each input's among them)."""
        import torch

        if self.ordered:
            of = self.read("g_idx", slice(0, 1), inputs)[0].long()
        else:
            of = torch.arange(inputs.start, inputs.stop) // self.group
        first = int(of.min())
        return slice(first, int(of.max()) + 1), of - first


def unpacked(words: Tensor, bits: int, shifts: tuple[int, ...], wanted: slice) -> Tensor:
    """(w, n) words of 32 bits that hold `wanted` places of each column: their numbers, as int32."""
    import torch

    count, width = UNITS[bits]
    first, last = wanted.start // count, -(-wanted.stop // count)
    units = words.unflatten(0, (last - first, width))
    if width == 1:
        numbers = units >> torch.tensor(shifts, dtype=torch.int32).view(1, -1, 1)
    else:  # one stream of bits: a number may begin in one word and end in the next
        at = torch.arange(0, count * bits, bits)
        wide = units.long() & 0xFFFFFFFF
        after = torch.cat([wide[:, 1:], torch.zeros_like(wide[:, :1])], 1)
        both = wide[:, at // _WORD] | after[:, at // _WORD] << _WORD
        numbers = (both >> (at % _WORD).view(1, -1, 1)).int()
    numbers = (numbers & (1 << bits) - 1).flatten(0, 1)
    return numbers[wanted.start - first * count : wanted.stop - first * count]


@dataclass(frozen=True)
class PackedBlocks:
    """Eight-bit floats, a scale each block; those at the ends of a matrix may be cut short."""

    block: tuple[int, int]
    rows: int  # of a matrix, of which several may lie one behind the other
    weight: Read
    scale: Callable[[], Tensor]  # (blocks of rows, blocks of columns)

    def __call__(self, rows: slice, columns: slice) -> Tensor:
        import torch

        row, column = (torch.arange(side.start, side.stop) for side in (rows, columns))
        high, wide = self.block
        down = row // self.rows * -(-self.rows // high) + row % self.rows // high
        scale = self.scale().float()[down[:, None], column // wide]
        return self.weight(rows, columns).float().mul_(scale)
