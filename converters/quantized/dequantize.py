"""Show a checkpoint of GPTQ, AWQ or FP8 as if it held plain weights.

Of `X.qweight`, `X.scales` … one tensor `X.weight` is made, which is decoded when it is used. Specs,
plans and models know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from converters.checkpoint import SHARD_BYTES, Checkpoint, Reader, shard
from converters.formats import TensorInfo, torch_dtype
from converters.lazy import Read
from converters.plan import FLOATS
from converters.quantized.packing import (
    AWQ_SHIFTS,
    UNITS,
    Matrix,
    PackedBlocks,
    PackedGroups,
    transposed,
)
from converters.quantized.settings import FIELD, Quantization
from converters.spec import Dialect
from zoo.errors import (
    CorruptCheckpoint,
    DtypeMismatch,
    DuplicateTensor,
    MissingTensors,
    ShapeMismatch,
    ZooError,
    listing,
)

if TYPE_CHECKING:
    import torch

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FP8, _SCALES = "F8_E4M3", ("F32", "BF16", "F16", "F8_E8M0")
_ENDS = ("_scale_inv", "_scale")  # suffixes of scales, behind the name of the weights
_OF_INPUTS = (".input_scale", "activation_scale")
_Grids = dict[tuple[int, ...], tuple[int, int]]
_SHOWN = 20  # problems of a kind that a message lists


def has_inputs_first(dialect: Dialect, disk: str) -> bool:
    """Return whether a matrix in its file has its inputs first.

    The model has them last, `[o i]`; a rule that begins with that axis, `[i o]`, transposes it.
    """
    for rule in (*dialect.rules, *(r for when in dialect.when for r in when.weights + when.heads)):
        source, target = rule.source.pattern, rule.targets[0].pattern
        if source is None or target is None:
            continue
        if any(rule.source.name.match(n) for n in {disk, disk.removeprefix(dialect.prefix)}):
            return source.dims[0] == target.dims[-1]
    return False


# --- the tensors ---------------------------------------------------------------------------------


def dequantize_checkpoint(
    checkpoint: Checkpoint,
    how: Quantization,
    inputs_first: Callable[[str], bool],
    dtype: str | None,
) -> Checkpoint:
    """Return the checkpoint with one plain matrix in the place of each group of packed tensors.

    Args:
        checkpoint: The tensors on disk.
        how: The quantization config.
        inputs_first: Returns whether a matrix of this name has its inputs first.
        dtype: The dtype in the config.

    Raises:
        CheckpointError: With all problems; its subclass is that of the gravest.
    """
    groups = _Groups(checkpoint, how, inputs_first, dtype)
    groups.collect()
    groups.raise_problems()
    return groups.checkpoint_of_matrices()


class _Groups:
    def __init__(
        self,
        checkpoint: Checkpoint,
        how: Quantization,
        inputs_first: Callable[[str], bool],
        dtype: str | None,
    ) -> None:
        self.checkpoint, self.how, self.inputs_first = checkpoint, how, inputs_first
        self.tensors = checkpoint.tensors
        self.problems: list[tuple[type[ZooError], str]] = []
        self.matrices: dict[str, Matrix] = {}
        self.unused: dict[str, str] = {}
        self.dtype = self._dtype(dtype)

    def _dtype(self, config_dtype: str | None) -> str:
        """Return the dtype of all other weights, so that the model has one; else the config's."""
        integers = self.how.method in ("gptq", "awq")
        ends = (".scales",) if integers else (*_ENDS, *_OF_INPUTS)
        rest = {i.dtype for n, i in self.tensors.items() if not n.endswith(ends)} & FLOATS
        dtypes = {i.dtype for n, i in self.tensors.items() if n.endswith(ends)} & FLOATS
        if len(rest) == 1:
            (dtype,) = rest
        elif config_dtype:
            dtype = config_dtype
        else:
            dtype = next(iter(dtypes)) if len(dtypes) == 1 else "F32"
        return dtype

    def problem(self, kind: type[ZooError], text: str) -> None:
        self.problems.append((kind, text))

    def raise_problems(self) -> None:
        """Raise one error for all problems, of the gravest class among them."""
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

    def collect(self) -> None:
        """Find the packed matrices and check their parts."""
        collect = self._integers if self.how.method in ("gptq", "awq") else self._floats
        collect()

    def _stems(self, *ends: str) -> list[str]:
        """Return X of every X.end, in the files' order."""
        stems = (n[: -len(e) - 1] for n in self.tensors for e in ends if n.endswith(f".{e}"))
        return list(dict.fromkeys(stems))

    # --- integers in groups ---

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
        """Return (inputs, outputs, inputs of a group), or report what does not fit."""
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
            fault = f"{FIELD}.group_size {group} does not divide {inputs} inputs"
            self.problem(ShapeMismatch, f"{stem}.qweight: {fault}")
            return None
        if outputs % count:
            fault = f"{outputs} outputs, whose zero points fill no whole words of {count}"
            self.problem(ShapeMismatch, f"{stem}.qweight: {fault}")
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
        box = PackedGroups(
            how.bits,
            group,
            how.less_one,
            tuple(range(0, 32, how.bits)) if gptq else AWQ_SHIFTS,
            gptq,
            lambda part, *box: self.checkpoint.lazy(f"{stem}.{part}").matrix(*box),
            "g_idx" in there,
        )
        parts = tuple(f"{stem}.{part}" for part in there)
        kind = torch_dtype(self.dtype)
        if self.inputs_first(name):
            self.matrices[name] = Matrix((inputs, outputs), kind, box, parts)
        else:
            self.matrices[name] = Matrix((outputs, inputs), kind, transposed(box), parts)

    def _check_order(self, name: str, groups: int) -> bool:
        """Check that the group of every input exists: no header shows it."""
        order = self.checkpoint.tensor(name)
        outside = ((order < 0) | (order >= groups)).nonzero()
        if len(outside):
            at = int(outside[0])
            file = self.checkpoint.where[name]
            self.problem(
                CorruptCheckpoint,
                f"{name}[{at}] is {int(order[at])}, and there are groups 0..{groups - 1} ({file})",
            )
        return not len(outside)

    # --- eight-bit floats ---

    def _floats(self) -> None:
        narrow = [name for name, info in self.tensors.items() if info.dtype == _FP8]
        scaled = [self._scaled(name) for name in self.tensors]
        for name in dict.fromkeys([*narrow, *(n for n in scaled if n is not None)]):
            there = [f"{name}{end}" for end in _ENDS if f"{name}{end}" in self.tensors]
            weight = self.tensors.get(name)
            if weight is None:
                self.problem(MissingTensors, f"{name}: missing beside {there[0]}")
            elif not there:
                named = _ENDS[0] if self.how.block or self.how.method == "fp8" else _ENDS[1]
                self.problem(MissingTensors, f"{name}{named}: missing beside {name}")
            elif len(there) > 1:
                self.problem(DuplicateTensor, f"{listing(there)}: scales of one matrix twice")
            elif (grid := self._grid(weight, self.tensors[there[0]])) is not None:
                self._add_floats(weight, self.tensors[there[0]], grid)
        for name in self.tensors:
            if name.endswith(_OF_INPUTS):
                self.unused[name] = "of inputs rounded to eight bits, which they are not here"

    def _scaled(self, name: str) -> str | None:
        """Return what these scales belong to: `X.weight`, or a stack of experts."""
        end = next((end for end in _ENDS if name.endswith(end)), None)
        if end is None or name.endswith(_OF_INPUTS):
            return None
        scaled = name.removesuffix(end)
        return scaled if scaled.endswith(".weight") or scaled in self.tensors else None

    def _grid(self, weight: TensorInfo, scale: TensorInfo) -> tuple[int, int] | None:
        """Return the rows and columns of one scale; None if anything does not fit."""
        before = len(self.problems)
        if weight.dtype != _FP8:
            fault = f"dtype {weight.dtype} beside {scale.name}, expected {_FP8}"
            self.problem(DtypeMismatch, f"{weight.name}: {fault}")
        if scale.dtype not in _SCALES:
            fault = f"dtype {scale.dtype}, expected {' or '.join(_SCALES)}"
            self.problem(DtypeMismatch, f"{scale.name}: {fault}")
        *stack, rows, columns = (1, 1, *weight.shape)[-max(2, len(weight.shape)) :]
        axes = 2 if weight.name.endswith(".weight") else 3
        if len(weight.shape) != axes or not all(weight.shape):
            fault = f"shape {list(weight.shape)}, expected {axes} axes"
            self.problem(ShapeMismatch, f"{weight.name}: {fault}")
            return None
        block_shapes = self._grids(rows, columns, stacked=axes == 3)
        grids = {(*stack, *shape): block for shape, block in block_shapes.items()}
        if scale.shape not in grids:
            expected = " or ".join(str(list(shape)) for shape in grids)
            fault = f"shape {list(scale.shape)}, expected {expected} of {list(weight.shape)}"
            self.problem(ShapeMismatch, f"{scale.name}: {fault}")
        return grids[scale.shape] if len(self.problems) == before else None

    def _grids(self, rows: int, columns: int, *, stacked: bool) -> _Grids:
        """Return shape of the scales -> rows and columns of one of them."""
        if self.how.block is not None:
            down, across = self.how.block
            grids: _Grids = {(-(-rows // down), -(-columns // across)): (down, across)}
            if stacked and down >= rows and rows % 2 == 0:  # two stacked matrices
                grids[2, -(-columns // across)] = rows // 2, across
            return grids
        whole, row = (rows, columns), (1, columns)
        if stacked:
            halves: _Grids = {(2, 1): (rows // 2, columns)} if rows % 2 == 0 else {}
            return {(1, 1): whole, (rows, 1): row, **halves}
        return {(): whole, (1,): whole, (1, 1): whole, (rows, 1): row, (rows,): row}

    def _add_floats(self, weight: TensorInfo, scale: TensorInfo, block: tuple[int, int]) -> None:
        *_, rows, columns = weight.shape
        read, grid = self.checkpoint.tensor, -(-columns // block[1])
        box = PackedBlocks(
            block,
            rows,
            lambda *box: self.checkpoint.lazy(weight.name).matrix(*box),
            lambda: read(scale.name).reshape(-1, grid),
        )
        matrix = Matrix(weight.shape, torch_dtype(self.dtype), box, (weight.name, scale.name))
        self.matrices[weight.name] = matrix

    # --- plain weights ---

    def checkpoint_of_matrices(self) -> Checkpoint:
        """Return the checkpoint; each matrix is at the position of its first part."""
        name_of = {part: name for name, m in self.matrices.items() for part in m.parts}
        tensors: dict[str, TensorInfo] = {}
        where: dict[str, str] = {}
        for disk, info in self.tensors.items():
            if disk in self.unused:
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
        split = {
            i.name: file for file, infos in shard(tensors.values(), SHARD_BYTES) for i in infos
        }
        return replace(
            self.checkpoint,
            tensors=tensors,
            where=where,
            readers=readers,
            outside=dict(self.unused),
            made_of={name: matrix.parts for name, matrix in self.matrices.items()},
            quantized=dict.fromkeys(self.matrices, self.how.about),
            split=split,
            biases=frozenset(f"{name.removesuffix('weight')}bias" for name in self.matrices),
        )

    def _of(self, file: str, where: Mapping[str, str]) -> dict[str, Matrix]:
        return {name: m for name, m in self.matrices.items() if where[name] == file}


class _Reader:
    """A file's reader, with matrices decoded from their parts."""

    def __init__(
        self, reader: Any, matrices: Mapping[str, Matrix], infos: Mapping[str, TensorInfo]
    ) -> None:
        self._reader, self._matrices = reader, matrices
        self.path, self.metadata = reader.path, reader.metadata
        mine = {*reader.tensors, *matrices}
        self.tensors = {name: info for name, info in infos.items() if name in mine}

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, decoded if it is a packed matrix."""
        if name in self._matrices:
            return self._matrices[name].whole()
        tensor: torch.Tensor = self._reader.tensor(name)
        return tensor

    def decoder(self, name: str) -> Read | None:
        """Return what reads or decodes a box of a tensor."""
        if name in self._matrices:
            return self._matrices[name].box
        read: Read | None = self._reader.decoder(name)
        return read

    def span(self, name: str) -> tuple[int, int] | None:
        """Return where a tensor's bytes are; None if it is decoded."""
        if name in self._matrices or not hasattr(self._reader, "span"):
            return None
        span: tuple[int, int] | None = self._reader.span(name)
        return span
