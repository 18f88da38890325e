"""Byte-level BPE, by tiktoken: from GPT-2's two files, or from ranks."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

from zoo.errors import BadTokenizer, listing
from zoo.tokenizers.engines import Added, ByteTokens, Splitter, TextStream, assign_ids, refusing
from zoo.tokenizers.settings import parse_vocabulary, read_bytes, read_text

# pre-tokenizer patterns: merges stay within a match, as each family was trained
_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "qwen2": rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
    "llama3": rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
}
MOST_BLANK = 100_000  # at a million, tiktoken's stack overflows
_BLANK = re.compile(rf"\s{{{MOST_BLANK}}}")
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+")
Composed = Literal["text", "parts"]


@cache
def letters() -> dict[int, str]:
    """GPT-2's spelling of each byte: printable ones are themselves, others begin at 256."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (b for b in range(256) if b not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


@cache
def _values() -> dict[str, int]:
    return {letter: byte for byte, letter in letters().items()}


def spelling(token: bytes) -> str:
    """A token's bytes as GPT-2's files spell them."""
    table = letters()
    return "".join([table[byte] for byte in token])


class ByteLevel:
    """Byte-level BPE: lower ranks merge first, and `ids` are the ids of the ranks.

    `composed`: NFC is applied to the whole text, or to the text between added tokens only.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        ids: Sequence[int],
        pattern: str,
        added: Mapping[str, Added],
        *,
        composed: Composed | None = None,
        space: bool = False,
        where: object,
    ) -> None:
        import tiktoken

        self._where = where
        with refusing(where):
            self._bpe = tiktoken.Encoding(
                str(where),
                pat_str=pattern,
                mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
                special_tokens={},
            )
        self._ids = None if list(ids) == list(range(len(ids))) else list(ids)
        self._added, self._split, self._space = added, Splitter(added), space
        self._composed = composed
        self._normal: Any = _composer() if composed else None
        self.specials = frozenset(t.id for t in added.values() if t.special and t.id is not None)
        places = [t.id for t in added.values() if t.id is not None]
        self.size = 1 + max(chain(ids, places))
        pieces = [b""] * self.size
        self._texts: dict[int, str] = {}
        for id, token in zip(ids, tokens, strict=True):
            pieces[id] = token
        for text, entry in added.items():
            assert entry.id is not None
            pieces[entry.id], self._texts[entry.id] = text.encode(), text
        self._pieces = pieces
        self._table = ByteTokens(pieces)

    def encode(self, text: str, special: bool) -> list[int]:
        """The ids of a text, without special tokens around it."""
        if self._composed == "text":
            text = self._normal.normalize_str(text)
        out: list[int] = []
        for part in self._split(text, special):
            if isinstance(part, int):
                out.append(part)
                continue
            if self._composed == "parts":
                part = self._normal.normalize_str(part)
            if self._space and not part.startswith(" "):
                part = f" {part}"
            for piece in _cut(part):
                with refusing(self._where):  # a pattern may give up
                    ranks = self._bpe.encode_ordinary(piece)
                out += ranks if self._ids is None else [self._ids[rank] for rank in ranks]
        return out

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self._table.decode(ids)

    def stream(self) -> TextStream:
        """A decoder that takes one id at a time."""
        return self._table.stream()

    def token(self, id: int) -> str | None:
        """The token of an id, as the vocabulary writes it."""
        return self._texts.get(id) or spelling(self._pieces[id]) or None

    def id(self, token: str) -> int | None:
        """The id of a token."""
        if token in self._added:
            return self._added[token].id
        try:
            rank = self._bpe.encode_single_token(bytes(_values()[letter] for letter in token))
        except KeyError:
            return None
        return rank if self._ids is None else self._ids[rank]


def _cut(text: str) -> Iterator[str]:
    """Split a text where whitespace runs longer than tiktoken's stack allows."""
    start = 0
    for run in _BLANK.finditer(text) if len(text) > MOST_BLANK else ():
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def _composer() -> Any:
    """NFC by the reference's own Unicode tables, which differ from some Pythons'."""
    from tokenizers.normalizers import NFC

    return NFC()


# --- vocabulary and merges -----------------------------------------------------------------------


def guess(vocabulary: Iterable[str]) -> str:
    """Guess which pattern a vocabulary was trained with: "gpt2" or "qwen2".

    Only GPT-2's keeps several digits together; only Qwen2's joins a sign other than a space to the
    letters after it.
    """
    digits = glued = False
    for token in vocabulary:
        digits |= len(token) > 1 and token.isascii() and token.isdigit()
        glued |= token[:1] in {"(", ".", "_", "/"} and token[1:].isascii() and token[1:].isalpha()
    return "qwen2" if glued and not digits else "gpt2"


def from_merges(
    vocab: Path, merges_file: Path, kind: str, extra: Iterable[Added], space: bool
) -> ByteLevel:
    """Read vocabulary and merges; a token's rank is the line of the merge that makes it.

    Single bytes rank before all merges.
    """
    ids = read_ids(vocab)
    ranked = {letter: bytes([byte]) for byte, letter in letters().items()}
    unknown = []
    for number, left, right in merges(merges_file):
        if left not in ids or right not in ids or left + right not in ids:
            unknown.append(f"line {number}: {left} {right}")
        else:
            ranked.setdefault(left + right, _bytes(left + right))
    if unknown:
        raise BadTokenizer(
            f"{merges_file}: {len(unknown)} merges of or into tokens that {vocab.name} lacks: "
            f"{listing(unknown, 5)}"
        )
    if missing := [letter for letter in letters().values() if letter not in ids]:
        raise BadTokenizer(f"{vocab}: {len(missing)} of 256 bytes are no token: {listing(missing)}")
    # no merge makes these tokens, so no text does: they are added tokens
    unmerged = [Added(text, id) for text, id in ids.items() if text not in ranked]
    extras = list(extra)
    texts = {token.text for token in extras}
    unmerged = [token for token in unmerged if token.text not in texts]
    added = assign_ids([*extras, *unmerged], ids, 1 + max(ids.values()), vocab)
    numbers = [ids[text] for text in ranked]
    composed: Composed | None = "parts" if kind == "qwen2" else None
    return ByteLevel(
        list(ranked.values()),
        numbers,
        PATTERNS[kind],
        added,
        composed=composed,
        space=space,
        where=vocab,
    )


def read_ids(path: Path) -> dict[str, int]:
    """Read token -> id; each id occurs once, and none is far beyond their number."""
    ids = parse_vocabulary(read_bytes(path), path)
    wrong = [f"{text!r}: {id!r}" for text, id in ids.items() if type(id) is not int or id < 0]
    if wrong or not ids:
        raise BadTokenizer(f"{path}: expected tokens with their ids, found {listing(wrong, 5)}")
    if len(set(ids.values())) != len(ids):
        raise BadTokenizer(f"{path}: tokens that share an id")
    if max(ids.values()) > 2 * len(ids) + 1024:
        raise BadTokenizer(f"{path}: id {max(ids.values())} among {len(ids)} tokens")
    return ids


def merges(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, left, right) of each merge in a file."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise BadTokenizer(f"{path}: line {number}: expected two tokens, found {line[:80]!r}")
        yield number, left, right


def _bytes(text: str) -> bytes:
    values = _values()
    try:
        return bytes([values[letter] for letter in text])
    except KeyError as error:
        raise BadTokenizer(f"{text!r}: {error} is not the spelling of a byte") from None


def merges_of(tokens: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The merge that makes each token: its two parts by tokens of lower ranks, in rank order."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for rank, token in enumerate(tokens):
        parts = [token[n : n + 1] for n in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            if (least := min(pairs)) == rank:
                break
            at = pairs.index(least)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


# --- ranks ---------------------------------------------------------------------------------------


def holds_ranks(path: Path) -> bool:
    """Whether a file's first line is base64 and a number."""
    with path.open("rb") as file:
        return _RANK_LINE.fullmatch(file.readline(4096).rstrip()) is not None


def from_ranks(
    path: Path, kind: str, extra: Iterable[Added], composed: Composed | None = None
) -> ByteLevel:
    """Read a file of ranks, one base64 token a line."""
    tokens = read_ranks(path)
    added = assign_ids(extra, {}, len(tokens), path)
    return ranked(tokens, PATTERNS[kind], added, path, composed=composed)


def read_ranks(path: Path) -> list[bytes]:
    """Read tokens in the order of their ranks."""
    tokens: list[bytes] = []
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line:
            continue
        if not _RANK_LINE.fullmatch(line):
            raise BadTokenizer(f"{path}: line {number}: expected base64 and a rank")
        text, _, rank = line.partition(b" ")
        if rank.decode() != str(len(tokens)):
            raise BadTokenizer(f"{path}: line {number}: rank {rank.decode()[:20]} is out of order")
        try:
            tokens.append(base64.b64decode(text, validate=True))
        except binascii.Error as error:
            raise BadTokenizer(f"{path}: line {number}: {error}") from None
    return tokens


def ranked(
    tokens: Sequence[bytes],
    pattern: str,
    added: Mapping[str, Added],
    path: Path,
    *,
    first: int = 0,
    composed: Composed | None = None,
) -> ByteLevel:
    """Build the engine from tokens in the order of their ranks; ids begin at `first`."""
    distinct = set(tokens)
    if len(distinct) != len(tokens):
        raise BadTokenizer(f"{path}: {len(tokens) - len(distinct)} tokens occur twice")
    if missing := [byte for byte in range(256) if bytes([byte]) not in distinct]:
        raise BadTokenizer(f"{path}: {len(missing)} of 256 bytes have no rank: truncated?")
    ids = range(first, first + len(tokens))
    if clash := [token.text for token in added.values() if token.id in ids]:
        raise BadTokenizer(f"{path}: added tokens with ids of ranks: {listing(clash)}")
    return ByteLevel(tokens, ids, pattern, added, composed=composed, where=path)
