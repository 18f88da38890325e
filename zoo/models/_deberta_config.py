"""DeBERTa's config: where positions enter, and what its versions and heads differ in."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from zoo.components import config, encoder
from zoo.components.disentangled import NO_TERMS, PositionTerms, RelativePositions

PREDICTIONS = ("lm_predictions", "enhanced_masked_lm")  # heads on what pretraining left


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
        """How many tokens have positions; None where only distances count."""
        return (
            self.positions if self.absolute_positions or self.head == "enhanced_masked_lm" else None
        )

    @property
    def longest(self) -> int:
        """The distance beyond which all distances share a vector."""
        return self.max_distance if self.max_distance > 0 else self.positions

    def derived(self) -> Mapping[str, Any]:
        """Widths from dim and heads; a head that pretraining left is not a legacy one."""
        own = {"head_dim": self.dim // self.heads, "pooler_dim": self.dim}
        return {**super().derived(), **own, "legacy": self.head not in PREDICTIONS}

    def problems(self) -> Iterator[str]:
        """Widths, norms and convolutions that are not implemented."""
        yield from super().problems()
        if self.head_dim * self.heads != self.dim or self.pooler_dim != self.dim:
            yield "head_dim, pooler_dim: heads and poolers of other widths are not implemented"
        if self.table_norm not in ("none", "layer_norm"):
            yield f"table_norm: {self.table_norm!r} is not implemented (only none and layer_norm)"
        if self.conv and not self.conv % 2:
            yield f"conv: {self.conv} is even, and leaves sequences of another length"
        yield from config.divides("conv_groups", self.conv_groups, "dim", self.dim)

    def relative_positions(self) -> RelativePositions | None:
        """The table of vectors for distances that all layers share."""
        if not self.relative:
            return None
        norm = nn.LayerNorm(self.dim, self.eps) if self.table_norm == "layer_norm" else None
        return RelativePositions(self.dim, self.longest, self.log_buckets, norm)
