"""T5: an encoder, a decoder that attends to it, and learned biases by distance for positions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.components import config
from zoo.components.activations import ACTIVATIONS
from zoo.components.attention import Attend, Attention, Biased, attend
from zoo.components.encoder_decoder import EncoderDecoder
from zoo.components.masks import Cache, Mask
from zoo.components.mlp import MLP, GatedMLP
from zoo.components.model import Embedding, Linear
from zoo.components.norm import RMSNorm
from zoo.components.relative_bias import RelativeBias


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    vocab: int = 32128
    dim: int = 512
    layers: int = 6
    decoder_layers: int = config.DERIVED  # layers
    heads: int = 8
    head_dim: int = 64
    hidden: int = 2048
    mlp: str = "relu"  # gated- before it: of two projections
    act: str = config.DERIVED  # what mlp says
    gated: bool = config.DERIVED
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dropout: float = 0.1
    tied: bool = True  # and the states scaled before it, which an untied head's are not
    may_share: bool = True  # the embedding is the head where files hold no other
    init_std: float = 1.0
    pad: int | None = 0
    start: int | None = config.DERIVED  # what answers begin with: pad
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
        if self.head == "shared_lm" and not self.may_share:
            yield "may_share: false, so the head is a matrix of its own"


def attention(c: Config, attend: Attend = attend) -> Attention:
    """Attention without biases, whose scores are not scaled."""
    shape = (c.dim, c.heads, c.heads, c.head_dim)
    return Attention(*shape, bias=False, dropout=c.dropout, scale=1.0, attend=attend)


def mlp(c: Config) -> nn.Module:
    """The MLP, gated or plain."""
    kind = GatedMLP if c.gated else MLP
    return kind(c.dim, c.hidden, ACTIVATIONS[c.act], bias=False, dropout=c.dropout)


class EncoderBlock(nn.Module):
    def __init__(self, c: Config, attend: Attend) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.dim, c.eps), RMSNorm(c.dim, c.eps)
        self.attn = attention(c, attend)
        self.mlp = mlp(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class DecoderBlock(nn.Module):
    def __init__(self, c: Config, attend: Attend) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.dim, c.eps), RMSNorm(c.dim, c.eps)
        self.attn = attention(c, attend)
        self.norm_cross = RMSNorm(c.dim, c.eps)
        self.cross = attention(c)
        self.mlp = mlp(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Mask, encoded: Tensor, encoded_mask: Mask) -> Tensor:
        """(b, s, d) from (b, s, d), and from (b, t, d) of the encoder's states."""
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        x = x + self.dropout(self.cross(self.norm_cross(x), encoded_mask, encoded))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.distances = RelativeBias(c.heads, c.buckets, c.max_distance, both_ways=True)
        attend = Biased(self.distances)
        self.blocks = nn.ModuleList(EncoderBlock(c, attend) for _ in range(c.layers))
        self.norm = RMSNorm(c.dim, c.eps)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.dropout(self.norm(x))


class Decoder(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.distances = RelativeBias(c.heads, c.buckets, c.max_distance, both_ways=False)
        attend = Biased(self.distances)
        self.blocks = nn.ModuleList(DecoderBlock(c, attend) for _ in range(c.decoder_layers))
        self.norm = RMSNorm(c.dim, c.eps)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Mask, encoded: Tensor, encoded_mask: Mask) -> Tensor:
        """(b, s, d) from (b, s, d), and from (b, t, d) of the encoder's states."""
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, mask, encoded, encoded_mask)
        return self.dropout(self.norm(x))


class Model(EncoderDecoder):
    heads: ClassVar = Config.heads_known
    headless: ClassVar = ("encoder", "none")

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.embed = Embedding(c.vocab, c.dim)
        self.encoder = Encoder(c)
        if c.head != "encoder":
            self.decoder = Decoder(c)
        if c.head in ("lm", "shared_lm"):
            self.head = Linear(c.dim, c.vocab, bias=False)
            if c.tied or c.head == "shared_lm":
                self.head.weight = self.embed.weight
        self.finish()

    @torch.no_grad()
    def initialize(self) -> None:
        """Scale by the config's init_std: embeddings by it alone, matrices by their fan-in too."""
        super().initialize()
        for name, weight in self.named_parameters():
            if name.endswith("distances.weight"):
                weight.mul_(self.config.dim**-0.5)
            elif weight.dim() == 1:
                weight.fill_(self.config.init_std)
            elif weight.dim() == 2 and name not in ("embed.weight", "head.weight"):
                scores = self.config.head_dim if name.endswith(".q.weight") else 1
                weight.mul_((weight.shape[1] * scores) ** -0.5)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """(b, s, v) of logits for the answer so far, or the hidden states of a bare model."""
        memory = self.read(input_ids, attention_mask, cache)
        if self.config.head == "encoder":
            return memory.states
        mask = self.mask(decoder_input_ids, decoder_attention_mask, cache)
        x = self.decoder(self.embed(decoder_input_ids), mask, memory.states, memory.mask)
        if self.config.head == "none":
            return x
        return self.head(x * self.config.dim**-0.5 if self.config.tied else x)
