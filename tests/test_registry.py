"""registry.yaml says what it must, and a mistake in it is named."""

import re
from typing import Any

import pytest
import yaml

from zoo import registry
from zoo.checkpoints.locate import skeleton
from zoo.errors import ConfigError, UnknownName, UnsupportedArchitecture
from zoo.registry import RegistryError

NAMED = {
    *("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"),
    *(f"bert-{size}-{case}" for size in ("base", "large") for case in ("cased", "uncased")),
    *(f"llama2-{size}{chat}" for size in ("7b", "13b", "70b") for chat in ("", "-chat")),
    *("tinyllama-1.1b", "llama3-8b", "llama3-70b", "llama3.1-8b", "llama3.1-70b"),
    *("llama3.2-1b", "llama3.2-3b", "llama3.3-70b"),
}


def test_every_promised_name_is_there() -> None:
    assert set(registry.checkpoints()) >= NAMED
    assert list(registry.architectures())[:3] == ["gpt2", "bert", "llama"]


def test_every_name_says_where_it_comes_from() -> None:
    wrong = []
    for entry in registry.checkpoints().values():
        architecture, named = registry.architecture_for(entry.reference_config, entry.name)
        if not (
            re.fullmatch(r"[\w.-]+/[\w.-]+", entry.repo)
            and entry.license
            and (entry.pinned or entry.revision == "main")
            and (architecture.name, named) == (entry.architecture, entry.reference_class)
        ):
            wrong.append(entry.name)
    assert wrong == []


@pytest.mark.slow
def test_parameters_are_those_of_the_models() -> None:
    wrong = []
    for entry in registry.checkpoints().values():
        count = sum(p.numel() for p in skeleton(entry.name).parameters())
        if count != entry.parameters:
            wrong.append(f"{entry.name}: {entry.parameters} declared, {count} in the model")
    assert wrong == []


def test_no_number_is_spelt_as_a_word() -> None:
    """YAML reads 1e-5 as text; so does a config, later and elsewhere."""

    def words(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [w for v in value.values() for w in words(v)]
        if isinstance(value, list):
            return [w for v in value for w in words(v)]
        return [value] if isinstance(value, str) and re.fullmatch(r"[-+.\deE]+", value) else []

    configs = [e.config for e in registry.checkpoints().values()]
    configs += [v["config"] for named in registry.variants().values() for v in named.values()]
    assert [w for config in configs for w in words(dict(config))] == []


def test_sections_read_alone_are_the_whole_file() -> None:
    whole = yaml.safe_load(registry._text())
    assert set(whole) == set(registry._SECTIONS)
    for name in registry._SECTIONS:
        assert registry.parse_section(registry._text(), name) == whole[name]


# --- names ---------------------------------------------------------------------------------------


def test_a_misspelt_name_is_answered_with_the_right_one() -> None:
    with pytest.raises(UnknownName, match=r"'gtp2'.*Did you mean gpt2"):
        registry.find("gtp2")
    with pytest.raises(UnknownName, match="Did you mean llama2-7b"):
        registry.find("Llama2-7B")
    with pytest.raises(UnknownName, match="zoo list"):
        registry.find("qqqqqq")


# --- config.json to architecture -----------------------------------------------------------------


def test_the_class_chooses_the_head() -> None:
    architecture, named = registry.architecture_for(
        {"model_type": "bert", "architectures": ["BertModel"]}, "x"
    )
    assert named is not None
    assert architecture.heads[named] == ("pooler", "none")


def test_a_config_without_model_type_is_known_by_its_class() -> None:
    architecture, _ = registry.architecture_for({"architectures": ["GPT2LMHeadModel"]}, "x")
    assert architecture.name == "gpt2"


def test_a_config_without_class() -> None:
    for config in ({"model_type": "llama"}, {"model_type": "llama", "architectures": []}):
        assert registry.architecture_for(config, "x")[1] is None


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "mamba"}, r"d/config.json.*'mamba'.*bert, .*gpt2, .*llama"),
        ({"model_type": "lama"}, r"Did you mean llama"),
        ({}, r"no model_type.*bert, .*gpt2, .*llama"),
        (
            {"model_type": "llama", "architectures": ["LlamaForQuestionAnswering"]},
            r"LlamaForQuestionAnswering is not implemented for llama.*LlamaForCausalLM",
        ),
        ({"model_type": "llama", "architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
    ],
)
def test_what_zoo_lacks_is_said_with_what_it_has(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=says):
        registry.architecture_for(config, "d/config.json")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": 3},
        {"model_type": ["gpt2"]},
        {"architectures": "GPT2Model"},
        {"model_type": "gpt2", "architectures": [None]},
    ],
)
def test_a_malformed_config_names_the_field(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"c: (model_type|architectures): expected"):
        registry.architecture_for(config, "c")


# --- mistakes in the file ------------------------------------------------------------------------

A = {"model_type": "a", "heads": {"AModel": "none"}}
PARSED = registry.parse_architectures({"a": A})
C = {
    "architecture": "a",
    "repo": "o/n",
    "revision": "main",
    "license": "MIT",
    "parameters": 3,
    "class": "AModel",
    "config": {},
}


def test_siblings_are_named_by_default_and_overridable() -> None:
    parsed = registry.parse_architectures({"a": A, "b": {**A, "model": "a", "spec": "c"}})
    assert (parsed["a"].module, parsed["a"].spec) == ("a", "a")
    assert (parsed["b"].module, parsed["b"].spec) == ("a", "c")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({**A, "head": {}}, r"architectures\.a: unknown field head\. Did you mean heads"),
        ({"heads": {"AModel": "none"}}, r"architectures\.a: model_type is missing"),
        ({**A, "heads": {}}, r"architectures\.a: heads: expected reference classes"),
        ({**A, "heads": {"AModel": []}}, r"architectures\.a: heads\.AModel: expected"),
        ({**A, "heads": {"AModel": 1}}, r"architectures\.a: heads\.AModel: expected"),
        ("x", r"architectures\.a: expected a mapping"),
    ],
)
def test_a_bad_architecture_is_named(entry: Any, says: str) -> None:
    with pytest.raises(RegistryError, match=says):
        registry.parse_architectures({"a": entry})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"repo": "name"}, r"checkpoints\.c: repo: expected org/name, found 'name'"),
        ({"parameters": "3"}, r"checkpoints\.c: parameters: expected a positive whole number"),
        ({"parameters": True}, "parameters"),
        ({"revision": 3}, "revision: expected some text"),
        ({"license": None}, "license: expected some text"),
        ({"config": [1]}, "config: expected a mapping"),
        ({"architecture": "aa"}, r"checkpoints\.c: no architecture is called 'aa'.*a\?"),
        ({"class": "AModels"}, r"a has no class 'AModels'.*AModel\?"),
        ({"sha": "0"}, "unknown field sha"),
        ({"file": "../x.bin"}, "file: expected a path within"),
        ({"golden": "/x.json"}, "golden: expected a path within"),
    ],
)
def test_a_bad_checkpoint_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(RegistryError, match=says):
        registry.parse_checkpoints({"c": {**C, **change}}, PARSED)


def test_all_mistakes_are_told_at_once() -> None:
    broken = {"c": {**C, "repo": ""}, "d": {k: v for k, v in C.items() if k != "class"}}
    with pytest.raises(RegistryError, match=r"checkpoints\.c: repo.*checkpoints\.d: class is"):
        registry.parse_checkpoints(broken, PARSED)


def test_a_name_that_reads_as_a_path_is_refused() -> None:
    with pytest.raises(RegistryError, match="read as a path"):
        registry.parse_checkpoints({"a/b": C}, PARSED)


def test_variants_are_checked_too() -> None:
    good = {"a": {"tiny": {"class": "AModel", "config": {}}}}
    assert registry.parse_variants(good, PARSED) == good
    with pytest.raises(RegistryError, match=r"variants\.a\.tiny: a has no class 'B'"):
        registry.parse_variants({"a": {"tiny": {"class": "B", "config": {}}}}, PARSED)
    with pytest.raises(RegistryError, match="no architecture is called 'b'"):
        registry.parse_variants({"b": good["a"]}, PARSED)


def test_a_bad_value_is_named_with_its_line() -> None:
    text = yaml.safe_dump({"checkpoints": {"c": {**C, "repo": "name", "parameters": 0}}})
    data = registry.parse_section(f"architectures: {{}}\n{text}", "checkpoints")
    with pytest.raises(RegistryError) as error:
        registry.parse_checkpoints(data, PARSED, text)
    lines = {
        name: 1 + text[: text.index(f"{name}:")].count("\n") for name in ("repo", "parameters")
    }
    assert f"line {lines['repo']}: checkpoints.c: repo: expected org/name" in str(error.value)
    assert f"line {lines['parameters']}: checkpoints.c: parameters: " in str(error.value)


HEAD = "architectures: {}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD + "checkpoints:\n  a: 1\n  a: 2\n", "line 4: key 'a' occurs twice"),
        (HEAD + "checkpoints:\n  a: {x: 1, x: 2}\n", "line 3: key 'x' occurs twice"),
        (HEAD + "checkpoints: {}\ncheckpoints: {}\n", "'checkpoints' stands 2 times"),
        (HEAD, "'checkpoints' stands 0 times"),
        (HEAD + "chekpoints: {}\n", "unknown section 'chekpoints'. Did you mean checkpoints"),
        (HEAD + "checkpoints:\n  a: [1\n", "registry.yaml: line"),
        (HEAD + "checkpoints:\n  a: !!python/object:os.system {}\n", "registry.yaml: line 3"),
    ],
)
def test_a_file_that_does_not_parse_is_told_by_line(text: str, says: str) -> None:
    with pytest.raises(RegistryError, match=says):
        registry.parse_section(text, "checkpoints")
