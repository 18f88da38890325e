"""House rules that hold themselves: libraries, siblings, start-up, wheel, forbidden calls."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import PATIENCE
from source_tree import SourceTree, is_within
from tiny import build

import zoo
from zoo import registry

ROOT = Path(__file__).parents[1]
PYTHON = [sys.executable, "-X", "utf8"]


# --- libraries -----------------------------------------------------------------------------------

# room or module -> the libraries it may import beside the standard one; the longest name counts
LIBRARIES = {
    "converters": {"torch", "einops", "safetensors", "yaml", "xxhash", "pydantic"},
    "zoo": {"torch"},
    "zoo.errors": set(),
    "zoo.registry": {"pydantic"},
    "zoo.components": {"torch", "einops"},
    "zoo.components.config": {"pydantic", "pydantic_core"},
    "zoo.models": {"torch", "einops", "pydantic"},
    "zoo.checkpoints": {"torch", "huggingface_hub"},
    "zoo.checkpoints.oracle": {"torch", "safetensors", "transformers"},
    "zoo.tokenizers": {"torch", "tiktoken", "sentencepiece", "tokenizers", "jinja2"},
    "zoo.saving.graphs": {"torch", "onnx_ir"},
    "zoo.training": {"torch", "pydantic", "yaml", "wandb", "pyarrow"},
    "zoo.parity": {"torch", "einops", "safetensors", "yaml"},
    "zoo.diagnosis": {"torch", "einops", "safetensors", "yaml"},
    "zoo.cli": {"torch", "typer", "click", "rich"},
}


def test_rooms_import_their_libraries_alone(code: SourceTree) -> None:
    ours = {module.partition(".")[0] for module in code.sources}
    wrong = []
    for source in code.within("zoo", "converters"):
        room = max((r for r in LIBRARIES if is_within(source.module, r)), key=len)
        for line in code.imports(source):
            library = line.module.partition(".")[0]
            if library not in LIBRARIES[room] | ours | sys.stdlib_module_names:
                wrong.append(f"{source.path}:{line.line} imports {line.module}")
    assert wrong == []


def test_the_reference_is_imported_only_when_called(code: SourceTree) -> None:
    at_top = [
        source.path
        for source in code.within("zoo", "converters", "tools", "examples")
        for line in code.imports(source)
        if is_within(line.module, "transformers") and not line.in_function and not line.for_types
    ]
    assert at_top == []


# --- siblings ------------------------------------------------------------------------------------


def test_models_specs_and_entries_have_each_other() -> None:
    models = {path.stem for path in (ROOT / "zoo/models").glob("[!_]*.py")}
    specs = {path.name for path in (ROOT / "converters/specs").iterdir()} - {"common"}
    entries = registry.architectures().values()
    assert {entry.module for entry in entries} == models
    assert {entry.spec for entry in entries} == specs


def test_every_architecture_has_checkpoints_and_variants() -> None:
    names = set(registry.architectures())
    assert {entry.architecture for entry in registry.checkpoints().values()} == names
    assert set(registry.variants()) == names


def test_heads_are_those_of_the_model() -> None:
    """All of them are somebody's, and none is made up."""
    declared: dict[type, set[str]] = {}
    for entry in registry.architectures().values():
        heads = declared.setdefault(entry.model, set())
        heads.update(head for names in entry.heads.values() for head in names)
    assert declared == {model: set(model.heads) for model in declared}


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


def forbidden(nodes: Iterable[ast.AST]) -> list[str]:
    """Calls that may run what a file holds."""
    calls = []
    for node in nodes:
        if isinstance(node, ast.Call):
            if (called := dotted(node.func)) in CALLS:
                calls.append(called)
            calls += [
                f"{k.arg}={ast.unparse(k.value)}"
                for k in node.keywords
                if k.arg in FLAGS
                and not (isinstance(k.value, ast.Constant) and k.value.value is not FLAGS[k.arg])
            ]
            if called == "torch.load" and "weights_only" not in {k.arg for k in node.keywords}:
                calls.append("torch.load without weights_only")
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "yaml"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            calls += sorted(names & CALLS)
    return calls


def test_nothing_runs_what_a_file_holds(code: SourceTree) -> None:
    calls = {source.path: forbidden(source.nodes) for source in code.within()}
    assert len(calls) > 100
    assert {path: names for path, names in calls.items() if names} == {}


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
    assert forbidden(ast.walk(ast.parse(text)))


def test_the_rule_lets_pass_what_is_safe() -> None:
    text = "model.eval(); torch.load(f, weights_only=True); yaml.safe_load(f)"
    assert forbidden(ast.walk(ast.parse(text))) == []


TEXT = {".py", ".md", ".yaml", ".toml", ".txt", ".sh", ""}
FOLDERS = ("zoo", "converters", "tools", "examples", "tests", "docs", ".ci")


def texts() -> list[Path]:
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return [
        path
        for path in sorted([*inside, *ROOT.iterdir()])
        if path.is_file() and path.suffix in TEXT and path.name not in (".coverage", ".git")
    ]


def test_no_file_names_a_machines_folders() -> None:
    """Built from parts, so that this file does not hold what it looks for."""
    roots = "|".join(["ho" + "me", "ro" + "ot", "wo" + "rk", "Us" + "ers", "fa" + "rm"])
    pattern = re.compile(rf"(?<![\w.~}}])/(?:{roots})/\w+")
    named = {
        path.relative_to(ROOT).as_posix(): names
        for path in texts()
        if (names := pattern.findall(path.read_text(encoding="utf-8")))
    }
    assert named == {}
