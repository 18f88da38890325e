"""Parity: prove that the native model and the reference compute the same function."""

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

Progress = Callable[[int, int, str], None]  # (jobs done, number of jobs, name of the next job)


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
    """Run every parity check on the variants of an architecture or on a checkpoint.

    A checkpoint is checked twice: with its own weights, and with its config and random weights in
    which every parameter has an effect.

    Args:
        ref: Name of an architecture, or a checkpoint as in `zoo.load`. A name that is both, such
            as "gpt2", also checks the checkpoint if that is in the hub's cache.
        all: Check every architecture.
        variants: Names of the variants to check (default: all of them).
        seed: Seed of the random weights and inputs.
        progress: Called with the number of finished jobs, the number of jobs, and the next name.
        golden: File with outputs that a checkpoint's authors published, or the name of a
            checkpoint for which the registry has one. It is compared in addition to the reference,
            or alone if the reference cannot read the checkpoint.
        revision: Branch, tag or commit of the checkpoint.
        **reading: `head`, `config` and `ignore_config` as in `zoo.load`.

    Returns:
        All measurements with their limits; `report.ok` is True if all are within limits.

    Raises:
        UsageError: The arguments contradict each other, or a variant has an unknown name.
        Offline: The checkpoint is not in the cache; this function downloads nothing.

    Example:
        >>> report = zoo.verify("gpt2", variants=["base"])  # doctest: +SKIP
        >>> print(report.summary())  # doctest: +SKIP
        parity: 13 measurements of 1 checkpoint, all within limits
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
        transformers()  # if it is missing, raise before anything else
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
    """One checkpoint to check: `write` creates it, or `directory` already holds it.

    With `golden`, the model is compared with that alone.
    """

    name: str
    reference_class: str
    write: Callable[[Path, int], object] | None = None
    directory: Path | None = None
    golden: Golden | None = None
    published: Published | None = None  # set if its weights are those of a named checkpoint
    reading: Mapping[str, Any] = field(default_factory=dict)  # arguments of zoo.load


def variant_job(entry: Architecture, variant: str) -> Job:
    """Return the job that checks a variant of an architecture."""
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
            return jobs  # the golden outputs replace the reference
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
    # with other fields or another head it is another model than the published one
    named = None if {"head", "config", "ignore_config"} & reading.keys() else source.checkpoint
    if named is not None and source.repo and source.revision:
        published = Published(named.name, source.repo, source.revision)
    place: dict[str, Any] = {"directory": directory}
    # another head leaves tensors out, which is no difference
    if reference_class != own_class and not Oracle(reference_class).own:
        place = {"write": lambda copy, seed: write_under(directory, copy, reference_class)}
    return [
        Job(name, reference_class, **place, reading=reading, published=published),
        Job(f"{name}, hot", reference_class, write, reading=reading),
    ]


def _run(job: Job, seed: int) -> Iterator[Row]:
    """Run every check. An exception fails its own check, and the other checks still run."""
    from zoo.loading import load
    from zoo.parity.checks import CHECKS, Subject
    from zoo.parity.layouts import layouts
    from zoo.parity.truth import Truth

    with _checkpoint(job, seed) as directory, warnings.catch_warnings():
        if job.write is not None:  # warn about a user's config only at its own path
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
        warnings.simplefilter(
            "ignore", UnusedFieldsWarning
        )  # later loads would repeat the warnings of the first
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
