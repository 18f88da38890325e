"""NaN and infinity: refused with the file, the tensor and the index that they come from."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import Made
from safetensors.torch import load_file, save_file
from tiny import build, hot

import zoo
from zoo.errors import ConfigError, NonFinite, OverflowOnCast, PlanError, UsageError, ZooError
from zoo.tokenizers import CharTokenizer

LETTERS = " abcdefghijklmnopqrstuvwxyzAU:.\n"
IDS = torch.tensor([[3, 4, 5, 6]])
FC = "transformer.h.1.mlp.c_fc.weight"  # (in, out) on disk, the other way round here
NAMED = rf"model\.safetensors: {FC}\[2, 5\] is nan \(here blocks\.1\.mlp\.up\.weight\[5, 2\]"


def broken(
    place: Path, name: str = FC, at: tuple[int, ...] = (2, 5), value: float = float("nan")
) -> Path:
    """A speller whose file holds one value that is not finite."""
    zoo.save(hot(build("gpt2", vocab=len(LETTERS), layers=2)), place)
    CharTokenizer.of(LETTERS).save(place)
    tensors = load_file(place / "model.safetensors")
    tensors[name][at] = value
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.fixture(scope="module")
def nan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return broken(tmp_path_factory.mktemp("nan") / "x")


CALLS: dict[str, Callable[[Any], Any]] = {
    "greedy": lambda m: m.generate(IDS),
    "sampled": lambda m: m.generate(IDS, temperature=1.0),
    "beams": lambda m: m.generate(IDS, num_beams=2),
    "no cache": lambda m: m.generate(IDS, use_cache=False),
    "stream": lambda m: list(m.generate(IDS, stream=True)),
    "guesses": lambda m: m.generate(IDS, assistant_model=m),
    "text": lambda m: zoo.generate(m, "abc"),
    "text stream": lambda m: list(zoo.generate(m, "abc", stream=True)),
    "perplexity": lambda m: zoo.perplexity(m, "abcabc"),
    "embed": lambda m: zoo.embed(m, ["abc", "a"]),
}


@pytest.mark.parametrize("call", CALLS)
def test_nan_is_traced_to_its_file(nan: Path, call: str) -> None:
    with pytest.raises(NonFinite, match=NAMED):
        CALLS[call](zoo.load(nan))


@pytest.mark.parametrize("kind", ["prepared", "native", "half", "fresh", "in memory"])
def test_nan_in_every_kind_of_model(nan: Path, tmp_path: Path, kind: str) -> None:
    message = NAMED
    if kind == "fresh":
        model, message = (
            build("gpt2", layers=2).eval(),
            r"blocks\.1\.mlp\.up\.weight\[5, 2\] is nan",
        )
        message += r"\. It is of no checkpoint"
    elif kind == "native":
        zoo.save(zoo.load(nan), tmp_path / "n", to="native", allow_nonfinite=True)
        model, message = (
            zoo.load(tmp_path / "n"),
            r"model\.safetensors: blocks\.1\.mlp\.up\.weight\[5",
        )
    elif kind == "in memory":
        model = zoo.load(nan)
        save = load_file(nan / "model.safetensors")
        assert save[FC].isnan().any()
        model = hot(build("gpt2", vocab=len(LETTERS), layers=2))
        model = zoo.load(zoo.save(model, tmp_path / "x"))
        message = r"up\.weight\[5, 2\] is nan, and finite in model\.safetensors: " + FC
    else:
        model = zoo.load(
            nan, prepare=kind == "prepared", dtype="bfloat16" if kind == "half" else None
        )
    if kind in ("fresh", "in memory"):
        with torch.no_grad():
            model.blocks[1].mlp.up.weight[5, 2] = float("nan")
    with pytest.raises(NonFinite, match=message):
        model.generate(IDS)


@pytest.mark.parametrize(
    "options", [{"adapter": False}, {"ignore_config": ["pruned_head"]}], ids=str
)
def test_nan_is_traced_to_its_file_by_the_options_of_loading(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    place = broken(tmp_path / "x")
    if "adapter" in options:
        (place / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
        save_file({"a": torch.zeros(1)}, place / "adapter_model.safetensors")
    else:
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, "pruned_head": [1]}))
    with pytest.raises(ZooError):
        zoo.load(place)
    model = zoo.load(place, **options)
    with pytest.raises(NonFinite, match=NAMED):
        model.generate(IDS)


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("change", ["written to", "gone"])
def test_cause_is_open_if_the_files_cannot_be_read_again(
    tmp_path: Path, prepare: bool, change: str
) -> None:
    place = broken(tmp_path / "x")
    model = zoo.load(place, mmap=False, prepare=prepare)
    if change == "written to":
        os.utime(place / "model.safetensors", ns=(0, 0))
    else:
        (place / "model.safetensors").unlink()
    with pytest.raises(
        NonFinite, match=r"could not be opened again: .*model\.safetensors"
    ) as error:
        model.generate(IDS)
    assert "training" not in str(error.value) and "all weights are finite" not in str(error.value)


ATTENTION = "transformer.h.0.attn.c_attn.weight"  # q of the first head lies first in it


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("prepare", [False, True])
def test_nan_hidden_by_fused_attention_is_refused(
    prepare: bool, value: float, tmp_path: Path
) -> None:
    """torch's fused attention replaces a row of NaN by zeros: finite but wrong logits."""
    place = broken(tmp_path / "x", ATTENTION, (1, 0), value)
    says = rf"model\.safetensors: {ATTENTION}\[1, 0\] is (nan|inf)"
    for name in ("greedy", "beams", "text", "perplexity", "embed"):
        model = zoo.load(place, prepare=prepare)
        with pytest.raises(NonFinite, match=says):
            CALLS[name](model)
        assert not any(module._forward_hooks for module in model.modules())


def test_error_names_the_row(tmp_path: Path) -> None:
    """A non-finite embedding affects only the rows with its token."""
    model = hot(build("gpt2", vocab=len(LETTERS), layers=1, tied=False))
    with torch.no_grad():
        model.embed.weight[9, 0] = float("inf")
    ids = torch.tensor([[3, 4, 5], [3, 9, 5], [3, 4, 5]])
    for options in ({}, {"num_beams": 2}, {"temperature": 1.0, "num_return_sequences": 2}):
        with pytest.raises(NonFinite, match=r"logits of row 1 not finite: embed\.weight\[9, 0\]"):
            model.generate(ids, **options)
    with pytest.raises(NonFinite, match=r"logits of row 1 "):
        model.generate(ids, assistant_model=model)
    assert model.generate(ids[:1]).shape == (1, 23)
    zoo.save(model, tmp_path / "x", allow_nonfinite=True)
    CharTokenizer.of(LETTERS).save(tmp_path / "x")
    letter = zoo.load(tmp_path / "x").tokenizer.decode([9])
    with pytest.raises(
        NonFinite, match=r"the embedding of row 2 not finite: .*wte\.weight\[9, 0\]"
    ):
        zoo.embed(tmp_path / "x", ["a", "abcd", letter])


def test_overflow_of_activations_names_dtype_and_module() -> None:
    model = hot(build("llama", vocab=50)).half()
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.fill_(6e4)
    with pytest.raises(
        NonFinite, match=r"all weights are finite, so the model overflows in float16"
    ) as e:
        model.generate(IDS)
    assert "blocks.0.mlp.down" in str(e.value) and "dtype='bfloat16' or 'float32'" in str(e.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_fill_refuses_nan(tmp_path: Path) -> None:
    model = hot(build("bert", vocab=40))
    with torch.no_grad():
        model.blocks[0].mlp.up.weight[1, 2] = float("nan")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    zoo.save(model, tmp_path / "x", allow_nonfinite=True)
    (tmp_path / "x" / "vocab.txt").write_text("\n".join(tokens) + "\n")
    (tmp_path / "x" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(NonFinite, match=r"layer\.0\.intermediate\.dense\.weight\[1, 2\] is nan"):
        zoo.fill(tmp_path / "x", "a [MASK] b")


def test_shell_commands_name_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], nan: Path
) -> None:
    from zoo.cli.app import main

    (tmp_path / "text").write_text("abcabc")
    for arguments in (["generate", str(nan), "abc"], ["score", str(nan), str(tmp_path / "text")]):
        assert main(arguments) == 1
        assert FC in capsys.readouterr().err


def test_hook_on_the_head_is_removed_if_forward_raises() -> None:
    """With the hook, every later forward would return only the last token's logits."""
    model = build("gpt2", vocab=50).eval()

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    hook = model.norm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        model.generate(IDS)
    hook.remove()
    assert model(IDS).shape[1] == IDS.shape[1]
    assert not model.head._forward_pre_hooks


# --- at loading ----------------------------------------------------------------------------------


def test_check_finite_checks_all_weights_while_loading(nan: Path) -> None:
    with pytest.raises(NonFinite, match=NAMED):
        zoo.load(nan, check="finite")
    with pytest.raises(NonFinite, match=NAMED):
        zoo.models.gpt2.Model.from_pretrained(nan, check="finite")
    assert zoo.load(nan).config.vocab == len(LETTERS)


def test_verify_reports_nan(nan: Path, tmp_path: Path) -> None:
    zoo.convert(nan, tmp_path / "n", to="native", allow_nonfinite=True)
    zoo.load(tmp_path / "n")
    with pytest.raises(NonFinite, match=r"blocks\.1\.mlp\.up\.weight\[5, 2\] is nan"):
        zoo.load(tmp_path / "n", verify=True)


def test_invalid_value_of_check_is_refused(nan: Path) -> None:
    with pytest.raises(UsageError, match=r"check='finit'.*Did you mean finite"):
        zoo.load(nan, check="finit")  # type: ignore[arg-type]


def test_a_cast_that_overflows_names_the_source(tmp_path: Path) -> None:
    place = broken(tmp_path / "x", value=1e30)
    message = (
        rf"model\.safetensors: {FC}\[2, 5\] is 1e\+30.*torch\.float16 \(here blocks\.1\.mlp\.up"
    )
    with pytest.raises(OverflowOnCast, match=message):
        zoo.load(place, dtype="float16")


@pytest.mark.parametrize("to", ["native", "hf"])
@pytest.mark.parametrize(("value", "error"), [(float("nan"), NonFinite), (1e30, OverflowOnCast)])
def test_convert_names_the_source(tmp_path: Path, to: str, value: float, error: Any) -> None:
    place = broken(tmp_path / "x", value=value)
    with pytest.raises(error) as caught:
        zoo.convert(place, tmp_path / "out", to=to, dtype="float16" if value == 1e30 else None)
    assert f"from model.safetensors: {FC}" in str(caught.value)
    name = FC + "[2, 5]" if to == "hf" else "blocks.1.mlp.up.weight[5, 2]"
    assert f"{name} is" in str(caught.value)


# --- adapters ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("lora"), "llama/base", ("q_proj",), torch.float32)


def changed(llama: Made, place: Path, **config: Any) -> Path:
    """The adapter with other settings."""
    place.mkdir()
    (place / "adapter_model.safetensors").write_bytes(
        (llama.adapter / "adapter_model.safetensors").read_bytes()
    )
    settings = json.loads((llama.adapter / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(settings | config))
    return place


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": 10**400}, r"lora_alpha: expected a number that fp32 holds, found 1000"),
        ({"lora_alpha": -(10**400)}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern: 'q_proj': 1000"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, r"alpha_pattern\.q_proj is NaN"),
        ({"rank_pattern": {"q_proj": 10**400}}, "rank_pattern: 'q_proj': 1000"),
        ({"r": 10**400}, "r: expected a positive whole number"),
        ({"lora_dropout": 10**400}, "lora_dropout"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_non_finite_settings_are_refused(
    llama: Made, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    place = changed(llama, tmp_path / "a", **config)
    for use in (
        lambda: zoo.load(llama.base, adapter=place),
        lambda: zoo.load(llama.base, adapter=place, merge=True),
        lambda: zoo.convert(llama.base, tmp_path / "out", adapter=place),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            use()
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("options", [{"alpha": 10**400}, {"alpha": float("nan")}, {"r": 10**400}])
def test_non_finite_adapter_options_are_refused(options: dict[str, Any]) -> None:
    model = build("llama")
    with pytest.raises(UsageError, match=r"lora_alpha|r: "):
        model.add_adapter(("q_proj",), **options)


def test_a_merge_that_overflows_changes_nothing(llama: Made, tmp_path: Path) -> None:
    place = changed(llama, tmp_path / "a", lora_alpha=2.9e38 * 3)
    with pytest.raises(ConfigError):
        zoo.load(llama.base, adapter=place)
    place = changed(llama, tmp_path / "b", lora_alpha=1e10)
    model = zoo.load(llama.base, adapter=place, dtype="float16")
    before = {name: p.clone() for name, p in model.named_parameters()}
    message = (
        r"adapter_model\.safetensors: merged, blocks\.0\.attn\.q\.weight\[\d+, \d+\] is too large"
    )
    with pytest.raises(OverflowOnCast, match=message):
        model.merge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(NonFinite, match=r"overflows in float16.*blocks\.0\.attn\.q"):
        model.generate(IDS)
    with pytest.raises(OverflowOnCast, match=r"q_proj\.weight.*adapter_model\.safetensors"):
        zoo.convert(llama.base, tmp_path / "out", to="hf", adapter=place, dtype="float16")


def test_nan_in_adapter_weights_is_refused(llama: Made, tmp_path: Path) -> None:
    place = changed(llama, tmp_path / "a")
    path = place / "adapter_model.safetensors"
    for name, at in (
        (next(iter(llama.factors)), (1, 2)),
        ("base_model.model.lm_head.weight", (3, 4)),
    ):
        tensors = dict(llama.factors)
        head = zoo.load(llama.base).head.weight.detach().clone()
        tensors = {n: t.clone() for n, t in tensors.items()} | {
            "base_model.model.lm_head.weight": head
        }
        tensors[name][at] = float("nan")
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(PlanError, match=rf"{name}: \[{at[0]}, {at[1]}\] is nan"):
            zoo.load(llama.base, adapter=place)


def test_non_finite_factors_after_training_are_named(llama: Made) -> None:
    model = zoo.load(llama.base, adapter=llama.adapter)
    piece = next(iter(model.adapter.pieces.values()))[0]
    with torch.no_grad():
        piece.low.b[1, 0] = float("nan")
    message = r"adapter_model\.safetensors: lora_B of model\.layers\.0\.self_attn\.q_proj"
    with pytest.raises(NonFinite, match=message):
        model.generate(IDS)
