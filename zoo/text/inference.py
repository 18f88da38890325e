"""What every use of a loaded model begins with: find the model, check its files, set it to eval."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import nn

from zoo.checkpoints.provenance import check_sources
from zoo.checkpoints.sources import Ref
from zoo.components.model import Model
from zoo.errors import UsageError, listing
from zoo.loading import load


def model_of(model: Model | Ref, **loading: Any) -> Model:
    """Return a model whose files are unchanged, or load one from a reference.

    Args:
        **loading: options of `zoo.load`, for a reference only.
    """
    if isinstance(model, str | PathLike):
        return load(model, **loading)
    if loading:
        raise UsageError(
            f"{listing(loading)}: the model is loaded already; these are options of zoo.load"
        )
    if not isinstance(model, Model):
        raise UsageError(f"expected a model or a reference, found {type(model).__name__}")
    check_sources(model)
    return model


def name_of(model: Model) -> str:
    """A model's name in messages: its architecture and its head."""
    return f"{model.architecture or type(model).__name__} with head {model.config.head!r}"


def headless(model: Model) -> Model:
    """The same modules as a model that returns hidden states.

    Not through copy, which a prepared model refuses.
    """
    body = object.__new__(type(model))
    body.__dict__.update(model.__dict__)
    body.__dict__.pop("_compiled_call_impl", None)  # it is compiled with the head
    body.config = model.config.replace(head=type(model).headless[0])
    return body


def check_all_logits(model: Model) -> None:
    """Refuse a model that was prepared to return the logits of the last position only."""
    preparation = model.prepared
    if preparation is not None and preparation.last_only:
        raise UsageError(
            f"{name_of(model)}: prepared with last_only=True, and the logits of every position are "
            "needed. Prepare it without last_only"
        )


def is_encoder_decoder(model: Model) -> bool:
    """Whether an encoder reads the input, and a decoder writes an answer apart from it."""
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter."""
    return next(model.parameters()).device


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Turn dropout and gradients off; afterwards, modules in training mode are so again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
