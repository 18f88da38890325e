"""Attention: projections around one shared `attend`, which uses the fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from zoo.components.masks import Mask
from zoo.components.model import Linear
from zoo.components.rotary import NO_ROTARY, Rotation

Attend = Callable[[Tensor, Tensor, Tensor, Mask, float, float], Tensor]
Term = Callable[[Tensor, Tensor, Mask], Tensor]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float,
    dropout: float,
    bias: Tensor | None = None,
) -> Tensor:
    """(b, h, s, e) from queries (b, h, s, e), keys and values (b, g, t, e).

    `bias` (b, h, s, t), or what broadcasts to it, is added to the scaled scores.
    """
    allowed, causal = mask.allowed, mask.causal
    if bias is not None:
        dense = mask.dense(q.shape[2])
        allowed = bias if dense is None else bias.masked_fill(~dense, -torch.inf)
        causal = False
    elif q.shape[2] == 1 and q.shape[1] != k.shape[1]:
        # one query a row: heads that share keys become its rows, so that keys are read once
        rows = rearrange(q, "b (g r) 1 e -> b g r e", g=k.shape[1])
        y = F.scaled_dot_product_attention(
            rows, k, v, attn_mask=allowed, dropout_p=dropout, scale=scale
        )
        return rearrange(y, "b g r e -> b (g r) 1 e")
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=allowed,
        is_causal=causal,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


class Biased:
    """`attend` with a bias that depends on positions alone, so that all layers share it."""

    def __init__(self, term: Term) -> None:
        self.term = term

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float
    ) -> Tensor:
        bias = mask.keep(self.term, lambda: self.term(q, k, mask))
        return attend(q, k, v, mask, scale, dropout, bias)


class Explicit:
    """`attend` step by step: scores in fp32 with `upcast`, and `bend` applied to them."""

    def __init__(self, upcast: bool = False, bend: Callable[[Tensor], Tensor] | None = None):
        self.upcast, self.bend = upcast, bend

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        groups = q.shape[1] // k.shape[1]
        k, v = (repeat(x, "b g t e -> b (g r) t e", r=groups) for x in (k, v))
        if self.upcast:
            q, k = q.to(wide), k.to(wide)
        scores = (q @ k.mT) * scale
        if self.bend is not None:
            scores = self.bend(scores)
        if (allowed := mask.dense(q.shape[2])) is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        return F.dropout(scores.softmax(dim=-1, dtype=wide).to(v.dtype), dropout) @ v


class Attention(nn.Module):
    """Grouped-query attention; with kv_heads == heads it is multi-head attention.

    `rotary` rotates queries and keys, `attend` combines them with values.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
        out_bias: bool | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        rotary: Rotation = NO_ROTARY,
        attend: Attend = attend,
    ) -> None:
        super().__init__()
        self.head_dim, self.dropout = head_dim, dropout
        self.scale = head_dim**-0.5 if scale is None else scale
        self.rotary, self.attend = rotary, attend
        self.q = Linear(dim, heads * head_dim, bias=bias)
        self.k = Linear(dim, kv_heads * head_dim, bias=bias)
        self.v = Linear(dim, kv_heads * head_dim, bias=bias)
        self.out = Linear(heads * head_dim, dim, bias=bias if out_bias is None else out_bias)

    def forward(self, x: Tensor, mask: Mask, source: Tensor | None = None) -> Tensor:
        """(b, s, d); keys and values are projected from `source` (b, t, d) if given, else `x`."""
        if source is None:
            q, k, v = self.project(x)
            q, k = self.rotary(q, k, mask)
            k, v = mask.remember(k, v)
        else:
            q = self.by_head(self.q(x))
            k, v = mask.keep(self, lambda: [self.by_head(p(source)) for p in (self.k, self.v)])
        y = self.attend(q, k, v, mask, self.scale, self.dropout if self.training else 0.0)
        return self.out(rearrange(y, "b h s e -> b s (h e)"))

    def project(self, x: Tensor) -> Iterable[Tensor]:
        """Queries (b, h, s, e), keys and values (b, g, s, e)."""
        return [self.by_head(p(x)) for p in (self.q, self.k, self.v)]

    def by_head(self, x: Tensor) -> Tensor:
        """(b, h, s, e) from (b, s, h · e)."""
        return rearrange(x, "b s (h e) -> b h s e", e=self.head_dim)
