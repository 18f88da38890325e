"""What parity measured: rows of facts, a table for a person, JSON for a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from zoo.terminal import BOLD, GREEN, RED, paint


@dataclass(frozen=True)
class Row:
    """One measurement. It passes where `value` is at most `limit`; NaN never passes."""

    subject: str
    check: str
    value: float
    limit: float
    shown: str
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        value = self.value if math.isfinite(self.value) else None
        return {
            "subject": self.subject,
            "check": self.check,
            "value": value,
            "limit": self.limit,
            "ok": self.ok,
            "shown": self.shown,
            "detail": self.detail,
        }


class Published(NamedTuple):
    """The weights of a checkpoint that has a name, and where they come from."""

    name: str
    repo: str
    revision: str  # a commit


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # how long each subject took
    published: dict[str, Published] = field(default_factory=dict)  # by subject

    @property
    def ok(self) -> bool:
        """True where something was measured and all of it passed."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if not row.ok]

    def to_text(self, color: bool = False) -> str:
        """A line for each subject and a column for each check; below it, why anything failed."""
        checks = list(dict.fromkeys(row.check for row in self.rows))
        subjects = list(dict.fromkeys(row.subject for row in self.rows))
        cells = {(row.subject, row.check): row for row in self.rows}
        table = [["", *checks]]
        for subject in subjects:
            found = (cells.get((subject, check)) for check in checks)
            table.append([subject, *(row.shown if row else "-" for row in found)])
        widths = [max(len(line[k]) for line in table) for k in range(len(table[0]))]
        lines = []
        for n, line in enumerate(table):
            words = []
            for k, (word, width) in enumerate(zip(line, widths, strict=True)):
                padded = word.ljust(width) if k == 0 else word.rjust(width)
                row = cells.get((subjects[n - 1], checks[k - 1])) if n and k else None
                words.append(paint(padded, _style(n, row), color))
            lines.append("  ".join(words).rstrip())
        lines += [
            paint(f"FAILED {row.subject}: {row.check}: {row.detail or row.shown}", RED, color)
            for row in self.failures
        ]
        return "\n".join([*lines, self.summary(color)])

    def summary(self, color: bool = False) -> str:
        subjects = len({row.subject for row in self.rows})
        said = f"{len(self.rows)} measurements of {subjects} checkpoints"
        if self.ok:
            return paint(f"parity: {said}, all within their limits", GREEN, color)
        return paint(f"NO parity: {said}, {len(self.failures)} beyond their limits", RED, color)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "rows": [row.to_json() for row in self.rows]}


def _style(line: int, row: Row | None) -> str:
    if line == 0:
        return BOLD
    if row is None:
        return ""
    return GREEN if row.ok else RED
