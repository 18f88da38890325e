"""Weights with the marks of training, which zoo diagnose goes by, and none of its hours."""

import torch
from torch import Tensor

from zoo.components.model import Model
from zoo.components.norm import OffsetRMSNorm
from zoo.components.rotary import Rotated


@torch.no_grad()
def grown(model: Model, seed: int = 0) -> Model:
    """What reads the residual stream and what writes to it share its directions.

    Rows are of several sizes, those of a rotary pair alike; norms of neighboring layers differ
    little.
    """
    random = torch.Generator().manual_seed(seed)
    dim = model.config.dim
    main = torch.randn(dim // 8, dim, generator=random) / dim**0.5
    first = dict[str, Tensor]()
    added = any(isinstance(module, OffsetRMSNorm) for module in model.modules())
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if parameter.dim() < 2:
            kind = ".".join(name.split(".")[-2:])  # one of the same of each layer
            value = 0.3 * first.setdefault(kind, noise) + 0.05 * noise
            one = 0.0 if added else 1.0
            parameter.copy_(one + value if name.endswith("weight") else 0.1 * value)
            continue
        writes = name.endswith(("out.weight", "down.weight", "mlp.down"))
        rows = noise.mT if writes else noise
        if rows.shape[-1] == dim:
            rows = rows + 2 * (rows @ main.T) @ main
        rows = rows * torch.exp(0.3 * torch.randn(rows.shape[-2], 1, generator=random))
        rows = rows * _profile(model, name, rows.shape[-2])
        parameter.copy_(0.05 * (rows.mT if writes else rows))
    return model


def _profile(model: Model, name: str, count: int) -> Tensor | float:
    """(rows, 1): of queries and keys those grow that turn slowly, in both halves of a head."""
    config = model.config
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if not isinstance(config, Rotated) or leaf not in ("q", "k"):
        return 1.0
    heads = config.heads if leaf == "q" else getattr(config, "kv_heads", config.heads)
    half = torch.linspace(-0.6, 0.6, config.rotary_dim // 2)
    rest = torch.zeros(count // heads - config.rotary_dim)
    return torch.exp(torch.cat([half, half, rest]).repeat(heads))[:, None]
