"""Beam search: several ways to go on at once, the likeliest of them kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo.components.model import Model
from zoo.text.generate import Bounds, Options, Runner

_NONE = -1e9


@dataclass
class _Row:
    """One prompt's beams: token rows that go on, and those that have ended."""

    running: list[list[int]]
    ended: list[tuple[float, list[int]]] = field(default_factory=list)  # best first
    open: bool = True  # one that goes on may still win


def search(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    asked: Options,
    bounds: Bounds,
) -> tuple[list[list[int]], list[list[float]]]:
    """The best `num_return_sequences` of each row, and [score] of each."""
    beams, most, ends = asked.num_beams, asked.most(model, input_ids), bounds.eos
    more: dict[str, Any] = {"use_cache": asked.use_cache, "start": bounds.start}
    rules = asked.constraints(model, input_ids, most, bounds)
    runner = Runner(model, input_ids, attention_mask, room=most, **more)
    logits = runner.feed()[:, -1]
    each = torch.arange(len(logits), device=logits.device).repeat_interleave(beams)
    runner.take(each)
    logits = logits[each]
    rows = [_Row([[] for _ in range(beams)]) for _ in input_ids]
    scores = torch.full((len(rows), beams), _NONE, device=logits.device)
    scores[:, 0] = 0  # at first all beams are one
    keep = max(2, 1 + len(ends)) * beams  # so many that enough of them go on
    for length in range(1, most + 1):
        rows_so_far = runner.rows if rules.reads_rows else []
        likely = rules.apply(logits.float().log_softmax(dim=-1), rows_so_far, length - 1)
        vocab = likely.shape[-1]
        total = (likely.view(len(rows), beams, vocab) + scores[:, :, None]).flatten(1)
        best = total.topk(min(keep, total.shape[1]), dim=-1)
        source, tokens = best.indices // vocab, best.indices % vocab
        chosen: list[list[int]] = []  # for each row, which of the best go on
        over: list[list[bool]] = []  # and which have ended
        for n, row in enumerate(rows):
            each_best = (x[n].tolist() for x in (best.values, source, tokens))
            found = list(zip(*each_best, strict=True))
            over.append([token in ends or length == most for _, _, token in found])
            _end(row, found, over[n], length, asked)
            # where too few go on, of a tiny vocabulary, what is over stands in, and cannot win
            chosen.append(sorted(range(len(found)), key=over[n].__getitem__)[:beams])
            row.running = [row.running[found[k][1]] + [found[k][2]] for k in chosen[-1]]
        index = torch.tensor(chosen, device=logits.device)
        scores = best.values.gather(1, index)
        scores += _NONE * torch.tensor(
            [[over[n][k] for k in row] for n, row in enumerate(chosen)], device=logits.device
        )
        for n, row in enumerate(rows):
            row.open = row.open and _may_win(row, scores[n, 0].item(), length, most, asked)
        full = asked.early_stopping is True and all(len(row.ended) == beams for row in rows)
        if length == most or full or not any(row.open for row in rows):
            break
        offset = torch.arange(len(rows), device=logits.device)[:, None] * beams
        runner.take((source.gather(1, index) + offset).flatten())
        logits = runner.feed(tokens.gather(1, index).view(-1, 1).to(runner.ids.dtype))[:, -1]
    wanted = [row.ended[: asked.num_return_sequences] for row in rows]
    return [t for row in wanted for _, t in row], [[s] for row in wanted for s, _ in row]


def _end(
    row: _Row,
    found: list[tuple[float, int, int]],
    over: list[bool],
    length: int,
    asked: Options,
) -> None:
    """Those that end here and are among the best, as many as there are beams, by score a token."""
    full = len(row.ended) == asked.num_beams
    if not row.open or (full and asked.early_stopping is True):
        return
    for (score, beam, token), is_over in list(zip(found, over, strict=True))[: asked.num_beams]:
        if is_over:
            each = score / length**asked.length_penalty
            row.ended.append((each, row.running[beam] + [token]))
    row.ended = sorted(row.ended, key=lambda one: -one[0])[: asked.num_beams]


def _may_win(row: _Row, best: float, length: int, most: int, asked: Options) -> bool:
    """Whether the best that goes on may yet be better than the worst that has ended."""
    if len(row.ended) < asked.num_beams:
        return True
    long = asked.early_stopping == "never" and asked.length_penalty > 0
    return best / (most if long else length) ** asked.length_penalty > row.ended[-1][0]
