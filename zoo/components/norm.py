"""Norms, computed in fp32 at least whatever the model's dtype."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divides by the root of the mean square; the mean is not subtracted."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def draw(self, std: float) -> None:
        """Initialize to the identity."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) from (…, d)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class OffsetRMSNorm(RMSNorm):
    """The scale is 1 + weight, and is applied before rounding (Gemma)."""

    def draw(self, std: float) -> None:
        """Initialize to the identity."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) from (…, d)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1 + self.weight.to(wide.dtype))).to(x.dtype)
