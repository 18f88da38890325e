"""Sentence embeddings: one vector a row, by the steps that a checkpoint's modules.json names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from converters.opening import open_checkpoint
from converters.paths import confined
from converters.strict_json import read_json
from zoo.checkpoints.file_names import CONFIG, MODULES, SENTENCE_FILES, module_folders
from zoo.checkpoints.finite import at, first_where
from zoo.components.activations import ACTIVATIONS
from zoo.components.inputs import check_mask
from zoo.components.masks import positions_of
from zoo.components.model import Linear, Model
from zoo.errors import (
    ConfigError,
    MissingTensors,
    NonFinite,
    ShapeMismatch,
    UnsupportedArchitecture,
    listing,
    option,
)


class SentenceModel(Model):
    """A model and the steps from its hidden states to a vector for each row."""

    def __init__(self, model: Model, steps: list[nn.Module], folders: list[str]) -> None:
        super().__init__(model.config)
        self.provenance, self.architecture = model.provenance, model.architecture
        self.model, self.steps = model, nn.ModuleList(steps)
        self.folders = folders  # where each step's files lie

    @property
    def is_prepared(self) -> bool:
        """Whether the model inside is prepared."""
        return bool(self.model.is_prepared)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor
    ) -> Tensor:
        """(b, d). Padding is ignored, on either side."""
        x = self.model(input_ids, attention_mask, **inputs)
        x = x[0] if isinstance(x, tuple) else x
        real = check_mask(attention_mask, input_ids)
        real = torch.ones_like(input_ids, dtype=torch.bool) if real is None else real
        for step in self.steps:
            x = step(x, real)
        return x


class Pooling(nn.Module):
    """(b, s, d) to (b, n d): one vector of a row's tokens, for each of n ways to pool them."""

    def __init__(self, ways: tuple[str, ...]) -> None:
        super().__init__()
        self.ways = ways

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """(b, s, d) and (b, s), True at tokens, to (b, n d)."""
        return torch.cat([WAYS[way](x, real) for way in self.ways], dim=-1)


def _first(x: Tensor, real: Tensor) -> Tensor:
    return _at(x, real.int().argmax(dim=-1))


def _last(x: Tensor, real: Tensor) -> Tensor:
    return _at(x, real.shape[1] - 1 - real.int().flip(-1).argmax(dim=-1))


def _at(x: Tensor, position: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0], device=x.device), position]


def _largest(x: Tensor, real: Tensor) -> Tensor:
    return x.masked_fill(~real[..., None], -torch.inf).amax(dim=1)


def _mean(x: Tensor, real: Tensor) -> Tensor:
    return _sum(x, real) / real.sum(dim=1, keepdim=True)


def _mean_by_root(x: Tensor, real: Tensor) -> Tensor:
    return _sum(x, real) / real.sum(dim=1, keepdim=True).to(x.dtype).sqrt()


def _mean_by_position(x: Tensor, real: Tensor) -> Tensor:
    """Later tokens count more: the n-th n times."""
    weights = (positions_of(real, real) + 1) * real
    return _sum(x * weights[..., None], real) / weights.sum(dim=1, keepdim=True)


def _sum(x: Tensor, real: Tensor) -> Tensor:
    return x.masked_fill(~real[..., None], 0).sum(dim=1)


# in the order in which they stand beside each other
WAYS = {
    "cls_token": _first,
    "max_tokens": _largest,
    "mean_tokens": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean_tokens": _mean_by_position,
    "lasttoken": _last,
}
_SHORT = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens"}
_SHORT |= {"mean_sqrt_len": "mean_sqrt_len_tokens", "weightedmean": "weightedmean_tokens"}


class Dense(nn.Module):
    """A linear layer and its activation, from the checkpoint's own folder."""

    def __init__(self, inputs: int, outputs: int, bias: bool, act: str) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.linear = Linear(inputs, outputs, bias=bias)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """(b, d) to (b, outputs)."""
        return self.act(self.linear(x))


class Normalize(nn.Module):
    """Scale each vector to length one."""

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """(b, d) to (b, d)."""
        return F.normalize(x, dim=-1)


# --- from files ----------------------------------------------------------------------------------


def headless(heads: tuple[str, ...], kind: type[Model]) -> tuple[str, ...]:
    """Return those heads of a class that give hidden states, without task heads."""
    return tuple(h for h in heads if h == "pooler" or h in kind.headless) or kind.headless[:1]


def with_steps(model: Model, directory: Path, *, finite: bool = False) -> SentenceModel:
    """Append every step that modules.json names to a model; unknown steps are refused.

    `finite`: NaN and infinity among their weights are refused too.
    """
    first = next(iter(model.parameters()))
    steps, folders = read_steps(directory, model.config.dim)
    for step, folder in zip(steps, folders, strict=True) if finite else ():
        for name, tensor in step.named_parameters():
            if (index := first_where(tensor)) is not None:
                raise NonFinite(f"{directory / folder}: {name}{at(tensor, index)}")
    moved = [step.to(first.device, first.dtype) for step in steps]
    return SentenceModel(model, moved, folders).eval()


def read_steps(directory: Path, width: int) -> tuple[list[nn.Module], list[str]]:
    """Return (steps for states of `width`, where each one's files lie); weights as stored."""
    steps, folders = list[nn.Module](), list[str]()
    for kind, folder in module_folders(directory):
        step, width = _step(kind, directory, folder, width)
        steps.append(step)
        folders.append(folder)
    return steps, folders


class Manner(NamedTuple):
    """How a text is prepared: cut to `longest` tokens, put into lower case."""

    longest: int | None = None
    lower: bool = False


def manner(directory: Path) -> Manner:
    """Read how a text is prepared, from the small files beside modules.json."""
    settings: dict[str, Any] = {}
    for name in SENTENCE_FILES:
        if os.path.lexists(directory / name):
            settings |= read_json(confined(directory, name), ConfigError)
    longest, lower = settings.get("max_seq_length"), settings.get("do_lower_case", False)
    if not (longest is None or (type(longest) is int and longest > 0)) or type(lower) is not bool:
        raise ConfigError(
            f"{directory / SENTENCE_FILES[0]}: expected max_seq_length, a number of tokens, and "
            f"do_lower_case, true or false; found {longest!r} and {lower!r}"
        )
    if prompt := settings.get("default_prompt_name"):
        raise UnsupportedArchitecture(
            f"{directory / SENTENCE_FILES[1]}: default_prompt_name {prompt!r}: prompts before each "
            "text are not implemented. Pass modules=False to zoo.load and do what it says yourself"
        )
    return Manner(longest, lower)


def _step(kind: str, root: Path, folder: str, width: int) -> tuple[nn.Module, int]:
    """A step for vectors of `width`, and the width it gives."""
    if kind == "Normalize":
        return Normalize(), width
    if kind not in ("Pooling", "Dense"):
        raise UnsupportedArchitecture(
            f"{root / MODULES}: module {kind!r} is not implemented (only Transformer, Pooling, "
            f"Dense and Normalize). Pass {option('head', ...)} for the model without its modules"
        )
    path = confined(root, f"{folder}/{CONFIG}")
    config = read_json(path, ConfigError)
    if kind == "Pooling":
        ways = _ways(config, str(path))
        _check_width(config.get("word_embedding_dimension", width), width, f"{path}: width")
        return Pooling(ways), width * len(ways)
    _check_width(config.get("in_features"), width, f"{path}: in_features")
    return _dense(root / folder, config, str(path))


def _check_width(width: Any, wanted: int, what: str) -> None:
    if width != wanted:
        raise ConfigError(f"{what}: {width!r}, and what comes before gives {wanted}")


def _ways(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    modes = {k.removeprefix("pooling_mode_"): v for k, v in config.items() if "mode_" in k}
    short = config.get("pooling_mode")
    for name in [short] if isinstance(short, str) else short or []:
        modes[_SHORT.get(name, name)] = True
    others = {"word_embedding_dimension", "include_prompt", "pooling_mode"}
    unknown = [k for k in config if "mode_" not in k and k not in others]
    unknown += [k for k in modes if k not in WAYS]
    ways = tuple(way for way in WAYS if modes.get(way) is True)
    if unknown or not ways or any(type(v) is not bool for v in modes.values()):
        fields = f"unknown fields {listing(unknown)}"
        problem = fields if unknown else f"names no way to pool: {dict(config)}"
        raise ConfigError(f"{where}: {problem}. Known: {', '.join(WAYS)}")
    return ways


def _dense(folder: Path, config: Mapping[str, Any], where: str) -> tuple[Dense, int]:
    named = str(config.get("activation_function", "Tanh")).rpartition(".")[2].lower()
    act = {"identity": "linear"}.get(named, named)
    inputs, outputs = config.get("in_features"), config.get("out_features")
    bias = config.get("bias", True)
    if act not in ACTIVATIONS or type(outputs) is not int or type(bias) is not bool:
        raise ConfigError(f"{where}: expected sizes, a bias and a known activation: {dict(config)}")
    assert isinstance(inputs, int)
    with torch.device("meta"):
        dense = Dense(inputs, outputs, bias, act)
    checkpoint = open_checkpoint(folder, mmap=False)
    wanted = {f"linear.{name}": tuple(p.shape) for name, p in dense.linear.named_parameters()}
    if differing := sorted(checkpoint.tensors.keys() ^ wanted.keys()):
        raise MissingTensors(f"{folder}: expected {listing(wanted)}; at odds: {listing(differing)}")
    for name, shape in wanted.items():
        if (stored := checkpoint.tensors[name].shape) != shape:
            raise ShapeMismatch(f"{folder}: {name}: shape {list(stored)}, expected {list(shape)}")
        setattr(dense.linear, name.removeprefix("linear."), nn.Parameter(checkpoint.tensor(name)))
    return dense, outputs
