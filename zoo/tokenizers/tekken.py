"""Mistral's tekken.json: ranks, their pattern, and special tokens that have the first ids."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from converters.strict_regex import why_slow
from zoo.errors import BadTokenizer
from zoo.tokenizers.bytelevel import ByteLevel, ranked
from zoo.tokenizers.engines import MOST_ADDED, Added, assign_ids
from zoo.tokenizers.settings import parse_vocabulary, read_bytes

# versions whose files list no special tokens, and the tokens that they mean
_UNLISTED = ("v1", "v2", "v3", "v7")
_SPECIALS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
)
# a pattern that matches only parts of a text would lose the rest
_PROBE = "It's Él, 12345 ways… (漢字)\n\n\tif x_1 != '😀':  \r\n"


def from_tekken(path: Path, extra: Iterable[Added]) -> ByteLevel:
    """Read a tekken.json."""
    data = parse_vocabulary(read_bytes(path), path)
    config: dict[str, Any] = data["config"] if isinstance(data.get("config"), dict) else {}
    vocab = data["vocab"] if isinstance(data.get("vocab"), list) else []
    size: Any = config.get("default_vocab_size")
    special: Any = config.get("default_num_special_tokens")
    _refuse(path, _shape_problems(config.get("pattern"), vocab, size, special))
    entries = vocab[: size - special]  # a file may hold more than are used
    _refuse(path, _entry_problems(entries))
    specials: Any = data.get("special_tokens")
    if specials is None and config.get("version") in _UNLISTED:
        specials = [{"rank": rank, "token_str": text} for rank, text in enumerate(_SPECIALS)]
    _refuse(path, _special_problems(specials, special))
    texts = {entry["rank"]: entry["token_str"] for entry in specials}
    texts |= {id: _filler(id) for id in range(len(texts), special)}
    ids = {text: id for id, text in texts.items()}
    extra = list(extra)
    extra_texts = {token.text for token in extra}
    own = [Added(text, id) for text, id in ids.items() if text not in extra_texts]
    added = assign_ids([*extra, *own], ids, size, path)
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in entries]
    engine = ranked(tokens, config["pattern"], added, path, first=special)
    if (decoded := engine.decode(engine.encode(_PROBE, special=False))) != _PROBE:
        _refuse(path, [f"config.pattern: of {_PROBE!r} it leaves {decoded!r}"])
    return engine


def _refuse(path: Path, problems: Iterable[str]) -> None:
    if problems := list(problems):
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        lines = [f"{path}: not what Mistral writes:", *problems[:20], *more]
        raise BadTokenizer("\n  ".join(lines))


def _shape_problems(pattern: Any, vocab: Sequence[Any], size: Any, special: Any) -> Iterator[str]:
    if not isinstance(pattern, str) or not pattern:
        yield f"config.pattern: expected a pattern, found {pattern!r}"
    elif why := why_slow(pattern):
        yield f"config.pattern: {pattern[:60]!r} {why}"
    if not vocab:
        yield "vocab: expected a list of tokens"
    if type(special) is not int or not 0 <= special <= MOST_ADDED:
        yield f"config.default_num_special_tokens: expected a count, found {special!r}"
    elif type(size) is not int or not special < size <= special + len(vocab):
        problem = (
            f"expected at most {special} special tokens and {len(vocab)} others, found {size!r}"
        )
        yield f"config.default_vocab_size: {problem}"


def _entry_problems(entries: Sequence[Any]) -> Iterator[str]:
    for rank, entry in enumerate(entries):
        entry = entry if isinstance(entry, dict) else {}
        if type(entry.get("rank")) is not int or entry["rank"] != rank:
            yield f"vocab.{rank}: expected rank {rank}, found {str(entry.get('rank'))[:20]}"
        try:
            base64.b64decode(entry.get("token_bytes", 0), validate=True)
        except (binascii.Error, TypeError, ValueError):
            value = repr(entry.get("token_bytes"))[:40]
            yield f"vocab.{rank}: token_bytes: expected base64, found {value}"


def _special_problems(specials: Any, count: int) -> Iterator[str]:
    if not isinstance(specials, list):
        problem = (
            "nothing, which only early versions may" if specials is None else repr(specials)[:40]
        )
        yield f"special_tokens: expected a list, found {problem}"
        return
    if len(specials) > count:
        yield f"special_tokens: {len(specials)}, and config.default_num_special_tokens is {count}"
    ranks: set[int] = set()
    texts = {_filler(id) for id in range(len(specials), count)}
    for n, entry in enumerate(specials):
        entry = entry if isinstance(entry, dict) else {}
        rank, text = entry.get("rank"), entry.get("token_str")
        if type(rank) is not int or not 0 <= rank < len(specials) or rank in ranks:
            problem = f"expected each of 0..{len(specials) - 1} once, found {str(rank)[:20]}"
            yield f"special_tokens.{n}: rank: {problem}"
        else:
            ranks.add(rank)
        if not isinstance(text, str) or not text or text in texts:
            problem = f"expected a text of its own, found {repr(text)[:40]}"
            yield f"special_tokens.{n}: token_str: {problem}"
        else:
            texts.add(text)


def _filler(id: int) -> str:
    """The name of a special token that the file does not list."""
    return f"<SPECIAL_{id}>"
