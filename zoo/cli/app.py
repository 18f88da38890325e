"""The command line: one function a command, each a thin front over the package."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import zoo
from converters.memory import enough
from zoo import evidence, registry
from zoo.checkpoints import info
from zoo.checkpoints.local import is_path
from zoo.cli.progress import Shown
from zoo.errors import (
    InputError,
    UnusedFieldsWarning,
    UsageError,
    ZooError,
    did_you_mean,
    in_shell,
    listing,
    printable,
)
from zoo.terminal import BOLD, RED, Escaped, has_color, paint, passing
from zoo.version import VERSION

if TYPE_CHECKING:
    from zoo.components.model import Model

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name that it cannot write is no failure
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  closed by the shell
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    content, out, err = sys.stdout, Escaped(sys.stdout, printable), Escaped(sys.stderr, printable)
    with redirect_stdout(out), redirect_stderr(err):
        return _guarded(arguments, content)


def _guarded(arguments: Sequence[str] | None, content: TextIO) -> int:
    """The command's exit code; what a model writes goes to `content` as it is."""
    options = argparse.Namespace(run=None, failed=FAILED)
    try:
        options = _parsed(arguments)
        _check_directory()
        writes = options.run in (_generate, _chat)
        way_out = "Take a smaller model, a shorter text or another machine"
        with (
            _beside_a_shell(),
            enough(options.name, way_out),
            redirect_stdout(content) if writes else nullcontext(),
        ):
            code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # the reader has seen enough; nothing more can be written, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        going_on = options.run is _convert and not options.dry_run
        told = "interrupted. The same command goes on from here" if going_on else "interrupted"
        return _fail(told, INTERRUPTED)
    except ZooError as error:
        return _fail(str(error), USAGE if isinstance(error, UsageError) else options.failed)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}", options.failed)


def _check_directory() -> None:
    """Libraries that torch loads end the process, in words of their own, where there is none."""
    try:
        os.getcwd()
    except OSError:
        raise UsageError("the current directory was deleted: cd to another one") from None


@contextmanager
def _beside_a_shell() -> Iterator[None]:
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


def _fail(message: str, code: int) -> int:
    title = paint("zoo: error:", BOLD + RED, has_color(sys.stderr))
    print(title, message, file=sys.stderr)
    return code


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, odd = parser.parse_known_args(arguments)
    if odd:
        command: argparse.ArgumentParser = options.command
        known = [name for action in command._actions for name in action.option_strings]
        near = did_you_mean(odd[0].partition("=")[0], known)
        command.error(f"unrecognized arguments: {' '.join(odd)}{near and '.' + near}")
    return options


def _add_ref(command: argparse.ArgumentParser, metavar: str = "NAME|PATH") -> None:
    command.add_argument(
        "ref", metavar=metavar, help="a name, hf:org/repo@rev, a directory or a file"
    )
    _add_reading(command)


def _add_reading(command: argparse.ArgumentParser) -> None:
    """How a checkpoint is read, in every command that takes one."""
    group = command.add_argument_group("reading the checkpoint")
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit  [main]")
    group.add_argument("--head", help="use this head  [the one that the checkpoint names]")
    does = "set fields of the config, under native names"
    group.add_argument("--config", metavar="FIELD=VALUE", type=_pair, help=does, **several)
    does = "accept these unknown fields of config.json"
    group.add_argument("--ignore-config", metavar="FIELD", help=does, **several)


def _reading(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for of these, as `zoo.load` takes it."""
    names = ("revision", "head", "ignore_config", "adapter", "mmap")
    asked = {name: getattr(options, name, None) for name in names}  # not every command has all
    asked["config"] = None if options.config is None else dict(options.config)
    return {name: value for name, value in asked.items() if value is not None}


def _add_mmap(command: argparse.ArgumentParser) -> None:
    does = "weights as views of their file, or read into memory  [safetensors and GGUF as views]"
    how = argparse.BooleanOptionalAction
    command.add_argument("--mmap", action=how, default=None, help=does)


def _add_adapter(command: argparse.ArgumentParser, applied: bool = True) -> None:
    """What is made of an adapter; `applied`: it may be applied, and not only ignored."""
    how = command.add_mutually_exclusive_group()
    if applied:
        does = "apply a LoRA of peft's: the one in DIR; without DIR, the one beside the weights"
        how.add_argument("--adapter", metavar="DIR", nargs="?", const=True, type=_place, help=does)
    does = "ignore the adapter beside the weights: they have it merged in already"
    how.add_argument("--no-adapter", dest="adapter", action="store_const", const=False, help=does)


def _add_weights(command: argparse.ArgumentParser) -> None:
    """How weights are loaded, in every command that computes with them."""
    _add_adapter(command)
    _add_mmap(command)


def _loaded(options: argparse.Namespace) -> Model:
    return zoo.load(options.ref, **_reading(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoo",
        description="Published checkpoints in small native code, proven to compute the same, "
        "and back.",
    )
    parser.add_argument("--version", action="version", version=f"zoo {VERSION}")
    parser.set_defaults(failed=FAILED)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = commands.add_parser("list", help="the checkpoints that have a name")
    command.add_argument(
        "--verified",
        action="store_true",
        help="what was measured of each architecture, and the checkpoints whose own weights were",
    )
    command.add_argument("--json", action="store_true", help="for programs")
    command.set_defaults(run=_list)

    command = commands.add_parser("info", help="what a checkpoint is, without loading it")
    _add_ref(command)
    how = command.add_mutually_exclusive_group()
    how.add_argument("--tree", action="store_true", help="its modules and their shapes")
    how.add_argument("--json", action="store_true", help="for programs")
    command.set_defaults(run=_info)

    command = commands.add_parser(
        "verify", help="prove that zoo and the reference compute the same function"
    )
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("ref", metavar="NAME|DIR", nargs="?", help="a name or a directory")
    which.add_argument("--all", action="store_true", help="every architecture's tiny variants")
    _add_reading(command)
    does = "published outputs, of a file or a name, beside the reference or in its place"
    command.add_argument("--golden", metavar="NAME|FILE", help=does)
    command.add_argument(
        "--html",
        metavar="DIR",
        type=Path,
        help="a page of it, with what is recorded of bugs and round trips, and report.json",
    )
    command.add_argument("--record", action="store_true", help="into zoo/evidence.json")
    command.add_argument("--json", action="store_true", help="for programs")
    _add_adapter(command, applied=False)
    _add_mmap(command)
    command.set_defaults(run=_verify)

    command = commands.add_parser("diff", help="where two models part: the first module that does")
    _add_ref(command)
    command.add_argument(
        "other", metavar="OTHER", nargs="?", help="what it is held against  [the reference's NAME]"
    )
    command.add_argument("--dtype", default="float64", help="float32, bfloat16 …  [float64]")
    command.add_argument(
        "--way", default="whole", help="whole, padded, cached or unmasked  [whole]"
    )
    command.add_argument("--backward", action="store_true", help="the first gradient to differ")
    command.add_argument("--text", help="in the place of random tokens")
    command.add_argument("--seed", type=int, default=0, help="of random tokens  [0]")
    command.add_argument(
        "--no-diagnose", dest="diagnose", action="store_false", help="the place, and not the cause"
    )
    command.add_argument("--json", action="store_true", help="for programs")
    _add_weights(command)
    command.set_defaults(run=_diff, failed=USAGE)  # 1 is an answer

    command = commands.add_parser(
        "diagnose", help="what is wrong in a checkpoint, with nothing to hold it against"
    )
    _add_ref(command)
    command.add_argument("--text", metavar="FILE", help="that it should foresee; - is stdin")
    command.add_argument("--tensors", action="store_true", help="a line each, not each kind")
    command.add_argument("--json", action="store_true", help="for programs")
    command.set_defaults(run=_diagnose, failed=USAGE)

    command = commands.add_parser("convert", help="write a checkpoint in another layout")
    _add_ref(command, "SRC")
    command.add_argument(
        "--to",
        metavar="DIALECT",
        type=_dialect,
        default="native",
        help="hf, meta, gguf, nanogpt, onnx, pt2 … [native]",
    )
    command.add_argument("--out", metavar="DIR", type=_place, help="[SRC's name and the layout's]")
    _add_adapter(command)
    command.add_argument("--trust", metavar="TENSOR", nargs="*", help="which of tied names wins")
    pair = {"metavar": "FIELD=VALUE", "nargs": "*", "type": _pair}
    command.add_argument("--layout", **pair, help="shards=2, version=1 …, as the dialect offers")  # type: ignore[arg-type]
    command.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    does = "replace the checkpoint in DIR; other files there are kept (default: refuse)"
    command.add_argument("--force", action="store_true", help=does)
    command.add_argument("--dtype", help="cast to float32, bfloat16, q8_0 …  [as stored]")
    command.add_argument("--memory", type=_bytes, metavar="BYTES", help="for buffers  [64M]")
    command.add_argument("--shard", type=_bytes, metavar="BYTES", help="at most, a file  [5G]")
    command.add_argument("--part", metavar="N/M", help="a share; the last one done publishes")
    command.add_argument("--restart", action="store_true", help="from the start, after a kill")
    command.add_argument("--allow-nonfinite", action="store_true", help="keep NaN and infinity")
    command.add_argument("--no-sha256", action="store_true", help="xxh3-128 of each tensor alone")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="events, one a line")
    how.add_argument("--quiet", action="store_true", help="errors alone")
    command.set_defaults(run=_convert)

    command = commands.add_parser(
        "convert-optimizer",
        help="what a torch optimizer keeps of SRC's weights, as SRC is converted",
    )
    _add_ref(command, "SRC")
    command.add_argument("file", metavar="FILE", type=_place, help="optimizer.pt, ckpt.pt …")
    command.add_argument(
        "--to", metavar="DIALECT", default="native", help="native, or what SRC becomes  [native]"
    )
    command.add_argument("--out", metavar="FILE", type=_place, required=True)
    does = "of the side that is not native, a name a line, as its optimizer has them"
    command.add_argument("--names", metavar="FILE", type=_place, help=does)
    does = "replace the optimizer's state in FILE (default: refuse)"
    command.add_argument("--force", action="store_true", help=does)
    command.set_defaults(run=_convert_optimizer)

    command = commands.add_parser("check", help="whether a directory still is what convert wrote")
    command.add_argument("directory", metavar="DIR", type=Path)
    command.add_argument("--sha256", action="store_true", help="whole files too")
    command.set_defaults(run=_check)

    command = commands.add_parser("tokenize", help="the ids of a text, and their tokens")
    _add_ref(command)
    command.add_argument("text", metavar="TEXT")
    command.add_argument("--special", action="store_true", help="find special tokens in TEXT")
    command.add_argument("--json", action="store_true", help="for programs")
    command.set_defaults(run=_tokenize)

    command = commands.add_parser("score", help="how well a decoder foresees a text: perplexity")
    _add_ref(command)
    command.add_argument("file", metavar="FILE", help="the text; - is standard input")
    command.add_argument("--window", type=int, metavar="TOKENS", help="[all positions]")
    command.add_argument("--stride", type=int, metavar="TOKENS", help="[half the window]")
    command.add_argument("--json", action="store_true", help="for programs")
    _add_weights(command)
    command.set_defaults(run=_score)

    command = commands.add_parser("fill", help="what a masked LM puts in a text's gaps")
    _add_ref(command)
    command.add_argument("text", metavar="TEXT", help='such as "The capital of [MASK] is"')
    command.add_argument("--top", type=int, default=5, metavar="N", help="how many for each [5]")
    command.add_argument("--json", action="store_true", help="for programs")
    _add_weights(command)
    command.set_defaults(run=_fill)

    command = commands.add_parser("embed", help="a vector for each text")
    _add_ref(command)
    command.add_argument("texts", metavar="TEXT", nargs="*")
    command.add_argument("--file", metavar="FILE", help="a text each line; - is standard input")
    command.add_argument("--pooling", choices=("mean", "first", "last", "max"), help="[mean]")
    command.add_argument("--normalize", action="store_true", help="to length one")
    command.add_argument("--truncate", action="store_true", help="cut what is too long")
    command.add_argument("--json", action="store_true", help="an object with its text each line")
    _add_weights(command)
    command.set_defaults(run=_embed)

    command = commands.add_parser("generate", help="go on with a text")
    _add_ref(command)
    command.add_argument("text", metavar="TEXT")
    _add_sampling(command)
    command.add_argument("--num-return-sequences", type=int, metavar="N", help="several samples")
    command.add_argument("--beams", dest="num_beams", type=int, metavar="N", help="beam search")
    command.add_argument("--special", action="store_true", help="find special tokens in TEXT")
    command.add_argument("--json", action="store_true", help="text, ids, logprobs and times")
    how = command.add_mutually_exclusive_group()
    told = "each piece as soon as it is written; so it is, unless there are several or --json"
    how.add_argument("--stream", action="store_true", help=told)
    how.add_argument("--no-stream", action="store_true", help="nothing before all is written")
    _add_weights(command)
    command.set_defaults(run=_generate)

    command = commands.add_parser("chat", help="a dialogue; /help tells more there")
    _add_ref(command)
    _add_sampling(command)
    _add_weights(command)
    command.set_defaults(run=_chat)
    for name, command in commands.choices.items():
        command.set_defaults(command=command, name=name)
    return parser


SAMPLING = {  # option: its type and what it does
    "max-new-tokens": (int, "as many at most  [100; 1000 in a dialogue]"),
    "temperature": (float, "above 0: drawn, and not the likeliest"),
    "top-k": (int, "of so many"),
    "top-p": (float, "of the fewest that hold this share"),
    "min-p": (float, "of those with this share of the likeliest one's"),
    "repetition-penalty": (float, "above 1: what was said is less likely"),
    "no-repeat-ngram-size": (int, "no run of so many tokens comes twice"),
    "seed": (int, "the same samples again"),
}


def _add_sampling(command: argparse.ArgumentParser) -> None:
    for name, (kind, does) in SAMPLING.items():
        command.add_argument(f"--{name}", type=kind, metavar="N", help=does)
    how = {"dest": "stop_strings", "action": "append", "metavar": "TEXT"}
    command.add_argument("--stop", **how, help="end before TEXT; may be given again")  # type: ignore[arg-type]
    does = "do without what the checkpoint's generation_config.json sets, but for its token ids"
    command.add_argument("--ignore-generation-config", action="store_true", default=None, help=does)
    does = "a smaller model of the same vocabulary, to guess ahead: the same, and often sooner"
    command.add_argument("--assistant", metavar="NAME|DIR", help=does)


def _dialect(text: str) -> str:
    from zoo.saving.checks import check_dialect

    try:
        check_dialect(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("to=")) from None
    return text


def _pair(text: str) -> tuple[str, Any]:
    """n_heads=12: the value as JSON has it, else a word."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIELD=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    names = [name.replace("-", "_") for name in SAMPLING]
    names += ["stop_strings", "num_return_sequences", "num_beams", "ignore_generation_config"]
    found = {name: getattr(options, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


# --- commands ------------------------------------------------------------------------------------


def _list(options: argparse.Namespace) -> int:
    if options.verified:
        return _list_verified(options)
    entries = info.list_checkpoints()
    if options.json:
        print(_json([entry.to_json() for entry in entries]))
        return OK
    rows = [
        (
            entry.name,
            entry.architecture,
            _short(entry.parameters),
            entry.license,
            entry.repo,
            _revision(entry.revision, entry.pinned),
        )
        for entry in entries
    ]
    head = ("NAME", "ARCHITECTURE", "PARAMETERS", "LICENCE", "REPOSITORY", "REVISION")
    print(_table([head, *rows], right={2}))
    return OK


ERRORS = ("fp64", "fp32", "bf16")


def _list_verified(options: argparse.Namespace) -> int:
    proven, bugs = evidence.proven(), evidence.read()["bugs"]
    architectures = [
        {
            "architecture": name,
            "measured": evidence.when("parity", name, entry),
            "variants": entry["variants"],
            **_errors(entry),
            "bugs": _killed(bugs.get(name)),
        }
        for name, entry in proven.items()
        if name in registry.architectures()
    ]
    verified = evidence.verified_checkpoints()
    checkpoints = [
        {
            "checkpoint": name,
            "measured": evidence.when("checkpoints", name, entry),
            **_errors(entry),
            "repo": entry["repo"],
            "revision": entry["revision"],
        }
        for name, entry in verified.items()
    ]
    if options.json:
        print(_json({"architectures": architectures, "checkpoints": checkpoints}))
        return OK
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
    return OK


def _errors(entry: Mapping[str, Any]) -> dict[str, str]:
    return {name: entry["checks"].get(name, {}).get("shown", "-") for name in ERRORS}


def _killed(entry: Mapping[str, Any] | None) -> str:
    """12/12: of the planted bugs that a model runs with, those that parity sees."""
    if entry is None:
        return "not run"
    planted = [bug for bug in entry["bugs"].values() if "refused" not in bug]
    return f"{sum(bool(bug.get('killed')) for bug in planted)}/{len(planted)}"


def _records(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows that have the same fields."""
    return _table(
        [[name.upper() for name in rows[0]], *([*map(str, row.values())] for row in rows)]
    )


def _info(options: argparse.Namespace) -> int:
    found = info.info(options.ref, **_reading(options))
    if options.json:
        print(_json(found.to_json()))
        return OK
    rows: list[tuple[str, str]] = []
    if stored := found.stored:
        files = f"{len(stored.files)} file{'s' if len(stored.files) > 1 else ''}"
        rows.append(("kind", f"{stored.about}, {files}, {_size(stored.size)}"))
    if found.dialect:
        rows.append(("dialect", " ".join([found.dialect, f"({found.about})" * bool(found.about)])))
    rows.append(("architecture", found.architecture))
    if found.reference_class:
        rows.append(("class", found.reference_class))
    rows.append(("head", f"{found.head or 'not named'}, of {', '.join(found.heads)}"))
    if found.parameters is not None:
        rows.append(("parameters", f"{found.parameters:,}"))
    if found.license:
        rows.append(("license", found.license))
    if found.repo:
        rows.append(("repository", found.repo))
        rows.append(("revision", _revision(found.revision or "", found.pinned)))
    if found.adapter:
        rows.append(("adapter", found.adapter))
    if found.mismatch:
        rows.append(("in the cache", f"not this checkpoint: {'; '.join(found.mismatch)}"))
    if found.quantized:
        rows.append(("quantized", found.quantized))
    if stored:
        rows.append(("tensors", f"{stored.tensors:,}"))
        for dtype, count in stored.dtypes.items():
            rows.append((f"  {dtype}", f"{count:,} values, {_size(stored.dtype_bytes[dtype])}"))
    if found.directory:
        rows.append(("directory", found.directory))
    if stored:
        rows.append(("files", _ends(stored.files)))
    print(found.ref)
    print(_indent(_table(rows)))
    for title, fields in (("config", found.config), ("told by the tensors", found.inferred)):
        if fields or title == "config":
            print(f"  {title}")
            print(_indent(_table([(k, json.dumps(v)) for k, v in fields.items()]), 4))
    if options.tree:
        from zoo.checkpoints.locate import skeleton

        print("  modules")
        print(_indent("\n".join(info.tree(skeleton(options.ref, **_reading(options)))), 4))
    return OK


def _size(count: int) -> str:
    """137.97 GB; below a thousand, bytes."""
    for unit, each in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= each:
            return f"{count / each:,.2f} {unit}"
    return f"{count} bytes"


def _ends(names: Sequence[str]) -> str:
    """All of a few names; of many the first and the last."""
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} … {names[-1]}"


def _verify(options: argparse.Namespace) -> int:
    # what is wrong with either place is said before the work
    known = evidence.read() if options.html is not None or options.record else {}
    if options.html is not None:
        options.html.mkdir(parents=True, exist_ok=True)
    how = {"all": options.all, "golden": options.golden, "progress": _progress}
    report = zoo.verify(options.ref, **how, **_reading(options))
    if options.html is not None or options.record:
        from zoo.report.gather import gather, of_checkpoints
        from zoo.report.page import page

        run = gather(report, known, lambda name: passing(f"{name}: drawn", sys.stderr))
        passing("", sys.stderr)
    if options.record:
        evidence.update("parity", run.to_record()["parity"])
        if published := of_checkpoints(report):
            evidence.update("checkpoints", published)
    if options.html is not None:
        (options.html / "index.html").write_text(page(run), encoding="utf-8")
        evidence.write(run.to_record(), options.html / "report.json")
    if options.json:
        print(_json(report.to_json()))
    else:
        print(report.to_text(color=has_color(sys.stdout)))
    return OK if report.ok else FAILED


def _diff(options: argparse.Namespace) -> int:
    names = ("dtype", "way", "backward", "text", "seed", "diagnose")
    how = {name: getattr(options, name) for name in names}
    found = zoo.diff(options.ref, options.other, **how, **_reading(options))
    print(_json(found.to_json()) if options.json else found.to_text(has_color(sys.stdout)))
    return OK if found.ok else FAILED


def _diagnose(options: argparse.Namespace) -> int:
    """0 where nothing looks wrong, 1 where something does, 2 where nothing can be read."""
    text = None if options.text is None else _text(options.text)
    try:
        found = zoo.diagnose(options.ref, text=text, progress=_progress, **_reading(options))
    finally:
        passing("", sys.stderr)
    if options.json:
        print(_json(found.to_json()))
    else:
        print(found.to_text(has_color(sys.stdout), tensors=options.tensors))
    return OK if found.ok else FAILED


def _progress(done: int, count: int, name: str) -> None:
    """One line on standard error, gone when all is done."""
    passing(f"{done + 1}/{count} {name}" if done < count else "", sys.stderr)


def _convert(options: argparse.Namespace) -> int:
    asked = _reading(options)
    if options.trust is not None:
        asked["trust"] = options.trust
    if options.layout is not None:
        asked["layout"] = dict(options.layout)
    if options.dry_run:
        from zoo.saving.convert import dry_run

        asked |= {"dtype": options.dtype, "max_shard_size": options.shard, "part": options.part}
        print(dry_run(options.ref, to=options.to, **asked))
        return OK
    out = options.out or Path(f"{_stem(options.ref)}-{options.to}")
    show = Shown(options.json, options.quiet)
    more = {**asked, **({"memory": options.memory} if options.memory else {})}
    written = zoo.convert(
        options.ref,
        out,
        to=options.to,
        force=options.force,
        dtype=options.dtype,
        max_shard_size=options.shard,
        restart=options.restart,
        part=options.part,
        allow_nonfinite=options.allow_nonfinite,
        sha256=not options.no_sha256,
        tell=show,
        **more,
    )
    if options.json or options.quiet:
        return OK
    if options.part and not written.exists():
        print(f"part {options.part} of {written} is written; other parts are not", file=sys.stderr)
    else:
        print(f"{options.ref} -> {written} ({options.to})")
    return OK


def _convert_optimizer(options: argparse.Namespace) -> int:
    from zoo.saving.optimizer_files import convert_file, read_names

    names = options.names and read_names(options.names)
    how = {"to": options.to, "names": names or None, "force": options.force}
    written = convert_file(options.ref, options.file, options.out, **how, **_reading(options))
    print(f"{options.file} -> {written} ({options.to})")
    return OK


def _check(options: argparse.Namespace) -> int:
    from converters.manifest import check, read

    damages = list(check(options.directory, sha256=options.sha256))
    for damage in damages:
        print(damage)
    said = read(options.directory)
    files = said["files"]
    for name, digest in said.get("adapter", {}).items():
        print(f"changed by an adapter: {name}, sha256 {digest}")
    if options.sha256 and (without := [name for name in files if not files[name]["sha256"]]):
        print(f"no sha256 was taken of {listing(without)}: each tensor's own digest was compared")
    print(f"{options.directory}: {f'{len(damages)} damaged' if damages else 'as it was written'}")
    return FAILED if damages else OK


def _tokenize(options: argparse.Namespace) -> int:
    tokenizer = zoo.tokenizer(options.ref, **_reading(options))
    ids = tokenizer.encode(options.text, special=options.special)
    tokens = [tokenizer.token(id) for id in ids]
    seen = map(_seen, tokens)
    if options.json:
        print(_json({"ids": ids, "tokens": tokens}))
    elif ids:
        print(_table([(str(id), token) for id, token in zip(ids, seen, strict=True)], right={0}))
    return OK


def _seen(token: str) -> str:
    return token if token.isprintable() else repr(token)


def _score(options: argparse.Namespace) -> int:
    text = _text(options.file)
    asked = {"window": options.window, "stride": options.stride}
    try:
        score = zoo.perplexity(_loaded(options), text, progress=_scored, **asked)
    finally:
        passing("", sys.stderr)
    if options.json:
        print(_json(score.to_json()))
    else:
        told = "unknown" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
        rows = [("tokens", f"{score.tokens:,}"), ("nats a token", f"{score.nll:.4f}")]
        rows += [("perplexity", f"{score.perplexity:.4f}"), ("bits a byte", told)]
        print(_table(rows))
    return OK


def _scored(done: int, count: int) -> None:
    passing(f"{done:,} of {count:,} tokens", sys.stderr)


def _fill(options: argparse.Namespace) -> int:
    gaps = zoo.fill(_loaded(options), options.text, top=options.top)
    if options.json:
        print(_json([[guess._asdict() for guess in gap] for gap in gaps]))
        return OK
    for n, gap in enumerate(gaps):
        if len(gaps) > 1:
            print(f"mask {n + 1}")
        print(_table([(f"{guess.probability:.4f}", _seen(guess.text)) for guess in gap]))
    return OK


def _embed(options: argparse.Namespace) -> int:
    if bool(options.texts) == bool(options.file):
        raise UsageError("embed: either texts or --file")
    texts = options.texts or _lines(_text(options.file))
    asked = {"normalize": options.normalize, "truncate": options.truncate}
    vectors = zoo.embed(_loaded(options), texts, pooling=options.pooling, **asked).tolist()
    for text, vector in zip(texts, vectors, strict=True):
        if options.json:
            print(_json({"text": text, "embedding": vector}, indent=None))
        else:
            print(*(f"{number:.7g}" for number in vector))
    return OK


def _text(file: str) -> str:
    """What a file holds, or standard input."""
    if file == "-" and sys.stdin is None:
        raise InputError("standard input is closed")
    if not is_path(file):
        raise InputError(f"{file!r}: no file has such a name")
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    place = "standard input" if file == "-" else file
    if not data:
        raise InputError(f"{place}: is empty")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 at byte {error.start}") from None


def _lines(text: str) -> list[str]:
    """As editors count them; a line separator of Unicode is part of a text."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _place(text: str) -> Path:
    if not text:  # an unset variable of the shell's, and no wish for the current directory
        raise argparse.ArgumentTypeError("expected a directory")
    return Path(text)


def _generate(options: argparse.Namespace) -> int:
    from zoo.text.generate import continue_texts
    from zoo.text.options import GenerationOptions, resolve_options

    asked = GenerationOptions.of(_asked(options))  # before weights are looked at
    if options.assistant and asked.num_beams > 1:
        raise UsageError("--assistant: beams do not guess ahead")
    model = _loaded(options)
    more = {**_asked(options), **_assistant(options, model)}
    asked, special_ids = resolve_options(model, more)
    several = asked.num_return_sequences > 1 or asked.num_beams > 1
    if not options.json and (options.stream or not (options.no_stream or several)):
        pieces = zoo.generate(model, options.text, stream=True, special=options.special, **more)
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        finally:  # of a text that is interrupted too
            print(flush=True)
        return OK
    started = time.perf_counter()
    found = continue_texts(model, [options.text], asked, special_ids, options.special)
    seconds = time.perf_counter() - started
    if options.json:
        texts = [each._asdict() for each in found]
        told = texts[0] if len(texts) == 1 else {"samples": texts}
        speed = sum(len(each.ids) for each in found) / seconds
        print(_json({**told, "seconds": seconds, "tokens_per_second": speed}))
    else:
        print("\n---\n".join(each.text for each in found))
    return OK


def _chat(options: argparse.Namespace) -> int:
    from zoo.cli.chat import talk
    from zoo.text.options import GenerationOptions

    GenerationOptions.of(_asked(options))
    model = _loaded(options)
    talk(model, {**_asked(options), **_assistant(options, model)})
    return OK


def _assistant(options: argparse.Namespace, model: Model) -> dict[str, Model]:
    if not options.assistant:
        return {}
    from zoo.text.speculative import check_vocabulary

    small = zoo.load(options.assistant, mmap=options.mmap)
    try:
        check_vocabulary(model, small)
    except UsageError as error:
        told = str(error).removeprefix("assistant_model: ")
        raise UsageError(f"--assistant {options.assistant}: {told}") from None
    return {"assistant_model": small}


def _bytes(text: str) -> int:
    """12, 64M, 5G: as a number of bytes."""
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    number, unit = text.upper().removesuffix("B").removesuffix("I"), ""
    if number[-1:] in units:
        number, unit = number[:-1], number[-1]
    if not number.isascii() or not number.isdigit() or not int(number):
        raise argparse.ArgumentTypeError(f"{text!r}: expected bytes, such as 64M or 5G")
    return int(number) << units.get(unit, 0)


def _stem(ref: str) -> str:
    """A name for what is made of a reference: its last part, without the revision."""
    return Path(ref.partition("@")[0] if ref.startswith("hf:") else ref).resolve().name


# --- text ----------------------------------------------------------------------------------------


def _table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def _indent(text: str, by: int = 2) -> str:
    return "\n".join(" " * by + line for line in text.splitlines())


def _short(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


def _revision(revision: str, pinned: bool | None) -> str:
    return f"{revision} (unpinned)" if pinned is False else revision


def _json(data: Any, indent: int | None = 2) -> str:
    # what cannot be written would be so as Python does it, and be no JSON
    plain = "utf" not in (sys.stdout.encoding or "utf-8").lower()
    text = json.dumps(data, indent=indent, ensure_ascii=plain)
    if text.isprintable():
        return text
    # JSON allows more than a terminal should get
    kept = (c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
    return "".join(kept)
