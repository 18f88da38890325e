"""A text and a recipe that train in a second."""

from pathlib import Path
from typing import Any

import pytest

from zoo.training.recipe import Recipe

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "to", "the", "sun"]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of few characters, which a model learns quickly."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    lines = (" ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 9)) for n in range(1, 400))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def settings(text_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run with dropout, several parts a batch, and several evaluations."""
    return {
        "data": str(text_file),
        "tokenizer": "char",
        "config": {"layers": 2, "heads": 2, "dim": 16},
        "dropout": 0.1,
        "context": 16,
        "batch": 8,
        "accumulate": 2,
        "steps": 12,
        "warmup": 4,
        "eval_every": 4,
        "eval_batches": 2,
        "log_every": 1,
        "out": str(tmp_path / "run"),
    }


@pytest.fixture
def recipe(settings: dict[str, Any]) -> Recipe:
    """The recipe of these settings."""
    return Recipe.of(settings)
