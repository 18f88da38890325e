"""What a masked LM would put where a text has gaps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from zoo.checkpoints.finite import check_finite, watched
from zoo.checkpoints.sources import Ref
from zoo.components.heads import MaskedLMHead
from zoo.components.model import Model
from zoo.errors import InputError, UsageError
from zoo.text.inference import at_rest, called, device_of, model_of


class Guess(NamedTuple):
    text: str
    id: int
    probability: float


def fill(model: Model | Ref, text: str, *, top: int = 5, **reading: Any) -> list[list[Guess]]:
    """For each mask in a text, in order, the `top` tokens for it, the likeliest first.

    Masks are written as the checkpoint's tokenizer names them ([MASK], <mask>); other special
    tokens in the text are such too. Each mask is filled for itself, as the others stay hidden.
    `reading` is as `zoo.load` has it: head, config, ignore_config, revision …
    """
    model = model_of(model, **reading)
    if not any(isinstance(part, MaskedLMHead) for part in model.children()):
        more = ". Load it with head='masked_lm'" if "masked_lm" in model.heads else ""
        raise UsageError(f"{called(model)}: only a masked LM fills gaps{more}")
    tokenizer = model.tokenizer
    if tokenizer.mask is None:
        raise InputError(f"{tokenizer!r}: names no mask token, so no text can have a gap")
    most = min(model.config.vocab, tokenizer.vocab_size)
    if type(top) is not int or not 1 <= top <= most:
        raise UsageError(f"top={top!r}: expected a number of tokens from 1 to {most}")
    ids = torch.tensor([tokenizer.encode(text, special=True)], device=device_of(model))
    gaps = ids[0] == tokenizer.mask
    if not gaps.any():
        raise InputError(f"no {tokenizer.token(tokenizer.mask)} in the text")
    with at_rest(model), watched(model):
        out = model(ids)
        logits = (out[0] if isinstance(out, tuple) else out)[0, gaps]
        check_finite(model, logits, row=lambda n: None, again=lambda: model(ids))
    shares = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    best = shares[:, :most].topk(top)  # rows beyond the vocabulary make a table's size round
    return [
        [Guess(tokenizer.decode([id]), id, share) for id, share in zip(*row, strict=True)]
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
