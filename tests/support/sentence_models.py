"""Checkpoints of sentence embeddings: a hot model and modules.json beside it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from zoo import registry
from zoo.checkpoints.sentences import WAYS
from zoo.parity.fixtures import hot_checkpoint

KIND = "sentence_transformers.models."


def write(root: Path, name: str, data: Any) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def checkpoint(
    root: Path,
    *ways: str,
    dense: int = 0,
    normal: bool = True,
    architecture: str = "bert",
    variant: str = "bare",
) -> Path:
    """A hot model and modules as the library of sentence embeddings writes them."""
    hot_checkpoint(registry.architectures()[architecture], variant, root)
    width = json.loads((root / "config.json").read_text())
    dim = width.get("hidden_size") or width["d_model"]
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modes = {f"pooling_mode_{way}": way in ways for way in WAYS}
    write(root, "1_Pooling/config.json", {"word_embedding_dimension": dim, **modes})
    if dense:
        folder, size = "2_Dense", {"in_features": dim * len(ways), "out_features": dense}
        act = {"bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
        write(root, f"{folder}/config.json", {**size, **act})
        layer = torch.nn.Linear(dim * len(ways), dense)
        state = {f"linear.{n}": p.detach() for n, p in layer.named_parameters()}
        save_file(state, root / folder / "model.safetensors", metadata={"format": "pt"})
        modules.append(("Dense", folder))
    if normal:
        modules.append(("Normalize", f"{len(modules)}_Normalize"))
    listed = [
        {"idx": n, "name": str(n), "path": path, "type": KIND + kind}
        for n, (kind, path) in enumerate(modules)
    ]
    write(root, "modules.json", listed)
    return root
