"""One token a character: for those who train on a text of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from converters.strict_json import read_json
from zoo.errors import BadTokenizer, InputError, listing
from zoo.tokenizers.core import Tokenizer
from zoo.tokenizers.engines import Pieces, Stream

FILE = "characters.json"


class CharTokenizer(Tokenizer):
    """Its vocabulary is the characters of a text, in order."""

    @classmethod
    def of(cls, text: str) -> Self:
        """Of every character in a text."""
        return cls(_Characters("".join(sorted(set(text)))))

    @classmethod
    def read(cls, path: Path) -> Self:
        characters = read_json(path, BadTokenizer).get("characters")
        if not isinstance(characters, str) or len(set(characters)) != len(characters):
            raise BadTokenizer(f"{path}: characters: expected a text that has each of them once")
        return cls(_Characters(characters), directory=path.parent)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Into a directory, for `zoo.tokenizer` to find."""
        path = Path(directory) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"characters": self._characters}, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
        return path

    @property
    def _characters(self) -> str:
        return "".join(self.token(id) for id in range(self.vocab_size))


class _Characters:
    """An id is a character's place."""

    specials: frozenset[int] = frozenset()

    def __init__(self, characters: str) -> None:
        self.size = len(characters)
        self._all = characters
        self._ids = {character: id for id, character in enumerate(characters)}
        try:
            self._table = Pieces([character.encode() for character in characters])
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

    def stream(self) -> Stream:
        return self._table.stream()

    def token(self, id: int) -> str | None:
        return self._all[id]

    def id(self, token: str) -> int | None:
        return self._ids.get(token)
