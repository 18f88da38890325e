"""One finding of a diagnosis: what is wrong, where, the evidence, and the fix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """`where` are names of the file's own. `likely` is between 0 and 1: findings are told by it."""

    what: str
    where: tuple[str, ...]
    seen: str
    likely: float
    fix: str = ""

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "what": self.what,
            "where": list(self.where),
            "seen": self.seen,
            "likely": self.likely,
            "fix": self.fix,
        }
