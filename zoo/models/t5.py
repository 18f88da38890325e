"""T5: an encoder, a decoder that attends to it, and learned biases by distance for positions."""

import torch
from torch import Tensor, nn

from zoo.components.attention import Attend, Biased
from zoo.components.encoder_decoder import EncoderDecoder, Stack
from zoo.components.masks import Cache, Mask
from zoo.components.model import Embedding
from zoo.components.norm import RMSNorm
from zoo.components.relative_bias import RelativeBias
from zoo.models._t5_config import Config


class EncoderBlock(nn.Module):
    def __init__(self, c: Config, attend: Attend) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.dim, c.eps), RMSNorm(c.dim, c.eps)
        self.attn = c.attention(attend)
        self.mlp = c.feed_forward()
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class DecoderBlock(nn.Module):
    def __init__(self, c: Config, attend: Attend) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.dim, c.eps), RMSNorm(c.dim, c.eps)
        self.attn = c.attention(attend)
        self.norm_cross = RMSNorm(c.dim, c.eps)
        self.cross = c.attention()
        self.mlp = c.feed_forward()
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Mask, encoded: Tensor, encoded_mask: Mask) -> Tensor:
        """(b, s, d) from (b, s, d), and from (b, t, d) of the encoder's states."""
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        x = x + self.dropout(self.cross(self.norm_cross(x), encoded_mask, encoded))
        return x + self.dropout(self.mlp(self.norm2(x)))


def stack(c: Config, block: type[nn.Module], layers: int, *, both_ways: bool) -> Stack:
    """Blocks that share one bias by distance."""
    distances = RelativeBias(c.heads, c.buckets, c.max_distance, both_ways=both_ways)
    attend = Biased(distances)
    blocks = (block(c, attend) for _ in range(layers))
    return Stack(distances, blocks, RMSNorm(c.dim, c.eps), c.dropout)


class Model(EncoderDecoder):
    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.embed = Embedding(c.vocab, c.dim)
        self.encoder = stack(c, EncoderBlock, c.layers, both_ways=True)
        if c.head != "encoder":
            self.decoder = stack(c, DecoderBlock, c.decoder_layers, both_ways=False)
        self.add_head()

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
