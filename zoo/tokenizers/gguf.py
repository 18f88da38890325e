"""The vocabulary in a GGUF file, written as the tokenizer files of a Hugging Face directory.

One reader for each kind of vocabulary is enough: the file's values become tokenizer.model,
tokenizer.json or vocab.txt, and these are read, or written beside an exported model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from zoo.errors import BadTokenizer
from zoo.tokenizers import llama2c
from zoo.tokenizers.bytelevel import PATTERNS
from zoo.tokenizers.sentencepiece_file import BYTE, CONTROL, UNKNOWN, USER_DEFINED
from zoo.tokenizers.settings import SETTINGS

GENERATION = "generation_config.json"
KEY = "tokenizer.ggml."
NORMAL, UNUSED = 1, 5  # types of tokens; the others are SentencePiece's kinds of pieces
_PADDING = re.compile(r"\[PAD\d+\]")
# role -> the key of its id; "seperator" is the format's own spelling
ROLE_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_NONE = (-1, 0xFFFFFFFF)  # llama.cpp's LLAMA_TOKEN_NULL, as a signed and an unsigned number
# pre-tokenizer pattern -> its name in GGUF, and the tokenizer class that has it
SPLITS = {
    "gpt2": ("gpt-2", "GPT2Tokenizer"),
    "qwen2": ("qwen2", "Qwen2Tokenizer"),
    "llama3": ("llama-bpe", "PreTrainedTokenizerFast"),
}
SPACE = "\u2581"  # marks a piece that begins a word, where vocab.txt marks those that do not


def has_vocabulary(values: Mapping[str, Any]) -> bool:
    """Whether a GGUF file's key/values contain a vocabulary."""
    return values.get(f"{KEY}model") not in (None, "no_vocab")


def ends(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a generation_config.json that the key/values contain."""
    ids = _special_ids(values, (ROLE_KEYS["bos"], ROLE_KEYS["pad"], *_ENDS))
    config: dict[str, Any] = {f"{r}_token_id": ids.get(ROLE_KEYS[r]) for r in ("bos", "pad")}
    last = list(dict.fromkeys(ids[key] for key in _ENDS if key in ids))
    config["eos_token_id"] = last[0] if len(last) == 1 else last or None
    return {key: id for key, id in config.items() if id is not None}


def _special_ids(values: Mapping[str, Any], keys: Iterable[str]) -> dict[str, int]:
    """The ids of special tokens that a file sets, by their keys."""
    ids = {key: values.get(KEY + key) for key in keys}
    return {key: id for key, id in ids.items() if type(id) is int and id not in _NONE}


def files(values: Mapping[str, Any], where: Path) -> dict[str, bytes]:
    """The tokenizer files of a Hugging Face directory, by name; none without a vocabulary."""
    if not has_vocabulary(values):
        return {}
    makers: dict[str, Callable[[_Fields], dict[str, bytes]]]
    makers = {"llama": _as_pieces, "gpt2": _as_merges, "bert": _as_words}
    kind = values[f"{KEY}model"]
    if not isinstance(kind, str) or kind not in makers:
        kinds = ", ".join(makers)
        raise BadTokenizer(f"{where}: {KEY}model: {kind!r} is not implemented (only {kinds})")
    fields = _Fields(values, where)
    made = makers[kind](fields)
    made[SETTINGS] = _json(fields.settings)
    if more := ends(values):
        made[GENERATION] = _json(more)
    return made


class _Fields:
    """A file's values below tokenizer.ggml, with their types and sizes checked."""

    def __init__(self, values: Mapping[str, Any], where: Path) -> None:
        self._values, self.where = values, where
        self.architecture = values.get("general.architecture")
        self.tokens: list[str] = self.list("tokens", str)
        count = len(self.tokens)
        self.types: list[int] = self.list("token_type", int, count) or [NORMAL] * count
        if wrong := [type_ for type_ in self.types if not NORMAL <= type_ <= BYTE]:
            raise self.wrong("token_type", f"numbers from {NORMAL} to {BYTE}", wrong[0])
        ids = _special_ids(values, {*ROLE_KEYS.values(), *_ENDS})
        for key, id in sorted(ids.items()):
            if not 0 <= id < count:
                raise self.wrong(key, f"an id of {count} tokens, or {_NONE[1]} for none", id)
        self.roles = {role: self.tokens[ids[key]] for role, key in ROLE_KEYS.items() if key in ids}
        self.settings: dict[str, Any] = {f"{r}_token": text for r, text in self.roles.items()}
        self.settings["clean_up_tokenization_spaces"] = False
        if isinstance(template := values.get("tokenizer.chat_template"), str):
            self.settings["chat_template"] = template

    def flag(self, name: str, default: bool) -> bool:
        value = self._values.get(KEY + name, default)
        if type(value) is not bool:
            raise self.wrong(name, "true or false", value)
        return value

    def list(self, name: str, kind: type, count: int | None = None) -> list[Any]:
        """A list of `count` values; empty if the key is missing and a count is expected."""
        value = self._values.get(KEY + name)
        if value is None and count is not None:
            return []
        items = [] if value is None or isinstance(value, str | int | float) else list(value)
        if not items or any(type(each) is not kind for each in items):
            raise self.wrong(name, f"an array of {kind.__name__}", value)
        if count is not None and len(items) != count:
            raise self.wrong(name, f"{count} of them, one a token", f"{len(items)}")
        return items

    def wrong(self, name: str, expected: str, value: Any) -> BadTokenizer:
        return BadTokenizer(
            f"{self.where}: {KEY}{name}: expected {expected}, found {repr(value)[:80]}"
        )


def _as_pieces(fields: _Fields) -> dict[str, bytes]:
    scores = fields.list("scores", float, len(fields.tokens))
    if not scores:
        raise fields.wrong("scores", "one a token", None)
    pieces = list(zip(fields.tokens, scores, fields.types, strict=True))
    fields.settings["tokenizer_class"] = "LlamaTokenizer"
    fields.settings["add_bos_token"] = fields.flag("add_bos_token", True)
    fields.settings["add_eos_token"] = fields.flag("add_eos_token", False)
    model = llama2c.sentencepiece_model(
        pieces,
        prefix=fields.flag("add_space_prefix", True),
        collapse=fields.flag("remove_extra_whitespaces", False),
        falls_back=BYTE in fields.types,
    )
    return {"tokenizer.model": model}


def _as_merges(fields: _Fields) -> dict[str, bytes]:
    pre = fields._values.get(f"{KEY}pre")
    if pre is None and fields.architecture == "gpt2":
        pre = "gpt-2"  # older files of GPT-2, the first model of this kind, have no key
    kind = next((ours for ours, (theirs, _) in SPLITS.items() if theirs == pre), None)
    if kind is None:
        raise fields.wrong("pre", " or ".join(theirs for theirs, _ in SPLITS.values()), pre)
    merges = fields.list("merges", str)
    vocabulary: dict[str, int] = {}
    added: list[dict[str, Any]] = []
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for id, (text, type_) in enumerate(zip(fields.tokens, fields.types, strict=True)):
        if type_ == UNUSED and _PADDING.fullmatch(text):
            continue  # pads the vocabulary to the embedding's size
        if vocabulary.setdefault(text, id) != id:
            raise fields.wrong("tokens", "each of them once", text)
        if type_ in (CONTROL, USER_DEFINED, UNKNOWN):
            special = type_ != USER_DEFINED
            added.append({"id": id, "content": text, **flags, "special": special})
    fields.settings["tokenizer_class"] = SPLITS[kind][1]
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if kind == "qwen2" else None,
        "pre_tokenizer": _pre_tokenizer(kind),
        "post_processor": _template(fields, vocabulary),
        "decoder": _byte_level(False),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": kind == "llama3",
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    return {"tokenizer.json": _json(data)}


def _byte_level(cuts: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": cuts}


def _pre_tokenizer(kind: str) -> dict[str, Any]:
    if kind == "gpt2":
        return _byte_level(True)
    at = {"Regex": PATTERNS[kind]}
    split = {"type": "Split", "pattern": at, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


def _template(fields: _Fields, vocabulary: Mapping[str, int]) -> dict[str, Any] | None:
    """The post-processor that puts special tokens before and after a text."""
    used_roles = [role for role in ("bos", "eos") if fields.flag(f"add_{role}_token", False)]
    if missing := [role for role in used_roles if fields.roles.get(role) not in vocabulary]:
        raise fields.wrong(ROLE_KEYS[missing[0]], "a token's id", fields.roles.get(missing[0]))
    if not used_roles:
        return None
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {role: fields.roles[role] for role in used_roles}
    marks = {r: {"SpecialToken": {"id": token, "type_id": 0}} for r, token in tokens.items()}
    single = [*([marks["bos"]] if "bos" in marks else []), text]
    single += [marks["eos"]] if "eos" in marks else []
    second = json.loads(json.dumps(single).replace('"A"', '"B"').replace(": 0}", ": 1}"))
    special = {t: {"id": t, "ids": [vocabulary[t]], "tokens": [t]} for t in tokens.values()}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *second],
        "special_tokens": special,
    }


def _as_words(fields: _Fields) -> dict[str, bytes]:
    words = []
    for text, type_ in zip(fields.tokens, fields.types, strict=True):
        if type_ in (CONTROL, UNKNOWN, UNUSED):
            words.append(text)
        else:
            words.append(text[1:] if text.startswith(SPACE) else f"##{text}")
    if broken := [word for word in words if "\n" in word]:
        raise fields.wrong("tokens", "words of one line", broken[0])
    for role in ("bos", "eos"):  # these are [CLS] and [SEP] here
        fields.settings.pop(f"{role}_token", None)
    fields.settings |= {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    return {"vocab.txt": ("\n".join(words) + "\n").encode()}


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
