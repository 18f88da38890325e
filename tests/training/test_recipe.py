"""Recipes: settings from YAML, keywords and the shell, with every problem named at once."""

from pathlib import Path

import pytest

from zoo.errors import UsageError
from zoo.training.recipe import Recipe, placed


def test_recipe_survives_yaml(tmp_path: Path) -> None:
    recipe = Recipe.of({"data": "a.txt", "from": "gpt2", "lr": 3e-4, "lora": ["q_proj"]})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.read(path) == recipe


def test_changes_replace_settings_and_single_config_fields(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 10\nconfig: {layers: 2, dim: 64}\n")
    recipe = Recipe.read(path, placed({"steps": 20, "dim": 32}))
    assert recipe.steps == 20
    assert recipe.config == {"layers": 2, "dim": 32}


def test_every_setting_has_help_and_a_section() -> None:
    for name, field in Recipe.model_fields.items():
        assert field.description and len(field.description) < 100, name
        assert isinstance(field.json_schema_extra, dict)
        assert field.json_schema_extra["section"], name


@pytest.mark.parametrize(
    ("values", "problems"),
    [
        ({"step": 10}, ["step: no such setting. Did you mean steps?"]),
        ({"lr": -1, "batch": 0}, ["lr:", "batch:"]),
        ({"batch": 10, "accumulate": 3}, ["accumulate: 3 does not divide batch 10"]),
        ({"lr": 1e-4, "min_lr": 1e-3}, ["min_lr: 0.001 is above lr 0.0001"]),
        ({"lr": float("nan")}, ["lr:"]),
        ({"schedule": "cosin"}, ["schedule:", "'cosin'"]),
        ({"log": ["tensorbord"]}, ["log:", "'tensorbord'"]),
        ({"config": [1]}, ["config:"]),
    ],
)
def test_problems_are_named(values: dict[str, object], problems: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.of(values)
    for problem in problems:
        assert problem in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n", "steps: [\n", "steps: 1\nsteps: 2\n"])
def test_files_that_are_no_recipe_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"recipe\.yaml"):
        Recipe.read(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        Recipe.read(tmp_path / "none.yaml")
