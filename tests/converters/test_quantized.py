"""GPTQ, AWQ and FP8 checkpoints: packed here by loops in plain Python, read there as weights."""

import json
import re
import tracemalloc
from collections.abc import Callable, Mapping
from functools import cache, partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build
from torch import Tensor

import zoo
from converters import lazy
from converters.checkpoint import Checkpoint
from converters.manifest import NAME, check
from converters.opening import open_checkpoint
from converters.quantized.dequantize import dequantize_checkpoint, has_inputs_first
from converters.quantized.settings import Quantization, read_config
from converters.spec import load_spec
from zoo import registry
from zoo.cli.app import main
from zoo.errors import (
    ConfigError,
    CorruptCheckpoint,
    DtypeMismatch,
    DuplicateTensor,
    MissingTensors,
    NonFinite,
    ShapeMismatch,
    UnexpectedTensors,
    UsageError,
    ZooError,
)
from zoo.parity.fixtures import write

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which column stands in each place of a word
Numbers = list[list[int]]  # [inputs][outputs]


# --- packing, in loops ----------------------------------------------------------------------------


def packed(numbers: Numbers, bits: int) -> Tensor:
    """(n, m) numbers, each column one stream of bits: (n * bits / 32, m) words."""
    words = [[0] * len(numbers[0]) for _ in range(len(numbers) * bits // 32)]
    for k, row in enumerate(numbers):
        for column, number in enumerate(row):
            for bit in range(bits):
                place = k * bits + bit
                words[place // 32][column] |= (number >> bit & 1) << place % 32
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))


def packed_across(numbers: Numbers, bits: int) -> Tensor:
    return packed([list(column) for column in zip(*numbers, strict=True)], bits).t().contiguous()


def packed_awq(numbers: Numbers) -> Tensor:
    words = [[0] * (len(row) // 8) for row in numbers]
    for k, row in enumerate(numbers):
        for word in range(len(row) // 8):
            for place, column in enumerate(AWQ_ORDER):
                words[k][word] |= row[8 * word + column] << 4 * place
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))


def in_groups(
    dense: Tensor, *, method: str, bits: int, group: int, v2: bool, order: list[int] | None
) -> tuple[dict[str, Tensor], Tensor]:
    """(parts of a packed matrix, what they stand for [o i]) of [o i] weights, number by number."""
    outputs, inputs = dense.shape
    size = inputs if group < 0 else group
    groups = inputs // size
    of = order or [i // size for i in range(inputs)]
    rows: list[list[float]] = dense.float().tolist()
    scales, zeros = torch.empty(groups, outputs, dtype=torch.float16), [[0] * outputs] * groups
    zeros = [list(row) for row in zeros]
    most = (1 << bits) - 1
    for g in range(groups):
        mine = [i for i in range(inputs) if of[i] == g]
        for o in range(outputs):
            low = min(0.0, *(rows[o][i] for i in mine))
            high = max(0.0, *(rows[o][i] for i in mine))
            scales[g, o] = max(high - low, 1e-3) / most
            zeros[g][o] = min(most, max(0, round(-low / float(scales[g, o]))))
    steps: list[list[float]] = scales.double().tolist()
    numbers = [[0] * outputs for _ in range(inputs)]
    meant = torch.empty(outputs, inputs, dtype=torch.float64)
    for i in range(inputs):
        for o in range(outputs):
            zero, step = zeros[of[i]][o], steps[of[i]][o]
            numbers[i][o] = min(most, max(0, round(rows[o][i] / step) + zero))
            meant[o, i] = (numbers[i][o] - zero) * step
    if method == "awq":
        parts = {"qweight": packed_awq(numbers), "qzeros": packed_awq(zeros)}
    else:
        stored = zeros if v2 else [[(z - 1) % (most + 1) for z in row] for row in zeros]
        parts = {"qweight": packed(numbers, bits), "qzeros": packed_across(stored, bits)}
        parts["g_idx"] = torch.tensor(of, dtype=torch.int32)
    return {**parts, "scales": scales}, meant


def in_blocks(
    dense: Tensor, block: list[int] | None, name: str
) -> tuple[dict[str, Tensor], Tensor]:
    """(eight-bit floats with their scales, what they stand for)."""
    rows, columns = dense.shape
    down, across = block or (rows, columns)
    grid = (ceil(rows / down), ceil(columns / across))
    scale = torch.empty(grid)
    weight, meant = torch.empty(rows, columns), torch.empty(rows, columns, dtype=torch.float64)
    for r in range(grid[0]):
        for c in range(grid[1]):
            box = slice(r * down, (r + 1) * down), slice(c * across, (c + 1) * across)
            scale[r, c] = dense[box].float().abs().max() / 448
            weight[box] = dense[box].float() / scale[r, c]
    tensors = weight.to(torch.float8_e4m3fn)
    for row in range(rows):
        for column in range(columns):
            step = float(scale[row // down, column // across])
            meant[row, column] = float(tensors[row, column]) * step
    return {"weight": tensors, name: scale if block else scale[0]}, meant.float().double()


# --- checkpoints ----------------------------------------------------------------------------------

LLAMA = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
GPT2 = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 96}
NEOX = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "neox": ("GPTNeoXForCausalLM", {**NEOX, "intermediate_size": 96, "rotary_pct": 0.25}),
    "falcon": ("FalconForCausalLM", {**NEOX, "new_decoder_architecture": True, "num_kv_heads": 2}),
}
LINEAR = (
    *("_proj.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight", "w1.weight", "w2.weight"),
    *("w3.weight", "query_key_value.weight", "dense.weight", "4h.weight", "4h_to_h.weight"),
)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False}
WAYS: dict[str, dict[str, Any]] = {
    "gptq": GPTQ,
    "gptq-v2": {**GPTQ, "checkpoint_format": "gptq_v2", "damp_percent": 0.1},
    "gptq-order": {**GPTQ, "desc_act": True},
    "gptq-one-group": {**GPTQ, "group_size": -1},
    "gptq-3": {**GPTQ, "bits": 3, "group_size": 32},
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": None,
    },
    "fp8": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [24, 40],  # ragged at both ends
    },
    "fp8-tensor": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}
        },
    },
}


def split_up(way: str, dense: Tensor, turned: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Parts of one matrix by one of the ways, and what they stand for, both as files have them."""
    config = WAYS[way]
    if "fp8" in way:
        block = config.get("weight_block_size")
        return in_blocks(dense, block, "weight_scale_inv" if block else "weight_scale")
    matrix = dense.t() if turned else dense
    order = None
    if config.get("desc_act"):
        generator = torch.Generator().manual_seed(matrix.shape[1])
        shuffled = torch.randperm(matrix.shape[1], generator=generator)
        order = (shuffled // config["group_size"]).tolist()
    parts, meant = in_groups(
        matrix,
        method=config["quant_method"],
        bits=config["bits"],
        group=config["group_size"],
        v2=config.get("checkpoint_format") == "gptq_v2",
        order=order,
    )
    return parts, meant.t() if turned else meant


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """(a quantized checkpoint, the same with plain weights)"""

    @cache
    def make(model: str = "llama", way: str = "gptq") -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(f"{model}-{way}")
        dtype = torch.bfloat16 if "fp8" in way else torch.float16
        reference_class, fields = MODELS[model]
        write(reference_class, fields, root / "plain", dtype=dtype)
        plain = load_file(root / "plain" / "model.safetensors")
        quantized = dict(plain)
        for name, tensor in plain.items():
            if name.endswith(LINEAR):
                stem = name.removesuffix(".weight")
                del quantized[name]
                parts, meant = split_up(way, tensor, turned=model == "gpt2")
                quantized |= {f"{stem}.{part}": t.contiguous() for part, t in parts.items()}
                plain[name] = meant.to(dtype).contiguous()
        save_file(plain, root / "plain" / "model.safetensors", metadata={"format": "pt"})
        copied(root / "plain", root / "held", quantized, {"quantization_config": WAYS[way]})
        return root / "held", root / "plain"

    return make


def copied(
    source: Path, directory: Path, tensors: Mapping[str, Tensor], changes: Mapping[str, Any]
) -> Path:
    directory.mkdir()
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def opened(
    directory: Path, config: Mapping[str, Any], *, turned: bool = False, dtype: str | None = None
) -> Checkpoint:
    how, problems = read_config(config)
    assert how is not None, problems
    return dequantize_checkpoint(open_checkpoint(directory), how, lambda name: turned, dtype)


def one(
    directory: Path, parts: Mapping[str, Tensor], config: Mapping[str, Any], **how: Any
) -> Checkpoint:
    """A checkpoint of one matrix x."""
    directory.mkdir(exist_ok=True)
    tensors = {f"x.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, directory / "model.safetensors")
    return opened(directory, config, **how)


# --- known answers, by hand -----------------------------------------------------------------------


def words(*values: int) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.uint32).view(np.int32))


@pytest.mark.parametrize(
    ("bits", "column", "zeros", "numbers"),
    [
        (4, [0x76543210], 0x77777777, list(range(8))),
        (8, [0x03020100, 0xFF7F0504], 0x07070707, [0, 1, 2, 3, 4, 5, 127, 255]),
        (2, [0xE4E4E4E4], 0x55555555, [0, 1, 2, 3] * 4),
    ],
)
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptq_equals_numbers_decoded_by_hand(
    tmp_path: Path, bits: int, column: list[int], zeros: int, numbers: list[int], form: str
) -> None:
    """Numbers ascend from a word's lowest bits; version 1 keeps zero points less one."""
    outputs = 32 // bits
    zero = (zeros & (1 << bits) - 1) + (form == "gptq")
    parts = {
        "qweight": words(*column)[:, None].repeat(1, outputs),
        "qzeros": words(zeros)[None],
        "scales": torch.arange(1, outputs + 1)[None].half() / 4,
    }
    config = {**GPTQ, "bits": bits, "group_size": -1, "checkpoint_format": form}
    actual = one(tmp_path, parts, config).tensor("x.weight")
    assert actual.dtype == torch.float16 and actual.shape == (outputs, len(numbers))
    for o in range(outputs):
        assert actual[o].tolist() == [(number - zero) * (o + 1) / 4 for number in numbers]


def test_three_bit_numbers_cross_words(tmp_path: Path) -> None:
    """0 to 7 are 0xfac688, four times over in three words."""
    stream = [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    parts = {
        "qweight": words(*stream)[:, None].repeat(1, 32),
        "qzeros": words(*stream)[None],  # zero points 1 to 8, of which 8 is none: 0
        "scales": torch.ones(1, 32).half(),
    }
    config = {**GPTQ, "bits": 3, "group_size": -1}
    actual = one(tmp_path, parts, config).tensor("x.weight")
    for o in range(32):
        assert actual[o].tolist() == [i % 8 - (o % 8 + 1) % 8 for i in range(32)]


def test_awq_equals_numbers_decoded_by_hand(tmp_path: Path) -> None:
    """Of a word the even columns first, then the odd ones; zero points as they are."""
    parts = {
        "qweight": words(0x75316420, 0xFDB9ECA8)[:, None],
        "qzeros": words(0x11111111)[None],
        "scales": torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8]]).half(),
    }
    actual = one(tmp_path, parts, {**WAYS["awq"], "group_size": 2}).tensor("x.weight")
    assert actual.tolist() == [[(o - 1) * (o + 1), (o + 7) * (o + 1)] for o in range(8)]


@pytest.mark.parametrize(
    ("block", "scale", "steps"),
    [
        ([2, 2], [[1.0, 2], [4, 8]], [[1, 1, 2], [1, 1, 2], [4, 4, 8]]),
        (None, 3.0, [[3] * 3] * 3),
        (None, [3.0], [[3] * 3] * 3),
        (None, [[1.0], [2], [4]], [[1] * 3, [2] * 3, [4] * 3]),
    ],
)
def test_fp8_equals_numbers_decoded_by_hand(
    tmp_path: Path, block: list[int] | None, scale: Any, steps: list[list[int]]
) -> None:
    tensors = torch.tensor([[0x38, 0xB8, 0x40], [0x7E, 0x01, 0x00], [0x30, 0x3C, 0xFE]])
    values = [[1, -1, 2], [448, 2**-9, 0], [0.5, 1.5, -448]]
    weight = tensors.to(torch.uint8).view(torch.float8_e4m3fn)
    name = "weight_scale_inv" if block else "weight_scale"
    config = {"quant_method": "fp8", "weight_block_size": block}
    actual = one(tmp_path, {"weight": weight, name: torch.tensor(scale)}, config).tensor("x.weight")
    assert actual.dtype == torch.float32  # the scales', where nothing else says
    wanted = [[v * s for v, s in zip(*rows, strict=True)] for rows in zip(values, steps)]  # noqa: B905
    assert actual.tolist() == wanted


# --- any range, each way --------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_any_range_is_decoded_as_the_whole_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, turned: bool
) -> None:
    dense = torch.randn(96, 64, generator=torch.Generator().manual_seed(3))
    parts, meant = split_up(way, dense, turned)
    actual = one(tmp_path, parts, WAYS[way], turned=turned, dtype="F32")
    whole = actual.tensor("x.weight")
    assert torch.equal(whole, meant.float())
    monkeypatch.setattr(lazy, "_PIECE", 50)  # less than a row: pieces begin and end anywhere
    for rows, columns in [((0, 96), (0, 64)), ((95, 96), (63, 64)), ((17, 50), (9, 31))]:
        box = slice(*rows), slice(*columns)
        assert torch.equal(actual.lazy("x.weight").matrix(*box), whole[box])
    pieces = list(actual.lazy("x.weight").pieces(334))
    assert max(map(torch.numel, pieces)) * whole.element_size() <= 334
    assert torch.equal(torch.cat([piece.flatten() for piece in pieces]), whole.flatten())


def test_a_zero_point_of_zero_is_stored_as_the_largest(tmp_path: Path) -> None:
    dense = torch.linspace(0, 15, 64).view(8, 8)  # nothing below zero
    parts, meant = split_up("gptq-one-group", dense, False)
    assert set(parts["qzeros"].tolist()[0]) == {-1}
    assert torch.equal(
        one(tmp_path, parts, WAYS["gptq-one-group"]).tensor("x.weight"), meant.half()
    )


def test_fp8_equals_the_reference(tmp_path: Path) -> None:
    oracle = pytest.importorskip("transformers.integrations.finegrained_fp8")
    generator = torch.Generator().manual_seed(5)
    tensors = torch.randn(300, 333, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 3, generator=generator)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    parts = {"weight": tensors, "weight_scale_inv": scale}
    actual = one(tmp_path, parts, config, dtype="BF16").tensor("x.weight")
    expected = oracle._dequantize_fp8_weight(tensors, scale, [128, 128], torch.float32)
    assert torch.equal(actual, expected.bfloat16())


def stacks(scales: tuple[int, ...]) -> dict[str, Tensor]:
    """Two experts of 6x10, as transformers has them in memory."""
    generator = torch.Generator().manual_seed(6)
    tensors = torch.randn(2, 6, 10, generator=generator).to(torch.float8_e4m3fn)
    return {
        "down_proj": tensors,
        "down_proj_scale_inv": torch.rand(2, *scales, generator=generator),
    }


@pytest.mark.parametrize(
    ("block", "scales"),
    [
        ([4, 4], (2, 3)),
        ([16, 4], (2, 3)),
        ([6, 4], (2, 3)),  # a block as high as both: still two of them, one of each
        (None, (1, 1)),
        (None, (2, 1)),
        (None, (6, 1)),
    ],
)
def test_stacked_experts_are_dequantized(
    tmp_path: Path, block: list[int] | None, scales: Any
) -> None:
    """The scales of a stack have its first axis; two of them may be of gate and up."""
    parts = stacks(scales)
    config = {"quant_method": "fp8", "weight_block_size": block}
    weight, scale = parts["down_proj"], parts["down_proj_scale_inv"]
    checkpoint = one(tmp_path, parts, config, dtype="F32")
    down, across = 6 / scales[0] if block is None or block[0] >= 6 else 4, 4 if block else 10
    meant = torch.empty(2, 6, 10)
    for x, r, c in np.ndindex(2, 6, 10):
        meant[x, r, c] = weight[x, r, c].float() * scale[x, int(r // down), c // across]
    assert torch.equal(checkpoint.tensor("x.down_proj"), meant)
    pieces = [p.reshape(-1) for p in checkpoint.lazy("x.down_proj").pieces(52)]
    assert torch.equal(torch.cat(pieces), meant.flatten())
    oracle = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if block == [4, 4]:
        theirs = oracle._dequantize_fp8_weight(weight, scale, block, torch.float32)
        assert torch.equal(theirs, meant)


def test_scales_that_do_not_fit_a_stack_are_refused(tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "weight_block_size": None}
    with pytest.raises(ShapeMismatch, match=r"\[2, 4, 1\], expected \[2, 1, 1\] or \[2, 6, 1\]"):
        one(tmp_path, stacks((4, 1)), config)
    # a block lower than the matrix has as many rows of scales as blocks; an odd height no halves
    with pytest.raises(ShapeMismatch, match=r"\[2, 2, 3\], expected \[2, 3, 3\] of"):
        one(tmp_path, stacks((2, 3)), {"quant_method": "fp8", "weight_block_size": [2, 4]})
    bad = {name: part[:, :5].contiguous() for name, part in stacks((2, 3)).items()}
    with pytest.raises(ShapeMismatch, match=r"\[2, 2, 3\], expected \[2, 1, 3\] of"):
        one(tmp_path, bad, {"quant_method": "fp8", "weight_block_size": [8, 4]})
    parts = {**stacks((1, 1)), "down_proj_activation_scale": torch.ones(2)}
    assert "x.down_proj_activation_scale" in one(tmp_path, parts, config).outside
    del parts["down_proj_scale_inv"]
    with pytest.raises(MissingTensors, match=r"x\.down_proj_scale_inv: missing"):
        one(tmp_path, parts, config)


# --- models ---------------------------------------------------------------------------------------


def usual(model: str, way: str) -> bool:
    return model in ("llama", "gpt2") or way in ("gptq-order", "awq", "fp8")


def same(a: Any, b: Any) -> bool:
    mine, other = dict(a.named_parameters()), dict(b.named_parameters())
    return mine.keys() == other.keys() and all(
        mine[n].dtype == other[n].dtype and torch.equal(mine[n], other[n]) for n in mine
    )


@pytest.mark.parametrize(("model", "way"), [(m, w) for m in MODELS for w in WAYS if usual(m, w)])
def test_a_model_is_that_of_the_decoded_weights(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path, model: str, way: str
) -> None:
    directory, plain = made(model, way)
    m, wanted = zoo.load(directory), zoo.load(plain)
    assert same(m, wanted)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        assert torch.equal(m(ids), wanted(ids))
    assert m.provenance.lossy.startswith(WAYS[way]["quant_method"]) and not wanted.provenance.lossy
    native = zoo.convert(directory, tmp_path / "native", to="native", memory=1)
    assert same(zoo.load(native), wanted)
    out = zoo.convert(directory, tmp_path / "out", to="hf", memory=1)
    assert (out / "model.safetensors").read_bytes() == _as_zoo_writes(plain, tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((plain / "config.json").read_text())


def _as_zoo_writes(plain: Path, tmp_path: Path) -> bytes:
    return (zoo.convert(plain, tmp_path / "plain", to="hf") / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", registry.architectures())
def test_every_architecture_in_eight_bits(tmp_path: Path, name: str) -> None:
    """All its matrices but every fourth, whatever rules fuse, turn or stack them."""
    zoo.save(build(name), tmp_path / "plain")
    steps = zoo.load(tmp_path / "plain").provenance.plan.steps
    tied = {n for step in steps if step.also for n in step.sources}
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    matrices = [n for n, t in plain.items() if t.dim() == 2 and n.endswith(".weight")]
    tensors = dict(plain)
    for n in [n for k, n in enumerate(sorted(matrices)) if k % 4 and n not in tied]:
        rows, columns = plain[n].shape
        scale = 0.01 + torch.rand(ceil(rows / 24), ceil(columns / 40))
        each = scale.repeat_interleave(24, 0)[:rows].repeat_interleave(40, 1)[:, :columns]
        tensors[n] = (plain[n] / each).to(torch.float8_e4m3fn)
        tensors[f"{n}_scale_inv"], plain[n] = scale, tensors[n].float() * each
    copied(tmp_path / "plain", tmp_path / "held", tensors, {"quantization_config": WAYS["fp8"]})
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    wanted = zoo.load(tmp_path / "plain")
    assert same(zoo.load(tmp_path / "held"), wanted)
    for to in ("native", "hf"):
        out = zoo.convert(tmp_path / "held", tmp_path / to, to=to, memory=1)
        assert same(zoo.load(out), wanted)
    again = zoo.load(zoo.convert(tmp_path / "native", tmp_path / "again", to="hf"))
    assert same(again, wanted)
    assert set() < again.provenance.quantized.keys() < dict(wanted.named_parameters()).keys()


def test_a_stack_of_experts_is_loaded(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """As transformers has them in memory."""
    _, plain = made("mixtral", "fp8")
    tensors = load_file(plain / "model.safetensors")
    for layer in range(2):
        before, after = (f"model.layers.{layer}.{n}" for n in ("block_sparse_moe", "mlp"))
        w1, w2, w3 = (
            torch.stack([tensors.pop(f"{before}.experts.{x}.w{n}.weight") for x in range(3)])
            for n in (1, 2, 3)
        )
        tensors[f"{after}.gate.weight"] = tensors.pop(f"{before}.gate.weight")
        for kind, weight in (("gate_up", torch.cat([w1, w3], 1)), ("down", w2)):
            weights = (weight.float() * 100).to(torch.float8_e4m3fn)
            tensors[f"{after}.experts.{kind}_proj"] = weights
            scale = torch.full((3, ceil(weights.shape[1] / 24), ceil(weights.shape[2] / 40)), 0.01)
            tensors[f"{after}.experts.{kind}_proj_scale_inv"] = scale
    config = {"quantization_config": WAYS["fp8"]}
    m, wanted = zoo.load(copied(plain, tmp_path / "held", tensors, config)), zoo.load(plain)
    assert "blocks.1.mlp.up" in m.provenance.quantized
    for mine, other in zip(m.parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(mine.float(), other.float(), rtol=0.1, atol=1e-3)


AUTO_GPTQ = {"bits": 4, "group_size": 16, "desc_act": False, "sym": False, "damp_percent": 0.01}
AUTO_AWQ = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}


@pytest.mark.parametrize(
    ("way", "name", "config"),
    [
        ("gptq", "quantize_config.json", AUTO_GPTQ),
        ("gptq", "quantize_config.json", {**AUTO_GPTQ, "quant_method": "gptq"}),
        ("awq", "quant_config.json", AUTO_AWQ),
    ],
)
def test_a_separate_quantization_config_is_read(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path, way: str, name: str, config: Any
) -> None:
    """As the first programs wrote it; beside plain weights it is what was left there."""
    directory, plain = made("llama", way)
    tensors = load_file(directory / "model.safetensors")
    bad = copied(directory, tmp_path / "held", tensors, {"quantization_config": None})
    (bad / name).write_text(json.dumps(config))
    assert same(zoo.load(bad), zoo.load(plain))
    assert zoo.info(bad).quantized == zoo.info(directory).quantized
    out = zoo.convert(bad, tmp_path / "out", to="hf")
    assert not (out / name).exists() and same(zoo.load(out), zoo.load(plain))
    (out / name).write_text(json.dumps({"bits": "many"}))
    assert same(zoo.load(out), zoo.load(plain))
    bits = "w_bit" if way == "awq" else "bits"
    (bad / name).write_text(json.dumps({**config, bits: 5}))
    with pytest.raises(ConfigError, match=rf"{name}(.|\n)*\.bits: 5 is not implemented"):
        zoo.load(bad)


@pytest.mark.parametrize("way", ["gptq-order", "awq", "fp8"])
def test_manifest_records_that_weights_were_dequantized(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path, way: str
) -> None:
    directory, plain = made("llama", way)
    method, projection = WAYS[way]["quant_method"], "model.layers.1.mlp.down_proj.weight"
    for to in ("hf", "native", "meta"):
        out = zoo.convert(
            directory, tmp_path / to, to=to, dtype="float32" if to == "meta" else None
        )
        config = json.loads((out / NAME).read_text())
        assert config["lossy"].startswith(f"dequantized: {method}") and not list(check(out))
        lossy = lossy_in(config)
        assert len(lossy) == 2 * 7 and all("norm" not in name for name in lossy)
        assert to != "hf" or projection in lossy
        again = zoo.load(out)
        assert same(again, zoo.load(plain, dtype="float32" if to == "meta" else None))
    native = zoo.load(tmp_path / "native")
    assert native.provenance.lossy.startswith(method)
    back = zoo.convert(tmp_path / "native", tmp_path / "back", to="hf")
    assert json.loads((back / NAME).read_text())["lossy"].startswith(f"dequantized: {method}")
    assert (back / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    assert (
        load_file(back / "model.safetensors").keys()
        == load_file(plain / "model.safetensors").keys()
    )
    zoo.convert(plain, tmp_path / "exact", to="hf")
    assert "lossy" not in (tmp_path / "exact" / NAME).read_text()


def lossy_in(manifest: dict[str, Any]) -> set[str]:
    files = (config.get("tensors", {}) for config in manifest["files"].values())
    return {name for tensors in files for name, config in tensors.items() if config.get("lossy")}


def in_files(kind: str, made: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Path:
    """Quantized in safetensors, or by ourselves in another dialect's file."""
    if kind in WAYS:
        return made("llama", kind)[0]
    dtype = "q8_0" if kind == "gguf" else "float32"
    return zoo.convert(made()[1], tmp_path / "held", to=kind, dtype=dtype)


@pytest.mark.parametrize("kind", ["gptq", "fp8", "gguf", "llama2c-q8"])
def test_manifest_keeps_the_quantized_type_through_conversions(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path, kind: str
) -> None:
    directory = in_files(kind, made, tmp_path)
    first = zoo.load(directory).provenance
    assert first is not None and "blocks.1.mlp.down.weight" in first.quantized
    assert "blocks.0.norm1.weight" not in first.quantized
    assert first.lossy and first.lossy in zoo.info(directory).quantized
    rounds = [("native", None), ("hf", None), ("native", "float32"), ("meta", None), ("hf", None)]
    for n, (to, dtype) in enumerate([*rounds, ("gguf", None), ("llama2c", None)]):
        directory = zoo.convert(directory, tmp_path / str(n), to=to, dtype=dtype)
        config = json.loads((directory / NAME).read_text())
        assert config["quantised"] == first.quantized
        assert config["lossy"] == f"dequantized: {first.lossy}"
        lossy = lossy_in(config)
        assert lossy and (to != "native" or lossy == first.quantized.keys())
        m = zoo.load(directory)
        assert m.provenance.quantized == first.quantized
        assert zoo.info(directory).quantized == f"it was, and is decoded: {first.lossy}"
        zoo.save(m, tmp_path / f"{n}, saved", to=to)
        again = json.loads((tmp_path / f"{n}, saved" / NAME).read_text())
        assert again["quantised"] == first.quantized and lossy_in(again) == lossy
    (directory / NAME).write_text("{}")  # damaged: nothing that loading would refuse
    assert not zoo.load(directory).provenance.quantized


def test_a_damaged_record_of_quantized_types_is_refused(tmp_path: Path) -> None:
    zoo.save(build("llama"), tmp_path / "native", to="native")
    path = tmp_path / "native" / "zoo.json"
    config = json.loads(path.read_text())
    for bad in ("gptq", {"norm.weight": 4}):
        path.write_text(json.dumps({**config, "quantised": bad}))
        with pytest.raises(ConfigError, match="quantized: expected words by name"):
            zoo.load(tmp_path / "native")


def test_saving_writes_plain_weights(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    directory, plain = made("qwen2", "gptq")
    m = zoo.load(directory)
    for to in ("hf", "native"):
        out = zoo.save(m, tmp_path / to, to=to)
        assert (
            "quantization_config"
            not in (out / "config.json" if to == "hf" else out / NAME).read_text()
        )
        assert json.loads((out / NAME).read_text())["lossy"].startswith("dequantized: gptq")
        assert same(zoo.load(out), zoo.load(plain))


def test_the_reference_loads_what_is_written(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    directory, _ = made("gpt2", "gptq")
    zoo.convert(directory, tmp_path / "out", to="hf", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        ours, theirs = zoo.load(directory, dtype="float32")(ids), theirs(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_parts_of_a_matrix_may_lie_in_several_files(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    directory, plain = made()
    names = [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    tensors = load_file(directory / "model.safetensors")
    where = {tensor: names[n % 3] for n, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file({t: tensors[t] for t in where if where[t] == name}, tmp_path / name)
    index = {"metadata": {}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    (tmp_path / "quantize_config.json").write_text("{}")
    assert same(zoo.load(tmp_path), zoo.load(plain))
    out = zoo.convert(tmp_path, tmp_path / "out", to="hf")  # decoded, and so split anew
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", NAME}


def test_a_plan_names_every_part(
    made: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = made()
    assert main(["convert", str(directory), "--to", "hf", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "lossy: gptq, 4 bits, groups of 16" in output
    assert all(name in output for name in open_checkpoint(directory).tensors)


def test_info_shows_the_quantization(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = made()
    assert main(["info", str(directory)]) == 0
    assert "gptq, 4 bits, groups of 16" in capsys.readouterr().out
    zoo.convert(directory, tmp_path / "native", to="native")
    assert zoo.info(tmp_path / "native").quantized.endswith("gptq, 4 bits, groups of 16")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq"}
    bad = copied(directory, tmp_path / "odd", {}, config)
    assert "hqq" in zoo.info(bad).quantized


def test_verify_of_a_quantized_checkpoint_names_the_next_step(
    made: Callable[..., tuple[Path, Path]],
) -> None:
    with pytest.raises(UsageError, match=r"zoo convert .* --to hf"):
        zoo.verify(made()[0])


def test_conversion_holds_no_matrix_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 million numbers, of which no thread asks for more than its share of the memory."""
    asked: list[int] = []
    real = lazy.Decoded.matrix

    def matrix(self: lazy.Decoded, rows: slice, columns: slice) -> Tensor:
        actual = real(self, rows, columns)
        asked.append(actual.nbytes)
        return actual

    dim, hidden = 1024, 4096
    fields = {**LLAMA, "hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": 1}
    write("LlamaForCausalLM", fields, tmp_path / "plain", dtype=torch.float16, seed=None)
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    for name in [n for n in tensors if n.endswith(LINEAR)]:
        stem, (outputs, inputs) = name.removesuffix(".weight"), tensors.pop(name).shape
        tensors[f"{stem}.qweight"] = torch.randint(0, 1 << 31, (inputs, outputs // 8)).int()
        tensors[f"{stem}.qzeros"] = torch.randint(0, 1 << 31, (inputs // 32, outputs // 8)).int()
        tensors[f"{stem}.scales"] = torch.rand(inputs // 32, outputs).half()
    directory = copied(
        tmp_path / "plain", tmp_path / "held", tensors, {"quantization_config": WAYS["awq"]}
    )
    monkeypatch.setattr(lazy.Decoded, "matrix", matrix)
    for to in ("hf", "native"):
        zoo.convert(directory, tmp_path / to, to=to, memory=2 << 20, threads=2)
    assert max(asked) <= 512 << 10 and sum(asked) == 2 * 2 * (3 * hidden * dim + dim * dim * 3)


# --- what cannot be read --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            r"'bitsandbytes' is not implemented .*\. Take the weights",
        ),
        ({"quant_method": "hqq"}, "only gptq, awq, fp8, compressed-tensors"),
        ({"quant_method": None}, "quant_method None"),
        ({"bits": 5}, r"quantization_config\.bits: 5 is not implemented \(only 2 or 3 or 4 or 8\)"),
        ({"bits": True}, r"\.bits: True is not implemented"),
        ({"bits": None}, r"\.bits: None, expected"),
        ({"group_size": 0}, r"\.group_size: 0, expected"),
        ({"group_size": "16"}, r"\.group_size: '16', expected"),
        ({"group_size": -2}, r"\.group_size: -2, expected"),
        ({"checkpoint_format": "marlin"}, r"\.checkpoint_format: 'marlin'"),
        ({"checkpoint_format": "gptq_v2", "format": "gptq"}, "differ: gptq, gptq_v2"),
        ({"checkpoint_format": ["gptq"]}, r"\.checkpoint_format: \['gptq'\]"),
        ({"format": {"a": 1}}, r"\.format: \{'a': 1\}"),
        ({"is_marlin_format": True}, r"\.is_marlin_format: True"),
        ({"dynamic": {"-:lm_head": {}}}, r"\.dynamic: "),
        ({"desc_akt": True}, r"desc_akt: unknown field\. Did you mean desc_act"),
        ({"quant_method": "awq"}, r"\.version: missing"),
        ({"quant_method": "awq", "version": "gemv"}, r"\.version: 'gemv'"),
        ({"quant_method": "awq", "version": "gemm", "zero_point": False}, r"\.zero_point: False"),
        ({"quant_method": "fp8", "bits": 4}, r"\.bits: unknown field"),
    ],
)
def test_unimplemented_config_values_are_refused_by_name(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = {"quantization_config": {**GPTQ, **changes}}
    with pytest.raises(ConfigError, match=message):
        zoo.load(copied(made()[0], tmp_path / "odd", {}, config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1], "quantization_config: list is not"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, r"\.fmt: 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "expected rows and columns"),
        ({"quant_method": "fp8", "weight_block_size": [0, 4]}, "not positive"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "'pack-quantized' .*Take the",
        ),
        ({"quant_method": "compressed-tensors"}, r"\.config_groups: expected"),
        (
            {**WAYS["fp8-tensor"], "config_groups": {"g": {"weights": {"num_bits": 4}}}},
            r"config_groups\.g\.weights: num_bits, type and strategy \(4, None, None\)",
        ),
        ({**WAYS["fp8-tensor"], "kv_cache_scheme": {"num_bits": 8}}, "only absent"),
    ],
)
def test_malformed_quantization_configs_are_refused(config: Any, message: str) -> None:
    actual, problems = read_config(config)
    assert actual is None and any(re.search(message, p) for p in problems), problems


def test_an_unknown_field_can_be_ignored(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    directory, plain = made()
    tensors = load_file(directory / "model.safetensors")
    config = {"quantization_config": {**GPTQ, "foo": 1}}
    bad = copied(directory, tmp_path / "odd", tensors, config)
    with pytest.raises(ConfigError, match=r"ignore_config=\('quantization_config\.foo',\)"):
        zoo.load(bad)
    assert same(zoo.load(bad, ignore_config=("quantization_config.foo",)), zoo.load(plain))


Q = "model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, Tensor]], None]


def without(part: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{Q}.{part}"]

    return change


def changed(part: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda t: t.update({f"{Q}.{part}": change(t[f"{Q}.{part}"]).contiguous()})


def added(name: str, tensor: Tensor) -> Change:
    return lambda t: t.update({name: tensor})


def set_to(place: int, value: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return change


DAMAGES: list[tuple[str, Change, type[ZooError], str]] = [
    ("gptq", without("scales"), MissingTensors, rf"{Q}\.scales: missing beside {Q}\.qweight"),
    ("gptq", without("qzeros"), MissingTensors, rf"{Q}\.qzeros: missing"),
    ("gptq", without("qweight"), MissingTensors, rf"{Q}\.qweight: missing beside {Q}\.qzeros"),
    ("gptq-order", without("g_idx"), MissingTensors, rf"{Q}\.g_idx: missing"),
    ("gptq", added(f"{Q}.weight", torch.zeros(64, 64).half()), DuplicateTensor, "matrix twice"),
    ("gptq", added("x.scales", torch.ones(1).half()), UnexpectedTensors, r"x\.scales"),
    ("gptq", added("x.g_idx", torch.ones(1).int()), UnexpectedTensors, r"x\.g_idx"),
    ("gptq", changed("scales", lambda t: t[:-1]), ShapeMismatch, r"\[3, 64\], expected \[4, 64\]"),
    ("gptq", changed("scales", lambda t: t[0]), ShapeMismatch, "expected 2 axes"),
    ("gptq", changed("qzeros", lambda t: t[:, :-1]), ShapeMismatch, r"expected \[4, 8\]"),
    ("gptq", changed("g_idx", lambda t: t[:-1]), ShapeMismatch, r"\[63\], expected \[64\]"),
    ("gptq", changed("qweight", lambda t: t[:-1]), ShapeMismatch, "16 does not divide 56 inputs"),
    ("gptq", changed("qweight", lambda t: t[:, :-1]), ShapeMismatch, "63 outputs"),
    ("gptq", changed("qweight", lambda t: t[:0]), ShapeMismatch, r"shape \[0, 64\]"),
    ("gptq", changed("qweight", lambda t: t.float()), DtypeMismatch, "dtype F32, expected I32"),
    ("gptq", changed("g_idx", lambda t: t.long()), DtypeMismatch, "dtype I64, expected I32"),
    ("gptq", changed("scales", lambda t: t.double()), DtypeMismatch, "F64, expected F16 or BF16"),
    ("gptq", changed("g_idx", set_to(9, 4)), CorruptCheckpoint, r"g_idx\[9\] is 4, .* 0\.\.3"),
    ("gptq", changed("g_idx", set_to(8, -1)), CorruptCheckpoint, r"g_idx\[8\] is -1"),
    ("gptq-3", changed("qweight", lambda t: t[:-1]), ShapeMismatch, "32 numbers take 3 words"),
    ("awq", changed("qweight", lambda t: t[:, :-1]), ShapeMismatch, r"expected \[2, 7\]"),
    ("awq", added(f"{Q}.g_idx", torch.zeros(64).int()), UnexpectedTensors, "g_idx"),
    ("fp8", without("weight_scale_inv"), MissingTensors, rf"{Q}\.weight_scale_inv: missing"),
    ("fp8", without("weight"), MissingTensors, rf"{Q}\.weight: missing beside"),
    ("fp8", added(f"{Q}.weight_scale", torch.ones(1)), DuplicateTensor, "one matrix twice"),
    ("fp8", changed("weight_scale_inv", lambda t: t.t()), ShapeMismatch, r"expected \[3, 2\]"),
    ("fp8", changed("weight_scale_inv", lambda t: t.int()), DtypeMismatch, "dtype I32"),
    ("fp8", changed("weight", lambda t: t.bfloat16()), DtypeMismatch, "BF16 beside .*F8_E4M3"),
    ("fp8", changed("weight", lambda t: t.to(torch.float8_e5m2)), DtypeMismatch, "F8_E5M2"),
    ("fp8", changed("weight", lambda t: t[0]), ShapeMismatch, "expected 2 axes"),
    ("fp8-tensor", changed("weight_scale", lambda t: t.repeat(2)), ShapeMismatch, r"or \[64, 1\]"),
]


@pytest.mark.parametrize(("way", "change", "kind", "message"), DAMAGES)
def test_tensors_that_do_not_fit_are_named(
    made: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
    way: str,
    change: Change,
    kind: type[ZooError],
    message: str,
) -> None:
    tensors = load_file(made("llama", way)[0] / "model.safetensors")
    change(tensors)
    bad = copied(made("llama", way)[0], tmp_path / "odd", tensors, {})
    with pytest.raises(kind, match=message):
        zoo.load(bad)
    with pytest.raises(kind, match=message):
        zoo.convert(bad, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


def test_all_tensors_that_do_not_fit_are_in_one_error(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    tensors = load_file(made()[0] / "model.safetensors")
    for change in (without("qzeros"), added("x.qzeros", torch.ones(1, 1).int())):
        change(tensors)
    k = "model.layers.0.self_attn.k_proj"
    tensors[f"{k}.g_idx"] = tensors[f"{k}.g_idx"].long()
    with pytest.raises(MissingTensors) as caught:
        zoo.load(copied(made()[0], tmp_path / "odd", tensors, {}))
    assert all(name in str(caught.value) for name in (f"{Q}.qzeros", "x.qweight", f"{k}.g_idx"))


def test_packed_tensors_without_a_config_that_says_so_are_not_weights(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    directory, _ = made()
    tensors = load_file(directory / "model.safetensors")
    bad = copied(directory, tmp_path / "odd", tensors, {"quantization_config": None})
    with pytest.raises(MissingTensors, match=r"q_proj\.qweight"):
        zoo.load(bad)


def test_scales_that_are_not_finite_are_refused(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    tensors = load_file(made()[0] / "model.safetensors")
    tensors[f"{Q}.scales"][1, 5] = torch.nan
    bad = copied(made()[0], tmp_path / "odd", tensors, {})
    with pytest.raises(NonFinite, match=rf"{Q}\.weight\[5, 16\] is nan"):
        zoo.convert(bad, tmp_path / "out", to="hf")


def test_biases_of_zeros_beside_packed_matrices_are_left_out(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """The first programs for GPTQ gave every matrix a bias."""
    directory, plain = made()
    tensors = load_file(directory / "model.safetensors")
    tensors |= {f"{Q}.bias": torch.zeros(64).half()}
    m = zoo.load(copied(directory, tmp_path / "zeros", tensors, {}))
    assert same(m, zoo.load(plain)) and "zeros" in m.provenance.dropped[f"{Q}.bias"]
    out = zoo.convert(tmp_path / "zeros", tmp_path / "out", to="hf")
    assert (
        load_file(out / "model.safetensors").keys() == load_file(plain / "model.safetensors").keys()
    )
    zoo.save(m, tmp_path / "saved")
    tensors[f"{Q}.bias"][7] = 1e-3
    with pytest.raises(UnexpectedTensors, match=r"q_proj\.bias"):
        zoo.load(copied(directory, tmp_path / "some", tensors, {}))


def test_scales_of_inputs_are_dropped_with_a_reason(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    directory, plain = made("llama", "fp8-tensor")
    tensors = load_file(directory / "model.safetensors") | {f"{Q}.input_scale": torch.ones(1)}
    m = zoo.load(copied(directory, tmp_path / "static", tensors, {}))
    assert same(m, zoo.load(plain)) and f"{Q}.input_scale" in m.provenance.dropped


def test_orientation_of_a_matrix_follows_from_the_spec() -> None:
    turns = partial(has_inputs_first, load_spec("gpt2").dialect("hf"))
    assert turns("transformer.h.3.attn.c_attn.weight") and turns("h.0.mlp.c_proj.weight")
    assert not turns("lm_head.weight") and not turns("transformer.wte.weight")
    for spec, name in (("llama", "model.layers.0.mlp.up_proj.weight"), ("neox", "x.weight")):
        assert not has_inputs_first(load_spec(spec).dialect("hf"), name)


def test_headers_cost_no_weights(made: Callable[..., tuple[Path, Path]]) -> None:
    how = Quantization("gptq", 4, 16, True)
    tracemalloc.start()
    try:
        dequantize_checkpoint(open_checkpoint(made()[0]), how, lambda name: False, None)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("way", ["gptq", "fp8"])
@torch.no_grad()
def test_an_adapter_on_a_quantized_base(
    way: str, made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """Decoded, with what the adapter adds, in the dtype that the config names."""
    directory, plain = made("llama", next(each for each in WAYS if way in each))
    model = zoo.load(directory).add_adapter(["q_proj", "down_proj"], r=3)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    model.save_adapter(tmp_path / "adapter")
    ids = torch.arange(3, 14)[None]
    other = zoo.load(plain, adapter=tmp_path / "adapter")
    assert model(ids).equal(other(ids))
    zoo.convert(directory, tmp_path / "out", adapter=tmp_path / "adapter")
    zoo.convert(plain, tmp_path / "wanted", adapter=tmp_path / "adapter")
    actual, wanted, before = (
        load_file(place / "model.safetensors")
        for place in (tmp_path / "out", tmp_path / "wanted", plain)
    )
    assert all(actual[name].equal(tensor) for name, tensor in wanted.items())
    changed = {name for name in actual if not actual[name].equal(before[name])}
    assert changed == {n for n in actual if "q_proj" in n or "down_proj" in n}
    assert json.loads((tmp_path / "out" / "zoo-manifest.json").read_bytes())["lossy"]
