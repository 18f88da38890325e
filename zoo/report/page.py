"""The evidence as one static HTML page, without a server or a script."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from html import escape
from typing import Any

from converters.spec import load_spec
from zoo import evidence, registry
from zoo.errors import counted
from zoo.report import spec_tables
from zoo.report.gather import DTYPES, Evidence, Measured, Run
from zoo.report.html import STYLE, cells, folded, table, tag
from zoo.report.wiring import svg

# column -> the checks of which it shows the worst
COLUMNS = {
    "fp64": ("fp64", "headless", "from scratch"),
    "fp32": ("fp32", "top-1"),
    "bf16": ("bf16", "KL"),
    "gradients": ("gradients",),
    "padding": ("padding", "batch"),
    "cache": ("cache", "cached"),
    "export": ("export",),
    "layouts": ("layouts",),
    "golden": ("golden",),
}
ABOUT = {
    "loads": "variants that load, of all",
    "fp64": "largest difference from the reference in fp64, in units of the root mean square",
    "fp32": "error against fp64, and as a multiple of the reference's own",
    "bf16": "error against fp64, and as a multiple of the reference's own",
    "gradients": "difference of every parameter's gradient, in fp64",
    "padding": "rows padded left, right and on both sides against rows alone",
    "cache": "a sequence in two parts through the KV cache against the whole, at every split",
    "export": "variants saved again with equal files, names, dtypes and bytes",
    "layouts": "other file layouts (prefix, legacy names, shards, .bin), loaded and written back",
    "golden": "largest difference from outputs that a checkpoint's authors published",
}
PARTS = {"parity": "Parity", "bugs": "Planted bugs", "trips": "Round trips"}
BUGS = ("planted", "killed", "located", "diagnosed")
TRIPS = ("bytes", "weights", "values", "lossy", "refused", "wrong")
BUGS_ABOUT = (
    "Planted bugs, one at a time. Killed: a check of this page fails. Located: zoo diff names the "
    "right module. Diagnosed: the first cause that it names is the right one."
)
MANY = 20  # failures listed in the summary
TRIPS_ABOUT = (
    "Files converted from the dialect of a row to that of a column, and back. bytes: every file is "
    "equal; weights: the files of weights are equal, the config is worded differently; values: "
    "equal tensors and logits; lossy: a number is the difference of the logits, with the type they "
    "were rounded to; refused (no): with what the dialect cannot express."
)


def page(run: Run) -> str:
    """The whole page as HTML."""
    architectures = run.architectures
    title = ", ".join(
        dict.fromkeys(["zoo: parity", *(each.stamp["date"] for each in architectures)])
    )
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
            "<h1>zoo: evidence</h1>",
            *_summary(run),
            *(_matrix(architectures) if architectures else ()),
            *(line for each in architectures for line in _chapter(each)),
            "</body></html>",
        ]
    )


def _summary(run: Run) -> Iterator[str]:
    architectures = run.architectures
    if not architectures:
        yield tag("p", "Nothing was measured.")
        return
    variants = sum(each.variants for each in architectures)
    failures = [line for each in architectures for line in _failures(each, link=True)]
    text = "NOT all within limits" if failures else "all within limits"
    dates = ", ".join(dict.fromkeys(each.stamp["date"] for each in architectures))
    yield tag(
        "p",
        f"{dates}. {counted(len(architectures), 'architecture')}, {counted(variants, 'variant')}: "
        f"{tag('span', text, class_=_class(not failures))}.",
    )
    if more := failures[MANY:]:
        failures[MANY:] = [tag("li", f"and {len(more)} more, below", class_="bad")]
    if failures:
        yield tag("ul", "".join(failures))


def _failures(each: Evidence, link: bool = False) -> Iterator[str]:
    """A line for each failure, those of recorded bugs and round trips included."""
    name = tag("a", escape(each.name), href=f"#{_place(each)}") + ", " if link else ""
    for check, measured in each.checks.items():
        for variant, why in measured.failed.items():
            limit = f" (at most {measured.limit:g})" if measured.limit else ""
            text = f"{check} of {variant}: {why}{limit}"
            yield tag("li", name + escape(text), class_="bad")
    if each.unseen:
        yield tag("li", f"{name}no wiring diagram: {escape(each.unseen)}", class_="bad")
    for bug, became in (each.bugs or {}).get("bugs", {}).items():
        if "refused" not in became and not became.get("killed"):
            yield tag("li", f"{name}planted bug survived: {escape(bug)}", class_="bad")
    for trip, why in (each.trips or {}).get("wrong", {}).items():
        yield tag("li", name + escape(f"round trip, {trip}: {why}"), class_="bad")


# --- the matrix ----------------------------------------------------------------------------------


def _matrix(architectures: list[Evidence]) -> Iterator[str]:
    columns = [
        name for name, of in COLUMNS.items() if any(set(of) & {*e.checks} for e in architectures)
    ]
    groups = {"parity": 2 + len(columns), "planted bugs": 5, "round trips": 7}
    over = [tag("th", "")]
    over += [tag("th", n, class_="group", colspan=str(count)) for n, count in groups.items()]
    head = ("architecture", "loads", *columns, "measured")
    head += (*BUGS, "measured", *TRIPS, "measured")
    above = tag("tr", "".join(over))
    yield table(head, (_row(each, columns) for each in architectures), "matrix", above)
    yield tag(
        "p",
        "Each number is the worst of all variants; limits stand below. Failures name their "
        "variant. A dash: not applicable (an encoder has no cache), or the variant does not load.",
    )
    listed = [f"{tag('b', n)}: {escape(ABOUT[n])}" for n in ("loads", *columns)]
    yield folded("Columns", tag("p", ". ".join(listed) + ".") + tag("p", BUGS_ABOUT))
    yield tag(
        "ul",
        "".join(tag("li", line) for line in (*_with(architectures), *_extremes(architectures))),
    )


def _row(each: Evidence, columns: Iterable[str]) -> Iterator[str]:
    yield tag("td", tag("a", escape(each.name), href=f"#{_place(each)}"))
    loads = f"{each.loaded} of {each.variants}"
    yield tag("td", loads, class_=f"group {_class(each.loaded == each.variants)}")
    for column in columns:
        names = [name for name in COLUMNS[column] if name in each.checks]
        yield _cell([each.checks[name] for name in names])
    yield _date("parity", each.name, each.stamp)
    yield from _bugs_cells(each)
    yield from _trips_cells(each)


def _cell(measured: list[Measured]) -> str:
    if not measured:
        return tag("td", "–")
    worst = next((each for each in measured if each.failed), measured[0])
    shown = worst.shown
    if worst.failed:
        names = [*dict.fromkeys(variant for each in measured for variant in each.failed)]
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        shown = f"{escape(shown)}<br>{escape(', '.join(names[:2]))}{more}"
    elif worst.shown == "equal":  # of an export, which has no error to show
        shown = f"{worst.count} of {worst.count}"
    else:
        shown = escape(shown).replace(" ", "<br>") if shown.endswith("x") else escape(shown)
    about = f"{worst.count} measured, limit {worst.limit:g}, worst: {worst.variant}"
    return tag("td", shown, class_=_class(not worst.failed), title=about)


def _bugs_cells(each: Evidence) -> Iterator[str]:
    if each.bugs is None:
        yield tag("td", "not run", class_="group old", colspan=str(len(BUGS) + 1))
        return
    counts = bug_counts(each.bugs)
    for n, name in enumerate(BUGS):
        good = counts[name] >= counts["planted"] * (0.9 if name == "diagnosed" else 1)
        yield tag("td", str(counts[name]), class_=_class(good) if n else "group")
    yield _date("bugs", each.name, each.bugs)


def bug_counts(bugs: Mapping[str, Any]) -> dict[str, int]:
    """Counts of bugs planted, killed, located, diagnosed; without those refused at loading."""
    ran = [bug for bug in bugs["bugs"].values() if "refused" not in bug]
    return {"planted": len(ran)} | {n: sum(bool(b.get(n)) for b in ran) for n in BUGS[1:]}


def _trips_cells(each: Evidence) -> Iterator[str]:
    if each.trips is None:
        yield tag("td", "not run", class_="group old", colspan=str(len(TRIPS) + 1))
        return
    counts = each.trips["counts"]
    for n, name in enumerate(TRIPS):
        count = counts.get(name, 0)
        look = _class(not count) if name == "wrong" else "" if n else "group"
        yield tag("td", str(count), class_=look)
    yield _date("trips", each.name, each.trips)


def _date(section: str, name: str, entry: Mapping[str, Any]) -> str:
    text = evidence.when(section, name, entry)
    return tag("td", escape(text), class_="" if text == entry["date"] else "old")


def _with(architectures: Iterable[Evidence]) -> Iterator[str]:
    """The versions that each section was measured with."""
    architectures = list(architectures)
    stamps = {
        "parity": [each.stamp for each in architectures],
        "bugs": [each.bugs for each in architectures if each.bugs],
        "trips": [each.trips for each in architectures if each.trips],
    }
    for section, entries in stamps.items():
        left = len(architectures) - len(entries)
        also = f"; not run for {counted(left, 'architecture')}" if entries and left else ""
        used = dict.fromkeys(
            ", ".join(f"{name} {number}" for name, number in entry["versions"].items())
            for entry in entries
        )
        text = " or ".join(used) or f"not run; {evidence.SECTIONS[section]} does"
        yield escape(f"{PARTS[section]}: {text}{also}.")


def _extremes(architectures: Iterable[Evidence]) -> Iterator[str]:
    """The slowest variant and the largest checkpoint."""
    took = {f"{each.name}/{v}": t for each in architectures for v, t in each.seconds.items()}
    if took:
        slowest = max(took, key=lambda name: took[name])
        total = _time(sum(took.values()))
        yield escape(f"Slowest variant: {slowest}, {_time(took[slowest])} of {total} in total.")
    if largest := _largest({each.name for each in architectures}):
        yield f"Largest named checkpoint: {largest}."


def _largest(names: Collection[str]) -> str:
    named = [c for c in registry.checkpoints().values() if c.architecture in names]
    most = max(named, key=lambda c: c.parameters, default=None)
    return escape(f"{most.name}, {most.parameters:,} parameters") if most else ""


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.1f} s"


def _class(good: bool) -> str:
    return "good" if good else "bad"


# --- an architecture -----------------------------------------------------------------------------


def _place(each: Evidence) -> str:
    """An HTML id."""
    return "of-" + "".join(c if c.isalnum() else "-" for c in each.name)


def _chapter(each: Evidence) -> Iterator[str]:
    total = sum(each.seconds.values())
    took = f", {_time(total)}" if total else ""
    failures = "".join(_failures(each))
    entry = registry.architectures().get(each.name)
    parts = [
        tag("ul", failures) if failures else "",
        tag("div", "".join(_drawings(each)), class_="drawings") if each.drawings else "",
        tag("h3", "Error, by part and dtype") + _heat(each) if each.heat else "",
        tag("h3", "Checks") + _checks(each),
        tag("h3", f"Round trips ({escape(evidence.when('trips', each.name, each.trips))})"),
        _trips(each) if each.trips else "",
        tag("h3", f"Planted bugs ({escape(evidence.when('bugs', each.name, each.bugs))})"),
        _bugs(each) if each.bugs else "",
        tag("h3", "Facts") + tag("p", " ".join(_facts(each))),
        tag("h3", "Spec") + spec_tables.shown(load_spec(entry.spec)) if entry else "",
    ]
    about = f"{tag('h2', escape(each.name))} variants: {each.variants}{took}"
    # failures are open; a link to an id inside opens the section without a script
    inside = tag("div", "".join(parts), id=_place(each))
    yield folded(about, inside, open="open" if failures else "")


def _drawings(each: Evidence) -> Iterator[str]:
    for name, nodes in each.drawings.items():
        text = tag("figcaption", f"wiring of {escape(name)}")
        yield tag("figure", svg(nodes, f"{each.name}: {name}") + text)


def _checks(each: Evidence) -> str:
    head = ("check", "worst", "limit", "of", "measured", "failed")
    rows = (
        cells(name, m.shown, f"{m.limit:g}", m.variant, m.count, len(m.failed))
        for name, m in each.checks.items()
    )
    return table(head, rows)


def _trips(each: Evidence) -> str:
    assert each.trips is not None
    by = each.trips["trips"]
    targets = list(dict.fromkeys(to for one in by.values() for to in one))

    def rows(variants: bool) -> list[list[str]]:
        named = {s: one for s, one in by.items() if s.startswith("hf: ") == variants}
        return [cells(s, *(one.get(to, "") for to in targets)) for s, one in named.items()]

    head, counts = ("from, to", *targets), each.trips["counts"]
    text = ", ".join(f"{count} {name}" for name in TRIPS if (count := counts.get(name)))
    more = rows(variants=True)
    return (
        tag("p", f"{text}. {TRIPS_ABOUT}")
        + table(head, rows(variants=False))
        + (
            folded(
                f"{counted(len(more), 'variant')} as the reference writes them", table(head, more)
            )
            if more
            else ""
        )
    )


def _bugs(each: Evidence) -> str:
    assert each.bugs is not None
    rows = []
    for bug, became in each.bugs["bugs"].items():
        if "refused" in became:
            rows.append(cells(bug, f"refused, {became['refused']}", "", "", ""))
            continue
        killed, short = became.get("killed") or "SURVIVED", became.get("said", "")
        if short and not became.get("located"):
            short = f"{short} (located at {became.get('place') or 'no module'})"
        marks = ["yes" if became.get(name) else "no" for name in BUGS[2:]]
        rows.append(cells(bug, killed, *marks, short))
    counts = bug_counts(each.bugs)
    text = ", ".join(f"{counts[name]} {name}" for name in BUGS)
    return folded(text, table(("bug", "killed by", *BUGS[2:], "reported instead"), rows, "words"))


def _facts(each: Evidence) -> Iterator[str]:
    if each.largest:
        largest = tag("code", escape(each.largest))
        yield f"The first variant has {each.parameters:,} parameters; the largest: {largest}."
    if each.seconds:
        slowest = max(each.seconds, key=lambda variant: each.seconds[variant])
        yield escape(f"Slowest variant: {slowest}, {_time(each.seconds[slowest])}.")
    name, near = max(each.checks.items(), key=lambda item: _share(item[1]))
    yield f"Nearest to its limit: {escape(name)} of {escape(near.variant)}, {escape(near.shown)}."
    if largest := _largest({each.name}):
        yield f"Largest named checkpoint: {largest}."


def _share(measured: Measured) -> float:
    value = math.inf if measured.value is None else measured.value
    return value / measured.limit if measured.limit else value


def _heat(each: Evidence) -> str:
    """Parts across, dtypes down; darker cells are closer to the limit."""
    parts = list(dict.fromkeys(part for by in each.heat.values() for part in by))
    rows = [
        [tag("td", dtype), *(_warm(*each.heat[dtype].get(part, (0.0, 1.0))) for part in parts)]
        for dtype in DTYPES
        if dtype in each.heat
    ]
    return table(("", *parts), rows, "heat")


def _warm(error: float | None, limit: float) -> str:
    """A cell of the heat map; eight powers of ten below the limit have no color."""
    if error is None or error > limit:
        text = "not finite" if error is None else f"{error:.1e}"
        style = "--share: 1"
        return tag("td", f"{text}, limit {limit:.1e}", class_="bad", style=style)
    share = 1 + math.log10(error / limit) / 8 if error else 0.0
    style = f"--share: {max(0.0, share):.2f}"
    return tag("td", f"{error:.1e}", style=style, title=f"limit {limit:.1e}")
