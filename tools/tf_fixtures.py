"""Tensor bundles as TensorFlow itself writes them, into tests/data/tf: `make tf-fixtures`.

Needs TensorFlow, in an environment of its own; the tests read what is committed. Values are random
and ours; beside each bundle the same values lie as safetensors, written without TensorFlow. What
the tests' own encoder writes (TensorFlow reads snappy, and never writes it) is given to TensorFlow
to read, and has to come back.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from bundles import index  # noqa: E402

from converters.formats.sstable import read_table  # noqa: E402

HOME = ROOT / "tests" / "data" / "tf"
CODES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "bfloat16": "BF16",
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "complex64": "C64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
Arrays = dict[str, Any]


def drawn(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    chance = np.random.default_rng(seed)
    return {name: chance.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def keep(path: Path, arrays: Arrays) -> None:
    """The same values as safetensors."""
    entries, data = {}, b""
    for name, array in sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])):
        end = len(data) + array.nbytes
        code = CODES[array.dtype.name]
        entries[name] = {"dtype": code, "shape": array.shape, "data_offsets": [len(data), end]}
        data += array.tobytes()
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def save(prefix: Path, arrays: Arrays, cut: Mapping[str, tuple[int, list[int]]] = {}) -> None:
    """One shard, by the operation that every saver of TensorFlow ends in."""
    saved: list[tuple[str, str, Any]] = []
    for name, array in sorted(arrays.items()):
        if name not in cut:
            saved.append((name, "", array))
            continue
        axis, sizes = cut[name]
        start = 0
        for size in sizes:
            spans = [f"{start},{size}" if a == axis else "-" for a in range(array.ndim)]
            spec = " ".join([*map(str, array.shape), ":".join(spans)])
            saved.append((name, spec, np.take(array, range(start, start + size), axis)))
            start += size
    names, slices, tensors = zip(*saved, strict=True)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(names),
        shape_and_slices=list(slices),
        tensors=[tf.constant(tensor) for tensor in tensors],
    )


def mixed() -> Arrays:
    """All kinds of numbers, as random bits; one byte too many before some, so that all shift."""
    chance = np.random.default_rng(5)
    arrays: Arrays = {"scalar": np.array(7, np.int64), "empty": np.zeros((0, 3), np.float32)}
    for number, name in enumerate(CODES):
        if name == "bool":
            arrays["kinds/bool"] = chance.integers(0, 2, (3, 5)).astype(bool)
            continue
        dtype = tf.dtypes.as_dtype(name).as_numpy_dtype
        size = 2 * (number + 3) * np.dtype(dtype).itemsize
        arrays[f"kinds/{name}"] = np.frombuffer(chance.bytes(size), dtype).reshape(2, number + 3)
    arrays["kinds/float32_odd"] = chance.standard_normal((5, 7), np.float32)
    arrays["kinds/float1_byte"] = np.array([1, 2, 3], np.uint8)
    arrays["long/name" * 20] = np.array([1.5], np.float32)
    arrays["cut/rows"] = chance.standard_normal((7, 5), np.float32)
    arrays["cut/columns"] = chance.integers(-(1 << 31), 1 << 31, (3, 150)).astype(np.int32)
    return arrays


CUT = {"cut/rows": (0, [3, 4]), "cut/columns": (1, [30, 50, 70])}
STRANGE: Arrays = {"words": np.array([b"a", b"long " * 30]), "wide": np.ones(2, np.complex128)}


def gpt2(c: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """What OpenAI's code calls the tensors of GPT-2; kernels have an axis of 1 in front."""
    d = c["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {"wte": (c["n_vocab"], d), "wpe": (c["n_ctx"], d)}
    for layer in range(c["n_layer"]):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h{layer}/{norm}/{p}": (d,) for p in "gb"}
        for name, i, o in (
            ("attn/c_attn", d, 3 * d),
            ("attn/c_proj", d, d),
            ("mlp/c_fc", d, 4 * d),
            ("mlp/c_proj", 4 * d, d),
        ):
            shapes |= {f"h{layer}/{name}/w": (1, i, o), f"h{layer}/{name}/b": (o,)}
    shapes |= {f"ln_f/{p}": (d,) for p in "gb"}
    return {f"model/{name}": shape for name, shape in shapes.items()}


def bert(c: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """What Google's code calls the tensors of BERT with its two heads of pretraining."""
    d, f, shapes = c["hidden_size"], c["intermediate_size"], dict[str, tuple[int, ...]]()

    def dense(name: str, i: int, o: int) -> None:
        shapes.update({f"{name}/kernel": (i, o), f"{name}/bias": (o,)})

    def norm(name: str) -> None:
        shapes.update({f"{name}/LayerNorm/{p}": (d,) for p in ("beta", "gamma")})

    for name, size in (
        ("word", "vocab_size"),
        ("position", "max_position_embeddings"),
        ("token_type", "type_vocab_size"),
    ):
        shapes[f"bert/embeddings/{name}_embeddings"] = (c[size], d)
    norm("bert/embeddings")
    for layer in range(c["num_hidden_layers"]):
        at = f"bert/encoder/layer_{layer}"
        for name in ("query", "key", "value"):
            dense(f"{at}/attention/self/{name}", d, d)
        dense(f"{at}/attention/output/dense", d, d)
        norm(f"{at}/attention/output")
        dense(f"{at}/intermediate/dense", d, f)
        dense(f"{at}/output/dense", f, d)
        norm(f"{at}/output")
    dense("bert/pooler/dense", d, d)
    dense("cls/predictions/transform/dense", d, d)
    norm("cls/predictions/transform")
    shapes["cls/predictions/output_bias"] = (c["vocab_size"],)
    shapes["cls/seq_relationship/output_weights"] = (2, d)
    shapes["cls/seq_relationship/output_bias"] = (2,)
    return shapes


def read_back(prefix: Path, arrays: Arrays) -> None:
    """By TensorFlow."""
    restored = tf.raw_ops.RestoreV2(
        prefix=str(prefix),
        tensor_names=list(arrays),
        shape_and_slices=[""] * len(arrays),
        dtypes=[tf.dtypes.as_dtype(array.dtype) for array in arrays.values()],
    )
    for (name, array), tensor in zip(arrays.items(), restored, strict=True):
        assert tensor.numpy().tobytes() == array.tobytes(), name


def main() -> None:
    shutil.rmtree(HOME, ignore_errors=True)
    for name in ("mixed", "gpt2", "bert", "objects"):
        (HOME / name).mkdir(parents=True)

    arrays = mixed()
    keep(HOME / "mixed" / "same.safetensors", arrays)
    save(HOME / "mixed" / "one", arrays | STRANGE, CUT)

    halves = [dict(sorted(arrays.items())[n::2]) for n in (0, 1)]
    for number, half in enumerate(halves):
        save(HOME / f"part{number}" / "x", half, CUT)
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(HOME / f"part{number}" / "x") for number in (0, 1)],
        destination_prefix=str(HOME / "mixed" / "two"),
        delete_old_dirs=True,
    )

    pairs = read_table(HOME / "mixed" / "one.index")
    (HOME / "mixed" / "snappy.index").write_bytes(index(pairs, kind=1, size=16))
    shard = "data-00000-of-00001"
    shutil.copy(HOME / "mixed" / f"one.{shard}", HOME / "mixed" / f"snappy.{shard}")
    for name in ("one", "two", "snappy"):
        read_back(HOME / "mixed" / name, arrays)
    # the same bytes again: the tests put them there
    (HOME / "mixed" / f"snappy.{shard}").unlink()

    hparams = {"n_vocab": 53, "n_ctx": 17, "n_embd": 12, "n_head": 2, "n_layer": 3}
    arrays = drawn(6, gpt2(hparams))
    keep(HOME / "gpt2" / "same.safetensors", arrays)
    save(HOME / "gpt2" / "model.ckpt", arrays)
    (HOME / "gpt2" / "hparams.json").write_text(json.dumps(hparams) + "\n")
    note = 'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'
    (HOME / "gpt2" / "checkpoint").write_text(note)

    config = {
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 12,
        "initializer_range": 0.02,
        "intermediate_size": 26,
        "max_position_embeddings": 19,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "type_vocab_size": 5,
        "vocab_size": 59,
    }
    shapes = bert(config)
    slots = {f"{name}/adam_{p}": shape for name, shape in shapes.items() for p in "mv"}
    arrays = drawn(7, shapes | slots) | {"global_step": np.array(20, np.int64)}
    keep(HOME / "bert" / "same.safetensors", arrays)
    save(HOME / "bert" / "bert_model.ckpt", arrays)
    (HOME / "bert" / "bert_config.json").write_text(json.dumps(config, indent=2) + "\n")

    weight = np.random.default_rng(8).standard_normal((3, 2), np.float32)
    objects = tf.train.Checkpoint(dense=tf.train.Checkpoint(kernel=tf.Variable(weight)))
    objects.save(str(HOME / "objects" / "ckpt"))
    keep(HOME / "objects" / "same.safetensors", {"dense/kernel/.ATTRIBUTES/VARIABLE_VALUE": weight})

    total = sum(path.stat().st_size for path in HOME.rglob("*") if path.is_file())
    print(f"TensorFlow {tf.__version__}: {total} bytes in {HOME.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
