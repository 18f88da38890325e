"""Config, tensors, tied names and tokenizer: what contradicts what."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from zoo.diagnosis.checkup.finding import Finding, about, counted
from zoo.diagnosis.checkup.opened import Opened
from zoo.diagnosis.checkup.statistics import Numbers
from zoo.diagnosis.checkup.value_checks import equal
from zoo.errors import ZooError, listing

CONFLICT = "tied, and not equal"
_SHOWN = 6
_BLOCK = re.compile(r"(?P<stem>.*?[a-z_.])(?P<number>\d+)[./](?P<rest>.+)")
_BLOCKS = 4  # numbers, and tensors below each, that make layers


def refused(contents: Opened) -> Iterator[Finding]:
    """Why loading refuses the checkpoint; tensors that are transposed are one finding."""
    transposed = [
        name
        for name, (wanted, _) in contents.misshapen.items()
        if len(wanted) == 2 and contents.checkpoint.tensors[name].shape == wanted[::-1]
    ]
    if transposed:
        name = transposed[0]
        here, wanted = contents.checkpoint.tensors[name].shape, contents.misshapen[name][0]
        seen = f"{name}: shape {list(here)}, expected {list(wanted)}"
        what = f"transposed by their shapes: {counted(transposed)}"
        yield Finding(what, tuple(transposed), seen, 0.99, "transpose them")
    if contents.refused and not contents.unknown:
        lines = [line.strip() for line in contents.refused.splitlines()]
        problems = lines[1:] if len(lines) > 1 else lines
        more = f" … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        seen = "; ".join(problems[:_SHOWN]) + more
        names = tuple(n for n in contents.checkpoint.tensors if n in contents.misshapen)
        yield Finding("it does not load", names, seen, 0.98)


def holes(contents: Opened) -> Iterator[Finding]:
    """Numbers of layers that are left out, where no config says how many there are."""
    if contents.config is not None:
        return
    below = defaultdict[str, dict[int, set[str]]](dict)
    for name in contents.checkpoint.tensors:
        if (match := _BLOCK.fullmatch(name)) is not None:
            tensors = below[match["stem"]].setdefault(int(match["number"]), set())
            tensors.add(match["rest"])
    for stem, layers in below.items():
        usual = max(map(len, layers.values()))
        gone = sorted(set(range(max(layers) + 1)) - layers.keys())
        if len(layers) < _BLOCKS or usual < _BLOCKS:
            continue
        if gone and len(gone) <= len(layers) / 3:
            seen = f"{stem}* counts to {max(layers)}, without {listing(map(str, gone), _SHOWN)}"
            what = f"layers are missing: {listing([f'{stem}{n}' for n in gone], _SHOWN)}"
            yield Finding(what, (), seen, 0.9, "a file of several may be missing")
        every = set.union(*layers.values())
        for rest in sorted(every):
            lacks = [n for n, names in layers.items() if rest not in names]
            # the first and the last may differ
            inner = len(lacks) == 1 and 0 < lacks[0] < max(layers)
            if inner and usual > len(layers[lacks[0]]):
                name = f"{stem}{lacks[0]}.{rest}"
                seen = f"all other {len(layers) - 1} of {stem}* have {rest}"
                fix = "it was not written, or has another name"
                yield Finding(f"a tensor is missing: {name}", (name,), seen, 0.6, fix)


def ties(contents: Opened, numbers: Sequence[Numbers]) -> Iterator[Finding]:
    """Names of one array that differ, and arrays that are equal where the config has two."""
    checkpoint = contents.checkpoint
    for groups in contents.also:
        for other in groups[1:]:
            pairs = list(zip(groups[0], other, strict=True))
            unequal = [
                (a, b)
                for a, b in pairs
                if not torch.equal(checkpoint.tensor(a), checkpoint.tensor(b))
            ]
            if unequal:
                a, b = unequal[0]
                seen = f"the config ties {a} and {b}, and they differ"
                fix = f"if {a} counts: trust=({a!r},); if both do, the config should not tie them"
                yield Finding(CONFLICT, tuple(n for p in unequal for n in p), seen, 0.97, fix)
    by_name = {n.name: n for n in numbers}
    head = next((by_name[n] for n in ("head.weight", "head.decoder.weight") if n in by_name), None)
    embed = by_name.get("embed.weight")
    if head is not None and embed is not None and head.array.shape == embed.array.shape:
        same = (head.mean, head.std, head.fourth) == (embed.mean, embed.std, embed.fourth)
        if same and equal(head, embed):
            seen = f"{head.name} and {embed.name} hold the same numbers, and the config has two"
            fix = "it computes the same; trained further, the two would part: tie them"
            yield about("not tied, and equal", [embed, head], seen, 0.3, fix)


def vocabulary(contents: Opened) -> Iterator[Finding]:
    """A tokenizer that has more tokens than there are rows for them."""
    rows = getattr(contents.config, "vocab", None)
    if rows is None or contents.located is None:
        return
    from zoo.tokenizers.load import read

    try:
        count = read(contents.place).vocab_size
    except (ZooError, OSError):
        return  # none, or one of its own making
    if count > rows:
        seen = f"the tokenizer has {count:,} tokens, the embedding {rows:,} rows"
        fix = "the tokenizer is another model's, or the embedding was not made longer with it"
        yield Finding("more tokens than rows for them", (), seen, 0.9, fix)


def notes(contents: Opened, numbers: Sequence[Numbers]) -> Iterator[str]:
    """Observations that are common and no fault."""
    if contents.refused and contents.unknown:
        nobody = "nothing says what it is: its arrays are looked at under their own names"
        yield nobody if contents.located is None else contents.refused
    for n in numbers:
        if not n.matrix or n.array.layer is not None or n.constant or not n.finite:
            continue
        if empty := int(n.empty.sum()):
            yield f"{n.name}: {empty:,} of {len(n.rows):,} rows are zero, as padding is"
        rows = torch.stack([n.rows, n.marks], dim=1)[~n.empty]
        if again := len(rows) - len(rows.unique(dim=0)):
            yield f"{n.name}: {again:,} of {len(n.rows):,} rows are there more than once"
