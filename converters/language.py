"""The mapping language: names whose indices are axes, patterns as einops writes them.

A rule `source ref: target ref` (or a list of target refs) is parsed into a `Rule`. With every
size known it becomes a `Transform`, which carries arrays from source to target and back without
losing a bit. Nothing here knows of files or models; torch is imported only when arrays move.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from zoo.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

Binding = dict[str, Any]  # placeholder -> number, or position in its enumeration
Sizes = dict[str, int]  # axis -> length

NUMBER_WORDS = {"one": 1, "two": 2, "three": 3, "four": 4}


# --- names ---------------------------------------------------------------------------------------


class Placeholder(NamedTuple):
    """`{layer}` is a number; `{n=q,k,v}` one of the values listed."""

    name: str
    values: tuple[str, ...] = ()

    def spell(self, index: int) -> str:
        return self.values[index] if self.values else str(index)


@dataclass(frozen=True)
class Template:
    """A tensor's name with placeholders; formats bindings and matches names, in linear time."""

    parts: tuple[str | Placeholder, ...]

    @cached_property
    def placeholders(self) -> dict[str, Placeholder]:
        return {part.name: part for part in self.parts if isinstance(part, Placeholder)}

    def format(self, binding: Mapping[str, int]) -> str:
        parts = self.parts
        return "".join(p if isinstance(p, str) else p.spell(binding[p.name]) for p in parts)

    def match(self, name: str) -> Binding | None:
        """The binding under which `format` gives `name`, or None.

        Every part moves a set of positions forward: the time is at most parts x values x length.
        """
        states: dict[int, Binding] = {0: {}}
        for part in self.parts:
            after: dict[int, Binding] = {}
            for at, binding in states.items():
                for end, index in _continuations(part, name, at):
                    if index is None:
                        after.setdefault(end, binding)
                    elif binding.get(part.name, index) == index:  # type: ignore[union-attr]
                        after.setdefault(end, {**binding, part.name: index})  # type: ignore[union-attr]
            states = after
        return states.get(len(name))

    def __str__(self) -> str:
        def show(p: Placeholder) -> str:
            return f"{{{p.name}={','.join(p.values)}}}" if p.values else f"{{{p.name}}}"

        return "".join(p if isinstance(p, str) else show(p) for p in self.parts)


def _continuations(part: str | Placeholder, name: str, at: int) -> Iterator[tuple[int, int | None]]:
    if isinstance(part, str):
        if name.startswith(part, at):
            yield at + len(part), None
    elif part.values:
        for index, value in enumerate(part.values):
            if name.startswith(value, at):
                yield at + len(value), index
    else:
        end = at
        while end < len(name) and name[end] in "0123456789":
            end += 1
        # "07" is not how anybody spells 7, and a longer number is no index
        if at < end <= at + 9 and (name[at] != "0" or end == at + 1):
            yield end, int(name[at:end])


# --- patterns ------------------------------------------------------------------------------------


class Ragged(NamedTuple):
    """`(q | k | v)`: parts of different sizes, one behind the other."""

    parts: tuple[tuple[str, ...], ...]


Node = str | Ragged
Dim = tuple[Node, ...]  # one dimension of an array: a product of axes


@dataclass(frozen=True)
class Pattern:
    """`[(g (r|one|one) e) i]`: the axes of each dimension, outermost first."""

    dims: tuple[Dim, ...]

    @cached_property
    def ragged(self) -> tuple[int, int] | None:
        """(dimension, place in it) of the ragged axis, if there is one."""
        for d, dim in enumerate(self.dims):
            for k, node in enumerate(dim):
                if isinstance(node, Ragged):
                    return d, k
        return None

    @property
    def pieces(self) -> tuple[tuple[str, ...], ...]:
        if self.ragged is None:
            return ()
        d, k = self.ragged
        node = self.dims[d][k]
        assert isinstance(node, Ragged)
        return node.parts

    @cached_property
    def axes(self) -> frozenset[str]:
        flat = (n for dim in self.dims for n in dim)
        names = (a for n in flat for a in ([n] if isinstance(n, str) else sum(n.parts, ())))
        return frozenset(names)

    def choose(self, piece: int) -> tuple[tuple[str, ...], ...]:
        """The dims with the ragged axis's dimension taken apart and its `piece` chosen.

        `[(g (r|one|one) e) i]` with piece 0 is `g r e i`, each a dimension of its own.
        """
        if self.ragged is None:
            return self.dims  # type: ignore[return-value]
        d, k = self.ragged
        dim = self.dims[d]
        apart = [(a,) for a in dim[:k]] + [self.pieces[piece]] + [(a,) for a in dim[k + 1 :]]
        return (*self.dims[:d], *apart, *self.dims[d + 1 :])  # type: ignore[arg-type]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(prod(_length(node, sizes) for node in dim) for dim in self.dims)

    def apart(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with the ragged axis's dimension taken apart, as `choose` lays it out."""
        if self.ragged is None:
            return self.shape(sizes)
        d, _ = self.ragged
        shape = self.shape(sizes)
        middle = tuple(_length(node, sizes) for node in self.dims[d])
        return (*shape[:d], *middle, *shape[d + 1 :])

    @property
    def ragged_dim(self) -> int:
        assert self.ragged is not None
        return sum(self.ragged)

    def __str__(self) -> str:
        def show(dim: Dim) -> str:
            words = [n if isinstance(n, str) else f"({_bars(n)})" for n in dim]
            return words[0] if len(words) == 1 else f"({' '.join(words)})"

        return f"[{' '.join(show(dim) for dim in self.dims)}]"

    def describe(self, sizes: Mapping[str, int]) -> str:
        """`[i=4 (n=3 o=4)]`, for messages."""
        text = str(self)
        for mark in "[]()|":
            text = text.replace(mark, f" {mark} ")
        words = [f"{w}={sizes[w]}" if w in sizes else w for w in text.split()]
        out = " ".join(words)
        for mark in "[(":
            out = out.replace(f"{mark} ", mark)
        for mark in "])":
            out = out.replace(f" {mark}", mark)
        return out


def _bars(ragged: Ragged) -> str:
    return " | ".join(p[0] if len(p) == 1 else f"({' '.join(p)})" for p in ragged.parts)


def _length(node: Node, sizes: Mapping[str, int]) -> int:
    if isinstance(node, str):
        return 1 if node == "1" else sizes[node]
    return sum(prod(_length(a, sizes) for a in part) for part in node.parts)


# --- parsing -------------------------------------------------------------------------------------


class Ref(NamedTuple):
    """A family of tensors on one side of a rule: how they are called and how their axes lie."""

    name: Template
    pattern: Pattern | None

    def __str__(self) -> str:
        return f"{self.name} {self.pattern}" if self.pattern else str(self.name)


class _Reader:
    """A text and a place in it; errors point at the column."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where, self.at = text, where, 0

    def fail(self, why: str, at: int | None = None) -> SpecError:
        at = self.at if at is None else at
        return SpecError(
            f"{self.where}: column {at + 1}: {why}\n  {self.text}\n  {' ' * at}^".lstrip(": ")
        )

    def peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at] == " ":
            self.at += 1
        return self.text[self.at] if self.at < len(self.text) else ""

    def take(self, mark: str, why: str) -> None:
        if self.peek() != mark:
            raise self.fail(why)
        self.at += 1


def parse_name(text: str, where: str = "") -> Template:
    reader = _Reader(text, where)
    template = _name(reader)
    if reader.peek():
        raise reader.fail("expected the end of the name")
    return template


def parse_ref(text: str, where: str = "") -> Ref:
    """`h.{layer}.attn.c_attn.weight [i (n o)]`"""
    reader = _Reader(text, where)
    name = _name(reader)
    pattern = None
    if reader.peek() == "[":
        pattern = _pattern(reader)
    if reader.peek():
        raise reader.fail("expected axes in [ ] or the end of the line")
    return Ref(name, pattern)


def _name(reader: _Reader) -> Template:
    reader.peek()
    parts: list[str | Placeholder] = []
    text, declared = reader.text, dict[str, Placeholder]()
    while reader.at < len(text) and text[reader.at] not in " [":
        start = reader.at
        if text[start] == "{":
            close = text.find("}", start)
            if close < 0:
                raise reader.fail("'{' is never closed")
            placeholder = _placeholder(reader, text[start + 1 : close], declared)
            if parts and isinstance(parts[-1], Placeholder) and not parts[-1].values:
                raise reader.fail("a number needs a literal behind it, or its end cannot be found")
            declared[placeholder.name] = placeholder
            parts.append(placeholder)
            reader.at = close + 1
        elif text[start] in "}]()|":
            raise reader.fail(f"'{text[start]}' has no place in a name")
        else:
            while reader.at < len(text) and text[reader.at] not in " [{}]()|":
                reader.at += 1
            literal = text[start : reader.at]
            number = parts and isinstance(parts[-1], Placeholder) and not parts[-1].values
            if number and literal[0].isdigit():
                raise reader.fail("a digit behind a number: its end cannot be found", start)
            parts.append(literal)
    if not parts:
        raise reader.fail("expected a tensor's name")
    return Template(tuple(parts))


def _placeholder(reader: _Reader, body: str, declared: Mapping[str, Placeholder]) -> Placeholder:
    name, equals, listed = body.partition("=")
    name = name.strip()
    if not name.isidentifier() or name.startswith("_"):
        raise reader.fail(f"'{name}' is no placeholder name", reader.at + 1)
    values = tuple(v.strip() for v in listed.split(",")) if equals else ()
    if name in declared:
        if values and values != declared[name].values:
            raise reader.fail(f"'{name}' is declared twice with different values", reader.at + 1)
        return declared[name]
    if equals and (len(set(values)) != len(values) or not any(values)):
        raise reader.fail(f"the values of '{name}' must be distinct", reader.at + 1)
    for value in values:
        if any(c in value for c in " [](){}|="):
            raise reader.fail(f"'{value}' is no value of an enumeration", reader.at + 1)
    return Placeholder(name, values)


def _pattern(reader: _Reader) -> Pattern:
    start = reader.at
    reader.take("[", "expected '['")
    dims: list[Dim] = []
    while reader.peek() != "]":
        if not reader.peek():
            raise reader.fail("'[' is never closed", start)
        if reader.peek() != "(":
            dims.append((_axis(reader),))
            continue
        node = _group(reader)
        dims.append((node,) if isinstance(node, Ragged) else node)
    reader.take("]", "expected ']'")
    pattern = Pattern(tuple(dims))
    _check_axes(pattern, reader, start)
    return pattern


def _axis(reader: _Reader) -> str:
    reader.peek()
    start = reader.at
    while reader.at < len(reader.text) and (
        reader.text[reader.at].isalnum() or reader.text[reader.at] == "_"
    ):
        reader.at += 1
    word = reader.text[start : reader.at]
    if word != "1" and (not word.isidentifier() or word.startswith("_") or not word.isascii()):
        raise reader.fail(f"expected an axis, found '{word or reader.peek() or 'the end'}'", start)
    return word


def _group(reader: _Reader) -> tuple[Node, ...] | Ragged:
    """`( … )`: axes and at most one ragged group; with bars at its own level it is that group."""
    start = reader.at
    reader.take("(", "expected '('")
    parts: list[list[Node]] = [[]]
    while reader.peek() != ")":
        mark = reader.peek()
        if mark in ("", "]"):
            raise reader.fail("'(' is never closed", start)
        if mark == "|":
            if not parts[-1]:
                raise reader.fail("an empty part")
            reader.at += 1
            parts.append([])
        elif mark == "(":
            inner = _group(reader)
            parts[-1].extend([inner] if isinstance(inner, Ragged) else inner)
        else:
            parts[-1].append(_axis(reader))
    reader.at += 1
    if not parts[-1]:
        raise reader.fail("an empty part" if len(parts) > 1 else "an empty group", start)
    if len(parts) == 1:
        return tuple(parts[0])
    if any(isinstance(node, Ragged) for part in parts for node in part):
        raise reader.fail("a ragged group inside a ragged group", start)
    return Ragged(tuple(tuple(part) for part in parts))  # type: ignore[arg-type]


def _check_axes(pattern: Pattern, reader: _Reader, start: int) -> None:
    ragged = [n for dim in pattern.dims for n in dim if isinstance(n, Ragged)]
    if len(ragged) > 1:
        raise reader.fail("two ragged groups in one pattern", start)
    for piece in range(max(1, len(pattern.pieces))):
        flat = [a for dim in pattern.choose(piece) for a in dim if a != "1"]
        for axis in flat:
            if flat.count(axis) > 1:
                raise reader.fail(f"axis '{axis}' appears twice", start)


# --- rules ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # a rule is itself: looked up often, never compared
class Rule:
    """One line of a spec: source tensors and the native tensors that hold the same numbers."""

    source: Ref
    targets: tuple[Ref, ...]
    where: str = ""

    @cached_property
    def loops(self) -> dict[str, Placeholder]:
        """Placeholders on both sides: the rule holds for each of their values apart."""
        there = set.intersection(*(set(t.name.placeholders) for t in self.targets))
        return {n: p for n, p in self.source.name.placeholders.items() if n in there}

    @cached_property
    def stacked(self) -> dict[str, Placeholder]:
        """Placeholders of the source alone that are axes of the target: tensors to stack."""
        axes = frozenset().union(*(p.axes for p in self._patterns(1)))
        return {
            n: p
            for n, p in self.source.name.placeholders.items()
            if n not in self.loops and n in axes
        }

    @cached_property
    def replicated(self) -> dict[str, Placeholder]:
        """Numbers of the source alone that are no axis of the target: copies that must be equal."""
        mine = self.source.name.placeholders.items()
        return {n: p for n, p in mine if n not in self.loops and n not in self.stacked}

    def spread(self, target: Ref) -> dict[str, Placeholder]:
        """Placeholders of a target alone, which are axes of the source: tensors to unstack."""
        return {n: p for n, p in target.name.placeholders.items() if n not in self.loops}

    def _patterns(self, side: int) -> list[Pattern]:
        refs = [self.source] if side == 0 else self.targets
        return [r.pattern for r in refs if r.pattern is not None]

    @property
    def plain(self) -> bool:
        """Names change and nothing else."""
        return self.source.pattern is None

    def __str__(self) -> str:
        targets = [str(t) for t in self.targets]
        return (
            f"{self.source}: {targets[0] if len(targets) == 1 else '[' + ', '.join(targets) + ']'}"
        )


def parse_rule(source: str, target: str | Sequence[str], where: str = "") -> Rule:
    texts = [target] if isinstance(target, str) else list(target)
    if not texts or not all(isinstance(t, str) for t in texts):
        raise SpecError(f"{where}: {source}: expected a tensor's name or a list of them")
    left = parse_ref(source, where)
    right = [parse_ref(text, where) for text in texts]
    # no brackets: same axes on both sides
    if left.pattern is None and len(right) == 1:
        left = Ref(left.name, right[0].pattern)
    right = [r if r.pattern or len(right) > 1 else Ref(r.name, left.pattern) for r in right]
    rule = Rule(left, tuple(right), where)
    _check_rule(rule)
    return rule


def _check_rule(rule: Rule) -> None:
    def fail(why: str) -> SpecError:
        return SpecError(f"{rule.where}: {rule}\n  {why}".lstrip(": "))

    source, targets = rule.source, rule.targets
    for target in targets:
        for name, mine in rule.loops.items():
            theirs = target.name.placeholders[name]
            if bool(mine.values) != bool(theirs.values) or len(mine.values) != len(theirs.values):
                raise fail(f"'{name}' has {_count(mine)} on the left and {_count(theirs)} here")
    if rule.plain:
        if len(targets) > 1 or any(rule.spread(t) for t in targets):
            raise fail("one tensor becomes several: say by axes in [ ] how it is cut")
        if any(p.values for p in rule.replicated.values()):
            raise fail("several tensors become one: say by axes in [ ] how they are joined")
        return
    assert source.pattern is not None
    pieces = len(source.pattern.pieces) or 1
    if len(targets) > 1 and pieces != len(targets):
        raise fail(f"{pieces} parts on the left, {len(targets)} tensors on the right")
    for k in range(pieces):
        target = targets[k] if len(targets) > 1 else targets[0]
        if target.pattern is None:
            raise fail(f"{target.name}: axes in [ ] are missing")
        if target.pattern.ragged and len(targets) > 1:
            raise fail(f"{target.name}: a part cannot be ragged itself")
        if len(targets) == 1 and len(target.pattern.pieces or (1,)) != pieces:
            raise fail("both sides must have the same number of parts")
        for name, placeholder in rule.replicated.items():
            if placeholder.values:
                raise fail(f"'{name}' is an axis of neither side")
        left = {a for dim in source.pattern.choose(k) for a in dim} | set(rule.stacked)
        right = {a for dim in target.pattern.choose(k) for a in dim} | set(rule.spread(target))
        if odd := sorted((left ^ right) - {"1", "one"}):
            side = "left" if odd[0] in left else "right"
            raise fail(f"axis '{odd[0]}' is on the {side} alone")


def _count(placeholder: Placeholder) -> str:
    return f"{len(placeholder.values)} values" if placeholder.values else "numbers"


# --- sizes ---------------------------------------------------------------------------------------


def solve(pattern: Pattern, shape: Sequence[int], sizes: Sizes) -> str | None:
    """Fill in the axes of `pattern` that `shape` determines; what cannot be, in words, or None."""
    if len(pattern.dims) != len(shape):
        return f"{len(shape)} dimensions, and {pattern} has {len(pattern.dims)}"
    for dim, length in zip(pattern.dims, shape, strict=True):
        unknown = [n for n in dim if isinstance(n, str) and n != "1" and n not in sizes]
        known = [n for n in dim if n not in unknown]
        ragged = next((n for n in known if isinstance(n, Ragged)), None)
        if ragged and (problem := _solve_ragged(ragged, dim, length, sizes)):
            return problem
        if ragged and any(a not in sizes for part in ragged.parts for a in part if a != "1"):
            continue
        if len(unknown) > 1:
            continue
        rest = prod(_length(n, sizes) for n in known)
        if unknown:
            if rest == 0 or length % rest:
                return f"{length} is not divisible by {rest} in {pattern.describe(sizes)}"
            sizes[unknown[0]] = length // rest
        elif rest != length:
            return f"{length} where {pattern.describe(sizes)} has {rest}"
    return None


def _solve_ragged(ragged: Ragged, dim: Dim, length: int, sizes: Sizes) -> str | None:
    """One unknown axis of one part follows from the whole."""
    unknown = [a for part in ragged.parts for a in part if a != "1" and a not in sizes]
    others = [n for n in dim if n is not ragged]
    if len(unknown) != 1 or any(n not in sizes and n != "1" for n in others):
        return None
    around = prod(_length(n, sizes) for n in others)
    part = next(p for p in ragged.parts if unknown[0] in p)
    rest = sum(prod(_length(a, sizes) for a in p) for p in ragged.parts if p is not part)
    beside = prod(_length(a, sizes) for a in part if a != unknown[0])
    if not around or length % around or (length // around - rest) % (beside or 1):
        return f"{length} cannot hold ({_bars(ragged)})"
    sizes[unknown[0]] = (length // around - rest) // beside
    return None


# --- arrays --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transform:
    """A rule with every size known: what it does to arrays, both ways."""

    rule: Rule
    sizes: tuple[tuple[str, int], ...]

    @cached_property
    def _sizes(self) -> Sizes:
        return dict(self.sizes)

    def grid(self, placeholders: Mapping[str, Placeholder]) -> list[Binding]:
        """Every combination of the placeholders' values, the last one fastest."""
        names = list(placeholders)
        ranges = [range(len(p.values) or self._sizes[n]) for n, p in placeholders.items()]
        return [dict(zip(names, point, strict=True)) for point in product(*ranges)]

    def source_shape(self) -> tuple[int, ...]:
        assert self.rule.source.pattern is not None
        return self.rule.source.pattern.shape(self._sizes)

    def target_shape(self, target: Ref) -> tuple[int, ...]:
        assert target.pattern is not None
        return target.pattern.shape(self._sizes)

    @cached_property
    def _equations(self) -> list[tuple[str, str, Sizes]]:
        """For each part: how it lies in the source, how in the target, and the sizes both need."""
        rule, out = self.rule, []
        assert rule.source.pattern is not None
        for k in range(len(rule.source.pattern.pieces) or 1):
            target = rule.targets[k] if len(rule.targets) > 1 else rule.targets[0]
            assert target.pattern is not None
            left, right = rule.source.pattern.choose(k), target.pattern.choose(k)
            if rule.stacked:
                left = (tuple(rule.stacked), *left)
            if spread := rule.spread(target):
                right = (tuple(spread), *right)
            # `one` may stand on one side alone: einops writes it as 1 there
            both = {a for d in left for a in d} & {a for d in right for a in d}
            text = [_einops(side, both) for side in (left, right)]
            used = {a: self._sizes[a] for a in both if a != "1"}
            out.append((text[0], text[1], used))
        return out

    def forward(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """Source tensors in grid order to target tensors, target by target in grid order."""
        from einops import rearrange

        rule, pattern = self.rule, self.rule.source.pattern
        assert pattern is not None
        x = _stack(sources) if rule.stacked else sources[0]
        lead = 1 if rule.stacked else 0
        if not pattern.ragged:
            ((left, right, used),) = self._equations
            y = rearrange(x, f"{left} -> {right}", **used)
            return list(y.unbind(0)) if rule.spread(rule.targets[0]) else [y]
        x = x.reshape(*x.shape[:lead], *pattern.apart(self._sizes))
        widths = self._widths(pattern)
        parts = x.split(widths, dim=lead + pattern.ragged_dim)
        moved = [
            rearrange(part, f"{left} -> {right}", **used)
            for part, (left, right, used) in zip(parts, self._equations, strict=True)
        ]
        if len(rule.targets) > 1:
            out: list[Tensor] = []
            for target, y in zip(rule.targets, moved, strict=True):
                out.extend(y.unbind(0) if rule.spread(target) else [y])
            return out
        return self._join(rule.targets[0], bool(rule.spread(rule.targets[0])), moved)

    def backward(self, targets: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `forward`: target tensors in its order to source tensors in grid order."""
        from einops import rearrange

        rule, pattern = self.rule, self.rule.source.pattern
        assert pattern is not None
        if len(rule.targets) > 1:
            parts, rest = [], list(targets)
            for target in rule.targets:
                spread = rule.spread(target)
                count = len(self.grid(spread)) if spread else 1
                mine, rest = rest[:count], rest[count:]
                parts.append(_stack(mine) if spread else mine[0])
        else:
            target = rule.targets[0]
            assert target.pattern is not None
            spread = rule.spread(target)
            y = _stack(targets) if spread else targets[0]
            parts = [y]
            if target.pattern.ragged:
                lead = 1 if spread else 0
                y = y.reshape(*y.shape[:lead], *target.pattern.apart(self._sizes))
                dim = lead + target.pattern.ragged_dim
                parts = list(y.split(self._widths(target.pattern), dim=dim))
        moved = [
            rearrange(part, f"{right} -> {left}", **used)
            for part, (left, right, used) in zip(parts, self._equations, strict=True)
        ]
        if pattern.ragged:
            return self._join(rule.source, bool(rule.stacked), moved)
        return list(moved[0].unbind(0)) if rule.stacked else moved

    def _widths(self, pattern: Pattern) -> list[int]:
        return [prod(_length(a, self._sizes) for a in part) for part in pattern.pieces]

    def _join(self, ref: Ref, several: bool, parts: Sequence[Tensor]) -> list[Tensor]:
        import torch

        assert ref.pattern is not None
        lead = 1 if several else 0
        x = torch.cat(list(parts), dim=lead + ref.pattern.ragged_dim)
        x = x.reshape(*x.shape[:lead], *ref.pattern.shape(self._sizes))
        return list(x.unbind(0)) if several else [x]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.stack(list(tensors))


def _einops(dims: Sequence[tuple[str, ...]], both: set[str]) -> str:
    def word(axis: str) -> str:
        return axis if axis in both else "1"

    return " ".join(
        word(dim[0]) if len(dim) == 1 else f"({' '.join(word(a) for a in dim)})" for dim in dims
    )
