"""`zoo list` and `zoo info`: what there is, without loading it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from zoo.checkpoints import info as checkpoint_info
from zoo.cli.command import Commands
from zoo.cli.exit_codes import ExitCode
from zoo.cli.options import Json, Reading, Ref, exclusive, option
from zoo.cli.output import first_and_last, indent, short_count, size, to_json
from zoo.terminal import table

commands = Commands()
PRECISIONS = ("fp64", "fp32", "bf16")


@commands.define("list")
def list_checkpoints(
    verified: Annotated[
        bool,
        option(
            "--verified",
            help="print what was measured of each architecture, and the checkpoints whose "
            "published weights were compared (default: off)",
        ),
    ] = False,
    json: Json = False,
) -> int:
    """List the checkpoints that have a name."""
    if verified:
        return _list_verified(json)
    entries = checkpoint_info.list_checkpoints()
    if json:
        print(to_json([entry.to_json() for entry in entries]))
        return ExitCode.OK
    rows = [
        (
            entry.name,
            entry.architecture,
            short_count(entry.parameters),
            entry.license,
            entry.repo,
            _revision(entry.revision, entry.pinned),
        )
        for entry in entries
    ]
    head = ("NAME", "ARCHITECTURE", "PARAMETERS", "LICENSE", "REPOSITORY", "REVISION")
    print(table([head, *rows], right={2}))
    return ExitCode.OK


def _list_verified(as_json: bool) -> int:
    from zoo import evidence, registry

    proven, bugs = evidence.proven(), evidence.read()["bugs"]
    architectures = [
        {
            "architecture": name,
            "measured": evidence.when("parity", name, entry),
            "variants": entry["variants"],
            **_errors(entry),
            "bugs": _detected(bugs.get(name)),
        }
        for name, entry in proven.items()
        if name in registry.architectures()
    ]
    checkpoints = [
        {
            "checkpoint": name,
            "measured": evidence.when("checkpoints", name, entry),
            **_errors(entry),
            "repo": entry["repo"],
            "revision": entry["revision"],
        }
        for name, entry in evidence.verified_checkpoints().items()
    ]
    if as_json:
        print(to_json({"architectures": architectures, "checkpoints": checkpoints}))
        return ExitCode.OK
    print("Architectures: tiny models of random weights, every variant; the worst error of each")
    print("dtype (fp32 and bf16 with its multiple of the reference's own), planted bugs killed\n")
    print(_records(architectures))
    print(
        f"\nCheckpoints compared on their own published weights: {len(checkpoints) or 'none yet'}"
    )
    if checkpoints:
        print(f"\n{_records(checkpoints)}")
    else:
        print("Load one once (it is downloaded), then run: zoo verify NAME --record")
    return ExitCode.OK


def _errors(entry: Mapping[str, Any]) -> dict[str, str]:
    return {name: entry["checks"].get(name, {}).get("shown", "-") for name in PRECISIONS}


def _detected(entry: Mapping[str, Any] | None) -> str:
    """12/12: of the planted bugs that a model runs with, those that parity detects."""
    if entry is None:
        return "not run"
    planted = [bug for bug in entry["bugs"].values() if "refused" not in bug]
    return f"{sum(bool(bug.get('killed')) for bug in planted)}/{len(planted)}"


def _records(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows that have the same fields."""
    return table([[name.upper() for name in rows[0]], *([*map(str, row.values())] for row in rows)])


@commands.define("info")
def info(
    ref: Ref,
    reading: Reading,
    tree: Annotated[
        bool, option("--tree", help="print its modules and their shapes too (default: off)")
    ] = False,
    json: Json = False,
) -> int:
    """Describe a checkpoint from its config and headers."""
    exclusive(tree=tree, json=json)
    report = checkpoint_info.info(ref, **reading.arguments())
    if json:
        print(to_json(report.to_json()))
        return ExitCode.OK
    print(report.ref)
    print(indent(table(_summary(report))))
    for title, values in (("config", report.config), ("told by the tensors", report.inferred)):
        if values or title == "config":
            print(f"  {title}")
            print(indent(table([(key, _value(value)) for key, value in values.items()]), 4))
    if tree:
        from zoo.checkpoints.locate import skeleton

        print("  modules")
        lines = checkpoint_info.tree(skeleton(ref, **reading.arguments()))
        print(indent("\n".join(lines), 4))
    return ExitCode.OK


def _summary(report: Any) -> list[tuple[str, str]]:
    """Name and value of each fact."""
    rows: list[tuple[str, str]] = []
    stored = report.stored
    if stored:
        files = f"{len(stored.files)} file{'s' if len(stored.files) > 1 else ''}"
        rows.append(("kind", f"{stored.about}, {files}, {size(stored.size)}"))
    if report.dialect:
        about = f"({report.about})" * bool(report.about)
        rows.append(("dialect", " ".join([report.dialect, about])))
    rows.append(("architecture", report.architecture))
    if report.reference_class:
        rows.append(("class", report.reference_class))
    rows.append(("head", f"{report.head or 'not named'}, of {', '.join(report.heads)}"))
    if report.parameters is not None:
        rows.append(("parameters", f"{report.parameters:,}"))
    if report.license:
        rows.append(("license", report.license))
    if report.repo:
        rows.append(("repository", report.repo))
        rows.append(("revision", _revision(report.revision or "", report.pinned)))
    if report.adapter:
        rows.append(("adapter", report.adapter))
    if report.mismatch:
        rows.append(("in the cache", f"not this checkpoint: {'; '.join(report.mismatch)}"))
    if report.quantized:
        rows.append(("quantized", report.quantized))
    if stored:
        rows.append(("tensors", f"{stored.tensors:,}"))
        for dtype, count in stored.dtypes.items():
            rows.append((f"  {dtype}", f"{count:,} values, {size(stored.dtype_bytes[dtype])}"))
    if report.directory:
        rows.append(("directory", report.directory))
    if stored:
        rows.append(("files", first_and_last(stored.files)))
    return rows


def _value(value: Any) -> str:
    return json.dumps(value)


def _revision(revision: str, pinned: bool | None) -> str:
    return f"{revision} (unpinned)" if pinned is False else revision
