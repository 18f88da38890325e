"""Benchmarks as commands: `tools/bench.py import`, `load`, `moe`, `convert`, `generate`, `info`.

Fresh processes in turn, ratios pair by pair, medians: these survive a machine whose speed drifts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from bench_cases import CASES, ENV, ROOT, SIZED, made, median

MODULES = {"GPT2LMHeadModel": "gpt2", "BertForMaskedLM": "bert", "LlamaForCausalLM": "llama"}

# What one process does, phase by phase: seconds, and MB of anonymous memory that it adds to a bare
# `import torch`. Both sides import the class of the architecture; what else a side imports when
# it loads counts as its load.
PHASES = """
import sys, time
t0 = time.perf_counter()
import torch
def anonymous():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Anonymous:")) / 1024
t1, a1 = time.perf_counter(), anonymous()
{imports}
t2, a2 = time.perf_counter(), anonymous()
{load}
t3, a3 = time.perf_counter(), anonymous()
with torch.no_grad():
    m(torch.tensor([[1, 5, 9, 40, 2, 17, 300, 8]]))
t4, a4 = time.perf_counter(), anonymous()
m = None
t5 = time.perf_counter()
{load}
t6 = time.perf_counter()
import json
print(json.dumps({{"torch": t1 - t0, "import": t2 - t1, "load": t3 - t2, "first": t4 - t3,
                   "again": t6 - t5, "import_mb": a2 - a1, "load_mb": a3 - a2,
                   "first_mb": a4 - a3}}))
"""


def zoo_script(directory: Path, module: str) -> str:
    imports = f"import zoo.models.{module}; from zoo import load"
    return PHASES.format(imports=imports, load=f"m = load({str(directory)!r})")


def reference_script(directory: Path, name: str) -> str:
    load = f'm = {name}.from_pretrained({str(directory)!r}, dtype="auto").eval()'
    return PHASES.format(imports=f"from transformers import {name}", load=load)


def run(script: str) -> dict[str, float]:
    """Run a new process and return the time of its phases and its total wall time."""
    started = time.perf_counter()
    out = subprocess.run(
        [sys.executable, "-c", script], env=ENV, capture_output=True, text=True, check=False
    )
    wall = time.perf_counter() - started
    if out.returncode:
        raise SystemExit(out.stderr)
    return {**json.loads(out.stdout), "wall": wall}


def evict(directory: Path) -> None:
    """Drop the weights from the page cache, so that the next read is from disk."""
    os.sync()
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench_load(pairs: int, where: Path, only: str = "") -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    for name in CASES if not only else (only,):
        reference = CASES[SIZED.get(name, (name,))[0]][2]
        directory = made(name, where)
        scripts = zoo_script(directory, MODULES[reference]), reference_script(directory, reference)
        for script in scripts:
            run(script)  # warm up
        for cold in (False, True):
            ours: list[dict[str, float]] = []
            theirs: list[dict[str, float]] = []
            for _ in range(pairs):
                for script, out in zip(scripts, (ours, theirs), strict=True):
                    if cold:
                        evict(directory)
                    out.append(run(script))
            rows.append({"case": name, "cache": "cold" if cold else "warm", **phases(ours, theirs)})
            print_row(rows[-1])
    return rows


STEPS = ("import", "load", "first")


def phases(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, float]:
    """Measure each phase of both sides in ms and MB, and the ratios of the totals."""

    def library(run: dict[str, float]) -> float:
        return sum(run[step] for step in STEPS)

    pairs = list(zip(ours, theirs, strict=True))
    out = {
        "library_ratio": median([library(b) / library(a) for a, b in pairs]),
        "process_ratio": median([b["wall"] / a["wall"] for a, b in pairs]),
    }
    for side, runs in (("zoo", ours), ("reference", theirs)):
        for step in (*STEPS, "again"):
            out[f"{side}_{step}_ms"] = 1e3 * median([each[step] for each in runs])
        for step in STEPS:
            out[f"{side}_{step}_mb"] = median([each[f"{step}_mb"] for each in runs])
    return out


def print_row(row: dict[str, float | str]) -> None:
    """Print two lines for each case, one for each side."""
    ratios = f"library {row['library_ratio']:.1f}x, process {row['process_ratio']:.1f}x faster"
    print(f"{row['case']}, {row['cache']} cache: {ratios}")
    for side in ("zoo", "reference"):
        cells = [
            f"{step} {row[f'{side}_{step}_ms']:8.1f} ms {row[f'{side}_{step}_mb']:7.1f} MB"
            for step in STEPS
        ]
        again = f"load again {row[f'{side}_again_ms']:.1f} ms"
        print(f"  {side:<11}{' | '.join((*cells, again))}", flush=True)


def bench_moe(rounds: int) -> dict[str, float]:
    """Milliseconds a token through one layer: experts used down, experts that exist across.

    Each size in turn, medians; only what a token goes through should cost it.
    """
    sys.path.insert(0, str(ROOT))
    import torch

    from zoo.components.activations import ACTIVATIONS
    from zoo.components.moe import Experts

    dim, hidden, tokens = 512, 1792, 8
    x = torch.randn(1, tokens, dim)
    layers = {}
    for experts in (4, 8, 16, 32, 64):
        for chosen in (1, 2, 4):
            silu = ACTIVATIONS["silu"]
            layer = Experts(dim, hidden, silu, experts=experts, experts_per_token=chosen)
            layer.router.weight.data.normal_()
            layer.draw(0.02)
            layers[experts, chosen] = layer
    times: dict[tuple[int, int], list[float]] = {size: [] for size in layers}
    with torch.no_grad():
        for k in range(rounds + 1):
            for size, layer in layers.items():
                started = time.perf_counter()
                for token in x.split(1, dim=1):
                    layer(token)
                if k:
                    times[size].append(1e3 * (time.perf_counter() - started) / tokens)
    figures = {size: median(values) for size, values in times.items()}
    print("ms a token  " + "".join(f"{n:>9} exist" for n in (4, 8, 16, 32, 64)))
    for chosen in (1, 2, 4):
        row = "".join(f"{figures[n, chosen]:>15.3f}" for n in (4, 8, 16, 32, 64))
        print(f"{chosen} used      {row}")
    return {f"{experts} exist, {chosen} used": ms for (experts, chosen), ms in figures.items()}


# How it is converted, and of which cases, about 0.5, 2.2 and 6.9 GB.
LLAMAS = ("llama-0.3b-bf16", "llama-1.1b-bf16", "llama-3.4b-bf16")
CONVERSIONS = {
    "names change": (("bert-base-fp32", *LLAMAS[1:]), {}, {"sha256": False}),
    "names change, sha256": (("bert-base-fp32", *LLAMAS[1:]), {}, {"sha256": True}),
    "turned": (("gpt2-124m-fp32", "gpt2-0.5b-fp32", "gpt2-1.7b-fp32"), {}, {"sha256": False}),
    "bf16 to fp32": (LLAMAS, {"dtype": "float32"}, {"sha256": False}),
}

# `cp`, `dd` of as many zeros and the engine in one process once all is planned, in an order drawn
# anew each round: whoever comes behind a large file's removal pays for it. Memory in a run apart.
CONVERT = """
import json, os, random, shutil, subprocess, sys, threading, time
from pathlib import Path
from converters.writer import WriteOptions, run
from converters.staging.stage import Stage
from zoo.saving.convert import plan_output
from zoo.checkpoints.locate import locate
source, changes, options, rounds, durable = json.loads(sys.argv[1])
source = Path(source)
output = plan_output(locate(source, mmap=False), "native", **changes)
files = sorted(source.glob("*.safetensors"))
place = source.parent / "convert"
class Journal:
    def append(self, entry):
        pass
def anonymous():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Anonymous:")) / 1024
def called(*words):
    subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
    if durable:
        called_sync = ["sync", "-d", *map(str, place.iterdir())]
        subprocess.run(called_sync, check=True)
def cp():
    for n in range(round(output.size / sum(f.stat().st_size for f in files))):
        called("cp", *map(str, files), str(place))
def dd():
    called("dd", "if=/dev/zero", f"of={place}/zeros", "bs=1M", f"count={output.size >> 20}")
def zoo():
    run(output, Stage(place, Journal(), []), WriteOptions(**options))
def timed(work):
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
if not durable:
    os.fsync = lambda fd: None
times = {way.__name__: [] for way in (cp, dd, zoo)}
for n in range(rounds + 1):
    for way in random.sample((cp, dd, zoo), 3):
        took = timed(way)
        if n:
            times[way.__name__].append(took)
before, peak, over = anonymous(), [0.0], threading.Event()
def watch():
    while not over.wait(0.02):
        peak[0] = max(peak[0], anonymous() - before)
watcher = threading.Thread(target=watch)
watcher.start()
timed(zoo)
over.set()
watcher.join()
shutil.rmtree(place)
print(json.dumps({"times": times, "bytes": output.size, "anonymous": peak[0]}))
"""


def bench_convert(rounds: int, where: Path, only: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    print(f"{'':46} {'cp / zoo':>9} {'best':>6} {'dd / zoo':>9} {'best':>6}", end="")
    print(f" {'zoo':>10} {'cp':>10} {'dd':>10} {'anonymous':>10}")
    for name, (cases, changes, options) in CONVERSIONS.items():
        for case in cases:
            for durable in (False, True):
                label = f"{name}, {case}{', fsync' if durable else ''}"
                if only not in label:
                    continue
                row = converted([str(made(case, where)), changes, options, rounds, durable])
                rows.append({"case": label, **row})
                print(f"{label:46}", end="")
                for than in ("cp", "dd"):
                    print(
                        f" {row[than + ' / zoo']:8.2f}x {row[than + ' / zoo best']:5.2f}x", end=""
                    )
                print("".join(f" {row[who]:5.2f} GB/s" for who in ("zoo", "cp", "dd")), end="")
                print(f" {row['anonymous']:7.0f} MB", flush=True)
    return rows


def converted(options: list[object]) -> dict[str, float]:
    """Return the median of the paired ratios, the ratio of the best runs, and the rates."""
    command = [sys.executable, "-c", CONVERT, json.dumps(options)]
    out = subprocess.run(command, env=ENV, capture_output=True, text=True, check=False)
    if out.returncode:
        raise SystemExit(out.stderr)
    result = json.loads(out.stdout.splitlines()[-1])
    times, size = result["times"], result["bytes"] / 1e9
    row = {"gigabytes": size, "anonymous": result["anonymous"]}
    for who in times:
        row[who] = size / median(times[who])
    for than in ("cp", "dd"):
        row[f"{than} / zoo"] = median(
            [a / b for a, b in zip(times[than], times["zoo"], strict=True)]
        )
        row[f"{than} / zoo best"] = min(times[than]) / min(times["zoo"])
    return row


# What is run, of which checkpoint, in which dtype; a reference class for the same.
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["import", "load", "moe", "convert", "generate", "info"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--dir", type=Path, default=ROOT / ".bench", help="directory of the checkpoints"
    )
    parser.add_argument("--against", type=Path, help="import: another checkout to compare with")
    parser.add_argument("--only", default="", help="run only cases whose label contains this")
    parser.add_argument(
        "--section", action="append", help="section of generate: decode, prefill, …"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    figures: dict[str, object] = {}
    if args.what == "moe":
        figures["moe"] = bench_moe(10 * args.pairs)
    elif args.what == "convert":
        args.dir.mkdir(parents=True, exist_ok=True)
        figures["convert"] = bench_convert(args.pairs, args.dir, args.only)
    elif args.what == "import":
        import bench_import

        figures["import"] = bench_import.run(
            4 * args.pairs + 1, args.dir / "import", ENV, args.against
        )
    elif args.what == "info":
        import bench_info

        figures["info"] = bench_info.run(args.pairs, args.dir / "info", args.only, ENV)
    elif args.what == "generate":
        args.dir.mkdir(parents=True, exist_ok=True)
        import bench_generate

        figures["generate"] = bench_generate.run(
            args.pairs, args.dir, args.only, args.section or list(bench_generate.SECTIONS)
        )
    else:
        args.dir.mkdir(parents=True, exist_ok=True)
        if args.only and args.only not in (*CASES, *SIZED):
            parser.error(f"--only {args.only}: load has {', '.join((*CASES, *SIZED))}")
        figures["load"] = bench_load(args.pairs, args.dir, args.only)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
