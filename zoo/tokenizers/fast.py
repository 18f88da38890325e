"""The engine of the library `tokenizers`: tokenizer.json, and WordPiece from vocab.txt."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from zoo.errors import BadTokenizer
from zoo.tokenizers.bounds import check_steps
from zoo.tokenizers.character_maps import check_replacements, tables_in
from zoo.tokenizers.engines import Added, TextStream, assign_ids, refusing
from zoo.tokenizers.settings import (
    KINDS,
    TokenizerSettings,
    parse_vocabulary,
    read_bytes,
    read_text,
)

STRAYS = 0.01  # the share of words with capitals that a lowercased vocabulary may have
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Fast:
    """A tokenizer of `tokenizers`, without its truncation and padding.

    `plain` makes the model for texts in which special tokens are plain text, if it differs.
    """

    def __init__(
        self,
        backend: Any,
        extra: Iterable[Added],
        where: Path,
        *,
        plain: Callable[[], Any] | None = None,
    ) -> None:
        with refusing(where):
            backend.no_truncation()
            backend.no_padding()
            already: Mapping[int, Any] = backend.get_added_tokens_decoder()
            vocabulary = backend.get_vocab(with_added_tokens=True)
            size = 1 + max(vocabulary.values(), default=-1)
        if not vocabulary:
            raise BadTokenizer(f"{where}: an empty vocabulary")
        added = assign_ids(extra, vocabulary, size, where)
        special = {token.content for token in already.values() if token.special}
        known_texts = {token.content for token in already.values()}
        missing = [
            t for t in added.values() if t.text not in (special if t.special else known_texts)
        ]
        with refusing(where):
            for token in sorted(missing, key=lambda t: t.id or 0):
                self._add(backend, token)
        if wrong := [t.text for t in missing if backend.token_to_id(t.text) != t.id]:
            raise BadTokenizer(f"{where}: added tokens whose ids leave a gap: {wrong[:5]}")
        self._backend, self._where, self._unspecial = backend, where, plain
        # byte tokens become text only together, so that none of them can be decoded alone
        self._falls_back = "ByteFallback" in repr(backend.decoder)
        final: Mapping[int, Any] = backend.get_added_tokens_decoder()
        self.specials = frozenset(id for id, token in final.items() if token.special)
        self.size = max(size, 1 + max(final, default=-1))

    @staticmethod
    def _add(backend: Any, token: Added) -> None:
        from tokenizers import AddedToken

        flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word")}
        made = AddedToken(token.text, special=token.special, normalized=token.normalized, **flags)
        (backend.add_special_tokens if token.special else backend.add_tokens)([made])

    @cached_property
    def _plain(self) -> Any:
        """A second tokenizer that reads special tokens as text: a call cannot choose that."""
        from tokenizers import Tokenizer

        plain = Tokenizer.from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        if self._unspecial is not None:
            plain.model = self._unspecial()
        return plain

    def ends(self) -> tuple[list[int], list[int]] | None:
        """The ids that the post-processor, if any, puts before and after a text."""
        backend = self._backend
        if backend.post_processor is None:
            return None
        with refusing(self._where):
            texts = ("a", *backend.get_vocab())  # some vocabularies lack "a" and drop it
            text = next(t for t in texts if backend.encode(t, add_special_tokens=False).ids)
            encoding = backend.encode(text)
            mask = encoding.special_tokens_mask
            start, stop = mask.index(0), len(mask) - mask[::-1].index(0)
        return encoding.ids[:start], encoding.ids[stop:]

    def encode(self, text: str, special: bool) -> list[int]:
        """The ids of a text, without special tokens around it."""
        backend = self._backend if special else self._plain
        with refusing(self._where):
            ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        with refusing(self._where):
            text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def stream(self) -> TextStream:
        """A decoder that takes one id at a time."""
        return _Window(self)

    def whole(self, id: int) -> bool:
        """Whether text may end with this token; False if it may be one byte of a character."""
        return not (self._falls_back and _BYTE.fullmatch(self.token(id) or ""))

    def token(self, id: int) -> str | None:
        """The token of an id, as the vocabulary writes it."""
        text: str | None = self._backend.id_to_token(id)
        return text

    def id(self, token: str) -> int | None:
        """The id of a token."""
        number: int | None = self._backend.token_to_id(token)
        return number


class _Window:
    """Decodes the last tokens again with each new one, since a token's text may depend on others.

    Text is returned up to the end of a character, so decoding can restart there.
    """

    def __init__(self, engine: Fast) -> None:
        self._engine = engine
        self._ids: list[int] = []
        self._shown = 0  # the number of ids whose text was returned, and that text
        self._text = ""

    def put(self, id: int) -> str:
        self._ids.append(id)
        return self._show() if self._engine.whole(id) else ""

    def end(self) -> str:
        return self._show(final=True) if self._ids[self._shown :] else ""

    def _show(self, final: bool = False) -> str:
        text = self._engine.decode(self._ids)
        if not final and (text.endswith("\ufffd") or len(text) <= len(self._text)):
            return ""
        new = text[len(self._text) :]
        self._ids = self._ids[self._shown :]
        self._shown, self._text = len(self._ids), self._engine.decode(self._ids)
        return new


def from_json(path: Path, extra: Iterable[Added]) -> Fast:
    """Read a tokenizer.json, after checking that it stays within bounds."""
    from tokenizers import Tokenizer

    data = read_bytes(path)
    content = parse_vocabulary(data, path)
    with refusing(path):
        # not in the vocabulary: it has no tables, and half a million entries
        for table in tables_in({key: value for key, value in content.items() if key != "model"}):
            check_replacements(table)
        check_steps(content)
        backend = Tokenizer.from_str(data.decode())
    return Fast(backend, extra, path)


def words_of(path: Path) -> list[str]:
    """Read a vocab.txt: a word a line, in the order of ids."""
    words = [line.rstrip("\r") for line in read_text(path).split("\n")]
    return words[:-1] if words[-1] == "" else words


def lower_case(words: Sequence[str], settings: TokenizerSettings) -> bool:
    """Whether to lowercase texts: as tokenizer_config.json says, else by the words.

    Google's checkpoints say it only in the names of their directories. A cased vocabulary has many
    words with capitals, an uncased one only strays.
    """
    setting = settings.flag("do_lower_case")
    if setting is not None:
        return setting
    plain = [word for word in words if not (word.startswith("[") and word.endswith("]"))]
    return sum(word != word.lower() for word in plain) <= len(plain) * STRAYS


def from_words(path: Path, settings: TokenizerSettings) -> Fast:
    """Read a WordPiece vocabulary with the defaults of BERT's tokenizer class."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import WordPiece

    words = words_of(path)
    ids = {word: id for id, word in enumerate(words)}
    roles = {**KINDS["bert"].roles, **{role: t.text for role, t in settings.named.items()}}
    unknown = roles["unk"]
    if unknown not in ids:
        raise BadTokenizer(f"{path}: no {unknown} among its {len(ids)} words: truncated?")
    extra_texts = {token.text for token in settings.added}
    role_tokens = [
        Added(text) for text in roles.values() if text in ids and text not in extra_texts
    ]
    with refusing(path):
        backend = Tokenizer(WordPiece(ids, unk_token=unknown))
        backend.normalizer = normalizers.BertNormalizer(
            lowercase=lower_case(words, settings),
            handle_chinese_chars=settings.flag("tokenize_chinese_chars") is not False,
            strip_accents=settings.flag("strip_accents"),
        )
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
    return Fast(backend, [*settings.added, *role_tokens], path)
