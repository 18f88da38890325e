"""Generation against the reference's own, each row against the row alone, text against its ids."""

import json
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from test_stories import publish
from tiny import build
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import zoo
from zoo import registry
from zoo.errors import ConfigError, InputError, SequenceTooLong, TokenIdError, UsageError
from zoo.generation import Options, Pieces, generate, left_aligned
from zoo.parity.fixtures import hot_checkpoint
from zoo.parity.reference import Reference
from zoo.registry import Architecture
from zoo.tokenizers import CharTokenizer

WRITES = ("CausalLM", "LMHeadModel", "ForConditionalGeneration")
WRITERS = {
    name: [v for v, data in entry.variants.items() if data["class"].endswith(WRITES)]
    for name, entry in registry.architectures().items()
}
NEW, ROWS, WIDTH = 12, 3, 10


def cases() -> Iterator[Any]:
    """Every variant that writes; the first of each architecture in the ordinary tests."""
    for name, variants in WRITERS.items():
        for n, variant in enumerate(variants):
            yield pytest.param(name, variant, marks=(pytest.mark.slow,) if n else ())


every_variant = pytest.mark.parametrize(("name", "variant"), list(cases()))
every_writer = pytest.mark.parametrize(
    "name", [name for name, variants in WRITERS.items() if variants]
)


def test_all_but_encoders_are_here() -> None:
    encoders = {name for name, variants in WRITERS.items() if not variants}
    assert encoders == {
        *("bert", "roberta", "xlm-roberta", "distilbert", "deberta", "deberta-v2"),
    }


class Case:
    """A model, the reference's of the same weights, and prompts that both can go on with."""

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
        # tokens that do come, so that rows end at different times
        self.ends = sorted({int(free[0, self.new // 3]), int(free[2, self.new // 2])})
        self.pad = next(id for id in (1, 2, 3) if id not in self.ends)

    def write(self, **options: Any) -> Any:
        return generate(self.model, self.ids, **options)

    def told(self, mask: Tensor | None, **options: Any) -> Tensor:
        """By the reference. It takes a padding id of 0 for none, behind beams."""
        self.reference.generation_config.eos_token_id = None
        options["eos_token_id"] = options.pop("eos_token_id") or None
        ask = partial(self.reference.generate, do_sample=False, **options)
        mask = torch.ones_like(self.ids) if mask is None else mask
        said = self.reference.config
        if said.is_encoder_decoder or said._attn_implementation != "eager":
            return ask(self.ids, attention_mask=mask)
        # its plain attention overflows in fp64, to NaN at padding: each row alone
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
# the reference counts padding among what was said before; zoo does not
UNPADDED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 0.7},
]


@every_variant
def test_as_the_reference(name: str, variant: str) -> None:
    this = case(name, variant)
    for ends in ([], this.ends):
        for mask, all_options in ((None, PLAIN + UNPADDED), (this.left, PLAIN[:3])):
            for options in all_options if ends else all_options[:1]:
                more = {"max_new_tokens": this.new, "pad_token_id": this.pad, **options}
                got = this.write(attention_mask=mask, eos_token_id=ends, **more)
                want = this.told(mask, eos_token_id=ends, **more)
                assert got.tolist() == want.tolist(), (ends, mask is None, options)


def padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of 10, 7 and 5 tokens: as they are, right-padded, padded on both sides."""
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
def test_a_row_is_the_row_alone(name: str, options: dict[str, Any]) -> None:
    this = case(name)
    ids, mask = padded(this.ids)
    each = options.get("num_return_sequences", 1)
    options = {"max_new_tokens": 6, "eos_token_id": this.ends, "pad_token_id": this.pad, **options}
    seeds = [7, 8, 9] if "num_beams" not in options else [None] * 3
    for cached in (True, False):
        seed = {} if seeds[0] is None else {"seed": seeds}
        got = generate(this.model, ids, mask, use_cache=cached, **options, **seed)
        for n in range(ROWS):
            one = {} if seeds[0] is None else {"seed": seeds[n]}
            row = ids[n : n + 1, mask[n].bool()]
            alone = generate(this.model, row, **options, **one)
            new = alone[:, 1 if name == "t5" else row.shape[1] :]
            found = got[n * each : (n + 1) * each, 1 if name == "t5" else WIDTH :]
            assert found[:, : new.shape[1]].tolist() == new.tolist()
            assert (found[:, new.shape[1] :] == this.pad).all()


@every_writer
def test_logprobs_are_the_models_own(name: str) -> None:
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
            rows, real = left_aligned(got.sequences, whole.bool())
            logits = this.model(rows, real)
    said = logits[:, -6:-1].log_softmax(dim=-1).gather(2, new[:, :, None]).squeeze(2)
    torch.testing.assert_close(got.logprobs.double(), said, atol=1e-5, rtol=0)


def test_scores_of_beams_are_means() -> None:
    this = case("llama")
    got = this.write(
        max_new_tokens=5, num_beams=3, length_penalty=1.0, eos_token_id=[], return_logprobs=True
    )
    with torch.no_grad():
        logits = this.model(got.sequences)[:, WIDTH - 1 : -1].log_softmax(dim=-1)
    each = logits.gather(2, got.sequences[:, WIDTH:, None]).squeeze(2)
    torch.testing.assert_close(got.logprobs[:, 0].double(), each.mean(dim=1), atol=1e-5, rtol=0)


def test_no_tiny_vocabulary_lets_what_has_ended_go_on() -> None:
    """Three tokens, two of them ends: fewer go on than there are beams."""
    model = build("gpt2", vocab=3).double()
    ids = torch.tensor([[0, 2]])
    rows = generate(
        model, ids, num_beams=3, num_return_sequences=3, max_new_tokens=4, eos_token_id=[0, 1]
    )
    for row in rows[:, 2:].tolist():
        first = next((n for n, id in enumerate(row) if id != 2), len(row))
        assert len(set(row[first:])) <= 1 or set(row[first + 1 :]) <= {0}


MOST: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": []}

# --- guessing ahead ------------------------------------------------------------------------------


@every_writer
def test_guessing_ahead_is_greedy(name: str) -> None:
    if name == "t5":
        pytest.skip("it reads a question apart")
    this = case(name)
    ids, mask = padded(this.ids)
    other = build("gpt2", vocab=this.config.vocab).double().eval()
    for ends in ([], this.ends):
        options = {"max_new_tokens": 11, "eos_token_id": ends, "pad_token_id": this.pad}
        want = generate(this.model, ids, mask, return_logprobs=True, **options)
        for small in (this.model, other):
            for count in (1, 2, 5, 20):
                more = {"assistant_model": small, "num_assistant_tokens": count, **options}
                got = generate(this.model, ids, mask, return_logprobs=True, **more)
                assert got.sequences.tolist() == want.sequences.tolist()
                torch.testing.assert_close(got.logprobs, want.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cached", [True, False])
def test_guessing_ahead_with_penalties(cached: bool) -> None:
    this = case("llama")
    small = build("gpt2", vocab=this.config.vocab).double().eval()
    for assistant in (this.model, small):
        options: dict[str, Any] = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
        options |= {"max_new_tokens": 11, "use_cache": cached}
        got = this.write(assistant_model=assistant, num_assistant_tokens=3, **options)
        assert got.tolist() == this.write(**options).tolist()


def test_guesses_that_hold_cost_the_large_model_few_calls() -> None:
    """Else it is only slow: one call looks at all guesses and gives one token more."""
    this, calls = case("llama"), []
    small = Case(registry.architectures()["llama"], WRITERS["llama"][0]).model  # the same weights
    hook = this.model.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    try:
        generate(this.model, this.ids[:1], assistant_model=small, **MOST)
    finally:
        hook.remove()
    # a token; five guesses and one more, twice
    assert calls == [WIDTH, 6, 5]
