"""`zoo convert --adapter`: the adapter is merged into each tensor while converting."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import ADAPTED, FP64, Made, distance, run, truth
from safetensors.torch import load_file, save_file
from torch import Tensor

import zoo
from converters.lazy import Decoded
from converters.manifest import NAME, check
from zoo.cli.app import main
from zoo.errors import NotACheckpoint, PlanError, UsageError
from zoo.lora.files import Factors
from zoo.lora.merging import FactorSlice, LowRankUpdate, Merged, product
from zoo.lora.targets import TargetMatrix
from zoo.parity.reference import Reference

ROOT = Path(__file__).parents[2]


def tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    mine, theirs = tensors(one), tensors(other)
    return mine.keys() == theirs.keys() and all(mine[n].equal(x) for n, x in theirs.items())


@pytest.mark.parametrize("key", ADAPTED)
@torch.no_grad()
def test_converting_an_adapter_equals_merging_and_saving(key: str, tmp_path: Path) -> None:
    made = Made(tmp_path, key)
    zoo.convert(made.base, tmp_path / "hf", adapter=made.adapter, memory=1, threads=1)
    zoo.load(made.base, adapter=made.adapter, merge=True).save_pretrained(tmp_path / "saved")
    assert same(tmp_path / "hf", tmp_path / "saved")
    wanted = tensors(made.merged)
    assert all(distance(x, wanted[n]) < 1e-14 for n, x in tensors(tmp_path / "hf").items())
    # through native files, before and after the adapter
    zoo.convert(made.base, tmp_path / "native", to="native")
    zoo.convert(tmp_path / "native", tmp_path / "hf2", adapter=made.adapter)
    assert same(tmp_path / "hf2", tmp_path / "hf")
    zoo.convert(made.base, tmp_path / "native2", to="native", adapter=made.adapter)
    assert distance(run(zoo.load(tmp_path / "native2")), truth(made)) < FP64


@pytest.mark.parametrize("to", ["meta", "gguf"])
@torch.no_grad()
def test_from_and_to_other_dialects(to: str, tmp_path: Path) -> None:
    """Factors have the reference's names, whatever dialect the base has."""
    made = Made(tmp_path, "llama/multi-head", ends=("q_proj", "down_proj"), dtype=torch.float32)
    kept: dict[str, Any] = {"to": to}
    zoo.convert(made.base, tmp_path / "first", **kept)
    zoo.convert(tmp_path / "first", tmp_path / "then", adapter=made.adapter, **kept)
    zoo.convert(made.base, tmp_path / "at-once", adapter=made.adapter, **kept)
    files = {
        name: [p.read_bytes() for p in (tmp_path / name).iterdir() if p.suffix in (".pth", ".gguf")]
        for name in ("first", "then", "at-once")
    }
    assert files["then"] == files["at-once"] != files["first"]
    assert len(files["then"]) == 1


def test_the_manifest_names_the_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, out = Made(tmp_path, "llama/base"), tmp_path / "out"
    asked = ["convert", str(made.base), "--adapter", str(made.adapter), "--to", "hf"]
    assert main([*asked, "--dry-run"]) == 0
    assert "changed by the adapter: 12 tensors" in capsys.readouterr().out
    assert main([*asked, "--out", str(out), "--quiet"]) == 0
    manifest = json.loads((out / NAME).read_bytes())
    files = ("adapter_config.json", "adapter_model.safetensors")
    assert {name: manifest["sources"][name]["sha256"] for name in files} == manifest["adapter"]
    rules = {n: t["rule"] for n, t in manifest["files"]["model.safetensors"]["tensors"].items()}
    changed = {name for name, rule in rules.items() if rule.endswith(" + the adapter")}
    assert changed == {n for n in rules if any(f"{end}." in n for end in ADAPTED["llama/base"])}
    assert main(["check", str(out)]) == 0
    assert (
        f"adapter_model.safetensors, sha256 {manifest['adapter'][files[1]]}"
        in capsys.readouterr().out
    )

    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    assert len(list(check(out))) == 1


KILLED = """
import os, signal, sys
import zoo
count, write = 0, os.pwrite
def pwrite(*given):
    global count
    count += 1
    if count == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*given)
os.pwrite = pwrite
seen = []
zoo.convert(*sys.argv[1:3], adapter=sys.argv[3], threads=1, tell=seen.append)
print(seen[-1]["resumed"], any(event["event"] == "restart" for event in seen))
"""


@pytest.mark.slow
def test_a_killed_conversion_resumes_with_the_same_adapter_only(tmp_path: Path) -> None:
    made, out = Made(tmp_path, "llama/base"), tmp_path / "out"

    def convert(at: int) -> subprocess.CompletedProcess[str]:
        asked = [str(made.base), str(out), str(made.adapter), str(at)]
        return subprocess.run(
            [sys.executable, "-c", KILLED, *asked], cwd=ROOT, capture_output=True, text=True
        )

    assert convert(9).returncode == -signal.SIGKILL
    assert not out.exists()
    resumed, restarted = convert(0).stdout.split()
    assert int(resumed) > 0
    assert restarted == "False"
    zoo.convert(made.base, tmp_path / "whole", adapter=made.adapter)
    assert (out / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()

    out = tmp_path / "other"
    assert convert(9).returncode == -signal.SIGKILL
    place = made.adapter / "adapter_model.safetensors"
    changed = {name: factor * 2 for name, factor in load_file(place).items()}
    save_file(changed, place, {"format": "pt"})
    assert convert(0).stdout.split()[0] == "0", "nothing of another adapter's is kept"
    assert not same(out, tmp_path / "whole")


def test_conversion_in_parts_gives_the_same_bytes(tmp_path: Path) -> None:
    made = Made(tmp_path, "llama/base")
    kept: dict[str, Any] = {"adapter": made.adapter, "max_shard_size": 300_000}
    for part in ("2/2", "1/2"):
        zoo.convert(made.base, tmp_path / "parts", part=part, **kept)
    zoo.convert(made.base, tmp_path / "whole", **kept)
    files = sorted(os.listdir(tmp_path / "whole"))
    assert len(files) > 4
    assert all(
        (tmp_path / "parts" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes()
        for n in files
    )


# --- a piece at a time ---------------------------------------------------------------------------


@pytest.mark.parametrize("embedding", [False, True])
def test_only_the_requested_part_of_an_update_is_computed(embedding: bool) -> None:
    """The whole matrix would be 160 GB."""
    size = 200_000
    a, b = torch.randn(2, size), torch.randn(size, 2)
    every = torch.arange(size)
    part = FactorSlice(TargetMatrix("x", None, (0, every), (1, every)), every, every)
    array = Decoded((size, size), torch.float32, lambda rows, columns: torch.ones(1, 1))
    merged = Merged(array, [LowRankUpdate(part, Factors(a, b, 0.5, embedding))])
    part = merged.matrix(slice(150_001, 150_004), slice(7, 900))
    rows, columns = (a.mT, b.mT) if embedding else (b, a)
    wanted = 1 + rows[150_001:150_004] @ columns[:, 7:900] * 0.5
    assert torch.allclose(part, wanted, atol=1e-5)


@pytest.mark.parametrize("order", ["in order", "turned", "one in three"])
def test_tiles_have_the_bits_of_the_whole_product(order: str) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 1009).double(), torch.randn(211, 5).double()
    rows, columns = torch.arange(3, 200), torch.arange(11, 1000)
    if order == "turned":
        rows, columns = rows.flip(0), columns.flip(0)
    if order == "one in three":
        rows, columns = rows[::3], columns[::3]
    every = ((rows, columns), (rows, torch.arange(1009)), (torch.arange(211), columns))
    for high, wide in (*every, (torch.arange(3, 65), torch.arange(383, 385))):
        assert torch.allclose(product(b, a, high, wide), (b @ a)[high][:, wide], atol=1e-12)
    assert product(b, a, rows[:0], columns).shape == (0, len(columns))


# --- heads ---------------------------------------------------------------------------------------


def classifier(made: Made, labels: int, task: str | None = "SEQ_CLS", **changes: Any) -> Tensor:
    """The adapter with its own head, as peft saves modules_to_save."""
    place, config = (made.adapter / n for n in ("adapter_model.safetensors", "adapter_config.json"))
    dim = json.loads((made.base / "config.json").read_text())["hidden_size"]
    score = torch.randn(labels, dim, generator=torch.Generator().manual_seed(1)).double()
    save_file({**load_file(place), "base_model.model.score.weight": score}, place, {"format": "pt"})
    fields = {**json.loads(config.read_text()), "task_type": task, "modules_to_save": ["score"]}
    config.write_text(json.dumps({**fields, **changes}))
    return score


@pytest.mark.parametrize("labels", [2, 5])
@torch.no_grad()
def test_an_adapter_brings_a_head_that_the_base_lacks(labels: int, tmp_path: Path) -> None:
    made = Made(tmp_path, "llama/base")
    score = classifier(made, labels)
    merged = {n: x for n, x in tensors(made.merged).items() if n != "lm_head.weight"}
    config = json.loads((made.merged / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0}
    config["id2label"] = {str(n): f"LABEL_{n}" for n in range(labels)}
    save_file(
        {**merged, "score.weight": score}, made.merged / "model.safetensors", {"format": "pt"}
    )
    (made.merged / "config.json").write_text(json.dumps(config))
    reference = Reference(made.merged, "LlamaForSequenceClassification", torch.float64, lifted=True)
    ids = torch.arange(3, 14)[None]
    wanted = next(iter(reference({"input_ids": ids}).values())).detach()
    assert wanted.shape == (1, labels)

    model = zoo.load(made.base, adapter=made.adapter)
    assert model.score.weight.requires_grad
    assert distance(model(ids), wanted) < FP64
    assert distance(model.merge_adapter()(ids), wanted) < FP64
    zoo.convert(made.base, tmp_path / "out", adapter=made.adapter)
    assert distance(zoo.load(tmp_path / "out")(ids), wanted) < FP64
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    again = Reference(
        tmp_path / "out", "LlamaForSequenceClassification", torch.float64, lifted=True
    )
    assert distance(next(iter(again({"input_ids": ids}).values())).detach(), wanted) < FP64
    # on a classifier with another number of labels
    zoo.convert(tmp_path / "out", tmp_path / "native", to="native")
    for base in (tmp_path / "native", tmp_path / "out"):
        other = Made(tmp_path / base.name / "x", "llama/base")
        classifier(other, 7)
        assert zoo.load(base, adapter=other.adapter)(ids).shape == (1, 7)


def test_missing_heads_are_reported(tmp_path: Path) -> None:
    made = Made(tmp_path, "llama/base")
    classifier(made, 5, None)
    with pytest.raises(PlanError, match=r"score.weight: .* another head than lm: pass head="):
        zoo.load(made.base, adapter=made.adapter)
    ids = torch.arange(3, 14)[None]
    model = zoo.load(made.base, adapter=made.adapter, head="sequence_classification")
    assert model(ids).shape == (1, 5)
    classifier(made, 5)
    with pytest.raises(PlanError, match=r"score.weight"):
        zoo.load(made.base, adapter=made.adapter, config={"labels": 4})
    made32 = Made(tmp_path / "narrow", "llama/base", dtype=torch.float32)
    classifier(made32, 5)
    zoo.convert(made32.base, tmp_path / "gguf", to="gguf")
    zoo.convert(made32.base, tmp_path / "native", to="native")
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    for base in (file, tmp_path / "native"):
        with pytest.raises(UsageError, match=r"brings score.weight, .* with --to hf first"):
            zoo.load(base, adapter=made32.adapter)


@pytest.mark.parametrize(("key", "to"), [("gpt2/base", "native"), ("llama/base", "gguf")])
@torch.no_grad()
def test_whole_arrays_on_bases_of_other_names(key: str, to: str, tmp_path: Path) -> None:
    """Trained biases and norms are mapped to the base's names."""
    ends = ADAPTED[key][:1]
    made = Made(tmp_path, key, ends=ends, dtype=torch.float32, bias="all")
    place, base = made.adapter / "adapter_model.safetensors", tensors(made.base)
    names = [n for n in base if n.endswith(("c_attn.bias", "norm.weight", "ln_f.bias"))]
    more = {f"base_model.model.{name}": base[name] + 0.5 for name in names}
    assert more
    save_file({**load_file(place), **more}, place, {"format": "pt"})
    zoo.convert(made.base, tmp_path / "other", to=to)
    zoo.convert(tmp_path / "other", tmp_path / "then", to=to, adapter=made.adapter)
    zoo.convert(made.base, tmp_path / "wanted", to=to, adapter=made.adapter)
    for path in (tmp_path / "wanted").iterdir():
        if path.suffix in (".gguf", ".safetensors"):
            assert (tmp_path / "then" / path.name).read_bytes() == path.read_bytes()
            assert (tmp_path / "other" / path.name).read_bytes() != path.read_bytes()


def test_an_adapter_alone_is_refused_as_a_model(tmp_path: Path) -> None:
    made = Made(tmp_path, "llama/base")
    with pytest.raises(NotACheckpoint, match=r"an adapter, .* adapter="):
        zoo.load(made.adapter)
