"""Plant each fault and check that `zoo diff` locates and names it."""

from __future__ import annotations

import functools
import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from zoo import evidence, registry
from zoo.components.model import Model
from zoo.diagnosis.diff import sides
from zoo.diagnosis.diff.comparison import Comparison
from zoo.diagnosis.diff.diff import inputs_of, pad_of
from zoo.diagnosis.diff.difference import Cause, Difference
from zoo.diagnosis.diff.explain import diagnosed
from zoo.diagnosis.diff.flows import Way
from zoo.diagnosis.diff.matching import Matching
from zoo.diagnosis.faults import Fault, planted_faults
from zoo.diagnosis.gate import Verdict, planted
from zoo.diagnosis.gate import run as gate
from zoo.diagnosis.planting import NotApplicable
from zoo.errors import ZooError, did_you_mean
from zoo.loading import load_directory
from zoo.parity.fixtures import hot_checkpoint
from zoo.parity.reference import Reference
from zoo.registry import Architecture
from zoo.terminal import passing

# whether gradients are taken, and how tokens are fed
WAYS = ((False, "whole"), (False, "padded"), (False, "unmasked"), (True, "unmasked"))


@dataclass(frozen=True)
class Trace:
    """What became of a bug in an architecture that it can be planted in."""

    architecture: str
    fault: str
    located: bool
    diagnosed: bool
    where: str = ""  # variant and way in which it was seen; empty: in none
    place: str = ""
    causes: tuple[str, ...] = ()  # the most likely first

    @property
    def ok(self) -> bool:
        """Whether the fault was located and diagnosed."""
        return self.located and self.diagnosed

    @property
    def restored(self) -> bool:
        """Whether the first cause was undone, and nothing differed then."""
        return self.diagnosed and any("Parity is restored" in text for text in self.causes[:1])


class Tracer:
    """The variants of one architecture, each with the reference's reading of it."""

    def __init__(self, entry: Architecture, scratch: Path) -> None:
        self.entry, self.scratch = entry, scratch
        self._references: dict[str, Reference] = {}

    def reference(self, variant: str) -> Reference:
        """The reference's model of a variant."""
        if variant not in self._references:
            directory = self.scratch / "traced" / self.entry.name / variant
            named = hot_checkpoint(self.entry, variant, directory)
            self._references[variant] = Reference(directory, named, torch.float64, lifted=True)
        return self._references[variant]

    def trace(self, fault: Fault) -> Trace | None:
        """In the first variant and way that shows it; None where it cannot be planted."""
        torch.manual_seed(0)  # dropout that is left on hides a cause with some seeds
        there = False
        for variant in self.entry.variants:
            reference = self.reference(variant)
            load = functools.partial(load_directory, reference.directory, self.entry)
            try:
                model = planted(load, fault, self.entry, torch.float64)
            except NotApplicable:
                continue
            except ZooError:
                continue  # refused: it never runs
            there = True
            for back, way in WAYS:
                comparison = compared(model, reference, way)
                difference = comparison.run(back)
                if not difference.ok:
                    causes = diagnosed(comparison, difference)
                    return self.traced(fault, f"{variant}, {way}", difference, causes)
        if not there:
            return None
        return Trace(self.entry.name, fault.name, False, False)

    def traced(
        self, fault: Fault, where: str, difference: Difference, causes: Sequence[Cause]
    ) -> Trace:
        """Judge what was reported of a planted fault."""
        place, texts = placed(difference), tuple(map(str, causes))
        located = re.search(fault.at, place) is not None
        right = bool(causes) and fault.is_named(causes[0].fault, texts[0])
        return Trace(self.entry.name, fault.name, located, right, where, place, texts)


def compared(model: Model, reference: Reference, way: str) -> Comparison:
    """Compare a model with the reference on tokens that are fed in some way."""
    other = sides.read_by(model, reference)
    matching = Matching(model, other.module, other.planned, other.fold)
    inputs = inputs_of(model, way, pad=pad_of(other))
    return Comparison(matching, other, Way(way, inputs), torch.float64)


def placed(difference: Difference) -> str:
    """`in` or `out`, and a module; or what else shows it."""
    if (first := difference.first) is not None:
        return f"{first.measurement.side} {first.measurement}"
    ties = [f"tie {' and '.join(names)}" for names in difference.untied]
    return "; ".join([*ties, *difference.idle])


def run(
    architectures: Iterable[Architecture] | None = None,
    faults: Iterable[Fault] | None = None,
    seen: Callable[[str, str], None] = lambda architecture, bug: None,
) -> Iterator[Trace]:
    """Trace each fault in each architecture that it can be planted in."""
    torch.set_num_threads(1)  # tiny tensors: threads cost more than they bring
    faults = planted_faults() if faults is None else list(faults)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="zoo-traces-")))
        for entry in architectures or registry.architectures().values():
            tracer = Tracer(entry, scratch)
            for fault in faults:
                seen(entry.name, fault.name)
                if (trace := tracer.trace(fault)) is not None:
                    yield trace


Killed = Collection[tuple[str, str]]  # (architecture, bug) that the gate noticed


def table(traces: Iterable[Trace], killed: Killed) -> str:
    """A line for each architecture, as Markdown; below it what fell short."""
    traces = list(traces)
    names = list(dict.fromkeys(trace.architecture for trace in traces))
    heads = ("architecture", "planted", "killed", "located", "diagnosed", "restored")
    lines = [f"| {' | '.join(heads)} |", "|---|--:|--:|--:|--:|--:|"]
    for name in [*names, ""]:
        mine = [t for t in traces if not name or t.architecture == name]
        counts = [
            len(mine),
            sum((t.architecture, t.fault) in killed for t in mine),
            sum(t.located for t in mine),
            sum(t.diagnosed for t in mine),
            sum(t.restored for t in mine),
        ]
        lines.append(f"| {name or 'all'} | {' | '.join(map(str, counts))} |")
    short = [t for t in traces if not t.ok]
    if short:
        lines += ["", "| fell short | in | seen at | said first |", "|---|---|---|---|"]
    for t in short:
        text = t.causes[0].replace("|", "\\|") if t.causes else "nothing"
        lines.append(f"| {t.fault} | {t.architecture} | {t.place or 'nowhere'} | {text} |")
    return "\n".join(lines)


def page(traces: Iterable[Trace], killed: Killed) -> str:
    """The table as it stands in docs/diagnosis.md."""
    traces = list(traces)
    refused = len(set(killed) - {(t.architecture, t.fault) for t in traces})
    return (
        "# Planted bugs, located and diagnosed\n\n"
        f"Measured {date.today()} by `make diagnosis`: each of the {len(planted_faults())} faults "
        "of the mutation gate, planted alone\nin every architecture that it applies to; "
        f"{refused} more never run, since they are refused when loaded. *Killed*: a check of\n"
        "`zoo verify` fails. *Located*: the place that is named is the one written beside the "
        "bug. *Diagnosed*: the first cause\nthat is named is the one written there. *Restored*: "
        "undone, nothing differs.\n\n" + table(traces, killed) + "\n"
    )


def to_record(traces: Iterable[Trace], verdicts: Iterable[Verdict]) -> dict[str, dict[str, Any]]:
    """Architecture -> what became of each bug that can be planted there, for the record."""
    traced = {(t.architecture, t.fault): t for t in traces}
    entries: dict[str, dict[str, Any]] = {}
    for verdict in verdicts:
        trace = traced.get((verdict.architecture, verdict.fault))
        entry = entries.setdefault(verdict.architecture, {})
        if trace is not None:
            killed = verdict.by if verdict.status == "killed" else ""
            short = (
                {} if trace.ok else {"place": trace.place, "said": (*trace.causes, "nothing")[0]}
            )
            entry[verdict.fault] = {
                "killed": killed,
                "located": trace.located,
                "diagnosed": trace.diagnosed,
                **short,
            }
        elif verdict.status == "killed":
            entry[verdict.fault] = {"refused": verdict.by}  # when it is loaded: it never runs
    architectures = registry.architectures()
    return {
        name: {**evidence.stamp("bugs", architectures[name]), "bugs": bugs}
        for name, bugs in entries.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """`parity.py --diagnose`: measure, print, and keep."""
    parser = ArgumentParser(prog="parity.py --diagnose", description=__doc__)
    parser.add_argument("names", metavar="ARCHITECTURE", nargs="*", help="[all]")
    parser.add_argument("--write", metavar="FILE", type=Path, help="a page of it")
    parser.add_argument("--record", action="store_true", help="into zoo/evidence.json")
    options = parser.parse_args(arguments)
    architectures = registry.architectures()
    if unknown := [name for name in options.names if name not in architectures]:
        parser.error(
            f"no architecture is called {unknown[0]!r}.{did_you_mean(unknown[0], architectures)}"
        )
    if options.record:
        evidence.read()  # what is wrong with it is said before hours of work
    chosen = [architectures[name] for name in options.names] or None
    verdicts = gate(chosen, lambda v: passing(f"{v.architecture}: {v.fault}", sys.stderr))
    killed = {(v.architecture, v.fault) for v in verdicts if v.status == "killed"}
    traces = list(run(chosen, seen=lambda *names: passing(": ".join(names), sys.stderr)))
    passing("", sys.stderr)
    print(table(traces, killed))
    if options.write:
        options.write.write_text(page(traces, killed), encoding="utf-8")
    if options.record:
        evidence.update("bugs", to_record(traces, verdicts))
    located = all(trace.located for trace in traces)
    return 0 if located and sum(t.diagnosed for t in traces) >= 0.9 * len(traces) else 1
