"""The project's Python files, each read and parsed once: what they import and what they define."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FOLDERS = ("zoo", "converters", "tools", "examples", "tests")


@dataclass(frozen=True)
class Import:
    """One imported module, and whether the import stands in a function or for types alone."""

    module: str
    line: int
    in_function: bool
    for_types: bool


@dataclass(frozen=True)
class Source:
    """A file: its path below the root, its dotted module name, its text and its syntax tree."""

    path: str
    module: str
    text: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.endswith("/__init__.py")

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        return tuple(ast.walk(self.tree))


class SourceTree:
    """All files of the folders above, by module name."""

    def __init__(self, root: Path, folders: Iterable[str] = FOLDERS) -> None:
        self.sources: dict[str, Source] = {}
        for path in sorted(p for folder in folders for p in (root / folder).rglob("*.py")):
            below = path.relative_to(root)
            module = ".".join(below.with_suffix("").parts).removesuffix(".__init__")
            text = path.read_text(encoding="utf-8")
            self.sources[module] = Source(below.as_posix(), module, text, ast.parse(text))

    def within(self, *packages: str) -> list[Source]:
        """The files of some packages; of all of them if none is named."""
        return [
            source
            for source in self.sources.values()
            if not packages or any(is_within(source.module, package) for package in packages)
        ]

    def imports(self, source: Source) -> Iterator[Import]:
        """Every import, in functions and under TYPE_CHECKING too.

        `from zoo import loading` is an import of `zoo.loading`. Tools and tests import their
        siblings by bare names, which are completed here.
        """
        package = source.module.split(".")
        if not source.is_package:
            package = package[:-1]

        def walk(node: ast.AST, lazy: bool, typed: bool) -> Iterator[Import]:
            for child in ast.iter_child_nodes(node):
                match child:
                    case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                        for statement in child.body:
                            yield from walk(ast.Module([statement], []), lazy, True)
                        for statement in child.orelse:
                            yield from walk(ast.Module([statement], []), lazy, typed)
                    case ast.Import():
                        for alias in child.names:
                            name = self._complete(alias.name, source)
                            yield Import(name, child.lineno, lazy, typed)
                    case ast.ImportFrom():
                        base = package[: len(package) - child.level + 1] if child.level else []
                        name = ".".join([*base, *([child.module] if child.module else [])])
                        name = self._complete(name, source)
                        for alias in child.names:
                            below = f"{name}.{alias.name}"
                            target = below if below in self.sources else name
                            yield Import(target, child.lineno, lazy, typed)
                    case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                        yield from walk(child, True, typed)
                    case _:
                        yield from walk(child, lazy, typed)

        yield from walk(source.tree, False, False)

    def _complete(self, name: str, source: Source) -> str:
        for package in ("tools", "tests.support"):
            if is_within(source.module, package.partition(".")[0]):
                sibling = f"{package}.{name}"
                if sibling.partition(".")[0] != name and self._exists(sibling):
                    return sibling
        return name

    def _exists(self, name: str) -> bool:
        return any(is_within(module, name) for module in self.sources)

    @cached_property
    def graph(self) -> Mapping[str, frozenset[str]]:
        """Of each module those of ours that it imports."""
        return {
            module: frozenset(
                line.module
                for line in self.imports(source)
                if line.module in self.sources and line.module != module
            )
            for module, source in self.sources.items()
        }


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The sets of nodes that reach each other (strongly connected components), largest first."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for below in graph[node]:
            if below not in index:
                visit(below)
                lowest[node] = min(lowest[node], lowest[below])
            elif below in stack:
                lowest[node] = min(lowest[node], index[below])
        if lowest[node] == index[node]:
            start = stack.index(node)
            component = stack[start:]
            del stack[start:]
            if len(component) > 1:
                components.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(components, key=len, reverse=True)
