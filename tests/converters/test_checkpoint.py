"""Directories of weights: which files count, what an index may say, and how files are split."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import write

from converters.checkpoint import shard
from converters.formats import TensorInfo
from converters.formats.safetensors import SafetensorsReader
from converters.lazy import Lazy
from converters.opening import open_checkpoint
from converters.output import Item, Shard, index_of
from converters.paths import confined, is_plain
from zoo.errors import (
    AmbiguousCheckpoint,
    BadIndex,
    CorruptCheckpoint,
    DuplicateTensor,
    MissingShard,
    MissingTensors,
    NotACheckpoint,
    UnsafePath,
    ZooError,
)

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"


def index(directory: Path, weight_map: object, name: str = INDEX, **more: object) -> None:
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map} | more))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2)}, tmp_path / ONE, {"format": "pt"})
    save_file({"b": torch.zeros(3), "c": torch.ones(1)}, tmp_path / TWO, {"format": "pt"})
    index(tmp_path, {"a": ONE, "b": TWO, "c": TWO})
    return tmp_path


def test_a_single_file_is_opened(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.root, checkpoint.format) == (tmp_path, "safetensors")
    assert checkpoint.files == (tmp_path / "model.safetensors",)
    assert checkpoint.tensors == {"a": TensorInfo("a", (2,), "F32")}
    assert checkpoint.where == {"a": "model.safetensors"}
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.tensor("a").tolist() == [1, 1]
    with pytest.raises(MissingTensors, match=r"aa\. Did you mean a"):
        checkpoint.tensor("aa")


def test_shards_and_index_are_opened(sharded: Path) -> None:
    save_file({"z": torch.ones(1)}, sharded / "model-00003-of-00003.safetensors")
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.where == {"a": ONE, "b": TWO, "c": TWO}
    assert [file.name for file in checkpoint.files] == [ONE, TWO]
    assert checkpoint.unlisted == ("model-00003-of-00003.safetensors",)
    assert checkpoint.tensor("b").shape == (3,)
    index(sharded, {"c": TWO, "b": TWO, "a": ONE})  # order means nothing
    assert (
        open_checkpoint(sharded) == checkpoint
        or open_checkpoint(sharded).tensors == checkpoint.tensors
    )


def test_torch_files_are_opened_if_there_are_no_safetensors(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.format, checkpoint.tensor("a").tolist()) == ("torch", [1, 1])
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.ones(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    files = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    index(tmp_path, files, BIN_INDEX)
    assert open_checkpoint(tmp_path).where == files
    save_file({"s": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"m": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert open_checkpoint(tmp_path).tensors.keys() == {"s"}


def test_a_single_file_beside_an_index_is_ambiguous(sharded: Path) -> None:
    save_file({"a": torch.ones(2)}, sharded / "model.safetensors")
    with pytest.raises(
        AmbiguousCheckpoint, match=r"model\.safetensors and model\.safetensors\.index"
    ):
        open_checkpoint(sharded)
    index(sharded, {"a": "model.safetensors"})  # here both say the same
    assert open_checkpoint(sharded).where == {"a": "model.safetensors"}
    shutil.rmtree(sharded)
    sharded.mkdir()
    torch.save({"a": torch.ones(2)}, sharded / "pytorch_model.bin")
    index(sharded, {"a": "pytorch_model-1.bin"}, BIN_INDEX)
    with pytest.raises(AmbiguousCheckpoint):
        open_checkpoint(sharded)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match=r"Looked for model\.safetensors.*found nothing"):
        open_checkpoint(tmp_path)
    (tmp_path / "README.md").touch()
    with pytest.raises(NotACheckpoint, match=r"pytorch_model\.bin\.index\.json; found README\.md"):
        open_checkpoint(tmp_path)
    with pytest.raises(NotACheckpoint, match="give the directory that contains it"):
        open_checkpoint(tmp_path / "README.md")
    with pytest.raises(NotACheckpoint, match=r"model\.safetensors"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(NotACheckpoint, match="loop"):
        open_checkpoint(tmp_path / "loop")
    save_file({"a": torch.ones(1)}, tmp_path / ONE)
    with pytest.raises(BadIndex, match=f"{ONE} and no index"):
        open_checkpoint(tmp_path)


def test_missing_shards_are_all_named(sharded: Path) -> None:
    index(sharded, {"a": ONE, "b": TWO, "x": "model-3.safetensors", "y": "sub/model-4.safetensors"})
    (sharded / TWO).unlink()
    (sharded / TWO).symlink_to("nowhere")
    (sharded / ONE).write_bytes(b"corrupt, but nobody looked")
    with pytest.raises(MissingShard) as error:
        open_checkpoint(sharded)
    text = str(error.value)
    assert "3 of 4" in text
    assert f"{TWO} (a broken link), model-3.safetensors, sub/model-4.safetensors" in text


def test_corrupt_shards_are_all_named(sharded: Path) -> None:
    for name in (ONE, TWO):
        with (sharded / name).open("ab") as file:
            file.write(b"\0")
    with pytest.raises(CorruptCheckpoint, match=rf"(?s){ONE}.*{TWO}"):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, sharded / TWO)
    with pytest.raises(DuplicateTensor, match=rf"a \({ONE} and {TWO}\)"):
        open_checkpoint(sharded)


def test_an_index_that_disagrees_with_its_shards_is_refused(sharded: Path) -> None:
    index(sharded, {"a": ONE, "b": TWO, "d": TWO, "e": ONE})
    with pytest.raises(BadIndex) as error:
        open_checkpoint(sharded)
    text = str(error.value)
    assert INDEX in text
    assert f"lacks: d (not in {TWO}), e (not in {ONE})" in text
    assert f"leaves out tensors that its shards hold: c (in {TWO})" in text
    index(sharded, {"a": TWO, "b": ONE, "c": TWO})
    with pytest.raises(BadIndex, match=rf"a \(not in {TWO}\), b \(not in {ONE}\)"):
        open_checkpoint(sharded)


def test_a_shard_that_the_index_leaves_out_is_listed(sharded: Path) -> None:
    index(sharded, {"a": ONE})
    checkpoint = open_checkpoint(sharded)  # the plan says which tensors are missing
    assert checkpoint.tensors.keys() == {"a"}
    assert checkpoint.unlisted == (TWO,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "holds list"),
        ("{}", "field weight_map is null"),
        ('{"weight_map": null}', "field weight_map is null"),
        ('{"weight_map": []}', "field weight_map is"),
        ('{"weight_map": {}}', "field weight_map is empty"),
        ('{"weight_map": {"a": 1, "b": null, "c": ""}}', r"weight_map\.a.*\.b.*\.c"),
        ('{"weight_map": {"a": ["x"]}}', r"field weight_map\.a"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a'"),
        ('{"weight_map": {"a": "x"}, "weight_map": {}}', "'weight_map'"),
        (
            '{"metadata": {"total_size": NaN}, "weight_map": {"a": "x"}}',
            r"metadata\.total_size is NaN",
        ),
        ('{"metadata": {"total_size": "9"}, "weight_map": {"a": "x"}}', r"metadata\.total_size"),
        ('{"metadata": {"total_size": -1}, "weight_map": {"a": "x"}}', r"metadata\.total_size"),
        ('{"metadata": [], "weight_map": {"a": "x"}}', r"field metadata is \[\]"),
        ('{"metadata": 1, "weight_map": []}', "weight_map is .*metadata is 1"),
        ('{"weight_map": ' + "[" * 5000 + "]" * 5000 + "}", "nested deeper"),
    ],
)
def test_malformed_indices_are_refused(sharded: Path, text: str, message: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(BadIndex, match=message) as error:
        open_checkpoint(sharded)
    assert INDEX in str(error.value)


def test_a_total_may_be_a_float(sharded: Path) -> None:
    data = json.loads((sharded / INDEX).read_text())
    data["metadata"] = {"total_size": 24.0, "total_parameters": 6, "note": "published so"}
    (sharded / INDEX).write_text(json.dumps(data))
    assert len(open_checkpoint(sharded).tensors) == 3


def test_an_index_whose_metadata_is_null_is_read(sharded: Path) -> None:
    data = json.loads((sharded / INDEX).read_text())
    (sharded / INDEX).write_text(json.dumps({**data, "metadata": None}))
    assert len(open_checkpoint(sharded).tensors) == 3


# --- paths ---------------------------------------------------------------------------------------


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are opened from here on."""
    opened: list[str] = []
    real = os.open

    def noting(path: Path, *rest: int) -> int:
        opened.append(Path(path).name)
        return real(path, *rest)

    monkeypatch.setattr(os, "open", noting)
    return opened


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "sub/../model.safetensors",
        "./model.safetensors",
        "sub//model.safetensors",
        "/etc/hostname",
        "..",
        "sub\\..\\x",
        "C:/x.safetensors",
        "a\0b",
        "a\nb",
        "sub/",
    ],
)
def test_unsafe_names_are_refused(
    sharded: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"z": torch.ones(1)}, sharded.parent / "outside.safetensors")
    index(sharded, {"a": ONE, "z": name, "x": "/also/this"})
    opened = watched(monkeypatch)
    with pytest.raises(UnsafePath) as error:
        open_checkpoint(sharded)
    assert repr(name) in str(error.value)
    assert "/also/this" in str(error.value)
    assert opened == [INDEX]


def test_names_below_the_directory_are_accepted(sharded: Path) -> None:
    (sharded / "sub").mkdir()
    (sharded / TWO).rename(sharded / "sub" / "..two.safetensors")
    (sharded / TWO).symlink_to("sub/..two.safetensors")
    assert open_checkpoint(sharded).tensors.keys() == {"a", "b", "c"}
    index(sharded, {"a": ONE, "b": "sub/..two.safetensors", "c": "sub/..two.safetensors"})
    assert open_checkpoint(sharded).where["b"] == "sub/..two.safetensors"


@settings(max_examples=200, deadline=None)
@given(st.text("ab./\\:\0", max_size=8))
def test_plain_names_stay_below(name: str) -> None:
    if is_plain(name):
        whole = os.path.normpath(f"/base/{name}")
        assert whole == f"/base/{name}"


@pytest.mark.parametrize("kind", ["outside", "fifo", "device", "directory", "by a folder"])
def test_unsafe_files_are_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = tmp_path / "checkpoint", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    save_file({"a": torch.ones(2)}, outside / "w.safetensors")
    path = root / "model.safetensors"
    if kind == "outside":
        path.symlink_to(outside / "w.safetensors")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        (root / "sub").symlink_to(outside)
        index(root, {"a": "sub/w.safetensors"})
    opened = watched(monkeypatch)
    with pytest.raises(UnsafePath, match=r"links to|not a regular file"):
        open_checkpoint(root)
    assert set(opened) <= {INDEX}


def test_a_linked_directory_and_the_hubs_cache(tmp_path: Path, sharded: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    blobs = repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for n, name in enumerate((ONE, TWO, INDEX)):
        shutil.move(sharded / name, blobs / f"{n:064x}")
        (snapshot / name).symlink_to(Path("..", "..", "blobs", f"{n:064x}"))
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.where["b"] == TWO
    assert checkpoint.tensor("b").tolist() == [0, 0, 0]
    (tmp_path / "link").symlink_to(snapshot)
    assert open_checkpoint(tmp_path / "link").tensors == checkpoint.tensors
    (snapshot / ONE).unlink()
    (snapshot / ONE).symlink_to(Path("..", "..", "refs"))
    (repo / "refs").write_bytes((blobs / f"{0:064x}").read_bytes())
    with pytest.raises(UnsafePath, match="refs"):
        open_checkpoint(snapshot)
    with pytest.raises(MissingShard, match="is not there"):
        confined(snapshot, "config.json")
    os.mkfifo(snapshot / "config.json")
    with pytest.raises(UnsafePath, match="not a regular file"):
        confined(snapshot, "config.json")


# --- splitting -----------------------------------------------------------------------------------

sizes = st.lists(st.integers(0, 12), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(sizes, st.integers(1, 40))
def test_shards_equal_the_split_of_the_hub_library(counts: list[int], limit: int) -> None:
    state = {f"t{n}": torch.zeros(count) for n, count in enumerate(counts)}
    infos = [TensorInfo(name, (tensor.numel(),), "F32") for name, tensor in state.items()]
    theirs = split_torch_state_dict_into_shards(
        {n: torch.empty(t.shape, device="meta") for n, t in state.items()}, max_shard_size=limit
    )
    ours = {file: [info.name for info in tensors] for file, tensors in shard(infos, limit)}
    assert ours == theirs.filename_to_tensors


def test_no_tensors_are_one_empty_file() -> None:
    assert shard([], 10) == [("model.safetensors", [])]


@pytest.mark.parametrize("tied", [True, False])
def test_files_and_index_are_those_of_save_pretrained(tmp_path: Path, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    ours.mkdir()
    model.save_pretrained(theirs, max_shard_size="12KB")
    state = {n: p.detach() for n, p in model.named_parameters()}
    infos = [TensorInfo(name, tuple(p.shape), "F32") for name, p in state.items()]
    shards = shard(infos, 12_000)
    assert len(shards) > 3
    unread = Lazy.of(torch.empty(0))
    for name, tensors in shards:
        write(ours / name, {info.name: state[info.name] for info in tensors}, {"format": "pt"})
    made = [
        Shard.of(n, [Item(i, "", lambda: unread) for i in tensors], None) for n, tensors in shards
    ]
    for name, text in index_of(made).items():
        (ours / name).write_bytes(text)
    written = {path.name for path in theirs.iterdir()} - {"config.json", "generation_config.json"}
    assert {path.name for path in ours.iterdir()} == written
    for name in written:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert open_checkpoint(ours).where == open_checkpoint(theirs).where
    again = LlamaForCausalLM.from_pretrained(shutil.copytree(theirs, tmp_path / "x"))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_shard_that_changes_after_its_header_is_refused(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    save_file({"a": torch.ones(5)}, sharded / ONE)
    with pytest.raises(ZooError, match="changed"):
        checkpoint.tensor("a")
    assert SafetensorsReader(sharded / ONE).tensors["a"].shape == (5,)
