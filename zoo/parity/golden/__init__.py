"""Golden files: outputs published by a checkpoint's authors, used as a reference.

A file holds tokens and, at each position, the most likely next tokens with their logits.
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
    """Published outputs for one sequence of tokens."""

    name: str
    about: str  # where the outputs come from
    tolerance: float  # of a logit
    tokens: Tensor  # (s,)
    ids: Tensor  # (s, TOP), the most likely first
    logits: Tensor  # (s, TOP)

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor, tolerance: float, about: str) -> Golden:
        """Golden outputs from all logits (s, v) over tokens (s,)."""
        best = logits.double().topk(TOP)
        return cls("", about, tolerance, tokens, best.indices, best.values)

    def to_text(self) -> str:
        """The file's text: a line per position, logits with the digits of fp32."""
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
        """Compare a model's logits; an unlisted token that exceeds a listed one counts too."""
        out = model(self.tokens[None])
        logits: Tensor = (out[0] if isinstance(out, tuple) else out)[0].double()
        if (
            logits.dim() != 2
            or len(logits) != len(self.tokens)
            or self.ids.max() >= logits.shape[1]
        ):
            has = f"{len(self.tokens)} tokens, with ids up to {self.ids.max()}"
            detail = f"{self.name}: {has}; the model's outputs are {list(logits.shape)}"
            return Row(subject, "golden", float("inf"), self.tolerance, "shape", detail)
        apart = (logits.gather(1, self.ids) - self.logits).abs()
        others = logits.scatter(1, self.ids, -torch.inf).amax(dim=1) - self.logits[:, -1]
        worst = torch.cat([apart, others[:, None]], dim=1)
        error = worst.max().item()  # NaN where there is one
        position = int(worst.amax(dim=1).argmax())
        detail = f"{self.name}: {error:.1e} after token {position}, {self.tolerance:.1e} at most"
        return Row(subject, "golden", error, self.tolerance, f"{error:.1e}", detail)


def _rows(rows: list[list[Any]]) -> str:
    return ",\n".join(json.dumps(row) for row in rows)


def find(asked: str | PathLike[str] | None, ref: Any) -> Golden | None:
    """The golden outputs of a file or name, or those that the registry has for the checkpoint."""
    entry = registry.named(ref)
    if asked is None:
        return read(_path(entry.golden)) if entry is not None and entry.golden else None
    named = registry.named(asked)
    if named is None:
        if not (path := Path(asked)).is_file():
            near = did_you_mean(str(asked), registry.checkpoints())
            raise NotACheckpoint(
                f"golden: {asked}: neither a file nor the name of a checkpoint.{near}"
            )
        return read(path)
    if not named.golden:
        raise NotACheckpoint(f"golden: {named.name}: the registry has no outputs for it")
    return read(_path(named.golden))


def _path(name: str) -> Path:
    return Path(__file__).with_name(name)


def read(path: Path) -> Golden:
    """Read and check a golden file."""
    data = read_json(path)
    if problems := list(_problems(data)):
        raise ConfigError("\n  ".join([f"{path}: not a golden file:", *problems]), problems)
    return Golden(
        path.name,
        data["about"],
        data["tolerance"],
        torch.tensor(data["tokens"]),
        torch.tensor(data["ids"]),
        torch.tensor(data["logits"], dtype=torch.float64),
    )


def _problems(data: Mapping[str, Any]) -> Iterator[str]:
    if names := [name for name in (*data, *FIELDS) if (name in data) != (name in FIELDS)]:
        yield f"its fields are {', '.join(FIELDS)}; missing or unknown: {', '.join(names)}"
        return
    if not isinstance(data["about"], str):
        yield f"about: expected a text, found {data['about']!r}"
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
            yield f"{name}: expected {TOP} after each of {len(tokens)} tokens"
        elif name == "ids" and any(len(set(row)) != TOP for row in rows):
            yield "ids: one token twice in a row"
        elif name == "logits" and (
            unsorted := [n for n, r in enumerate(rows) if r != sorted(r)[::-1]]
        ):
            yield f"logits: after token {unsorted[0]}, the most likely is not the first"
        elif name == "logits" and _is_number(data["tolerance"]):
            apart = min(row[0] - row[-1] for row in rows)
            if data["tolerance"] >= apart:  # any order would pass
                yield f"tolerance: {data['tolerance']:g}, and logits lie within {apart:g}"


def _are(values: Any, fits: Any) -> bool:
    return isinstance(values, list) and all(map(fits, values))


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)
