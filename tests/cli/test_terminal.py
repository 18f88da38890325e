"""Ctrl-C at any time is one line; no name from a file controls the terminal."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import tqdm
from safetensors.torch import load_file, save_file

import zoo
from zoo.checkpoints.hub import _bar
from zoo.cli.app import main
from zoo.errors import ZooError, printable
from zoo.terminal import Escaped

SLOW = """
import time
try:
    print("importing", flush=True)
    time.sleep(60)
except BaseException:  # as libraries do that try what they can import
    pass
"""


def test_what_a_model_writes_is_printed_as_it_is() -> None:
    out = io.StringIO()
    escaped = Escaped(out, printable)
    print("a\x1b[31mb\u00a0\u3000c\td", file=escaped)
    assert out.getvalue() == "a\\x1b[31mb\u00a0\u3000c\td\n"
    assert escaped.unescaped is out


@pytest.mark.parametrize(
    ("module", "command"),
    [("yaml", ["list"]), ("torch", ["score", "CHECKPOINT", "FILE"]), ("typer", ["--help"])],
)
def test_an_interrupted_import_says_one_line(
    module: str, command: list[str], root: Path, made: Any, tmp_path: Path
) -> None:
    (tmp_path / f"{module}.py").write_text(SLOW)
    (tmp_path / "text.txt").write_text("text")
    names = {"CHECKPOINT": str(made("llama")), "FILE": str(tmp_path / "text.txt")}
    process = subprocess.Popen(
        [sys.executable, "-m", "zoo", *(names.get(word, word) for word in command)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "zoo: error: interrupted\n"
    assert process.returncode == 130


EVIL = "evil\x1b[2J\x9b5m\x07\r\b\x7f\u202e\u2066\u200f"
SHOWN = r"evil\x1b[2J\x9b5m\x07\r\x08\x7f\u202e\u2066\u200f"


def check_harmless(out: str) -> None:
    unsafe = {c for c in out if not c.isprintable()} - {"\n"}
    assert unsafe == set(), unsafe
    assert SHOWN in out or json.dumps(EVIL)[1:-1] in out


def test_control_characters_of_tensor_names_are_escaped(
    tmp_path: Path, made: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "evil"
    shutil.copytree(made("gpt2"), place)
    tensors = load_file(place / "model.safetensors")
    save_file({**tensors, EVIL: torch.ones(3)}, place / "model.safetensors")
    commands = [
        ["score", str(place), str(place / "config.json")],
        ["convert", str(place), "--out", str(tmp_path / "out")],
        ["diagnose", str(place), "--tensors"],
        ["diagnose", str(place), "--json"],
    ]
    for command in commands:
        assert main(command) != 0
        check_harmless("".join(capsys.readouterr()))
    with pytest.raises(ZooError) as caught:
        zoo.load(place)
    check_harmless(str(caught.value))


def test_control_characters_of_configs_and_paths_are_escaped(
    tmp_path: Path, made: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / EVIL
    shutil.copytree(made("gpt2"), place)
    path = place / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "author": EVIL, EVIL: 1}))
    assert main(["info", str(place)]) == 0
    check_harmless("".join(capsys.readouterr()))
    assert main(["info", str(place), "--json"]) == 0
    out = capsys.readouterr().out
    check_harmless(out)
    assert json.loads(out)["config"]["author"] == EVIL
    for command in (["check", str(place)], ["tokenize", str(place), "x"], ["list", EVIL]):
        with contextlib.suppress(SystemExit):
            main(command)
        check_harmless("".join(capsys.readouterr()))


def test_the_bar_of_a_download_stays_on_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    states = sys.modules[tqdm.__module__]
    monkeypatch.setattr(states, "progress_bar_states", {})  # other tests switch bars off
    monkeypatch.setattr(states, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    with contextlib.redirect_stderr(Escaped(out, printable)):
        bar = _bar(True)(total=2, desc="a\x1b[31mb", mininterval=0)
        bar.update(1)
        bar.close()
    assert out.getvalue().startswith("\ra\\x1b[31mb:")
    assert "\\r" not in out.getvalue() and "\r" in out.getvalue()[1:]


def test_closed_standard_input_is_an_error(
    made: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    for command in (["score", str(made("llama")), "-"], ["embed", str(made("bert")), "--file=-"]):
        assert main(command) == 1
        assert capsys.readouterr().err == "zoo: error: standard input is closed\n"


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_no_file_has_is_an_error(
    name: str, made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(made("bert"))
    (tmp_path / "file").touch()
    commands = [
        ["score", place, name],
        ["embed", place, "--file", name],
        ["diagnose", place, "--text", name],
        ["convert", place, "--out", name],
        ["diagnose", name],
    ]
    for command in commands:
        assert main(command) in (1, 2)
        assert capsys.readouterr().err.startswith("zoo: error: ")


def test_a_deleted_working_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place := tmp_path / "gone").mkdir()
    monkeypatch.chdir(place)
    place.rmdir()
    assert main(["list"]) == 2
    assert "the current directory was deleted" in capsys.readouterr().err
    monkeypatch.undo()
