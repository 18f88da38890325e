"""Components on their own: masks, rotary scaling, activations, heads, configs."""

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from zoo.components import config, masks
from zoo.components.activations import ACTIVATIONS
from zoo.components.attention import Biased, Explicit, attend
from zoo.components.heads import Pooler, last_token
from zoo.components.rotary import Rotary, Scaling, rotate
from zoo.errors import ConfigError, MaskError, ResourceLimit, TokenIdError

IDS = torch.tensor([[9, 8, 7, 6, 5], [4, 3, 2, 1, 9]])
HOLES = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])


# --- masks ---------------------------------------------------------------------------------------


def test_positions_count_real_tokens() -> None:
    assert masks.causal(IDS, HOLES).positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    assert masks.full(IDS, None).positions.tolist() == [[0, 1, 2, 3, 4]]


def test_no_query_is_left_without_a_key() -> None:
    for make in (masks.causal, masks.full):
        allowed = make(IDS, HOLES).allowed
        assert allowed is not None
        assert allowed.any(-1).all()


def test_mask_of_ones_is_dropped() -> None:
    assert masks.causal(IDS, torch.ones_like(IDS)).allowed is None


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 4), torch.tensor([[0] * 5, [1] * 5]), torch.full((2, 5), -1e9)],
    ids=["another length", "an empty row", "additive"],
)
def test_malformed_masks_are_refused(mask: Tensor) -> None:
    with pytest.raises(MaskError):
        masks.causal(IDS, mask)


def test_window_allows_the_last_tokens() -> None:
    alone = masks.causal(IDS, None, window=2).allowed
    assert alone is not None
    assert alone.sum(-1).tolist() == [1, 2, 2, 2, 2] and alone.diagonal().all()
    assert masks.causal(IDS, None, window=5).allowed is None
    padded = masks.causal(IDS, HOLES, window=2).allowed
    assert padded is not None
    assert padded[0, 0].sum(-1).tolist() == [1, 1, 1, 2, 2]


# --- attention -----------------------------------------------------------------------------------


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 6, 5, 4).double(), torch.randn(2, 2, 2, 5, 4).double()
    return q, k, v


MASKS = [
    masks.causal(IDS, None),
    masks.causal(IDS, HOLES),
    masks.causal(IDS, HOLES, window=2),
    masks.full(IDS, None),
    masks.full(IDS, HOLES),
]


@pytest.mark.parametrize("mask", MASKS)
def test_explicit_attention_equals_the_fused_kernel(mask: masks.Mask) -> None:
    q, k, v = qkv()
    fused = attend(q, k, v, mask, 0.3, 0.0)
    for upcast in (True, False):
        steps = Explicit(upcast)(q, k, v, mask, 0.3, 0.0)
        torch.testing.assert_close(fused, steps, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mask", MASKS)
def test_bias_is_added_to_the_scaled_scores(mask: masks.Mask) -> None:
    q, k, v = qkv()
    term = torch.randn(1, 6, 5, 5).double()
    fused = Biased(lambda q, k, mask: term)(q, k, v, mask, 0.3, 0.0)
    steps = Explicit(bend=lambda scores: scores + term)(q, k, v, mask, 0.3, 0.0)
    torch.testing.assert_close(fused, steps, rtol=0, atol=1e-14)
    assert (fused - attend(q, k, v, mask, 0.3, 0.0)).abs().max() > 0.1


# --- rotary --------------------------------------------------------------------------------------


def frequencies(width: int, base: float, limit: int, length: int = 3, **scaling: object) -> Tensor:
    rotary = Rotary(width, base, Scaling.from_json(scaling), limit)
    steps = torch.arange(0, width, 2).double() / width
    return rotary.scaling.frequencies(rotary, steps, torch.arange(length)[None]).squeeze()


def test_scores_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    rotary = Rotary(8, 100.0, Scaling(), 64)
    q, k = torch.randn(2, 1, 1, 1, 8).double()

    def score(a: int, b: int) -> float:
        (ca, sa), (cb, sb) = (rotary.tables(torch.tensor([[n]]), torch.float64) for n in (a, b))
        return (rotate(q, ca, sa) * rotate(k, cb, sb)).sum().item()

    assert math.isclose(score(3, 10), score(20, 27), abs_tol=1e-12)
    assert not math.isclose(score(3, 10), score(3, 11), abs_tol=1e-3)


def test_partial_rotary_leaves_the_rest_of_each_head() -> None:
    torch.manual_seed(0)
    mask, x = masks.causal(IDS, None), torch.randn(2, 1, 5, 8)
    part, _ = Rotary(4, 100.0, Scaling(), 64)(x, x, mask)
    whole, _ = Rotary(4, 100.0, Scaling(), 64)(x[..., :4], x[..., :4], mask)
    assert torch.equal(part, torch.cat((whole, x[..., 4:]), dim=-1))


def test_linear_divides_and_llama3_keeps_high_frequencies() -> None:
    plain = frequencies(16, 500.0, 64)
    assert torch.equal(frequencies(16, 500.0, 64, rope_type="linear", factor=4.0), plain / 4)
    scaled = frequencies(
        16, 500.0, 64, type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0
    )
    torch.testing.assert_close(scaled[0], plain[0])
    torch.testing.assert_close(scaled[-1], plain[-1] / 4)


def test_dynamic_base_grows_beyond_the_positions_only() -> None:
    plain = frequencies(16, 500.0, 20)
    at, beyond = (frequencies(16, 500.0, 20, n, rope_type="dynamic", factor=2.0) for n in (20, 21))
    torch.testing.assert_close(at, plain)
    assert (beyond[1:] < plain[1:]).all()


def test_yarn_truncates_by_default() -> None:
    """Null means false, as in the reference. These sizes make the ramp's ends fractions."""

    def yarn(**more: object) -> Tensor:
        sizes = {"factor": 4.0, "original_max_position_embeddings": 200}
        return frequencies(
            24, 60.0, 800, rope_type="yarn", beta_fast=9.0, beta_slow=1.3, **sizes, **more
        )

    assert torch.equal(yarn(), yarn(truncate=True))
    assert torch.equal(yarn(truncate=None), yarn(truncate=False))
    assert (yarn() - yarn(truncate=False)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"rope_type": "longrope"}, "'longrope' is not implemented"),
        ({"rope_type": "linaer", "factor": 2.0}, "Did you mean linear"),
        ({"rope_type": "linear"}, "needs factor"),
        ({"rope_type": "linear", "factor": 0}, "not positive"),
        ({"rope_type": "linear", "factor": "2"}, "expected a number"),
        ({"rope_type": "default", "factor": 2.0}, "has no 'factor'"),
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, "differ"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ([], "expected an object"),
    ],
)
def test_rope_scaling_that_is_not_implemented_is_refused(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scaling.from_json(value)


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3", "yarn"])
def test_rope_scaling_round_trips_through_json(kind: str) -> None:
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    factor = {} if kind == "default" else {"factor": 2.0}
    made = Scaling.from_json({"type": kind, **factor, **more})
    assert Scaling.from_json(made.to_json()) == made
    assert Scaling.from_json(None).to_json() == {"rope_type": "default"}


# --- activations and heads -----------------------------------------------------------------------


def test_activations_compute_their_definitions() -> None:
    x = torch.linspace(-12, 12, 97, dtype=torch.float64)
    exact = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    torch.testing.assert_close(ACTIVATIONS["gelu"](x), exact)
    assert 1e-5 < (ACTIVATIONS["gelu_new"](x) - exact).abs().max() < 1e-3
    assert 1e-3 < (ACTIVATIONS["quick_gelu"](x) - exact).abs().max() < 1e-1
    assert ACTIVATIONS["gelu_10"](x).max() == 10
    assert all(f(x).isfinite().all() for f in ACTIVATIONS.values())


@pytest.mark.parametrize(
    ("mask", "pad", "at"),
    [
        (None, None, [4, 4]),
        (HOLES, None, [4, 2]),
        (None, 9, [4, 3]),
        (HOLES, 2, [4, 1]),
        (torch.ones_like(IDS), 9, [4, 3]),
        (torch.tensor([[0, 0, 0, 0, 1], [1] * 5]), 5, [4, 4]),
    ],
    ids=["neither", "mask", "pad", "both", "ones and pad", "nothing but pads"],
)
def test_last_real_token_is_classified(mask: Tensor | None, pad: int | None, at: list[int]) -> None:
    x = torch.arange(5.0).expand(2, 5)[..., None]
    assert last_token(x, IDS, mask, pad).flatten().tolist() == at


def test_pooler_reads_the_first_real_token() -> None:
    pooler = Pooler(1)
    torch.nn.init.ones_(pooler.dense.weight)
    torch.nn.init.zeros_(pooler.dense.bias)
    x = torch.arange(1.0, 6.0).expand(2, 5)[..., None]
    torch.testing.assert_close(pooler(x, HOLES).flatten(), torch.tensor([3.0, 1.0]).tanh())
    torch.testing.assert_close(pooler(x, None).flatten(), torch.tensor([1.0, 1.0]).tanh())


# --- configs -------------------------------------------------------------------------------------


class Tiny(config.Config):
    layers: config.Layers = 2
    eps: config.Positive = 1e-5
    tied: bool = False
    pad: config.TokenId | None = 0
    dropout: config.Fraction = 0.0
    heads_known: ClassVar = ("lm", "none")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 0),
        ("layers", 2.0),
        ("layers", True),
        ("layers", None),
        ("eps", float("nan")),
        ("eps", "1e-5"),
        ("tied", 1),
        ("dropout", 1.5),
        ("head", "ml"),
        ("layer", 3),
    ],
)
def test_bad_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        Tiny(**{field: value})


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)layers.*eps"):
        Tiny(layers=0, eps=-1.0)
    with pytest.raises(ConfigError, match="Did you mean layers"):
        Tiny(layer=3)


def test_a_billion_layers_are_refused() -> None:
    with pytest.raises(ResourceLimit):
        Tiny(layers=10**9)


def test_optional_field_can_be_null() -> None:
    assert Tiny(pad=None).pad is None
    assert Tiny().replace(pad=3).to_dict()["pad"] == 3


def test_labels_by_count_or_by_name() -> None:
    names = config.Labels.from_json({"1": "b", "0": "a", "10": "c"})
    assert names == ("a", "b", "c")
    assert config.Labels.from_json({1: "b", 0: "a"}) == ("a", "b")
    assert len(config.Labels.from_json(5)) == 5
    for bad in (0, {}, {"x": "y"}, True):
        with pytest.raises(ConfigError):
            config.Labels.from_json(bad)


class Seen(config.Windowed):
    heads_known: ClassVar = ("lm",)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({}, (None, None, None)),
        ({"window": 7}, (7, 7, 7)),
        ({"window": 7, "window_from": 2}, (None, None, 7)),
        ({"window": 7, "windowed": False}, (None, None, None)),
        ({"window": 7, "kinds": [config.SLIDING, config.FULL, config.SLIDING]}, (7, None, 7)),
    ],
)
def test_windows_of_layers(fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert Seen(layers=3, **fields).windows() == windows


def test_contradictory_windows_are_refused() -> None:
    for fields in ({}, {"window": 7, "windowed": False}, {"window": 7, "layers": 2}):
        with pytest.raises(ConfigError, match="kinds"):
            Seen(**{"layers": 3, "kinds": [config.SLIDING] * 3, **fields})


def test_layer_kinds_round_trip_through_json() -> None:
    kinds = config.LayerKinds.from_json(["full_attention", "sliding_attention"])
    assert config.LayerKinds.from_json(kinds.to_json()) == kinds
    with pytest.raises(ConfigError, match="chunked"):
        config.LayerKinds.from_json(["chunked_attention"])


def test_token_outside_the_vocabulary_is_located() -> None:
    from zoo.components.inputs import check_ids

    with pytest.raises(TokenIdError, match=r"row 1, position 2.*99"):
        check_ids(torch.tensor([[1, 2, 3], [4, 5, 99]]), 50)
