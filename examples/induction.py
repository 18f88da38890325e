"""Induction heads: train a two-layer model on texts that repeat, and find how it copies.

In such a text a token is followed by what followed it the last time. Attention predicts that in two
steps: a previous-token head stores at each position the token before it, and an induction head in a
later layer attends to the position that stored the current token, and copies the token there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from zoo.models import llama

VOCAB, HALF, TEXTS = 64, 24, 256
MUCH = 0.2  # a head with this much of its attention on one position is named by it
Head = tuple[int, int]  # (layer, number in the layer)


class Findings(NamedTuple):
    seconds: float  # of training
    plain: float  # loss in nats a token, on repeated tokens
    lens: list[float]  # the same by the logit lens: before, between and after the blocks
    before: Tensor  # (layers, heads), attention to the previous token
    induction: Tensor  # (layers, heads), attention to what followed the last time
    chance: float  # what uniform attention would put there
    groups: dict[str, list[Head]]
    without: dict[tuple[str, str], float]  # loss by ablated group and kind of ablation
    recovered: Tensor  # (layers, heads), share of the loss that patching one head recovers


def texts(count: int, random: torch.Generator) -> Tensor:
    """(count, 48) tokens, the second half of each the first half again."""
    return torch.randint(VOCAB, (count, HALF), generator=random).repeat(1, 2)


def train(steps: int, seed: int) -> llama.Model:
    """Train on random tokens that repeat with a period of 8 to 24, drawn for each row."""
    torch.manual_seed(seed)
    model = llama.Model(llama.Config(vocab=VOCAB, dim=64, layers=2, heads=4, hidden=128))
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        period = torch.randint(8, HALF + 1, (64, 1), generator=random)
        tokens = torch.randint(VOCAB, (64, HALF), generator=random)
        ids = tokens.gather(1, torch.arange(2 * HALF) % period)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def loss_of(logits: Tensor, ids: Tensor) -> float:
    """Nats a token, over the repeated half of the text."""
    predicted = logits[:, HALF:-1].flatten(0, 1)
    return F.cross_entropy(predicted, ids[:, HALF + 1 :].flatten()).item()


def replaced(heads: Iterable[Head], by: Callable[[Tensor, Head], Tensor]) -> dict[str, object]:
    """A patch that replaces the outputs of these heads, (b, s, e) each, and nothing else."""

    def of(layer: int, numbers: list[int]) -> Callable[[Tensor], Tensor]:
        def change(outputs: Tensor) -> Tensor:
            outputs = outputs.clone()
            for n in numbers:
                outputs[:, n] = by(outputs[:, n], (layer, n))
            return outputs

        return change

    heads = list(heads)
    return {
        f"blocks.{layer}.attn:heads": of(layer, [n for at, n in heads if at == layer])
        for layer in {layer for layer, _ in heads}
    }


def zero(output: Tensor, head: Head) -> Tensor:
    """Zero ablation."""
    return torch.zeros_like(output)


def mean(output: Tensor, head: Head) -> Tensor:
    """Mean ablation, over texts and positions."""
    return output.mean(dim=(0, 1), keepdim=True).expand_as(output)


@torch.no_grad()
def study(model: llama.Model, seed: int, seconds: float = 0.0) -> Findings:
    """Find the heads, ablate them, and patch them one at a time."""
    random = torch.Generator().manual_seed(seed + 1)
    ids = texts(TEXTS, random)

    # where heads attend
    logits, cache = model.run_with_cache(ids, names="blocks.*.attn:pattern")
    patterns = torch.stack(list(cache.values())).mean(dim=1)  # (layers, heads, s, t)
    again = torch.arange(HALF, 2 * HALF - 1)  # positions whose token is a repetition
    before = patterns[..., again, again - 1].mean(-1)
    induction = patterns[..., again, again - HALF + 1].mean(-1)
    chance = (1 / (again + 1.0)).mean().item()
    every = [(layer, n) for layer in range(2) for n in range(len(induction[0]))]
    groups = {
        "induction": [head for head in every if induction[head] > MUCH],
        "previous token": [head for head in every if before[head] > MUCH],
        "neither": [head for head in every if max(induction[head], before[head]) <= MUCH],
    }

    # the loss without them
    without = {}
    for name, heads in groups.items():
        for by in (zero, mean):
            with model.patch(replaced(heads, by)):
                without[name, by.__name__] = loss_of(model(ids), ids)

    # which heads carry the answer: with another first half nothing can be copied
    other = torch.cat((texts(TEXTS, random)[:, :HALF], ids[:, HALF:]), dim=1)
    plain, lost = loss_of(logits, ids), loss_of(model(other), ids)
    _, right = model.run_with_cache(ids, names="blocks.*.attn:heads")

    def from_the_right_text(output: Tensor, head: Head) -> Tensor:
        return right[f"blocks.{head[0]}.attn:heads"][:, head[1]]

    recovered = torch.zeros_like(induction)
    for head in every:
        with model.patch(replaced([head], from_the_right_text)):
            recovered[head] = (lost - loss_of(model(other), ids)) / (lost - plain)

    lens = [loss_of(logits, ids) for logits in model.logit_lens(ids, lazy=True)]
    return Findings(seconds, plain, lens, before, induction, chance, groups, without, recovered)


def table(f: Findings) -> str:
    """The findings as text."""
    lines = [
        f"trained in {f.seconds:.0f} s; loss on repeated tokens: {f.plain:.3f} nats a token",
        "logit lens before block 0, before block 1, at the end: "
        + ", ".join(f"{loss:.3f}" for loss in f.lens),
        "",
        "head   to the previous   to what followed   recovers",
    ]
    for layer, heads in enumerate(f.induction.tolist()):
        for n, score in enumerate(heads):
            names = [name for name, group in f.groups.items() if (layer, n) in group]
            numbers = f"{f.before[layer, n]:16.2f}{score:19.2f}{f.recovered[layer, n]:11.0%}"
            lines.append(f"{layer}.{n} {numbers}   {', '.join(names)}")
    lines += [f"      (uniform attention: {f.chance:.2f})", ""]
    lines.append("loss without heads    zero    mean")
    for name in f.groups:
        both = "".join(f"{f.without[name, way]:8.3f}" for way in ("zero", "mean"))
        lines.append(f"{name:18}{both}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Findings:
    """Train, study and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # small matrices gain nothing from more, and a seed gives one result
    started = time.perf_counter()
    model = train(options.steps, options.seed)
    findings = study(model, options.seed, time.perf_counter() - started)
    print(table(findings))
    return findings


if __name__ == "__main__":
    main()
