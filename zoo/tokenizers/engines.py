"""The interface of tokenizer engines, added tokens, and engines whose tokens are bytes."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from zoo.errors import BadTokenizer, ZooError


class Added(NamedTuple):
    """A token beside the vocabulary, matched as a whole before anything else."""

    text: str
    id: int | None = None  # None: its id in the vocabulary, or else the next free one
    special: bool = True
    lstrip: bool = False  # includes the whitespace before it
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class TextStream(Protocol):
    """Decodes ids as they come, complete characters only."""

    def put(self, id: int) -> str:
        """The characters that this id completes."""
        ...

    def end(self) -> str:
        """The rest, after the last id."""
        ...


class Engine(Protocol):
    """Encodes and decodes text without the special tokens around it; the caller checks ids."""

    size: int  # all ids are below it
    specials: frozenset[int]

    def encode(self, text: str, special: bool) -> list[int]:
        """The ids of a text; `special`: special tokens in it are read as such."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        ...

    def stream(self) -> TextStream:
        """A decoder that takes one id at a time."""
        ...

    def token(self, id: int) -> str | None:
        """The token of an id, as the vocabulary writes it."""
        ...

    def id(self, token: str) -> int | None:
        """The id of a token."""
        ...


@contextmanager
def refusing(where: object) -> Iterator[None]:
    """Turn any error of another library about a file into a `BadTokenizer`."""
    try:
        yield
    except (ZooError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        message = " ".join(str(error).split())[:300]
        raise BadTokenizer(f"{where}: {message or type(error).__name__}") from None


# --- added tokens --------------------------------------------------------------------------------

MOST_ADDED = 1 << 20  # ids beyond the vocabulary, before a table of them is made


def assign_ids(
    extra: Iterable[Added], ids: Mapping[str, int], size: int, where: object
) -> dict[str, Added]:
    """Give each added token its id; refuse those that contradict the vocabulary, all at once."""
    result: dict[str, Added] = {}
    texts_by_id: dict[int, str] = {}
    problems = []
    texts = {id: text for text, id in ids.items()}
    after = size
    for token in sorted(extra, key=lambda t: (t.id is None, t.id or 0)):
        own_id = ids.get(token.text)
        at = token.id if token.id is not None else own_id
        if at is None:
            at = after
        owner = texts_by_id.get(at, texts.get(at, token.text))
        if owner != token.text:
            problems.append(f"{token.text!r} has id {at}, and so has {owner!r}")
        elif own_id not in (None, at):
            problems.append(f"{token.text!r} has id {at}, and {own_id} in the vocabulary")
        elif not 0 <= at < size + MOST_ADDED:
            problems.append(f"{token.text!r} has id {at}, far beyond the {size} of the vocabulary")
        result[token.text], texts_by_id[at] = token._replace(id=at), token.text
        after = max(after, at + 1)
    if problems:
        raise BadTokenizer("\n  ".join([f"{where}: added tokens that cannot be:", *problems[:20]]))
    return result


class Splitter:
    """Splits a text at added tokens; at special ones only if `special`."""

    def __init__(self, added: Mapping[str, Added]) -> None:
        self._added = added
        self._all = _pattern(added.values())
        self._plain = _pattern(token for token in added.values() if not token.special)

    def __call__(self, text: str, special: bool) -> Iterator[str | int]:
        """Texts between added tokens, never empty, and the ids of added tokens."""
        pattern = self._all if special else self._plain
        start = 0
        for match in pattern.finditer(text) if pattern else ():
            token = self._added[match[match.lastindex or 0]]
            assert token.id is not None
            before = text[start : match.start()]
            if token.lstrip:  # here: in the pattern it would be quadratic in runs of spaces
                before = before.rstrip()
            if before:
                yield before
            yield token.id
            start = match.end()
        if start < len(text):
            yield text[start:]


def _pattern(tokens: Iterable[Added]) -> re.Pattern[str] | None:
    """Match the longest token, from the left; the group that matched, if any, is its text.

    Only tokens that include whitespace are groups: a thousand groups take seconds a page.
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
    """U+FFFD for each invalid byte, as sentencepiece does, instead of one for a run of them."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("zoo-each-byte", _each_byte)


class ByteTokens:
    """Tokens as bytes of UTF-8, joined to a text; `lead` drops the space that it begins with.

    `errors` handles invalid bytes: "replace" one U+FFFD for a run, "zoo-each-byte" for each byte.
    """

    def __init__(
        self, pieces: Sequence[bytes], *, errors: str = "replace", lead: bool = False
    ) -> None:
        self._pieces, self._errors, self._lead = pieces, errors, lead

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        text = b"".join([self._pieces[id] for id in ids]).decode("utf-8", self._errors)
        return text.removeprefix(" ") if self._lead else text

    def stream(self) -> TextStream:
        """A decoder that takes one id at a time."""
        return _ByteStream(self._pieces, self._errors, self._lead)


class _ByteStream:
    """Decodes id by id; a character appears with its last byte."""

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
