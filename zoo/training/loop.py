"""The training loop: one for every architecture, objective, device and number of processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.components.model import Model
from zoo.errors import NonFinite
from zoo.training.objectives import LabeledBatch, Objective, cost
from zoo.training.optimizers import learning_rate, parameters_of, set_learning_rate
from zoo.training.processes import Processes
from zoo.training.recipe import Recipe

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    number: int  # of steps that are done
    loss: float  # nats a label, before the step
    grad_norm: float  # before clipping
    lr: float
    tokens: int  # of this step
    seconds: float


@dataclass
class State:
    """What a run is made of, and all that a checkpoint has to keep."""

    recipe: Recipe
    model: Model
    running: nn.Module  # the model, compiled or spread over processes
    objective: Objective
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    processes: Processes
    step: int = 0  # steps that are done
    tokens: int = 0
    seconds: float = 0.0
    best: float = math.inf  # the lowest loss of an evaluation
    losses: list[float] = field(default_factory=list)


def train(
    state: State,
    *,
    done: Callable[[StepReport], None] = lambda step: None,
    evaluated: Callable[[int, float], None] = lambda number, loss: None,
) -> None:
    """Take the steps that a recipe still has, from wherever the state stands.

    Args:
        state: The run; it is changed.
        done: Called after each step.
        evaluated: Called after each evaluation: when the recipe says, and at the end.

    Raises:
        NonFinite: The loss is no number any more; the state is as before that step.
    """
    recipe = state.recipe
    state.running.train()
    while state.step < recipe.steps:
        done(take_step(state))
        at_end = state.step == recipe.steps
        if at_end or (recipe.eval_every and state.step % recipe.eval_every == 0):
            loss = evaluate(state)
            state.best = min(state.best, loss)
            evaluated(state.step, loss)


def take_step(state: State) -> StepReport:
    """One step: the batch's gradient in parts, clipped, and the optimizers' updates."""
    recipe, started = state.recipe, time.perf_counter()
    batch = state.objective.batch(state.step)
    counts, loss = batch.counts, 0.0
    parts = state.processes.share(len(batch), recipe.accumulate)
    for number, part in enumerate(parts):
        seed(recipe.seed, state.step, number, state.processes.rank)
        with state.processes.gradients(state.running, last=part is parts[-1]):
            share = _cost(state, batch.rows(part), counts)
            # DDP takes the mean over processes, and the sum of their shares is meant
            state.scaler.scale(share * state.processes.count).backward()
        loss += share.item()
    loss = state.processes.total(loss)
    norm = _clipped(state)
    if not math.isfinite(loss):
        _forget(state)
        raise NonFinite(
            f"step {state.step}: the loss is {loss}. Is the learning rate too high? "
            "The weights are those from before this step"
        )
    rate = learning_rate(recipe, state.step)
    set_learning_rate(state.optimizers, rate)
    for optimizer in state.optimizers:
        state.scaler.step(optimizer)
    state.scaler.update()
    _forget(state)
    seconds = time.perf_counter() - started
    state.step, state.tokens = state.step + 1, state.tokens + batch.tokens
    state.seconds += seconds
    state.losses.append(loss)
    return StepReport(state.step, loss, norm, rate, batch.tokens, seconds)


def _cost(state: State, part: LabeledBatch, counts: dict[str, int]) -> Tensor:
    device = state.processes.device
    part, dtype = part.to(device), AUTOCAST.get(state.recipe.precision)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        out = state.running(**part.inputs)
    return cost(out, part, counts)


def _clipped(state: State) -> float:
    """Clip all gradients as one vector, and return the length that it had."""
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    trained = parameters_of(state.optimizers)
    most = state.recipe.clip or math.inf
    return float(state.processes.whole(nn.utils.clip_grad_norm_(trained, most)))


def _forget(state: State) -> None:
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def evaluate(state: State) -> float:
    """The mean loss of some batches that are held back, without dropout."""
    total = 0.0
    state.running.eval()
    try:
        for number in range(state.recipe.eval_batches):
            batch = state.objective.held_back(number)
            counts = batch.counts
            for part in state.processes.share(len(batch), state.recipe.accumulate):
                total += _cost(state, batch.rows(part), counts).item()
    finally:
        state.running.train()
    return state.processes.total(total) / state.recipe.eval_batches


def seed(*numbers: Any) -> None:
    """Let what is random in a step depend on these numbers: a resumed run draws the same."""
    from zoo.training.data import mixed

    torch.manual_seed(mixed(*numbers))
