"""Kernels in C for products of a few rows, where torch's own reach half the memory bandwidth.

They are compiled once a process; on a machine without a C compiler, torch's kernels are used.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from ctypes import c_float, c_int, c_long, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.components.masks import Mask

WIDE = 64  # outputs of a block, as in kernels.c
_SOURCE = Path(__file__).with_name("kernels.c")
_DTYPES = (torch.float32, torch.bfloat16)
_STEPS = c_long * 3
_ROWS = [c_long] * 3 + [c_int]
_ARGUMENTS: dict[str, list[Any]] = {
    "zoo_blocks": [c_void_p, c_int, c_void_p, c_int, c_void_p, c_void_p, c_int, c_long, *_ROWS],
    "zoo_bytes": [c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_int, *_ROWS],
    "zoo_scores": [*[c_void_p] * 3, c_int, *[c_long] * 5, _STEPS, c_float, c_int],
    "zoo_norm": [*[c_void_p] * 3, c_int, c_long, c_long, c_float, c_float],
    "zoo_turn": [*[c_void_p] * 4, c_int, *[c_long] * 4, _STEPS, c_long],
    "zoo_mix": [*[c_void_p] * 3, c_int, *[c_long] * 5, _STEPS, c_int],
}


@cache
def library() -> Any:
    """The kernels compiled for this machine; None if there is no compiler."""
    setting = os.environ.get("CC", "").split()
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if not setting and compiler is None:
        return None
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    try:  # also without kernels: a machine where no temporary directory can be written
        with tempfile.TemporaryDirectory(prefix="zoo-kernels-") as directory:
            out = os.path.join(directory, "kernels.so")
            command = [*(setting or [str(compiler)]), *flags, "-o", out, os.fspath(_SOURCE)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            handle = ctypes.CDLL(out)
    except (OSError, subprocess.SubprocessError):
        return None
    for name, arguments in _ARGUMENTS.items():
        getattr(handle, name).argtypes = arguments
        getattr(handle, name).restype = c_int
    return handle


def usable(x: Tensor) -> bool:
    """Whether the kernels take an input like this one."""
    fits = x.dtype in _DTYPES and x.device.type == "cpu"
    return fits and not torch.compiler.is_compiling() and library() is not None


class WeightBlocks:
    """A weight (o, i) in oneDNN's layout: blocks of 64 outputs, in each input after input."""

    def __init__(self, packed: Tensor, bias: Tensor | None, outputs: int, deep: int) -> None:
        self.packed, self.outputs, self.deep = packed, outputs, deep
        self.bias = None if bias is None else bias.float()
        self.half = int(packed.dtype == torch.bfloat16)
        # the address is valid as long as `packed` is alive
        self.start = torch.ops.mkldnn.data_ptr(packed)
        _in_large_pages(self.start, torch.ops.mkldnn._nbytes(packed))

    @classmethod
    def of(cls, packed: Tensor, weight: Tensor, bias: Tensor | None) -> WeightBlocks | None:
        """The blocks, or None if oneDNN chose another layout, as it may for some CPU or shape."""
        if library() is None or weight.dtype not in _DTYPES:
            return None
        outputs, inputs = weight.shape
        size, pair = weight.element_size(), 4 // weight.element_size()
        count, nbytes = -(-outputs // WIDE), torch.ops.mkldnn._nbytes(packed)
        deep, rest = divmod(nbytes, count * WIDE * size)
        if rest or deep % pair or deep < inputs:
            return None
        result = cls(packed, bias, outputs, deep)
        memory = (ctypes.c_char * nbytes).from_address(result.start)
        blocks = torch.frombuffer(memory, dtype=weight.dtype).view(count, deep // pair, WIDE, pair)

        def agree(b: int) -> bool:
            rows = weight[b * WIDE : (b + 1) * WIDE]
            rows = F.pad(rows, (0, deep - inputs, 0, WIDE - len(rows)))
            return torch.equal(blocks[b], rows.view(WIDE, -1, pair).transpose(0, 1))

        some = {0, count // 2, count - 1}
        plain = all((rows := blocks[b]).eq(rows.flatten()[0]).all() for b in some)
        return result if all(map(agree, range(count) if plain else some)) else None

    def product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., o) from (..., i), summed in fp32 and rounded once."""
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.outputs), dtype=dtype)
        inputs = x.shape[-1]
        ok = library().zoo_blocks(
            self.start,
            self.half,
            x.data_ptr(),
            x.dtype == torch.bfloat16,
            None if self.bias is None else self.bias.data_ptr(),
            y.data_ptr(),
            dtype == torch.bfloat16,
            x.numel() // inputs,
            self.outputs,
            inputs,
            self.deep,
            torch.get_num_threads(),
        )
        return _checked(ok, y)


_LARGE, _COLLAPSE = 2 << 20, 25  # bytes of a large page; MADV_COLLAPSE, of Linux 6.1


def _in_large_pages(start: int, size: int) -> None:
    """Ask Linux for large pages: 5% faster if it has them, and harmless if not."""
    first, end = -(-start // _LARGE) * _LARGE, (start + size) // _LARGE * _LARGE
    if sys.platform == "linux" and first < end:
        ctypes.CDLL(None).madvise(c_void_p(first), ctypes.c_size_t(end - first), _COLLAPSE)


def bytes_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor | None:
    """(..., o) from (..., i) and int8 (o, i); scale and bias are fp32. None if x is not finite."""
    x = x.contiguous()
    outputs, inputs = weight.shape
    y = x.new_empty((*x.shape[:-1], outputs))
    half = x.dtype == torch.bfloat16
    ok = library().zoo_bytes(
        weight.data_ptr(),
        scale.data_ptr(),
        x.data_ptr(),
        half,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        half,
        x.numel() // inputs,
        outputs,
        inputs,
        torch.get_num_threads(),
    )
    return y if ok else None


def attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """`attend` for queries (b, h, 1, e); keys and values are read once, without a copy."""
    (b, h, _, e), (_, g, t, _) = q.shape, k.shape
    half, threads = q.dtype == torch.bfloat16, torch.get_num_threads()
    q = q.contiguous()
    scores = q.new_empty((b, h, 1, t), dtype=torch.float32)
    sizes = (half, b, g, h // g, t, e)
    ok = library().zoo_scores(
        q.data_ptr(), k.data_ptr(), scores.data_ptr(), *sizes, _steps(k), scale, threads
    )
    if mask.allowed is not None:
        scores.masked_fill_(~mask.allowed, -torch.inf)
    weights, y = _checked(ok, scores).softmax(dim=-1), torch.empty_like(q)
    sizes = (half, b, g, h // g, t, v.shape[-1])
    ok = library().zoo_mix(
        weights.data_ptr(), v.data_ptr(), y.data_ptr(), *sizes, _steps(v), threads
    )
    return _checked(ok, y)


def norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """RMS norm of (..., d), scaled by `offset + weight`."""
    x = x.contiguous()
    y, half, rows = torch.empty_like(x), x.dtype == torch.bfloat16, x.numel() // x.shape[-1]
    sizes = (half, rows, x.shape[-1])
    library().zoo_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), *sizes, eps, offset)
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (b, h, 1, e) by (b, 1, 1, e/2), or by one row for all."""
    b, h, _, e = x.shape
    y, half = x.new_empty((b, h, 1, e)), x.dtype == torch.bfloat16
    row = cos.shape[-1] if len(cos) > 1 else 0
    sizes = (half, b, h, e, 2 * cos.shape[-1], _steps(x), row)
    library().zoo_turn(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), *sizes)
    return y


def _steps(x: Tensor) -> Any:
    return _STEPS(*x.stride()[:3])


def _checked(ok: int, y: Tensor) -> Tensor:
    if not ok:
        raise MemoryError("no memory for the rows of a product")
    return y
