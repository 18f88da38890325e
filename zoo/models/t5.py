"""T5: an encoder, a decoder that reads it, and places that show as learned biases by distance."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.components import config, inputs, masks, model
from zoo.components.activations import ACTIVATIONS
from zoo.components.attention import Attention, Biased
from zoo.components.masks import Cache, Mask
from zoo.components.mlp import MLP, GatedMLP
from zoo.components.model import Embedding, Linear
from zoo.components.norm import RMSNorm
from zoo.errors import InputError


class Config(config.Config):
    vocab: config.Size = 32128
    dim: config.Size = 512
    layers: config.Layers = 6
    decoder_layers: config.Layers = config.DERIVED  # layers
    heads: config.Size = 8
    head_dim: config.Size = 64
    hidden: config.Size = 2048
    mlp: str = "relu"  # gated- before it: of two projections
    act: config.ActivationName = config.DERIVED  # what mlp says
    gated: bool = config.DERIVED
    buckets: config.Size = 32
    max_distance: config.Size = 128
    eps: config.Positive = 1e-6
    dropout: config.Fraction = 0.1
    tied: bool = True  # and the states scaled before it, which an untied head's are not
    may_share: bool = True  # the embedding is the head where files hold no other
    init_std: config.Amount = 1.0
    pad: config.TokenId | None = 0
    start: config.TokenId | None = config.DERIVED  # what answers begin with: pad
    heads_known: ClassVar = ("lm", "shared_lm", "encoder", "none")

    def derived(self) -> Mapping[str, Any]:
        gated, act = self.mlp.startswith("gated-"), self.mlp.removeprefix("gated-")
        act = "gelu_new" if self.mlp == "gated-gelu" else act
        return {
            "decoder_layers": self.layers,
            "act": act,
            "gated": gated,
            "start": self.pad,
        }

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.vocabulary_problems("start")
        if self.head == "shared_lm" and not self.may_share:
            yield "may_share: false, so the head is a matrix of its own"


class Distances(nn.Module):
    """A term for `Biased`: (b, h, s, t), a number for each head and each bucket of distances."""

    def __init__(self, c: Config, both_ways: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.buckets, c.heads))
        self.max_distance, self.both_ways = c.max_distance, both_ways

    def draw(self, std: float) -> None:
        nn.init.normal_(self.weight, 0, std)

    def forward(self, q: Tensor, k: Tensor, mask: Mask) -> Tensor:
        ahead = mask.keys[:, None, :] - mask.positions[:, :, None]
        return F.embedding(self.bucket(ahead), self.weight).permute(0, 3, 1, 2)

    def bucket(self, ahead: Tensor) -> Tensor:
        """Near distances have a bucket each, those beyond it share: ever more, up to `reach`."""
        count, later = len(self.weight), torch.zeros_like(ahead)
        if self.both_ways:
            count //= 2
            later, ahead = (ahead > 0) * count, -ahead.abs()
        far, near = (-ahead).clamp(min=0), count // 2
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        grown = (far.to(wide) / near).log() / math.log(self.max_distance / near) * (count - near)
        shared = (near + grown.clamp(min=0).long()).clamp(max=count - 1)
        return later + torch.where(far < near, far, shared)


class Block(nn.Module):
    def __init__(self, c: Config, attend: Biased, reads: bool) -> None:
        super().__init__()
        shape = (c.dim, c.heads, c.heads, c.head_dim)
        kind = partial(Attention, *shape, bias=False, dropout=c.dropout, scale=1.0)
        self.norm1, self.norm2 = RMSNorm(c.dim, c.eps), RMSNorm(c.dim, c.eps)
        self.attn = kind(attend=attend)
        self.norm_cross = RMSNorm(c.dim, c.eps) if reads else None
        self.cross = kind() if reads else None
        mlp = GatedMLP if c.gated else MLP
        self.mlp = mlp(c.dim, c.hidden, ACTIVATIONS[c.act], bias=False, dropout=c.dropout)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Mask, encoded: Tensor | None, there: Mask) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        if self.cross is not None and self.norm_cross is not None:
            x = x + self.dropout(self.cross(self.norm_cross(x), there, encoded))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Stack(nn.Module):
    def __init__(self, c: Config, layers: int, reads: bool) -> None:
        super().__init__()
        self.distances = Distances(c, both_ways=not reads)
        attend = Biased(self.distances)
        self.blocks = nn.ModuleList(Block(c, attend, reads) for _ in range(layers))
        self.norm = RMSNorm(c.dim, c.eps)
        self.dropout = nn.Dropout(c.dropout)

    def forward(
        self, x: Tensor, mask: Mask, encoded: Tensor | None = None, there: Mask | None = None
    ) -> Tensor:
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, mask, encoded, there)
        return self.dropout(self.norm(x))


class Model(model.Model):
    heads: ClassVar = Config.heads_known
    headless: ClassVar = ("encoder", "none")

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.embed = Embedding(c.vocab, c.dim)
        self.encoder = Stack(c, c.layers, reads=False)
        if c.head != "encoder":
            self.decoder = Stack(c, c.decoder_layers, reads=True)
        if c.head in ("lm", "shared_lm"):
            self.head = Linear(c.dim, c.vocab, bias=False)
            if c.tied or c.head == "shared_lm":
                self.head.weight = self.embed.weight
        self.finish()

    @torch.no_grad()
    def initialize(self) -> None:
        """The spread that the config says, of embeddings; of what follows them by its fan-in."""
        super().initialize()
        for name, weight in self.named_parameters():
            if name.endswith("distances.weight"):
                weight.mul_(self.config.dim**-0.5)
            elif weight.dim() == 1:
                weight.fill_(self.config.init_std)
            elif weight.dim() == 2 and name not in ("embed.weight", "head.weight"):
                scores = self.config.head_dim if name.endswith(".q.weight") else 1
                weight.mul_((weight.shape[1] * scores) ** -0.5)

    def read(
        self, ids: Tensor, attention_mask: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Mask]:
        """The encoder's states, once a question where a cache keeps them."""
        if cache is not None and (known := cache.read(ids)) is not None:
            return known
        inputs.check(ids, self.config)
        there = masks.full(ids, attention_mask)
        encoded = self.encoder(self.embed(ids), there), there
        if cache is not None:
            cache.encoded = encoded
        return encoded

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        encoded, there = self.read(input_ids, attention_mask, cache)
        if self.config.head == "encoder":
            return encoded
        if decoder_input_ids is None:
            raise InputError(
                "decoder_input_ids: missing; the answer so far, one padding id at first"
            )
        inputs.check(decoder_input_ids, self.config, cache)
        mask = masks.causal(decoder_input_ids, decoder_attention_mask, cache=cache)
        x = self.decoder(self.embed(decoder_input_ids), mask, encoded, there)
        if self.config.head == "none":
            return x
        return self.head(x * self.config.dim**-0.5 if self.config.tied else x)
