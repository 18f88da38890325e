"""Bad input, line by line, for every format and dialect that is read: refused by name."""

import io
import json
import os
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from converters.formats import TensorInfo, dtype_code, gguf
from converters.formats.tf_bundle import TFBundleReader
from zoo.errors import (
    AmbiguousCheckpoint,
    ConfigError,
    CorruptCheckpoint,
    DtypeMismatch,
    MissingShard,
    NonFinite,
    ResourceLimit,
    ShapeMismatch,
    TieConflict,
    UnsupportedZip,
    ZooError,
)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
try:
    import bundles
    import damage
    import fuzzed
finally:
    sys.path.pop(0)

MODELS = {
    "hf": ("llama", "gpt2", "bert"),
    "bin": ("llama", "gpt2", "bert"),
    "meta": ("1", "2"),
    "tf-models": ("gpt2", "bert"),
    "trainers": ("nanogpt", "mingpt", "book"),
    "llama2c": ("0", "1", "2"),
    "gguf-models": ("llama", "gpt2", "bert"),
    "gptq": ("gptq", "gptq-v2", "gptq-order"),
    "awq": ("awq", "awq-one-group"),
    "fp8": ("fp8", "fp8-tensor"),
}
WORDS = {
    "sentencepiece": ("tokenizer", "spiece", "sentencepiece"),
    "tokenizer.bin": ("bin",),
    "gguf-words": ("llama", "gpt2", "bert"),
}
EVERY = [(kind, name) for kind, names in {**MODELS, **WORDS}.items() for name in names]
Files = dict[str, bytes]
Victims = Callable[[str], Any]


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Victims:
    """By kind what fuzzing damages: samples of files that can be read, and how they are."""
    return cache(lambda kind: fuzzed.VICTIMS[kind][1](tmp_path_factory.mktemp(kind)))


def sample(victims: Victims, kind: str, name: str) -> tuple[Files, Callable[[Path], None]]:
    """(its files, how they are read)"""
    victim = victims(kind)
    found = next(each for each in victim.samples if each.name == name)
    return dict(found.files), partial(victim.read, **found.told)


def written(files: Mapping[str, bytes], place: Path) -> Path:
    place.mkdir(exist_ok=True)
    for name, data in files.items():
        (place / name).write_bytes(data)
    return place


def test_every_sample_is_looked_at(victims: Victims) -> None:
    for kind, names in {**MODELS, **WORDS}.items():
        assert tuple(sample.name for sample in victims(kind).samples) == names


# --- files ---------------------------------------------------------------------------------------


def absent(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\xff" * 9)


def another(path: Path) -> None:
    path.write_bytes(b"GIF89a" * 400)


def pointer(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)  # whoever opens it waits for ever


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def outside(path: Path) -> None:
    other = path.parent.parent / f"outside-{path.name}"
    path.rename(other)
    path.symlink_to(other)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


HARMS = (absent, empty, cut, longer, another, pointer, folder, pipe, device, outside, loop)


GIVEN = "gguf-words"  # by its own path, which may be a link to anywhere


@pytest.mark.parametrize(
    ("kind", "name", "harm"),
    [(k, n, harm) for k, n in EVERY for harm in HARMS if (k, harm) != (GIVEN, outside)],
)
def test_files_that_are_none(
    victims: Victims, tmp_path: Path, kind: str, name: str, harm: Callable[[Path], None]
) -> None:
    """Each of a checkpoint's files in turn."""
    files, read = sample(victims, kind, name)
    for number, file in enumerate(files):
        place = written(files, tmp_path / str(number))
        harm(place / file)
        with pytest.raises(ZooError) as error:
            read(place)
        assert str(place) in str(error.value), file


# --- configs -------------------------------------------------------------------------------------

JSON = {
    "null": b"null",
    "a list": b"[]",
    "half of it": b'{"a": ',
    "no text": b'{"a": "\xff"}',
    "twice": b'{"a": 1, "a": 1}',
    "not a number": b'{"a": {"b": [NaN]}}',
    "infinity": b'{"a": -Infinity}',
    "beyond any float": b'{"a": 1e999}',
    "a long number": b'{"a": ' + b"9" * 5000 + b"}",
    "half a character": b'{"a": "\\ud800"}',
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep enough": b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}",
}
TOLD = [("hf", "llama"), ("meta", "1"), ("tf-models", "gpt2"), ("tf-models", "bert")]


@pytest.mark.parametrize("case", JSON)
@pytest.mark.parametrize(("kind", "name"), TOLD)
def test_configs_that_are_no_json(
    victims: Victims, tmp_path: Path, kind: str, name: str, case: str
) -> None:
    files, read = sample(victims, kind, name)
    (file,) = (n for n in files if n.endswith(".json"))
    with pytest.raises(ConfigError) as error:
        read(written({**files, file: JSON[case]}, tmp_path / "x"))
    assert file in str(error.value)


# of each config: its layers, its heads, its width, and a field that is like one of its own
FIELDS = {
    ("hf", "llama"): "num_hidden_layers num_attention_heads hidden_size hidden_sise",
    ("hf", "gpt2"): "n_layer n_head n_embd n_layers",
    ("hf", "bert"): "num_hidden_layers num_attention_heads hidden_size hidden_sise",
    ("bin", "llama"): "num_hidden_layers num_attention_heads hidden_size hidden_sise",
    ("gptq", "gptq"): "num_hidden_layers num_attention_heads hidden_size hidden_sise",
    ("meta", "1"): "n_layers n_heads dim n_layer",
    ("meta", "2"): "n_layers n_heads dim n_layer",
    ("tf-models", "gpt2"): "n_layer n_head n_embd n_layers",
    ("tf-models", "bert"): "num_hidden_layers num_attention_heads hidden_size hidden_sise",
    ("trainers", "nanogpt"): "n_layer n_head n_embd n_layers",
    ("gguf-models", "llama"): "block_count attention.head_count embedding_length block_counts",
    ("gguf-models", "gpt2"): "block_count attention.head_count embedding_length block_counts",
    ("gguf-models", "bert"): "block_count attention.head_count embedding_length block_counts",
}


def saying(files: Files, place: Path, changes: Mapping[str, Any]) -> Files:
    """A sample whose config says something else."""
    if "model.gguf" in files:
        (place / "g").mkdir()
        said, infos = fuzzed._gguf_parts(files["model.gguf"], place / "g")
        above = said["general.architecture"].value
        layout = gguf.lay_out(infos, {**said, **{f"{above}.{k}": v for k, v in changes.items()}}, "")
        return {"model.gguf": layout.head + bytes(layout.size)}
    if "ckpt.pt" in files:
        found = torch.load(io.BytesIO(files["ckpt.pt"]), weights_only=True)
        found["model_args"] |= changes
        return {"ckpt.pt": fuzzed.zip_of(found, place)}
    (file,) = (n for n in files if n.endswith(".json"))
    return {**files, file: json.dumps({**json.loads(files[file]), **changes}).encode()}


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_what_a_config_may_not_say(
    victims: Victims, tmp_path: Path, kind: str, name: str
) -> None:
    files, read = sample(victims, kind, name)
    layers, heads, width, odd = FIELDS[kind, name].split()
    cases: dict[str, tuple[dict[str, Any], type[ZooError] | tuple[type[ZooError], ...], str]] = {
        "many layers": ({layers: 10**9}, ResourceLimit, layers),
        "a layer more": ({layers: 2}, ConfigError, f"{layers}: 1 found, 2 declared"),
        "no layers": ({layers: 0}, ConfigError, f"{layers}: 0 is not positive"),
        "words": ({layers: "one"}, ConfigError, f"{layers}: "),
        "a truth": ({layers: True}, ConfigError, f"{layers}: "),
        "a list": ({layers: [1]}, ConfigError, f"{layers}: "),
        "heads": ({heads: 5}, ConfigError, "divide"),
        "another width": ({width: 24}, (ShapeMismatch, ConfigError), "24"),
        "far too wide": ({width: 2**31 - 4}, (ShapeMismatch, ResourceLimit), "2147483644"),
        "unknown": ({odd: 2}, ConfigError, f"{odd}.*unknown"),
    }
    for case, (changes, kinds, told) in cases.items():
        place = tmp_path / case
        place.mkdir()
        with pytest.raises(kinds, match=told.replace(".", r"\.", told.count("attention."))) as error:
            read(written(saying(files, place, changes), place / "files"))
        assert "files" in str(error.value), case
