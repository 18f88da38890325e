"""One static page of all that was measured: no server, no script; light, dark, and on a phone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from zoo.parity.drawing import svg
from zoo.parity.evidence import DTYPES, Evidence, Measured, Run

# what a column shows, and the checks whose worst it is
COLUMNS = {
    "fp64": ("fp64", "headless", "anew"),
    "fp32": ("fp32", "top-1"),
    "bf16": ("bf16", "KL"),
    "gradients": ("gradients",),
    "padding": ("padding", "batch"),
    "cache": ("cache",),
    "export": ("export",),
    "forms": ("layouts",),
}
ABOUT = {
    "fp64": "largest difference from the reference in fp64, in units of the root mean square",
    "fp32": "error against fp64, as a multiple of the reference's own",
    "bf16": "likewise",
    "gradients": "in fp64, of every parameter",
    "padding": "rows padded left, right and on both sides against rows alone",
    "cache": "a sequence in parts against the whole, cut at every place",
    "export": "saved again: files, names, dtypes and bytes",
    "forms": "with prefix and without, legacy names, shards, .bin: loaded and given back",
}

TRIPS = (
    "Converted and converted back. bytes: every file is what it was; weights: those of the weights "
    "are, and a config has other words; values: equal tensors and logits; a number: how far logits "
    "were off, and the type they were rounded to; no: refused, by what cannot be said there."
)

STYLE = """
:root { color-scheme: light dark; --page: #fdfdfb; --ink: #1d1f21; --soft: #5c6166;
  --line: #d9dad6; --box: #f1f2ee; --good: #1a7f37; --bad: #b3261e; --warm: 200 90 30; }
@media (prefers-color-scheme: dark) { :root { --page: #16181a; --ink: #e6e6e3; --soft: #9aa0a6;
  --line: #34383c; --box: #212427; --good: #57c274; --bad: #ff8a80; --warm: 240 140 70; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem; max-width: 76rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 0; display: inline }
h3 { font-size: .95rem; margin: 1.2rem 0 .4rem } p { margin: .4rem 0; color: var(--soft) }
.wide { overflow-x: auto } a { color: inherit }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--page) }
td.left { text-align: left } thead th { color: var(--soft); font-weight: 600 }
.good { color: var(--good) } .bad { color: var(--bad); font-weight: 600 }
details { border: 1px solid var(--line); border-radius: 8px; margin: .7rem 0; padding: .6rem .9rem }
summary { cursor: pointer } details details { border: 0; padding: 0; margin: .3rem 0 }
code, .rules td { font-family: ui-monospace, monospace; font-size: .8rem; text-align: left }
.drawings { display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start }
.drawings figure { margin: 0; flex: 1 1 260px; max-width: 320px } figcaption { color: var(--soft) }
svg { width: 100%; height: auto } svg text { fill: var(--ink); font: 13px system-ui, sans-serif }
svg .small { fill: var(--soft); font-size: 9.5px } .node { fill: var(--box); stroke: var(--line) }
.wire { fill: none; stroke: var(--soft); stroke-width: 1.3 }
@media (max-width: 40rem) { body { padding: .7rem; font-size: 14px }
  th, td { padding: .25rem .4rem } }
"""


def page(run: Run) -> str:
    """HTML, whole."""
    used = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    variants = sum(each.variants for each in run.architectures)
    told = "all within their limits" if run.ok else "NOT all within their limits"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>zoo: parity, {run.date}</title><style>{STYLE}</style></head><body>",
            "<h1>zoo: what was measured</h1>",
            tag(
                "p",
                f"{run.date}. {len(run.architectures)} architectures, {variants} variants: "
                f"{tag('span', told, class_=_class(run.ok))}. {escape(used)}.",
            ),
            *_matrix(run.architectures),
            *(line for each in run.architectures for line in _chapter(each)),
            "</body></html>",
        ]
    )


def tag(name: str, inside: str, **attributes: str) -> str:
    """`class_` is class; attributes are escaped, what is inside is HTML already."""
    said = "".join(f' {k.rstrip("_")}="{escape(v)}"' for k, v in attributes.items())
    return f"<{name}{said}>{inside}</{name}>"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], **attributes: str) -> str:
    """Of cells that are HTML already; it scrolls where the page is narrow."""
    first = tag("thead", tag("tr", "".join(head)))
    body = tag("tbody", "\n".join(tag("tr", "".join(row)) for row in rows))
    return tag("div", tag("table", first + body, **attributes), class_="wide")


def _matrix(found: Iterable[Evidence]) -> Iterable[str]:
    columns = [tag("th", name, title=ABOUT[name]) for name in COLUMNS]
    heads = [tag("th", name) for name in ("architecture", "variants", "loads")]
    more = [tag("th", name) for name in ("round trips exact", "mutants killed")]
    yield table([*heads, *columns, *more], map(_row, found))
    yield tag("p", "Each number is the worst of all variants. What is beyond its limit is named.")


def _row(each: Evidence) -> Iterable[str]:
    loads = "load" not in each.checks and "reference" not in each.checks
    yield tag("td", tag("a", each.name, href=f"#{each.name}"))
    yield tag("td", str(each.variants))
    yield tag("td", "all" if loads else "no", class_=_class(loads))
    for names in COLUMNS.values():
        yield _cell([each.checks[name] for name in names if name in each.checks])
    trips = [shown for by in each.trips.values() for shown in by.values()]
    exact = sum(shown in ("bytes", "weights", "values") for shown in trips)
    told = f"round trips between {', '.join(each.trips)}; wrong: {', '.join(each.wrong) or 'none'}"
    yield tag("td", f"{exact} of {len(trips)}", class_=_class(not each.wrong), title=told)
    status = list(each.mutants.values())
    killed, planted = status.count("killed"), len(status) - status.count("n.a.")
    good = _class(killed == planted)
    yield tag("td", f"{killed} of {planted}", class_=good) if status else tag("td", "–")


def _cell(measured: list[Measured]) -> str:
    if not measured:
        return tag("td", "–")
    failed = [variant for each in measured for variant in each.failed]
    worst = next((each for each in measured if each.failed), measured[0])
    shown = f"{worst.shown} ({', '.join(failed[:3])})" if failed else worst.shown
    about = f"{worst.count} measured, limit {worst.limit:g}, the worst of them {worst.variant}"
    return tag("td", escape(shown), class_=_class(not failed), title=about)


def _class(good: bool) -> str:
    return "good" if good else "bad"


def _chapter(each: Evidence) -> Iterable[str]:
    took = f", {each.seconds:.0f} s" if each.seconds else ""
    yield f'<details id="{each.name}">'
    yield tag("summary", f"{tag('h2', each.name)} variants: {each.variants}{took}")
    yield tag("div", "".join(_drawings(each)), class_="drawings")
    yield tag("h3", "Error, by part and dtype") + _heat(each)
    yield tag("h3", "Round trips: from, to") + _trips(each) + tag("p", TRIPS)
    yield tag("h3", "Facts") + tag("p", " ".join(_facts(each)))
    for dialect, rules in each.rules.items():
        told = table(
            [tag("th", "in its files"), tag("th", "in the model")],
            ([tag("td", escape(source)), tag("td", escape(target))] for source, target in rules),
        )
        about = tag("summary", f"{escape(dialect)}: {len(rules)} rules")
        yield tag("details", about + told, class_="rules")
    if each.mutants:
        rows = [
            [tag("td", escape(bug)), tag("td", status, class_=_class(status == "killed"))]
            for bug, status in each.mutants.items()
            if status != "n.a."
        ]
        yield tag("details", tag("summary", "Planted bugs") + table([], rows))
    yield "</details>"


def _drawings(each: Evidence) -> Iterable[str]:
    for name, nodes in each.drawings.items():
        told = tag("figcaption", f"{escape(name)}, as it ran")
        yield tag("figure", svg(nodes, f"{each.name}: {name}") + told)


def _facts(each: Evidence) -> Iterable[str]:
    largest = tag("code", escape(each.largest))
    yield f"The first variant holds {each.parameters:,} parameters; the largest: {largest}."
    if each.slowest:
        yield f"The slowest variant to prove: {escape(each.slowest)}."
    name, near = max(each.checks.items(), key=lambda item: _share(item[1]))
    yield f"Nearest to its limit: {escape(name)} of {escape(near.variant)}, {escape(near.shown)}."


def _share(measured: Measured) -> float:
    value = math.inf if measured.value is None else measured.value
    return value / measured.limit if measured.limit else value


def _heat(each: Evidence) -> str:
    """Parts across, dtypes down; the darker, the nearer to the limit."""
    parts = list(dict.fromkeys(part for by in each.heat.values() for part in by))
    rows = [
        [tag("td", dtype), *(_warm(*each.heat[dtype].get(part, (0.0, 1.0))) for part in parts)]
        for dtype in DTYPES
        if dtype in each.heat
    ]
    return table([tag("th", ""), *(tag("th", escape(part)) for part in parts)], rows)


def _trips(each: Evidence) -> str:
    """What came back of files in each dialect, by way of each other: bytes, weights, values …"""
    targets = list(dict.fromkeys(to for by in each.trips.values() for to in by))
    rows = [
        [tag("td", source), *(tag("td", escape(by.get(to, ""))) for to in targets)]
        for source, by in each.trips.items()
    ]
    return table([tag("th", ""), *(tag("th", to) for to in targets)], rows)


def _warm(error: float, limit: float) -> str:
    """Eight powers of ten below the limit and less are cold."""
    share = 1 + math.log10(error / limit) / 8 if error else 0.0
    colour = f"background: rgb(var(--warm) / {0.8 * min(1.0, max(0.0, share)):.2f})"
    return tag("td", f"{error:.1e}", style=colour, title=f"limit {limit:.1e}")
