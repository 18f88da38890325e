"""DeBERTa: what a token is and where it stands look at each other through weights of their own."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from zoo.components import config, encoder, inputs, masks
from zoo.components.activations import ACTIVATIONS
from zoo.components.attention import Attention, attend
from zoo.components.heads import MaskedLMHead
from zoo.components.masks import Mask
from zoo.components.mlp import MLP
from zoo.components.model import Embedding, Linear
from zoo.errors import ConfigError

PREDICTIONS = ("lm_predictions", "enhanced_masked_lm")  # heads on what pretraining left


class PositionTerms(config.Parsed, tuple[str, ...]):
    """Who looks at whom beside contents at contents: c2p, contents at places, and p2c."""

    json_schema: ClassVar = {"type": ["array", "string", "null"]}

    @classmethod
    def from_json(cls, value: Any) -> "PositionTerms":
        names = value.split("|") if isinstance(value, str) else value or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"expected c2p and p2c in a list, or joined by |, found {value!r}")
        names = [name.strip().lower() for name in names]
        if odd := [name for name in names if name not in ("c2p", "p2c")]:
            raise ConfigError(f"{odd[0]!r} is not implemented (only c2p and p2c)")
        return cls(names)

    def to_json(self) -> list[str]:
        return list(self)


NO_TERMS = PositionTerms()


class Config(encoder.Config):
    head: str = "masked_lm"
    vocab: config.Size = 128100
    layers: config.Layers = 12
    head_dim: config.Size = config.DERIVED
    pooler_dim: config.Size = config.DERIVED
    positions: config.Size = 512
    absolute_positions: bool = True  # inputs hold their absolute places
    types: config.Count = 0  # of tokens
    eps: config.Positive = 1e-7
    relative: bool = False
    position_terms: PositionTerms = NO_TERMS
    max_distance: config.Limit = -1  # of distances; positions
    log_buckets: config.Limit = -1  # for distances, far ones together; each has its own
    shared_projections: bool = False  # places go through the projections of contents
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


class Distances(nn.Module):
    """A vector for each distance, or for each bucket of them, in both directions."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.buckets, self.max_distance = c.log_buckets, c.longest
        self.span = self.buckets if self.buckets > 0 else self.max_distance
        self.embed = Embedding(2 * self.span, c.dim)
        self.norm = nn.LayerNorm(c.dim, c.eps) if c.table_norm == "layer_norm" else None

    def once(self, mask: Mask) -> tuple[Tensor, Tensor]:
        """The same for all layers."""
        return mask.keep(self, lambda: self(mask.positions))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(p, d), the vectors, and (b, 1, s, t), which of them stands between query and key."""
        vectors = self.embed.weight
        return vectors if self.norm is None else self.norm(vectors), self.rows(positions)

    def rows(self, positions: Tensor) -> Tensor:
        behind = positions[:, None, :, None] - positions[:, None, None, :]
        if self.buckets > 0:
            behind = self.bucket(behind)
        return (behind + self.span).clamp(0, 2 * self.span - 1)

    def bucket(self, behind: Tensor) -> Tensor:
        """The half of them that is near counts in steps, the rest in ever larger ones."""
        near = self.buckets // 2
        wide = torch.promote_types(self.embed.weight.dtype, torch.float32)
        far = behind.abs().clamp(min=near).to(wide)
        most = torch.tensor((self.max_distance - 1) / near, dtype=wide).log()
        grown = ((far / near).log() / most * (near - 1)).ceil() + near
        return torch.where(behind.abs() <= near, behind, grown.long() * behind.sign())


class Disentangled(Attention):
    def __init__(self, c: Config, distances: Callable[[Mask], tuple[Tensor, Tensor]] | None):
        scale = (c.head_dim * (1 + len(c.position_terms))) ** -0.5
        shape = (c.dim, c.heads, c.heads, c.head_dim)
        super().__init__(*shape, bias=True, dropout=c.attn_dropout, scale=scale, attend=self.look)
        self.k = Linear(c.dim, c.dim, bias=c.key_bias)
        self.position_terms, self.distances = c.position_terms, distances
        own = [] if c.shared_projections or distances is None else c.position_terms
        self.pos_k = Linear(c.dim, c.dim, bias=c.key_bias) if "c2p" in own else None
        self.pos_q = Linear(c.dim, c.dim) if "p2c" in own else None
        self.table_dropout = nn.Dropout(c.dropout)

    def look(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float
    ) -> Tensor:
        if self.distances is None or not self.position_terms:
            return attend(q, k, v, mask, scale, dropout)
        vectors, rows = self.distances(mask)
        vectors, bias = self.table_dropout(vectors), torch.zeros((), dtype=q.dtype, device=q.device)
        if "c2p" in self.position_terms:
            bias = bias + self.at(rows, q, (self.pos_k or self.k)(vectors))
        if "p2c" in self.position_terms:
            bias = bias + self.at(rows.mT, k, (self.pos_q or self.q)(vectors)).mT
        return attend(q, k, v, mask, scale, dropout, bias * scale)

    def at(self, rows: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
        """(b, h, s, t), each of x against the vector of its row."""
        scores = x @ rearrange(vectors, "p (h e) -> h e p", e=self.head_dim)
        return scores.gather(-1, rows.expand(*scores.shape[:2], -1, -1))


class Block(nn.Module):
    def __init__(self, c: Config, distances: Callable[[Mask], tuple[Tensor, Tensor]] | None):
        super().__init__()
        self.attn = Disentangled(c, distances)
        self.norm1, self.norm2 = nn.LayerNorm(c.dim, c.eps), nn.LayerNorm(c.dim, c.eps)
        self.mlp = MLP(c.dim, c.hidden, ACTIVATIONS[c.act], bias=True)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Mask, source: Tensor | None = None) -> Tensor:
        x = self.norm1(x + self.dropout(self.attn(x, mask, source)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class Conv(nn.Module):
    """Beside the first layer, what the neighbors were before it."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.conv = nn.Conv1d(c.dim, c.dim, c.conv, padding=c.conv // 2, groups=c.conv_groups)
        self.act, self.dropout = ACTIVATIONS[c.conv_act], nn.Dropout(c.dropout)
        self.norm = nn.LayerNorm(c.dim, c.eps)

    def draw(self, std: float) -> None:
        nn.init.normal_(self.conv.weight, 0, std)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, before: Tensor, x: Tensor) -> Tensor:
        return self.norm(x + self.act(self.dropout(self.conv(before.mT).mT)))


class Model(encoder.Encoder):
    heads: ClassVar = Config.heads_known

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.embed = Embedding(c.vocab, c.dim, padding_idx=c.pad)
        self.positions = Embedding(c.positions, c.dim) if c.limit else None
        self.types = Embedding(c.types, c.dim) if c.types else None
        self.norm, self.dropout = nn.LayerNorm(c.dim, c.eps), nn.Dropout(c.dropout)
        self.distances = Distances(c) if c.relative else None
        look = self.distances.once if self.distances else None
        self.blocks = nn.ModuleList(Block(c, look) for _ in range(c.layers))
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
        inputs.check(input_ids, self.config)
        mask = masks.full(input_ids, attention_mask)
        x = self.embed(input_ids)
        places = None if self.positions is None else self.positions(mask.positions)
        if self.config.absolute_positions:
            x = x + places
        if self.types is not None:
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            inputs.check_ids(types, self.config.types, "token type", input_ids)
            x = x + self.types(types)
        x = self.dropout(self.norm(x))
        if attention_mask is not None:  # a convolution sees nothing where padding stands
            x = x * attention_mask[..., None].to(x.dtype)
        states = [x]
        for n, block in enumerate(self.blocks):
            x = block(x, mask)
            if n == 0 and self.conv is not None:
                x = self.conv(states[0], x)
            states.append(x)
        if self.config.head == "enhanced_masked_lm" and not self.config.absolute_positions:
            x = states[-2] + places
            for _ in range(2):  # places ask, and the last layer answers from the one before it
                x = self.blocks[-1](x, mask, states[-2])
        if self.config.head in PREDICTIONS:
            return self.predictions(x)
        return self.read_out(x, attention_mask)
