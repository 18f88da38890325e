"""The files of a peft adapter: adapter_config.json, with every field checked, and the factors."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from converters.formats import TensorInfo, dtype_code
from converters.formats.safetensors import SafetensorsReader
from converters.formats.torch_zip import TorchZipReader
from converters.lazy import Lazy
from converters.output import Item, Output, Shard
from converters.paths import confined
from converters.plan import FLOATS
from converters.strict_json import parse_json
from converters.strict_regex import why_slow
from zoo.checkpoints.file_names import ADAPTER as CONFIG
from zoo.checkpoints.file_names import ADAPTER_WEIGHTS as WEIGHTS
from zoo.checkpoints.finite import at, first_where
from zoo.errors import ConfigError, NotACheckpoint, PlanError, UsageError, listing

PREFIX = "base_model.model."  # peft's two wrappers
# the ends of the factors' names, of linear layers and of embeddings
ENDS = {
    False: (".lora_A.weight", ".lora_B.weight"),
    True: (".lora_embedding_A", ".lora_embedding_B"),
}
# fields that the tensors imply, or that do not change the output
IGNORED = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("task_type", "target_modules", "exclude_modules", "modules_to_save", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "eva_config", "loftq_config", "megatron_core"),
    "qalora_group_size",
}
USED = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias"),
    *("rank_pattern", "alpha_pattern", "init_lora_weights"),
}
# initializations that do not change the base weights; others subtract the factors from them
INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")
MERGED = "Merge it in peft (merge_and_unload) and load what that saves"
_LARGEST, _LARGEST_RANK = 3e38, 1 << 31  # the range of fp32; more rows than any matrix has
MOST_TRIES = 1 << 20  # pairs of a pattern and a module
LONGEST_NAME = 256  # characters of a module's name that patterns are matched with
_UNBOUNDED = 3  # repetitions in a pattern: names are short


@dataclass(frozen=True)
class AdapterSettings:
    """The fields of adapter_config.json that change the output."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)  # pattern -> rank
    alphas: Mapping[str, float] = field(default_factory=dict)
    task: str = ""  # peft's task_type

    def rank_of(self, module: str) -> int:
        """The rank of a module's factors."""
        return int(_first(self.ranks, module, self.rank))

    def scale_of(self, module: str, rank: int) -> float:
        """The scale of the product of a module's factors."""
        alpha = _first(self.alphas, module, self.alpha)
        return float(alpha / sqrt(rank) if self.rslora else alpha / rank)


def _first(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the module's name or an end of it."""
    matches = (v for p, v in patterns.items() if _is_named(_compiled(p), module))
    return next(matches, default)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"({pattern})$")


def _is_named(pattern: re.Pattern[str], module: str) -> bool:
    """Whether `(.*\\.)?(pattern)$` matches, tried without one more repetition for the matcher."""
    starts = [0, *(dot.end() for dot in re.finditer(r"\.", module))]
    return any(pattern.match(module, start) for start in starts)


class Factors(NamedTuple):
    """scale * b @ a is added to a module's weight, stored (out, in) or (in, out)."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    scale: float
    embedding: bool = False  # then `in` is the vocabulary


@dataclass(frozen=True)
class Files:
    """An adapter as peft stores it, by the names of the reference's modules."""

    where: str
    config: str  # verbatim
    settings: AdapterSettings
    factors: Mapping[str, Factors] = field(repr=False)  # by module
    whole: Mapping[str, Tensor] = field(repr=False)  # by tensor: replaces the model's
    # tensors under further names, saved again unchanged
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)  # tensor -> name in the file
    others: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    paths: tuple[Path, ...] = ()


def read(directory: Path) -> Files:
    """Read an adapter's directory; list every problem at once."""
    path = directory / CONFIG
    if not directory.is_dir():
        raise NotACheckpoint(
            f"{directory}: no such directory; an adapter is read from a local directory"
        )
    if not path.is_file():
        raise NotACheckpoint(f"{directory}: no {CONFIG} in it, so it is no adapter of peft")
    text = confined(directory, CONFIG).read_bytes().decode("utf-8", "replace")
    settings = read_settings(parse_json(text.encode(), str(path)), str(path))
    name = next((name for name in WEIGHTS if (directory / name).is_file()), None)
    if name is None:
        raise NotACheckpoint(f"{directory}: has {CONFIG}, and none of {listing(WEIGHTS)}")
    file = confined(directory, name)
    kind = SafetensorsReader if name.endswith(".safetensors") else TorchZipReader
    reader = kind(file, mmap=False)
    wrong = [
        f"{n}: {i.dtype} is no weight" for n, i in reader.tensors.items() if i.dtype not in FLOATS
    ]
    tensors = {name: reader.tensor(name) for name in reader.tensors} if not wrong else {}
    files, problems = _sorted(tensors, settings, str(file), text)
    if problems := [*wrong, *problems]:
        raise PlanError("\n  ".join([f"{file}:", *problems]))
    return replace(files, paths=(path, file))


def read_settings(config: Mapping[str, Any], where: str) -> AdapterSettings:
    """Read an adapter_config.json; list every field that is wrong or not implemented."""
    if problems := list(_problems(config)):
        raise ConfigError("\n  ".join([f"{where}:", *problems]), problems)
    return AdapterSettings(
        config["r"],
        config["lora_alpha"],
        config.get("lora_dropout") or 0.0,
        config.get("use_rslora") or False,
        config.get("rank_pattern") or {},
        config.get("alpha_pattern") or {},
        config.get("task_type") or "",
    )


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
        yield f"peft_type: {config.get('peft_type')!r}; LORA alone is read. {MERGED}"
        return
    rank, alpha, dropout = (config.get(n) for n in ("r", "lora_alpha", "lora_dropout"))
    if not _is_rank(rank):
        yield f"r: expected a positive whole number, found {_shown(rank)}"
    if not _is_number(alpha):
        yield f"lora_alpha: expected a number that fp32 holds, found {_shown(alpha)}"
    if dropout is not None and (not _is_number(dropout) or not 0 <= dropout < 1):
        yield f"lora_dropout: expected a share below 1, found {_shown(dropout)}"
    if not isinstance(config.get("use_rslora"), bool | None):
        yield f"use_rslora: expected true or false, found {config['use_rslora']!r}"
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        yield f"bias: expected none, all or lora_only, found {config['bias']!r}"
    for name, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            yield f"{name}: expected an object, found {patterns!r}"
            continue
        for pattern, value in patterns.items():
            if why := "no number that fits" * (not fits(value)) or _bad_pattern(pattern):
                yield f"{name}: {pattern!r}: {_shown(value)}: {why}"
    initialization = config.get("init_lora_weights", True)
    if initialization not in INITIALIZATIONS:
        yield (
            f"init_lora_weights: {initialization!r} changed the base weights too, which are not "
            "here. Save it in peft with path_initial_model_for_weight_conversion"
        )
    for name, value in config.items():
        if name not in USED | IGNORED and value not in (None, False, [], {}):
            yield f"{name}: {value!r} is not implemented. {MERGED}"


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < _LARGEST_RANK


def _is_number(value: Any) -> bool:
    """Whether fp32 represents it; integers of JSON may have hundreds of digits."""
    return type(value) in (int, float) and abs(value) <= _LARGEST


def _shown(value: Any) -> str:
    """A value's repr; of a long one only the beginning."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:30]}… ({len(text)} characters)"


def _bad_pattern(pattern: str) -> str:
    """Why a pattern from a file is not used: it could take forever, or is invalid."""
    if why := why_slow(pattern, _UNBOUNDED, nested=False, to_the_end=True):
        return f"a pattern that is not tried: it {why}"
    try:
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"no pattern: {error}"
    return ""


def _too_many(settings: AdapterSettings, modules: Collection[str]) -> Iterator[str]:
    """Why patterns are not matched with so many modules, or with such names."""
    count = len(settings.ranks) + len(settings.alphas)
    if count * len(modules) > MOST_TRIES:
        yield f"{count} patterns for {len(modules)} modules: more than {MOST_TRIES} pairs of them"
    if count and (long := [name for name in modules if len(name) > LONGEST_NAME]):
        yield f"{long[0][:40]}…: a name of {len(long[0])} characters; the limit is {LONGEST_NAME}"
    if count and (broken := [name for name in modules if "\n" in name]):
        yield f"{broken[0][:40]!r}: a name of several lines, which no pattern is matched with"


def _sorted(
    tensors: Mapping[str, Tensor], settings: AdapterSettings, where: str, config: str
) -> tuple[Files, list[str]]:
    problems: list[str] = []
    halves: dict[tuple[str, bool], dict[int, Tensor]] = {}
    whole, keys, others = dict[str, Tensor](), dict[str, str](), dict[str, Tensor]()
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            problems.append(f"{key}: does not begin with {PREFIX!r}, as all that peft saves does")
            continue
        name = key.removeprefix(PREFIX)
        half = next(
            (
                (e, n, end)
                for e, ends in ENDS.items()
                for n, end in enumerate(ends)
                if name.endswith(end)
            ),
            None,
        )
        if half is not None:
            embedding, n, end = half
            halves.setdefault((name.removesuffix(end), embedding), {})[n] = tensor
        elif ".lora_" in name:
            problems.append(f"{key}: not implemented, or not as peft saves it. {MERGED}")
        elif ".original_module." in name:
            others[key] = tensor  # the module before training; nothing reads it
        else:
            plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            if why := _not_finite(key, tensor):
                problems.append(why)
            if plain in whole:
                if not whole[plain].equal(tensor):
                    problems.append(f"{key}: differs from {keys[plain]}, and both are one tensor")
                others[key] = tensor
            else:
                whole[plain], keys[plain] = tensor, key
    factors: dict[str, Factors] = {}
    if too_many := list(_too_many(settings, {module for module, _ in halves})):
        return Files(where, config, settings, {}, {}), too_many
    for (module, embedding), pair in halves.items():
        if why := _half_problem(module, pair, settings, ENDS[embedding]):
            problems.append(why)
        else:
            scale = settings.scale_of(module, pair[0].shape[0])
            factors[module] = Factors(pair[0], pair[1], scale, embedding)
    if not tensors:
        problems.append("contains no tensors")
    return Files(where, config, settings, factors, whole, keys, others), problems


def _half_problem(
    module: str, pair: Mapping[int, Tensor], settings: AdapterSettings, ends: tuple[str, str]
) -> str:
    if len(pair) < 2:
        present, missing = (ends[n] for n in (*pair, 1 - next(iter(pair))))
        return f"{PREFIX}{module}: {present[1:]} without {missing[1:]}"
    a, b = pair[0], pair[1]
    rank = settings.rank_of(module)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
        return (
            f"{PREFIX}{module}: {ends[0][1:]} {list(a.shape)} and {ends[1][1:]} {list(b.shape)}, "
            f"expected [{rank} in] and [out {rank}] by {CONFIG}"
        )
    for end, tensor in zip(ends, (a, b), strict=True):
        if why := _not_finite(f"{PREFIX}{module}{end}", tensor):
            return why
    return ""


def _not_finite(key: str, tensor: Tensor) -> str:
    if (index := first_where(tensor)) is None:
        return ""
    return f"{key}: {at(tensor, index)}. An earlier checkpoint may be sound"


# --- written -------------------------------------------------------------------------------------


def output(files: Files) -> Output:
    """The files to write: the same bytes if the adapter was read and has not changed."""
    tensors = dict(files.others)
    for module, (a, b, _, embedding) in files.factors.items():
        for end, tensor in zip(ENDS[embedding], (a, b), strict=True):
            tensors[f"{PREFIX}{module}{end}"] = tensor
    tensors |= {files.keys.get(n, PREFIX + n): tensor for n, tensor in files.whole.items()}
    items = [
        Item(TensorInfo(n, tuple(t.shape), dtype_code(t.dtype)), "", partial(Lazy.of, t))
        for n, t in tensors.items()
    ]
    shard = Shard.of(WEIGHTS[0], items, {"format": "pt"})
    return Output(
        (shard,), {CONFIG: files.config.encode()}, notes={"to": "peft", "writer": "save_adapter"}
    )


def config_text(settings: AdapterSettings, modules: list[str]) -> str:
    """Write an adapter_config.json that peft reads."""
    config = {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "peft_type": "LORA",
        "r": settings.rank,
        "target_modules": modules,
        "task_type": None,
        "use_rslora": settings.rslora,
    }
    if problems := list(_problems(config)):
        raise UsageError("; ".join(problems))
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
