"""The mutation gate: faults planted one at a time, each of which the parity checks must notice."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn

from converters.spec import load_spec
from zoo import registry
from zoo.diagnosis.faults import Fault, planted_faults
from zoo.diagnosis.planting import Mapped, NotApplicable, need
from zoo.errors import ZooError
from zoo.loading import load_directory
from zoo.parity.checks import NUMERIC, Subject
from zoo.parity.fixtures import hot_checkpoint
from zoo.parity.truth import Truth
from zoo.registry import Architecture
from zoo.terminal import DIM, GREEN, RED, has_color, paint, passing


@dataclass
class Bench:
    """The variants of one architecture, with the truth about each, to plant bugs in."""

    entry: Architecture
    scratch: Path
    _truths: dict[str, Truth] = field(default_factory=dict)
    _failing: dict[str, set[str]] = field(default_factory=dict)

    def truth(self, variant: str) -> Truth:
        """The reference's results of a variant."""
        if variant not in self._truths:
            directory = self.scratch / self.entry.name / variant
            named = hot_checkpoint(self.entry, variant, directory)
            self._truths[variant] = Truth(directory, named)
        return self._truths[variant]

    def failing(self, variant: str) -> set[str]:
        """Checks that fail without any bug planted, and so can kill none."""
        if variant not in self._failing:
            healthy = self.subject(variant)
            rows = (row for check in NUMERIC for row in check(healthy))
            self._failing[variant] = {row.check for row in rows if not row.ok}
        return self._failing[variant]

    def subject(self, variant: str, fault: Fault | None = None) -> Subject:
        """A variant's native model with a bug in it, or healthy."""
        truth = self.truth(variant)
        load = functools.partial(load_directory, truth.directory, self.entry)
        return Subject(variant, truth, functools.partial(planted, load, fault, self.entry))


def planted(load: Callable[..., Any], fault: Fault | None, entry: Architecture, dtype: Any) -> Any:
    """A model with a fault planted in its spec, its config or itself; healthy without one.

    Raises:
        NotApplicable: The fault cannot be planted there, or changes nothing.
    """
    if fault is None:
        return load(dtype=dtype)
    if fault.kind == "model":
        model = load(dtype=dtype)
        fault.edit.plant(model)
        return model
    config = load().config
    if fault.kind == "config":
        return load(dtype=dtype, config=fault.edit.plant(config))
    healthy = load(dtype=dtype)
    model = load(dtype=dtype, spec=fault.edit.plant(Mapped(load_spec(entry.spec), config)))
    # at some sizes two orders are one
    pairs = zip(_parameters(healthy), _parameters(model), strict=True)
    need(any(not torch.equal(p, q) for p, q in pairs))
    return model


def _parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach() for _, p in sorted(model.named_parameters())]


@dataclass(frozen=True)
class Verdict:
    """What became of a fault in one architecture; `by` names the variant and check that saw it."""

    architecture: str
    fault: str
    kind: str
    status: Literal["killed", "n.a.", "SURVIVED"]
    by: str = ""


def hunt(bench: Bench, fault: Fault, variants: Iterable[str] = ()) -> Verdict:
    """Find the first variant and check that notice a fault; a refusal to load counts last."""
    verdict = functools.partial(Verdict, bench.entry.name, fault.name, fault.kind)
    is_planted, refusal = False, ""
    for variant in variants or bench.entry.variants:
        subject = bench.subject(variant, fault)
        try:
            subject.model(torch.float64)
            is_planted = True
            rows = (row for check in NUMERIC for row in check(subject) if not row.ok)
            row = next((r for r in rows if r.check not in bench.failing(variant)), None)
        except NotApplicable:
            continue
        except ZooError as error:
            refusal = refusal or f"{variant}: {type(error).__name__}"
            continue
        if row is not None:
            return verdict("killed", f"{variant}: {row.check} {row.shown}")
    if is_planted:
        return verdict("SURVIVED")
    return verdict("killed", refusal) if refusal else verdict("n.a.")


def run(
    architectures: Iterable[Architecture] | None = None, seen: Callable[[Verdict], None] = print
) -> list[Verdict]:
    """Plant every fault in every architecture; `seen` is called with each verdict."""
    torch.set_num_threads(1)  # tiny tensors: threads cost more than they bring
    verdicts = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="zoo-mutants-")))
        for entry in architectures or registry.architectures().values():
            bench = Bench(entry, scratch)
            for fault in planted_faults():
                verdicts.append(hunt(bench, fault))
                seen(verdicts[-1])
    return verdicts


_STYLES = {"killed": GREEN, "SURVIVED": RED, "n.a.": DIM}


def table(verdicts: Iterable[Verdict], color: bool = False) -> str:
    """Faults down, architectures across."""
    verdicts, faults = list(verdicts), planted_faults()
    names = list(dict.fromkeys(v.architecture for v in verdicts))
    cells = {(v.fault, v.architecture): v for v in verdicts}
    width = max(len(fault.name) for fault in faults)
    lines = [f"{'kind':8} {'fault':{width}}  " + "  ".join(f"{name:34}" for name in names)]
    for fault in faults:
        line = f"{fault.kind:8} {fault.name:{width}}  "
        for name in names:
            verdict = cells[fault.name, name]
            text = f"{verdict.status} {verdict.by}".strip()[:34].ljust(34)
            line += paint(text, _STYLES[verdict.status], color) + "  "
        lines.append(line.rstrip())
    counts = {s: sum(v.status == s for v in verdicts) for s in ("killed", "n.a.", "SURVIVED")}
    lines.append(
        f"{len(faults)} faults in {len(names)} architectures: {counts['killed']} killed, "
        f"{counts['n.a.']} not applicable, {counts['SURVIVED']} survived"
    )
    return "\n".join(lines)


def main() -> int:
    """`parity.py --mutants`: plant, print, and fail where a fault survives."""
    verdicts = run(seen=lambda v: passing(f"{v.architecture}: {v.fault}", sys.stderr))
    passing("", sys.stderr)
    print(table(verdicts, color=has_color(sys.stdout)))
    return 1 if any(v.status == "SURVIVED" for v in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
