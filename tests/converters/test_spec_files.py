"""The files of specs: each is valid by itself, and the glossary explains every section."""

import re
from pathlib import Path

import pytest

from converters.spec_files import (
    COMMON,
    NATIVE,
    SPECS,
    CommonFile,
    Container,
    DialectFile,
    NativeFile,
    checked,
    files,
    laid_over,
    spec_names,
)
from converters.strict_yaml import read_yaml
from converters.validation import Entry, line_of
from zoo.errors import SpecError

GLOSSARY = Path(__file__).parents[2] / "docs" / "glossary.md"
SECTIONS = {*NativeFile.model_fields, *DialectFile.model_fields, *CommonFile.model_fields}


def model_of(file: str) -> type[Entry]:
    folder, _, name = file.partition("/")
    return CommonFile if folder == COMMON else NativeFile if name == NATIVE else DialectFile


def test_every_file_is_valid_before_it_is_laid_over_another() -> None:
    """Editors check a file alone."""
    for file in files():
        checked(model_of(file), read_yaml(SPECS / f"{file}.yaml", SpecError), file)


def test_every_file_names_its_schema() -> None:
    names = {CommonFile: "common", NativeFile: "native", DialectFile: "dialect"}
    for file in files():
        first = (SPECS / f"{file}.yaml").read_text().partition("\n")[0]
        schema = f"../../../docs/schemas/{names[model_of(file)]}.json"
        assert first == f"# yaml-language-server: $schema={schema}", file


def test_every_folder_but_common_is_a_spec() -> None:
    folders = {path.name for path in SPECS.iterdir()}
    assert folders == {*spec_names(), COMMON}


def test_a_null_removes_and_a_list_adds() -> None:
    below = {"weights": {"a": "x", "b": "y"}, "ignore": ["u"], "prefix": "m."}
    above = {"weights": {"a": None, "c": "z"}, "ignore": ["v"], "prefix": None}
    assert laid_over(below, above) == {"weights": {"b": "y", "c": "z"}, "ignore": ["u", "v"]}


def test_all_problems_of_a_file_are_listed_at_once() -> None:
    data = {"wieghts": {}, "prefix": 3, "config": {"dim": "d |", "heads": "h"}, "ignore": "x"}
    with pytest.raises(SpecError) as error:
        checked(DialectFile, data, "x/hf.yaml")
    assert str(error.value).split("; ") == [
        "x/hf.yaml: prefix: expected some text, found 3",
        "x/hf.yaml: config.dim: expected a field or several joined by |, found 'd |'",
        "x/hf.yaml: ignore: expected a list of field names, found 'x'",
        "x/hf.yaml: unknown section wieghts. Did you mean weights?",
    ]


def test_a_misspelt_field_of_a_container_is_answered_with_the_right_one() -> None:
    with pytest.raises(SpecError, match=r"container: unknown field fromat\. Did you mean format"):
        checked(CommonFile, {"container": {"fromat": "torch", "format": "torch"}}, "x")


def test_lines_are_those_of_the_key() -> None:
    text = "a: 1\nb:\n  c: 2\n  d: {e: 3}\n"
    assert [line_of(text, path) for path in (("a",), ("b", "c"), ("b", "d", "e"))] == [1, 3, 4]
    assert line_of(text, ("b", "x")) is None


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_the_glossary_explains_each_section(name: str) -> None:
    assert f"**`{name}`**" in GLOSSARY.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(Container.model_fields))
def test_the_glossary_explains_each_field_of_a_container(name: str) -> None:
    assert f"| `{name}` |" in GLOSSARY.read_text(encoding="utf-8")


def test_examples_of_the_glossary_stand_in_the_specs() -> None:
    text = GLOSSARY.read_text(encoding="utf-8")
    examples = re.findall(r"\(`([\w-]+/[\w-]+)\.yaml`\):\n\n```yaml\n(.*?)```", text, re.DOTALL)
    assert len(examples) == text.count("```yaml") >= len(SECTIONS)
    for file, example in examples:
        lines = {line.strip() for line in (SPECS / f"{file}.yaml").read_text().splitlines()}
        assert [line for line in example.splitlines() if line.strip() not in lines] == [], file
