"""Where the reference library lacks an architecture: what in it computes the same function.

registry.yaml says it below `oracle`: the library's class, its names for fields of the config, and
the field under which each layer runs twice in a row, for which the library has two of each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from converters.opening import open_checkpoint
from zoo import registry
from zoo.errors import MissingDependency, ParityError

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def _moved(name: str, to: Callable[[int], int]) -> str:
    return _LAYER.sub(lambda match: f"layers.{to(int(match[1]))}.", name)


@cache
def transformers() -> ModuleType:
    """Import the reference library and silence it."""
    try:
        import transformers as library
    except ImportError as error:
        raise MissingDependency(
            "parity is measured against transformers, which is not installed. "
            "Run: pip install transformers"
        ) from error
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


class Oracle:
    """Translate between a reference class and the library's; the same where it has it."""

    def __init__(self, reference_class: str) -> None:
        entries = registry.architectures().values()
        entry = next((e for e in entries if reference_class in e.heads), None)
        oracle = dict(entry.oracle) if entry is not None else {}
        self.model_type: str = oracle.get("model_type", entry.model_type if entry else "")
        self.reference_class = oracle.get("classes", {}).get(reference_class, reference_class)
        self.fields: dict[str, str] = oracle.get("fields", {})
        self.repeat: str = oracle.get("repeat", "")
        self.own: dict[str, Any] = {}
        if entry is not None and oracle:
            self.own = {"model_type": entry.model_type, "architectures": [reference_class]}

    def library_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config in the library's fields, for the layers that a checkpoint holds."""
        if not self.own:
            return dict(config)
        kept = {n: v for n, v in config.items() if n not in (*self.fields.values(), self.repeat)}
        renamed = {self.fields.get(n, n): v for n, v in kept.items()}
        classes = {"model_type": self.model_type, "architectures": [self.reference_class]}
        return {**renamed, **classes}

    def own_config(self, library: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config that the library wrote, as the architecture's own files have it."""
        kept = {n: v for n, v in library.items() if n not in self.fields.values()}
        names = (*self.fields, self.repeat) if self.own else ()
        return {**kept, **{n: own[n] for n in names if n in own}, **self.own}

    @contextmanager
    def directory(self, source: Path) -> Iterator[Path]:
        """Give `source`, or a rewritten copy that the library loads."""
        if not self.own:
            yield source
            return
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        checkpoint = open_checkpoint(source)
        tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.tensors}
        library = self.library_config(config)
        if config.get(self.repeat):
            library["num_hidden_layers"] *= 2
            tensors = {
                _moved(name, lambda n, k=k: 2 * n + k): x.clone()  # type: ignore[misc]
                for name, x in tensors.items()
                for k in (0, 1)
            }
        with TemporaryDirectory(prefix="zoo-oracle-") as scratch:
            Path(scratch, "config.json").write_text(json.dumps(library), encoding="utf-8")
            save_file(tensors, Path(scratch, "model.safetensors"), metadata={"format": "pt"})
            yield Path(scratch)

    def fold(self, source: Path) -> Callable[[str], str]:
        """Return a function to the one name of two layers, where layers were written out twice."""
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        twice = bool(self.repeat and config.get(self.repeat))
        return lambda name: _moved(name, lambda n: n // 2) if twice else name

    def folded(self, source: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add up gradients of layers that were written out twice, under their one name."""
        fold, out = self.fold(source), dict[str, Tensor]()
        for name, x in tensors.items():
            one = fold(name)
            out[one] = out[one] + x if one in out else x
        return out


def reference_on_meta(reference_class: str, config: Mapping[str, Any]) -> nn.Module:
    """Build the reference's module on the meta device: names, shapes and order of parameters."""
    library, oracle = transformers(), Oracle(reference_class)
    if config.get(oracle.repeat):
        raise ParityError(f"the reference has two layers for each of {reference_class}'s")
    fields = {**oracle.library_config(config), "model_type": oracle.model_type}
    with torch.device("meta"):
        model: nn.Module = getattr(library, oracle.reference_class)(
            library.AutoConfig.for_model(**fields)
        )
    model.tie_weights()  # type: ignore[operator]
    return model
