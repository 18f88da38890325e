"""What every engine is to a Tokenizer, and what those share whose tokens are bytes."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from zoo.errors import BadTokenizer, ZooError


class Added(NamedTuple):
    """A token beside the vocabulary proper: matched as a whole, before anything else."""

    text: str
    id: int | None = None  # None: its place in the vocabulary, or else the next free one
    special: bool = True
    lstrip: bool = False  # takes the whitespace before it along
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class Stream(Protocol):
    """Text as ids come in, whole characters only."""

    def put(self, id: int) -> str: ...
    def end(self) -> str: ...


class Engine(Protocol):
    """Ids of a text without what stands around it, and back. Ids are checked by the caller."""

    size: int  # all ids are below it
    specials: frozenset[int]

    def encode(self, text: str, special: bool) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def stream(self) -> Stream: ...
    def token(self, id: int) -> str | None: ...
    def id(self, token: str) -> int | None: ...


@contextmanager
def refusing(where: object) -> Iterator[None]:
    """Another library's complaint about a file, as one of ours."""
    try:
        yield
    except (ZooError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        told = " ".join(str(error).split())[:300]
        raise BadTokenizer(f"{where}: {told or type(error).__name__}") from None


# --- added tokens --------------------------------------------------------------------------------

MOST_ADDED = 1 << 20  # ids beyond the vocabulary, before a table of them is made


def place(
    wanted: Iterable[Added], ids: Mapping[str, int], size: int, where: object
) -> dict[str, Added]:
    """Each with its id, or everything that contradicts the vocabulary."""
    placed: dict[str, Added] = {}
    taken: dict[int, str] = {}
    problems = []
    texts = {id: text for text, id in ids.items()}
    after = size
    for token in sorted(wanted, key=lambda t: (t.id is None, t.id or 0)):
        known = ids.get(token.text)
        at = token.id if token.id is not None else known
        if at is None:
            at = after
        there = taken.get(at, texts.get(at, token.text))
        if there != token.text:
            problems.append(f"{token.text!r} has id {at}, and so has {there!r}")
        elif known not in (None, at):
            problems.append(f"{token.text!r} has id {at}, and {known} in the vocabulary")
        elif not 0 <= at < size + MOST_ADDED:
            problems.append(f"{token.text!r} has id {at}, far beyond the {size} of the vocabulary")
        placed[token.text], taken[at] = token._replace(id=at), token.text
        after = max(after, at + 1)
    if problems:
        raise BadTokenizer("\n  ".join([f"{where}: added tokens that cannot be:", *problems[:20]]))
    return placed


class Splitter:
    """Cuts a text at added tokens; special ones only where that is asked for."""

    def __init__(self, added: Mapping[str, Added]) -> None:
        self._added = added
        self._all = _pattern(added.values())
        self._plain = _pattern(token for token in added.values() if not token.special)

    def __call__(self, text: str, special: bool) -> Iterator[str | int]:
        """Stretches of text, never empty, and ids."""
        pattern = self._all if special else self._plain
        start = 0
        for match in pattern.finditer(text) if pattern else ():
            found = self._added[match[match.lastindex or 0]]
            assert found.id is not None
            before = text[start : match.start()]
            if found.lstrip:  # here, as a pattern would look for it from each space on
                before = before.rstrip()
            if before:
                yield before
            yield found.id
            start = match.end()
        if start < len(text):
            yield text[start:]


def _pattern(tokens: Iterable[Added]) -> re.Pattern[str] | None:
    """The longest that fits, from the left; the group that took part, if any, is its text.

    Only what takes part of its surroundings is a group: a thousand of them take seconds a page.
    """
    parts = []
    for token in sorted(tokens, key=lambda t: -len(t.text)):
        part = re.escape(token.text)
        if token.rstrip:
            part = f"({part})"
        if token.single_word:
            part = rf"(?<!\w){part}(?!\w)"
        parts.append(part + (r"\s*" if token.rstrip else ""))
    return re.compile("|".join(parts)) if parts else None


# --- tokens that are bytes -----------------------------------------------------------------------


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """One mark for every byte that fits nowhere: sentencepiece counts them so."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("zoo-each-byte", _each_byte)


class Pieces:
    """Tokens as bytes of UTF-8, which together make the text; `lead` drops the space it opens with.

    `errors` says what stands for bytes that are none: one mark for a run, or one for each byte.
    """

    def __init__(
        self, pieces: Sequence[bytes], *, errors: str = "replace", lead: bool = False
    ) -> None:
        self._pieces, self._errors, self._lead = pieces, errors, lead

    def decode(self, ids: Sequence[int]) -> str:
        text = b"".join([self._pieces[id] for id in ids]).decode("utf-8", self._errors)
        return text.removeprefix(" ") if self._lead else text

    def stream(self) -> Stream:
        return _ByteStream(self._pieces, self._errors, self._lead)


class _ByteStream:
    """The same, with a character held back until its last byte is there."""

    def __init__(self, pieces: Sequence[bytes], errors: str, lead: bool) -> None:
        self._pieces, self._lead = pieces, lead
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def put(self, id: int) -> str:
        return self._opened(self._decoder.decode(self._pieces[id]))

    def end(self) -> str:
        return self._opened(self._decoder.decode(b"", final=True))

    def _opened(self, text: str) -> str:
        if self._lead and text:
            self._lead = False
            return text.removeprefix(" ")
        return text
