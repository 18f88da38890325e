"""GGUF's quantized types: how blocks of bytes are decoded into numbers, and Q8_0 encoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from zoo.errors import NonFinite, OverflowOnCast

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 1 << 16  # numbers decoded at a time: what is made on the way stays in the cache


class BlockType(NamedTuple):
    """A type of tensors: plain numbers, or rows cut into blocks."""

    name: str
    block: int = 1  # numbers
    size: int = 0  # bytes of a block
    decode: Callable[[Tensor], Tensor] | None = None

    @property
    def dtype(self) -> str:
        """The dtype code of the decoded numbers."""
        return "F32" if self.decode else self.name

    def nbytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of a tensor whose rows are whole blocks."""
        return math.prod(shape) // self.block * self.size


# --- decoding: (n, bytes) -> (n, numbers) ---------------------------------------------------------
# Products and sums are taken one after the other, as the reference takes them: to the bit.


def _half(raw: Tensor) -> Tensor:
    """(n, 2k) bytes -> (n, k) F32. It copies first, since kernels may assume an even address."""
    import torch

    return raw.clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _fields(raw: Tensor, bits: int, run: int) -> Tensor:
    """(n, m) bytes -> (n, m * 8 / bits): per run of bytes, all lowest fields, then all next."""
    import torch

    runs = raw.reshape(len(raw), -1, run)
    parts = [(runs >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, 2).view(len(raw), -1)


def _scaled(scales: Tensor, values: Tensor) -> Tensor:
    """(n, g) scales and (n, g * k) values -> (n, g, k) products."""
    return scales.unsqueeze(2) * values.reshape(*scales.shape, -1)


@cache
def _table(values: tuple[float, ...]) -> Tensor:
    import torch

    return torch.tensor(values)


def _looked_up(values: tuple[float, ...], index: Tensor) -> Tensor:
    return _table(values).index_select(0, index.reshape(-1).int()).view(index.shape)


def _q4_0(raw: Tensor) -> Tensor:
    return _half(raw[:, :2]) * (_fields(raw[:, 2:], 4, 16).float() - 8)


def _q4_1(raw: Tensor) -> Tensor:
    return _half(raw[:, :2]) * _fields(raw[:, 4:], 4, 16).float() + _half(raw[:, 2:4])


def _q5_0(raw: Tensor) -> Tensor:
    values = _fields(raw[:, 6:], 4, 16) | _fields(raw[:, 2:6], 1, 1) << 4
    return _half(raw[:, :2]) * (values.float() - 16)


def _q5_1(raw: Tensor) -> Tensor:
    values = _fields(raw[:, 8:], 4, 16) | _fields(raw[:, 4:8], 1, 1) << 4
    return _half(raw[:, :2]) * values.float() + _half(raw[:, 2:4])


def _q8_0(raw: Tensor) -> Tensor:
    import torch

    return raw[:, 2:].view(torch.int8).float() * _half(raw[:, :2])


def _q2_k(raw: Tensor) -> Tensor:
    scales, values = raw[:, :16], _fields(raw[:, 16:80], 2, 32).float()
    least = _half(raw[:, 82:]) * (scales >> 4).float()
    return _scaled(_half(raw[:, 80:82]) * (scales & 15).float(), values) - least.unsqueeze(2)


def _q3_k(raw: Tensor) -> Tensor:
    values = _fields(raw[:, 32:96], 2, 32) | _fields(raw[:, :32], 1, 32) << 2
    scales = _fields(raw[:, 96:104], 4, 8) | _fields(raw[:, 104:108], 2, 4) << 4
    return _scaled(_half(raw[:, 108:]) * (scales.float() - 32), values.float() - 4)


def _scales_and_leasts(raw: Tensor) -> tuple[Tensor, Tensor]:
    """The first 16 bytes of Q4_K and Q5_K -> (n, 8) twice.

    Eight scales and eight minima of six bits: of the first four each the low bits of a byte, of the
    others four bits in the last bytes and two above the former.
    """
    import torch

    low, least, rest = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scales = torch.cat([low & 63, rest & 15 | low >> 2 & 48], 1)
    leasts = torch.cat([least & 63, rest >> 4 | least >> 2 & 48], 1)
    return _half(raw[:, :2]) * scales.float(), _half(raw[:, 2:4]) * leasts.float()


def _q4_k(raw: Tensor) -> Tensor:
    scales, leasts = _scales_and_leasts(raw)
    return _scaled(scales, _fields(raw[:, 16:], 4, 32).float()) - leasts.unsqueeze(2)


def _q5_k(raw: Tensor) -> Tensor:
    scales, leasts = _scales_and_leasts(raw)
    values = _fields(raw[:, 48:], 4, 32) | _fields(raw[:, 16:48], 1, 32) << 4
    return _scaled(scales, values.float()) - leasts.unsqueeze(2)


def _q6_k(raw: Tensor) -> Tensor:
    import torch

    values = _fields(raw[:, :128], 4, 64) | _fields(raw[:, 128:192], 2, 32) << 4
    scales = _half(raw[:, 208:]) * raw[:, 192:208].view(torch.int8).float()
    return _scaled(scales, values.float() - 32)


def _trits(raw: Tensor, count: int, run: int) -> Tensor:
    """(n, m) bytes -> (n, m * count) of 0, 1, 2: base-3 digits of the byte as a fraction.

    A product that overflows brings the next digit to the front.
    """
    import torch

    runs = raw.reshape(len(raw), -1, run)
    parts = torch.stack([runs * 3**place for place in range(count)], 2)
    return (parts.short() * 3 >> 8).view(len(raw), -1)


def _tq1_0(raw: Tensor) -> Tensor:
    import torch

    places = (raw[:, :32], 5, 32), (raw[:, 32:48], 5, 16), (raw[:, 48:52], 4, 4)
    values = torch.cat([_trits(*place) for place in places], 1)
    return _half(raw[:, 52:]) * (values.float() - 1)


def _tq2_0(raw: Tensor) -> Tensor:
    return _half(raw[:, 64:]) * (_fields(raw[:, :64], 2, 32).float() - 1)


_IQ4 = (-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4 = (0.0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the numbers
# half of what a byte's exponent and fraction stand for; the lowest exponents have no leading one
_E8M0 = tuple(2.0 ** (byte - 128) for byte in range(256))
_E4M3 = tuple(
    ((byte & 7) / 512 if byte & 120 == 0 else (1 + (byte & 7) / 8) * 2.0 ** ((byte >> 3 & 15) - 7))
    / 2
    * (byte != 127)
    for byte in range(256)
)


def _iq4_nl(raw: Tensor) -> Tensor:
    return _half(raw[:, :2]) * _looked_up(_IQ4, _fields(raw[:, 2:], 4, 16))


def _iq4_xs(raw: Tensor) -> Tensor:
    scales = _fields(raw[:, 4:8], 4, 1) | _fields(raw[:, 2:4], 2, 1) << 4
    values = _looked_up(_IQ4, _fields(raw[:, 8:], 4, 16))
    return _scaled(_half(raw[:, :2]) * (scales.float() - 32), values)


def _mxfp4(raw: Tensor) -> Tensor:
    return _looked_up(_E8M0, raw[:, :1]) * _looked_up(_FP4, _fields(raw[:, 1:], 4, 16))


def _nvfp4(raw: Tensor) -> Tensor:
    return _scaled(_looked_up(_E4M3, raw[:, :4]), _looked_up(_FP4, _fields(raw[:, 4:], 4, 8)))


# by their number in the file
KINDS = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    20: BlockType("IQ4_NL", 32, 18, _iq4_nl),
    23: BlockType("IQ4_XS", 256, 136, _iq4_xs),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54, _tq1_0),
    35: BlockType("TQ2_0", 256, 66, _tq2_0),
    39: BlockType("MXFP4", 32, 17, _mxfp4),
    40: BlockType("NVFP4", 64, 36, _nvfp4),
}


# these look numbers up in long tables, or are no type of files
UNREAD = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    29: "IQ1_M",
    41: "Q1_0",
}
WRITTEN = {KINDS[number].name: number for number in (0, 1, 8, 30)}


def dequantize(kind: BlockType, raw: Tensor, out: Tensor) -> None:
    """Decode (bytes,) into `out`, (numbers,) F32."""
    assert kind.decode is not None
    blocks, step = raw.view(-1, kind.size), _PIECE // kind.block
    for start in range(0, len(blocks), step):
        piece = kind.decode(blocks[start : start + step])
        out[start * kind.block :][: piece.numel()] = piece.view(-1)


def quantize_q8_0(tensor: Tensor) -> Tensor:
    """(..., numbers) -> (..., bytes): per 32 numbers a float16 scale, then 32 int8 numbers.

    Halves are rounded away from zero.

    Raises:
        NonFinite: If a number is NaN or infinite.
        OverflowOnCast: If a scale is too large for float16.
    """
    import torch

    kind = KINDS[WRITTEN["Q8_0"]]
    blocks = tensor.float().reshape(-1, kind.block)
    largest = blocks.abs().amax(1, keepdim=True)
    if not largest.isfinite().all():
        raise NonFinite("NaN or infinity has no place in Q8_0")
    scale = largest / 127
    half = scale.half()
    if not half.isfinite().all():
        raise OverflowOnCast(f"{largest.max():g}: the scales of Q8_0 reach up to 65504 * 127")
    # of numbers so small that this is infinite the scale is zero
    values = blocks * torch.where(scale > 2.0**-128, 1 / scale, 0)
    whole = values.trunc()
    whole += (2 * (values - whole)).trunc()
    packed = torch.cat([half.view(torch.uint8), whole.to(torch.int8).view(torch.uint8)], 1)
    return packed.view(*tensor.shape[:-1], -1)


def pieces_of_q8_0(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield (bytes,) of a tensor that comes in pieces of any size in row-major order."""
    import torch

    kept: Tensor | None = None  # what is not a whole block yet
    for piece in pieces:
        numbers = piece.float().reshape(-1)
        if kept is not None and len(kept):
            numbers = torch.cat([kept, numbers])
        whole = len(numbers) // 32 * 32
        kept = numbers[whole:].clone()  # whoever gives the piece may use its memory again
        if whole:
            yield quantize_q8_0(numbers[:whole])
    assert kept is None or not len(kept), "rows that are no whole blocks are refused before"
