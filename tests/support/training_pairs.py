"""A reference and the native model that are trained side by side, and nanoGPT's parameters."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from converters.carry_out import invert
from converters.formats import TensorInfo, dtype_code
from converters.plan import make_plan
from zoo import registry
from zoo.parity.fixtures import hot_checkpoint
from zoo.parity.reference import Reference

NEAR = 1e-9
FIRST = [f"{name}/{next(iter(entry.variants))}" for name, entry in registry.architectures().items()]
IDS = torch.randint(3, 30, (3, 9), generator=torch.Generator().manual_seed(5))


class Pair:
    """A reference and the native model of the same checkpoint, in fp64."""

    def __init__(self, key: str, place: Path) -> None:
        name, variant = key.split("/")
        entry = registry.architectures()[name]
        kind = hot_checkpoint(entry, variant, place, dtype=torch.float64)
        self.reference = Reference(place, kind, torch.float64, lifted=True)
        self.model = zoo.load(place)
        self.seq2seq = name == "t5"

    def loss(self, ours: bool, ids: Tensor = IDS) -> Tensor:
        more = {"decoder_input_ids": ids}
        if ours:
            out: Any = self.model(ids, **(more if self.seq2seq else {}))
            out = out[0] if isinstance(out, tuple) else out
        else:
            out = next(iter(self.reference({"input_ids": ids, **more}).values()))
        generator = torch.Generator().manual_seed(7)
        return (out * torch.randn(out.shape, generator=generator).double()).mean()

    def step(self, ours: bool, optimizer: torch.optim.Optimizer, ids: Tensor = IDS) -> float:
        optimizer.zero_grad()
        loss = self.loss(ours, ids)
        loss.backward()
        optimizer.step()
        return loss.item()

    def errors(self) -> dict[str, float]:
        """Of the native weights on the reference's side, by name, of their scale."""
        other = {n: p.detach() for n, p in self.reference.model.named_parameters()}
        header = {n: TensorInfo(n, tuple(x.shape), dtype_code(x.dtype)) for n, x in other.items()}
        plan, fields = self.model.provenance.plan, self.model.config.to_dict()
        mine = invert(
            make_plan(plan.spec, "hf", fields, plan.native, header),
            {n: p.detach() for n, p in self.model.named_parameters()},
        )
        aliases = {"embed_out.weight": "lm_head.weight"}
        mine = {n if n in other else aliases[n]: x for n, x in mine.items()}
        assert mine.keys() == other.keys()
        return {n: ((mine[n] - x).abs().max() / x.abs().max()).item() for n, x in other.items()}


class Nano(nn.Module):
    """The names of nanoGPT's parameters, and nothing else of it."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        linear, norm = partial(nn.Linear, bias=c.bias), partial(nn.LayerNorm, bias=c.bias)
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(c.vocab, c.dim),
            "wpe": nn.Embedding(c.positions, c.dim),
            "h": nn.ModuleList(),
            "ln_f": norm(c.dim),
        }
        for _ in range(c.layers):
            attn = {"c_attn": linear(c.dim, 3 * c.dim), "c_proj": linear(c.dim, c.dim)}
            mlp = {"c_fc": linear(c.dim, c.hidden), "c_proj": linear(c.hidden, c.dim)}
            block = {"ln_1": norm(c.dim), "attn": nn.ModuleDict(attn)}
            block |= {"ln_2": norm(c.dim), "mlp": nn.ModuleDict(mlp)}
            parts["h"].append(nn.ModuleDict(block))  # type: ignore[operator]
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(c.dim, c.vocab, bias=False)
        self.lm_head.weight = parts["wte"].weight  # type: ignore[assignment]
