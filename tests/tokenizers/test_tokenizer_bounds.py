"""Untrusted tokenizer.json: steps that lengthen texts, slow patterns, large vocabularies."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

import zoo
from zoo.errors import BadTokenizer, ResourceLimit, ZooError
from zoo.tokenizers.engines import Added, Splitter

BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
SPACES = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}


def table(*texts: str) -> dict[str, Any]:
    """A character map that contains a text which it never uses."""
    data = (1024).to_bytes(4, "little") + bytes(1024) + b"".join(t.encode() + b"\0" for t in texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def split(pattern: str) -> dict[str, Any]:
    at = {"Regex": pattern}
    return {"type": "Split", "pattern": at, "behavior": "Isolated", "invert": False}


def several(key: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", key: steps}


def read(tmp_path: Path, **parts: Any) -> Any:
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<m>": 2}, "unk_token": "a"}
    data = {"version": "1.0", "added_tokens": [], "model": model, **parts}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    return zoo.tokenizer(tmp_path)


NORMAL, CUT, SHOWN = "normalizers", "pretokenizers", "decoders"
TWICE = [replace("aa")] * 30
NESTED: dict[str, Any] = replace("aa")
for _ in range(25):
    NESTED = several(NORMAL, [NESTED, replace("aa")])
HOSTILE = {
    "doubling": ({"normalizer": several(NORMAL, TWICE)}, "256 times as long"),
    "nested": ({"normalizer": NESTED}, "256 times as long"),
    "deep": ({"normalizer": several(NORMAL, [several(NORMAL, [NESTED])] * 30)}, "steps"),
    "anything": (
        {"normalizer": several(NORMAL, [replace("b", Regex="")] * 30)},
        "256 times as long",
    ),
    "some of it": (
        {"normalizer": several(NORMAL, [replace("bb", Regex=r"\w+")] * 30)},
        "256 times as long",
    ),
    "one step": ({"normalizer": replace("b" * 300)}, "256 times as long"),
    "prepended": (
        {"normalizer": several(NORMAL, [{"type": "Prepend", "prepend": "▁"}] * 9)},
        "256 times as long",
    ),
    "forms": (
        {"normalizer": several(NORMAL, [{"type": "NFKD"}, replace("ﷺ"), {"type": "NFKC"}] * 9)},
        "256 times as long",
    ),
    "one table": ({"normalizer": table("b", "a" * 300)}, "256 times as long"),
    "tables": ({"normalizer": several(NORMAL, [table("é" * 19)] * 2)}, "256 times as long"),
    "bytes": ({"pre_tokenizer": several(CUT, [BYTES] * 30)}, "256 times as long"),
    "spaces": ({"pre_tokenizer": several(CUT, [SPACES] * 30)}, "256 times as long"),
    "decoder": ({"decoder": several(SHOWN, TWICE)}, "decoder: makes a text more than 256"),
    "pattern": ({"pre_tokenizer": split("(a+)+$")}, "pre_tokenizer: the pattern '(a+)+$' repeats"),
    "normalizer's pattern": (
        {"normalizer": replace("", Regex="(a|a)*$")},
        "normalizer: the pattern",
    ),
    "template": (
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "a", "type_id": 0}}] * 100
                + [{"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [],
                "special_tokens": {"a": {"id": "a", "ids": [0] * 99, "tokens": ["a"] * 99}},
            }
        },
        "post_processor.single: expected at most 1024 special tokens, found 9900",
    ),
    "words": (
        {
            "model": {
                "type": "WordPiece",
                "vocab": {"a": 0},
                "unk_token": "a",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 10**9,
            }
        },
        "max_input_chars_per_word: expected at most 1000, found 1000000000",
    ),
}


def test_steps_of_published_tokenizers_are_accepted(tmp_path: Path) -> None:
    llama = several(NORMAL, [{"type": "Prepend", "prepend": "▁"}, replace("▁", String=" ")])
    albert = several(
        NORMAL,
        [
            replace('"', String="``"),
            replace('"', String="''"),
            {"type": "NFKD"},
            {"type": "StripAccents"},
            {"type": "Lowercase"},
            replace(" ", Regex=" {2,}"),
        ],
    )
    xlnet = several(NORMAL, [albert, table("ص" * 18)])
    for normalizer in (llama, albert, xlnet, None):
        cut = several(CUT, [split(r"\p{N}{1,3}"), split(r"\s?\p{L}+"), BYTES])
        assert read(tmp_path, normalizer=normalizer, pre_tokenizer=cut).encode("a")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    parts, message = HOSTILE[name]
    with pytest.raises(BadTokenizer) as caught:
        read(tmp_path, **parts)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("depth", [100, 5000])
def test_normalizers_nested_too_deep_are_refused(tmp_path: Path, depth: int) -> None:
    head, tail = '{"type":"Sequence","normalizers":[', "]}"
    (tmp_path / "tokenizer.json").write_text('{"normalizer":' + head * depth + tail * depth + "}")
    with pytest.raises(BadTokenizer, match="nested deeper than 64 levels"):
        zoo.tokenizer(tmp_path)


@pytest.mark.parametrize("filler", ["[],", "{},", '["a"],', '{"a":1},'])
def test_an_inflated_vocabulary_is_refused_before_it_is_built(tmp_path: Path, filler: str) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model":[' + filler * (10**7 // len(filler)) + "0]}")
    with pytest.raises(ResourceLimit, match="MB of memory"):
        zoo.tokenizer(tmp_path)


def test_added_tokens_strip_long_runs_of_spaces_quickly() -> None:
    """In linear time: a pattern would try all pairs of 40,000 spaces."""
    flags = {"lstrip": True, "rstrip": True}
    split = Splitter({"<m>": Added("<m>", 7, **flags), "<s>": Added("<s>", 8, single_word=True)})
    spaces = " " * 200_000
    assert list(split(f"a{spaces}<m>{spaces}b", True)) == ["a", 7, "b"]
    assert list(split(f"{spaces}<m>{spaces}<m><s>c <s>", True)) == [7, 7, "<s>c ", 8]
    assert list(split(spaces, True)) == [spaces]


def test_added_tokens_of_a_file_strip_long_runs_of_spaces_quickly(tmp_path: Path) -> None:
    flags = {"lstrip": True, "rstrip": True, "single_word": True, "normalized": False}
    token = {"id": 2, "content": "<m>", "special": True, **flags}
    tokenizer = read(tmp_path, added_tokens=[token], pre_tokenizer={"type": "Whitespace"})
    spaces = " " * 40_000
    assert tokenizer.encode(f"a{spaces}<m>{spaces}b", special=True) == [0, 2, 1]


def test_errors_of_other_libraries_become_ours(tmp_path: Path) -> None:
    for value in (5, "x", [], [[]], {"type": "Sequence"}, {"type": "Replace", "pattern": 5}):
        for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor", "model"):
            with pytest.raises(ZooError):
                read(tmp_path, **{part: value}, added_tokens=5)
