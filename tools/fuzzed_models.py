"""What is damaged, a model at a time: tiny ones in every dialect, loaded from their files."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from damage import Chance, Damage, altered, cut, mutated, renumbered, reworded, rezipped
from fuzzed import Sample, Samples, bundle_files, packed, rebundled, regguf, relaid, unpacked

import zoo
from converters.containers import kind_of
from converters.formats import llama2c
from converters.formats.tf_bundle import TFBundleReader
from zoo import registry
from zoo.checkpoints.locate import skeleton

TF = Path(__file__).resolve().parent.parent / "tests/data/tf"  # what TensorFlow wrote


class Configs(Samples):
    """config.json of every architecture: the model it makes is built without its weights."""

    def made(self, place: Path) -> Iterable[Sample]:
        for name, entry in registry.architectures().items():
            variant = next(iter(entry.variants.values()))
            kind = {"model_type": entry.model_type, "architectures": [variant["class"]]}
            more = {"id2label": {"0": "a", "1": "b"}, "torch_dtype": "bfloat16"}
            config = {**kind, **more, **variant["config"]}
            yield Sample(
                name, {"config.json": json.dumps(config).encode()}, {"config.json": reworded}
            )

    def read(self, place: Path, **options: Any) -> None:
        skeleton(place)


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
    contents = {p.name: p.read_bytes() for p in sorted(place.iterdir())}
    return {name: data for name, data in contents.items() if name != "zoo-manifest.json"}


class Models(Samples):
    """Loaded, whatever the damage: config, plan and all tensors."""

    def read(self, place: Path, **options: Any) -> None:
        model = zoo.load(place, config=options)
        assert not any(p.is_meta for p in model.parameters()), "half-loaded"


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
            infos, contents = unpacked(files.pop("model.safetensors"))
            state = {
                i.name: torch.frombuffer(bytearray(contents[i]), dtype=torch.float32).view(i.shape)
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
                moments = {**adam.state_dict(), "state": kept}
                state = state if dialect == "nanogpt" else {"model_state_dict": state}
                key = "optimizer" if dialect == "nanogpt" else "optimizer_state_dict"
                state |= {key: moments, "iter_num": 7, "config": {"out_dir": "out", "lr": 6e-4}}
            fields = {"heads": 2} if dialect != "nanogpt" else {}
            yield Sample(dialect, {name: zip_of(state, place)}, {name: rezipped}, fields)


class Quantized(Models):
    """Packed matrices, and the part of config.json that says how."""

    def __init__(self, place: Path, sections: Mapping[str, Mapping[str, Any]]) -> None:
        self.sections = sections
        super().__init__(place)

    def made(self, place: Path) -> Iterable[Sample]:
        sizes = {"dim": 16, "hidden": 32, "kv_heads": 2}
        files = saved(model("llama", **sizes), place / "plain", "hf")
        infos, contents = unpacked(files["model.safetensors"])
        for name, section in self.sections.items():
            tensors: dict[str, torch.Tensor] = {}
            for info in infos:
                data = torch.frombuffer(bytearray(contents[info]), dtype=torch.float32).view(
                    info.shape
                )
                if info.name.endswith("_proj.weight"):
                    tensors |= parts(info.name.removesuffix(".weight"), data, section)
                else:
                    tensors[info.name] = data.half()
            config = {**json.loads(files["config.json"]), "quantization_config": section}
            about = {"config.json": json.dumps(config).encode()}
            damage = {"model.safetensors": relaid, "config.json": requantized}
            yield Sample(name, {**about, "model.safetensors": packed(tensors)}, damage)


def parts(stem: str, weight: torch.Tensor, section: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Of a matrix (o, i): numbers at random, in the shapes that a config asks for."""
    outputs, inputs = weight.shape
    if "fp8" in section["quant_method"] or "compressed" in section["quant_method"]:
        down, across = section.get("weight_block_size") or weight.shape
        grid = math.ceil(outputs / down), math.ceil(inputs / across)
        ends = "weight_scale_inv" if "weight_block_size" in section else "weight_scale"
        return {
            f"{stem}.weight": weight.to(torch.float8_e4m3fn),
            f"{stem}.{ends}": torch.ones(grid),
        }
    bits, group = section["bits"], section["group_size"]
    group = inputs if group < 0 else group
    along = (inputs * bits // 32, outputs), (inputs, outputs * bits // 32)
    made = {
        "qweight": torch.randint(
            -99, 99, along[section["quant_method"] == "awq"], dtype=torch.int32
        ),
        "qzeros": torch.randint(-99, 99, (inputs // group, outputs * bits // 32)).int(),
        "scales": torch.rand(inputs // group, outputs).half(),
    }
    if section["quant_method"] == "gptq":
        made["g_idx"] = (torch.arange(inputs) // group).int()
    return {f"{stem}.{part}": tensor for part, tensor in made.items()}


def requantized(data: bytes, chance: Chance) -> bytes:
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
            options = {} if version == "2" else {"layout": layout}
            files = saved(made, place / f"{version}-files", dialect, **options)
            yield Sample(version, files, {"model.bin": resized})

    def read(self, place: Path, **options: Any) -> None:
        path = place / "model.bin"
        if kind_of(path) == "llama2c":
            reader = llama2c.Llama2cReader(path)
            assert reader.header.starts()[1] == path.stat().st_size, "accepted, of another size"
            for name in reader.tensors:
                reader.tensor(name)
        super().read(place, **options)


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


class GgufModels(Models):
    def made(self, place: Path) -> Iterable[Sample]:
        for name in SIZES:
            changes = {"head": "none"} if name == "bert" else {}
            files = saved(model(name, **changes), place / f"{name}-gguf", "gguf")
            yield Sample(name, files, {"model.gguf": partial(regguf, place=place)})
