"""Sampling: warpers of the distribution, and draws that a row makes for itself.

Each warper takes and gives (b, v) logits; what may not follow has -inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.errors import UsageError

_SEED = 1 << 63


def temperature(logits: Tensor, value: float) -> Tensor:
    return logits / value


def top_k(logits: Tensor, count: int) -> Tensor:
    """The `count` most likely, and what is as likely as the last of them."""
    least = logits.topk(min(count, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits: Tensor, mass: float) -> Tensor:
    """The fewest that hold `mass` of the probability; one at least."""
    ordered, index = logits.sort(dim=-1, descending=False)
    removed = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - mass
    removed[..., -1] = False
    return logits.masked_fill(removed.scatter(-1, index, removed), -torch.inf)


def min_p(logits: Tensor, share: float) -> Tensor:
    """Those that have `share` of the likeliest one's probability."""
    probabilities = logits.softmax(dim=-1)
    least = share * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < least, -torch.inf)


def typical_p(logits: Tensor, mass: float) -> Tensor:
    """Those whose information is nearest to its mean, until they hold `mass` together."""
    likely = logits.log_softmax(dim=-1)
    entropy = -(likely * likely.exp()).nansum(dim=-1, keepdim=True)
    ordered, index = (-likely - entropy).abs().sort(dim=-1)
    sums = logits.gather(-1, index).softmax(dim=-1).cumsum(dim=-1)
    last = (sums < mass).sum(dim=-1, keepdim=True).clamp(max=sums.shape[-1] - 1)
    removed = ordered > ordered.gather(-1, last)
    removed[..., 0] = False
    return logits.masked_fill(removed.scatter(-1, index, removed), -torch.inf)


def epsilon_cutoff(logits: Tensor, least: float) -> Tensor:
    """Those of this probability at least, and the likeliest."""
    return _cut(logits, least)


def eta_cutoff(logits: Tensor, epsilon: float) -> Tensor:
    """The same, where less counts as little if the distribution is flat."""
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
    """How tokens are chosen: the likeliest at temperature 0, else drawn from what is left.

    Warpers come in the order of the fields.
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
        warm = self.temperature  # below the least that fp32 divides by, all logits are infinite
        wrong = [
            text
            for text, fits in (
                ("temperature: 0, or 1e-30 and more", warm == 0 or 1e-30 <= warm < float("inf")),
                ("top_k: 0 or more", self.top_k >= 0),
                ("top_p: above 0, 1 at most", 0 < self.top_p <= 1),
                ("min_p: from 0 to 1", 0 <= self.min_p <= 1),
                ("typical_p: above 0, 1 at most", 0 < self.typical_p <= 1),
                ("epsilon_cutoff: from 0 to 1", 0 <= self.epsilon_cutoff < 1),
                ("eta_cutoff: from 0 to 1", 0 <= self.eta_cutoff < 1),
            )
            if not fits
        ]
        if wrong:
            raise UsageError("; ".join(wrong))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def warped(self, logits: Tensor) -> Tensor:
        """As far as it is drawn from."""
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


class Dice:
    """A source of numbers for each row, so that no row depends on the others of its batch."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.sources = [torch.Generator().manual_seed(seed % _SEED) for seed in seeds]

    def numbers(self, count: int = 1) -> Tensor:
        """(b, count) in [0, 1), fp64."""
        draws = [torch.rand(count, generator=g, dtype=torch.float64) for g in self.sources]
        return torch.stack(draws)

    def choose(self, logits: Tensor) -> Tensor:
        """(b,) tokens by (b, v) logits: where the row's number falls in their distribution."""
        return pick(logits.double().softmax(dim=-1), self.numbers().to(logits.device))


def pick(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """(b,): the first place where the sum of (b, v) passes the row's number; never one of none."""
    sums = probabilities.cumsum(dim=-1)
    found = torch.searchsorted(sums, numbers * sums[:, -1:], right=True).squeeze(-1)
    last = torch.arange(sums.shape[-1], device=sums.device) * (probabilities > 0)
    return torch.minimum(found, last.amax(dim=-1))


def seeds_of(seed: int | Sequence[int] | None, rows: int, samples: int) -> list[int]:
    """One for each sample of each row; a row's own do not follow from where it stands."""
    if seed is None:
        return torch.randint(_SEED - 1, (rows * samples,)).tolist()
    given = list(seed) if isinstance(seed, Sequence) else [seed] * rows
    if len(given) != rows or not all(type(s) is int for s in given):
        raise UsageError(f"seed={seed!r}: a whole number, or one for each of {rows} rows")
    # the first sample is the one that a single sample would be
    return [s + n * 0x9E3779B97F4A7C15 for s in given for n in range(samples)]
