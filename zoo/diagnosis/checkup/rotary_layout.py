"""The order of rotary rows: both members of a pair have one frequency and are about as large.

So the sizes of a head's rows follow one profile of its frequencies, in all heads and layers, twice
in a row where the rows stand in halves. Values are not rotated and have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.components.rotary import Rotated
from zoo.diagnosis.checkup.finding import Finding, about, families_of
from zoo.diagnosis.checkup.opened import Opened
from zoo.diagnosis.checkup.statistics import Numbers
from zoo.diagnosis.edits import order

# Of sizes of rows, the share that other layers' profile foretells: 0.16 to 0.38 of trained queries
# and keys that are read as they lie, below 0.04 of those that are not, and of values.
_CLEAR_SHARE, _SHARE = 0.08, 0.3
# How far the halves of a profile are apart, 2 where each is the other upside down: 0.03 to 0.43
# where they are read as they lie, above 1.3 where not.
_APART, _ALIKE = 1.2, 0.5
# What chance makes of that share, times the root of how many rows there are: of all layers, of one
_NOISE, _ALONE = 2.0, 3.6
_TIE = 0.9  # of readings that explain as much, the one with the smoothest profile counts
_NAMES = {"q": "queries", "k": "keys", "v": "values"}
_FEW = 4  # rows of a head that are rotated; less shows no profile


@dataclass(frozen=True)
class RowSizes:
    """(layers, rows) logarithms of sizes, and how many heads and rows of each are rotated."""

    arrays: tuple[Numbers, ...]
    sizes: Tensor
    heads: int
    rotary_dim: int

    @property
    def halves(self) -> Tensor:
        """(rows,) the order that brings pairs that stand side by side into halves."""
        return _halves(self.sizes.shape[1], self.heads, self.rotary_dim)

    def read(self, order: Tensor | None = None, heads: int = 0) -> Tensor:
        """(layers, heads, rotary_dim), each head's around its own mean."""
        sizes = self.sizes if order is None else self.sizes[:, order]
        by_head = sizes.unflatten(1, (heads or self.heads, -1))
        by_head = by_head[:, :, : by_head.shape[-1] if heads else self.rotary_dim]
        return by_head - by_head.mean(-1, keepdim=True)


def explained(read: Tensor) -> Tensor:
    """(layers,), the share of each that the profile of the other layers' pairs explains."""
    return 1 - _left(read) / read.square().mean((1, 2)).clamp_min(1e-30)


def _left(read: Tensor) -> Tensor:
    """(layers,), mean squares of what that profile does not explain."""
    pairs = read.unflatten(-1, (2, -1)).mean((1, 2))
    others = (pairs.sum(0) - pairs) / max(len(pairs) - 1, 1)
    return (read - torch.cat([others, others], -1)[:, None]).square().mean((1, 2))


def apart(read: Tensor) -> float:
    """The distance between the two halves of the mean profile."""
    profile = read.mean((0, 1))
    first, second = profile.chunk(2)
    return float((first - second).square().sum() / profile.square().sum().clamp_min(1e-30))


def rough(read: Tensor) -> float:
    """How far apart neighboring frequencies are, which differ little; of a straight line 1.3."""
    profile = torch.stack(read.mean((0, 1)).chunk(2)).mean(0)
    steps = profile.diff().square().sum() / profile.square().sum().clamp_min(1e-30)
    return float(steps) * len(profile)


def rotary(contents: Opened, numbers: Sequence[Numbers]) -> Iterator[Finding]:
    """Rows of queries and keys in another order, other numbers of heads, exchanged values."""
    config = contents.config
    if not isinstance(config, Rotated) or getattr(config, "alibi", False):
        return
    rows = {leaf: sizes for leaf in ("q", "k", "v") if (sizes := _rows(config, numbers, leaf))}
    rotated = [leaf for leaf in ("q", "k") if leaf in rows]
    yield from _together([each for leaf in rotated for each in _layout(config, leaf, rows[leaf])])
    yield from _heads(rows)
    yield from _exchanged(rows)


def _rows(config: Rotated, numbers: Sequence[Numbers], leaf: str) -> RowSizes | None:
    families = families_of(numbers)
    arrays = next((v for f, v in families.items() if f.endswith(f".attn.{leaf}.weight")), [])
    arrays = [n for n in arrays if n.finite and not n.constant and float(n.rows.min()) > 0]
    heads: int = config.heads  # type: ignore[attr-defined]
    if leaf != "q":
        heads = getattr(config, "kv_heads", heads) or heads
    if len(arrays) < 2 or len(arrays[0].rows) % heads or config.rotary_dim < _FEW:
        return None
    if config.rotary_dim % 2 or len(arrays[0].rows) // heads < config.rotary_dim:
        return None
    return RowSizes(
        tuple(arrays), torch.stack([n.rows.log() / 2 for n in arrays]), heads, config.rotary_dim
    )


# --- the order of rows ---------------------------------------------------------------------------


def _orders(config: Rotated, rows: RowSizes) -> Iterator[tuple[str, str, Tensor]]:
    """(what happened, how to read it, which row is which) of the usual mistakes."""
    count = rows.sizes.shape[1]
    pairs = rows.halves
    how = f"(h={rows.heads} e two) -> (h two e)"
    yield "pairs stand side by side and are read as halves", how, pairs
    how = f"(h={rows.heads} two e) -> (h e two)"
    yield "pairs were brought into halves twice", how, pairs.argsort()
    heads: int = config.heads  # type: ignore[attr-defined]
    for other in {heads, getattr(config, "kv_heads", None) or heads} - {rows.heads}:
        width = count // other
        if count % other or width % 2 or rows.rotary_dim * rows.heads != count:
            continue
        back = _halves(count, other, width).argsort()
        what = f"pairs were brought into halves as those of {other} heads"
        yield what, f"(h={other} two e) -> (h e two), then {rows.heads} heads", back[pairs]


def _halves(count: int, heads: int, rotary_dim: int) -> Tensor:
    """(count,) rows whose pairs stand side by side, in the order that brings them into halves."""
    head = torch.arange(count // heads)
    head[:rotary_dim] = order("e two", "two e", rotary_dim, two=2)
    return (torch.arange(0, count, len(head))[:, None] + head).flatten()


def _layout(config: Rotated, leaf: str, rows: RowSizes) -> Iterator[Finding]:
    as_read = rows.read()
    whole = float(explained(as_read).mean())
    others = [(what, fix, rows.read(order)) for what, fix, order in _orders(config, rows)]
    share = max(float(explained(read).mean()) for _, _, read in others)
    near = [other for other in others if float(explained(other[2]).mean()) > _TIE * share]
    what, fix, _ = min(near, key=lambda other: rough(other[2]), default=others[0])
    beyond = _NOISE / as_read.numel() ** 0.5
    clear = share > _CLEAR_SHARE and share - whole > beyond and whole < _SHARE * share
    if clear and apart(as_read) > _APART:
        seen = (
            f"one profile of pairs explains {share:.0%} of the rows' sizes if they are put right, "
            f"and {max(whole, 0):.0%} as they lie"
        )
        named = f"rotary rows of all {_NAMES[leaf]}: {what}"
        yield about(named, rows.arrays, seen, 0.93, f"put rows in order: {fix}")
        return
    if len(rows.arrays) < 3 or whole < _CLEAR_SHARE:
        return
    for what, fix, other in others:
        layers = list[int]()
        for layer in range(len(rows.arrays)):
            mixed = as_read.clone()
            mixed[layer] = other[layer]
            mine, theirs = float(explained(as_read)[layer]), float(explained(mixed)[layer])
            far = apart(as_read[layer : layer + 1]) > _APART
            clear = theirs > _CLEAR_SHARE and theirs - mine > _ALONE / as_read[0].numel() ** 0.5
            if clear and far:
                layers.append(layer)
        if layers and len(layers) < len(rows.arrays) / 2:
            arrays = [rows.arrays[n] for n in layers]
            seen = (
                f"{arrays[0].name}: its rows have the other layers' profile if they are put right"
            )
            named = f"rotary rows of {{}}: {what}"
            yield about(named, arrays, seen, 0.9, f"put rows in order: {fix}")
            return


def _together(findings: Sequence[Finding]) -> Sequence[Finding]:
    """Merge the findings about queries and keys where the same happened to both."""
    if len(findings) < 2:
        return findings
    q, k = findings
    happened = q.what.removeprefix("rotary rows of all queries: ")
    if k.what != f"rotary rows of all keys: {happened}":
        return findings
    what = f"rotary rows of all queries and keys: {happened}"
    seen = f"queries: {q.seen}; keys: {k.seen}"
    fix = q.fix if q.fix == k.fix else f"{q.fix}; keys: {k.fix}"
    return [Finding(what, (*q.where, *k.where), seen, max(q.likely, k.likely), fix)]


# --- how many heads, and which of three ----------------------------------------------------------


def _heads(rows: Mapping[str, RowSizes]) -> Iterator[Finding]:
    """Quarters that are alike: heads are half as wide, or pairs were brought into halves twice."""
    both = [rows[leaf] for leaf in ("q", "k") if leaf in rows]
    if len(both) < 2 or both[0].rotary_dim % 4:
        return
    if any(each.rotary_dim * each.heads != each.sizes.shape[1] for each in both):
        return
    narrow = [each.read(heads=2 * each.heads) for each in both]
    if any(float(explained(read).mean()) < _CLEAR_SHARE or apart(read) > _ALIKE for read in narrow):
        return
    back = [each.read(each.halves.argsort()) for each in both]
    arrays = [n for each in both for n in each.arrays]
    seen = f"both halves of each half have one profile ({apart(narrow[0]):.2f} apart)"
    queries, keys = (2 * each.heads for each in both)
    reorder = (
        f"put rows in order: (h={both[0].heads} two e) -> (h e two), of keys h={both[1].heads}"
    )
    count = f"set the number of heads to {queries}, of keys to {keys}"
    if sum(map(_by_chance, back)) < sum(map(_by_chance, narrow)):
        what = "rotary rows of all queries and keys: pairs were brought into halves twice"
        yield about(what, arrays, seen, 0.88, f"{reorder}; or {count}")
    else:
        what = f"more heads than the config says: {queries}, and not {queries // 2}"
        yield about(what, arrays, seen, 0.85, f"{count}; or {reorder}")


def _by_chance(read: Tensor) -> float:
    """What is left of a row; each head's mean, which is taken from it, has its part in that."""
    return float(_left(read).mean()) / (1 - 1 / read.shape[-1])


def _exchanged(rows: Mapping[str, RowSizes]) -> Iterator[Finding]:
    """Values that have pairs, and queries or keys of their shape that have none."""
    if "v" not in rows:
        return
    values = rows["v"].read()
    share = float(explained(values).mean())
    if share < _CLEAR_SHARE or apart(values) > _ALIKE:
        return
    for leaf, name in (("k", "keys"), ("q", "queries")):
        others = rows.get(leaf)
        if others is None or others.sizes.shape != rows["v"].sizes.shape:
            continue
        other = float(explained(others.read()).mean())
        if other < _SHARE * share:
            seen = (
                f"the values' rows have the profile of rotary pairs ({share:.0%} of their sizes "
                f"follow it) and the {name}' have not ({max(other, 0):.0%})"
            )
            arrays = (*others.arrays, *rows["v"].arrays)
            what, fix = f"values and {name} are exchanged", f"read one as the other: {leaf} and v"
            yield about(what, arrays, seen, 0.9, fix)
