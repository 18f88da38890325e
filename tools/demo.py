"""The main job, offline: for each architecture make, plan, convert, load, prove, give back.

The checkpoints are made by `transformers` itself, from the first tiny config that registry.yaml
has for each architecture; every parameter is redrawn, so that none can hide.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

import zoo
from converters.opening import open_checkpoint
from zoo import registry
from zoo.checkpoints.locate import locate
from zoo.checkpoints.oracle import transformers
from zoo.checkpoints.plan import prove
from zoo.components.model import Model
from zoo.parity.checks import Subject, bf16, differences, fp32, fp64
from zoo.parity.fixtures import hot_checkpoint
from zoo.parity.result import Report, Row
from zoo.parity.truth import Truth
from zoo.registry import Architecture
from zoo.terminal import BOLD, DIM, GREEN, has_color, paint, passing

COLOR = has_color(sys.stdout)


def main() -> int:
    passing("importing the reference …", sys.stdout)
    transformers()
    report = Report()
    architectures = registry.architectures()
    with TemporaryDirectory(prefix="zoo-demo-") as scratch:
        for number, entry in enumerate(architectures.values(), 1):
            passing("", sys.stdout)
            print(paint(f"{entry.name} ({number} of {len(architectures)})", BOLD, COLOR))
            report.rows += demonstrate(entry, Path(scratch, entry.name))
    print("\nerror against the reference in fp64, and in fp32 and bf16 as a multiple of its own")
    print(report.to_text(color=COLOR))
    return 0 if report.ok else 1


def demonstrate(entry: Architecture, place: Path) -> Iterator[Row]:
    """Run every step for one architecture and yield the measurements."""
    made, native, back = (place / name for name in ("made", "native", "back"))
    place.mkdir()
    clock = Clock()

    clock.start("make", "a reference checkpoint, every parameter redrawn")
    reference_class = hot_checkpoint(entry, next(iter(entry.variants)), made)
    clock.done(f"{reference_class}.save_pretrained, {size(made)}")

    clock.start("plan", "config, spec and headers against the model")
    located = locate(made)
    _, plan = prove(located, open_checkpoint(made), {})
    rules = {str(step.rule) for step in plan.steps}
    mapped = sum(len(step.targets) for step in plan.steps)
    clock.done(
        f"{len(plan.header)} tensors on disk are {mapped} of the model by {len(rules)} rules, "
        f"{len(plan.dropped)} dropped; no weights read"
    )

    clock.start("convert", "to native")
    zoo.convert(made, native, to="native")
    clock.done(f"native, {size(native)}")

    clock.start("load", "the native checkpoint")
    model = zoo.load(native)
    clock.done(f"{type(model).__module__}.Model, {count(model):,} parameters")

    clock.start("prove", "against the reference in fp64, fp32 and bf16")
    truth = Truth(made, reference_class)
    subject = Subject(entry.name, truth, lambda dtype: zoo.load(native, dtype=dtype))
    rows = [row for check in (fp64, fp32, bf16) for row in check(subject)]
    clock.done(f"{truth.batch.ids.numel():,} tokens, {len(rows)} measurements")

    clock.start("return", "native to the published layout")
    zoo.convert(native, back, to="hf")
    problems = differences(made, back)
    shown = "equal" if not problems else f"{len(problems)} differ"
    clock.done(f"names, shapes, dtypes and bytes: {shown}")
    yield from rows
    yield Row(entry.name, "bytes back", len(problems), 0, shown, "; ".join(problems[:8]))


class Clock:
    """Print one line for a step: its name while it runs, then its result and duration."""

    def start(self, name: str, text: str) -> None:
        self.name, self.began = name, time.perf_counter()
        passing(paint(f"  {name:<9}{text} …", DIM, COLOR), sys.stdout)

    def done(self, text: str) -> None:
        took = paint(f"{time.perf_counter() - self.began:.2f} s", DIM, COLOR)
        passing("", sys.stdout)
        print(f"  {paint(f'{self.name:<9}', GREEN, COLOR)}{text}  {took}", flush=True)


def size(directory: Path) -> str:
    files = [path for path in directory.iterdir() if path.is_file()]
    return f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.2f} MB"


def count(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    sys.exit(main())
