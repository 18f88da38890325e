"""A state of the residual stream as a weighted sum of outputs, by least squares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.parity.checks import rms

NEAR = 1e-6  # of the root mean square: what is no sum is off by far more
MANY = 20_000  # equations say as much as all of them; all are checked


@dataclass(frozen=True)
class Sum:
    """How much of each output there is in it; what is not in it is not named."""

    parts: dict[str, float]

    def __str__(self) -> str:
        return " + ".join(n if w == 1 else f"{w:.6g} {n}" for n, w in self.parts.items()) or "0"


def summed(outs: Mapping[str, Tensor], wanted: Tensor) -> Sum | None:
    """By least squares; None where it is no sum of these."""
    if not outs:
        return None
    y = wanted.double().flatten()
    a = torch.stack([x.double().flatten() for x in outs.values()], dim=1)
    scale = a.square().sum(0).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    a = a / scale
    some = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:MANY]
    weights = torch.linalg.lstsq(a[some], y[some, None], driver="gelsd").solution[:, 0]
    if not float((a @ weights - y).abs().max()) <= NEAR * float(rms(y)):
        return None
    parts = dict(zip(outs, (weights / scale).tolist(), strict=True))
    near = {n: float(round(w)) if abs(w - round(w)) < 1e-5 else w for n, w in parts.items()}
    return Sum({n: w for n, w in near.items() if w})
