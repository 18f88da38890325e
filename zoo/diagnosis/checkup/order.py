"""Tables whose rows are off, what is read from them scaled, and layers in another order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from zoo.components.model import Model
from zoo.components.moe import Experts
from zoo.diagnosis.checkup.parts import Hypothesis, Made, blocks, kinds

OFF = (1, -1, 2, -2, 3, -3)
MOST = 12  # of which any two may be exchanged; of more, neighbors


def tables(model: Model) -> Iterator[Hypothesis]:
    vocab = model.config.vocab
    held = dict(model.named_parameters())
    words = [name for name, p in held.items() if p.shape[0] == vocab]
    sets = {"tokens": words}
    if {"embed.weight", "head.weight"} <= held.keys():
        sets |= {"embed": ["embed.weight"], "head": ["head.weight"]}
    if "positions.weight" in held:
        sets["positions"] = ["positions.weight"]
    for what, names in sets.items():
        for by in OFF if what in ("tokens", "positions") else OFF[:2]:
            made = {name: _rolled(held[name], by) for name in names}
            said = " and ".join(names)
            more = ", or the tokenizer's ids are" if what == "tokens" else ""
            rows, are = "row" if abs(by) == 1 else "rows", "is" if len(names) == 1 else "are"
            yield Hypothesis(
                f"{said}: rows are off by {-by:+d}{more}",
                f"{said} {are} read {abs(by)} {rows} {'later' if by > 0 else 'earlier'}",
                made,
            )
    for name in ("types.weight", "positions.weight"):
        if name in held:
            yield Hypothesis(
                f"{name} is added, and should not be",
                f"{name} is left out",
                {name: (lambda p=held[name]: torch.zeros_like(p.data))},  # type: ignore[misc]
            )
    if "types.weight" in held and len(held["types.weight"]) > 1:
        yield Hypothesis(
            "types.weight: another type is what a plain text has",
            "types.weight is read 1 row later",
            {"types.weight": _rolled(held["types.weight"], 1)},
        )
    yield from _scaled(model)


def _rolled(p: nn.Parameter, by: int) -> Made:
    return lambda: p.data.roll(by, 0)


def _scaled(model: Model) -> Iterator[Hypothesis]:
    root = model.config.dim**0.5
    for factor, how in ((root, "multiplied"), (1 / root, "divided")):
        for name, what in (("embed", "embeddings"), ("head", "what the head reads")):
            module = dict(model.named_children()).get(name)
            if not isinstance(module, nn.Embedding | nn.Linear):
                continue
            yield Hypothesis(
                f"{what} should be {how} by the root of their width",
                f"{what} are {how} by {root:.4g}",
                settings={name: {"forward": _times(module.forward, factor)}},
            )


def _times(forward: Any, factor: float) -> Any:
    def run(x: Tensor) -> Tensor:
        out: Tensor = forward(x)
        return out * factor

    return run


def layers(model: Model) -> Iterator[Hypothesis]:
    """Layers in each other's place."""
    for stack in blocks(model):
        names = list(stack.modules)
        for how, lie in _orders(len(names)):
            # what lies at n is layer lie[n]
            made = {
                f"{names[layer]}.{leaf}": stack.taken(f"{names[n]}.{leaf}")
                for n, layer in enumerate(lie)
                if n != layer
                for leaf, _ in stack.first.named_parameters()
            }
            if all(name in stack.held for name in made):
                what = f"{stack.name} lie {how}"
                yield Hypothesis(what, f"{stack.name} are put in order", made, across=True)


def experts(model: Model) -> Iterator[Hypothesis]:
    """Experts likewise, so that a token goes to another than its router means."""
    for moe in kinds(model, Experts):
        parts = ("gate", "up", "down")
        for how, lie in _orders(moe.first.experts):
            rows = torch.tensor(lie).argsort()
            for some in (parts, *((part,) for part in parts)):
                said = " and ".join(f"{moe.name}.{part}" for part in some)
                made = moe.all(some, lambda x, rows=rows: x[rows.to(x.device)])  # type: ignore[misc]
                yield Hypothesis(
                    f"experts of {said} lie {how}", f"experts of {said} are put in order", made
                )


def _orders(count: int) -> Iterator[tuple[str, list[int]]]:
    """How so many may lie, and which of them comes at each place then."""
    sorts = {
        "in the order of words: 0, 1, 10, 11 …": sorted(range(count), key=str),
        "backwards": list(range(count))[::-1],
        "off by one, the last one first": [*range(1, count), 0],
        "off by one, the first one last": [count - 1, *range(count - 1)],
    }
    for a, b in combinations(range(count), 2):
        if b == a + 1 or count <= MOST:
            lie = list(range(count))
            lie[a], lie[b] = b, a
            sorts[f"with {a} and {b} exchanged"] = lie
    seen = [list(range(count))]
    for how, lie in sorts.items() if count > 1 else ():
        if lie not in seen:
            seen.append(lie)
            yield how, lie
