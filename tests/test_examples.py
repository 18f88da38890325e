"""The examples in the docstrings of public functions run, and print what they say.

They run in a directory that holds the checkpoints `tiny-gpt2`, `tiny-llama` and `tiny-bert`, each
with a tokenizer, so that an example can begin with `zoo.load("tiny-gpt2")`. `zoo` and `torch` are
imported.
"""

import doctest
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build, hot

import zoo
from zoo.components.model import Model
from zoo.tokenizers import CharTokenizer

TEXT = "abcdefghijklmnopqrstuvwxyz .,"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "fox", "dog", "runs"]
MODULES = ["zoo.tokenizers", "zoo.interpret", "zoo.lora", "zoo.text.generate"]


def public() -> Iterator[tuple[str, Any]]:
    """Public functions of the package, of `Model`, and of the modules that users import."""
    for name in zoo.__all__:
        yield f"zoo.{name}", getattr(zoo, name)
    for name in dir(Model):
        if not name.startswith("_") and not hasattr(torch.nn.Module, name):
            yield f"Model.{name}", getattr(Model, name)
    for path in MODULES:
        module = import_module(path)
        for name in getattr(module, "__all__", dir(module)):
            yield f"{path}.{name}", getattr(module, name)


def examples() -> list[Any]:
    """Each docstring with an example once, under its first name."""
    finder, cases = doctest.DocTestFinder(recurse=True, exclude_empty=True), dict[str, Any]()
    for name, value in public():
        is_ours = getattr(value, "__module__", "").startswith(("zoo", "converters"))
        if not is_ours or not (inspect.isroutine(value) or inspect.isclass(value)):
            continue
        for test in finder.find(inspect.unwrap(value), name, module=False, globs={}):
            if test.examples:
                cases.setdefault(test.docstring, pytest.param(test, id=test.name))
    return list(cases.values())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("examples")
    for name in ("gpt2", "llama"):
        zoo.save(hot(build(name, vocab=len(TEXT), positions=64)), root / f"tiny-{name}")
        CharTokenizer.of(TEXT).save(root / f"tiny-{name}")
    zoo.save(hot(build("bert", vocab=len(WORDS))), root / "tiny-bert")
    (root / "tiny-bert" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return root


@pytest.mark.parametrize("example", examples())
def test_example_prints_what_it_says(
    example: doctest.DocTest, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in checkpoints.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    example.globs.update(zoo=zoo, torch=torch)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    result = runner.run(example, out=report.append)
    assert result.failed == 0, "".join(report)


def test_an_example_that_is_wrong_fails() -> None:
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner().run(test, out=lambda text: None).failed == 1


def test_functions_for_text_have_examples() -> None:
    names = {example.id for example in examples()}
    assert {"zoo.generate", "zoo.perplexity", "zoo.fill", "zoo.embed"} <= names


def test_what_every_user_calls_first_has_an_example() -> None:
    names = {example.id for example in examples()}
    assert {"zoo.load", "zoo.info", "zoo.list", "Model.from_pretrained"} <= names
