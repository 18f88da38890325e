"""Draft a new architecture from a reference class and a similar architecture, by names and shapes.

Whatever could not be guessed is marked `unguessed:` in the written files; `left` lists the marks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path
from typing import Any

from scaffold.text import MARK
from zoo import registry
from zoo.errors import OutputExists, UsageError, did_you_mean

ROOT = Path(__file__).parents[2]
REGISTRY = "registry.yaml"


@dataclass
class Draft:
    """The texts of the drafted files, and the errors that loading them would raise."""

    name: str
    only_data: bool
    files: dict[str, str]  # path in the tree -> what will stand there
    added: list[str]  # to the registry
    marks: list[str]
    verdict: list[str]

    def write(self, root: Path = ROOT, *, force: bool = False) -> list[Path]:
        """Write all files or none; `force` replaces existing files."""
        texts = {root / path: text for path, text in self.files.items()}
        there = [p for p in self.files if p != REGISTRY and (root / p).exists()]
        if there and not force:
            raise OutputExists(f"{', '.join(there)}: there already; --force replaces it")
        staged = {path: path.with_name(f".{path.name}.new") for path in texts}
        try:
            for path, place in staged.items():
                place.parent.mkdir(exist_ok=True)
                place.write_text(texts[path], encoding="utf-8")
            for path, place in staged.items():
                place.replace(path)
        finally:
            for place in staged.values():
                place.unlink(missing_ok=True)
        return list(texts)


def draft(
    name: str,
    like: str,
    reference: str,
    *,
    root: Path = ROOT,
    only_data: bool | None = None,
    force: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Draft:
    """Draft the files of architecture `name`: three, or two if `like`'s model fits unchanged.

    `only_data` requires two (True) or three (False) files; `settings`: fields of the tiny config.
    """
    text = (root / REGISTRY).read_text(encoding="utf-8")
    architectures = registry.parse_architectures(registry.parse_section(text, "architectures"))
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UsageError(f"{name!r}: the name is a module's: small letters, digits and _")
    if like not in architectures or like == name:
        near = did_you_mean(like, architectures.keys() - {name})
        raise UsageError(
            f"--like {like}: "
            + ("that is what is to be drafted" if like == name else "no such architecture")
            + f".{near or f' There is {chr(44).join(architectures)}.'}"
        )
    if name in architectures and not force:
        raise OutputExists(f"{REGISTRY}: {name} is there already; --force replaces it")

    from scaffold.guess import Guess, registered
    from scaffold.reference import make_survey  # transformers, and seconds

    entry = architectures[like]
    survey = make_survey(reference, entry, settings or {})
    for other in architectures.values():
        if other.model_type == survey.model_type and other.name != name:
            raise UsageError(
                f"--reference {reference}: {other.name} has its model_type {other.model_type!r} "
                f"already; add the class to that entry of {REGISTRY}"
            )
    guess = Guess(entry, survey)
    if only_data and guess.misses:
        raise UsageError(
            "\n  ".join([f"--only-data: {name} is no {like} with other names:", *guess.misses])
        )
    data = not guess.misses if only_data is None else only_data
    spec = guess.spec_text(name)
    folder = f"converters/specs/{name}"
    files = {f"{folder}/native.yaml": guess.native_text(), f"{folder}/hf.yaml": spec}
    if not data:
        source = root / "zoo" / "models" / f"{entry.module}.py"
        files[f"zoo/models/{name}.py"] = guess.model_text(name, source.read_text(encoding="utf-8"))
    files[REGISTRY] = registered(text, name, guess, entry.module if data else None)
    added = _added(text, files[REGISTRY])
    texts = {**files, REGISTRY: "\n".join(added)}
    marks = [
        f"{path}: {_mark_of(line)}"
        for path, written in texts.items()
        for line in written.splitlines()
        if MARK in line
    ]
    return Draft(name, data, files, added, marks, guess.verdict(name, spec))


def _added(before: str, after: str) -> list[str]:
    lines = unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return [line[1:] for line in list(lines)[2:] if line.startswith("+")]


def left(root: Path = ROOT) -> list[str]:
    """Return every mark that is still in the tree, as `file:line: text`."""
    return [
        f"{path.relative_to(root)}:{number}: {_mark_of(line)}"
        for pattern in ("zoo/models/*.py", "converters/specs/*/*.yaml", REGISTRY)
        for path in sorted(root.glob(pattern))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MARK in line
    ]


def _mark_of(line: str) -> str:
    return line[line.index(MARK) :].strip().rstrip('"')
