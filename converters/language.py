"""The mapping language: names whose indices are axes, patterns as einops writes them.

A rule `source ref: target ref` (or a list of target refs) is parsed into a `Rule`. With every
size known it becomes a `Transform`, which carries arrays from source to target and back without
losing a bit. Nothing here knows of files or models; torch is imported only when arrays move.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from converters.lazy import Lazy, Patch, moved
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

    def forward(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """Source tensors in grid order to target tensors, target by target in grid order."""
        return [array.whole() for array in self.targets_of(sources)]

    def backward(self, targets: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `forward`: target tensors in its order to source tensors in grid order."""
        return [array.whole() for array in self.sources_of(targets)]

    def coordinates(self, axis: int) -> list[Tensor]:
        """Targets that hold, of each number, where it stands along an axis of its source."""
        import torch

        shape = self.source_shape()
        along = torch.arange(shape[axis], dtype=torch.int32)
        along = along.view([-1 if d == axis else 1 for d in range(len(shape))]).expand(shape)
        return self.forward([along] * self._sides[0].count)

    def owners(self) -> list[Tensor]:
        """Targets that hold, of each number, which of the sources it is from."""
        import torch

        shape = self.source_shape()
        count = self._sides[0].count
        return self.forward([torch.full(shape, n, dtype=torch.int32) for n in range(count)])

    def targets_of(self, sources: Sequence[Tensor | Lazy]) -> list[Lazy]:
        """`forward` without a copy: arrays that are made as they are asked for."""
        return moved(partial(self._move, self._sides[0], self._sides[1]), sources)

    def sources_of(self, targets: Sequence[Tensor | Lazy]) -> list[Lazy]:
        return moved(partial(self._move, self._sides[1], self._sides[0]), targets)

    @cached_property
    def _sides(self) -> tuple[_Side, _Side]:
        rule = self.rule
        left = _Side((rule.source,), (tuple(rule.stacked),), self)
        return left, _Side(rule.targets, tuple(tuple(rule.spread(t)) for t in rule.targets), self)

    def _move(self, here: _Side, there: _Side, tensors: Sequence[Tensor]) -> list[Lazy]:
        """Every part of every tensor `here`, turned into its place `there`."""
        assert self.rule.source.pattern is not None
        parts: list[list[Patch]] = [[] for _ in range(there.count)]
        for k in range(len(self.rule.source.pattern.pieces) or 1):
            mine, other = here.place(k), there.place(k)
            views = [
                (dict(zip(mine.index, point, strict=True)), mine.view(tensors[mine.first + n]))
                for n, point in enumerate(mine.points)
            ]
            if other.hides(mine.index):  # such tensors make one axis of several: they are joined
                views = [({}, _stack([view for _, view in views], mine.lengths))]
                mine = mine.joined()
            for point, view in views:
                for n, corner in enumerate(other.points):
                    chosen = dict(zip(other.index, corner, strict=True))
                    parts[other.first + n].append(other.part(view, mine.axes, point, chosen))
        return [
            Lazy(shape, space, found)
            for (shape, space), found in zip(there.layout(), parts, strict=True)
        ]

    def length(self, node: Node) -> int:
        return _length(node, self._sizes)


@dataclass(frozen=True)
class _Side:
    """One side of a rule: its refs, and the placeholders of each that are axes."""

    refs: tuple[Ref, ...]
    index: tuple[tuple[str, ...], ...]
    of: Transform

    def points(self, n: int) -> list[tuple[int, ...]]:
        ranges = [range(self.of._sizes[name]) for name in self.index[n]]
        return list(product(*ranges))

    @property
    def count(self) -> int:
        """How many tensors there are."""
        return sum(len(self.points(n)) for n in range(len(self.refs)))

    def place(self, k: int) -> _Place:
        """Where part `k` lies."""
        n = k if len(self.refs) > 1 else 0
        first = sum(len(self.points(m)) for m in range(n))
        pattern = self.refs[n].pattern
        assert pattern is not None
        dims = pattern.choose(k if pattern.ragged else 0)
        return _Place(pattern, k, dims, self.index[n], tuple(self.points(n)), first, self.of)

    def layout(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(shape, space) of each tensor."""
        for n, ref in enumerate(self.refs):
            assert ref.pattern is not None
            place = self.place(n)
            for _ in place.points:
                yield ref.pattern.shape(self.of._sizes), place.space


@dataclass(frozen=True)
class _Place:
    """A part in the tensors of one ref: its axes there, one by one."""

    pattern: Pattern
    k: int
    dims: tuple[tuple[str, ...], ...]
    index: tuple[str, ...]
    points: tuple[tuple[int, ...], ...]
    first: int
    of: Transform

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(axis for dim in self.dims for axis in dim)

    @property
    def lengths(self) -> list[int]:
        return [self.of._sizes[name] for name in self.index]

    def joined(self) -> _Place:
        return replace(self, dims=tuple((name,) for name in self.index) + self.dims, index=())

    @cached_property
    def _ragged(self) -> tuple[str, ...]:
        """The axes of the ragged axis's own part, which are one axis of the space."""
        return self.pattern.pieces[self.k] if self.pattern.ragged else ()

    def hides(self, index: Sequence[str]) -> bool:
        return any(name in self._ragged for name in index)

    @cached_property
    def _offset(self) -> int:
        pieces = self.pattern.pieces[: self.k] if self.pattern.ragged else ()
        return sum(prod(self.of.length(axis) for axis in piece) for piece in pieces)

    @cached_property
    def _width(self) -> int:
        return prod(self.of.length(axis) for axis in self._ragged)

    @cached_property
    def space(self) -> tuple[int, ...]:
        """Every axis apart, but the ragged one whole."""
        out: list[int] = []
        for n, dim in enumerate(self.dims):
            if self.pattern.ragged and n == self.pattern.ragged_dim:
                node = next(x for d in self.pattern.dims for x in d if isinstance(x, Ragged))
                out.append(self.of.length(node))
            else:
                out += [self.of.length(axis) for axis in dim]
        return tuple(out)

    def view(self, tensor: Tensor) -> Tensor:
        """The part of a whole tensor, each of its axes apart."""
        x = tensor.reshape(self.pattern.apart(self.of._sizes))
        if self.pattern.ragged:
            x = x.narrow(self.pattern.ragged_dim, self._offset, self._width)
        return x.reshape([self.of.length(axis) for axis in self.axes])

    def part(
        self, view: Tensor, axes: Sequence[str], point: Mapping[str, int], chosen: Mapping[str, int]
    ) -> Patch:
        """A view of such axes as it stands here, in the tensor that `chosen` names."""
        left = list(axes)
        for axis in reversed(range(len(left))):
            if left[axis] in chosen:
                view = view.select(axis, chosen[left.pop(axis)])
            elif left[axis] not in self.axes or left[axis] == "1":
                view, _ = view.squeeze(axis), left.pop(axis)
        order = [axis for axis in self.axes if axis in left]
        view = view.permute([left.index(axis) for axis in order])
        box: list[slice] = []
        for n, name in enumerate(self.axes):
            start = point.get(name, 0)
            if name not in order:
                view = view.unsqueeze(n)
            box.append(slice(start, start + view.shape[n]))
        if self.pattern.ragged:
            d = sum(len(dim) for dim in self.dims[: self.pattern.ragged_dim])
            shape = view.shape
            view = view.reshape(*shape[:d], self._width, *shape[d + len(self._ragged) :])
            box[d : d + len(self._ragged)] = [slice(self._offset, self._offset + self._width)]
        return Patch(tuple(box), view)


def _stack(views: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    import torch

    return torch.stack(list(views)).unflatten(0, list(lengths))
