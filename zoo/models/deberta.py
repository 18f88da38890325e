"""DeBERTa: content and relative position attend to each other, each with its own projections."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from zoo.components import config, encoder, inputs, masks
from zoo.components.activations import ACTIVATIONS
from zoo.components.disentangled import DisentangledAttention, RelativePositions
from zoo.components.heads import MaskedLMHead
from zoo.components.masks import Mask
from zoo.components.mlp import MLP
from zoo.components.model import Embedding
from zoo.errors import ConfigError

PREDICTIONS = ("lm_predictions", "enhanced_masked_lm")  # heads on what pretraining left


class PositionTerms(config.Parsed, tuple[str, ...]):
    """Terms of the scores beside content to content: c2p, content to position, and p2c."""

    json_schema: ClassVar = {"type": ["array", "string", "null"]}

    @classmethod
    def from_json(cls, value: Any) -> "PositionTerms":
        names = value.split("|") if isinstance(value, str) else value or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"expected c2p and p2c in a list, or joined by |, found {value!r}")
        names = [name.strip().lower() for name in names]
        if others := [name for name in names if name not in ("c2p", "p2c")]:
            raise ConfigError(f"{others[0]!r} is not implemented (only c2p and p2c)")
        return cls(names)

    def to_json(self) -> list[str]:
        return list(self)


NO_TERMS = PositionTerms()


class Config(encoder.EncoderConfig):
    head: str = "masked_lm"
    vocab: config.Size = 128100
    layers: config.Layers = 12
    head_dim: config.Size = config.DERIVED
    pooler_dim: config.Size = config.DERIVED
    positions: config.Size = 512
    absolute_positions: bool = True  # added to the embeddings
    types: config.Count = 0  # of tokens
    eps: config.Positive = 1e-7
    relative: bool = False
    position_terms: PositionTerms = NO_TERMS
    max_distance: config.Limit = -1  # of distances; positions
    log_buckets: config.Limit = -1  # for distances, far ones together; each has its own
    shared_projections: bool = False  # positions use the projections of contents
    legacy: bool = config.DERIVED  # the masked LM's head is one that the reference added
    key_bias: bool = True  # the first version has none
    table_norm: str = "none"
    conv: config.Count = 0  # tokens that a convolution beside the first layer sees
    conv_groups: config.Size = 1
    conv_act: config.ActivationName = "tanh"
    summary_act: config.ActivationName | None = "gelu"
    heads_known: ClassVar = (
        *("masked_lm", *PREDICTIONS, "none"),
        *("sequence_classification", "token_classification", "question_answering"),
    )

    @property
    def limit(self) -> int | None:
        return (
            self.positions if self.absolute_positions or self.head == "enhanced_masked_lm" else None
        )

    @property
    def longest(self) -> int:
        return self.max_distance if self.max_distance > 0 else self.positions

    def derived(self) -> Mapping[str, Any]:
        own = {"head_dim": self.dim // self.heads, "pooler_dim": self.dim}
        return {**super().derived(), **own, "legacy": self.head not in PREDICTIONS}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.head_dim * self.heads != self.dim or self.pooler_dim != self.dim:
            yield "head_dim, pooler_dim: heads and poolers of other widths are not implemented"
        if self.table_norm not in ("none", "layer_norm"):
            yield f"table_norm: {self.table_norm!r} is not implemented (only none and layer_norm)"
        if self.conv and not self.conv % 2:
            yield f"conv: {self.conv} is even, and leaves sequences of another length"
        yield from config.divides("conv_groups", self.conv_groups, "dim", self.dim)


def relative_positions(c: Config) -> RelativePositions:
    """The table of vectors for distances that all layers share."""
    norm = nn.LayerNorm(c.dim, c.eps) if c.table_norm == "layer_norm" else None
    return RelativePositions(c.dim, c.longest, c.log_buckets, norm)


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
    """(b, s, d): the block's output `x`, plus a convolution over the block's input."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.conv = nn.Conv1d(c.dim, c.dim, c.conv, padding=c.conv // 2, groups=c.conv_groups)
        self.act, self.dropout = ACTIVATIONS[c.conv_act], nn.Dropout(c.dropout)
        self.norm = nn.LayerNorm(c.dim, c.eps)

    def draw(self, std: float) -> None:
        """Initialize the weight with this standard deviation, the bias with zeros."""
        nn.init.normal_(self.conv.weight, 0, std)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, before: Tensor, x: Tensor) -> Tensor:
        """(b, s, d) from (b, s, d) twice."""
        return self.norm(x + self.act(self.dropout(self.conv(before.mT).mT)))


class Model(encoder.Encoder):
    heads: ClassVar = Config.heads_known

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.embed = Embedding(c.vocab, c.dim, padding_idx=c.pad)
        self.positions = Embedding(c.positions, c.dim) if c.limit else None
        self.types = Embedding(c.types, c.dim) if c.types else None
        self.norm, self.dropout = nn.LayerNorm(c.dim, c.eps), nn.Dropout(c.dropout)
        self.distances = relative_positions(c) if c.relative else None
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
