"""A spec as tables: what each dialect's files call what, and its config's words."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from converters.language import Rule
from converters.spec import Dialect, Spec
from zoo.report.html import cells, folded, table


def shown(spec: Spec) -> str:
    return "".join(_dialect(dialect) for dialect in spec.dialects.values())


def _dialect(dialect: Dialect) -> str:
    lines, fields = [*_lines(dialect)], [*_fields(dialect)]
    about = f" ({dialect.container.about})" if dialect.container and dialect.container.about else ""
    told = f"{dialect.name}{about}: {len(lines)} lines of tensors, {len(fields)} of its config"
    parts = [table(("in its files", "in the model", ""), (cells(*each) for each in lines), "rules")]
    if fields:
        head = ("in its config", "in the model", "")
        parts.append(table(head, (cells(*each) for each in fields), "rules"))
    return folded(escape(told), "".join(parts))


def _lines(dialect: Dialect) -> Iterator[tuple[str, str, str]]:
    if dialect.prefix:
        yield f"{dialect.prefix}…", "", "before names, or not"
    yield from _rules(dialect.weights, "")
    for when in dialect.when:
        told = f"if {when.field}" if when.holds else f"if not {when.field}"
        yield from _rules(when.weights, told)
        yield from _rules(when.heads, f"{told}, and the model has it")
    yield from _rules(dialect.alternatives, "where it is there, instead")
    yield from _rules(dialect.heads, "if the model has it")
    for one, other in dialect.tied:
        yield str(one), str(other), "tied: the same array, both names of files"
    for old, new in dialect.aliases:
        yield str(old), str(new), "an old name of the other, read alone"
    for name, why in dialect.drop:
        yield str(name), "", f"dropped: {why}"
    for suffix, why in dialect.optimizer_slots.items():
        yield f"…{suffix}", "", f"dropped: {why}"


def _rules(rules: tuple[Rule, ...], told: str) -> Iterator[tuple[str, str, str]]:
    for rule in rules:
        yield str(rule.source), ", ".join(map(str, rule.targets)), told


def _fields(dialect: Dialect) -> Iterator[tuple[str, str, str]]:
    for name, paths in dialect.config.items():
        words = "; ".join(
            f"{theirs!r} is {mine!r}" for theirs, mine in dialect.value_map.get(name, ())
        )
        missing = f"{dialect.defaults[name]!r} if left out" if name in dialect.defaults else ""
        yield " or ".join(paths), name, "; ".join(filter(None, (words, missing)))
    for name, value in dialect.defaults.items():
        if name not in dialect.config:
            yield "", name, f"always {value!r}"
    for name, values in dialect.require.items():
        yield name, "", f"only {' or '.join(map(repr, values))}"
    if dialect.ignore:
        yield ", ".join(sorted(dialect.ignore)), "", "read by nothing that computes"
    for group in dialect.exclusive:
        yield ", ".join(group), "", "one of them counts"
    if dialect.required:
        yield "", ", ".join(dialect.required), "to be told: the files do not say it"
    if dialect.lossy_fields:
        yield "", ", ".join(sorted(dialect.lossy_fields)), "not written: inference does not need it"
