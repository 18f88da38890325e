"""`zoo convert`, `zoo convert-optimizer` and `zoo check`: files of another layout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import zoo
from zoo.cli.command import Commands
from zoo.cli.exit_codes import ExitCode
from zoo.cli.options import (
    AdapterOptions,
    Reading,
    Source,
    argument,
    byte_count,
    dtype_name,
    exclusive,
    option,
    pair,
    pairs,
    path,
    text,
)
from zoo.cli.progress import ConversionProgress
from zoo.errors import UsageError, listing

commands = Commands()


def dialect(value: str) -> str:
    """A layout that zoo writes."""
    if value == "native":  # the default costs no import
        return value
    from zoo.saving.save import check_dialect

    try:
        check_dialect(value)
    except UsageError as error:
        raise typer.BadParameter(str(error).removeprefix("to=").removeprefix("--to ")) from None
    return value


def stored_dtype(value: str) -> str:
    """A dtype of torch's by its short name too; others are the layout's own, such as q8_0."""
    try:
        return dtype_name(value)
    except typer.BadParameter:
        return value


@commands.define("convert")
def convert(
    src: Source,
    reading: Reading,
    adapter: AdapterOptions,
    to: Annotated[
        str,
        option(
            "--to",
            metavar="LAYOUT",
            help="write hf, native, meta, gguf, nanogpt, onnx, pt2 … (default: native)",
            parser=dialect,
        ),
    ] = "native",
    out: Annotated[
        Path | None,
        option(
            "--out",
            metavar="DIR",
            help="write into DIR (default: SRC's name and the layout's, here)",
            parser=path,
        ),
    ] = None,
    trust: Annotated[
        list[str] | None,
        option(
            "--trust",
            metavar="TENSOR...",
            help="believe these where tied tensors differ (default: refuse)",
            parser=text,
        ),
    ] = None,
    layout: Annotated[
        list[str] | None,
        option(
            "--layout",
            metavar="FIELD=VALUE...",
            help="choose what the layout leaves open: shards=2, version=1 … (default: its own)",
            parser=pair,
        ),
    ] = None,
    dry_run: Annotated[
        bool, option("--dry-run", help="print the plan, write nothing (default: off)")
    ] = False,
    force: Annotated[
        bool,
        option(
            "--force",
            help="replace the checkpoint in DIR; other files there are kept (default: refuse)",
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        option(
            "--dtype",
            metavar="DTYPE",
            help="cast to fp32, bf16, fp16 or a type of the layout's, such as q8_0 "
            "(default: as stored)",
            parser=stored_dtype,
        ),
    ] = None,
    memory: Annotated[
        int | None,
        option(
            "--memory",
            metavar="BYTES",
            help="use this much for buffers (default: 64M)",
            parser=byte_count,
        ),
    ] = None,
    shard: Annotated[
        int | None,
        option(
            "--shard",
            metavar="BYTES",
            help="write files of at most this size (default: 5G)",
            parser=byte_count,
        ),
    ] = None,
    part: Annotated[
        str | None,
        option(
            "--part",
            metavar="N/M",
            help="write the N-th of M shares; the last one done publishes (default: all)",
            parser=text,
        ),
    ] = None,
    restart: Annotated[
        bool,
        option("--restart", help="begin from the start after a kill (default: go on)"),
    ] = False,
    allow_nonfinite: Annotated[
        bool,
        option("--allow-nonfinite", help="keep NaN and infinity (default: refuse)"),
    ] = False,
    no_sha256: Annotated[
        bool,
        option("--no-sha256", help="digest each tensor and no whole file (default: both)"),
    ] = False,
    json: Annotated[
        bool, option("--json", help="print events, one JSON object a line (default: off)")
    ] = False,
    quiet: Annotated[bool, option("--quiet", help="print errors alone (default: off)")] = False,
) -> int:
    """Convert a checkpoint; after an interrupt or a kill the same command goes on."""
    exclusive(json=json, quiet=quiet)
    asked: dict[str, Any] = reading.arguments() | adapter.arguments()
    if trust is not None:
        asked["trust"] = trust
    if layout is not None:
        asked["layout"] = pairs(layout)
    if dry_run:
        from zoo.saving.convert import dry_run as plan

        asked |= {"dtype": dtype, "max_shard_size": shard, "part": part}
        print(plan(src, to=to, **asked))
        return ExitCode.OK
    if memory:
        asked["memory"] = memory
    try:
        written = zoo.convert(
            src,
            out or Path(f"{_stem(src)}-{to}"),
            to=to,
            force=force,
            dtype=dtype,
            max_shard_size=shard,
            restart=restart,
            part=part,
            allow_nonfinite=allow_nonfinite,
            sha256=not no_sha256,
            tell=ConversionProgress(json, quiet),
            **asked,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("The same command goes on from here") from None
    if json or quiet:
        return ExitCode.OK
    if part and not written.exists():
        print(f"part {part} of {written} is written; other parts are not", file=sys.stderr)
    else:
        print(f"{src} -> {written} ({to})")
    return ExitCode.OK


def _stem(ref: str) -> str:
    """A name for what is made of a reference: its last part, without the revision."""
    return Path(ref.partition("@")[0] if ref.startswith("hf:") else ref).resolve().name


@commands.define("convert-optimizer")
def convert_optimizer(
    src: Source,
    file: Annotated[Path, argument("FILE", "optimizer.pt, ckpt.pt …", parser=path)],
    reading: Reading,
    out: Annotated[
        Path, option("--out", metavar="FILE", help="write into FILE (required)", parser=path)
    ],
    to: Annotated[
        str,
        option(
            "--to",
            metavar="LAYOUT",
            help="native, or what SRC becomes (default: native)",
            parser=text,
        ),
    ] = "native",
    names: Annotated[
        Path | None,
        option(
            "--names",
            metavar="FILE",
            help="the parameters of the side that is not native, a name a line, in its "
            "optimizer's order (default: the spec's order)",
            parser=path,
        ),
    ] = None,
    force: Annotated[
        bool,
        option("--force", help="replace the optimizer's state in FILE (default: refuse)"),
    ] = False,
) -> int:
    """Convert what a torch optimizer keeps of SRC's weights."""
    from zoo.saving.optimizer_files import convert_file, read_names

    listed = names and read_names(names)
    how: dict[str, Any] = {"to": to, "names": listed or None, "force": force}
    written = convert_file(src, file, out, **how, **reading.arguments())
    print(f"{file} -> {written} ({to})")
    return ExitCode.OK


@commands.define("check")
def check(
    directory: Annotated[Path, argument("DIR", "a directory that convert wrote", parser=path)],
    sha256: Annotated[
        bool, option("--sha256", help="digest whole files too (default: each tensor)")
    ] = False,
) -> int:
    """Compare a directory with its manifest; exit with 1 where it differs."""
    from converters import manifest

    damages = list(manifest.check(directory, sha256=sha256))
    for damage in damages:
        print(damage)
    written = manifest.read(directory)
    files = written["files"]
    for name, digest in written.get("adapter", {}).items():
        print(f"changed by an adapter: {name}, sha256 {digest}")
    if sha256 and (without := [name for name in files if not files[name]["sha256"]]):
        print(f"no sha256 was taken of {listing(without)}: each tensor's own digest was compared")
    outcome = f"{len(damages)} damaged" if damages else "every digest matches the manifest"
    print(f"{directory}: {outcome}")
    return ExitCode.FAILED if damages else ExitCode.OK
