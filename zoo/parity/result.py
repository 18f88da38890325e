"""The results of parity: rows of measurements, as a table and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from zoo.errors import counted
from zoo.terminal import BOLD, GREEN, RED, paint


@dataclass(frozen=True)
class Row:
    """One measurement. It passes if `value` is at most `limit`; NaN never passes."""

    subject: str
    check: str
    value: float
    limit: float
    shown: str
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether the value is within its limit."""
        return self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        """The row as JSON data; a value that is not finite is null."""
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
    """A named checkpoint whose own weights were verified, and where they come from."""

    name: str
    repo: str
    revision: str  # a commit


@dataclass
class Report:
    """All rows of a run, with the time that each subject took."""

    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # how long each subject took
    published: dict[str, Published] = field(default_factory=dict)  # by subject

    @property
    def ok(self) -> bool:
        """Whether something was measured and all of it passed."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def failures(self) -> list[Row]:
        """The rows beyond their limits."""
        return [row for row in self.rows if not row.ok]

    def to_text(self, color: bool = False) -> str:
        """A table of subjects by checks, followed by the reason of each failure."""
        checks = list(dict.fromkeys(row.check for row in self.rows))
        subjects = list(dict.fromkeys(row.subject for row in self.rows))
        cells = {(row.subject, row.check): row for row in self.rows}
        table = [["", *checks]]
        for subject in subjects:
            rows = (cells.get((subject, check)) for check in checks)
            table.append([subject, *(row.shown if row else "-" for row in rows)])
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
        """One line: parity or not, and the number of measurements."""
        subjects = counted(len({row.subject for row in self.rows}), "checkpoint")
        total = f"{counted(len(self.rows), 'measurement')} of {subjects}"
        if self.ok:
            return paint(f"parity: {total}, all within limits", GREEN, color)
        return paint(f"NO parity: {total}, {len(self.failures)} beyond limits", RED, color)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {"ok": self.ok, "rows": [row.to_json() for row in self.rows]}


def _style(line: int, row: Row | None) -> str:
    if line == 0:
        return BOLD
    if row is None:
        return ""
    return GREEN if row.ok else RED
