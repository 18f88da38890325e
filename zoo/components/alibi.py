"""ALiBi: scores that fall with distance, at a slope of each head's own, instead of positions."""

import math

import torch
from torch import Tensor

from zoo.components.masks import Mask


class Alibi:
    """A term for `attention.Biased`: (b, h, 1, t), each key's position times the head's slope.

    Softmax depends on differences only, so the query's position need not be subtracted. `dtype` is
    what the original rounds the term to, whatever it computes in.
    """

    def __init__(self, heads: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> None:
        self.slopes, self.scale, self.dtype = slopes(heads), scale, dtype

    def __call__(self, q: Tensor, k: Tensor, mask: Mask) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        wide = self.dtype or exact
        slope = torch.tensor(self.slopes, dtype=wide, device=q.device)[:, None, None]
        # two bf16 numbers have their product in fp32: rounded once, as bf16 itself rounds it
        term = slope.to(exact) * mask.keys[:, None, None, :].to(wide).to(exact)
        return term.to(wide).to(q.dtype) * self.scale


def slopes(heads: int) -> list[float]:
    """2^(-8n/p) for n = 1 … p, the largest power of two; further heads lie halfway between."""
    whole = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * n / whole) for n in range(1, whole + 1)]
    return first + [2 ** (-4 * n / whole) for n in range(1, 2 * (heads - whole), 2)]
