"""Families of edits: how a mistake is planted, and the hypotheses that undo it.

Each family is one kind of invertible edit: modules exchanged, rows permuted by an einops pattern,
matrices transposed, numbers shifted or scaled, layers reordered, config fields, attention, code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.components.mlp import MLP, GatedMLP
from zoo.components.model import Model
from zoo.components.moe import Experts
from zoo.components.rotary import Rotary
from zoo.diagnosis import attention, planting
from zoo.diagnosis.attention import Form, Sizes, Variant
from zoo.diagnosis.edits import PARTS, Hypothesis, Make, order
from zoo.diagnosis.kinds import ModuleKind, attentions, blocks, kinds, norms
from zoo.diagnosis.planting import Mapped, feed, need
from zoo.diagnosis.planting import blocks as blocks_of
from zoo.diagnosis.variants import config_hypotheses, plain

Rules = Mapping[str, str]  # native parameter -> the rule that makes it
LETTERS = {"q": "h", "k": "g", "v": "g", "out": "h"}  # of the axis that counts a part's heads


class Family:
    """A family of edits: how one is planted, and the hypotheses that undo it in a model.

    `kind` says what is planted into: "mapping" returns an edited spec, "config" the fields that
    change, "model" changes the loaded model.
    """

    kind: ClassVar[planting.Target] = "model"

    def plant(self, target: Any) -> Any:
        """Make the mistake; NotApplicable where it cannot be made."""
        raise planting.NotApplicable

    def undo(self, model: Model, rules: Rules) -> Iterator[Hypothesis]:
        """What mends a model in which the mistake was made; nothing where it does not apply."""
        return iter(())


def anything(config: Any) -> object:
    """Whatever the config."""
    return True


def _and(names: Iterable[str]) -> str:
    return " and ".join(names)


# --- exchanges -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange(Family):
    """Modules or parameters below one module, each read from the tensors of another."""

    sources: Mapping[str, str]  # what is read -> from where; .name stands at the model's top
    when: Callable[[Any], object] = anything  # of the config
    kind = "mapping"

    @classmethod
    def of(cls, a: str, b: str, when: Callable[[Any], object] = anything) -> Exchange:
        """Two in each other's place."""
        return cls({a: b, b: a}, when)

    def plant(self, target: Mapped) -> Any:
        """Exchange names on the native side of the rules."""
        need(self.when(target.config))
        return target.exchanged(self.sources)

    def undo(self, model: Model, rules: Rules) -> Iterator[Hypothesis]:
        """Exchange parameters of every kind of module that has both."""
        sources = {a.removeprefix("."): b for a, b in self.sources.items()}
        if not self.when(model.config):
            return
        for kind in kinds(model):
            if not (moved := kind.moved(sources)):
                continue
            names = _and(kind.called(name) for name in sources)
            what, fix = f"{names} are in each other's place", f"{names} are exchanged"
            if len(sources) > 2:
                what = f"{names} are read from {', '.join(sources.values())}"
                pairs = ((kind.called(a), b) for a, b in sources.items())
                fix = _and(f"{a} is read from what {b} is read from" for a, b in pairs)
            rows = dict[str, Tensor]()
            if set(sources) <= set(PARTS):
                own = own_rows(kind)
                rows = {a: own[b] for a, b in sources.items()}
            yield Hypothesis(what, fix, moved, across=not kind.name, rows=rows)


def own_rows(attn: ModuleKind) -> dict[str, Tensor]:
    """The rows of q, k and v, counted one below the other."""
    sizes = [attn.shape(f"{part}.weight")[0] for part in PARTS]
    return dict(zip(PARTS, torch.arange(sum(sizes)).split(sizes), strict=True))


@dataclass(frozen=True)
class Copied(Family):
    """A head or an embedding that holds the other's numbers, as if they were tied."""

    to: str
    source: str

    def undo(self, model: Model, rules: Rules) -> Iterator[Hypothesis]:
        """Give one the other's numbers, where they are not tied."""
        whole = kinds(model)[0]
        if whole.has(f"{self.to}.weight") and not getattr(model.config, "tied", False):
            yield Hypothesis(
                f"{self.to} is not what belongs there: it is tied to {self.source}",
                f"{self.to}.weight is {self.source}.weight",
                {f"{self.to}.weight": whole.made(f"{self.source}.weight")},
            )


# --- rows of attention's projections -------------------------------------------------------------


def heads_of(attn: ModuleKind) -> dict[str, int]:
    """How many heads each projection has."""
    width = attn.first.head_dim
    counts = {part: attn.shape(f"{part}.weight")[0] // width for part in PARTS}
    return {**counts, "out": counts["q"]}


def rows_of(
    attn: ModuleKind, rows: Mapping[str, Tensor], together: bool = False
) -> dict[str, Make]:
    """Projections with their rows (of `out`, columns) taken from elsewhere in q, k and v.

    `together`: a weight or a bias only where all three have one, since they lie in one tensor.
    """
    own, made = own_rows(attn), dict[str, Make]()
    inside = not together and all(
        set(rows[p].tolist()) <= set(own[p].tolist()) for p in rows.keys() & own.keys()
    )
    for part, index in rows.items():
        for leaf in ("weight", "bias") if part != "out" else ("weight",):
            if part == "out" or inside:
                start = own[part][0] if part in own else 0
                made |= attn.each(f"{part}.{leaf}", _selected(index - start, part == "out"))
                continue
            for name in attn.modules:
                three = [attn.parameters.get(f"{name}.{each}.{leaf}") for each in PARTS]
                if all(p is not None for p in three):
                    made[f"{name}.{part}.{leaf}"] = _cut(three, index)  # type: ignore[arg-type]
    return made


def _selected(index: Tensor, columns: bool) -> Callable[[Tensor], Tensor]:
    return lambda x: x.index_select(int(columns), index.to(x.device))


def _cut(parts: Sequence[nn.Parameter], index: Tensor) -> Make:
    return lambda: torch.cat([p.data for p in parts]).index_select(0, index.to(parts[0].device))


@dataclass(frozen=True)
class PermutedRows(Family):
    """Rows of projections that lie in one order and are read in another.

    Orders are einops patterns; `{}` stands for the axis that counts heads (h of queries, g of keys
    and values). `heads` names a part whose number of heads was taken instead of the own one ("one":
    a single head); with `again` the rows were then put in order with the own number, too.
    """

    parts: tuple[str, ...]
    lie: str
    read: str
    heads: str = ""
    again: bool = False
    kind = "mapping"

    @property
    def in_pairs(self) -> bool:
        """Whether the rows are those of rotary pairs."""
        return "two" in self.lie

    def plant(self, target: Mapped) -> Any:
        """Let the rules read rows in the wrong order."""
        config = target.config
        width = getattr(config, "head_dim", None) or config.dim // config.heads
        counts = {"h": config.heads, "g": getattr(config, "kv_heads", config.heads)}
        fields = {"h": "heads", "g": "kv_heads" if hasattr(config, "kv_heads") else "heads"}
        for part in self.parts:
            own, letter = LETTERS[part], LETTERS[self.heads or part]
            if self.heads:
                rows = counts[own] * width
                need(counts[own] != counts[letter] and rows % (2 * counts[letter]) == 0)
            need(width % 2 == 0 if self.in_pairs else counts[letter] > 1)
            orders = self.read.format(letter), self.lie.format(letter)
            axis = 1 if part == "out" else 0
            axes = {letter: fields[letter]}
            spec = target.permuted(f"attn.{part}", axis, *orders, **axes)
            target = replace(target, spec=spec)
        return target.spec

    def undo(self, model: Model, rules: Rules) -> Iterator[Hypothesis]:
        """Put rows in order, with weights and biases or either alone."""
        for attn in attentions(model):
            counts, width = heads_of(attn), attn.first.head_dim
            rotary = isinstance(attn.first.rotary, Rotary)
            if self.heads:
                if rotary:
                    yield from self._miscounted(attn, counts, width, rules)
            elif not self.in_pairs:
                parts = [part for part in self.parts if counts[part] > 1]
                rows = {p: self._order(p, counts, width) for p in parts}
                if rows and ("r" not in self.lie or 1 < counts["k"] < counts["q"]):
                    yield self._hypothesis(attn, rows, rules)
            # queries and keys in another order both: without a rotary embedding all is as before
            elif rotary or len(self.parts) == 1:
                widths = [width, attn.first.rotary.width] if rotary else [width]
                for part in dict.fromkeys(reversed(widths)):
                    if part % 2 or part < 4:  # of a head of two, both orders are one
                        continue
                    rows = {p: self._pairs(counts[p], width, part) for p in self.parts}
                    of = "" if part == width else f" of the {part} that are rotated"
                    whole = self._hypothesis(attn, rows, rules, of)
                    alone = [whole.only(leaf) for leaf in ("weight", "bias")]
                    yield from (each for each in (whole, *alone) if each is not None)

    def _order(self, part: str, counts: Mapping[str, int], width: int) -> Tensor:
        a, b = (text.format(LETTERS[part]) for text in (self.lie, self.read))
        shared = "r" in self.lie  # queries that share a key
        lengths = {"g": counts["k"], "e": width} if shared else {LETTERS[part]: counts[part]}
        return order(a, b, counts[part] * width, **lengths)

    def _pairs(self, count: int, width: int, part: int) -> Tensor:
        """Rows of `count` heads of which the first `part` are in another order."""
        a, b = (text.format("").strip() for text in (self.lie, self.read))
        one = torch.cat((order(a, b, part, two=2), torch.arange(part, width)))
        return (torch.arange(count)[:, None] * width + one).flatten()

    def _miscounted(
        self, attn: ModuleKind, counts: Mapping[str, int], width: int, rules: Rules
    ) -> Iterator[Hypothesis]:
        (part,) = self.parts
        own, count = counts[part], counts.get(self.heads, 1)
        if count == own or own * width % (2 * count):
            return
        a, b = (text.format("h") for text in (self.lie, self.read))
        rows = order(a, b, own * width, h=count, two=2)
        if self.again:
            rows = rows[order(b, a, own * width, h=own, two=2)]
        made = self._hypothesis(attn, {part: rows}, rules, letter="h")
        stands = made.fix.endswith("as it stands")
        fix = made.fix if stands else f"{made.fix} with {count} heads"
        if self.again and not stands:
            fix += f", and as [({b}) i]: [({a}) i] with {own}"
        what = f"{made.what} of {count} heads, where it has {own}"
        yield replace(made, what=what, fix=fix, across=True)

    def _hypothesis(
        self,
        attn: ModuleKind,
        rows: dict[str, Tensor],
        rules: Rules,
        of: str = "",
        letter: str = "",
    ) -> Hypothesis:
        letter = letter or LETTERS[next(iter(rows))]
        a, b = (f"({text.format(letter)})" for text in (self.lie, self.read))
        names = _and(f"{attn.name}.{part}" for part in rows)
        lie, read = (f"[o {x}]" if rows.keys() == {"out"} else f"[{x} i]" for x in (a, b))
        own = own_rows(attn)
        counted = {part: at + own[part][0] if part in own else at for part, at in rows.items()}
        made = rows_of(attn, counted)
        how = "[o i], as it stands" if _read_back(rules, made, a, b) else f"{lie}: {read}"
        axis = "columns" if rows.keys() == {"out"} else "rows"
        return Hypothesis(
            f"{axis} of {names}{of} lie as [{a}], and are read as [{b}]",
            f"{names}{of} {'is' if len(rows) == 1 else 'are'} read as {how}",
            made,
            across=len(rows) > 1 and not self.in_pairs,
            rows=counted,
        )


def _read_back(rules: Rules, names: Iterable[str], a: str, b: str) -> bool:
    """Whether the rules that make parameters just undo what the file has: (b) there, (a) here."""

    def bare(text: str) -> str:  # a rule may count the same heads by another letter
        return re.sub(r"\b[hg]\b", ".", text)

    rule_sides = [rules.get(name, "").partition(": ")[::2] for name in names]
    undone = (bare(b) in bare(lie) and bare(a) in bare(read) for lie, read in rule_sides)
    return bool(rule_sides) and all(undone)


@dataclass(frozen=True)
class Fused(Family):
    """Queries, keys and values cut out of one tensor in another way than they lie in it."""

    lie: str
    read: str
    kind = "mapping"

    def plant(self, target: Mapped) -> Any:
        """Let the rules cut fused parts in the other order."""
        return target.fused_reordered()

    def undo(self, model: Model, rules: Rules) -> Iterator[Hypothesis]:
        """Cut them as they lie."""
        for attn in attentions(model):
            layouts, sizes = self._layouts(attn), [len(x) for x in own_rows(attn).values()]
            if not {self.lie, self.read} <= layouts.keys():
                continue
            # where each row lies in the file as it was read, and from there where it should be read
            index = torch.empty(sum(sizes), dtype=torch.long)
            index[layouts[self.lie]] = torch.arange(sum(sizes))
            index = index[layouts[self.read]]
            if torch.equal(index, torch.arange(len(index))):
                continue
            rows = dict(zip(PARTS, index.split(sizes), strict=True))
            lie, read, name = f"[({self.lie})]", f"[({self.read})]", attn.name
            if "(" in self.lie + self.read:
                lie, read = f"[{self.lie}]", f"[{self.read}]"
            made = rows_of(attn, rows, together=True)
            alone = attn.has("q.bias") and not any(each.endswith("bias") for each in made)
            yield Hypothesis(
                f"{name}: queries, keys and values lie fused as {lie}, and are read as {read}",
                f"{name}.{{q,k,v}} are read as {lie[:-1]} i], not {read[:-1]} i]"
                + ", in its weight" * alone,
                made,
                rows=rows,
            )

    def _layouts(self, attn: ModuleKind) -> dict[str, Tensor]:
        """Layout -> (rows,) the rows of the fused tensor that q, k and v are, one after another."""
        count, width = heads_of(attn), attn.first.head_dim
        q, k, v = own_rows(attn).values()
        if count["k"] == 1:
            return {}  # one group: all of these are one
        stacked = torch.cat((q, k, v))
        groups = torch.cat([x.view(count["k"], -1, width) for x in (q, k, v)], 1).flatten()
        if count["q"] != count["k"]:
            return {"(q|k|v)": stacked, "(g (r|one|one) e)": groups}
        return {"n o": stacked, "o n": torch.stack((q, k, v), 1).flatten(), "h n e": groups}


# --- numbers of parameters -----------------------------------------------------------------------


@dataclass(frozen=True)
class Transposed(Family):
    """Matrices that hold their transpose; where they are not square, in their own shape."""

    types: tuple[type[nn.Module], ...]
    parts: tuple[str, ...] = ()  # empty: each that is square
    module: str = ""  # the square matrix of one module alone
    kind = "mapping"

    def plant(self, target: Mapped) -> Any:
        """Let the rules transpose a square."""
        config = target.config
        width = getattr(config, "head_dim", None) or config.dim // config.heads
        need(width * config.heads == config.dim)
        return target.transposed(f"blocks.0.attn.{self.parts[0]}.weight")

    def undo(self, model: Model, rules: Rules) -> Iterator[Hypothesis]:
        """Transpose matrices, or reorder the numbers of those that are not square."""
        for kind in kinds(model, *self.types):
            parts = self.parts or tuple(p for p in LETTERS if kind.is_square(f"{p}.weight"))
            leaves = [f"{part}.weight" for part in parts]
            if self.module:
                leaves = ["weight"] if kind.name == self.module and kind.is_square("weight") else []
            if not leaves or not all(kind.has(leaf) for leaf in leaves):
                continue
            names = _and(map(kind.called, leaves))
            are = "are" if len(leaves) > 1 else "is"
            ways: dict[str, Callable[[Tensor], Tensor]]
            ways = {"[i o]: [o i], or no longer so": lambda x: x.mT}
            if not all(map(kind.is_square, leaves)):
                ways = {
                    "written column by column": lambda x: x.reshape(x.mT.shape).mT,
                    "written row by row, and read by columns": lambda x: x.mT.reshape(x.shape),
                }
            for how, change in ways.items():
                fix = f"{names} {are} read as {how}"
                yield Hypothesis(f"{names} {are} transposed", fix, kind.all(leaves, change))


@dataclass(frozen=True)
class ExchangedTransposed(Family):
    """Two matrices in each other's place, whose shapes fit since both are transposed, too."""

    a: str
    b: str

    def undo(self, model: Model, rules: Rules) -> Iterator[Hypothesis]:
        """Exchange both and transpose them."""
        for kind in kinds(model, MLP, GatedMLP):
            if kind.has(f"{self.a}.bias"):
                continue
            names = _and(kind.called(x) for x in (self.a, self.b))
            pairs = ((self.a, self.b), (self.b, self.a))
            made = {
                f"{name}.{to}.weight": kind.made(f"{name}.{source}.weight", lambda x: x.mT)
                for name in kind.modules
                for to, source in pairs
            }
            what = f"{names} are in each other's place, and transposed"
            yield Hypothesis(what, f"{names} are exchanged and read as [i o]", made)


@dataclass(frozen=True)
class NormOffset(Family):
    """Norms whose weights have one too much (+1) or too little (-1)."""

    by: int

    def plant(self, target: Any) -> None:
        """Add to the first norm of each block."""
        for block in blocks_of(target):
            norm = planting.part(block, "norm1")
            planting.overwrite(norm.weight, norm.weight + self.by)

    def undo(self, model: Model, rules: Rules) -> Iterator[Hypothesis]:
        """Subtract from all norms, or from those of one name."""
        stored = "a scale, and no offset from one" if self.by > 0 else "an offset from one"
        how = "what is stored - 1" if self.by > 0 else "1 + what is stored"
        one = [(k.name, k.each("weight", lambda x: x - self.by)) for k in norms(model)]
        every = {name: make for _, made in one for name, make in made.items()}
        for name, made in [("each norm", every), *(one if len(one) > 1 else ())]:
            fix = f"the weight of {name} is {how}"
            yield Hypothesis(f"what {name} stores is {stored}", fix, made)


@dataclass(frozen=True)
class RowsOff(Family):
    """Tables whose rows are moved by a few; empty names: every table of the vocabulary."""

    by: int
    names: tuple[str, ...] = ()

    def plant(self, target: Any) -> None:
        """Move the embedding's rows."""
        planting.overwrite(target.embed.weight, target.embed.weight.roll(self.by, 0))

    def undo(self, model: Model, rules: Rules) -> Iterator[Hypothesis]:
        """Move rows back."""
        parameters = dict(model.named_parameters())
        tokens = [n for n, p in parameters.items() if p.shape[0] == model.config.vocab]
        names = self.names or tokens
        if not names or not set(names) <= parameters.keys() or self.names == tuple(tokens):
            return
        if self.names in (("embed.weight",), ("head.weight",)) and "head.weight" not in tokens:
            return
        # what is rolled by -1 is read a row earlier
        made = {name: _rolled(parameters[name], -self.by) for name in names}
        more = "" if self.names else ", or the tokenizer's ids are"
        count = f"{abs(self.by)} row{'s'[: abs(self.by) - 1]}"
        are = "is" if len(names) == 1 else "are"
        yield Hypothesis(
            f"{_and(names)}: rows are off by {self.by:+d}{more}",
            f"{_and(names)} {are} read {count} {'later' if self.by < 0 else 'earlier'}",
            made,
        )


def _rolled(p: nn.Parameter, by: int) -> Make:
    return lambda: p.data.roll(by, 0)


@dataclass(frozen=True)
class AddedTable(Family):
    """A table that is added to embeddings and should not be; `row`: another of its rows should."""

    name: str
    row: int = 0

    def undo(self, model: Model, rules: Rules) -> Iterator[Hypothesis]:
        """Leave a table out, or read another row of it."""
        table = dict(model.named_parameters()).get(self.name)
        if table is None or len(table) <= self.row:
            return
        if self.row:
            what = f"{self.name}: another type is what a plain text has"
            fix = f"{self.name} is read {self.row} row later"
            yield Hypothesis(what, fix, {self.name: _rolled(table, self.row)})
        else:
            what, fix = f"{self.name} is added, and should not be", f"{self.name} is left out"
            yield Hypothesis(what, fix, {self.name: lambda: torch.zeros_like(table.data)})


@dataclass(frozen=True)
class Scaled(Family):
    """Embeddings, or what the head reads, scaled by a power of the root of the width."""

    module: str
    power: int  # of what is applied, and should not be

    def plant(self, target: Any) -> None:
        """Scale what a module reads."""
        need(target.config.head in ("lm", "shared_lm"))
        root = target.config.dim**0.5
        feed(target, self.module, lambda x: x * root**self.power)

    def undo(self, model: Model, rules: Rules) -> Iterator[Hypothesis]:
        """Scale what a module gives back."""
        module = dict(model.named_children()).get(self.module)
        if not isinstance(module, nn.Embedding | nn.Linear):
            return
        what = "embeddings" if self.module == "embed" else "what the head reads"
        how = "divided" if self.power > 0 else "multiplied"
        factor, forward = model.config.dim ** (-self.power / 2), module.forward
        yield Hypothesis(
            f"{what} should be {how} by the root of their width",
            f"{what} are {how} by {max(factor, 1 / factor):.4g}",
            settings={self.module: {"forward": lambda x: forward(x) * factor}},
        )


# --- order of layers and experts -----------------------------------------------------------------

MOST = 12  # of which any two may be exchanged; of more, neighbors


def orders(count: int) -> Iterator[tuple[str, list[int]]]:
    """How so many may lie, and which of them comes at each position then."""
    ways = {
        "in the order of words: 0, 1, 10, 11 ...": sorted(range(count), key=str),
        "backwards": list(range(count))[::-1],
        "off by one, the last one first": [*range(1, count), 0],
        "off by one, the first one last": [count - 1, *range(count - 1)],
    }
    for a, b in combinations(range(count), 2):
        if b == a + 1 or count <= MOST:
            lie = list(range(count))
            lie[a], lie[b] = b, a
            ways[f"with {a} and {b} exchanged"] = lie
    seen = [list(range(count))]
    for how, lie in ways.items() if count > 1 else ():
        if lie not in seen:
            seen.append(lie)
            yield how, lie


class LayerOrder(Family):
    """Layers in another order; planted: each read from the next one."""

    kind = "mapping"

    def plant(self, target: Mapped) -> Any:
        """Let the rules read each layer from the next one's tensors."""
        count = target.config.layers
        need(count > 1)
        return target.exchanged({f"blocks.{i}": f"blocks.{(i + 1) % count}" for i in range(count)})

    def undo(self, model: Model, rules: Rules) -> Iterator[Hypothesis]:
        """Put layers in order."""
        for stack in blocks(model):
            names = list(stack.modules)
            for how, lie in orders(len(names)):
                # what lies at n is layer lie[n]
                made = {
                    f"{names[layer]}.{leaf}": stack.made(f"{names[n]}.{leaf}")
                    for n, layer in enumerate(lie)
                    if n != layer
                    for leaf, _ in stack.first.named_parameters()
                }
                if all(name in stack.parameters for name in made):
                    what, fix = f"{stack.name} lie {how}", f"{stack.name} are put in order"
                    yield Hypothesis(what, fix, made, across=True)


class ExpertOrder(Family):
    """Experts in another order than the router means; planted: the gates of the first two."""

    kind = "mapping"

    def plant(self, target: Mapped) -> Any:
        """Let the rules exchange the gates of two experts."""
        count = getattr(target.config, "experts", 0)
        need(count > 1)
        return target.experts([1, 0, *range(2, count)])

    def undo(self, model: Model, rules: Rules) -> Iterator[Hypothesis]:
        """Put experts in order."""
        for moe in kinds(model, Experts):
            parts = ("gate", "up", "down")
            for how, lie in orders(moe.first.experts):
                select = _selected(torch.tensor(lie).argsort(), False)
                for some in (parts, *((part,) for part in parts)):
                    names = _and(map(moe.called, some))
                    what, fix = f"{names} lie {how}", f"{names} are put in order"
                    yield Hypothesis(
                        f"experts of {what}", f"experts of {fix}", moe.all(some, select)
                    )


# --- config fields, attention and code -----------------------------------------------------------


@dataclass(frozen=True)
class WrongField(Family):
    """A config field with another value: `wrong` makes it of the right one and the config.

    Both values are as JSON has them. The right one again: there is no such mistake here.
    """

    name: str
    wrong: Callable[[Any, Any], Any]
    kind = "config"

    def plant(self, target: Any) -> dict[str, Any]:
        """The config field that changes, where it is set."""
        value = plain(getattr(target, self.name, None))
        need(value is not None)
        wrong = self.wrong(value, target)
        need(wrong != value)
        return {self.name: wrong}


class AnyField(Family):
    """Every field of a config, with each value that it may have been meant to have."""

    kind = "config"

    def undo(self, model: Model, rules: Rules) -> Iterator[Hypothesis]:
        """Each field with each usual value."""
        yield from config_hypotheses(model)


@dataclass(frozen=True)
class Attends(Family):
    """Attention that computes another function; `text`: a text is searched for it, too."""

    group: str  # of variants of one group, one is tried at a time
    what: str
    change: attention.Change
    text: bool = False
    when: Callable[[Any], object] = anything  # of the model that it is planted in

    def plant(self, target: Any) -> None:
        """Change every attention."""
        need(self.when(target))
        modules = [m for m in target.modules() if hasattr(m, "attend") and hasattr(m, "rotary")]
        every = [self._settings(target.config, m, n + 1) for n, m in enumerate(modules)]
        need(any(every))
        for module, settings in zip(modules, every, strict=True):
            for name, value in settings.items():
                setattr(module, name, value)

    def _settings(self, config: Any, module: Any, layer: int) -> dict[str, Any]:
        """The attributes of an attention module that change."""
        form = Form.of(module)
        other = self.change(form, Sizes.of(config, module, layer))
        return {} if other is None else other.settings(form)

    def variant(self, form: Form, sizes: Sizes) -> Variant | None:
        """The same for `zoo diff`; None where it changes nothing."""
        other = self.change(form, sizes)
        if other is None or not other.settings(form):
            return None
        return Variant(self.group, self.what, lambda form: self.change(form, sizes) or form)

    def undo(self, model: Model, rules: Rules) -> Iterator[Hypothesis]:
        """Change the attention of a model, where a text can tell."""
        for attn in attentions(model) if self.text else ():
            modules = enumerate(attn.modules.items())
            every = {name: self._settings(model.config, m, n + 1) for n, (name, m) in modules}
            settings = {name: changes for name, changes in every.items() if changes}
            if settings:
                what = f"{attn.name}: {self.what}"
                yield Hypothesis(what, f"in {attn.name} {self.what}", settings=settings)


@dataclass(frozen=True)
class Code(Family):
    """Code that is wrong in its structure: it is planted, and `zoo diff` explains what it sees."""

    tamper: Callable[[Any], object]

    def plant(self, target: Any) -> None:
        """Tamper with the model."""
        self.tamper(target)
