"""The tokenizer of a run: characters of the text, or a checkpoint's."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.errors import UsageError
from zoo.tokenizers import CharTokenizer, Tokenizer, read, tokenizer
from zoo.training.data import is_tokenized
from zoo.training.recipe import Recipe
from zoo.training.run import RunDirectory
from zoo.training.text_files import documents

CHAR = "char"


def texts_of(source: Any) -> Any:
    """The documents of some data: of files, or a list of texts."""
    if isinstance(source, str | PathLike):
        return documents(Path(source))
    return source


def tokenizer_for(recipe: Recipe, source: Any, resumed: RunDirectory | None) -> Tokenizer | None:
    """The tokenizer that a recipe names; None where the base checkpoint's own is meant.

    Raises:
        UsageError: None is named and none is known.
    """
    if resumed is not None:
        return read(resumed.last) if recipe.base is None else None
    name = recipe.tokenizer
    if name is None:
        if recipe.base is not None or isinstance(source, Tensor):
            return None
        if isinstance(source, str | PathLike) and is_tokenized(Path(source)):
            return None
        raise UsageError("tokenizer: missing; char reads any text, a letter a token")
    if name == CHAR:
        return CharTokenizer.of("".join(texts_of(source)))
    return tokenizer(name)
