"""Attention's projections: rows in another order, or in each other's place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations

import torch
from torch import Tensor

from zoo.components.model import Model
from zoo.components.rotary import Rotary
from zoo.diagnosis.checkup.parts import Hypothesis, Kind, Made
from zoo.diagnosis.edits import PARTS, order, said_of

LETTERS = {"q": "h", "k": "g", "v": "g"}
BOTH = (("weight", "bias"), ("weight",), ("bias",))  # which of them lie otherwise


def heads(attn: Kind) -> dict[str, int]:
    width = attn.first.head_dim
    return {part: attn.shape(f"{part}.weight")[0] // width for part in PARTS}


def turned(attn: Kind, model: Model) -> Iterator[Hypothesis]:
    """Pairs of a rotary lie side by side, or half a head apart."""
    rotary, counts, width = attn.first.rotary, heads(attn), attn.first.head_dim
    sets: list[tuple[str, ...]] = [("k",), ("q",)]
    widths = [width]
    if isinstance(rotary, Rotary):  # else queries and keys that are both turned do the same
        sets, widths = [("q", "k"), *sets], list(dict.fromkeys((rotary.width, width)))
    for part in widths:
        if part % 2 or part < 4:  # of a head of two, both orders are one
            continue
        of = "" if part == width else f" of the {part} that turn"
        for a, b in (("e two", "two e"), ("two e", "e two")):
            for some in sets:
                rows = {p: _pairs(counts[p], width, part, a, b) for p in some}
                for leaves in BOTH if attn.has("q.bias") else BOTH[:1]:
                    leaf_rows = [(f"{p}.{leaf}", rows[p]) for p in some for leaf in leaves]
                    made = {
                        n: m for leaf, at in leaf_rows for n, m in _rows(attn, leaf, at).items()
                    }
                    yield _read(attn, some, leaves, (a, b), made, of, model)
    if isinstance(rotary, Rotary):
        yield from _counts(attn, counts, width)


def _pairs(count: int, width: int, part: int, a: str, b: str) -> Tensor:
    """Rows of `count` heads of which the first `part` are in another order."""
    one = torch.cat((order(a, b, part, two=2), torch.arange(part, width)))
    return (torch.arange(count)[:, None] * width + one).flatten()


def _rows(attn: Kind, leaf: str, rows: Tensor, axis: int = 0) -> dict[str, Made]:
    return attn.each(leaf, lambda x: x.index_select(axis, rows.to(x.device)))


def _read(
    attn: Kind,
    some: Sequence[str],
    leaves: Sequence[str],
    orders: tuple[str, str],
    made: dict[str, Made],
    of: str,
    model: Model,
) -> Hypothesis:
    a, b = orders
    names = " and ".join(f"{attn.name}.{p}" for p in some)
    alone = f" ({leaves[0]} alone)" if len(leaves) == 1 and attn.has("q.bias") else ""
    letter = "g" if some == ("k",) else "h"
    lie, are = f"[({letter} {a})]", f"[({letter} {b})]"
    plain = all(_already(model, name, a, b) for name in made)
    how = "[o i], as it stands" if plain else f"[({letter} {a}) i]: [({letter} {b}) i]"
    return Hypothesis(
        f"rows of {names}{alone}{of} lie as {lie}, and are read as {are}",
        f"{names}{alone}{of} {_are(some)} read as {how}",
        made,
        across=bool(alone),
    )


def _are(some: Sequence[str]) -> str:
    return "is" if len(some) == 1 else "are"


def _already(model: Model, name: str, a: str, b: str) -> bool:
    """Whether the rule that makes a parameter turns it just the other way."""
    known = model.provenance
    source, _, target = ("" if known is None else known.rules.get(name, "")).partition(": ")
    return f" {b})" in source and f" {a})" in target


def _counts(attn: Kind, counts: dict[str, int], width: int) -> Iterator[Hypothesis]:
    """Turned as if there were another number of heads."""
    for p in ("k", "q"):
        rows = counts[p] * width
        others = [n for n in dict.fromkeys((counts["q"], counts["k"], 1)) if n != counts[p]]
        for n in others:
            if rows % (2 * n):
                continue
            for a, b in (("h e two", "h two e"), ("h two e", "h e two")):
                wrong = order(a, b, rows, h=n, two=2)
                right = order(b, a, rows, h=counts[p], two=2)
                name = f"{attn.name}.{p}"
                for index, how in (
                    (wrong, f"read as [({a}) i]: [({b}) i] with {n} heads"),
                    (
                        wrong[right],
                        f"read as [({a}) i]: [({b}) i] with {n} heads, and as [({b}) i]: [({a}) i] "
                        f"with {counts[p]}",
                    ),
                ):
                    yield Hypothesis(
                        f"{name} was turned with {n} heads, and has {counts[p]}",
                        f"{name} is {how}",
                        _rows(attn, f"{p}.weight", index) | _rows(attn, f"{p}.bias", index),
                        across=True,
                    )


def roles(attn: Kind) -> Iterator[Hypothesis]:
    """Queries, keys, values and what reads them out in each other's place."""
    for some in permutations(PARTS):
        moved = {a: b for a, b in zip(PARTS, some, strict=True) if a != b}
        if moved and (found := attn.moved(moved)):
            what, fix = said_of(some)
            yield Hypothesis(f"{attn.name}: {what}", fix.format(name=attn.name), found)
    for part in ("q", "v"):
        if found := attn.moved({part: "out", "out": part}):
            said = f"{attn.name}.{part} and {attn.name}.out"
            yield Hypothesis(f"{said} are in each other's place", f"{said} are exchanged", found)


def fused(attn: Kind) -> Iterator[Hypothesis]:
    """Cut out of one tensor in another way than they lie in it."""
    count, width = heads(attn), attn.first.head_dim
    q, k, v = torch.arange((count["q"] + 2 * count["k"]) * width).split(
        [count[p] * width for p in PARTS]
    )
    groups = [x.view(count["k"], -1, width) for x in (q, k, v)]
    lies = {
        "[((q|k|v) o)]": torch.cat((q, k, v)),
        "[(g (r|one|one) e)]": torch.cat(groups, 1).flatten(),
    }
    if count["q"] == count["k"]:
        lies["[(o n)]"] = torch.stack((q, k, v), 1).flatten()
        lies["[(h n e)]"] = lies.pop("[(g (r|one|one) e)]")
        lies["[(n o)]"] = lies.pop("[((q|k|v) o)]")
    if count["k"] == 1:
        return  # one group: all of these are one
    seen = [torch.arange(len(torch.cat((q, k, v))))]
    for (now, a), (then, b) in permutations(lies.items(), 2):
        # where each row lies in the file as it was read, and from there where it should be read
        index = torch.empty_like(a)
        index[b] = torch.arange(len(b))
        index = index[a]
        if any(torch.equal(index, other) for other in seen):
            continue
        seen.append(index)
        yield Hypothesis(
            f"{attn.name}: queries, keys and values lie fused as {then}, and are read as {now}",
            f"{attn.name}.q, k and v are read as {then}, not {now}",
            _cut(attn, PARTS, index),
        )


def _cut(kind: Kind, parts: Sequence[str], index: Tensor) -> dict[str, Made]:
    """Parts of one tensor whose rows are in another order."""
    found = dict[str, Made]()
    for name in kind.modules:
        for leaf in ("weight", "bias"):
            held = [kind.held.get(f"{name}.{part}.{leaf}") for part in parts]
            if any(p is None for p in held):
                continue
            start = 0
            for part, p in zip(parts, held, strict=True):
                rows = index[start : start + len(p)]  # type: ignore[arg-type]
                start += len(p)  # type: ignore[arg-type]

                def made(held: list[Tensor] = held, rows: Tensor = rows) -> Tensor:  # type: ignore[assignment]
                    return torch.cat([p.data for p in held]).index_select(0, rows)

                found[f"{name}.{part}.{leaf}"] = made
    return found


def by_head(attn: Kind) -> Iterator[Hypothesis]:
    """Heads interleaved: the numbers of one do not lie together."""
    count, width = heads(attn), attn.first.head_dim
    sizes = {part: count[part] * width for part in PARTS} | {"out": count["q"] * width}
    letters = {**LETTERS, "out": "h"}

    def rows(part: str, a: str, b: str, **lengths: int) -> dict[str, Made]:
        index = order(a, b, sizes[part], **lengths)
        if part == "out":
            return _rows(attn, "out.weight", index, axis=1)
        return _rows(attn, f"{part}.weight", index) | _rows(attn, f"{part}.bias", index)

    for some in (("v",), ("out",), ("q",), ("k",), PARTS, (*PARTS, "out")):
        for x, y in (("e {}", "{} e"), ("{} e", "e {}")):
            made = dict[str, Made]()
            for part in some:
                letter = letters[part]
                n = count[part if part in count else "q"]
                if n > 1:
                    made |= rows(part, x.format(letter), y.format(letter), **{letter: n})
            if made:
                names = ", ".join(f"{attn.name}.{p}" for p in some)
                letter = letters[some[0]]
                a, b = x.format(letter), y.format(letter)
                axes = (
                    (f"[o ({a})]", f"[o ({b})]")
                    if some == ("out",)
                    else (f"[({a}) i]", f"[({b}) i]")
                )
                yield Hypothesis(
                    f"heads of {names} lie as [({a})], and are read as [({b})]",
                    f"{names} {_are(some)} read as {axes[0]}: {axes[1]}",
                    made,
                    across=len(some) > 1,
                )
    if 1 < count["k"] < count["q"]:
        for a, b in (("r g e", "g r e"), ("g r e", "r g e")):
            lengths = {"g": count["k"], "e": width}
            yield Hypothesis(
                f"{attn.name}: queries that share a key lie as [({a})], and are read as [({b})]",
                f"{attn.name}.q and out are read as [({a}) i] and [o ({a})]",
                rows("q", a, b, **lengths) | rows("out", a, b, **lengths),
            )
