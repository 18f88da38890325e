"""Checks of numbers alone: NaN, zeros, repeated arrays, swapped bytes, missing parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import inf

import torch

from zoo.diagnosis.checkup.finding import Finding, about, called, counted, families_of, files_of
from zoo.diagnosis.checkup.opened import Opened, group
from zoo.diagnosis.checkup.statistics import Numbers, blocks
from zoo.errors import listing

AGAIN = "take the files from where they came once more and compare their digests"
_APART, _TOGETHER = 12.0, 6.0  # powers of two: weights are spread over 1.5 to 2, junk over 70
_HOLE, _FEWEST = 8, 4  # rows of zeros one behind the other; of small matrices
_RARE, _COMMON = 0.01, 0.5  # share of numbers below the smallest normal one: wide types, fp16
_SHOWN = 4


def spoilt(contents: Opened, numbers: Sequence[Numbers]) -> Iterator[Finding]:
    """Arrays so damaged that no other check applies to them."""
    swapped = [n for n in numbers if _APART < n.orders < inf and n.swapped < _TOGETHER]
    if swapped:
        yield _bytes_swapped(swapped, numbers)
        if 2 * len(swapped) >= len(numbers):
            return  # so are those that are too small to tell
        numbers = [n for n in numbers if n not in swapped]
    yield from _not_finite(numbers)
    cut = _cut_off(contents, numbers)
    if cut:
        count = counted(files_of(cut))
        seen = f"from {cut[0].array.files[0]} to the end there are zeros ({count})"
        yield about("the file ends in zeros", cut, seen, 0.95, AGAIN)
    rest = [n for n in numbers if n not in cut]
    yield from _zero(rest)
    yield from _holes(rest)
    yield from _limits(rest)


# --- one array -----------------------------------------------------------------------------------


def _bytes_swapped(swapped: Sequence[Numbers], numbers: Sequence[Numbers]) -> Finding:
    first = swapped[0]
    seen = (
        f"{first.name}: spread over {first.orders:.0f} powers of two, and over "
        f"{first.swapped:.1f} with the bytes of each number the other way round"
    )
    what = "the bytes of every number are the other way round"
    if 2 * len(swapped) < len(numbers):
        what = f"the bytes of numbers are the other way round in {called(swapped)}"
    else:
        swapped = numbers
    return Finding(what, files_of(swapped), seen, 0.98, "swap the bytes of these tensors")


def _not_finite(numbers: Sequence[Numbers]) -> Iterator[Finding]:
    spoilt = [n for n in numbers if not n.finite]
    if spoilt:
        counts = [
            f"{n.name}: {' and '.join(_how_many(n))} of {n.count:,} numbers"
            for n in spoilt[:_SHOWN]
        ]
        yield about("NaN or infinity in {}", spoilt, listing(counts), 1.0, AGAIN)


def _how_many(n: Numbers) -> list[str]:
    counts = [f"{n.nans:,} NaN"] if n.nans else []
    return counts + ([f"{n.infs:,} infinite"] if n.infs else [])


def _zero(numbers: Sequence[Numbers]) -> Iterator[Finding]:
    """All zero or all the same, where the other layers' are not."""
    for zero in (True, False):
        constant = [n for n in numbers if n.constant and (n.low == 0) == zero]
        families = families_of(numbers)
        alone = [n for n in constant if n.matrix and n.array.shape[0] > 2]
        for n in constant:
            siblings = [m for m in families.get(n.array.family, []) if m is not n]
            varied = [m for m in siblings if not m.constant]
            if n not in alone and varied and 2 * len(varied) >= len(siblings):
                alone.append(n)
        if alone:
            first = alone[0]
            seen = f"{first.name}: {first.count:,} numbers, all {first.low:g}"
            if len(alone[0].array.shape) == 1:
                seen += ", as before any training; the other layers' vary"
            fix = "it was never filled: look at what wrote it, and " + AGAIN
            what, likely = ("all zero: {}", 0.95) if zero else ("one number throughout: {}", 0.85)
            yield about(what, alone, seen, likely, fix)


def _longest(n: Numbers) -> tuple[int, int]:
    """(where the longest run of rows of zeros begins, its length)"""
    edges = torch.diff(n.empty.int(), prepend=torch.zeros(1), append=torch.zeros(1))
    starts, ends = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    if not len(starts):
        return 0, 0
    best = int((ends - starts).argmax())
    return int(starts[best]), int(ends[best] - starts[best])


def _holes(numbers: Sequence[Numbers]) -> Iterator[Finding]:
    """Rows of zeros in a layer's matrix; a vocabulary's padding stands in no layer."""
    holes = list[tuple[Numbers, int, int]]()
    for n in numbers:
        if n.matrix and n.array.layer is not None and not n.constant:
            start, length = _longest(n)
            if length >= min(_HOLE, max(_FEWEST, len(n.rows) // 8)):
                holes.append((n, start, length))
    if holes:
        n, start, length = holes[0]
        seen = f"{n.name}: rows {start} to {start + length - 1} of {len(n.rows)} are zero"
        arrays = [n for n, _, _ in holes]
        yield about("a part is missing, and zeros are there: {}", arrays, seen, 0.7, AGAIN)


def _cut_off(contents: Opened, numbers: Sequence[Numbers]) -> list[Numbers]:
    """The arrays at a file's end that are zeros to the last, two or more of them."""
    by_name = defaultdict[str, list[Numbers]](list)
    for n in numbers:
        for name in n.array.files:
            by_name[name].append(n)
    where = contents.checkpoint.where
    for file in dict.fromkeys(where.values()):
        names = [n for n in contents.checkpoint.tensors if where[n] == file and n in by_name]
        last = list[Numbers]()
        for name in reversed(names):
            arrays = by_name[name]
            if not all(n.constant and n.low == 0 for n in arrays):
                if last and len(arrays) == len(arrays[0].array.files) == 1 and arrays[0].empty[-1]:
                    last += arrays
                break
            last += arrays
        # zeros of vectors are what biases begin as
        if len(last) > 1 and any(n.matrix for n in last) and len(last) < len(numbers):
            return last[::-1]
    return []


def _limits(numbers: Sequence[Numbers]) -> Iterator[Finding]:
    if limited := [n for n in numbers if n.saturated]:
        n = limited[0]
        seen = f"{n.name}: {n.saturated:,} of {n.count:,} numbers are exactly 65504"
        fix = "convert the original again, to bfloat16 or float32"
        yield about("cut off at the largest number of fp16: {}", limited, seen, 0.8, fix)
    limited = [
        n
        for n in numbers
        if n.denormal > n.count * (_COMMON if n.array.dtype == "F16" else _RARE)
        and n.matrix
        and n.array.layer is not None
    ]
    if limited:
        n = limited[0]
        seen = f"{n.name}: {n.denormal / n.count:.0%} of its numbers have few bits left"
        what = f"too small for {n.array.dtype}: {{}}"
        yield about(what, limited, seen, 0.5, "convert the original again, to float32")


# --- several arrays ------------------------------------------------------------------------------


def repeated(numbers: Sequence[Numbers]) -> Iterator[Finding]:
    """The same numbers under several names that no tie explains."""
    groups = group(
        (n for n in numbers if not n.constant and n.finite and n.count >= 8),
        lambda n: (n.array.shape, n.mean, n.std, n.fourth, n.low, n.high),
    )
    same = [[n for n in each if equal(each[0], n)] for each in groups.values() if len(each) > 1]
    same = [each for each in same if len(each) > 1 and not _expected(each)]
    layers = families_of(numbers)
    pairs = defaultdict[tuple[int, ...], list[list[Numbers]]](list)
    for each in same:
        families = [some for some in families_of(each).values() if len(some) > 1]
        for some in families or [each]:
            pairs[tuple(n.array.layer or 0 for n in some) if families else ()].append(some)
    for numbered, alike in pairs.items():
        arrays = [n for each in alike for n in each]
        stems = {n.array.family.partition("*")[0] for n in arrays}
        whole = [f for f, each in layers.items() if not all(n.constant for n in each)]
        whole = [f for f in whole if f.partition("*")[0] in stems]
        first, second = alike[0][:2]
        seen = f"{first.name} and {second.name}: {first.count:,} numbers, all equal"
        if numbered and len(alike) == len(whole) > 1:
            what = f"layers {' and '.join(map(str, numbered))} hold the same numbers"
        else:
            what = "the same numbers in {}"
        fix = "one of them was written in the other's place: convert the original again"
        yield about(what, arrays, seen, 0.9, fix)


def _expected(each: Sequence[Numbers]) -> bool:
    """Heads and embeddings, which are looked at with the config; biases that learn the same.

    What two parallel branches add to the stream has one gradient.
    """
    if all(n.array.layer is None and n.matrix for n in each):
        return True
    return not each[0].matrix and len({n.array.layer for n in each}) == 1


def equal(a: Numbers, b: Numbers) -> bool:
    """Whether two arrays hold the same numbers."""
    if a is b:
        return True
    pairs = zip(
        blocks(a.array.made(), a.array.shape), blocks(b.array.made(), b.array.shape), strict=True
    )
    return all(torch.equal(x, y) for (_, _, x), (_, _, y) in pairs)
