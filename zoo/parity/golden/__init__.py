"""Golden files: what a checkpoint's authors published of its outputs, in the place of a reference.

A file holds tokens and, at each place, the likeliest next tokens with their logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters.strict_json import read_json
from zoo import registry
from zoo.errors import ConfigError, NotACheckpoint, did_you_mean
from zoo.parity.result import Row

TOP = 20
FIELDS = ("about", "tolerance", "tokens", "ids", "logits")


@dataclass(frozen=True)
class Golden:
    name: str
    about: str  # whose outputs they are
    tolerance: float  # of a logit
    tokens: Tensor  # (s,)
    ids: Tensor  # (s, TOP), the likeliest first
    logits: Tensor  # (s, TOP)

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor, tolerance: float, about: str) -> Golden:
        """From all logits (s, v) over tokens (s,)."""
        best = logits.double().topk(TOP)
        return cls("", about, tolerance, tokens, best.indices, best.values)

    def to_text(self) -> str:
        """A line for each place; logits with as many digits as fp32 has."""
        logits = [[float(f"{x:.9g}") for x in row] for row in self.logits.tolist()]
        lines = [
            *(f'"{name}": {json.dumps(getattr(self, name))}' for name in FIELDS[:2]),
            f'"tokens": {json.dumps(self.tokens.tolist())}',
            f'"ids": [\n{_rows(self.ids.tolist())}\n]',
            f'"logits": [\n{_rows(logits)}\n]',
        ]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @torch.no_grad()
    def row(self, subject: str, model: Any) -> Row:
        """How far a model's logits are from these; a token that passes one of them counts too."""
        out = model(self.tokens[None])
        found: Tensor = (out[0] if isinstance(out, tuple) else out)[0].double()
        if found.dim() != 2 or len(found) != len(self.tokens) or self.ids.max() >= found.shape[1]:
            has = f"{len(self.tokens)} tokens, and ids up to {self.ids.max()} behind them"
            detail = f"{self.name}: {has}; the model's outputs are {list(found.shape)}"
            return Row(subject, "golden", float("inf"), self.tolerance, "shape", detail)
        apart = (found.gather(1, self.ids) - self.logits).abs()
        others = found.scatter(1, self.ids, -torch.inf).amax(dim=1) - self.logits[:, -1]
        worst = torch.cat([apart, others[:, None]], dim=1)
        error = worst.max().item()  # NaN where there is one
        place = int(worst.amax(dim=1).argmax())
        detail = f"{self.name}: {error:.1e} behind token {place}, {self.tolerance:.1e} at most"
        return Row(subject, "golden", error, self.tolerance, f"{error:.1e}", detail)


def _rows(rows: list[list[Any]]) -> str:
    return ",\n".join(json.dumps(row) for row in rows)


def find(asked: str | PathLike[str] | None, ref: Any) -> Golden | None:
    """The file or the name that is asked for, or what the registry has for the checkpoint."""
    entry = registry.named(ref)
    if asked is None:
        return read(_path(entry.golden)) if entry is not None and entry.golden else None
    named = registry.named(asked)
    if named is None:
        if not (path := Path(asked)).is_file():
            near = did_you_mean(str(asked), registry.checkpoints())
            raise NotACheckpoint(f"golden: {asked}: neither a file nor a checkpoint's name.{near}")
        return read(path)
    if not named.golden:
        raise NotACheckpoint(f"golden: {named.name}: the registry knows no outputs of it")
    return read(_path(named.golden))


def _path(name: str) -> Path:
    return Path(__file__).with_name(name)


def read(path: Path) -> Golden:
    data = read_json(path)
    if problems := list(_problems(data)):
        raise ConfigError("\n  ".join([f"{path}: no golden file:", *problems]), problems)
    return Golden(
        path.name,
        data["about"],
        data["tolerance"],
        torch.tensor(data["tokens"]),
        torch.tensor(data["ids"]),
        torch.tensor(data["logits"], dtype=torch.float64),
    )


def _problems(data: Mapping[str, Any]) -> Iterator[str]:
    if odd := [name for name in (*data, *FIELDS) if (name in data) != (name in FIELDS)]:
        yield f"its fields are {', '.join(FIELDS)}; missing or unknown: {', '.join(odd)}"
        return
    if not isinstance(data["about"], str):
        yield f"about: expected words, found {data['about']!r}"
    if not _is_number(data["tolerance"]) or data["tolerance"] <= 0:
        yield f"tolerance: expected a positive number, found {data['tolerance']!r}"
    tokens = data["tokens"]
    if not _are(tokens, _is_id) or not tokens:
        yield "tokens: expected token ids"
        return
    for name, fits in (("ids", _is_id), ("logits", _is_number)):
        rows = data[name]
        if (
            not isinstance(rows, list)
            or len(rows) != len(tokens)
            or not all(_are(row, fits) and len(row) == TOP for row in rows)
        ):
            yield f"{name}: expected {TOP} behind each of {len(tokens)} tokens"
        elif name == "ids" and any(len(set(row)) != TOP for row in rows):
            yield "ids: one token twice in a row"
        elif name == "logits" and (wild := [n for n, r in enumerate(rows) if r != sorted(r)[::-1]]):
            yield f"logits: behind token {wild[0]}, the likeliest is not the first"
        elif name == "logits" and _is_number(data["tolerance"]):
            apart = min(row[0] - row[-1] for row in rows)
            if data["tolerance"] >= apart:  # then any order of them would pass
                yield f"tolerance: {data['tolerance']:g}, and logits lie within {apart:g}"


def _are(values: Any, fits: Any) -> bool:
    return isinstance(values, list) and all(map(fits, values))


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)
