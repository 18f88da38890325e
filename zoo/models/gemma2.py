"""Gemma-2: norms before and after each branch, soft caps, a window in every second layer."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.components import activations, config, decoder
from zoo.components.attention import Attention, Explicit
from zoo.components.masks import Cache, Mask
from zoo.components.mlp import GatedMLP
from zoo.components.model import Embedding
from zoo.components.norm import OffsetRMSNorm
from zoo.components.rotary import Rotary, Rotated


class Config(Rotated, config.Windowed):
    vocab: config.Size = 256000
    dim: config.Size = 2304
    layers: config.Layers = 26
    heads: config.Size = 8
    kv_heads: config.Size = 4
    head_dim: config.Size = 256
    hidden: config.Size = 9216
    act: config.ActivationName = "gelu_pytorch_tanh"
    positions: config.Size = 8192
    eps: config.Positive = 1e-6
    query_scale: config.Size = 256  # scores are divided by its root
    score_cap: config.Positive | None = 50.0
    logit_cap: config.Positive | None = 30.0
    window: config.Size | None = 4096
    attn_bias: bool = False
    attn_dropout: config.Fraction | None = 0.0
    tied: bool = True
    pad: config.TokenId | None = 0
    heads_known: ClassVar = decoder.HEADS

    def derived(self) -> Mapping[str, Any]:
        """Every second layer has a window, the first among them."""
        kinds = (config.FULL if n % 2 else config.SLIDING for n in range(self.layers))
        return {"kinds": config.LayerKinds(kinds)}

    def problems(self) -> Iterator[str]:
        """Key heads that do not divide the heads."""
        yield from super().problems()
        yield from config.divides("kv_heads", self.kv_heads, "heads", self.heads)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Squash x smoothly into (-cap, cap); None leaves it as it is."""
    return x if cap is None else (x / cap).tanh() * cap


class Block(nn.Module):
    def __init__(self, c: Config, rotary: Rotary) -> None:
        super().__init__()
        self.norm1 = OffsetRMSNorm(c.dim, c.eps)
        shape = (c.dim, c.heads, c.kv_heads, c.head_dim)
        self.attn = Attention(
            *shape,
            bias=c.attn_bias,
            dropout=c.attn_dropout or 0.0,
            scale=c.query_scale**-0.5,
            rotary=rotary,
            attend=Explicit(bend=partial(soft_cap, cap=c.score_cap)),
        )
        self.norm1_out = OffsetRMSNorm(c.dim, c.eps)
        self.norm2 = OffsetRMSNorm(c.dim, c.eps)
        self.mlp = GatedMLP(c.dim, c.hidden, activations.ACTIVATIONS[c.act], bias=False)
        self.norm2_out = OffsetRMSNorm(c.dim, c.eps)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        x = x + self.norm1_out(self.attn(self.norm1(x), mask))
        return x + self.norm2_out(self.mlp(self.norm2(x)))


class Model(decoder.Decoder):
    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.embed = Embedding(c.vocab, c.dim, padding_idx=c.pad)
        rotary = c.rotary()
        self.blocks = nn.ModuleList(Block(c, rotary) for _ in range(c.layers))
        self.norm = OffsetRMSNorm(c.dim, c.eps)
        self.add_head()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """(b, s, v) of logits, or what the config's head gives, from (b, s) of token ids."""
        c = self.config
        masks = self.masks(input_ids, attention_mask, cache)
        x = self.embed(input_ids)
        x = x * torch.tensor(c.dim**0.5, dtype=x.dtype, device=x.device)  # rounded as x is
        for layer, block in enumerate(self.blocks):
            x = block(x, masks[layer])
        x = self.read_out(self.norm(x), input_ids, attention_mask)
        return soft_cap(x, c.logit_cap) if c.head == "lm" else x
