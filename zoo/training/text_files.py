"""Texts to train on, from files: plain text, directories, JSONL, Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoo.errors import MissingDependency, UsageError, did_you_mean

RECORDS = (".jsonl", ".ndjson", ".parquet")
TEXTS = (".txt", ".md", ".text")


def documents(data: Path) -> Iterator[str]:
    """Each document of a text file, of a directory of files, or of records with a `text`.

    Raises:
        UsageError: There is no such file, it is no text, or a record has no `text`.
    """
    for path in files(data):
        if path.suffix in RECORDS:
            for where, record in records(path):
                if not isinstance(record.get("text"), str):
                    near = did_you_mean("text", record)
                    raise UsageError(f"{where}: expected a field text.{near}")
                yield record["text"]
        else:
            yield read_text(path)


def files(data: Path) -> list[Path]:
    """The files that data means: itself, or all texts and records in a directory."""
    if not data.is_dir():
        return [data]
    kinds = (*TEXTS, *RECORDS)
    below = sorted(path for path in data.rglob("*") if path.suffix in kinds and path.is_file())
    if not below:
        raise UsageError(f"{data}: no file in it ends in {', '.join(kinds)}")
    return below


def read_text(path: Path) -> str:
    """The text of a file, with its line ends as they are.

    Raises:
        UsageError: There is no such file, or it is no UTF-8 text.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: no UTF-8 text: byte {error.start} is {error.reason}") from None


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, a record) of a file of JSON lines or of Parquet.

    Raises:
        UsageError: A line is no JSON object.
        MissingDependency: Parquet, without the library that reads it.
    """
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{where}: no JSON: {error}") from None
        if not isinstance(record, dict):
            raise UsageError(f"{where}: expected a JSON object, found {type(record).__name__}")
        yield where, record


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise MissingDependency(
            f"{path}: reading Parquet needs pyarrow: pip install 'zoo-weights[train]'"
        ) from None
    number = 0
    for batch in parquet.ParquetFile(path).iter_batches():
        for record in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", record
