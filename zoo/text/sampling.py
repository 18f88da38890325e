"""Sampling: warpers of the distribution, and one random generator for each row.

Each warper maps (b, v) logits to (b, v) logits; excluded tokens have -inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.errors import UsageError

_SEED = 1 << 63


def temperature(logits: Tensor, value: float) -> Tensor:
    """Divide the logits: above 1 the distribution is flatter, below 1 sharper."""
    return logits / value


def top_k(logits: Tensor, count: int) -> Tensor:
    """Keep the `count` most likely tokens, and those as likely as the last of them."""
    least = logits.topk(min(count, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits: Tensor, mass: float) -> Tensor:
    """Nucleus sampling: keep the smallest set of tokens whose probabilities sum to `mass`."""
    ordered, index = logits.sort(dim=-1, descending=False)
    removed = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - mass
    removed[..., -1] = False
    return logits.masked_fill(removed.scatter(-1, index, removed), -torch.inf)


def min_p(logits: Tensor, share: float) -> Tensor:
    """Keep tokens that have `share` of the most likely one's probability."""
    probabilities = logits.softmax(dim=-1)
    least = share * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < least, -torch.inf)


def typical_p(logits: Tensor, mass: float) -> Tensor:
    """Locally typical sampling: keep tokens of nearly average information, up to `mass`."""
    likely = logits.log_softmax(dim=-1)
    entropy = -(likely * likely.exp()).nansum(dim=-1, keepdim=True)
    ordered, index = (-likely - entropy).abs().sort(dim=-1)
    sums = logits.gather(-1, index).softmax(dim=-1).cumsum(dim=-1)
    last = (sums < mass).sum(dim=-1, keepdim=True).clamp(max=sums.shape[-1] - 1)
    removed = ordered > ordered.gather(-1, last)
    removed[..., 0] = False
    return logits.masked_fill(removed.scatter(-1, index, removed), -torch.inf)


def epsilon_cutoff(logits: Tensor, least: float) -> Tensor:
    """Keep tokens of this probability at least, and the most likely one."""
    return _cut(logits, least)


def eta_cutoff(logits: Tensor, epsilon: float) -> Tensor:
    """Keep tokens as `epsilon_cutoff` does, with a lower cutoff where the distribution is flat."""
    likely, bound = logits.log_softmax(dim=-1), torch.tensor(epsilon, device=logits.device)
    finite = likely.clamp(min=torch.finfo(likely.dtype).min)
    entropy = -(finite * likely.exp()).sum(dim=-1, keepdim=True)
    return _cut(logits, torch.min(bound, bound.sqrt() * torch.exp(-entropy)))


def _cut(logits: Tensor, least: Tensor | float) -> Tensor:
    removed = logits.softmax(dim=-1) < least
    removed &= logits < logits.amax(dim=-1, keepdim=True)
    return logits.masked_fill(removed, -torch.inf)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens: the most likely at temperature 0, else drawn from what warpers keep.

    Warpers are applied in the order of the fields.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            whole = name == "top_k"
            if type(value) is not int and (whole or not isinstance(value, int | float)):
                raise UsageError(f"{name}={value!r}: expected a {'whole ' * whole}number")
        heat = self.temperature  # below 1e-30, fp32 logits become infinite
        bounds = {
            "temperature": ("0, or ≥ 1e-30 and finite", heat == 0 or 1e-30 <= heat < float("inf")),
            "top_k": ("≥ 0", self.top_k >= 0),
            "top_p": ("> 0 and ≤ 1", 0 < self.top_p <= 1),
            "min_p": ("≥ 0 and ≤ 1", 0 <= self.min_p <= 1),
            "typical_p": ("> 0 and ≤ 1", 0 < self.typical_p <= 1),
            "epsilon_cutoff": ("≥ 0 and < 1", 0 <= self.epsilon_cutoff < 1),
            "eta_cutoff": ("≥ 0 and < 1", 0 <= self.eta_cutoff < 1),
        }
        wrong = [
            f"{name}={getattr(self, name)!r}: must be {bound}"
            for name, (bound, fits) in bounds.items()
            if not fits
        ]
        if wrong:
            raise UsageError("; ".join(wrong))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is chosen."""
        return self.temperature == 0

    def warp(self, logits: Tensor) -> Tensor:
        """Apply all warpers to (b, v) logits."""
        if self.greedy:
            return logits
        if self.temperature != 1:
            logits = temperature(logits, self.temperature)
        if self.top_k:
            logits = top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = top_p(logits, self.top_p)
        if self.min_p:
            logits = min_p(logits, self.min_p)
        if self.typical_p < 1:
            logits = typical_p(logits, self.typical_p)
        if self.epsilon_cutoff:
            logits = epsilon_cutoff(logits, self.epsilon_cutoff)
        if self.eta_cutoff:
            logits = eta_cutoff(logits, self.eta_cutoff)
        return logits


class RowGenerators:
    """A random generator for each row, so that no row depends on the others of its batch."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed % _SEED) for seed in seeds]

    def numbers(self, count: int = 1) -> Tensor:
        """(b, count) random numbers in [0, 1), fp64."""
        draws = [torch.rand(count, generator=g, dtype=torch.float64) for g in self.generators]
        return torch.stack(draws)

    def choose(self, logits: Tensor) -> Tensor:
        """(b,) tokens drawn from the distribution of (b, v) logits."""
        return pick(logits.double().softmax(dim=-1), self.numbers().to(logits.device))


def pick(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """(b,) indices where the cumulative (b, v) probabilities pass the rows' numbers.

    An index of probability 0 is never picked.
    """
    sums = probabilities.cumsum(dim=-1)
    index = torch.searchsorted(sums, numbers * sums[:, -1:], right=True).squeeze(-1)
    last = torch.arange(sums.shape[-1], device=sums.device) * (probabilities > 0)
    return torch.minimum(index, last.amax(dim=-1))


def seeds_of(seed: int | Sequence[int] | None, rows: int, samples: int) -> list[int]:
    """A seed for each sample of each row; it does not depend on the row's number in the batch."""
    if seed is None:
        return torch.randint(_SEED - 1, (rows * samples,)).tolist()
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * rows
    if len(seeds) != rows or not all(type(s) is int for s in seeds):
        raise UsageError(f"seed={seed!r}: expected a whole number, or one for each of {rows} rows")
    # a row's first sample does not depend on how many there are
    return [s + n * 0x9E3779B97F4A7C15 for s in seeds for n in range(samples)]
