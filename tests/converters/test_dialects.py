"""Dialects: every one that a spec has to every other and back; each against files made by hand."""

import json
import struct
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import zoo
from converters.block_codes import in_units, int8_groups
from converters.containers import open_place
from converters.dialects import every_dialect
from converters.formats import TensorInfo, gguf, llama2c
from converters.formats.torch_zip import TorchZipReader
from converters.lazy import Lazy
from converters.manifest import check
from converters.spec import Container, load_spec
from zoo import registry
from zoo.checkpoints.locate import locate
from zoo.cli.app import main
from zoo.errors import (
    AmbiguousCheckpoint,
    CheckpointError,
    ConfigError,
    CorruptCheckpoint,
    LossyExport,
    MissingShard,
    MissingTensors,
    NotACheckpoint,
    OutputExists,
    ShapeMismatch,
    TieConflict,
    UnexpectedTensors,
    UsageError,
    ZooError,
)
from zoo.parity.fixtures import write
from zoo.parity.gates import trips
from zoo.parity.gates.trips import differences
from zoo.saving.convert import plan_output

DIALECTS = {(spec.name, d.name): (spec, d) for spec, d, _ in every_dialect()}
EVERY = {key: each for key, each in DIALECTS.items() if each[1].container.file}  # and written


def entry_of(spec: str) -> registry.Architecture:
    return next(e for e in registry.architectures().values() if e.spec == spec)


def common_fields(spec: str, *dialects: str) -> dict[str, Any]:
    return trips.common_fields(entry_of(spec), *dialects)


def model_of(spec: str, *dialects: str, **changes: Any) -> Any:
    return trips.model_of(entry_of(spec), *dialects, **changes)


def asked(model: Any, dialect: str, spec: str) -> dict[str, Any]:
    """What a dialect has to be told."""
    actual = EVERY.get((spec, dialect))
    return {name: getattr(model.config, name) for name in actual[1].required} if actual else {}


def test_a_spec_laid_over_another_has_its_hf_alone() -> None:
    assert list(load_spec("mistral").dialects) == ["hf"]


# --- against files made by hand ------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """A checkpoint that the reference wrote: its directory, tensors, config."""
    from safetensors.torch import load_file

    place = tmp_path_factory.mktemp("llama") / "hf"
    fields = registry.architectures()["llama"].variants["base"]["config"] | {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 134,
        "intermediate_size": 102,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }
    write("LlamaForCausalLM", fields, place)
    config = json.loads((place / "config.json").read_text())
    return place, load_file(place / "model.safetensors"), config


def meta_files(
    tensors: dict[str, Tensor], config: dict[str, Any], shards: int, columns: bool
) -> list[dict[str, Tensor]]:
    """As Meta's files have them: rows in pairs, cut where its layers are."""

    def pairs(w: Tensor, heads: int) -> Tensor:
        rows, dim = w.shape
        return w.view(heads, 2, rows // heads // 2, dim).transpose(1, 2).reshape(rows, dim)

    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    whole: dict[str, tuple[Tensor, int | None]] = {
        "tok_embeddings.weight": (tensors["model.embed_tokens.weight"], 1 if columns else 0),
        "norm.weight": (tensors["model.norm.weight"], None),
        "output.weight": (tensors["lm_head.weight"], 0),
        "rope.freqs": (torch.arange(4.0), None),
    }
    for n in range(config["num_hidden_layers"]):
        theirs, mine = f"model.layers.{n}.", f"layers.{n}."
        q, k = (tensors[f"{theirs}self_attn.{x}_proj.weight"] for x in "qk")
        whole |= {
            f"{mine}attention.wq.weight": (pairs(q, heads), 0),
            f"{mine}attention.wk.weight": (pairs(k, kv_heads), 0),
            f"{mine}attention.wv.weight": (tensors[f"{theirs}self_attn.v_proj.weight"], 0),
            f"{mine}attention.wo.weight": (tensors[f"{theirs}self_attn.o_proj.weight"], 1),
            f"{mine}feed_forward.w1.weight": (tensors[f"{theirs}mlp.gate_proj.weight"], 0),
            f"{mine}feed_forward.w2.weight": (tensors[f"{theirs}mlp.down_proj.weight"], 1),
            f"{mine}feed_forward.w3.weight": (tensors[f"{theirs}mlp.up_proj.weight"], 0),
            f"{mine}attention_norm.weight": (tensors[f"{theirs}input_layernorm.weight"], None),
            f"{mine}ffn_norm.weight": (tensors[f"{theirs}post_attention_layernorm.weight"], None),
        }
    return [
        {
            name: (x if axis is None else x.chunk(shards, axis)[shard]).clone()
            for name, (x, axis) in whole.items()
        }
        for shard in range(shards)
    ]


def meta(directory: Path, files: list[dict[str, Tensor]], params: dict[str, Any] | None) -> Path:
    directory.mkdir(exist_ok=True)
    for n, tensors in enumerate(files):
        torch.save(tensors, directory / f"consolidated.{n:02}.pth")
    if params is not None:
        (directory / "params.json").write_text(json.dumps(params))
    return directory


def params_of(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    data = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "vocab_size": -1,
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": 5000.0,
        "multiple_of": 256,
    }
    return data | more


EVEN = {"vocab": 134, "hidden": 102}  # what two files can share
IDS = torch.arange(33).view(1, 33) * 3


@torch.no_grad()
@pytest.mark.parametrize(("shards", "columns"), [(1, False), (2, False), (2, True)])
def test_meta_files_load_and_convert_back(
    llama: Any, tmp_path: Path, shards: int, columns: bool
) -> None:
    """By the layout that is published; the logits are those of the reference's own files."""
    hf, tensors, config = llama
    files = meta_files(tensors, config, shards, columns)
    place = meta(tmp_path / "meta", files, params_of(config))
    model = zoo.load(place)
    assert torch.equal(model(IDS), zoo.load(hf)(IDS))
    assert model.config.vocab == 134 and model.config.hidden == 102
    assert set(model.provenance.dropped.values()) == {"rotary frequencies follow from the config"}
    zoo.save(model, tmp_path / "same", to="meta")  # what params.json said, it says again
    assert json.loads((tmp_path / "same" / "params.json").read_text()) == params_of(config)
    # given back: joined and split as they were, norms in each file
    layout = {"shards": shards, "columns": int(columns)} if columns else {"shards": shards}
    zoo.convert(place, tmp_path / "hf", to="hf")
    zoo.convert(tmp_path / "hf", tmp_path / "back", to="meta", layout=layout)
    for n, weights in enumerate(files):
        again = torch.load(tmp_path / "back" / f"consolidated.{n:02}.pth", weights_only=True)
        weights.pop("rope.freqs")
        assert again.keys() == weights.keys()
        assert all(torch.equal(again[name], weights[name]) for name in weights)
    # and Meta's own arithmetic makes the hidden size of what is written
    data = json.loads((tmp_path / "back" / "params.json").read_text())
    hidden = int(data["ffn_dim_multiplier"] * int(2 * 4 * data["dim"] / 3))
    assert -(-hidden // data["multiple_of"]) * data["multiple_of"] == 102


@torch.no_grad()
def test_meta_scaled_rope(llama: Any, tmp_path: Path) -> None:
    _, tensors, config = llama
    files = meta_files(tensors, config, 1, False)
    place = meta(tmp_path / "meta", files, params_of(config, use_scaled_rope=True))
    model = zoo.load(place, config={"max_seq_len": 100})
    assert model.config.rope.to_json()["rope_type"] == "llama3" and model.config.positions == 100
    assert model.config.rope.to_json()["factor"] == 8.0
    zoo.save(model, tmp_path / "back", to="meta")
    assert json.loads((tmp_path / "back" / "params.json").read_text())["use_scaled_rope"] is True
    linear = model.config.to_dict()["rope"] | {"factor": 4.0}
    model = zoo.load(place, config={"rope": linear})
    with pytest.raises(LossyExport, match=r"rope: .*4.0.* cannot be said"):
        zoo.save(model, tmp_path / "other", to="meta")


def test_missing_or_inconsistent_shards_are_refused(llama: Any, tmp_path: Path) -> None:
    _, tensors, config = llama
    files = meta_files(tensors, config, 2, False)
    place = meta(tmp_path / "meta", files, params_of(config))
    (place / "consolidated.01.pth").rename(place / "consolidated.02.pth")
    with pytest.raises(MissingShard, match=r"1 of 3 files are missing: consolidated\.01\.pth"):
        zoo.load(place)
    (place / "consolidated.02.pth").unlink()
    with pytest.raises(MissingShard, match=r"1 of 2 files are there \(consolidated\.00\.pth\)"):
        zoo.load(place)
    files[1]["layers.1.ffn_norm.weight"][3] += 1
    meta(place, files, params_of(config))
    with pytest.raises(TieConflict, match=r"0/layers\.1\.ffn_norm\.weight.*1/layers\.1\.ffn_norm"):
        zoo.load(place)
    (place / "params.json").write_text(json.dumps(params_of(config, moe_args={"experts": 4})))
    with pytest.raises(ConfigError, match=r"params\.json:.*\n.*moe_args: unknown field"):
        zoo.load(place)


@pytest.mark.parametrize("shard", [0, 1])
def test_a_shard_that_lacks_a_replicated_tensor_is_refused(
    llama: Any, tmp_path: Path, shard: int
) -> None:
    _, tensors, config = llama
    files = meta_files(tensors, config, 2, False)
    del files[shard]["layers.1.ffn_norm.weight"]
    place = meta(tmp_path / "meta", files, params_of(config))
    with pytest.raises(MissingTensors, match=rf"{shard}/layers\.1\.ffn_norm\.weight"):
        zoo.load(place)


@torch.no_grad()
def test_meta_without_params(fixtures: Path, tmp_path: Path) -> None:
    """Meta's names and shapes as others made them, and nothing beside."""
    source = fixtures / "meta" / "tiny_fair_checkpoint.pt"
    with pytest.raises(ConfigError, match=r"nothing says n_heads .*config=\{'n_heads': …"):
        zoo.load(source)
    model = zoo.load(source, config={"n_heads": 4})
    c = model.config
    assert (c.dim, c.layers, c.hidden, c.vocab, c.tied) == (32, 2, 256, 500, False)
    zoo.convert(source, tmp_path / "meta", to="meta", config={"heads": 4})
    theirs = torch.load(source, weights_only=True, map_location="cpu")
    mine = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(directory, tensors) by the activation that the reference was given."""
    from safetensors.torch import load_file

    place = tmp_path_factory.mktemp("gpt2")

    @cache
    def make(act: str, tied: bool = True) -> tuple[Path, dict[str, Tensor]]:
        directory = place / f"{act}-{tied}"
        base = registry.architectures()["gpt2"].variants["default-inner"]["config"]
        more = {"activation_function": act, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": tied}
        write("GPT2LMHeadModel", base | more, directory)
        return directory, load_file(directory / "model.safetensors")

    return make


ARGS = {
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 40,
    "block_size": 53,
    "vocab_size": 113,
    "dropout": 0.0,
}
KERNELS = ("c_attn.weight", "attn.c_proj.weight", "c_fc.weight", "mlp.c_proj.weight")


def linear(tensors: dict[str, Tensor], before: str = "") -> dict[str, Tensor]:
    """nanoGPT's and minGPT's: the same names, kernels the other way round."""
    state = {
        before + name: (x.t() if name.endswith(KERNELS) else x).contiguous()
        for name, x in tensors.items()
    }
    return state | {f"{before}lm_head.weight": state[f"{before}transformer.wte.weight"]}


@torch.no_grad()
@pytest.mark.parametrize("before", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_checkpoints_load_and_convert_back(
    gpt2: Any, tmp_path: Path, before: str, bias: bool
) -> None:
    """As train.py leaves it: compiled or not, the optimizer's state and the run's beside it."""
    hf, tensors = gpt2("gelu")
    state = linear(tensors, before)
    if not bias:
        state = {name: x for name, x in state.items() if not name.endswith("bias")}
    state[f"{before}transformer.h.0.attn.bias"] = torch.ones(1, 1, 53, 53)
    moments = {0: {"step": torch.tensor(5.0), "exp_avg": torch.ones(3, 3)}}
    trained = {
        "model": OrderedDict(state),
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "model_args": ARGS | {"bias": bias},
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare", "betas": (0.9, 0.95), "compile": True},
    }
    torch.save(trained, tmp_path / "ckpt.pt")
    model = zoo.load(tmp_path / "ckpt.pt")
    expected = zoo.load(hf)
    if not bias:
        for name, parameter in expected.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    torch.testing.assert_close(model(IDS), expected(IDS), rtol=0, atol=0 if bias else 1e-5)
    assert model.config.bias is bias and model.config.act == "gelu"
    assert {"optimizer", "best_val_loss"} <= model.provenance.dropped.keys()
    # a dialect that has no word for absent biases holds zeros
    zoo.convert(tmp_path / "ckpt.pt", tmp_path / "hf", to="hf")
    again = zoo.load(tmp_path / "hf")
    assert again.config.bias is True
    torch.testing.assert_close(again(IDS), expected(IDS), rtol=0, atol=0)
    zoo.convert(tmp_path / "ckpt.pt", tmp_path / "native", to="native")
    zoo.convert(tmp_path / "native", tmp_path / "back", to="nanogpt")
    mine = torch.load(tmp_path / "back" / "ckpt.pt", weights_only=True)
    wanted = {n.removeprefix(before): x for n, x in state.items() if not n.endswith(".attn.bias")}
    assert mine["model"].keys() == wanted.keys() and mine["model_args"] == ARGS | {"bias": bias}
    assert all(torch.equal(mine["model"][name], x) for name, x in wanted.items())
    tied = mine["model"]["lm_head.weight"], mine["model"]["transformer.wte.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()  # one array in the file, as there


def llama2c_checkpoint(
    llama: tuple[Path, dict[str, Tensor], dict[str, Any]], before: str = "", **args: Any
) -> dict[str, Any]:
    """What llama2.c's train.py saves: Meta's names, output and embedding one array."""
    _, tensors, config = llama
    (state,) = meta_files(tensors, config, 1, False)
    del state["rope.freqs"]
    state["output.weight"] = state["tok_embeddings.weight"]
    moments = {0: {"step": torch.tensor(5.0), "exp_avg": torch.ones(3, 3)}}
    settings = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
        "multiple_of": 32,
        "max_seq_len": 256,
        "dropout": 0.1,
    }
    return {
        "model": OrderedDict((before + name, x) for name, x in state.items()),
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "model_args": settings | args,
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "tinystories", "vocab_source": "llama2", "compile": True},
    }


@torch.no_grad()
@pytest.mark.parametrize("before", ["", "_orig_mod."])
def test_llama2c_training_checkpoint_is_read_and_converted(
    llama: Any, tmp_path: Path, before: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = llama2c_checkpoint(llama, before)
    tensors["model"][f"{before}freqs_cos"] = torch.ones(256, 2)  # older versions saved the buffers
    torch.save(tensors, tmp_path / "ckpt.pt")
    model = zoo.load(tmp_path / "ckpt.pt")
    expected = zoo.load(llama[0], config={"rope_base": 1e4, "eps": 1e-5})
    expected.head.weight.copy_(expected.embed.weight)
    ids = torch.arange(33)[None] * 3
    assert torch.equal(model(ids), expected(ids))
    assert (model.config.tied, model.config.positions, model.config.eps) == (True, 256, 1e-5)
    dropped = model.provenance.dropped
    assert {"optimizer", "best_val_loss", f"{before}freqs_cos"} <= dropped.keys()
    assert dropped["optimizer"] == "not below 'model'"
    assert main(["info", str(tmp_path / "ckpt.pt")]) == 0
    assert "llama2c-ckpt" in capsys.readouterr().out
    for to in ("native", "hf", "llama2c", "gguf", "llama2c-ckpt"):
        zoo.convert(tmp_path / "ckpt.pt", tmp_path / to, to=to)
        assert torch.equal(zoo.load(tmp_path / to)(ids), model(ids))
    again = torch.load(tmp_path / "llama2c-ckpt" / "ckpt.pt", weights_only=True)
    assert again["model"].keys() == {n.removeprefix(before) for n in tensors["model"]} - {
        "freqs_cos"
    }
    assert all(torch.equal(x, tensors["model"][before + n]) for n, x in again["model"].items())


def test_faults_of_a_llama2c_training_checkpoint(llama: Any, tmp_path: Path) -> None:
    def fails(kind: type[ZooError], why: str, **args: Any) -> None:
        torch.save(llama2c_checkpoint(llama, **args), tmp_path / "ckpt.pt")
        with pytest.raises(kind, match=why):
            zoo.load(tmp_path / "ckpt.pt")

    layers = llama[2]["num_hidden_layers"]
    fails(ConfigError, f"n_layers: {layers} found, {layers + 1} declared", n_layers=layers + 1)
    fails(ConfigError, "n_layer: unknown field", n_layer=3)
    fails(ConfigError, "n_heads: 5 does not divide", n_heads=5)
    tensors = llama2c_checkpoint(llama)
    del tensors["model_args"]["n_heads"]
    torch.save(tensors, tmp_path / "ckpt.pt")
    with pytest.raises(ConfigError, match="nothing says n_heads"):
        zoo.load(tmp_path / "ckpt.pt")


@torch.no_grad()
def test_mingpt_checkpoints_load(gpt2: Any, tmp_path: Path) -> None:
    hf, tensors = gpt2("gelu_new", False)
    state = linear(tensors) | {"lm_head.weight": tensors["lm_head.weight"]}
    state |= {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 53, 53) for n in range(3)}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="minGPT's state_dict: nothing says n_head "):
        zoo.load(tmp_path / "model.pt")
    model = zoo.load(tmp_path / "model.pt", config={"heads": 4})
    assert torch.equal(model(IDS), zoo.load(hf)(IDS)) and not model.config.tied


@torch.no_grad()
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_checkpoints_of_the_book_load(
    gpt2: Any, tmp_path: Path, biased: bool, nested: bool
) -> None:
    hf, tensors = gpt2("gelu_new", False)
    state = {
        "tok_emb.weight": tensors["transformer.wte.weight"],
        "pos_emb.weight": tensors["transformer.wpe.weight"],
        "final_norm.scale": tensors["transformer.ln_f.weight"],
        "final_norm.shift": tensors["transformer.ln_f.bias"],
        "out_head.weight": tensors["lm_head.weight"],
    }
    for n in range(3):
        theirs, mine = f"transformer.h.{n}.", f"trf_blocks.{n}."
        fused = [tensors[f"{theirs}attn.c_attn.{p}"].chunk(3, -1) for p in ("weight", "bias")]
        for part, weight, bias in zip(("query", "key", "value"), *fused, strict=True):
            state[f"{mine}att.W_{part}.weight"] = weight.t().contiguous()
            if biased:
                state[f"{mine}att.W_{part}.bias"] = bias.contiguous()
        state[f"{mine}att.mask"] = torch.ones(53, 53).triu(1)
        for name, other in (
            ("att.out_proj", "attn.c_proj"),
            ("ff.layers.0", "mlp.c_fc"),
            ("ff.layers.2", "mlp.c_proj"),
        ):
            state[f"{mine}{name}.weight"] = tensors[f"{theirs}{other}.weight"].t().contiguous()
            state[f"{mine}{name}.bias"] = tensors[f"{theirs}{other}.bias"]
        for k in (1, 2):
            state[f"{mine}norm{k}.scale"] = tensors[f"{theirs}ln_{k}.weight"]
            state[f"{mine}norm{k}.shift"] = tensors[f"{theirs}ln_{k}.bias"]
    path = tmp_path / "gpt.pth"
    torch.save({"model_state_dict": state, "optimizer_state_dict": {}} if nested else state, path)
    with pytest.raises(ConfigError, match=r"nothing says n_heads .*config=\{'n_heads': …"):
        zoo.load(path)
    model = zoo.load(path, config={"n_heads": 4})
    expected = zoo.load(hf)
    if not biased:
        for block in expected.blocks:
            for part in (block.attn.q, block.attn.k, block.attn.v):
                part.bias.zero_()
    torch.testing.assert_close(model(IDS), expected(IDS), rtol=0, atol=0 if biased else 1e-5)
    assert model.config.qkv_bias is biased and model.config.positions == 53
    zoo.convert(path, tmp_path / "back", to="book", config={"heads": 4})
    mine = torch.load(tmp_path / "back" / "gpt.pth", weights_only=True)
    assert mine.keys() == {name for name in state if not name.endswith("mask")}
    assert all(torch.equal(mine[name], state[name]) for name in mine)


@torch.no_grad()
@pytest.mark.parametrize(
    ("spec", "to", "layout"),
    [
        ("llama", "meta", {}),
        ("llama", "meta", {"shards": 2}),
        ("gpt2", "book", {}),
        ("gpt2", "mingpt", {}),
    ],
)
def test_a_head_that_is_the_embedding(spec: str, to: str, layout: Any, tmp_path: Path) -> None:
    """One array under two names in the file, and one in the model that is read from it."""
    even = EVEN if spec == "llama" else {}
    model = model_of(spec, to, tied=True, **even)
    zoo.save(model, tmp_path / "out", to=to, layout=layout)
    again = zoo.load(tmp_path / "out", config=asked(model, to, spec))
    assert again.config.tied and again.head.weight is again.embed.weight
    assert torch.equal(again(IDS), model(IDS))
    apart = model_of(spec, to, tied=False, **even)
    apart.head.weight.copy_(apart.embed.weight)
    zoo.save(apart, tmp_path / "apart", to=to, layout=layout)
    assert not zoo.load(tmp_path / "apart", config=asked(model, to, spec)).config.tied
    if layout:
        with pytest.raises(LossyExport, match="leave columns away"):
            zoo.save(model, tmp_path / "no", to=to, layout=layout | {"columns": 1})


# --- llama2.c ------------------------------------------------------------------------------------


@pytest.fixture
def stories(fixtures: Path) -> Path:
    return fixtures / "stories260K"


def test_stories_there_and_back(stories: Path, tmp_path: Path) -> None:
    source = stories / "stories260K.bin"
    zoo.convert(source, tmp_path / "native", to="native")
    zoo.convert(tmp_path / "native", tmp_path / "back", to="llama2c")
    assert (tmp_path / "back" / "model.bin").read_bytes() == source.read_bytes()
    assert (tmp_path / "back" / "tokenizer.bin").read_bytes() == (
        stories / "tok512.bin"
    ).read_bytes()
    zoo.convert(source, tmp_path / "one", to="llama2c", layout={"version": 1})
    data = (tmp_path / "one" / "model.bin").read_bytes()
    assert data[:8] == struct.pack("<Ii", 0x616B3432, 1)
    tables = 2 * 512 * 4 * 4
    assert len(data) == source.stat().st_size - 28 - tables + 256
    zoo.convert(tmp_path / "one", tmp_path / "zero", to="llama2c")
    assert (tmp_path / "zero" / "model.bin").read_bytes() == source.read_bytes()


@torch.no_grad()
def test_stories_text_and_logits(stories: Path, tmp_path: Path) -> None:
    expected = json.loads((stories / "EXPECTED.json").read_text())
    greedy = expected["greedy_ids_from_BOS"]
    model = zoo.load(stories / "stories260K.bin")
    truth = torch.from_numpy(np.load(stories / "ref_logits_64tok.npy"))
    logits = model(torch.tensor([greedy[:64]]))
    torch.testing.assert_close(logits.reshape(truth.shape), truth, atol=2e-4, rtol=0)
    actual = model.generate(torch.tensor([greedy[:1]]), max_new_tokens=len(greedy) - 1)
    assert actual.ids[0].tolist() == greedy if hasattr(actual, "ids") else True
    text = model.tokenizer.decode(greedy, skip_special=True)
    assert text.strip() == expected["greedy_text"].strip()
    # with llama2.c's own vocabulary in its place
    for name in ("stories260K.bin", "tok512.bin"):
        (tmp_path / name).write_bytes((stories / name).read_bytes())
    tokenizer = zoo.tokenizer(tmp_path / "stories260K.bin")
    assert tokenizer.encode(text) == model.tokenizer.encode(text)
    assert tokenizer.bos == 1 and tokenizer.decode(greedy, skip_special=True) == text
    zoo.convert(stories / "stories260K.bin", tmp_path / "q8", to="llama2c-q8")
    rough = zoo.load(tmp_path / "q8")(torch.tensor([greedy[:64]]))
    assert 0.01 < (rough - logits).abs().max() < 1


def quantized(group: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(count // group, group, generator=torch.Generator().manual_seed(3))
    x[2] = 0
    scale = x.abs().amax(1) / 127
    whole = torch.where(scale[:, None] > 0, (x / scale[:, None]).round(), 0).to(torch.int8)
    return x, whole, scale


def test_groups_of_int8_however_the_pieces_are_cut() -> None:
    x, whole, scale = quantized(8, 80)
    first, second = int8_groups(8)
    for step in (1, 7, 8, 13, 80):
        pieces = [x.view(-1)[at : at + step] for at in range(0, 80, step)]
        coded = torch.cat([data.reshape(-1) for _, data in in_units(iter(pieces), first)])
        assert torch.equal(coded.view(torch.int8), whole.view(-1))
        coded = torch.cat([data.reshape(-1) for _, data in in_units(iter(pieces), second)])
        assert torch.equal(coded.view(torch.float32), scale)
    with pytest.raises(AssertionError, match="4 numbers beyond"):
        list(in_units(iter([torch.ones(12)]), first))


def test_version_2_as_llama2c_writes_it(tmp_path: Path) -> None:
    """Norms, then each matrix as whole numbers and scales; odd places need no alignment."""
    header = llama2c.Header(2, (8, 24, 2, 2, 1, 5, 16), False, 8)
    path = tmp_path / "model.bin"
    data, wanted = header.pack(), {}
    generator = torch.Generator().manual_seed(0)
    for name, shape in header.arrays():
        x = torch.randn(shape, generator=generator)
        if not header.groups(name):
            data, wanted[name] = data + x.numpy().tobytes(), x
            continue
        groups = x.view(-1, 8)
        scale = groups.abs().amax(1) / 127
        whole = (groups / scale[:, None]).round().to(torch.int8)
        data += whole.numpy().tobytes() + scale.numpy().tobytes()
        wanted[name] = (whole.float() * scale[:, None]).view(shape)
    path.write_bytes(data)
    model = zoo.load(path)
    assert model.config.kv_heads == 1 and not model.config.tied
    assert torch.equal(model.blocks[1].mlp.down.weight, wanted["w2.1"])
    assert torch.equal(model.head.weight, wanted["wcls"])
    rows = wanted["wq.1"].view(2, 2, 2, 8).transpose(1, 2).reshape(8, 8)
    assert torch.equal(model.blocks[1].attn.q.weight, rows)


SIZES = (64, 172, 5, 8, 4, 512, 512)


@pytest.mark.parametrize(
    ("head", "size", "why"),
    [
        (struct.pack("<7i", *SIZES), 1_056_539, "1056539 bytes, .* makes 1056540. Truncated"),
        (struct.pack("<7i", *SIZES), 1_056_544, "makes 1056540. Bytes trail"),
        (struct.pack("<Ii7iB", 0x616B3432, 3, *SIZES, 1), 4096, "version 3 of llama2.c's"),
        (struct.pack("<Ii7iB", 0x616B3432, 1, *SIZES, 7), 4096, "shared_classifier is 7"),
        (struct.pack("<Ii", 0x616B3432, 1), 40, "40 bytes, and its header alone has 256"),
        (struct.pack("<Ii7iB", 0x616B3432, 1, *(2**31 - 1,) * 7, 1), 4096, "dim is 2147483647"),
        (struct.pack("<Ii7iB", 0x616B3432, 1, 64, -1, *SIZES[2:], 1), 4096, "hidden_dim is -1"),
        (struct.pack("<Ii7iB", 0x616B3432, 1, 64, 172, 5, 7, 7, 512, 9, 1), 999, "does not divide"),
        (struct.pack("<Ii7iBi", 0x616B3432, 2, *SIZES, 1, 0), 4096, "group_size is 0"),
        (struct.pack("<Ii7iBi", 0x616B3432, 2, *SIZES, 1, 63), 4096, "63 does not divide"),
        (struct.pack("<7i", 2**20, 2**22, 4096, 2, 2, 2**26, 4), 4096, "makes .*Truncated"),
    ],
)
def test_hostile_llama2c_headers_are_refused(
    tmp_path: Path, head: bytes, size: int, why: str
) -> None:
    path = tmp_path / "x.bin"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(max(size, len(head)))
    with pytest.raises(CorruptCheckpoint, match=why) as error:
        zoo.load(path)
    assert str(path) in str(error.value)


def test_numbers_of_groups_wherever_they_are_cut(tmp_path: Path) -> None:
    header = llama2c.Header(2, (8, 24, 2, 2, 1, 5, 16), True, 8)
    path = tmp_path / "model.bin"
    size = header.starts()[1]
    body = torch.randn(size, generator=torch.Generator().manual_seed(2)).to(torch.float16)
    data = body.view(torch.uint8)[: size - 256].numpy().tobytes()
    path.write_bytes(header.pack() + data)
    reader = llama2c.Llama2cReader(path)
    for name in ("wq.1", "w2.0", "token_embedding_table"):
        whole = reader.tensor(name)
        for rows, columns in (((0, 1), (0, 1)), ((1, 4), (3, 7)), ((2, 5), (0, 8))):
            box = slice(*rows), slice(*columns)
            actual = reader.numbers(name, *box)
            assert torch.equal(actual.nan_to_num(), whole[box].nan_to_num())


@pytest.mark.parametrize("to", ["llama2c", "gguf", "hf"])
def test_no_array_is_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    """Layers in one array, of matrices whose rows are moved twice on the way: piece by piece."""
    zoo.save(model_of("llama", "meta", to, **EVEN), tmp_path / "meta", to="meta")
    seen: list[int] = []

    def watched(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any) -> Tensor:
            actual = make(*args)
            if actual.untyped_storage().nbytes() < mapped:  # no view of a file
                seen.append(actual.nbytes)
            return actual

        return made

    output = plan_output(locate(tmp_path / "meta"), to)
    mapped = sum(path.stat().st_size for path in output.sources) // 2
    for item in (item for shard in output.shards for item in shard.items):
        whole = item.make().whole()
        with monkeypatch.context() as patch:
            for name in ("region", "matrix", "window", "whole"):
                patch.setattr(Lazy, name, watched(getattr(Lazy, name)))
            pieces = [piece.reshape(-1).clone() for piece in item.make().pieces(512)]
        assert torch.equal(torch.cat(pieces), whole.reshape(-1)), item.name
    assert seen and max(seen) <= 1024


# --- recognition of files ------------------------------------------------------------------------


def test_files_of_no_known_format_are_refused(tmp_path: Path, gpt2: Any) -> None:
    (tmp_path / "noise.bin").write_bytes(b"GIF89a" * 100)
    with pytest.raises(
        NotACheckpoint, match=r"expected a directory .* file of torch.save, .*llama2"
    ):
        zoo.load(tmp_path / "noise.bin")
    torch.save({"a.b": torch.ones(2)}, tmp_path / "odd.pt")
    with pytest.raises(
        NotACheckpoint, match=r"fit no dialect:(.|\n)*llama of Meta's(.|\n)*gpt2 of|"
    ):
        zoo.load(tmp_path / "odd.pt")
    with pytest.raises(NotACheckpoint) as error:
        zoo.load(tmp_path / "odd.pt")
    for word in ("nanoGPT's ckpt.pt: nothing below model", "Meta's", "knows 0 of 1 names", "a.b"):
        assert word in str(error.value)
    _, tensors = gpt2("gelu")
    state = linear(tensors)
    torch.save({"model": state, "model_args": ARGS}, tmp_path / "ckpt.pt")
    with pytest.raises(AmbiguousCheckpoint, match=r"ckpt\.pt, odd\.pt"):
        zoo.load(tmp_path)
    assert zoo.load(tmp_path / "ckpt.pt").architecture == "gpt2"
    state["transformer.h.0.lora"] = torch.ones(2)
    torch.save({"model": state, "model_args": ARGS}, tmp_path / "ckpt.pt")
    with pytest.raises(NotACheckpoint, match=r"not \['transformer\.h\.0\.lora'\]"):
        zoo.load(tmp_path / "ckpt.pt")


def test_faults_of_a_nested_file(tmp_path: Path, gpt2: Any) -> None:
    _, tensors = gpt2("gelu")
    path = tmp_path / "ckpt.pt"

    def fails(kind: type[ZooError], why: str, state: dict[str, Tensor], **args: Any) -> None:
        torch.save({"model": state, "model_args": ARGS | args}, path)
        with pytest.raises(kind, match=why):
            zoo.load(path)

    state = linear(tensors)
    fails(ConfigError, "n_layer: 3 found, 4 declared", state, n_layer=4)
    fails(
        ShapeMismatch,
        r"wte.weight: shape \[113, 40\], expected \[50304, 40\]",
        state,
        vocab_size=50304,
    )
    fails(ConfigError, "flash: unknown field", state, flash=True)
    fails(ConfigError, "n_head: 7 does not divide", state, n_head=7)
    fails(TieConflict, "lm_head", state | {"lm_head.weight": torch.ones(113, 40)})
    fails(UnexpectedTensors, r"ln_f\.bias", state, bias=False)
    deep: Any = torch.ones(1)
    for _ in range(40):
        deep = {"x": deep}
    torch.save({"model": state, "more": deep}, path)
    with pytest.raises(ZooError, match="deeper than 32 levels"):
        zoo.load(path)
    torch.save({"model": state, "odd": {1.5: 1}}, path)
    with pytest.raises(CheckpointError, match=r"names that are no text: 1.5"):
        zoo.load(path)
    torch.save({"a/b": torch.ones(1), "a": {"b": torch.ones(2)}}, path)
    with pytest.raises(ZooError, match="two tensors are called a/b"):
        TorchZipReader(path, nested=True)


def test_configs_that_a_dialect_cannot_express_are_refused_by_name(tmp_path: Path) -> None:
    llama, gpt = entry_of("llama"), entry_of("gpt2")

    def refused(entry: Any, to: str, why: str, **changes: Any) -> None:
        model = entry.model(entry.config_class(**common_fields(entry.spec, to) | changes))
        with pytest.raises(LossyExport, match=why):
            zoo.save(model, tmp_path / "out", to=to)
        zoo.save(model, tmp_path / "native", to="native", force=True)
        with pytest.raises(LossyExport, match=why):
            zoo.convert(tmp_path / "native", tmp_path / "out", to=to)
        assert [p.name for p in tmp_path.iterdir()] == ["native"]

    refused(llama, "llama2c", "eps: 1e-06 cannot be said there", eps=1e-6)
    refused(llama, "llama2c", "rope_base: 5000.0 cannot", rope_base=5000.0)
    refused(llama, "llama2c", "no rule for blocks.0.attn.q.bias", attn_bias=True)
    refused(llama, "meta", "head_dim: 14 cannot", head_dim=14)
    refused(llama, "meta", "window: 9 cannot", window=9)
    refused(llama, "meta", "no rule for score.weight", head="sequence_classification")
    refused(llama, "llama2c", "head: 'none' cannot be said", head="none")
    refused(gpt, "nanogpt", "act: 'gelu_new' cannot", act="gelu_new")
    refused(gpt, "nanogpt", "no rule for head.weight", tied=False)
    refused(gpt, "book", "scale_attn: False cannot", scale_attn=False)
    model = model_of("gpt2", "nanogpt")
    for to, why in (("meta", "gpt2 is not written in that dialect"), ("mtea", "Did you mean meta")):
        with pytest.raises(ZooError, match=why):
            zoo.save(model, tmp_path / "out", to=to)
    with pytest.raises(UsageError, match="nanogpt has no 'shards'; it has none"):
        zoo.save(model, tmp_path / "out", to="nanogpt", layout={"shards": 2})
    small = model_of("llama", "llama2c")
    for to, layout, why in (
        ("llama2c", {"version": 2}, "version=2: a whole number from 0 to 1"),
        ("llama2c-q8", {"version": 1}, "has no 'version'; it has group"),
        ("llama2c", {"version": True}, "version=True"),
    ):
        with pytest.raises(UsageError, match=why):
            zoo.save(small, tmp_path / "out", to=to, layout=layout)
    with pytest.raises(UsageError, match="hf has no options"):
        zoo.save(model, tmp_path / "out", to="hf", layout={"shards": 2})
    model = model_of("llama", "meta")
    with pytest.raises(ConfigError, match="n_heads: 6 cannot be cut into 4"):
        zoo.save(model, tmp_path / "out", to="meta", layout={"shards": 4})
    with pytest.raises(LossyExport, match=r"stores F32, and .* have more precision"):
        zoo.save(model_of("llama", "llama2c").double(), tmp_path / "out", to="llama2c")
    zoo.save(model_of("llama", "llama2c").bfloat16(), tmp_path / "out", to="llama2c")


@pytest.mark.parametrize("parts", [1, 2])
def test_files_of_no_dialect_are_recognized_and_opened(tmp_path: Path, parts: int) -> None:
    """A dialect of them is a section of a spec and nothing more."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    raw = torch.cat([data.reshape(-1) for _, data in in_units(iter([x]), int8_groups(32)[0])])
    names = ["one.gguf"] if parts == 1 else [f"x-0000{n}-of-00002.gguf" for n in (1, 2)]
    for n, name in enumerate(names):
        infos = [TensorInfo(f"blk.{n}.w", (4, 64), "Q8_0"), TensorInfo(f"norm.{n}", (6,), "F32")]
        fields: dict[str, Any] = {"general.architecture": "none"}
        if parts == 2:
            fields |= {"split.no": gguf.Value("u16", n), "split.count": gguf.Value("u16", 2)}
        layout = gguf.lay_out(infos, fields, name)
        body = bytearray(raw.numpy().tobytes() * 2)[: layout.size].ljust(layout.size, b"\0")
        body[layout.starts[f"norm.{n}"] - (-272 % 32) : layout.starts[f"norm.{n}"]] = bytes(
            -272 % 32
        )
        (tmp_path / name).write_bytes(layout.head + body)
    for place in (tmp_path, tmp_path / names[-1]):
        with pytest.raises(
            NotACheckpoint, match=r"GGUF whose names fit no dialect(.|\n)*architecture is 'none'"
        ):
            zoo.load(place)
        opened = open_place(place)
        assert opened is not None and opened.values["general.architecture"] == "none"
        checkpoint = opened.checkpoint(Container(format="gguf", file=""))
        assert checkpoint is not None and len(checkpoint.tensors) == 2 * parts
        for name in checkpoint.tensors:
            whole = checkpoint.tensor(name)
            actual = [p.reshape(-1) for p in checkpoint.lazy(name).pieces(100)]
            assert torch.equal(torch.cat(actual).nan_to_num(), whole.reshape(-1).nan_to_num())
    ((_, reader), *_) = opened.readers
    assert reader.quantized


# --- the engine ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "layout"), [("meta", {"shards": 2}), ("llama2c", None), ("gguf", None)]
)
def test_an_interrupted_conversion_resumes(tmp_path: Path, to: str, layout: Any) -> None:
    """With the CRCs of what was written before."""
    zoo.save(model_of("llama", "llama2c", **EVEN), tmp_path / "native", to="native")
    zoo.convert(tmp_path / "native", tmp_path / "whole", to=to, layout=layout)
    seen: list[dict[str, Any]] = []

    def stop(event: dict[str, Any]) -> None:
        seen.append(event)
        if sum(e["event"] == "tensor" for e in seen) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.convert(
            tmp_path / "native", tmp_path / "out", to=to, layout=layout, tell=stop, threads=1
        )
    assert not (tmp_path / "out").exists()
    seen.clear()
    zoo.convert(tmp_path / "native", tmp_path / "out", to=to, layout=layout, tell=seen.append)
    assert seen[-1]["resumed"] > 0
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_parts_write_the_same_files_as_a_whole_conversion(tmp_path: Path) -> None:
    zoo.save(model_of("llama", "meta", **EVEN), tmp_path / "native", to="native")
    how: dict[str, Any] = {"to": "meta", "layout": {"shards": 2}}
    zoo.convert(tmp_path / "native", tmp_path / "whole", **how)
    zoo.convert(tmp_path / "native", tmp_path / "out", **how, part="2/2")
    assert not (tmp_path / "out").exists()
    (path,) = (tmp_path / ".out.zoo-partial").glob("*.pth")
    data = bytearray(path.read_bytes())
    data[-40] ^= 1  # in the zip's directory, which has no tensor
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=r"part 2 of 2: .* outside its tensors .*part 2/2"):
        zoo.convert(tmp_path / "native", tmp_path / "out", **how, part="1/2")
    zoo.convert(tmp_path / "native", tmp_path / "out", **how, part="2/2")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_check_finds_what_was_changed(tmp_path: Path) -> None:
    zoo.save(model_of("gpt2", "nanogpt"), tmp_path / "out", to="nanogpt")
    path = tmp_path / "out" / "ckpt.pt"
    data = path.read_bytes()
    fields = json.loads((tmp_path / "out" / "zoo-manifest.json").read_text())["files"]["ckpt.pt"]
    start, size = fields["tensors"]["transformer.wpe.weight"]["at"]
    for at, what in ((start + size - 1, "transformer.wpe.weight"), (5, "outside"), (-3, "outside")):
        broken = bytearray(data)
        broken[at] ^= 1
        path.write_bytes(broken)
        (damage,) = check(tmp_path / "out")
        assert what in str(damage)
    path.write_bytes(data)
    assert list(check(tmp_path / "out", sha256=True)) == []


def test_bf16_stays_and_casts_are_asked_for(tmp_path: Path) -> None:
    model = model_of("llama", "meta").bfloat16()
    zoo.save(model, tmp_path / "meta", to="meta")
    assert zoo.load(tmp_path / "meta", config={}).norm.weight.dtype == torch.bfloat16
    zoo.convert(tmp_path / "meta", tmp_path / "half", to="meta", dtype="float16")
    assert zoo.load(tmp_path / "half").norm.weight.dtype == torch.float16
    with pytest.raises(UsageError, match="llama2c has F32 only"):
        zoo.convert(tmp_path / "meta", tmp_path / "no", to="llama2c", dtype="bfloat16")


# --- the command line ----------------------------------------------------------------------------


def test_info_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("llama", "meta", **EVEN)
    zoo.save(model, tmp_path / "out", to="meta", layout={"shards": 2})
    info = zoo.info(tmp_path / "out")
    assert (info.architecture, info.dialect) == ("llama", "meta")
    assert info.config["multiple_of"] == info.inferred["hidden"] == 102
    assert info.stored is not None and len(info.stored.files) == 2
    assert main(["info", str(tmp_path / "out" / "consolidated.01.pth")]) == 0
    output = capsys.readouterr().out
    for word in ("Meta's consolidated.NN.pth", "told by the tensors", "consolidated.00.pth"):
        assert word in output


def test_convert_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("gpt2", "book")
    zoo.save(model, tmp_path / "book", to="book")
    source, out = str(tmp_path / "book" / "gpt.pth"), str(tmp_path / "out")
    assert main(["convert", source, "--to", "hf", "--out", out]) == 1
    assert "--config n_heads=…" in capsys.readouterr().err
    asked = ["--config", f"n_heads={model.config.heads}"]
    assert main(["convert", source, "--to", "hf", "--out", out, *asked]) == 0
    assert torch.equal(zoo.load(out)(IDS), model(IDS))
    assert main(["convert", source, "--to", "hf", "--dry-run", *asked]) == 0
    assert "trf_blocks.0.att.W_query.weight" in capsys.readouterr().out


# --- errors about files --------------------------------------------------------------------------


def test_tensors_stored_in_two_dtypes_keep_them(llama: Any, tmp_path: Path) -> None:
    _, tensors, config = llama
    mixed = {n: x if "norm" in n else x.bfloat16() for n, x in tensors.items()}
    mixed["model.norm.weight"] = mixed["model.norm.weight"].bfloat16().float()  # exact in both
    files = meta_files(mixed, config, 2, False)
    place = meta(tmp_path / "meta", files, params_of(config))
    zoo.convert(place, tmp_path / "hf", to="hf")
    zoo.convert(tmp_path / "hf", tmp_path / "back", to="meta", layout={"shards": 2})
    for n, weights in enumerate(files):
        again = torch.load(tmp_path / "back" / f"consolidated.{n:02}.pth", weights_only=True)
        assert all(again[name].dtype == x.dtype for name, x in weights.items() if name in again)
        assert all(torch.equal(again[name], weights[name]) for name in again)


def test_heads_are_never_guessed(tmp_path: Path) -> None:
    """Twelve of them would divide the width, and give other logits without a word."""
    zoo.save(model_of("gpt2", "nanogpt", dim=48, heads=4), tmp_path / "a", to="nanogpt")
    path = tmp_path / "a" / "ckpt.pt"
    saved = torch.load(path, weights_only=True)
    del saved["model_args"]["n_head"]
    torch.save(saved, path)
    with pytest.raises(ConfigError, match=r"nothing says n_head .*model_args"):
        zoo.load(path)
    with pytest.raises(ConfigError, match=r"config=\{'n_head': …\}, and not n_heda"):
        zoo.load(path, config={"n_heda": 4})
    assert zoo.load(path, config={"n_head": 4}).config.heads == 4


def test_a_misshapen_tensor_is_not_reported_as_a_missing_file(llama: Any, tmp_path: Path) -> None:
    _, tensors, config = llama
    files = meta_files(tensors, config, 1, False)
    files[0]["layers.1.attention.wq.weight"] = torch.zeros(3, 3)
    place = meta(tmp_path / "meta", files, params_of(config))
    with pytest.raises(ShapeMismatch, match=r"layers\.1\.attention\.wq\.weight: shape \[3, 3\]"):
        zoo.load(place)
    (place / "params.json").write_text(json.dumps(params_of(config, n_heads=5)))
    with pytest.raises(ConfigError, match=r"(?s)meta/params\.json:.*n_heads: 5 does"):
        zoo.load(place)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "found an empty file"),
        (struct.pack("<Q", 2) + b"{}", "found what looks like safetensors: give the directory"),
        (b'{"dim": 8}', "found what looks like JSON"),
        (b"\xff" * 64, r"found a file that begins with b'\\xff"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    with pytest.raises(NotACheckpoint, match=rf"model\.bin: expected a directory .*{message}"):
        zoo.load(path)


def test_a_named_file_is_opened_wherever_it_is(tmp_path: Path) -> None:
    """A link to it too, or one that a directory would not show; in a directory it counts not."""
    zoo.save(model_of("llama", "gguf"), tmp_path / "there", to="gguf")
    (tmp_path / "here").mkdir()
    link, hidden = tmp_path / "here" / "x", tmp_path / "here" / ".model.gguf"
    link.symlink_to(tmp_path / "there" / "model.gguf")
    hidden.write_bytes(link.read_bytes())
    wanted = zoo.load(tmp_path / "there")
    for path in (link, hidden):
        assert differences(wanted, zoo.load(path)) == []
        assert zoo.info(path).architecture == "llama"
    (tmp_path / "here" / "config.json").write_text('{"model_type": "llama"}')
    hidden.rename(tmp_path / "here" / "model.gguf")
    message = r"no weights\. Looked for .* those of model\.gguf: give that file"
    with pytest.raises(NotACheckpoint, match=message):
        zoo.load(tmp_path / "here", head="lm")


def test_options_that_a_dialect_lacks_are_refused(tmp_path: Path) -> None:
    model = model_of("llama", "llama2c")
    zoo.save(model, tmp_path / "hf")
    for to in ("gguf", "meta"):
        with pytest.raises(UsageError, match=rf"max_shard_size: to='{to}' does not support it"):
            zoo.convert(tmp_path / "hf", tmp_path / "out", to=to, max_shard_size=1 << 20)
        with pytest.raises(UsageError, match=rf"max_shard_size: to='{to}' does not support it"):
            zoo.save(model, tmp_path / "out", to=to, max_shard_size=1 << 20)
    with pytest.raises(UsageError, match="llama2c has no 'group'; it has version"):
        zoo.convert(tmp_path / "hf", tmp_path / "out", to="llama2c", layout={"group": 2})


def test_what_is_written_beside_its_source_can_be_replaced(tmp_path: Path) -> None:
    zoo.save(model_of("llama", "gguf"), tmp_path / "a", to="gguf")
    for source, to in ((tmp_path / "a" / "model.gguf", "hf"), (tmp_path / "a", "native")):
        place = tmp_path / "a" / to
        for _ in range(2):
            zoo.convert(source, place, to=to, force=True)
        assert list(check(place)) == []
        with pytest.raises(OutputExists, match="contains the source"):
            zoo.convert(source, tmp_path / "a", to=to, force=True)


def test_manifest_records_quantized_groups(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of what is made of it; its size is that of the file."""
    zoo.save(model_of("llama", "llama2c"), tmp_path / "hf")
    asked = ["convert", str(tmp_path / "hf"), "--to", "llama2c-q8", "--out", str(tmp_path / "q")]
    assert main([*asked, "--dry-run"]) == 0
    assert "tensors from F32 to int8 in groups of" in capsys.readouterr().out
    assert main(asked) == 0
    lossy = zoo.load(tmp_path / "q").provenance.lossy
    assert lossy.startswith("int8 in groups of ")
    stored = zoo.info(tmp_path / "q").stored
    assert stored is not None and stored.bytes + 256 == (tmp_path / "q/model.bin").stat().st_size
    zoo.convert(tmp_path / "q", tmp_path / "native", to="native")
    assert zoo.load(tmp_path / "native").provenance.lossy == lossy
    assert lossy in zoo.info(tmp_path / "native").quantized


def test_required_zero_biases_are_not_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo.save(model_of("gpt2", "nanogpt", bias=False, qkv_bias=False), tmp_path / "a", to="nanogpt")
    path = tmp_path / "a" / "ckpt.pt"
    assert main(["convert", str(path), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    assert "all zero" not in capsys.readouterr().err
    stored = zoo.info(path).stored  # the head is the embedding under a second name
    assert stored is not None and stored.bytes < path.stat().st_size
