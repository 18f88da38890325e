"""The command line: what it prints, and one clear line and an exit code for each mistake."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PATIENCE

import zoo
from zoo import registry
from zoo.checkpoints import info
from zoo.cli.app import main
from zoo.errors import ConfigError, OutputExists, ParityError
from zoo.tokenizers import CharTokenizer

Result = tuple[int, str, str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> Result:
        return main(arguments), *capsys.readouterr()

    return call


# --- list ----------------------------------------------------------------------------------------


def test_list_is_a_table(run: Any) -> None:
    code, out, err = run("list")
    head, *lines = out.splitlines()
    assert (code, err) == (0, "")
    assert head.split()[:3] == ["NAME", "ARCHITECTURE", "PARAMETERS"]
    assert [line.split()[0] for line in lines] == list(registry.checkpoints())
    for column in ("ARCHITECTURE", "LICENSE", "REPOSITORY", "REVISION"):
        at = head.index(column)
        assert all(line[at - 1] == " " and line[at] != " " for line in lines), column
    assert "124M" in lines[0]
    assert lines[0].endswith("main (unpinned)")


def test_list_as_json(run: Any) -> None:
    code, out, _ = run("list", "--json")
    first = json.loads(out)[0]
    assert code == 0
    assert first == {
        "name": "gpt2",
        "architecture": "gpt2",
        "parameters": 124439808,
        "license": "MIT",
        "repo": "openai-community/gpt2",
        "revision": "main",
        "pinned": False,
    }


def test_list_and_info_are_functions_too() -> None:
    assert [entry.name for entry in zoo.list()] == list(registry.checkpoints())
    assert zoo.info("llama2-7b").parameters == 6738415616


# --- info ----------------------------------------------------------------------------------------


def test_info_of_a_name_is_answered_offline(run: Any, no_sockets: None) -> None:
    code, out, err = run("info", "llama3.2-1b")
    assert (code, err) == (0, "")
    for line in (
        "architecture  llama",
        "class         LlamaForCausalLM",
        "head          lm",
        "parameters    1,235,814,400",
        "license       Llama 3.2 Community",
        "repository    meta-llama/Llama-3.2-1B",
        "revision      main (unpinned)",
        "num_key_value_heads      8",
    ):
        assert line in out


def test_info_of_a_name_that_is_not_cached_imports_no_client(tmp_path: Path) -> None:
    code = (
        "import sys, zoo; zoo.info('gpt2'); print('huggingface_hub.file_download' in sys.modules)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "False\n"


def test_info_of_changed_fields_describes_that_model() -> None:
    whole, less = info.info("gpt2"), info.info("gpt2", config={"layers": 1})
    assert (whole.parameters, less.parameters) == (124_439_808, 46_473_216)
    with pytest.raises(ConfigError, match="nonsense: no such field"):
        info.info("gpt2", config={"nonsense": 3})


def test_a_pinned_revision_is_not_called_unpinned() -> None:
    entry = registry.find("gpt2")
    pinned = entry._replace(revision="a" * 40)
    assert (entry.pinned, pinned.pinned) == (False, True)


def test_info_of_a_directory_reads_config_and_headers(run: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    config = {"model_type": "gpt2", "architectures": ["GPT2Model"], "n_layer": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    code, out, err = run("info", str(tmp_path))
    assert (code, err) == (0, "")
    size = (tmp_path / "model.safetensors").stat().st_size
    for line in (
        f"  kind          safetensors, 1 file, {size} bytes\n",
        "  head          none, of lm, none, ",
        "  tensors       2\n    F32         6 values, 24 bytes\n",
        "    BF16        5 values, 10 bytes\n",
        "  files         model.safetensors\n",
    ):
        assert line in out
    report = info.info(tmp_path)
    assert report.stored is not None
    assert (report.stored.bytes, report.parameters) == (34, None)
    # the same by a file of it, and for programs
    assert info.info(tmp_path / "model.safetensors").stored == report.stored
    code, out, _ = run("info", str(tmp_path), "--json")
    stored = json.loads(out)["stored"]
    assert (code, stored["dtype_bytes"], stored["size"]) == (0, {"F32": 24, "BF16": 10}, size)


def test_info_of_a_file_loads_no_torch(tmp_path: Path) -> None:
    """Its import alone would take longer than all else."""
    import torch

    shapes = {"wte": (7, 4), "wpe": (5, 4), "ln_f": (4,)}
    tensors = {f"transformer.{n}.weight": torch.ones(shape) for n, shape in shapes.items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    counted = f"zoo.info({str(tmp_path)!r}).stored.tensors"
    code = f"import sys, zoo; print({counted}, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "3 False\n"


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("meta", "a file of torch.save, 1 file"),
        ("gguf", "GGUF, 1 file"),
        ("llama2c", "llama2.c's .bin, 1 file"),
        ("llama2c-q8", "int8 in groups of "),
        ("native", "safetensors, 1 file"),
    ],
)
def test_info_of_every_kind_of_file(run: Any, tmp_path: Path, to: str, words: str) -> None:
    """Its bytes are the files', but for headers."""
    from zoo.parity.gates import trips

    zoo.save(trips.model_of(registry.architectures()["llama"], to), tmp_path / to, to=to)
    code, out, err = run("info", str(tmp_path / to))
    assert (code, err) == (0, "") and words in out
    for word in (f"  dialect +{to}", "  architecture +llama\n", "    dim" if to != "gguf" else ""):
        assert re.search(word, out)
    stored = info.info(tmp_path / to).stored
    assert stored is not None and 0 <= stored.size - stored.bytes < 20_000


def test_the_tree_folds_equal_blocks_and_names_ties() -> None:
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 3)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)) for _ in range(4)
            )
            self.head = nn.Linear(3, 7, bias=False)
            self.head.weight = self.embed.weight

    head, *lines = info.tree(Model())
    assert head.endswith(f"Model  {7 * 3 + 4 * (9 + 3 + 6)} parameters")
    assert lines == [
        "  embed: weight [7 3]",
        "  blocks",
        "    0 … 3",
        "      0: weight [3 3], bias [3]",
        "      1: weight [3], bias [3]",
        "  head: weight = embed.weight",
    ]


# --- verify and convert --------------------------------------------------------------------------


def test_verify_exits_with_1_where_parity_fails(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(ref: str | None, *, all: bool, **more: Any) -> Any:
        return SimpleNamespace(
            ok=ref == "gpt2",
            to_text=lambda color: f"{ref} all={all} color={color}",
            to_json=lambda: {"ok": False},
        )

    monkeypatch.setattr(zoo, "verify", verify, raising=False)
    assert run("verify", "gpt2") == (0, "gpt2 all=False color=False\n", "")
    assert run("verify", "llama") == (1, "llama all=False color=False\n", "")
    assert run("verify", "--all", "--json") == (1, '{\n  "ok": false\n}\n', "")
    assert run("verify", "--all") == (1, "None all=True color=False\n", "")


def test_verify_takes_either_a_name_or_all(run: Any) -> None:
    assert run("verify")[0] == 2
    assert run("verify", "gpt2", "--all")[0] == 2


def test_convert_hands_its_options_to_the_function(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    others: list[dict[str, Any]] = []

    def convert(src: str, dst: Path, *, to: str, force: bool, **more: Any) -> Path:
        calls.append((src, dst, to, force))
        others.append(more)
        return dst

    monkeypatch.setattr(zoo, "convert", convert, raising=False)
    assert run("convert", "x", "--to", "hf", "--out", "y", "--force")[0] == 0
    code, out, _ = run("convert", "hf:org/repo@v1")
    assert (code, out) == (0, "hf:org/repo@v1 -> repo-native (native)\n")
    run("convert", "some/dir/")
    assert calls == [
        ("x", Path("y"), "hf", True),
        ("hf:org/repo@v1", Path("repo-native"), "native", False),
        ("some/dir/", Path("dir-native"), "native", False),
    ]
    asked = ("--dtype", "bfloat16", "--memory", "8M", "--shard", "2GB", "--restart")
    run("convert", "x", *asked, "--allow-nonfinite", "--no-sha256", "--quiet")
    assert others[0].pop("tell") and others[-1].pop("tell")
    names = ("dtype", "max_shard_size", "part")
    nothing = {**dict.fromkeys(names), "restart": False}
    assert others[0] == {**nothing, "allow_nonfinite": False, "sha256": True}
    assert others[-1] == {
        "dtype": "bfloat16",
        "max_shard_size": 2 << 30,
        "memory": 8 << 20,
        "restart": True,
        "part": None,
        "allow_nonfinite": True,
        "sha256": False,
    }
    assert run("convert", "x", "--memory", "much")[0] == 2


def test_a_failure_is_one_line_and_a_code(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OutputExists("y is there already; --force replaces it")

    def lack(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", "/x")

    def differ(*args: Any, **kwargs: Any) -> None:
        raise ParityError("logits differ")

    monkeypatch.setattr(zoo, "convert", refuse, raising=False)
    line = "zoo: error: y is there already; --force replaces it\n"
    assert run("convert", "x", "--out", "y") == (1, "", line)
    monkeypatch.setattr(zoo, "convert", lack, raising=False)
    assert run("convert", "x") == (1, "", "zoo: error: /x: Permission denied\n")
    monkeypatch.setattr(zoo, "verify", differ, raising=False)
    assert run("verify", "x") == (1, "", "zoo: error: logits differ\n")
    for command in ("diff", "diagnose"):  # 1 is an answer of theirs
        monkeypatch.setattr(zoo, command, lack, raising=False)
        assert run(command, "x") == (2, "", "zoo: error: /x: Permission denied\n")


# --- mistakes ------------------------------------------------------------------------------------


def wrong_directory(at: Path) -> str:
    (at / "notes.txt").touch()
    return str(at)


def unsupported(at: Path) -> str:
    config = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (at / "config.json").write_text(json.dumps(config))
    return str(at)


def no_weights(at: Path) -> str:
    (at / "config.json").write_text('{"model_type": "gpt2"}')
    return str(at)


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (lambda at: "gtp2", 2, "Did you mean gpt2?"),
        (lambda at: "openai-community/gpt2", 2, "write hf:openai-community/gpt2"),
        (lambda at: str(at / "nope"), 1, "no such directory"),
        (wrong_directory, 1, "no config.json"),
        (unsupported, 1, "'mamba' and class MambaForCausalLM; zoo implements bert, "),
        (no_weights, 1, "model.safetensors"),
    ],
)
def test_a_mistake_is_one_line(
    run: Any, tmp_path: Path, no_sockets: None, make: Any, code: int, says: str
) -> None:
    got, out, err = run("info", make(tmp_path))
    assert (got, out) == (code, "")
    assert err.startswith("zoo: error: ")
    assert says in err
    assert err.count("\n") == 1


def test_a_command_line_without_sense_prints_the_usage(run: Any) -> None:
    for arguments in ((), ("lst",), ("list", "--yaml"), ("convert", "x", "--to", "tflite")):
        code, _, err = run(*arguments)
        assert code == 2
        assert "usage: zoo" in err
    assert run("--version")[:2] == (0, f"zoo {zoo.__version__}\n")


def test_misspelt_options_are_refused_with_what_is_near(run: Any) -> None:
    code, _, err = run("generate", "gpt2", "abc", "--temprature", "1")
    assert code == 2
    assert (
        "usage: zoo generate" in err
        and "no such option: --temprature. Did you mean --temperature" in err
    )
    assert run("score", "gpt2", "file", "more")[2].endswith("unrecognized arguments: more\n")


# --- as a process --------------------------------------------------------------------------------


@pytest.mark.slow
def test_module_tool_and_command_are_the_same(root: Path) -> None:
    def ask(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=root, capture_output=True, text=True, timeout=60
        )
        assert done.returncode in (0, 2)
        return done.stdout + done.stderr

    assert ask("-m", "zoo", "list") == ask("-c", "import zoo.cli.app; zoo.cli.app.main(['list'])")
    assert ask("-m", "zoo", "convert", "gtp2") == ask("tools/convert.py", "gtp2")


def test_a_reader_that_leaves_is_no_error(root: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "zoo", "list"],
        cwd=root,
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=PATIENCE,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_json_is_json_whatever_can_be_written(root: Path, tmp_path: Path) -> None:
    CharTokenizer.of("aé漢").save(tmp_path)
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-m", "zoo", "tokenize", str(tmp_path), "é漢", "--json"],
        cwd=root,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=PATIENCE,
        check=True,
    )
    assert json.loads(done.stdout) == {"ids": [1, 2], "tokens": ["é", "漢"]}
