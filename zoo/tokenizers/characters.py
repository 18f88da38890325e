"""Character-level tokenizer: one token a character, to train on a text of your own."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from converters.strict_json import read_json
from zoo.errors import BadTokenizer, InputError, listing
from zoo.tokenizers.core import Tokenizer
from zoo.tokenizers.engines import ByteTokens, TextStream

FILE = "characters.json"


class CharTokenizer(Tokenizer):
    """A tokenizer whose vocabulary is the characters of a text, sorted.

    Example:
        >>> tokenizer = zoo.tokenizers.CharTokenizer.of("hello")
        >>> tokenizer.encode("hole")
        [1, 3, 2, 0]
        >>> tokenizer.decode([1, 3, 2, 0])
        'hole'
    """

    @classmethod
    def of(cls, text: str) -> Self:
        """Make a tokenizer of every character in a text."""
        return cls(_Characters("".join(sorted(set(text)))))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a characters.json."""
        characters = read_json(path, BadTokenizer).get("characters")
        if not isinstance(characters, str) or len(set(characters)) != len(characters):
            raise BadTokenizer(f"{path}: characters: expected a text that has each of them once")
        return cls(_Characters(characters), directory=path.parent)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write characters.json into a directory, where `zoo.tokenizer` finds it."""
        name, content = self.file()
        path = Path(directory) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def file(self) -> tuple[str, bytes]:
        """The name and the content of the file that holds it."""
        text = json.dumps({"characters": self._characters}, ensure_ascii=False) + "\n"
        return FILE, text.encode()

    @property
    def _characters(self) -> str:
        return "".join(self.token(id) for id in range(self.vocab_size))


class _Characters:
    """An engine whose ids are the indices of characters."""

    specials: frozenset[int] = frozenset()

    def __init__(self, characters: str) -> None:
        self.size = len(characters)
        self._all = characters
        self._ids = {character: id for id, character in enumerate(characters)}
        try:
            self._table = ByteTokens([character.encode() for character in characters])
        except UnicodeEncodeError as error:
            raise InputError(f"half a surrogate pair at character {error.start}") from None

    def encode(self, text: str, special: bool) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError:
            unknown = sorted({repr(c) for c in text if c not in self._ids})
            raise InputError(
                f"characters that the vocabulary lacks: {listing(unknown)}. "
                "Build it with CharTokenizer.of from a text that has them"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return self._table.decode(ids)

    def stream(self) -> TextStream:
        return self._table.stream()

    def token(self, id: int) -> str | None:
        return self._all[id]

    def id(self, token: str) -> int | None:
        return self._ids.get(token)
