"""An array compared with the same array of other layers: untrained, out of scale, coarser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp, log, sqrt
from statistics import median

from zoo.diagnosis.checkup.finding import Finding, about, families_of
from zoo.diagnosis.checkup.orientation import Stream
from zoo.diagnosis.checkup.statistics import MANTISSA, Numbers

# Deviations that chance alone hardly reaches. Of matrices as initialized none was beyond 4, of
# trained ones of the smallest models one at least of the two sides is.
_CHANCE, _ALONE = 4.5, 3.0  # of a whole checkpoint's, of one among trained ones
_SMALL = 1024  # fewer numbers tell nothing
_ENOUGH, _LOOSE = 4096, 8192  # of one among trained ones; of one beside the residual stream
_SMOOTH = 1.15  # the largest singular value, beside that of independent numbers: 0.9 to 1.05
_FRESH, _MUCH = 0.9, 0.35  # of all matrices
# how many times the size of its neighbors' a layer's numbers may be, within and outermost: of
# matrices 2.2 and 4.8 were measured; norms grow with depth of themselves
_SCALE, _OUTER, _NORM = 5.0, 8.0, 2.0
_BITS = 3  # fewer of a mantissa than the other layers'


def fresh(n: Numbers, chance: float = _CHANCE) -> bool | None:
    """Whether a matrix is independent numbers of one distribution; None where nothing tells.

    Rows and columns of trained matrices differ in size by more than chance.
    """
    if not n.matrix or n.constant or not n.finite or n.count < _SMALL:
        return None
    if min(n.array.shape[-2:]) < 16 or n.array.coarse:
        return None
    for axis in (0, 1):
        uneven, deviation = n.unevenness(axis)
        if not uneven < 1 + chance * deviation:
            return False
    there = max(n.count - n.zeros, 1)
    if abs(n.mean) > _CHANCE * n.std / sqrt(there) or n.peak > _SMOOTH:
        return False
    return n.kurtosis < 3 + chance * sqrt(24 / there) + 0.03


def untrained(numbers: Sequence[Numbers], stream: Stream) -> tuple[list[Finding], bool]:
    """What looks as initialized, and whether all does: then layers tell nothing of each other."""
    measured = [(n, verdict) for n in numbers if (verdict := fresh(n)) is not None]
    random = [n for n, verdict in measured if verdict]
    share = len(random) / max(len(measured), 1)
    if share < _FRESH:
        # what resembles others is trained, however little
        random = [n for n in random if fresh(n, _ALONE) and stream.is_like_none(n)]
        random = [n for n in random if n.count >= (_ENOUGH if stream.knows(n) else _LOOSE)]
        share = len(random) / max(len(measured), 1)
    if not random:
        return [], False
    n, of = random[0], f"{len(random)} of {len(measured)} matrices"
    seen = f"{n.name}: independent {_shape(n)} numbers with a deviation of {n.std:.3g}"
    if share >= _FRESH:
        fix = "if it should be trained: load it again where it came from, and heed warnings there"
        what = "nothing of it looks trained: its matrices are as initialized"
        evidence = f"{of} are independent random numbers; {seen}"
        return [about(what, random, evidence, 0.97, fix)], True
    if share > _MUCH:
        what = f"hardly trained: {of} are as initialized"
        fix = (
            "if it should be trained: its layers may have been initialized again where it was saved"
        )
        return [about(what, random, seen, 0.8, fix)], False
    fix = "it was missing where this was saved from, or its name was not known there"
    evidence = f"{seen}; {len(measured) - len(random)} other matrices have structure"
    return [about("never trained, as initialized: {}", random, evidence, 0.93, fix)], False


def _shape(n: Numbers) -> str:
    return "uniform" if n.kurtosis < 2.1 else "normal"


def between_layers(numbers: Sequence[Numbers]) -> Iterator[Finding]:
    """Arrays that differ in scale or in precision from the same array of other layers."""
    families = families_of(n for n in numbers if n.finite and not n.constant).values()
    ordered = [sorted(each, key=lambda n: n.array.layer or 0) for each in families]
    yield from _scales(ordered)
    yield from _coarse(ordered)


def _scales(families: Sequence[Sequence[Numbers]]) -> Iterator[Finding]:
    outliers = list[tuple[float, Numbers]]()
    for each in families:
        if len(each) < 3 or each[0].array.name.endswith("bias"):
            continue
        sizes = [log(n.size) for n in each]
        spread = median(abs(size - median(sizes)) for size in sizes)
        for at, n in enumerate(each):
            near = [sizes[m] for m in range(max(0, at - 2), min(len(each), at + 3)) if m != at]
            away = sizes[at] - median(near)
            most = _SCALE if 0 < at < len(each) - 1 else _OUTER
            most *= 1.0 if n.matrix else _NORM
            if abs(away) > max(log(most), 5 * spread):
                outliers.append((exp(away), n))
    if outliers:
        times, n = max(outliers, key=lambda pair: abs(log(pair[0])))
        factor = f"{times:.3g} times" if times > 1 else f"a {1 / times:.3g}th of"
        seen = f"{n.name}: its numbers are {factor} the size of the neighboring layers'"
        fix = "a scale was applied twice or left out: convert the original again"
        yield about("out of scale: {}", [n for _, n in outliers], seen, 0.8, fix)


def _coarse(families: Sequence[Sequence[Numbers]]) -> Iterator[Finding]:
    outliers, usual = list[Numbers](), dict[str, int]()
    for each in families:
        bits = [n.bits for n in each if n.bits is not None]
        if len(bits) < 3:
            continue
        middle = median(bits)
        for n in each:
            fewer = n.bits is not None and n.bits <= middle - _BITS
            whole = bool(n.grid) and sum(bool(m.grid) for m in each) < len(each) / 2
            if (fewer or whole) and not n.array.coarse:
                outliers.append(n)
                usual[n.name] = int(middle)
    if outliers:
        n = outliers[0]
        precision = n.grid or _named(n.bits or 0)
        seen = f"{n.name}: its numbers are {precision}; the other layers' use {usual[n.name]} bits"
        fix = "convert the original again: these went through a narrower type"
        yield about("precision was lost: {}", outliers, seen, 0.85, fix)


def _named(bits: int) -> str:
    """The narrowest type that holds a mantissa of so many bits."""
    for most, name in ((2, "fp8 (e5m2)"), (3, "fp8 (e4m3)"), (7, "bfloat16"), (10, "float16")):
        if bits <= most:
            return f"exact in {name}"
    return f"of {bits} bits"


def precision(numbers: Sequence[Numbers]) -> str:
    """The narrowest type that all numbers are exact in, if it is narrower than theirs."""
    matrices = [n for n in numbers if n.bits is not None and n.matrix]
    wide = max((MANTISSA[n.array.dtype] for n in matrices), default=0)
    most = max((n.bits or 0 for n in matrices), default=wide)
    if not matrices or most >= wide - _BITS + 1:
        return ""
    return _named(most)
