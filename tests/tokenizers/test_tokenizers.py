"""Text to ids and back, against transformers, tiktoken and sentencepiece themselves.

Each of six kinds is tried twice: on small vocabularies made here, and on the published ones where
ZOO_FIXTURES has them. Three more, which lie beside a tokenizer.json as a rule, are made here alone.
"""

import base64
import copy
import io
import json
import os
import random
import shutil
import string
import struct
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sentencepiece
import tiktoken
import torch
from conftest import PATIENCE
from tiny import build
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

import zoo
from zoo.cli.app import main
from zoo.errors import (
    BadTokenizer,
    InputError,
    NotACheckpoint,
    TemplateError,
    TokenIdError,
    UnsafePath,
    UsageError,
    ZooError,
)
from zoo.tokenizers import CharTokenizer, Tokenizer, bytelevel, llama2c, sentencepiece_file

KINDS = ("gpt2", "qwen2", "llama3", "llama2", "t5", "bert-uncased")
MORE = ("xlm-roberta", "qwen", "tekken")

# --- material ------------------------------------------------------------------------------------

POOLS = (
    string.ascii_lowercase,
    "THE quick Brown fox's don't I'LL we've it's 'S",
    "0123456789",
    "éèüñçß ŁódźŉÅ ﬁ ﬀ ﷺ ǅ",
    "αβγδ ЖЩж שלום مرحبا नमस्ते ไทยำ",
    "漢字かなカナ한국어",
    "👩\u200d👧👨🏽\u200d💻🇩🇪☕\ufe0f🏳\ufe0f\u200d🌈😀",
    "e\u0301u\u0308a\u0323\u20dd\u0e33",
    "\x00\x01\x1b\x1c\x7f\x85\u200b\u200d\u2028\ufeff\xad",
    " \t\n\r\v\f\u00a0\u2003\u3000",
    string.punctuation,
    "𝔘𝔫𝔦𠀀𐍈𓀀",
    "\u2581Ġ\ufffd##",
)
LOOK_ALIKES = (
    *("<|endoftext|>", "<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<extra_id_0>"),
    *("[CLS]", "[MASK]", "[UNK]", "<|begin_of_text|>", "<|im_start|>", "<|eot_id|>"),
)
EDGES = ("", " ", "  ", "\n", "a", " a", "a ", "\0", "\u0301", "'s", "Hello world", "a" * 300)


def texts(count: int, seed: int = 0) -> Iterator[str]:
    """Edge cases, then random strings of up to a dozen runs, each of one script."""
    yield from EDGES
    draw = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(1, 12)):
            sort = draw.random()
            if sort < 0.08:
                parts.append(draw.choice(LOOK_ALIKES))
            elif sort < 0.14:
                low, high = draw.choice([(0x20, 0xD800), (0xE000, 0x110000)])
                parts.append(chr(draw.randrange(low, high)))
            elif sort < 0.25:
                parts.append(" " * draw.randint(1, 9))
            else:
                parts.append("".join(draw.choices(draw.choice(POOLS), k=draw.randint(1, 8))))
        yield "".join(parts)


OFTEN = "The quick brown fox jumps over it. 2024 1234 12 123 456"
CORPUS = [*texts(400, seed=7), *[OFTEN] * 20]


def write_pairs(folder: Path, names: tuple[str, str], split: Any) -> None:
    """A byte-level BPE trained by `tokenizers`, in the two files of GPT-2."""
    backend = Backend(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"] if names[0] == "encoder.json" else [],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    folder.mkdir()
    for path in map(Path, backend.model.save(str(folder))):
        path.rename(folder / names[path.suffix == ".txt"])


TEKKEN_PATTERN = r"\p{Lu}*[\p{Ll}\p{M}]+|\p{N}|[^\s\p{N}]|\s+(?!\S)|\s+"


def ranks(split: str) -> list[bytes]:
    """All bytes in order, then the merges of a BPE trained by `tokenizers`."""
    backend = Backend(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = pre_tokenizers.Split(Regex(split), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, letters])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    values = {letter: byte for byte, letter in bytelevel.letters().items()}
    ids = sorted((id, text) for text, id in backend.get_vocab().items())
    merged = [bytes(values[letter] for letter in text) for _, text in ids if len(text) > 1]
    return [*(bytes([byte]) for byte in range(256)), *merged]


def write_tekken(path: Path) -> None:
    tokens = ranks(TEKKEN_PATTERN)
    vocab = [
        {"rank": n, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for n, token in enumerate(tokens)
    ]
    named = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
    specials = [{"rank": n, "token_str": t, "is_control": True} for n, t in enumerate(named)]
    config = {
        "pattern": TEKKEN_PATTERN,
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": len(vocab) - 20 + 10,  # so that some special tokens are unlisted
        "default_num_special_tokens": 10,
        "version": "v13",
    }
    path.parent.mkdir()
    path.write_text(json.dumps({"config": config, "vocab": vocab, "special_tokens": specials}))


def write_pieces(path: Path, **options: Any) -> None:
    path.parent.mkdir()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(t for t in CORPUS if "\0" not in t),
        model_writer=model,
        minloglevel=3,
        hard_vocab_limit=False,
        **options,
    )
    path.write_bytes(model.getvalue())


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small directory of each kind."""
    top = tmp_path_factory.mktemp("tokenizers")
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    words = pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    write_pairs(top / "gpt2", ("encoder.json", "vocab.bpe"), words[0])
    write_pairs(top / "qwen2", ("vocab.json", "merges.txt"), words[1])
    (top / "qwen2" / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"th", b"he", b"the", b" the", b"  ", b"12", b"123", " é".encode(), b"\n\n"]
    lines = (base64.b64encode(t) + b" %d\n" % n for n, t in enumerate(tokens))
    (top / "llama3").mkdir()
    (top / "llama3" / "tokenizer.model").write_bytes(b"".join(lines))
    write_pieces(
        top / "llama2" / "tokenizer.model",
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=0.98,
    )
    write_pieces(
        top / "t5" / "spiece.model",
        model_type="unigram",
        vocab_size=400,
        character_coverage=0.98,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "##s", "##x", "e"]
    words += [*string.ascii_lowercase[:20], *(f"##{c}" for c in string.ascii_lowercase), "'", "漢"]
    (top / "bert-uncased").mkdir()
    (top / "bert-uncased" / "vocab.txt").write_text("\n".join(dict.fromkeys(words)) + "\n")
    write_pieces(
        top / "xlm-roberta" / "sentencepiece.bpe.model",
        model_type="unigram",
        vocab_size=400,
        character_coverage=0.98,
    )
    config = '{"tokenizer_class": "XLMRobertaTokenizer"}'
    (top / "xlm-roberta" / "tokenizer_config.json").write_text(config)
    (top / "qwen").mkdir()
    tokens = enumerate(ranks(bytelevel.PATTERNS["qwen2"]))
    lines = (base64.b64encode(token) + b" %d\n" % n for n, token in tokens)
    (top / "qwen" / "qwen.tiktoken").write_bytes(b"".join(lines))
    write_tekken(top / "tekken" / "tekken.json")
    return top


def _folder(request: pytest.FixtureRequest) -> Path:
    """The directory with one tokenizer of each kind."""
    if request.param == "made":
        return Path(request.getfixturevalue("made"))
    return Path(request.getfixturevalue("fixtures")) / "tokenizers"


# the reference takes seconds to read published files
kinds = pytest.fixture(_folder, params=("made", pytest.param("published", marks=pytest.mark.slow)))
everywhere = pytest.fixture(_folder, params=("made", "published"), name="everywhere")


class Oracle(NamedTuple):
    """The reference, with special tokens in a text read as text, and read as special."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    backend: Any


@cache
def oracle(folder: Path, kind: str) -> Oracle:
    import transformers as ref

    if kind in ("llama2", "t5"):
        model = sentencepiece.SentencePieceProcessor(model_file=str(next(folder.glob("*.model"))))
        return Oracle(model.encode, _through_pieces(model, kind).decode, model)
    if kind == "llama3":
        reference = _through_ranks(folder / "tokenizer.model")
    elif kind == "bert-uncased":
        reference = ref.BertTokenizer(vocab=str(folder / "vocab.txt"))
    elif kind == "gpt2":
        vocab, merges = str(folder / "encoder.json"), str(folder / "vocab.bpe")
        reference = ref.GPT2Tokenizer(vocab=vocab, merges=merges)
    else:
        vocab, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
        reference = ref.Qwen2Tokenizer(vocab=vocab, merges=merges)

    def encode(text: str) -> list[int]:
        ids = reference(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return list(ids)

    return Oracle(
        encode, lambda ids: reference.decode(ids, clean_up_tokenization_spaces=False), reference
    )


def _through_pieces(model: Any, kind: str) -> Any:
    """The reference's class on the pieces of a model; for the file itself it needs protobuf."""
    import transformers as ref
    from transformers.tokenization_utils_base import generate_merges

    numbers = range(model.get_piece_size())
    scores = {model.id_to_piece(i): model.get_score(i) for i in numbers}
    if kind == "t5":
        return ref.T5Tokenizer(vocab=list(scores.items()), extra_ids=0)
    ids = {text: i for i, text in enumerate(scores)}
    return ref.LlamaTokenizer(vocab=ids, merges=generate_merges(ids, scores))


def _through_ranks(path: Path) -> Any:
    import transformers as ref
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(
        vocab_file=str(path),
        extra_special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
    )
    return ref.PreTrainedTokenizerFast(tokenizer_object=converter.converted())


def plain(tokenizer: Tokenizer, text: str, **options: Any) -> list[int]:
    return tokenizer.encode(text, bos=False, eos=False, **options)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join(map(stream.put, ids)) + stream.end()


# --- the same as the reference -------------------------------------------------------------------


def same(folder: Path, kind: str, count: int, seed: int) -> None:
    mine, reference = zoo.tokenizer(folder), oracle(folder, kind)
    for text in texts(count, seed):
        ids = plain(mine, text)
        assert ids == reference.encode(text), repr(text)
        shown = mine.decode(ids)
        assert shown == reference.decode(ids), repr(text)
        assert streamed(mine, ids) == shown, repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_random_texts_match_the_reference(everywhere: Path, kind: str) -> None:
    same(everywhere / kind, kind, 1000, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_random_texts_match_the_reference(kinds: Path, kind: str) -> None:
    same(kinds / kind, kind, 10_000, seed=2)


def test_llama_matches_the_references_class(kinds: Path) -> None:
    """Except where it differs from sentencepiece: transformers 5 drops a space before a space."""
    folder = kinds / "llama2"
    mine, reference = zoo.tokenizer(folder), _through_pieces(oracle(folder, "llama2").backend, "")
    for text in texts(1000, seed=3):
        if not text.startswith((" ", "\u2581")):
            theirs = reference(text, add_special_tokens=False, split_special_tokens=True)
            assert plain(mine, text) == theirs["input_ids"], repr(text)


@pytest.mark.parametrize("kind", ("gpt2", "qwen2", "llama3", "bert-uncased"))
def test_special_tokens_in_a_text_are_read_on_request(kinds: Path, kind: str) -> None:
    mine, reference = zoo.tokenizer(kinds / kind), copy.deepcopy(oracle(kinds / kind, kind).backend)
    if kind != "bert-uncased":  # a special token of only one of the two would be text to the other
        reference.add_special_tokens({"extra_special_tokens": list(mine.special_tokens)})
    special = 0
    for text in texts(1000, seed=4):
        ids = plain(mine, text, special=True)
        assert ids == reference(text, add_special_tokens=False)["input_ids"], repr(text)
        special += any(id in mine.special_tokens.values() for id in ids)
    assert special > 10


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_decode_and_stream_alike(kinds: Path, kind: str) -> None:
    """Also ids that no text has: a model may stop within a character."""
    mine, reference = zoo.tokenizer(kinds / kind), oracle(kinds / kind, kind)
    draw = random.Random(5)
    size = mine.vocab_size if kind not in ("qwen2", "llama3") else mine.eos
    for _ in range(300):
        ids = [draw.randrange(size) for _ in range(draw.randint(1, 20))]
        shown = mine.decode(ids)
        assert streamed(mine, ids) == shown
        if kind != "llama2":
            assert shown == reference.decode(ids)
        elif not set(ids) & set(mine.special_tokens.values()):
            # half a character: one U+FFFD for each byte, and the characters before it stay
            assert shown == reference.backend.decode(ids)


@pytest.mark.parametrize(
    ("kind", "name"), [("gpt2", "gpt-2"), ("llama2", "llama-spm"), ("bert-uncased", "bert-bge")]
)
def test_llama_cpps_vectors(fixtures: Path, kind: str, name: str) -> None:
    vectors = fixtures / "tokenizer_vectors"
    texts = (vectors / f"{name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    wanted = (vectors / f"{name}.out").read_text().split("\n")
    mine = zoo.tokenizer(fixtures / "tokenizers" / kind)
    assert len(texts) == len(wanted) == 47
    for text, ids in zip(texts, wanted, strict=True):
        assert plain(mine, text) == [int(id) for id in ids.split()], repr(text)


@pytest.mark.slow
def test_published_examples(fixtures: Path) -> None:
    llama2 = zoo.tokenizer(fixtures / "tokenizers/llama2")
    wanted = [1, 306, 4658, 278, 6593, 310, 2834, 338]
    assert llama2.encode("I believe the meaning of life is") == wanted
    llama3 = zoo.tokenizer(fixtures / "tokenizers/llama3")
    assert plain(llama3, "This is a test sentence.") == [2028, 374, 264, 1296, 11914, 13]
    sizes = {kind: zoo.tokenizer(fixtures / "tokenizers" / kind).vocab_size for kind in KINDS}
    assert sizes == {
        "gpt2": 50257,
        "qwen2": 151646,
        "llama3": 128256,
        "llama2": 32000,
        "t5": 32000,
        "bert-uncased": 30522,
    }


# --- three that lie beside a tokenizer.json as a rule ---------------------------------------------

XLM_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def fairseq(folder: Path) -> Any:
    """The reference's class for such a file, which it needs protobuf to read."""
    import transformers as ref

    path = folder / "sentencepiece.bpe.model"
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    numbers = range(3, model.get_piece_size())
    pieces = [(model.id_to_piece(n), model.get_score(n)) for n in numbers]
    first = [(text, 0.0) for text in XLM_SPECIALS[:4]]
    table = sentencepiece_file.read_model(path).characters or None
    vocab = [*first, *pieces, ("<mask>", 0.0)]
    return ref.XLMRobertaTokenizer(vocab=vocab, _spm_precompiled_charsmap=table)


def same_as_fairseq(folder: Path, count: int, seed: int) -> None:
    """Compare with special tokens read as special; without any in the text, also read as text.

    The reference's model reads their characters as special either way: they are among its pieces.
    """
    mine, reference = zoo.tokenizer(folder), fairseq(folder)
    apart = 0
    for text in texts(count, seed):
        theirs = reference(text)["input_ids"]
        assert mine.encode(text, special=True) == theirs, repr(text)
        ids = plain(mine, text)
        if any(special in text for special in XLM_SPECIALS):
            apart += 1
            assert not {0, 1, 2, mine.vocab_size - 1} & set(ids), repr(text)
        else:
            options = {"add_special_tokens": False, "split_special_tokens": True}
            assert ids == reference(text, **options)["input_ids"], repr(text)
        shown = mine.decode(theirs)
        assert shown == reference.decode(theirs, clean_up_tokenization_spaces=False), repr(text)
        assert streamed(mine, theirs) == shown, repr(text)
    assert 0 < apart < count / 5


def test_xlm_roberta_matches_the_reference(made: Path) -> None:
    same_as_fairseq(made / "xlm-roberta", 1000, seed=11)


@pytest.mark.slow
def test_xlm_roberta_matches_on_ten_thousand_texts(made: Path) -> None:
    same_as_fairseq(made / "xlm-roberta", 10_000, seed=12)


def test_xlm_roberta_without_a_character_map(tmp_path: Path) -> None:
    write_pieces(
        tmp_path / "x" / "sentencepiece.bpe.model",
        model_type="unigram",
        vocab_size=400,
        character_coverage=0.98,
        normalization_rule_name="identity",
        user_defined_symbols=["foxes"],
        control_symbols=["<ctl>"],
    )
    assert (
        sentencepiece_file.read_model(tmp_path / "x" / "sentencepiece.bpe.model").characters == b""
    )
    same_as_fairseq(tmp_path / "x", 500, seed=13)
    mine = zoo.tokenizer(tmp_path / "x")
    assert mine.id("<ctl>") in mine.special_tokens.values()
    assert mine.id("<ctl>") == 4
    assert plain(mine, "thefoxesfox") == [
        *plain(mine, "the"),
        mine.id("foxes"),
        *plain(mine, "fox"),
    ]
    assert 4 in plain(mine, "a<ctl>b", special=True) and 4 not in plain(mine, "a<ctl>b")


def test_fairseq_ids_are_sentencepiece_ids_except_the_first(made: Path) -> None:
    """If no character is composed and all scores differ."""
    path = made / "xlm-roberta" / "sentencepiece.bpe.model"
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    mine = zoo.tokenizer(path.parent)
    for text in ("the quick brown fox", "jumps over it 2024", "", "  a  b "):
        assert plain(mine, text) == [{0: 3}.get(id, id + 1) for id in model.encode(text)]
    assert mine.vocab_size == model.get_piece_size() + 2
    assert [mine.bos, mine.pad, mine.eos, mine.unk] == [0, 1, 2, 3]
    assert (mine.cls, mine.sep, mine.mask) == (0, 2, mine.vocab_size - 1)
    assert mine.encode("fox") == [0, *plain(mine, "fox"), 2]
    assert plain(mine, "\ufffc") == [mine.id("\u2581"), 3]


def test_the_config_names_fairseqs_special_tokens(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "xlm-roberta", tmp_path, dirs_exist_ok=True)
    size = zoo.tokenizer(tmp_path).vocab_size
    config = {
        "tokenizer_class": "XLMRobertaTokenizerFast",
        "pad_token": "[PAD]",
        "mask_token": {"content": "[MASK]", "lstrip": True},
        "added_tokens_decoder": {str(size): {"content": "[NEW]", "special": True}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    mine = zoo.tokenizer(tmp_path)
    assert (mine.pad, mine.mask, mine.id("[NEW]")) == (1, size - 1, size)
    ids = plain(mine, "the  [MASK] fox[NEW]", special=True)
    assert ids == [*plain(mine, "the"), size - 1, *plain(mine, " fox"), size]
    assert not {size - 1, size} & set(plain(mine, "the  [MASK] fox[NEW]"))


@pytest.mark.parametrize(
    ("config", "model", "fine"),
    [
        ({}, {}, True),
        ({}, {"model_type": "xlm-roberta"}, True),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, {"model_type": "xlm-roberta"}, True),
        ({"tokenizer_class": "XLMRobertaTokenizer"}, {"model_type": "bert"}, True),
        ({"tokenizer_class": "CamembertTokenizer"}, {"model_type": "xlm-roberta"}, False),
        ({"tokenizer_class": "NllbTokenizer"}, {}, False),
        ({}, {"model_type": "mbart"}, False),
    ],
)
def test_unigrams_of_other_families_are_refused(
    made: Path, tmp_path: Path, config: Any, model: Any, fine: bool
) -> None:
    shutil.copytree(made / "xlm-roberta", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps(model))
    if fine:
        assert zoo.tokenizer(tmp_path).bos == 0
        return
    with pytest.raises(BadTokenizer, match="only XLM-RoBERTa's ids are known"):
        zoo.tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "bpe"}, "expected unigrams"),
        ({"model_type": "unigram", "byte_fallback": True}, "byte fallback"),
        (
            {"model_type": "unigram", "pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3},
            "twice: </s>",
        ),
        ({"model_type": "unigram", "bos_id": -1}, "its first"),
    ],
)
def test_models_that_do_not_fit_fairseq_ids_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "x" / "sentencepiece.bpe.model"
    write_pieces(path, vocab_size=700, character_coverage=0.98, **options)
    with pytest.raises(BadTokenizer, match=message) as caught:
        zoo.tokenizer(path.parent)
    assert str(path) in str(caught.value)


class Ranked(NamedTuple):
    """tiktoken itself on the tables of this file, and the id of each rank."""

    encoding: tiktoken.Encoding
    ids: list[int]
    composes: bool

    def encode(self, text: str, **options: Any) -> list[int]:
        text = unicodedata.normalize("NFC", text) if self.composes else text
        ids = self.encoding.encode(text, disallowed_special=(), **options)
        return [self.ids[rank] for rank in ids]

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode([self.ids.index(id) for id in ids])


def through_tiktoken(kind: str) -> Ranked:
    if kind == "qwen":
        pattern = bytelevel.PATTERNS["qwen2"]
        tokens, names = ranks(pattern), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        names += [f"<|extra_{n}|>" for n in range(205)]
        ids = list(range(len(tokens) + len(names)))
    else:
        pattern, tokens = TEKKEN_PATTERN, ranks(TEKKEN_PATTERN)[:-20]
        names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
        names += [f"<SPECIAL_{n}>" for n in range(6, 10)]
        ids = [*range(10, 10 + len(tokens)), *range(10)]
    special = {name: len(tokens) + n for n, name in enumerate(names)}
    table = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        kind, pat_str=pattern, mergeable_ranks=table, special_tokens=special
    )
    return Ranked(encoding, ids, composes=kind == "qwen")


def same_as_tiktoken(folder: Path, count: int, seed: int) -> None:
    mine, reference = zoo.tokenizer(folder), through_tiktoken(folder.name)
    special = list(mine.special_tokens)
    draw, specials = random.Random(seed), 0
    for text in texts(count, seed):
        text += draw.choice(["", "", draw.choice(special), draw.choice(special) + "\u0338 a"])
        ids = plain(mine, text)
        assert ids == reference.encode(text), repr(text)
        shown = mine.decode(ids)
        assert shown == reference.decode(ids), repr(text)
        assert streamed(mine, ids) == shown, repr(text)
        ids = plain(mine, text, special=True)
        assert ids == reference.encode(text, allowed_special="all"), repr(text)
        assert mine.decode(ids) == reference.decode(ids)
        specials += any(id in mine.special_tokens.values() for id in ids)
    assert specials > count / 4


@pytest.mark.parametrize("kind", ("qwen", "tekken"))
def test_ranks_match_tiktoken(made: Path, kind: str) -> None:
    same_as_tiktoken(made / kind, 1000, seed=14)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("qwen", "tekken"))
def test_ranks_match_tiktoken_on_ten_thousand_texts(made: Path, kind: str) -> None:
    same_as_tiktoken(made / kind, 10_000, seed=15)


def test_qwen_tiktoken_file(made: Path, tmp_path: Path) -> None:
    mine = zoo.tokenizer(made / "qwen")
    count = mine.vocab_size - 208
    assert mine.token(count) == "<|endoftext|>" and mine.token(count + 207) == "<|extra_204|>"
    assert (mine.bos, mine.eos, mine.pad) == (None, count, count)
    assert mine.encode("fox") == plain(mine, "fox")
    shutil.copyfile(made / "qwen" / "qwen.tiktoken", tmp_path / "other.tiktoken")
    with pytest.raises(BadTokenizer, match=r"other\.tiktoken.*only Qwen's pattern is known"):
        zoo.tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}')
    assert zoo.tokenizer(tmp_path).eos == count
    shutil.copyfile(made / "qwen" / "qwen.tiktoken", tmp_path / "qwen.tiktoken")
    with pytest.raises(
        BadTokenizer, match=r"one file of ranks, found other\.tiktoken, qwen\.tiktoken"
    ):
        zoo.tokenizer(tmp_path)
    (tmp_path / "other.tiktoken").unlink()
    assert zoo.tokenizer(tmp_path).eos == count
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(BadTokenizer, match="ranks for 'gpt2'"):
        zoo.tokenizer(tmp_path)


def test_tekken_file(made: Path) -> None:
    mine = zoo.tokenizer(made / "tekken")
    assert [mine.unk, mine.bos, mine.eos, mine.pad] == [0, 1, 2, 5]
    assert mine.encode("fox") == [1, *plain(mine, "fox")]
    assert mine.token(9) == "<SPECIAL_9>" and mine.id("a") == 10 + ord("a")
    file = json.loads((made / "tekken" / "tekken.json").read_text())
    assert mine.vocab_size == file["config"]["default_vocab_size"] < len(file["vocab"])


def test_early_tekken_file_without_special_tokens(made: Path, tmp_path: Path) -> None:
    file = json.loads((made / "tekken" / "tekken.json").read_text())
    del file["special_tokens"]
    file["config"] |= {"version": "v3", "default_num_special_tokens": 30}
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(file))
    mine = zoo.tokenizer(tmp_path)
    names = ["[TOOL_CALLS]", "[IMG]", "<pad>", "[TOOL_CONTENT]", "<SPECIAL_20>"]
    assert [mine.id(name) for name in names] == [9, 10, 11, 19, 20]
    assert (mine.pad, mine.id("a")) == (11, 30 + ord("a"))
    path.write_text(json.dumps(file | {"config": file["config"] | {"version": "v11"}}))
    with pytest.raises(BadTokenizer, match="special_tokens: expected a list, found nothing"):
        zoo.tokenizer(tmp_path)


def test_many_special_tokens_are_found_quickly(made: Path, tmp_path: Path) -> None:
    """A published tekken.json has a thousand: 24 kB of text once took seven seconds."""
    file = json.loads((made / "tekken" / "tekken.json").read_text())
    more = {"default_num_special_tokens": 1000, "default_vocab_size": 1500}
    (tmp_path / "tekken.json").write_text(json.dumps(file | {"config": file["config"] | more}))
    mine = zoo.tokenizer(tmp_path)
    started = time.process_time()
    assert plain(mine, "hello world " * 2000 + "[INST]", special=True)[-1] == 3
    assert time.process_time() - started < 10


# --- tokenizer.json ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_json(kinds: Path, kind: str, tmp_path: Path) -> None:
    """As the reference saves it, with every decoder that these kinds need."""
    reference = oracle(kinds / kind, kind).backend
    if kind in ("llama2", "t5"):
        reference = _through_pieces(reference, kind)
    reference.save_pretrained(tmp_path)
    mine = zoo.tokenizer(tmp_path)
    assert mine.vocab_size == len(reference)
    for text in texts(200, seed=6):
        ids = reference(text, split_special_tokens=True)["input_ids"]
        assert mine.encode(text) == ids, repr(text)
        assert mine.encode(text, special=True) == reference(text)["input_ids"], repr(text)
        shown = mine.decode(ids)
        assert shown == reference.decode(ids, clean_up_tokenization_spaces=False)
        assert streamed(mine, ids) == shown
    draw = random.Random(8)
    for _ in range(200):
        ids = [draw.randrange(len(reference)) for _ in range(20)]
        assert streamed(mine, ids) == mine.decode(ids) == reference.decode(ids)
        left = mine.decode(ids, skip_special=True)
        assert left == reference.decode(ids, skip_special_tokens=True)


def test_tokenizer_json_comes_first(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "gpt2", tmp_path, dirs_exist_ok=True)
    _through_pieces(oracle(made / "t5", "t5").backend, "t5").save_pretrained(tmp_path)
    assert zoo.tokenizer(tmp_path).token(1) == "</s>"


# --- what stands around a text -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("gpt2", [], []),
        ("qwen2", [], []),
        ("llama3", ["<|begin_of_text|>"], []),
        ("llama2", ["<s>"], []),
        ("t5", [], ["</s>"]),
        ("bert-uncased", ["[CLS]"], ["[SEP]"]),
    ],
)
def test_special_tokens_around_a_text_by_family(
    made: Path, kind: str, before: list[str], after: list[str]
) -> None:
    mine = zoo.tokenizer(made / kind)
    body = plain(mine, "the fox")
    ends = [list(map(mine.id, tokens)) for tokens in (before, after)]
    assert mine.encode("the fox") == [*ends[0], *body, *ends[1]]
    assert mine.encode("the fox", eos=True)[-1:] == (ends[1] or [mine.eos])
    assert mine.decode(mine.encode("the fox"), skip_special=True) == "the fox"
    if kind == "t5":
        with pytest.raises(UsageError, match="no such token"):
            mine.encode("", bos=True)


def test_the_config_sets_special_tokens_around_a_text(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "llama2", tmp_path, dirs_exist_ok=True)
    config = {"add_bos_token": False, "add_eos_token": True, "padding_side": "left"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    mine = zoo.tokenizer(tmp_path)
    assert mine.encode("the") == [*plain(mine, "the"), mine.eos]
    assert mine.padding_side == "left"


def write_json(place: Path, kind: str, flags: dict[str, bool], **parts: Any) -> None:
    """Numbers, <s>, </s> and bytes, with `kind` as tokenizer_class."""
    place.mkdir()
    numbers = {str(n): n for n in range(20)}
    bytes_ = {f"<0x{n:02X}>": 40 + n for n in range(256)}
    backend = Backend(models.BPE({**numbers, **bytes_, "<s>": 30, "</s>": 31}, []))
    backend.add_special_tokens(["<s>", "</s>"])
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.save(str(place / "tokenizer.json"))
    config = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>", **flags}
    (place / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer"])
def test_tokenizer_json_sets_special_tokens_around_a_text(kind: str, tmp_path: Path) -> None:
    """Like the reference: other files do not count, and without a post-processor there are none."""
    import transformers as ref

    specials = [("<s>", 30), ("</s>", 31)]
    both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    for n, around in enumerate((None, both)):
        for flag in (None, True, False):
            flags = {} if flag is None else {"add_bos_token": flag, "add_eos_token": flag}
            place = tmp_path / f"{n}-{flag}"
            write_json(place, kind, flags, post_processor=around)
            wanted = ref.AutoTokenizer.from_pretrained(place).encode("1")
            assert {30, 31} & set(wanted) == ({30, 31} if n else set())
            assert zoo.tokenizer(place).encode("1") == ([30, 1, 31] if n else [1])


def test_post_processor_of_a_vocabulary_without_letters(tmp_path: Path) -> None:
    """Such a vocabulary drops unknown letters, so the probe text must be one of its tokens."""
    around = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 30), ("</s>", 31)]
    )
    write_json(tmp_path / "x", "PreTrainedTokenizerFast", {}, post_processor=around)
    assert zoo.tokenizer(tmp_path / "x").encode("1a") == [30, 1, 31]


def test_ids_without_a_token_are_refused(tmp_path: Path) -> None:
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    write_json(tmp_path / "x", "PreTrainedTokenizerFast", {}, decoder=decoder)
    mine = zoo.tokenizer(tmp_path / "x")
    ids = [1, 35, 40 + 0xC3, 35, 40 + 0xA9, 35]
    assert mine.decode(ids) == streamed(mine, ids) == "1é"
    with pytest.raises(TokenIdError, match="35 has no token"):
        mine.token(35)


def test_t5_has_sentinel_tokens(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "t5", tmp_path, dirs_exist_ok=True)
    size = zoo.tokenizer(tmp_path).vocab_size
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    mine = zoo.tokenizer(tmp_path)
    assert mine.vocab_size == size + 100
    assert mine.id("<extra_id_0>") == size + 99
    ids = plain(mine, "the <extra_id_0> fox", special=True)
    assert ids == [*plain(mine, "the"), size + 99, *plain(mine, "fox")]
    assert size + 99 not in plain(mine, "the <extra_id_0> fox")


def test_added_tokens(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "llama2", tmp_path, dirs_exist_ok=True)
    size = zoo.tokenizer(tmp_path).vocab_size
    listed = {
        str(size): {"content": "<mark>", "special": True, "lstrip": True},
        str(size + 1): {"content": "foxes", "special": False},
        str(size + 3): {"content": "fox", "special": False},
    }
    config = {"added_tokens_decoder": listed, "pad_token": {"content": "<mark>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text('{"mask_token": "<mask>"}')
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<mask>": size + 2}))
    mine = zoo.tokenizer(tmp_path)
    assert (mine.pad, mine.mask, mine.vocab_size) == (size, size + 2, size + 4)
    assert list(mine.special_tokens.values()) == [0, 1, 2, size, size + 2]
    # tokens that are not special are matched in any text; lstrip includes the space before
    assert plain(mine, "foxesfox") == [size + 1, size + 3]
    assert plain(mine, "the  <mark>foxes", special=True) == [*plain(mine, "the"), size, size + 1]
    assert mine.decode([size, size + 1]) == "<mark>foxes"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"added_tokens_decoder": {"5": {"content": "x9"}}}, "'x9' has id 5, and so has"),
        ({"added_tokens_decoder": {"99999999": {"content": "x9"}}}, "far beyond"),
        ({"added_tokens_decoder": {"-1": {"content": "x9"}}}, "an id and its token"),
        ({"added_tokens_decoder": []}, None),
        ({"added_tokens_decoder": [1]}, "tokens by id"),
        ({"bos_token": 5}, "bos_token: expected a token's text"),
        ({"bos_token": ""}, "bos_token: expected a token's text"),
        ({"add_bos_token": "yes"}, "add_bos_token: expected true or false"),
        ({"additional_special_tokens": "x"}, "expected a list of tokens"),
        ({"padding_side": "up"}, "padding_side: expected left or right"),
        ({"chat_template": 5}, "chat_template"),
        ({"chat_template": [{"name": "x"}]}, "chat_template"),
    ],
)
def test_wrong_settings_are_refused(
    made: Path, tmp_path: Path, config: dict[str, Any], message: str | None
) -> None:
    shutil.copytree(made / "llama2", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if message is None:
        zoo.tokenizer(tmp_path)
        return
    with pytest.raises(BadTokenizer) as caught:
        zoo.tokenizer(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


# --- the rest of the surface ---------------------------------------------------------------------


def test_batches_are_padded(made: Path) -> None:
    mine = zoo.tokenizer(made / "gpt2")
    long, short = plain(mine, "the quick fox"), plain(mine, "a")
    blank = [mine.eos] * (len(long) - 1)
    right = mine.batch(["the quick fox", "a"])
    assert right.input_ids.tolist() == [long, [*short, *blank]]
    assert right.attention_mask.tolist() == [[1] * len(long), [1, *[0] * len(blank)]]
    left = mine.batch(["the quick fox", "a"], padding_side="left", pad=3)
    assert left.input_ids.tolist() == [long, [*[3] * len(blank), *short]]
    assert left.attention_mask.tolist()[1] == [*[0] * len(blank), 1]
    assert mine.batch([]).input_ids.shape == (0, 0)
    assert mine.batch(["", ""]).input_ids.shape == (2, 0)
    assert zoo.tokenizer(made / "bert-uncased").batch(["the", ""]).input_ids.tolist()[1][-1] == 0
    with pytest.raises(UsageError, match="padding_side"):
        mine.batch(["a"], padding_side="middle")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="several texts"):
        mine.batch("a")
    with pytest.raises(TokenIdError):
        mine.batch(["a"], pad=10**6)


def test_a_batch_without_a_pad_token_is_refused() -> None:
    mine = CharTokenizer.of("abc")
    with pytest.raises(UsageError, match="no pad token: pass pad="):
        mine.batch(["a", "ab"])
    assert mine.batch(["ab", "ab"]).input_ids.tolist() == [[0, 1], [0, 1]]
    assert mine.batch(["a", "ab"], pad=2).input_ids.tolist() == [[0, 2], [0, 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_ids_map_both_ways(kinds: Path, kind: str) -> None:
    mine = zoo.tokenizer(kinds / kind)
    for id in range(0, mine.vocab_size, 1 + mine.vocab_size // 997):
        assert mine.id(mine.token(id)) == id
    for wrong in (-1, mine.vocab_size, True, "a", 1.0):
        with pytest.raises(TokenIdError):
            mine.token(wrong)  # type: ignore[arg-type]
        with pytest.raises(TokenIdError):
            mine.decode([wrong])  # type: ignore[list-item]
        with pytest.raises(TokenIdError):
            mine.stream().put(wrong)  # type: ignore[arg-type]
    with pytest.raises(TokenIdError):
        mine.id("no such token")
    assert mine.decode(torch.tensor(mine.encode("a"))) == mine.decode(mine.encode("a"))


@pytest.mark.parametrize("kind", KINDS + MORE)
def test_input_that_is_no_text_is_refused(made: Path, kind: str) -> None:
    mine = zoo.tokenizer(made / kind)
    with pytest.raises(InputError, match="half a surrogate pair at character 1"):
        mine.encode("a\ud800")
    with pytest.raises(InputError, match="expected a text"):
        mine.encode(b"a")  # type: ignore[arg-type]


def test_decode_takes_one_row_of_ids(made: Path) -> None:
    mine = zoo.tokenizer(made / "llama2")
    ids = plain(mine, "the fox")
    one = mine.decode(ids[:1])
    assert mine.decode(ids[0]) == mine.decode(torch.tensor(ids[0])) == one
    assert mine.decode(torch.tensor(ids)) == mine.decode(iter(ids)) == "the fox"
    for wrong in (None, torch.tensor([ids]), 1.5):
        with pytest.raises(InputError, match="one row of ids"):
            mine.decode(wrong)  # type: ignore[arg-type]


def test_a_stream_waits_for_whole_characters(made: Path) -> None:
    mine = zoo.tokenizer(made / "llama2")
    stream, parts = mine.stream(skip_special=True), mine.encode("a \U0010fffd")
    shown = [stream.put(id) for id in parts]
    assert shown[0] == "" and shown[-4:-1] == ["", "", ""] and shown[-1] == "\U0010fffd"
    half = mine.stream()
    assert [half.put(id) for id in parts[-4:-1]] == ["", "", ""]
    assert half.end() == "\ufffd" * 3


@pytest.mark.parametrize("kind", KINDS)
def test_long_runs_of_one_character(kinds: Path, kind: str) -> None:
    """A hundred thousand of one character: no hang, no crash, and decoding returns them."""
    mine = zoo.tokenizer(kinds / kind)
    for piece in ("a", " ", "\n", "é", "!", "1", "'s", "a "):
        text = piece * 100_000
        started = time.process_time()
        ids = plain(mine, text)
        assert time.process_time() - started < 5  # measured: 0.3 s at most
        if kind not in ("t5", "bert-uncased", "llama2"):
            assert mine.decode(ids) == text


def test_whitespace_beyond_tiktokens_stack(made: Path) -> None:
    mine = zoo.tokenizer(made / "gpt2")
    for text in (" " * 10**6 + "a", "\n" * 10**6, " \n" * 10**6):
        assert mine.decode(plain(mine, text)) == text


def test_copies_share_the_tokenizer(made: Path) -> None:
    mine = zoo.tokenizer(made / "gpt2")
    assert copy.deepcopy(mine) is mine
    assert "gpt2" in repr(mine)


# --- characters ----------------------------------------------------------------------------------


def test_character_tokenizer(tmp_path: Path) -> None:
    mine = CharTokenizer.of("hello wörld 😀")
    mine.save(tmp_path)
    again = zoo.tokenizer(tmp_path)
    assert isinstance(again, CharTokenizer)
    ids = again.encode("hell😀")
    assert ids == mine.encode("hell😀") and len(ids) == 5
    assert again.decode(ids) == streamed(again, ids) == "hell😀"
    assert again.vocab_size == len(set("hello wörld 😀"))
    with pytest.raises(InputError, match="lacks: 'x', 'y'"):
        again.encode("xyx")
    (tmp_path / "characters.json").write_text('{"characters": "aa"}')
    with pytest.raises(BadTokenizer, match="once"):
        zoo.tokenizer(tmp_path)


# --- where it comes from -------------------------------------------------------------------------


def test_a_model_has_its_tokenizer(made: Path, tmp_path: Path) -> None:
    """It is read from the checkpoint when first used, and saved with the model."""
    published = zoo.save(build("gpt2").eval(), tmp_path / "published")
    for path in (made / "gpt2").iterdir():
        shutil.copyfile(path, published / path.name)
    (published / "chat_template.jinja").write_text("{{ messages[0].content }}")
    native = zoo.convert(published, tmp_path / "native")
    for place in (published, native, zoo.convert(native, tmp_path / "back", to="hf")):
        model = zoo.load(place)
        assert "tokenizer" not in vars(model)
        assert model.tokenizer.decode(model.tokenizer.encode("the fox")) == "the fox"
        assert model.tokenizer.chat([{"content": "hi"}]) == "hi"
        assert model.tokenizer is model.tokenizer
    with pytest.raises(UsageError, match="no checkpoint"):
        _ = build("gpt2").tokenizer


def test_libraries_are_imported_when_used(made: Path) -> None:
    code = """
import sys, zoo
zoo.tokenizer
libraries = {"tiktoken", "sentencepiece", "tokenizers", "jinja2", "transformers"}
print(sorted(libraries & set(sys.modules)))
zoo.tokenizer(sys.argv[1]).encode("a")
print(sorted(libraries & set(sys.modules)))
"""
    for kind, used in (("gpt2", "['tiktoken']"), ("t5", "['sentencepiece']")):
        run = [sys.executable, "-c", code, str(made / kind)]
        shown = subprocess.run(run, capture_output=True, text=True, timeout=PATIENCE)
        assert shown.stdout.splitlines() == ["[]", used], shown.stderr


def test_tokenize_command(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", str(made / "gpt2"), "fox<|endoftext|>", "--special", "--json"]) == 0
    mine = zoo.tokenizer(made / "gpt2")
    output = json.loads(capsys.readouterr().out)
    assert output["ids"] == [*plain(mine, "fox"), mine.eos]
    assert output["tokens"][-1] == "<|endoftext|>"
    assert main(["tokenize", str(made / "bert-uncased"), "fox"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["2", "[CLS]"], ["6", "fox"], ["3", "[SEP]"]]


def test_directories_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(NotACheckpoint, match=r"no tokenizer.*It holds notes\.txt"):
        zoo.tokenizer(tmp_path)
    with pytest.raises(NotACheckpoint, match="no such directory"):
        zoo.tokenizer(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no revisions"):
        zoo.tokenizer(tmp_path, revision="main")


def test_files_outside_the_directory_are_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").symlink_to(made / "llama2" / "tokenizer.model")
    with pytest.raises(UnsafePath):
        zoo.tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("words", "kind"), [(["12", ".com"], "gpt2"), ([".com", "the"], "qwen2"), (["the"], "gpt2")]
)
def test_the_pattern_is_guessed_from_the_vocabulary(words: list[str], kind: str) -> None:
    assert bytelevel.guess(words) == kind


def test_the_pattern_of_published_vocabularies_is_guessed(fixtures: Path) -> None:
    for kind, name in (("gpt2", "encoder.json"), ("qwen2", "vocab.json")):
        ids = bytelevel.read_ids(fixtures / "tokenizers" / kind / name)
        assert bytelevel.guess(ids) == kind


# --- damage --------------------------------------------------------------------------------------

FILES = {
    "gpt2": ("encoder.json", "vocab.bpe"),
    "qwen2": ("vocab.json", "merges.txt", "tokenizer_config.json"),
    "llama3": ("tokenizer.model",),
    "llama2": ("tokenizer.model",),
    "t5": ("spiece.model",),
    "bert-uncased": ("vocab.txt",),
    "xlm-roberta": ("sentencepiece.bpe.model", "tokenizer_config.json"),
    "qwen": ("qwen.tiktoken",),
    "tekken": ("tekken.json",),
}
PLACES = [(kind, name) for kind, names in FILES.items() for name in names]


def damaged(data: bytes) -> Iterator[bytes]:
    """Cut short, flipped, doubled, emptied."""
    draw = random.Random(0)
    yield b""
    yield b"\xff\xfe" + data
    yield data + b"\xff"
    for _ in range(8):
        yield data[: draw.randrange(len(data))]
        at = draw.randrange(len(data))
        yield data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    yield data + data


@pytest.mark.parametrize(("kind", "name"), PLACES)
def test_damaged_files_raise_only_our_errors(
    made: Path, tmp_path: Path, kind: str, name: str
) -> None:
    shutil.copytree(made / kind, tmp_path, dirs_exist_ok=True)
    path, refused = tmp_path / name, 0
    for data in damaged((made / kind / name).read_bytes()):
        path.write_bytes(data)
        try:
            zoo.tokenizer(tmp_path).encode("the fox é")
        except ZooError as error:
            refused += str(tmp_path) in str(error)
    assert refused >= 3


def test_damaged_tokenizer_json_raises_only_our_errors(made: Path, tmp_path: Path) -> None:
    oracle(made / "bert-uncased", "bert-uncased").backend.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = path.read_bytes()
    for broken in damaged(data):
        path.write_bytes(broken)
        try:
            zoo.tokenizer(tmp_path).encode("the fox é")
        except ZooError as error:
            assert str(tmp_path) in str(error)
    path.write_bytes(data.replace(b'"[PAD]": 0', b'"[PAD]": 0, "[PAD]": 1'))
    with pytest.raises(BadTokenizer, match=r"tokenizer\.json: duplicate keys"):
        zoo.tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("kind", "name", "edit", "message"),
    [
        ("gpt2", "vocab.bpe", lambda d: d + b"zz qq\n", "1 merges of or into tokens"),
        ("gpt2", "vocab.bpe", lambda d: d + b"zz\n", "expected two tokens, found 'zz'"),
        ("gpt2", "encoder.json", lambda d: d.replace(b'"!":', b'"?!":', 1), "are no token: !"),
        ("gpt2", "encoder.json", lambda d: d.replace(b'"!":1,', b'"!":2,'), "share an id"),
        ("gpt2", "encoder.json", lambda d: d.replace(b'"!":1,', b'"!":-1,'), "found '!': -1"),
        ("gpt2", "encoder.json", lambda d: d.replace(b'"!":1,', b'"!":9999999,'), "id 9999999"),
        ("gpt2", "encoder.json", lambda d: b"[]", "an object is expected"),
        ("llama3", "tokenizer.model", lambda d: d + b"!!!! 265\n", "line 266: expected base64"),
        ("llama3", "tokenizer.model", lambda d: d + b"YWJj 300\n", "rank 300 is out of order"),
        ("llama3", "tokenizer.model", lambda d: d + b"dGg= 265\n", "1 tokens occur twice"),
        ("llama3", "tokenizer.model", lambda d: d[:808], "truncated"),
        ("llama2", "tokenizer.model", lambda d: d[: len(d) // 2], "no model of sentencepiece"),
        ("bert-uncased", "vocab.txt", lambda d: d[:6], r"no \[UNK\]"),
        ("qwen", "qwen.tiktoken", lambda d: d + b"YWJj 9999\n", "rank 9999 is out of order"),
        ("qwen", "qwen.tiktoken", lambda d: d[: d.index(b" 200\n")], "line 201"),
        ("xlm-roberta", "sentencepiece.bpe.model", lambda d: d[:-1], "it ends within"),
        ("xlm-roberta", "sentencepiece.bpe.model", lambda d: d + b"\x0a\x00", "without text"),
        ("xlm-roberta", "sentencepiece.bpe.model", lambda d: d + b"\x18\x01", "expected bytes"),
        ("xlm-roberta", "sentencepiece.bpe.model", lambda d: d + d, "its first pieces"),
        (
            "xlm-roberta",
            "sentencepiece.bpe.model",
            lambda d: d + llama2c._bytes(2, bytes(1 << 20)) * 5,
            "settings of more than",
        ),
        ("tekken", "tekken.json", lambda d: d.replace(b'"pattern"', b'"x"'), "config.pattern"),
        ("tekken", "tekken.json", lambda d: d.replace(b'"vocab"', b'"x"'), "vocab: expected"),
        ("tekken", "tekken.json", lambda d: d.replace(b'tern": "', b'tern": "('), "without an end"),
        ("tekken", "tekken.json", lambda d: d.replace(b"|[^", b"|x[^"), "config.pattern: of"),
        ("tekken", "tekken.json", lambda d: d.replace(b'"rank": 7,', b'"rank": 8,'), "vocab.7"),
        ("tekken", "tekken.json", lambda d: d.replace(b'"YQ=="', b'"Y!=="'), "token_bytes"),
        ("tekken", "tekken.json", lambda d: d.replace(b'"YQ=="', b"null"), "vocab.97: token_bytes"),
        (
            "tekken",
            "tekken.json",
            lambda d: d.replace(b'"YQ=="', b'"Yg=="'),
            "1 tokens occur twice",
        ),
        ("tekken", "tekken.json", lambda d: d.replace(b'"<pad>"', b'"<s>"'), "special_tokens.5"),
        ("tekken", "tekken.json", lambda d: d.replace(b'"<s>"', b'"<SPECIAL_7>"'), "of its own"),
        ("tekken", "tekken.json", lambda d: d.replace(b'tokens": 10', b'tokens": 5'), "6, and"),
        ("tekken", "tekken.json", lambda d: d.replace(b'tokens": 10', b'tokens": -1'), "a count"),
        ("tekken", "tekken.json", lambda d: d.replace(b'size": ', b'size": 9'), "vocab_size"),
    ],
)
def test_damaged_files_are_refused_by_name(
    made: Path, tmp_path: Path, kind: str, name: str, edit: Callable[[bytes], bytes], message: str
) -> None:
    shutil.copytree(made / kind, tmp_path, dirs_exist_ok=True)
    path = tmp_path / name
    before = path.read_bytes()
    path.write_bytes(edit(before))
    assert path.read_bytes() != before
    with pytest.raises(BadTokenizer, match=message) as caught:
        zoo.tokenizer(tmp_path)
    assert str(path) in str(caught.value)


def table(*units: int, size: int = 1024, texts: bytes = b"a\0") -> bytes:
    """A character map with these first units."""
    return struct.pack("<257I", size, *units, *[0] * (256 - len(units))) + texts


LEAF, BEYOND = 1 << 31, 1 << 20  # a unit where a text begins; one that points far outside
TABLES = {
    "more than there is": table(size=0xFFFFFF00),
    "half a unit": table(size=1022),
    "half a block": table(size=1020),
    "no units": table(size=0),
    "cut": table()[:3],
    "an endless text": table(texts=b"a"),
    "no text": table(texts=b""),
    "a text beyond": table(0, LEAF + 2),
    "a unit beyond": table(BEYOND),
    "a text that is none": table(1 << 8),
}


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("name", ["tokenizer.model", "sentencepiece.bpe.model", "tokenizer.json"])
def test_character_maps_that_point_outside_are_refused(
    tmp_path: Path, name: str, case: str
) -> None:
    """The library would read outside the map, or allocate as much memory as it claims."""

    def read(data: bytes) -> None:
        if name == "tokenizer.json":
            step = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}
            model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
            config = {"normalizer": {"type": "Sequence", "normalizers": [step]}, "model": model}
            text = json.dumps({"version": "1.0", "added_tokens": [], **config}).encode()
        else:
            words = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("a", -1.0, 1)]
            text = llama2c.sentencepiece_model(words, falls_back=False) + b"\x12\x02\x18\x01"
            text += llama2c._bytes(3, llama2c._bytes(2, data))
        (tmp_path / name).write_bytes(text)
        zoo.tokenizer(tmp_path).encode("a")

    if name == "tokenizer.model":  # sentencepiece checks its maps itself
        message = "INTERNAL"
    else:
        read(table())
        message = "a character map"
    with pytest.raises(BadTokenizer, match=f"{name}.*{message}"):
        read(TABLES[case])


def test_files_too_large_are_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "gpt2", tmp_path, dirs_exist_ok=True)
    os.truncate(tmp_path / "vocab.bpe", 1 << 40)
    with pytest.raises(BadTokenizer, match="larger than the"):
        zoo.tokenizer(tmp_path)


# --- chat ----------------------------------------------------------------------------------------

LLAMA2_CHAT = """\
{%- set ns = namespace(intro='') -%}
{%- for m in messages -%}
  {%- if m.role == 'system' -%}
    {%- set ns.intro = '<<SYS>>\\n' ~ m.content ~ '\\n<</SYS>>\\n\\n' -%}
  {%- elif m.role == 'user' -%}
    {{- bos_token + '[INST] ' + (ns.intro ~ m.content) | trim + ' [/INST]' -}}
    {%- set ns.intro = '' -%}
  {%- elif m.role == 'assistant' -%}
    {{- ' ' ~ m['content'].strip() ~ ' ' ~ eos_token -}}
  {%- else -%}
    {{- raise_exception('no role ' + m.role) -}}
  {%- endif -%}
{%- endfor -%}
"""
LLAMA3_CHAT = """\
{{ bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>%s<|end_header_id|>\\n\\n' % m.role }}
{{- m.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = """\
{% for m in messages %}
    {% if loop.first and m.role != 'system' %}
<|im_start|>system
You help.<|im_end|>
    {% endif %}
    {% if m.role == 'skip' %}{% continue %}{% endif %}
<|im_start|>{{ m.role }}
{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
MESSAGES = [
    {"role": "system", "content": "Be brief. <b>'ü'</b>"},
    {"role": "user", "content": " Hello\n"},
    {"role": "assistant", "content": "Hi! "},
    {"role": "user", "content": "{{ 1 }} & <|eot_id|>"},
]
TOOLS = [{"type": "function", "function": {"name": "ü", "parameters": {"<": [1, 2.5, None]}}}]


@pytest.fixture
def talker(made: Path) -> Tokenizer:
    return zoo.tokenizer(made / "llama2")


@pytest.mark.parametrize("template", (LLAMA2_CHAT, LLAMA3_CHAT, CHATML), ids=("2", "3", "ml"))
@pytest.mark.parametrize("messages", (MESSAGES, MESSAGES[1:], MESSAGES[:2]), ids=len)
@pytest.mark.parametrize("prompt", (True, False))
@pytest.mark.parametrize("tools", (None, TOOLS), ids=("", "tools"))
def test_chat_templates_match_the_reference(
    made: Path, tmp_path: Path, template: str, messages: Any, prompt: bool, tools: Any
) -> None:
    reference = _through_pieces(oracle(made / "llama2", "llama2").backend, "llama2")
    reference.chat_template = template
    reference.save_pretrained(tmp_path)
    options = {"add_generation_prompt": prompt, "tools": tools}
    wanted = reference.apply_chat_template(messages, tokenize=False, **options)
    assert zoo.tokenizer(tmp_path).chat(messages, **options) == wanted


def test_documented_formats(talker: Tokenizer) -> None:
    assert talker.chat(MESSAGES[:3], template=LLAMA2_CHAT) == (
        "<s>[INST] <<SYS>>\nBe brief. <b>'ü'</b>\n<</SYS>>\n\n Hello [/INST] Hi! </s>"
    )
    assert talker.chat(MESSAGES[1:2], template=LLAMA3_CHAT) == (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert talker.chat([{"role": "user", "content": "Hi"}], template=CHATML) == (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_named_templates(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "llama2", tmp_path, dirs_exist_ok=True)
    named = [{"name": n, "template": n} for n in ("default", "tool_use", "rag")]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    mine = zoo.tokenizer(tmp_path)
    assert mine.chat([]) == "default"
    assert mine.chat([], template="rag") == "rag"
    assert mine.chat([], tools=TOOLS) == "tool_use"
    with pytest.raises(TemplateError, match="Did you mean rag"):
        mine.chat([], template="rga")
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%Y') }} {{ x }}")
    assert zoo.tokenizer(tmp_path).chat([], x=5) == f"{datetime.now():%Y} 5"


def test_templates_in_a_folder(made: Path, tmp_path: Path) -> None:
    """As the reference saves several templates; saving a model copies them."""
    reference = _through_pieces(oracle(made / "llama2", "llama2").backend, "llama2")
    texts = {"default": "default", "tool_use": "{{ tools|length }} tools", "rag": "documents"}
    reference.chat_template = texts
    zoo.save(build("llama"), tmp_path / "x")
    reference.save_pretrained(tmp_path / "x")
    zoo.save(zoo.load(tmp_path / "x"), tmp_path / "saved")
    zoo.convert(tmp_path / "x", tmp_path / "native", to="native")
    for name in ("x", "saved", "native"):
        mine = zoo.tokenizer(tmp_path / name)
        assert mine.templates == texts
        assert mine.chat(MESSAGES, tools=TOOLS) == "1 tools"
        assert (
            mine.chat(MESSAGES) == "default" and mine.chat(MESSAGES, template="rag") == "documents"
        )
    (tmp_path / "x" / "additional_chat_templates" / "out.jinja").symlink_to("/etc/hostname")
    with pytest.raises(UnsafePath):
        zoo.tokenizer(tmp_path / "x")


@pytest.mark.parametrize(
    "messages", ["hello", MESSAGES[0], None, ["hello"], [("user", "hello")], 5]
)
def test_wrong_messages_are_refused(talker: Tokenizer, messages: Any) -> None:
    with pytest.raises(InputError, match="messages: expected a list of mappings"):
        talker.chat(messages, template=CHATML)
    with pytest.raises(InputError, match="template=5"):
        talker.chat(MESSAGES, template=5)  # type: ignore[arg-type]


def test_a_missing_template_is_refused(talker: Tokenizer) -> None:
    with pytest.raises(TemplateError, match="no chat template 'default'; it has none"):
        talker.chat(MESSAGES)


def test_objects_in_messages_are_refused(talker: Tokenizer) -> None:
    """Only plain values are accepted: an object's methods could do anything."""
    with pytest.raises(TemplateError, match="expected texts, numbers, lists and mappings, found a"):
        talker.chat([{"role": "user", "content": Path()}], template="{{ 1 }}")
    harmful = type("Odd", (str,), {"harm": lambda self: "done"})("text")
    with pytest.raises(TemplateError):
        talker.chat([{"content": harmful}], template="{{ messages[0].content.harm() }}")


def test_long_conversations_fit(talker: Tokenizer) -> None:
    messages = [{"role": "user", "content": "word " * 2000}] * 500
    for template in (LLAMA2_CHAT, LLAMA3_CHAT, CHATML):
        assert len(talker.chat(messages, template=template)) > 4_900_000


# --- whether case counts -------------------------------------------------------------------------

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CASED = {  # words of cased vocabularies in several scripts
    "english": (["Paris", "paris", "the", "##s", "."], "Paris"),
    "multilingual": (["Москва", "москва", "été", "Été", "東", "京", "##ს", "और"], "Été"),
}


@pytest.mark.parametrize("language", CASED)
@pytest.mark.parametrize("setting", [None, True, False])
def test_a_cased_vocabulary_keeps_case(tmp_path: Path, language: str, setting: bool | None) -> None:
    """Without do_lower_case in tokenizer_config.json, as in Google's files, the words decide."""
    words, text = CASED[language]
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIALS, *words]) + "\n", encoding="utf-8")
    if setting is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": setting}))
    tokenizer = zoo.tokenizer(tmp_path)
    small = text.lower() if language == "english" else "ete"  # lowercasing also strips accents
    whole = text if setting is not True else small
    expected = whole if whole in words else "[UNK]"
    assert [
        tokenizer.token(id)
        for id in tokenizer.encode(text)
        if tokenizer.token(id) not in SPECIALS[2:4]
    ] == [expected]


@pytest.mark.parametrize("stray", [0, 2])
def test_an_uncased_vocabulary_lowercases(tmp_path: Path, stray: int) -> None:
    words = [*SPECIALS, "[Q]", "paris", "ete", "東", *(f"w{n}" for n in range(400))]
    words += ["A", "B"][:stray]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer = zoo.tokenizer(tmp_path)
    tokens = [tokenizer.token(id) for id in tokenizer.encode("Paris ÉTÉ")]
    assert [token for token in tokens if token not in SPECIALS] == ["paris", "ete"]


def test_googles_own_directory_lowercases(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "data" / "tf" / "bert"
    for path in source.glob("bert*"):
        shutil.copy(path, tmp_path)
    words = [*SPECIALS, "Paris", "paris"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    assert 5 in zoo.load(tmp_path).tokenizer.encode("Paris")
