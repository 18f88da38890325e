"""Provenance, dtypes, heads, shards and errors of `zoo.load`, `zoo.save` and `zoo.convert`."""

import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import build, run

import zoo
from converters import manifest
from zoo import registry
from zoo.checkpoints.former_fields import DEFAULTS, RENAMED
from zoo.components.model import Model
from zoo.errors import (
    ConfigError,
    MissingTensors,
    NonFinite,
    OutputExists,
    OverflowOnCast,
    TieConflict,
    UnexpectedTensors,
    UnsupportedArchitecture,
    UsageError,
)
from zoo.saving.convert import dry_run

NAMES = sorted(registry.architectures())
CLASSES = "sequence_classification"
IDS = torch.tensor([[5, 9, 40, 2, 17, 30, 8]])


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


@pytest.fixture(params=NAMES)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint in each architecture's published layout."""
    return zoo.save(build(request.param).eval(), tmp_path / "published")


# --- loading -------------------------------------------------------------------------------------


def test_provenance_names_the_rule_of_each_tensor(published: Path, no_sockets: None) -> None:
    model = zoo.load(published)
    provenance = model.provenance
    assert provenance.directory == published
    assert (
        set(provenance.hashes) == {"model.safetensors"}
        and len(provenance.hashes["model.safetensors"]) == 64
    )
    owners = {name for name, _ in model.named_parameters()}
    assert set(provenance.rules) == owners
    assert all(": " in rule for rule in provenance.rules.values())
    with pytest.raises(AttributeError):
        model.config.layers = 3


def test_each_class_loads_its_own_head(published: Path) -> None:
    model = zoo.load(published)
    again = type(model).from_pretrained(published)
    assert type(again) is type(model) and not again.training
    other = next(e.model for e in registry.architectures().values() if e.model is not type(model))
    with pytest.raises(UnsupportedArchitecture, match=r"Use zoo\.load"):
        other.from_pretrained(published)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_dtype_is_the_requested_one(published: Path, dtype: str) -> None:
    model = zoo.load(published, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_overflow_in_a_cast_names_the_tensor(published: Path) -> None:
    weights = load_file(published / "model.safetensors")
    name = next(n for n, w in weights.items() if w.ndim == 2)
    weights[name][1, 2] = 1e6
    save_file(weights, published / "model.safetensors", {"format": "pt"})
    with pytest.raises(OverflowOnCast, match=r"1e\+06, which is beyond torch.float16"):
        zoo.load(published, dtype="float16")
    assert zoo.load(published, dtype="bfloat16") is not None


def test_loading_restores_the_garbage_collector(published: Path, tmp_path: Path) -> None:
    for before in (True, False):
        (gc.enable if before else gc.disable)()
        try:
            zoo.load(published)
            with pytest.raises(zoo.ZooError):
                zoo.load(tmp_path / "nothing")
            assert gc.isenabled() is before
        finally:
            gc.enable()


def test_weights_are_memory_mapped(tmp_path: Path) -> None:
    """A new process that loads 40 MB allocates no memory for them."""
    big = zoo.save(build("llama", dim=528, head_dim=88, hidden=2048, layers=4), tmp_path / "big")
    small = zoo.save(build("llama"), tmp_path / "small")
    script = f"""
import torch, zoo
zoo.load({str(small)!r})
def own():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(x.split()[1]) for x in file if x.startswith("Anonymous:")) / 1024
before = own()
model = zoo.load({str(big)!r})
size = sum(p.nbytes for p in model.parameters()) / 2**20
print(size, own() - before)
"""
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("this system does not say how much memory is a process's own")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    size, own = map(float, run.stdout.split())
    assert size > 40 and own < 4


def test_training_does_not_change_the_file(published: Path) -> None:
    before = (published / "model.safetensors").read_bytes()
    model = zoo.load(published).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert (published / "model.safetensors").read_bytes() == before


def test_head_can_be_omitted_but_not_invented(published: Path) -> None:
    model = zoo.load(published)
    bare = zoo.load(published, head="none")
    assert run(bare, IDS)[0].shape == (*IDS.shape, model.config.dim)
    with pytest.raises(UsageError, match="Did you mean none"):
        zoo.load(published, head="nonee")
    with pytest.raises(MissingTensors if CLASSES in model.heads else UsageError):
        zoo.load(published, head=CLASSES)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pruned_head": 1}, ConfigError, "pruned_head: unknown field"),
        ({"architectures": ["NoSuchModel"]}, UnsupportedArchitecture, "NoSuchModel"),
        ({"model_type": "mamba"}, UnsupportedArchitecture, "mamba.*bert, .*llama"),
    ],
)
def test_wrong_config_is_refused(
    published: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    edit(published / "config.json", **changes)
    with pytest.raises(error, match=message):
        zoo.load(published)


def test_head_follows_from_the_tensors_without_a_class(published: Path) -> None:
    """deberta-v3-base and Bio_ClinicalBERT have no `architectures` field."""
    named = zoo.load(published)
    edit(published / "config.json", architectures=...)
    model = zoo.load(published)
    assert model.config == named.config
    assert model.provenance.origin.reference_class == named.provenance.origin.reference_class


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_classifier_follows_from_the_tensors_without_a_class(name: str, tmp_path: Path) -> None:
    place = zoo.save(build(name, head="sequence_classification"), tmp_path / "x")
    edit(place / "config.json", architectures=...)
    assert zoo.load(place).config.head == "sequence_classification"


def test_unknown_field_loads_with_ignore_config(published: Path) -> None:
    edit(published / "config.json", pruned_head=1)
    assert zoo.load(published, ignore_config=["pruned_head"]) is not None


@pytest.mark.parametrize(
    ("name", "field"),
    [("gpt2", "n_layer"), ("bert", "num_hidden_layers"), ("llama", "num_hidden_layers")],
)
@pytest.mark.parametrize("declared", [1, 4])
def test_number_of_layers_must_match_the_config(
    tmp_path: Path, name: str, field: str, declared: int
) -> None:
    directory = zoo.save(build(name), tmp_path / "x")
    edit(directory / "config.json", **{field: declared})
    with pytest.raises(ConfigError, match=f"{field}: 3 found, {declared} declared"):
        zoo.load(directory)


def test_tied_config_with_untied_weights_is_refused(tmp_path: Path) -> None:
    directory = zoo.save(build("gpt2"), tmp_path / "x")
    weights = load_file(directory / "model.safetensors")
    embed = next(w for n, w in weights.items() if n.endswith("wte.weight"))
    weights["lm_head.weight"] = embed + 1
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(TieConflict, match=r"trust=\("):
        zoo.load(directory)
    model = zoo.load(directory, trust=["lm_head.weight"])
    assert torch.equal(model.embed.weight, embed + 1)


# --- random weights ------------------------------------------------------------------------------


@pytest.mark.slow
def test_random_weights_of_a_registry_name_need_no_file(no_sockets: None) -> None:
    def draw() -> Model:
        torch.manual_seed(3)
        changes = {"layers": 1, "hidden": 64}
        return zoo.load("llama2-7b", weights="random", dtype="bfloat16", config=changes)

    model = draw()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (model.config.dim, model.config.heads, model.config.vocab) == (4096, 32, 32000)
    assert abs(model.embed.weight.float().std() - 0.02) < 1e-3
    assert torch.equal(model.head.weight, draw().head.weight)
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("head", ["none", "sequence_classification"])
def test_random_weights_take_any_head(head: str) -> None:
    changes = {"layers": 1, "dim": 24, "heads": 4, "hidden": 32, "vocab": 53}
    model = zoo.load("gpt2", weights="random", head=head, config=changes)
    assert model.config.head == head


# --- giving back ---------------------------------------------------------------------------------


def besides_manifest(directory: Path) -> list[Path]:
    """It names what the files were made from."""
    return [path for path in directory.iterdir() if path.name != manifest.NAME]


def test_native_and_back_is_byte_for_byte(published: Path, tmp_path: Path) -> None:
    (published / "tokenizer.json").write_text("{}")
    (published / "generation_config.json").write_text('{"max_length": 5}')
    native = zoo.convert(published, tmp_path / "native", to="native")
    back = zoo.convert(native, tmp_path / "back", to="hf")
    for path in besides_manifest(published):
        assert (back / path.name).read_bytes() == path.read_bytes(), path.name
    theirs = zoo.load(published).state_dict()
    for name, tensor in zoo.load(native).state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_dry_run_shows_the_requested_conversion(published: Path, tmp_path: Path) -> None:
    native = zoo.convert(published, tmp_path / "native", to="native")
    there, written = (text.splitlines() for text in dry_run(published).split("\n\n"))
    back = dry_run(native, to="hf").partition("\n\n")[0].splitlines()
    assert [line.split(":")[0].strip() for line in written] == [
        "to be written (native)",
        *(path.name for path in sorted(native.glob("*.safetensors"))),
        "zoo.json",
        *(p.name for p in sorted(published.glob("generation_config.json"))),
    ]
    rows = [line.split() for line in there[1:-1]]
    assert {row[0] for row in rows} <= set(load_file(published / "model.safetensors"))
    assert len(rows) == len(back) - 2
    assert all(any(f"  {row[0]} " in line for line in back) for row in rows)
    assert "blocks.0.attn.q.weight" in dry_run(native)


def test_bin_is_saved_as_safetensors_that_the_reference_loads(
    published: Path, tmp_path: Path
) -> None:
    weights = load_file(published / "model.safetensors")
    (published / "model.safetensors").unlink()
    torch.save(weights, published / "pytorch_model.bin")
    back = zoo.save(zoo.load(published), tmp_path / "back")
    with safe_open(back / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(weights)


def test_shards_follow_the_source_or_the_requested_size(published: Path, tmp_path: Path) -> None:
    split = zoo.save(zoo.load(published), tmp_path / "split", max_shard_size=20_000)
    index = json.loads((split / "model.safetensors.index.json").read_text())
    files = {path.name for path in split.glob("model-*.safetensors")}
    assert len(files) > 1 and set(index["weight_map"].values()) == files
    again = zoo.convert(split, tmp_path / "again", to="hf")
    for path in besides_manifest(split):
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_changed_weights_are_saved(published: Path, tmp_path: Path) -> None:
    model = zoo.load(published)
    with torch.no_grad():
        model.embed.weight.mul_(2)
    saved = zoo.save(model, tmp_path / "doubled")
    assert torch.equal(zoo.load(saved).embed.weight, model.embed.weight)
    half = zoo.save(zoo.load(published, dtype="bfloat16"), tmp_path / "half")
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    assert {w.dtype for w in load_file(half / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("through", ("hf", "native"))
def test_config_changed_in_loading_is_saved(published: Path, tmp_path: Path, through: str) -> None:
    model = zoo.load(published, config={"init_std": 0.25})
    assert zoo.load(published).config.init_std != 0.25
    saved = zoo.save(model, tmp_path / "saved", to=through)
    again = zoo.load(zoo.convert(saved, tmp_path / "again", to="hf"))
    assert again.config == zoo.load(saved).config == model.config


def test_saved_checkpoint_can_be_verified_and_is_finite(published: Path, tmp_path: Path) -> None:
    model = zoo.load(published)
    assert not list(manifest.check(zoo.save(model, tmp_path / "saved")))
    zoo.load(tmp_path / "saved", verify=True)
    weight = next(model.parameters())
    with torch.no_grad():
        weight.view(-1)[0] = torch.nan
    with pytest.raises(NonFinite, match="is nan"):
        zoo.save(model, tmp_path / "odd")
    assert not (tmp_path / "odd").exists()
    zoo.save(model, tmp_path / "odd", allow_nonfinite=True)


def test_nothing_is_overwritten_without_force(published: Path, tmp_path: Path) -> None:
    place = tmp_path / "taken"
    place.mkdir()
    (place / "precious").write_text("x")
    with pytest.raises(OutputExists, match="force"):
        zoo.convert(published, place, to="hf")
    assert [p.name for p in place.iterdir()] == ["precious"]
    zoo.convert(published, place, to="hf", force=True)
    assert (place / "precious").read_text() == "x"
    with pytest.raises(UsageError, match="hf, native"):
        zoo.convert(published, tmp_path / "x", to="hff")


@pytest.mark.parametrize("name", ["../evil.safetensors", "/tmp/evil.safetensors", "a\\b", ""])
def test_native_file_that_points_elsewhere_is_refused(
    published: Path, tmp_path: Path, name: str
) -> None:
    native = zoo.convert(published, tmp_path / "native", to="native")
    record = json.loads((native / "zoo.json").read_text())
    for tensor in record["origin"]["tensors"].values():
        tensor[2] = name
    (native / "zoo.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="not what zoo writes"):
        zoo.load(native)


def test_native_config_with_former_field_names_is_read(published: Path, tmp_path: Path) -> None:
    native = zoo.convert(published, tmp_path / "native", to="native")
    record = json.loads((native / "zoo.json").read_text())
    now = dict(record["config"])
    former = {new: old for old, new in RENAMED.items()}
    if "buckets" in now:
        former["max_distance"] = "distance"
    record["config"] = {former.get(name, name): value for name, value in now.items()}
    record["config"] |= {"dual_chunk": None, "twice": False} if "rope" in now else {}
    edit(native / "zoo.json", **record)
    assert zoo.load(native).config.to_dict() == now
    shown = {name: value for name, value in now.items() if name not in {"head", *DEFAULTS}}
    assert zoo.info(native).config == shown


def test_native_config_with_a_field_of_another_model_is_refused(tmp_path: Path) -> None:
    native = zoo.save(build("gpt2"), tmp_path / "native", to="native")
    record = json.loads((native / "zoo.json").read_text())
    edit(native / "zoo.json", config={**record["config"], "twice": True})
    with pytest.raises(ConfigError, match="repeat: no such field"):
        zoo.load(native)


def test_incomplete_native_checkpoint_is_refused(published: Path, tmp_path: Path) -> None:
    native = zoo.convert(published, tmp_path / "native", to="native")
    weights = load_file(native / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    gone = weights.pop(name)
    save_file(weights, native / "model.safetensors", {"format": "pt"})
    with pytest.raises(MissingTensors, match=re.escape(name)):
        zoo.load(native)
    weights |= {name: gone, "more": gone.clone()}
    save_file(weights, native / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnexpectedTensors, match="more"):
        zoo.load(native)
