"""Packed matrices of GPTQ, AWQ and FP8: any box of their numbers can be decoded by itself."""

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

# bits -> (numbers, words) that begin and end together
UNITS = {2: (16, 1), 3: (32, 3), 4: (8, 1), 8: (4, 1)}
# the shift of each position in a word of AWQ, whose kernels unpack two at a time
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


class Matrix(NamedTuple):
    """A matrix that is decoded from other tensors, a box at a time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    box: Read  # (rows, columns) as float32 with any strides
    parts: tuple[str, ...]  # names on disk

    def whole(self) -> Tensor:
        """Decode the whole matrix."""
        with one_thread_each():  # pieces are small: several threads take several times as long
            return Decoded(self.shape, self.dtype, self.box).whole()


def transposed(box: Read) -> Read:
    """Return the transposed matrix."""
    return lambda rows, columns: box(columns, rows).t()


@dataclass(frozen=True)
class PackedGroups:
    """(inputs, outputs) of small integers, with a scale and a zero point for every `group` inputs.

    `shifts` are the positions of numbers in a word. GPTQ packs numbers along the inputs, AWQ along
    the outputs; both pack zero points along the outputs.
    """

    bits: int
    group: int
    less_one: bool  # zero points are stored minus one
    shifts: tuple[int, ...]
    along_inputs: bool
    read: Callable[[str, slice, slice], Tensor]  # a box of qweight, qzeros, scales or g_idx
    ordered: bool  # g_idx holds the group of each input

    def __call__(self, inputs: slice, outputs: slice) -> Tensor:
        """Decode (inputs, outputs) as float32, so that a narrower dtype rounds once."""
        if self.along_inputs:
            words = self.read("qweight", self._words(inputs), outputs)
            whole = unpacked(words, self.bits, self.shifts, inputs)
        else:
            whole = self._along_outputs("qweight", inputs, outputs)
        groups, position = self._groups(inputs)
        zero = self._along_outputs("qzeros", groups, outputs)
        if self.less_one:
            zero = zero + 1 & (1 << self.bits) - 1  # 0 is stored as the largest number
        whole = whole - zero[position]
        return whole.float().mul_(self.read("scales", groups, outputs).float()[position])

    def _along_outputs(self, part: str, rows: slice, outputs: slice) -> Tensor:
        words = self.read(part, rows, self._words(outputs))
        return unpacked(words.t(), self.bits, self.shifts, outputs).t()

    def _words(self, wanted: slice) -> slice:
        """Return the words that hold the numbers at the `wanted` positions."""
        count, width = UNITS[self.bits]
        return slice(wanted.start // count * width, -(-wanted.stop // count) * width)

    def _groups(self, inputs: slice) -> tuple[slice, Tensor]:
        """Return (the range of groups that these inputs belong to, the index of each in it)."""
        import torch

        if self.ordered:
            of = self.read("g_idx", slice(0, 1), inputs)[0].long()
        else:
            of = torch.arange(inputs.start, inputs.stop) // self.group
        first = int(of.min())
        return slice(first, int(of.max()) + 1), of - first


def unpacked(words: Tensor, bits: int, shifts: tuple[int, ...], wanted: slice) -> Tensor:
    """Unpack the numbers at `wanted` positions of each column as int32.

    `words` is (w, n): the 32-bit words that hold them.
    """
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
    """8-bit floats with a scale for each block; blocks at the edges may be cut off."""

    block: tuple[int, int]
    rows: int  # of one matrix; several may be stacked
    weight: Read
    scale: Callable[[], Tensor]  # (blocks of rows, blocks of columns)

    def __call__(self, rows: slice, columns: slice) -> Tensor:
        """Decode (rows, columns) as float32."""
        import torch

        row, column = (torch.arange(side.start, side.stop) for side in (rows, columns))
        high, wide = self.block
        down = row // self.rows * -(-self.rows // high) + row % self.rows // high
        scale = self.scale().float()[down[:, None], column // wide]
        return self.weight(rows, columns).float().mul_(scale)
