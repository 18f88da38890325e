"""Norms of blocks: which of two a vector is, and whether its weights lack one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

from zoo.components.norm import OffsetRMSNorm
from zoo.diagnosis.checkup.finding import Finding, about, families_of
from zoo.diagnosis.checkup.opened import Opened, group
from zoo.diagnosis.checkup.statistics import Numbers

_NEARER = 0.6  # of the distance to its neighbors is that to the other norm's
_BELOW = 0.1  # of all scales: as good as none is negative in trained models
_AROUND = 0.5  # how far the mean is from what is expected


def between_norms(contents: Opened, numbers: Sequence[Numbers]) -> Iterator[Finding]:
    """Norms that are exchanged, and norms that lack one or have one too much."""
    yield from _exchanged(numbers)
    yield from _offset(contents, numbers)


def _values(n: Numbers) -> Tensor:
    return n.array.made().whole().double().flatten()


def _norms(numbers: Sequence[Numbers]) -> list[Numbers]:
    return [
        n
        for n in numbers
        if len(n.array.shape) == 1
        and n.array.native
        and n.finite
        and n.name.endswith(".weight")
        and n.count > 1
    ]


def _exchanged(numbers: Sequence[Numbers]) -> Iterator[Finding]:
    """Two norms of one block that are each like the other one of the blocks around it."""
    ordered = (
        sorted(each, key=lambda n: n.array.layer or 0)
        for each in families_of(_norms(numbers)).values()
        if len(each) >= 3 and not any(n.constant for n in each)
    )
    blocks = group(ordered, lambda each: each[0].array.family.partition("*")[0])
    for families in blocks.values():
        values = [torch.stack([_values(n) for n in each]) for each in families]
        for a, b in combinations(range(len(families)), 2):
            if values[a].shape != values[b].shape:
                continue
            inner = range(1, len(values[a]) - 1)  # the outermost are like none
            crossed = [n for n in inner if _crossed(values[a], values[b], n)]
            if crossed and len(crossed) < len(values[a]) / 2:
                arrays = [families[k][n] for n in crossed for k in (a, b)]
                names = f"{arrays[0].name} and {arrays[1].name}"
                seen = f"{names}: each is nearer to the other one's neighbors"
                yield about("two norms are exchanged: {}", arrays, seen, 0.85, "exchange them")


def _crossed(first: Tensor, second: Tensor, at: int) -> bool:
    """Whether each is much nearer to the other one's neighbors than to its own."""

    def distance(x: Tensor, others: Tensor) -> float:
        near = [n for n in (at - 2, at - 1, at + 1, at + 2) if 0 <= n < len(others)]
        return float((others[near].median(0).values - x).square().mean())

    straight = distance(first[at], first) + distance(second[at], second)
    across = distance(first[at], second) + distance(second[at], first)
    return across < _NEARER**2 * straight


def _offset(contents: Opened, numbers: Sequence[Numbers]) -> Iterator[Finding]:
    """Scales around zero where they multiply, or all around one where one is added to them."""
    norms = [n for n in _norms(numbers) if "norm" in n.name and not n.constant]
    if len(norms) < 3 or contents.model is None:
        return
    every = torch.cat([_values(n) for n in norms])
    mean, below = float(every.mean()), float((every < 0).double().mean())
    if _adds_one(contents):
        is_wrong, usual = below == 0 and abs(mean - 1) < _AROUND, 0.0
        what, fix = "one is added to norms that hold it already", "take one from each"
    else:
        is_wrong, usual = below > _BELOW and abs(mean) < _AROUND, 1.0
        what, fix = "norms lack the one that is added to them elsewhere", "add one to each"
    if is_wrong:
        seen = (
            f"scales are {mean:.2g} on average and {below:.0%} of them are negative; about "
            f"{usual:g} were expected"
        )
        yield about(what, norms, seen, 0.85, fix)


def _adds_one(contents: Opened) -> bool:
    """Whether the model adds one to what its norms hold."""
    assert contents.model is not None
    return any(isinstance(module, OffsetRMSNorm) for module in contents.model.modules())
