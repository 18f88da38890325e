"""The `zoo` command: `main` runs a command line and turns what stops it into an exit code."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.main import get_command

import zoo
from zoo.cli.command import NO_VALUE, WIDTH, Root
from zoo.cli.exit_codes import ExitCode, exit_code_of
from zoo.errors import (
    UnusedFieldsWarning,
    UsageError,
    ZooError,
    did_you_mean,
    in_shell,
    printable,
)
from zoo.terminal import BOLD, RED, Escaped, has_color, paint, passing

SHELLS = ("bash", "zsh", "fish")
COMPLETE = "_ZOO_COMPLETE"  # what a shell sets to ask for completions
app = typer.Typer(
    cls=Root,
    rich_markup_mode=None,
    add_completion=False,
    context_settings=WIDTH,
    help="Published checkpoints in small native code, proven to compute the same, and back.",
)


# --- zoo without a command -----------------------------------------------------------------------


def _show_version(ctx: typer.Context, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        print(f"zoo {zoo.__version__}")
        raise typer.Exit(ExitCode.OK)


def _show_completion(ctx: typer.Context, value: str | None) -> None:
    if value and not ctx.resilient_parsing:
        from typer.completion import get_completion_script

        shell = _shell(value)
        print(get_completion_script(prog_name="zoo", complete_var=COMPLETE, shell=shell))
        raise typer.Exit(ExitCode.OK)


def _install_completion(ctx: typer.Context, value: str | None) -> None:
    if value and not ctx.resilient_parsing:  # a shell that completes a line runs nothing
        from typer.completion import install

        shell, file = install(_shell(value), prog_name="zoo", complete_var=COMPLETE)
        print(f"{file}: completion for {shell}. It works in the next {shell} that is started")
        raise typer.Exit(ExitCode.OK)


def _shell(value: str) -> str:
    """The shell that is meant; the one that runs this where none is named."""
    if value == NO_VALUE:
        from typer.completion import _get_shell_name

        value = _get_shell_name() or ""
        if value not in SHELLS:
            raise UsageError(f"which shell? Name it: --show-completion {' | '.join(SHELLS)}")
    if value not in SHELLS:
        near = did_you_mean(value, SHELLS)
        raise UsageError(f"{value}: completion is for {', '.join(SHELLS)}.{near}")
    return value


def _option(
    *names: str, help: str, callback: Any, metavar: str | None = None, words: Sequence[str] = ()
) -> Any:
    how: dict[str, Any] = {"help": help, "callback": callback, "metavar": metavar}
    if words:
        how["autocompletion"] = lambda: [*words]
    return typer.Option(*names, is_eager=True, show_default=False, **how)


@app.callback()
def root(
    version: Annotated[
        bool, _option("--version", help="print zoo's version", callback=_show_version)
    ] = False,
    show_completion: Annotated[
        str | None,
        _option(
            "--show-completion",
            metavar="[SHELL]",
            help="print what completes zoo's commands in bash, zsh or fish",
            callback=_show_completion,
            words=SHELLS,
        ),
    ] = None,
    install_completion: Annotated[
        str | None,
        _option(
            "--install-completion",
            metavar="[SHELL]",
            help="write that into the shell's own configuration",
            callback=_install_completion,
            words=SHELLS,
        ),
    ] = None,
) -> None:
    """Options before the command."""


# --- running -------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: The words after `zoo`; by default those of this process.

    Returns:
        The exit code, one of `ExitCode`.

    Example:
        >>> main(["list", "--json"])
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name that it cannot write is no failure
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  closed by the shell
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    command = get_command(app)
    if COMPLETE in os.environ:
        from typer.completion import completion_init

        completion_init()
        command.main(args=[], prog_name="zoo", complete_var=COMPLETE)
    words = list(sys.argv[1:] if arguments is None else arguments)
    out, err = Escaped(sys.stdout, printable), Escaped(sys.stderr, printable)
    with redirect_stdout(out), redirect_stderr(err):
        return int(_guarded(command, words))


def _guarded(root: Any, words: list[str]) -> int:
    """Run the command; one line and a code for whatever stops it."""
    context = None
    try:
        with root.make_context("zoo", words) as context:
            _check_directory()
            code = _run(context)
        sys.stdout.flush()
        return code
    except typer.Exit as leave:
        return leave.exit_code
    except typer.TyperException as error:
        return _refuse(error)
    except BrokenPipeError:
        # the reader has seen enough; nothing more can be written, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except KeyboardInterrupt as interrupt:
        return _fail(". ".join(["interrupted", *map(str, interrupt.args)]), exit_code_of(interrupt))
    except ZooError as error:
        return _fail(_spelled(str(error), root, context), exit_code_of(error, _command(context)))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", exit_code_of(error, _command(context)))


def _run(context: Any) -> int:
    from converters.memory import enough

    way_out = "Take a smaller model, a shorter text or another machine"
    with _messages_for_a_shell(), enough(lambda: _command(context), way_out):
        code: int = context.command.invoke(context)
    return code


def _spelled(message: str, root: Any, context: Any) -> str:
    """The message, with options as the command that was run spells them."""
    command = root.get_command(context, _command(context))
    if command is None:
        return message
    from zoo.cli.messages import in_shell_syntax, spellings

    return in_shell_syntax(message, spellings(command.params))


def _command(context: Any) -> str:
    """The name of the command that was run, if it came to that."""
    return "" if context is None else context.invoked_subcommand or ""


def _check_directory() -> None:
    """Libraries that torch loads end the process, in words of their own, where there is none."""
    try:
        os.getcwd()
    except OSError:
        raise UsageError("the current directory was deleted: cd to another one") from None


@contextmanager
def _messages_for_a_shell() -> Iterator[None]:
    """Messages name options as a shell has them, and a warning is one line on standard error."""

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if not issubclass(category, UnusedFieldsWarning):
            return before(message, category, *rest)
        passing("", sys.stderr)
        print("zoo: warning:", message, file=sys.stderr)

    token = in_shell.set(True)
    try:
        with warnings.catch_warnings():
            before, warnings.showwarning = warnings.showwarning, show  # type: ignore[assignment]
            warnings.simplefilter("default", UnusedFieldsWarning)
            yield
    finally:
        in_shell.reset(token)


def _fail(message: str, code: ExitCode) -> int:
    title = paint("zoo: error:", BOLD + RED, has_color(sys.stderr))
    print(title, message, file=sys.stderr)
    return code


def _refuse(error: Any) -> int:
    """A command line that does not parse: how it is written, and what is wrong with it."""
    if (ctx := getattr(error, "ctx", None)) is not None:
        print(ctx.get_usage(), file=sys.stderr)
    return _fail(_problem(error), ExitCode.USAGE)


def _problem(error: Any) -> str:
    param = getattr(error, "param", None)
    if param is None:
        message = str(error.message)
        return message[:1].lower() + message[1:]
    is_option = param.param_type_name == "option"
    name = "/".join(param.opts) if is_option else param.metavar
    if hasattr(error, "param_type"):  # it is missing
        return f"expected {name}{getattr(error, 'hint', '')}"
    return f"{name}: {str(error.message).removeprefix('Value error, ')}"
