"""The directory of a run: recipe.yaml, metrics.jsonl, and the checkpoints last and best."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo.checkpoints.file_names import RUN_RECIPE as RECIPE
from zoo.errors import OutputExists, UsageError, option
from zoo.training.recipe import Recipe
from zoo.training.states import BEST, LAST, TRAINING

METRICS = "metrics.jsonl"


class RunDirectory:
    """Where a run writes; paths of its parts."""

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.place = Path(place).expanduser()

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.place / LAST

    @property
    def best(self) -> Path:
        """The checkpoint whose evaluation was best."""
        return self.place / BEST

    def check_new(self) -> None:
        """Refuse a directory in which something lies.

        Raises:
            OutputExists: There is a run, or something else.
        """
        if self.place.exists() and (not self.place.is_dir() or any(self.place.iterdir())):
            way = f"{option('resume', ...)} goes on with a run" if self.is_run else "Name another"
            raise OutputExists(f"{self.place}: exists already. {way}")

    def begin(self, recipe: Recipe) -> None:
        """Make the directory of a new run, and write its recipe."""
        self.check_new()
        self.place.mkdir(parents=True, exist_ok=True)
        (self.place / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")

    def remove_begun(self) -> None:
        """Remove the directory of a run that could not begin: nobody else has written to it."""
        shutil.rmtree(self.place)

    @property
    def is_run(self) -> bool:
        """Whether a run was begun here."""
        return (self.place / RECIPE).is_file()

    def resumed(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe of the run that is here, with changes such as more steps.

        Raises:
            UsageError: No run was begun here, or it has no checkpoint yet.
        """
        if not self.is_run:
            raise UsageError(f"{self.place}: no run was begun here: it has no {RECIPE}")
        if not (self.last / TRAINING).is_file():
            raise UsageError(
                f"{self.place}: stopped before its first checkpoint. Remove it, and begin again"
            )
        return Recipe.read(self.place / RECIPE, changes)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with (self.place / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def cut(self, step: int) -> None:
        """Remove what was logged after a checkpoint: those steps are taken again."""
        path = self.place / METRICS
        kept = [line for line, entry in self._lines() if entry["step"] <= step]
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)

    def metrics(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl."""
        return [entry for _, entry in self._lines()]

    def _lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        path = self.place / METRICS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                yield line, entry
