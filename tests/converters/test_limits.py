"""Files that would take much more memory or time than their bytes are worth."""

import difflib
import json
import os
import stat
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import build

import zoo
from converters import strict_json
from converters.formats.safetensors import SafetensorsReader
from converters.formats.torch_zip import TorchZipReader
from converters.strict_json import DuplicateKeys, memory_of, parse_json, read_json, unique
from zoo import errors
from zoo.errors import ConfigError, ResourceLimit

MANY, MOST = 1 << 20, 8 << 20  # bytes of each file; of memory, an eighth of what there really is


def in_json(item: bytes) -> Callable[[Path], None]:
    return lambda path: _write(path, b'{"a":[' + item * (MANY // len(item)) + b"0]}")


def in_header(item: bytes) -> Callable[[Path], None]:
    header = b'{"__metadata__":{' + item * (MANY // len(item)) + b'"":""}}'
    return lambda path: _write(path, struct.pack("<Q", len(header)) + header)


def in_pickle(opcodes: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            body = b"\x80\x02N" + opcodes * (MANY // len(opcodes)) + b"."
            archive.writestr("archive/data.pkl", body)

    return write


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


FILES = {
    "lists.json": in_json(b"[],"),
    "mappings.json": in_json(b"{},"),
    "nested.json": in_json(b"[" * 30 + b"]" * 30 + b","),
    "texts.json": in_json('"aĀ",'.encode()),
    "keys.json": in_json(b'{"a":1},'),
    "lists.safetensors": in_header(b'"a":[],'),
    "texts.safetensors": in_header(b'"a":"",'),
    "lists.bin": in_pickle(b"]"),
    "mappings.bin": in_pickle(b"}"),
    "memo.bin": in_pickle(b"".join(b"r" + struct.pack("<I", n) for n in range(MANY // 5))),
    "numbers.bin": in_pickle(b"M\xff\xff"),
    "texts.bin": in_pickle(b"U\x02ab"),
    "tuples.bin": in_pickle(b"K\x01\x85"),
}
READ = """
import resource, sys
from pathlib import Path
from converters import strict_json
from converters.formats import safetensors, torch_pickle
from converters.formats.safetensors import SafetensorsReader
from converters.formats.torch_zip import TorchZipReader
from zoo.errors import ResourceLimit
for module in (strict_json, safetensors, torch_pickle):
    module.MAX_MEMORY //= 8
readers = {".json": strict_json.read_json, ".safetensors": SafetensorsReader}
readers[".bin"] = TorchZipReader
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    try:
        readers[Path(name).suffix](Path(name))
    except ResourceLimit:
        continue
    print(name, "was read")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_files_of_the_largest_models_are_read(tmp_path: Path) -> None:
    """An index of 140,000 tensors, as Kimi K2 has it; 30,000 tensors in one file."""
    names = [f"model.layers.{n // 2304}.mlp.experts.{n % 2304}.proj.weight" for n in range(140_000)]
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00061.safetensors")}
    (tmp_path / "x.json").write_text(json.dumps(index, indent=2))
    assert len(read_json(tmp_path / "x.json")["weight_map"]) == 140_000
    entry = '"%s":{"dtype":"U8","shape":[0,99],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % name for name in names[:30_000]) + "}").encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert len(SafetensorsReader(tmp_path / "x.safetensors").tensors) == 30_000
    torch.save({name: torch.zeros(0, 99) for name in names[:2000]}, tmp_path / "x.bin")
    assert len(TorchZipReader(tmp_path / "x.bin").tensors) == 2000


def test_memory_before_a_refusal(tmp_path: Path, root: Path) -> None:
    """At most the file and the limit, where some would take sixty times their bytes."""
    for name, write in FILES.items():
        write(tmp_path / name)
    run = [sys.executable, "-c", READ, *(str(tmp_path / name) for name in FILES)]
    done = subprocess.run(run, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().isdecimal(), done.stdout + done.stderr
    slack = 3 << 20  # of what the readers themselves import and keep
    assert int(done.stdout) << 10 < MANY + MOST + slack


def test_a_small_file_takes_a_small_buffer(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"layers": 2}')
    tracemalloc.start()
    try:
        assert read_json(path) == {"layers": 2}
        assert tracemalloc.get_traced_memory()[1] < MANY
    finally:
        tracemalloc.stop()


def test_a_file_that_grows_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"layers": 2}')
    status = [*path.stat()]
    status[stat.ST_SIZE] = 5
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result(status))
    assert read_json(path) == {"layers": 2}
    monkeypatch.setattr(strict_json, "MAX_BYTES", 10)
    with pytest.raises(ResourceLimit, match="grew beyond 10 bytes"):
        read_json(path)


def test_wide_text_counts_by_its_characters(tmp_path: Path) -> None:
    """One character beyond the first 65536 makes Python take four bytes for each."""
    text = "a" * (20 << 20)
    (tmp_path / "x.json").write_text(json.dumps({"a": text}))
    assert read_json(tmp_path / "x.json") == {"a": text}
    (tmp_path / "x.json").write_text(json.dumps({"a": text + "😀"}, ensure_ascii=False))
    with pytest.raises(ResourceLimit, match=r"x\.json: .* bytes of JSON that would take some 1"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps({"a": text + "😀"}))
    with pytest.raises(ResourceLimit):
        read_json(tmp_path / "x.json")


def test_memory_of_json_is_no_less_than_what_it_takes() -> None:
    for item in ("[]", "{}", "[[[1]]]", '{"a":{"b":1}}', '"ab"', "1.5", "12345", '{"ab":"cd"}'):
        text = "[" + ",".join([item] * 10_000) + "]"
        tracemalloc.start()
        actual = json.loads(text, object_pairs_hook=unique)
        assert tracemalloc.get_traced_memory()[0] <= memory_of(text.encode()), item
        tracemalloc.stop()
        assert len(actual) == 10_000


def test_duplicate_keys_by_the_ten_thousand_are_counted_once() -> None:
    class Name(str):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Name.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    pairs = [(Name(f"k{n // 2}"), n) for n in range(40_000)]
    with pytest.raises(DuplicateKeys, match=r"^'k0', 'k1', 'k10', .* and 19980 more$"):
        unique(pairs)
    assert Name.compared < 10 * len(pairs)  # all with all are 800 million
    data = ("{" + ",".join(f'"k{n // 2}":{n}' for n in range(40_000)) + "}").encode()
    with pytest.raises(ConfigError, match="duplicate keys in one object: 'k0', 'k1'"):
        parse_json(data, "here")


def test_suggestions_compare_few_names_and_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"model.layers.{n // 100}.experts.{n % 100}.gate_proj.weight" for n in range(20_000)]
    compared: list[int] = []

    def matches(word: str, names: list[str], **options: object) -> list[str]:
        compared.append(len(names))
        return difflib.get_close_matches(word, names, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(errors, "get_close_matches", matches)
    message = errors.did_you_mean("model.layers.7.experts.11.gate_pro.weight", names)
    assert "model.layers.7.experts.11.gate_proj.weight" in message and compared == [500]
    assert errors.did_you_mean("a" * 10**6, ["a" * 10**6 + "b"]) == ""


def test_fields_by_the_ten_thousand_have_few_suggestions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = zoo.save(build("llama"), tmp_path / "x", to="hf")
    config = json.loads((place / "config.json").read_text())
    config |= {f"hidden_sise{n}": n for n in range(10_000)}
    (place / "config.json").write_text(json.dumps(config))
    words: list[str] = []
    near = errors.get_close_matches
    monkeypatch.setattr(
        errors, "get_close_matches", lambda word, *a, **k: words.append(word) or near(word, *a, **k)
    )
    with pytest.raises(ConfigError, match="10000 unknown fields, no model's config: hidden_sise0"):
        zoo.load(place)
    assert len(words) < 100
