"""Sampling: warpers match the reference, and samples follow their distribution."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode

from zoo.components.cache import Cache
from zoo.components.model import Model
from zoo.errors import UsageError
from zoo.models.gpt2 import Config as GPT2
from zoo.text import sampling, speculative
from zoo.text.constraints import Constraints
from zoo.text.generate import generate
from zoo.text.sampling import RowGenerators, Sampling, pick, seeds_of

INF = float("inf")


def logits() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    plain = torch.randn(4, 97, generator=random)
    return {
        "plain": plain,
        "hot": plain * 30,
        "flat": plain * 1e-4,
        "ties": plain.round(),
        "equal": torch.zeros(2, 9),
        "quarters": torch.zeros(2, 4),  # cumulative sums equal a bound exactly
        "masked": plain.masked_fill(plain < 0.3, -INF),
        "one left": torch.full((2, 9), -INF).index_fill(1, torch.tensor([4]), 1.5),
        "two tokens": plain[:, :2],
        "huge": plain * 1e30,
    }


LOGITS = logits()
every_kind = pytest.mark.parametrize("kind", LOGITS)


@every_kind
@pytest.mark.parametrize(
    ("mine", "reference", "values"),
    [
        (sampling.temperature, "TemperatureLogitsWarper", (1e-3, 0.5, 1.7, 1e4)),
        (sampling.top_k, "TopKLogitsWarper", (1, 2, 5, 96, 97, 1000)),
        (sampling.top_p, "TopPLogitsWarper", (1e-9, 0.1, 0.5, 0.9, 0.99, 1 - 1e-7)),
        (sampling.min_p, "MinPLogitsWarper", (0.0, 1e-6, 0.05, 0.5, 0.999, 1.0)),
        (sampling.typical_p, "TypicalLogitsWarper", (1e-6, 0.1, 0.5, 0.9, 0.999)),
        (sampling.epsilon_cutoff, "EpsilonLogitsWarper", (1e-9, 3e-4, 0.02, 0.3, 0.999)),
        (sampling.eta_cutoff, "EtaLogitsWarper", (1e-9, 3e-4, 0.02, 0.3, 0.999)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_warpers_match_the_reference(
    kind: str, mine: Any, reference: str, values: tuple[float, ...]
) -> None:
    import transformers

    for value in values:
        warper = getattr(transformers, reference)(value)
        for dtype in (torch.float32, torch.float64):
            logits = LOGITS[kind].to(dtype)
            assert torch.equal(mine(logits, value), warper(None, logits.clone())), value


@every_kind
def test_penalties_match_the_reference(kind: str) -> None:
    import transformers

    logits = LOGITS[kind]
    random = torch.Generator().manual_seed(1)
    rows = torch.randint(0, min(logits.shape[1], 7), (len(logits), 23), generator=random)
    for value in (0.3, 0.99, 1.0, 1.2, 40.0):
        want = transformers.RepetitionPenaltyLogitsProcessor(value)(rows, logits.clone())
        got = Constraints(repetition_penalty=value).apply(logits, rows.tolist(), 0)
        assert torch.equal(got, want), value
    for size in (1, 2, 3, 5, 23, 40):
        want = transformers.NoRepeatNGramLogitsProcessor(size)(rows, logits.clone())
        got = Constraints(no_repeat_ngram_size=size).apply(logits, rows.tolist(), 0)
        assert torch.equal(got, want), size


def test_warpers_apply_in_the_references_order() -> None:
    """Temperature, top-k, top-p, min-p: each applies to the result of those before."""
    import transformers as ref

    logits = LOGITS["plain"] * 2
    want = logits
    for warper in (
        ref.TemperatureLogitsWarper(1.3),
        ref.TopKLogitsWarper(12),
        ref.TopPLogitsWarper(0.8),
        ref.MinPLogitsWarper(0.1),
    ):
        want = warper(None, want)
    got = Sampling(temperature=1.3, top_k=12, top_p=0.8, min_p=0.1).warp(logits)
    assert torch.equal(got, want)
    left = got.isfinite().sum(dim=1)
    assert 1 < left.max() < 12


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": INF},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"temperature": 1e-320},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": None},
        {"typical_p": 0.0},
        {"epsilon_cutoff": 1.0},
        {"eta_cutoff": -0.1},
    ],
    ids=str,
)
def test_sampling_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"repetition_penalty": 0},
        {"repetition_penalty": "much"},
        {"no_repeat_ngram_size": -2},
        {"min_length": -1},
        {"min_new_tokens": 1.5},
        {"forced_bos_token_id": "x"},
        {"forced_eos_token_id": ["x"]},
        {"suppress_tokens": 5},
        {"begin_suppress_tokens": [1.0]},
        {"bad_words_ids": [1, 2]},
        {"bad_words_ids": [[]]},
        {"sequence_bias": [[1, 2.0]]},
        {"sequence_bias": {(1,): "x"}},
        {"exponential_decay_length_penalty": 2},
        {"exponential_decay_length_penalty": [3, 0]},
        {"renormalize_logits": "yes"},
    ],
    ids=str,
)
def test_constraint_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))}=.*expected"):
        Constraints(**wrong)


def test_single_bad_words_and_biases_are_applied_together() -> None:
    """The cost does not grow with their number, with longer sequences beside them."""

    def applied(count: int) -> tuple[torch.Tensor, int]:
        biases = [[[n], 0.5 * n] for n in range(count, 2 * count)]
        rules = Constraints(
            bad_words_ids=[[n] for n in range(count)] + [[7, 2 * count]],
            sequence_bias=[*biases, [[3, 7, count], -2.0]],
            ends=(0,),
        )
        rules.check_ids(5000)
        calls = 0

        class Counting(TorchFunctionMode):
            def __torch_function__(
                self, call: Any, _: Any, args: Any = (), more: Any = None
            ) -> Any:
                nonlocal calls
                calls += 1
                return call(*args, **(more or {}))

        with Counting():
            return rules.apply(torch.zeros(2, 5000), [[3, 7], [7, 3]], 0), calls

    (_, few), (out, many) = applied(2), applied(1000)
    assert many == few
    want = torch.zeros(2, 5000)
    want[:, 1000:2000] = torch.arange(1000, 2000) * 0.5
    want[:, 1:1000] = -torch.inf
    want[0, 1000] -= 2.0
    want[0, 2000] = -torch.inf
    assert torch.equal(out, want)


# --- draws ---------------------------------------------------------------------------------------


def chi_square(counts: Tensor, chances: Tensor) -> float:
    """Chi-square in units of its standard deviation: below 4 is chance, 10 is not."""
    expected = chances * counts.sum()
    seen = expected > 0
    assert (counts[~seen] == 0).all()
    freedom = int(seen.sum()) - 1
    value = ((counts - expected)[seen] ** 2 / expected[seen]).sum().item()
    return (value - freedom) / (2 * freedom) ** 0.5


def counted(tokens: Tensor, vocab: int) -> Tensor:
    return torch.bincount(tokens.flatten(), minlength=vocab).double()


def test_samples_follow_the_distribution() -> None:
    warm = Sampling(temperature=0.8, top_k=9).warp(LOGITS["plain"][:1])
    chances = warm.double().softmax(dim=-1)
    numbers = RowGenerators([11]).numbers(20_000)
    tokens = torch.cat([pick(chances, numbers[:, n : n + 1]) for n in range(20_000)])
    counts = counted(tokens, chances.shape[1])
    assert abs(chi_square(counts, chances[0])) < 4
    other = Sampling(temperature=0.9, top_k=9).warp(LOGITS["plain"][:1]).double().softmax(dim=-1)
    assert chi_square(counts, other[0]) > 10  # the test detects another distribution


def test_pick_never_chooses_probability_zero() -> None:
    """The random number may be 0, and must not choose a token of probability 0."""
    chances = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.5, 1 - 2**-53, 1.0], dtype=torch.float64)
    assert pick(chances.expand(6, 5), numbers[:, None]).tolist() == [1, 1, 3, 3, 3, 3]
    assert int(pick(chances * 1e-300, torch.tensor([[0.9]], dtype=torch.float64))) == 3


def test_each_row_and_sample_has_its_own_random_numbers() -> None:
    one, two = (
        RowGenerators(seeds_of([3, 4], 2, 2)).numbers(5),
        RowGenerators(seeds_of(4, 1, 3)).numbers(5),
    )
    assert one[2:].tolist() == two[:2].tolist()
    assert len({tuple(row) for row in torch.cat((one, two[2:])).tolist()}) == 5
    assert len(set(seeds_of(None, 3, 3))) == 9
    torch.manual_seed(0)
    first = seeds_of(None, 2, 1)
    torch.manual_seed(0)
    assert seeds_of(None, 2, 1) == first
    for wrong in ([1], [1, 2, 3], "ab", 0.5, [1, None]):
        with pytest.raises(UsageError, match="seed"):
            seeds_of(wrong, 2, 1)  # type: ignore[arg-type]


def test_negative_and_large_seeds_are_accepted() -> None:
    assert RowGenerators([-1, 2**80, 0]).numbers().shape == (3, 1)


# --- speculative decoding -------------------------------------------------------------------------

VOCAB = 5


class Chain(Model):
    """A Markov chain: the next token depends on the last one and on the parity of its position."""

    def __init__(self, seed: int) -> None:
        super().__init__(GPT2(vocab=VOCAB, dim=2, heads=1, positions=10**6))
        self.head = nn.Linear(2 * VOCAB, VOCAB, bias=False).double()
        nn.init.normal_(self.head.weight, 0, 1.3, torch.Generator().manual_seed(seed))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        start = 0 if cache is None else cache.length
        if cache is not None:
            cache.step(input_ids, None)
        parity = (start + torch.arange(input_ids.shape[1])) % 2
        return self.head(one_hot(input_ids + VOCAB * parity, 2 * VOCAB).double())


def distance_of_guesses(**options: Any) -> float:
    """The distance of a chain's steps under speculative decoding from its own distribution."""
    large, small = Chain(seed=1), Chain(seed=2)
    chances = Sampling(**options).warp(large.head.weight.detach().T).softmax(dim=-1)
    counts = torch.zeros_like(chances)
    for seed in range(2):
        row = generate(
            large,
            torch.tensor([[1, 3]]),
            assistant_model=small,
            num_assistant_tokens=3,
            max_new_tokens=600,
            eos_token_id=[],
            seed=seed,
            **options,
        )[0]
        before = row[:-1] + VOCAB * (torch.arange(len(row) - 1) % 2)
        pairs = torch.stack((before, row[1:]))[:, 1:]
        counts.index_put_(tuple(pairs), torch.ones(600, dtype=torch.float64), accumulate=True)
    distances = [chi_square(n, p) for n, p in zip(counts, chances, strict=True) if n.sum() > 50]
    assert len(distances) > 5
    return sum(distances) / len(distances) ** 0.5


@pytest.mark.parametrize("how", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 3}], ids=str)
def test_speculative_decoding_keeps_the_distribution(how: dict[str, Any]) -> None:
    assert abs(distance_of_guesses(**how)) < 4


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        ("_accepts", lambda mine, draft, number: True),
        ("_accepts", lambda mine, draft, number: bool(number < mine)),
        ("_residual", lambda mine, draft: mine),
        ("_residual", lambda mine, draft: (mine - draft).abs()),
    ],
    ids=["all hold", "as if alone", "drawn from all", "from too many"],
)
def test_a_wrong_acceptance_rule_changes_the_distribution(
    monkeypatch: pytest.MonkeyPatch, rule: str, wrong: Any
) -> None:
    monkeypatch.setattr(speculative, rule, wrong)
    assert distance_of_guesses(temperature=1.0) > 10
