"""House rules that hold themselves: arrows, budgets, siblings, start-up, wheel, forbidden calls."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import PATIENCE
from tiny import build

import zoo
from zoo import registry

ROOT = Path(__file__).parents[1]
PYTHON = [sys.executable, "-X", "utf8"]


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_look_at() -> None:
    """Else every rule below would hold of nothing."""
    assert len(sources("zoo", "converters")) > 15


# --- arrows --------------------------------------------------------------------------------------

STANDARD = sys.stdlib_module_names
# module or package -> what it may import beside the standard library and itself; first that fits
ARROWS = {
    "zoo.errors": set(),
    "zoo.models": {"zoo.components", "zoo.errors", "torch", "einops"},
    "zoo.components": {"zoo.errors", "torch", "einops", "pydantic", "pydantic_core"},
    "zoo.registry": {"zoo.errors", "zoo.models", "converters"},
    "zoo.checkpoints.downloads": {"zoo.errors", "huggingface_hub"},
    "zoo.checkpoints.sources": {
        *("zoo.errors", "zoo.registry", "zoo.checkpoints.downloads", "zoo.terminal"),
        *("converters", "huggingface_hub"),
    },
    "zoo.tokenizers": {
        *("zoo", "converters", "torch"),
        *("tiktoken", "sentencepiece", "tokenizers", "jinja2"),
    },
    "zoo.saving.graphs": {"zoo", "converters", "torch", "onnx_ir"},
    "zoo.parity": {"zoo", "converters", "torch", "einops", "safetensors", "transformers", "yaml"},
    "zoo": {"zoo", "converters", "torch"},
    "converters": {"zoo.errors", "torch", "einops", "safetensors", "yaml", "xxhash", "pydantic"},
}
# (file, what it imports): why it may
EXCEPTIONS = {
    ("zoo/components/model.py", "zoo.loading"): "from_pretrained on the class, when called",
    ("zoo/components/model.py", "zoo.saving.save"): "save_pretrained on the class, when called",
    ("zoo/components/model.py", "zoo.text.generate"): "generate on the model, when called",
    ("zoo/components/model.py", "zoo.interpret"): "looking inside, on the model, when called",
    ("zoo/components/model.py", "zoo.lora"): "adapters on the model, when asked for",
    ("zoo/components/model.py", "zoo.tokenizers"): "the tokenizer beside the weights, when asked",
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, at the top level?) of every import that runs; those for types alone do not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = path.relative_to(ROOT).parts[:-1]

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            match child:
                case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                    for other in child.orelse:
                        yield from walk(other, top)
                case ast.Import():
                    yield from ((alias.name, top) for alias in child.names)
                case ast.ImportFrom():
                    base = package[: len(package) - child.level + 1] if child.level else ()
                    module = ".".join([*base, *([child.module] if child.module else [])])
                    for alias in child.names:
                        below = f"{module}.{alias.name}"
                        yield (below if is_module(below) else module, top)
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                    yield from walk(child, False)
                case _:
                    yield from walk(child, top)

    yield from walk(tree, True)


def is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("path", sources("zoo", "converters"), ids=name)
def test_arrows(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    rule = next(package for package in ARROWS if within(module, package))
    # the package itself, without what has a rule of its own
    allowed = ARROWS[rule] | ({rule} if rule != "zoo" else set())
    wrong = [
        imported
        for imported, _ in imports(path)
        if imported.partition(".")[0] not in STANDARD
        and not any(within(imported, package) for package in allowed)
        and (name(path), imported) not in EXCEPTIONS
    ]
    assert not wrong, f"{rule} may import {sorted(ARROWS[rule])}"


def test_exceptions_are_still_needed() -> None:
    there = {(name(path), i) for path in sources("zoo", "converters") for i, _ in imports(path)}
    assert set(EXCEPTIONS) <= there


def test_the_reference_is_imported_only_when_called() -> None:
    at_top = [
        name(path)
        for path in sources("zoo", "converters", "tools", "examples")
        for imported, top in imports(path)
        if within(imported, "transformers") and top
    ]
    assert at_top == []


# --- budgets -------------------------------------------------------------------------------------

OVER_BUDGET = {  # file: reason
    "zoo/models/t5.py": "two stacks, and biases by distance that no other architecture has",
    "zoo/models/deberta.py": "two versions, with attention and a convolution that no other has",
}


def lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


@pytest.mark.parametrize(
    ("pattern", "most"), [("zoo/models/*.py", 100), ("converters/specs/*/*.yaml", 50)]
)
def test_models_and_specs_keep_their_budget_of_lines(pattern: str, most: int) -> None:
    counts = {name(path): lines(path) for path in ROOT.glob(pattern)}
    assert len(counts) >= 3
    assert {f: n for f, n in counts.items() if n > most and f not in OVER_BUDGET} == {}
    over = [f for f in OVER_BUDGET if f in counts]
    assert all(counts[f] > most for f in over)  # no exception outlives its reason


def test_specs_keep_within_110_columns() -> None:
    wide = [
        f"{name(path)}:{number}: {len(line)}"
        for path in ROOT.glob("converters/specs/*/*.yaml")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 110
    ]
    assert wide == []


def test_ten_arguments_at_most() -> None:
    """To construct a component."""
    long = [
        f"{name(path)}: {node.name}"
        for path in sources("zoo/components")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == "__init__"
        if len(method.args.args) + len(method.args.kwonlyargs) - 1 > 10
    ]
    assert long == []


# --- siblings ------------------------------------------------------------------------------------


def test_models_specs_and_entries_have_each_other() -> None:
    models = {path.stem for path in (ROOT / "zoo/models").glob("*.py")} - {"__init__"}
    specs = {path.name for path in (ROOT / "converters/specs").iterdir()} - {"common"}
    known = registry.architectures().values()
    assert {entry.module for entry in known} == models
    assert {entry.spec for entry in known} == specs


def test_every_architecture_has_checkpoints_and_variants() -> None:
    known = set(registry.architectures())
    assert {entry.architecture for entry in registry.checkpoints().values()} == known
    assert set(registry.variants()) == known


@pytest.mark.parametrize("entry", registry.architectures().values(), ids=lambda e: e.name)
def test_heads_are_those_of_the_model(entry: registry.Architecture) -> None:
    """All of them are somebody's, and none is made up."""
    heads = {
        head
        for other in registry.architectures().values()
        if other.model is entry.model
        for names in other.heads.values()
        for head in names
    }
    assert heads == set(entry.model.heads)


# --- starting up ---------------------------------------------------------------------------------


def output(*arguments: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [*PYTHON, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "einops",
    "yaml",
    "pydantic",
)
LOADED = f"import sys; print([m for m in {HEAVY} if m in sys.modules])"


def test_importing_zoo_loads_nothing_heavy() -> None:
    assert output("-c", f"import zoo; {LOADED}").strip() == "[]"
    assert "torch" not in output("-c", f"import zoo.cli.app; zoo.cli.app.main(['list']); {LOADED}")


def test_loading_brings_in_neither_reference_nor_hub() -> None:
    loaded = output("-c", f"import zoo; zoo.load; {LOADED}")
    assert "torch" in loaded
    assert "transformers" not in loaded
    assert "huggingface_hub" not in loaded


# --- without NumPy -------------------------------------------------------------------------------

WITHOUT_NUMPY = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "numpy":
            raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

sys.meta_path.insert(0, Blocked())
"""


def test_nothing_needs_numpy_or_warns_that_it_is_absent(tmp_path: Path) -> None:
    """torch does, as soon as it is imported: before every output of an installed wheel."""
    zoo.save(build("llama", dim=64, hidden=96, heads=4).eval(), tmp_path / "hf")
    script = f"""{WITHOUT_NUMPY}
import zoo, zoo.cli.app
model = zoo.load("hf")
import torch
print(model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2).shape[1])
zoo.save(model, "saved", to="native")
for to, dtype in (("native", None), ("hf", "float16"), ("gguf", None), ("gguf", "q8_0")):
    zoo.convert("hf", f"{{to}}-{{dtype}}", to=to, dtype=dtype)
    zoo.load(f"{{to}}-{{dtype}}")
assert zoo.cli.app.main(["check", "gguf-q8_0"]) == 0
assert "numpy" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[0] == "5"


# --- the wheel -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_installed_wheel_has_registry_and_specs(tmp_path: Path) -> None:
    """Built and installed without a network; what it depends on comes from this environment."""
    output("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    output("-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel))
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))

    def ask(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = ask(str(python), "-c", "import zoo, converters; print(zoo.__file__)")
    assert Path(where.strip()).is_relative_to(home)
    assert ask(str(home / "bin" / "zoo"), "list") == output("-m", "zoo", "list")
    names = "import converters.spec as s; print(s.spec_names(), s.load_spec('gpt2').name)"
    assert ask(str(python), "-c", names) == output("-c", names)
    assert not (packages / "tests").exists()


# --- what nothing may do -------------------------------------------------------------------------

CALLS = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}
FLAGS = {"trust_remote_code": True, "weights_only": False}


def dotted(node: ast.expr) -> str:
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return f"{dotted(node.value)}.{node.attr}"
    return ""


@cache
def forbidden(text: str) -> list[str]:
    """Calls that may run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            if (called := dotted(node.func)) in CALLS:
                found.append(called)
            found += [
                f"{k.arg}={ast.unparse(k.value)}"
                for k in node.keywords
                if k.arg in FLAGS
                and not (isinstance(k.value, ast.Constant) and k.value.value is not FLAGS[k.arg])
            ]
            if called == "torch.load" and "weights_only" not in {k.arg for k in node.keywords}:
                found.append("torch.load without weights_only")
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "yaml"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += sorted(names & CALLS)
    return found


@pytest.mark.parametrize(
    "path", sources("zoo", "converters", "tools", "examples", "tests"), ids=name
)
def test_nothing_runs_what_a_file_holds(path: Path) -> None:
    assert forbidden(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "import pickle\npickle.load(f)",
        "from pickle import loads",
        "yaml.load(f)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "m.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_the_rule_sees_what_it_forbids(text: str) -> None:
    assert forbidden(text)


def test_the_rule_lets_pass_what_is_safe() -> None:
    assert forbidden("model.eval(); torch.load(f, weights_only=True); yaml.safe_load(f)") == []


TEXT = {".py", ".md", ".yaml", ".toml", ".txt", ".sh", ""}
FOLDERS = ("zoo", "converters", "tools", "examples", "tests", "docs", ".ci")


def texts() -> list[Path]:
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return [
        path
        for path in sorted([*inside, *ROOT.iterdir()])
        if path.is_file() and path.suffix in TEXT and path.name != ".coverage"
    ]


@pytest.mark.parametrize("path", texts(), ids=name)
def test_no_file_names_a_machines_folders(path: Path) -> None:
    """Built from parts, so that this file does not hold what it looks for."""
    roots = "|".join(["ho" + "me", "ro" + "ot", "wo" + "rk", "Us" + "ers", "fa" + "rm"])
    found = re.findall(rf"(?<![\w.~}}])/(?:{roots})/\w+", path.read_text(encoding="utf-8"))
    assert found == []
