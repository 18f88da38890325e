"""Prepared models compute the same function, within the error of their dtype."""

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import first_of
from tiny import build, run
from torch import Tensor
from torch._dynamo.utils import counters

import zoo
from zoo import registry
from zoo.checkpoints.sentences import Pooling, SentenceModel
from zoo.components.cache import Cache
from zoo.components.heads import LOGITS
from zoo.errors import MissingDependency, UsageError
from zoo.prepared import packed
from zoo.prepared.last_only import last_only
from zoo.text.inference import headless

TOKENS = 33
# a row's first part needs a real token, and one row begins with nine tokens of padding
SPLITS = ([20, 13], [10] + [1] * 23, [10, 1, 1, 5, 16])
FIRST = [(name, next(iter(variants))) for name, variants in registry.variants().items()]
OTHERS = [(name, v) for name, (_, *later) in registry.variants().items() for v in later]
CASES = first_of([*FIRST, *OTHERS])
NAMES = sorted(registry.architectures())
Hot = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def hot(made: Hot) -> Hot:
    """A variant as the reference saves it, with random parameters."""
    return made


def masks(rows: int) -> Iterator[Tensor | None]:
    yield None
    for left in (True, False):
        mask = torch.ones(rows, TOKENS, dtype=torch.long)
        mask[0, slice(9) if left else slice(TOKENS - 9, None)] = 0
        yield mask


@torch.no_grad()
def outputs(model: Any, ids: Tensor) -> Iterator[Tensor]:
    """Outputs at all real tokens: at once, and in parts through a cache."""
    accepts = signature(type(model).forward).parameters
    for mask in masks(len(ids)):
        real = torch.ones_like(ids).bool() if mask is None else mask.bool()
        for out in run(model, ids, mask):
            places = out.ndim > 1 and out.shape[1] == TOKENS
            yield (out[real] if places else out).double().flatten()
        if "cache" not in accepts or model.config.head not in ("none", *LOGITS):
            continue
        if (model.config.limit_cached or TOKENS) < TOKENS:
            continue
        for split in SPLITS:
            past, parts = Cache(TOKENS), []
            mask_parts = (None,) * len(split) if mask is None else mask.split(split, 1)
            for part, its_mask in zip(ids.split(split, 1), mask_parts, strict=True):
                if "decoder_input_ids" in accepts:
                    parts.append(model(ids, mask, part, its_mask, cache=past))
                else:
                    parts.append(model(part, its_mask, cache=past))
            yield torch.cat(parts, 1)[real].double().flatten()


def ids_for(model: Any, rows: int = 4) -> Tensor:
    random = torch.Generator().manual_seed(5)
    return torch.randint(4, model.config.vocab, (rows, TOKENS), generator=random)


def enough_for(model: Any) -> Tensor:
    """More rows for heads with few outputs: ratios of errors need many numbers."""
    ids = ids_for(model)
    few = min(x.numel() for x in outputs(model, ids)) < 1000
    return ids_for(model, 256) if few else ids


def error(model: Any, truth: list[Tensor], ids: Tensor) -> float:
    squares = [(x - y).square().mean() for x, y in zip(outputs(model, ids), truth, strict=True)]
    return torch.stack(squares).mean().sqrt().item()


# sums have another order: over 101 variants the ratio of errors was 1.2 at most
FLOOR = 1.5


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_prepared_is_as_exact_as_plain(name: str, variant: str, hot: Hot) -> None:
    place = hot(name, variant)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        plain = zoo.load(place, dtype=dtype)
        exact = zoo.load(place, dtype=dtype).double()
        fast = zoo.load(place, dtype=dtype, prepare=True)
        ids = enough_for(plain)
        truth = list(outputs(exact, ids))
        scale = torch.cat(truth).square().mean().sqrt()
        if dtype is torch.float64:
            assert error(fast, truth, ids) <= 1e-12 * scale
        else:
            assert error(fast, truth, ids) <= FLOOR * error(plain, truth, ids)


@pytest.mark.parametrize("name", NAMES)
def test_int8_reports_its_loss(name: str) -> None:
    model = build(name).eval()
    ids = ids_for(model)[:2, :16]
    with torch.no_grad():
        before = run(model, ids)[0].double()
        zoo.prepare(model, int8=True, sample=ids)
        after = run(model, ids)[0].double()
    loss = model.prepared.loss
    assert 0 < loss.mean < 0.05
    assert loss.tokens == ids.numel()
    apart = ((after - before).abs() / before.square().mean().sqrt()).max().item()
    assert loss.worst == pytest.approx(apart, rel=1e-6) or loss.worst > apart
    assert (loss.kl is not None) == (model.config.head in LOGITS)


def test_lossless_preparation_reports_no_loss() -> None:
    assert zoo.prepare(build("gpt2")).prepared.loss is None


def test_every_linear_layer_is_replaced_in_place() -> None:
    model = build("llama")
    before = [weakref.ref(p) for p in model.parameters()]
    assert zoo.prepare(model) is model
    assert isinstance(model, registry.architectures()["llama"].model)
    left = dict(model.named_parameters())
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in left} <= {
        *("embed", "norm", "norm1", "norm2")
    }
    assert not any(p.requires_grad for p in left.values())
    assert not any(isinstance(part, torch.nn.Linear) for part in model.modules())
    assert not any(p() is not None for p in before)  # no second copy of the weights stays


def test_without_onednn_weights_are_fused_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "has_onednn", lambda dtype: False)
    model, ids = build("llama").eval(), torch.arange(20).view(2, 10)
    with torch.no_grad():
        before = model(ids)
        after = zoo.prepare(model)(ids)
    assert model.prepared.packed == 0
    torch.testing.assert_close(after, before)


# --- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda m, place: zoo.save(m, place),
        lambda m, place: m.save_pretrained(place),
        lambda m, place: zoo.prepare(m),
        lambda m, place: m.train(),
        lambda m, place: m.requires_grad_(),
        lambda m, place: m.double(),
        lambda m, place: m.to("meta"),
        lambda m, place: m.state_dict(),
        lambda m, place: m.load_state_dict({}),
    ],
)
def test_training_saving_and_copying_are_refused(
    use: Callable[[Any, Path], Any], tmp_path: Path
) -> None:
    model = zoo.prepare(build("gpt2"))
    with pytest.raises(UsageError, match="prepared"):
        use(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not any(part.training for part in model.modules())
    assert all(p.dtype is torch.float32 and p.device.type == "cpu" for p in model.parameters())


def test_a_sentence_model_is_prepared_with_its_inner_model(tmp_path: Path) -> None:
    model = SentenceModel(
        build("bert", head="none"), [Pooling(("mean_tokens",))], ["1_Pooling"]
    ).eval()
    ids = ids_for(model)
    with torch.no_grad():
        before = model(ids)
        torch.testing.assert_close(zoo.prepare(model)(ids), before)
    for one in (model, model.model):
        for use in (lambda m: zoo.save(m, tmp_path / "out"), lambda m: m.train(), zoo.prepare):
            with pytest.raises(UsageError, match="prepared"):
                use(one)


def test_a_model_around_a_prepared_one_is_prepared() -> None:
    model = SentenceModel(build("bert", head="none"), [Pooling(("mean_tokens",))], ["1_Pooling"])
    assert not model.is_prepared
    zoo.prepare(model.model)
    assert model.is_prepared


def test_a_model_whose_preparation_failed_halfway_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: packed.Packer, *parts: Any, **options: Any) -> None:
        raise MemoryError

    model = build("gpt2")
    monkeypatch.setattr(packed.Packer, "__call__", fail)
    with pytest.raises(MemoryError):
        zoo.prepare(model)
    with pytest.raises(UsageError, match="prepared"):
        zoo.save(model, tmp_path / "out")


def test_calls_without_effect_are_allowed() -> None:
    model = zoo.prepare(build("gpt2"))
    assert model.eval().float().to("cpu").requires_grad_(False) is model


def test_gradients_are_refused() -> None:
    model = zoo.prepare(build("llama"))
    model.embed.weight.requires_grad = True
    with pytest.raises(UsageError, match="no gradients"):
        model(torch.ones(1, 4, dtype=torch.long))


def test_meta_models_and_other_modules_are_refused() -> None:
    with torch.device("meta"):
        model = build("gpt2")
    for value in (model, torch.nn.Linear(2, 2), None):
        with pytest.raises(UsageError):
            zoo.prepare(value)


def test_a_missing_cpp_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> None:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    model = build("gpt2")
    with pytest.raises(MissingDependency, match=r"C\+\+ compiler"):
        zoo.prepare(model, compile=True)
    assert not model.is_prepared


# --- the last place alone ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fast", [False, True])
def test_last_only(name: str, fast: bool) -> None:
    model = build(name).eval()
    if model.config.head not in LOGITS:
        with pytest.raises(UsageError, match="last_only"):
            zoo.prepare(model, last_only=True)
        assert not model.is_prepared
        return
    if fast:
        zoo.prepare(model)
    ids = ids_for(model)
    with torch.no_grad():
        for mask in masks(len(ids)):
            (whole,) = run(model, ids, mask)
            last = [
                TOKENS - 1 if mask is None else int(row.nonzero().max())
                for row in masked(mask, ids)
            ]
            with last_only(model):
                (out,) = run(model, ids, mask)
            torch.testing.assert_close(out[:, 0], whole[torch.arange(len(ids)), last])
            assert run(model, ids, mask)[0].shape == whole.shape


def masked(mask: Tensor | None, ids: Tensor) -> Tensor:
    return torch.ones_like(ids) if mask is None else mask


def test_prepared_with_last_only() -> None:
    model, ids = build("gpt2").eval(), torch.arange(20).view(2, 10)
    with torch.no_grad():
        whole = model(ids)
        zoo.prepare(model, last_only=True)
        torch.testing.assert_close(model(ids), whole[:, -1:])
        past = Cache(10)
        mask = torch.ones_like(ids)
        model(ids[:, :6], mask[:, :6], cache=past)
        torch.testing.assert_close(model(ids[:, 6:], mask, cache=past), whole[:, -1:])
        with last_only(model):
            torch.testing.assert_close(model(ids), whole[:, -1:])


def test_last_only_does_not_affect_other_threads() -> None:
    model, ids = zoo.prepare(build("gpt2"), last_only=True), torch.arange(20).view(2, 10)
    first, second = torch.ones_like(ids), torch.ones_like(ids)
    first[:, 4:] = 0
    want = [model(ids, mask) for mask in (first, second)]
    inner: list[Tensor] = []

    def meanwhile(*_: Any) -> None:  # between the note of the mask and the head
        hook.remove()
        inner.append(ThreadPoolExecutor(1).submit(model, ids, second).result())

    hook = model.norm.register_forward_pre_hook(meanwhile)
    torch.testing.assert_close(model(ids, first), want[0])
    torch.testing.assert_close(inner[0], want[1])


def test_a_prepared_model_scores_and_embeds_like_before() -> None:
    plain, fast = build("gpt2").eval(), zoo.prepare(build("gpt2"))
    ids = ids_for(plain, 1)[0]
    assert zoo.perplexity(fast, ids, window=16).nll == pytest.approx(
        zoo.perplexity(plain, ids, window=16).nll, rel=1e-5
    )
    with torch.no_grad():
        body = headless(fast)
        torch.testing.assert_close(body(ids[None]), headless(plain)(ids[None]))
    assert fast(ids[None]).shape[-1] == plain.config.vocab


def test_perplexity_with_last_only_is_refused() -> None:
    last, other = zoo.prepare(build("gpt2"), last_only=True), build("gpt2").eval()
    ids = ids_for(other, 1)[:, :9]
    with pytest.raises(UsageError, match="last_only=True"):
        zoo.perplexity(last, ids[0])
    with pytest.raises(UsageError, match="last_only=True"):
        last.generate(ids, assistant_model=other, max_new_tokens=4)
    same = {"max_new_tokens": 4, "eos_token_id": []}
    assert torch.equal(last.generate(ids, **same), other.generate(ids, **same))


# --- compiled ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_with_a_cache_each_shape_is_compiled_once(name: str, padded: bool) -> None:
    """One graph for the prompt and one for every later token, in a second dialogue too."""
    counters.clear()
    model = build(name).eval()
    ids = ids_for(model)[:2, :20]
    mask = torch.ones_like(ids)
    mask[0, : 3 * padded] = 0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        whole = model(ids, mask)
        for _ in range(2):
            past, parts = Cache(32), []
            for split in torch.arange(20).split([8] + [1] * 12):
                parts.append(compiled(ids[:, split], mask[:, split], cache=past))
            real = mask.bool()
            torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real])
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


# torch.compile itself uses deprecated functions
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "int8"), [("gpt2", False), ("llama", False), ("llama", True)])
def test_prepared_and_compiled_agree(
    name: str, int8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a cache shared with other processes could be read half-written
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters.clear()
    models = [zoo.prepare(build(name), int8=int8, compile=c, last_only=True) for c in (False, True)]
    ids = ids_for(models[0])[:2, :12]
    models.append(build(name).eval())
    with torch.no_grad():
        pasts = [Cache(16) for _ in models]
        for split in torch.arange(12).split([8, 1, 1, 1, 1]):
            one, two, truth = (
                m(ids[:, split], cache=c)[:, -1:] for m, c in zip(models, pasts, strict=True)
            )
            if int8:  # it rounds to bf16, and a compiler may keep what eager code rounds
                far = [(x - truth).square().mean().sqrt() for x in (one, two)]
                assert far[1] <= FLOOR * far[0]
            else:
                torch.testing.assert_close(one, two)
    assert counters["stats"]["unique_graphs"] == 2
    with (
        pytest.raises(UsageError, match="compiled"),
        last_only(zoo.prepare(build(name), compile=True)),
    ):
        pass
