"""Help, examples, completion and suggestions: what a person reads before a command runs."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

from zoo import registry
from zoo.cli import app, options
from zoo.cli.app import main
from zoo.cli.command import Options, Root
from zoo.cli.exit_codes import ExitCode
from zoo.cli.table import COMMANDS

ROOT: Root = typer.main.get_command(app.app)  # type: ignore[assignment]
READING = {"--revision", "--head", "--config", "--ignore-config"}
LOADING = READING | {"--device", "--dtype", "--prepare", "--int8", "--adapter", "--mmap"}
LOADS = ("score", "fill", "embed", "generate", "chat")


def command(name: str) -> Any:
    return ROOT.get_command(None, name)


def option_names(name: str) -> set[str]:
    return {each for param in command(name).params for each in param.opts if each.startswith("--")}


# --- help ----------------------------------------------------------------------------------------


def test_root_help_lists_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, row in COMMANDS.items():
        assert f"\n  {name} " in shown and row.summary.split()[0] in shown
    for code in ExitCode:
        assert f"\n  {int(code)} " in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_command_help_has_examples_that_parse(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith((f"usage: zoo {name} ", f"usage: zoo {name}\n"))
    assert COMMANDS[name].summary in " ".join(shown.split())
    for example in COMMANDS[name].examples:
        assert f"\n  {example}\n" in shown
        words = shlex.split(example.rpartition("| ")[2])
        assert words[:2] == ["zoo", name]
        command(name).make_context(name, words[2:])  # refuses what does not parse


def test_every_option_says_its_default() -> None:
    silent = [
        f"{name} {param.opts[0]}"
        for name in COMMANDS
        for param in command(name).params
        if param.param_type_name == "option"
        and "(default: " not in (param.help or "")
        and "(required)" not in (param.help or "")
    ]
    assert not silent, silent


@pytest.mark.parametrize("width", [80, 120])
def test_help_fits_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for arguments in (["--help"], *([name, "--help"] for name in COMMANDS)):
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        long = [line for line in lines if len(line) > width and not line.startswith("  zoo ")]
        assert not long, long


def test_help_loads_neither_torch_nor_commands() -> None:
    code = (
        "import sys; from zoo.cli.app import main; main(['--help']); "
        "print([m for m in ('torch', 'yaml', 'pydantic', 'rich', 'zoo.cli.text') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


@pytest.mark.parametrize("arguments", [["list"], ["info", "gpt2"]])
def test_quick_commands_load_neither_torch_nor_rich(arguments: list[str]) -> None:
    code = (
        f"import sys; from zoo.cli.app import main; main({arguments}); "
        "print([m for m in ('torch', 'rich', 'zoo.evidence') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


def test_colors_are_for_terminals_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--help"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["--help"]) == 0
    assert "\x1b[1mInspect\x1b[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["--help"]) == 0
    assert "\x1b" not in capsys.readouterr().out


# --- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADS)
def test_commands_that_load_have_all_options_of_loading(name: str) -> None:
    assert option_names(name) >= LOADING


def test_commands_that_take_a_checkpoint_have_all_options_of_reading() -> None:
    # what `train` goes on from is described by its recipe: --from, --head, --set
    taking = [name for name in COMMANDS if name not in ("list", "check", "train")]
    assert not {
        name: READING - option_names(name) for name in taking if READING - option_names(name)
    }


def test_a_shared_option_is_declared_once() -> None:
    """What several commands call alike and explain alike stands in options.py."""
    shared = set[int]()
    for kind in vars(options).values():
        if isinstance(kind, type) and issubclass(kind, Options) and kind is not Options:
            hints = get_type_hints(kind, include_extras=True)
            shared |= {hash(get_args(hint)[1].help) for hint in hints.values()}
    shared |= {
        hash(get_args(value)[1].help)
        for value in vars(options).values()
        if len(get_args(value)) == 2 and hasattr(get_args(value)[1], "help")
    }
    users: dict[tuple[str, str], list[str]] = {}
    for name in COMMANDS:
        for param in command(name).params:
            if param.param_type_name == "option":
                users.setdefault((param.opts[0], param.help), []).append(name)
    twice = {
        key[0]: names
        for key, names in users.items()
        if len(names) > 1 and hash(key[1]) not in shared
    }
    assert not twice, twice


# --- did you mean --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["lst"], "no such command: lst. Did you mean list?"),
        (["chekc", "x"], "Did you mean check?"),
        (["list", "--verifeid"], "no such option: --verifeid. Did you mean --verified?"),
        (["--versoin"], "no such option: --versoin. Did you mean --version?"),
        (["info", "gtp2"], "Did you mean gpt2?"),
        (["info", "./my-modle"], "./my-modle: no such directory. Did you mean my-model?"),
        (["info", "my-modle"], "no directory of that name either. Did you mean my-model?"),
        (["score", "gpt2", "nots.txt"], "nots.txt: no such file. Did you mean notes.txt?"),
        (["score", "gpt2", "notes.txt", "--device", "cud"], "Did you mean cuda"),
        (["score", "gpt2", "notes.txt", "--dtype", "fp61"], "Did you mean fp64"),
        (["convert", "gpt2", "--to", "gguff"], "Did you mean gguf?"),
        (["diff", "gpt2", "--way", "padedd"], "Did you mean padded?"),
        (["--show-completion", "fsih"], "Did you mean fish?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_near_is_suggested(
    arguments: list[str],
    suggestion: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_sockets: None,
) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "notes.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) != 0
    out, err = capsys.readouterr()
    assert suggestion in err and out == ""


# --- completion ----------------------------------------------------------------------------------


def completions(shell: str, line: str) -> list[str]:
    """What `zoo` offers a shell at the end of a line."""
    words = line.split(" ")
    environment = {
        **os.environ,
        "_ZOO_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run(
        [sys.executable, "-m", "zoo"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_names_of_commands_options_and_checkpoints_complete() -> None:
    assert completions("bash", "zoo con") == ["convert", "convert-optimizer"]
    assert completions("bash", "zoo list --ver") == ["--verified"]
    assert completions("bash", "zoo score gpt2 x --dtype b") == ["bf16"]
    names = [name for name in registry.checkpoints() if name.startswith("gpt2")]
    assert completions("bash", "zoo info gpt2") == names
    assert [line.split("\t") for line in completions("fish", "zoo info gpt2-x")] == [
        ["gpt2-xl", "gpt2"]
    ]
    assert '"gpt2-xl":"gpt2"' in "".join(completions("zsh", "zoo info gpt2-x"))


@pytest.mark.parametrize("shell", app.SHELLS)
def test_completing_a_line_offers_shells_and_installs_nothing(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for option in ("--install-completion", "--show-completion"):
        offered = completions(shell, f"zoo {option} z")
        assert "zsh" in "".join(offered) and "fish" not in "".join(offered)
        completions(shell, f"zoo {option} zsh ")
    completions(shell, "zoo --version ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shell", app.SHELLS)
def test_completion_scripts_are_accepted(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--show-completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    assert "_ZOO_COMPLETE" in script.read_text() and "zoo" in script.read_text()
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", script], check=True, capture_output=True)


def test_bash_completes_with_the_script(tmp_path: Path, root: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    program = tmp_path / "zoo"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m zoo "$@"\n')
    program.chmod(0o755)
    lines = (
        'eval "$(zoo --show-completion bash)"; COMP_WORDS=(zoo inf); COMP_CWORD=1; '
        '_zoo_completion zoo; echo "${COMPREPLY[@]}"'
    )
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", lines],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "info\n"


@pytest.mark.parametrize("shell", app.SHELLS)
def test_completion_is_installed_for_a_shell(
    shell: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["--install-completion", shell]) == 0
    file = Path(capsys.readouterr().out.partition(": ")[0])
    assert file.is_relative_to(tmp_path) and "_ZOO_COMPLETE" in file.read_text()
