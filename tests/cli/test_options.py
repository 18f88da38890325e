"""What the shared options do: what is handed to zoo.load, and what is refused before it."""

import contextlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build, hot

import zoo
from zoo.cli import options
from zoo.cli.app import main
from zoo.cli.messages import in_shell_syntax
from zoo.prepared import kernels
from zoo.tokenizers import CharTokenizer

LETTERS = " abcdefghijklmnopqrstuvwxyzAU:.\n"


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose tokens are letters."""
    place = Path(tmp_path_factory.mktemp("options") / "speller")
    zoo.save(hot(build("llama", vocab=len(LETTERS))), place)
    CharTokenizer.of(LETTERS).save(place)
    return place


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of each zoo.load, which loads nothing."""
    calls: list[dict[str, Any]] = []

    def load(ref: str, **more: Any) -> Any:
        calls.append({"ref": ref, **more})
        raise zoo.ZooError("loaded")

    monkeypatch.setattr(zoo, "load", load, raising=False)
    return calls


# --- loading -------------------------------------------------------------------------------------


def test_a_dtype_is_computed_in(speller: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (speller.parent / "text").write_text("abc def")
    asked = ["score", str(speller), str(speller.parent / "text")]
    shown = {}
    for dtype in ("auto", "fp32", "fp64", "bf16"):
        assert main([*asked, "--dtype", dtype]) == 0
        shown[dtype] = capsys.readouterr().out
    assert shown["auto"] == shown["fp32"] != shown["bf16"]


@pytest.mark.parametrize("how", [["--prepare"], ["--prepare", "--no-mmap"], ["--device", "auto"]])
def test_preparing_and_mapping_change_no_text(
    speller: Path, capsys: pytest.CaptureFixture[str], how: list[str]
) -> None:
    asked = ["generate", str(speller), "abc", "--max-new-tokens", "20"]
    assert main(asked) == 0
    text = capsys.readouterr().out
    assert main([*asked, *how]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.skipif(kernels.library() is None, reason="there is no C compiler")
def test_int8_prepares_with_bytes(
    speller: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, prepared = zoo.prepare, []

    def watched(model: Any, **more: Any) -> Any:
        prepared.append(prepare(model, **more))
        return prepared[-1]

    monkeypatch.setattr(zoo, "prepare", watched, raising=False)
    assert main(["generate", str(speller), "abc", "--max-new-tokens", "3", "--int8"]) == 0
    assert prepared[0].prepared.int8


def test_every_option_of_loading_reaches_load(loads: list[dict[str, Any]]) -> None:
    words = (
        "--revision v1 --head lm --config layers=2 name=x --ignore-config a b --no-mmap "
        "--adapter DIR --dtype bf16 --prepare"
    )
    assert main(["chat", "gpt2", *words.split()]) == 1
    assert loads == [
        {
            "ref": "gpt2",
            "revision": "v1",
            "head": "lm",
            "config": {"layers": 2, "name": "x"},
            "ignore_config": ["a", "b"],
            "mmap": False,
            "adapter": Path("DIR"),
            "merge": True,  # what is prepared has its adapter merged in
            "dtype": "bfloat16",
        }
    ]


@pytest.mark.parametrize(
    ("words", "adapter"),
    [
        ([], None),
        (["--adapter"], True),
        (["--adapter", "--no-mmap"], True),
        (["--adapter", "DIR"], Path("DIR")),
        (["--no-adapter"], False),
    ],
)
def test_an_adapter_may_be_named_or_not(
    loads: list[dict[str, Any]], words: list[str], adapter: Any
) -> None:
    main(["generate", "gpt2", "text", *words])
    assert loads[0].get("adapter") == adapter


@pytest.mark.parametrize("way", ["words", "again"])
def test_options_of_several_words_may_be_repeated(loads: list[dict[str, Any]], way: str) -> None:
    words = ["--ignore-config", "a", "b"]
    words = words if way == "words" else ["--ignore-config", "a", "--ignore-config=b"]
    main(["generate", *words, "--config", "n=-1", "--", "gpt2", "-text"])
    assert loads == [{"ref": "gpt2", "ignore_config": ["a", "b"], "config": {"n": -1}}]


# --- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "mps", "device"),
    [(True, False, "cuda"), (False, True, "mps"), (True, True, "cuda"), (False, False, "cpu")],
)
def test_auto_is_the_fastest_device(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert options.device_here("auto") == device


def test_a_device_reaches_load_and_the_assistant(
    loads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    loading = options.Loading(device="cuda:1", dtype="bfloat16", mmap=False, head="lm")
    for load in (loading.load, loading.load_assistant):
        with contextlib.suppress(zoo.ZooError):
            load("gpt2")
    same = {"ref": "gpt2", "device": "cuda:1", "dtype": "bfloat16", "mmap": False}
    assert loads == [{**same, "head": "lm"}, same]


# --- what makes no sense together ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("generate gpt2 --ignore-config foo Once", "--ignore-config"),
        ("generate --adapter gpt2 Once", "--adapter"),
        ("tokenize gpt2 --config eps=1 x=1", "--config"),
    ],
)
def test_missing_argument_names_the_option_that_took_it(
    line: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    assert f"expected TEXT before {option}, which takes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cuda"], "--device cuda: torch sees no CUDA device here. Use --device cpu"),
        (["--device", "mps"], "--device mps: torch sees no MPS device here. Use --device cpu"),
        (["--device", "cpu:1"], "--device: cpu:1: one of auto, cpu, cuda, mps"),
        (["--int8", "--dtype", "fp64"], "--int8 --dtype fp64: bytes are no fp64. Use --dtype fp32"),
        (["--adapter", "x", "--no-adapter"], "--adapter and --no-adapter exclude each other"),
        (["--stream", "--no-stream"], "--stream and --no-stream exclude each other"),
        (["--adapter="], "--adapter: expected a path, got an empty word"),
        (["--top-p", "much"], "--top-p: 'much': expected a number"),
        (["--seed", "1.5"], "--seed: '1.5': expected a whole number"),
        (["--seed"], "--seed"),
        (["--config"], "--config"),
    ],
)
def test_options_without_sense_are_refused_before_loading(
    words: list[str],
    message: str,
    loads: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert main(["generate", "gpt2", "text", *words]) == 2
    assert message in capsys.readouterr().err and not loads


def test_int8_needs_kernels_and_a_cpu(
    loads: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert main(["fill", "gpt2", "text", "--int8"]) == 2
    assert "--int8: its kernels cannot be compiled here. Install a C" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["fill", "gpt2", "text", "--int8", "--device", "auto"]) == 2
    assert "--int8 --device auto: bytes are multiplied by kernels" in capsys.readouterr().err
    assert not loads


@pytest.mark.parametrize("command", [["convert", "x", "--out"], ["verify", "x", "--html"]])
def test_a_home_of_nobody_is_no_directory(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, "~nobody-here/y"]) == 2
    assert "no user is called 'nobody-here'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert options.path("~/y") == tmp_path / "y"


# --- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("head='lm': gpt2 has none", "--head lm: gpt2 has none"),
        ("top_p: above 0", "--top-p: above 0"),
        ("load it with head='lm'", "load it with --head lm"),
        ("or config={'extrapolate': True}", "or --config extrapolate=True"),
        ("trust=('a', 'b') or mmap=False", "--trust a b or --no-mmap"),
        ("num_beams=2 and unknown=3", "--beams 2 and unknown=3"),
        ("zoo.load('x', head='lm'), or head='lm'", "zoo.load('x', head='lm'), or --head lm"),
        ("x.head='lm'", "x.head='lm'"),
        ("head=lm", "head=lm"),
    ],
)
def test_messages_have_options_as_the_shell_spells_them(message: str, shown: str) -> None:
    names = ("head", "top_p", "config", "trust", "mmap")
    spelled = {name: f"--{name.replace('_', '-')}" for name in names} | {"num_beams": "--beams"}
    assert in_shell_syntax(message, spelled) == shown


def test_a_head_that_is_not_there_is_named_as_the_shell_spells_it(
    made: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", str(made("llama")), __file__, "--head", "nonee"]) == 2
    assert "zoo: error: --head nonee: llama has" in capsys.readouterr().err


def test_load_takes_what_the_options_are_named() -> None:
    parameters = inspect.signature(zoo.load).parameters
    asked = options.Loading(
        revision="x",
        head="y",
        config=["a=1"],
        ignore_config=["b"],
        mmap=True,
        prepare=True,
        adapter=Path("z"),
    ).arguments()
    assert asked.keys() <= parameters.keys() and {"device", "dtype"} <= parameters.keys()
