"""Every exit code of the table is met, and none but these."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PATIENCE
from tiny import build, hot

import zoo
from zoo.cli.app import main
from zoo.cli.exit_codes import ExitCode, exit_code_of
from zoo.errors import NonFinite, OutputExists, UnknownName, UsageError
from zoo.tokenizers import CharTokenizer


def test_success_is_0() -> None:
    assert main(["list"]) == ExitCode.OK == 0


def test_an_error_is_1_and_one_of_usage_2(tmp_path: Path) -> None:
    assert main(["info", str(tmp_path)]) == ExitCode.FAILED == 1
    assert main(["info", "gtp2"]) == ExitCode.USAGE == 2
    assert main(["info"]) == ExitCode.USAGE
    assert main([]) == ExitCode.USAGE


def test_a_damaged_directory_is_1(made: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(made("llama")), "--out", str(out), "--quiet"]) == 0
    assert main(["check", str(out)]) == ExitCode.OK
    path = out / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["check", str(out)]) == ExitCode.FAILED


def test_where_1_is_an_answer_an_error_is_2(tmp_path: Path) -> None:
    for command in ("diff", "diagnose"):
        assert main([command, str(tmp_path)]) == ExitCode.USAGE


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "convert", interrupt, raising=False)
    monkeypatch.setattr(zoo, "verify", interrupt, raising=False)
    assert main(["verify", "gpt2"]) == ExitCode.INTERRUPTED == 130
    assert capsys.readouterr().err == "zoo: error: interrupted\n"
    assert main(["convert", "gpt2"]) == ExitCode.INTERRUPTED
    expected = "zoo: error: interrupted. The same command goes on from here\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("error", "command", "code"),
    [
        (UsageError("x"), "convert", ExitCode.USAGE),
        (UnknownName("x"), "info", ExitCode.USAGE),
        (OutputExists("x"), "convert", ExitCode.FAILED),
        (OSError("x"), "convert", ExitCode.FAILED),
        (NonFinite("x"), "diagnose", ExitCode.USAGE),
        (NonFinite("x"), "", ExitCode.FAILED),
        (KeyboardInterrupt(), "diff", ExitCode.INTERRUPTED),
    ],
)
def test_the_code_of_an_error(error: BaseException, command: str, code: ExitCode) -> None:
    assert exit_code_of(error, command) == code


def test_the_docs_have_the_table(root: Path) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\d+)` \| (.*) \|$", text, re.MULTILINE)
    assert rows == [(str(int(code)), code.meaning) for code in ExitCode]


def test_a_piped_dialogue_ends_with_the_code_of_its_error(tmp_path: Path, root: Path) -> None:
    letters = " abcdefghijklmnopqrstuvwxyzAU:.\n"
    model = hot(build("llama", vocab=len(letters)))
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    zoo.save(model, tmp_path / "nan", allow_nonfinite=True)
    CharTokenizer.of(letters).save(tmp_path / "nan")
    done = subprocess.run(
        [sys.executable, "-m", "zoo", "chat", str(tmp_path / "nan")],
        cwd=root,
        input="/sing\nhello\nhello\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == ExitCode.FAILED
    unknown, nonfinite = done.stderr.splitlines()
    assert "/sing: no such command" in unknown and "not finite" in nonfinite
