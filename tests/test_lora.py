"""LoRA directories of peft's on native models: apart, merged, trained, and given back."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build, hot
from torch import Tensor, nn

import zoo
from zoo import registry
from zoo.cli import main
from zoo.components.moe import Experts
from zoo.errors import ConfigError, NotACheckpoint, PlanError, UsageError
from zoo.lora.layers import Lora
from zoo.parity.fixtures import hot_checkpoint
from zoo.parity.reference import Lift, Reference

FP64 = 1e-10  # of the outputs' scale, as parity has it
IDS = torch.randint(3, 30, (2, 11), generator=torch.Generator().manual_seed(5))

# architecture/variant -> ends of the adapted modules' names on disk
ADAPTED = {
    "gpt2/base": ("c_attn", "c_proj", "wpe"),
    "llama/base": ("q_proj", "k_proj", "o_proj", "down_proj"),
    "neox/base": ("query_key_value", "dense_h_to_4h", "embed_out"),
    "bert/masked-lm": ("query", "output.dense", "token_type_embeddings"),
    "falcon/grouped": ("query_key_value",),
    "mixtral/base": ("q_proj", "gate", "1.w1", "2.w1", "2.w2", "3.w3"),
    "t5/gated-own-head": ("q", "k", "wi_0", "wo", "lm_head"),
    "deberta/base": ("in_proj", "pos_proj"),
    "gemma2/base": ("q_proj", "up_proj"),
}
TURNED = ("gpt2",)  # kernels that lie (in, out)


class Made:
    """A checkpoint, an adapter for it as peft would save it, and the two merged by hand."""

    def __init__(self, place: Path, key: str, **config: Any) -> None:
        name, variant = key.split("/")
        self.base, self.adapter, self.merged = (place / n for n in ("base", "adapter", "merged"))
        entry = registry.architectures()[name]
        self.reference_class = hot_checkpoint(entry, variant, self.base, dtype=torch.float64)
        tensors = load_file(self.base / "model.safetensors")
        torch.manual_seed(3)
        settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "bias": "none", **config}
        self.factors: dict[str, Tensor] = {}
        for end in ADAPTED[key]:
            found = [n for n in tensors if n.endswith(f".{end}.weight") or n == f"{end}.weight"]
            assert found, end
            for weight in found:
                self._adapt(tensors, weight.removesuffix(".weight"), settings, name in TURNED)
        self.adapter.mkdir()
        save_file(self.factors, self.adapter / "adapter_model.safetensors", {"format": "pt"})
        text = json.dumps({**settings, "target_modules": list(ADAPTED[key])})
        (self.adapter / "adapter_config.json").write_text(text)
        self.merged.mkdir()
        save_file(tensors, self.merged / "model.safetensors", {"format": "pt"})
        (self.merged / "config.json").write_bytes((self.base / "config.json").read_bytes())

    def _adapt(
        self, tensors: dict[str, Tensor], module: str, settings: dict[str, Any], turned: bool
    ) -> None:
        weight, rank, scale = tensors[f"{module}.weight"], settings["r"], 0.0
        for end, value in settings.get("rank_pattern", {}).items():
            rank = value if module.endswith(end) else rank
        alpha = settings["lora_alpha"]
        for end, value in settings.get("alpha_pattern", {}).items():
            alpha = value if module.endswith(end) else alpha
        scale = alpha / rank ** (0.5 if settings.get("use_rslora") else 1)
        embedding = "embeddings" in module or module.endswith("wpe")
        out, into = weight.shape if not (embedding or turned) else weight.mT.shape
        a, b = torch.randn(rank, into).double() * 0.1, torch.randn(out, rank).double() * 0.1
        product = scale * b @ a
        tensors[f"{module}.weight"] = weight + (product.mT if embedding or turned else product)
        ends = ("lora_embedding_A", "lora_embedding_B")
        ends = ends if embedding else ("lora_A.weight", "lora_B.weight")
        for end, factor in zip(ends, (a, b), strict=True):
            self.factors[f"base_model.model.{module}.{end}"] = factor.contiguous()


def run(model: Any, ids: Tensor = IDS) -> Tensor:
    more = {"decoder_input_ids": ids} if "t5" in type(model).__module__ else {}
    out = model(ids, **more)
    return out[0] if isinstance(out, tuple) else out


def distance(x: Tensor, y: Tensor) -> float:
    return ((x - y).abs().max() / y.pow(2).mean().sqrt()).item()


def truth(made: Made) -> Tensor:
    """What the reference computes with the merged weights."""
    reference = Reference(made.merged, made.reference_class, torch.float64, lifted=True)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    assert not reference.problems
    return next(iter(reference(inputs).values())).detach()


@pytest.mark.parametrize("key", ADAPTED)
@torch.no_grad()
def test_apart_and_merged_are_the_reference_with_merged_weights(key: str, tmp_path: Path) -> None:
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
def test_scales_and_ranks(config: dict[str, Any], tmp_path: Path) -> None:
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
    """The reference's weight with factors of its own, in the layout of its file."""

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


@pytest.mark.parametrize(
    "key", ["gpt2/base", "llama/base", "neox/base", "bert/masked-lm", "t5/gated-own-head"]
)
def test_one_step_of_training(key: str, tmp_path: Path) -> None:
    made = Made(tmp_path, key)
    reference = Reference(made.base, made.reference_class, torch.float64, lifted=True)
    reference.model.requires_grad_(False)
    beside: dict[str, Beside] = {}
    for name, a in made.factors.items():
        if not name.endswith(("lora_A.weight", "lora_embedding_A")):
            continue
        b = made.factors[name.replace("_A", "_B")]
        disk = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        # in memory NeoX's head has another name than in its files
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
def test_biases_and_whole_modules(tmp_path: Path) -> None:
    made = Made(tmp_path, "gpt2/base", bias="all")
    held = load_file(made.base / "model.safetensors")
    names = ["transformer.h.0.attn.c_attn.bias", "transformer.h.1.mlp.c_fc.bias"]
    names += ["transformer.h.1.ln_2.weight", "transformer.h.1.ln_2.bias"]
    new = {name: held[name] + 0.5 for name in names}
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
def test_a_narrow_adapter_is_trained_wider_and_given_back_as_it_was(tmp_path: Path) -> None:
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


def test_a_new_adapter(tmp_path: Path) -> None:
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


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("use_dora", True, "use_dora: True is not implemented"),
        ("peft_type", "LOHA", "peft_type: 'LOHA'"),
        ("r", 0, "r: expected a positive whole number"),
        ("lora_alpha", "8", "lora_alpha: expected a number"),
        ("init_lora_weights", "pissa", "changed the base weights"),
        ("rank_pattern", {"(a+)+": 2}, "may take for ever"),
        ("target_parameters", ["mlp.experts.gate_up_proj"], "target_parameters"),
    ],
)
def test_configs_that_are_refused(field: str, value: Any, told: str, tmp_path: Path) -> None:
    model = build("llama")
    model.add_adapter(["q_proj"], r=2)
    model.save_adapter(tmp_path / "a")
    model.remove_adapter()
    place = tmp_path / "a" / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), field: value}))
    with pytest.raises(ConfigError, match=f"adapter_config.json:\n.*{field}") as error:
        model.load_adapter(tmp_path / "a")
    assert told in str(error.value)
    assert model.adapter is None


def test_tensors_that_are_refused(tmp_path: Path) -> None:
    model = build("llama")
    model.add_adapter(["q_proj"], r=2)
    model.save_adapter(tmp_path / "a")
    model.remove_adapter()
    place = tmp_path / "a" / "adapter_model.safetensors"
    good, begin = load_file(place), "base_model.model.model.layers.0.self_attn."
    for name, tensors, told in (
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
        ("shape", {k: x[:, :4] if "lora_A" in k else x for k, x in good.items()}, "factors for"),
    ):
        tensors = {k: x.contiguous() for k, x in tensors.items()}
        save_file(tensors, place, {"format": "pt"})
        with pytest.raises(PlanError) as error:
            model.load_adapter(tmp_path / "a")
        assert told in str(error.value), name
        assert model.adapter is None
        assert not any(isinstance(part, Lora) for part in model.modules())
    with pytest.raises(NotACheckpoint, match="no adapter"):
        model.load_adapter(tmp_path)


def test_what_cannot_be_done_with_an_adapter(tmp_path: Path) -> None:
    model = build("gpt2")
    with pytest.raises(UsageError, match="has no adapter"):
        model.merge_adapter()
    with pytest.raises(UsageError, match="Did you mean c_attn"):
        model.add_adapter(["c_atn"])
    for options, told in (
        ({"r": 0}, "r: "),
        ({"dropout": 2}, "dropout: "),
        ({"alpha": "x"}, "alpha"),
    ):
        with pytest.raises(UsageError, match=told):
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


def test_convert_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Made(tmp_path, "llama/base")
    out = tmp_path / "out"
    asked = ["convert", str(made.base), "--adapter", str(made.adapter), "--to", "hf"]
    assert main([*asked, "--out", str(out)]) == 0
    mine, wanted = (load_file(d / "model.safetensors") for d in (out, made.merged))
    assert mine.keys() == wanted.keys()
    assert all(distance(mine[n], x) < 1e-14 for n, x in wanted.items())
    assert main([*asked, "--dry-run"]) == 0
    assert "changed by the adapter: 12 tensors" in capsys.readouterr().out


# --- against peft itself, where it is installed --------------------------------------------------


@pytest.mark.parametrize("key", ["gpt2/base", "llama/base", "neox/base", "t5/gated-own-head"])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_peft_reads_what_is_written_and_merges_to_the_same_bytes(key: str, tmp_path: Path) -> None:
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
