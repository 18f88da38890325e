"""`zoo train` and `zoo plot`: train a model, and look at runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from zoo.cli.command import Commands, Options
from zoo.cli.exit_codes import ExitCode
from zoo.cli.options import (
    Json,
    among,
    argument,
    number,
    one_of,
    option,
    pair,
    pairs,
    path,
    text,
    whole_number,
)
from zoo.cli.output import to_json
from zoo.errors import UsageError
from zoo.training.recipe import Recipe, merged, placed

commands = Commands()


def _kinds(annotation: Any) -> Iterator[Any]:
    """The plain types, or the words, that a setting may have."""
    inner = get_args(annotation)
    if not inner:
        yield annotation
    for each in inner:
        if isinstance(each, type | str) or get_args(each):
            yield from _kinds(each)


def _setting(name: str, info: Any) -> tuple[str, Any, Any]:
    """An option for a setting of `Recipe`."""
    flag = f"--{(info.alias or name).replace('_', '-')}"
    kinds = [*_kinds(info.annotation)]
    shown = info.description
    if info.default not in (None, "", False, []) and "default" not in shown:
        shown += (
            f" (default: {info.default!r})" if name == "prompt" else f" (default: {info.default})"
        )
    elif "default" not in shown:
        shown += " (default: off)" if bool in kinds else " (default: none)"
    how: dict[str, Any] = {"help": shown, "rich_help_panel": info.json_schema_extra["section"]}
    if bool in kinds:
        return name, Annotated[bool, option(flag, **how)], field(default=False)
    is_list = info.default == []
    if not is_list and all(isinstance(kind, str) for kind in kinds):
        how |= {
            "parser": one_of(*kinds),
            "autocompletion": among(*kinds),
            "metavar": "|".join(kinds),
        }
        return name, Annotated[str | None, option(flag, **how)], field(default=None)
    if int in kinds:
        how |= {"parser": whole_number, "metavar": "N"}
        return name, Annotated[int | None, option(flag, **how)], field(default=None)
    if float in kinds:
        how |= {"parser": number, "metavar": "X"}
        return name, Annotated[float | None, option(flag, **how)], field(default=None)
    how |= {"parser": text, "metavar": "A,B" if is_list else _METAVARS.get(name, "NAME")}
    return name, Annotated[str | None, option(flag, **how)], field(default=None)


_METAVARS = {
    "data": "FILE|DIR",
    "out": "DIR",
    "base": "NAME|DIR",
    "prompt": "TEXT",
    "tokenizer": "char|NAME|DIR",
}

if TYPE_CHECKING:

    class Settings(Options):
        """An option for every setting of `Recipe`."""

else:
    Settings = make_dataclass(
        "Settings",
        [_setting(name, info) for name, info in Recipe.model_fields.items() if name != "config"],
        bases=(Options,),
        frozen=True,
    )


def _asked_for(settings: Settings) -> dict[str, Any]:
    """The settings that the command line names, as `Recipe` has them."""
    values = dict[str, Any]()
    for name, value in vars(settings).items():
        info = Recipe.model_fields[name]
        if value is None or value is False:
            continue
        if info.default == [] and isinstance(value, str):
            value = [word.strip() for word in value.split(",") if word.strip()]
        values[info.alias or name] = value
    return values


@commands.define("train")
def train(
    settings: Settings,
    recipe: Annotated[
        Path | None, argument("[RECIPE]", "a recipe's YAML file", parser=path)
    ] = None,
    changes: Annotated[
        list[str] | None,
        option(
            "--set",
            metavar="FIELD=VALUE",
            parser=pair,
            help="a field of the model's config, or of the recipe; may be repeated "
            "(default: a small model)",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        option(
            "--resume", metavar="DIR", parser=path, help="go on with a run (default: begin one)"
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Train, and print the last loss."""
    asked = merged(placed(pairs(changes)), _asked_for(settings))
    from zoo.training.run import RunDirectory
    from zoo.training.start import run

    if resume is not None:
        if recipe is not None or "out" in asked:
            raise UsageError("--resume: a run has its recipe and its directory; leave others out")
        whole = RunDirectory(resume).resumed({**asked, "out": str(resume)})
    else:
        whole = Recipe.of(asked) if recipe is None else Recipe.read(recipe, asked)
        if whole.out is None:
            whole = whole.changed({"out": _directory(recipe)})
    result = run(whole, resume=resume is not None, progress=True)
    place = str(result.directory)
    if json:
        report = {"out": place, "steps": whole.steps, "evaluations": result.evaluations}
        print(to_json({**report, "stopped": result.is_stopped}))
    elif result.is_stopped:
        print(f"stopped after a whole step. To go on: zoo train --resume {place}", file=sys.stderr)
    else:
        print(f"{place}: val loss {result.val_loss:.4f}")
    return ExitCode.INTERRUPTED if result.is_stopped else ExitCode.OK


def _directory(recipe: Path | None) -> str:
    """runs/NAME, with a number behind it where that is there already."""
    name, count = "run" if recipe is None else recipe.stem, 1
    place = Path("runs") / name
    while place.exists():
        count += 1
        place = Path("runs") / f"{name}-{count}"
    return str(place)
