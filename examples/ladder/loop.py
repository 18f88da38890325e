"""What is the same on every rung: train a model, test it, and let it write.

A model gives logits (b, s, v) for ids (b, s): a score for each character that may come next.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import play
import torch
from text import CONTEXT, Batch, Text
from torch import Tensor, nn


class Run(NamedTuple):
    model: nn.Module
    text: Text
    losses: list[float]  # nats a character on each batch, before the step that learns from it
    validation: float  # the same on text that the model never saw
    seconds: float


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """(), mean of -ln(the probability that the model gave to the character that came)."""
    ids, targets = batch  # (b, s) each
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


def train(model: nn.Module, text: Text, steps: int, rate: float, seed: int) -> list[float]:
    """Show a batch, ask each parameter which way lowers the loss, and move a little that way."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    for step in range(steps):
        loss = loss_of(model, text.batch(random))
        optimizer.zero_grad()  # else gradients of all steps so far would add up
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % max(1, steps // 10) == 0:  # batches differ: a mean shows more than one loss
            print(f"step {step:5}  loss {fmean(losses[-max(1, steps // 10) :]):.2f}")
    return losses


@torch.no_grad()
def write(model: nn.Module, text: Text, count: int) -> str:
    """Draw characters one at a time, each from the model's distribution after all before it."""
    ids = torch.zeros(1, 1, dtype=torch.long)  # (1, s); id 0 is a newline, where there is one
    for _ in range(count):
        logits = model(ids[:, -CONTEXT:])[:, -1]  # (1, v), after the last character
        drawn = torch.multinomial(logits.softmax(dim=-1), 1)  # (1, 1)
        ids = torch.cat((ids, drawn), dim=1)
    return text.decode(ids[0].tolist())


def run(make: Callable[[int], nn.Module], rate: float, arguments: list[str] | None = None) -> Run:
    """Read the command line, make a model for the text's characters, train it, and let it write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?", type=Path, help="a text (default: play.py writes one)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=rate, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    torch.manual_seed(options.seed)
    text = Text(options.file.read_text(encoding="utf-8") if options.file else play.write())
    model = make(text.vocab)
    print(f"{text.vocab} characters, {sum(p.numel() for p in model.parameters()):,} parameters")
    started = time.perf_counter()
    losses = train(model, text, options.steps, options.rate, options.seed)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        validation = loss_of(model.eval(), text.test()).item()
    print(f"step {options.steps:5}  validation {validation:.2f}  ({seconds:.0f} s)")
    print(write(model, text, 300))
    return Run(model, text, losses, validation, seconds)
