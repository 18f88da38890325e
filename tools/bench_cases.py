"""The checkpoints that benchmarks run on, and what all of them share."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CASES = {  # registry name, dtype, reference class
    "gpt2-124m-fp32": ("gpt2", "float32", "GPT2LMHeadModel"),
    "bert-base-fp32": ("bert-base-uncased", "float32", "BertForMaskedLM"),
    "llama-1.1b-bf16": ("tinyllama-1.1b", "bfloat16", "LlamaForCausalLM"),
}
SIZED = {  # a case above with other layers
    "gpt2-2-layers-fp32": ("gpt2-124m-fp32", 2),
    "gpt2-0.5b-fp32": ("gpt2-124m-fp32", 72),
    "gpt2-1.7b-fp32": ("gpt2-124m-fp32", 237),
    "llama-0.3b-bf16": ("llama-1.1b-bf16", 3),
    "llama-3.4b-bf16": ("llama-1.1b-bf16", 75),
}
SHARD = 1_200_000_000
# Bytecode is cached as on a user's machine, whatever this shell says; threads do not spin.
ENV = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
    "PYTHONPATH": str(ROOT),
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
}


def made(name: str, where: Path) -> Path:
    """The checkpoint of a case: random weights in the published layout, made once and kept."""
    like, layers = SIZED.get(name, (name, None))
    checkpoint, dtype, _ = CASES[like]
    config = {"layers": layers} if layers else None
    directory = where / name
    if not directory.is_dir():
        print(f"making {directory} …", file=sys.stderr)
        code = (
            f"import zoo; m = zoo.load({checkpoint!r}, weights='random', dtype={dtype!r}, "
            f"config={config}); zoo.save(m, {str(directory)!r}, max_shard_size={SHARD})"
        )
        subprocess.run([sys.executable, "-c", code], check=True, env=ENV)
    return directory


def median(values: list[float]) -> float:
    return statistics.median(values)
