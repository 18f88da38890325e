"""What every use of a loaded model begins with: which model is meant, and that it is at rest."""

from __future__ import annotations

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


def model_of(model: Model | Ref, **reading: Any) -> Model:
    """The model itself, its files as they were; or the one that `zoo.load` finds, read as told."""
    if isinstance(model, str | PathLike):
        return load(model, **reading)
    if reading:
        raise UsageError(f"{listing(reading)}: the model is loaded already")
    if not isinstance(model, Model):
        raise UsageError(f"expected a model or a reference, found {type(model).__name__}")
    check_sources(model)
    return model


def called(model: Model) -> str:
    """What a message calls it: its architecture, and its head."""
    return f"{model.architecture or type(model).__name__} with head {model.config.head!r}"


def headless(model: Model) -> Model:
    """The same modules, giving hidden states. Not through copy, which a prepared model refuses."""
    body = object.__new__(type(model))
    body.__dict__.update(model.__dict__)
    body.__dict__.pop("_compiled_call_impl", None)  # it knows the model with its head
    body.config = model.config.replace(head=type(model).headless[0])
    return body


def every_place(model: Model) -> None:
    """Refuses a model that was prepared to give the logits of the last place alone."""
    done = model.prepared
    if done is not None and done.last_only:
        raise UsageError(
            f"{called(model)}: prepared with last_only=True, and logits of every place are wanted"
        )


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; a model in training is so again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
