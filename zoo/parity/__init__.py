"""Parity: native and reference compute the same function, by a protocol planted bugs fail."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from zoo.errors import UnusedFieldsWarning
from zoo.parity.result import Published, Report, Row

if TYPE_CHECKING:
    from zoo.checkpoints.sources import Source
    from zoo.parity.golden import Golden
    from zoo.registry import Architecture

__all__ = ["Report", "Row", "verify"]

Progress = Callable[[int, int, str], None]  # done, all there are, the next one's name


def verify(
    ref: str | PathLike[str] | None = None,
    *,
    all: bool = False,
    variants: Collection[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    golden: str | PathLike[str] | None = None,
    revision: str | None = None,
    **reading: Any,
) -> Report:
    """The whole protocol: an architecture by its variants, a checkpoint as it is and redrawn hot.

    A name may be both, as "gpt2" is: then its checkpoint joins in if it is in the hub's cache.
    `all` is every architecture; `variants` picks some of them by name. `golden` is a file of
    outputs that a checkpoint's authors published, or the name of the checkpoint that the registry
    has one for: it is held against the model too, or alone where no reference reads the checkpoint.
    `revision` and `reading` (head, config, ignore_config) say how a checkpoint is read, as
    `zoo.load` has them; a head's reference class is read beside it.
    """
    from zoo.checkpoints.oracle import transformers
    from zoo.errors import UsageError, did_you_mean
    from zoo.parity.golden import find

    if (ref is None) != all:
        raise UsageError("verify takes a name, a directory or all=True")
    if golden is not None and ref is None:
        raise UsageError("golden: of one checkpoint, and not of all")
    published = find(golden, ref)
    if published is None:
        transformers()  # the fix for its absence is said before anything else
    if (reading or revision) and ref is None:
        raise UsageError("head, config, ignore_config, revision: of one checkpoint, and not of all")
    if reading.get("adapter") not in (None, False):
        raise UsageError(
            f"adapter={reading['adapter']!r}: the reference reads the weights alone. "
            "Merge it in first: zoo convert DIR --adapter ADAPTER --to hf --out OUT, and verify OUT"
        )
    jobs = _jobs(ref, published, revision, reading)
    if variants is not None:
        names = [job.name.rpartition("/")[2] for job in jobs]
        if unknown := [name for name in variants if name not in names]:
            raise UsageError(f"{ref}: no variant {unknown[0]!r}.{did_you_mean(unknown[0], names)}")
        jobs = [job for job in jobs if job.name.rpartition("/")[2] in variants]
    report = Report()
    for done, job in enumerate(jobs):
        if progress is not None:
            progress(done, len(jobs), job.name)
        started = time.perf_counter()
        report.rows.extend(_run(job, seed))
        if job.published is not None:
            report.published[job.name] = job.published
        report.seconds[job.name] = time.perf_counter() - started
    if progress is not None:
        progress(len(jobs), len(jobs), "")
    return report


@dataclass(frozen=True)
class Job:
    """One checkpoint to be proven: made by `write`, or there already in `directory`.

    With `golden` against that alone.
    """

    name: str
    reference_class: str
    write: Callable[[Path, int], object] | None = None
    directory: Path | None = None
    golden: Golden | None = None
    published: Published | None = None  # where its weights are those of a named checkpoint
    reading: Mapping[str, Any] = field(default_factory=dict)  # how zoo.load reads it


def variant_job(entry: Architecture, variant: str) -> Job:
    from zoo.parity.fixtures import hot_checkpoint

    def write(directory: Path, seed: int) -> object:
        return hot_checkpoint(entry, variant, directory, seed=seed)

    return Job(f"{entry.name}/{variant}", entry.variants[variant]["class"], write)


def _jobs(
    ref: str | PathLike[str] | None,
    golden: Golden | None,
    revision: str | None = None,
    reading: Mapping[str, Any] = MappingProxyType({}),
) -> list[Job]:
    from zoo import registry
    from zoo.checkpoints import sources
    from zoo.errors import Offline

    architectures = registry.architectures()
    entries = (
        list(architectures.values())
        if ref is None
        else [architectures[ref]]
        if ref in architectures
        else []
    )
    jobs = [variant_job(entry, name) for entry in entries for name in entry.variants]
    if ref is None or (entries and ref not in registry.checkpoints()):
        return jobs
    try:
        # a proof never downloads gigabytes unasked
        source = sources.resolve(ref, local_files_only=True, revision=revision)
        if reading.get("adapter") is None:
            sources.check_no_adapter(source, applied=False)
    except Offline as error:
        if entries:
            return jobs
        raise Offline(
            f"{ref} is not in the cache, and verify downloads nothing: run "
            f"zoo.load({str(ref)!r}) once, or pass a directory"
        ) from error
    name = str(ref) if source.repo else (source.file or source.directory.resolve()).name
    if golden is not None:
        place = source.file or source.directory
        jobs.append(Job(name, "", directory=place, golden=golden, reading=reading))
        if not (source.directory / "config.json").is_file() or source.file is not None:
            return jobs  # it stands in the place of the reference
    return jobs + _checkpoint_jobs(source, name, reading)


def _checkpoint_jobs(source: Source, name: str, reading: Mapping[str, Any]) -> list[Job]:
    from converters.strict_json import read_json
    from zoo import registry
    from zoo.checkpoints.oracle import Oracle
    from zoo.errors import ConfigError, UsageError
    from zoo.parity.fixtures import write_like, write_under

    directory = source.directory
    path = directory / "config.json"
    if not path.is_file():
        raise UsageError(
            f"{directory}: a native checkpoint, which the reference cannot read. "
            f"Run: zoo convert {directory} --to hf --out DIR, and verify DIR"
        )
    config = read_json(path, ConfigError)
    if config.get("quantization_config") is not None:
        raise UsageError(
            f"{directory}: quantized, and the reference computes in other numbers than those it "
            f"stands for. Run: zoo convert {directory} --to hf --out DIR, and verify DIR"
        )
    entry, own_class = registry.architecture_for(config, str(path))
    reference_class = own_class
    if (head := reading.get("head")) is not None:
        reference_class = next((c for c, heads in entry.heads.items() if head in heads), None)
    if reference_class is None:
        raise ConfigError(f"{path}: 'architectures' names no class for the reference to load")

    def write(copy: Path, seed: int) -> None:
        write_like(directory, copy, reference_class, seed=seed)

    published = None
    # read with other fields or another head, it is another model
    named = None if {"head", "config", "ignore_config"} & reading.keys() else source.checkpoint
    if named is not None and source.repo and source.revision:
        published = Published(named.name, source.repo, source.revision)
    place: dict[str, Any] = {"directory": directory}
    if (
        reference_class != own_class and not Oracle(reference_class).own
    ):  # what another head leaves out is no difference
        place = {"write": lambda copy, seed: write_under(directory, copy, reference_class)}
    return [
        Job(name, reference_class, **place, reading=reading, published=published),
        Job(f"{name}, hot", reference_class, write, reading=reading),
    ]


def _run(job: Job, seed: int) -> Iterator[Row]:
    """Every check; one that breaks is a failure of that check and not the end of the others."""
    from zoo.loading import load
    from zoo.parity.checks import CHECKS, Subject
    from zoo.parity.layouts import layouts
    from zoo.parity.truth import Truth

    with _checkpoint(job, seed) as directory, warnings.catch_warnings():
        if job.write is not None:  # a user's own config is read, and warned of, where it lies
            warnings.simplefilter("ignore", UnusedFieldsWarning)
        if job.golden is not None:
            try:
                yield job.golden.row(job.name, load(directory, modules=False, **job.reading))
            except Exception as error:
                yield _broken(job.name, "golden", error)
            return
        try:
            truth = Truth(directory, job.reference_class, seed)
            if truth.problems:
                raise ValueError(f"the reference itself loads with {'; '.join(truth.problems)}")
        except Exception as error:
            yield _broken(job.name, "reference", error)
            return
        subject = Subject(
            job.name,
            truth,
            lambda dtype: load(directory, dtype=dtype, modules=False, **job.reading),
            job.reading,
        )
        try:
            subject.model(None)
        except Exception as error:
            yield _broken(job.name, "load", error)
            return
        warnings.simplefilter("ignore", UnusedFieldsWarning)  # the other loads repeat the first
        for check in (*CHECKS, layouts):
            try:
                yield from check(subject)
            except Exception as error:
                yield _broken(job.name, check.__name__, error)


@contextmanager
def _checkpoint(job: Job, seed: int) -> Iterator[Path]:
    if job.directory is not None:
        yield job.directory
        return
    assert job.write is not None
    with TemporaryDirectory(prefix="zoo-parity-") as scratch:
        directory = Path(scratch, "checkpoint")
        job.write(directory, seed)
        yield directory


def _broken(subject: str, check: str, error: Exception) -> Row:
    detail = f"{type(error).__name__}: {error}"
    return Row(subject, check, float("nan"), 0, type(error).__name__, detail)
