"""Paths are read with sockets blocked, the hub from a server on loopback and from its cache."""

import hashlib
import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import Made
from conftest import PATIENCE
from hub_server import CONFIG, FIRST, INDEX, SECOND, SMALL, Hub, holds
from sentence_models import checkpoint

import zoo
from converters.weight_files import groups
from zoo import registry
from zoo.checkpoints import sources
from zoo.errors import (
    AmbiguousCheckpoint,
    BadIndex,
    ConfigError,
    GatedRepo,
    MissingShard,
    NotACheckpoint,
    Offline,
    RepoNotFound,
    SourceError,
    UnknownName,
    UnsafePath,
    UnsupportedArchitecture,
    UsageError,
)
from zoo.parity.gates import trips


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process talks to, as if HF_ENDPOINT had named it at start."""
    from huggingface_hub import constants

    served = Hub()
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield served
    served.close()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# --- what is downloaded --------------------------------------------------------------------------


def test_only_needed_files_are_downloaded(hub: Hub, cache: Path) -> None:
    unwanted = ["pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "README.md", "m.gguf"]
    hub.add("o/m", {**SMALL, **dict.fromkeys(unwanted, b"no"), "onnx/model.onnx": b"no"})
    source = sources.resolve("hf:o/m", cache_dir=cache, progress=False)
    assert (source.repo, source.revision, source.checkpoint) == ("o/m", FIRST, None)
    assert holds(source.directory) == sorted(SMALL)
    assert (source.directory / "model.safetensors").read_bytes() == b"weights"
    assert sorted(hub.asked("GET")) == sorted(SMALL)


def test_second_load_downloads_nothing(hub: Hub, cache: Path) -> None:
    hub.add("o/m", SMALL)
    first = sources.resolve("hf:o/m", cache_dir=cache, progress=False)
    hub.log.clear()
    assert sources.resolve("hf:o/m", cache_dir=cache, progress=False) == first
    assert hub.asked("GET") == []
    assert set(hub.asked("HEAD")) == {"config.json"}  # has main moved?
    hub.log.clear()
    pinned = sources.resolve(f"hf:o/m@{FIRST}", cache_dir=cache, progress=False)
    assert pinned.directory == first.directory
    assert hub.log == []


def test_shards_of_the_index_are_downloaded(hub: Hub, cache: Path) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": bytes([i]) for i in (1, 2)}
    stray = {"model-00003-of-00003.safetensors": b"no", "consolidated.safetensors": b"no"}
    files = {"config.json": CONFIG, "model.safetensors.index.json": INDEX, **shards}
    hub.add("o/m", {**files, **stray})
    source = sources.resolve("hf:o/m", cache_dir=cache, progress=False)
    assert holds(source.directory) == sorted(files)


def test_bin_is_downloaded_without_safetensors(hub: Hub, cache: Path) -> None:
    hub.add("o/m", {"config.json": CONFIG, "pytorch_model.bin": b"b"})
    source = sources.resolve("hf:o/m", cache_dir=cache, progress=False)
    assert holds(source.directory) == ["config.json", "pytorch_model.bin"]


def test_sentence_model_is_downloaded_with_its_modules(
    hub: Hub, cache: Path, tmp_path: Path
) -> None:
    root = checkpoint(tmp_path / "s", "mean_tokens", dense=5)
    files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    hub.add("o/m", {**files, "2_Dense/pytorch_model.bin": b"no", "1_Pooling/notes.txt": b"no"})
    source = sources.resolve("hf:o/m", cache_dir=cache, progress=False)
    paths = source.directory.rglob("*")
    assert {str(p.relative_to(source.directory)) for p in paths if p.is_file()} == files.keys()
    # the cache holds links, also below its folders
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(zoo.load(source.directory)(ids), zoo.load(root)(ids))


def test_weights_need_not_be_downloaded(hub: Hub, cache: Path) -> None:
    hub.add("o/m", SMALL)
    source = sources.resolve("hf:o/m", cache_dir=cache, weights=False, progress=False)
    assert holds(source.directory) == ["config.json", "tokenizer.json"]


def test_absent_file_is_recognized_without_the_hubs_header(hub: Hub, cache: Path) -> None:
    hub.plain_404 = True
    hub.add("o/m", SMALL)
    source = sources.resolve("hf:o/m", cache_dir=cache, progress=False)
    assert holds(source.directory) == sorted(SMALL)


def test_registry_name_resolves_to_its_repository(hub: Hub, cache: Path) -> None:
    hub.add("openai-community/gpt2", SMALL)
    source = sources.resolve("gpt2", cache_dir=cache, progress=False)
    assert source.checkpoint is not None
    assert (source.checkpoint.name, source.repo) == ("gpt2", "openai-community/gpt2")
    assert source.revision == FIRST
    hub.add("openai-community/gpt2", SMALL, SECOND, "v2")
    source = sources.resolve("gpt2", revision="v2", cache_dir=cache, progress=False)
    assert source.revision == SECOND


def test_revisions_are_branches_tags_and_commits(hub: Hub, cache: Path) -> None:
    hub.add("o/m", SMALL)
    hub.add("o/m", {**SMALL, "model.safetensors": b"newer"}, SECOND, "v2")
    for ref, revision in [
        ("hf:o/m@v2", None),
        ("hf:o/m", "v2"),
        (f"hf:o/m@{SECOND}", None),
        ("hf:o/m@v2", "v2"),
    ]:
        source = sources.resolve(ref, revision=revision, cache_dir=cache, progress=False)
        assert source.revision == SECOND
        assert (source.directory / "model.safetensors").read_bytes() == b"newer"
    assert sources.resolve("hf:o/m", cache_dir=cache, progress=False).revision == FIRST


def test_moved_branch_is_followed(hub: Hub, cache: Path) -> None:
    hub.add("o/m", SMALL)
    sources.resolve("hf:o/m", cache_dir=cache, progress=False)
    hub.add("o/m", {**SMALL, "model.safetensors": b"newer"}, SECOND)
    moved = sources.resolve("hf:o/m", cache_dir=cache, progress=False)
    assert moved.revision == SECOND
    assert (moved.directory / "model.safetensors").read_bytes() == b"newer"
    kept = sources.resolve("hf:o/m", cache_dir=cache, local_files_only=True)
    assert kept == moved  # the cache knows where main went


def test_deleted_branch_is_not_served_from_the_cache(hub: Hub, cache: Path) -> None:
    hub.add("o/m", SMALL)
    hub.add("o/m", SMALL, SECOND, "v2")
    sources.resolve("hf:o/m@v2", cache_dir=cache, progress=False)
    del hub.refs["o/m"]["v2"]
    with pytest.raises(RepoNotFound, match="no revision 'v2'"):
        sources.resolve("hf:o/m@v2", cache_dir=cache, progress=False)


# --- files that say themselves what they are -----------------------------------------------------

TF = Path(__file__).parents[1] / "data" / "tf"


def bytes_of(place: Path, but: str = "") -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in place.iterdir() if p.name != but}


def made(place: Path, to: str, **how: Any) -> dict[str, bytes]:
    zoo.save(trips.model_of(registry.architectures()["llama"], to), place, to=to, **how)
    return bytes_of(place, "zoo-manifest.json")


def same(ref: str, place: Path, cache: Path) -> Any:
    """What a reference loads, which is what the directory does."""
    loaded, wanted = zoo.load(ref, cache_dir=cache), zoo.load(place).state_dict()
    assert all(torch.equal(x, wanted[n]) for n, x in loaded.state_dict().items())
    return loaded


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_tensorflow_repository_loads(hub: Hub, cache: Path, name: str) -> None:
    """Only the weights, the config and the vocabulary are downloaded."""
    files = bytes_of(TF / name, "same.safetensors")
    beside = {"vocab.txt": b"[UNK]\n"} if name == "bert" else {"encoder.json": b"{}"}
    hub.add("o/m", {**files, **beside, "README.md": b"", "events.out.1": b"no"})
    loaded = same("hf:o/m", TF / name, cache)
    assert (loaded.provenance.repo, loaded.provenance.revision) == ("o/m", FIRST)
    assert holds(loaded.provenance.directory) == sorted({*files, *beside})
    hub.log.clear()
    same("hf:o/m", TF / name, cache)
    assert hub.asked("GET") == [
        asked for asked in hub.asked("GET") if "tree" in asked or "?" in asked
    ]
    hub.down = True
    assert same("hf:o/m", TF / name, cache).provenance.revision == FIRST  # by what was fetched
    zoo.load("hf:o/m", cache_dir=cache, local_files_only=True)


def test_meta_repository_loads(hub: Hub, cache: Path, tmp_path: Path) -> None:
    """Also from a subfolder, as Llama 3 has them, and with several shards."""
    files = made(tmp_path / "meta", "meta")
    hub.add("o/m", {f"original/{name}": data for name, data in files.items()} | {"LICENSE": b""})
    loaded = same("hf:o/m", tmp_path / "meta", cache)
    assert holds(loaded.provenance.directory) == ["consolidated.00.pth", "params.json"]
    assert loaded.provenance.revision == FIRST


def test_one_of_several_gguf_files_must_be_named(hub: Hub, cache: Path, tmp_path: Path) -> None:
    (data,) = made(tmp_path / "gguf", "gguf").values()
    names = [f"m.Q{n}_K.gguf" for n in range(2, 9)]
    hub.add("o/m", {**dict.fromkeys(names, data), "README.md": b""})
    with pytest.raises(AmbiguousCheckpoint, match=r"7 checkpoints.*hf:o/m/m\.Q2_K\.gguf, hf:o/m/m"):
        zoo.load("hf:o/m", cache_dir=cache)
    assert not [name for name in hub.asked("GET") if name.endswith(".gguf")]
    loaded = same("hf:o/m/m.Q4_K.gguf", tmp_path / "gguf", cache)
    assert holds(loaded.provenance.directory) == ["m.Q4_K.gguf"]
    hub.add("o/m", {"m.Q4_K.gguf": data}, SECOND, "v2")
    for ref, how in (("hf:o/m/m.Q4_K.gguf@v2", {}), ("hf:o/m/m.Q4_K.gguf", {"revision": "v2"})):
        assert zoo.load(ref, cache_dir=cache, **how).provenance.revision == SECOND
    assert zoo.info("hf:o/m/m.Q4_K.gguf@v2", cache_dir=cache).dialect == "gguf"
    with pytest.raises(NotACheckpoint, match=r"m\.Q9\.gguf"):
        zoo.load("hf:o/m/m.Q9.gguf", cache_dir=cache)
    with pytest.raises(UsageError, match="hf:org/repo/file"):
        zoo.load("hf:o/m/../x.gguf", cache_dir=cache)


def test_config_without_weights_beside_another_file(hub: Hub, cache: Path, tmp_path: Path) -> None:
    """As repositories of GGUF files have one; and information downloads no weights."""
    (data,) = made(tmp_path / "gguf", "gguf").values()
    config = b'{"model_type": "llama"}'
    hub.add("o/m", {"config.json": config, "m.gguf": data})
    with pytest.raises(
        NotACheckpoint, match=r"m\.gguf is not in the cache, and there is no config"
    ):
        zoo.info("hf:o/m/m.gguf", cache_dir=cache)
    assert "m.gguf" not in hub.asked("GET")
    same("hf:o/m", tmp_path / "gguf", cache)
    hub.add("o/n", SMALL)  # a file that a config is of stands for its directory
    source = sources.resolve("hf:o/n/model.safetensors", cache_dir=cache, progress=False)
    assert holds(source.directory) == sorted(SMALL) and source.file is None


def test_repository_with_weights_and_an_adapter(hub: Hub, cache: Path, tmp_path: Path) -> None:
    made = Made(tmp_path, "gpt2/base", base_model_name_or_path="org/base")
    hub.add("o/m", bytes_of(made.base) | bytes_of(made.adapter))
    with pytest.raises(AmbiguousCheckpoint, match="holds weights and an adapter"):
        zoo.load("hf:o/m", cache_dir=cache)
    assert zoo.load("hf:o/m", cache_dir=cache, adapter=False).adapter is None
    assert "adapter_model.safetensors" not in hub.asked("GET")
    assert zoo.load("hf:o/m", cache_dir=cache, adapter=True).adapter is not None


def test_repository_with_only_an_adapter_names_its_base(
    hub: Hub, cache: Path, tmp_path: Path
) -> None:
    made = Made(tmp_path, "gpt2/base", base_model_name_or_path="org/base")
    hub.add("o/m", bytes_of(made.adapter))
    says = r"hf:o/m: an adapter of org/base, and no model.*hf download o/m.*'hf:org/base', adapter="
    with pytest.raises(NotACheckpoint, match=says):
        zoo.load("hf:o/m", cache_dir=cache)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "b.gguf"], [(0, 1), (2,)]),
        (["consolidated.00.pth", "consolidated.01.pth", "params.json"], [(0, 1)]),
        (["m.ckpt.data-00000-of-00002", "m.ckpt.data-00001-of-00002", "m.ckpt.index"], [(2, 0, 1)]),
        (["x.index", "optimizer.pt", "training_args.bin", "rng_state.pth", "tokenizer.bin"], []),
        (["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.safetensors"], []),
        (["ckpt.pt", "a/b/c.gguf"], [(0,)]),
        (["a[1]-00001-of-00002.gguf", "a[1]-00002-of-00002.gguf"], [(0, 1)]),
    ],
)
def test_file_names_are_grouped_by_checkpoint(
    names: list[str], expected: list[tuple[int, ...]]
) -> None:
    assert [g.files for g in groups(names)] == [tuple(names[n] for n in ns) for ns in expected]


# --- what is refused, before the weights are fetched ---------------------------------------------


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        ({"README.md": b""}, NotACheckpoint, "no config.json"),
        ({"config.json": CONFIG}, NotACheckpoint, "looked for model.safetensors, .*model.bin"),
        ({**SMALL, "config.json": b"{"}, ConfigError, "config.json"),
        (
            {**SMALL, "config.json": b'{"model_type": "mamba"}'},
            UnsupportedArchitecture,
            "hf:o/m: config.json: model_type 'mamba'; zoo implements bert, ",
        ),
        ({**SMALL, "model.safetensors.index.json": INDEX}, AmbiguousCheckpoint, "o/m holds"),
        (
            {"config.json": CONFIG, "model.safetensors.index.json": INDEX},
            MissingShard,
            "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors",
        ),
        (
            {
                "config.json": CONFIG,
                "model.safetensors.index.json": b'{"weight_map": {"a": "../x", "b": "/etc/x"}}',
            },
            UnsafePath,
            "'../x', '/etc/x'",
        ),
        (
            {"config.json": CONFIG, "model.safetensors.index.json": b'{"weight_map": {"a": 1}}'},
            BadIndex,
            "weight_map",
        ),
        (
            {"config.json": CONFIG, "model.safetensors.index.json": b"[]"},
            BadIndex,
            "index.json",
        ),
    ],
)
def test_unsupported_model_is_refused_before_its_weights_are_downloaded(
    hub: Hub, cache: Path, files: dict[str, bytes], error: type[Exception], says: str
) -> None:
    hub.add("o/m", files)
    with pytest.raises(error, match=says):
        sources.resolve("hf:o/m", cache_dir=cache, progress=False)
    assert "model.safetensors" not in hub.asked("GET")


def test_gated_repository_is_reported(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("meta-llama/Llama-2-7b-hf", {**SMALL, "config.json": b'{"model_type": "llama"}'})
    hub.gated.add("meta-llama/Llama-2-7b-hf")
    with pytest.raises(GatedRepo, match=rf"{hub.url}/meta-llama/Llama-2-7b-hf.*HF_TOKEN"):
        sources.resolve("llama2-7b", cache_dir=cache, progress=False)
    source = sources.resolve("llama2-7b", cache_dir=cache, token="hf_right", progress=False)
    assert holds(source.directory) == sorted(SMALL)
    # what was once fetched with a token needs none
    assert sources.resolve("llama2-7b", cache_dir=cache, progress=False) == source


@pytest.mark.parametrize(
    ("ref", "token", "says"),
    [
        ("hf:o/nothing", None, "o/nothing: no such repository, or a private one.*HF_TOKEN"),
        ("hf:o/nothing", "hf_right", "o/nothing: no such repository"),
        ("hf:o/m@v9", None, "o/m has no revision 'v9'"),
        (f"hf:o/m@{SECOND}", None, "o/m has no revision"),
        ("hf:o/m", "hf_wrong", "refused the token"),
    ],
)
def test_missing_repository_or_revision_is_reported(
    hub: Hub, cache: Path, ref: str, token: str | None, says: str
) -> None:
    hub.add("o/m", SMALL)
    with pytest.raises(RepoNotFound, match=says):
        sources.resolve(ref, token=token, cache_dir=cache, progress=False)


# --- out of reach --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["down", "503", "local_files_only", "HF_HUB_OFFLINE"])
def test_unreachable_hub_is_reported(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    from huggingface_hub import constants

    hub.add("o/m", SMALL)
    fetched = sources.resolve("hf:o/m", cache_dir=cache, progress=False)
    local = how == "local_files_only"
    if how == "down":
        hub.close()
    elif how == "503":
        hub.status = 503
    elif how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    for ref in ("hf:o/m", "hf:o/m@main", f"hf:o/m@{FIRST}"):
        source = sources.resolve(ref, cache_dir=cache, local_files_only=local)
        assert (source.directory, source.revision) == (fetched.directory, FIRST)
    says = {"down": "cannot be reached", "503": "answered 503"}.get(how, f"{how} is set")
    for ref in ("hf:o/other", "hf:o/m@v9", f"hf:o/m@{SECOND}"):
        started = time.monotonic()
        with pytest.raises(Offline, match=rf"not.* in the cache {cache}, and .*{says}"):
            sources.resolve(ref, cache_dir=cache, local_files_only=local)
        assert time.monotonic() - started < 60  # no patient retries
    if local or how == "HF_HUB_OFFLINE":
        assert hub.log == []


def test_unwritable_cache_is_not_reported_as_a_network_error(hub: Hub, cache: Path) -> None:
    hub.add("o/m", SMALL)
    cache.write_text("a file")
    with pytest.raises(SourceError, match=f"the cache {cache} cannot be used: .*Errno") as caught:
        sources.resolve("hf:o/m", cache_dir=cache, progress=False)
    assert not isinstance(caught.value, Offline)


def test_weights_missing_from_the_cache_are_reported(hub: Hub, cache: Path) -> None:
    hub.add("o/m", SMALL)
    sources.resolve("hf:o/m", cache_dir=cache, weights=False, progress=False)
    with pytest.raises(
        Offline, match=r"not wholly, in the cache .* Missing: weights, in one of model\.safetensors"
    ):
        sources.resolve("hf:o/m", cache_dir=cache, local_files_only=True)
    sources.resolve("hf:o/m", cache_dir=cache, weights=False, local_files_only=True)


def test_shard_missing_from_the_cache_is_reported(hub: Hub, cache: Path) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": bytes([i]) for i in (1, 2)}
    hub.add("o/m", {"config.json": CONFIG, "model.safetensors.index.json": INDEX, **shards})
    source = sources.resolve("hf:o/m", cache_dir=cache, progress=False)
    (source.directory / next(iter(shards))).unlink()
    with pytest.raises(Offline):
        sources.resolve("hf:o/m", cache_dir=cache, local_files_only=True)
    mended = sources.resolve("hf:o/m", cache_dir=cache, progress=False)
    assert set(shards) < set(holds(mended.directory))


def test_cache_written_by_another_program_is_read(cache: Path, no_sockets: None) -> None:
    """refs/, blobs/ and snapshots/ as huggingface_hub documents them, made by hand."""
    repo = cache / "models--o--m"
    for commit, weights in ((FIRST, b"one"), (SECOND, b"two")):
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir(exist_ok=True)
        for name, content in (("config.json", CONFIG), ("model.safetensors", weights)):
            blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(FIRST)
    (repo / "refs" / "v2").write_text(SECOND)

    def weights_of(ref: str) -> bytes:
        source = sources.resolve(ref, cache_dir=cache, local_files_only=True)
        return (source.directory / "model.safetensors").read_bytes()

    assert weights_of("hf:o/m") == b"one"
    assert weights_of("hf:o/m@v2") == b"two"
    assert weights_of(f"hf:o/m@{SECOND}") == b"two"


# --- the environment, as a user sets it ----------------------------------------------------------

RESOLVE = "import sys, zoo.checkpoints.sources as s; print(s.resolve(sys.argv[1]).directory)"


def clean(home: Path, environment: dict[str, str]) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return {**kept, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **environment}


def user(root: Path, home: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A process with an environment of its own, since huggingface_hub reads it on import."""
    return subprocess.Popen(
        [sys.executable, "-c", *arguments],
        cwd=root,
        env=clean(home, environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return out.strip()


def test_environment_variables_are_used(tmp_path: Path, root: Path) -> None:
    served = Hub()
    try:
        served.add("o/secret", SMALL)
        served.gated.add("o/secret")
        home = tmp_path / "home"
        online = {"HF_ENDPOINT": served.url, "HF_TOKEN": "hf_right"}
        directory = finish(user(root, home, RESOLVE, "hf:o/secret", **online))
        assert Path(directory).is_relative_to(home / "hub")
        assert holds(Path(directory)) == sorted(SMALL)
    finally:
        served.close()
    again = finish(user(root, home, RESOLVE, "hf:o/secret", HF_HUB_OFFLINE="1"))
    assert again == directory


def on_a_terminal(root: Path, home: Path, code: str, **environment: str) -> bytes:
    """What a process says on its standard error, where that is a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=root,
        env=clean(home, environment),
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:
        pass  # the other end closed
    os.close(ours)
    assert process.wait(PATIENCE) == 0
    return seen


def test_progress_is_shown_only_on_a_terminal(tmp_path: Path, root: Path) -> None:
    served = Hub()
    served.add("o/m", {**SMALL, "model.safetensors": bytes(1 << 20)})
    try:
        piped = user(root, tmp_path / "a", RESOLVE, "hf:o/m", HF_ENDPOINT=served.url)
        assert piped.communicate(timeout=PATIENCE)[1] == ""
        code = "import zoo.checkpoints.sources as s; s.resolve('hf:o/m')"
        seen = on_a_terminal(root, tmp_path / "b", code, HF_ENDPOINT=served.url)
        assert b"model.safetensors" in seen
        assert b"100%" in seen
        code = code.replace(")", ", progress=False)")
        assert on_a_terminal(root, tmp_path / "c", code, HF_ENDPOINT=served.url) == b""
    finally:
        served.close()


# --- directories ---------------------------------------------------------------------------------


@pytest.fixture
def directory(in_tmp: Path) -> Path:
    path = in_tmp / "gpt2"
    path.mkdir()
    (path / "config.json").write_bytes(CONFIG)
    return path


@pytest.mark.parametrize("ref", ["./gpt2", Path("gpt2"), "gpt2/"])
def test_directory_resolves_to_itself(directory: Path, no_sockets: None, ref: Any) -> None:
    source = sources.resolve(ref)
    assert source.directory.samefile(directory)
    assert (source.checkpoint, source.repo, source.revision) == (None, None, None)


def test_directory_may_have_any_name(directory: Path, no_sockets: None) -> None:
    directory.rename("mine")
    assert sources.resolve("mine").directory == Path("mine")
    Path("zoo.json").write_text("{}")
    assert sources.resolve(Path()).directory == Path()


def test_directory_does_not_import_the_hub_client(directory: Path, root: Path) -> None:
    code = (
        "import sys, zoo.checkpoints.sources as s; s.resolve(sys.argv[1]); "
        "print([m for m in ('huggingface_hub', 'torch', 'ssl', 'asyncio') if m in sys.modules])"
    )
    assert finish(user(root, directory, code, str(directory))) == "[]"


def test_registry_name_takes_precedence_over_a_directory(directory: Path, cache: Path) -> None:
    with pytest.raises(Offline, match="openai-community/gpt2"):
        sources.resolve("gpt2", cache_dir=cache, local_files_only=True)


def link_loop() -> str:
    Path("loop").symlink_to("loop")
    return "loop"


def file() -> str:
    Path("model.safetensors").touch()
    return "model.safetensors"


def empty() -> str:
    Path("empty").mkdir()
    return "./empty"


def other() -> str:
    Path("other").mkdir()
    Path("other/notes.txt").touch()
    return "./other"


def parent() -> str:
    Path("up/down").mkdir(parents=True)
    Path("up/down/config.json").write_bytes(CONFIG)
    return "up"


def repo_in_cache() -> str:
    snapshot = Path(f"models--o--m/snapshots/{FIRST}")
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes(CONFIG)
    return "models--o--m"


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: "gtp2", UnknownName, "'gtp2'.*Did you mean gpt2"),
        (lambda: "./gpt2", NotACheckpoint, "./gpt2: no such directory"),
        (lambda: Path("nope"), NotACheckpoint, "nope: no such directory"),
        (lambda: "o/m", UsageError, "write hf:o/m"),
        (lambda: "https://huggingface.co/o/m/tree/main", UsageError, "write hf:o/m"),
        (lambda: "hf://o/m", UsageError, "write hf:o/m|expected hf:org/repo"),
        (lambda: "hf:gpt2", UsageError, "expected hf:org/repo"),
        (lambda: "hf:o/m@", UsageError, "expected hf:org/repo"),
        (lambda: "hf:../../etc", UsageError, "expected hf:org/repo"),
        (lambda: "hf:o/m@../../x", UsageError, "expected hf:org/repo"),
        (lambda: f"hf:o/m@{'x' * 5000}", UsageError, "expected hf:org/repo"),
        (lambda: "~nouser/x", NotACheckpoint, "~nouser/x: no such directory"),
        (lambda: "\ud800/x", NotACheckpoint, "no such directory"),
        (lambda: "", UsageError, "empty"),
        (lambda: "a\0b", UsageError, "no checkpoint is called|no such"),
        (lambda: "x" * 5000, UsageError, "no checkpoint is called"),
        (lambda: 3, UsageError, "expected a name.*int 3"),
        (lambda: None, UsageError, "expected a name"),
        (link_loop, NotACheckpoint, "loop: expected a directory"),
        (file, NotACheckpoint, "model.safetensors: expected a directory"),
        (empty, NotACheckpoint, "no config.json.*It is empty"),
        (other, NotACheckpoint, "no config.json.*It holds notes.txt"),
        (parent, NotACheckpoint, "There is one in up/down"),
        (repo_in_cache, NotACheckpoint, f"There is one in models--o--m/snapshots/{FIRST}"),
    ],
)
def test_wrong_reference_error_names_the_next_step(
    in_tmp: Path,
    no_sockets: None,
    make: Callable[[], Any],
    error: type[Exception],
    says: str,
) -> None:
    with pytest.raises(error, match=says) as caught:
        sources.resolve(make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("revision", ["../../x", "", "a\0b", "x" * 300, 3, b"main", "a\nb"])
def test_invalid_revision_is_refused(cache: Path, revision: Any) -> None:
    with pytest.raises(UsageError, match="revision="):
        sources.resolve("hf:o/m", revision=revision, cache_dir=cache, local_files_only=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_ENDPOINT", "http://[::1"),
        ("HF_ENDPOINT", "http://h:99999"),
        ("HF_HUB_ETAG_TIMEOUT", "x"),
    ],
)
def test_environment_variable_that_breaks_the_client_is_named(
    tmp_path: Path, root: Path, name: str, value: str
) -> None:
    code = (
        "import zoo.checkpoints.sources as s, zoo.errors as e\n"
        "try: s.resolve('hf:o/m')\nexcept e.SourceError as error: print(error)"
    )
    message = finish(user(root, tmp_path, code, **{name: value}))
    assert re.fullmatch(
        rf"huggingface_hub cannot use the environment .*: check .*{name}.*", message
    )


def test_home_directory_is_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Any
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "in").symlink_to(made("gpt2"))
    assert zoo.convert("~/in", "~/out", to="native") == tmp_path / "out"
    assert zoo.load("~/out")


def test_contradictory_revisions_are_refused(directory: Path) -> None:
    with pytest.raises(UsageError, match="a directory has no revisions"):
        sources.resolve(directory, revision="main")
    with pytest.raises(UsageError, match="one revision and"):
        sources.resolve("hf:o/m@v1", revision="v2")


def test_every_error_is_a_source_error_or_a_usage_error() -> None:
    assert issubclass(Offline, SourceError)
    assert not issubclass(UnknownName, SourceError)
