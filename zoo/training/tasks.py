"""Which objective a model's head asks for, and the data that it needs."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.components.decoder import Decoder
from zoo.components.model import Model
from zoo.errors import UsageError
from zoo.saving.origin import entry_of
from zoo.tokenizers import Tokenizer
from zoo.training.data import Split, Windows, encoded, prepare, split_ids
from zoo.training.objectives import CausalLM, Objective
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
        UsageError: The head foresees no next token.
    """
    if not isinstance(model, Decoder) or model.config.head != "lm":
        raise UsageError(
            f"head {model.config.head} of {entry_of(model).name}: only decoders with head lm are "
            "trained, on the next token"
        )
    split = tokens_of(recipe, model, tokenizer, source, place, processes)
    length, seed = recipe.context + 1, recipe.seed
    val = Windows(split.val, length, recipe.batch, seed + 1)
    return CausalLM(Windows(split.train, length, recipe.batch, seed), val)
