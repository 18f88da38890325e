"""Induction heads: train a model of two layers on texts that repeat, and look how it copies.

A token that came before is followed by what followed it then. To say so a model of attention needs
two steps: a head that tells each place which token stood before it, and one, in a later layer, that
looks for the place that was told the present token, and copies what stands there.
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
MUCH = 0.2  # of what a head looks at: by that much it is named
Head = tuple[int, int]  # its layer, and its number there


class Findings(NamedTuple):
    seconds: float  # of training
    plain: float  # loss, in nats a token, on what comes again
    lens: list[float]  # the same, read off before, between and after the blocks
    before: Tensor  # (layers, heads), how much of each looks one token back
    induction: Tensor  # (layers, heads), and at the token that followed the last time
    chance: float  # what a head that looks everywhere alike would have there
    groups: dict[str, list[Head]]
    without: dict[tuple[str, str], float]  # loss, by the group that is put out and the way
    recovered: Tensor  # (layers, heads), of the loss, by what one head says of the right text


def texts(count: int, random: torch.Generator) -> Tensor:
    """(count, 48) tokens, the second half of each the first half again."""
    return torch.randint(VOCAB, (count, HALF), generator=random).repeat(1, 2)


def train(steps: int, seed: int) -> llama.Model:
    """On random tokens that come again after 8 to 24 places, each row after its own number."""
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
    """Nats a token, where the token stood before in the text."""
    told = logits[:, HALF:-1].flatten(0, 1)
    return F.cross_entropy(told, ids[:, HALF + 1 :].flatten()).item()


def replaced(heads: Iterable[Head], by: Callable[[Tensor, Head], Tensor]) -> dict[str, object]:
    """A patch: what these heads say, (b, s, e) of each, and nothing else, becomes another thing."""

    def of(layer: int, numbers: list[int]) -> Callable[[Tensor], Tensor]:
        def change(said: Tensor) -> Tensor:
            said = said.clone()
            for n in numbers:
                said[:, n] = by(said[:, n], (layer, n))
            return said

        return change

    heads = list(heads)
    return {
        f"blocks.{layer}.attn:heads": of(layer, [n for at, n in heads if at == layer])
        for layer in {layer for layer, _ in heads}
    }


def zero(said: Tensor, head: Head) -> Tensor:
    return torch.zeros_like(said)


def mean(said: Tensor, head: Head) -> Tensor:
    return said.mean(dim=(0, 1), keepdim=True).expand_as(said)


@torch.no_grad()
def study(model: llama.Model, seed: int, seconds: float = 0.0) -> Findings:
    random = torch.Generator().manual_seed(seed + 1)
    ids = texts(TEXTS, random)

    # who looks where
    logits, kept = model.run_with_cache(ids, names="blocks.*.attn:pattern")
    patterns = torch.stack(list(kept.values())).mean(dim=1)  # (layers, heads, s, t)
    again = torch.arange(HALF, 2 * HALF - 1)  # places whose token has been there before
    before = patterns[..., again, again - 1].mean(-1)
    induction = patterns[..., again, again - HALF + 1].mean(-1)
    chance = (1 / (again + 1.0)).mean().item()
    every = [(layer, n) for layer in range(2) for n in range(len(induction[0]))]
    groups = {
        "induction": [head for head in every if induction[head] > MUCH],
        "one back": [head for head in every if before[head] > MUCH],
        "neither": [head for head in every if max(induction[head], before[head]) <= MUCH],
    }

    # what becomes of the model without them
    without = {}
    for name, heads in groups.items():
        for by in (zero, mean):
            with model.patch(replaced(heads, by)):
                without[name, by.__name__] = loss_of(model(ids), ids)

    # which heads carry the answer: in a text whose first half is another, nothing can be copied
    other = torch.cat((texts(TEXTS, random)[:, :HALF], ids[:, HALF:]), dim=1)
    plain, lost = loss_of(logits, ids), loss_of(model(other), ids)
    _, right = model.run_with_cache(ids, names="blocks.*.attn:heads")

    def from_the_right_text(said: Tensor, head: Head) -> Tensor:
        return right[f"blocks.{head[0]}.attn:heads"][:, head[1]]

    recovered = torch.zeros_like(induction)
    for head in every:
        with model.patch(replaced([head], from_the_right_text)):
            recovered[head] = (lost - loss_of(model(other), ids)) / (lost - plain)

    lens = [loss_of(said, ids) for said in model.logit_lens(ids, lazy=True)]
    return Findings(seconds, plain, lens, before, induction, chance, groups, without, recovered)


def table(f: Findings) -> str:
    lines = [
        f"trained in {f.seconds:.0f} s; loss on what comes again: {f.plain:.3f} nats a token",
        "by the lens, before block 0, before block 1, at the end: "
        + ", ".join(f"{loss:.3f}" for loss in f.lens),
        "",
        "head   looks one back   at what followed   recovers",
    ]
    for layer, heads in enumerate(f.induction.tolist()):
        for n, score in enumerate(heads):
            names = [name for name, group in f.groups.items() if (layer, n) in group]
            numbers = f"{f.before[layer, n]:16.2f}{score:19.2f}{f.recovered[layer, n]:11.0%}"
            lines.append(f"{layer}.{n} {numbers}   {', '.join(names)}")
    lines += [f"      (a head that looks everywhere alike: {f.chance:.2f})", ""]
    lines.append("loss without heads    zero    mean")
    for name in f.groups:
        both = "".join(f"{f.without[name, way]:8.3f}" for way in ("zero", "mean"))
        lines.append(f"{name:18}{both}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Findings:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # so small matrices gain nothing from more; and so a seed is a result
    started = time.perf_counter()
    model = train(given.steps, given.seed)
    found = study(model, given.seed, time.perf_counter() - started)
    print(table(found))
    return found


if __name__ == "__main__":
    main()
