"""A diagnosis for people (text) and for programs (JSON)."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo.diagnosis.checkup.finding import Finding
from zoo.diagnosis.checkup.opened import Opened, family_of, group
from zoo.diagnosis.checkup.statistics import Numbers
from zoo.errors import listing
from zoo.terminal import BOLD, DIM, GREEN, RED, paint, table

_WIDTH, _NAMES = 96, 4
_SURE = ((0.9, "almost certain"), (0.7, "likely"), (0.4, "possible"), (0.0, "perhaps"))


@dataclass(frozen=True)
class Diagnosis:
    """`findings`, the most likely first; `notes` are common and no reason to worry."""

    ref: str
    opened: Opened = field(repr=False)
    numbers: tuple[Numbers, ...] = field(repr=False)
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    loads: bool = True

    @property
    def ok(self) -> bool:
        """Whether nothing looks wrong."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "ref": self.ref,
            "ok": self.ok,
            "architecture": self.opened.architecture or None,
            "loads": self.loads,
            "refused": self.opened.refused or None,
            "findings": [finding.to_json() for finding in self.findings],
            "notes": list(self.notes),
            "tensors": [n.to_json() for n in self.numbers],
        }

    def to_text(self, color: bool = False, *, tensors: bool = False) -> str:
        """For a terminal; `tensors` gives a line to each array."""
        parts = ["\n".join(self._head(color))]
        if self.findings:
            count = len(self.findings)
            title = "1 finding" if count == 1 else f"{count} findings, the most likely first"
            described = [self._described(n, each, color) for n, each in enumerate(self.findings, 1)]
            parts += [paint(title, BOLD + RED, color), *described]
        else:
            parts.append(paint("Nothing looks wrong.", BOLD + GREEN, color))
        if self.notes:
            notes = ["Noted:", *(f"  {note}" for note in self.notes)]
            parts.append(paint("\n".join(notes), DIM, color))
        parts.append(table(self._each() if tensors else self._families()))
        return "\n\n".join(parts)

    def _head(self, color: bool) -> Iterator[str]:
        checkpoint = self.opened.checkpoint
        count = sum(
            info.numel for name, info in checkpoint.tensors.items() if name not in checkpoint.shared
        )
        kinds = sorted(
            {checkpoint.quantized.get(n, i.dtype) for n, i in checkpoint.tensors.items()}
        )
        named = self.opened.architecture or "no architecture that zoo knows"
        loads = "; it loads" if self.loads else "; it does not load"
        if self.opened.unknown:
            loads = ""
        yield paint(self.ref, BOLD, color)
        looked = sum(n.count for n in self.numbers)
        all_of = "all" if looked == count else f"{looked:,}"
        yield (
            f"  {named}; {len(checkpoint.tensors):,} tensors in {listing(kinds)}, "
            f"{count:,} numbers, {all_of} of them looked at{loads}"
        )

    def _described(self, number: int, finding: Finding, color: bool) -> str:
        sure = next(word for least, word in _SURE if finding.likely >= least)
        lines = [f"{number}  {paint(finding.what, BOLD, color)}  ({sure})"]
        lines += _wrapped(finding.seen)
        if finding.where:
            where = listing(_starred(finding.where), _NAMES)
            lines += [paint(line, DIM, color) for line in _wrapped(where)]
        if finding.fix:
            lines += _wrapped(f"-> {finding.fix}")
        return "\n".join(lines)

    def _families(self) -> Sequence[tuple[str, ...]]:
        """One row for the same array of all layers."""
        families = group(self.numbers, lambda n: n.array.family)
        names = {name for finding in self.findings for name in finding.where}
        rows = [("", "shape", "layers", "std", "largest", "stands out")]
        for family, each in families.items():
            out = [n for n in each if names & set(n.array.files)]
            rows.append(
                (
                    family,
                    "x".join(map(str, each[0].array.shape)),
                    str(len(each)) if "*" in family else "",
                    _range([n.std for n in each]),
                    _range([n.most for n in each]),
                    "" if not out else _layers(out, each),
                )
            )
        return rows if names else [row[:-1] for row in rows]

    def _each(self) -> Sequence[tuple[str, ...]]:
        """One row for each array."""
        rows = [
            ("", "shape", "dtype", "mean", "std", "least", "largest", "zeros", "kurtosis", "bits")
        ]
        for n in self.numbers:
            rows.append(
                (
                    n.name,
                    "x".join(map(str, n.array.shape)),
                    n.array.coarse or n.array.dtype,
                    f"{n.mean:.2g}",
                    f"{n.std:.3g}",
                    f"{n.least:.2g}",
                    f"{n.most:.3g}",
                    f"{n.zeros / n.count:.1%}" if n.zeros else "",
                    f"{n.kurtosis:.3g}",
                    n.grid or ("" if n.bits is None else str(n.bits)),
                )
            )
        return rows


def _starred(names: Sequence[str]) -> list[str]:
    """Names that differ by a layer's number as one, with a star."""
    families = group(names, family_of)
    return [each[0] if len(each) == 1 else f"{f} ({len(each)})" for f, each in families.items()]


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} … {high}"


def _layers(out: Sequence[Numbers], each: Sequence[Numbers]) -> str:
    if len(out) == len(each):
        return "all" if len(each) > 1 else "yes"
    return f"layer {listing([str(n.array.layer) for n in out], 6)}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent="   ", subsequent_indent="   ", break_long_words=False
    )
