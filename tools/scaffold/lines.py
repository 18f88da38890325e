"""Rules as lines of a spec: expand them to single names, test them, and collapse them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product, takewhile
from typing import Any

from converters.language import NUMBER_WORDS, Placeholder, Ref, Rule, Template, parse_rule, solve
from converters.plan import Native
from scaffold.text import quoted


@dataclass
class Line:
    """One rule of the draft as text, with a note for the person who completes it."""

    source: str
    targets: str | list[str]
    head: bool = False
    note: str = ""

    @property
    def rule(self) -> Rule:
        return parse_rule(self.source, self.targets)

    def text(self) -> list[str]:
        out = [f"  # {self.note}"] if self.note else []
        if isinstance(self.targets, str):
            return [*out, f"  {quoted(self.source)}: {quoted(self.targets)}"]
        return [
            *out,
            f"  {quoted(self.source)}:",
            *(f"    - {quoted(t)}" for t in self.targets),
        ]


def elementary(rule: Rule) -> list[Rule]:
    """Expand a rule to one rule for each value of the enumerations on both sides."""
    listed = {n: p for n, p in rule.loops.items() if p.values}

    def chosen(ref: Ref, at: Mapping[str, int]) -> Ref:
        parts: list[str | Placeholder] = []
        for part in ref.name.parts:
            if isinstance(part, Placeholder) and part.name in at:
                part = part.spell(at[part.name])
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            else:
                parts.append(part)
        return Ref(Template(tuple(parts)), ref.pattern)

    points = [
        dict(zip(listed, point, strict=True))
        for point in product(*(range(len(p.values)) for p in listed.values()))
    ]
    return [
        Rule(chosen(rule.source, at), tuple(chosen(t, at) for t in rule.targets)) for at in points
    ]


def reads(
    rule: Rule,
    disk: Mapping[str, tuple[tuple[int, ...], bool]],
    native: Native,
    used: set[str],
    filled: set[str],
) -> bool:
    """Return whether the rule maps a name on disk to the model; add to `used` and `filled`."""
    matched = False
    for name, (shape, _) in disk.items():
        if name in used or (binding := rule.source.name.match(name)) is None:
            continue
        targets = []
        for target in rule.targets:
            spread = rule.spread(target)
            for point in product(*(range(len(p.values) or 1) for p in spread.values())):
                into = target.name.format({**binding, **dict(zip(spread, point, strict=True))})
                targets.append((into, target, native.shapes.get(native.ties.get(into, into))))
        if any(size is None for _, _, size in targets) or not _solves(rule, shape, targets):
            continue
        used.add(name)
        filled.update(native.ties.get(into, into) for into, _, _ in targets)
        matched = True
    return matched


def _solves(rule: Rule, shape: tuple[int, ...], targets: Sequence[tuple[str, Ref, Any]]) -> bool:
    if rule.source.pattern is None:
        return all(size == shape for _, _, size in targets)
    sizes = dict(NUMBER_WORDS)
    for ref in (rule.source, *rule.targets):
        sizes.update({n: len(p.values) for n, p in ref.name.placeholders.items() if p.values})
    for _, ref, size in targets:
        if ref.pattern is None or solve(ref.pattern, size, sizes):
            return False
    return solve(rule.source.pattern, shape, sizes) is None


def collapse(rules: Sequence[Rule]) -> list[tuple[str, str | list[str]]]:
    """Collapse rules to few lines: weight with bias, then names that differ in one component."""
    out: list[tuple[str, str | list[str]]] = []
    stems: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for rule in rules:
        if not rule.plain or len(rule.targets) > 1:
            texts = [str(t) for t in rule.targets]
            out.append((str(rule.source), texts[0] if len(texts) == 1 else texts))
            continue
        here, _, leaf = str(rule.source.name).rpartition(".")
        there, _, into = str(rule.targets[0].name).rpartition(".")
        stems.setdefault((here, there), []).append((leaf, into))
    items: list[_Item] = [(s.split("."), t.split("."), tuple(p)) for (s, t), p in stems.items()]
    while items:
        first = items[0]
        groups = [
            (i, j, [o for o in items if _differs(first, o, i, j)])
            for i in range(1, len(first[0]))  # names are not told apart by their first word alone
            for j in range(1, len(first[1]))
        ]
        i, j, group = max(groups, key=lambda g: len(g[2]), default=(0, 0, [first]))
        items = [item for item in items if item not in group]
        source, target, leaves = list(first[0]), list(first[1]), first[2]
        if len(group) > 1:
            source[i] = _enumerated("n", [s[i] for s, _, _ in group])
            target[j] = _enumerated("n", [t[j] for _, t, _ in group])
        ends = [_enumerated("p", [pair[k] for pair in leaves]) for k in (0, 1)]
        out.append((".".join([*source, ends[0]]).lstrip("."), ".".join([*target, ends[1]])))
    return out


_Item = tuple[list[str], list[str], tuple[tuple[str, str], ...]]


def _differs(a: _Item, b: _Item, i: int, j: int) -> bool:
    """Return whether two items differ at most in source component i and target component j."""
    if a == b:
        return True
    if a[2] != b[2] or len(a[0]) != len(b[0]) or len(a[1]) != len(b[1]):
        return False
    return all(
        (x[at] != y[at] and "{" not in x[at] + y[at])
        and x[:at] + x[at + 1 :] == y[:at] + y[at + 1 :]
        for x, y, at in ((a[0], b[0], i), (a[1], b[1], j))
    )


def _shared(words: Sequence[str]) -> str:
    """Return the common prefix."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*words, strict=False))
    return "".join(letters[0] for letters in same)


def _enumerated(name: str, words: Sequence[str]) -> str:
    """Return names as an enumeration, such as `{n=q,k,v}_proj`."""
    if len(words) == 1:
        return words[0]
    start = _shared(words)
    start = start if all(w[len(start) :].isdigit() for w in words) else ""
    cut = [w[len(start) :] for w in words]
    end = _shared([w[::-1] for w in cut])[::-1]
    end = end[end.find("_") :] if "_" in end else ""
    return f"{start}{{{name}={','.join(w.removesuffix(end) for w in cut)}}}{end}"
