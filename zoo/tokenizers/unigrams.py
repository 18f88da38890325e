"""SentencePiece's unigrams under fairseq's ids (XLM-RoBERTa), by `tokenizers` as the reference has.

Its own <unk>, <s> and </s> make room for <s>, <pad>, </s> and <unk>; <mask> comes last.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from zoo.errors import BadTokenizer, listing
from zoo.tokenizers.engines import Added, refusing
from zoo.tokenizers.fast import Fast
from zoo.tokenizers.pieces import MOST, SPACE
from zoo.tokenizers.replacing import check_replacements
from zoo.tokenizers.settings import KINDS, Settings, read_bytes

# kinds of a piece, and of a model
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
UNIGRAM = 1
MOST_SETTINGS = 4 << 20  # bytes; the largest published table of characters has 300 thousand
FIRST = ("bos", "pad", "eos", "unk")


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


class Model(NamedTuple):
    """What is used of a model's file."""

    pieces: list[Piece]
    kind: int
    characters: bytes  # a table of what stands for what, to compose them
    prefix: bool = True  # a space before a text
    collapse: bool = True  # several spaces count as one


def from_pieces(path: Path, settings: Settings) -> Fast:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = read_model(path)
    _check(model, path)
    roles = {**KINDS["roberta"].roles, **{role: t.text for role, t in settings.named.items()}}
    first, rest = [roles[role] for role in FIRST], model.pieces[3:]
    entries = [*((text, 0.0) for text in first), *((p.text, p.score) for p in rest)]
    entries.append((roles["mask"], 0.0))
    texts = [text for text, _ in entries]
    if twice := [text for text, count in Counter(texts).items() if count > 1]:
        raise BadTokenizer(f"{path}: pieces that stand twice: {listing(twice)}")
    own = [Added(text, id) for id, text in enumerate(first)]
    own += [
        Added(piece.text, id, special=piece.kind == CONTROL)
        for id, piece in enumerate(rest, len(first))
        if piece.kind in (CONTROL, USER_DEFINED)
    ]
    own.append(Added(roles["mask"], len(texts) - 1))
    listed = {token.text for token in settings.added}
    # no word holds a space, so what begins with one is found in none
    special = {token.text for token in own if token.special}
    unseen = [(f" {text}" if text in special else text, score) for text, score in entries]
    prefix: Any = "never" if settings.flag("add_prefix_space") is False else "always"
    spaces = {"replacement": SPACE, "prepend_scheme": prefix}
    with refusing(path):
        backend = Tokenizer(models.Unigram(entries, FIRST.index("unk"), False))
        if model.characters:
            backend.normalizer = normalizers.Precompiled(model.characters)
        words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(words)
        backend.decoder = decoders.Metaspace(**spaces)
    wanted = [*settings.added, *(token for token in own if token.text not in listed)]
    return Fast(
        backend, wanted, path, plain=lambda: models.Unigram(unseen, FIRST.index("unk"), False)
    )


def _check(model: Model, path: Path) -> None:
    """All that would make these ids mean something else."""
    problems = []
    if model.kind != UNIGRAM:
        problems.append(f"trainer_spec.model_type: expected unigrams ({UNIGRAM}), not {model.kind}")
    if not 3 < len(model.pieces) <= MOST:
        problems.append(f"{len(model.pieces)} pieces")
    kinds = [piece.kind for piece in model.pieces]
    if sorted(kinds[:3]) != [UNKNOWN, CONTROL, CONTROL] or UNKNOWN in kinds[3:]:
        there = listing(piece.text for piece in model.pieces[:3])
        problems.append(f"expected <unk>, <s> and </s> as its first pieces, found {there}")
    if BYTE in kinds:
        problems.append("bytes to fall back on, which these ids have no place for")
    if problems:
        raise BadTokenizer("\n  ".join([f"{path}: not what fairseq's ids are for:", *problems]))


# --- the file ------------------------------------------------------------------------------------


def read_model(path: Path) -> Model:
    """The three fields that count, of the message that a model's file is."""
    messages: dict[int, list[bytes]] = {1: [], 2: [], 3: []}
    left = MOST_SETTINGS
    try:
        for number, value in _fields(read_bytes(path)):
            if number in messages:
                messages[number].append(_bytes(value))
                left -= len(value) if number > 1 else 0
                if left < 0:
                    raise ValueError(f"settings of more than {MOST_SETTINGS} bytes")
        pieces = [_piece(message) for message in messages[1]]
        kind = dict(_fields(b"".join(messages[2]))).get(3, UNIGRAM)
        normal = dict(_fields(b"".join(messages[3])))
        characters = _bytes(normal.get(2, b""))
        check_replacements(characters)
    except ValueError as error:
        raise BadTokenizer(f"{path}: no model of sentencepiece: {error}") from None
    return Model(pieces, kind, characters, bool(normal.get(3, 1)), bool(normal.get(4, 1)))


def _bytes(value: Any) -> bytes:
    if type(value) is not bytes:
        raise ValueError(f"the number {value} where bytes are expected")
    return value


def _piece(data: bytes) -> Piece:
    found = dict(_fields(data))
    text, score, kind = _bytes(found.get(1, b"")), _bytes(found.get(2, bytes(4))), found.get(3, 1)
    if not text or len(score) != 4:
        raise ValueError("a piece without text, or with a score that is none")
    (value,) = struct.unpack("<f", score)
    if not math.isfinite(value) or type(kind) is not int:
        raise ValueError(f"a piece of score {value} and kind {kind}")
    return Piece(text.decode(), value, kind)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message of protobuf: a number, or bytes."""
    at, end = 0, len(data)
    while at < end:
        key, at = _number(data, at)
        sort = key & 7
        if sort == 0:
            value, at = _number(data, at)
            yield key >> 3, value
            continue
        if sort not in (1, 2, 5):
            raise ValueError(f"a field of sort {sort}")
        size, at = _number(data, at) if sort == 2 else (8 if sort == 1 else 4, at)
        if at + size > end:
            raise ValueError("it ends within a field")
        yield key >> 3, data[at : at + size]
        at += size


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at == len(data):
            raise ValueError("it ends within a number")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number without an end")
