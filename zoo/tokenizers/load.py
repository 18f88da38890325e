"""Load a tokenizer: choose the engine by the files of a directory, and the special tokens."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.containers import kind_of
from converters.formats.gguf import open_gguf
from converters.paths import confined
from zoo.checkpoints import sources
from zoo.checkpoints.sources import Ref
from zoo.errors import BadTokenizer, NotACheckpoint, UsageError, listing
from zoo.tokenizers import bytelevel, fairseq, fast, gguf, llama2c, tekken
from zoo.tokenizers.characters import FILE as CHARACTERS
from zoo.tokenizers.characters import CharTokenizer
from zoo.tokenizers.core import Side, Tokenizer
from zoo.tokenizers.engines import Added, Engine
from zoo.tokenizers.sentencepiece_engine import SentencePieces
from zoo.tokenizers.settings import (
    ADDED,
    KINDS,
    MAP,
    ROLES,
    SETTINGS,
    TEMPLATE,
    TokenizerKind,
    TokenizerSettings,
)

if TYPE_CHECKING:
    from zoo.components.model import Model  # it imports torch

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
MODELS = ("tokenizer.model", "spiece.model", "spm.model")
FAIRSEQ = "sentencepiece.bpe.model"
TEKKEN = "tekken.json"
QWEN = "qwen.tiktoken"
T5_EXTRA_IDS = 100  # the default of T5's tokenizer class

_OF_MODELS = ("head", "config", "ignore_config")  # options of zoo.load


def tokenizer(ref: Ref, **where: Any) -> Tokenizer:
    """Load the tokenizer of a checkpoint, without its weights.

    Args:
        ref: a registry name, `hf:org/repo@revision`, a directory or a file.
        **where: options of `zoo.load`: revision, token, cache_dir, local_files_only. head, config
            and ignore_config are accepted and have no effect.

    Returns:
        A `Tokenizer`.

    Raises:
        NotACheckpoint: there is no such reference, or no tokenizer in it.
        BadTokenizer: its files contradict each other or exceed a limit.

    Example:
        >>> tokenizer = zoo.tokenizer("tiny-bert")
        >>> tokenizer.encode("the fox")
        [2, 5, 7, 3]
        >>> tokenizer.token(7)
        'fox'
    """
    where = {name: value for name, value in where.items() if name not in _OF_MODELS}
    location = sources.resolve(ref, weights=False, config=False, **where)
    return read(location.file or location.directory)


def tokenizer_of(model: Model) -> Tokenizer:
    """Read the tokenizer that belongs to a loaded model's weights: `model.tokenizer`."""
    if model.provenance is None:
        raise UsageError("a model of no checkpoint has no tokenizer: zoo.tokenizer reads one")
    return read(model.provenance.tokenizer_at)


def read(path: Path) -> Tokenizer:
    """Read the tokenizer in a local directory, which need not contain a model.

    For a file of weights: the tokenizer in it, else the one in its directory.
    """
    if not path.is_dir():
        return _within(path) or read(path.parent)
    directory = path

    def has(*names: str) -> bool:
        return all(os.path.lexists(directory / name) for name in names)

    settings = TokenizerSettings.of(directory)
    if has("tokenizer.json"):
        return _spelled_out(confined(directory, "tokenizer.json"), settings)
    for vocab, merges in PAIRS:
        if has(vocab, merges):
            return _merged(confined(directory, vocab), confined(directory, merges), settings)
    for name in MODELS:
        if has(name):
            return _modelled(confined(directory, name), settings)
    if has(FAIRSEQ):
        return _fairseq(confined(directory, FAIRSEQ), settings)
    if has(TEKKEN):
        mistral = tekken.from_tekken(confined(directory, TEKKEN), settings.added)
        return _finish(mistral, KINDS["tekken"], settings)
    if ranks := sorted(path.name for path in directory.glob("*.tiktoken")):
        return _ranked(directory, ranks, settings)
    if has("vocab.txt"):
        words = fast.from_words(confined(directory, "vocab.txt"), settings)
        return _finish(words, KINDS["bert"], settings)
    if has(CHARACTERS):
        return CharTokenizer.read(confined(directory, CHARACTERS))
    inside = [p for p in sorted(directory.glob("*.gguf")) if kind_of(p) == "gguf"][:1]
    if inside and (embedded := _within(inside[0])) is not None:
        return embedded
    if (lone := _lone(directory)) is not None:
        if lone.suffix == ".model":
            return _modelled(lone, settings)
        engine = SentencePieces(lone, settings.added, data=llama2c.to_sentencepiece(lone))
        return _finish(engine, engine.kind(), settings)
    names = ["tokenizer.json", *map(" and ".join, PAIRS), *MODELS, FAIRSEQ, TEKKEN, QWEN]
    names += ["vocab.txt", CHARACTERS]
    contents = listing(sorted(os.listdir(directory)), 5) or "nothing"
    raise NotACheckpoint(f"{directory}: no tokenizer: no {listing(names)}. It holds {contents}.")


def _within(path: Path) -> Tokenizer | None:
    """The tokenizer in a GGUF file, which may contain a vocabulary beside the weights."""
    if kind_of(path) != "gguf":
        return None
    values = next(iter(open_gguf(path).values())).values
    if not gguf.has_vocabulary(values):
        return None
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in gguf.files(values, path).items():
            (Path(scratch) / name).write_bytes(data)
        tokenizer = read(Path(scratch))
    tokenizer.directory = path.parent
    return tokenizer


def _lone(directory: Path) -> Path | None:
    """The only `*.model` of another name, or the only vocabulary of llama2.c."""
    models = sorted(directory.glob("*.model"))
    if len(models) == 1:
        return confined(directory, models[0].name)
    bins = [path for path in sorted(directory.glob("*.bin")) if llama2c.is_vocabulary(path)]
    return confined(directory, bins[0].name) if len(bins) == 1 and not models else None


def beside(file: Path) -> dict[str, Path]:
    """The tokenizer files beside a file of weights, by their usual names."""
    directory = file.parent
    every = ("tokenizer.json", *(name for pair in PAIRS for name in pair), *MODELS, "vocab.txt")
    every += (FAIRSEQ, TEKKEN, QWEN)
    every += (SETTINGS, MAP, ADDED, TEMPLATE, "generation_config.json", CHARACTERS)
    named = {n: confined(directory, n) for n in every if os.path.lexists(directory / n)}
    if any(name in named for name in every[: every.index(SETTINGS)]):
        return named
    if (path := _lone(directory)) is not None:
        return {"tokenizer.model" if path.suffix == ".model" else llama2c.FILE: path}
    return named


def _spelled_out(path: Path, settings: TokenizerSettings) -> Tokenizer:
    """Read a tokenizer.json; its post-processor sets the special tokens around a text.

    Like the reference, it ignores add_bos_token and add_eos_token of tokenizer_config.json; without
    a post-processor only families with [CLS], or with an end token, put any.
    """
    config = {
        k: v for k, v in settings.config.items() if k not in ("add_bos_token", "add_eos_token")
    }
    engine = fast.from_json(path, settings.added)
    # roles that no file names: the family's, if the vocabulary has them
    kind = KINDS.get(settings.kind or "", TokenizerKind({}))
    kind = kind._replace(before=None if kind.before == "bos" else kind.before)
    return _finish(engine, kind, replace(settings, config=config), engine.ends())


def _merged(vocab: Path, merges: Path, settings: TokenizerSettings) -> Tokenizer:
    kind = settings.kind
    if kind is None:
        kind = bytelevel.guess(bytelevel.read_ids(vocab))
    pattern = "qwen2" if kind == "qwen2" else "gpt2"
    space = bool(settings.flag("add_prefix_space"))
    engine = bytelevel.from_merges(vocab, merges, pattern, _added_tokens(settings, kind), space)
    return _finish(engine, KINDS[kind], settings)


def _modelled(path: Path, settings: TokenizerSettings) -> Tokenizer:
    if bytelevel.holds_ranks(path):
        ranks = bytelevel.from_ranks(path, "llama3", _added_tokens(settings, "llama3"))
        return _finish(ranks, KINDS["llama3"], settings)
    extra = list(settings.added)
    if settings.kind == "t5":
        extra += _sentinels(settings)
    legacy = settings.flag("legacy")
    engine = SentencePieces(path, extra, prefix_each=legacy)
    is_plain = settings.kind in ("bert", "deberta", "roberta")
    kind = KINDS[settings.kind or ""] if is_plain else engine.kind()
    return _finish(engine, kind, settings)


def _fairseq(path: Path, settings: TokenizerSettings) -> Tokenizer:
    """Read XLM-RoBERTa's file; other families with such a file have other ids."""
    if settings.family not in ("", "xlmroberta", "xlmrobertaxl"):
        raise BadTokenizer(
            f"{path}: pieces for {settings.family!r}, and only XLM-RoBERTa's ids are known. Set "
            f"tokenizer_class to XLMRobertaTokenizer in {SETTINGS} if the ids are XLM-RoBERTa's"
        )
    return _finish(fairseq.from_pieces(path, settings), KINDS["roberta"], settings)


def _ranked(directory: Path, names: list[str], settings: TokenizerSettings) -> Tokenizer:
    """Read a file of ranks, which has no pre-tokenizer pattern; Qwen's is known."""
    if len(names) > 1:
        raise BadTokenizer(f"{directory}: expected one file of ranks, found {listing(names)}")
    path = confined(directory, names[0])
    if settings.family != "qwen" and (settings.family or path.name != QWEN):
        raise BadTokenizer(
            f"{path}: ranks for {settings.family or 'nobody'!r}, and only Qwen's pattern is known. "
            f"Set tokenizer_class to QWenTokenizer in {SETTINGS} if the pattern is Qwen's"
        )
    ranks = bytelevel.from_ranks(path, "qwen2", _added_tokens(settings, "qwen"), composed="text")
    return _finish(ranks, KINDS["qwen"], settings)


def _added_tokens(settings: TokenizerSettings, kind: str) -> list[Added]:
    """The checkpoint's added tokens; the family's too, where none is listed with its id."""
    added = settings.added
    if any(token.id is not None for token in added):
        return added
    texts = {token.text for token in added}
    return [*(Added(text) for text in KINDS[kind].beyond if text not in texts), *added]


def _sentinels(settings: TokenizerSettings) -> list[Added]:
    """T5's sentinel tokens <extra_id_N>, in descending order of N."""
    count = settings.config.get("extra_ids", T5_EXTRA_IDS)
    if type(count) is not int or not 0 <= count <= 1000:
        raise settings.wrong(SETTINGS, "extra_ids", "a count", count)
    listed_texts = {token.text for token in settings.added if token.id is not None}
    texts = (f"<extra_id_{n}>" for n in reversed(range(count)))
    return [Added(text) for text in texts if text not in listed_texts]


def _finish(
    engine: Engine,
    kind: TokenizerKind,
    settings: TokenizerSettings,
    ends: tuple[list[int], list[int]] | None = None,
) -> Tokenizer:
    role_texts: Mapping[str, str] = {role: token.text for role, token in settings.named.items()}
    texts = {**kind.roles, **role_texts}
    ids = {role: engine.id(texts[role]) for role in ROLES if role in texts}
    if missing := sorted(role_texts[role] for role in role_texts if ids[role] is None):
        raise BadTokenizer(f"{settings.directory}: special tokens of no id: {listing(missing)}")
    roles = {role: id for role, id in ids.items() if id is not None}
    before, after = ends or (_only(roles, kind.before), _only(roles, kind.after))
    # these two flags are about bos and eos, and not about [CLS] and [SEP]
    if (flag := settings.flag("add_bos_token")) is not None and kind.before != "cls":
        before = _only(roles, "bos" if flag else None)
    if (flag := settings.flag("add_eos_token")) is not None and kind.after != "sep":
        after = _only(roles, "eos" if flag else None)
    side: Side = settings.config.get("padding_side", "right")
    if side not in ("left", "right"):
        raise settings.wrong(SETTINGS, "padding_side", "left or right", side)
    return Tokenizer(
        engine,
        roles=roles,
        before=before,
        after=after,
        padding_side=side,
        templates=settings.templates,
        directory=settings.directory,
    )


def _only(roles: Mapping[str, int], role: str | None) -> list[int]:
    return [roles[role]] if role is not None and role in roles else []
