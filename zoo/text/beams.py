"""Beam search: keep the most likely continuations of each prompt, several at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo.components.model import Model
from zoo.text.options import GenerationOptions, SpecialIds
from zoo.text.runner import Runner

_IMPOSSIBLE = -1e9


@dataclass
class _Row:
    """One prompt's beams: running token rows, and finished ones."""

    running: list[list[int]]
    finished: list[tuple[float, list[int]]] = field(default_factory=list)  # best first
    open: bool = True  # a running beam may still win


def beam_search(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    special: SpecialIds,
) -> tuple[list[list[int]], list[list[float]]]:
    """The best `num_return_sequences` of each row, and [score] of each."""
    beams, max_new, ends = options.num_beams, options.max_new(model, input_ids), special.eos
    more: dict[str, Any] = {"use_cache": options.use_cache, "start": special.start}
    rules = options.constraints(model, input_ids, max_new, special)
    runner = Runner(model, input_ids, attention_mask, room=max_new, **more)
    logits = runner.feed()[:, -1]
    each = torch.arange(len(logits), device=logits.device).repeat_interleave(beams)
    runner.select_rows(each)
    logits = logits[each]
    rows = [_Row([[] for _ in range(beams)]) for _ in input_ids]
    scores = torch.full((len(rows), beams), _IMPOSSIBLE, device=logits.device)
    scores[:, 0] = 0  # at first all beams of a row are the same
    keep = max(2, 1 + len(ends)) * beams  # so many that enough of them keep running
    for length in range(1, max_new + 1):
        rows_so_far = runner.rows if rules.reads_rows else []
        likely = rules.apply(logits.float().log_softmax(dim=-1), rows_so_far, length - 1)
        vocab = likely.shape[-1]
        total = (likely.view(len(rows), beams, vocab) + scores[:, :, None]).flatten(1)
        best = total.topk(min(keep, total.shape[1]), dim=-1)
        source, tokens = best.indices // vocab, best.indices % vocab
        chosen: list[list[int]] = []  # for each row, which of the best keep running
        over: list[list[bool]] = []  # and which have ended
        for n, row in enumerate(rows):
            each_best = (x[n].tolist() for x in (best.values, source, tokens))
            candidates = list(zip(*each_best, strict=True))
            over.append([token in ends or length == max_new for _, _, token in candidates])
            _finish(row, candidates, over[n], length, options)
            # where a tiny vocabulary leaves too few, ended ones fill in, and cannot win
            chosen.append(sorted(range(len(candidates)), key=over[n].__getitem__)[:beams])
            row.running = [row.running[candidates[k][1]] + [candidates[k][2]] for k in chosen[-1]]
        index = torch.tensor(chosen, device=logits.device)
        scores = best.values.gather(1, index)
        scores += _IMPOSSIBLE * torch.tensor(
            [[over[n][k] for k in row] for n, row in enumerate(chosen)], device=logits.device
        )
        for n, row in enumerate(rows):
            row.open = row.open and _may_win(row, scores[n, 0].item(), length, max_new, options)
        full = options.early_stopping is True and all(len(row.finished) == beams for row in rows)
        if length == max_new or full or not any(row.open for row in rows):
            break
        offset = torch.arange(len(rows), device=logits.device)[:, None] * beams
        runner.select_rows((source.gather(1, index) + offset).flatten())
        logits = runner.feed(tokens.gather(1, index).view(-1, 1).to(runner.ids.dtype))[:, -1]
    results = [row.finished[: options.num_return_sequences] for row in rows]
    return [t for row in results for _, t in row], [[s] for row in results for s, _ in row]


def _finish(
    row: _Row,
    candidates: list[tuple[float, int, int]],
    over: list[bool],
    length: int,
    options: GenerationOptions,
) -> None:
    """Move those of the best `num_beams` that end here to the finished ones."""
    full = len(row.finished) == options.num_beams
    if not row.open or (full and options.early_stopping is True):
        return
    best = list(zip(candidates, over, strict=True))[: options.num_beams]
    for (score, beam, token), is_over in best:
        if is_over:
            each = score / length**options.length_penalty
            row.finished.append((each, row.running[beam] + [token]))
    row.finished = sorted(row.finished, key=lambda one: -one[0])[: options.num_beams]


def _may_win(row: _Row, best: float, length: int, max_new: int, options: GenerationOptions) -> bool:
    """Whether the best running beam may still beat the worst finished one."""
    if len(row.finished) < options.num_beams:
        return True
    long = options.early_stopping == "never" and options.length_penalty > 0
    return best / (max_new if long else length) ** options.length_penalty > row.finished[-1][0]
