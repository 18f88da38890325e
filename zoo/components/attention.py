"""Attention: projections around one shared `attend`, which picks the fused kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from zoo.components.masks import Mask
from zoo.components.model import Linear
from zoo.components.rotary import UNTURNED

Attend = Callable[[Tensor, Tensor, Tensor, Mask, float, float], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float) -> Tensor:
    """(b, h, s, e) of queries, (b, g, t, e) of keys and values, to (b, h, s, e)."""
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask.allowed,
        is_causal=mask.causal,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def attend_upcast(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float
) -> Tensor:
    """The same function with scores and softmax in fp32 at least, for half-precision models."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    k, v = (repeat(x, "b g t e -> b (g r) t e", r=groups) for x in (k, v))
    scores = (q.to(wide) @ k.to(wide).mT) * scale
    allowed = mask.allowed
    if mask.causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return F.dropout(scores.softmax(dim=-1).to(v.dtype), dropout) @ v


class Attention(nn.Module):
    """Grouped-query attention; with as many key heads as query heads it is the ordinary one."""

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
        dropout: float = 0.0,
        scale: float | None = None,
        rotary: Callable[[Tensor, Tensor, Mask], tuple[Tensor, Tensor]] = UNTURNED,
        attend: Attend = attend,
    ) -> None:
        super().__init__()
        self.head_dim, self.dropout = head_dim, dropout
        self.scale = head_dim**-0.5 if scale is None else scale
        self.rotary, self.attend = rotary, attend
        self.q = Linear(dim, heads * head_dim, bias=bias)
        self.k = Linear(dim, kv_heads * head_dim, bias=bias)
        self.v = Linear(dim, kv_heads * head_dim, bias=bias)
        self.out = Linear(heads * head_dim, dim, bias=bias)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        q, k, v = (
            rearrange(part(x), "b s (h e) -> b h s e", e=self.head_dim)
            for part in (self.q, self.k, self.v)
        )
        q, k = self.rotary(q, k, mask)
        y = self.attend(q, k, v, mask, self.scale, self.dropout if self.training else 0.0)
        return self.out(rearrange(y, "b h s e -> b s (h e)"))
