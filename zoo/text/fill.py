"""`fill`: predict the masked tokens of a text with a masked language model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from zoo.checkpoints.finite import check_finite, watched
from zoo.checkpoints.sources import Ref
from zoo.components.heads import MaskedLMHead
from zoo.components.model import Model
from zoo.errors import InputError, UsageError
from zoo.text.inference import at_rest, device_of, model_of, name_of


class Guess(NamedTuple):
    """A token for a mask, with its probability."""

    text: str
    id: int
    probability: float


def fill(model: Model | Ref, text: str, *, top: int = 5, **loading: Any) -> list[list[Guess]]:
    """Predict the masked tokens of a text.

    Masks are written as the checkpoint's tokenizer names them ([MASK], <mask>); other special
    tokens in the text are read as such too. Each mask is predicted while the others stay masked.

    Args:
        model: a masked language model, or a reference that `zoo.load` loads.
        text: a text with one mask or more.
        top: tokens returned for each mask.
        **loading: options of `zoo.load`, for a reference: head, config, ignore_config, revision …

    Returns:
        For each mask in order, the `top` tokens, most likely first, with their probabilities.

    Raises:
        UsageError: the model has no masked LM head, or `top` is out of range.
        InputError: the text has no mask, or the tokenizer has no mask token.

    Example:
        >>> model = zoo.load("tiny-bert")
        >>> masks = zoo.fill(model, "the [MASK] fox", top=3)
        >>> len(masks), len(masks[0])
        (1, 3)
        >>> masks[0][0].probability >= masks[0][1].probability
        True
    """
    model = model_of(model, **loading)
    if not any(isinstance(part, MaskedLMHead) for part in model.children()):
        more = ". Load it with head='masked_lm'" if "masked_lm" in model.heads else ""
        raise UsageError(f"{name_of(model)}: only a masked LM predicts masked tokens{more}")
    tokenizer = model.tokenizer
    if tokenizer.mask is None:
        raise InputError(f"{tokenizer!r}: has no mask token, so no text can have a mask")
    most = min(model.config.vocab, tokenizer.vocab_size)
    if type(top) is not int or not 1 <= top <= most:
        raise UsageError(f"top={top!r}: expected a number of tokens from 1 to {most}")
    ids = torch.tensor([tokenizer.encode(text, special=True)], device=device_of(model))
    masks = ids[0] == tokenizer.mask
    if not masks.any():
        raise InputError(f"no {tokenizer.token(tokenizer.mask)} in the text")
    with at_rest(model), watched(model):
        out = model(ids)
        logits = (out[0] if isinstance(out, tuple) else out)[0, masks]
        check_finite(model, logits, row=lambda n: None, again=lambda: model(ids))
    shares = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    best = shares[:, :most].topk(top)  # rows beyond the vocabulary only pad the embedding's size
    return [
        [Guess(tokenizer.decode([id]), id, share) for id, share in zip(*row, strict=True)]
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
