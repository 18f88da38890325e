"""ALiBi: no positions, but scores that fall with distance, each head's at a pace of its own."""

import math

import torch
from torch import Tensor

from zoo.components.masks import Mask


class Alibi:
    """A term for `attention.Biased`: (b, h, 1, t), each key's place times the head's slope.

    Softmax sees differences alone, so the query's own place need not be taken away. `dtype` is what
    the original rounds the term to, whatever it computes in.
    """

    def __init__(self, heads: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> None:
        self.slopes, self.scale, self.dtype = slopes(heads), scale, dtype

    def __call__(self, q: Tensor, k: Tensor, mask: Mask) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        wide = self.dtype or exact
        pace = torch.tensor(self.slopes, dtype=wide, device=q.device)[:, None, None]
        # two bf16 numbers have their product in fp32: rounded once, as bf16 itself rounds it
        term = pace.to(exact) * mask.keys[:, None, None, :].to(wide).to(exact)
        return term.to(wide).to(q.dtype) * self.scale


def slopes(heads: int) -> list[float]:
    """2^(-8n/p) for the largest power of two p; heads beyond it stand halfway between those."""
    whole = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * n / whole) for n in range(1, whole + 1)]
    return first + [2 ** (-4 * n / whole) for n in range(1, 2 * (heads - whole), 2)]
