"""Small models that were trained for seconds, so that a text is likelier than chance to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import registry
from zoo.components.decoder import Decoder

SIZES = {"dim": 64, "layers": 3, "heads": 4, "hidden": 160, "positions": 128}
GROUPED = {**SIZES, "kv_heads": 2}
QUICK = 0.1  # of so narrow a model: the usual 0.02 is for wide ones
# of each architecture's config, what differs from its own defaults
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": SIZES,
    "llama": GROUPED,
    "qwen2": {**GROUPED, "attn_bias": True, "attn_out_bias": False, "rope_base": 1e6},
    "gemma2": {**GROUPED, "head_dim": 16, "query_scale": 16, "window": 48},
    "neox": {**SIZES, "hidden": 256},
    "falcon": {**SIZES, "grouped": True, "groups": 2},
    "bloom": {"dim": 64, "layers": 3, "heads": 4},
    "bert": SIZES,
    "mixtral": {**GROUPED, "hidden": 64, "experts": 4, "experts_per_token": 2},
}
FIRST = 5  # characters' ids begin here
MASK = 4


def characters(path: Path) -> tuple[Tensor, int]:
    """A text's ids, and how many there are."""
    text = path.read_text(encoding="utf-8")
    alphabet = sorted(set(text))
    ids = {c: n + FIRST for n, c in enumerate(alphabet)}
    return torch.tensor([ids[c] for c in text]), len(alphabet) + FIRST


def trained(name: str, text: Tensor, vocab: int, seed: int = 0) -> Any:
    """A model of an architecture that has read a text; an encoder needs more of it."""
    torch.manual_seed(seed)
    entry = registry.architectures()[name]
    quiet = dict.fromkeys(("dropout", "attn_dropout", "embed_dropout"), 0.0)
    names = entry.config_class.model_fields
    fields = {**{f: v for f, v in quiet.items() if f in names}, "init_std": QUICK, **MODELS[name]}
    model = entry.model(entry.config_class(vocab=vocab, **fields))
    model.architecture = name
    steps, rate = 250, 5e-3
    if not isinstance(model, Decoder):
        steps, rate = 1500, 2e-3
        look_around(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.15)
    random = torch.Generator().manual_seed(seed)
    length, rows = 128, 8
    for _ in range(steps):
        starts = torch.randint(len(text) - length - 1, (rows, 1), generator=random)
        ids = text[starts + torch.arange(length + 1)]
        loss = loss_of(model, ids, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def look_around(model: Any) -> None:
    """An encoder begins with heads that look at neighbors and hand on what they see.

    By itself it had not found out, after 500 steps, that a gap is told by what is beside it.
    """
    dim, half = model.config.dim, model.config.dim // 2
    places = torch.arange(len(model.positions.weight))[:, None]
    paces = (torch.randperm(half) + 0.5) * torch.pi / half
    angles = paces * places
    model.positions.weight.copy_(0.3 * torch.stack((angles.cos(), angles.sin()), -1).flatten(1))
    model.embed.weight.mul_(3)
    one = torch.eye(dim)
    for block in model.blocks:
        block.attn.v.weight.copy_(one)
        block.attn.out.weight.add_(one)
    model.head.dense.weight.add_(one)
    attn = model.blocks[0].attn
    attn.q.weight.copy_(4 * one)
    attn.k.weight.zero_()
    for n, ahead in enumerate((-1, 1, -2, 2)):
        for pair in range(n * half // 4, (n + 1) * half // 4):
            cos, sin = (paces[pair] * ahead).cos(), (paces[pair] * ahead).sin()
            at = slice(2 * pair, 2 * pair + 2)
            attn.k.weight[at, at] = 4 * torch.tensor([[cos, sin], [-sin, cos]])


def loss_of(model: Any, ids: Tensor, random: torch.Generator) -> Tensor:
    if isinstance(model, Decoder):
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    ids = ids[:, :-1]  # an encoder has no token to predict beyond the last position
    hidden = torch.rand(ids.shape, generator=random) < 0.15
    return F.cross_entropy(model(torch.where(hidden, MASK, ids))[hidden], ids[hidden])
