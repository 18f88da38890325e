"""`generate`: tokens as the reference's, rows independent of their batch, streamed text."""

import base64
import codecs
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import first_of
from stories import publish
from tiny import build, hot
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import zoo
from zoo import registry
from zoo.errors import ConfigError, InputError, SequenceTooLong, TokenIdError, UsageError
from zoo.parity.fixtures import hot_checkpoint
from zoo.parity.reference import Reference
from zoo.registry import Architecture
from zoo.text.beams import _may_win, _Row
from zoo.text.generate import generate
from zoo.text.generation_config import defaults_of
from zoo.text.options import GenerationOptions
from zoo.text.pieces import TextPieces
from zoo.text.runner import Runner, left_align
from zoo.tokenizers import CharTokenizer

WRITES = ("CausalLM", "LMHeadModel", "ForConditionalGeneration")
WRITERS = {
    name: [v for v, data in entry.variants.items() if data["class"].endswith(WRITES)]
    for name, entry in registry.architectures().items()
}
NEW, ROWS, WIDTH = 12, 3, 10


def cases() -> Iterator[Any]:
    """Every variant that writes; the first of three architectures in the ordinary tests."""
    pairs = [(name, variant) for name, variants in WRITERS.items() for variant in variants]
    yield from first_of(sorted(pairs, key=lambda pair: pair[1] != WRITERS[pair[0]][0]))


every_variant = pytest.mark.parametrize(("name", "variant"), list(cases()))
every_writer = pytest.mark.parametrize(
    "name", [name for name, variants in WRITERS.items() if variants]
)


class Case:
    """A model, the reference with the same weights, and prompts for both."""

    def __init__(self, entry: Architecture, variant: str) -> None:
        with TemporaryDirectory() as scratch:
            place = Path(scratch, "x")
            kind = hot_checkpoint(entry, variant, place)
            self.model = zoo.load(place, dtype="float64")
            self.reference = Reference(place, kind, torch.float64).model
            self.config = self.model.config
        limit = self.config.limit_cached
        self.new = NEW if limit is None else min(NEW, limit - WIDTH)
        random = torch.Generator().manual_seed(5)
        self.ids = torch.randint(3, self.config.vocab, (ROWS, WIDTH), generator=random)
        self.left = torch.ones_like(self.ids)
        self.left[0, :5] = self.left[2, :2] = 0
        free = self.write(max_new_tokens=self.new, eos_token_id=[])[:, -self.new :]
        # tokens that are generated, so that rows end at different times
        self.ends = sorted({int(free[0, self.new // 3]), int(free[2, self.new // 2])})
        self.pad = next(id for id in (1, 2, 3) if id not in self.ends)

    def write(self, **options: Any) -> Any:
        return generate(self.model, self.ids, **options)

    def expected(self, mask: Tensor | None, **options: Any) -> Tensor:
        """The tokens of the reference, which reads a pad id of 0 as none in beam search."""
        self.reference.generation_config.eos_token_id = None
        options["eos_token_id"] = options.pop("eos_token_id") or None
        ask = partial(self.reference.generate, do_sample=False, **options)
        mask = torch.ones_like(self.ids) if mask is None else mask
        config = self.reference.config
        # its cache has as many layers as the encoder, and fails if the decoder has more
        ask = partial(ask, use_cache=not config.is_encoder_decoder)
        if config.is_encoder_decoder or config._attn_implementation != "eager":
            return ask(self.ids, attention_mask=mask)
        # its eager attention overflows to NaN at padding in fp64: run each row alone
        rows = []
        for ids, real in zip(self.ids, mask.bool(), strict=True):
            for row in ask(ids[real][None], attention_mask=torch.ones_like(ids[real])[None]):
                rows.append(torch.cat((ids[~real], row)))
        return pad_sequence(rows, batch_first=True, padding_value=self.pad)


@cache
def case(name: str, variant: str = "") -> Case:
    return Case(registry.architectures()[name], variant or WRITERS[name][0])


PLAIN: list[dict[str, Any]] = [
    {},
    {"num_beams": 3},
    {"num_beams": 4, "length_penalty": 0.3, "early_stopping": True},
    {
        "num_beams": 3,
        "early_stopping": "never",
        "length_penalty": 2.0,
        "num_return_sequences": 2,
    },
    {"num_beams": 2, "length_penalty": -1.0, "early_stopping": "never"},
]
# the reference counts padding among the previous tokens; zoo does not
UNPADDED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 0.7},
]


@every_variant
def test_generate_matches_the_reference(name: str, variant: str) -> None:
    this = case(name, variant)
    for ends in ([], this.ends):
        for mask, all_options in ((None, PLAIN + UNPADDED), (this.left, PLAIN[:3])):
            for options in all_options if ends else all_options[:1]:
                more = {"max_new_tokens": this.new, "pad_token_id": this.pad, **options}
                got = this.write(attention_mask=mask, eos_token_id=ends, **more)
                want = this.expected(mask, eos_token_id=ends, **more)
                assert got.tolist() == want.tolist(), (ends, mask is None, options)


def test_every_architecture_but_encoders_generates() -> None:
    encoders = {name for name, variants in WRITERS.items() if not variants}
    assert encoders == {
        *("bert", "roberta", "xlm-roberta", "distilbert", "deberta", "deberta-v2"),
    }


def padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of 10, 7 and 5 tokens: without padding, padded right, padded on both sides."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    mask[1, 7:] = mask[2, :2] = mask[2, 7:] = 0
    return ids.masked_fill(mask == 0, 0), mask


@every_writer
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"num_beams": 2},
        {"temperature": 1.3, "top_k": 20, "num_return_sequences": 2},
        {"top_p": 0.9, "min_p": 0.01},
    ],
    ids=["greedy", "beams", "samples", "masses"],
)
def test_a_row_does_not_depend_on_its_batch(name: str, options: dict[str, Any]) -> None:
    this = case(name)
    ids, mask = padded(this.ids)
    each = options.get("num_return_sequences", 1)
    options = {"max_new_tokens": 6, "eos_token_id": this.ends, "pad_token_id": this.pad, **options}
    seeds = [7, 8, 9] if "num_beams" not in options else [None] * 3
    for cached in (True,) if GenerationOptions.of(options).sampled else (True, False):
        seed = {} if seeds[0] is None else {"seed": seeds}
        got = generate(this.model, ids, mask, use_cache=cached, **options, **seed)
        for n in range(ROWS):
            one = {} if seeds[0] is None else {"seed": seeds[n]}
            row = ids[n : n + 1, mask[n].bool()]
            alone = generate(this.model, row, **options, **one)
            new = alone[:, 1 if name == "t5" else row.shape[1] :]
            rows = got[n * each : (n + 1) * each, 1 if name == "t5" else WIDTH :]
            assert rows[:, : new.shape[1]].tolist() == new.tolist()
            assert (rows[:, new.shape[1] :] == this.pad).all()


@every_writer
def test_logprobs_are_those_of_the_model_itself(name: str) -> None:
    this = case(name)
    ids, mask = padded(this.ids)
    options = {"max_new_tokens": 5, "eos_token_id": [], "temperature": 0.7, "top_k": 9, "seed": 3}
    got = generate(this.model, ids, mask, return_logprobs=True, **options)
    new = got.sequences[:, -5:]
    with torch.no_grad():
        if name == "t5":
            logits = this.model(ids, mask, decoder_input_ids=got.sequences)
        else:
            whole = torch.cat((mask, torch.ones_like(new)), dim=1)
            rows, real = left_align(got.sequences, whole.bool())
            logits = this.model(rows, real)
    expected = logits[:, -6:-1].log_softmax(dim=-1).gather(2, new[:, :, None]).squeeze(2)
    torch.testing.assert_close(got.logprobs.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.5, 2.0])
@pytest.mark.parametrize("worst", [-500.0, -120.0, -60.0, -1.5, -0.7, -0.1])
def test_beam_search_stops_when_the_reference_does(
    early_stopping: Any, penalty: float, worst: float
) -> None:
    """The bound for running beams: the longest text under "never", else the next token."""
    from transformers import GenerationMixin

    options = GenerationOptions(num_beams=2, early_stopping=early_stopping, length_penalty=penalty)
    row = _Row([[], []], [(0.0, [1]), (worst, [2])])
    may_win = _may_win(row, -10.0, length=5, max_new=20, options=options)
    want = GenerationMixin._check_early_stop_heuristic(
        torch.tensor([True])[:, None],
        torch.tensor([[-10.0, -11.0]]),
        torch.tensor([[0.0, worst]]),
        torch.tensor([[True, True]]),
        5 + 3,
        20 + 3,
        3,
        early_stopping,
        penalty,
    )
    assert may_win is bool(want)


def test_beam_scores_are_divided_by_length() -> None:
    this = case("llama")
    got = this.write(
        max_new_tokens=5, num_beams=3, length_penalty=1.0, eos_token_id=[], return_logprobs=True
    )
    with torch.no_grad():
        logits = this.model(got.sequences)[:, WIDTH - 1 : -1].log_softmax(dim=-1)
    each = logits.gather(2, got.sequences[:, WIDTH:, None]).squeeze(2)
    torch.testing.assert_close(got.logprobs[:, 0].double(), each.mean(dim=1), atol=1e-5, rtol=0)


def test_finished_beams_do_not_continue() -> None:
    """If every token is an end token, no beam runs on, and finished ones are not reused."""
    model = build("gpt2", vocab=3).double()
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 4}
    rows = generate(model, torch.tensor([[0, 2]]), eos_token_id=[0, 1, 2], **options)
    assert rows.shape == (3, 3) and sorted(rows[:, 2].tolist()) == [0, 1, 2]


MOST: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": []}

# --- speculative decoding -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, v in WRITERS.items() if v and name != "t5"])
def test_speculative_decoding_gives_the_greedy_tokens(name: str) -> None:
    this = case(name)
    ids, mask = padded(this.ids)
    other = build("gpt2", vocab=this.config.vocab).double().eval()
    tries = (
        (this.model, 4, this.ends),
        (this.model, 20, []),
        (other, 1, []),
        (other, 5, this.ends),
    )
    for small, count, ends in tries:
        options = {"max_new_tokens": 11, "eos_token_id": ends, "pad_token_id": this.pad}
        want = generate(this.model, ids, mask, return_logprobs=True, **options)
        more = {"assistant_model": small, "num_assistant_tokens": count, **options}
        got = generate(this.model, ids, mask, return_logprobs=True, **more)
        assert got.sequences.tolist() == want.sequences.tolist()
        torch.testing.assert_close(got.logprobs, want.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1, "use_cache": False},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_speculative_decoding_obeys_penalties(options: dict[str, Any]) -> None:
    for name in ("llama", "bloom"):
        this = case(name)
        small = build("gpt2", vocab=this.config.vocab).double().eval()
        want = this.write(**options, **MOST).tolist()
        for assistant in (this.model, small):
            got = this.write(assistant_model=assistant, num_assistant_tokens=3, **options, **MOST)
            assert got.tolist() == want


def test_accepted_proposals_save_calls_of_the_large_model() -> None:
    """One call of the large model checks all proposals and yields one token more."""
    this, calls, read = case("llama"), [], []
    small = Case(registry.architectures()["llama"], WRITERS["llama"][0]).model  # the same weights
    small.register_forward_pre_hook(lambda _, args: read.extend(args[0][0].tolist()))
    hook = this.model.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    try:
        row = generate(this.model, this.ids[:1], assistant_model=small, **MOST)[0].tolist()
    finally:
        hook.remove()
    # the prompt; then five proposals and one more token, twice
    assert calls == [WIDTH, 6, 5]
    assert read == row[: len(read)] and len(read) >= len(row) - 2  # each token is read once


# --- text ----------------------------------------------------------------------------------------

CHARACTERS = "abcdefghijklm \n.😀é漢"


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A character-level model; some characters have several bytes."""
    place = tmp_path_factory.mktemp("speller") / "x"
    zoo.save(hot(build("llama", vocab=len(CHARACTERS), positions=64)), place)
    CharTokenizer.of(CHARACTERS).save(place)
    return zoo.load(place)


@pytest.fixture(scope="module")
def piecewise(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose tokens are single bytes: every character beyond ASCII spans several."""
    place = tmp_path_factory.mktemp("piecewise") / "x"
    zoo.save(hot(build("llama", vocab=512, positions=512)), place)
    tokens = [*(bytes([n]) for n in range(256)), b"th", b"he", b" the", b"12"]
    lines = (base64.b64encode(token) + b" %d\n" % n for n, token in enumerate(tokens))
    (place / "tokenizer.model").write_bytes(b"".join(lines))
    return zoo.load(place)


WARM: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0}


def test_streamed_pieces_join_to_the_text(speller: Any, piecewise: Any) -> None:
    for model, prompt in ((speller, "abc"), (piecewise, "the 漢")):
        for seed in range(2):
            for stops in ((), ("e", "ab"), ("\n",)):
                more = {**WARM, "seed": seed, "stop_strings": stops}
                whole = zoo.generate(model, prompt, **more)
                pieces = list(zoo.generate(model, prompt, stream=True, **more))
                assert "".join(pieces) == whole
                assert all(pieces) and not any(stop in whole for stop in stops)


def test_streamed_pieces_have_whole_characters() -> None:
    """Tokens are bytes here: a character appears with its last byte, also at the end."""
    text = "a😀漢é" * 2
    tokenizer = SimpleNamespace(stream=lambda **_: Bytes(), vocab_size=256)
    model: Any = SimpleNamespace(tokenizer=tokenizer)
    for stops in ((), ("漢é",), ("zz",), ("é",)):
        pieces = TextPieces(model, stops)
        out = [pieces.put(byte) for byte in text.encode()] + [pieces.end()]
        assert "".join(out) == (text.partition(stops[0])[0] if stops else text)
        assert "\ufffd" not in "".join(out)
    pieces = TextPieces(model, ("a",))
    assert [pieces.put(byte) for byte in "éa".encode() + b"\xe2"] == ["", "é", "", ""]
    assert pieces.end() == ""  # text after a stop string is dropped


class Bytes:
    """A stream of single bytes."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, id: int) -> str:
        return self.decoder.decode(bytes([id]))

    def end(self) -> str:
        return self.decoder.decode(b"", final=True)


def test_ids_beyond_the_tokenizers_vocabulary_have_no_text(tmp_path: Path) -> None:
    """Embeddings are often padded beyond the vocabulary: such ids are no text, and no error."""
    zoo.save(hot(build("llama", vocab=2 * len(CHARACTERS))), tmp_path / "x")
    CharTokenizer.of(CHARACTERS).save(tmp_path / "x")
    model = zoo.load(tmp_path / "x")
    for stops in ((), ("zz",)):
        more = {**WARM, "seed": 1, "stop_strings": stops}
        row = model.generate(torch.tensor([model.tokenizer.encode("abc")]), **more)[0, 3:]
        decodable = row[row < len(CHARACTERS)]
        assert len(decodable) < len(row)
        text = zoo.generate(model, "abc", **more)
        assert text == model.tokenizer.decode(decodable)
        assert text == "".join(zoo.generate(model, "abc", stream=True, **more))


def test_stop_strings_end_a_row(speller: Any) -> None:
    free = zoo.generate(speller, "abc", **WARM, seed=5)
    stop = free[12:15]  # three tokens
    place = free.index(stop)
    assert zoo.generate(speller, "abc", **WARM, seed=5, stop_strings=stop) == free[:place]
    assert zoo.generate(speller, "abc", **WARM, seed=5, stop_strings=["☃", stop]) == free[:place]
    ids = speller.tokenizer.batch(["abc"]).input_ids
    row = speller.generate(ids, **WARM, seed=5, stop_strings=stop)[0, 3:]
    assert speller.tokenizer.decode(row) == free[: place + 3]  # and no further token was computed
    plain = zoo.generate(speller, "abc", max_new_tokens=40)
    more: dict[str, Any] = {"max_new_tokens": 40, "stop_strings": plain[7:9]}
    ahead = zoo.generate(speller, "abc", assistant_model=speller, **more)
    assert ahead == zoo.generate(speller, "abc", **more) == plain[: plain.index(plain[7:9])]
    two = zoo.generate(speller, ["abc", "ab"], **WARM, seed=[5, 6], stop_strings=stop)
    assert two[0] == free[:place]


def test_several_texts_and_samples(speller: Any) -> None:
    options = {"max_new_tokens": 9, "temperature": 1.0, "seed": 3}
    alone = [zoo.generate(speller, text, **options) for text in ("abc", "i", "head")]
    assert zoo.generate(speller, ["abc", "i", "head"], **options) == alone
    many = zoo.generate(speller, ["abc", "i"], num_return_sequences=3, **options)
    assert many[::3] == alone[:2] and len(set(many[:3])) == len(set(many[3:])) == 3
    one = zoo.generate(speller, "abc", num_return_sequences=2, **options)
    assert one == many[:2]
    beams = zoo.generate(speller, "abc", num_beams=3, num_return_sequences=2, max_new_tokens=9)
    assert len(beams) == 2 and beams[0] != beams[1]
    guessed = zoo.generate(speller, "abc", assistant_model=speller, max_new_tokens=9)
    assert guessed == zoo.generate(speller, "abc", max_new_tokens=9)


def test_stream_of_tokens_matches_the_whole(speller: Any) -> None:
    ids, mask = padded(torch.randint(0, len(CHARACTERS), (3, 10)))
    options = {"max_new_tokens": 9, "temperature": 1.0, "seed": 3, "eos_token_id": [1]}
    want = speller.generate(ids, mask, return_logprobs=True, pad_token_id=1, **options)
    rows: list[list[int]] = [[], [], []]
    for step in speller.generate(ids, mask, stream=True, **options):
        assert step.logprob == want.logprobs[step.row, len(rows[step.row])]
        rows[step.row].append(step.token)
    width = want.sequences.shape[1] - 10
    assert [row + [1] * (width - len(row)) for row in rows] == want.sequences[:, 10:].tolist()
    with pytest.raises(UsageError, match="stream: beam search"):
        speller.generate(ids, mask, stream=True, num_beams=2)


def test_texts_are_returned_with_logprobs(speller: Any) -> None:
    options = {"max_new_tokens": 9, "temperature": 1.0, "seed": 3}
    got = zoo.generate(speller, "abc", return_logprobs=True, **options)
    assert got.text == zoo.generate(speller, "abc", **options)
    ids = torch.tensor([speller.tokenizer.encode("abc")])
    want = speller.generate(ids, return_logprobs=True, **options)
    assert got.ids == want.sequences[0, 3:].tolist()
    assert got.logprobs == pytest.approx(want.logprobs[0].tolist())
    two = zoo.generate(speller, ["abc", "i"], return_logprobs=True, **options)
    assert [each.text for each in two] == zoo.generate(speller, ["abc", "i"], **options)
    with pytest.raises(UsageError, match=r"m\.generate streams tokens"):
        zoo.generate(speller, "abc", return_logprobs=True, stream=True)


def test_encoder_decoders_answer_texts(tmp_path: Path) -> None:
    zoo.save(hot(build("t5", vocab=len(CHARACTERS), pad=None, start=None)), tmp_path / "x")
    CharTokenizer.of(CHARACTERS).save(tmp_path / "x")
    with pytest.raises(ConfigError, match="decoder_start_token_id: missing"):
        zoo.generate(tmp_path / "x", "abc")
    (tmp_path / "x" / "generation_config.json").write_text('{"decoder_start_token_id": 0}')
    model = zoo.load(tmp_path / "x")
    options = {"max_new_tokens": 9, "temperature": 1.0, "seed": 3}
    answers = zoo.generate(model, ["abc", "a bead"], **options)
    for text, answer in zip(["abc", "a bead"], answers, strict=True):
        ids = torch.tensor([model.tokenizer.encode(text)])
        rows = model.generate(ids, **options)
        assert answer == model.tokenizer.decode(rows[0, 1:])  # without the start token
        assert answer == "".join(zoo.generate(model, text, stream=True, **options))


def test_a_seed_belongs_to_its_row() -> None:
    this = case("llama")
    options = {"max_new_tokens": 8, "temperature": 1.5, "eos_token_id": []}
    same = generate(this.model, this.ids[:1].repeat(3, 1), seed=[1, 2, 1], **options)
    assert same[0].tolist() == same[2].tolist() != same[1].tolist()
    torch.manual_seed(4)
    first = this.write(**options)
    second = this.write(**options)
    torch.manual_seed(4)
    assert this.write(**options).tolist() == first.tolist() != second.tolist()


# --- a trained model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("stories")
    publish(fixtures / "stories260K" / "stories260K.bin", place)
    shutil.copyfile(fixtures / "stories260K" / "tok512.model", place / "tokenizer.model")
    return zoo.load(place)


def test_a_trained_model_continues_a_story(stories: Any, fixtures: Path) -> None:
    expected = json.loads((fixtures / "stories260K" / "EXPECTED.json").read_text())
    ids, text = expected["greedy_ids_from_BOS"], expected["greedy_text"]
    count = len(ids) - 1
    assert stories.generate(torch.tensor([[1]]), max_new_tokens=count).tolist() == [ids]
    assert zoo.generate(stories, "", max_new_tokens=count) == text
    assert "".join(zoo.generate(stories, "", max_new_tokens=count, stream=True)) == text
    # the space after the prompt is part of the new text
    start = text[: text.index(" a time")]
    assert zoo.generate(stories, start, max_new_tokens=3).startswith(" a time")
    short = zoo.generate(stories, "", max_new_tokens=count, stop_strings="park.\nLily")
    assert text.startswith(short) or "park.\nLily" not in text


# --- mistakes ------------------------------------------------------------------------------------

IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1.0}, "Did you mean temperature"),
        ({"max_tokens": 5}, "max_new_tokens"),
        ({"return_logprob": True}, "return_logprobs"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5"),
        ({"num_beams": None}, "num_beams=None"),
        ({"do_sample": True, "temperature": 0}, "temperature=0 is greedy"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"num_beams": 2, "temperature": 1.0}, "works neither with sampling"),
        ({"num_return_sequences": 2}, "set a temperature"),
        ({"num_beams": 2, "num_return_sequences": 3}, "more than 2 beams"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping='soon'"),
        ({"num_beams": 2, "length_penalty": 1000.0}, "length_penalty=1000.0"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty=nan"),
        ({"use_cache": "no"}, "use_cache='no'"),
        ({"do_sample": "yes"}, "do_sample='yes'"),
        ({"stop_strings": [""]}, "stop_strings"),
        ({"stop_strings": [3]}, "stop_strings"),
        ({"stop_strings": "x"}, "no checkpoint"),
        ({"temperature": 1.0, "seed": [1, 2]}, "one for each of 1 rows"),
        ({"assistant_model": "gpt2"}, "assistant_model"),
        ({"assistant_model": build("gpt2", vocab=7)}, "found 7"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build("gpt2").eval().generate(IDS, **options)
    assert message in str(caught.value)


def test_speculative_decoding_of_encoder_decoders_is_refused() -> None:
    this = case("t5")
    with pytest.raises(UsageError, match="not implemented for encoder-decoders"):
        this.write(assistant_model=this.model)


@pytest.mark.parametrize("ids", [[1, 100000], torch.tensor([-1]), 1.5, "x"], ids=str)
def test_an_end_token_outside_the_vocabulary_is_refused(ids: Any) -> None:
    with pytest.raises(TokenIdError, match=r"eos_token_id: (100000|-1|1.5|'x') is outside"):
        build("gpt2").generate(IDS, eos_token_id=ids)


@pytest.mark.parametrize("id", [-1, 100000, 1.5, "x"])
def test_a_pad_token_outside_the_vocabulary_is_refused(id: Any) -> None:
    with pytest.raises(TokenIdError, match="pad_token_id"):
        build("gpt2").generate(IDS, pad_token_id=id, max_new_tokens=1)


def test_options_accept_tensors_and_none() -> None:
    this = case("llama")
    ends = this.write(eos_token_id=this.ends).tolist()
    assert this.write(eos_token_id=torch.tensor(this.ends), stop_strings=None).tolist() == ends
    one = this.write(eos_token_id=this.ends[:1]).tolist()
    assert this.write(eos_token_id=torch.tensor(this.ends[0])).tolist() == one


def test_a_model_in_training_mode_generates_without_dropout() -> None:
    model = build("gpt2")
    want = hot(model).generate(IDS, **MOST).tolist()
    model.train()
    assert model.generate(IDS, **MOST).tolist() == want
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("ids", [torch.tensor([1, 2]), torch.zeros(1, 0).long(), "text", [[1]]])
def test_wrong_input_ids_are_refused(ids: Any) -> None:
    with pytest.raises(InputError, match="input_ids"):
        build("gpt2").generate(ids)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "deberta-v2"])
def test_encoders_refuse_to_generate(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is an encoder"):
        build(name).generate(IDS)


def test_heads_without_logits_refuse_to_generate() -> None:
    for head in ("none", "sequence_classification"):
        with pytest.raises(
            UsageError, match=f"head '{head}' cannot generate text; load the model with"
        ):
            build("gpt2", head=head).generate(IDS)
    with pytest.raises(UsageError, match="'encoder'"):
        build("t5", head="encoder").generate(IDS)


def test_empty_prompts_are_refused(speller: Any) -> None:
    for prompt in ("", ["abc", ""]):
        with pytest.raises(InputError, match="an empty text"):
            zoo.generate(speller, prompt)
    for prompt in ([], None, 5, b"abc"):
        with pytest.raises(InputError):
            zoo.generate(speller, prompt)
    for more in ({"num_return_sequences": 2, "temperature": 1.0}, {"num_beams": 2}):
        with pytest.raises(UsageError, match="expected one text"):
            zoo.generate(speller, "abc", stream=True, **more)


def test_generation_stops_at_the_last_position(speller: Any) -> None:
    """64 positions: by default as many tokens as fit; the last token needs no position."""
    assert speller.generate(torch.ones(1, 60).long()).shape == (1, 64)
    assert speller.generate(torch.ones(1, 60).long(), max_new_tokens=5).shape == (1, 65)
    with pytest.raises(SequenceTooLong, match=r"65 tokens.* 64 positions: fewer max_new_tokens"):
        speller.generate(torch.ones(1, 60).long(), max_new_tokens=6)
    with pytest.raises(SequenceTooLong):
        speller.generate(torch.ones(1, 65).long())
    # padding uses no positions
    mask = torch.zeros(1, 80).long()
    mask[0, 30:40] = 1
    assert speller.generate(torch.ones(1, 80).long(), mask, max_new_tokens=40).shape == (1, 120)


def test_an_assistant_with_few_positions_is_refused(speller: Any) -> None:
    small = build("gpt2", vocab=len(CHARACTERS), positions=16).eval()
    with pytest.raises(SequenceTooLong, match=r"assistant_model: .* 16 positions"):
        zoo.generate(speller, "abc", assistant_model=small, max_new_tokens=20)


def test_dynamic_rope_goes_beyond_its_positions_without_a_cache() -> None:
    this = Case(registry.architectures()["llama"], "rope-dynamic-beyond")  # 19 positions
    with pytest.raises(SequenceTooLong, match="use_cache=False goes on beyond them"):
        generate(this.model, this.ids, max_new_tokens=15)
    options = {"max_new_tokens": 15, "use_cache": False, "pad_token_id": 1, "eos_token_id": []}
    got = generate(this.model, this.ids, **options)
    for length in range(WIDTH, WIDTH + 15):
        with torch.no_grad():
            logits = this.model(got[:, :length])[:, -1]
        assert logits.argmax(dim=-1).tolist() == got[:, length].tolist()
    assert generate(this.model, this.ids).shape == (ROWS, 19)


def test_end_tokens_come_from_generation_config_first(tmp_path: Path) -> None:
    zoo.save(build("gpt2").eval(), tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config |= {"eos_token_id": 5, "pad_token_id": 6}
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    more = tmp_path / "x" / "generation_config.json"
    more.unlink(missing_ok=True)
    assert defaults_of(zoo.load(tmp_path / "x")).special[:2] == ((5,), 6)
    more.write_text('{"eos_token_id": [7, 8], "pad_token_id": 9}')
    assert defaults_of(zoo.load(tmp_path / "x")).special[:2] == ((7, 8), 9)
    for wrong in (100000, "x", [1, 2.5], True):
        more.write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ConfigError, match="eos_token_id"):
            zoo.load(tmp_path / "x").generate(IDS)


def test_generation_config_is_read_once_a_call(tmp_path: Path, monkeypatch: Any) -> None:
    read: list[Path] = []

    def counted(path: Path, error: Any) -> Any:
        read.append(path)
        return {"eos_token_id": 5, "pad_token_id": 0}

    monkeypatch.setattr("zoo.text.generation_config.read_json", counted)
    for name in ("gpt2", "t5"):
        zoo.save(hot(build(name, vocab=len(CHARACTERS))), tmp_path / name)
        (tmp_path / name / "generation_config.json").write_text("{}")
        CharTokenizer.of(CHARACTERS).save(tmp_path / name)
        model = zoo.load(tmp_path / name)
        for options in ({}, {"num_beams": 2}, {"assistant_model": model}, {"temperature": 1.0}):
            if name == "t5" and "assistant_model" in options:
                continue
            for call in (
                lambda o: model.generate(IDS, max_new_tokens=3, **o),  # noqa: B023
                lambda o: zoo.generate(model, "abc", max_new_tokens=3, **o),  # noqa: B023
            ):
                read.clear()
                call(options)
                assert read == [tmp_path / name / "generation_config.json"]
        read.clear()
        assert list(zoo.generate(model, "abc", max_new_tokens=3, stream=True))
        assert len(read) == 1


T5_IDS = {"pad_token_id": 3, "decoder_start_token_id": 7, "eos_token_id": 9}


@pytest.mark.parametrize("kind", ("made", "published", "changed", "without", "head"))
def test_a_saved_t5_answers_like_the_original(tmp_path: Path, kind: str) -> None:
    """In memory, loaded again, and in the reference: the decoder start token is saved."""
    from transformers import T5ForConditionalGeneration

    fields = {} if kind == "without" else {"pad": 3, "start": 7}
    model = hot(build("t5", tied=kind != "head", **fields))
    if kind not in ("made", "without"):
        source = zoo.save(model, tmp_path / "source")
        config = json.loads((source / "config.json").read_text()) | T5_IDS
        (source / "config.json").write_text(json.dumps(config, indent=1))
        changes = {"changed": {"start": 11}, "head": {"dropout": 0.0}}
        model = zoo.load(source, config=changes.get(kind, {}))
    place = zoo.save(model, tmp_path / "x")
    config = json.loads((place / "config.json").read_text())
    start = {"changed": 11, "without": 0}.get(kind, 7)
    assert config["decoder_start_token_id"] == start
    assert config["pad_token_id"] == (0 if kind == "without" else 3)
    assert config["eos_token_id"] == (None if kind in ("made", "without") else 9)
    if kind == "published":
        assert (place / "config.json").read_bytes() == (source / "config.json").read_bytes()
    reference = T5ForConditionalGeneration.from_pretrained(place).eval()
    ids = torch.randint(12, 130, (4, 7), generator=torch.Generator().manual_seed(2))
    wanted = reference.generate(ids, max_new_tokens=12, do_sample=False)
    assert wanted[:, 0].tolist() == [start] * 4 and len(wanted[:, 1:].unique()) > 4
    for each in (model, zoo.load(place)):
        assert torch.equal(each.generate(ids, max_new_tokens=12), wanted)


def test_an_interrupted_step_leaves_the_cache_unchanged() -> None:
    model = build("llama").double().eval()
    runner = Runner(model, IDS, None, room=9)
    with torch.no_grad():
        runner.feed()
        hook = model.blocks[1].register_forward_pre_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.feed(torch.tensor([[4, 5]]))
        hook.remove()
        assert runner.cache is not None and runner.cache.length == 3
        again = torch.tensor([[1, 2, 3, 4, 6, 7]])
        assert runner.resume(again) == 3
        assert torch.allclose(runner.feed()[:, -1], model(again)[:, -1], atol=1e-12)
        assert runner.resume(again[:, :2]) == 1 and runner.feed().shape[1] == 1
        assert torch.allclose(runner.feed(IDS)[:, -1], model(runner.ids)[:, -1], atol=1e-12)


def interrupted(*args: Any) -> None:
    raise KeyboardInterrupt


def test_only_the_last_logits_of_a_prompt_are_computed() -> None:
    model, seen = build("gpt2").eval(), []
    model.head.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    model.generate(IDS, max_new_tokens=4, eos_token_id=[])
    assert seen == [1, 1, 1, 1]
    assert model(IDS).shape[1] == 3


def test_options_of_sampling_turn_sampling_on() -> None:
    assert GenerationOptions().sampled is False and GenerationOptions(temperature=0.5).sampled
    assert GenerationOptions(do_sample=True).sampling.temperature == 1
    assert GenerationOptions(top_p=0.9).sampling.temperature == 1
    assert GenerationOptions(do_sample=False, temperature=0.5).sampling.greedy


def test_other_threads_get_all_logits_during_generation() -> None:
    model, ids = build("gpt2").eval(), torch.arange(20).view(2, 10)
    results: list[Tensor] = []

    def meanwhile(*_: Any) -> None:
        hook.remove()
        results.append(ThreadPoolExecutor(1).submit(model, ids).result())

    hook = model.norm.register_forward_pre_hook(meanwhile)
    with torch.no_grad():
        Runner(model, ids, None, room=2).feed()
    torch.testing.assert_close(results[0], model(ids))
