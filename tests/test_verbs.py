"""Verbs of Model look and act as methods, and type checkers see them and the public names."""

import ast
import gc
import inspect
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import stubs
import torch
from tiny import build

import zoo
from zoo import verbs
from zoo.components import model as components_model
from zoo.components.model import Model
from zoo.errors import UsageError

TARGETS = {name: target.strip("@()") for name, target in zoo.VERBS.items()}


def test_verbs_are_methods_with_the_functions_own_signature() -> None:
    assert list(inspect.signature(Model.generate).parameters)[:2] == ["model", "input_ids"]
    assert "max_new_tokens" in (inspect.getdoc(Model.generate) or "")
    model = build("gpt2").eval()
    assert next(iter(inspect.signature(model.generate).parameters)) == "input_ids"
    ids = torch.tensor([[1, 2]])
    assert model.generate(ids, max_new_tokens=2, eos_token_id=[]).shape == (1, 4)


def test_class_verbs_are_told_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("zoo.loading.from_pretrained", lambda *arguments: seen.append(arguments))
    type(build("gpt2")).from_pretrained("x")  # type: ignore[no-untyped-call]
    assert seen == [(zoo.models.gpt2.Model, "x")]


def test_an_attribute_is_computed_once_and_may_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build("gpt2"), list[Any]()
    with pytest.raises(UsageError, match="no tokenizer"):
        _ = model.tokenizer
    monkeypatch.setattr("zoo.tokenizers.tokenizer_of", lambda m: calls.append(m) or "one")
    assert (model.tokenizer, model.tokenizer, calls) == ("one", "one", [model])
    model.tokenizer = "another"
    assert model.tokenizer == "another"


def test_type_checkers_see_the_public_names() -> None:
    assert stubs.STUB.read_text(encoding="utf-8") == stubs.stub(), "run: python tools/stubs.py"


def test_type_checkers_see_the_verbs() -> None:
    """Each verb of the table is declared in components/model.py, with the real parameters."""
    tree = ast.parse(Path(components_model.__file__).read_text(encoding="utf-8"))
    (owner,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Model")
    (block,) = (node for node in owner.body if isinstance(node, ast.If))
    declared = {node.name: node for node in block.body if isinstance(node, ast.FunctionDef)}
    assert list(declared) == list(zoo.VERBS)
    for name, node in declared.items():
        real = list(inspect.signature(getattr(Model, name)).parameters.values())
        first = 0 if zoo.VERBS[name].startswith("@") else 1  # the model itself
        positional = [p.name for p in real[first:] if p.kind == p.POSITIONAL_OR_KEYWORD]
        assert [a.arg for a in node.args.args[1:]] == positional, name
        more = any(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in real)
        assert (node.args.kwarg is not None) == more, name


def test_importing_models_imports_no_verb() -> None:
    code = "import sys, zoo.models.llama; print([m for m in sys.modules if m.startswith('zoo.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {target.partition(":")[0] for target in TARGETS.values()}
    assert not modules & set(ast.literal_eval(done.stdout))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("module", ["zoo.errors", "zoo.no_such_module"])
def test_the_garbage_collector_is_as_before_after_an_import(enabled: bool, module: str) -> None:
    gc.enable() if enabled else gc.disable()
    try:
        with nullcontext() if module == "zoo.errors" else pytest.raises(ModuleNotFoundError):
            verbs.resolve(module)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
