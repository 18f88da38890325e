"""What an outside tester did to conversions: each a case that once went wrong without a word."""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from converters import manifest
from converters.formats.torch_zip import TorchZipReader
from converters.manifest import NAME, check
from converters.output import digest
from zoo import registry
from zoo.errors import (
    ConfigError,
    CorruptCheckpoint,
    NonFinite,
    OutputExists,
    OverflowOnCast,
    SourceChanged,
    UsageError,
)
from zoo.parity.fixtures import hot_checkpoint
from zoo.saving.convert import dry_run

Change = Callable[[dict[str, Any]], None]
WEIGHTS = "model.safetensors"
SHARDS = 60_000  # bytes: a few files of a tiny model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    entry = registry.architectures()["gpt2"]
    hot_checkpoint(entry, "base", tmp_path / "in" / "source")
    return tmp_path / "in" / "source"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "native"


def change(source: Path, place: int = 0, value: float = 5.0) -> None:
    """One number, in a tensor that comes late."""
    tensors = load_file(source / WEIGHTS)
    tensors["transformer.wte.weight"].view(-1)[place] = value
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})


def stopped(source: Path, out: Path, after: int, **options: Any) -> None:
    """A conversion interrupted once some tensors are written."""
    seen = 0

    def tell(event: dict[str, Any]) -> None:
        nonlocal seen
        seen += event["event"] == "tensor"
        if seen == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.convert(source, out, to="native", threads=1, tell=tell, **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def fresh(source: Path, **options: Any) -> dict[str, bytes]:
    place = source.parent / "fresh"
    shutil.rmtree(place, ignore_errors=True)
    return contents(zoo.convert(source, place, to="native", **options))


def beside(out: Path) -> list[str]:
    return sorted(os.listdir(out.parent))


def part(source: Path, out: Path, which: str, **options: Any) -> None:
    zoo.convert(source, out, to="native", part=which, **{"max_shard_size": SHARDS, **options})


# --- resuming ------------------------------------------------------------------------------------


def test_interrupted_replacement_resumes(source: Path, out: Path) -> None:
    zoo.convert(source, out, to="native")
    change(source)
    stopped(source, out, 20, force=True)
    zoo.convert(source, out, to="native", force=True)
    assert contents(out) == fresh(source)
    assert beside(out) == ["native"]


@pytest.mark.parametrize("first", [{}, {"allow_nonfinite": True}])
def test_source_nan_is_reported_on_resume(first: dict[str, bool], source: Path, out: Path) -> None:
    change(source, value=float("nan"))
    stopped(source, out, 30, **first)
    with pytest.raises(NonFinite, match=r"embed\.weight\[0, 0\] is nan"):
        zoo.convert(source, out, to="native")


def test_overflow_is_reported_on_resume(source: Path, out: Path) -> None:
    change(source, value=1e6)
    stopped(source, out, 30, dtype="float16")
    with pytest.raises(OverflowOnCast, match=r"embed\.weight\[0, 0\] is 1e\+06"):
        zoo.convert(source, out, to="native", dtype="float16")


def test_damaged_output_is_replaced(source: Path, out: Path) -> None:
    whole = contents(zoo.convert(source, out, to="native"))
    for kill in (True, False):
        with (out / WEIGHTS).open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\xff")
        if kill:
            stopped(source, out, 20, force=True)
            zoo.convert(source, out, to="native", force=True)
        else:
            zoo.convert(source, out, to="native", force=True, part="1/1")
        assert contents(out) == whole


def test_refusal_keeps_unfinished_output(source: Path, out: Path) -> None:
    zoo.convert(source, out, to="native")
    stopped(source, out, 20, force=True)
    with pytest.raises(OutputExists):
        zoo.convert(source, out, to="native")
    events: list[dict[str, Any]] = []
    zoo.convert(source, out, to="native", force=True, tell=events.append)
    assert events[-1]["resumed"] > 0


def test_foreign_files_in_the_stage_are_not_published(
    source: Path, out: Path, tmp_path: Path
) -> None:
    """Files of another run, files of the user, and links to other files."""
    stopped(source, out, 20, max_shard_size=SHARDS)
    stage = out.parent / ".native.zoo-partial"
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (stage / "evil.txt").write_text("evil")
    (stage / NAME).symlink_to(victim)
    os.link(victim, stage / "zoo.json")
    zoo.convert(source, out, to="native", max_shard_size=SHARDS)
    assert contents(out) == fresh(source, max_shard_size=SHARDS)
    assert victim.read_text() == "untouched"
    assert not (out / NAME).is_symlink()


def test_stage_that_is_a_link_is_not_used(source: Path, out: Path, tmp_path: Path) -> None:
    stopped(source, out, 20)
    stage = out.parent / ".native.zoo-partial"
    stage.rename(tmp_path / "elsewhere")
    stage.symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    zoo.convert(source, out, to="native")
    assert contents(out) == fresh(source)
    assert contents(tmp_path / "elsewhere") == before


@pytest.mark.parametrize(
    "line",
    ["[" * 100_000, "null", '{"tensor": 1}', '{"file": [], "tensor": "x", "xxh3": "y"}', "{", "\0"],
)
def test_invalid_journal_line_is_ignored(line: str, source: Path, out: Path) -> None:
    stopped(source, out, 20)
    journal = out.parent / ".native.zoo-lock"
    first, *others = journal.read_text().splitlines()
    journal.write_text("\n".join([first, line, *others]) + "\n")
    zoo.convert(source, out, to="native")
    assert contents(out) == fresh(source)


# --- parts ---------------------------------------------------------------------------------------


def test_finished_part_of_another_source_is_not_used(source: Path, out: Path) -> None:
    part(source, out, "1/1")
    part(source, out, "1/1")  # there is nothing left to do
    change(source)
    with pytest.raises(OutputExists, match="exists already"):
        part(source, out, "1/1")
    part(source, out, "1/1", force=True)
    assert contents(out) == fresh(source, max_shard_size=SHARDS)


@pytest.mark.parametrize("harm", ["a bit", "a file", "all"])
def test_last_part_checks_the_other_parts(harm: str, source: Path, out: Path) -> None:
    part(source, out, "1/2")
    stage = out.parent / ".native.zoo-partial"
    file = sorted(stage.glob("*.safetensors"))[0]
    if harm == "a bit":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif harm == "a file":
        file.unlink()
    else:
        shutil.rmtree(stage)
    with pytest.raises(CorruptCheckpoint, match=r"part 1 of 2: .*run it again: --part 1/2"):
        part(source, out, "2/2")
    assert not out.exists()
    part(source, out, "1/2")
    assert contents(out) == fresh(source, max_shard_size=SHARDS)
    assert beside(out) == ["native"]


def test_whole_conversion_and_parts_do_not_mix(source: Path, out: Path) -> None:
    part(source, out, "1/2")
    for other in ({}, {"part": "1/3"}, {"part": "2/2", "dtype": "bfloat16"}):
        with pytest.raises(OutputExists, match=r"part-1-of-2 were begun .*restart=True"):
            zoo.convert(source, out, to="native", max_shard_size=SHARDS, **other)
    part(source, out, "2/2")  # nothing of it was touched
    assert contents(out) == fresh(source, max_shard_size=SHARDS)
    shutil.rmtree(out)
    part(source, out, "1/2")
    zoo.convert(source, out, to="native", restart=True)
    assert (contents(out), beside(out)) == (fresh(source), ["native"])
    shutil.rmtree(out)
    stopped(source, out, 20)
    with pytest.raises(OutputExists, match="a conversion of the whole was begun"):
        part(source, out, "1/2")
    part(source, out, "1/2", restart=True)
    part(source, out, "2/2")
    assert beside(out) == ["native"]


def test_part_with_other_options_keeps_the_finished_part(source: Path, out: Path) -> None:
    part(source, out, "1/2")
    part(source, out, "1/3", restart=True)
    with pytest.raises(OutputExists):
        part(source, out, "1/2")
    for which in ("2/3", "3/3"):
        part(source, out, which)
    assert contents(out) == fresh(source, max_shard_size=SHARDS)


@pytest.mark.parametrize("content", [b"null\n", b"[1]\n", b'"x"\n', b"[" * 100_000 + b"\n"])
def test_invalid_part_journal_is_ignored(content: bytes, source: Path, out: Path) -> None:
    part(source, out, "1/2")
    (out.parent / ".native.zoo-part-1-of-2").write_bytes(content)
    part(source, out, "2/2")
    assert not out.exists()
    part(source, out, "1/2")
    assert contents(out) == fresh(source, max_shard_size=SHARDS)


# --- sources that change -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "to"),
    [
        ("replaced", "native"),
        ("replaced", "hf"),
        ("edited", "native"),
        ("edited", "hf"),
        ("cut", "native"),
        ("cut", "hf"),
    ],
)
def test_source_that_changes_during_conversion_is_refused(
    how: str, to: str, source: Path, out: Path
) -> None:
    other = source.parent / "other"
    shutil.copytree(source, other)
    change(other)
    seen = 0

    def tell(event: dict[str, Any]) -> None:
        nonlocal seen
        seen += event["event"] == "tensor"
        if seen == 3:
            if how == "replaced":
                os.replace(other / WEIGHTS, source / WEIGHTS)
            elif how == "cut":
                os.truncate(source / WEIGHTS, 5000)
            else:
                status = (source / WEIGHTS).stat()
                (source / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())
                os.utime(source / WEIGHTS, ns=(status.st_atime_ns, status.st_mtime_ns))
            seen += 1

    with pytest.raises(SourceChanged, match=r"model\.safetensors.*changed"):
        zoo.convert(source, out, to=to, threads=1, tell=tell)
    assert not out.exists()


# --- formats and files ---------------------------------------------------------------------------


def test_index_of_one_file(source: Path, out: Path, tmp_path: Path) -> None:
    name = "model-00001-of-00001.safetensors"
    (source / WEIGHTS).rename(source / name)
    where = dict.fromkeys(load_file(source / name), name)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (source / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    zoo.convert(source, out, to="native")
    zoo.convert(out, tmp_path / "back", to="hf")
    zoo.convert(source, tmp_path / "again", to="hf")
    zoo.save(zoo.load(source), tmp_path / "saved")
    for place in ("back", "again", "saved"):
        zoo.load(tmp_path / place)
        assert (tmp_path / place / name).read_bytes() == (source / name).read_bytes()


def test_weights_named_like_a_license_are_not_copied(source: Path, out: Path) -> None:
    save_file({"x": torch.zeros(3)}, source / "LICENSE.safetensors")
    zoo.convert(source, out, to="native", dtype="bfloat16")
    assert not (out / "LICENSE.safetensors").exists()


def test_threads_may_read_the_same_tensor(tmp_path: Path) -> None:
    torch.save({str(n): torch.randn(7) for n in range(40)}, tmp_path / "model.bin")
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            reader = TorchZipReader(tmp_path / "model.bin")
            names = [str(n) for n in range(40) for _ in range(8)]
            assert len(list(pool.map(reader.tensor, names))) == 320


def test_events_are_not_concurrent(source: Path, out: Path) -> None:
    busy = threading.Lock()

    def tell(event: dict[str, Any]) -> None:
        assert busy.acquire(blocking=False), "two events at once"
        json.dumps(event)
        busy.release()

    zoo.convert(source, out, to="native", threads=8, max_shard_size=3000, tell=tell)


def test_dropped_tensors_are_in_the_manifest(source: Path, out: Path) -> None:
    tensors = load_file(source / WEIGHTS)
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    zoo.convert(source, out, to="native")
    dropped = json.loads((out / NAME).read_text())["dropped"]
    assert list(dropped) == ["transformer.h.0.attn.bias"]


# --- checking ------------------------------------------------------------------------------------


def first_of(files: dict[str, Any]) -> dict[str, Any]:
    return next(file for file in files.values() if "tensors" in file)


def set_to(*path: str, value: Any) -> Change:
    def change(data: dict[str, Any]) -> None:
        for name in path[:-1]:
            data = first_of(data) if name == "*" else data[name]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_to("format", value=99),
        set_to("files", value=None),
        set_to("files", value=[]),
        set_to("files", value={}),
        set_to("files", WEIGHTS, value=None),
        set_to("files", WEIGHTS, value=[1]),
        set_to("files", "*", "size", value="1"),
        set_to("files", "*", "header", value=None),
        set_to("files", "*", "sha256", value=3),
        set_to("files", "*", "tensors", value=None),
        set_to("files", "*", "tensors", value=[]),
        set_to("files", "*", "tensors", "embed.weight", value={}),
        set_to("files", "zoo.json", "sha256", value=None),
    ],
)
def test_foreign_manifest_is_refused(change: Change, source: Path, out: Path) -> None:
    zoo.convert(source, out, to="native")
    data = json.loads((out / NAME).read_text())
    del data["digest"]
    change(data)
    (out / NAME).write_text(json.dumps({**data, "digest": digest(data)}))
    with pytest.raises(ConfigError, match="not what zoo writes"):
        list(check(out))
    with pytest.raises(ConfigError):
        zoo.load(out, verify=True)


def test_manifest_with_missing_tensors_is_refused(source: Path, out: Path) -> None:
    zoo.convert(source, out, to="native")
    data = json.loads((out / NAME).read_text())
    del data["digest"], data["files"][WEIGHTS]["tensors"]["embed.weight"]
    (out / NAME).write_text(json.dumps({**data, "digest": digest(data)}))
    assert [d.what for d in check(out)] == [
        "its tensors are not those of the manifest: embed.weight"
    ]


def test_unlisted_weight_file_is_refused(source: Path, out: Path) -> None:
    zoo.convert(source, out, to="native")
    (out / "README.md").write_text("a note of the owner's")
    assert not list(check(out))
    shutil.copy(source / WEIGHTS, out / "model-00001-of-00001.safetensors")
    assert [d.file for d in manifest.check(out)] == ["model-00001-of-00001.safetensors"]


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "64M"},
        {"memory": None},
        {"memory": 0},
        {"memory": -1},
        {"threads": -1},
        {"threads": "2"},
        {"max_shard_size": "40K"},
        {"max_shard_size": 0},
        {"part": 5},
        {"part": "9/1"},
        {"trust": ["nope"]},
        {"dtype": "junk"},
    ],
)
def test_contradictory_arguments_are_refused(
    options: dict[str, Any], source: Path, out: Path
) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        zoo.convert(source, out, to="native", **options)
    assert beside(out) == []


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 256])
def test_invalid_destinations_are_refused(name: str, source: Path, out: Path) -> None:
    with pytest.raises(UsageError):
        zoo.convert(source, str(out) + "\0" if "\0" in name else name and out.parent / name)


def test_source_that_links_to_blobs_is_kept(source: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    with pytest.raises(OutputExists, match="contains the source"):
        zoo.convert(snapshot, blobs, to="native", force=True)


def test_dry_run_reports_casts(source: Path) -> None:
    text = dry_run(source, dtype="bfloat16")
    assert re.search(r"cast: \d+ tensors from F32 to BF16", text)
    with pytest.raises(UsageError):
        dry_run(source, dtype="junk")
    with pytest.raises(UsageError):
        dry_run(source, part="9/1")


def test_model_without_experts(tmp_path: Path) -> None:
    hot_checkpoint(registry.architectures()["mixtral"], "base", tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps({**config, "num_local_experts": 0}))
    with pytest.raises(ConfigError, match="num_local_experts: 0 is not positive"):
        zoo.load(tmp_path / "x")
