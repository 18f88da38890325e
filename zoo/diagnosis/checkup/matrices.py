"""Parameters in each other's place, transposed, or stored as an offset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

from torch import Tensor, nn

from zoo.components.mlp import MLP, GatedMLP
from zoo.components.model import Model
from zoo.components.moe import Experts
from zoo.diagnosis.checkup.parts import Hypothesis, Kind, attentions, blocks, kinds, norms


def exchanged(model: Model) -> Iterator[Hypothesis]:
    """Two of a kind in each other's place."""
    for mlp in kinds(model, GatedMLP, Experts):
        yield from _pair(mlp, "gate", "up")
    for block in blocks(model):
        vectors = [name for name, p in block.first.named_parameters() if p.dim() == 1]
        inside = [name for name, _ in block.first.named_children() if f"{name}.weight" in vectors]
        for a, b in combinations(inside, 2):
            yield from _pair(block, a, b)
        yield from _pair(block, "attn.out.bias", "mlp.down.bias")
    for norm in norms(model):
        if norm.has("bias"):
            said = f"{norm.name}.weight and {norm.name}.bias"
            crossed = {
                f"{name}.{a}": norm.taken(f"{name}.{b}")
                for name in norm.modules
                for a, b in (("weight", "bias"), ("bias", "weight"))
            }
            yield Hypothesis(f"{said} are in each other's place", f"{said} are exchanged", crossed)
    held = dict(model.named_parameters(remove_duplicate=False))
    whole = Kind("", {"": model}, {f".{n}": p for n, p in held.items()})
    first = next((n for n in held if n.endswith("blocks.0.norm1.weight")), "")
    if first and "norm.weight" in held:
        yield from _pair(whole, first.removesuffix(".weight"), "norm", across=True)
    if "head.weight" in held and not model.config.tied:
        yield from _pair(whole, "embed", "head", across=True)
        for a, b in (("head", "embed"), ("embed", "head")):
            yield Hypothesis(
                f"{a} is not what belongs there: it is tied to {b}",
                f"{a}.weight is {b}.weight",
                {f"{a}.weight": whole.taken(f".{b}.weight")},
            )


def _pair(kind: Kind, a: str, b: str, across: bool = False) -> Iterator[Hypothesis]:
    if not (found := kind.moved({a: b, b: a})):
        return
    found = {name.removeprefix("."): make for name, make in found.items()}
    said = " and ".join(f"{kind.name}.{part}".removeprefix(".") for part in (a, b))
    yield Hypothesis(
        f"{said} are in each other's place", f"{said} are exchanged", found, across=across
    )


def transposed(model: Model) -> Iterator[Hypothesis]:
    """Squares, which no shape tells from what they should be, and what holds its transpose."""
    for attn in attentions(model):
        every = ("q", "k", "v", "out")
        square = tuple(p for p in every if _is_square(attn, f"{p}.weight"))
        sets: list[tuple[str, ...]] = [(p,) for p in every]
        sets += [square, ("q", "k", "v"), ("q", "k"), ("q", "out"), ("v", "out"), every]
        for parts in dict.fromkeys(sets):
            yield from _turned(attn, parts)
    for mlp in kinds(model, MLP, GatedMLP):
        parts = tuple(p for p in ("gate", "up", "down") if mlp.has(f"{p}.weight"))
        for some in dict.fromkeys((*((p,) for p in parts), parts)):
            yield from _turned(mlp, some)
        if not mlp.has("up.bias"):
            flipped = {
                f"{name}.{a}.weight": mlp.taken(f"{name}.{b}.weight", lambda x: x.mT)
                for name in mlp.modules
                for a, b in (("up", "down"), ("down", "up"))
            }
            said = f"{mlp.name}.up and {mlp.name}.down"
            yield Hypothesis(
                f"{said} are in each other's place, and transposed",
                f"{said} are exchanged and read as [i o]",
                flipped,
            )
    for kind in kinds(model, nn.Linear):
        if (
            kind.name.count(".") == 1
            and kind.name.startswith("head.")
            and _is_square(kind, "weight")
        ):
            yield from _turned(kind, ("",))


def _is_square(kind: Kind, leaf: str) -> bool:
    return kind.has(leaf) and len(set(kind.shape(leaf))) == 1 and len(kind.shape(leaf)) == 2


def _turned(kind: Kind, parts: tuple[str, ...]) -> Iterator[Hypothesis]:
    leaves = [f"{part}.weight".removeprefix(".") for part in parts]
    said = " and ".join(f"{kind.name}.{leaf}" for leaf in leaves)
    are = "are" if len(leaves) > 1 else "is"
    ways: dict[str, Callable[[Tensor], Tensor]] = {"[i o]: [o i], or no longer so": lambda x: x.mT}
    if not all(_is_square(kind, leaf) for leaf in leaves):
        ways = {
            "written column by column": lambda x: x.reshape(x.mT.shape).mT,
            "written row by row, and read by columns": lambda x: x.mT.reshape(x.shape),
        }
    for how, change in ways.items() if leaves else ():
        yield Hypothesis(
            f"{said} {are} transposed", f"{said} {are} read as {how}", kind.all(leaves, change)
        )


def offset(model: Model) -> Iterator[Hypothesis]:
    """What norms store is an offset from one, or is not."""
    every = norms(model)
    for by in (1, -1):
        said = "an offset from one" if by > 0 else "a scale, and no offset from one"
        how = "1 + what is stored" if by > 0 else "what is stored - 1"

        def changed(x: Tensor, by: int = by) -> Tensor:
            return x + by

        one = [(k.name, k.each("weight", changed)) for k in every]
        both = {name: make for _, made in one for name, make in made.items()}
        for name, made in [("each norm", both), *(one if len(one) > 1 else ())]:
            yield Hypothesis(
                f"what {name} stores is {said}", f"the weight of {name} is {how}", made
            )
