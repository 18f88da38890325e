"""Codes for blocks of numbers: a fixed count of numbers becomes a fixed count of bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Coding(NamedTuple):
    """A code: each `unit` numbers in row-major order become `width` bytes."""

    name: str
    unit: int
    width: int
    encode: Callable[[Tensor], Tensor]  # (n, unit) of float32 to as many rows of bytes

    def nbytes(self, numel: int) -> int:
        """Bytes of `numel` numbers."""
        return numel // self.unit * self.width


def in_units(pieces: Iterator[Tensor], coding: Coding) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (numbers as float32, their bytes) in whole units, however the pieces are cut."""
    import torch

    left = torch.empty(0)
    for piece in pieces:
        flat = piece.reshape(-1).to(torch.float32)
        flat = torch.cat([left, flat]) if left.numel() else flat
        whole = flat.numel() // coding.unit * coding.unit
        left = flat[whole:].clone()
        if whole:
            yield flat[:whole], coding.encode(flat[:whole].view(-1, coding.unit))
    assert not left.numel(), f"{left.numel()} numbers beyond whole units of {coding.unit}"


def _scales(groups: Tensor) -> Tensor:
    """(n, 1): the scale that maps the largest number of each group to 127."""
    return groups.abs().amax(dim=1, keepdim=True) / 127.0


def _whole(groups: Tensor) -> Tensor:
    import torch

    scales = _scales(groups)
    scales[scales == 0] = 1  # a group of zeros
    return (groups / scales).round().to(torch.int8).view(torch.uint8)


def _scale_bytes(groups: Tensor) -> Tensor:
    import torch

    return _scales(groups).contiguous().view(torch.uint8)


def int8_groups(unit: int) -> tuple[Coding, Coding]:
    """Return llama2.c's codes: int8 numbers of an array, and the float32 scales of its groups."""
    whole = Coding(f"int8 in groups of {unit}", unit, unit, _whole)
    return whole, Coding(f"scales of groups of {unit}", unit, 4, _scale_bytes)


def q8_0() -> Coding:
    """Return GGUF's Q8_0: for each 32 numbers a float16 scale and 32 int8 numbers."""
    from converters.quantized.blocks import quantize_q8_0

    return Coding("Q8_0", 32, 34, quantize_q8_0)
