"""A directory becomes a Tokenizer: which engine, which tokens around a text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.containers import kind_of
from converters.formats.gguf import open_gguf
from converters.paths import confined
from zoo.checkpoints import sources
from zoo.checkpoints.sources import Ref
from zoo.components.model import Model
from zoo.errors import BadTokenizer, NotACheckpoint, UsageError, listing
from zoo.tokenizers import bytelevel, fast, gguf, llama2c, pieces, tekken, unigrams
from zoo.tokenizers.characters import FILE as CHARACTERS
from zoo.tokenizers.characters import CharTokenizer
from zoo.tokenizers.core import Side, Tokenizer
from zoo.tokenizers.engines import Added, Engine
from zoo.tokenizers.settings import (
    ADDED,
    KINDS,
    MAP,
    ROLES,
    SETTINGS,
    TEMPLATE,
    Kind,
    Settings,
)

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
MODELS = ("tokenizer.model", "spiece.model", "spm.model")
FAIRSEQ = "sentencepiece.bpe.model"
TEKKEN = "tekken.json"
QWEN = "qwen.tiktoken"
T5_EXTRA_IDS = 100  # where the config says nothing else

_OF_MODELS = ("head", "config", "ignore_config")  # options of zoo.load


def tokenizer(ref: Ref, **where: Any) -> Tokenizer:
    """The tokenizer behind a registry name, `hf:org/repo@revision` or a directory.

    `where` is as `zoo.load` has it: revision, token, cache_dir, local_files_only; no tokenizer
    depends on head, config and ignore_config.
    """
    where = {name: value for name, value in where.items() if name not in _OF_MODELS}
    found = sources.resolve(ref, weights=False, config=False, **where)
    return read(found.file or found.directory)


def tokenizer_of(model: Model) -> Tokenizer:
    """Read the tokenizer that lies with a loaded model's weights."""
    if model.provenance is None:
        raise UsageError("a model of no checkpoint has no tokenizer: zoo.tokenizer reads one")
    return read(model.provenance.tokenizer_at)


def read(place: Path) -> Tokenizer:
    """The tokenizer in a local directory; one that holds nothing else will do.

    Of a file of weights the one that it holds itself, else what lies beside it.
    """
    if not place.is_dir():
        return _within(place) or read(place.parent)
    directory = place

    def has(*names: str) -> bool:
        return all(os.path.lexists(directory / name) for name in names)

    settings = Settings.of(directory)
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
    if inside and (held := _within(inside[0])) is not None:
        return held
    if (lone := _lone(directory)) is not None:
        if lone.suffix == ".model":
            return _modelled(lone, settings)
        engine = pieces.SentencePieces(lone, settings.added, data=llama2c.as_model(lone))
        return _finish(engine, engine.kind(), settings)
    known = ["tokenizer.json", *map(" and ".join, PAIRS), *MODELS, FAIRSEQ, TEKKEN, QWEN]
    known += ["vocab.txt", CHARACTERS]
    there = listing(sorted(os.listdir(directory)), 5) or "nothing"
    raise NotACheckpoint(f"{directory}: no tokenizer: no {listing(known)}. It holds {there}.")


def _within(path: Path) -> Tokenizer | None:
    """Of a file that holds weights and vocabulary."""
    if kind_of(path) != "gguf":
        return None
    said = next(iter(open_gguf(path).values())).values
    return gguf.read(said, path) if gguf.has_one(said) else None


def _lone(directory: Path) -> Path | None:
    """The only model of another name, or the only vocabulary of llama2.c's."""
    models = sorted(directory.glob("*.model"))
    if len(models) == 1:
        return confined(directory, models[0].name)
    bins = [path for path in sorted(directory.glob("*.bin")) if llama2c.is_one(path)]
    return confined(directory, bins[0].name) if len(bins) == 1 and not models else None


def beside(file: Path) -> dict[str, Path]:
    """What is the tokenizer of weights in a file that was given alone, by its usual names."""
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


def _spelled_out(path: Path, settings: Settings) -> Tokenizer:
    """What stands around a text is in the file: as the reference, which heeds no add_bos_token
    beside it, and where the file is silent asks only families that begin with [CLS] or end with
    an end.
    """
    said = {k: v for k, v in settings.config.items() if k not in ("add_bos_token", "add_eos_token")}
    found = fast.from_json(path, settings.added)
    # roles that no file names: the family's, if the vocabulary has them
    kind = KINDS.get(settings.kind or "", Kind({}))
    kind = kind._replace(before=None if kind.before == "bos" else kind.before)
    return _finish(found, kind, replace(settings, config=said), found.ends())


def _merged(vocab: Path, merges: Path, settings: Settings) -> Tokenizer:
    kind = settings.kind
    if kind is None:
        kind = bytelevel.guess(bytelevel.read_ids(vocab))
    pattern = "qwen2" if kind == "qwen2" else "gpt2"
    space = bool(settings.flag("add_prefix_space"))
    engine = bytelevel.from_merges(vocab, merges, pattern, _wanted(settings, kind), space)
    return _finish(engine, KINDS[kind], settings)


def _modelled(path: Path, settings: Settings) -> Tokenizer:
    if bytelevel.holds_ranks(path):
        ranks = bytelevel.from_ranks(path, "llama3", _wanted(settings, "llama3"))
        return _finish(ranks, KINDS["llama3"], settings)
    wanted = list(settings.added)
    if settings.kind == "t5":
        wanted += _sentinels(settings)
    legacy = settings.flag("legacy")
    engine = pieces.SentencePieces(path, wanted, prefix_each=legacy)
    known = settings.kind in ("bert", "deberta", "roberta")
    kind = KINDS[settings.kind or ""] if known else engine.kind()
    return _finish(engine, kind, settings)


def _fairseq(path: Path, settings: Settings) -> Tokenizer:
    """Of the families with this file, each with ids of its own, XLM-RoBERTa's is known."""
    if settings.family not in ("", "xlmroberta", "xlmrobertaxl"):
        raise BadTokenizer(
            f"{path}: pieces for {settings.family!r}, and only XLM-RoBERTa's ids are known. Name "
            f"XLMRobertaTokenizer as tokenizer_class in {SETTINGS} if these are they"
        )
    return _finish(unigrams.from_pieces(path, settings), KINDS["roberta"], settings)


def _ranked(directory: Path, names: list[str], settings: Settings) -> Tokenizer:
    """Lines of ranks say nothing of what is not merged across: Qwen's pattern is known."""
    if len(names) > 1:
        raise BadTokenizer(f"{directory}: {listing(names)}, and one file of ranks is wanted")
    path = confined(directory, names[0])
    if settings.family != "qwen" and (settings.family or path.name != QWEN):
        raise BadTokenizer(
            f"{path}: ranks for {settings.family or 'nobody'!r}, and only Qwen's pattern is known. "
            f"Name QWenTokenizer as tokenizer_class in {SETTINGS} if it is theirs"
        )
    ranks = bytelevel.from_ranks(path, "qwen2", _wanted(settings, "qwen"), composed="text")
    return _finish(ranks, KINDS["qwen"], settings)


def _wanted(settings: Settings, kind: str) -> list[Added]:
    """What the checkpoint adds; what the family adds, where nothing is listed with its id."""
    listed = settings.added
    if any(token.id is not None for token in listed):
        return listed
    there = {token.text for token in listed}
    return [*(Added(text) for text in KINDS[kind].beyond if text not in there), *listed]


def _sentinels(settings: Settings) -> list[Added]:
    """T5's marks for what is left out of a text: the first is the last id."""
    count = settings.config.get("extra_ids", T5_EXTRA_IDS)
    if type(count) is not int or not 0 <= count <= 1000:
        raise settings.wrong(SETTINGS, "extra_ids", "a count", count)
    there = {token.text for token in settings.added if token.id is not None}
    texts = (f"<extra_id_{n}>" for n in reversed(range(count)))
    return [Added(text) for text in texts if text not in there]


def _finish(
    engine: Engine,
    kind: Kind,
    settings: Settings,
    ends: tuple[list[int], list[int]] | None = None,
) -> Tokenizer:
    named: Mapping[str, str] = {role: token.text for role, token in settings.named.items()}
    texts = {**kind.roles, **named}
    ids = {role: engine.id(texts[role]) for role in ROLES if role in texts}
    if lacking := sorted(named[role] for role in named if ids[role] is None):
        raise BadTokenizer(f"{settings.directory}: special tokens of no id: {listing(lacking)}")
    roles = {role: id for role, id in ids.items() if id is not None}
    before, after = ends or (_only(roles, kind.before), _only(roles, kind.after))
    # these two are about bos and eos alone, and say nothing of [CLS] and [SEP]
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
