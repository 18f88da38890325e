"""DeBERTa: content and relative position attend to each other, each with its own projections."""

from torch import Tensor, nn

from zoo.components import encoder, inputs, masks
from zoo.components.activations import ACTIVATIONS
from zoo.components.convolution import Conv1d
from zoo.components.disentangled import DisentangledAttention, RelativePositions
from zoo.components.heads import MaskedLMHead
from zoo.components.masks import Mask
from zoo.components.mlp import MLP
from zoo.components.model import Embedding
from zoo.models._deberta_config import PREDICTIONS, Config


class Block(nn.Module):
    def __init__(self, c: Config, relative: RelativePositions | None) -> None:
        super().__init__()
        self.attn = DisentangledAttention(
            c.dim,
            c.heads,
            c.head_dim,
            terms=c.position_terms,
            relative=None if relative is None else relative.once,
            key_bias=c.key_bias,
            shared_projections=c.shared_projections,
            dropout=c.attn_dropout,
            table_dropout=c.dropout,
        )
        self.norm1, self.norm2 = nn.LayerNorm(c.dim, c.eps), nn.LayerNorm(c.dim, c.eps)
        self.mlp = MLP(c.dim, c.hidden, ACTIVATIONS[c.act], bias=True)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Mask, source: Tensor | None = None) -> Tensor:
        """(b, s, d) from (b, s, d); keys and values come from `source` if given."""
        x = self.norm1(x + self.dropout(self.attn(x, mask, source)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class Conv(nn.Module):
    """Beside the first block: what it gives, plus a convolution over what it reads."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.conv = Conv1d(c.dim, c.dim, c.conv, padding=c.conv // 2, groups=c.conv_groups)
        self.act, self.dropout = ACTIVATIONS[c.conv_act], nn.Dropout(c.dropout)
        self.norm = nn.LayerNorm(c.dim, c.eps)

    def forward(self, before: Tensor, x: Tensor) -> Tensor:
        """(b, s, d) from the block's input and output, (b, s, d) each."""
        return self.norm(x + self.act(self.dropout(self.conv(before.mT).mT)))


class Model(encoder.Encoder):
    heads = Config.heads_known

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.embed = Embedding(c.vocab, c.dim, padding_idx=c.pad)
        self.positions = Embedding(c.positions, c.dim) if c.limit else None
        self.types = Embedding(c.types, c.dim) if c.types else None
        self.norm, self.dropout = nn.LayerNorm(c.dim, c.eps), nn.Dropout(c.dropout)
        self.distances = c.relative_positions()
        self.blocks = nn.ModuleList(Block(c, self.distances) for _ in range(c.layers))
        self.conv = Conv(c) if c.conv else None
        if c.head in PREDICTIONS:
            act = ACTIVATIONS[c.head_act]
            self.predictions = MaskedLMHead(c.dim, c.vocab, act, c.eps, self.embed, lone_bias=False)
        self.add_head()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> encoder.Output:
        """What the config's head gives, from (b, s) of token ids."""
        inputs.check(input_ids, self.config)
        mask = masks.full(input_ids, attention_mask)
        x = self.embed(input_ids)
        positions = None if self.positions is None else self.positions(mask.positions)
        if self.config.absolute_positions:
            x = x + positions
        if self.types is not None:
            x = x + self.types(inputs.token_types(token_type_ids, self.config.types, input_ids))
        x = self.dropout(self.norm(x))
        if attention_mask is not None:  # the convolution reads zeros at padding
            x = x * attention_mask[..., None].to(x.dtype)
        before = x
        for layer, block in enumerate(self.blocks):
            before, x = x, block(x, mask)
            if layer == 0 and self.conv is not None:
                x = self.conv(before, x)
        if self.config.head == "enhanced_masked_lm" and not self.config.absolute_positions:
            x = before + positions
            for _ in range(2):  # the last block again: positions are queries, its input is keys
                x = self.blocks[-1](x, mask, before)
        if self.config.head in PREDICTIONS:
            return self.predictions(x)
        return self.read_out(x, attention_mask)
