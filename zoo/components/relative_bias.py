"""Relative position bias: a learned number for each head and each bucket of distances."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.components.masks import Mask


class RelativeBias(nn.Module):
    """A term for `attention.Biased`: (b, h, s, t).

    Where `both_ways`, keys after the query have buckets of their own; else they share the bucket
    of the query itself, as in a causal decoder, which sees none of them.
    """

    def __init__(self, heads: int, buckets: int, max_distance: int, *, both_ways: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        self.max_distance, self.both_ways = max_distance, both_ways

    def draw(self, std: float) -> None:
        """Initialize the weight with this standard deviation."""
        nn.init.normal_(self.weight, 0, std)

    def forward(self, q: Tensor, k: Tensor, mask: Mask) -> Tensor:
        """(b, h, s, t) from the positions of queries and keys."""
        ahead = mask.keys[:, None, :] - mask.positions[:, :, None]
        return F.embedding(self.bucket(ahead), self.weight).permute(0, 3, 1, 2)

    def bucket(self, ahead: Tensor) -> Tensor:
        """(b, s, t) bucket of each distance.

        Half of the buckets hold one distance each. The others grow by a constant factor up to
        `max_distance`; the last one also holds all that is farther.
        """
        count, first = len(self.weight), torch.zeros_like(ahead)
        if self.both_ways:
            count //= 2
            first, ahead = (ahead > 0) * count, -ahead.abs()
        distance, near = (-ahead).clamp(min=0), count // 2
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        steps = (distance.to(wide) / near).log() / math.log(self.max_distance / near)
        far = (near + (steps * (count - near)).clamp(min=0).long()).clamp(max=count - 1)
        return first + torch.where(distance < near, distance, far)
