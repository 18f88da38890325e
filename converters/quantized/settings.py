"""The quantization config of a checkpoint (GPTQ, AWQ, FP8): what is read and what is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from converters.opening import open_checkpoint
from converters.paths import confined
from converters.quantized.packing import UNITS
from converters.strict_json import read_json
from zoo.errors import (
    SUGGESTED,
    CheckpointError,
    ConfigError,
    NotACheckpoint,
    did_you_mean,
    listing,
    option,
)

FIELD = "quantization_config"
# files of early programs that hold the config if config.json does not
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_WORDS = {"w_bit": "bits", "q_group_size": "group_size"}  # names in AutoAWQ's file
_INSTEAD = (
    "Use the original weights, or have the program that quantized them write dequantized weights"
)

# The fields of each method's config: those of which only these values are implemented,
_ALLOWED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gptq": {
        "bits": tuple(UNITS),
        "checkpoint_format": ("gptq", "gptq_v2"),
        "format": ("gptq", "gptq_v2"),
        "is_marlin_format": (False,),
        "pack_dtype": ("int32",),
        "dynamic": ({},),
        "sym": (True, False),
        "desc_act": (True, False),
    },
    "awq": {"bits": (4,), "version": ("gemm", "GEMM"), "zero_point": (True,)},
    "fp8": {"fmt": ("e4m3", "float8_e4m3fn"), "scale_fmt": ("ue8m0", "float")},
    "compressed-tensors": {
        "format": ("float-quantized",),
        "quantization_status": ("compressed",),
        "kv_cache_scheme": (),
        "sparsity_config": ({},),
        "transform_config": ({},),
    },
}
# those that are read besides,
_READ = {
    "gptq": {"group_size"},
    "awq": {"group_size"},
    "fp8": {"weight_block_size"},
    "compressed-tensors": {"config_groups"},
}
# and those that do not matter: how the numbers were calibrated, which layers are not quantized (the
# files show it), and instructions for inference programs.
_IGNORED = {
    "gptq": {
        *("damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "dataset"),
        *("model_name_or_path", "model_file_base_name", "meta", "model_seqlen", "batch_size"),
        *("block_name_to_quantize", "module_name_preceding_first_block", "pad_token_id"),
        *("use_exllama", "disable_exllama", "exllama_config", "max_input_length", "backend"),
        *("cache_block_outputs", "modules_in_block_to_quantize", "tokenizer", "use_cuda_fp16"),
        *("lm_head", "modules_to_not_convert", "act_group_aware", "mse"),
    },
    "awq": {
        *("modules_to_not_convert", "do_fuse", "modules_to_fuse", "fuse_max_seq_len", "backend"),
        *("exllama_config", "desc_act", "sym"),
    },
    "fp8": {
        *("activation_scheme", "modules_to_not_convert", "ignored_layers", "dequantize"),
    },
    "compressed-tensors": {"ignore", "global_compression_ratio", "version", "run_compressed"},
}


class Quantization(NamedTuple):
    """How matrices are quantized, from a config."""

    method: str
    bits: int = 8
    group: int = -1  # -1: all inputs
    less_one: bool = False
    ordered: bool = False  # the inputs of a group need not be adjacent
    block: tuple[int, int] | None = None

    @property
    def about(self) -> str:
        """A description for people."""
        if self.method in ("gptq", "awq"):
            groups = "a scale a column" if self.group < 0 else f"groups of {self.group}"
            return f"{self.method}, {self.bits} bits, {groups}"
        if self.block is None:
            return f"{self.method}, float8_e4m3fn, a scale a matrix or a row"
        return f"{self.method}, float8_e4m3fn, blocks of {self.block[0]}x{self.block[1]}"


def beside(directory: Path) -> tuple[str, dict[str, Any]] | None:
    """Return (name, content) of the quantization config in a file of its own.

    Early programs write it beside a config.json that does not mention it. Beside plain weights such
    a file is left over from another checkpoint and means nothing.
    """
    for name, method in _BESIDE.items():
        if not (directory / name).is_file():
            continue
        with suppress(CheckpointError, NotACheckpoint):  # its reader reports a damaged file
            if any(tensor.endswith(".qweight") for tensor in open_checkpoint(directory).tensors):
                fields = read_json(confined(directory, name), ConfigError)
                fields = {_WORDS.get(key, key): value for key, value in fields.items()}
                return name, {"quant_method": method, **fields}
    return None


def read_config(
    section: Any, ignore: Collection[str] = ()
) -> tuple[Quantization | None, list[str]]:
    """Return (what a `quantization_config` means, everything in it that is not read).

    The first is None if anything is not implemented.
    """
    method = section.get("quant_method") if isinstance(section, dict) else None
    if not isinstance(method, str) or method not in _ALLOWED:
        actual = f"quant_method {method!r}" if isinstance(section, dict) else type(section).__name__
        only = ", ".join(_ALLOWED)
        return None, [f"{FIELD}: {actual} is not implemented (only {only}). {_INSTEAD}"]
    allowed, read = _ALLOWED[method], _READ[method]
    problems = []
    for key, value in section.items():
        if key in allowed:
            if value is None or any(value == a and type(value) is type(a) for a in allowed[key]):
                continue
            only = " or ".join(map(repr, allowed[key])) or "absent"
            fault = f"{value!r} is not implemented (only {only}). {_INSTEAD}"
            problems.append(f"{FIELD}.{key}: {fault}")
        elif key not in read | _IGNORED[method] | {"quant_method"}:
            name, field_names = f"{FIELD}.{key}", {*allowed, *read, *_IGNORED[method]}
            if name not in ignore:
                # other programs read these, so the reference does not show which matter
                near = did_you_mean(key, field_names) if len(problems) < SUGGESTED else ""
                problems.append(
                    f"{name}: unknown field.{near} If it does not change "
                    f"the decoded numbers, pass {option('ignore_config', (name,))}"
                )
    understand = _integers if method in ("gptq", "awq") else _floats
    how, more = understand(method, section)
    return (None if problems or more else how), problems + more


def _integers(method: str, section: Mapping[str, Any]) -> tuple[Quantization, list[str]]:
    group, problems = section.get("group_size"), list[str]()
    if type(group) is not int or (group < 1 and group != -1):
        problems.append(f"{FIELD}.group_size: {group!r}, expected a number of inputs, or -1")
    if type(section.get("bits")) is not int:
        problems.append(f"{FIELD}.bits: {section.get('bits')!r}, expected a whole number")
    if method == "awq":
        if section.get("version") is None:
            problems.append(f"{FIELD}.version: missing, and the order of numbers depends on it")
        return Quantization(method, 4, group or -1), problems
    values = (section.get(key) for key in ("checkpoint_format", "format"))
    formats = {value for value in values if isinstance(value, str)}
    if len(formats) > 1:
        problems.append(f"{FIELD}.checkpoint_format and .format differ: {listing(sorted(formats))}")
    first = formats != {"gptq_v2"}
    bits, ordered = section.get("bits") or 4, bool(section.get("desc_act"))
    return Quantization(method, bits, group or -1, first, ordered), problems


def _floats(method: str, section: Mapping[str, Any]) -> tuple[Quantization, list[str]]:
    if method == "fp8":
        blocks = [section.get("weight_block_size")]
        where = f"{FIELD}.weight_block_size"
    else:
        where = f"{FIELD}.config_groups"
        groups = section.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            return Quantization(method), [f"{where}: expected groups by name"]
        blocks = []
        for name, group in groups.items():
            weights = group.get("weights") if isinstance(group, dict) else None
            settings = weights if isinstance(weights, dict) else {}
            kind, strategy = (
                (settings.get("num_bits"), settings.get("type")),
                settings.get("strategy"),
            )
            if kind != (8, "float") or strategy not in ("tensor", "channel", "block"):
                return Quantization(method), [
                    f"{where}.{name}.weights: num_bits, type and strategy {(*kind, strategy)} are "
                    "not implemented (only 8, 'float' and 'tensor', 'channel' or 'block')"
                ]
            blocks.append(settings.get("block_structure") if strategy == "block" else None)
    if any(block != blocks[0] for block in blocks):
        return Quantization(method), [f"{where}: blocks of several sizes, {blocks}"]
    if blocks[0] is None:
        return Quantization(method), []
    size = blocks[0]
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int for n in size)):
        return Quantization(method), [f"{where}: {size!r}, expected rows and columns"]
    if min(size) < 1:
        return Quantization(method), [f"{where}: {size!r} is not positive"]
    return Quantization(method, block=(size[0], size[1])), []
