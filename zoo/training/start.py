"""`zoo.train`: a run from a recipe, or of a model in memory."""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from zoo.components.model import Model
from zoo.errors import UsageError, option
from zoo.loading import load
from zoo.lora import add_adapter
from zoo.text.generate import generate_text
from zoo.tokenizers import Tokenizer
from zoo.training.loop import State, StepReport
from zoo.training.loop import train as take_steps
from zoo.training.objectives import Objective
from zoo.training.observers import (
    Observer,
    flops_per_token,
    observers,
    peak_flops,
    synchronize,
)
from zoo.training.optimizers import optimizers
from zoo.training.processes import Processes, joined, spread
from zoo.training.recipe import Recipe
from zoo.training.run import RunDirectory
from zoo.training.sizes import architecture, build, small
from zoo.training.states import load_state, save_state
from zoo.training.tasks import objective_of, special_tokens
from zoo.training.vocabularies import tokenizer_for

Data = str | PathLike[str] | Tensor | Sequence[str]


@dataclass
class TrainingRun:
    """A run that has ended: its model, and what it learned."""

    model: Model
    recipe: Recipe
    losses: list[float]  # of each step since it was begun or resumed
    evaluations: list[tuple[int, float]]  # steps done, loss of what is held back
    tokenizer: Tokenizer | None = None
    directory: Path | None = None
    is_stopped: bool = field(default=False)  # by Ctrl-C, before its last step

    @property
    def val_loss(self) -> float:
        """The last evaluation's loss."""
        return self.evaluations[-1][1]


def train(
    model: Model,
    data: Data,
    *,
    tokenizer: Tokenizer | None = None,
    out: str | PathLike[str] | None = None,
    progress: bool = False,
    **settings: Any,
) -> TrainingRun:
    """Train a model on a text or on token ids, by the loop that `zoo train` runs.

    The model is changed and stays in evaluation mode afterwards.

    Args:
        model: A model of zoo's.
        data: A file or a directory of texts, texts themselves as a list, or (n,) token ids.
        tokenizer: Reads texts (default: the model's own).
        out: The run's directory (default: nothing is written).
        progress: Whether to show a live line on standard error.
        **settings: Settings of `Recipe`: steps, lr, batch, context ...

    Returns:
        A `TrainingRun`: `run.losses`, `run.val_loss`, `run.model`.

    Raises:
        UsageError: A setting or the data does not fit.
        NonFinite: The loss is no number any more.

    Example:
        >>> import torch, zoo
        >>> from zoo.models.gpt2 import Config, Model
        >>> model = Model(Config(vocab=11, dim=8, layers=1, heads=2, positions=16))
        >>> ids = torch.arange(400) % 11
        >>> run = zoo.train(model, ids, steps=60, context=8, batch=4, lr=0.02, warmup=5)
        >>> run.losses[-1] < run.losses[0] / 2
        True
    """
    if not isinstance(model, Model):
        raise UsageError(f"expected a model of zoo's, found {type(model).__name__}")
    if model.is_prepared:
        raise UsageError("a prepared model is not trained: load it again")
    limit = model.config.limit or Recipe().context
    named = {"context": min(limit, Recipe().context), **settings}
    recipe = Recipe.of({**named, "out": None if out is None else str(out)}, "zoo.train")
    return run(recipe, model=model, data=data, tokenizer=tokenizer, progress=progress)


def run(
    recipe: Recipe,
    *,
    resume: bool = False,
    model: Model | None = None,
    data: Data | None = None,
    tokenizer: Tokenizer | None = None,
    progress: bool = False,
) -> TrainingRun:
    """Run a recipe from the beginning, or go on with the run in its directory.

    Raises:
        UsageError: The recipe does not fit the data, the model or the machine.
        OutputExists: The directory is not empty.
    """
    directory = None if recipe.out is None else RunDirectory(recipe.out)
    with ExitStack() as stack:
        processes = stack.enter_context(joined(recipe.device))
        if processes.count > 1 and directory is None:
            raise UsageError("several processes need a directory that they share: name one as out")
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zoo-train-")))
        if directory is not None and not resume:
            directory.check_new()
        source = data if data is not None else recipe.data
        if source is None:
            raise UsageError(f"no data to train on: name a file, {option('data', ...)}")
        if tokenizer is None and model is None:
            tokenizer = tokenizer_for(recipe, source, directory if resume else None)
        if model is None:
            model = _model(recipe, tokenizer, directory if resume else None)
            if tokenizer is None and recipe.base is not None:
                tokenizer = model.tokenizer
        elif tokenizer is None and not isinstance(source, Tensor):
            tokenizer = model.tokenizer
        if tokenizer is not None and model.provenance is None:
            vars(model)["tokenizer"] = tokenizer  # what it generates is read with it
        if directory is not None and processes.is_first and not resume:
            directory.begin(recipe)
        processes.wait()
        place = scratch if directory is None else directory.place / "data"
        try:
            state = _state(recipe, model, tokenizer, source, place, processes)
        except BaseException:
            if directory is not None and processes.is_first and not resume:
                directory.remove_begun()
            raise
        if resume and directory is not None:
            load_state(state, directory.last)
            if processes.is_first:
                directory.cut(state.step)
        return _supervised(state, tokenizer, directory, progress)


def _model(recipe: Recipe, tokenizer: Tokenizer | None, resumed: RunDirectory | None) -> Model:
    """The model of a recipe: a checkpoint's, or new; of a resumed run its last one."""
    if resumed is not None and not recipe.lora:
        return load(resumed.last, mmap=False)
    if recipe.base is not None:
        model = _base(recipe.base, recipe)
        if recipe.lora and resumed is not None:
            return model.load_adapter(resumed.last)
        if recipe.lora:
            torch.manual_seed(recipe.seed)
            add_adapter(model, recipe.lora, r=recipe.rank, alpha=recipe.alpha)
        return model
    entry = architecture(recipe.arch)
    asked = dict(recipe.config)
    if tokenizer is not None:
        asked = special_tokens(entry, tokenizer, recipe.context) | asked
    elif "vocab" not in asked:
        raise UsageError("no vocabulary: name a tokenizer, or set vocab")
    dropout = 0.0 if recipe.dropout is None else recipe.dropout
    fields = small(entry, recipe.context, asked, dropout)
    torch.manual_seed(recipe.seed)
    return build(entry, fields, recipe.head)


def _base(ref: str, recipe: Recipe) -> Model:
    """The checkpoint that a run goes on from, with the recipe's config fields."""
    how: dict[str, Any] = {} if recipe.head is None else {"head": recipe.head}
    fields = dict(recipe.config)
    if recipe.dropout is not None:
        named = load(ref, **how).config.to_dict()
        fields |= {name: recipe.dropout for name in named if "dropout" in name}
    return load(ref, mmap=False, config=fields or None, **how)


def _state(
    recipe: Recipe,
    model: Model,
    tokenizer: Tokenizer | None,
    source: Data,
    place: Path,
    processes: Processes,
) -> State:
    if model.config.limit is not None and recipe.context > model.config.limit:
        raise UsageError(
            f"context: {recipe.context}, and the model has {model.config.limit} positions"
        )
    if recipe.lora and recipe.shard == "fsdp" and processes.count > 1:
        raise UsageError("lora: factors are small, and are not spread over processes: use ddp")
    objective: Objective = objective_of(recipe, model, tokenizer, source, place, processes)
    model.train()
    if model.adapter is None:
        model.requires_grad_(True)
    model.to(processes.device)
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        model.float()  # a step of a thousandth is lost in bfloat16
    for p in model.parameters():
        # a loaded weight may be a transposed view. torch's fused AdamW takes the order in memory
        # for that of the moments, and products of views round differently
        p.data = p.data.contiguous()
    if recipe.recompute:
        model.gradient_checkpointing_enable()
    if recipe.tf32 and processes.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    running = spread(model, processes, recipe.shard)
    some = optimizers(model, recipe)
    if recipe.compile:
        running = torch.compile(running)  # type: ignore[assignment]
    scaler = torch.amp.GradScaler(processes.device.type, enabled=recipe.precision == "fp16")
    return State(recipe, model, running, objective, some, scaler, processes)


def _supervised(
    state: State, tokenizer: Tokenizer | None, directory: RunDirectory | None, progress: bool
) -> TrainingRun:
    """Take the steps; show, log, sample and save as the recipe says."""
    recipe, processes, evaluations = state.recipe, state.processes, list[tuple[int, float]]()
    seen = observers(recipe, directory, progress) if processes.is_first else []
    rate = _Rate(state)
    with _stopped_by_ctrl_c() as is_asked_to_stop:

        def done(step: StepReport) -> None:
            if step.number % recipe.log_every == 0 or step.number in (1, recipe.steps):
                _show(
                    seen,
                    {
                        "step": step.number,
                        "loss": step.loss,
                        "lr": step.lr,
                        "grad_norm": step.grad_norm,
                        **rate.entry(step),
                    },
                )
            if recipe.sample_every and step.number % recipe.sample_every == 0 and tokenizer:
                _show(seen, {"step": step.number, "sample": _sample(state)})
            is_due = recipe.save_every and step.number % recipe.save_every == 0
            if directory is not None and (is_due or is_asked_to_stop()):
                save_state(state, directory.last, tokenizer)
            if is_asked_to_stop():
                raise _Stopped

        def evaluated(number: int, loss: float) -> None:
            evaluations.append((number, loss))
            _show(seen, {"step": number, "val_loss": loss})
            if directory is not None:
                if loss <= state.best:
                    save_state(state, directory.best, tokenizer)
                if not recipe.save_every or number == recipe.steps:
                    save_state(state, directory.last, tokenizer)

        try:
            take_steps(state, done=done, evaluated=evaluated)
            is_stopped = False
        except _Stopped:
            is_stopped = True
        finally:
            for observer in seen:
                observer.close()
            state.model.eval()
    place = None if directory is None else directory.place
    return TrainingRun(state.model, recipe, state.losses, evaluations, tokenizer, place, is_stopped)


def _show(seen: Sequence[Observer], entry: dict[str, Any]) -> None:
    for observer in seen:
        observer.see(entry)


class _Rate:
    """Tokens a second since the last entry, and the share of the machine's products."""

    def __init__(self, state: State) -> None:
        self._state, self._tokens, self._seconds = state, state.tokens, state.seconds
        self._flops = flops_per_token(state.model, state.recipe.context)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(state.recipe.precision)
        self._peak = peak_flops(state.processes.device, dtype or torch.float32)

    def entry(self, step: StepReport) -> dict[str, Any]:
        """What metrics.jsonl has of it."""
        synchronize(self._state.processes.device)
        tokens = self._state.tokens - self._tokens
        seconds = max(self._state.seconds - self._seconds, 1e-9)
        self._tokens, self._seconds = self._state.tokens, self._state.seconds
        speed = tokens / seconds
        count = self._state.processes.count
        return {
            "tokens": self._state.tokens,
            "seconds": round(self._state.seconds, 4),
            "tokens_per_second": round(speed, 1),
            "mfu": round(speed * self._flops / (self._peak * count), 4),
        }


def _sample(state: State) -> str:
    model, recipe = state.model, state.recipe
    model.eval()
    try:
        room = model.config.limit_cached
        begun = len(model.tokenizer.encode(recipe.prompt))
        most = recipe.sample_tokens if room is None else min(recipe.sample_tokens, room - begun)
        how: dict[str, Any] = {"temperature": 0.8, "top_k": 200, "seed": recipe.seed}
        written = generate_text(model, recipe.prompt, max_new_tokens=most, **how)
        return f"{recipe.prompt}{written}".strip("\n")
    finally:
        model.train()


# --- Ctrl-C --------------------------------------------------------------------------------------


class _Stopped(Exception):
    """Somebody asked to stop; the checkpoint is written."""


@contextmanager
def _stopped_by_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: the step is finished first. A second one stops at once."""
    asked = False

    def take(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, take)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
