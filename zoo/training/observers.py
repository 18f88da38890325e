"""What a person sees of a run: a live line, metrics, TensorBoard and W&B."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from zoo.components.model import Model
from zoo.errors import MissingDependency, printable
from zoo.terminal import passing
from zoo.training.recipe import Recipe
from zoo.training.run import RunDirectory


class Observer(Protocol):
    """Is shown each entry of metrics.jsonl."""

    def see(self, entry: Mapping[str, Any]) -> None:
        """Take an entry: of a step, an evaluation or a sample."""

    def close(self) -> None:
        """No entry follows."""


class File:
    """Appends each entry to metrics.jsonl."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    def see(self, entry: Mapping[str, Any]) -> None:
        """Write a line."""
        self._directory.append(entry)

    def close(self) -> None:
        """Nothing is kept open."""


class Lines:
    """A live line on a terminal; a line for each evaluation in a file or a pipe."""

    def __init__(self, recipe: Recipe, stream: TextIO | None = None) -> None:
        self._steps, self._stream = recipe.steps, stream or sys.stderr
        self._begun: tuple[float, int] | None = None

    def see(self, entry: Mapping[str, Any]) -> None:
        """Show what an entry says."""
        step = entry["step"]
        width = len(f"{self._steps:,}")
        title = f"step {step:>{width},}/{self._steps:,}"
        if "sample" in entry:
            self._print(f"--- sample at step {step:,}\n{printable(entry['sample'])}\n---")
        elif "val_loss" in entry:
            self._print(f"{title}  val loss {entry['val_loss']:.4f}")
        else:
            passing(f"{title}  {self._described(entry)}", self._stream)

    def _described(self, entry: Mapping[str, Any]) -> str:
        now = time.monotonic()
        if self._begun is None:
            self._begun = now, entry["step"]
        began, first = self._begun
        steps = entry["step"] - first
        parts = [f"loss {entry['loss']:.4f}", f"lr {entry['lr']:.1e}"]
        parts.append(f"{entry['tokens_per_second']:,.0f} tokens/s")
        if entry.get("mfu"):
            parts.append(f"mfu {entry['mfu']:.0%}")
        if steps:
            left = (now - began) / steps * (self._steps - entry["step"])
            parts.append(f"{clock(left)} left")
        return "  ".join(parts)

    def _print(self, text: str) -> None:
        passing("", self._stream)
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Wipe the live line."""
        passing("", self._stream)


class TensorBoard:
    """Writes TensorBoard's event files."""

    def __init__(self, place: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard") from None
        self._writer = SummaryWriter(str(place / "tensorboard"))

    def see(self, entry: Mapping[str, Any]) -> None:
        """Write every number of an entry, and samples as text."""
        for name, value in entry.items():
            if name == "sample":
                self._writer.add_text("sample", displayable(value), entry["step"])
            elif name != "step" and value is not None:
                self._writer.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Wandb:
    """Logs to Weights & Biases, offline where WANDB_MODE says so."""

    def __init__(self, recipe: Recipe, place: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise _missing("wandb") from None
        self._wandb = wandb
        self._run = wandb.init(
            project="zoo", name=place.name, dir=str(place), config=recipe.to_dict()
        )

    def see(self, entry: Mapping[str, Any]) -> None:
        """Log every number of an entry, and samples as text."""
        values = {k: v for k, v in entry.items() if k not in ("step", "sample") and v is not None}
        if "sample" in entry:
            values["sample"] = self._wandb.Html(
                f"<pre>{_escaped(displayable(entry['sample']))}</pre>"
            )
        self._run.log(values, step=entry["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _missing(name: str) -> MissingDependency:
    return MissingDependency(f"--log {name}: needs {name}: pip install 'zoo-weights[train]'")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def displayable(text: str) -> str:
    """A text without what displays refuse: control characters and halves of surrogate pairs."""
    clean = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return clean.encode("utf-8", "replace").decode()


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def observers(recipe: Recipe, directory: RunDirectory | None, show: bool) -> list[Observer]:
    """All that are shown a run."""
    some: list[Observer] = [Lines(recipe)] if show else []
    if directory is not None:
        some.append(File(directory))
        if "tensorboard" in recipe.log:
            some.append(TensorBoard(directory.place))
        if "wandb" in recipe.log:
            some.append(Wandb(recipe, directory.place))
    return some


# --- how well the machine is used ----------------------------------------------------------------


def flops_per_token(model: Model, context: int) -> float:
    """Floating-point operations of a training step for each token: forward and twice that back.

    Six for each weight of a product, and twelve for each pair of a query and a key and channel.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    heads = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    weights = sum(
        p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in tables - heads
    )
    config = model.config
    layers = config.layers + getattr(config, "decoder_layers", 0)
    width = config.heads * (getattr(config, "head_dim", None) or config.dim // config.heads)
    return 6.0 * weights + 12.0 * layers * width * context


def peak_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """What a large product reaches on this device in a second: the best of a few."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(4):
        synchronize(device)
        started = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
