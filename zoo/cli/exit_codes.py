"""The exit codes of every command, in one table."""

from enum import IntEnum

from zoo.cli.table import COMMANDS
from zoo.errors import UsageError


class ExitCode(IntEnum):
    """What the shell gets back; the text is what `zoo --help` and the docs print."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> "ExitCode":
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    OK = 0, "success; a check passed"
    FAILED = 1, "an error, or a check that did not pass (verify, check, diff, diagnose)"
    USAGE = 2, "an invalid command line; any error of diff and diagnose"
    INTERRUPTED = 130, "Ctrl-C"


def exit_code_of(error: BaseException, command: str = "") -> ExitCode:
    """The code for an error that stopped a command.

    Args:
        error: What stopped it.
        command: Its name: where 1 is an answer, an error is 2.
    """
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if isinstance(error, UsageError) or (command in COMMANDS and COMMANDS[command].answers):
        return ExitCode.USAGE
    return ExitCode.FAILED
