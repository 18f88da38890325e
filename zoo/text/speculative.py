"""Speculative decoding: a small model proposes tokens, the large one checks them in one call.

The result is that of the large model alone: the same tokens under greedy search, the same
distribution under sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from zoo.components.inputs import check_mask
from zoo.components.model import Model
from zoo.errors import NotACheckpoint, UsageError, ZooError
from zoo.text.constraints import Constraints
from zoo.text.inference import check_all_logits, is_encoder_decoder
from zoo.text.options import GenerationOptions, SpecialIds
from zoo.text.pieces import StopStrings
from zoo.text.runner import NewToken, Runner
from zoo.text.sampling import RowGenerators, Sampling, pick, seeds_of


def speculate(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    special: SpecialIds,
    runners: Sequence[Runner] = (),
) -> Iterator[NewToken]:
    """Generate row by row; each row accepts its own number of proposals.

    `runners`: the model's and the assistant's, of one row, if they have read some of it before.
    """
    small = options.assistant_model
    assert small is not None
    _check_size(model, small)
    if is_encoder_decoder(model) or is_encoder_decoder(small):
        raise UsageError("assistant_model: not implemented for encoder-decoders")
    check_all_logits(model)
    real = check_mask(attention_mask, input_ids)
    samples = options.num_return_sequences
    seeds = seeds_of(options.seed, len(input_ids), samples)
    for n in range(len(input_ids) * samples):
        row = n // samples
        prompt = input_ids[row : row + 1]
        if real is not None:
            prompt = prompt[:, real[row]]
        max_new = options.max_new(model, input_ids)
        rules = options.constraints(model, input_ids, max_new, special)
        large, draft = runners or _runners(model, small, prompt, max_new, options.use_cache)
        large.row = draft.row = row if len(input_ids) > 1 else None
        stops = StopStrings(model, options.stops, large.rows[0]) if options.stops else None
        for token, logprob in _row(large, draft, RowGenerators([seeds[n]]), rules, options):
            yield NewToken(n, token, logprob)
            if token in special.eos or (stops is not None and stops.reached(token)):
                break


def _check_size(model: Model, small: Model) -> None:
    if small.config.vocab != model.config.vocab:
        raise UsageError(
            f"assistant_model: expected a vocabulary of {model.config.vocab} tokens, like the "
            f"model's, found {small.config.vocab}"
        )


def check_vocabulary(model: Model, small: Model) -> None:
    """Refuse an assistant whose ids stand for other tokens, special tokens aside.

    The output would be right all the same, since every proposal is checked, but few would hold.
    """
    _check_size(model, small)
    try:
        mine, other = model.tokenizer, small.tokenizer
    except NotACheckpoint:  # without a tokenizer, it is as good as its proposals
        return
    if (difference := mine.difference(other)) is not None:
        id, word, proposal = difference
        raise UsageError(
            f"assistant_model: another vocabulary: id {id} is {proposal!r}, and {word!r} to the "
            "model"
        )


def _runners(
    model: Model, small: Model, prompt: Tensor, max_new: int, use_cache: bool
) -> tuple[Runner, Runner]:
    large = Runner(model, prompt, None, room=max_new, use_cache=use_cache)
    try:
        return large, Runner(small, prompt, None, room=max_new, use_cache=use_cache)
    except ZooError as error:
        raise type(error)(f"assistant_model: {error}") from None


def _row(
    large: Runner,
    draft: Runner,
    generators: RowGenerators,
    rules: Constraints,
    options: GenerationOptions,
) -> Iterator[tuple[int, float]]:
    draft.feed()
    count, accepted = 0, _first(large.feed()[0], large, rules, options.sampling, generators)
    while True:
        for token, logprob in accepted:
            count += 1
            yield token, logprob
            if count == rules.max_new:
                return
        proposals = min(options.num_assistant_tokens, rules.max_new - count - 1)
        distribution = partial(_distribution, rules=rules, sampling=options.sampling)
        accepted = _round(draft, large, accepted[-1][0], count, proposals, distribution, generators)


def _first(
    logits: Tensor,
    runner: Runner,
    rules: Constraints,
    sampling: Sampling,
    generators: RowGenerators,
) -> list[tuple[int, float]]:
    probabilities = _distribution(logits, runner.rows[0], 0, rules, sampling)
    token = int(pick(probabilities, generators.numbers())[0])
    return [(token, _logprob(logits, token))]


def _round(
    small: Runner,
    large: Runner,
    last: int,
    count: int,
    proposals: int,
    distribution: Callable[[Tensor, list[int], int], Tensor],
    generators: RowGenerators,
) -> list[tuple[int, float]]:
    """The accepted proposals, and one token of the large model's own behind them.

    `last` is the last of `count` new tokens.
    """
    length = large.ids.shape[1] + 1  # with `last`, which is certain
    token, drafts, proposed = last, [], []
    for n in range(proposals):
        logits = small.feed(_one(large, token), last=1)[0]
        drafts.append(distribution(logits, small.rows[0], count + n))
        token = int(pick(drafts[-1], generators.numbers())[0])
        proposed.append(token)
    tokens = torch.cat([_one(large, t) for t in (last, *proposed)], dim=1)
    before = large.rows[0]
    logits = large.feed(tokens, last=proposals + 1)[0]
    out: list[tuple[int, float]] = []
    for n in range(proposals + 1):
        mine = distribution(logits[n : n + 1], [*before, last, *proposed[:n]], count + n)
        if n < proposals:
            token = proposed[n]
            if _accepts(mine[0, token], drafts[n][0, token], generators.numbers()[0, 0]):
                out.append((token, _logprob(logits[n : n + 1], token)))
                continue
            mine = _residual(mine, drafts[n])
        token = int(pick(mine, generators.numbers())[0])
        out.append((token, _logprob(logits[n : n + 1], token)))
        break
    # both have read `last` and the accepted tokens, but not the token that comes now
    large.truncate(length + len(out) - 1)
    if len(out) == proposals + 1 and proposals:
        small.feed(_one(large, proposed[-1]))  # all accepted: the small one has not read its last
    small.truncate(length + len(out) - 1)
    return out


def _accepts(mine: Tensor, draft: Tensor, number: Tensor) -> bool:
    """Accept a proposal with probability min(1, p_large / p_small)."""
    return bool(number * draft < mine)


def _residual(mine: Tensor, draft: Tensor) -> Tensor:
    """The part of the large model's distribution that proposals do not cover."""
    return (mine - draft).clamp(min=0)


def _one(runner: Runner, token: int) -> Tensor:
    return torch.full_like(runner.ids[:, :1], token)


def _distribution(
    logits: Tensor, row: list[int], new: int, rules: Constraints, sampling: Sampling
) -> Tensor:
    """(1, v) probabilities; under greedy search all of it on the most likely token."""
    logits = rules.apply(logits.float(), [row], new)
    if sampling.greedy:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).double()
    return sampling.warp(logits).double().softmax(dim=-1)


def _logprob(logits: Tensor, token: int) -> float:
    return logits.float().log_softmax(dim=-1)[0, token].item()
