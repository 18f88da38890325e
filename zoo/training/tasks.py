"""Which objective a model's head asks for, and the data that it needs."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.components.decoder import Decoder
from zoo.components.encoder import Encoder
from zoo.components.encoder_decoder import EncoderDecoder
from zoo.components.heads import LOGITS
from zoo.components.model import Model
from zoo.errors import UsageError
from zoo.registry import Architecture
from zoo.saving.origin import entry_of
from zoo.tokenizers import Tokenizer
from zoo.training.data import Split, Windows, encoded, prepare, split_ids
from zoo.training.objectives import CausalLM, MaskedLM, Objective, Spans, hidden_spans
from zoo.training.processes import Processes
from zoo.training.recipe import Recipe


def tokens_of(
    recipe: Recipe,
    model: Model,
    tokenizer: Tokenizer | None,
    source: Any,
    place: Path,
    processes: Processes,
) -> Split:
    """The tokens of some data: of files, of a list of texts, or ids themselves."""
    vocab = model.config.vocab
    if isinstance(source, Tensor):
        return split_ids(source, recipe.val_share, vocab)
    if not isinstance(source, str | PathLike):
        if tokenizer is None:
            raise UsageError("texts, and no tokenizer to read them with: pass tokenizer=")
        ids = torch.tensor(list(encoded(source, tokenizer)))
        return split_ids(ids, recipe.val_share, vocab)
    data = Path(source).expanduser()
    if processes.is_first:
        split = prepare(data, tokenizer, place, recipe.val_share, vocab)
        processes.wait()
        return split
    processes.wait()
    return prepare(data, tokenizer, place, recipe.val_share, vocab, write=False)


def objective_of(
    recipe: Recipe,
    model: Model,
    tokenizer: Tokenizer | None,
    source: Any,
    place: Path,
    processes: Processes,
) -> Objective:
    """The objective of a model's head.

    Raises:
        UsageError: The head foresees no tokens.
    """
    split = tokens_of(recipe, model, tokenizer, source, place, processes)

    def windows(length: int) -> tuple[Windows, Windows]:
        train = Windows(split.train, length, recipe.batch, recipe.seed)
        return train, Windows(split.val, length, recipe.batch, recipe.seed + 1)

    config = model.config
    if isinstance(model, Decoder) and config.head == "lm":
        return CausalLM(*windows(recipe.context + 1))
    if isinstance(model, Encoder) and config.head == "masked_lm":
        mask = config.vocab - 1 if tokenizer is None or tokenizer.mask is None else tokenizer.mask
        return MaskedLM(*windows(recipe.context), mask, config.vocab)
    if isinstance(model, EncoderDecoder) and config.head in LOGITS:
        return Spans(*windows(recipe.context), config.start, config.vocab)
    raise UsageError(
        f"head {config.head} of {entry_of(model).name}: only decoders with head lm, encoders with "
        "head masked_lm and encoder-decoders with head lm are trained"
    )


def special_tokens(entry: Architecture, tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    """Config fields `vocab` and `pad` of a new model: its tokenizer's, and more rows.

    A masked LM needs a token that hides others; an encoder-decoder one for each span, and one that
    answers begin with.
    """
    size, pad = tokenizer.vocab_size, tokenizer.pad
    if issubclass(entry.model, EncoderDecoder):
        spans = hidden_spans(context)[1]
        return {"vocab": size + 1 + spans, "pad": size if pad is None else pad}
    if issubclass(entry.model, Encoder):
        needs = "positions_after_pad" in entry.config_class.model_fields and pad is None
        more = (tokenizer.mask is None) + needs
        return {"vocab": size + more, "pad": size if needs else pad}
    return {"vocab": size}
