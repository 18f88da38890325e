"""The contract of the house: floors, circles, names and budgets.

Each rule is one test that lists every offender. No rule has a list of exceptions.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from source_tree import Source, SourceTree, circles, is_within

import zoo

# Rooms from the ground up. A module imports its own room and the floors below, nothing else.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("zoo.errors", "zoo.terminal", "zoo.version", "zoo.verbs"),
    ("converters", "zoo.components"),
    ("zoo.models", "zoo.registry", "zoo.interpret"),
    ("zoo.evidence",),
    ("zoo.checkpoints",),
    ("zoo.tokenizers", "zoo.lora"),
    ("zoo.prepared",),
    ("zoo.loading",),
    ("zoo.text",),
    ("zoo.saving",),
    ("zoo.training",),
    ("zoo.parity",),
    ("zoo.diagnosis",),
    ("zoo.report",),
    ("zoo",),  # zoo/__init__.py itself: the public names of all rooms above
    ("zoo.cli",),
    ("zoo.__main__", "tools", "examples"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LOOSE = 10  # Python files directly in zoo/
MODEL_LINES, SPEC_LINES, SPEC_COLUMNS, ARGUMENTS = 100, 50, 110, 10
WITHOUT_DOCSTRING = 0.05
# not used as names of variables, parameters, fields, functions or classes
WORDS = {
    *("found", "said", "told", "known", "held", "given", "taken"),
    *("odd", "otherwise", "anew"),
}


def assert_none(offenders: list[str]) -> None:
    """Fail with every offender, a line each."""
    assert not offenders, f"{len(offenders)} offenders:\n" + "\n".join(offenders)


def room_of(module: str) -> str:
    """The room that a module belongs to; empty where it belongs to none."""
    if module == "zoo":
        return "zoo"
    rooms = [room for room in FLOOR_OF if room != "zoo" and is_within(module, room)]
    return max(rooms, key=len, default="")


# --- imports -------------------------------------------------------------------------------------


def test_every_file_belongs_to_a_room(code: SourceTree) -> None:
    sources = code.within("zoo", "converters", "tools", "examples")
    assert len(sources) > 100
    assert_none([source.path for source in sources if not room_of(source.module)])


def test_imports_point_down(code: SourceTree) -> None:
    """Imports in functions and under TYPE_CHECKING count."""
    upward = [
        f"{source.path}:{line.line} imports {line.module}"
        for source in code.within("zoo", "converters", "tools", "examples")
        if (own := room_of(source.module))
        for line in code.imports(source)
        if (other := room_of(line.module)) and other != own
        if FLOOR_OF[other] >= FLOOR_OF[own]
    ]
    assert_none(upward)


def test_models_know_components_and_errors_alone(code: SourceTree) -> None:
    """A model's file is made of components: nothing else of ours is needed to read it."""
    allowed = ("zoo.components", "zoo.errors", "zoo.models")
    others = [
        f"{source.path}:{line.line} imports {line.module}"
        for source in code.within("zoo.models")
        for line in code.imports(source)
        if room_of(line.module) and not any(is_within(line.module, room) for room in allowed)
    ]
    assert_none(others)


def test_no_circle_of_files(code: SourceTree) -> None:
    graph = {m: below for m, below in code.graph.items() if not is_within(m, "tests")}
    assert_none([", ".join(circle) for circle in circles(graph)])


def test_circles_are_seen() -> None:
    graph = {"a": "bd", "b": "c", "c": "a", "d": "", "e": "f", "f": "e"}
    assert circles(graph) == [["a", "b", "c"], ["e", "f"]]


def test_tests_import_helpers_and_never_another_test_file(code: SourceTree) -> None:
    tests = {source.module.rpartition(".")[2] for source in code.within("tests")}
    names = {name for name in tests if name.startswith("test_")}
    assert_none(
        [
            f"{source.path}:{line.line} imports {line.module}"
            for source in code.within("tests")
            for line in code.imports(source)
            if line.module.rpartition(".")[2] in names
        ]
    )


# --- names ---------------------------------------------------------------------------------------


def test_public_names_resolve() -> None:
    missing = [name for name in zoo.__all__ if not hasattr(zoo, name)]
    assert_none(missing)


def test_verbs_resolve_to_higher_floors() -> None:
    """A verb is a method of `Model` whose function lives above: `"module:function"`.

    `@` before it marks a class method, `()` behind it an attribute.
    """
    wrong = []
    for name, target in zoo.VERBS.items():
        module, _, function = target.strip("@()").partition(":")
        if not callable(getattr(import_module(module), function, None)):
            wrong.append(f"{name}: {target} does not exist")
        elif FLOOR_OF[room_of(module)] <= FLOOR_OF["zoo.components"]:
            wrong.append(f"{name}: {target} is not above zoo.components")
    assert_none(wrong)


def test_ten_files_lie_loose_in_zoo(code: SourceTree) -> None:
    loose = [s.path for s in code.within("zoo") if s.path.count("/") == 1]
    assert len(loose) <= LOOSE, loose


def test_no_file_or_folder_is_named_like_a_public_function(root: Path) -> None:
    """`import zoo.diff` would replace the function `zoo.diff`."""
    names = {path.stem for path in (root / "zoo").iterdir() if path.suffix in ("", ".py")}
    functions = {name for name in zoo.__all__ if not isinstance(getattr(zoo, name), type(zoo))}
    assert_none(sorted(names & functions))


def test_public_classes_are_defined_once(code: SourceTree) -> None:
    places = defaultdict(list)
    for source in code.within("zoo", "converters"):
        if not is_within(source.module, "zoo.models"):
            for node in source.tree.body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(source.path)
    assert_none([f"{n}: {', '.join(paths)}" for n, paths in places.items() if len(paths) > 1])


def names_bound(source: Source) -> Iterator[tuple[int, str]]:
    """(line, name) of every variable, parameter, attribute, function and class."""
    for node in source.nodes:
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield node.lineno, name
            case ast.ExceptHandler(name=str(name)):
                yield node.lineno, name


def test_words_that_are_no_names(code: SourceTree) -> None:
    bad = [
        f"{source.path}:{line} {name}"
        for source in code.within()
        for line, name in names_bound(source)
        if name.strip("_").lower() in WORDS
    ]
    assert_none(bad)


def public_functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.startswith("_"):
                continue
            if isinstance(node, ast.ClassDef):
                yield from public_functions(node.body)
            else:
                yield node


def test_public_functions_have_docstrings(code: SourceTree) -> None:
    functions = [
        (f"{source.path}:{node.lineno} {node.name}", ast.get_docstring(node))
        for source in code.within("zoo", "converters")
        for node in public_functions(source.tree.body)
    ]
    bare = [name for name, docstring in functions if not docstring]
    if len(bare) > WITHOUT_DOCSTRING * len(functions):
        assert_none([f"of {len(functions)} public functions:", *bare])


# --- budgets -------------------------------------------------------------------------------------


def test_models_fit_on_a_page(code: SourceTree) -> None:
    counts = {s.path: s.text.count("\n") for s in code.within("zoo.models")}
    assert len(counts) > 3
    assert_none([f"{path}: {n} lines" for path, n in counts.items() if n > MODEL_LINES])


def test_specs_fit_on_a_page(root: Path) -> None:
    """A file a dialect, those that every architecture shares included."""
    folder = root / "converters" / "specs"
    files = list(folder.rglob("*.yaml"))
    assert len(files) > 3
    long = [
        f"{path.relative_to(folder)}: {count} lines"
        for path in files
        if (count := path.read_text(encoding="utf-8").count("\n")) > SPEC_LINES
    ]
    wide = [
        f"{path.relative_to(folder)}:{number} {len(line)} columns"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > SPEC_COLUMNS
    ]
    assert_none(long + wide)


def test_components_take_ten_arguments_at_most(code: SourceTree) -> None:
    long = []
    for source in code.within("zoo.components"):
        for node in source.nodes:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                count = len(node.args.args) + len(node.args.kwonlyargs) - 1
                if count > ARGUMENTS:
                    long.append(f"{source.path}:{node.lineno} takes {count}")
    assert_none(long)
