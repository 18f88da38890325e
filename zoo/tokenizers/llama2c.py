"""llama2.c's tokenizer.bin: the pieces of a SentencePiece model with their scores."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from converters.formats import open_regular
from zoo.errors import BadTokenizer, ZooError
from zoo.tokenizers.engines import refusing
from zoo.tokenizers.sentencepiece_file import MOST_PIECES, SPACE
from zoo.tokenizers.settings import read_bytes

FILE = "tokenizer.bin"
_MARKS = {"\n<s>\n": "<s>", "\n</s>\n": "</s>"}  # llama2.c prints them on lines of their own
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # kinds of pieces in SentencePiece's message
_LONGEST = 1 << 10


def is_vocabulary(path: Path) -> bool:
    """Whether a file is such a vocabulary, from its first byte to its last."""
    try:
        fd = open_regular(path)
        try:
            longest, _, first = struct.unpack("<IfI", os.pread(fd, 12, 0))
        finally:
            os.close(fd)
        return 0 < first <= longest <= _LONGEST and bool(pieces(path))
    except (ZooError, struct.error):
        return False


def pieces(path: Path) -> list[tuple[str, float]]:
    """Read (text, score) of each piece, in the order of ids."""
    data = read_bytes(path)
    if len(data) < 4:
        raise BadTokenizer(f"{path}: {len(data)} bytes are no vocabulary of llama2.c's")
    (longest,) = struct.unpack_from("<I", data)
    out: list[tuple[str, float]] = []
    at = 4
    while at < len(data):
        if at + 8 > len(data) or len(out) >= MOST_PIECES:
            raise BadTokenizer(f"{path}: piece {len(out)}: cut short at byte {at}, or too many")
        score, length = struct.unpack_from("<fI", data, at)
        at += 8
        if length > min(longest, _LONGEST) or at + length > len(data):
            raise BadTokenizer(
                f"{path}: piece {len(out)}: expected {longest} bytes at most, found {length}"
            )
        try:
            out.append((data[at : at + length].decode(), score))
        except UnicodeDecodeError:
            raise BadTokenizer(f"{path}: piece {len(out)} is not UTF-8") from None
        at += length
    return out


def to_sentencepiece(path: Path) -> bytes:
    """Make a SentencePiece model of these pieces: BPE with byte fallback."""
    out: list[tuple[str, float, int]] = []
    for id, (text, score) in enumerate(pieces(path)):
        text = _MARKS.get(text, text)
        kind = _NORMAL
        if id == 0:
            kind = _UNKNOWN
        elif text in _MARKS.values():
            kind = _CONTROL
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = _BYTE
        out.append((text.replace(" ", SPACE), score, kind))
    return sentencepiece_model(out)


def sentencepiece_model(
    pieces: Iterable[tuple[str, float, int]],
    *,
    prefix: bool = True,
    collapse: bool = False,
    falls_back: bool = True,
) -> bytes:
    """Write a SentencePiece model of type BPE from (text, score, kind); spaces are escaped."""
    parts = []
    for text, score, kind in pieces:
        piece = _bytes(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        parts.append(_bytes(1, piece + b"\x18" + bytes([kind])))
    parts.append(_bytes(2, b"\x18\x02\x98\x02" + bytes([falls_back])))  # fields 3 and 35
    spaces = b"\x18" + bytes([prefix]) + b"\x20" + bytes([collapse]) + b"\x28\x01"
    return b"".join(parts) + _bytes(3, _bytes(1, b"identity") + spaces)


def _bytes(field: int, data: bytes) -> bytes:
    """A protobuf field of bytes."""
    length, size = b"", len(data)
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([field << 3 | 2]) + length + bytes([size]) + data


def from_sentencepiece(files: Mapping[str, Path]) -> bytes | None:
    """Write tokenizer.bin from the SentencePiece model among a checkpoint's files, if any."""
    import sentencepiece

    from zoo.tokenizers import bytelevel

    path = next((p for name, p in files.items() if name.endswith(".model")), None)
    if path is None or bytelevel.holds_ranks(path):
        return None
    with refusing(path):
        model = sentencepiece.SentencePieceProcessor(model_proto=read_bytes(path))
        texts = [model.id_to_piece(id) for id in range(model.get_piece_size())]
        scores = [model.get_score(id) for id in range(len(texts))]
        ends = {model.bos_id(): "\n<s>\n", model.eos_id(): "\n</s>\n"}
    data = [ends.get(id, text).replace(SPACE, " ").encode() for id, text in enumerate(texts)]
    out = struct.pack("<I", max(map(len, data)))
    for score, text in zip(scores, data, strict=True):
        out += struct.pack("<fI", score, len(text)) + text
    return out
