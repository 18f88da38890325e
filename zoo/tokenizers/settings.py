"""A tokenizer's small files: roles of special tokens, added tokens, flags and chat templates."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from converters.formats import open_regular
from converters.paths import confined
from converters.strict_json import MAX_BYTES, MAX_MEMORY, parse_json, read_json
from zoo.checkpoints.file_names import CONFIG, MORE_TEMPLATES, NATIVE_FILE
from zoo.errors import BadTokenizer
from zoo.tokenizers.engines import Added

SETTINGS, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE = "chat_template.jinja"
MAX_VOCABULARY = 512 << 20  # bytes of memory for its JSON; Gemma 3's tokenizer.json takes 450
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class TokenizerKind(NamedTuple):
    """A family's defaults, for what its files do not say."""

    roles: Mapping[str, str]
    before: str | None = None  # the role of the token before a text
    after: str | None = None  # and after it
    beyond: tuple[str, ...] = ()  # special tokens that follow the vocabulary, in order


_END = "<|endoftext|>"
_BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_ROBERTA = {
    "bos": "<s>",
    "cls": "<s>",
    "eos": "</s>",
    "sep": "</s>",
    "unk": "<unk>",
    "pad": "<pad>",
    "mask": "<mask>",
}
_LLAMA3 = (
    *("begin_of_text", "end_of_text"),
    *(f"reserved_special_token_{n}" for n in range(4)),
    *("start_header_id", "end_header_id", "reserved_special_token_4", "eot_id"),
    *(f"reserved_special_token_{n}" for n in range(5, 251)),
)
KINDS = {
    "gpt2": TokenizerKind({"bos": _END, "eos": _END, "unk": _END}),
    "qwen2": TokenizerKind(
        {"eos": _END, "pad": _END, "unk": _END}, beyond=(_END, "<|im_start|>", "<|im_end|>")
    ),
    "qwen": TokenizerKind(
        {"eos": _END, "pad": _END},
        beyond=(_END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))),
    ),
    "llama": TokenizerKind({"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, before="bos"),
    "llama3": TokenizerKind(
        {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"},
        before="bos",
        beyond=tuple(f"<|{name}|>" for name in _LLAMA3),
    ),
    "tekken": TokenizerKind(
        {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}, before="bos"
    ),
    "t5": TokenizerKind({"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}, after="eos"),
    "bert": TokenizerKind(_BERT, before="cls", after="sep"),
    "deberta": TokenizerKind({**_BERT, "bos": "[CLS]", "eos": "[SEP]"}, before="cls", after="sep"),
    "roberta": TokenizerKind(_ROBERTA, before="cls", after="sep"),
}
# other names of the same families
_SAME = {
    "distilbert": "bert",
    "debertav2": "deberta",
    "mistral": "llama",
    "mobilellm": "llama",
    "xlmroberta": "roberta",
}
_ANYONES = ("", "pretrained", "tokenizersbackend")


@dataclass(frozen=True)
class TokenizerSettings:
    """The small files of a directory; every value is checked when it is read."""

    directory: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    map: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, directory: Path) -> TokenizerSettings:
        """Read the files of a directory; those that are missing are empty."""
        return cls(directory, *(_optional(directory, name) for name in (SETTINGS, MAP, ADDED)))

    @cached_property
    def kind(self) -> str | None:
        """A key of KINDS by tokenizer_class, else by the model; None if neither is known."""
        for name in (self.family, self._model):
            if (name := _SAME.get(name, name)) in KINDS:
                return name
        return None

    @cached_property
    def family(self) -> str:
        """The family by tokenizer_class, or by the model if that class is a generic one."""
        name = str(self.config.get("tokenizer_class") or "").lower().removesuffix("fast")
        name = name.removesuffix("tokenizer")
        return self._model if name in _ANYONES else name

    @cached_property
    def _model(self) -> str:
        for name, key in ((NATIVE_FILE, "architecture"), (CONFIG, "model_type")):
            if value := _optional(self.directory, name).get(key):
                return str(value).replace("-", "").replace("_", "").lower()
        return ""

    def flag(self, name: str) -> bool | None:
        """A boolean of tokenizer_config.json, or None if it is missing."""
        value = self.config.get(name)
        if not isinstance(value, bool | None):
            raise self.wrong(SETTINGS, name, "true or false", value)
        return value

    @cached_property
    def named(self) -> dict[str, Added]:
        """The token of each role that these files name; tokenizer_config.json wins."""
        tokens = {}
        for file, source in ((MAP, self.map), (SETTINGS, self.config)):
            for role in ROLES:
                if (value := source.get(f"{role}_token")) is not None:
                    tokens[role] = self._token(file, f"{role}_token", value)
        return tokens

    @cached_property
    def added(self) -> list[Added]:
        """Every token that these files add or name, with its id where they set it."""
        by_id = self._by_id()
        named = [*self.named.values(), *self._additional()]
        tokens = {token.text: token for token in named}
        for text, id in self.extra.items():
            if type(id) is not int:
                raise self.wrong(ADDED, text, "an id", id)
            token = tokens.get(text, Added(self._text(ADDED, text, text), special=False))
            tokens[text] = token._replace(id=id)
        return list({**tokens, **{token.text: token for token in by_id}}.values())

    def _by_id(self) -> list[Added]:
        tokens = []
        listed = self.config.get("added_tokens_decoder") or {}
        if not isinstance(listed, dict):
            raise self.wrong(SETTINGS, "added_tokens_decoder", "tokens by id", listed)
        for id, value in listed.items():
            where = f"added_tokens_decoder.{id}"
            if not (id.isascii() and id.isdigit() and len(id) < 10) or not isinstance(value, dict):
                raise self.wrong(SETTINGS, where, "an id and its token", value)
            token = self._token(SETTINGS, where, value)
            tokens.append(token._replace(id=int(id), special=bool(value.get("special", False))))
        return tokens

    def _additional(self) -> Iterator[Added]:
        for file, source in ((MAP, self.map), (SETTINGS, self.config)):
            for key in ("additional_special_tokens", "extra_special_tokens"):
                value = source.get(key) or []
                listed = list(value.values()) if isinstance(value, dict) else value
                if not isinstance(listed, list):
                    raise self.wrong(file, key, "a list of tokens", value)
                for item in listed:
                    yield self._token(file, key, item)

    def _token(self, file: str, name: str, value: Any) -> Added:
        if not isinstance(value, dict):
            return Added(self._text(file, name, value))
        flags = {key: value.get(key, False) for key in ("lstrip", "rstrip", "single_word")}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise self.wrong(file, name, "true or false for lstrip, rstrip, single_word", value)
        normalized = bool(value.get("normalized", False))
        return Added(self._text(file, name, value.get("content")), normalized=normalized, **flags)

    def _text(self, file: str, name: str, value: Any) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= 1024:
            raise self.wrong(file, name, "a token's text", value)
        return value

    def wrong(self, file: str, name: str, expected: str, value: Any) -> BadTokenizer:
        """The error for a field of a file that has an unexpected value."""
        return BadTokenizer(
            f"{self.directory / file}: {name}: expected {expected}, found {repr(value)[:80]}"
        )

    @cached_property
    def templates(self) -> dict[str, str]:
        """Chat templates by name; *.jinja files win over tokenizer_config.json."""
        value = self.config.get("chat_template")
        if value is None:
            templates = {}
        elif isinstance(value, str):
            templates = {"default": value}
        else:
            listed = value if isinstance(value, list) else [value]
            items = [item if isinstance(item, dict) else {} for item in listed]
            pairs = [(item.get("name"), item.get("template")) for item in items]
            templates = {n: t for n, t in pairs if isinstance(n, str) and isinstance(t, str)}
            if len(templates) != len(listed):
                raise self.wrong(SETTINGS, "chat_template", "a text, or names with texts", value)
        if os.path.lexists(self.directory / TEMPLATE):
            templates["default"] = read_text(confined(self.directory, TEMPLATE))
        for path in sorted((self.directory / MORE_TEMPLATES).glob("*.jinja")):
            file = confined(self.directory, f"{MORE_TEMPLATES}/{path.name}")
            templates[path.stem] = read_text(file)
        return templates


def _optional(directory: Path, name: str) -> dict[str, Any]:
    if not os.path.lexists(directory / name):
        return {}
    return read_json(confined(directory, name), BadTokenizer)


def parse_vocabulary(data: bytes, path: Path) -> dict[str, Any]:
    """Parse JSON with a larger memory limit: short texts take much more memory than their bytes."""
    most = min(MAX_MEMORY + 24 * len(data), MAX_VOCABULARY)
    return parse_json(data, str(path), BadTokenizer, most)


def read_bytes(path: Path) -> bytes:
    """Read a whole file; refuse one that is empty, or larger than a tokenizer may be."""
    with open(open_regular(path), "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise BadTokenizer(f"{path}: larger than the {MAX_BYTES} bytes that such a file may have")
    if not data:
        raise BadTokenizer(f"{path}: is empty")
    return data


def read_text(path: Path) -> str:
    """Read a file as UTF-8, within the same limits."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise BadTokenizer(f"{path}: not UTF-8 at byte {error.start}") from None
