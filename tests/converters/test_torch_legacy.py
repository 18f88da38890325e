"""`.bin` and `.pt` as torch before 1.6 saved them."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import zoo
from converters.formats.torch_zip import TorchZipReader
from zoo.errors import CorruptCheckpoint


@pytest.fixture
def old(tmp_path: Path) -> Path:
    whole = torch.arange(12.0).view(3, 4)
    state = {
        "a.weight": whole,
        "a.part": whole[1:, ::2],
        "half": torch.ones(5, dtype=torch.float16),
        "brain": torch.full((2, 2), -1.5, dtype=torch.bfloat16),
        "empty": torch.empty(0),
        "count": torch.tensor(7),
    }
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def test_every_tensor_is_what_torch_reads(old: Path) -> None:
    expected = torch.load(old, weights_only=True)
    reader = TorchZipReader(old)
    assert reader.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (
            torch.equal(reader.tensor(name), tensor) and reader.tensor(name).dtype == tensor.dtype
        )
    assert reader.place("a.weight")[0] == reader.place("a.part")[0]


def test_a_published_directory_with_an_old_bin_loads(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    source = made("bert")
    shutil.copy(source / "config.json", tmp_path)
    state = load_file(source / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    there = dict(zoo.load(source).named_parameters())
    for name, parameter in zoo.load(tmp_path).named_parameters():
        assert torch.equal(parameter, there[name])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data[:-3], r"storage \d+ at byte \d+: expected|its storages end at byte"),
        (lambda data: data + b"\0", r"its storages end at byte \d+, the file at \d+"),
        (lambda data: data.replace(b"\x88X\n", b"\x89X\n", 1), "expected version 1001 and little"),
        (lambda data: data[:200], "no pickle, or a damaged one"),
        (lambda data: data[:15], "no pickle, or a damaged one"),
    ],
    ids=["truncated", "trailing", "big-endian", "within a pickle", "magic alone"],
)
def test_a_damaged_file_is_refused(old: Path, edit: Callable[[bytes], bytes], message: str) -> None:
    old.write_bytes(edit(old.read_bytes()))
    with pytest.raises(CorruptCheckpoint, match=message):
        TorchZipReader(old)


def test_a_payload_in_a_pickle_is_refused_and_never_run(old: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    data = old.read_bytes()
    at = data.index(b"}", data.index(b"little_endian"))  # where the saved dict's pickle begins
    at = data.rindex(b"\x80\x02", 0, at)
    old.write_bytes(data[:at] + pickle.dumps(Payload(), 2))
    with pytest.raises(CorruptCheckpoint, match=r"asks for posix\.mkdir.*Nothing was run"):
        TorchZipReader(old)
    assert not (tmp_path / "ran").exists()
