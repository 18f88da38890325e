"""The options that several commands share, each declared once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.command import NO_VALUE, Options
from zoo.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from zoo.components.model import Model

# --- values --------------------------------------------------------------------------------------


def text(value: Any) -> Any:
    """A word as the shell gave it, whatever bytes it holds."""
    return value


def path(value: str) -> Path:
    """A path, `~` expanded.

    Raises:
        typer.BadParameter: It is empty (an unset variable of the shell's, and no wish for the
            current directory), or begins with a `~` that names no user.
    """
    if not value:
        raise typer.BadParameter("expected a path, got an empty word")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        user = value.partition("/")[0]
        raise typer.BadParameter(
            f"{value}: no user is called {user[1:]!r}. Write ./{value} for a directory of that name"
        ) from None


def adapter_path(value: str) -> Path | bool:
    """A directory; True where the option came without one."""
    return True if value == NO_VALUE else path(value)


def pair(value: str) -> str:
    """FIELD=VALUE, checked."""
    name, equals, _ = value.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"{value!r}: expected FIELD=VALUE")
    return value


def pairs(values: list[str] | None) -> dict[str, Any]:
    """{"heads": 12} of heads=12: a value as JSON has it, else a word."""
    result = dict[str, Any]()
    for each in values or ():
        name, _, value = each.partition("=")
        try:
            result[name] = json.loads(value)
        except ValueError:
            result[name] = value
    return result


def whole_number(value: Any) -> int:
    """12, -1."""
    try:
        return int(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r}: expected a whole number") from None


def number(value: Any) -> float:
    """0.7, 1e-3."""
    try:
        return float(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r}: expected a number") from None


def byte_count(value: str) -> int:
    """12, 64M, 5G as a number of bytes."""
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    number, unit = str(value).upper().removesuffix("B").removesuffix("I"), ""
    if number[-1:] in units:
        number, unit = number[:-1], number[-1]
    if not number.isascii() or not number.isdigit() or not int(number):
        raise typer.BadParameter(f"{value!r}: expected bytes, such as 64M or 5G")
    return int(number) << units.get(unit, 0)


def one_of(*names: str) -> Callable[[str], str]:
    """A parser that takes these words alone."""

    def parse(value: str) -> str:
        if value not in names:
            near = did_you_mean(value, names)
            raise typer.BadParameter(f"{value}: one of {', '.join(names)}.{near}")
        return value

    return parse


def among(*names: str) -> Callable[[], list[str]]:
    """A completion that offers these words."""
    return lambda: [*names]


def exclusive(**options: Any) -> None:
    """Refuse two options that exclude each other.

    Raises:
        UsageError: More than one of them is set.
    """
    names = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} exclude each other: give one of them")


def checkpoint_names(incomplete: str) -> Iterator[tuple[str, str]]:
    """Complete a name of the registry, each with its architecture."""
    from zoo import registry

    for name, entry in registry.checkpoints().items():
        if name.startswith(incomplete):
            yield name, entry.architecture


def verifiable_names(incomplete: str) -> Iterator[tuple[str, str]]:
    """Complete an architecture or a checkpoint."""
    from zoo import registry

    for name in registry.architectures():
        if name.startswith(incomplete):
            yield name, "architecture"
    yield from checkpoint_names(incomplete)


# --- arguments and options of their own ----------------------------------------------------------

_REF = "a name, hf:org/repo@rev, a directory or a file"


def argument(metavar: str, help: str, **more: Any) -> Any:
    """A word without a name."""
    more.setdefault("parser", text)
    return typer.Argument(metavar=metavar, help=help, show_default=False, **more)


def option(*names: str, help: str, metavar: str | None = None, **more: Any) -> Any:
    """An option; `help` says its default."""
    return typer.Option(*names, metavar=metavar, help=help, show_default=False, **more)


Ref = Annotated[str, argument("NAME|PATH", _REF, autocompletion=checkpoint_names)]
Source = Annotated[str, argument("SRC", _REF, autocompletion=checkpoint_names)]
Json = Annotated[bool, option("--json", help="print JSON, for programs (default: off)")]
Special = Annotated[
    bool,
    option("--special", help="recognize special tokens such as <s> in TEXT (default: off)"),
]

# --- reading a checkpoint ------------------------------------------------------------------------

READING, LOADING, SAMPLING = "Reading the checkpoint", "Loading the model", "Sampling"


@dataclass(frozen=True)
class Reading(Options):
    """How a checkpoint is read, in every command that takes one."""

    revision: Annotated[
        str | None,
        option(
            "--revision",
            metavar="REV",
            help="branch, tag or commit of the hub's repository (default: main, or the pinned one)",
            parser=text,
            rich_help_panel=READING,
        ),
    ] = None
    head: Annotated[
        str | None,
        option(
            "--head",
            metavar="HEAD",
            help="use this head, or none for hidden states (default: the checkpoint's own)",
            parser=text,
            rich_help_panel=READING,
        ),
    ] = None
    config: Annotated[
        list[str] | None,
        option(
            "--config",
            metavar="FIELD=VALUE...",
            help="set fields of the config, under native names (default: as published)",
            parser=pair,
            rich_help_panel=READING,
        ),
    ] = None
    ignore_config: Annotated[
        list[str] | None,
        option(
            "--ignore-config",
            metavar="FIELD...",
            help="accept these unknown fields of config.json (default: refuse them)",
            parser=text,
            rich_help_panel=READING,
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """What was asked for, as keywords of `zoo.load`; nothing where nothing was."""
        asked = {
            "revision": self.revision,
            "head": self.head,
            "ignore_config": self.ignore_config,
            "config": None if self.config is None else pairs(self.config),
        }
        return {name: value for name, value in asked.items() if value is not None}


@dataclass(frozen=True)
class MappingOptions(Options):
    """Whether weights stay in their files."""

    mmap: Annotated[
        bool | None,
        option(
            "--mmap/--no-mmap",
            help="leave weights in their file, or read them into memory "
            "(default: safetensors and GGUF stay in their file)",
            rich_help_panel=LOADING,
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Keywords of `zoo.load`."""
        return {} if self.mmap is None else {"mmap": self.mmap}


@dataclass(frozen=True)
class NoAdapter(Options):
    """Whether an adapter beside the weights is ignored."""

    no_adapter: Annotated[
        bool,
        option(
            "--no-adapter",
            help="ignore the adapter beside the weights, since they have it merged in already "
            "(default: refuse to guess)",
            rich_help_panel=LOADING,
        ),
    ] = False

    def arguments(self) -> dict[str, Any]:
        """Keywords of `zoo.load`."""
        return {"adapter": False} if self.no_adapter else {}


@dataclass(frozen=True)
class AdapterOptions(NoAdapter):
    """Which adapter is applied."""

    adapter: Annotated[
        Path | None,
        option(
            "--adapter",
            metavar="[DIR]",
            help="apply peft's LoRA adapter in DIR; without DIR, the one beside the weights "
            "(default: none)",
            parser=adapter_path,
            rich_help_panel=LOADING,
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Keywords of `zoo.load`."""
        exclusive(adapter=self.adapter, no_adapter=self.no_adapter)
        return super().arguments() if self.adapter is None else {"adapter": self.adapter}


# --- loading a model -----------------------------------------------------------------------------

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
DEVICES = ("auto", "cpu", "cuda", "mps")


def dtype_name(value: str) -> str:
    """float16 for fp16; a name of torch's as it is."""
    value = value.removeprefix("torch.")
    if value in DTYPES.values():
        return value
    if value not in DTYPES:
        names = (*DTYPES, *DTYPES.values())
        near = did_you_mean(value, names)
        raise typer.BadParameter(f"{value}: one of {', '.join(DTYPES)}.{near}")
    return DTYPES[value]


def dtype_or_auto(value: str) -> str:
    """As `dtype_name`; empty for auto, which keeps what is stored."""
    if value == "auto":
        return ""
    try:
        return dtype_name(value)
    except typer.BadParameter:
        near = did_you_mean(value, ("auto", *DTYPES, *DTYPES.values()))
        raise typer.BadParameter(f"{value}: one of {', '.join(DTYPES)} or auto.{near}") from None


def device_name(value: str) -> str:
    """One of DEVICES, which may have a number: cuda:1."""
    kind, _, index = value.partition(":")
    if kind not in DEVICES or (index and (kind != "cuda" or not index.isdecimal())):
        near = did_you_mean(kind, DEVICES)
        raise typer.BadParameter(f"{value}: one of {', '.join(DEVICES)}, or cuda:1 …{near}")
    return value


def device_here(name: str) -> str:
    """The device to load on: what "auto" is here, and any other if this machine has it.

    Raises:
        UsageError: torch sees no such device.
    """
    import torch

    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    kind, _, index = name.partition(":")
    if kind == "auto":
        return "cuda" if has_cuda else "mps" if has_mps else "cpu"
    ways = "Use --device cpu, or --device auto for the fastest that there is"
    if (kind == "cuda" and not has_cuda) or (kind == "mps" and not has_mps):
        raise UsageError(f"--device {name}: torch sees no {kind.upper()} device here. {ways}")
    if index and int(index) >= (count := torch.cuda.device_count()):
        raise UsageError(f"--device {name}: torch sees {count}, numbered from 0. {ways}")
    return name


@dataclass(frozen=True)
class Loading(MappingOptions, AdapterOptions, Reading):
    """How a model is loaded, in every command that computes with one."""

    device: Annotated[
        str,
        option(
            "--device",
            metavar="DEVICE",
            help="compute on auto, cpu, cuda or mps; auto is the fastest that there is "
            "(default: cpu)",
            parser=device_name,
            autocompletion=among(*DEVICES),
            rich_help_panel=LOADING,
        ),
    ] = "cpu"
    dtype: Annotated[
        str,
        option(
            "--dtype",
            metavar="DTYPE",
            help="compute in fp16, bf16, fp32 or fp64; auto is as stored (default: auto)",
            parser=dtype_or_auto,
            autocompletion=among("auto", *DTYPES),
            rich_help_panel=LOADING,
        ),
    ] = "auto"
    prepare: Annotated[
        bool,
        option(
            "--prepare",
            help="fuse and pack the weights for fast inference; an adapter is merged "
            "(default: off)",
            rich_help_panel=LOADING,
        ),
    ] = False
    int8: Annotated[
        bool,
        option(
            "--int8",
            help="prepare with one byte a weight, on the CPU, which changes the outputs "
            "(default: off)",
            rich_help_panel=LOADING,
        ),
    ] = False

    def arguments(self) -> dict[str, Any]:
        """What was asked for, as keywords of `zoo.load`."""
        asked = (
            Reading.arguments(self)
            | AdapterOptions.arguments(self)
            | MappingOptions.arguments(self)
        )
        if self.prepares and asked.get("adapter") not in (None, False):
            asked["merge"] = True
        return asked

    @property
    def prepares(self) -> bool:
        """Whether the model is prepared for inference."""
        return self.prepare or self.int8

    def load(self, ref: str) -> Model:
        """Load the model behind `ref` as the options say.

        Raises:
            UsageError: Options that exclude each other, or that this machine cannot satisfy.
        """
        return self._load(ref, self.arguments())

    def load_assistant(self, ref: str) -> Model:
        """Load another model on the same device, in the same dtype."""
        return self._load(ref, MappingOptions.arguments(self))

    def _load(self, ref: str, arguments: dict[str, Any]) -> Model:
        import zoo

        device = device_here(self.device)
        self._check(device)
        if device != "cpu":
            arguments["device"] = device
        if self.dtype:
            arguments["dtype"] = self.dtype
        model = zoo.load(ref, **arguments)
        return zoo.prepare(model, int8=self.int8) if self.prepares else model

    def _check(self, device: str) -> None:
        if device == "mps" and self.dtype == "float64":
            raise UsageError("--dtype fp64: MPS has none. Use --dtype fp32, or --device cpu")
        if not self.int8:
            return
        if device != "cpu":
            raise UsageError(
                f"--int8 --device {self.device}: bytes are multiplied by kernels for the CPU. Use "
                "--device cpu, or --prepare without --int8"
            )
        if self.dtype == "float64":
            raise UsageError("--int8 --dtype fp64: bytes are no fp64. Use --dtype fp32 or bf16")
        from zoo.prepared import kernels

        if kernels.library() is None:
            raise UsageError(
                "--int8: its kernels cannot be compiled here. Install a C compiler (gcc or clang), "
                "or use --prepare"
            )


# --- sampling ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingOptions(Options):
    """How a text is continued; names and defaults are those of `zoo.generate`."""

    max_new_tokens: Annotated[
        int | None,
        option(
            "--max-new-tokens",
            metavar="N",
            help="stop after N new tokens (default: 100; in a dialogue 1000)",
            parser=whole_number,
            rich_help_panel=SAMPLING,
        ),
    ] = None
    temperature: Annotated[
        float | None,
        option(
            "--temperature",
            metavar="T",
            help="sample, with the logits divided by T; 0 takes the most likely token (default: 0)",
            parser=number,
            rich_help_panel=SAMPLING,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        option(
            "--top-k",
            metavar="K",
            help="sample from the K most likely tokens (default: off)",
            parser=whole_number,
            rich_help_panel=SAMPLING,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        option(
            "--top-p",
            metavar="P",
            help="nucleus sampling: keep the smallest set of tokens whose probabilities sum to P "
            "(default: off)",
            parser=number,
            rich_help_panel=SAMPLING,
        ),
    ] = None
    min_p: Annotated[
        float | None,
        option(
            "--min-p",
            metavar="P",
            help="keep tokens with at least P times the probability of the most likely one "
            "(default: off)",
            parser=number,
            rich_help_panel=SAMPLING,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        option(
            "--repetition-penalty",
            metavar="R",
            help="make tokens that occurred already less likely, above 1 (default: 1)",
            parser=number,
            rich_help_panel=SAMPLING,
        ),
    ] = None
    no_repeat_ngram_size: Annotated[
        int | None,
        option(
            "--no-repeat-ngram-size",
            metavar="N",
            help="never repeat a run of N tokens (default: off)",
            parser=whole_number,
            rich_help_panel=SAMPLING,
        ),
    ] = None
    seed: Annotated[
        int | None,
        option(
            "--seed",
            metavar="N",
            help="draw the same samples again (default: others each time)",
            parser=whole_number,
            rich_help_panel=SAMPLING,
        ),
    ] = None
    stop_strings: Annotated[
        list[str] | None,
        option(
            "--stop",
            metavar="TEXT",
            help="stop before TEXT; may be repeated (default: none)",
            parser=text,
            rich_help_panel=SAMPLING,
        ),
    ] = None
    ignore_generation_config: Annotated[
        bool,
        option(
            "--ignore-generation-config",
            help="ignore the checkpoint's generation_config.json, but for its token ids "
            "(default: off)",
            rich_help_panel=SAMPLING,
        ),
    ] = False
    assistant: Annotated[
        str | None,
        option(
            "--assistant",
            metavar="NAME|DIR",
            help="speculative decoding: a smaller model of the same vocabulary guesses ahead, "
            "for the same text sooner (default: none)",
            parser=text,
            autocompletion=checkpoint_names,
            rich_help_panel=SAMPLING,
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """What was asked for, as keywords of `zoo.generate`; the assistant is not loaded here."""
        asked = {name: value for name, value in vars(self).items() if name != "assistant"}
        asked["ignore_generation_config"] = self.ignore_generation_config or None
        return {name: value for name, value in asked.items() if value is not None}

    def load_assistant(self, loading: Loading, model: Model) -> dict[str, Model]:
        """The keyword that hands the assistant to `zoo.generate`, or nothing.

        Raises:
            UsageError: Its vocabulary is not the model's.
        """
        if not self.assistant:
            return {}
        from zoo.text.speculative import check_vocabulary

        small = loading.load_assistant(self.assistant)
        try:
            check_vocabulary(model, small)
        except UsageError as error:
            problem = str(error).removeprefix("assistant_model: ")
            raise UsageError(f"--assistant {self.assistant}: {problem}") from None
        return {"assistant_model": small}
