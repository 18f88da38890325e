"""A spec as HTML tables: the names of tensors and config fields in each dialect."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from converters.language import Rule
from converters.spec import Dialect, Spec
from zoo.report.html import cells, folded, table


def shown(spec: Spec) -> str:
    """One folded table for each dialect of a spec."""
    return "".join(_dialect(dialect) for dialect in spec.dialects.values())


def _dialect(dialect: Dialect) -> str:
    lines, fields = [*_lines(dialect)], [*_fields(dialect)]
    about = f" ({dialect.container.about})" if dialect.container and dialect.container.about else ""
    note = f"{dialect.name}{about}: {len(lines)} tensor rules, {len(fields)} config fields"
    parts = [
        table(
            ("name in the files", "name in the model", ""),
            (cells(*each) for each in lines),
            "rules",
        )
    ]
    if fields:
        head = ("field in its config", "field in the model", "")
        parts.append(table(head, (cells(*each) for each in fields), "rules"))
    return folded(escape(note), "".join(parts))


def _lines(dialect: Dialect) -> Iterator[tuple[str, str, str]]:
    if dialect.prefix:
        yield f"{dialect.prefix}…", "", "optional prefix of all names"
    yield from _rules(dialect.weights, "")
    for when in dialect.when:
        note = f"if {when.field}" if when.holds else f"if not {when.field}"
        yield from _rules(when.weights, note)
        yield from _rules(when.heads, f"{note} and the model has this head")
    yield from _rules(dialect.alternatives, "alternative, if it is in the files")
    yield from _rules(dialect.heads, "if the model has this head")
    for one, other in dialect.tied:
        yield str(one), str(other), "tied: two names of one array"
    for old, new in dialect.aliases:
        yield str(old), str(new), "legacy name, read and never written"
    for name, why in dialect.drop:
        yield str(name), "", f"dropped: {why}"
    for suffix, why in dialect.slots.items():
        yield f"…{suffix}", "", f"dropped: {why}"


def _rules(rules: tuple[Rule, ...], note: str) -> Iterator[tuple[str, str, str]]:
    for rule in rules:
        yield str(rule.source), ", ".join(map(str, rule.targets)), note


def _fields(dialect: Dialect) -> Iterator[tuple[str, str, str]]:
    for name, paths in dialect.config.items():
        words = "; ".join(f"{theirs!r} is {mine!r}" for theirs, mine in dialect.words.get(name, ()))
        missing = f"{dialect.defaults[name]!r} if missing" if name in dialect.defaults else ""
        yield " or ".join(paths), name, "; ".join(filter(None, (words, missing)))
    for name, value in dialect.defaults.items():
        if name not in dialect.config:
            yield "", name, f"always {value!r}"
    for name, values in dialect.require.items():
        yield name, "", f"only {' or '.join(map(repr, values))}"
    if dialect.ignore:
        yield ", ".join(sorted(dialect.ignore)), "", "ignored: does not change inference"
    for group in dialect.exclusive:
        yield ", ".join(group), "", "mutually exclusive"
    if dialect.needs:
        yield "", ", ".join(dialect.needs), "must be given: the files do not state it"
    if dialect.forgets:
        yield "", ", ".join(sorted(dialect.forgets)), "not written: inference does not need it"
