"""HTML without a library: tags, tables, and one style sheet for light, dark and narrow screens."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

STYLE = """
:root { color-scheme: light dark; --page: #fdfdfb; --ink: #1d1f21; --soft: #5c6166;
  --line: #d9dad6; --box: #f1f2ee; --good: #1a7f37; --bad: #b3261e; --old: #8a5a00;
  --warm: 200 90 30; --hottest: .55; }
@media (prefers-color-scheme: dark) { :root { --page: #16181a; --ink: #e6e6e3; --soft: #9aa0a6;
  --line: #34383c; --box: #212427; --good: #57c274; --bad: #ff8a80; --old: #e0b050;
  --warm: 240 140 70; --hottest: .45; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem; max-width: 100rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 0; display: inline }
h3 { font-size: .95rem; margin: 1.2rem 0 .4rem }
p, li { margin: .4rem 0; color: var(--soft); max-width: 60rem } li.bad { color: var(--bad) }
.wide { overflow-x: auto } a { color: inherit }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .84rem }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--page) }
.matrix { font-size: .76rem } .matrix th, .matrix td { padding: .3rem .28rem }
td[colspan] { text-align: center }
.rules th { text-align: left } .rules td:nth-child(3) { white-space: normal; min-width: 14rem }
.words td, .words th { text-align: left; white-space: normal }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom }
.group { border-left: 1px solid var(--line) } th.group { text-align: left }
ul { padding-left: 1.2rem }
.good { color: var(--good) } .bad { color: var(--bad); font-weight: 600 } .old { color: var(--old) }
details { border: 1px solid var(--line); border-radius: 8px; margin: .7rem 0; padding: .6rem .9rem }
summary { cursor: pointer } details > div[id] { scroll-margin-top: 3.5rem }
details details { border: 0; padding: 0; margin: .3rem 0 }
code, .rules td { font-family: ui-monospace, monospace; font-size: .8rem; text-align: left;
  overflow-wrap: anywhere }
.drawings { display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start }
.drawings figure { margin: 0; flex: 1 1 260px; max-width: 320px } figcaption { color: var(--soft) }
svg { width: 100%; height: auto } svg text { fill: var(--ink); font: 13px system-ui, sans-serif }
svg .small { fill: var(--soft); font-size: 9.5px } .node { fill: var(--box); stroke: var(--line) }
.wire { fill: none; stroke: var(--soft); stroke-width: 1.3 }
.heat td { background: rgb(var(--warm) / calc(var(--hottest) * var(--share, 0))) }
.heat td:first-child { background: var(--page) }
@media (max-width: 40rem) { body { padding: .7rem; font-size: 14px }
  th, td { padding: .25rem .4rem } details { padding: .5rem .6rem } }
"""


def tag(name: str, inside: str, **attributes: str) -> str:
    """An element. `class_` becomes class; attributes are escaped, `inside` must be HTML."""
    attributes_text = "".join(f' {k.rstrip("_")}="{escape(v)}"' for k, v in attributes.items() if v)
    return f"<{name}{attributes_text}>{inside}</{name}>"


def cells(*texts: object, **attributes: str) -> list[str]:
    """Table cells, one for each text."""
    return [tag("td", escape(str(text)), **attributes) for text in texts]


def table(
    head: Iterable[str], rows: Iterable[Iterable[str]], about: str = "", above: str = ""
) -> str:
    """A table with a head of words and rows of HTML cells; it scrolls on a narrow page."""
    names = tag("tr", "".join(tag("th", escape(name)) for name in head))
    first = tag("thead", above + names)
    body = tag("tbody", "\n".join(tag("tr", "".join(row)) for row in rows))
    return tag("div", tag("table", first + body, class_=about), class_="wide")


def folded(about: str, inside: str, **attributes: str) -> str:
    """A section that opens on a click, under its summary."""
    return tag("details", tag("summary", about) + inside, **attributes)
