"""Defaults of generation_config.json: `generate(ids)` without options matches the reference."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build
from torch import Tensor

import zoo
from zoo import registry
from zoo.cli.app import main
from zoo.cli.chat import Dialogue
from zoo.errors import ConfigError, SequenceTooLong, TokenIdError, UsageError, ZooError
from zoo.parity.fixtures import hot_checkpoint
from zoo.parity.reference import Reference
from zoo.text.generation_config import NOT_IMPLEMENTED, defaults_of
from zoo.text.options import resolve_options
from zoo.tokenizers import CharTokenizer

LETTERS = " abcdefghijklmnopqrstuvwxyzAU:.\n"


class Pair:
    """A model and the reference, of one directory whose generation_config.json changes."""

    def __init__(self, place: Path, name: str) -> None:
        entry = registry.architectures()[name]
        kind = hot_checkpoint(entry, next(iter(entry.variants)), place)
        self.place, self.file = place, place / "generation_config.json"
        self.model = zoo.load(place, dtype="float64")
        self.reference = Reference(place, kind, torch.float64).model
        random = torch.Generator().manual_seed(5)
        self.ids = torch.randint(3, self.model.config.vocab, (2, 7), generator=random)
        self.free = self.written({"max_new_tokens": 14})[:, -14:].tolist()

    def written(self, fields: dict[str, Any], ids: Tensor | None = None, **options: Any) -> Tensor:
        self.file.write_text(json.dumps(fields))
        return self.model.generate(self.ids if ids is None else ids, **options)

    def wanted(self, fields: dict[str, Any], ids: Tensor | None = None, **options: Any) -> Tensor:
        from transformers import GenerationConfig

        self.file.write_text(json.dumps(fields))
        self.reference.generation_config = GenerationConfig.from_pretrained(self.place)
        return self.reference.generate(self.ids if ids is None else ids, **options)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("gpt2") / "x", "gpt2")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("t5") / "x", "t5")


def fields_of(this: Pair) -> Iterator[dict[str, Any]]:
    """Each field that greedy and beam search read, with tokens that are generated."""
    (a, b, c, d, *_), other = this.free[0], this.free[1][5]
    new: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 1}
    yield {}
    yield {"max_length": 15}
    yield {"max_length": 12, "max_new_tokens": 9}
    yield {"eos_token_id": c, "pad_token_id": 2}
    yield {"eos_token_id": [other, d]}  # rows are padded with the first
    yield {**new, "eos_token_id": c, "min_length": 13}
    yield {**new, "eos_token_id": c, "min_new_tokens": 6}
    yield {**new, "eos_token_id": c, "min_length": 40, "min_new_tokens": 4}
    yield {**new, "repetition_penalty": 1.7}
    yield {**new, "no_repeat_ngram_size": 2}
    yield {**new, "suppress_tokens": [a, d, 10**6]}
    yield {**new, "begin_suppress_tokens": [a, d]}
    yield {**new, "forced_bos_token_id": 9}
    yield {**new, "forced_eos_token_id": 9}
    yield {**new, "forced_eos_token_id": [9, 11]}
    yield {**new, "bad_words_ids": [[b], [a, c], [c, d]]}
    yield {**new, "eos_token_id": c, "bad_words_ids": [[c], [a]]}
    yield {**new, "sequence_bias": [[[a], -3.0], [[a, b], -30.0], [[9], 1.5]]}
    yield {**new, "eos_token_id": 9, "exponential_decay_length_penalty": [3, 1.6]}
    yield {**new, "num_beams": 3}
    yield {**new, "num_beams": 3, "eos_token_id": [c, other], "length_penalty": 0.2}
    yield {**new, "num_beams": 2, "eos_token_id": c, "early_stopping": True}
    yield {**new, "num_beams": 3, "num_return_sequences": 2, "early_stopping": "never"}
    yield {**new, "num_beams": 3, "no_repeat_ngram_size": 1, "renormalize_logits": True}
    yield {**new, "num_beams": 3, "eos_token_id": c, "min_new_tokens": 5, "suppress_tokens": [a]}
    yield {**new, "num_beams": 2, "forced_eos_token_id": 9, "eos_token_id": [9]}
    # fields of sampling have no effect without do_sample, nor those of beams without beams
    yield {**new, "temperature": 0.0, "top_k": 3, "top_p": 0.5, "typical_p": 0.2}
    yield {**new, "do_sample": False, "length_penalty": 3.0, "early_stopping": True}
    yield {**new, "use_cache": False, "transformers_version": "4.1", "chat_format": "x"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(29))
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_generate_without_options_matches_the_reference(
    name: str, number: int, request: pytest.FixtureRequest
) -> None:
    this: Pair = request.getfixturevalue(name)
    fields = list(fields_of(this))[number]
    if name == "t5":  # without it the reference has no decoder start token
        fields = {"decoder_start_token_id": 4, "pad_token_id": 1, **fields}
        fields |= {"use_cache": False}
    assert this.written(fields).tolist() == this.wanted(fields).tolist()


@pytest.mark.filterwarnings("ignore")
def test_every_case_is_compared_and_changes_the_output(gpt2: Pair) -> None:
    cases = list(fields_of(gpt2))
    assert len(cases) == 29
    plain = gpt2.written({"max_new_tokens": 12, "pad_token_id": 1}).tolist()
    for fields in cases[3:-3]:
        if "forced_bos_token_id" not in fields:  # it needs a prompt of one token
            assert gpt2.written(fields).tolist() != plain, fields


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [{}, {"begin_suppress_tokens": [5]}, {"num_beams": 2}], ids=str)
def test_forced_first_token_of_a_one_token_prompt(gpt2: Pair, more: dict[str, Any]) -> None:
    fields = {"max_new_tokens": 5, "pad_token_id": 1, "forced_bos_token_id": 9, **more}
    ids = gpt2.ids[:, :1]
    written = gpt2.written(fields, ids)
    assert written.tolist() == gpt2.wanted(fields, ids).tolist()
    assert (written[:, 1] == 9).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 4},
        {"repetition_penalty": 1.0},
        {"num_beams": 1},
        {"no_repeat_ngram_size": 1, "max_new_tokens": 6},
        {"suppress_tokens": []},
        {"eos_token_id": 9},
    ],
    ids=str,
)
def test_arguments_override_what_the_file_sets(gpt2: Pair, options: dict[str, Any]) -> None:
    fields = {"max_length": 15, "num_beams": 2, "repetition_penalty": 1.6, "pad_token_id": 1}
    fields["suppress_tokens"] = gpt2.free[0][:2]
    assert gpt2.written(fields, **options).tolist() == gpt2.wanted(fields, **options).tolist()
    assert resolve_options(gpt2.model, {"max_length": 9})[0].max_new(gpt2.model, gpt2.ids) == 2


def test_a_length_as_an_argument_overrides_any_in_the_file(gpt2: Pair) -> None:
    fields = {"max_new_tokens": 9, "max_length": 30}
    assert gpt2.written(fields, max_length=11).shape == (2, 11)
    assert gpt2.written(fields, max_new_tokens=2).shape == (2, 9)


@pytest.mark.parametrize(
    "sampling",
    [
        {},  # the reference's own top_k of 50
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 0},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"typical_p": 0.4},
        {"epsilon_cutoff": 0.02},
        {"eta_cutoff": 0.05},
        {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9},
        {"repetition_penalty": 1.8, "no_repeat_ngram_size": 1, "top_k": 9},
    ],
    ids=str,
)
def test_samples_follow_the_references_distribution(gpt2: Pair, sampling: dict[str, Any]) -> None:
    """Random numbers differ, so the distributions are compared."""
    fields = {"do_sample": True, "max_new_tokens": 1, "pad_token_id": 1, **sampling}
    want = gpt2.wanted(fields, output_scores=True, return_dict_in_generate=True).scores[0]
    asked, bounds = resolve_options(gpt2.model, {})
    assert asked.sampled
    rules = asked.constraints(gpt2.model, gpt2.ids, 1, bounds)
    with torch.no_grad():
        logits = gpt2.model(gpt2.ids)[:, -1].float()
    warped = asked.sampling.warp(rules.apply(logits, gpt2.ids.tolist(), 0))
    torch.testing.assert_close(warped.softmax(-1), want.softmax(-1), rtol=0, atol=1e-6)
    assert gpt2.written(fields, seed=3).tolist() == gpt2.written(fields, seed=3).tolist()
    if "top_k" not in sampling and sampling.keys() <= {"temperature"}:
        assert warped.isfinite().sum(dim=1).tolist() == [50, 50]


def test_a_file_that_asks_for_samples_gives_samples(gpt2: Pair) -> None:
    fields = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 8, "pad_token_id": 1}
    samples = {tuple(gpt2.written(fields, seed=seed)[0].tolist()) for seed in range(6)}
    assert len(samples) == 6
    greedy = gpt2.written({"max_new_tokens": 8, "pad_token_id": 1}).tolist()
    for options in ({"do_sample": False}, {"temperature": 0}, {"ignore_generation_config": True}):
        assert gpt2.written(fields, **options, max_new_tokens=8).tolist() == greedy
    assert gpt2.written(fields, num_return_sequences=3).shape[0] == 6
    # sampling set by an argument uses the file's temperature, and no default top_k
    warm = resolve_options(gpt2.model, {"top_p": 0.9})[0].sampling
    assert (warm.temperature, warm.top_k, warm.top_p) == (1.5, 50, 0.9)
    gpt2.file.write_text('{"temperature": 0.5}')
    assert resolve_options(gpt2.model, {"do_sample": True})[0].sampling.top_k == 0
    assert not resolve_options(gpt2.model, {})[0].sampled


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guidance_scale": 1.5}, "guidance_scale: 1.5"),
        ({"encoder_repetition_penalty": 1.2}, "encoder_repetition_penalty: 1.2"),
        ({"encoder_no_repeat_ngram_size": 3}, "encoder_no_repeat_ngram_size: 3"),
        ({"watermarking_config": {"bias": 2.0}}, "watermarking_config"),
        ({"max_time": 3.0}, "max_time: 3.0"),
        ({"token_healing": True}, "token_healing: True"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha: 0.6"),
        ({"num_beams": 4, "num_beam_groups": 2}, "num_beam_groups: 2"),
        ({"do_sample": True, "top_h": 0.4}, "top_h: 0.4"),
        ({"cache_implementation": "quantized"}, "cache_implementation: 'quantized'"),
        ({"dola_layers": "high"}, "dola_layers: 'high'"),
        ({"force_words_ids": [[4]]}, "force_words_ids"),
        ({"do_sample": True, "num_beams": 3}, "num_beams: beam search works neither with sampling"),
        (
            {"num_return_sequences": 2},
            "num_return_sequences: greedy sequences would all be the same",
        ),
        ({"do_sample": True, "temperature": 0}, "temperature=0 is greedy"),
        ({"do_sample": "yes"}, "do_sample='yes'"),
        ({"repetition_penalty": "much"}, "repetition_penalty='much'"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"eos_token_id": "x"}, "eos_token_id: expected an id below 113, found 'x'"),
        ({"bad_words_ids": 5}, "bad_words_ids=5"),
    ],
    ids=str,
)
def test_fields_not_implemented_are_refused_by_name(
    gpt2: Pair, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        gpt2.written(fields)
    assert message in str(caught.value) and str(gpt2.file) in str(caught.value)
    if "eos_token_id" not in fields:
        assert "ignore_generation_config=True" in str(caught.value)
        every = tuple(fields)
        plain = gpt2.written({}).tolist()
        assert gpt2.written(fields, ignore_generation_config=every).tolist() == plain


@pytest.mark.parametrize("name", NOT_IMPLEMENTED)
def test_neutral_values_of_fields_not_implemented_pass(gpt2: Pair, name: str) -> None:
    plain = gpt2.written({}).tolist()
    for value in (None, *NOT_IMPLEMENTED[name]):
        assert gpt2.written({name: value}).tolist() == plain
    idle = {"top_h": 0.4, "assistant_ensemble_weight": 0.5}  # no sampling, no assistant
    assert gpt2.written(idle).tolist() == plain


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [{}, {"num_beams": 1}], ids=str)
def test_beam_fields_are_ignored_without_beams(gpt2: Pair, more: dict[str, Any]) -> None:
    fields = {"max_new_tokens": 5, "diversity_penalty": 0.5, "num_beam_groups": 2, **more}
    assert gpt2.written(fields).tolist() == gpt2.wanted(fields).tolist()


def test_ignoring_an_unset_field_is_refused(gpt2: Pair) -> None:
    for wrong, message in (
        (["guidance_scal"], "does not set 'guidance_scal'. Did you mean guidance_scale"),
        ("guidance_scale", "expected True, or names of fields"),
        (3, "expected True, or names of fields"),
    ):
        with pytest.raises(UsageError) as caught:
            gpt2.written({"guidance_scale": 2}, ignore_generation_config=wrong)
        assert message in str(caught.value)


def test_a_prompt_beyond_max_length_is_refused(gpt2: Pair) -> None:
    with pytest.raises(SequenceTooLong, match=r"max_length=7: the prompt has 7.*max_new_tokens"):
        gpt2.written({"max_length": 7})
    assert gpt2.written({"max_length": 7}, max_new_tokens=2).shape == (2, 9)


@pytest.mark.parametrize("name", ["forced_bos_token_id", "forced_eos_token_id"])
def test_forced_tokens_outside_the_vocabulary_are_refused(gpt2: Pair, name: str) -> None:
    with pytest.raises(TokenIdError, match=f"{name}: 1000000 is outside"):
        gpt2.written({name: 10**6})
    for fields in ({"bad_words_ids": [[10**6]]}, {"sequence_bias": [[[10**6], 1.0]]}):
        with pytest.raises(TokenIdError, match="1000000 is outside"):
            gpt2.written(fields)


def test_config_json_counts_without_generation_config(tmp_path: Path) -> None:
    """Checkpoints from before 2023 have these fields in config.json; the reference reads them."""
    from transformers import AutoModelForCausalLM

    entry = registry.architectures()["gpt2"]
    hot_checkpoint(entry, next(iter(entry.variants)), tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    old = {"max_length": 12, "no_repeat_ngram_size": 1, "eos_token_id": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | old))
    (tmp_path / "x" / "generation_config.json").unlink(missing_ok=True)
    ids = torch.tensor([[4, 9, 9, 5]])
    model = zoo.load(tmp_path / "x", ignore_config=["max_length", "no_repeat_ngram_size"])
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "x").generate(ids)
    assert model.generate(ids).tolist() == want.tolist()
    assert want.shape == (1, 12)
    (tmp_path / "x" / "generation_config.json").write_text("{}")
    assert model.generate(ids).shape == (1, 24)


def test_end_tokens_come_from_generation_config_only(gpt2: Pair) -> None:
    """With generation_config.json the reference does not read end tokens from config.json."""
    gpt2.file.write_text('{"eos_token_id": [-1, 7]}')
    assert defaults_of(gpt2.model).special == ((7,), None, None)


def test_speculative_decoding_obeys_generation_config(gpt2: Pair) -> None:
    c = gpt2.free[0][2]
    fields = {"max_new_tokens": 12, "pad_token_id": 1, "eos_token_id": c, "min_new_tokens": 5}
    fields |= {"begin_suppress_tokens": gpt2.free[0][:1], "forced_eos_token_id": 9}
    fields |= {"bad_words_ids": [gpt2.free[0][3:5]], "repetition_penalty": 1.2}
    plain = gpt2.written(fields).tolist()
    assert gpt2.written(fields, assistant_model=gpt2.model).tolist() == plain


# --- text commands -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import build, hot

    place = tmp_path_factory.mktemp("speller") / "x"
    zoo.save(hot(build("llama", vocab=len(LETTERS), positions=2000)), place)
    CharTokenizer.of(LETTERS).save(place)
    return place


def test_generate_command_obeys_generation_config(
    speller: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = speller / "generation_config.json"
    file.write_text("{}")
    assert main(["generate", str(speller), "abc"]) == 0
    plain = capsys.readouterr().out
    assert len(plain) == 101
    file.write_text('{"max_length": 12, "stop_strings": null}')
    assert main(["generate", str(speller), "abc"]) == 0
    assert capsys.readouterr().out == plain[:9] + "\n"
    file.write_text('{"num_beams": 3, "max_new_tokens": 20}')
    assert main(["generate", str(speller), "abc"]) == 0
    beams = zoo.generate(speller, "abc", num_beams=3, max_new_tokens=20)
    assert capsys.readouterr().out == beams + "\n" != plain[:20] + "\n"
    file.write_text('{"guidance_scale": 2.0}')
    assert main(["generate", str(speller), "abc"]) == 1
    assert "--ignore-generation-config" in capsys.readouterr().err
    assert main(["generate", str(speller), "abc", "--ignore-generation-config"]) == 0
    assert capsys.readouterr().out == plain


def test_chat_obeys_generation_config(speller: Path) -> None:
    file = speller / "generation_config.json"
    file.write_text('{"max_new_tokens": 7, "no_repeat_ngram_size": 1}')
    text = "".join(Dialogue(zoo.load(speller)).answer("abc"))
    assert len(text) <= 7 and len(set(text)) == len(text)
    file.write_text('{"max_length": 40}')
    dialogue = Dialogue(zoo.load(speller))
    list(dialogue.answer("abc"))
    with pytest.raises(SequenceTooLong, match=r"max_length is 40: /reset"):
        list(dialogue.answer("abcdefgh" * 5))
    file.write_text('{"num_beams": 2}')
    with pytest.raises(UsageError, match="one answer at a time"):
        Dialogue(zoo.load(speller))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 10**30},
        {"repetition_penalty": 10**30},
        {"stop_strings": 5},
        {"eos_token_id": [None]},
        {"do_sample": True, "temperature": 10**30},
        {"sequence_bias": [[[1], 10**400]]},
        {"exponential_decay_length_penalty": [1, 10**400]},
        {"do_sample": True, "num_return_sequences": 10**9},
        {"do_sample": True, "top_p": "x"},
    ],
    ids=lambda fields: next(iter(reversed(fields))),
)
def test_values_out_of_range_in_the_file_are_refused(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    place = zoo.save(build("gpt2").eval(), tmp_path / "x")
    (place / "generation_config.json").write_text(json.dumps(fields))
    with pytest.raises(ZooError):
        zoo.load(place).generate(torch.tensor([[3, 4]]), max_new_tokens=1)
