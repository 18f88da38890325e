"""What is given wrongly is answered in zoo's own words, whatever library would trip over it."""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build, run

import zoo
from zoo import registry
from zoo.errors import (
    ConfigError,
    InputError,
    MaskError,
    MissingTensors,
    OutputExists,
    ResourceLimit,
    UnsafePath,
    UsageError,
    ZooError,
)

NAMES = sorted(registry.architectures())
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
COUNTS += ("num_local_experts", "num_labels", "vocab_size", "hidden_size", "n_embd", "d_model")


@pytest.fixture(params=NAMES)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return zoo.save(build(request.param).eval(), tmp_path / "published")


def changed(directory: Path, **fields: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return directory


# --- config --------------------------------------------------------------------------------------


def test_excessive_counts_are_refused_at_once(published: Path) -> None:
    config = json.loads((published / "config.json").read_text())
    text = (published / "config.json").read_text()
    for field in config.keys() & set(COUNTS):
        started = time.process_time()
        with pytest.raises(ResourceLimit, match=rf"config\.json: {field}: "):
            zoo.load(changed(published, **{field: 10**10}))
        assert time.process_time() - started < 10
        (published / "config.json").write_text(text)


def test_any_number_in_a_config_field_loads_or_is_refused(published: Path) -> None:
    """Either an error names the file, or the model has outputs of the same shapes."""
    text = (published / "config.json").read_text()
    ids, answers = torch.ones(1, 3, dtype=torch.long) * 5, Counter[str]()
    shapes = [out.shape for out in run(zoo.load(published), ids)]
    for field, original in json.loads(text).items():
        for value in (0, -1, 10**400, -0.5, 1e300, [], ["a"], {}, "x", True):
            try:
                model = zoo.load(changed(published, **{field: value}))
                actual = [out.shape for out in run(model, ids)]
            except ZooError as error:
                answers["refused"] += 1
                named = (
                    str(published),
                    "lm_head.weight",
                    "embed_out.weight",
                )  # or the tied tensors
                assert any(n in str(error) for n in named), f"{field}: {value!r}: {error}"
            else:
                answers["run"] += 1
                assert actual == shapes, f"{field}: {value!r}: {actual}"
                assert field not in COUNTS or value is original, f"{field}: {value!r} is no count"
            (published / "config.json").write_text(text)
    assert answers["refused"] > answers["run"] > 0


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("llama", {"num_attention_heads": 0}, "num_attention_heads: 0 is not positive"),
        ("llama", {"hidden_size": -1}, "hidden_size: -1 is not positive"),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps: larger than any float"),
        ("bert", {"id2label": {"0": 10**4200, "1": "b"}}, "id2label: expected a number of labels"),
        (
            "bert",
            {"id2label": {"9" * 4200: "a", "1": "b"}},
            "id2label: expected a number of labels",
        ),
        ("roberta", {"pad_token_id": None}, "pad_token_id: null, and positions_after_pad needs"),
        ("roberta", {"max_position_embeddings": 1}, "max_position_embeddings: 1 leave none"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping: 0.0 is not"),
        ("llama", {"rope_parameters": {"rope_type": ["linear"]}}, "is not implemented"),
    ],
)
def test_errors_name_the_published_field(
    name: str, fields: dict[str, Any], says: str, tmp_path: Path
) -> None:
    directory = zoo.save(build(name).eval(), tmp_path / "published")
    with pytest.raises(ConfigError, match=says):
        zoo.load(changed(directory, **fields))


@pytest.mark.parametrize("field", ["original_max_position_embeddings", "beta_fast", "beta_slow"])
def test_negative_yarn_ramp_is_refused(field: str, tmp_path: Path) -> None:
    directory = zoo.save(build("llama").eval(), tmp_path / "published")
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 100.0, field: -8}
    with pytest.raises(ConfigError, match=f"{field}: -8 is not positive"):
        zoo.load(changed(directory, rope_parameters=rope))


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_ids_and_masks_of_a_wrong_type_are_refused(name: str) -> None:
    model = build(name).eval()
    ids = torch.ones(1, 3, dtype=torch.long)
    for value in ([[1, 2]], None, "text", ids.numpy(), ids.to(torch.int8), ids.to(torch.complex64)):
        with pytest.raises(InputError, match="expected"):
            run(model, value)  # type: ignore[arg-type]
    for mask in ([[1, 1, 1]], ids.numpy()):
        with pytest.raises(MaskError, match="expected a tensor"):
            model(ids, mask)


def test_token_types_of_another_length_are_refused() -> None:
    model = build("bert").eval()
    with pytest.raises(InputError, match=r"token type ids: \[1, 2\] for input_ids \[1, 3\]"):
        model(torch.ones(1, 3, dtype=torch.long), token_type_ids=torch.ones(1, 2, dtype=torch.long))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": 3},
        {"dtype": "float8_e4m3fn"},
        {"dtype": torch.int8},
        {"device": "cudaa"},
        {"device": "cuda:77"},
        {"head": 3},
        {"config": [1]},
        {"ignore_config": 5},
        {"trust": "wte"},
    ],
    ids=str,
)
def test_contradictory_options_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    directory = zoo.save(build("gpt2").eval(), tmp_path / "published")
    with pytest.raises(UsageError, match=next(iter(options))):
        zoo.load(directory, **options)


@pytest.mark.parametrize("repo", ["a/..", "-a/b", "a--b/c", "a/" + "b" * 200])
def test_invalid_repository_names_are_refused(repo: str) -> None:
    with pytest.raises(UsageError, match="repository"):
        zoo.load(f"hf:{repo}", local_files_only=True)


def test_wrong_arguments_of_save_are_refused() -> None:
    model: Any = build("gpt2")
    for wrong in ("", None, 5):
        with pytest.raises(UsageError, match="expected a directory"):
            zoo.save(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="expected a model of zoo's"):
        zoo.save(torch.nn.Linear(2, 2), "x")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max_shard_size"):
        zoo.save(model, "x", max_shard_size="5GB")  # type: ignore[arg-type]


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vocab.txt", "config.json"])
def test_files_outside_the_checkpoint_are_not_read(name: str, tmp_path: Path) -> None:
    directory = zoo.save(build("gpt2").eval(), tmp_path / "published")
    secret = tmp_path / "secret"
    secret.write_bytes((directory / name).read_bytes() if (directory / name).exists() else b"s")
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(secret)
    with pytest.raises(UnsafePath, match=name):
        zoo.convert(directory, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


def test_shard_missing_from_the_index_is_reported(tmp_path: Path) -> None:
    directory = zoo.save(build("gpt2").eval(), tmp_path / "published", max_shard_size=40_000)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    gone = sorted(set(index["weight_map"].values()))[-1]
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != gone}
    path.write_text(json.dumps(index))
    with pytest.raises(MissingTensors, match=f"{gone} lie there too, and the index"):
        zoo.load(directory)


def test_likely_cause_comes_first(tmp_path: Path) -> None:
    directory = zoo.save(build("llama").eval(), tmp_path / "published")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for prefix, cause in (("module.", "DataParallel"), ("base_model.model.", "peft")):
        save_file({prefix + name: x for name, x in tensors.items()}, path, {"format": "pt"})
        with pytest.raises(MissingTensors, match=cause) as error:
            zoo.load(directory)
        assert cause in str(error.value).splitlines()[1]
    save_file({}, path, {"format": "pt"})
    with pytest.raises(MissingTensors, match="hold no tensors at all"):
        zoo.load(directory)


def test_message_lists_at_most_twenty_errors_of_a_kind(tmp_path: Path) -> None:
    directory = zoo.save(build("bert").eval(), tmp_path / "published")
    changed(directory, hidden_size=88)
    with pytest.raises(ZooError, match="more of this kind") as error:
        zoo.load(directory)
    assert len(str(error.value).splitlines()) < 30


def test_force_replaces_neither_the_source_nor_its_neighbours(tmp_path: Path) -> None:
    models = tmp_path / "models"
    for name in ("gpt2", "bert"):
        zoo.save(build(name).eval(), models / name)
    with pytest.raises(OutputExists, match="contains the source"):
        zoo.convert(models / "gpt2", models, to="hf", force=True)
    with pytest.raises(OutputExists, match="contains the source"):
        zoo.convert(models / "gpt2", models / "gpt2", to="native", force=True)
    zoo.save(build("gpt2").eval(), models, force=True)
    assert {"bert", "gpt2", "model.safetensors"} < set(os.listdir(models))
    assert zoo.load(models / "bert").architecture == "bert"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tensors", []),
        ("tensors", {"x": ["F99", [1], "model.safetensors"]}),
        ("tensors", {"x": ["F32", [-1], "model.safetensors"]}),
        ("tensors", {"x": ["F32", [True], "model.safetensors"]}),
        ("tensors", {"x": ["F32", [2, 1.0], "model.safetensors"]}),
        ("tensors", {"x": ["F32", 2, "model.safetensors"]}),
        ("tensors", {"x": ["F32", [2]]}),
        ("tensors", {"x": ["F32", [2], 5]}),
        ("tensors", {"x": ["F32", [2], "../model.safetensors"]}),
        ("metadata", 5),
        ("config", 5),
        ("config", "{"),
        ("class", 5),
        ("dialect", "fh"),
    ],
)
def test_invalid_native_metadata_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    path = zoo.save(build("gpt2").eval(), tmp_path / "native", to="native") / "zoo.json"
    record = json.loads(path.read_text())
    record["origin"][field] = value
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=rf"origin\.{field}"):
        zoo.load(path.parent)


def test_native_metadata_may_name_an_empty_tensor(tmp_path: Path) -> None:
    path = zoo.save(build("gpt2").eval(), tmp_path / "native", to="native") / "zoo.json"
    record = json.loads(path.read_text())
    record["origin"]["tensors"]["x"] = ["F32", [0, 3], "model.safetensors"]
    path.write_text(json.dumps(record))
    zoo.load(path.parent)


def cached_as_gpt2(cache: Path, architecture: str, **config: Any) -> Path:
    """A tiny model in a hub's cache, under the repository that `gpt2` names."""
    snapshot = cache / "models--openai-community--gpt2" / "snapshots" / ("1" * 40)
    zoo.save(build(architecture, **config).eval(), snapshot)
    (refs := snapshot.parents[1] / "refs").mkdir()
    (refs / "main").write_text("1" * 40)
    return snapshot


def test_registry_name_with_another_architecture_is_refused(tmp_path: Path) -> None:
    cached_as_gpt2(tmp_path, "bert")
    where: Any = {"cache_dir": tmp_path, "local_files_only": True}
    with pytest.raises(ConfigError, match="architecture: expected gpt2, found bert"):
        zoo.load("gpt2", **where)
    assert zoo.load("hf:openai-community/gpt2", **where)


def test_registry_name_with_another_size_is_refused(tmp_path: Path) -> None:
    snapshot = cached_as_gpt2(tmp_path, "gpt2", dim=32, layers=3, heads=4)
    where: Any = {"cache_dir": tmp_path, "local_files_only": True}
    says = (
        "not the checkpoint that is called gpt2:\n(.*\n)*  n_embd: expected 768, found 32\n"
        "  n_layer: expected 12, found 3\n(.*\n)*.*hf:openai-community/gpt2, or its directory"
    )
    with pytest.raises(ConfigError, match=says):
        zoo.load("gpt2", **where)
    with pytest.raises(ConfigError, match=says):
        zoo.convert("gpt2", tmp_path / "out", to="native", **where)
    assert not (tmp_path / "out").exists()
    assert "n_layer: expected 12, found 3" in zoo.info("gpt2", **where).mismatch
    assert zoo.info("gpt2", **where).parameters is None
    for ref in ("hf:openai-community/gpt2", snapshot):
        assert zoo.load(ref, **(where if ref is not snapshot else {})).config.layers == 3


def test_caller_may_change_the_size_of_a_registry_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is held against the registry where the caller changes nothing."""
    cached_as_gpt2(tmp_path, "gpt2")
    model = zoo.load("hf:openai-community/gpt2", cache_dir=tmp_path, local_files_only=True)
    count = sum(p.numel() for p in model.parameters())
    config = json.loads(model.provenance.origin.config)
    gpt2 = registry.checkpoints()["gpt2"]._replace(config=config, parameters=count)
    monkeypatch.setitem(registry.checkpoints(), "gpt2", gpt2)
    where: Any = {"cache_dir": tmp_path, "local_files_only": True}
    assert zoo.load("gpt2", **where).config.layers == model.config.layers
    assert zoo.load("gpt2", head="none", **where)  # fewer parameters, as asked for
    assert zoo.load("gpt2", config={"eps": 1e-3}, **where).config.eps == 1e-3
    for entry in (gpt2._replace(parameters=count + 1), gpt2._replace(config={}, parameters=1)):
        monkeypatch.setitem(registry.checkpoints(), "gpt2", entry)
        with pytest.raises(ConfigError, match=rf"parameters: expected .*, found {count:,}"):
            zoo.load("gpt2", **where)


@pytest.mark.parametrize("option", ["weights", "device", "expect", "verify", "heads"])
def test_convert_rejects_options_of_other_functions(option: str, tmp_path: Path) -> None:
    source = zoo.save(build("gpt2").eval(), tmp_path / "published")
    with pytest.raises(UsageError, match=rf"^{option}: not an option of convert"):
        zoo.convert(source, tmp_path / "out", to="native", **{option: "random"})
    assert not (tmp_path / "out").exists()
