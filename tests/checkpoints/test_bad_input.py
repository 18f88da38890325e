"""Bad input, line by line, for every format and dialect that is read: refused by name."""

import io
import json
import os
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import bundles
import damage
import fuzz
import fuzzed
import fuzzed_models
import pytest
import torch
from torch import Tensor

import zoo
from converters.formats import TensorInfo, dtype_code, gguf, torch_dtype
from converters.formats.tf_bundle import TFBundleReader
from zoo import registry
from zoo.errors import (
    AmbiguousCheckpoint,
    ConfigError,
    CorruptCheckpoint,
    DtypeMismatch,
    DuplicateTensor,
    MissingShard,
    NonFinite,
    ResourceLimit,
    ShapeMismatch,
    TieConflict,
    UnsupportedZip,
    ZooError,
)

ROOT = Path(__file__).parents[2]

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
    """Return the fuzzing samples of a kind: valid files and the function that reads them."""
    return cache(lambda kind: fuzz.VICTIMS[kind][1](tmp_path_factory.mktemp(kind)))


def sample(victims: Victims, kind: str, name: str) -> tuple[Files, Callable[[Path], None]]:
    """Return a sample's files and the function that reads them."""
    victim = victims(kind)
    match = next(each for each in victim.samples if each.name == name)
    return dict(match.files), partial(victim.read, **match.options)


def written(files: Mapping[str, bytes], place: Path) -> Path:
    place.mkdir(exist_ok=True)
    for name, data in files.items():
        (place / name).write_bytes(data)
    return place


def test_every_sample_is_tested(victims: Victims) -> None:
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


NAMED_FILES = "gguf-words"  # by its own path, which may be a link to anywhere


@pytest.mark.parametrize(
    ("kind", "name", "harm"),
    [(k, n, harm) for k, n in EVERY for harm in HARMS if (k, harm) != (NAMED_FILES, outside)],
)
def test_damaged_file_is_refused(
    victims: Victims, tmp_path: Path, kind: str, name: str, harm: Callable[[Path], None]
) -> None:
    """Damage each file of a checkpoint in turn."""
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
WITH_CONFIG = [("hf", "llama"), ("meta", "1"), ("tf-models", "gpt2"), ("tf-models", "bert")]


@pytest.mark.parametrize("case", JSON)
@pytest.mark.parametrize(("kind", "name"), WITH_CONFIG)
def test_config_that_is_not_json_is_refused(
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
    """Return a sample with changed config fields."""
    if "model.gguf" in files:
        (place / "g").mkdir()
        fields, infos = fuzzed.gguf_parts(files["model.gguf"], place / "g")
        above = fields["general.architecture"].value
        layout = gguf.lay_out(
            infos, {**fields, **{f"{above}.{k}": v for k, v in changes.items()}}, ""
        )
        return {"model.gguf": layout.head + bytes(layout.size)}
    if "ckpt.pt" in files:
        state = torch.load(io.BytesIO(files["ckpt.pt"]), weights_only=True)
        state["model_args"] |= changes
        return {"ckpt.pt": fuzzed_models.zip_of(state, place)}
    (file,) = (n for n in files if n.endswith(".json"))
    return {**files, file: json.dumps({**json.loads(files[file]), **changes}).encode()}


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_wrong_config_value_is_refused(
    victims: Victims, tmp_path: Path, kind: str, name: str
) -> None:
    files, read = sample(victims, kind, name)
    layers, heads, width, similar = FIELDS[kind, name].split()
    cases: dict[str, tuple[dict[str, Any], type[ZooError] | tuple[type[ZooError], ...], str]] = {
        "many layers": ({layers: 10**9}, ResourceLimit, layers),
        "a layer more": ({layers: 2}, ConfigError, f"{layers}: 1 found, 2 declared"),
        "no layers": ({layers: 0}, ConfigError, f"{layers}: 0 is not positive"),
        "words": ({layers: "one"}, ConfigError, f"{layers}: "),
        "a truth": ({layers: True}, ConfigError, f"{layers}: "),
        "a list": ({layers: [1]}, ConfigError, f"{layers}: "),
        "heads": ({heads: 5}, ConfigError, "divide"),
        "another width": ({width: 24}, (ShapeMismatch, ConfigError), "24"),
        "far too wide": (
            {width: 2**31 - 4},
            (ShapeMismatch, ResourceLimit),
            "2147483644|8589934576",
        ),
        "unknown": ({similar: 2}, ConfigError, f"{similar}.*unknown"),
    }
    for case, (changes, kinds, message) in cases.items():
        place = tmp_path / case
        place.mkdir()
        with pytest.raises(
            kinds, match=message.replace(".", r"\.", message.count("attention."))
        ) as error:
            read(written(saying(files, place, changes), place / "files"))
        assert "files" in str(error.value), case


@pytest.mark.parametrize("share", [1.5, 1e308])
def test_rotary_factor_above_one_is_refused(tmp_path: Path, share: float) -> None:
    """Also for factors whose product with the size is infinite."""
    variant = next(iter(registry.architectures()["neox"].variants.values()))
    fields = {"model_type": "gpt_neox", "architectures": [variant["class"]], **variant["config"]}
    fields.pop("rope_parameters", None)
    text = json.dumps({**fields, "rotary_pct": share})
    with pytest.raises(ConfigError, match=f"rotary_factor: {re.escape(str(share))} is more"):
        zoo.load(written({"config.json": text.encode()}, tmp_path / "x"), weights="random")


# --- tensors -------------------------------------------------------------------------------------

TENSORS = [(k, n) for k, n in EVERY if k in ("hf", "bin", "meta", "tf-models", "trainers")]
TENSORS += [(k, n) for k, n in EVERY if k in ("gguf-models", "gptq", "awq", "fp8")]
STORED = ("F32", "F16", "BF16")  # in a GGUF file that is written here


def stored_tensors(files: Files, place: Path) -> tuple[str, dict[str, Tensor]]:
    """Return the name of the weight file and its tensors."""
    for file, data in files.items():
        if file.endswith(".safetensors"):
            infos, bytes_of = fuzzed.unpacked(data)
            return file, {i.name: _tensor(bytes_of[i], i) for i in infos}
        if file.endswith(".gguf"):
            reader = gguf.GGUFReader(written({file: data}, place) / file)
            return file, {name: reader.tensor(name) for name in reader.tensors}
        if file.endswith(".index"):
            reader = TFBundleReader(written(files, place) / file)
            return file, {name: reader.tensor(name) for name in reader.tensors}
        if file.endswith((".bin", ".pth", ".pt")):
            return file, dict(_weights(torch.load(io.BytesIO(data), weights_only=True)))
    raise AssertionError(files.keys())


def _tensor(data: bytes, info: TensorInfo) -> Tensor:
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return raw.view(torch_dtype(info.dtype)).view(info.shape)


def _weights(saved: Any) -> Any:
    return next((saved[key] for key in ("model", "model_state_dict") if key in saved), saved)


def holding(files: Files, tensors: Mapping[str, Tensor], place: Path) -> Files:
    """Return the files with their tensors replaced."""
    file, _ = stored_tensors(files, place / "before")
    if file.endswith(".safetensors"):
        return {**files, file: fuzzed.packed(tensors)}
    if file.endswith(".gguf"):
        fields, _ = fuzzed.gguf_parts(files[file], place)
        infos = [TensorInfo(n, tuple(t.shape), dtype_code(t.dtype)) for n, t in tensors.items()]
        layout = gguf.lay_out(infos, fields, "here")
        out = bytearray(layout.head + bytes(layout.size))
        for name, start in layout.starts.items():
            raw = bytes(tensors[name].reshape(-1).view(torch.uint8).tolist())
            out[len(layout.head) + start : len(layout.head) + start + len(raw)] = raw
        return {**files, file: bytes(out)}
    if file.endswith(".index"):
        bundles.bundle(place / "x", tensors)
        made = {p.name: p.read_bytes() for p in place.glob("x.*")}
        return {**files, **made}
    saved = torch.load(io.BytesIO(files[file]), weights_only=True)
    state = _weights(saved)
    state.clear()
    state.update(tensors)
    return {**files, file: fuzzed_models.zip_of(saved, place)}


def matrix(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of a matrix that is no embedding, not tied and not packed."""
    ends = ("o_proj.weight", "down_proj.weight", "o_proj.qweight", "wo.weight", "c_proj.weight")
    ends += ("c_proj/w", "attention/output/dense/kernel", "attention.output.dense.weight")
    ends += ("att.out_proj.weight", "attn_output.weight")
    return next(n for end in ends for n in tensors if n.endswith(end))


LAYER = re.compile(r"((?:layers?[._]|/h|h\.|blk\.|blocks\.))0(?=[./])")


@pytest.mark.parametrize(("kind", "name"), TENSORS)
def test_wrong_tensors_are_refused(victims: Victims, tmp_path: Path, kind: str, name: str) -> None:
    files, read = sample(victims, kind, name)
    file, tensors = stored_tensors(files, tmp_path / "held")
    one = matrix(tensors)
    x = tensors[one]
    rest = {n: t for n, t in tensors.items() if n != one}
    last = one.rpartition("/" if "/" in one else ".")
    cases: dict[str, dict[str, Tensor]] = {
        "none": {},
        "missing": rest,
        "misspelt": {**rest, f"{last[0]}x{last[1]}{last[2]}": x},
        "of a wrapper's": {f"module.{n}": t for n, t in tensors.items()},
        "nobody's": {**tensors, "lora.A": x},
        "a layer more": {**tensors, one.replace("0", "1", 1): x},
        "shorter": {**rest, one: x[:-1].clone()},
        "flat": {**rest, one: x.reshape(-1).clone()},
        "no numbers": {**rest, one: x[:0].clone()},
        "from one on": {LAYER.sub(r"\g<1>1", n): t for n, t in tensors.items()},
    }
    if not file.endswith(".gguf"):
        for dtype in (torch.int64, torch.uint8, torch.complex64, torch.bool, torch.float8_e5m2):
            cases[str(dtype)] = {**rest, one: x.float().to(dtype)}
    for case, changed in cases.items():
        place = tmp_path / case.replace(" ", "-")
        (place / "made").mkdir(parents=True)
        if file.endswith(".gguf") and case == "no numbers":
            continue  # which the format does not have
        with pytest.raises(ZooError) as error:
            read(written(holding(files, changed, place / "made"), place / "files"))
        message = str(error.value)
        assert str(place / "files") in message, (case, message)
        if case not in ("none", "of a wrapper's", "from one on"):
            named = {one, last[0], *changed.keys() - tensors.keys()}
            assert any(word in message for word in named), (case, message)
        if "torch." in case:
            assert isinstance(error.value, DtypeMismatch), (case, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("kind", "name"), TENSORS)
def test_convert_refuses_nan_and_infinity(
    victims: Victims, tmp_path: Path, kind: str, name: str, value: float
) -> None:
    """A conversion checks every number in every storage format."""
    files, _ = sample(victims, kind, name)
    _, tensors = stored_tensors(files, tmp_path / "held")
    one = next(n for n in (matrix(tensors).replace("qweight", "scales"),) if n in tensors)
    if tensors[one].dtype == torch.float8_e4m3fn:
        one = next(n for n in tensors if n.startswith(f"{one}_scale"))
    tensors[one] = tensors[one].clone()
    tensors[one].view(-1)[-1] = value
    (tmp_path / "made").mkdir()
    place = written(holding(files, tensors, tmp_path / "made"), tmp_path / "files")
    options = next(s.options for s in victims(kind).samples if s.name == name)
    with pytest.raises(NonFinite, match=r"blocks\.0\.\S+"):
        zoo.convert(place, tmp_path / "out", to="native", config=options)
    assert not (tmp_path / "out").exists()


PREFIXED = {  # what names may begin with
    ("hf", "gpt2"): "transformer.",
    ("hf", "bert"): "bert.",
    ("bin", "gpt2"): "transformer.",
    ("trainers", "nanogpt"): "_orig_mod.",
}


@pytest.mark.parametrize(("kind", "name"), PREFIXED)
def test_tensor_under_two_names_is_refused(
    victims: Victims, tmp_path: Path, kind: str, name: str
) -> None:
    files, read = sample(victims, kind, name)
    _, tensors = stored_tensors(files, tmp_path / "held")
    (tmp_path / "made").mkdir()
    first = next(n for n in tensors if n.startswith(PREFIXED[kind, name]))
    bare = first.removeprefix(PREFIXED[kind, name])
    tensors[bare] = tensors[first].clone()
    with pytest.raises(DuplicateTensor, match=bare):
        read(written(holding(files, tensors, tmp_path / "made"), tmp_path / "files"))


TIED = {  # a second name of a table's, where files may have both
    ("hf", "gpt2"): ("transformer.wte.weight", "lm_head.weight"),
    ("bin", "gpt2"): ("transformer.wte.weight", "lm_head.weight"),
    ("hf", "bert"): ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ("trainers", "nanogpt"): ("_orig_mod.transformer.wte.weight", "_orig_mod.lm_head.weight"),
}


@pytest.mark.parametrize(("kind", "name"), TIED)
def test_tied_weights_that_differ_are_refused(
    victims: Victims, tmp_path: Path, kind: str, name: str
) -> None:
    files, read = sample(victims, kind, name)
    _, tensors = stored_tensors(files, tmp_path / "held")
    first, second = TIED[kind, name]
    (tmp_path / "made").mkdir()
    tensors[second] = tensors[first].clone()
    read(written(holding(files, tensors, tmp_path / "made"), tmp_path / "same"))
    tensors[second][0, 0] += 1
    with pytest.raises(TieConflict, match=second):
        read(written(holding(files, tensors, tmp_path / "made"), tmp_path / "files"))
    del tensors[first], tensors[second]
    with pytest.raises(ZooError, match=first.partition(".")[2]):
        read(written(holding(files, tensors, tmp_path / "made"), tmp_path / "gone"))


# --- zips and sums -------------------------------------------------------------------------------

ZIPS = [(k, n) for k, n in EVERY if k in ("bin", "meta", "trainers")]
PAYLOADS = {
    "os.system": b"cos\nsystem\n(X\x09\0\0\0touch /x0tR.",
    "builtins.eval": b"c__builtin__\neval\n(X\x01\0\0\x001tR.",
    "builtins.bytearray": b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.",
    "STACK_GLOBAL": b"\x80\x04X\x02\0\0\0osX\x06\0\0\0system\x93.",
    "INST": b"(X\x01\0\0\0aios\nsystem\n.",
    "no pickle": b"\xff\xff",
    "a memo that is not there": b"\x80\x02h\7.",
    "a list": b"\x80\x02].",
}


@cache
def bomb() -> bytes:
    return damage.zipped([("x/data.pkl", bytes(65 << 20))], zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize(("kind", "name"), ZIPS)
def test_hostile_zips_and_pickles_are_refused(
    victims: Victims, tmp_path: Path, kind: str, name: str
) -> None:
    """No code is run, no bomb is unpacked, and every checksum is verified."""
    files, read = sample(victims, kind, name)
    file = next(n for n in files if not n.endswith(".json"))
    entries = damage.records(files[file])
    at = next(n for n, (entry, _) in enumerate(entries) if entry.endswith("data.pkl"))
    weights = max((entry for entry in entries if "/data/" in entry[0]), key=lambda e: len(e[1]))

    def fails(case: str, data: bytes, kinds: Any, message: str) -> None:
        with pytest.raises(kinds, match=message) as error:
            read(written({**files, file: data}, tmp_path / case.replace(" ", "-")))
        assert file in str(error.value), case

    seen: list[str] = []
    sys.addaudithook(lambda event, _: seen.append(event) if event == "os.system" else None)
    for case, pickle in PAYLOADS.items():
        changed = list(entries)
        changed[at] = changed[at][0], pickle
        fails(case, damage.zipped(changed), ZooError, "Nothing was run|pickle|holds a list")
    assert seen == []
    deflated = damage.zipped(entries, zipfile.ZIP_DEFLATED)
    fails("deflated", deflated, UnsupportedZip, "compressed are")
    fails("a bomb", bomb(), ResourceLimit, "claims to unpack")
    flipped = bytearray(files[file])
    place = files[file].index(weights[1])
    flipped[place + len(weights[1]) // 2] ^= 16
    fails("a flipped bit", bytes(flipped), CorruptCheckpoint, "CRC")
    beyond = bytearray(files[file])
    directory = files[file].rindex(b"PK\x01\x02")
    beyond[directory + 42 : directory + 46] = struct.pack("<I", 1 << 30)
    fails("beyond the file", bytes(beyond), CorruptCheckpoint, "disagree|overlaps|whole zip")


def test_flipped_bit_of_a_bundle_is_refused(victims: Victims, tmp_path: Path) -> None:
    for name in MODELS["tf-models"]:
        files, read = sample(victims, "tf-models", name)
        (file,) = (n for n in files if ".data-" in n)
        data = bytearray(files[file])
        data[len(data) // 2] ^= 1
        with pytest.raises(CorruptCheckpoint, match="CRC"):
            read(written({**files, file: bytes(data)}, tmp_path / name))


@pytest.mark.parametrize(
    ("kind", "name"),
    [(k, n) for k, n in EVERY if k in ("meta", "trainers", "llama2c", "gguf-models", "tf-models")],
)
def test_two_checkpoints_in_one_directory_are_refused(
    victims: Victims, tmp_path: Path, kind: str, name: str
) -> None:
    files, read = sample(victims, kind, name)
    file = next(n for n in sorted(files) if not n.endswith(".json") and ".data-" not in n)
    with pytest.raises((AmbiguousCheckpoint, MissingShard)) as error:
        read(written({**files, f"other-{file}": files[file]}, tmp_path / "x"))
    assert f"other-{file}" in str(error.value) or kind == "tf-models"
