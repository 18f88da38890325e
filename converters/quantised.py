"""Checkpoints of GPTQ, AWQ and FP8, shown as if they held plain weights.

Between files and plan: of `X.qweight`, `X.scales` … one tensor `X.weight` is made, decoded as it is
looked at. Neither specs nor models know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from converters.checkpoint import SHARD_BYTES, Checkpoint, Reader, shard
from converters.formats import TensorInfo, torch_dtype
from converters.packing import AWQ_SHIFTS, UNITS, Blocks, Groups, Matrix, turned
from converters.plan import FLOATS
from converters.spec import Dialect
from zoo.errors import (
    CorruptCheckpoint,
    DtypeMismatch,
    DuplicateTensor,
    MissingTensors,
    ShapeMismatch,
    ZooError,
    did_you_mean,
    listing,
)

if TYPE_CHECKING:
    import torch

FIELD = "quantization_config"
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FP8, _SCALES = "F8_E4M3", ("F32", "BF16", "F16", "F8_E8M0")
_SHOWN = 20  # problems of a kind that a message holds

# What a method's config may hold: fields of which only these values are read,
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
# fields that are read beside these,
_READ = {
    "gptq": {"group_size"},
    "awq": {"group_size"},
    "fp8": {"weight_block_size"},
    "compressed-tensors": {"config_groups"},
}
# and fields that say how the numbers were found, which layers were left alone (the files tell), and
# what programs for inference should do.
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


class Quantisation(NamedTuple):
    """What a config says of how matrices are held."""

    method: str
    bits: int = 8
    group: int = -1  # -1: all inputs
    less_one: bool = False
    ordered: bool = False  # the inputs of a group need not stand side by side
    block: tuple[int, int] | None = None

    @property
    def about(self) -> str:
        if self.method in ("gptq", "awq"):
            groups = "a scale a column" if self.group < 0 else f"groups of {self.group}"
            return f"{self.method}, {self.bits} bits, {groups}"
        if self.block is None:
            return f"{self.method}, float8_e4m3fn, a scale a matrix or a row"
        return f"{self.method}, float8_e4m3fn, blocks of {self.block[0]}x{self.block[1]}"


# --- the config ----------------------------------------------------------------------------------


def read_config(said: Any, ignore: Collection[str] = ()) -> tuple[Quantisation | None, list[str]]:
    """What `quantization_config` means, and everything in it that is not read."""
    method = said.get("quant_method") if isinstance(said, dict) else None
    if not isinstance(method, str) or method not in _ALLOWED:
        found = f"quant_method {method!r}" if isinstance(said, dict) else type(said).__name__
        only = ", ".join(_ALLOWED)
        return None, [f"{FIELD}: {found} is not implemented (only {only})"]
    allowed, read = _ALLOWED[method], _READ[method]
    problems = []
    for key, value in said.items():
        if key in allowed:
            if value is None or any(value == a and type(value) is type(a) for a in allowed[key]):
                continue
            only = " or ".join(map(repr, allowed[key])) or "absent"
            problems.append(f"{FIELD}.{key}: {value!r} is not implemented (only {only})")
        elif key not in read | _IGNORED[method] | {"quant_method"}:
            name, known = f"{FIELD}.{key}", {*allowed, *read, *_IGNORED[method]}
            if name not in ignore:
                problems.append(
                    f"{name}: unknown field.{did_you_mean(key, known)} If it does not change what "
                    f"the numbers stand for, pass ignore_config=({name!r},)"
                )
    understand = _integers if method in ("gptq", "awq") else _floats
    how, more = understand(method, said)
    return (None if problems or more else how), problems + more


def _integers(method: str, said: Mapping[str, Any]) -> tuple[Quantisation, list[str]]:
    group, problems = said.get("group_size"), list[str]()
    if type(group) is not int or (group < 1 and group != -1):
        problems.append(f"{FIELD}.group_size: {group!r}, expected a number of inputs, or -1")
    if type(said.get("bits")) is not int:
        problems.append(f"{FIELD}.bits: {said.get('bits')!r}, expected a whole number")
    if method == "awq":
        if said.get("version") is None:
            problems.append(f"{FIELD}.version: missing, and the order of numbers depends on it")
        return Quantisation(method, 4, group or -1), problems
    told = (said.get(key) for key in ("checkpoint_format", "format"))
    formats = {each for each in told if isinstance(each, str)}
    if len(formats) > 1:
        problems.append(f"{FIELD}.checkpoint_format and .format differ: {listing(sorted(formats))}")
    first = formats != {"gptq_v2"}
    bits, ordered = said.get("bits") or 4, bool(said.get("desc_act"))
    return Quantisation(method, bits, group or -1, first, ordered), problems


def _floats(method: str, said: Mapping[str, Any]) -> tuple[Quantisation, list[str]]:
    if method == "fp8":
        blocks = [said.get("weight_block_size")]
        where = f"{FIELD}.weight_block_size"
    else:
        where = f"{FIELD}.config_groups"
        groups = said.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            return Quantisation(method), [f"{where}: expected groups by name"]
        blocks = []
        for name, group in groups.items():
            weights = group.get("weights") if isinstance(group, dict) else None
            held = weights if isinstance(weights, dict) else {}
            kind, strategy = (held.get("num_bits"), held.get("type")), held.get("strategy")
            if kind != (8, "float") or strategy not in ("tensor", "channel", "block"):
                return Quantisation(method), [
                    f"{where}.{name}.weights: num_bits, type and strategy {(*kind, strategy)} are "
                    "not implemented (only 8, 'float' and 'tensor', 'channel' or 'block')"
                ]
            blocks.append(held.get("block_structure") if strategy == "block" else None)
    if any(block != blocks[0] for block in blocks):
        return Quantisation(method), [f"{where}: blocks of several sizes, {blocks}"]
    if blocks[0] is None:
        return Quantisation(method), []
    size = blocks[0]
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int for n in size)):
        return Quantisation(method), [f"{where}: {size!r}, expected rows and columns"]
    if min(size) < 1:
        return Quantisation(method), [f"{where}: {size!r} is not positive"]
    return Quantisation(method, block=(size[0], size[1])), []


def stands_turned(dialect: Dialect, disk: str) -> bool:
    """Whether the inputs of a matrix stand first in its file.

    The model has them last, `[o i]`; a rule that begins with that axis, `[i o]`, turns it.
    """
    for rule in (*dialect.rules, *(r for when in dialect.when for r in when.weights + when.heads)):
        source, target = rule.source.pattern, rule.targets[0].pattern
        if source is None or target is None:
            continue
        if any(rule.source.name.match(n) for n in {disk, disk.removeprefix(dialect.prefix)}):
            return source.dims[0] == target.dims[-1]
    return False


# --- the tensors ---------------------------------------------------------------------------------


def dequantised(
    checkpoint: Checkpoint, how: Quantisation, turns: Callable[[str], bool], dtype: str | None
) -> Checkpoint:
    """The same checkpoint with one plain matrix in the place of each group of tensors.

    `turns` says of a matrix's name whether its inputs stand first; `dtype` is the config's.
    """
    found = _Groups(checkpoint, how, turns, dtype)
    found.look()
    found.raise_problems()
    return found.shown()


class _Groups:
    def __init__(
        self,
        checkpoint: Checkpoint,
        how: Quantisation,
        turns: Callable[[str], bool],
        dtype: str | None,
    ) -> None:
        self.checkpoint, self.how, self.turns = checkpoint, how, turns
        self.tensors = checkpoint.tensors
        self.problems: list[tuple[type[ZooError], str]] = []
        self.matrices: dict[str, Matrix] = {}
        self.needless: dict[str, str] = {}
        self.dtype = self._dtype(dtype)

    def _dtype(self, said: str | None) -> str:
        """What all other weights are in, so that the model computes in one; else the config's."""
        integers = self.how.method in ("gptq", "awq")
        scales = {".scales"} if integers else {".weight_scale", ".weight_scale_inv", ".input_scale"}
        ends = tuple(scales)
        rest = {i.dtype for n, i in self.tensors.items() if not n.endswith(ends)} & FLOATS
        held = {i.dtype for n, i in self.tensors.items() if n.endswith(ends)} & FLOATS
        one = rest if len(rest) == 1 else {said} if said else held if len(held) == 1 else {"F32"}
        (dtype,) = one
        assert dtype is not None
        return dtype

    def problem(self, kind: type[ZooError], text: str) -> None:
        self.problems.append((kind, text))

    def raise_problems(self) -> None:
        """One error for everything; its class is that of the gravest kind among them."""
        kinds = (DuplicateTensor, MissingTensors, ShapeMismatch, DtypeMismatch, CorruptCheckpoint)
        lines: list[str] = []
        for kind in kinds:
            texts = [text for each, text in self.problems if each is kind]
            lines += texts[:_SHOWN]
            if len(texts) > _SHOWN:
                lines.append(f"… and {len(texts) - _SHOWN} more of this kind")
        if lines:
            gravest = next(k for k in kinds if any(each is k for each, _ in self.problems))
            raise gravest("\n  ".join([f"{self.checkpoint.root} ({self.how.about}):", *lines]))

    def look(self) -> None:
        look = self._integers if self.how.method in ("gptq", "awq") else self._floats
        look()

    def _stems(self, *ends: str) -> list[str]:
        """X of every X.end, in the files' order."""
        found = (n[: -len(e) - 1] for n in self.tensors for e in ends if n.endswith(f".{e}"))
        return list(dict.fromkeys(found))

    # --- whole numbers in groups ---

    def _integers(self) -> None:
        needed = ["qweight", "qzeros", "scales"]
        ordered = ["g_idx"] if self.how.method == "gptq" else []
        for stem in self._stems("qweight", "qzeros"):
            there = [p for p in (*needed, *ordered) if f"{stem}.{p}" in self.tensors]
            wanted = needed + (ordered if self.how.ordered else [])
            if missing := [f"{stem}.{p}" for p in wanted if p not in there]:
                self.problem(
                    MissingTensors, f"{listing(missing)}: missing beside {stem}.{there[0]}"
                )
                continue
            if f"{stem}.weight" in self.tensors:
                self.problem(DuplicateTensor, f"{stem}.weight and {stem}.qweight: one matrix twice")
                continue
            before = len(self.problems)
            sizes = self._sizes(stem, there)
            if len(self.problems) > before or sizes is None:
                continue
            self._add_integers(stem, there, *sizes)

    def _sizes(self, stem: str, there: Sequence[str]) -> tuple[int, int, int] | None:
        """(inputs, outputs, inputs of a group), or what does not fit."""
        for part in there:
            info = self.tensors[f"{stem}.{part}"]
            allowed = ("F16", "BF16", "F32") if part == "scales" else ("I32",)
            if info.dtype not in allowed:
                only = " or ".join(allowed)
                self.problem(DtypeMismatch, f"{info.name}: dtype {info.dtype}, expected {only}")
            rank = 1 if part == "g_idx" else 2
            if len(info.shape) != rank or not all(info.shape):
                self.problem(
                    ShapeMismatch, f"{info.name}: shape {list(info.shape)}, expected {rank} axes"
                )
                return None
        words = self.tensors[f"{stem}.qweight"].shape
        count, width = UNITS[self.how.bits]
        axis = 0 if self.how.method == "gptq" else 1
        if words[axis] % width:
            self.problem(
                ShapeMismatch,
                f"{stem}.qweight: shape {list(words)}; {count} numbers take {width} words",
            )
            return None
        length = words[axis] // width * count
        inputs, outputs = (length, words[1]) if axis == 0 else (words[0], length)
        group = inputs if self.how.group < 0 else self.how.group
        if inputs % group:
            told = f"{FIELD}.group_size {group} does not divide {inputs} inputs"
            self.problem(ShapeMismatch, f"{stem}.qweight: {told}")
            return None
        if outputs % count:
            told = f"{outputs} outputs, whose zero points fill no whole words of {count}"
            self.problem(ShapeMismatch, f"{stem}.qweight: {told}")
            return None
        expected = {
            "qzeros": (inputs // group, outputs // count * width),
            "scales": (inputs // group, outputs),
            "g_idx": (inputs,),
        }
        for part in there:
            info = self.tensors[f"{stem}.{part}"]
            if info.shape != expected.get(part, info.shape):
                self.problem(
                    ShapeMismatch,
                    f"{info.name}: shape {list(info.shape)}, expected {list(expected[part])}: "
                    f"{inputs} inputs in groups of {group}, {outputs} outputs",
                )
        return inputs, outputs, group

    def _add_integers(
        self, stem: str, there: Sequence[str], inputs: int, outputs: int, group: int
    ) -> None:
        how, name = self.how, f"{stem}.weight"
        if "g_idx" in there and not self._check_order(f"{stem}.g_idx", inputs // group):
            return
        gptq = how.method == "gptq"
        box = Groups(
            how.bits,
            group,
            how.less_one,
            tuple(range(0, 32, how.bits)) if gptq else AWQ_SHIFTS,
            gptq,
            lambda part: self.checkpoint.tensor(f"{stem}.{part}"),
            "g_idx" in there,
        )
        parts = tuple(f"{stem}.{part}" for part in there)
        kind = torch_dtype(self.dtype)
        if self.turns(name):
            self.matrices[name] = Matrix((inputs, outputs), kind, box, parts)
        else:
            self.matrices[name] = Matrix((outputs, inputs), kind, turned(box), parts)

    def _check_order(self, name: str, groups: int) -> bool:
        """Every input is of a group that there is: the one thing that no header tells."""
        order = self.checkpoint.tensor(name)
        odd = ((order < 0) | (order >= groups)).nonzero()
        if len(odd):
            at = int(odd[0])
            file = self.checkpoint.where[name]
            self.problem(
                CorruptCheckpoint,
                f"{name}[{at}] is {int(order[at])}, and there are groups 0..{groups - 1} ({file})",
            )
        return not len(odd)

    # --- eight-bit floats ---

    def _floats(self) -> None:
        scales = ("weight_scale_inv", "weight_scale")
        narrow = [n.removesuffix(".weight") for n, i in self.tensors.items() if i.dtype == _FP8]
        for stem in dict.fromkeys([*narrow, *self._stems(*scales)]):
            there = [f"{stem}.{s}" for s in scales if f"{stem}.{s}" in self.tensors]
            weight = self.tensors.get(f"{stem}.weight")
            if weight is None:
                if there:
                    self.problem(MissingTensors, f"{stem}.weight: missing beside {there[0]}")
                continue  # a narrow tensor of any other name is the plan's to refuse
            if not there:
                named = scales[0] if self.how.block or self.how.method == "fp8" else scales[1]
                self.problem(MissingTensors, f"{stem}.{named}: missing beside {weight.name}")
            elif len(there) > 1:
                self.problem(DuplicateTensor, f"{listing(there)}: scales of one matrix twice")
            elif self._fits(weight, self.tensors[there[0]]):
                self._add_floats(weight, self.tensors[there[0]])
        for name in self.tensors:
            if name.endswith((".input_scale", ".activation_scale")):
                self.needless[name] = "of inputs rounded to eight bits, which they are not here"

    def _fits(self, weight: TensorInfo, scale: TensorInfo) -> bool:
        before = len(self.problems)
        if weight.dtype != _FP8:
            told = f"dtype {weight.dtype} beside {scale.name}, expected {_FP8}"
            self.problem(DtypeMismatch, f"{weight.name}: {told}")
        if scale.dtype not in _SCALES:
            told = f"dtype {scale.dtype}, expected {' or '.join(_SCALES)}"
            self.problem(DtypeMismatch, f"{scale.name}: {told}")
        if len(weight.shape) != 2 or not all(weight.shape):
            told = f"shape {list(weight.shape)}, expected 2 axes"
            self.problem(ShapeMismatch, f"{weight.name}: {told}")
            return False
        rows, columns = weight.shape
        if self.how.block is not None:
            down, across = self.how.block
            fitting: list[tuple[int, ...]] = [(-(-rows // down), -(-columns // across))]
        else:
            fitting = [(), (1,), (1, 1), (rows, 1), (rows,)]
        if scale.shape not in fitting:
            expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(fitting))
            told = f"shape {list(scale.shape)}, expected {expected} of {list(weight.shape)}"
            self.problem(ShapeMismatch, f"{scale.name}: {told}")
        return len(self.problems) == before

    def _add_floats(self, weight: TensorInfo, scale: TensorInfo) -> None:
        rows, columns = weight.shape
        a_row = scale.shape[:1] == (rows,) and scale.shape != (1,)
        block = self.how.block or ((1, columns) if a_row else (rows, columns))
        grid = -(-rows // block[0]), -(-columns // block[1])
        read = self.checkpoint.tensor
        box = Blocks(block, partial(read, weight.name), lambda: read(scale.name).reshape(grid))
        matrix = Matrix((rows, columns), torch_dtype(self.dtype), box, (weight.name, scale.name))
        self.matrices[weight.name] = matrix

    # --- as plain weights ---

    def shown(self) -> Checkpoint:
        """Each matrix stands where the first of its parts stood."""
        name_of = {part: name for name, m in self.matrices.items() for part in m.parts}
        tensors: dict[str, TensorInfo] = {}
        where: dict[str, str] = {}
        for disk, info in self.tensors.items():
            if disk in self.needless:
                continue
            name = name_of.get(disk, disk)
            if name in tensors:
                continue
            if name in self.matrices:
                info = TensorInfo(name, self.matrices[name].shape, self.dtype)
            tensors[name], where[name] = info, self.checkpoint.where[disk]
        readers: dict[str, Reader] = {
            file: _Reader(reader, self._of(file, where), tensors)
            for file, reader in self.checkpoint.readers.items()
        }
        split = {i.name: file for file, held in shard(tensors.values(), SHARD_BYTES) for i in held}
        return replace(
            self.checkpoint,
            tensors=tensors,
            where=where,
            readers=readers,
            outside=dict(self.needless),
            made_of={name: matrix.parts for name, matrix in self.matrices.items()},
            packed=self.how.about,
            split=split,
            biases=frozenset(f"{name.removesuffix('weight')}bias" for name in self.matrices),
        )

    def _of(self, file: str, where: Mapping[str, str]) -> dict[str, Matrix]:
        return {name: m for name, m in self.matrices.items() if where[name] == file}


class _Reader:
    """A file's reader; what its tensors are parts of is made of them."""

    def __init__(
        self, reader: Any, matrices: Mapping[str, Matrix], shown: Mapping[str, TensorInfo]
    ) -> None:
        self._reader, self._matrices = reader, matrices
        self.path, self.metadata = reader.path, reader.metadata
        mine = {*reader.tensors, *matrices}
        self.tensors = {name: info for name, info in shown.items() if name in mine}

    def tensor(self, name: str) -> torch.Tensor:
        if name in self._matrices:
            return self._matrices[name].whole()
        found: torch.Tensor = self._reader.tensor(name)
        return found

    def decoder(self, name: str) -> Callable[[int, int], torch.Tensor] | None:
        return self._matrices[name].numbers if name in self._matrices else None

    def span(self, name: str) -> tuple[int, int] | None:
        if name in self._matrices or not hasattr(self._reader, "span"):
            return None
        found: tuple[int, int] | None = self._reader.span(name)
        return found
