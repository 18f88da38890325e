"""Names of files of weights, and which files of a repository form one checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import NamedTuple

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MANIFEST = "zoo-manifest.json"
# format: its single file and its index, the preferred format first: published repositories hold the
# same weights in several
LAYOUTS = {
    "safetensors": (SINGLE, INDEX),
    "torch": ("pytorch_model.bin", "pytorch_model.bin.index.json"),
}
# checkpoints of several files: the first file, and the pattern of the others
_SEVERAL = (
    (re.compile(r"(?P<stem>.+)-00001-of-(?P<count>\d{5})\.gguf"), "{stem}-?????-of-{count}.gguf"),
    (re.compile(r"(?P<stem>.*)\.00\.pth"), "{stem}.[0-9][0-9].pth"),
    (re.compile(r"(?P<stem>.+)\.index"), "{stem}.data-*"),
)
_WEIGHTS = (".gguf", ".index", ".pth", ".pt", ".bin")
# names that end like weights and are not, or that belong to a config.json and an index
_OTHER = (
    *("pytorch_model*.bin", "training_args.bin", "tokenizer.bin"),
    *("optimizer*", "scheduler*", "rng_state*", "scaler*"),
)
MAX_DEPTH = 2  # a folder and the file in it


class Group(NamedTuple):
    """Files that form one checkpoint; the first represents them."""

    files: tuple[str, ...]

    @property
    def name(self) -> str:
        """The file that represents the group."""
        return self.files[0]

    @property
    def folder(self) -> str:
        """Its folder; empty at the top."""
        return self.name.rpartition("/")[0]


def groups(names: Iterable[str]) -> list[Group]:
    """Return every checkpoint that files of these names may form, except those of a config.json.

    >>> groups(["a.gguf", "llama.00.pth", "llama.01.pth", "README.md"])
    [Group(files=('a.gguf',)), Group(files=('llama.00.pth', 'llama.01.pth'))]
    """
    names = sorted(n for n in names if len(PurePosixPath(n).parts) <= MAX_DEPTH)
    result, members = list[Group](), set[str]()
    for name in names:
        last = name.rpartition("/")[2]
        is_other = any(fnmatchcase(last, pattern) for pattern in _OTHER)
        if name in members or is_other or not last.endswith(_WEIGHTS):
            continue
        more = [other for other in names if other != name and _belongs(name, other)]
        if last.endswith(".index") and not more:
            continue  # some other program's
        result.append(Group((name, *more)))
        members |= {name, *more}
    return result


def _belongs(first: str, other: str) -> bool:
    for whole, like in _SEVERAL:
        if (match := whole.fullmatch(first)) is not None:
            words = {name: _literal(word) for name, word in match.groupdict().items()}
            return fnmatchcase(other, like.format(**words))
    return False


def _literal(text: str) -> str:
    """Escape a text so that fnmatch sees no pattern in it."""
    return re.sub(r"[*?[]", r"[\g<0>]", text)
