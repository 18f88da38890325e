"""Hot fixtures: small reference checkpoints in which every parameter changes the outputs."""

from __future__ import annotations

import copy
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.checkpoints.oracle import Oracle, transformers
from zoo.errors import ParityError, listing
from zoo.registry import Architecture

# the reference's names of the query and key projections
_QUERY_OR_KEY = re.compile(
    r"\b(q|k|q_proj|k_proj|query|key|c_attn|Wqkv|qkv_proj|query_key_value)\."
)
_QUERY = re.compile(r"\bq\.")
# config fields that the reference still reads but no longer writes -> what it writes instead
_OLD_SPELLING = {"rope_theta": "rope_parameters", "rope_scaling": "rope_parameters"}


def hot_checkpoint(
    entry: Architecture,
    variant: str,
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Write a variant as the reference saves it, and return the name of its reference class."""
    data = entry.variants[variant]
    write(
        data["class"],
        data["config"],
        directory,
        seed=seed,
        dtype=dtype,
        untied=data.get("untied", False),
    )
    return str(data["class"])


def write(
    reference_class: str,
    fields: Mapping[str, Any],
    directory: Path,
    *,
    model_type: str = "",
    seed: int | None = 0,
    dtype: torch.dtype = torch.float32,
    untied: bool = False,
) -> None:
    """Write a checkpoint of `reference_class` with random parameters, saved by the reference.

    Args:
        reference_class: Class name in the reference library.
        fields: Fields of config.json.
        directory: Where the checkpoint is written.
        model_type: Needed if the registry does not have the class.
        seed: Seed of the parameters; None keeps the reference's initialization.
        dtype: Dtype of the saved tensors.
        untied: Give the model a head of its own although no config field says so.
    """
    library, oracle = transformers(), Oracle(reference_class)
    kept = {k: v for k, v in fields.items() if k not in _OLD_SPELLING.values() or v is not None}
    named = {"model_type": oracle.model_type or model_type, "architectures": None}
    # a copy: the library fills in what nested fields leave open
    values = {**copy.deepcopy(oracle.library_config(kept)), **named}
    model = getattr(library, oracle.reference_class)(library.AutoConfig.for_model(**values))
    if untied:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
    if seed is not None:
        redraw(model, seed)
    model.to(dtype).save_pretrained(directory)
    _respell(directory / "config.json", fields, oracle)


def redraw(model: nn.Module, seed: int) -> None:
    """Draw every parameter again; its values depend only on its name and the seed."""
    owners, heads = dict(model.named_modules()), getattr(model.config, "num_attention_heads", 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            above = name.rpartition(".")[0]
            owner, around = owners[above], owners[above.rpartition(".")[0]]
            random = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            if _QUERY.search(name) and getattr(around, "scaling", None) == 1.0:
                # T5 does not scale its scores; without this, attention would be one-hot
                noise /= (parameter.shape[0] / heads) ** 0.5
            parameter.copy_(_hot(name, owner, parameter, noise))


def _hot(name: str, owner: nn.Module, parameter: nn.Parameter, noise: Tensor) -> Tensor:
    if "rel" in name and isinstance(owner, nn.Embedding):
        return noise  # relative position bias
    if isinstance(owner, nn.Embedding):
        return 0.03 * noise  # small enough for the first norm's eps to count
    if name.endswith("bias"):
        return 0.2 * noise
    if parameter.dim() < 2:
        return 1 + 0.3 * noise  # a norm's scale
    # GPT-2's Conv1D is [i o], everything else [o i]
    inputs = parameter.shape[0] if type(owner).__name__ == "Conv1D" else parameter.shape[1:].numel()
    return noise * (1.5 if _QUERY_OR_KEY.search(name) else 1.0) / inputs**0.5


def _respell(path: Path, fields: Mapping[str, Any], oracle: Oracle) -> None:
    """Keep the old spelling of `fields` in config.json and remove the new one."""
    old = {name: fields[name] for name in _OLD_SPELLING if name in fields}
    if not old and not oracle.own:
        return
    config = oracle.own_config(json.loads(path.read_text(encoding="utf-8")), fields)
    for name in old:
        config.pop(_OLD_SPELLING[name], None)
    config.update(old)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_like(directory: Path, destination: Path, reference_class: str, *, seed: int = 0) -> None:
    """Write a checkpoint with the config of `directory` and random weights."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    write(reference_class, config, destination, seed=seed, model_type=config.get("model_type", ""))


def write_under(directory: Path, destination: Path, reference_class: str) -> None:
    """Write the weights of `directory` as the reference publishes them under another class.

    Raises:
        ParityError: The class needs tensors that the directory does not hold.
    """
    kind = getattr(transformers(), reference_class)
    how = {"dtype": "auto", "local_files_only": True, "output_loading_info": True}
    model, info = kind.from_pretrained(directory, **how)
    if missing := info.get("missing_keys"):
        raise ParityError(
            f"{directory}: lacks what {reference_class} needs: {listing(map(str, missing))}"
        )
    model.save_pretrained(destination)
