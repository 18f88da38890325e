"""Every variant in the registry against the reference, and what the protocol itself rests on."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import first_of
from safetensors.torch import load_file, save_file

import zoo
from converters.spec import load_spec
from zoo import parity, registry
from zoo.errors import MissingDependency, ParityError, UsageError, ZooError
from zoo.parity import Report, Row, checks, fixtures, reference
from zoo.parity.truth import TOKENS, Truth
from zoo.registry import Architecture

ARCHITECTURES = list(registry.architectures().values())
VARIANTS = [(entry, variant) for entry in ARCHITECTURES for variant in entry.variants]
FIRST = [(entry, next(iter(entry.variants))) for entry in ARCHITECTURES]


def names(case: object) -> str | None:
    return case.name if isinstance(case, Architecture) else None


every_architecture = pytest.mark.parametrize(("entry", "variant"), FIRST, ids=names)
some_architectures = pytest.mark.parametrize(("entry", "variant"), first_of(FIRST), ids=names)
MARKED = [pytest.param(*case, marks=() if case in FIRST else pytest.mark.slow) for case in VARIANTS]


@pytest.mark.parametrize(("entry", "variant"), MARKED, ids=names)
def test_variant_is_within_limits(entry: Architecture, variant: str) -> None:
    report = parity.verify(entry.name, variants=[variant])
    assert report.ok, report.to_text()
    measured = {row.check for row in report.rows}
    assert {
        "fp64",
        "fp32",
        "bf16",
        "gradients",
        "padding",
        "batch",
        "export",
        "from scratch",
    } <= measured


@every_architecture
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.slow
def test_directory_is_within_limits(
    entry: Architecture, variant: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """A directory is checked with its own weights and with random weights."""
    fixtures.hot_checkpoint(entry, variant, tmp_path, seed=5, dtype=dtype)
    report = parity.verify(tmp_path)
    assert report.ok, report.to_text()
    assert len({row.subject for row in report.rows}) == 2


def test_converted_checkpoint_is_within_limits(tmp_path: Path) -> None:
    """The manifest of the source is not compared."""
    fixtures.hot_checkpoint(*FIRST[0], tmp_path / "hot")
    report = parity.verify(zoo.convert(tmp_path / "hot", tmp_path / "again", to="hf"))
    assert report.ok, report.to_text()


@some_architectures
def test_checkpoint_with_a_missing_tensor_fails(
    entry: Architecture, variant: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(made(entry.name, variant), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[sorted(weights)[0]]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    report = parity.verify(tmp_path)
    assert not report.ok
    assert not any(row.ok for row in report.rows if row.subject == tmp_path.name)


# --- fixtures ------------------------------------------------------------------------------------


def is_prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, math.isqrt(n) + 1))


def test_sizes_are_distinct() -> None:
    """Swapping two sizes must change the result in every variant."""
    wrong = []
    for entry, variant in VARIANTS:
        published = entry.variants[variant]["config"]
        fields, _ = load_spec(entry.spec).dialect("hf").read_config(published)
        config = entry.config_class(**fields)
        width = getattr(config, "head_dim", None) or config.dim // config.heads
        kv_heads = getattr(config, "kv_heads", None) or config.heads
        sizes = [config.heads, config.layers, width, config.vocab]
        sizes += [config.dim] if config.heads > 1 else []
        sizes += [kv_heads] if kv_heads != config.heads else []
        if len(set(sizes)) < len(sizes) or not is_prime(config.vocab):
            wrong.append(f"{entry.name}/{variant}: {sizes}")
    assert wrong == []
    assert TOKENS >= 33


@every_architecture
def test_every_parameter_is_redrawn(entry: Architecture, variant: str, tmp_path: Path) -> None:
    fixtures.hot_checkpoint(entry, variant, tmp_path / "a", seed=1)
    fixtures.hot_checkpoint(entry, variant, tmp_path / "b", seed=1)
    fixtures.hot_checkpoint(entry, variant, tmp_path / "c", seed=2)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), f"{name} does not follow from the seed"
        assert not torch.equal(tensor, c[name]), f"{name} does not depend on the seed"
        assert tensor.unique().numel() > 0.99 * tensor.numel(), f"{name} repeats values"
        assert tensor.abs().max() > 1e-3


@every_architecture
def test_attention_is_hot(entry: Architecture, variant: str, made: Callable[..., Path]) -> None:
    """Attention is neither uniform nor one-hot; otherwise errors in q and k would not show."""
    named = entry.variants[variant]["class"]
    model = reference.Reference(made(entry.name, variant), named, torch.float32).model
    ids = torch.randint(8, model.config.vocab_size, (4, TOKENS))
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            out = model(ids, decoder_input_ids=ids, output_attentions=True)
            attentions = out.encoder_attentions + out.decoder_attentions + out.cross_attentions
        else:
            attentions = model(ids, output_attentions=True).attentions
    for layer in attentions:
        last = layer[:, :, -1].double()  # the last token sees all the others
        entropy = -(last * last.clamp_min(1e-300).log()).sum(-1) / math.log(TOKENS)
        assert 0.2 < entropy.mean() < 0.95


def test_old_field_names_are_kept(tmp_path: Path) -> None:
    """A variant with an old field name has only that name in its config.json."""
    count = 0
    for entry, variant in VARIANTS:
        asked = entry.variants[variant]["config"]
        old = {k: asked[k] for k in ("rope_theta", "rope_scaling") if k in asked}
        if old:
            fixtures.hot_checkpoint(entry, variant, tmp_path / variant)
            written = json.loads((tmp_path / variant / "config.json").read_text())
            assert {k: written[k] for k in old} == old
            assert "rope_parameters" not in written
            count += 1
    assert count


# --- the truth -----------------------------------------------------------------------------------


@every_architecture
def test_lifted_reference_computes_in_fp64(
    entry: Architecture, variant: str, made: Callable[..., Path]
) -> None:
    """Two ways through the lifted reference agree to the last digits."""
    directory, named = made(entry.name, variant), entry.variants[variant]["class"]
    ids = {"input_ids": torch.randint(8, 100, (2, TOKENS))}
    ids["decoder_input_ids"] = ids["input_ids"].flip(1)  # read by encoder-decoders alone
    kinds = ("eager", "sdpa") if reference.fuses(named) else ("eager", "eager")
    with torch.no_grad():
        eager, fused = (
            reference.Reference(directory, named, torch.float64, lifted=True, attention=kind)(
                ids, watch=True
            )
            for kind in kinds
        )
    for name, value in eager.items():
        assert checks.distance(fused[name], value) < 1e-13


def test_unlifted_reference_is_caught(made: Callable[..., Path]) -> None:
    caught = 0
    for entry, variant in FIRST:
        named = entry.variants[variant]["class"]
        plain = reference.Reference(made(entry.name, variant), named, torch.float64)
        try:
            plain({"input_ids": torch.arange(8, 16)[None]}, watch=True)
        except ParityError:
            caught += 1
    assert caught


@some_architectures
def test_truth_is_repeatable(entry: Architecture, variant: str, made: Callable[..., Path]) -> None:
    """Also if the reference keeps state of the longest input."""
    directory, named = made(entry.name, variant), entry.variants[variant]["class"]
    one, two = Truth(directory, named), Truth(directory, named)
    for name, value in one.outputs.items():
        assert torch.equal(value, two.outputs[name])
    for name, value in one.gradients.items():
        assert torch.equal(value, two.gradients[name])


# --- comparing -----------------------------------------------------------------------------------


def test_gradients_differ_where_names_do() -> None:
    x = {"a": torch.ones(2), "b": torch.ones(2)}
    assert max(checks.gradient_errors(x, x).values()) == 0
    assert checks.gradient_errors({"a": torch.ones(2)}, x) == {"b": math.inf}
    assert checks.gradient_errors({**x, "b": torch.tensor([1.0, 1.1])}, x)["b"] > 0.05


def test_divergence() -> None:
    x = torch.randn(5, 7)
    assert checks.divergence(x + 3, x) == pytest.approx(0, abs=1e-12)
    assert checks.divergence(-x, x) > 0.1


def test_shapes_must_agree() -> None:
    with pytest.raises(checks.ShapesDiffer):
        checks.pair([torch.ones(2, 3)], {"logits": torch.ones(2, 4)})
    with pytest.raises(checks.ShapesDiffer):
        checks.pair([torch.ones(2)], {"start_logits": torch.ones(2), "end_logits": torch.ones(2)})


def test_differences_are_reported(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for directory in (a, b):
        directory.mkdir()
        save_file({"x": torch.ones(3), "y": torch.ones(3)}, directory / "model.safetensors")
        (directory / "config.json").write_text("{}")
    assert checks.differences(a, b) == []
    save_file({"x": torch.ones(3).half(), "z": torch.ones(3)}, b / "model.safetensors")
    (b / "config.json").unlink()
    assert checks.differences(a, b) == [
        "config.json: missing",
        "x: differs",
        "y: only in the source",
        "z: only in the copy",
    ]


# --- the report ----------------------------------------------------------------------------------

GOOD = Row("a", "fp64", 1e-15, 1e-10, "1e-15")
BAD = Row("b", "fp64", float("nan"), 1e-10, "nan", "what happened")


def test_report_as_text_and_json() -> None:
    assert Report([GOOD]).ok
    assert not Report([]).ok
    assert not Report([GOOD, BAD]).ok
    text = Report([GOOD, BAD]).to_text()
    assert "FAILED b: fp64: what happened" in text
    assert "\x1b" not in text
    assert "\x1b[31m" in Report([GOOD, BAD]).to_text(color=True)
    data = json.loads(json.dumps(Report([GOOD, BAD]).to_json()))
    assert [row["ok"] for row in data["rows"]] == [True, False]
    assert not data["ok"]


# --- verify --------------------------------------------------------------------------------------


def test_progress_is_called_for_each_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "_run", lambda job, seed: iter([GOOD]))
    seen: list[tuple[Any, ...]] = []
    report = parity.verify(all=True, progress=lambda *step: seen.append(step))
    assert len(report.rows) == len(VARIANTS)
    assert seen[0][:2] == (0, len(VARIANTS))
    assert seen[-1][0] == len(VARIANTS)


def test_wrong_arguments_of_verify_are_refused() -> None:
    with pytest.raises(UsageError):
        parity.verify()
    with pytest.raises(UsageError, match="no variant 'bse'"):
        parity.verify(ARCHITECTURES[0].name, variants=["bse"])
    with pytest.raises(ZooError, match="no checkpoint is called"):
        parity.verify("no-such-model")


def test_missing_reference_library_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    reference.transformers.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    try:
        with pytest.raises(MissingDependency, match="pip install"):
            parity.verify(ARCHITECTURES[0].name)
    finally:
        reference.transformers.cache_clear()
