"""`bench.py import`: what importing zoo, the first load of a process and `zoo list` take.

Processor time of fresh processes, on checkpoints so small that reading them takes next to none.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench_cases import ROOT, median
from bench_info import timed

SIZES = {"layers": 2, "dim": 32, "heads": 4, "hidden": 48, "vocab": 101, "positions": 64}
LLAMA = {**SIZES, "kv_heads": 2}
CHECKPOINTS = {"gpt2": SIZES, "tinyllama-1.1b": LLAMA}

# torch is imported before the clock starts, with one thread, since both sides need it
LOAD = """
import resource, torch
torch.set_num_threads(1)
def busy():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
before = busy()
import zoo
zoo.load({place!r})
print(busy() - before)
"""
IMPORTS = {
    "torch": "import torch",
    "class": "import zoo; zoo.models.llama.Model",
    "loader": "import zoo; zoo.models.llama.Model; zoo.load",
}


def make(where: Path, env: dict[str, str]) -> dict[str, Path]:
    """Name of a case -> a tiny checkpoint in the published layout, made once and kept."""
    places = {name: where / name for name in CHECKPOINTS}
    for name, place in places.items():
        if not place.is_dir():
            code = (
                f"import zoo; m = zoo.load({name!r}, weights='random', "
                f"config={CHECKPOINTS[name]}); zoo.save(m, {str(place)!r})"
            )
            subprocess.run([sys.executable, "-c", code], check=True, env=env)
    return places


def run(
    rounds: int, where: Path, env: dict[str, str], against: Path | None = None
) -> dict[str, object]:
    """Measure this checkout, and `against`, another one, in turn with it; print medians."""
    env = {**env, "PYTHONSAFEPATH": "1"}  # no zoo of the current directory
    sides = {"this": ROOT} | ({"against": against.resolve()} if against else {})
    cases: dict[str, list[str]] = {
        "python alone": ["-c", "pass"],
        "import zoo": ["-c", "import zoo"],
        "zoo list": ["-m", "zoo", "list"],
    }
    loads = {f"first load, {name}": place for name, place in make(where, env).items()}
    cases |= {case: ["-c", LOAD.format(place=str(place))] for case, place in loads.items()}
    times: dict[tuple[str, str], list[float]] = {(c, s): [] for c in cases for s in sides}
    for n in range(rounds + 1):
        for case, command in cases.items():
            for side, root in sides.items():
                took = busy([sys.executable, *command], {**env, "PYTHONPATH": str(root)}, case)
                if n:
                    times[case, side].append(1e3 * took)
    rows: dict[str, object] = {}
    for case in cases:
        row = {side: median(times[case, side]) for side in sides}
        shown = [f"{side} {ms:7.1f} ms" for side, ms in row.items()]
        if against:
            pairs = zip(times[case, "this"], times[case, "against"], strict=True)
            row["more"] = median([this - other for this, other in pairs])
            shown.append(f"more {row['more']:+7.1f} ms")
        rows[case] = row
        print(f"{case:28}{'  '.join(shown)}", flush=True)
    return {"rounds": rounds, "processor_ms": rows, "relative_to_torch": ratios(rounds, env)}


def busy(command: list[str], env: dict[str, str], case: str) -> float:
    """Seconds of processor time: of a load, beside torch; else of the whole process."""
    if not case.startswith("first load"):
        return timed(command, env)[1]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if out.returncode:
        raise SystemExit(out.stderr)
    return float(out.stdout)


def ratios(rounds: int, env: dict[str, str]) -> dict[str, float]:
    """Wall time of `import zoo` with a model class, and with the loader, by `import torch`'s."""
    walls: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for n in range(rounds + 1):
        for name, script in IMPORTS.items():
            took = timed([sys.executable, "-c", script], env)[0]
            if n:
                walls[name].append(took)
    pairs = {
        name: median([a / b for a, b in zip(walls[name], walls["torch"], strict=True)])
        for name in ("class", "loader")
    }
    print(
        f"import zoo / import torch: {pairs['class']:.3f} with a model's class, "
        f"{pairs['loader']:.3f} with zoo.load too",
        flush=True,
    )
    return pairs
