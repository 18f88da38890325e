"""The vocabulary in a GGUF file, as the files that other checkpoints have it in; and back.

One way to read each kind of vocabulary is enough: what the file says is made into tokenizer.model,
tokenizer.json or vocab.txt, and those are read, or written beside an exported model.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.formats.gguf import Value
from zoo.errors import BadTokenizer, LossyExport, option
from zoo.tokenizers import bytelevel, llama2c
from zoo.tokenizers.bytelevel import PATTERNS
from zoo.tokenizers.fast import lower_case, words_of
from zoo.tokenizers.settings import SETTINGS, Settings, parse_vocabulary, read_bytes
from zoo.tokenizers.unigrams import BYTE, CONTROL, UNKNOWN, USER_DEFINED, read_model

if TYPE_CHECKING:
    from zoo.tokenizers.core import Tokenizer

GENERATION = "generation_config.json"
_KEY = "tokenizer.ggml."
_NORMAL, _UNUSED = 1, 5  # the other types of tokens are those of SentencePiece
_BPE = 2  # a model's type, likewise
_LEAST = -1000.0  # the score of what nothing is merged into
_FILLER = re.compile(r"\[PAD\d+\]")
# role: the key of its id; the third is spelled so
_ROLES = {
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
# how texts are cut before merging: our name, the format's, the class that has it
_CUTS = {
    "gpt2": ("gpt-2", "GPT2Tokenizer"),
    "qwen2": ("qwen2", "Qwen2Tokenizer"),
    "llama3": ("llama-bpe", "PreTrainedTokenizerFast"),
}
_SPACE = "\u2581"  # before a word that begins one, where WordPiece marks those that do not


def has_one(values: Mapping[str, Any]) -> bool:
    return values.get(f"{_KEY}model") not in (None, "no_vocab")


def read(values: Mapping[str, Any], where: Path) -> Tokenizer:
    """The tokenizer of a file that has one."""
    from zoo.tokenizers.reading import read as read_directory

    with tempfile.TemporaryDirectory() as place:
        for name, data in files(values, where).items():
            (Path(place) / name).write_bytes(data)
        found = read_directory(Path(place))
    found.directory = where.parent
    return found


def ends(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a generation_config.json would say."""
    ids = _special_ids(values, (_ROLES["bos"], _ROLES["pad"], *_ENDS))
    told: dict[str, Any] = {f"{r}_token_id": ids.get(_ROLES[r]) for r in ("bos", "pad")}
    last = list(dict.fromkeys(ids[key] for key in _ENDS if key in ids))
    told["eos_token_id"] = last[0] if len(last) == 1 else last or None
    return {key: id for key, id in told.items() if id is not None}


def _special_ids(values: Mapping[str, Any], keys: Iterable[str]) -> dict[str, int]:
    """The ids of special tokens that a file names, by their keys."""
    ids = {key: values.get(_KEY + key) for key in keys}
    return {key: id for key, id in ids.items() if type(id) is int and id not in _NONE}


def files(values: Mapping[str, Any], where: Path) -> dict[str, bytes]:
    """name -> content, as a directory of the hub has them; none where there is no vocabulary."""
    if not has_one(values):
        return {}
    makers: dict[str, Callable[[_Said], dict[str, bytes]]]
    makers = {"llama": _as_pieces, "gpt2": _as_merges, "bert": _as_words}
    kind = values[f"{_KEY}model"]
    if not isinstance(kind, str) or kind not in makers:
        known = ", ".join(makers)
        raise BadTokenizer(f"{where}: {_KEY}model: {kind!r} is not implemented (only {known})")
    said = _Said(values, where)
    made = makers[kind](said)
    made[SETTINGS] = _json(said.settings)
    if more := ends(values):
        made[GENERATION] = _json(more)
    return made


class _Said:
    """A file's values below tokenizer.ggml, each looked at for what it should be."""

    def __init__(self, values: Mapping[str, Any], where: Path) -> None:
        self._values, self.where = values, where
        self.architecture = values.get("general.architecture")
        self.tokens: list[str] = self.list("tokens", str)
        count = len(self.tokens)
        self.types: list[int] = self.list("token_type", int, count) or [_NORMAL] * count
        if odd := [type_ for type_ in self.types if not _NORMAL <= type_ <= BYTE]:
            raise self.wrong("token_type", f"numbers from {_NORMAL} to {BYTE}", odd[0])
        ids = _special_ids(values, {*_ROLES.values(), *_ENDS})
        for key, id in sorted(ids.items()):
            if not 0 <= id < count:
                raise self.wrong(key, f"an id of {count} tokens, or {_NONE[1]} for none", id)
        self.roles = {role: self.tokens[ids[key]] for role, key in _ROLES.items() if key in ids}
        self.settings: dict[str, Any] = {f"{r}_token": text for r, text in self.roles.items()}
        self.settings["clean_up_tokenization_spaces"] = False
        if isinstance(template := values.get("tokenizer.chat_template"), str):
            self.settings["chat_template"] = template

    def flag(self, name: str, default: bool) -> bool:
        value = self._values.get(_KEY + name, default)
        if type(value) is not bool:
            raise self.wrong(name, "true or false", value)
        return value

    def list(self, name: str, kind: type, count: int | None = None) -> list[Any]:
        """Empty where it is not there and a count is known."""
        value = self._values.get(_KEY + name)
        if value is None and count is not None:
            return []
        found = [] if value is None or isinstance(value, str | int | float) else list(value)
        if not found or any(type(each) is not kind for each in found):
            raise self.wrong(name, f"an array of {kind.__name__}", value)
        if count is not None and len(found) != count:
            raise self.wrong(name, f"{count} of them, one a token", f"{len(found)}")
        return found

    def wrong(self, name: str, wanted: str, found: Any) -> BadTokenizer:
        return BadTokenizer(
            f"{self.where}: {_KEY}{name}: expected {wanted}, found {repr(found)[:80]}"
        )


def _as_pieces(said: _Said) -> dict[str, bytes]:
    scores = said.list("scores", float, len(said.tokens))
    if not scores:
        raise said.wrong("scores", "one a token", None)
    pieces = list(zip(said.tokens, scores, said.types, strict=True))
    said.settings["tokenizer_class"] = "LlamaTokenizer"
    said.settings["add_bos_token"] = said.flag("add_bos_token", True)
    said.settings["add_eos_token"] = said.flag("add_eos_token", False)
    model = llama2c.model_of(
        pieces,
        prefix=said.flag("add_space_prefix", True),
        collapse=said.flag("remove_extra_whitespaces", False),
        falls_back=BYTE in said.types,
    )
    return {"tokenizer.model": model}


def _as_merges(said: _Said) -> dict[str, bytes]:
    cut = said._values.get(f"{_KEY}pre")
    if cut is None and said.architecture == "gpt2":
        cut = "gpt-2"  # older files of the one model that this kind of vocabulary began with
    kind = next((ours for ours, (theirs, _) in _CUTS.items() if theirs == cut), None)
    if kind is None:
        raise said.wrong("pre", " or ".join(theirs for theirs, _ in _CUTS.values()), cut)
    merges = said.list("merges", str)
    vocabulary: dict[str, int] = {}
    added: list[dict[str, Any]] = []
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for id, (text, type_) in enumerate(zip(said.tokens, said.types, strict=True)):
        if type_ == _UNUSED and _FILLER.fullmatch(text):
            continue  # what makes the table as long as the embedding's
        if vocabulary.setdefault(text, id) != id:
            raise said.wrong("tokens", "each of them once", text)
        if type_ in (CONTROL, USER_DEFINED, UNKNOWN):
            special = type_ != USER_DEFINED
            added.append({"id": id, "content": text, **flags, "special": special})
    said.settings["tokenizer_class"] = _CUTS[kind][1]
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if kind == "qwen2" else None,
        "pre_tokenizer": _cutting(kind),
        "post_processor": _around(said, vocabulary),
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


def _cutting(kind: str) -> dict[str, Any]:
    if kind == "gpt2":
        return _byte_level(True)
    at = {"Regex": PATTERNS[kind]}
    split = {"type": "Split", "pattern": at, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


def _around(said: _Said, vocabulary: Mapping[str, int]) -> dict[str, Any] | None:
    """What stands before and after a text."""
    wanted = [role for role in ("bos", "eos") if said.flag(f"add_{role}_token", False)]
    if lacking := [role for role in wanted if said.roles.get(role) not in vocabulary]:
        raise said.wrong(_ROLES[lacking[0]], "a token's id", said.roles.get(lacking[0]))
    if not wanted:
        return None
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {role: said.roles[role] for role in wanted}
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


def _as_words(said: _Said) -> dict[str, bytes]:
    words = []
    for text, type_ in zip(said.tokens, said.types, strict=True):
        if type_ in (CONTROL, UNKNOWN, _UNUSED):
            words.append(text)
        else:
            words.append(text[1:] if text.startswith(_SPACE) else f"##{text}")
    if odd := [word for word in words if "\n" in word]:
        raise said.wrong("tokens", "words of one line", odd[0])
    for role in ("bos", "eos"):  # of [CLS] and [SEP], where there are such
        said.settings.pop(f"{role}_token", None)
    said.settings |= {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    return {"vocab.txt": ("\n".join(words) + "\n").encode()}


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


# --- and back ------------------------------------------------------------------------------------


def values_of(carried: Mapping[str, Path], size: int) -> dict[str, Any]:
    """Key/values for the tokenizer among a checkpoint's files, for an embedding of `size` rows."""
    model = next((carried[n] for n in carried if n.endswith(".model")), None)
    pairs = next((p for p in _PAIRS if carried.keys() >= set(p)), None)
    if model is not None and not bytelevel.holds_ranks(model):
        said = _of_pieces(model)
    elif "tokenizer.json" in carried:
        said = _of_json(carried["tokenizer.json"])
    elif pairs is not None:
        said = _of_pair(carried[pairs[0]], carried[pairs[1]])
    elif "vocab.txt" in carried:
        said = _of_words(carried["vocab.txt"])
    elif model is not None:
        said = _of_ranks(model)
    elif any(n.endswith((".tiktoken", "tekken.json")) for n in carried):
        raise _unsayable(carried, "ranks of another kind than Llama 3's")
    else:
        return {f"{_KEY}model": "no_vocab"}
    return _filled(said, size, next(iter(carried.values())).parent)


_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def _unsayable(where: Any, why: str) -> LossyExport:
    path = next(iter(where.values())).parent if isinstance(where, Mapping) else where
    return LossyExport(
        f"{path}: a vocabulary that GGUF cannot say: {why}. To write the weights without it: "
        f"{option('layout', {'vocabulary': 0})}"
    )


def _tokenizer(path: Path) -> Tokenizer:
    from zoo.tokenizers.reading import read as read_directory

    return read_directory(path.parent)


def _common(found: Tokenizer, kind: str, tokens: list[str], types: list[int]) -> dict[str, Any]:
    said: dict[str, Any] = {
        f"{_KEY}model": kind,
        f"{_KEY}tokens": Value("[str]", tokens),
        f"{_KEY}token_type": Value("[i32]", types),
    }
    for role, key in _ROLES.items():
        if (id := getattr(found, role)) is not None:
            said[_KEY + key] = id
    around = found.encode("")
    if kind != "bert":
        said[f"{_KEY}add_bos_token"] = found.bos is not None and around[:1] == [found.bos]
        said[f"{_KEY}add_eos_token"] = found.eos is not None and around[-1:] == [found.eos]
    if "default" in found.templates:
        said["tokenizer.chat_template"] = found.templates["default"]
    return said


def _filled(said: dict[str, Any], size: int, where: Path) -> dict[str, Any]:
    """As many tokens as the embedding has rows, which is how llama.cpp counts them."""
    fillers = {"tokens": None, "token_type": _UNUSED, "scores": _LEAST}
    count = len(said[f"{_KEY}tokens"].value)
    if count > size:
        raise _unsayable(where, f"{count} tokens, and the embedding has {size} rows")
    for key, filler in fillers.items():
        if (value := said.get(_KEY + key)) is not None:
            value.value.extend(
                f"[PAD{id}]" if filler is None else filler for id in range(count, size)
            )
    return said


def _of_pieces(path: Path) -> dict[str, Any]:
    model = read_model(path)
    if model.kind != _BPE or model.characters:
        why = "unigrams" if model.kind != _BPE else "characters that are replaced beforehand"
        raise _unsayable(path, why)
    found = _tokenizer(path)
    tokens = [piece.text for piece in model.pieces]
    types = [piece.kind for piece in model.pieces]
    specials = set(found.special_tokens.values())
    for id in range(len(tokens), found.vocab_size):
        tokens.append(found.token(id) or f"[PAD{id}]")
        types.append(CONTROL if id in specials else USER_DEFINED)
    scores = [piece.score for piece in model.pieces]
    scores += [_LEAST] * (len(tokens) - len(scores))
    said = _common(found, "llama", tokens, types)
    return {
        **said,
        f"{_KEY}pre": "default",
        f"{_KEY}scores": Value("[f32]", scores),
        f"{_KEY}add_space_prefix": model.prefix,
        f"{_KEY}remove_extra_whitespaces": model.collapse,
    }


def _of_pair(vocab: Path, merges: Path) -> dict[str, Any]:
    settings = Settings.of(vocab.parent)
    kind = settings.kind or bytelevel.guess(bytelevel.read_ids(vocab))
    if settings.flag("add_prefix_space"):
        raise _unsayable(vocab, "a space before each text (add_prefix_space)")
    if kind not in _CUTS:
        raise _unsayable(vocab, f"the way in which {kind} cuts texts")
    pairs = [f"{left} {right}" for _, left, right in bytelevel._merges(merges)]
    ids = bytelevel.read_ids(vocab)
    made = {left + right for left, _, right in (pair.partition(" ") for pair in pairs)}
    made |= set(bytelevel.letters().values())
    plain = {t.text for t in settings.added if not t.special}
    return _of_merges(_tokenizer(vocab), kind, pairs, ids.keys() & made, plain)


def _of_ranks(path: Path) -> dict[str, Any]:
    """Llama 3's."""
    tokens = bytelevel.read_ranks(path)
    spelled = bytelevel.spelling
    pairs = [f"{spelled(a)} {spelled(b)}" for a, b in bytelevel.merges_of(tokens)]
    return _of_merges(_tokenizer(path), "llama3", pairs, set(map(spelled, tokens)), set())


def _of_json(path: Path) -> dict[str, Any]:
    data = parse_vocabulary(read_bytes(path), path)
    model = data.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind == "WordPiece":
        return _of_words(path)
    cut = _cut_of(data)
    if kind != "BPE" or cut is None:
        raise _unsayable(path, f"a model of type {kind} or the way in which texts are cut")
    assert isinstance(model, dict)
    pairs = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
    plain = {t["content"] for t in data.get("added_tokens", []) if not t.get("special")}
    added = {t["content"] for t in data.get("added_tokens", [])}
    return _of_merges(_tokenizer(path), cut, pairs, model["vocab"].keys() - added, plain)


def _cut_of(data: Mapping[str, Any]) -> str | None:
    """Which of the known ways of cutting texts a tokenizer.json spells out."""
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
    found = next((name for name, text in PATTERNS.items() if text == pattern), None)
    return found if normal == ("NFC" if found == "qwen2" else None) else None


def _of_merges(
    found: Tokenizer, kind: str, merges: list[str], normal: Collection[str], plain: set[str]
) -> dict[str, Any]:
    tokens, types = list[str](), list[int]()
    specials = found.special_tokens
    for id in range(found.vocab_size):
        text = found.token(id)
        tokens.append(text or f"[PAD{id}]")
        if not text:
            types.append(_UNUSED)
        elif text in normal and text not in specials:
            types.append(_NORMAL)
        else:
            types.append(USER_DEFINED if text in plain else CONTROL)
    said = _common(found, "gpt2", tokens, types)
    return {**said, f"{_KEY}pre": _CUTS[kind][0], f"{_KEY}merges": Value("[str]", merges)}


def _of_words(path: Path) -> dict[str, Any]:
    """llama.cpp makes letters small and takes accents away, whatever the file says."""
    if path.suffix == ".json":
        normal = parse_vocabulary(read_bytes(path), path).get("normalizer") or {}
        lower = normal.get("type") == "BertNormalizer" and normal.get("lowercase")
        lower = lower and normal.get("strip_accents") is not False
    else:
        settings = Settings.of(path.parent)
        lower = lower_case(words_of(path), settings)
        lower = lower and settings.flag("strip_accents") is not False
    if not lower:
        raise _unsayable(path, "words whose case or accents count")
    found = _tokenizer(path)
    tokens, types = list[str](), list[int]()
    for id in range(found.vocab_size):
        text = found.token(id)
        special = id in (found.cls, found.sep, found.pad, found.mask, found.unk)
        types.append(UNKNOWN if id == found.unk else CONTROL if special else _NORMAL)
        tokens.append(text if special else text[2:] if text[:2] == "##" else f"{_SPACE}{text}")
    said = _common(found, "bert", tokens, types)
    return {f"{_KEY}bos_token_id": found.cls, f"{_KEY}eos_token_id": found.sep, **said}


__all__ = ["ends", "files", "has_one", "read", "values_of"]
