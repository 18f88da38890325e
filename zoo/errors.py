"""Every error a user can meet, as one tree. A message names the place and the next move.

Messages quote names from files; `str` of an error shows their control characters escaped.
"""

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from difflib import get_close_matches
from heapq import nlargest
from os.path import commonprefix
from typing import Any


class ZooError(Exception):
    """The root: `except zoo.ZooError` catches all that zoo raises on purpose."""

    def __str__(self) -> str:
        return printable(super().__str__())


class UsageError(ZooError):
    """A call or a command line that cannot mean anything."""


class UnknownName(UsageError):
    """A name that the registry does not hold."""


class SourceError(ZooError):
    """A reference could not be turned into a local directory."""


class RepoNotFound(SourceError):
    """The hub has no such repository or revision, or will not show it without a token."""


class GatedRepo(SourceError):
    """The repository exists; its license has to be accepted first."""


class Offline(SourceError):
    """The files are not in the cache and the network may not, or cannot, be used."""


class NotACheckpoint(SourceError):
    """A path that holds no checkpoint; the message says what was looked for."""


class UnsupportedArchitecture(ZooError):
    """config.json names an architecture that zoo does not implement."""


class ConfigError(ZooError):
    """A config field is missing, unknown, malformed, or has a value that is not implemented."""

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems) or [message]  # each begins with its field


class SpecError(ZooError):
    """A spec does not parse or contradicts itself; the message points at the column."""


class CheckpointError(ZooError):
    """Files that cannot be trusted or do not fit."""


class CorruptCheckpoint(CheckpointError):
    """Bytes that break their format's own rules."""


class ChecksumMismatch(CheckpointError):
    """Bytes that differ from their recorded digest."""


class BadIndex(CheckpointError):
    """A shard index that is malformed or contradicts its shards."""


class MissingShard(CheckpointError):
    """Shards that the index names and the directory lacks."""


class SourceChanged(CheckpointError):
    """A file that is not the one that was opened: written to, replaced or gone since."""


class UnsafePath(CheckpointError):
    """A path that leaves the checkpoint's directory, or is no regular file."""


class DuplicateTensor(CheckpointError):
    """One tensor under two names or in two files."""


class AmbiguousCheckpoint(CheckpointError):
    """Several sets of weights in one directory, and nothing to say which is meant."""


class UnsupportedZip(CheckpointError):
    """A torch zip that is not read: compressed, encrypted, big-endian or TorchScript."""


class UnsupportedFormat(CheckpointError):
    """A file in a version, byte order or encoding of its format that is not read."""


class ResourceLimit(CheckpointError):
    """A header or config asks for more than any real checkpoint holds."""


class DtypeMismatch(CheckpointError):
    """A tensor's dtype cannot stand for the parameter it is meant for."""


class NonFinite(CheckpointError):
    """NaN or infinity among the weights."""


class OverflowOnCast(CheckpointError):
    """A value too large for the dtype asked for."""


class TieConflict(CheckpointError):
    """Names that share one array hold different values."""


class BadTokenizer(CheckpointError):
    """Tokenizer files that break their format's rules or contradict each other."""


class TemplateError(CheckpointError):
    """A chat template that is malformed, refuses the messages, or reaches for more than text."""


class PlanError(CheckpointError):
    """Spec, config and headers do not fit; holds every problem at once."""


class MissingTensors(PlanError):
    """Tensors that the model needs and the checkpoint lacks."""


class UnexpectedTensors(PlanError):
    """Tensors that no rule of the spec maps or drops."""


class ShapeMismatch(PlanError):
    """Shapes that do not fit the rule's axes."""


class InputError(ZooError):
    """Arguments of forward that the model cannot answer."""


class TokenIdError(InputError):
    """A token id outside the vocabulary."""


class SequenceTooLong(InputError):
    """More tokens than the model has positions."""


class MaskError(InputError):
    """An attention mask of the wrong shape, or one with an empty row."""


class OutputExists(ZooError):
    """The destination is there already; force=True (`--force`) replaces a checkpoint in it."""


class LossyExport(ZooError):
    """The target cannot hold what the source holds, and nobody said that is fine."""


class RecordError(ZooError):
    """zoo/evidence.json is missing, damaged, or written by another version."""


class ParityError(ZooError):
    """Native and reference compute different functions."""


class MissingDependency(ZooError):
    """An optional package that this command needs is not installed."""


class UnusedFieldsWarning(UserWarning):
    """Fields of config.json that the reference never reads, so that they change nothing."""


# whether messages are read beside a shell, which the command line sets
in_shell: ContextVar[bool] = ContextVar("in_shell", default=False)


def option(name: str, value: Any = True) -> str:
    """How a reader passes an option: `ignore_config=('a',)`, or `--ignore-config a` in a shell.

    False is `mmap=False`, or `--no-mmap`.
    `...` stands for a value that the reader has to fill in.
    """
    if in_shell.get():
        if value is False:
            return f"--no-{name.replace('_', '-')}"
        items = value if isinstance(value, Mapping | list | tuple) else [value]
        if isinstance(value, Mapping):
            items = [f"{key}={_value(each)}" for key, each in value.items()]
        words = [] if value is True else [_value(item) for item in items]
        return " ".join([f"--{name.replace('_', '-')}", *words])
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key!r}: {_value(each, repr)}" for key, each in value.items())
        return f"{name}={{{inner}}}"
    return f"{name}={_value(value, repr)}"


def _value(value: Any, spell: Callable[[Any], str] = str) -> str:
    return "…" if value is ... else spell(value)


SUGGESTED = 20  # problems of one message that get a suggestion: each is compared with all names
_COMPARED, _LONGEST = 500, 256  # names, and characters of one, that are compared in full


def did_you_mean(word: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """` Did you mean a, b?` with a leading space, or nothing."""
    if len(word) > _LONGEST:
        return ""
    names = [name for name in names if len(name) <= _LONGEST]
    if len(names) > _COMPARED:
        names = nlargest(_COMPARED, names, key=lambda name: _shared(word, name))
    near = get_close_matches(word, names, n=3, cutoff=cutoff)
    return f" Did you mean {', '.join(near)}?" if near else ""


def _shared(a: str, b: str) -> int:
    """Characters with which both begin, and with which both end."""
    begin = len(commonprefix((a, b)))  # noqa: RUF071 - characters are what counts
    return begin + len(commonprefix((a[begin:][::-1], b[begin:][::-1])))  # noqa: RUF071


def listing(items: Iterable[str], limit: int = 20) -> str:
    """`a, b, c … and 5 more`: all there is, up to what a person reads."""
    items = list(items)
    more = f" … and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 tensor`, `2 tensors`, `1,024 bytes`: a number with its noun in the right form."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def printable(text: str) -> str:
    """The text with control and formatting characters as escapes; line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escape(c) for c in text)


def _escape(character: str) -> str:
    if character.isspace() and ord(character) > 0x9F and character not in "\u2028\u2029":
        return character  # a wide or unbreakable space moves nothing
    return character.encode("unicode_escape", "backslashreplace").decode()
