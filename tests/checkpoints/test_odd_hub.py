"""A hub, or something in its place, that answers oddly: a named error and a clean cache."""

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from hub_server import CONFIG, FIRST, SMALL, Hub, holds

import zoo
from zoo.checkpoints import downloads, sources
from zoo.errors import (
    ChecksumMismatch,
    CorruptCheckpoint,
    GatedRepo,
    SourceError,
    ZooError,
)

WEIGHTS = SMALL["model.safetensors"]
Answer = tuple[int, dict[str, str], bytes]


class OddHub(Hub):
    """Its answers pass through `change`, which may also write to the connection itself."""

    change: Callable[[BaseHTTPRequestHandler, Answer], Answer | None] | None = None

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        answer: Answer | None = self.look_up(request)
        self.log.append((request.command, request.path))
        if self.change is not None:
            answer = self.change(request, answer)
        if answer is None:
            return
        status, headers, content = answer
        request.send_response(status)
        headers = {"Content-Length": str(len(content)), **headers}
        for key, value in headers.items():
            request.send_header(key, value)
        request.end_headers()
        if body:
            request.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[OddHub]:
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    served = OddHub()
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # the client's patient retries
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    few = ("tokenizer.json", "vocab.txt")
    monkeypatch.setattr("zoo.checkpoints.hub.COMPANIONS", few)  # to ask for
    served.add("o/m", SMALL)
    yield served
    served.close()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "cache"


def resolve(cache: Path, ref: str = "hf:o/m", **how: Any) -> sources.Source:
    return sources.resolve(ref, cache_dir=cache, progress=False, **how)


def of(name: str, change: Callable[[str, Answer], Answer | None]) -> Any:
    """A change of the answers about one file."""

    def altered(request: BaseHTTPRequestHandler, answer: Answer) -> Answer | None:
        return change(request.command, answer) if request.path.endswith(name) else answer

    return altered


def headers(**more: str) -> Callable[[str, Answer], Answer]:
    def change(method: str, answer: Answer) -> Answer:
        status, headers, content = answer
        return status, {**headers, **{k.replace("_", "-"): v for k, v in more.items()}}, content

    return change


def files_of(place: Path) -> dict[str, bytes]:
    """Everything under a directory but locks."""
    files = {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}
    return {name: data for name, data in files.items() if ".locks" not in name}


def check_clean(hub: OddHub, cache: Path, root: Path) -> None:
    """Nothing outside the cache, no file in it under a digest that its bytes do not have."""
    outside = [p for p in root.rglob("*") if p.is_file() and not p.is_relative_to(cache)]
    assert outside == []
    for blob in cache.glob("*/blobs/*"):
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    hub.change = None
    source = resolve(cache)
    assert holds(source.directory) == sorted(SMALL)
    assert (source.directory / "model.safetensors").read_bytes() == WEIGHTS


def test_compressed_and_chunked_answers_are_decoded(hub: OddHub, cache: Path) -> None:
    def change(request: BaseHTTPRequestHandler, answer: Answer) -> Answer | None:
        status, _, content = answer
        if request.command != "GET" or status != 200:
            return answer
        packed = gzip.compress(content)
        request.send_response(200)
        request.send_header("Content-Encoding", "gzip")
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for piece in (packed[:5], packed[5:], b""):
            request.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        return None

    hub.change = change
    source = resolve(cache)
    assert {n: (source.directory / n).read_bytes() for n in SMALL} == SMALL


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    "etag", ["../../../x", "", "a" * 39, "g" * 64, "A" * 60_000, "0" * 32 + "-5", "é", "..", "/x"]
)
def test_etag_that_is_not_a_digest_is_refused(
    hub: OddHub, cache: Path, tmp_path: Path, etag: str, name: str
) -> None:
    hub.change = of(name, headers(ETag=f'"{etag}"'))
    with pytest.raises(SourceError, match=r"ETag|cannot be reached"):
        resolve(cache)
    check_clean(hub, cache, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.txt"])
@pytest.mark.parametrize("commit", ["../../../x", "", "main", "1" * 39, "z" * 40, "1" * 64])
def test_commit_that_is_not_a_digest_creates_no_folder(
    hub: OddHub, cache: Path, tmp_path: Path, commit: str, name: str
) -> None:
    hub.change = of(name, headers(X_Repo_Commit=commit))
    if name == "vocab.txt":  # a file that is absent, and the header says of which commit
        resolve(cache)
    else:
        with pytest.raises(SourceError, match="X-Repo-Commit"):
            resolve(cache)
    check_clean(hub, cache, tmp_path)


def test_download_with_a_wrong_digest_is_refused(hub: OddHub, cache: Path, tmp_path: Path) -> None:
    def flipped(method: str, answer: Answer) -> Answer:
        status, headers, content = answer
        return status, headers, b"W" + content[1:]

    hub.change = of("model.safetensors", flipped)
    with pytest.raises(ChecksumMismatch, match=r"model\.safetensors.*sha256.*expected"):
        resolve(cache)
    check_clean(hub, cache, tmp_path)


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def test_git_files_are_checked_by_sha1(hub: OddHub, cache: Path) -> None:
    digest = git_digest(CONFIG)
    hub.change = of("config.json", headers(ETag=f'"{digest}"'))
    source = resolve(cache)
    assert Path(os.path.realpath(source.directory / "config.json")).name == digest
    hub.change = of("tokenizer.json", headers(ETag=f'"{digest}"'))
    (cache / "models--o--m" / "snapshots" / FIRST / "tokenizer.json").unlink()
    (cache / "models--o--m" / "blobs" / digest).unlink()
    with pytest.raises(ChecksumMismatch, match="git's sha1"):
        resolve(cache)


def html(method: str, answer: Answer) -> Answer:
    return 200, {"Content-Type": "text/html"}, b"<html>Sign in to the airport's network</html>"


def loop(method: str, answer: Answer) -> Answer:
    return 302, {"Location": "#again"}, b""


def elsewhere(method: str, answer: Answer) -> Answer:
    return 302, {**answer[1], "Location": "http://127.0.0.1:9/gone"}, b""


def nowhere(method: str, answer: Answer) -> Answer:
    return 302, answer[1], b""


def long_error(method: str, answer: Answer) -> Answer:
    return 500, {}, b"x" * (1 << 20)


def busy(method: str, answer: Answer) -> Answer:
    return 429, {"Retry-After": "1"}, b""


def no_such_range(method: str, answer: Answer) -> Answer:
    return 416, answer[1], b""


def announced(size: str) -> Callable[[str, Answer], Answer]:
    return headers(X_Linked_Size=size)


def longer(method: str, answer: Answer) -> Answer:
    """More than was announced."""
    status, headers, content = answer
    return status, headers, content + (b"more" * 9 if method == "GET" else b"")


def shorter(method: str, answer: Answer) -> Answer:
    status, headers, content = answer
    return status, headers, content[:3] if method == "GET" else content


def not_gzip(method: str, answer: Answer) -> Answer:
    status, headers, content = answer
    return status, {**headers, "Content-Encoding": "gzip"}, content


ANSWERS: dict[str, Callable[[str, Answer], Answer]] = {
    "html": html,
    "a loop": loop,
    "elsewhere": elsewhere,
    "nowhere": nowhere,
    "an error of 1 MB": long_error,
    "busy": busy,
    "416": no_such_range,
    "a negative size": announced("-5"),
    "a size that is too large": announced("99999"),
    "a huge size": announced("9" * 30),
    "no size": headers(X_Linked_Size="many"),
    "longer": longer,
    "shorter": shorter,
    "not gzip": not_gzip,
    "204": lambda method, answer: (204, {}, b""),
    "300": lambda method, answer: (300, {}, b""),
    "418": lambda method, answer: (418, {"X-Error-Code": "Teapot"}, b""),
    "a bad range": headers(Content_Range="bytes 0-5/many"),
    "xet": headers(X_Xet_Hash="../x", X_Xet_Refresh_Route="x"),
    "links": headers(Link='<x>; rel="xet-auth"'),
}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.txt"])
@pytest.mark.parametrize("how", ANSWERS)
def test_malformed_answer_raises_a_named_error(
    hub: OddHub, cache: Path, tmp_path: Path, how: str, name: str
) -> None:
    hub.change = of(name, ANSWERS[how])
    try:
        source = resolve(cache)
    except ZooError as error:
        assert len(str(error)) < 1000
    else:
        assert (source.directory / "model.safetensors").read_bytes() == WEIGHTS
    check_clean(hub, cache, tmp_path)


@pytest.mark.parametrize("length", ["-5", "many", "3", "99999"])
def test_wrong_content_length_is_refused(
    hub: OddHub, cache: Path, tmp_path: Path, length: str
) -> None:
    def change(request: BaseHTTPRequestHandler, answer: Answer) -> Answer:
        request.close_connection = True
        if not request.path.endswith("model.safetensors"):
            return answer
        status, headers, content = answer
        return status, {**headers, "Content-Length": length}, content

    hub.change = change
    with pytest.raises(ZooError):
        resolve(cache)
    check_clean(hub, cache, tmp_path)


def test_interrupted_download_resumes(
    hub: OddHub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 3)
    cut: list[str] = []

    def change(request: BaseHTTPRequestHandler, answer: Answer) -> Answer | None:
        if request.command != "GET" or not request.path.endswith("model.safetensors"):
            return answer
        asked = request.headers.get("Range", "")
        cut.append(asked)
        if len(cut) == 1:
            request.send_response(200)
            request.send_header("Content-Length", str(len(WEIGHTS)))
            request.end_headers()
            request.wfile.write(WEIGHTS[:3])
            request.close_connection = True
            return None
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        size = len(WEIGHTS)
        return 206, {"Content-Range": f"bytes {start}-{size - 1}/{size}"}, WEIGHTS[start:]

    hub.change = change
    source = resolve(cache)
    assert (source.directory / "model.safetensors").read_bytes() == WEIGHTS
    assert cut == ["", "bytes=3-"]
    check_clean(hub, cache, tmp_path)


@pytest.mark.parametrize(
    "listing",
    [
        *[b"", b"null", b"3", b"{}", b'"x"', b"[null]", b"[[]]", b'["model.gguf"]', b"[{}]"],
        *[b'[{"type": "file"}]', b'[{"type": "file", "path": null, "size": 1, "oid": "0"}]'],
        *[b'[{"type": "file", "path": 3, "size": 1, "oid": "0"}]', b"\xff\xfe", b"<html>"],
        b'[{"type": "file", "path": "../../x.gguf", "size": 1, "oid": "0"}]',
        b'[{"type": "file", "path": "a\\u001b[2J.gguf", "size": 1, "oid": "0"}]',
        b'[{"type": "file", "path": "x.gguf", "size": -1, "oid": null, "lfs": 3}]',
        b'[{"type": "file", "path": "x.gguf", "size": "no", "oid": "0", "lastCommit": 3}]',
        json.dumps([{"type": "file", "path": "x" * 9999 + ".gguf", "size": 1, "oid": 1}]).encode(),
        b"[" * 100_000,
    ],
)
def test_malformed_file_listing_raises_a_named_error(
    hub: OddHub, cache: Path, tmp_path: Path, listing: bytes
) -> None:
    hub.add("o/n", {"README.md": b"", "x.gguf": b"GGUF"})

    def change(request: BaseHTTPRequestHandler, answer: Answer) -> Answer:
        listed = "/tree/" in request.path
        return (200, {"Content-Type": "application/json"}, listing) if listed else answer

    hub.change = change
    try:
        resolve(cache, "hf:o/n")
    except ZooError as error:
        assert len(str(error)) < 2000 and "\x1b" not in str(error)
    else:
        assert b"x.gguf" in listing
    check_clean(hub, cache, tmp_path)


# --- files in the cache --------------------------------------------------------------------------


def shortened(cache: Path, name: str) -> Path:
    (path,) = cache.glob(f"models--o--m/snapshots/*/{name}")
    blob = Path(os.path.realpath(path))
    blob.write_bytes(blob.read_bytes()[:3])
    return blob


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("ref", ["hf:o/m", f"hf:o/m@{FIRST}"])
def test_damaged_cache_file_is_downloaded_again(
    hub: OddHub, cache: Path, tmp_path: Path, name: str, ref: str
) -> None:
    resolve(cache)
    hub.add("o/m", {**SMALL})
    blob = shortened(cache, name)
    source = resolve(cache, ref)
    assert (source.directory / name).read_bytes() == SMALL[name] == blob.read_bytes()
    check_clean(hub, cache, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_cache_file_is_reported_offline(hub: OddHub, cache: Path, name: str) -> None:
    resolve(cache)
    blob = shortened(cache, name)
    with pytest.raises(SourceError, match=rf"{blob} is damaged \(3 bytes.*: delete it"):
        resolve(cache, local_files_only=True)
    assert blob.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "x.gguf"])
def test_large_damaged_cache_file_is_reported_on_reading(
    hub: OddHub, cache: Path, tmp_path: Path, made: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_SMALL", 1 << 10)  # what is larger is not hashed at each load
    place = made("gpt2")
    if name == "x.gguf":
        place = zoo.convert(place, tmp_path / "gguf", to="gguf")
    hub.add(
        "o/n",
        {
            p.name if p.suffix != ".gguf" else name: p.read_bytes()
            for p in place.iterdir()
            if p.name != "zoo-manifest.json"
        },
    )
    resolve(cache, "hf:o/n")
    (path,) = cache.glob(f"models--o--n/snapshots/*/{name}")
    blob = Path(os.path.realpath(path))
    blob.write_bytes(blob.read_bytes()[:-2000])
    with pytest.raises(CorruptCheckpoint, match=rf"{blob} is damaged .*: delete it"):
        zoo.load("hf:o/n", cache_dir=cache, local_files_only=True)
    blob.unlink()
    assert zoo.load("hf:o/n", cache_dir=cache)


def test_gated_file_is_not_reported_as_damaged(hub: OddHub, cache: Path) -> None:
    hub.gated.add("o/m")
    with pytest.raises(GatedRepo):
        resolve(cache)
