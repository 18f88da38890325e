"""XLM-RoBERTa's tokenizer: SentencePiece unigrams under fairseq's ids, by `tokenizers`.

The model's own <unk>, <s> and </s> are replaced by <s>, <pad>, </s> and <unk>; <mask> is the last.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from zoo.errors import BadTokenizer, listing
from zoo.tokenizers.engines import Added, refusing
from zoo.tokenizers.fast import Fast
from zoo.tokenizers.sentencepiece_file import (
    BYTE,
    CONTROL,
    MOST_PIECES,
    SPACE,
    UNIGRAM,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    read_model,
)
from zoo.tokenizers.settings import KINDS, TokenizerSettings

FIRST = ("bos", "pad", "eos", "unk")


def from_pieces(path: Path, settings: TokenizerSettings) -> Fast:
    """Read a sentencepiece.bpe.model."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = read_model(path)
    _check(model, path)
    roles = {**KINDS["roberta"].roles, **{role: t.text for role, t in settings.named.items()}}
    first, rest = [roles[role] for role in FIRST], model.pieces[3:]
    entries = [*((text, 0.0) for text in first), *((p.text, p.score) for p in rest)]
    entries.append((roles["mask"], 0.0))
    texts = [text for text, _ in entries]
    if twice := [text for text, count in Counter(texts).items() if count > 1]:
        raise BadTokenizer(f"{path}: pieces that occur twice: {listing(twice)}")
    own = [Added(text, id) for id, text in enumerate(first)]
    own += [
        Added(piece.text, id, special=piece.kind == CONTROL)
        for id, piece in enumerate(rest, len(first))
        if piece.kind in (CONTROL, USER_DEFINED)
    ]
    own.append(Added(roles["mask"], len(texts) - 1))
    extra_texts = {token.text for token in settings.added}
    # no word contains a space, so a piece that begins with one is never matched
    special = {token.text for token in own if token.special}
    unseen = [(f" {text}" if text in special else text, score) for text, score in entries]
    prefix: Any = "never" if settings.flag("add_prefix_space") is False else "always"
    spaces = {"replacement": SPACE, "prepend_scheme": prefix}
    with refusing(path):
        backend = Tokenizer(models.Unigram(entries, FIRST.index("unk"), False))
        if model.characters:
            backend.normalizer = normalizers.Precompiled(model.characters)
        words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(words)
        backend.decoder = decoders.Metaspace(**spaces)
    extra = [*settings.added, *(token for token in own if token.text not in extra_texts)]
    return Fast(
        backend, extra, path, plain=lambda: models.Unigram(unseen, FIRST.index("unk"), False)
    )


def _check(model: SentencePieceModel, path: Path) -> None:
    """Refuse a model whose pieces would not have fairseq's ids; list every reason."""
    problems = []
    if model.kind != UNIGRAM:
        problems.append(f"trainer_spec.model_type: expected unigrams ({UNIGRAM}), not {model.kind}")
    if not 3 < len(model.pieces) <= MOST_PIECES:
        problems.append(f"{len(model.pieces)} pieces")
    kinds = [piece.kind for piece in model.pieces]
    if sorted(kinds[:3]) != [UNKNOWN, CONTROL, CONTROL] or UNKNOWN in kinds[3:]:
        first = listing(piece.text for piece in model.pieces[:3])
        problems.append(f"expected <unk>, <s> and </s> as its first pieces, found {first}")
    if BYTE in kinds:
        problems.append("byte fallback, for which these ids have no room")
    if problems:
        raise BadTokenizer("\n  ".join([f"{path}: not what fairseq's ids are for:", *problems]))
