"""`zoo verify`, `zoo diff` and `zoo diagnose`: whether a model is right, and where it is not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import zoo
from zoo.cli.command import Commands
from zoo.cli.exit_codes import ExitCode
from zoo.cli.options import (
    AdapterOptions,
    Json,
    MappingOptions,
    NoAdapter,
    Reading,
    Ref,
    among,
    argument,
    dtype_name,
    one_of,
    option,
    path,
    text,
    verifiable_names,
    whole_number,
)
from zoo.cli.output import read_text, show_progress, to_json
from zoo.errors import UsageError
from zoo.terminal import has_color, passing

commands = Commands()


@commands.define("verify")
def verify(
    reading: Reading,
    no_adapter: NoAdapter,
    mapped: MappingOptions,
    ref: Annotated[
        str | None,
        argument("[NAME|DIR]", "a name or a directory", autocompletion=verifiable_names),
    ] = None,
    all: Annotated[
        bool, option("--all", help="verify every architecture's tiny variants (default: off)")
    ] = False,
    golden: Annotated[
        str | None,
        option(
            "--golden",
            metavar="NAME|FILE",
            help="compare with published outputs too, of a file or of a name; alone where no "
            "reference reads the checkpoint (default: none)",
            parser=text,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        option(
            "--html",
            metavar="DIR",
            help="write a page about it, with recorded bugs and round trips, and report.json "
            "(default: none)",
            parser=path,
        ),
    ] = None,
    record: Annotated[
        bool, option("--record", help="write the result into zoo/evidence.json (default: off)")
    ] = False,
    json: Json = False,
) -> int:
    """Run the parity protocol; exit with 1 where it fails."""
    if (ref is None) != all:
        raise UsageError("verify: expected either NAME|DIR or --all")
    # either is refused before the work begins
    recorded = _evidence_before(html, record)
    how: dict[str, Any] = {"all": all, "golden": golden, "progress": show_progress}
    asked = reading.arguments() | no_adapter.arguments() | mapped.arguments()
    report = zoo.verify(ref, **how, **asked)
    if html is not None or record:
        _publish(report, recorded, html, record)
    print(to_json(report.to_json()) if json else report.to_text(color=has_color(sys.stdout)))
    return ExitCode.OK if report.ok else ExitCode.FAILED


def _evidence_before(html: Path | None, record: bool) -> dict[str, Any]:
    if html is not None:
        html.mkdir(parents=True, exist_ok=True)
    if html is None and not record:
        return {}
    from zoo import evidence

    return evidence.read()


def _publish(report: Any, recorded: dict[str, Any], html: Path | None, record: bool) -> None:
    from zoo import evidence
    from zoo.report.gather import gather, of_checkpoints
    from zoo.report.page import page

    run = gather(report, recorded, lambda name: passing(f"{name}: drawn", sys.stderr))
    passing("", sys.stderr)
    if record:
        evidence.update("parity", run.to_record()["parity"])
        if published := of_checkpoints(report):
            evidence.update("checkpoints", published)
    if html is not None:
        (html / "index.html").write_text(page(run), encoding="utf-8")
        evidence.write(run.to_record(), html / "report.json")


@commands.define("diff")
def diff(
    ref: Ref,
    reading: Reading,
    adapter: AdapterOptions,
    mapped: MappingOptions,
    other: Annotated[
        str | None,
        argument("[OTHER]", "the model to compare with (default: the reference's NAME)"),
    ] = None,
    dtype: Annotated[
        str,
        option(
            "--dtype",
            metavar="DTYPE",
            help="compare in fp16, bf16, fp32 or fp64 (default: fp64)",
            parser=dtype_name,
        ),
    ] = "fp64",
    way: Annotated[
        str,
        option(
            "--way",
            metavar="WAY",
            help="run whole rows, padded, cached or unmasked (default: whole)",
            parser=one_of("whole", "padded", "cached", "unmasked"),
            autocompletion=among("whole", "padded", "cached", "unmasked"),
        ),
    ] = "whole",
    backward: Annotated[
        bool,
        option("--backward", help="find the first gradient that differs (default: off)"),
    ] = False,
    prompt: Annotated[
        str | None,
        option("--text", metavar="TEXT", help="run TEXT (default: random tokens)", parser=text),
    ] = None,
    seed: Annotated[
        int,
        option(
            "--seed", metavar="N", parser=whole_number, help="draw these random tokens (default: 0)"
        ),
    ] = 0,
    no_diagnose: Annotated[
        bool,
        option("--no-diagnose", help="find the module and not the cause (default: off)"),
    ] = False,
    json: Json = False,
) -> int:
    """Compare two models module by module; exit with 1 where they differ."""
    how: dict[str, Any] = {
        "dtype": dtype,
        "way": way,
        "backward": backward,
        "text": prompt,
        "seed": seed,
        "diagnose": not no_diagnose,
    }
    asked = reading.arguments() | adapter.arguments() | mapped.arguments()
    difference = zoo.diff(ref, other, **how, **asked)
    print(to_json(difference.to_json()) if json else difference.to_text(has_color(sys.stdout)))
    return ExitCode.OK if difference.ok else ExitCode.FAILED


@commands.define("diagnose")
def diagnose(
    ref: Ref,
    reading: Reading,
    file: Annotated[
        str | None,
        option(
            "--text",
            metavar="FILE",
            help="a text that the model should predict well; - is standard input "
            "(default: a text of zoo's own)",
            parser=text,
        ),
    ] = None,
    tensors: Annotated[
        bool,
        option("--tensors", help="print a line for each tensor, not each kind (default: off)"),
    ] = False,
    json: Json = False,
) -> int:
    """Look for mistakes; exit with 1 where something looks wrong, 2 where nothing can be read."""
    sample = None if file is None else read_text(file)
    try:
        diagnosis = zoo.diagnose(ref, text=sample, progress=show_progress, **reading.arguments())
    finally:
        passing("", sys.stderr)
    if json:
        print(to_json(diagnosis.to_json()))
    else:
        print(diagnosis.to_text(has_color(sys.stdout), tensors=tensors))
    return ExitCode.OK if diagnosis.ok else ExitCode.FAILED
