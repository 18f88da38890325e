"""What is damaged, kind by kind: a few small files, and how users have them read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import bundles
import torch
from damage import (
    CODES,
    Chance,
    Damage,
    altered,
    bitten,
    cut,
    flipped,
    mutated,
    renumbered,
    reshaped,
    retold,
    reworded,
    rezipped,
)
from plainly import sound_gguf, sound_safetensors

import zoo
from converters.checkpoint import open_checkpoint
from converters.containers import kind_of
from converters.formats import TensorInfo, dtype_code, gguf, llama2c, safetensors
from converters.formats.quants import KINDS, WRITTEN
from converters.formats.sstable import read_table
from converters.formats.tf_bundle import TFBundleReader
from zoo import registry
from zoo.errors import ZooError
from zoo.pretrained import skeleton
from zoo.tokenizers.llama2c import model_of

Files = Mapping[str, bytes]
TF = Path(__file__).resolve().parent.parent / "tests/data/tf"  # what TensorFlow wrote


class Kind:
    """Sound files in a directory; a call damages some of them, and has all of them read."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._there: dict[Path, dict[str, bytes]] = {}  # opening files takes longest

    def put(self, files: Files, below: str = "one") -> Path:
        """Their directory, which holds these and no others."""
        place = self.place / below
        place.mkdir(exist_ok=True)
        there = self._there.setdefault(place, {})
        for name in there.keys() - files.keys():
            (place / name).unlink()
            del there[name]
        for name, data in files.items():
            if there.get(name) != data:
                if there.pop(name, None) is not None:  # what is mapped of it stays as it is
                    (place / name).unlink()
                (place / name).write_bytes(data)
                there[name] = data
        return place

    def __call__(self, chance: Chance) -> None:
        """Damaged files, read: a ZooError is an answer, and so is what is in them."""
        raise NotImplementedError


class Sample(NamedTuple):
    """One set of files, and how each of them is damaged."""

    name: str
    files: Files
    damage: Mapping[str, Damage]
    told: Mapping[str, Any] = MappingProxyType({})  # what files of a dialect do not say


_FEW = (1, 1, 1, 2)  # files


class Samples(Kind):
    """Several sets of files that are read in the same way."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.samples = list(self.made(place))
        for sample in self.samples:
            self.read(
                self.put(sample.files, sample.name), **sample.told
            )  # as they are, they can be

    def made(self, place: Path) -> Iterable[Sample]:
        raise NotImplementedError

    def read(self, place: Path, **told: Any) -> None:
        raise NotImplementedError

    def __call__(self, chance: Chance) -> None:
        sample = chance.choice(self.samples)
        files = dict(sample.files)
        for name in chance.sample(
            list(sample.damage), min(len(sample.damage), chance.choice(_FEW))
        ):
            files[name] = sample.damage[name](files[name], chance)
        self.read(self.put(files, sample.name), **sample.told)


# --- safetensors, and directories of the hub ------------------------------------------------------


class Header(Kind):
    def __init__(self, place: Path) -> None:
        super().__init__(place)
        infos = [
            TensorInfo(f"blocks.{n}.w", (2, n + 1), d)
            for n, d in enumerate(("F32", "F32", "BF16", "I64"))
        ]
        self.layout = safetensors.lay_out(infos, {"format": "pt"}, "here")

    def __call__(self, chance: Chance) -> None:
        head = mutated(self.layout.head[8:], chance)
        length = len(head) if chance.random() < 0.9 else chance.getrandbits(chance.choice((8, 64)))
        data = struct.pack("<Q", length) + head + bytes(self.layout.size)
        path = self.put({"model.safetensors": data}) / "model.safetensors"
        reader = safetensors.SafetensorsReader(path)
        assert sound_safetensors(data), "accepted, and a plain reading refuses it"
        for name in reader.tensors:
            reader.span(name)


INDEX = "model.safetensors.index.json"


class Index(Samples):
    def made(self, place: Path) -> Iterable[Sample]:
        files, weights = dict[str, bytes](), dict[str, str]()
        for n in (1, 2, 3):
            name = f"model-0000{n}-of-00003.safetensors"
            files[name] = packed({f"w{n}": torch.ones(n), f"v{n}": torch.ones(2, n)})
            weights |= {f"w{n}": name, f"v{n}": name}
        index = {"metadata": {"total_size": 72}, "weight_map": weights}
        first = next(iter(files))
        files[INDEX] = json.dumps(index).encode()
        yield Sample("one", files, {INDEX: reworded, first: relaid})

    def read(self, place: Path, **told: Any) -> None:
        found = open_checkpoint(place)
        for name in found.tensors:
            found.tensor(name)


def packed(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A file of safetensors."""
    infos = [TensorInfo(n, tuple(t.shape), dtype_code(t.dtype)) for n, t in tensors.items()]
    layout = safetensors.lay_out(infos, {"format": "pt"}, "here")
    held = {n: bytes(t.reshape(-1).view(torch.uint8).tolist()) for n, t in tensors.items()}
    return layout.head + b"".join(held[name] for name in layout.starts)


@lru_cache(maxsize=32)
def _unpacked(data: bytes) -> tuple[list[TensorInfo], dict[TensorInfo, bytes]]:
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    header.pop("__metadata__", None)
    held = {
        TensorInfo(name, tuple(said["shape"]), said["dtype"]): data[size + start : size + end]
        for name, said in header.items()
        for start, end in [said["data_offsets"]]
    }
    return list(held), held


def relaid(data: bytes, chance: Chance) -> bytes:
    """A file of safetensors: its bytes, its header, or other tensors under a header that fits."""
    kind = chance.randrange(8)
    if kind == 0:
        return chance.choice((cut, flipped, renumbered))(data, chance)
    size = 8 + int.from_bytes(data[:8], "little")
    if kind == 1:
        head = mutated(data[8:size], chance)
        return struct.pack("<Q", len(head)) + head + data[size:]
    infos, held = _unpacked(data)
    if kind == 2:
        return data[:size] + flipped(data[size:], chance)
    layout = safetensors.lay_out(found := reshaped(infos, chance, CODES), None, "here")
    named = {info.name: info for info in found}
    wanted = [(named[name], named[name].nbytes) for name in layout.starts]
    return layout.head + b"".join(
        held[info] if info in held else chance.randbytes(count) for info, count in wanted
    )


class Configs(Samples):
    """config.json of every architecture: the model it makes is built without its weights."""

    def made(self, place: Path) -> Iterable[Sample]:
        for name, entry in registry.architectures().items():
            variant = next(iter(entry.variants.values()))
            said = {"model_type": entry.model_type, "architectures": [variant["class"]]}
            more = {"id2label": {"0": "a", "1": "b"}, "torch_dtype": "bfloat16"}
            config = {**said, **more, **variant["config"]}
            yield Sample(
                name, {"config.json": json.dumps(config).encode()}, {"config.json": reworded}
            )

    def read(self, place: Path, **told: Any) -> None:
        skeleton(place)


# --- whole models ---------------------------------------------------------------------------------

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"vocab": 11, "dim": 8, "layers": 1, "heads": 2, "kv_heads": 1, "hidden": 12},
    "gpt2": {"vocab": 11, "dim": 8, "layers": 1, "heads": 2, "positions": 6},
    "bert": {"vocab": 11, "dim": 8, "layers": 1, "heads": 2, "hidden": 12, "positions": 6},
}


def model(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    entry = registry.architectures()[name]
    made = entry.model(entry.config_class(**{**SIZES[name], **changes}))
    made.architecture = name
    return made


def saved(made: Any, place: Path, to: str, **how: Any) -> dict[str, bytes]:
    """What a model's files hold in a dialect."""
    zoo.save(made, place, to=to, **how)
    found = {p.name: p.read_bytes() for p in sorted(place.iterdir())}
    return {name: data for name, data in found.items() if name != "zoo-manifest.json"}


class Models(Samples):
    """Loaded, whatever the damage: config, plan and all tensors."""

    def read(self, place: Path, **told: Any) -> None:
        found = zoo.load(place, config=told)
        assert not any(p.is_meta for p in found.parameters()), "half-loaded"


class Hub(Models):
    """safetensors beside config.json."""

    def made(self, place: Path) -> Iterable[Sample]:
        for name in SIZES:
            files = saved(model(name), place / f"{name}-hf", "hf")
            yield Sample(name, files, {"model.safetensors": relaid, "config.json": reworded})


class Bin(Models):
    """pytorch_model.bin beside config.json."""

    def made(self, place: Path) -> Iterable[Sample]:
        for name in SIZES:
            files = saved(model(name), place / f"{name}-hf", "hf")
            infos, held = _unpacked(files.pop("model.safetensors"))
            state = {
                i.name: torch.frombuffer(bytearray(held[i]), dtype=torch.float32).view(i.shape)
                for i in infos
            }
            files["pytorch_model.bin"] = zip_of(state, place)
            yield Sample(name, files, {"pytorch_model.bin": rezipped})


def zip_of(state: Any, place: Path) -> bytes:
    path = place / "saved"
    torch.save(state, path)
    return path.read_bytes()


class Meta(Models):
    """Two shards and params.json."""

    def made(self, place: Path) -> Iterable[Sample]:
        for shards in (1, 2):
            made = model("llama", kv_heads=2, vocab=12)
            files = saved(made, place / f"{shards}-meta", "meta", layout={"shards": shards})
            damage: dict[str, Damage] = {name: rezipped for name in files if ".pth" in name}
            damage["params.json"] = reworded
            yield Sample(str(shards), files, damage, {"max_seq_len": 6})


class Trainers(Models):
    """What nanoGPT, minGPT and books leave: weights, and the optimizer's state and the run's."""

    def made(self, place: Path) -> Iterable[Sample]:
        for dialect in ("nanogpt", "mingpt", "book"):
            act = "gelu" if dialect == "nanogpt" else "gelu_new"
            files = saved(model("gpt2", act=act), place / f"{dialect}-files", dialect)
            ((name, data),) = files.items()
            (place / name).write_bytes(data)
            state = torch.load(place / name, weights_only=True)
            if dialect == "nanogpt":
                state["model"] = {f"_orig_mod.{n}": t for n, t in state["model"].items()}
            if dialect != "mingpt":
                weights = state["model"] if dialect == "nanogpt" else state
                adam = torch.optim.AdamW([torch.nn.Parameter(t) for t in weights.values()])
                kept = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 2)}}
                held = {**adam.state_dict(), "state": kept}
                state = state if dialect == "nanogpt" else {"model_state_dict": state}
                key = "optimizer" if dialect == "nanogpt" else "optimizer_state_dict"
                state |= {key: held, "iter_num": 7, "config": {"out_dir": "out", "lr": 6e-4}}
            told = {"heads": 2} if dialect != "nanogpt" else {}
            yield Sample(dialect, {name: zip_of(state, place)}, {name: rezipped}, told)


class Quantised(Models):
    """Packed matrices, and the part of config.json that says how."""

    def __init__(self, place: Path, said: Mapping[str, Mapping[str, Any]]) -> None:
        self.said = said
        super().__init__(place)

    def made(self, place: Path) -> Iterable[Sample]:
        sizes = {"dim": 16, "hidden": 32, "kv_heads": 2}
        files = saved(model("llama", **sizes), place / "plain", "hf")
        infos, held = _unpacked(files["model.safetensors"])
        for name, said in self.said.items():
            tensors: dict[str, torch.Tensor] = {}
            for info in infos:
                data = torch.frombuffer(bytearray(held[info]), dtype=torch.float32).view(info.shape)
                if info.name.endswith("_proj.weight"):
                    tensors |= parts(info.name.removesuffix(".weight"), data, said)
                else:
                    tensors[info.name] = data.half()
            config = {**json.loads(files["config.json"]), "quantization_config": said}
            about = {"config.json": json.dumps(config).encode()}
            damage = {"model.safetensors": relaid, "config.json": requantised}
            yield Sample(name, {**about, "model.safetensors": packed(tensors)}, damage)


def parts(stem: str, weight: torch.Tensor, said: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Of a matrix (o, i): numbers at random, in the shapes that a config asks for."""
    outputs, inputs = weight.shape
    if "fp8" in said["quant_method"] or "compressed" in said["quant_method"]:
        down, across = said.get("weight_block_size") or weight.shape
        grid = math.ceil(outputs / down), math.ceil(inputs / across)
        ends = "weight_scale_inv" if "weight_block_size" in said else "weight_scale"
        return {
            f"{stem}.weight": weight.to(torch.float8_e4m3fn),
            f"{stem}.{ends}": torch.ones(grid),
        }
    bits, group = said["bits"], said["group_size"]
    group = inputs if group < 0 else group
    along = (inputs * bits // 32, outputs), (inputs, outputs * bits // 32)
    made = {
        "qweight": torch.randint(-99, 99, along[said["quant_method"] == "awq"], dtype=torch.int32),
        "qzeros": torch.randint(-99, 99, (inputs // group, outputs * bits // 32)).int(),
        "scales": torch.rand(inputs // group, outputs).half(),
    }
    if said["quant_method"] == "gptq":
        made["g_idx"] = (torch.arange(inputs) // group).int()
    return {f"{stem}.{part}": tensor for part, tensor in made.items()}


def requantised(data: bytes, chance: Chance) -> bytes:
    """A config, in the part that says how numbers are held or in any other."""
    config = json.loads(data)
    if chance.random() < 0.2:
        return reworded(data, chance)
    config["quantization_config"] = altered(config["quantization_config"], chance)
    return json.dumps(config).encode()


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False, "desc_act": False}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}
_GROUP = {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}
GPTQ: dict[str, dict[str, Any]] = {
    "gptq": _GPTQ,
    "gptq-v2": {**_GPTQ, "checkpoint_format": "gptq_v2", "group_size": -1},
    "gptq-order": {**_GPTQ, "desc_act": True, "bits": 8, "damp_percent": 0.1},
}
AWQ: dict[str, dict[str, Any]] = {
    "awq": _AWQ,
    "awq-one-group": {**_AWQ, "group_size": -1, "modules_to_not_convert": None},
}
FP8: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [5, 7]},
    "fp8-tensor": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": _GROUP},
    },
}


class Llama2c(Models):
    """Versions 0, 1 and 2; sizes in the place of the header's, which often make the file's own."""

    def made(self, place: Path) -> Iterable[Sample]:
        layouts: dict[str, dict[str, Any]] = {"0": {}, "1": {"version": 1}, "2": {"version": 2}}
        for version, layout in layouts.items():
            made = model("llama", positions=6, tied=version != "1", eps=1e-5)
            dialect = "llama2c-q8" if version == "2" else "llama2c"
            told = {} if version == "2" else {"layout": layout}
            files = saved(made, place / f"{version}-files", dialect, **told)
            yield Sample(version, files, {"model.bin": resized})

    def read(self, place: Path, **told: Any) -> None:
        path = place / "model.bin"
        if kind_of(path) == "llama2c":
            reader = llama2c.Llama2cReader(path)
            assert reader.header.starts()[1] == path.stat().st_size, "accepted, of another size"
            for name in reader.tensors:
                reader.tensor(name)
        super().read(place, **told)


def resized(data: bytes, chance: Chance) -> bytes:
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        numbers = (0, 1, 2, -1, 2**31 - 1, -(2**31), 3, 8, 12, 255, chance.getrandbits(31))
        at = 4 * chance.randrange(12)
        out[at : at + 4] = struct.pack("<i", chance.choice(numbers))
    if chance.random() < 0.4:
        head = bytes(out[:260])
        return chance.choice((mutated, renumbered))(head, chance) + out[260:]
    return cut(bytes(out), chance) if chance.random() < 0.1 else bytes(out)


# --- TensorFlow's bundles -------------------------------------------------------------------------


def rebundled(table: bytes, chance: Chance) -> bytes:
    """An index, damaged before its sums are made, so that they fit; or after."""
    pairs, compressed = list(_pairs(table)), chance.randrange(2)
    match chance.randrange(6):
        case 0:
            return bitten(table, chance)
        case 1 | 2:  # an entry, or several
            for _ in range(chance.choice((1, 1, 5))):
                n = chance.randrange(len(pairs))
                key, value = pairs[n]
                whole = chance.random() < 0.5
                inner: dict[int, Any] = {2: {2: {}}, 7: {1: {}}} if key else {3: {}}
                pairs[n] = key, bitten(value, chance) if whole else retold(value, chance, inner)
            return bundles.index(pairs, compressed, 4)
        case 3:  # names, their order
            n, other = chance.randrange(len(pairs)), chance.randrange(len(pairs))
            pairs[n] = bitten(pairs[n][0], chance), pairs[other][1]
            return bundles.index(sorted(pairs) if chance.random() < 0.5 else pairs, compressed, 4)
    blocks = []  # one of them, before or behind its compression
    for n in range(0, len(pairs), 4):
        block = bundles.block(pairs[n : n + 4], chance.choice((1, 16)))
        if (where := chance.randrange(3)) == 0:
            block = bitten(block, chance)
        block = bundles.snappy(block) if compressed else block
        block = bitten(block, chance) if where == 1 and compressed else block
        blocks.append((pairs[min(n + 3, len(pairs) - 1)][0], block, compressed))
    return bundles.table(blocks, compressed)


_TABLES: dict[bytes, list[tuple[bytes, bytes]]] = {}  # of sound indices


def _pairs(table: bytes) -> list[tuple[bytes, bytes]]:
    return _TABLES[table]


def bundle_files(
    place: Path, prefix: str, tensors: Mapping[str, Any], **how: Any
) -> dict[str, bytes]:
    place.mkdir()
    path = bundles.bundle(place / prefix, tensors, **how)
    _TABLES[path.read_bytes()] = read_table(path)
    return {p.name: p.read_bytes() for p in sorted(place.iterdir())}


class Bundle(Samples):
    def made(self, place: Path) -> Iterable[Sample]:
        tensors = {f"m/h{n}/w": torch.arange(4.0 * n).view(2, -1) for n in range(7)}
        tensors |= {"a": torch.ones(3, dtype=torch.int8), "cut": torch.arange(14).view(2, 7)}
        files = bundle_files(place / "b", "x", tensors, shards=2, cut={"cut": (1, (3, 4))})
        damage = {name: mutated if ".data" in name else rebundled for name in files}
        # an index is where nearly everything stands
        yield from (
            Sample(n, files, {k: d for k, d in damage.items() if ".index" in k}) for n in "ab"
        )
        yield Sample("c", files, damage)

    def read(self, place: Path, **told: Any) -> None:
        reader = TFBundleReader(place / "x.index")
        shards = [path.read_bytes() for path in sorted(place.glob("*.data-*"))]
        held = sum(info.nbytes for info in reader.tensors.values())
        assert held <= sum(map(len, shards)), "more tensors than bytes"
        for name, info in reader.tensors.items():
            tensor = reader.tensor(name)
            assert (tuple(tensor.shape), dtype_code(tensor.dtype)) == info[1:], name
            raw = tensor.contiguous().reshape(-1).view(torch.uint8)
            if name != "cut":
                assert any(bytes(raw.tolist()) in data for data in shards), name


class TensorFlow(Models):
    """OpenAI's GPT-2 and Google's BERT, of one layer each."""

    def made(self, place: Path) -> Iterable[Sample]:
        for name, index, about, layers in (
            ("gpt2", "model.ckpt.index", "hparams.json", "n_layer"),
            ("bert", "bert_model.ckpt.index", "bert_config.json", "num_hidden_layers"),
        ):
            reader = TFBundleReader(TF / name / index)
            first = [
                n
                for n in reader.tensors
                if not any(f"{x}{k}/" in n for x in ("h", "layer_") for k in range(1, 9))
            ]
            weights = {
                n: reader.tensor(n) for n in first if "adam" not in n and "global_step" not in n
            }
            files = bundle_files(place / f"{name}-files", "x", weights)
            config = {**json.loads((TF / name / about).read_bytes()), layers: 1}
            files[about] = json.dumps(config).encode()
            damage = {
                n: rebundled if ".index" in n else reworded for n in files if ".data" not in n
            }
            yield Sample(name, files, damage)


# --- GGUF -----------------------------------------------------------------------------------------


def gguf_of(said: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], int]]) -> bytes:
    """A header with tensors of any kind, (shape, number of the kind), aligned to single bytes."""
    head = bytearray(gguf.lay_out([], {**said, "general.alignment": 1}, "here").head)
    struct.pack_into("<Q", head, 8, len(tensors))
    at = 0
    for name, (shape, kind) in tensors.items():
        text, dims = name.encode(), shape[::-1]
        head += struct.pack("<Q", len(text)) + text
        head += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, at)
        at += KINDS[kind].nbytes(dims)
    return bytes(head)


class Gguf(Kind):
    """Headers and tensors of all kinds."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        infos = [TensorInfo("a.weight", (2, 32), "Q8_0"), TensorInfo("b.weight", (2, 3), "F32")]
        infos += [TensorInfo("c.weight", (2, 1, 2, 1), "BF16"), TensorInfo("d", (), "F16")]
        said = {"general.architecture": "llama", "general.alignment": 32, "x": gguf.Value("u8", 7)}
        said |= {"llama.block_count": 2, "eps": 1e-5, "y": True, "tokens": ["<s>", "ü", "c"] * 3}
        said |= {"types": gguf.Value("[i32]", [3, 1, 1] * 400), "split.no": gguf.Value("u16", 0)}
        layout = gguf.lay_out(infos, {**said, "split.count": gguf.Value("u16", 1)}, "here")
        every = {kind.name: ((2, kind.block), number) for number, kind in KINDS.items()}
        numbers = gguf_of({"x": "y"}, every)
        size = sum(KINDS[number].nbytes(shape) for shape, number in every.values())
        self.sound = [(layout.head, layout.size), (numbers, size)]

    def __call__(self, chance: Chance) -> None:
        head, size = chance.choice(self.sound)
        data = renumbered(head, chance) + chance.randbytes(size)
        if chance.random() < 0.1:
            data = data[: chance.randrange(len(data))]
        reader = gguf.GGUFReader(self.put({"model.gguf": data}) / "model.gguf")
        assert sound_gguf(data), "accepted, and a plain reading refuses it"
        for name, info in reader.tensors.items():
            assert reader.tensor(name).shape == info.shape
        for value in reader.said.values():
            list(value) if isinstance(value, Iterable) else value


@lru_cache(maxsize=32)
def _gguf_parts(data: bytes, place: Path) -> tuple[dict[str, Any], list[TensorInfo]]:
    """(key/values with their types, tensors) of a sound file."""
    path = place / "sound.gguf"
    path.write_bytes(data)
    reader = gguf.GGUFReader(path)
    return {k: gguf.Value(reader.kinds[k], v) for k, v in reader.said.items()}, list(
        reader.tensors.values()
    )


def regguf(data: bytes, chance: Chance, place: Path) -> bytes:
    """A GGUF file: its header's numbers, or other key/values and tensors under one that fits."""
    said, infos = _gguf_parts(data, place)
    kind = chance.randrange(6)
    size = sum(info.nbytes for info in infos)
    if kind == 0:
        return renumbered(data[: len(data) - size], chance) + data[len(data) - size :]
    if kind == 1:
        return cut(data, chance) if chance.random() < 0.3 else flipped(data, chance)
    if kind > 2:
        plain = altered({key: value.value for key, value in said.items()}, chance)
        said = {key: _sayable(key, said.get(key), value) for key, value in plain.items()}
    if kind < 4:
        infos = reshaped(infos, chance, list(WRITTEN))
    try:
        layout = gguf.lay_out(infos, said, "here")
    except ZooError:
        return renumbered(data, chance)
    return layout.head + chance.randbytes(layout.size)


def _sayable(key: str, before: gguf.Value | None, value: Any) -> Any:
    """The value as the key's own type, as its usual one, or a word."""
    if before is not None and before.value == value:
        return before
    for way in (gguf.Value(before.kind, value) if before is not None else value, value):
        try:
            gguf.lay_out([], {key: way}, "here")
        except ZooError:
            continue
        return way
    return "x"


class GgufModels(Models):
    def made(self, place: Path) -> Iterable[Sample]:
        for name in SIZES:
            changes = {"head": "none"} if name == "bert" else {}
            files = saved(model(name, **changes), place / f"{name}-gguf", "gguf")
            yield Sample(name, files, {"model.gguf": partial(regguf, place=place)})


# --- vocabularies ---------------------------------------------------------------------------------


class Vocabularies(Samples):
    """Read, and put to work on a little text."""

    def read(self, place: Path, **told: Any) -> None:
        found = zoo.tokenizer(place)
        ids = found.encode("ab <s> é\n", special=True)
        found.decode(ids)
        found.decode(range(min(64, found.vocab_size)))


def pieces(kind: int) -> list[tuple[str, float, int]]:
    """A small vocabulary of SentencePiece's, of (text, score, type)."""
    marks = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    falls = [(f"<0x{n:02X}>", 0.0, 6) for n in range(256)] if kind == 2 else []
    words = ["\u2581", "a", "b", "é", "ab", "\u2581a", "\u2581ab", "\n", "c"]
    return [*marks, *falls, *((w, -float(n), 1) for n, w in enumerate(words))]


def spm(kind: int) -> bytes:
    data = model_of(pieces(kind), falls_back=kind == 2)
    return data if kind == 2 else data + b"\x12\x02\x18\x01"  # a model's type, set once more


def retold_spm(data: bytes, chance: Chance) -> bytes:
    if chance.random() < 0.1:
        return chance.choice((bitten, cut))(data, chance)
    return retold(data, chance, {1: {}, 2: {}, 3: {1: {}}})


class SentencePiece(Vocabularies):
    """tokenizer.model and what else such models are called."""

    def made(self, place: Path) -> Iterable[Sample]:
        for name, kind in (
            ("tokenizer.model", 2),
            ("spiece.model", 1),
            ("sentencepiece.bpe.model", 1),
        ):
            yield Sample(name.partition(".")[0], {name: spm(kind)}, {name: retold_spm})


class TokenizerBin(Vocabularies):
    """llama2.c's tokenizer.bin."""

    def made(self, place: Path) -> Iterable[Sample]:
        marks = {"<s>": "\n<s>\n", "</s>": "\n</s>\n"}
        words = [(marks.get(t, t.replace("\u2581", " ")).encode(), s) for t, s, _ in pieces(2)]
        data = struct.pack("<I", max(len(text) for text, _ in words))
        data += b"".join(struct.pack("<fI", score, len(text)) + text for text, score in words)
        yield Sample("bin", {"tokenizer.bin": data}, {"tokenizer.bin": renumbered})


class GgufVocabularies(Vocabularies):
    """SentencePiece's, byte-level merges and WordPiece, as GGUF files hold them."""

    def made(self, place: Path) -> Iterable[Sample]:
        said: dict[str, dict[str, Any]] = {}
        texts, scores, types = zip(*pieces(2), strict=True)
        said["llama"] = {"tokens": list(texts), "scores": list(scores)}
        said["llama"] |= {"token_type": gguf.Value("[i32]", list(types)), "bos_token_id": 1}
        words = ["a", "b", "Ġ", "ab", "Ġab", "<|end|>", "[PAD6]"]
        said["gpt2"] = {"tokens": words, "merges": ["a b", "Ġ ab"], "pre": "qwen2"}
        said["gpt2"] |= {"token_type": gguf.Value("[i32]", [1] * 5 + [3, 5]), "eos_token_id": 5}
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u2581ab", "a", "b", "\u2581a"]
        said["bert"] = {"tokens": words, "unknown_token_id": 1, "cls_token_id": 2}
        said["bert"] |= {"token_type": gguf.Value("[i32]", [3] * 5 + [1] * 4)}
        for name, mine in said.items():
            keys = {f"tokenizer.ggml.{key}": value for key, value in mine.items()}
            keys |= {"general.architecture": name, "tokenizer.ggml.model": name}
            data = gguf.lay_out([], keys, "here").head
            yield Sample(name, {"v.gguf": data}, {"v.gguf": partial(regguf, place=place)})

    def read(self, place: Path, **told: Any) -> None:
        super().read(place / "v.gguf", **told)


VICTIMS: dict[str, tuple[str, Callable[[Path], Kind]]] = {
    "header": ("safetensors: headers", Header),
    "index": ("safetensors: index and shards", Index),
    "config": ("config.json of each architecture", Configs),
    "hf": ("safetensors + config.json, loaded", Hub),
    "bin": ("pytorch_model.bin, loaded", Bin),
    "meta": ("consolidated.NN.pth + params.json, loaded", Meta),
    "tf": ("TensorFlow: index, data, snappy", Bundle),
    "tf-models": ("TensorFlow + hparams/bert_config.json, loaded", TensorFlow),
    "trainers": ("nanoGPT, minGPT, books: loaded", Trainers),
    "llama2c": ("llama2.c v0, v1, v2: loaded", Llama2c),
    "tokenizer.bin": ("llama2.c: tokenizer.bin", TokenizerBin),
    "gguf": ("GGUF: header, tensors of all kinds", Gguf),
    "gguf-models": ("GGUF, loaded", GgufModels),
    "gguf-words": ("GGUF: vocabularies", GgufVocabularies),
    "gptq": ("GPTQ, loaded", partial(Quantised, said=GPTQ)),
    "awq": ("AWQ, loaded", partial(Quantised, said=AWQ)),
    "fp8": ("FP8, loaded", partial(Quantised, said=FP8)),
    "sentencepiece": ("tokenizer.model", SentencePiece),
}
