"""optimizer.pt and its like: states from file to file, in orders that are told or found."""

import copy
import errno
import io
import json
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import build
from torch import nn
from training_pairs import FIRST, IDS, NEAR, Nano, Pair

import zoo
import zoo.saving.optimizer_files
from converters.opening import open_checkpoint
from zoo import registry
from zoo.checkpoints.oracle import reference_on_meta, transformers
from zoo.cli.app import main
from zoo.errors import (
    CheckpointError,
    CorruptCheckpoint,
    NonFinite,
    NotACheckpoint,
    OutputExists,
    UnsafePath,
    UnsupportedZip,
    UsageError,
    ZooError,
)
from zoo.parity.fixtures import hot_checkpoint
from zoo.saving.optimizer_files import convert_file, read


def trainers(module: nn.Module, decays: set[str]) -> torch.optim.AdamW:
    """As the reference's trainer groups a model's parameters."""
    named = list(module.named_parameters())
    groups = [
        {"params": [p for n, p in named if n in decays], "weight_decay": 0.1},
        {"params": [p for n, p in named if n not in decays], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01)


@pytest.mark.parametrize("key", FIRST)
def test_a_trainers_state_converts_to_native_and_back(key: str, tmp_path: Path) -> None:
    """Names of parameters are nowhere in the file; the next step is the same step."""
    pair = Pair(key, tmp_path / "hf")
    theirs = pair.reference.model
    decays = {*transformers().Trainer.get_decay_parameter_names(None, theirs)}
    optimizer = trainers(theirs, decays)
    before = copy.deepcopy(theirs.state_dict())
    for n in range(2):
        pair.step(False, optimizer, IDS.roll(n, 1))
    theirs.load_state_dict(before)
    file, native, back = (tmp_path / n for n in ("optimizer.pt", "native.pt", "back.pt"))
    torch.save(optimizer.state_dict(), file)
    assert main(["convert-optimizer", str(tmp_path / "hf"), str(file), "--out", str(native)]) == 0

    moved = torch.load(native, weights_only=True)
    own = [[pair.model.get_parameter(n) for n in g["param_names"]] for g in moved["param_groups"]]
    ours = torch.optim.AdamW([{"params": params} for params in own])
    ours.load_state_dict(moved)
    assert [g["weight_decay"] for g in ours.param_groups] == [0.1, 0.0]
    ids = IDS.roll(5, 1)
    assert pair.step(True, ours, ids) == pytest.approx(pair.step(False, optimizer, ids), rel=NEAR)
    errors = pair.errors()
    assert max(errors.values()) <= NEAR, max(errors.items(), key=lambda item: item[1])

    zoo.convert(tmp_path / "hf", tmp_path / "as-native", to="native")
    asked = ["convert-optimizer", str(tmp_path / "as-native"), str(native), "--to", "hf"]
    assert main([*asked, "--out", str(back)]) == 0
    again, was = (torch.load(f, weights_only=True) for f in (back, file))
    numbers = [group["params"] for group in was["param_groups"]]
    assert [group["params"] for group in again["param_groups"]] == numbers
    for n, state in was["state"].items():
        assert all(torch.equal(x, again["state"][n][k]) for k, x in state.items())


@pytest.mark.parametrize("key", FIRST)
def test_order_of_the_module_equals_the_references(key: str, tmp_path: Path) -> None:
    name, variant = key.split("/")
    kind = hot_checkpoint(registry.architectures()[name], variant, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    header = open_checkpoint(tmp_path).tensors
    module = reference_on_meta(kind, config)
    names = [n for n, _ in module.named_parameters()]
    assert names != sorted(names)
    assert sum(p.numel() for p in module.parameters()) == sum(i.numel for i in header.values())


# --- other optimizers, other dtypes --------------------------------------------------------------


@pytest.mark.parametrize("back", [False, True], ids=["from-native", "to-native"])
@pytest.mark.parametrize("key", ["gpt2/base", "neox/base", "mixtral/base", "t5/tied"])
def test_sgd_momentum_converts(key: str, back: bool, tmp_path: Path) -> None:
    def sgd(module: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    pair = Pair(key, tmp_path / "a")
    source, target = pair.reference.model, pair.model
    source, target = (source, target) if back else (target, source)
    optimizer = sgd(source)
    for n in range(2):
        pair.step(not back, optimizer, IDS.roll(n, 1))
    kept = copy.deepcopy(optimizer.state_dict())
    moved = zoo.convert_optimizer(kept, source, target)
    pair = Pair(key, tmp_path / "b")
    ours, theirs = sgd(pair.model), sgd(pair.reference.model)
    ours.load_state_dict(moved if back else kept)
    theirs.load_state_dict(kept if back else moved)
    assert pair.step(True, ours) == pytest.approx(pair.step(False, theirs), rel=NEAR)
    assert max(pair.errors().values()) <= NEAR


def test_wide_moments_of_narrow_weights_stay_wide() -> None:
    model = build("gpt2").to(torch.bfloat16)
    other = Nano(model.config).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(other.parameters())
    for p in other.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    state = optimizer.state_dict()
    for entry in state["state"].values():  # as mixed precision keeps them
        entry |= {k: torch.randn(entry[k].shape) for k in ("exp_avg", "exp_avg_sq")}
    moved = zoo.convert_optimizer(state, other, model)
    place = moved["param_groups"][0]["param_names"].index("blocks.0.attn.k.weight")
    fused = next(n for n, x in state["state"].items() if x["exp_avg"].shape[0] == 3 * 40)
    wanted = state["state"][fused]["exp_avg"].chunk(3)[1]
    assert moved["state"][place]["exp_avg"].dtype == torch.float32
    assert moved["state"][place]["exp_avg"].equal(wanted)


def test_frozen_parameters_have_no_state() -> None:
    model = build("llama")
    for n, p in model.named_parameters():
        p.requires_grad_("blocks.1" in n)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(IDS).pow(2).mean().backward()
    optimizer.step()
    state = optimizer.state_dict()
    entry = registry.architectures()["llama"]
    module = reference_on_meta("LlamaForCausalLM", next(iter(entry.variants.values()))["config"])
    moved = zoo.convert_optimizer(state, model, module)
    names = moved["param_groups"][0]["param_names"]
    assert names
    assert all(name.startswith("model.layers.1.") for name in names)
    # one that was trained and never got a gradient has none either, and keeps its number
    del state["state"][0]
    again = zoo.convert_optimizer(state, model, module)
    assert again["param_groups"] == moved["param_groups"]
    assert len(again["state"]) == len(moved["state"]) - 1


# --- orders --------------------------------------------------------------------------------------


def stepped(module: nn.Module, groups: Any = None) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(groups or module.parameters(), lr=0.01)
    for n, p in enumerate(module.parameters()):
        p.grad = torch.full_like(p, n + 1.0)
    optimizer.step()
    return optimizer.state_dict()


def test_alphabetical_names_are_refused_as_an_order(tmp_path: Path) -> None:
    """load_file gives them so, and k, out, q, v have one shape."""
    hot_checkpoint(registry.architectures()["llama"], "multi-head", tmp_path)
    tensors, model = load_file(tmp_path / "model.safetensors"), zoo.load(tmp_path)
    state = stepped(model)
    for source, target in ((tensors, model), (model, tensors)):
        with pytest.raises(UsageError, match="in alphabetical order"):
            zoo.convert_optimizer(state, source, target)
    module = reference_on_meta(
        "LlamaForCausalLM", json.loads((tmp_path / "config.json").read_text())
    )
    names = [n for n, _ in module.named_parameters()]
    moved = zoo.convert_optimizer(
        zoo.convert_optimizer(state, model, module), {n: tensors[n] for n in names}, model
    )
    assert all(x["exp_avg"].equal(moved["state"][n]["exp_avg"]) for n, x in state["state"].items())


def test_custom_parameter_groups_need_names() -> None:
    """Layers from the last to the first have the shapes of layers from the first to the last."""
    model = build("llama")
    entry = registry.architectures()["llama"]
    module = reference_on_meta("LlamaForCausalLM", next(iter(entry.variants.values()))["config"])
    layers = [list(block.parameters()) for block in model.blocks]
    named = {id(p): n for n, p in model.named_parameters()}
    last_first = [{"params": layer} for layer in reversed(layers)]
    for p in model.parameters():
        p.requires_grad_(any(p is each for layer in layers for each in layer))
    state = stepped(model, last_first)
    with pytest.raises(UsageError, match="Pass names="):
        zoo.convert_optimizer(state, model, module)
    names = [named[id(p)] for group in last_first for p in group["params"]]
    moved = zoo.convert_optimizer(state, model, module, names=names)
    message = [group["param_names"] for group in moved["param_groups"]]
    assert all(n.startswith("model.layers.2.") for n in message[0])


def test_states_keyed_by_name_convert() -> None:
    """As torch's distributed checkpoints give them when they are gathered."""
    model = build("llama")
    state = stepped(model)
    names = [n for n, _ in model.named_parameters()]
    by_name = {
        "state": {names[n]: x for n, x in state["state"].items()},
        "param_groups": [{**state["param_groups"][0], "params": names[::-1]}],
    }
    module = reference_on_meta(
        "LlamaForCausalLM",
        next(iter(registry.architectures()["llama"].variants.values()))["config"],
    )
    wanted, actual = (zoo.convert_optimizer(s, model, module) for s in (state, by_name))
    assert actual["param_groups"][0]["params"] == wanted["param_groups"][0]["params"]
    for n, entry in wanted["state"].items():
        assert all(torch.equal(x, actual["state"][n][k]) for k, x in entry.items())


def test_eight_bits_and_factors_are_refused() -> None:
    model = build("llama")
    module = reference_on_meta(
        "LlamaForCausalLM",
        next(iter(registry.architectures()["llama"].variants.values()))["config"],
    )
    state = stepped(model)
    for entry in state["state"].values():
        entry["state1"] = entry.pop("exp_avg").to(torch.uint8)
    with pytest.raises(UsageError, match="eight bits"):
        zoo.convert_optimizer(state, model, module)
    state = stepped(model)
    for entry in state["state"].values():
        entry["exp_avg_sq_row"] = torch.ones(2)
    with pytest.raises(UsageError, match=r"exp_avg_sq_row in several shapes .* Adafactor"):
        zoo.convert_optimizer(state, model, module)
    for entry in state["state"].values():
        entry.clear()
        entry["momentum"] = torch.ones(3)
    with pytest.raises(
        UsageError, match=r"names: the optimizer keeps other shapes of embed.weight"
    ):
        names = [n for n, _ in model.named_parameters()]
        zoo.convert_optimizer(state, model, module, names=names)


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """(a llama checkpoint, the state of an optimizer over its module)"""
    kind = hot_checkpoint(registry.architectures()["llama"], "base", tmp_path / "hf")
    module = getattr(transformers(), kind).from_pretrained(tmp_path / "hf")
    return tmp_path / "hf", stepped(module)


@pytest.mark.parametrize("where", ["", "optimizer", "optimizer_state_dict", "optimizer_states"])
def test_a_state_is_found_anywhere_in_a_file(
    where: str, saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    source, state = saved
    tensors: Any = (
        {where: [state] if where.endswith("s") else state, "epoch": 3} if where else state
    )
    torch.save(tensors, tmp_path / "o.pt")
    out = convert_file(source, tmp_path / "o.pt", tmp_path / "out.pt")
    assert len(torch.load(out, weights_only=True)["state"]) == len(state["state"])
    with pytest.raises(OutputExists, match="force=True"):
        convert_file(source, tmp_path / "o.pt", out)
    convert_file(source, tmp_path / "o.pt", out, force=True)
    assert not list(tmp_path.glob(".*partial"))


def test_files_without_a_state_are_refused(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    source, state = saved
    file = tmp_path / "o.pt"
    zero = {"base_optimizer_state": {}, "zero_stage": 2, "partition_count": 2}
    for tensors, kind, message in (
        ({"optimizer_state_dict": zero}, UsageError, "DeepSpeed"),
        ({"a": state, "b": state}, UsageError, "several optimizers' states: a, b"),
        ({"model": {"x": torch.ones(1)}}, NotACheckpoint, "no torch optimizer's state in it"),
        ({"state": {}, "param_groups": 3}, NotACheckpoint, "found state, param_groups"),
        ({"fn": print, **state}, CorruptCheckpoint, "asks for __builtin__.print"),
    ):
        torch.save(tensors, file)
        with pytest.raises(kind, match=message):
            read(file)
    file.write_bytes(b"no zip")
    with pytest.raises(CorruptCheckpoint, match=r"o\.pt: 6 bytes that are no zip file"):
        read(file)
    with pytest.raises(NotACheckpoint, match=r"a directory, .* FSDP"):
        read(source)
    torch.save(state, file)
    with pytest.raises(UsageError, match="one of the two is native"):
        convert_file(source, file, tmp_path / "out", to="hf")
    with pytest.raises(UsageError, match=r"to='ggml': llama has"):
        convert_file(source, file, tmp_path / "out", to="ggml")


def test_orders_without_the_reference(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By names in a file, by torch's own file of weights; else asked for."""
    source, state = saved
    torch.save(state, tmp_path / "o.pt")
    wanted = torch.load(convert_file(source, tmp_path / "o.pt", tmp_path / "1"), weights_only=True)
    config = json.loads((source / "config.json").read_text())
    order = [n for n, _ in reference_on_meta("LlamaForCausalLM", config).named_parameters()]

    def lacking(*inputs: Any) -> Any:
        raise zoo.errors.MissingDependency("transformers")

    monkeypatch.setattr("zoo.checkpoints.oracle.transformers", lacking)
    with pytest.raises(UsageError, match=r"order: names=…, or install transformers"):
        convert_file(source, tmp_path / "o.pt", tmp_path / "2")
    (tmp_path / "names").write_text("\n".join(order))
    asked = ["convert-optimizer", str(source), str(tmp_path / "o.pt"), "--out", str(tmp_path / "2")]
    assert main([*asked, "--names", str(tmp_path / "names")]) == 0
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(OrderedDict((n, tensors[n]) for n in order), source / "pytorch_model.bin")
    convert_file(source, tmp_path / "o.pt", tmp_path / "3")
    for name in ("2", "3"):
        actual = torch.load(tmp_path / name, weights_only=True)
        assert actual["param_groups"] == wanted["param_groups"]
        for n, entry in wanted["state"].items():
            assert all(torch.equal(x, actual["state"][n][k]) for k, x in entry.items())
    zoo.convert(source, tmp_path / "native", to="native")
    with pytest.raises(UsageError, match="does not say it"):
        convert_file(tmp_path / "native", tmp_path / "3", tmp_path / "4", to="hf")
    back = convert_file(tmp_path / "native", tmp_path / "3", tmp_path / "4", to="hf", names=order)
    again = torch.load(back, weights_only=True)
    assert again["param_groups"][0]["param_names"] == order
    for n, entry in state["state"].items():
        assert all(torch.equal(x, again["state"][n][k]) for k, x in entry.items())


def test_a_training_checkpoint_of_nanogpts(tmp_path: Path) -> None:
    model = build("gpt2", act="gelu", eps=1e-5)
    other = Nano(model.config)
    matrices = [p for p in other.parameters() if p.dim() >= 2]
    vectors = [p for p in other.parameters() if p.dim() < 2]
    state = stepped(other, [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    c = model.config
    data = {"n_layer": c.layers, "n_head": c.heads, "n_embd": c.dim, "block_size": c.positions}
    data |= {"bias": c.bias, "vocab_size": c.vocab, "dropout": 0.0}
    tensors = {"model": other.state_dict(), "optimizer": state, "model_args": data, "iter_num": 1}
    torch.save(tensors, tmp_path / "ckpt.pt")
    out = convert_file(tmp_path / "ckpt.pt", tmp_path / "ckpt.pt", tmp_path / "native.pt")
    moved = torch.load(out, weights_only=True)
    wanted = zoo.convert_optimizer(state, other, model)
    assert moved["param_groups"] == wanted["param_groups"]
    for n, entry in wanted["state"].items():
        assert all(torch.equal(x, moved["state"][n][k]) for k, x in entry.items())


def test_optimizer_of_a_llama2c_training_checkpoint(tmp_path: Path) -> None:
    """Matrices stand first in it, and the embedding is the output too."""
    model = build("llama", tied=True, eps=1e-5, rope_base=1e4, head_dim=None, act="silu")
    zoo.save(model, tmp_path / "c", to="llama2c-ckpt")
    tensors = torch.load(tmp_path / "c" / "ckpt.pt", weights_only=True)
    names = [name for name in tensors["model"] if name != "output.weight"]
    names.sort(key=lambda name: tensors["model"][name].dim() < 2)
    parameters = {name: nn.Parameter(tensors["model"][name].clone()) for name in names}
    split = sum(p.dim() >= 2 for p in parameters.values())
    groups = [[*parameters.values()][:split], [*parameters.values()][split:]]
    optimizer = torch.optim.AdamW([{"params": params} for params in groups], lr=0.01)
    torch.manual_seed(2)
    for p in parameters.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.save({**tensors, "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    out = convert_file(tmp_path / "ckpt.pt", tmp_path / "ckpt.pt", tmp_path / "native.pt")
    moved = torch.load(out, weights_only=True)
    order = [name for group in moved["param_groups"] for name in group["param_names"]]
    actual = {name: moved["state"][n]["exp_avg"] for n, name in enumerate(order)}
    theirs = {name: optimizer.state[p]["exp_avg"] for name, p in parameters.items()}
    assert torch.equal(actual["embed.weight"], theirs["tok_embeddings.weight"])
    assert torch.equal(actual["blocks.1.mlp.up.weight"], theirs["layers.1.feed_forward.w3.weight"])
    assert torch.equal(actual["norm.weight"], theirs["norm.weight"])
    pairs = theirs["layers.0.attention.wq.weight"].unflatten(0, (model.config.heads, -1, 2))
    assert torch.equal(actual["blocks.0.attn.q.weight"], pairs.transpose(1, 2).flatten(0, 2))


# --- hostile files and destinations --------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """(a native llama, the state of an optimizer over it, the names in its HF directory)"""
    model = build("llama").eval()
    place = tmp_path_factory.mktemp("native")
    zoo.save(model, place / "model", to="native")
    zoo.save(model, place / "hf")
    names = [name for name in open_checkpoint(place / "hf").tensors if name != "lm_head.weight"]
    return place / "model", stepped(model), names


def refused_state(change: Change, state: dict[str, Any], file: Path) -> ZooError:
    tensors = copy.deepcopy(state)
    tensors = (
        changed if isinstance(changed := change(tensors), dict | list | torch.Tensor) else tensors
    )
    torch.save(tensors, file)
    with pytest.raises(ZooError) as error:
        read(file)
    return error.value


STATES: dict[str, tuple[Change, type[ZooError], str]] = {
    "a list": (lambda s: [s], CheckpointError, "holds a list"),
    "a tensor": (lambda s: torch.ones(2), CheckpointError, "holds a Tensor"),
    "no state": (lambda s: {"param_groups": s["param_groups"]}, NotACheckpoint, "no torch"),
    "a list as state": (lambda s: s.update(state=[1]), UsageError, "state is a list"),
    "keys of text": (
        lambda s: s.update(state={str(n): x for n, x in s["state"].items()}),
        UsageError,
        "state of parameters that no group has: '0'",
    ),
    "too few params": (
        lambda s: s["param_groups"][0].update(params=[0]),
        UsageError,
        "state of parameters that no group has: 1",
    ),
    "no groups": (lambda s: s.update(param_groups=[]), UsageError, "no group has a parameter"),
    "params of tensors": (
        lambda s: s["param_groups"][0].update(params=torch.arange(2)),
        UsageError,
        "params is no list",
    ),
    "an id twice": (
        lambda s: s["param_groups"][0]["params"].append(0),
        UsageError,
        "in the groups twice: 0",
    ),
    "a list as entry": (
        lambda s: s["state"].update({0: [1]}),
        UsageError,
        r"state\[0\] is a list",
    ),
    "a dict as moment": (
        lambda s: s["state"][0].update(exp_avg={}),
        UsageError,
        r"state\[0\]\['exp_avg'\] is a dict",
    ),
    "a number as moment": (
        lambda s: s["state"][0].update(exp_avg=torch.tensor(0.5)),
        UsageError,
        r"state\[0\]\['exp_avg'\] is no array",
    ),
    "nothing as moment": (
        lambda s: s["state"][0].update(exp_avg_sq=None),
        UsageError,
        r"state\[0\]\['exp_avg_sq'\] is no array",
    ),
    "numbers as names": (
        lambda s: s["param_groups"][0].update(param_names=[1]),
        UsageError,
        "param_names is no list",
    ),
    "a sparse moment": (
        lambda s: s["state"][0].update(exp_avg=torch.eye(2).to_sparse()),
        CorruptCheckpoint,
        "_rebuild_sparse_tensor",
    ),
    "a dtype": (
        lambda s: s["param_groups"][0].update(kind=torch.float32),
        CheckpointError,
        r"param_groups/0/kind: torch\.float32 is no plain value",
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_a_malformed_state_is_refused_by_name(
    case: str, native: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    change, kind, message = STATES[case]
    with pytest.raises(kind, match=message):
        raise refused_state(change, native[1], tmp_path / "o.pt")


def test_a_plain_value_is_read_as_it_was_saved(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    group = {"params": [0], "lr": numpy.float64(0.1), "betas": (0.9, None, True), "n": -(10**30)}
    tensors = {
        "epoch": 3,
        "optimizer": {"state": {0: {"m": torch.ones(2)}}, "param_groups": [group]},
    }
    torch.save(tensors, tmp_path / "o.pt")
    state = read(tmp_path / "o.pt")
    assert state["param_groups"] == [group]
    assert state["state"][0]["m"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), r"exp_avg\[0, 5\] is nan"), (float("inf"), r"exp_avg\[0, 5\] is inf")],
)
def test_moments_that_are_not_finite_are_refused(
    value: float, message: str, native: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    model, state, names = native
    state = copy.deepcopy(state)
    state["state"][3]["exp_avg"][0, 5] = value
    torch.save(state, tmp_path / "o.pt")
    with pytest.raises(NonFinite, match=r"blocks\.0\.attn\.k\.weight: " + message):
        convert_file(model, tmp_path / "o.pt", tmp_path / "out.pt", to="hf", names=names)
    assert os.listdir(tmp_path) == ["o.pt"]


def test_damaged_and_deflated_files_are_refused(
    native: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "o.pt"
    torch.save(native[1], file)
    whole, packed = file.read_bytes(), io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(packed, "w", 8) as other:
        for info in archive.infolist():
            other.writestr(info.filename, archive.read(info))
        moment = whole.index(archive.read("o/data/4"))
    file.write_bytes(packed.getvalue())
    with pytest.raises(UnsupportedZip, match="compressed"):
        read(file)
    file.write_bytes(whole[: moment + 3] + bytes([whole[moment + 3] ^ 64]) + whole[moment + 4 :])
    with pytest.raises(CorruptCheckpoint, match="CRC"):
        read(file)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UnsafePath, match="regular"):
        read(tmp_path / "fifo")


def test_a_file_from_before_torch_1_6_converts_as_any_other(
    native: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    model, state, names = native
    for name, as_zip in (("zip", True), ("old", False)):
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=as_zip)
        convert_file(model, tmp_path / name, tmp_path / f"{name}.pt", to="hf", names=names)
    assert (tmp_path / "old.pt").read_bytes() == (tmp_path / "zip.pt").read_bytes()


def test_paths_begin_at_the_users_home_where_they_say_so(
    native: tuple[Path, dict[str, Any], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state, names = native
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(state, tmp_path / "o.pt")
    out = convert_file(model, "~/o.pt", "~/out.pt", to="hf", names=names)
    assert out == tmp_path / "out.pt" and out.is_file()


def test_force_replaces_an_optimizers_state_and_no_other_file(
    native: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    model, state, names = native
    file, thesis, both = tmp_path / "o.pt", tmp_path / "thesis.md", tmp_path / "ckpt.pt"
    torch.save(state, file)
    thesis.write_text("mine")
    torch.save({"model": {"x": torch.ones(1)}, "optimizer": state}, both)
    (tmp_path / "same.pt").hardlink_to(file)
    (tmp_path / "to-thesis").symlink_to(thesis)
    before = {path: path.read_bytes() for path in (file, thesis, both)}
    for out, message in (
        (thesis, "nothing else is replaced"),
        (both, "nothing else is replaced"),
        (file, "the file to be read"),
        (tmp_path / "same.pt", "the file to be read"),
        (tmp_path, "is a directory"),
    ):
        with pytest.raises(OutputExists, match=message):
            convert_file(model, file, out, to="hf", names=names, force=True)
    convert_file(model, file, tmp_path / "to-thesis", to="hf", names=names, force=True)
    assert not (tmp_path / "to-thesis").is_symlink()
    assert before == {path: path.read_bytes() for path in before}
    out = convert_file(model, file, tmp_path / "new" / "out.pt", to="hf", names=names)
    convert_file(model, file, out, to="hf", names=names, force=True)
    assert os.listdir(tmp_path / "new") == ["out.pt"]


@pytest.mark.parametrize("name", [".out.pt.partial", ".out.pt.zoo-partial"])
def test_a_link_at_the_stages_path_is_not_followed(
    name: str, native: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    model, state, names = native
    torch.save(state, tmp_path / "o.pt")
    (tmp_path / "victim").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "victim")
    convert_file(model, tmp_path / "o.pt", tmp_path / "out.pt", to="hf", names=names)
    assert (tmp_path / "victim").read_text() == "mine"
    assert len(torch.load(tmp_path / "out.pt", weights_only=True)["state"]) == len(state["state"])


class Full(io.BytesIO):
    """A file on a disk with room for a megabyte."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 1 << 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_is_named_and_leaves_nothing(
    native: tuple[Path, dict[str, Any], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state, names = native
    torch.save(state, tmp_path / "o.pt")
    large = {"large": torch.ones(1 << 20)}  # whose error torch hides behind its own
    monkeypatch.setattr("zoo.saving.optimizer_files._converted", lambda *_: large)
    save = zoo.saving.optimizer_files._save
    monkeypatch.setattr("zoo.saving.optimizer_files._save", lambda state, file: save(state, Full()))
    with pytest.raises(ZooError, match=r"out\.pt: not written: No space left"):
        convert_file(model, tmp_path / "o.pt", tmp_path / "out.pt", to="hf", names=names)
    assert os.listdir(tmp_path) == ["o.pt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"model.norm.weight model.norm.weight", "more than once"),
        (b"nothing.weight", "names: nothing.weight: no parameter"),
        (None, "No such file"),
    ],
)
def test_malformed_names_are_refused(
    content: bytes | None,
    message: str,
    native: tuple[Path, dict[str, Any], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, state, _ = native
    torch.save(state, tmp_path / "o.pt")
    if content is not None:
        (tmp_path / "names").write_bytes(content)
    asked = ["convert-optimizer", str(model), str(tmp_path / "o.pt"), "--to", "hf"]
    asked += ["--out", str(tmp_path / "out"), "--names", str(tmp_path / "names")]
    assert main(asked) > 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
