"""Norms, computed in fp32 at least whatever the model's dtype."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divides by the root of the mean square; no mean is taken away. Left as allocated."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def draw(self, std: float) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class OffsetRMSNorm(RMSNorm):
    """The weight is what the scale has beyond one, and is applied before rounding."""

    def draw(self, std: float) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1 + self.weight.to(wide.dtype))).to(x.dtype)
