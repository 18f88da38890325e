"""SentencePiece: BPE with bytes to fall back on (Llama-2), and unigrams (T5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from zoo.errors import BadTokenizer
from zoo.tokenizers.engines import Added, Pieces, Splitter, Stream, place, refusing
from zoo.tokenizers.settings import KINDS, Kind, read_bytes

SPACE = "\u2581"  # how a piece writes the space before a word
# a message set twice is merged: after this, the model puts no space before a text
_NO_PREFIX = b"\x1a\x02\x18\x00"
MOST = 1 << 21  # pieces; the largest published vocabulary has 256 thousand


class SentencePieces:
    """`prefix_each`: all stretches between special tokens open with a space, not only the first."""

    def __init__(
        self,
        path: Path,
        wanted: Iterable[Added],
        *,
        prefix_each: bool | None = None,
        data: bytes | None = None,  # the model, where it is not what the file holds
    ) -> None:
        self._path, self._data = path, read_bytes(path) if data is None else data
        model = self._model = self._load(self._data)
        count = model.get_piece_size()
        if not 0 < count <= MOST:
            raise BadTokenizer(f"{path}: {count} pieces")
        with refusing(path):
            texts = [model.id_to_piece(id) for id in range(count)]
            marks = [id for id in range(count) if model.is_control(id) or model.is_unknown(id)]
            byte = {id: bytes.fromhex(texts[id][3:-1]) for id in range(count) if model.is_byte(id)}
        if any(len(value) != 1 for value in byte.values()):
            raise BadTokenizer(f"{path}: pieces for bytes that are none")
        self._ids = {text: i for i, text in enumerate(texts)}
        added = place([*wanted, *self._own(texts, marks, wanted)], self._ids, count, path)
        self._added, self._split = added, Splitter(added)
        places = {t.id: text for text, t in added.items() if t.id is not None}
        self.specials = frozenset(id for id, text in places.items() if added[text].special)
        self.size = max(count, 1 + max(places, default=0))
        self._texts = [*texts, *[""] * (self.size - count)]
        pieces = [text.replace(SPACE, " ").encode() for text in self._texts]
        for id, value in byte.items():
            pieces[id] = value
        for id, text in places.items():
            self._texts[id], pieces[id] = text, text.encode()
        opens = self._encode("a")[:1]
        self._prefixes = bool(opens) and texts[opens[0]].startswith(SPACE)
        collapses = self._encode("a  b") == self._encode("a b")
        # with spaces collapsed, a stretch without its prefix would be glued to what it follows
        self._each = collapses if prefix_each is None else prefix_each
        self._table = Pieces(pieces, errors="zoo-each-byte", lead=self._prefixes)

    @staticmethod
    def _own(texts: list[str], marks: list[int], wanted: Iterable[Added]) -> list[Added]:
        """What the model itself keeps out of texts."""
        known = {token.text for token in wanted}
        return [Added(texts[i], i) for i in marks if texts[i] not in known]

    def _load(self, data: bytes) -> Any:
        import sentencepiece

        with refusing(f"{self._path}: no model of sentencepiece, nor ranks"):
            return sentencepiece.SentencePieceProcessor(model_proto=data)

    @cached_property
    def _bare(self) -> Any:
        return self._load(self._data + _NO_PREFIX)

    def _encode(self, text: str) -> list[int]:
        with refusing(self._path):
            found: list[int] = self._model.encode(text)
        return found

    def kind(self) -> Kind:
        """Roles as the model has them; where it has no token to begin with, one ends the text."""
        roles = {}
        for role in ("bos", "eos", "unk", "pad"):
            if (id := getattr(self._model, f"{role}_id")()) >= 0:
                roles[role] = self._texts[id]
        return KINDS["llama" if "bos" in roles else "t5"]._replace(roles=roles)

    def encode(self, text: str, special: bool) -> list[int]:
        found: list[int] = []
        bare = False
        for part in self._split(text, special):
            if isinstance(part, int):
                found.append(part)
            else:
                found += (self._bare if bare else self._model).encode(part)
            bare = self._prefixes and not self._each
        return found

    def decode(self, ids: Sequence[int]) -> str:
        return self._table.decode(ids)

    def stream(self) -> Stream:
        return self._table.stream()

    def token(self, id: int) -> str | None:
        return self._texts[id] or None

    def id(self, token: str) -> int | None:
        return self._added[token].id if token in self._added else self._ids.get(token)
