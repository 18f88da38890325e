"""The reference's outputs for one checkpoint: the truth in fp64, its own error in fp32 and bf16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.parity.reference import Outputs, Reference

TOKENS = 37  # rotary embeddings and masks need a few dozen positions to show
ROWS, MORE_ROWS = 48, 256  # ratios of errors need many numbers, and some heads give few per row
LENGTHS = (TOKENS, TOKENS - 1, 33, 21, 6, 1)
# side -> how many of a row's padding tokens stand on the left
SIDES = {
    "left": lambda pad, row: pad,
    "right": lambda pad, row: 0,
    "mixed": lambda pad, row: pad * row // (len(LENGTHS) - 1),
}


@dataclass(frozen=True)
class Inputs:
    """Token ids and further inputs; `mask` is None if every token is real.

    `answer` is the decoder's input of an encoder-decoder; its outputs stand at these positions.
    """

    ids: Tensor
    extra: Mapping[str, Tensor]
    mask: Tensor | None = None
    answer: Inputs | None = None

    @property
    def named(self) -> dict[str, Tensor]:
        """The inputs under the reference's names, without masks."""
        answer = {} if self.answer is None else {"decoder_input_ids": self.answer.ids}
        return {"input_ids": self.ids, **self.extra, **answer}

    @property
    def positions(self) -> Inputs:
        """The inputs whose positions have outputs."""
        return self.answer or self

    def row(self, index: int) -> Inputs:
        """One row alone, without its padding."""
        keep = slice(None) if self.mask is None else self.mask[index].bool()
        extra = {name: x[index : index + 1, keep] for name, x in self.extra.items()}
        answer = None if self.answer is None else self.answer.row(index)
        return Inputs(self.ids[index : index + 1, keep], extra, answer=answer)

    def masked(self) -> Inputs:
        """The same inputs with masks of ones."""
        answer = None if self.answer is None else self.answer.masked()
        return Inputs(self.ids, self.extra, torch.ones_like(self.ids), answer)


class Floor:
    """The reference in a narrower dtype, and the truth for weights rounded to that dtype."""

    def __init__(self, truth: Outputs, outputs: Outputs) -> None:
        self.truth, self.outputs = truth, outputs


class Truth:
    """Everything that the checks compare with. The reference model itself is released."""

    def __init__(self, directory: Path, reference_class: str, seed: int = 0) -> None:
        self.directory, self.reference_class = directory, reference_class
        lifted = Reference(directory, reference_class, torch.float64, lifted=True)
        self.problems = lifted.problems
        self.config = lifted.config
        draw = Draw.like(self.config, seed)
        size = sum(p.numel() for p in lifted.model.parameters())
        self.padded = {side: draw.padded(side) for side in SIDES}
        self.unmasked = draw.unmasked()
        with torch.no_grad():
            first = lifted(self.padded["mixed"].row(0).named, watch=True)
            few = min(out.numel() for out in first.values()) < TOKENS
            self.batch = draw.full(max(4, min(MORE_ROWS if few else ROWS, 10**9 // size)))
            self.outputs = lifted.by_rows(self.batch.named)
            self.hidden = lifted.hidden(self.batch.named)
            alone = self.padded["mixed"]
            self.alone = [lifted(alone.row(i).named) for i in range(len(alone.ids))]
            if self.unmasked is not None:
                self.of_unmasked = lifted.by_rows(self.unmasked.named)
        self.cotangents = [_cotangents(out, seed + i) for i, out in enumerate(self.alone)]
        for i, weights in enumerate(self.cotangents):
            _backward(lifted(alone.row(i).named), weights)
        if self.unmasked is not None:
            self.unmasked_cotangents = _cotangents(self.of_unmasked, seed)
            _backward(lifted(self.unmasked.named), self.unmasked_cotangents)
        self.gradients = lifted.gradients()
        self.floors = {torch.float32: self._floor(lifted, torch.float32)}
        with torch.no_grad():
            for p in lifted.model.parameters():
                p.copy_(p.bfloat16())
        self.floors[torch.bfloat16] = self._floor(lifted, torch.bfloat16)

    @torch.no_grad()
    def _floor(self, lifted: Reference, dtype: torch.dtype) -> Floor:
        # the fused kernel ignores the option to reorder and upcast, so there the floor is eager's
        upcast = getattr(self.config, "reorder_and_upcast_attn", False)
        narrow = Reference(
            self.directory, self.reference_class, dtype, attention="eager" if upcast else ""
        )
        truth = self.outputs if dtype is torch.float32 else lifted.by_rows(self.batch.named)
        return Floor(truth, narrow.by_rows(self.batch.named))


class Draw:
    """Random inputs. No real token is the padding token, because the reference would mask it."""

    def __init__(
        self,
        vocab: int,
        seed: int,
        *,
        pad: int | None = None,
        types: int = 0,
        limit: int | None = None,
        answers: bool = False,
    ) -> None:
        self.random = torch.Generator().manual_seed(seed + 17)
        self.vocab, self.types, self.answers = vocab, types, answers
        self.pad = pad if (pad or 0) >= 0 else None  # some old configs store -1 for none
        self.tokens = min(TOKENS, limit or TOKENS)
        self.lengths = [min(length, self.tokens) for length in LENGTHS]
        self.rows = self.full(len(LENGTHS))

    @classmethod
    def like(cls, config: Any, seed: int) -> Draw:
        """Inputs for a reference's config."""
        rope = getattr(config, "rope_parameters", None) or {}
        limit = getattr(config, "max_position_embeddings", None)
        return cls(
            config.vocab_size,
            seed,
            pad=config.pad_token_id,
            types=getattr(config, "type_vocab_size", 0),
            limit=None if rope.get("rope_type") == "dynamic" else limit,
            answers=bool(getattr(config, "is_encoder_decoder", False)),
        )

    def full(self, rows: int) -> Inputs:
        """Rows without padding."""
        inputs = self._ids(rows)
        extra = {}
        if self.types:
            extra["token_type_ids"] = torch.randint(self.types, inputs.shape, generator=self.random)
        answer = Inputs(self._ids(rows), {}) if self.answers else None
        return Inputs(inputs, extra, answer=answer)

    def _ids(self, rows: int) -> Tensor:
        ids = torch.randint(self.vocab, (rows, self.tokens), generator=self.random)
        if self.pad is not None:
            ids[ids == self.pad] = (self.pad + 1) % self.vocab
        return ids

    def padded(self, side: str) -> Inputs:
        """The same rows padded on a side; padding positions hold random tokens."""
        inputs = self.full(len(LENGTHS))
        answer = inputs.answer
        if answer is not None:
            assert self.rows.answer is not None
            # different lengths, so that one mask cannot pass for the other
            answer = self._put(answer, self.rows.answer, self.lengths[::-1], side)
        return replace(self._put(inputs, self.rows, self.lengths, side), answer=answer)

    def _put(self, inputs: Inputs, rows: Inputs, lengths: list[int], side: str) -> Inputs:
        mask = torch.zeros_like(inputs.ids)
        for i, length in enumerate(lengths):
            start = SIDES[side](self.tokens - length, i)
            here = slice(start, start + length)
            mask[i, here] = 1
            inputs.ids[i, here] = rows.ids[i, :length]
            for name, values in inputs.extra.items():
                values[i, here] = rows.extra[name][i, :length]
        return replace(inputs, mask=mask)

    def unmasked(self) -> Inputs | None:
        """Padding tokens without a mask, if there is a padding token."""
        if self.pad is None:
            return None
        inputs = self.full(len(LENGTHS))
        for i, length in enumerate(self.lengths):
            inputs.ids[i, length:] = self.pad
        return inputs


def _backward(out: Outputs, weights: Outputs) -> None:
    torch.stack([(out[name] * weight).sum() for name, weight in weights.items()]).sum().backward()


def _cotangents(out: Outputs, seed: int) -> Outputs:
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(x.shape, generator=random, dtype=torch.float64) for name, x in out.items()
    }
