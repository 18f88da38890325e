"""What happens to a model, or a conversion, when a file that it is of is written to."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import zoo
from converters.threads import one_thread_each
from zoo.errors import SourceChanged

IDS = torch.tensor([[1, 5, 9, 4]])


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("hf")
    fields = {"gpt2": {"act": "gelu", "eps": 1e-5}}  # as nanoGPT is
    names = ("gpt2", "bert", "llama")
    return {n: zoo.save(tiny.build(n, **fields.get(n, {})), place / n) for n in names}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("large") / "m"
    return zoo.save(tiny.build("gpt2", dim=512, heads=8, hidden=2048, layers=8), place)


@pytest.fixture
def directory(hf: Any, tmp_path: Path) -> Path:
    """A checkpoint of safetensors that may be written to."""
    place = tmp_path / "m"
    zoo.save(zoo.load(hf["gpt2"]), place)
    return place


@pytest.fixture
def trainers(hf: Any, tmp_path: Path) -> Path:
    """nanoGPT's ckpt.pt."""
    zoo.save(zoo.load(hf["gpt2"]), tmp_path / "nano", to="nanogpt")
    return tmp_path / "nano" / "ckpt.pt"


def run(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which a SIGBUS would end."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


OVERWRITTEN = """
import sys, torch, zoo
path = sys.argv[1]
model = zoo.load(path)
before = model(torch.tensor([[1, 5, 9, 4]]))
held = torch.load(path, weights_only=True)
held["model"] = {name: held["model"][name] for name in held["model"]}
state = {name: tensor for name, tensor in model.state_dict().items()}
torch.save({**held, "native": state}, path)
assert torch.equal(model(torch.tensor([[1, 5, 9, 4]])), before)
torch.save({"model": model.state_dict()}, path)
again = torch.load(path, weights_only=True)["model"]
assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
"""


@pytest.mark.parametrize("dialect", ["hf", "gguf", "nanogpt"])
@pytest.mark.parametrize("mmap", [None, True, False])
def test_mapped_and_read_weights_give_equal_outputs(
    hf: Any, tmp_path: Path, dialect: str, mmap: bool | None
) -> None:
    model = zoo.load(hf["llama" if dialect == "gguf" else "gpt2"])
    zoo.save(model, tmp_path / "m", to=dialect)
    loaded = zoo.load(tmp_path / "m", mmap=mmap)
    assert torch.equal(loaded(IDS), model(IDS))
    maps = Path("/proc/self/maps").read_text()
    assert (str(tmp_path) in maps) is (mmap is True or (mmap is None and dialect != "nanogpt"))


def test_torch_checkpoint_may_be_overwritten_by_its_model(trainers: Path) -> None:
    done = run(OVERWRITTEN, trainers)
    assert done.returncode == 0, done.stderr


GENERATING = """
import os, sys, torch, zoo
model = zoo.load(sys.argv[1], mmap=sys.argv[3] == "map")
os.truncate(sys.argv[2], 100)
try:
    model.generate(torch.tensor([[1, 5, 9, 4]]), max_new_tokens=2)
except zoo.errors.SourceChanged as error:
    assert "model.safetensors: was " in str(error) and "is 100" in str(error), error
    assert "mmap=False" in str(error)
    sys.exit(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("map", 3), ("read", 0)])
def test_generation_from_a_truncated_mapped_file_is_refused(
    directory: Path, how: str, code: int
) -> None:
    done = run(GENERATING, directory, directory / "model.safetensors", how)
    assert done.returncode == code, done.stderr


def uses(model: Any, place: Path) -> dict[str, Any]:
    return {
        "save": lambda: zoo.save(model, place / "saved"),
        "prepare": lambda: zoo.prepare(model),
        "generate": lambda: model.generate(IDS, max_new_tokens=1),
        "text": lambda: zoo.generate(model, "a", max_new_tokens=1),
        "perplexity": lambda: zoo.perplexity(model, "some text"),
        "hashes": lambda: model.provenance.hashes,
    }


@pytest.mark.parametrize("use", uses(None, Path()))
def test_modified_mapped_file_is_refused(directory: Path, tmp_path: Path, use: str) -> None:
    model = zoo.load(directory)
    path = directory / "model.safetensors"
    os.utime(path, ns=(0, 0))
    with pytest.raises(SourceChanged, match=r"model\.safetensors: was written to"):
        uses(model, tmp_path)[use]()


def test_replaced_mapped_file_is_refused(directory: Path) -> None:
    model = zoo.load(directory)
    path = directory / "model.safetensors"
    (directory / "other").write_bytes(path.read_bytes())
    os.replace(directory / "other", path)
    with pytest.raises(SourceChanged, match="was replaced by another file"):
        model.generate(IDS, max_new_tokens=1)


def test_inaccessible_mapped_file_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.load(directory)
    of, weights = os.stat, directory / "model.safetensors"

    def denied(path: Any, **options: Any) -> os.stat_result:
        if path == weights:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return of(path, **options)

    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(SourceChanged, match=r"cannot be looked at any more \(Permission denied"):
        model.generate(IDS, max_new_tokens=1)


@pytest.mark.parametrize("options", [{"mmap": False}, {"dtype": "float64"}, {"prepare": True}])
def test_copied_weights_stay_usable_when_their_file_changes(
    directory: Path, options: dict[str, Any]
) -> None:
    model = zoo.load(directory, **options)
    before = model(IDS)
    os.truncate(directory / "model.safetensors", 0)
    assert torch.equal(model(IDS), before)
    model.generate(IDS, max_new_tokens=1)


def test_hashing_a_changed_file_is_refused(
    directory: Path,
) -> None:
    model = zoo.load(directory, mmap=False)
    os.utime(directory / "model.safetensors", ns=(0, 0))
    with pytest.raises(SourceChanged, match="written to"):
        _ = model.provenance.hashes


def test_model_saved_over_its_source_stays_usable(directory: Path) -> None:
    model = zoo.load(directory)
    hashes = dict(model.provenance.hashes)
    for _ in range(2):  # train, save, train, save
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        zoo.save(model, directory, force=True)
        model.generate(IDS, max_new_tokens=1)
        assert model.provenance.hashes != hashes
        assert torch.equal(zoo.load(directory)(IDS), model(IDS))


def test_model_can_be_saved_after_its_directory_is_deleted(directory: Path, tmp_path: Path) -> None:
    model = zoo.load(directory)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    shutil.rmtree(directory)
    with pytest.warns(UserWarning, match="gone since the model was loaded"):
        zoo.save(model, tmp_path / "out")
    again = dict(zoo.load(tmp_path / "out").named_parameters())
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


# --- process-wide settings -----------------------------------------------------------------------


def test_random_weights_in_threads_restore_the_default_dtype(hf: Any) -> None:
    seen: set[torch.dtype] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.add(torch.get_default_dtype())

    watcher = threading.Thread(target=watch)
    watcher.start()
    kinds = (torch.float64, torch.bfloat16) * 3
    work = [
        threading.Thread(
            target=zoo.load, args=[hf["gpt2"]], kwargs={"weights": "random", "dtype": kind}
        )
        for kind in kinds
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    over.set()
    watcher.join()
    assert seen == {torch.float32}


def test_concurrent_conversions_restore_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        first, second = one_thread_each(), one_thread_each()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_random_weights_equal_those_of_the_default_dtype(
    hf: Any, family: str, kind: torch.dtype
) -> None:
    torch.manual_seed(3)
    loaded = zoo.load(hf[family], weights="random", dtype=kind)
    torch.set_default_dtype(kind)
    try:
        torch.manual_seed(3)
        wanted = zoo.load(hf[family], weights="random")
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, theirs in zip(loaded.parameters(), wanted.parameters(), strict=True):
        assert mine.dtype == theirs.dtype == kind
        assert torch.equal(mine, theirs)


# --- conversions ---------------------------------------------------------------------------------

CUT = """
import os, shutil, sys, zoo
source, out, other = sys.argv[1:]
path, seen = os.path.join(source, "model.safetensors"), []

def tell(event):
    seen.append(event)
    if len(seen) == 8:
        os.truncate(path, 5000)

shutil.copy(path, other)
try:
    zoo.convert(source, out, to="native", threads=1, tell=tell)
except zoo.errors.SourceChanged as error:
    assert "model.safetensors: changed" in str(error) and "resumes" in str(error), error
    sys.exit(3)
"""


def test_conversion_resumes_after_its_source_is_restored(directory: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    done = run(CUT, directory, out, kept)
    assert done.returncode == 3, done.stderr
    assert not out.exists()
    (directory / "model.safetensors").write_bytes(kept.read_bytes())
    events: list[dict[str, Any]] = []
    zoo.convert(directory, out, to="native", tell=events.append)
    assert events[-1]["resumed"] > 0
    assert not [event for event in events if event["event"] == "restart"]
    assert_as_fresh(directory, out, tmp_path)


@pytest.mark.slow
def test_output_of_a_changed_source_is_written_again(directory: Path, tmp_path: Path) -> None:
    """The same names and shapes in the place of the source that was cut."""
    out = tmp_path / "out"
    assert run(CUT, directory, out, tmp_path / "kept").returncode == 3
    other = tiny.build("gpt2", act="gelu", eps=1e-5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    zoo.save(other, tmp_path / "other")
    os.replace(tmp_path / "other" / "model.safetensors", directory / "model.safetensors")
    zoo.convert(directory, out, to="native")
    assert_as_fresh(directory, out, tmp_path)


def assert_as_fresh(source: Path, out: Path, place: Path) -> None:
    zoo.convert(source, place / "fresh", to="native")
    name = "model.safetensors"
    assert (out / name).read_bytes() == (place / "fresh" / name).read_bytes()


MEASURED = """
import sys, threading
from pathlib import Path
from converters.writer import WriteOptions, run
from converters.staging.stage import Stage
from zoo.saving.convert import plan_output
from zoo.checkpoints.locate import locate

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

*sources, out = sys.argv[1:]
for n, (to, dtype) in enumerate([("native", d) for d in (None, "float64", "bfloat16")]):
    for again, source in enumerate(sources):  # once for what is set up once
        output = plan_output(locate(source, mmap=False), to, dtype=dtype)
        place = Path(out, f"{n} {again}")
        place.mkdir()
        before, peak, over = anonymous(), [0], threading.Event()

        def look(event=None):
            peak[0] = max(peak[0], anonymous() - before)

        def watch():
            while not over.wait(0.002):
                look()

        watcher = threading.Thread(target=watch)
        watcher.start()
        run(output, Stage(place), WriteOptions(threads=2, tell=look))
        over.set()
        watcher.join()
    print(to, dtype, peak[0])
    assert 0 < peak[0] < 10 << 20
"""


@pytest.mark.slow
def test_conversion_needs_ten_megabytes_of_memory(large: Path, tmp_path: Path) -> None:
    assert (large / "model.safetensors").stat().st_size > 100e6
    done = run(MEASURED, large, large, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


# --- out of memory -------------------------------------------------------------------------------

LIMITED = """
import resource, sys, torch, zoo
from zoo.cli.app import main
zoo.load(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(sys.argv[3:]) if sys.argv[3:] else bool(zoo.load(sys.argv[2], mmap=False)))
"""


# a conversion needs so little that no limit of addresses stops it at the same place everywhere
REFUSED = """
import sys, zoo.saving.convert
from zoo.cli.app import main

def run(*args):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

zoo.saving.convert.run = run
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow
def test_out_of_memory_while_loading_is_named(hf: Any, large: Path) -> None:
    # room to read the small files, whose buffers may take 64 MB of addresses, and not the weights
    done = run(LIMITED.replace("64 << 20", "80 << 20"), hf["gpt2"], large)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"zoo.errors.ResourceLimit: {large}: weights of 0.10 GB")
    assert "out of memory (" in last
    assert "mmap=True" in last


@pytest.mark.slow
@pytest.mark.parametrize("options", [["generate", "--no-mmap"], ["convert", "--memory", "400M"]])
def test_out_of_memory_in_the_shell_prints_one_line(
    hf: Any, large: Path, tmp_path: Path, options: list[str]
) -> None:
    more = ["a"] if options[0] == "generate" else ["--out", tmp_path / "out", "--quiet"]
    code = REFUSED if options[0] == "convert" else LIMITED
    done = run(code, hf["gpt2"], large, options[0], large, *more, *options[1:])
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "out of memory (" in line
