"""Damaged inputs by the hundred thousand: `python tools/fuzz.py [--only KIND] [--count N]`.

Of each kind of input (fuzzed.py, fuzzed_models.py) small sound files are damaged at random
(damage.py) and read as users have them read. Whatever comes of it is an answer or a ZooError,
within a second of the processor's time, and with no more memory over what the process held than 64
MB and the files. What is found otherwise is printed with the command that repeats it.

Memory is the height that the kernel saw this process reach during the one mutant (VmHWM, set back
before each); and what asks for more addresses than that is refused by the kernel (RLIMIT_AS).
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # each process has one processor
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fuzzed  # noqa: E402
import fuzzed_models as models  # noqa: E402

from zoo.errors import ZooError  # noqa: E402

# what is asked for: what it is, and what makes its mutants
VICTIMS: dict[str, tuple[str, Callable[[Path], fuzzed.Kind]]] = {
    "header": ("safetensors: headers", fuzzed.Header),
    "index": ("safetensors: index and shards", fuzzed.Index),
    "config": ("config.json of each architecture", models.Configs),
    "hf": ("safetensors + config.json, loaded", models.Hub),
    "bin": ("pytorch_model.bin, loaded", models.Bin),
    "meta": ("consolidated.NN.pth + params.json, loaded", models.Meta),
    "tf": ("TensorFlow: index, data, snappy", fuzzed.Bundle),
    "tf-models": ("TensorFlow + hparams/bert_config.json, loaded", models.TensorFlow),
    "trainers": ("nanoGPT, minGPT, books: loaded", models.Trainers),
    "llama2c": ("llama2.c v0, v1, v2: loaded", models.Llama2c),
    "tokenizer.bin": ("llama2.c: tokenizer.bin", fuzzed.TokenizerBin),
    "gguf": ("GGUF: header, tensors of all kinds", fuzzed.Gguf),
    "gguf-models": ("GGUF, loaded", models.GgufModels),
    "gguf-words": ("GGUF: vocabularies", fuzzed.GgufVocabularies),
    "gptq": ("GPTQ, loaded", partial(models.Quantized, sections=models.GPTQ)),
    "awq": ("AWQ, loaded", partial(models.Quantized, sections=models.AWQ)),
    "fp8": ("FP8, loaded", partial(models.Quantized, sections=models.FP8)),
    "sentencepiece": ("tokenizer.model", fuzzed.SentencePiece),
}

COUNT = 100_000
TIMES = {"header": 10}  # that a kind is drawn more often, being cheap
SLICE = 1000  # mutants that a process takes at a time
SLOW = 1.0  # seconds of the processor's
HUNG, DEAD = 5.0, 20.0  # when Python is interrupted, and when the process is ended
LARGE = 64 << 20  # bytes
ROOM = LARGE + (64 << 20)  # of addresses: files are mapped, and allocators take more than they use


@dataclass
class Tally:
    """The results of some mutants of a kind."""

    kind: str
    mutants: int = 0
    refused: int = 0
    accepted: int = 0
    slowest: float = 0.0
    most: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.mutants += other.mutants
        self.refused += other.refused
        self.accepted += other.accepted
        self.slowest, self.most = max(self.slowest, other.slowest), max(self.most, other.most)
        self.seconds += other.seconds
        self.faults += other.faults


class Hung(BaseException):
    """A mutant took so long that it was interrupted."""


def _interrupt(*_: Any) -> None:
    raise Hung


class Memory:
    """The memory of this process, and its peak since the last call."""

    def __init__(self) -> None:
        try:
            self._reset = os.open("/proc/self/clear_refs", os.O_WRONLY)
            self._status = os.open("/proc/self/status", os.O_RDONLY)
        except OSError:  # no Linux: then only the height of all that was, which never sinks
            self._reset = self._status = -1

    def now(self) -> int:
        if self._reset >= 0:
            os.pwrite(self._reset, b"5", 0)
        return self._bytes_of(b"VmRSS:")

    def height(self) -> int:
        return self._bytes_of(b"VmHWM:")

    def _bytes_of(self, name: bytes) -> int:
        if self._status < 0:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        text = os.pread(self._status, 4096, 0)
        return int(text[text.index(name) + len(name) :].split(maxsplit=1)[0]) << 10

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Limit the memory, so that a much larger allocation raises MemoryError."""
        before = resource.getrlimit(resource.RLIMIT_AS)
        if self._status >= 0:
            resource.setrlimit(resource.RLIMIT_AS, (self._bytes_of(b"VmSize:") + ROOM, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)


_memory = cache(Memory)  # of the process that asks


def run(
    victim: fuzzed.Kind, kind: str, seed: int, start: int, count: int, slow: float = SLOW
) -> Tally:
    """Run mutants `start` to `start + count` of a kind; they are the same each time."""
    tally, memory = Tally(kind, count), _memory()
    signal.signal(signal.SIGPROF, _interrupt)
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    began = time.process_time()
    with memory.limited():
        for n in range(start, start + count):
            resident, started = memory.now(), time.process_time()
            signal.setitimer(signal.ITIMER_PROF, HUNG)
            signal.setitimer(signal.ITIMER_VIRTUAL, DEAD)
            problem = ""
            try:
                victim(random.Random(f"{kind} {seed} {n}"))
                tally.accepted += 1
            except ZooError:
                tally.refused += 1
            except (Exception, Hung) as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                problem = f"{type(error).__name__}: {str(error)[:120]} ({where})"
            signal.setitimer(signal.ITIMER_PROF, 0)
            took, grown = time.process_time() - started, memory.height() - resident
            tally.slowest, tally.most = max(tally.slowest, took), max(tally.most, grown)
            problem = problem or (f"took {took:.1f} s" if took > slow else "")
            problem = problem or (f"took {grown >> 20} MB" if grown > LARGE + victim.size else "")
            if problem:
                again = f"--only {kind} --seed {seed} --start {n} --count 1"
                tally.faults.append(f"{problem}\n    python tools/fuzz.py {again}")
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    tally.seconds = time.process_time() - began
    return tally


_VICTIMS: dict[str, fuzzed.Kind] = {}  # of this process, whose files are its own


def _run(scratch: str, kind: str, seed: int, start: int, count: int, slow: float) -> Tally:
    if kind not in _VICTIMS:
        place = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=scratch))
        _VICTIMS[kind] = VICTIMS[kind][1](place)
        run(_VICTIMS[kind], kind, seed, start, min(count, 20))  # imports are nobody's memory
    return run(_VICTIMS[kind], kind, seed, start, count, slow)


def run_all(options: argparse.Namespace, scratch: str) -> Iterator[Tally]:
    """Yield the tally of each kind as soon as all its mutants are done."""
    with ProcessPoolExecutor(options.jobs, get_context("fork")) as pool:
        for kind in [options.only] if options.only else VICTIMS:
            slices: dict[Future[Tally], int] = {}
            end = options.start + options.count * (1 if options.only else TIMES.get(kind, 1))
            for start in range(options.start, end, SLICE):
                count = min(SLICE, end - start)
                about = (kind, options.seed, start, count, options.slow)
                slices[pool.submit(_run, scratch, *about)] = start
            tally = Tally(kind)
            for done in as_completed(slices):
                try:
                    tally.add(done.result())
                except BrokenProcessPool:
                    where = f"one of {SLICE} from --start {slices[done]}, and maybe of others"
                    tally.faults.append(f"{kind}: the process died of {where}")
                    yield tally
                    return
            yield tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=VICTIMS, help="test one kind of input (default: all)")
    parser.add_argument(
        "--count", type=int, default=COUNT, help=f"mutants of each kind (default: {COUNT:,})"
    )
    parser.add_argument(
        "--start", type=int, default=0, help="number of the first mutant (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--slow", type=float, default=SLOW, help="seconds that count as a fault (default: 1)"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes (default: one per CPU)"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    faults: list[str] = []
    heads = ("mutants", "refused", "accepted", "slowest", "most memory", "time")
    print(f"{'':50}" + "".join(f"{head:>13}" for head in heads))
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a disk takes most of the time
    with tempfile.TemporaryDirectory(prefix="zoo-fuzz-", dir=memory) as scratch:
        for tally in run_all(options, scratch):
            numbers = (tally.mutants, tally.refused, tally.accepted)
            counts = "".join(f"{n:>13,}" for n in numbers)
            measured = f"{tally.slowest:>11.3f} s{tally.most / 2**20:>10.1f} MB"
            about = f"{tally.kind}: {VICTIMS[tally.kind][0]}"
            print(f"{about:50}{counts}{measured}{tally.seconds:>11.0f} s", flush=True)
            faults += tally.faults
    for problem, times in Counter(fault.partition("\n")[0] for fault in faults).most_common(50):
        first = next(fault for fault in faults if fault.partition("\n")[0] == problem)
        print(f"{times} x {first}")
    print(f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
