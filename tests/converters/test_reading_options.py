"""How a checkpoint is read: the same options in every command, and messages that name them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import build

import zoo
from zoo.cli import app
from zoo.errors import ConfigError, OutputExists, UsageError, in_shell, option

COMMANDS = (
    *("info", "convert", "convert-optimizer", "tokenize", "score", "fill", "embed", "generate"),
    *("chat", "verify", "diff", "diagnose"),
)


@pytest.fixture
def unusual(tmp_path: Path) -> Path:
    """A checkpoint with a field that the reference reads and zoo does not implement."""
    directory = zoo.save(build("llama").eval(), tmp_path / "unusual")
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "attention_chunk_size": 8}), encoding="utf-8")
    return directory


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_takes_a_checkpoint_has_them(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("--revision", "--head", "--config", "--ignore-config"):
        assert f"{name} " in shown, name


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "REF", "FILE"],
        ["embed", "REF", "a"],
        ["fill", "REF", "a"],
        ["generate", "REF", "a"],
        ["chat", "REF"],
        ["diff", "REF"],
        ["convert", "REF", "--dry-run"],
        ["convert-optimizer", "REF", "FILE", "--out", "OUT"],
        ["info", "REF", "--tree"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_ignore_config_is_passed_on(
    unusual: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    text = unusual.parent / "text"
    text.write_text("a b c", encoding="utf-8")
    places = {"REF": str(unusual), "FILE": str(text), "OUT": str(unusual.parent / "out")}
    arguments = [places.get(word, word) for word in arguments]
    assert app.main(arguments) != 0
    output = capsys.readouterr().err
    assert "attention_chunk_size: the reference reads this field" in output
    assert "pass --ignore-config attention_chunk_size" in output and "ignore_config=" not in output
    app.main([*arguments, "--ignore-config", "attention_chunk_size"])
    assert "attention_chunk_size" not in capsys.readouterr().err


def test_python_callers_see_python_syntax(unusual: Path) -> None:
    with pytest.raises(ConfigError, match=r"pass ignore_config=\('attention_chunk_size',\)"):
        zoo.load(unusual)


@pytest.mark.parametrize(
    ("name", "value", "python", "shell"),
    [
        ("force", True, "force=True", "--force"),
        ("mmap", False, "mmap=False", "--no-mmap"),
        ("head", ..., "head=…", "--head …"),
        ("ignore_config", ("a", "b"), "ignore_config=('a', 'b')", "--ignore-config a b"),
        ("config", {"n": 2, "m": ...}, "config={'n': 2, 'm': …}", "--config n=2 m=…"),
    ],
)
def test_an_option_is_named_as_its_reader_types_it(
    name: str, value: Any, python: str, shell: str
) -> None:
    assert option(name, value) == python
    token = in_shell.set(True)
    assert option(name, value) == shell
    in_shell.reset(token)


def test_a_file_that_exists_is_refused_in_the_readers_syntax(
    unusual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ignore = "attention_chunk_size"
    with pytest.raises(OutputExists, match=r"Use force=True to replace the checkpoint") as raised:
        zoo.convert(unusual, unusual.parent, to="native", ignore_config=(ignore,))
    assert "--force" not in str(raised.value)
    command = [
        "convert",
        str(unusual),
        "--out",
        str(tmp_path),
        "--quiet",
        "--ignore-config",
        ignore,
    ]
    assert app.main(command) == 1
    output = capsys.readouterr().err
    assert "Use --force to replace the checkpoint" in output and "force=True" not in output


def test_unused_fields_are_one_line_on_standard_error(
    unusual: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = unusual / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["attention_chunk_size"]
    path.write_text(json.dumps({**config, "unsloth_fixed": True}), encoding="utf-8")
    assert app.main(["convert", str(unusual), "--out", str(unusual.parent / "out"), "--quiet"]) == 0
    assert capsys.readouterr().err == (
        f"zoo: warning: {path}: fields that the reference never reads, so that they change "
        "nothing: unsloth_fixed\n"
    )


@pytest.mark.slow
def test_verify_reads_every_copy_alike_and_warns_once(
    unusual: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = unusual / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "unsloth_fixed": True}), encoding="utf-8")
    assert app.main(["verify", str(unusual), "--ignore-config", "attention_chunk_size"]) == 0
    out, output = capsys.readouterr()
    assert "unusual, hot" in out
    assert output.count("unsloth_fixed") == 1 and f"zoo: warning: {path}: " in output


@pytest.mark.slow
def test_verify_of_another_head_compares_with_a_checkpoint_of_its_class(
    made: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(["verify", str(made("gpt2")), "--head", "none"]) == 0
    assert "all within limits" in capsys.readouterr().out
    assert app.main(["verify", str(made("gpt2")), "--head", "sequence_classification"]) == 1
    assert "lacks what GPT2ForSequenceClassification needs" in capsys.readouterr().err


def test_info_shows_the_head_that_is_asked_for(
    unusual: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(["info", str(unusual), "--head", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["head"] == "none"
    assert app.main(["info", str(unusual), "--head", "nonee"]) == 2


def test_functions_of_texts_take_them_too(made: Callable[..., Path]) -> None:
    place = made("llama")
    model = zoo.load(place)
    for function in (zoo.perplexity, zoo.fill, zoo.embed, zoo.generate):
        with pytest.raises(UsageError, match="head='nonee'"):
            function(place, "a b", head="nonee")
        with pytest.raises(UsageError, match="head: the model is loaded already"):
            function(model, "a b", head="none")
