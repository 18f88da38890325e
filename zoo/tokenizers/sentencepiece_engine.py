"""The engine of sentencepiece: BPE with byte fallback (Llama 2), and unigrams (T5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from zoo.errors import BadTokenizer
from zoo.tokenizers.engines import Added, ByteTokens, Splitter, TextStream, assign_ids, refusing
from zoo.tokenizers.sentencepiece_file import MOST_PIECES, SPACE
from zoo.tokenizers.settings import KINDS, TokenizerKind, read_bytes

# protobuf merges repeated messages: with this appended, the model puts no space before a text
_NO_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieces:
    """A SentencePiece model.

    `prefix_each`: put a space before each text between special tokens, not only before the first.
    """

    def __init__(
        self,
        path: Path,
        extra: Iterable[Added],
        *,
        prefix_each: bool | None = None,
        data: bytes | None = None,  # the model, if it is not the file's content
    ) -> None:
        self._path, self._data = path, read_bytes(path) if data is None else data
        model = self._model = self._load(self._data)
        count = model.get_piece_size()
        if not 0 < count <= MOST_PIECES:
            raise BadTokenizer(f"{path}: {count} pieces")
        with refusing(path):
            texts = [model.id_to_piece(id) for id in range(count)]
            marks = [id for id in range(count) if model.is_control(id) or model.is_unknown(id)]
            byte = {id: bytes.fromhex(texts[id][3:-1]) for id in range(count) if model.is_byte(id)}
        if any(len(value) != 1 for value in byte.values()):
            raise BadTokenizer(f"{path}: pieces for bytes that are not one byte long")
        self._ids = {text: i for i, text in enumerate(texts)}
        added = assign_ids([*extra, *self._own(texts, marks, extra)], self._ids, count, path)
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
        # where spaces collapse, a text without its prefix would be joined to the token before it
        self._each = collapses if prefix_each is None else prefix_each
        self._table = ByteTokens(pieces, errors="zoo-each-byte", lead=self._prefixes)

    @staticmethod
    def _own(texts: list[str], marks: list[int], extra: Iterable[Added]) -> list[Added]:
        """The model's own control and unknown pieces, as added tokens."""
        extra_texts = {token.text for token in extra}
        return [Added(texts[i], i) for i in marks if texts[i] not in extra_texts]

    def _load(self, data: bytes) -> Any:
        import sentencepiece

        with refusing(f"{self._path}: no model of sentencepiece, nor ranks"):
            return sentencepiece.SentencePieceProcessor(model_proto=data)

    @cached_property
    def _bare(self) -> Any:
        return self._load(self._data + _NO_PREFIX)

    def _encode(self, text: str) -> list[int]:
        with refusing(self._path):
            ids: list[int] = self._model.encode(text)
        return ids

    def kind(self) -> TokenizerKind:
        """The model's own roles: with a bos token it is Llama's kind, else T5's."""
        roles = {}
        for role in ("bos", "eos", "unk", "pad"):
            if (id := getattr(self._model, f"{role}_id")()) >= 0:
                roles[role] = self._texts[id]
        return KINDS["llama" if "bos" in roles else "t5"]._replace(roles=roles)

    def encode(self, text: str, special: bool) -> list[int]:
        """The ids of a text, without special tokens around it."""
        ids: list[int] = []
        bare = False
        for part in self._split(text, special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += (self._bare if bare else self._model).encode(part)
            bare = self._prefixes and not self._each
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self._table.decode(ids)

    def stream(self) -> TextStream:
        """A decoder that takes one id at a time."""
        return self._table.stream()

    def token(self, id: int) -> str | None:
        """The token of an id, as the vocabulary writes it."""
        return self._texts[id] or None

    def id(self, token: str) -> int | None:
        """The id of a token."""
        return self._added[token].id if token in self._added else self._ids.get(token)
