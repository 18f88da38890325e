"""What an array holds: every number is looked at, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, nan, prod, sqrt
from typing import Any

import torch
from torch import Tensor

from converters.formats import torch_dtype
from converters.lazy import Lazy
from zoo.diagnosis.checkup.opened import Array

_BLOCK = 1 << 18  # numbers at a time: what is made of them on the way stays in the cache
_BANDS, _BAND, _ACROSS = 16, 16, 256  # of a matrix what is looked at more closely
_KEPT, _LONG = 1 << 17, 1 << 15  # numbers of a matrix, if its rows are no longer
MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}
_NORMAL = {"F64": 2.3e-308, "F32": 1.17549435e-38, "F16": 6.103515625e-05, "BF16": 1.17549435e-38}
LARGEST_F16 = 65504.0
# what a scale times a whole number up to so much is called
_GRIDS = {127: "int8", 7: "int4", 8: "int4"}
_GROUPS = (32, 64, 128)


@dataclass(frozen=True, eq=False)  # one is itself
class Numbers:
    """`rows` and `columns` are means of squares; the last axis counts columns, all others rows."""

    array: Array = field(repr=False)
    nans: int
    infs: int
    zeros: int
    mean: float
    std: float
    size: float  # the mean of what they are without a sign
    least: float  # without a sign; zeros do not count
    most: float
    fourth: float  # mean of the fourth power
    low: float  # of all, with its sign
    high: float
    denormal: int
    saturated: int
    rows: Tensor = field(repr=False)
    marks: Tensor = field(repr=False)  # (rows,), of equal rows the same
    columns: Tensor = field(repr=False)
    empty: Tensor = field(repr=False)  # (rows,), True where all are zero
    # some rows (n, columns) and some columns (n, rows) of a matrix, from all over it
    some_rows: Tensor = field(repr=False)
    some_columns: Tensor = field(repr=False)
    bits: int | None = None  # of the mantissa that are used; None where too few numbers tell
    grid: str = ""  # of whole numbers times a scale
    orders: float = 0.0  # powers of two that they are spread over, and with their bytes swapped
    swapped: float = inf
    peak: float = nan  # the largest singular value, in units of what noise of that size has

    @property
    def name(self) -> str:
        return self.array.name

    @property
    def count(self) -> int:
        return prod(self.array.shape)

    @property
    def finite(self) -> bool:
        return not self.nans and not self.infs

    @property
    def constant(self) -> bool:
        return self.count > 1 and self.finite and self.low == self.high

    @property
    def matrix(self) -> bool:
        return len(self.array.shape) >= 2 and min(self.array.shape[-2:]) > 1

    @cached_property
    def kurtosis(self) -> float:
        """3 of a normal distribution, 1.8 of a uniform one."""
        square = self.std**2 + self.mean**2
        return self.fourth / square**2 if square > 0 else nan

    def unevenness(self, axis: int) -> tuple[float, float]:
        """(how much sums of squares vary, deviation of that by chance); 1 of independent numbers.

        Along rows (0) or columns (1). Rows of zeros do not count.
        """
        there = int((~self.empty).sum())
        rows, each = (self.rows[~self.empty], len(self.columns))
        share = there / max(len(self.rows), 1)
        if axis == 1:
            rows, each = self.columns / max(share, 1e-12), there
        if len(rows) < 2 or not each:
            return nan, nan
        square = float(rows.mean())
        fourth = self.fourth / max(share, 1e-12)
        by_chance = (fourth - square**2) / each
        if not by_chance > 0:
            return nan, nan
        return float(rows.var()) / by_chance, sqrt(2 / (len(rows) - 1))

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "files": list(self.array.files),
            "shape": list(self.array.shape),
            "dtype": self.array.coarse or self.array.dtype,
            "mean": _plain(self.mean),
            "std": _plain(self.std),
            "least": _plain(self.least),
            "most": _plain(self.most),
            "kurtosis": _plain(self.kurtosis),
            "zeros": self.zeros / max(self.count, 1),
            "nan": self.nans,
            "inf": self.infs,
            "denormal": self.denormal,
            "bits": self.bits,
            "grid": self.grid,
            "peak": _plain(self.peak),
        }


def _plain(value: float) -> float | None:
    return value if -inf < value < inf else None


def numbers_of(array: Array) -> Numbers:
    lazy = array.made()
    sums = _Sums(array.shape, _NORMAL[array.dtype])
    for down, across, block in blocks(lazy, array.shape):
        sums.add(block, down, across)
    closer = _closer(lazy, sums.height, sums.width, array)
    return Numbers(array, **sums.told(), **closer)


class _Sums:
    """What is known of the blocks of a matrix so far."""

    def __init__(self, shape: Sequence[int], normal: float) -> None:
        self.width = shape[-1] if shape else 1
        self.height, self.normal = prod(shape) // self.width, normal
        self.rows, self.sums, self.marks = torch.zeros(3, self.height, dtype=torch.float64)
        self.columns = torch.zeros(self.width, dtype=torch.float64)
        self.empty = torch.ones(self.height, dtype=torch.bool)
        self.sketch = _Sketch(self.height, self.width) if len(shape) == 2 else None
        self.nans = self.infs = self.zeros = self.denormal = self.saturated = 0
        self.size = self.fourth = 0.0
        self.least, self.low, self.high = inf, inf, -inf

    def add(self, block: Tensor, down: slice, across: slice) -> None:
        x = block.to(torch.promote_types(block.dtype, torch.float32), copy=True)
        low, high = (float(end) for end in x.aminmax())
        if not (low > -inf and high < inf):  # NaN is above and below nothing
            self.nans += int(x.isnan().sum())
            self.infs += int(x.isinf().sum())
            low, high = (float(end) for end in x.nan_to_num_(0.0, 0.0, 0.0).aminmax())
        self.low, self.high, most = min(self.low, low), max(self.high, high), max(-low, high)
        if most > 1e9:  # a fourth power of which would be none
            x = x.double()
        if self.sketch is not None:
            self.sketch.put(x, down, across)
        squares = x * x
        self.rows[down] += squares.sum(1)
        self.columns[across] += squares.sum(0)
        self.fourth += float(squares.flatten().dot(squares.flatten()))
        self.sums[down] += x.sum(1)
        self.marks[down] += x @ torch.arange(across.start, across.stop).to(x.dtype).cos()
        some, bare = int(x.count_nonzero()), x.abs_()
        self.size += float(bare.sum(1).sum(dtype=torch.float64))
        self.zeros += x.numel() - some
        if most >= LARGEST_F16:
            self.saturated += int((bare == LARGEST_F16).sum())
        if some < x.numel():
            self.empty[down] &= (bare == 0).all(1)
            bare.masked_fill_(bare == 0, inf)
        else:
            self.empty[down] = False
        least = float(bare.min())
        self.least = min(self.least, least)
        if least < self.normal:
            self.denormal += int((bare < self.normal).sum())

    def told(self) -> dict[str, Any]:
        count = max(self.height * self.width - self.nans - self.infs, 1)
        mean, square = float(self.sums.sum()) / count, float(self.rows.sum()) / count
        same = ("nans", "infs", "zeros", "denormal", "saturated", "low", "high", "marks", "empty")
        return {
            **{name: getattr(self, name) for name in same},
            "mean": mean,
            "std": sqrt(max(square - mean**2, 0.0)),
            "size": self.size / count,
            "fourth": self.fourth / count,
            "least": self.least if self.least < inf else 0.0,
            "most": max(-self.low, self.high),
            "rows": self.rows / self.width,
            "columns": self.columns / max(self.height, 1),
            "some_rows": _NONE if self.sketch is None else self.sketch.rows,
            "some_columns": _NONE if self.sketch is None else self.sketch.columns,
        }


class _Sketch:
    """Rows and columns of a matrix at even distances, few enough to keep of every one."""

    def __init__(self, height: int, width: int) -> None:
        self.down, self.across = _picked(height, width), _picked(width, height)
        self.rows = torch.zeros(len(self.down), width, dtype=torch.bfloat16)
        self.columns = torch.zeros(len(self.across), height, dtype=torch.bfloat16)

    def put(self, block: Tensor, down: slice, across: slice) -> None:
        mine, theirs = _within(self.down, down), _within(self.across, across)
        self.rows[mine, across] = block[self.down[mine] - down.start].to(self.rows.dtype)
        turned = block[:, self.across[theirs] - across.start].T
        self.columns[theirs, down] = turned.to(self.rows.dtype)


_NONE = torch.zeros(0, 0)


def _picked(count: int, length: int) -> Tensor:
    """Which of so many rows of such length are kept."""
    most = 0 if length > _LONG else min(count, max(_KEPT // max(length, 1), 16))
    return torch.linspace(0, count - 1, most).long()


def _within(places: Tensor, part: slice) -> slice:
    edges = torch.searchsorted(places, torch.tensor([part.start, part.stop]))
    return slice(int(edges[0]), int(edges[1]))


def blocks(lazy: Lazy, shape: Sequence[int]) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows and columns that a block is of, and its numbers."""
    width = max(lazy.width, 1)
    height = prod(shape) // width
    wide = min(width, _BLOCK)
    step = max(1, _BLOCK // wide)
    for top in range(0, height, step):
        for left in range(0, width, wide):
            down = slice(top, min(top + step, height))
            across = slice(left, min(left + wide, width))
            yield down, across, _part(lazy, down, across)


def _part(lazy: Lazy, down: slice, across: slice) -> Tensor:
    plain = lazy.plain
    if plain is not None and (plain.dim() <= 2 or plain.is_contiguous()):
        return plain.reshape(-1, lazy.width)[down, across]
    return lazy.matrix(down, across)


# --- a closer look at some of them ---------------------------------------------------------------


def _closer(lazy: Lazy, height: int, width: int, array: Array) -> dict[str, Any]:
    """What a sample tells: bands of rows from all over, and their first columns."""
    band = min(_BAND, height)
    starts = sorted({n * (height - band) // max(_BANDS - 1, 1) for n in range(_BANDS)})
    across = slice(0, min(width, 16 * _ACROSS if height < _BAND else _ACROSS))
    bands = [_part(lazy, slice(at, at + band), across) for at in starts]
    if height <= _BANDS * _BAND:
        bands = [_part(lazy, slice(0, height), across)]
    some = torch.cat(bands)
    features: dict[str, Any] = {"bits": _bits(some, array.dtype)}
    if some.numel() >= 64:
        features |= dict(zip(("orders", "swapped"), _orders(some, array.dtype), strict=True))
    wide = some.float()
    if min(wide.shape) >= 16 and float(wide.abs().max()) < 1e15:  # and no NaN
        features["grid"] = _grid(wide)
        features["peak"] = _peak(wide)
    return features


def _bits(some: Tensor, dtype: str) -> int | None:
    """How many of the mantissa's bits are used by any."""
    kept = some.flatten()
    kept = kept[kept != 0]
    if len(kept) < 64 or dtype not in MANTISSA or some.dtype != torch_dtype(dtype):
        return None
    if dtype == "F64":
        return 52
    whole = {"F32": torch.int32, "F16": torch.int16, "BF16": torch.int16}[dtype]
    bits = kept.contiguous().view(whole).to(torch.int64) & ((1 << MANTISSA[dtype]) - 1)
    for n in range(MANTISSA[dtype]):
        if bool((bits & ((2 << n) - 1)).any()):
            return MANTISSA[dtype] - n
    return 0


def _grid(some: Tensor) -> str:
    """Whole numbers times a scale, by groups of a row; empty if they are not."""
    for group in (*(n for n in _GROUPS if some.shape[1] % n == 0), some.shape[1]):
        groups = some.reshape(-1, group)
        tops = groups.abs().amax(1, keepdim=True)
        if group < 16 or not bool((tops > 0).all()):
            continue
        for most, name in _GRIDS.items():
            whole = groups / tops * most
            if float((whole - whole.round()).abs().max()) < 0.07:
                return name
    return ""


def _orders(some: Tensor, dtype: str) -> tuple[float, float]:
    """Over how many powers of two numbers are spread, as they are and with their bytes swapped."""
    if some.element_size() < 2 or some.dtype == torch.float64:
        return 0.0, inf
    flat = some.contiguous().flatten()
    turned = flat.view(torch.uint8).reshape(-1, flat.element_size()).flip(1).contiguous()
    return _spread(flat), _spread(turned.flatten().view(flat.dtype))


def _spread(values: Tensor) -> float:
    x = values.double().abs()
    x = x[(x > 0) & x.isfinite()]
    return float(x.log2().std()) if len(x) > len(values) // 2 else inf


def _peak(some: Tensor) -> float:
    """The largest singular value beside the one that independent numbers would have."""
    some = some - some.mean()
    deviation = float(some.std())
    if deviation == 0:
        return nan
    height, width = some.shape
    return float(torch.linalg.matrix_norm(some, 2)) / (deviation * (sqrt(height) + sqrt(width)))
