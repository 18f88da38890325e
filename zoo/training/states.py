"""Checkpoints of a run: a model's directory with the optimizer's state beside it.

`last/` and `best/` are directories that `zoo.load` and the reference load. Beside the weights lie
`optimizer.safetensors`, the moments of each parameter by its native name, and `training.json`, all
that is a single number. They come into place together, by the staging and publication that
conversions use: a kill leaves the checkpoint before or the one after.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from converters.formats.safetensors import SafetensorsReader
from converters.output import Shard
from converters.strict_json import read_json
from zoo.checkpoints.file_names import RUN_CHECKPOINTS
from zoo.checkpoints.publish import write
from zoo.components.model import Model
from zoo.errors import CheckpointError, UsageError, listing
from zoo.saving.adapter import adapter_output
from zoo.saving.companions import companions
from zoo.saving.outputs import item_of
from zoo.saving.save import output_of
from zoo.tokenizers import CharTokenizer, Tokenizer
from zoo.training.loop import State
from zoo.training.optimizers import NAMES

OPTIMIZER, TRAINING = "optimizer.safetensors", "training.json"
BEST, LAST = RUN_CHECKPOINTS
VERSION = 1  # of training.json


def save_state(state: State, place: Path, tokenizer: Tokenizer | None) -> None:
    """Write a checkpoint over the one before it; on a full disk that one stays.

    Each of several processes calls this, and the first one writes.
    """
    moments, numbers = dict[str, Tensor](), dict[str, dict[str, float]]()
    for name, kept in _states(state):
        for key, value in kept.items():
            if isinstance(value, Tensor) and value.dim():
                moments[f"{key}/{name}"] = _whole(value)
            else:
                numbers.setdefault(key, {})[name] = float(value)
    model = _gathered(state.model)
    if not state.processes.is_first:
        return state.processes.wait()
    record = {
        "version": VERSION,
        "step": state.step,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "best": None if math.isinf(state.best) else state.best,
        "scaler": state.scaler.state_dict(),
        "numbers": {key: _short(values) for key, values in numbers.items()},
    }
    output = adapter_output(model) if model.adapter is not None else output_of(model)
    items = [item_of(name, tensor.detach()) for name, tensor in sorted(moments.items())]
    shards = (Shard.of(OPTIMIZER, items, {"format": "pt"}),) if items else ()
    texts, carried = tokenizer_files(tokenizer)
    output = replace(
        output,
        shards=(*output.shards, *shards),
        texts={**output.texts, **texts, TRAINING: (json.dumps(record) + "\n").encode()},
        carried={**output.carried, **carried},
    )
    write(output, place, force=True)
    state.processes.wait()


def load_state(state: State, place: Path) -> None:
    """Give a run the optimizer's state and the numbers of a checkpoint.

    The model's weights are loaded with the model, by `zoo.load`.

    Raises:
        CheckpointError: The files contradict the model or each other.
    """
    record = read_json(place / TRAINING)
    if record.get("version") != VERSION:
        raise CheckpointError(f"{place / TRAINING}: version {record.get('version')!r}, not 1")
    path = place / OPTIMIZER
    reader = SafetensorsReader(path) if path.is_file() else None
    arrays = {} if reader is None else {n: reader.tensor(n).clone() for n in reader.tensors}
    for optimizer in state.optimizers:
        kept = dict[int, dict[str, Any]]()
        for number, (name, parameter) in enumerate(_named(optimizer)):
            entry = {
                key.partition("/")[0]: _placed(arrays[key], parameter, place)
                for key in arrays
                if key.partition("/")[2] == name
            }
            for key, values in record["numbers"].items():
                if (value := values.get(name, values.get("*"))) is not None and entry:
                    entry[key] = torch.tensor(float(value))
            if entry:
                kept[number] = entry
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": kept, "param_groups": groups})
    state.step, state.tokens = record["step"], record["tokens"]
    state.seconds = record["seconds"]
    state.best = math.inf if record["best"] is None else record["best"]
    state.scaler.load_state_dict(record["scaler"])


# --- arrays --------------------------------------------------------------------------------------


def _named(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group[NAMES], group["params"], strict=True)


def _states(state: State) -> Iterator[tuple[str, dict[str, Any]]]:
    for optimizer in state.optimizers:
        for name, parameter in _named(optimizer):
            yield name, optimizer.state.get(parameter, {})


def _short(values: dict[str, float]) -> dict[str, float]:
    """One number for all parameters where they agree, as their counts of steps do."""
    return {"*": next(iter(values.values()))} if len(set(values.values())) == 1 else values


def _whole(value: Tensor) -> Tensor:
    """An array in one piece, on the CPU; every process takes part where it is spread."""
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    return value.detach().cpu().contiguous()


def _placed(value: Tensor, parameter: Tensor, place: Path) -> Tensor:
    """An array where its parameter lies: on a device, or spread over processes."""
    if value.shape != parameter.shape:
        raise CheckpointError(
            f"{place / OPTIMIZER}: {tuple(value.shape)} of a parameter {tuple(parameter.shape)}"
        )
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _gathered(model: Model) -> Model:
    """The model with whole parameters: itself, unless they are spread over processes."""
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        return model
    with torch.device("meta"):
        whole: Model = type(model)(model.config)
    arrays = dict[int, nn.Parameter]()
    spread = dict(model.named_parameters(remove_duplicate=False))
    for name, _ in list(whole.named_parameters(remove_duplicate=False)):
        own = spread[name]
        if id(own) not in arrays:
            arrays[id(own)] = nn.Parameter(_whole(own), requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(whole.get_submodule(owner), leaf, arrays[id(own)])
    whole.architecture, whole.provenance = model.architecture, model.provenance
    return whole


# --- the tokenizer -------------------------------------------------------------------------------


def tokenizer_files(tokenizer: Tokenizer | None) -> tuple[dict[str, bytes], dict[str, Path]]:
    """Files that hold a tokenizer: (those to write, those to copy)."""
    if tokenizer is None:
        return {}, {}
    if isinstance(tokenizer, CharTokenizer):
        return dict([tokenizer.file()]), {}
    if tokenizer.directory is None:
        raise UsageError(f"{tokenizer!r}: has no files that could be copied")
    files = companions(tokenizer.directory)
    if not files:
        raise UsageError(f"{tokenizer.directory}: no tokenizer in it: {listing(files)}")
    return {}, files
