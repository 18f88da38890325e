"""`bench.py info`: what `zoo info` takes of 70 billion parameters, in files without their numbers.

Headers, zips' directories and pickles are those of such files; between them the files are holes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from converters.formats import Layout

ROOT = Path(__file__).resolve().parent.parent
MODEL = "llama2-70b"
FILES = 15  # as it was published


def make(where: Path) -> dict[str, Path]:
    """Name of a case -> its files, made once and kept."""
    sys.path.insert(0, str(ROOT))
    from converters.checkpoint import shard
    from converters.formats import safetensors, torch_zip
    from converters.plan import target_names
    from zoo.checkpoints.build import native_of
    from zoo.checkpoints.locate import locate, skeleton
    from zoo.saving.convert import plan_output

    where.mkdir(parents=True, exist_ok=True)
    cases = {
        "HF safetensors, 15 files": where / "hf",
        "HF pytorch_model.bin, 15 files": where / "bin",
        "Meta consolidated, 8 files": where / "meta",
        "GGUF, 1 file": where / "gguf",
        "native, 1 file": where / "native",
    }
    if all(place.is_dir() for place in cases.values()):
        return cases
    print(f"making {where}: holes, and next to no bytes …", file=sys.stderr)
    model = skeleton(MODEL)
    located = locate(MODEL, weights=False)
    fields = {**model.config.to_dict(), "shards": 1}
    names = target_names(located.spec, "hf", fields, native_of(model), bare=False)
    infos = [info._replace(dtype="BF16") for info in names.values()]
    split = shard(infos, sum(info.nbytes for info in infos) // FILES + (1 << 29))
    for kind, (stem, suffix) in {
        "hf": ("model", "safetensors"),
        "bin": ("pytorch_model", "bin"),
    }.items():
        place, index = where / kind, dict[str, str]()
        place.mkdir(exist_ok=True)
        for n, (_, members) in enumerate(split, 1):
            name = f"{stem}-{n:05}-of-{len(split):05}.{suffix}"
            index |= {info.name: name for info in members}
            layout = (
                safetensors.lay_out(members, {"format": "pt"}, name)
                if kind == "hf"
                else torch_zip.lay_out(members, {info.name: info.name for info in members})
            )
            hollow(place / name, layout)
        text = json.dumps({"metadata": {}, "weight_map": index})
        (place / f"{stem}.{suffix}.index.json").write_text(text)
        (place / "config.json").write_text(located.config_text)
    for to in ("meta", "gguf", "native"):
        (where / to).mkdir(exist_ok=True)
        cut = {"shards": 8} if to == "meta" else None
        output = plan_output(locate(where / "hf"), to, layout=cut)
        for each in output.shards:
            hollow(where / to / each.name, each.layout)
        for name, data in output.texts.items():
            (where / to / name).write_bytes(data)
    return cases


def hollow(path: Path, layout: Layout) -> None:
    """A file of its full size, of which only what is no tensor is written."""
    with path.open("wb") as file:
        file.write(layout.head)
        file.truncate(len(layout.head) + layout.size)
        for at, data in layout.seal(dict.fromkeys(layout.starts, 0)) if layout.seal else ():
            file.seek(at)
            file.write(data)


def run(rounds: int, where: Path, only: str, env: dict[str, str]) -> list[dict[str, object]]:
    """Fresh processes in turn: the whole wall time, and what the processor was busy for."""
    cases = {name: place for name, place in make(where).items() if only in name}
    commands = {"python alone": [sys.executable, "-c", "pass"]} | {
        name: [sys.executable, "-m", "zoo", "info", str(place)] for name, place in cases.items()
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for n in range(rounds + 1):
        for name, command in commands.items():
            took = timed(command, env)
            if n:
                times[name].append(took)
    rows: list[dict[str, object]] = []
    for name, measured in times.items():
        size = sum(path.stat().st_size for path in cases[name].iterdir()) if name in cases else 0
        walls, busy = zip(*measured, strict=True)
        row = {"case": name, "gigabytes": size / 1e9, "wall": median(walls), "cpu": median(busy)}
        rows.append({**row, "best": min(walls)})
        print(
            f"{name:32}{size / 1e9:8.1f} GB  wall {median(walls):5.2f} s, best {min(walls):5.2f} s"
            f"  processor {median(busy):5.2f} s"
        )
    return rows


def timed(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """(wall, user and system) seconds of a process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if out.returncode:
        raise SystemExit(out.stderr)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
