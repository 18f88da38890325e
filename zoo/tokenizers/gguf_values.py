"""The GGUF key/values of a tokenizer, for a checkpoint that is written as GGUF."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from converters.formats.gguf import Value
from zoo.errors import LossyExport, option
from zoo.tokenizers import bytelevel
from zoo.tokenizers.bytelevel import PATTERNS
from zoo.tokenizers.core import Tokenizer
from zoo.tokenizers.fast import lower_case, words_of
from zoo.tokenizers.gguf import KEY, NORMAL, ROLE_KEYS, SPACE, SPLITS, UNUSED
from zoo.tokenizers.load import PAIRS, read
from zoo.tokenizers.sentencepiece_file import (
    BPE,
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    read_model,
)
from zoo.tokenizers.settings import TokenizerSettings, parse_vocabulary, read_bytes

_LOWEST = -1000.0  # the score of pieces that nothing is merged into


def values_of(carried: Mapping[str, Path], size: int) -> dict[str, Any]:
    """The key/values of the tokenizer among these files, for an embedding of `size` rows."""
    model = next((carried[n] for n in carried if n.endswith(".model")), None)
    pairs = next((p for p in PAIRS if carried.keys() >= set(p)), None)
    if model is not None and not bytelevel.holds_ranks(model):
        values = _of_pieces(model)
    elif "tokenizer.json" in carried:
        values = _of_json(carried["tokenizer.json"])
    elif pairs is not None:
        values = _of_pair(carried[pairs[0]], carried[pairs[1]])
    elif "vocab.txt" in carried:
        values = _of_words(carried["vocab.txt"])
    elif model is not None:
        values = _of_ranks(model)
    elif any(n.endswith((".tiktoken", "tekken.json")) for n in carried):
        raise _not_in_gguf(carried, "ranks of another kind than Llama 3's")
    else:
        return {f"{KEY}model": "no_vocab"}
    return _filled(values, size, next(iter(carried.values())).parent)


def _not_in_gguf(where: Any, why: str) -> LossyExport:
    path = next(iter(where.values())).parent if isinstance(where, Mapping) else where
    return LossyExport(
        f"{path}: a vocabulary that GGUF cannot represent: {why}. To write the weights without it: "
        f"{option('layout', {'vocabulary': 0})}"
    )


def _common(tokenizer: Tokenizer, kind: str, tokens: list[str], types: list[int]) -> dict[str, Any]:
    values: dict[str, Any] = {
        f"{KEY}model": kind,
        f"{KEY}tokens": Value("[str]", tokens),
        f"{KEY}token_type": Value("[i32]", types),
    }
    for role, key in ROLE_KEYS.items():
        if (id := getattr(tokenizer, role)) is not None:
            values[KEY + key] = id
    around = tokenizer.encode("")
    if kind != "bert":
        values[f"{KEY}add_bos_token"] = tokenizer.bos is not None and around[:1] == [tokenizer.bos]
        values[f"{KEY}add_eos_token"] = tokenizer.eos is not None and around[-1:] == [tokenizer.eos]
    if "default" in tokenizer.templates:
        values["tokenizer.chat_template"] = tokenizer.templates["default"]
    return values


def _filled(values: dict[str, Any], size: int, where: Path) -> dict[str, Any]:
    """Pad to as many tokens as the embedding has rows: llama.cpp counts tokens so."""
    fillers = {"tokens": None, "token_type": UNUSED, "scores": _LOWEST}
    count = len(values[f"{KEY}tokens"].value)
    if count > size:
        raise _not_in_gguf(where, f"{count} tokens, and the embedding has {size} rows")
    for key, filler in fillers.items():
        if (value := values.get(KEY + key)) is not None:
            value.value.extend(
                f"[PAD{id}]" if filler is None else filler for id in range(count, size)
            )
    return values


def _of_pieces(path: Path) -> dict[str, Any]:
    model = read_model(path)
    if model.kind != BPE or model.characters:
        why = "unigrams" if model.kind != BPE else "a map of characters to replace"
        raise _not_in_gguf(path, why)
    tokenizer = read(path.parent)
    tokens = [piece.text for piece in model.pieces]
    types = [piece.kind for piece in model.pieces]
    specials = set(tokenizer.special_tokens.values())
    for id in range(len(tokens), tokenizer.vocab_size):
        tokens.append(tokenizer.token(id) or f"[PAD{id}]")
        types.append(CONTROL if id in specials else USER_DEFINED)
    scores = [piece.score for piece in model.pieces]
    scores += [_LOWEST] * (len(tokens) - len(scores))
    values = _common(tokenizer, "llama", tokens, types)
    return {
        **values,
        f"{KEY}pre": "default",
        f"{KEY}scores": Value("[f32]", scores),
        f"{KEY}add_space_prefix": model.prefix,
        f"{KEY}remove_extra_whitespaces": model.collapse,
    }


def _of_pair(vocab: Path, merges: Path) -> dict[str, Any]:
    settings = TokenizerSettings.of(vocab.parent)
    kind = settings.kind or bytelevel.guess(bytelevel.read_ids(vocab))
    if settings.flag("add_prefix_space"):
        raise _not_in_gguf(vocab, "a space before each text (add_prefix_space)")
    if kind not in SPLITS:
        raise _not_in_gguf(vocab, f"the pre-tokenizer of {kind}")
    pairs = [f"{left} {right}" for _, left, right in bytelevel.merges(merges)]
    ids = bytelevel.read_ids(vocab)
    made = {left + right for left, _, right in (pair.partition(" ") for pair in pairs)}
    made |= set(bytelevel.letters().values())
    plain = {t.text for t in settings.added if not t.special}
    return _of_merges(read(vocab.parent), kind, pairs, ids.keys() & made, plain)


def _of_ranks(path: Path) -> dict[str, Any]:
    """The key/values of Llama 3's file of ranks."""
    tokens = bytelevel.read_ranks(path)
    spelled = bytelevel.spelling
    pairs = [f"{spelled(a)} {spelled(b)}" for a, b in bytelevel.merges_of(tokens)]
    return _of_merges(read(path.parent), "llama3", pairs, set(map(spelled, tokens)), set())


def _of_json(path: Path) -> dict[str, Any]:
    data = parse_vocabulary(read_bytes(path), path)
    model = data.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind == "WordPiece":
        return _of_words(path)
    cut = _split_of(data)
    if kind != "BPE" or cut is None:
        raise _not_in_gguf(path, f"a model of type {kind}, or another pre-tokenizer")
    assert isinstance(model, dict)
    pairs = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
    plain = {t["content"] for t in data.get("added_tokens", []) if not t.get("special")}
    added = {t["content"] for t in data.get("added_tokens", [])}
    return _of_merges(read(path.parent), cut, pairs, model["vocab"].keys() - added, plain)


def _split_of(data: Mapping[str, Any]) -> str | None:
    """Which of the known pre-tokenizers a tokenizer.json has."""
    steps = data.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    normal = (data.get("normalizer") or {}).get("type")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and normal is None:
        return "gpt2"
    if kinds != ["Split", "ByteLevel"] or steps[1].get("use_regex", True):
        return None
    pattern = steps[0].get("pattern", {}).get("Regex")
    name = next((name for name, text in PATTERNS.items() if text == pattern), None)
    return name if normal == ("NFC" if name == "qwen2" else None) else None


def _of_merges(
    tokenizer: Tokenizer, kind: str, merges: list[str], normal: Collection[str], plain: set[str]
) -> dict[str, Any]:
    tokens, types = list[str](), list[int]()
    specials = tokenizer.special_tokens
    for id in range(tokenizer.vocab_size):
        text = tokenizer.token(id)
        tokens.append(text or f"[PAD{id}]")
        if not text:
            types.append(UNUSED)
        elif text in normal and text not in specials:
            types.append(NORMAL)
        else:
            types.append(USER_DEFINED if text in plain else CONTROL)
    values = _common(tokenizer, "gpt2", tokens, types)
    return {**values, f"{KEY}pre": SPLITS[kind][0], f"{KEY}merges": Value("[str]", merges)}


def _of_words(path: Path) -> dict[str, Any]:
    """The key/values of WordPiece: llama.cpp always lowercases and strips accents."""
    if path.suffix == ".json":
        normal = parse_vocabulary(read_bytes(path), path).get("normalizer") or {}
        lower = normal.get("type") == "BertNormalizer" and normal.get("lowercase")
        lower = lower and normal.get("strip_accents") is not False
    else:
        settings = TokenizerSettings.of(path.parent)
        lower = lower_case(words_of(path), settings)
        lower = lower and settings.flag("strip_accents") is not False
    if not lower:
        raise _not_in_gguf(path, "words with case or accents")
    tokenizer = read(path.parent)
    tokens, types = list[str](), list[int]()
    for id in range(tokenizer.vocab_size):
        text = tokenizer.token(id)
        special = id in (tokenizer.cls, tokenizer.sep, tokenizer.pad, tokenizer.mask, tokenizer.unk)
        types.append(UNKNOWN if id == tokenizer.unk else CONTROL if special else NORMAL)
        tokens.append(text if special else text[2:] if text[:2] == "##" else f"{SPACE}{text}")
    values = _common(tokenizer, "bert", tokens, types)
    return {f"{KEY}bos_token_id": tokenizer.cls, f"{KEY}eos_token_id": tokenizer.sep, **values}
