"""Tokens to train on: one long row mapped from a file, and the part that is held back."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from zoo.errors import UsageError, listing
from zoo.tokenizers import Tokenizer
from zoo.training.text_files import documents

TRAIN, VAL = "train.bin", "val.bin"  # nanoGPT's names; ids of two bytes each, without a header
PIECE = 1 << 20  # ids that are written at a time
CODES = {torch.uint16: "H", torch.int32: "i"}


class Split(NamedTuple):
    """(n,) tokens to train on, and those that are held back."""

    train: Tensor
    val: Tensor


def dtype_for(vocab: int) -> torch.dtype:
    """The narrowest whole numbers that hold every id."""
    return torch.uint16 if vocab <= 1 << 16 else torch.int32


def read_tokens(path: Path, dtype: torch.dtype = torch.uint16) -> Tensor:
    """Map a file of ids: (n,), read from the disk as they are needed.

    Raises:
        UsageError: There is no such file, or its size is no whole number of ids.
    """
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    count, rest = divmod(size, dtype.itemsize)
    if rest or not count:
        raise UsageError(f"{path}: {size} bytes, expected ids of {dtype.itemsize} bytes each")
    return torch.from_file(str(path), shared=False, size=count, dtype=dtype)


def write_tokens(file: BinaryIO, ids: Iterable[int], dtype: torch.dtype) -> int:
    """Append ids to a file, and return how many there were."""
    count, rest = 0, iter(ids)
    while piece := array(CODES[dtype], islice(rest, PIECE)):
        piece.tofile(file)
        count += len(piece)
    return count


def encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[int]:
    """The ids of all documents; an end token stands between two of them."""
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    for number, text in enumerate(texts):
        yield from end if number else ()
        yield from tokenizer.encode(text, bos=False, eos=False)


def is_tokenized(data: Path) -> bool:
    """Whether a directory holds token files, as nanoGPT's preparation writes them."""
    return data.is_dir() and (data / TRAIN).is_file()


def prepare(
    data: Path,
    tokenizer: Tokenizer | None,
    directory: Path,
    val_share: float,
    vocab: int,
    *,
    write: bool = True,
) -> Split:
    """Map the token files of some data; of texts they are written first, into `directory`.

    `write=False`: another process has written them.

    Raises:
        UsageError: The data holds no text, too little of it, or ids outside the vocabulary.
    """
    dtype = dtype_for(vocab)
    if is_tokenized(data):
        train = read_tokens(data / TRAIN, dtype)
        val = read_tokens(data / VAL, dtype) if (data / VAL).is_file() else train[:0]
        split = Split(train, val) if len(val) else _split(train, val_share)
        return _checked(split, vocab, data)
    if tokenizer is None:
        raise UsageError(f"{data}: texts, and no tokenizer to read them with: name one")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "tokens.bin"
    if write:
        with path.open("wb") as file:
            if not write_tokens(file, encoded(documents(data), tokenizer), dtype):
                raise UsageError(f"{data}: holds no text")
    return _checked(_split(read_tokens(path, dtype), val_share), vocab, data)


def split_ids(ids: Tensor, val_share: float, vocab: int) -> Split:
    """The same of ids in memory."""
    if ids.dim() != 1 or ids.is_floating_point():
        raise UsageError(f"ids: expected one row of whole numbers, found {tuple(ids.shape)}")
    return _checked(_split(ids, val_share), vocab, Path("ids"))


def _split(tokens: Tensor, val_share: float) -> Split:
    cut = int(len(tokens) * (1 - val_share))
    return Split(tokens[:cut], tokens[cut:])


def _checked(split: Split, vocab: int, where: Path) -> Split:
    for part in split:
        for piece in part.split(PIECE):
            if outside := [int(id) for id in piece.int().unique() if not 0 <= id < vocab]:
                raise UsageError(
                    f"{where}: ids {listing(map(str, outside))} are outside the model's vocabulary "
                    f"of {vocab}: they are another tokenizer's"
                )
    return split


class Windows:
    """Batches of (b, length) ids at random places, which depend on the seed and the step alone."""

    def __init__(self, tokens: Tensor, length: int, batch: int, seed: int) -> None:
        if len(tokens) < length:
            raise UsageError(
                f"{len(tokens):,} tokens, and a sequence has {length:,}: take a shorter context or "
                "more text"
            )
        self.tokens, self.length, self.batch, self.seed = tokens, length, batch, seed

    def __call__(self, step: int) -> Tensor:
        """The batch of a step."""
        last = len(self.tokens) - self.length
        starts = torch.randint(last + 1, (self.batch,), generator=generator(self.seed, step))
        rows = [self.tokens[start : start + self.length] for start in starts.tolist()]
        return torch.stack(rows).long()


def generator(*numbers: int) -> torch.Generator:
    """Random numbers that depend on these numbers alone, such as a seed and a step."""
    return torch.Generator().manual_seed(mixed(*numbers))


def mixed(*numbers: int) -> int:
    """A seed made of several numbers: near ones give unrelated streams (splitmix64's finalizer)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
