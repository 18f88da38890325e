"""The file of a SentencePiece model: its pieces and the few settings that are used."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from zoo.errors import BadTokenizer
from zoo.tokenizers.character_maps import check_replacements
from zoo.tokenizers.settings import read_bytes

SPACE = "\u2581"  # stands for the space before a word
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # kinds of a piece
UNIGRAM, BPE = 1, 2  # kinds of a model
MOST_PIECES = 1 << 21  # the largest published vocabulary has 256 thousand
MOST_SETTINGS = 4 << 20  # bytes; the largest published table of characters has 300 thousand


class ScoredPiece(NamedTuple):
    """One piece of the vocabulary."""

    text: str
    score: float
    kind: int


class SentencePieceModel(NamedTuple):
    """The parts of a model that zoo uses."""

    pieces: list[ScoredPiece]
    kind: int
    characters: bytes  # a table of characters to replace, which composes them (NFKC)
    prefix: bool = True  # put a space before a text
    collapse: bool = True  # read several spaces as one


def read_model(path: Path) -> SentencePieceModel:
    """Read the three fields of a model's protobuf message that zoo uses."""
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
    return SentencePieceModel(
        pieces, kind, characters, bool(normal.get(3, 1)), bool(normal.get(4, 1))
    )


def _bytes(value: Any) -> bytes:
    if type(value) is not bytes:
        raise ValueError(f"expected bytes, found the number {value}")
    return value


def _piece(data: bytes) -> ScoredPiece:
    fields = dict(_fields(data))
    text, score, kind = (
        _bytes(fields.get(1, b"")),
        _bytes(fields.get(2, bytes(4))),
        fields.get(3, 1),
    )
    if not text or len(score) != 4:
        raise ValueError("a piece without text, or with a score that is not 4 bytes")
    (value,) = struct.unpack("<f", score)
    if not math.isfinite(value) or type(kind) is not int:
        raise ValueError(f"a piece of score {value} and kind {kind}")
    return ScoredPiece(text.decode(), value, kind)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message; a value is a number or bytes."""
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
    """(value, end) of a protobuf varint."""
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
