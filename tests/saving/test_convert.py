"""`zoo.convert`: bounded, resumable, checkable; and the same bytes whatever happens on the way."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save as as_bytes

import zoo
from converters.formats import TensorInfo
from converters.lazy import Lazy
from converters.manifest import NAME, check, digest
from converters.output import Item, Output, Shard
from converters.spec import load_spec
from converters.staging.stage import Stage
from converters.writer import WriteOptions, _Look, _Run, run
from zoo import registry
from zoo.cli.app import main
from zoo.errors import (
    ChecksumMismatch,
    NonFinite,
    NotACheckpoint,
    OutputExists,
    OverflowOnCast,
    UsageError,
    ZooError,
)
from zoo.parity.checks import differences
from zoo.parity.fixtures import hot_checkpoint

ROOT = Path(__file__).parents[2]
NAMES = sorted(registry.architectures())


def hot(directory: Path, name: str = "gpt2", variant: str = "") -> Path:
    entry = registry.architectures()[name]
    hot_checkpoint(entry, variant or next(iter(entry.variants)), directory)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def beside(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.parent.iterdir())


def large(directory: Path, name: str) -> Path:
    """Its first variant with a vocabulary so large that the embedding takes 300 KB."""
    entry = registry.architectures()[name]
    torch.manual_seed(0)
    variant = next(iter(entry.variants.values()))["config"]
    fields, problems = load_spec(entry.spec).dialect("hf").read_config(variant)
    assert not problems
    small = entry.model(entry.config_class(**fields))
    _, width = next(p for n, p in small.named_parameters() if "embed" in n).shape
    fields["vocab"] = 300_000 // (4 * width) + 1
    model = entry.model(entry.config_class(**fields))
    model.architecture = name
    return zoo.save(model.eval(), directory)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hot(tmp_path_factory.mktemp("source") / "gpt2")


# --- the same bytes ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_conversion_in_small_pieces_comes_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    """As loading and saving would write it; every byte of the source comes back."""
    first = hot(tmp_path / "source", name)
    zoo.convert(first, tmp_path / "native", to="native", memory=1, max_shard_size=40_000)
    zoo.convert(tmp_path / "native", tmp_path / "back", to="hf", memory=1)
    zoo.convert(first, tmp_path / "copy", to="hf")
    assert differences(first, tmp_path / "back") == []
    assert differences(first, tmp_path / "copy") == []
    zoo.save(zoo.load(first), tmp_path / "saved", to="native")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    made: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "native").glob("*.safetensors"):
        made |= load_file(path)
    assert made.keys() == saved.keys()
    assert all(torch.equal(made[n], saved[n]) for n in saved)


@pytest.mark.parametrize("name", NAMES)
def test_writing_in_pieces_equals_writing_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One matrix of 300 KB is turned, widened and copied in several pieces of 64 KB at most."""
    first, sizes = large(tmp_path / "source", name), list[int]()
    real = _Run._pieces

    def pieces(self: _Run, item: Item, look: _Look, start: int) -> Iterator[memoryview]:
        lengths = list[int]()
        for piece in real(self, item, look, start):
            lengths.append(len(piece))
            yield piece
        sizes.append(len(lengths))
        assert max(lengths, default=0) <= 64 << 10

    monkeypatch.setattr(_Run, "_pieces", pieces)
    zoo.convert(first, tmp_path / "native", to="native", memory=1)
    assert max(sizes) >= 5
    sizes.clear()
    zoo.convert(first, tmp_path / "wide", to="native", memory=1, dtype="float64")
    assert max(sizes) >= 10
    monkeypatch.undo()
    zoo.convert(tmp_path / "native", tmp_path / "back", to="hf", memory=1)
    assert differences(first, tmp_path / "back") == []
    whole = zoo.convert(first, tmp_path / "whole", to="native", memory=1 << 30)
    narrow, wide, kept = (
        load_file(path / "model.safetensors")
        for path in (tmp_path / "native", tmp_path / "wide", whole)
    )
    assert all(
        torch.equal(narrow[n], x) and torch.equal(wide[n], x.double()) for n, x in kept.items()
    )


@pytest.mark.parametrize(("memory", "threads"), [(1 << 20, 1), (1 << 20, 4), (3 << 20, 2)])
def test_buffers_of_all_threads_stay_within_the_memory_asked_for(
    source: Path, tmp_path: Path, memory: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers: dict[int, memoryview] = {}  # held, so that no other gets its id
    runs: list[_Run] = []
    real = _Run._buffer

    def buffer(self: _Run, name: str = "pieces") -> memoryview:
        one = real(self, name)
        buffers[id(one)] = one
        runs.append(self)
        return one

    monkeypatch.setattr(_Run, "_buffer", buffer)
    zoo.convert(source, tmp_path / "out", to="native", memory=memory, threads=threads)
    sizes = {len(one) for one in buffers.values()}
    # and it is made use of, up to half a megabyte each: small pieces are slow
    assert sizes == {min(512 << 10, memory // (3 * threads) // 4096 * 4096)}
    assert sum(map(len, buffers.values())) + threads * runs[0].slab <= memory


def test_memory_and_threads_do_not_change_the_bytes(source: Path, tmp_path: Path) -> None:
    ways: list[dict[str, Any]] = [
        {},
        {"memory": 1},
        {"threads": 1},
        {"threads": 7, "memory": 10**6},
    ]
    for n, way in enumerate(ways):
        zoo.convert(source, tmp_path / str(n), to="native", **way)
    first, *others = (contents(tmp_path / str(n)) for n in range(len(ways)))
    assert all(other == first for other in others)


def test_a_file_that_only_changes_its_names_is_copied_to_the_byte(
    source: Path, tmp_path: Path
) -> None:
    zoo.convert(source, tmp_path / "copy", to="hf")
    one, other = contents(source), contents(tmp_path / "copy")
    other.pop(NAME)
    assert one == other


# --- dtypes --------------------------------------------------------------------------------------


def test_a_cast_equals_torchs_and_is_in_the_manifest(source: Path, tmp_path: Path) -> None:
    zoo.convert(source, tmp_path / "half", to="hf", dtype="bfloat16")
    before, after = (load_file(d / "model.safetensors") for d in (source, tmp_path / "half"))
    assert all(torch.equal(x.bfloat16(), after[n]) for n, x in before.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    data = json.loads((tmp_path / "half" / NAME).read_text())["files"]["model.safetensors"]
    assert all(t["cast"] == "F32 -> BF16" and t["lossy"] for t in data["tensors"].values())
    zoo.convert(tmp_path / "half", tmp_path / "wide", to="hf", dtype="float32")
    data = json.loads((tmp_path / "wide" / NAME).read_text())["files"]["model.safetensors"]
    assert not any("lossy" in t for t in data["tensors"].values())


def edited(source: Path, directory: Path, name: str, value: float) -> Path:
    directory.mkdir()
    for path in source.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("to", ["native", "hf"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_are_refused_by_position(
    source: Path, tmp_path: Path, to: str, value: float
) -> None:
    name = "transformer.h.1.attn.c_attn.weight"
    broken = edited(source, tmp_path / "broken", name, value)
    wanted = rf"{name}\[0, 7\]" if to == "hf" else r"blocks\.1\.attn\.q\.weight\[7, 0\]"
    with pytest.raises(NonFinite, match=f"{wanted} is {value}"):
        zoo.convert(broken, tmp_path / "out", to=to)
    assert beside(tmp_path / "out") == ["broken"]
    zoo.convert(broken, tmp_path / "out", to=to, allow_nonfinite=True)


def test_position_of_a_nonfinite_value_counts_all_pieces() -> None:
    unread = Lazy.of(torch.empty(0))
    item = Item(TensorInfo("x", (3, 50), "F16"), "", lambda: unread, stored="F32")
    values = torch.zeros(3, 50)
    values[1, 49], values[2, 3], values[2, 4] = torch.nan, 1e6, 1e7
    look = _Look(item)
    for piece in values.flatten().split(40):
        look.at(piece.half(), piece)
    assert (look.nonfinite, look.overflow) == ("[1, 49] is nan", "[2, 3] is 1e+06")


def test_overflow_in_a_cast_is_refused_by_position(source: Path, tmp_path: Path) -> None:
    name = "transformer.h.0.mlp.c_fc.bias"
    large = edited(source, tmp_path / "large", name, 1e6)
    with pytest.raises(OverflowOnCast, match=rf"{name}\[7\] is 1e\+06"):
        zoo.convert(large, tmp_path / "out", to="hf", dtype="float16")
    zoo.convert(large, tmp_path / "out", to="hf", dtype="bfloat16")


def test_zero_and_duplicate_tensors_are_reported(source: Path, tmp_path: Path) -> None:
    copy = edited(source, tmp_path / "copy", "transformer.wpe.weight", 1.0)
    tensors = load_file(copy / "model.safetensors")
    tensors["transformer.ln_f.bias"].zero_()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    events: list[dict[str, Any]] = []
    zoo.convert(copy, tmp_path / "out", to="hf", tell=events.append)
    assert events[0]["event"] == "start" and events[-1]["event"] == "done"
    assert events[-1]["zeros"] == ["transformer.ln_f.bias"]
    assert {e["tensor"] for e in events if e["event"] == "tensor"} == tensors.keys()
    assert [e["file"] for e in events if e["event"] == "file"] == ["model.safetensors"]
    done = [e["done"] for e in events if e["event"] == "tensor"]
    sizes = [tensors[e["tensor"]].nbytes for e in events if e["event"] == "tensor"]
    assert done == [*accumulate(sizes)] and len(done) > 10


def test_duplicates_are_reported_from_64_kilobytes_on(tmp_path: Path) -> None:
    """Smaller ones are equal by chance, zeros by nature."""
    numbers = torch.arange(1.0, 1 + (64 << 10) / 4)
    tensors = {"a": numbers, "b": numbers.clone(), "c": numbers + 1, "z": numbers * 0}
    tensors |= {"y": numbers * 0, "s": numbers[1:].clone(), "t": numbers[1:].clone()}
    items = [
        Item(TensorInfo(n, tuple(t.shape), "F32"), "", partial(Lazy.of, t))
        for n, t in tensors.items()
    ]
    output = Output((Shard.of("x.safetensors", items, None),))
    report = run(output, Stage(tmp_path), WriteOptions(sha256=False))
    assert report.duplicates == [["a", "b"]] and sorted(report.zeros) == ["y", "z"]


# --- manifest and check --------------------------------------------------------------------------


def test_check_names_the_tensor_with_a_flipped_bit(source: Path, tmp_path: Path) -> None:
    out = zoo.convert(source, tmp_path / "out", to="native", max_shard_size=40_000)
    assert list(check(out, sha256=True)) == []
    data = json.loads((out / NAME).read_text())["files"]
    random = torch.Generator().manual_seed(0)
    for name in sorted(n for n in data if n.endswith(".safetensors")):
        path, whole = out / name, (out / name).read_bytes()
        head = 8 + int.from_bytes(whole[:8], "little")
        offsets = json.loads(whole[8:head])
        for at in torch.randint(len(whole), (12,), generator=random).tolist():
            flipped = bytearray(whole)
            flipped[at] ^= 1 << (at % 8)
            path.write_bytes(flipped)
            (damage,) = check(out)
            assert damage.file == name
            if at < head:
                assert "header" in damage.what
            else:
                start, end = offsets[damage.tensor]["data_offsets"]
                assert start <= at - head < end
        path.write_bytes(whole)
    (out / "config.json" if (out / "config.json").exists() else out / "zoo.json").write_text("{}")
    assert [d.tensor for d in check(out)] == [""]


def test_a_files_own_digest_is_checked_when_asked(source: Path, tmp_path: Path) -> None:
    """Each tensor is as the manifest says, and the file is not the one that was written."""
    out = zoo.convert(source, tmp_path / "out", to="native")
    fields = json.loads((out / NAME).read_text())
    del fields["digest"]
    fields["files"]["model.safetensors"]["sha256"] = "0" * 64
    (out / NAME).write_text(json.dumps({**fields, "digest": digest(fields)}))
    assert list(check(out)) == []
    (damage,) = check(out, sha256=True)
    assert damage.file == "model.safetensors" and "sha256" in damage.what
    assert main(["check", str(out)]) == 0 and main(["check", str(out), "--sha256"]) == 1
    # a tensor that differs is told once, by its name
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    (damage,) = check(out, sha256=True)
    assert damage.tensor
    # a conversion that was told to make no digest of files has none to check
    zoo.convert(source, tmp_path / "fast", to="native", sha256=False)
    assert list(check(tmp_path / "fast", sha256=True)) == []


def test_loading_verifies_when_asked(source: Path, tmp_path: Path) -> None:
    out = zoo.convert(source, tmp_path / "out", to="native")
    zoo.load(out, verify=True)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-3] ^= 64
    (out / "model.safetensors").write_bytes(data)
    zoo.load(out)
    with pytest.raises(ChecksumMismatch, match=r"model\.safetensors: \S+: differs from what"):
        zoo.load(out, verify=True)
    with pytest.raises(NotACheckpoint, match="nothing to verify against"):
        zoo.load(source, verify=True)


def test_the_hubs_cache_names_its_blobs_by_digest(source: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    zoo.load(snapshot, verify=True)
    weights = (snapshot / "model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(ChecksumMismatch, match=r"model\.safetensors: differs"):
        zoo.load(snapshot, verify=True)


def test_an_edited_manifest_is_refused(source: Path, tmp_path: Path) -> None:
    out = zoo.convert(source, tmp_path / "out", to="hf")
    text = (out / NAME).read_text()
    (out / NAME).write_text(text.replace('"to": "hf"', '"to": "fh"'))
    with pytest.raises(ZooError, match="differs from the digest"):
        list(check(out))
    with pytest.raises(NotACheckpoint, match="nothing to check against"):
        list(check(source))


def test_the_manifest_says_what_it_was_made_of(source: Path, tmp_path: Path) -> None:
    out = zoo.convert(source, tmp_path / "out", to="native")
    data = json.loads((out / NAME).read_text())
    weights = source / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    size = weights.stat().st_size
    assert data["sources"] == {"model.safetensors": {"size": size, "sha256": digest}}
    assert data["architecture"] == "gpt2" and data["to"] == "native"
    one = data["files"]["model.safetensors"]["tensors"]["blocks.0.attn.q.weight"]
    assert one["rule"].startswith("h.{layer}.attn.c_attn.weight [i (n o)]: ")
    made = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert data["files"]["model.safetensors"]["sha256"] == made


# --- killed --------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, threading
import zoo
from converters.staging import parts
src, dst, at, how = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
count = 0
def after(call):
    def wrapped(*args, **kwargs):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), getattr(signal, how))
            signal.pause()
        return call(*args, **kwargs)
    return wrapped
for name in ("pwrite", "fsync", "rename", "unlink", "mkdir", "ftruncate"):
    setattr(os, name, after(getattr(os, name)))
events = []
zoo.convert(src, dst, to="native", max_shard_size=60_000, memory=300_000, threads=1,
            force=True, part=sys.argv[5] or None, tell=events.append)
print("calls", count, "resumed", events[-1].get("resumed", -1) if events else -1)
"""


def convert(
    source: Path, out: Path, at: int = 0, how: str = "SIGKILL", part: str = ""
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(source), str(out), str(at), how, part],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("before", ["nothing", "another"])
def test_a_conversion_killed_anywhere_resumes_to_the_same_bytes(
    before: str, source: Path, tmp_path: Path
) -> None:
    """At some places over its whole run; the destination is the old one or the new one."""
    whole = convert(source, tmp_path / "whole")
    words = whole.communicate()[0].split()
    calls = int(words[1])
    truth = contents(tmp_path / "whole")
    points = sorted({1, *range(9, calls, max(1, calls // 3)), calls - 1, calls})
    resumed = 0
    for at in points:
        out = tmp_path / f"{at}" / "out"
        out.parent.mkdir()
        old = {"zoo.json": b"old", "model.safetensors": as_bytes({"x": torch.ones(1)})}
        if before == "another":
            out.mkdir()
            for name, data in old.items():
                (out / name).write_bytes(data)
        run = convert(source, out, at)
        run.communicate()
        assert run.returncode == -signal.SIGKILL, at
        now = contents(out) if out.exists() else {}
        assert now in ({}, truth) if before == "nothing" else now in (old, truth), at
        again = convert(source, out)
        text, errors = again.communicate()
        assert again.returncode == 0, errors
        assert contents(out) == truth, at
        assert beside(out) == ["out"], at
        resumed += max(0, int(text.split()[3]))
    assert resumed > 0


@pytest.mark.slow
def test_an_interrupted_conversion_stops_and_resumes(source: Path, tmp_path: Path) -> None:
    run = convert(source, tmp_path / "out", 9, "SIGINT")
    time.sleep(0.1)
    run.communicate()
    assert run.returncode not in (0, None)
    assert not (tmp_path / "out").exists()
    again = convert(source, tmp_path / "out")
    assert again.communicate()[0].startswith("calls") and beside(tmp_path / "out") == ["out"]


@pytest.mark.slow
def test_another_source_or_option_starts_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, 30).communicate()
    assert [name for name in beside(out) if "partial" in name]
    events: list[dict[str, Any]] = []
    zoo.convert(source, out, to="hf", tell=events.append)
    assert events[0] == {"event": "restart"}
    assert beside(out) == ["out"] and differences(source, out) == []
    with pytest.raises(OutputExists):
        zoo.convert(source, out, to="hf")


@pytest.mark.slow
def test_a_file_damaged_between_runs_is_written_again(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "whole").communicate()
    out = tmp_path / "out"
    convert(source, out, 60).communicate()
    (partial,) = (path for path in tmp_path.iterdir() if path.name.endswith("partial"))
    for path in partial.glob("*.safetensors"):
        damaged = bytearray(path.read_bytes())
        damaged[-5] ^= 1
        path.write_bytes(damaged)
    again = convert(source, out)
    assert again.communicate() and again.returncode == 0
    assert contents(out) == contents(tmp_path / "whole")


# --- parts ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_parts_write_the_whole_and_the_last_publishes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "whole").communicate()
    out = tmp_path / "parts" / "out"
    out.parent.mkdir()
    for part in ("2/3", "1/3"):
        assert convert(source, out, part=part).communicate()[1] == ""
        assert not out.exists()
    zoo.convert(source, tmp_path / "other", to="native", part="1/1", max_shard_size=60_000)
    assert convert(source, out, part="3/3").communicate()[1] == ""
    assert contents(out) == contents(tmp_path / "whole") == contents(tmp_path / "other")
    assert beside(out) == ["out"]
    assert convert(source, out, part="3/3").communicate()[1] == ""  # there is nothing left to do
    assert beside(out) == ["out"]


@pytest.mark.slow
def test_concurrent_parts_resume_after_one_is_killed(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "whole").communicate()
    out = tmp_path / "parts" / "out"
    out.parent.mkdir()
    runs = [convert(source, out, 25 if n == 2 else 0, part=f"{n}/4") for n in range(1, 5)]
    errors = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, -signal.SIGKILL, 0, 0], errors
    assert not out.exists()
    with pytest.raises(
        OutputExists, match="part-1-of-4, part-3-of-4, part-4-of-4 were begun from another"
    ):
        zoo.convert(source, out, to="native", part="2/4")
    again = convert(source, out, part="2/4")
    assert again.communicate()[1] == "" and contents(out) == contents(tmp_path / "whole")
    assert beside(out) == ["out"]


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "1/2/3", (2, 1)])
def test_malformed_parts_are_refused(part: Any, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="such as 3/16"):
        zoo.convert(source, tmp_path / "out", part=part)
