"""LoRA adapters of peft on native models: loaded beside the weights, merged, trained, saved."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import ADAPTED, FP64, IDS, Made, distance, run, truth
from safetensors.torch import load_file, save_file
from tiny import build, hot
from torch import Tensor, nn

import zoo
from zoo import registry
from zoo.cli.app import main
from zoo.components.moe import Experts
from zoo.errors import AmbiguousCheckpoint, ConfigError, NotACheckpoint, PlanError, UsageError
from zoo.lora import files
from zoo.lora.layers import Lora
from zoo.parity.fixtures import hot_checkpoint
from zoo.parity.reference import Lift, Reference
from zoo.saving.convert import dry_run


@pytest.mark.parametrize("key", ADAPTED)
@torch.no_grad()
def test_beside_and_merged_match_the_reference(key: str, tmp_path: Path) -> None:
    made = Made(tmp_path, key)
    wanted = truth(made)
    model = zoo.load(made.base, adapter=made.adapter)
    alone = run(zoo.load(made.base))
    assert distance(alone, wanted) > 1e-4, "the adapter must show"
    assert distance(run(model), wanted) < FP64

    model.save_adapter(tmp_path / "back")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (made.adapter / name).read_bytes()

    assert distance(run(copy.deepcopy(model).remove_adapter()), alone) < 1e-13
    model.merge_adapter()
    assert not any(isinstance(part, Lora) for part in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert distance(run(model), wanted) < FP64
    model.save_pretrained(tmp_path / "out")
    mine = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(made.merged / "model.safetensors").items():
        assert distance(mine[name], tensor) < 1e-14, name


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.k_proj": 4}},
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 11, "down_proj": 0.5}},
    ],
    ids=str,
)
@torch.no_grad()
def test_scales_and_ranks_match_peft(config: dict[str, Any], tmp_path: Path) -> None:
    made = Made(tmp_path, "llama/base", **config)
    model = zoo.load(made.base, adapter=made.adapter)
    assert distance(run(model), truth(made)) < FP64


def test_the_fused_projections_share_one_factor(tmp_path: Path) -> None:
    made = Made(tmp_path, "neox/base")
    attn = zoo.load(made.base, adapter=made.adapter).blocks[0].attn
    assert attn.q.lora.a is attn.k.lora.a is attn.v.lora.a
    assert attn.q.lora.b is not attn.k.lora.b


# --- training ------------------------------------------------------------------------------------


class Beside(nn.Module):
    """A weight of the reference with its factors, in the layout of its file."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, turned: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        self.scale, self.turned = scale, turned

    def forward(self, weight: Tensor) -> Tensor:
        product = self.b @ self.a * self.scale
        return weight + (product.mT if self.turned else product)


def step(parameters: list[Tensor], loss: Callable[[], Tensor]) -> float:
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    value = loss()
    value.backward()
    optimizer.step()
    return value.item()


@pytest.mark.parametrize("key", ADAPTED)
def test_one_step_of_training_matches_peft(key: str, tmp_path: Path) -> None:
    # the reference has no modules for single experts in memory
    ends = tuple(e for e in ADAPTED[key] if not key.startswith("mixtral") or "proj" in e)
    made = Made(tmp_path, key, ends=ends)
    reference = Reference(made.base, made.reference_class, torch.float64, lifted=True)
    reference.model.requires_grad_(False)
    beside: dict[str, Beside] = {}
    for name, a in made.factors.items():
        if not name.endswith(("lora_A.weight", "lora_embedding_A")):
            continue
        b = made.factors[name.replace("_A", "_B")]
        disk = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        # NeoX's head has another name in memory than in files
        module = reference.model.get_submodule(disk.replace("embed_out", "lm_head"))
        turned = key.startswith("gpt2") or "embedding" in name
        beside[disk] = Beside(a, b, 5 / 3, turned)
        nn.utils.parametrize.register_parametrization(module, "weight", beside[disk])

    weights = torch.randn(truth(made).shape, generator=torch.Generator().manual_seed(7)).double()

    def theirs() -> Tensor:
        inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
        return (next(iter(reference(inputs).values())) * weights).mean()

    model = zoo.load(made.base, adapter=made.adapter)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for m in model.modules() if isinstance(m, Lora) for p in m.parameters()} == {
        id(p) for p in trained
    }
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    expected = step([p for each in beside.values() for p in each.parameters()], theirs)
    assert step(trained, lambda: (run(model) * weights).mean()) == pytest.approx(expected, rel=1e-9)
    assert all(model.get_parameter(n).equal(p) for n, p in before.items())

    model.save_adapter(tmp_path / "trained")
    saved = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    for disk, each in beside.items():
        a, b = (saved[n] for n in sorted(saved) if n.startswith(f"base_model.model.{disk}.lora_"))
        was = made.factors[next(n for n in made.factors if f".{disk}.lora_" in n and "_A" in n)]
        assert distance(was, a) > 1e-3, "it must have moved"
        assert distance(a, each.a.detach()) < 1e-9, disk
        assert distance(b, each.b.detach()) < 1e-9, disk


def test_stacked_experts_are_trained(tmp_path: Path) -> None:
    made = Made(tmp_path, "mixtral/base")
    model = zoo.load(made.base, adapter=made.adapter)
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    run(model).pow(2).sum().backward()
    low: Any = experts.lora_gate["2"]
    gradient = low.b.grad.clone()
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            low.b[1, 0] += sign * 1e-6
            values.append(run(model).pow(2).sum().item())
            low.b[1, 0] -= sign * 1e-6
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(gradient[1, 0].item(), rel=1e-4)
    assert isinstance(experts.gate, nn.Parameter), "nothing is left of a call"


# --- what stands in the model's place ------------------------------------------------------------


@torch.no_grad()
def test_trained_biases_and_modules_are_loaded(tmp_path: Path) -> None:
    made = Made(tmp_path, "gpt2/base", bias="all")
    base = load_file(made.base / "model.safetensors")
    names = ["transformer.h.0.attn.c_attn.bias", "transformer.h.1.mlp.c_fc.bias"]
    names += ["transformer.h.1.ln_2.weight", "transformer.h.1.ln_2.bias"]
    new = {name: base[name] + 0.5 for name in names}
    merged = load_file(made.merged / "model.safetensors") | new
    save_file(merged, made.merged / "model.safetensors", {"format": "pt"})
    keys = {n: n.replace("c_attn.", "c_attn.base_layer.") for n in names}
    stored = {f"base_model.model.{keys[n]}": x for n, x in new.items()}
    place = made.adapter / "adapter_model.safetensors"
    save_file({**made.factors, **stored}, place, {"format": "pt"})

    model = zoo.load(made.base, adapter=made.adapter)
    assert distance(run(model), truth(made)) < FP64
    assert model.blocks[1].norm2.weight.requires_grad
    model.save_adapter(tmp_path / "back")
    assert (tmp_path / "back" / place.name).read_bytes() == place.read_bytes()
    plain = run(zoo.load(made.base))
    assert distance(run(model.remove_adapter()), plain) < 1e-13


@torch.no_grad()
def test_a_half_precision_adapter_trains_in_fp32_and_saves_unchanged(tmp_path: Path) -> None:
    made = Made(tmp_path, "llama/base")
    place = made.adapter / "adapter_model.safetensors"
    narrow = {name: factor.to(torch.bfloat16) for name, factor in made.factors.items()}
    save_file(narrow, place, {"format": "pt"})
    model = zoo.load(made.base, dtype="bfloat16", adapter=made.adapter)
    low: Any = model.blocks[0].attn.q.lora
    assert low.a.dtype == torch.float32
    assert run(model).dtype == torch.bfloat16
    model.save_adapter(tmp_path / "back")
    assert (tmp_path / "back" / place.name).read_bytes() == place.read_bytes()
    low.a.add_(1e-6)
    model.save_adapter(tmp_path / "trained")
    kept = load_file(tmp_path / "trained" / place.name)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert kept[key].equal(low.a), "no digit of what was learnt is lost"
    assert model.merge_adapter().blocks[0].attn.q.weight.dtype == torch.bfloat16


def test_a_new_adapter_changes_nothing_and_is_trained(tmp_path: Path) -> None:
    model = hot(build("gpt2"))
    before = run(model)
    model.add_adapter(["c_attn", "mlp.c_proj"], r=2, alpha=3)
    assert run(model).equal(before), "it changes nothing yet"
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    after = run(model)
    model.save_adapter(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    dim = model.config.dim
    shape = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].shape
    assert tuple(shape) == (3 * dim, 2)
    model.remove_adapter()
    assert run(model).equal(before)
    assert distance(run(model.load_adapter(tmp_path / "a")), after) < 1e-6


# --- one array, two names ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "ends", "names"),
    [
        ("llama/tied", ("embed_tokens",), ("embed.weight", "head.weight")),
        ("gpt2/base", ("wte", "c_attn"), ("embed.weight", "head.weight")),
        ("bert/masked-lm", ("word_embeddings",), ("embed.weight", "head.decoder.weight")),
    ],
)
@torch.no_grad()
def test_merging_unties_weights_that_differ(
    key: str, ends: tuple[str, ...], names: tuple[str, str], tmp_path: Path
) -> None:
    """Here the head keeps the old embedding; in peft a merge changes both."""
    made = Made(tmp_path, key, ends=ends)
    plain = zoo.load(made.base)
    model = zoo.load(made.base, adapter=made.adapter)
    apart = run(model)
    assert distance(run(plain), apart) > 1e-4
    assert model.get_parameter(names[0]) is model.get_parameter(names[1])
    copied = copy.deepcopy(model).remove_adapter()
    assert distance(run(copied), run(plain)) < 1e-13
    assert copied.get_parameter(names[0]) is copied.get_parameter(names[1])
    model.merge_adapter()
    assert distance(run(model), apart) < FP64
    assert model.get_parameter(names[1]).equal(plain.get_parameter(names[1]))
    assert not model.config.tied
    model.save_pretrained(tmp_path / "saved")
    zoo.convert(made.base, tmp_path / "out", adapter=made.adapter)
    mine, other = (load_file(tmp_path / n / "model.safetensors") for n in ("saved", "out"))
    assert mine.keys() == other.keys()
    assert all(x.equal(other[n]) for n, x in mine.items())
    reference = Reference(tmp_path / "out", made.reference_class, torch.float64, lifted=True)
    assert not reference.problems
    assert distance(next(iter(reference({"input_ids": IDS}).values())).detach(), apart) < FP64


@pytest.mark.parametrize("how", ["head alone", "both alike", "unchanged"])
@torch.no_grad()
def test_replaced_arrays_of_tied_names(how: str, tmp_path: Path) -> None:
    made = Made(tmp_path, "llama/tied", ends=("q_proj",))
    place = made.adapter / "adapter_model.safetensors"
    before = load_file(made.base / "model.safetensors")["model.embed_tokens.weight"]
    new = before + 0.1 * (how != "unchanged")
    names = ["lm_head.weight"] if how == "head alone" else ["model.embed_tokens.weight"]
    names += ["lm_head.weight"] if how == "both alike" else []
    added = {f"base_model.model.{name}": new.clone() for name in names}
    save_file({**made.factors, **added}, place, {"format": "pt"})
    model = zoo.load(made.base, adapter=made.adapter)
    apart = run(model)
    model.merge_adapter()
    assert distance(run(model), apart) < FP64
    assert model.config.tied == (how != "head alone")
    assert model.head.weight.equal(new)
    assert model.embed.weight.equal(new if how == "both alike" else before)
    zoo.convert(made.base, tmp_path / "out", adapter=made.adapter)
    assert distance(run(zoo.load(tmp_path / "out")), apart) < FP64


def test_factors_on_shared_arrays_are_refused(tmp_path: Path) -> None:
    made = Made(tmp_path, "t5/tied", ends=("q",))
    config = made.adapter / "adapter_model.safetensors"
    dim, vocab = 2, 3
    for name in ("shared", "encoder.embed_tokens"):
        more = {
            f"base_model.model.{name}.lora_embedding_A": torch.ones(3, vocab),
            f"base_model.model.{name}.lora_embedding_B": torch.ones(dim, 3),
        }
        save_file({**made.factors, **more}, config, {"format": "pt"})
        with pytest.raises(PlanError, match=f"{name}: several modules share this array"):
            zoo.load(made.base, adapter=made.adapter)
    size = load_file(made.base / "model.safetensors")["shared.weight"].shape
    more = {"base_model.model.encoder.embed_tokens.weight": torch.ones(size)}
    save_file({**made.factors, **more}, config, {"format": "pt"})
    with pytest.raises(PlanError, match=r"differs from shared.weight, and both are one array"):
        zoo.load(made.base, adapter=made.adapter)


def test_factors_on_distance_tables_are_refused(tmp_path: Path) -> None:
    """DeBERTa reads the table's weight directly: factors beside it would have no effect."""
    made = Made(tmp_path, "deberta-v2/v3", ends=("query_proj",))
    size = load_file(made.base / "model.safetensors")["deberta.encoder.rel_embeddings.weight"].shape
    begin = "base_model.model.deberta.encoder.rel_embeddings.lora_embedding_"
    more = {f"{begin}A": torch.ones(3, size[0]), f"{begin}B": torch.ones(size[1], 3)}
    place = made.adapter / "adapter_model.safetensors"
    save_file({**made.factors, **more}, place, {"format": "pt"})
    with pytest.raises(PlanError, match=r"distances.embed.weight is read directly"):
        zoo.load(made.base, adapter=made.adapter)


def test_an_adapter_on_an_initialized_model(tmp_path: Path) -> None:
    made = Made(tmp_path, "llama/base")
    model = zoo.load(made.base, weights="random", adapter=made.adapter, dtype="float64")
    assert sum(isinstance(part, Lora) for part in model.modules()) == 12


def test_untying_t5_is_refused(tmp_path: Path) -> None:
    made = Made(tmp_path, "t5/tied", ends=("q",))
    size = load_file(made.base / "model.safetensors")["shared.weight"].shape
    more = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(3, size[1]),
        "base_model.model.lm_head.lora_B.weight": torch.ones(size[0], 3),
    }
    place = made.adapter / "adapter_model.safetensors"
    save_file({**made.factors, **more}, place, {"format": "pt"})
    model = zoo.load(made.base, adapter=made.adapter)
    before = run(model)
    with pytest.raises(UsageError, match="t5 with separate arrays computes another function"):
        model.merge_adapter()
    assert run(model).equal(before)
    with pytest.raises(UsageError, match="another function"):
        zoo.convert(made.base, tmp_path / "out", adapter=made.adapter)


@torch.no_grad()
def test_trained_biases_under_two_names(tmp_path: Path) -> None:
    """BERT's head has one bias under two names, and peft saves both."""
    made = Made(tmp_path, "bert/masked-lm", ends=("query",), bias="all")
    new = load_file(made.base / "model.safetensors")["cls.predictions.bias"] + 1
    ends = ("bias", "decoder.bias")
    more = {f"base_model.model.cls.predictions.{end}": new.clone() for end in ends}
    place = made.adapter / "adapter_model.safetensors"
    save_file({**made.factors, **more}, place, {"format": "pt"})
    model = zoo.load(made.base, adapter=made.adapter)
    assert model.head.bias is model.head.decoder.bias
    assert model.head.bias.equal(new)
    assert model.merge_adapter().config.tied


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("use_dora", True, "use_dora: True is not implemented"),
        ("peft_type", "LOHA", "peft_type: 'LOHA'"),
        ("use_dora", True, "Merge it in peft"),
        ("lora_bias", True, "lora_bias: True is not implemented"),
        ("trainable_token_indices", [3], "trainable_token_indices"),
        ("layer_replication", [[0, 2], [1, 3]], "layer_replication"),
        ("ensure_weight_tying", True, "ensure_weight_tying"),
        ("r", 0, "r: expected a positive whole number"),
        ("lora_alpha", "8", "lora_alpha: expected a number"),
        ("init_lora_weights", "pissa", "changed the base weights"),
        ("rank_pattern", {"(a+)+": 2}, "repeats a group that itself repeats"),
        ("rank_pattern", {"(.?){60}x": 2}, "repeats a group that itself repeats"),
        ("rank_pattern", {".?" * 60 + "x": 2}, "may choose in more than 4096 ways"),
        ("alpha_pattern", {"(a|a)" * 60 + "x": 2}, "may choose in more than 4096 ways"),
        ("alpha_pattern", {"a*a*a*a*b": 2}, "may try all lengths of 4 repetitions"),
        ("rank_pattern", {"a*" * 10: 2}, "may try all lengths of 10 repetitions"),
        ("rank_pattern", {"(?i)c_attn": 2}, "no pattern: global flags not at the start"),
        ("rank_pattern", {"q_proj.*|a*a*a*": 2}, "may try all lengths of 3 repetitions"),
        ("rank_pattern", {r"a*a*\.*": 2}, "may try all lengths of 3 repetitions"),
        ("rank_pattern", {"a)|(b": 2}, "closes a group that it does not open"),
        ("alpha_pattern", {r"(a)\1": 2}, "has an escape of an unknown kind"),
        ("alpha_pattern", {"[[](a+)+$|x]]": 2}, "a class of characters with a bare ["),
        ("target_parameters", ["mlp.experts.gate_up_proj"], "target_parameters"),
    ],
)
def test_wrong_adapter_configs_are_refused(
    field: str, value: Any, message: str, tmp_path: Path
) -> None:
    model = build("llama")
    model.add_adapter(["q_proj"], r=2)
    model.save_adapter(tmp_path / "a")
    model.remove_adapter()
    place = tmp_path / "a" / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), field: value}))
    with pytest.raises(ConfigError, match=f"adapter_config.json:\n.*{field}") as error:
        model.load_adapter(tmp_path / "a")
    assert message in str(error.value)
    assert model.adapter is None


def test_too_many_patterns_and_modules_are_refused(monkeypatch: Any) -> None:
    settings = files.AdapterSettings(2, 4, ranks={f"a{n}": 2 for n in range(1000)})
    (problem,) = files._too_many(settings, [f"b{n}" for n in range(2000)])
    assert problem == f"1000 patterns for 2000 modules: more than {files.MOST_TRIES} pairs of them"
    (problem,) = files._too_many(settings, ["b" * 1000])
    assert "a name of 1000 characters" in problem
    (problem,) = files._too_many(settings, ["b\nc"])
    assert "a name of several lines" in problem
    assert not list(files._too_many(files.AdapterSettings(2, 4), ["b" * 1000] * 5000))


@pytest.mark.parametrize(
    ("pattern", "module", "fits"),
    [
        ("q_proj", "model.layers.1.q_proj", True),
        ("q_proj", "model.layers.1.xq_proj", False),
        (r"layers\.\d+\.(q|v)_proj", "model.layers.12.v_proj", True),
        (r"^model.*\.[qv]_proj", "model.layers.1.v_proj", True),
        (r"^layers.*\.[qv]_proj", "model.layers.1.v_proj", False),
        (r".*layers\.\d+\.mlp\..*", "model.layers.1.mlp.up_proj", True),
        ("a|b.c", "x.b.c", True),
        ("q_proj", "q_proj\n", True),
    ],
)
def test_rank_patterns_match_peft(pattern: str, module: str, fits: bool) -> None:
    assert (re.match(rf"(.*\.)?({pattern})$", module) is not None) is fits
    assert not files._bad_pattern(pattern)
    assert files._is_named(files._compiled(pattern), module) is fits


def test_wrong_adapter_tensors_are_refused(tmp_path: Path) -> None:
    model = build("llama")
    model.add_adapter(["q_proj"], r=2)
    model.save_adapter(tmp_path / "a")
    model.remove_adapter()
    place = tmp_path / "a" / "adapter_model.safetensors"
    good, begin = load_file(place), "base_model.model.model.layers.0.self_attn."
    for name, tensors, message in (
        (
            "half",
            {k: x for k, x in good.items() if "0.self_attn.q_proj.lora_B" not in k},
            "without",
        ),
        ("prefix", {"q_proj.lora_A.weight": torch.ones(2, 2)}, "does not begin with"),
        ("dora", {**good, f"{begin}q_proj.lora_magnitude_vector": torch.ones(3)}, "implemented"),
        ("empty", {}, "no tensors"),
        ("unknown", {k.replace("q_proj", "qq_proj"): x for k, x in good.items()}, "Did you mean"),
        ("rank", {k: x[:1] if "lora_A" in k else x for k, x in good.items()}, "expected [2 in]"),
        (
            "named",
            {k.replace("A.", "A.default."): x for k, x in good.items()},
            "not as peft saves it",
        ),
        ("nan", {k: x * float("nan") for k, x in good.items()}, "[0, 0] is nan"),
        ("resized", {**good, "base_model.model.lm_head.weight": torch.ones(140, 72)}, "resize"),
        ("shape", {k: x[:, :4] if "lora_A" in k else x for k, x in good.items()}, "factors for"),
    ):
        tensors = {k: x.contiguous() for k, x in tensors.items()}
        save_file(tensors, place, {"format": "pt"})
        with pytest.raises(PlanError) as error:
            model.load_adapter(tmp_path / "a")
        assert message in str(error.value), name
        assert model.adapter is None
        assert not any(isinstance(part, Lora) for part in model.modules())
    with pytest.raises(NotACheckpoint, match="no adapter"):
        model.load_adapter(tmp_path)
    with pytest.raises(NotACheckpoint, match="an adapter is read from a local directory"):
        model.load_adapter("hf:org/adapter")


def test_operations_without_or_with_an_adapter_are_refused(tmp_path: Path) -> None:
    model = build("gpt2")
    with pytest.raises(UsageError, match="has no adapter"):
        model.merge_adapter()
    with pytest.raises(UsageError, match="Did you mean c_attn"):
        model.add_adapter(["c_atn"])
    for options, message in (
        ({"r": 0}, "r: "),
        ({"dropout": 2}, "dropout: "),
        ({"alpha": "x"}, "alpha"),
    ):
        with pytest.raises(UsageError, match=message):
            model.add_adapter(["wte"], **options)
    model.add_adapter(["wte"], r=2)
    with pytest.raises(UsageError, match="merge it first"):
        model.add_adapter(["c_attn"])
    with pytest.raises(UsageError, match="save_adapter"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(UsageError, match="merge_adapter"):
        zoo.prepare(model)
    with pytest.raises(UsageError, match="no adapter to merge"):
        zoo.load(tmp_path, merge=True)


# --- an adapter in the directory of full weights ------------------------------------------------


def both(place: Path) -> Made:
    """A base whose directory contains an adapter too."""
    made = Made(place, "gpt2/base", base_model_name_or_path="org/base")
    for path in made.adapter.iterdir():
        (made.base / path.name).write_bytes(path.read_bytes())
    return made


WAYS_OUT = r"adapter \(adapter_config\.json of org/base\).*--adapter --to hf.*: adapter=False"


def test_a_checkpoint_with_an_adapter_beside_it_needs_a_choice(tmp_path: Path) -> None:
    made = both(tmp_path)
    commands: list[Callable[..., Any]] = [
        zoo.load,
        zoo.models.gpt2.Model.from_pretrained,
        zoo.perplexity,
        zoo.verify,
        zoo.diff,
        lambda ref, *more: zoo.convert(ref, tmp_path / "out", to="native"),
        lambda ref, *more: dry_run(ref),
        lambda ref, *more: zoo.load(ref / "model.safetensors"),
    ]
    for command in commands:
        with pytest.raises(AmbiguousCheckpoint, match=WAYS_OUT):
            command(made.base, *["a text"] * (command is zoo.perplexity))
    assert not (tmp_path / "out").exists()
    assert "of org/base" in zoo.info(made.base).adapter
    assert zoo.info(tmp_path / "merged").adapter == ""
    assert zoo.load(made.base, weights="random")
    assert not zoo.diagnose(made.base).ok


def test_the_adapter_beside_the_weights_is_applied_or_left_out(tmp_path: Path) -> None:
    made = both(tmp_path)
    model = zoo.load(made.base, adapter=True)
    assert model.adapter is not None
    assert distance(run(model), truth(made)) < FP64
    assert distance(run(zoo.load(made.base, adapter=True, merge=True)), truth(made)) < FP64
    base = run(zoo.load(made.base, adapter=False))
    assert distance(base, truth(made)) > 0.1
    assert distance(run(zoo.load(made.base, adapter=made.base)), truth(made)) < FP64
    for adapter, wanted in ((True, truth(made)), (False, base)):
        out = zoo.convert(made.base, tmp_path / f"{adapter}", to="hf", adapter=adapter)
        assert not (out / "adapter_config.json").exists()
        assert distance(run(zoo.load(out)), wanted) < FP64


def test_wrong_adapter_options_are_refused(tmp_path: Path) -> None:
    made = Made(tmp_path, "gpt2/base")
    with pytest.raises(NotACheckpoint, match=r"no adapter_config\.json in it"):
        zoo.load(made.base, adapter=True)
    with pytest.raises(UsageError, match="no adapter to merge"):
        zoo.load(made.base, adapter=False, merge=True)
    with pytest.raises(UsageError, match="random weights"):
        zoo.load("gpt2", weights="random", adapter=True)
    for adapter in (3, [made.adapter]):
        with pytest.raises(UsageError, match="expected a directory, True or False"):
            zoo.load(made.base, adapter=adapter)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="expected a directory, True or False"):
            zoo.convert(made.base, tmp_path / "out", adapter=adapter)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("org/base", r"an adapter of org/base, and no model.*zoo\.load\('hf:org/base', adapter="),
        (None, r"an adapter, and no model.*zoo\.load\('BASE'.*zoo convert BASE --adapter "),
        (7, "an adapter, and no model"),
        ("x" * 5000, "an adapter of xxx"),
    ],
)
def test_loading_an_adapter_alone_names_its_base(base: Any, says: str, tmp_path: Path) -> None:
    place = Made(tmp_path, "gpt2/base", base_model_name_or_path=base).adapter
    for ref in (place, place / "adapter_model.safetensors", place / "adapter_config.json"):
        with pytest.raises(NotACheckpoint, match=says) as caught:
            zoo.load(ref)
        assert len(str(caught.value)) < 4000


@pytest.mark.slow
def test_commands_report_a_merged_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = both(tmp_path)
    base = str(made.base)
    (made.base / "text").write_text("ab", encoding="utf-8")
    for command in (["score", base, f"{base}/text"], ["verify", base], ["diff", base]):
        assert main(command) != 0
        error = capsys.readouterr().err
        assert "is merged already: --no-adapter" in error and "adapter=" not in error
        assert ("To apply it: --adapter, or" in error) == (command[0] != "verify")
        assert main([*command, "--no-adapter"]) == (command[0] == "score")  # without a tokenizer
        assert "is merged already" not in capsys.readouterr().err
    assert main(["info", base]) == 0
    assert "adapter_config.json of org/base" in capsys.readouterr().out
    for n, how in enumerate((["--adapter"], ["--adapter", base], ["--no-adapter"])):
        out = tmp_path / str(n)
        assert main(["convert", base, "--to", "hf", "--out", str(out), "--quiet", *how]) == 0
        close = distance(run(zoo.load(out)), truth(made)) < FP64
        assert close == (how != ["--no-adapter"])


# --- against peft itself, where it is installed --------------------------------------------------

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear": ("llama/base", {"target_modules": "all-linear", "use_rslora": True}),
    "regex": ("llama/base", {"target_modules": r".*layers\.[01]\.self_attn\.(q|v)_proj"}),
    "layers": ("llama/base", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "patterns": (
        "llama/base",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 11},
        },
    ),
    "embeddings": ("llama/base", {"target_modules": ["embed_tokens", "lm_head"]}),
    "saved": (
        "llama/base",
        {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm", "lm_head"]},
    ),
    "conv1d": ("gpt2/base", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "bias": ("bert/masked-lm", {"target_modules": ["query"], "bias": "all"}),
    "own bias": ("bert/masked-lm", {"target_modules": ["query"], "bias": "lora_only"}),
    "fused": ("neox/base", {"target_modules": ["query_key_value", "dense"]}),
    "ragged": ("falcon/grouped", {"target_modules": ["query_key_value"]}),
    "heads": ("bloom/base", {"target_modules": ["query_key_value"]}),
    "deberta": ("deberta/base", {"target_modules": ["in_proj", "pos_proj"]}),
    "t5": ("t5/gated-own-head", {"target_modules": ["q", "wi_0", "wo", "lm_head"]}),
    "experts": ("mixtral/base", {"target_modules": ["q_proj", "v_proj"]}),
}
NARROW = {
    "regex": torch.bfloat16,
    "conv1d": torch.float32,
    "saved": torch.bfloat16,
    "deberta": torch.float32,  # the library keeps some biases in fp32 always
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_saved_peft_adapters_match_peft(name: str, tmp_path: Path) -> None:
    """Beside the weights within noise; merged in memory or by convert to the same bits."""
    peft, library = pytest.importorskip("peft"), pytest.importorskip("transformers")
    key, config = VARIANTS[name]
    dtype, (architecture, variant) = NARROW.get(name, torch.float64), key.split("/")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    kind = hot_checkpoint(registry.architectures()[architecture], variant, base, dtype=dtype)

    def reference() -> Any:
        # grouped products of experts need larger sizes
        more = {"experts_implementation": "eager"} if name == "experts" else {}
        return getattr(library, kind).from_pretrained(base, dtype=dtype, **more)

    made = peft.get_peft_model(reference(), peft.LoraConfig(r=4, **config))
    torch.manual_seed(4)
    for p in made.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p) * 0.1)
    made.save_pretrained(adapter)
    theirs = peft.PeftModel.from_pretrained(reference(), adapter).eval()
    model = zoo.load(base, adapter=adapter)
    if dtype == torch.float64:
        lifted = Reference(base, kind, torch.float64, lifted=True)
        with_adapter = peft.PeftModel.from_pretrained(lifted.model, adapter).eval()
        more = {"decoder_input_ids": IDS} if architecture == "t5" else {}
        with Lift():
            wanted = with_adapter(input_ids=IDS, **more)[0]
        assert distance(run(model), wanted) < FP64
    theirs.merge_and_unload().save_pretrained(tmp_path / "theirs")
    model.merge_adapter().save_pretrained(tmp_path / "mine")
    zoo.convert(base, tmp_path / "converted", adapter=adapter)
    wanted = load_file(tmp_path / "theirs" / "model.safetensors")
    for place in ("mine", "converted"):
        mine = load_file(tmp_path / place / "model.safetensors")
        assert mine.keys() == wanted.keys()
        assert all(x.equal(mine[n]) and x.dtype == mine[n].dtype for n, x in wanted.items())


@pytest.mark.parametrize("key", ["gpt2/base", "llama/base", "neox/base", "t5/gated-own-head"])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_peft_loads_a_saved_adapter_and_merges_to_the_same_bytes(key: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made = Made(tmp_path, key)
    model = zoo.load(made.base)
    model.add_adapter([end for end in ADAPTED[key] if end not in ("wpe", "embed_out")], r=2)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p) * 0.1)
    model.save_adapter(tmp_path / "new")
    reference = Reference(made.base, made.reference_class, torch.float64, lifted=True)
    theirs = peft.PeftModel.from_pretrained(reference.model, tmp_path / "new").eval()
    more = {"decoder_input_ids": IDS} if key.startswith("t5") else {}
    with Lift():
        wanted = theirs(input_ids=IDS, use_cache=False, **more)[0]
    assert distance(run(model), wanted) < FP64
    model.merge_adapter().save_pretrained(tmp_path / "mine")
    theirs.merge_and_unload().save_pretrained(tmp_path / "theirs")
    mine, wanted = (load_file(tmp_path / n / "model.safetensors") for n in ("mine", "theirs"))
    assert mine.keys() == wanted.keys()
    assert all(mine[n].equal(x) for n, x in wanted.items())


HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT2ForSequenceClassification": ("gpt2/base", "SEQ_CLS", {"target_modules": ["c_attn"]}),
    "BertForSequenceClassification": ("bert/pretraining", "SEQ_CLS", {"target_modules": ["query"]}),
    "RobertaForSequenceClassification": (
        "roberta/masked-lm",
        "SEQ_CLS",
        {"target_modules": ["value"]},
    ),
    "DistilBertForSequenceClassification": (
        "distilbert/masked-lm",
        "SEQ_CLS",
        {"target_modules": ["q_lin"]},
    ),
    "BertForTokenClassification": (
        "bert/masked-lm",
        "TOKEN_CLS",
        {"target_modules": ["query"]},
    ),
    "BertForQuestionAnswering": (
        "bert/masked-lm",
        "QUESTION_ANS",
        {"target_modules": ["query"]},
    ),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_heads_trained_by_peft_are_loaded(kind: str, tmp_path: Path) -> None:
    peft, library = pytest.importorskip("peft"), pytest.importorskip("transformers")
    key, task, config = HEADS[kind]
    (name, variant), base, adapter = key.split("/"), tmp_path / "base", tmp_path / "adapter"
    hot_checkpoint(registry.architectures()[name], variant, base, dtype=torch.float64)
    labels = 2 if task == "QUESTION_ANS" else 5

    def reference() -> Any:
        more = {"num_labels": labels, "dtype": torch.float64}
        more |= (
            {"pad_token_id": 0} if name == "gpt2" else {}
        )  # the reference needs it to classify a batch
        return getattr(library, kind).from_pretrained(base, **more)

    made = peft.get_peft_model(reference(), peft.LoraConfig(r=4, task_type=task, **config))
    torch.manual_seed(4)
    for p in made.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p) * 0.1)
    made.save_pretrained(adapter)
    theirs = peft.PeftModel.from_pretrained(reference(), adapter).eval().merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    model = zoo.load(base, adapter=adapter)
    assert distance(run(model), theirs(input_ids=IDS)[0]) < 1e-5  # its norms stay in fp32
    zoo.convert(base, tmp_path / "mine", adapter=adapter)
    mine, wanted = (load_file(tmp_path / n / "model.safetensors") for n in ("mine", "theirs"))
    assert mine.keys() == wanted.keys()
    assert all(mine[n].equal(x) for n, x in wanted.items())
    ours, theirs = (
        json.loads((tmp_path / n / "config.json").read_text()) for n in ("mine", "theirs")
    )
    assert ours["architectures"] == theirs["architectures"] == [kind]
