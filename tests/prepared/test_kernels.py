"""Kernels for a few rows: as exact as oneDNN's; without a compiler, torch computes."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from tiny import build

import zoo
from zoo.components.attention import attend
from zoo.components.cache import Cache
from zoo.components.masks import Mask
from zoo.components.norm import OffsetRMSNorm, RMSNorm
from zoo.components.rotary import rotate
from zoo.prepared import fused, kernels, packed

DTYPES = (torch.float32, torch.bfloat16)
NONE = pytest.mark.skipif(kernels.library() is None, reason="no C compiler is here")


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def pack(weight: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, packed.MANY)
    return out


def blocks_of(weight: torch.Tensor, bias: torch.Tensor | None) -> kernels.WeightBlocks:
    if not packed.has_onednn(weight.dtype):
        pytest.skip(f"oneDNN packs no {weight.dtype} here")
    blocks = kernels.WeightBlocks.of(pack(weight), weight, bias)
    if blocks is None:
        pytest.skip("oneDNN has another order on this machine")
    return blocks


@NONE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(64, 64), (65, 67), (100, 37), (63, 130), (256, 1000), (768, 3072)]
)
@pytest.mark.parametrize("biased", [True, False])
def test_blocks_are_as_exact_as_onednn(
    shape: tuple[int, int], biased: bool, dtype: torch.dtype
) -> None:
    weight = drawn(*shape, dtype=dtype)
    bias = drawn(shape[0], dtype=dtype) if biased else None
    blocks = blocks_of(weight, bias)
    for rows in (1, 2, 3, 4, 5, 8, 9):
        x = drawn(2, rows, shape[1], dtype=dtype)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        theirs = torch.ops.mkldnn._linear_pointwise(x, pack(weight), bias, "none", [], "")
        for out in (torch.float32, dtype):
            got = blocks.product(x, out)
            assert got.dtype == out
            assert got.shape == exact.shape
            assert rms(got - exact) <= 1.2 * rms(theirs - exact)


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@NONE
def test_strided_rows_are_read() -> None:
    weight, wide = drawn(96, 64), drawn(3, 128)
    got = blocks_of(weight, None).product(wide[:, ::2], torch.float32)
    torch.testing.assert_close(got, wide[:, ::2] @ weight.T)


@NONE
def test_nan_and_infinity_are_kept() -> None:
    for dtype in DTYPES:
        x = torch.tensor([[float("nan")] * 64, [float("inf")] * 64], dtype=dtype)
        got = blocks_of(torch.ones(64, 64, dtype=dtype), None).product(x, dtype)
        assert got[0].isnan().all()
        assert (got[1] == float("inf")).all()


@NONE
@pytest.mark.parametrize("integer", [1, 3])
def test_halves_are_rounded_to_even(integer: int) -> None:
    x = torch.tensor([[1, integer * 2**-8]], dtype=torch.bfloat16)
    got = blocks_of(torch.ones(64, 2, dtype=torch.bfloat16), None).product(x, torch.bfloat16)
    assert (got == torch.tensor(1 + integer * 2**-8).bfloat16()).all()


@NONE
@pytest.mark.parametrize("shape", [(128, 64), (100, 37)])
def test_another_block_layout_is_detected(shape: tuple[int, int]) -> None:
    weight = drawn(*shape)
    blocks_of(weight, None)
    for start in (0, len(weight) - 1):  # the first block, the last one
        other = weight.clone()
        other[start, 0] += 1
        assert kernels.WeightBlocks.of(pack(other), weight, None) is None
    one = torch.ops.mkldnn._reorder_linear_weight(weight, 1)  # row by row, in fp32
    assert kernels.WeightBlocks.of(one, weight, None) is None


@NONE
def test_constant_blocks_lead_to_a_check_of_all() -> None:
    weight = torch.zeros(64 * 7, 32)
    other = weight.clone()
    other[64:128] = drawn(64, 32)
    blocks_of(weight, None)
    assert kernels.WeightBlocks.of(pack(other), weight, None) is None


@NONE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (33, 768), (100, 37), (17, 4097), (5, 1)])
def test_int8_products_are_exact(shape: tuple[int, int], dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, shape, generator=random, dtype=torch.int8)
    weight[0] = 127
    scale, bias = drawn(shape[0]).abs(), drawn(shape[0])
    for rows in (1, 3):
        x = drawn(rows, shape[1], dtype=dtype)
        x[0].fill_(3)  # the largest possible sums
        got = kernels.bytes_product(x, weight, scale, bias)
        assert got is not None
        exact = F.linear(x.double(), weight.double() * scale.double()[:, None], bias.double())
        rounding = rms(exact.to(dtype) - exact)
        assert rms(got - exact) <= rounding + 3e-5 * rms(exact)  # x is quantized to 16 bits


@NONE
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_int8_products_of_infinite_inputs(value: float) -> None:
    layer = packed.Int8(drawn(64, 64), None)
    x = torch.ones(1, 64)
    x[0, 3] = value
    assert not layer(x).isfinite().any()
    assert (layer(torch.zeros(1, 64)) == 0).all()
    # zero, or the tiny product itself, depending on the CPU
    assert (layer(torch.full((1, 64), 1e-42)).abs() < 1e-37).all()


@NONE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "h", "g", "t", "e"),
    [(1, 12, 12, 170, 64), (3, 8, 4, 33, 24), (2, 6, 1, 1, 7), (1, 4, 2, 1000, 128)],
)
@pytest.mark.parametrize("masked", [True, False])
def test_attention_of_one_query(
    b: int, h: int, g: int, t: int, e: int, masked: bool, dtype: torch.dtype
) -> None:
    q = drawn(b, 1, h, e, dtype=dtype).transpose(1, 2)
    k, v = (drawn(b, g, t + n, e, dtype=dtype)[:, :, :t] for n in (3, 5))  # strided, as in a cache
    allowed = None
    if masked:
        allowed = torch.rand(b, 1, 1, t, generator=torch.Generator().manual_seed(1)) < 0.7
        allowed[..., -1] = True
    mask = Mask(allowed, torch.zeros(1, 1, dtype=torch.long))
    exact = attend(q.double(), k.double(), v.double(), mask, e**-0.5, 0.0)
    theirs = attend(q, k, v, mask, e**-0.5, 0.0)
    ours = kernels.attend_one(q, k, v, mask, e**-0.5)
    assert ours.dtype == dtype
    assert rms(ours - exact) <= 1.3 * rms(theirs - exact)


@NONE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [RMSNorm, OffsetRMSNorm])
@pytest.mark.parametrize("d", [1, 15, 64, 100])
def test_norms_match_torch(kind: type[RMSNorm], d: int, dtype: torch.dtype) -> None:
    plain = kind(d, 1e-5).to(dtype).requires_grad_(False)
    plain.weight.copy_(drawn(d))
    x = drawn(2, 3, 2 * d, dtype=dtype)[..., ::2]
    exact = deepcopy(plain).double()(x.double())
    quick = fused.QuickNorm(plain)
    got = quick(x)
    assert got.dtype == dtype
    assert rms(got - exact) <= 1.1 * rms(plain(x) - exact) + 1e-12
    assert rms(got - exact) > 0 or d == 1  # it was not computed in fp64
    many = x.repeat(quick.few, 1, 1)
    assert torch.equal(quick(many), plain(many))


@NONE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rest", [0, 6])
@pytest.mark.parametrize("own", [True, False])
def test_rotary_matches_torch(own: bool, rest: int, dtype: torch.dtype) -> None:
    x = drawn(3, 1, 5, 16 + rest, dtype=dtype).transpose(1, 2)
    cos, sin = (drawn(3 if own else 1, 1, 1, 8 + n, dtype=dtype)[..., :8] for n in (1, 2))
    exact = rotate(x.double(), cos.double(), sin.double())
    got = kernels.rotate(x, cos.contiguous(), sin.contiguous())
    assert rms(got - exact) <= 1.1 * rms(rotate(x, cos, sin) - exact)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("int8", [False, True])
def test_without_a_compiler_torch_computes(
    name: str, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(compiler: str) -> torch.Tensor:
        monkeypatch.setenv("CC", compiler)
        kernels.library.cache_clear()
        model = zoo.prepare(build(name).eval(), int8=int8)
        assert model.prepared.kernels == (kernels.library() is not None)
        ids, cache = torch.arange(12).view(2, 6), Cache(6)
        with torch.no_grad():
            return torch.cat([model(part, cache=cache) for part in ids.split(1, dim=1)], dim=1)

    try:
        with_them = logits("")
        without = logits("/no/such/compiler")
        assert kernels.library() is None
    finally:
        kernels.library.cache_clear()
    torch.testing.assert_close(without, with_them, atol=0.05 if int8 else 1e-5, rtol=0)


def test_a_failing_compiler_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        for compiler in ("false", "true"):
            monkeypatch.setenv("CC", compiler)
            kernels.library.cache_clear()
            assert kernels.library() is None
    finally:
        kernels.library.cache_clear()


@NONE
@pytest.mark.parametrize("rows", [1, 8, 9])
def test_few_rows_use_the_kernels(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = packed.OneDNN(drawn(128, 64), drawn(128), F.silu)
    if layer.blocks is None:
        pytest.skip("oneDNN has another order on this machine")
    calls: list[int] = []
    real = layer.blocks.product

    def counted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        calls.append(len(x))
        return real(x, dtype)

    monkeypatch.setattr(layer.blocks, "product", counted)
    x = drawn(rows, 64)
    torch.testing.assert_close(layer(x), F.silu(x @ drawn(128, 64).T + drawn(128)))
    assert calls == ([rows] if rows <= layer.few else [])


def test_without_a_temporary_directory_torch_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nowhere(*args: object, **options: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    kernels.library.cache_clear()
    monkeypatch.setattr(kernels.tempfile, "TemporaryDirectory", nowhere)
    assert kernels.library() is None
    model = build("llama").eval()
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids)
    assert torch.allclose(zoo.prepare(model)(ids), expected, atol=1e-5)
    monkeypatch.undo()
    kernels.library.cache_clear()
