"""Damaged inputs at random: `make fuzz` in short, what it would find, and what it has found."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"(?m)^([\w.-]+): .*? +([\d,]+) +([\d,]+) +([\d,]+) +([\d.]+) s +([\d.]+) MB")


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_some_of_each_kind() -> None:
    """None at fault, some refused and some accepted, in 64 MB."""
    run = fuzz("tools/fuzz.py", "--count", "60", "--jobs", "2", "--slow", "10")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("\n0 faults\n")
    rows = {row[0]: row[1:] for row in ROW.findall(run.stdout)}
    assert " ".join(rows) == (
        "header index config hf bin meta tf tf-models trainers llama2c tokenizer.bin gguf "
        "gguf-models gguf-words gptq awq fp8 sentencepiece"
    )
    for kind, (mutants, refused, accepted, slowest, most) in rows.items():
        assert int(mutants) == int(refused) + int(accepted) == (600 if kind == "header" else 60)
        assert int(refused) > 0 < int(accepted), kind
        assert float(slowest) <= 10 and float(most) <= 64, kind


def test_mutants_are_the_same_however_they_are_drawn() -> None:
    drawn = ["--only", "gguf-words", "--count", "90", "--start", "950"]
    rows = ROW.findall(fuzz("-c", SEVERAL.format(drawn=drawn)).stdout)
    assert len(rows) == 3 and rows[0][:4] == rows[1][:4] != rows[2][:4]


SEVERAL = """
import sys
sys.path.insert(0, "tools")
import fuzz
for more in (["--jobs", "1"], ["--jobs", "2"], ["--jobs", "1", "--seed", "1"]):
    sys.argv[1:] = [*{drawn}, *more]
    fuzz.main()
"""
FAULTS = {  # what a kind may do: how that is told
    '{}["a name"]': r"KeyError: 'a name' \(<string>:\d+\)",
    'b"1" * (70 << 20)': r"took (69|7\d) MB",
    "bytearray(1 << 40)": "MemoryError",
    "while True: chance.random()": "Hung",
    "os.abort()": "the process died",  # the last, since it takes the others along
}
FAULTY = """
import os, sys
from functools import partial
sys.path.insert(0, "tools")
import fuzz

class Faulty(fuzz.fuzzed.Kind):
    def __init__(self, harm, place):
        self.harm = harm

    def __call__(self, chance):
        if chance.random() < 0.1:
            exec(self.harm)

fuzz.HUNG, fuzz.TIMES = 0.3, {}
fuzz.VICTIMS = {harm: ("", partial(Faulty, harm)) for harm in HARMS}
sys.argv += ["--count", "20", "--jobs", "1"]
sys.exit(fuzz.main())
"""


def test_faults_are_found_and_told_with_what_repeats_them() -> None:
    run = fuzz("-c", FAULTY.replace("HARMS", repr(list(FAULTS))))
    assert run.returncode == 1, run.stderr
    for harm, pattern in FAULTS.items():
        assert re.search(pattern, run.stdout), (harm, run.stdout)
    again = re.findall(r"tools/fuzz\.py --only (.+) --seed 0 --start (\d+) --count 1", run.stdout)
    assert {kind for kind, _ in again} == {*list(FAULTS)[:-1]}
    assert all(0 <= int(n) < 20 for _, n in again)
