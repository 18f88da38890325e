"""How a command is declared, parsed and explained: typer's commands with four additions.

- A parameter annotated with an `Options` dataclass stands for all of its fields, so that options
  which several commands share are declared once.
- An option whose metavar ends in `...` takes several words, `--config a=1 b=2`; one whose metavar
  is in brackets may come without its value, `--adapter [DIR]`.
- Help has sections and examples.
- A misspelt command or option is answered with the ones that are near.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from zoo.cli.exit_codes import ExitCode
from zoo.cli.table import COMMANDS, CommandRow
from zoo.errors import did_you_mean
from zoo.terminal import BOLD, has_color, paint

F = TypeVar("F", bound=Callable[..., int])
WIDTH = {"max_content_width": 100}  # of help, on a wide terminal
NO_VALUE = "\0"  # stands for the value of an option that came without; no argument can be this


# --- declaring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Options that belong together: each field is one, `Annotated` with its `typer.Option`."""


class Commands(typer.Typer):
    """The commands of one file."""

    def __init__(self) -> None:
        super().__init__(rich_markup_mode=None, add_completion=False, callback=lambda: None)

    def define(self, name: str) -> Callable[[F], F]:
        """Make a function the command `name` of the table; it returns the exit code."""
        row = COMMANDS[name]

        def decorate(function: F) -> F:
            self.command(name, cls=Command, help=row.summary, context_settings=WIDTH)(
                _flat(function)
            )
            return function

        return decorate


def _flat(function: Callable[..., int]) -> Callable[..., int]:
    """The function with each `Options` parameter replaced by that dataclass's fields."""
    parameters, groups = list[inspect.Parameter](), dict[str, type[Options]]()
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        kind = parameter.annotation
        if is_dataclass(kind) and isinstance(kind, type) and issubclass(kind, Options):
            groups[parameter.name] = kind
            parameters += _parameters(kind)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(function)
    def flat(**values: Any) -> int:
        gc.enable()  # `zoo.__main__` has it off while commands are imported
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        return function(**values)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _parameters(kind: type[Options]) -> Iterator[inspect.Parameter]:
    types = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        how = inspect.Parameter.KEYWORD_ONLY
        yield inspect.Parameter(field.name, how, default=default, annotation=types[field.name])


# --- parsing -------------------------------------------------------------------------------------


class Command(TyperCommand):
    """One command."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Every option and argument, `--help` too."""
        return [_without_pydantic(param) for param in super().get_params(ctx)]

    @property
    def row(self) -> CommandRow:
        """Its entry in the table."""
        return COMMANDS[self.name or ""]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line; an unknown option is refused with what is near."""
        ctx.allow_extra_args = True  # they are refused below, in our words
        with _suggesting(self.params), _naming_what_took(args, self.params):
            rest = super().parse_args(ctx, list(_one_word_each(args, self.params)))
        if rest and not ctx.resilient_parsing:
            ctx.fail(f"unrecognized arguments: {' '.join(rest)}")
        return rest

    # --- help ------------------------------------------------------------------------------------

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Write the line that begins with "usage:"."""
        words = [str(p.metavar) for p in self.params if p.param_type_name == "argument"]
        formatter.write_usage(ctx.command_path, " ".join([*words, "[OPTIONS]"]), _USAGE)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then options by section: the command's own first."""
        arguments, own = "Arguments", "Options"
        sections: dict[str, list[tuple[str, str]]] = {arguments: [], own: []}
        for param in self.get_params(ctx):
            if getattr(param, "hidden", False):
                continue
            is_argument = param.param_type_name == "argument"
            name = arguments if is_argument else getattr(param, "rich_help_panel", None) or own
            sections.setdefault(name, []).append(_described(param))
        column = min(28, max(len(left) for rows in sections.values() for left, _ in rows))
        for name, rows in sections.items():
            if rows:
                with formatter.section(heading(name)):
                    _write_rows(formatter, rows, column)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples."""
        with formatter.section(heading("Examples")):
            for example in self.row.examples:
                formatter.write(f"  {example}\n")


def _without_pydantic(param: Any) -> Any:
    """The parameter, whose parser works alone: typer's way imports pydantic, which costs 0.1 s."""
    if "process_value" in vars(param):
        return param
    process, parser = param.process_value, param.type_descriptor.parameter_info.parser

    def process_value(ctx: Any, value: Any) -> Any:
        if value is None and not param.required:
            return None
        if value is None or parser is None or param.callback is not None:
            return process(ctx, value)
        return [*map(parser, value)] if param.multiple or param.nargs == -1 else parser(value)

    param.process_value = process_value
    return param


def _one_word_each(args: Sequence[str], params: Sequence[Any]) -> Iterator[str]:
    """`--config a=1 b=2` as `--config a=1 --config b=2`; an absent value as NO_VALUE."""
    several, optional = set[str](), set[str]()
    for param in params:
        if (param.metavar or "").endswith("..."):
            several.update(param.opts)
        elif _is_optional(param):
            optional.update(param.opts)
    words = list(args)
    while words:
        word = words.pop(0)
        if word == "--":
            yield from (word, *words)
            return
        yield word
        if word in optional and not _is_value(words):
            yield NO_VALUE
        elif word in several and _is_value(words):
            yield words.pop(0)
            while _is_value(words):
                yield from (word, words.pop(0))


@contextmanager
def _naming_what_took(args: Sequence[str], params: Sequence[Any]) -> Iterator[None]:
    """Say of a missing argument which option of several words, or of an optional one, took it."""
    try:
        yield
    except typer.TyperException as error:
        param = getattr(error, "param", None)
        greedy = [p for p in params if (p.metavar or "").endswith("...") or _is_optional(p)]
        takers = [word for word in args if any(word in each.opts for each in greedy)]
        if takers and param is not None and param.param_type_name == "argument":
            error.hint = f" before {takers[0]}, which takes the words after it"  # type: ignore[attr-defined]
        raise


def _is_optional(param: Any) -> bool:
    """Whether it is an option that may come without its value."""
    return (param.metavar or "").startswith("[") and param.param_type_name == "option"


def _is_value(words: Sequence[str]) -> bool:
    return bool(words) and (words[0] == "-" or not words[0].startswith("-"))


@contextmanager
def _suggesting(params: Sequence[Any]) -> Iterator[None]:
    """Name the options that are near one that does not exist."""
    try:
        yield
    except typer.TyperException as error:
        if hasattr(error, "possibilities"):
            name = str(getattr(error, "option_name", ""))
            options = [each for param in params for each in (*param.opts, *param.secondary_opts)]
            long = [each for each in options if each.startswith("--")]
            beginning = [each for each in long if len(name) > 3 and each.startswith(name)]
            near = did_you_mean(name, beginning, cutoff=0) or did_you_mean(name, long)
            error.message, error.possibilities = (
                f"no such option: {name}{near and '.' + near}",
                None,
            )
        raise


# --- the table of commands -----------------------------------------------------------------------


class Root(TyperGroup):
    """`zoo`: its commands are imported when they are run."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Every option and argument, `--help` too."""
        return [_without_pydantic(param) for param in super().get_params(ctx)]

    def list_commands(self, ctx: Any) -> list[str]:
        """Every command, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import the file that defines a command."""
        if cmd_name not in COMMANDS:
            return None
        return get_group(import_module(COMMANDS[cmd_name].module).commands).commands[cmd_name]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Refuse an unknown command with those that are near."""
        if args[0] not in COMMANDS and not ctx.resilient_parsing:
            near = did_you_mean(args[0], COMMANDS) or " `zoo --help` lists all commands"
            ctx.fail(f"no such command: {args[0]}.{near}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what stands before the command."""
        with _suggesting(self.params):
            return super().parse_args(ctx, list(_one_word_each(args, self.params)))

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        if not ctx._protected_args:
            ctx.fail("expected a command; `zoo --help` lists them")
        return super().invoke(ctx)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Complete the name of a command from the table, and options as typer does."""
        from typer._click.shell_completion import CompletionItem

        names = [name for name in COMMANDS if name.startswith(incomplete)]
        options = TyperCommand.shell_complete(self, ctx, incomplete)
        return [*(CompletionItem(name, help=COMMANDS[name].summary) for name in names), *options]

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Write the line that begins with "usage:"."""
        formatter.write_usage(ctx.command_path, "COMMAND ... [OPTIONS]", _USAGE)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the table, by section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, row in COMMANDS.items():
            sections.setdefault(row.section, []).append((name, row.summary))
        for title, rows in sections.items():
            with formatter.section(heading(title)):
                _write_rows(formatter, rows, max(map(len, COMMANDS)))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write commands, then options."""
        self.format_commands(ctx, formatter)
        rows = [_described(param) for param in self.get_params(ctx)]
        with formatter.section(heading("Options")):
            _write_rows(formatter, rows, max(len(left) for left, _ in rows))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the exit codes, and where to read on."""
        with formatter.section(heading("Exit codes")):
            _write_rows(formatter, [(str(int(code)), code.meaning) for code in ExitCode], 3)
        formatter.write_paragraph()
        formatter.write_text("`zoo COMMAND --help` has options and examples of each command.")


# --- writing help --------------------------------------------------------------------------------

_USAGE = "usage: "


def heading(text: str) -> str:
    """A title, bold on a terminal."""
    return paint(text, BOLD, has_color(sys.stdout))


def _write_rows(formatter: Any, rows: Sequence[tuple[str, str]], column: int) -> None:
    padded = [(left.ljust(column), right) for left, right in rows]
    formatter.write_dl(padded, col_max=column)


def _described(param: Any) -> tuple[str, str]:
    """An option's or argument's spelling, and what it does."""
    if param.param_type_name == "argument":
        return param.metavar or param.name.upper(), param.help or ""
    if "--help" in param.opts:
        return "--help", "print this"
    spelling = "/".join((*param.opts, *param.secondary_opts))
    return spelling if param.is_flag else f"{spelling} {param.metavar}", param.help or ""
