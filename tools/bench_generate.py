"""Decoding, prefill, batches, long contexts, training, and a shell's first token.

All ways in turn in one process, turn by turn; ratios pair by pair to the reference, medians.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_cases import CASES, ENV, ROOT, made, median

sys.path.insert(0, str(ROOT))

import zoo
from zoo.components.cache import Cache
from zoo.prepared.last_only import last_only

Ways = dict[str, Iterator[float]]  # who -> seconds of a turn, for ever
RUNS = {  # label: checkpoint, dtype, tokens of a long prompt
    "gpt2-124m fp32": ("gpt2-124m-fp32", "float32", 1024),
    "gpt2-124m bf16": ("gpt2-124m-fp32", "bfloat16", 1024),
    "llama-1.1b bf16": ("llama-1.1b-bf16", "bfloat16", 512),
}
PROMPT, NEW = 128, 64


@dataclass
class Case:
    """One checkpoint in one dtype; models are made when they are first asked for."""

    directory: Path
    dtype: str
    reference: str
    length: int

    def __post_init__(self) -> None:
        self._made: dict[str, Any] = {}

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            before, started = anonymous(), time.perf_counter()
            self._made[name] = make()
            took, size = time.perf_counter() - started, anonymous() - before
            print(f"  {name}: {took:.2f} s, {size:.0f} MB anonymous", flush=True)
        return self._made[name]

    @property
    def theirs(self) -> Any:
        import transformers

        load = getattr(transformers, self.reference).from_pretrained
        return self._once("reference", lambda: load(self.directory, dtype=self.dtype).eval())

    @property
    def clean(self) -> Any:
        return self._once("clean", lambda: zoo.load(self.directory, dtype=self.dtype))

    @property
    def prepared(self) -> Any:
        return self._once(
            "prepared", lambda: zoo.load(self.directory, dtype=self.dtype, prepare=True)
        )

    @property
    def int8(self) -> Any:
        model = self._once(
            "prepared int8",
            lambda: zoo.prepare(zoo.load(self.directory, dtype=self.dtype), int8=True),
        )
        return model

    def long(self, prepare: bool) -> Any:
        def make() -> Any:
            longer = {"positions": 8192 + NEW}
            return zoo.load(self.directory, dtype=self.dtype, config=longer, prepare=prepare)

        return self._once("prepared, 8k" if prepare else "clean, 8k", make)

    def ids(self, rows: int, length: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(0)
        return torch.randint(5, self.clean.config.vocab, (rows, length), generator=random)


def anonymous() -> float:
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Anonymous:")) / 1024


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# --- sections: (what is measured, tokens of a turn, turns for each pair asked for, who does it) ---

Table = tuple[str, int, int, Ways]


def decode(case: Case) -> Iterator[Table]:
    ids = case.ids(1, PROMPT)

    def ours(model: Any) -> Iterator[float]:
        while True:
            cache = Cache(PROMPT + NEW)
            with last_only(model):
                token = model(ids, cache=cache)[:, -1:].argmax(-1)
            for _ in range(NEW - 1):
                started = time.perf_counter()
                token = model(token, cache=cache)[:, -1:].argmax(-1)
                yield time.perf_counter() - started

    def theirs() -> Iterator[float]:
        while True:
            out = case.theirs(ids, use_cache=True, logits_to_keep=1)
            for _ in range(NEW - 1):
                started = time.perf_counter()
                token = out.logits[:, -1:].argmax(-1)
                out = case.theirs(token, past_key_values=out.past_key_values, use_cache=True)
                yield time.perf_counter() - started

    ways: Ways = {"reference": theirs(), "clean": ours(case.clean)}
    ways |= {"prepared": ours(case.prepared), "prepared int8": ours(case.int8)}
    yield "decode", 1, NEW - 1, ways | llama_cpp_decode(case, ids)

    def generate(model: Any, **options: Any) -> Iterator[float]:
        while True:
            yield timed(lambda: model.generate(ids, max_new_tokens=NEW, **options))

    end = {"min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    yield (
        "generate()",
        NEW,
        1,
        {
            "reference": generate(case.theirs, **end),
            "clean": generate(case.clean, eos_token_id=[]),
            "prepared": generate(case.prepared, eos_token_id=[]),
        },
    )


def prefill(case: Case) -> Iterator[Table]:
    ids = case.ids(1, case.length)

    def ours(model: Any, last: bool = False) -> Iterator[float]:
        while True:
            with last_only(model) if last else nullcontext():
                took = timed(lambda: model(ids))
            yield took  # outside, for others read with this model meanwhile

    def theirs(keep: int) -> Iterator[float]:
        while True:
            yield timed(lambda: case.theirs(ids, use_cache=False, logits_to_keep=keep))

    ways: Ways = {"reference": theirs(0), "reference, last": theirs(1)}
    ways |= {"clean": ours(case.clean), "prepared": ours(case.prepared)}
    ways |= {"prepared, last": ours(case.prepared, last=True), "prepared int8": ours(case.int8)}
    yield f"prefill {case.length}", case.length, 1, ways | llama_cpp_prefill(case, ids)


def eager(case: Case) -> Iterator[Table]:
    """Clean models alone: batches 1 and 8, lengths 128 and 1024."""
    for rows in (1, 8):
        for length in (128, 1024):
            if rows * length > 1024 and "llama" in case.directory.name:
                continue  # minutes a turn
            ids = case.ids(rows, length)
            who = {"reference": case.theirs, "clean": case.clean}

            def forward(model: Any, ids: torch.Tensor = ids) -> Iterator[float]:
                while True:
                    yield timed(lambda: model(ids))

            ways = {name: forward(model) for name, model in who.items()}
            yield f"eager {rows}x{length}", rows * length, 1, ways


def batch(case: Case) -> Iterator[Table]:
    """Rows of different lengths, padded on the left."""
    for rows in (8, 32):
        ids = case.ids(rows, PROMPT)
        starts = torch.linspace(0, PROMPT - 32, rows).long()[:, None]
        mask = (torch.arange(PROMPT) >= starts).long()

        def ours(model: Any, ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> Iterator[float]:
            while True:
                cache = Cache(PROMPT + NEW)
                with last_only(model):
                    token = model(ids, mask, cache=cache)[:, -1:].argmax(-1)
                for _ in range(NEW - 1):
                    started = time.perf_counter()
                    token = model(token, cache=cache)[:, -1:].argmax(-1)
                    yield time.perf_counter() - started

        def theirs(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> Iterator[float]:
            while True:
                seen = mask
                places = (seen.cumsum(1) - 1).clamp(min=0)
                out = case.theirs(
                    ids,
                    attention_mask=seen,
                    position_ids=places,
                    use_cache=True,
                    logits_to_keep=1,
                )
                for _ in range(NEW - 1):
                    started = time.perf_counter()
                    token = out.logits[:, -1:].argmax(-1)
                    seen = F.pad(seen, (0, 1), value=1)
                    out = case.theirs(
                        token,
                        attention_mask=seen,
                        position_ids=seen.sum(1, keepdim=True) - 1,
                        past_key_values=out.past_key_values,
                        use_cache=True,
                    )
                    yield time.perf_counter() - started

        who = {"clean": case.clean, "prepared": case.prepared, "prepared int8": case.int8}
        ways: Ways = {"reference": theirs(), **{name: ours(m) for name, m in who.items()}}
        yield f"batch of {rows}", rows, 16, ways


def context(case: Case) -> Iterator[Table]:
    """How a token's time grows with what stands before it; the cache is filled with noise."""
    if "llama" not in case.directory.name:
        return
    random = torch.Generator().manual_seed(0)
    for length in (1024, 2048, 4096, 8192):
        who = {"clean": case.long(False), "prepared": case.long(True)}

        def ours(model: Any, length: int = length) -> Iterator[float]:
            cache, token = Cache(length + NEW), torch.tensor([[7]])
            model(token, cache=cache)
            for slot in cache.slots:
                for part in slot:
                    part.normal_(generator=random)
            while True:
                cache.filled = torch.tensor(length)
                for _ in range(NEW):
                    yield timed(lambda: model(token, cache=cache))

        def theirs(length: int = length) -> Iterator[float]:
            token = torch.tensor([[7]])
            out = case.theirs(token, use_cache=True)
            past = out.past_key_values
            for layer in past.layers:
                for name in ("keys", "values"):
                    old = getattr(layer, name)
                    noise = torch.randn(
                        (*old.shape[:2], length, old.shape[3]), generator=random, dtype=old.dtype
                    )
                    setattr(layer, name, noise)
            while True:
                yield timed(lambda: case.theirs(token, past_key_values=past, use_cache=True))
                past.crop(-1)

        ways: Ways = {"reference": theirs(), **{name: ours(m) for name, m in who.items()}}
        yield f"after {length}", 1, 8, ways


def train(case: Case) -> Iterator[Table]:
    """Forward, loss and backward, without dropout; weights stay."""
    for rows in (1, 8):
        for length in (128, 1024):
            if rows * length > 1024 and "fp32" not in case.directory.name:
                continue
            ids = case.ids(rows, length)

            def steps(model: Any, ids: torch.Tensor = ids) -> Iterator[float]:
                def step() -> None:
                    out = model(ids)
                    logits = out if isinstance(out, torch.Tensor) else out.logits
                    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

                while True:
                    with torch.inference_mode(False), torch.enable_grad():
                        took = timed(step)
                    model.zero_grad(set_to_none=True)
                    yield took

            who = {"reference": case.theirs, "clean": case.clean}
            ways = {name: steps(model) for name, model in who.items()}
            yield f"train {rows}x{length}", rows * length, 1, ways


THEIR_SCRIPT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
ids = tokenizer("Once upon a time there was", return_tensors="pt")
out = model.generate(**ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
print(tokenizer.decode(out[0]))
"""


def first(case: Case) -> Iterator[Table]:
    """From the shell to the first token, whole processes."""
    if case.dtype != "float32" or not tokenizer_beside(case.directory):
        return
    zoo_command = [sys.executable, "-m", "zoo", "generate", str(case.directory)]
    text = "Once upon a time there was"

    def process(command: list[str]) -> Iterator[float]:
        while True:
            yield timed(lambda: subprocess.run(command, check=True, capture_output=True, env=ENV))

    ways: Ways = {
        "reference": process([sys.executable, "-c", THEIR_SCRIPT, str(case.directory)]),
        "zoo generate": process([*zoo_command, text, "--max-new-tokens", "1"]),
    }
    yield "first token", 1, 1, ways


def tokenizer_beside(directory: Path) -> bool:
    """GPT-2's own, from where the tests have it."""
    fixtures = os.environ.get("ZOO_FIXTURES")
    names = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}
    if all((directory / name).is_file() for name in names):
        return True
    if not fixtures or "gpt2" not in directory.name:
        print("  first token: not measured; ZOO_FIXTURES names no tokenizer")
        return False
    for name, source in names.items():
        shutil.copyfile(Path(fixtures) / "tokenizers" / "gpt2" / source, directory / name)
    return True


SECTIONS: dict[str, Callable[[Case], Iterator[Table]]] = {
    "decode": decode,
    "prefill": prefill,
    "batch": batch,
    "context": context,
    "eager": eager,
    "train": train,
    "first": first,
}


# --- llama.cpp, where it is installed ------------------------------------------------------------

KINDS = {"float32": "F32", "bfloat16": "BF16"}


def llama_cpp(case: Case) -> dict[str, Any]:
    """Who -> llama.cpp with the same weights, and with its bytes; none where it is missing."""
    try:
        import llama_cpp as package
    except ImportError:
        print("  llama.cpp: not measured, llama-cpp-python is not installed")
        return {}
    threads = torch.get_num_threads()

    def load(kind: str) -> Any:
        path = made_gguf(case.directory, kind)
        return package.Llama(
            str(path),
            n_ctx=1024,
            n_batch=1024,
            n_ubatch=1024,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    kinds = {"llama.cpp": KINDS[case.dtype], "llama.cpp q8_0": "Q8_0"}
    return {who: case._once(who, partial(load, kind)) for who, kind in kinds.items()}


def made_gguf(directory: Path, kind: str) -> Path:
    """The checkpoint's weights in one file beside it, made where it is missing."""
    path = directory.with_name(f"{directory.name}-{kind.lower()}.gguf")
    if not path.exists():
        dtype = {name: word for word, name in KINDS.items()}.get(kind, "q8_0")
        place = path.with_suffix(".making")
        zoo.convert(directory, place, to="gguf", dtype=dtype, layout={"vocabulary": 0}, force=True)
        (place / "model.gguf").rename(path)
        shutil.rmtree(place)
    return path


def llama_cpp_decode(case: Case, ids: torch.Tensor) -> Ways:
    def tokens(llama: Any) -> Iterator[float]:
        while True:
            llama.reset()
            llama.eval(ids[0].tolist())
            for token in range(10, 10 + NEW - 1):
                yield timed(partial(llama.eval, [token]))

    return {who: tokens(llama) for who, llama in llama_cpp(case).items()}


def llama_cpp_prefill(case: Case, ids: torch.Tensor) -> Ways:
    def prompts(llama: Any) -> Iterator[float]:
        while True:
            llama.reset()
            yield timed(lambda: llama.eval(ids[0].tolist()))

    return {who: prompts(llama) for who, llama in llama_cpp(case).items()}


# --- all of it -----------------------------------------------------------------------------------


def run(pairs: int, where: Path, only: str, sections: list[str]) -> list[dict[str, object]]:
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"memory read: {bandwidth():.1f} GB/s; matrices: {peak():.0f} GFLOP/s in fp32")
    rows: list[dict[str, object]] = []
    for label, (name, dtype, length) in RUNS.items():
        if only not in label:
            continue
        case = Case(made(name, where), dtype, CASES[name][2], length)
        assert case.theirs is not None  # not made in inference mode, where nothing is trained
        for section in sections:
            for what, tokens, turns, ways in SECTIONS[section](case):
                times = in_turn(ways, pairs * turns)
                for row in compared(times, tokens):
                    rows.append({"case": label, "what": what, **row})
                    show(rows[-1])
    return rows


def in_turn(ways: Ways, turns: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {who: [] for who in ways}
    for k in count():
        if k > turns:
            return times
        for who, way in ways.items():
            with torch.inference_mode():
                seconds = next(way)
            if k:  # the first warms up
                times[who].append(seconds)
    raise AssertionError


def compared(times: dict[str, list[float]], tokens: int) -> Iterator[dict[str, object]]:
    theirs = times["reference"]
    for who, ours in times.items():
        ratio = median([a / b for a, b in zip(theirs, ours, strict=True)])
        yield {
            "who": who,
            "ratio": ratio,
            "best": min(theirs) / min(ours),
            "milliseconds": 1e3 * median(ours),
            "tokens_per_second": tokens / median(ours),
        }


def show(row: dict[str, Any]) -> None:
    cells = (
        f"{row['case']:16}{row['what']:15}{row['who']:18}{row['tokens_per_second']:9.1f} tokens/s"
    )
    print(f"{cells} {row['ratio']:6.2f}x, best {row['best']:5.2f}x", flush=True)


def bandwidth() -> float:
    """GB/s of reading, the best of some passes over a gigabyte."""
    x = torch.ones(1 << 28)
    return x.nbytes / min(timed(x.sum) for _ in range(8)) / 1e9


def peak() -> float:
    """GFLOP/s of oneDNN's packed product."""
    x, weight = torch.randn(1024, 2048), torch.randn(2048, 2048)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1024)

    def product() -> None:
        torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    return 2 * 1024 * 2048 * 2048 / min(timed(product) for _ in range(8)) / 1e9
