"""Guessing ahead: a small model proposes, the large one looks at all proposals at once.

What comes out is what the large model alone would give: the same tokens where it is greedy, the
same distribution where it is not.
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
from zoo.text.generate import Bounds, Options, Runner, Step, Stop, answers
from zoo.text.inference import every_place
from zoo.text.sampling import Dice, Sampling, pick, seeds_of


def ahead(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    asked: Options,
    bounds: Bounds,
    runners: Sequence[Runner] = (),
) -> Iterator[Step]:
    """Row by row: each accepts as many guesses as it does.

    `runners`: the model's and the small one's, of one row, if they have read some of it before.
    """
    small = asked.assistant_model
    assert small is not None
    _same_size(model, small)
    if answers(model) or answers(small):
        raise UsageError("assistant_model: not for models that read a question apart")
    every_place(model)
    real = check_mask(attention_mask, input_ids)
    samples = asked.num_return_sequences
    seeds = seeds_of(asked.seed, len(input_ids), samples)
    for n in range(len(input_ids) * samples):
        row = n // samples
        prompt = input_ids[row : row + 1]
        if real is not None:
            prompt = prompt[:, real[row]]
        most = asked.most(model, input_ids)
        rules = asked.constraints(model, input_ids, most, bounds)
        large, draft = runners or _runners(model, small, prompt, most, asked.use_cache)
        large.row = draft.row = row if len(input_ids) > 1 else None
        stops = Stop(model, asked.stops, large.rows[0]) if asked.stops else None
        for token, logprob in _row(large, draft, Dice([seeds[n]]), rules, asked):
            yield Step(n, token, logprob)
            if token in bounds.eos or (stops is not None and stops.reached(token)):
                break


def _same_size(model: Model, small: Model) -> None:
    if small.config.vocab != model.config.vocab:
        raise UsageError(
            f"assistant_model: {small.config.vocab} tokens, and the model has {model.config.vocab}"
        )


def check_words(model: Model, small: Model) -> None:
    """Whether an id stands for the same in both, special tokens aside.

    Any guess is looked at, so that nothing wrong would come of it; but few would hold.
    """
    _same_size(model, small)
    try:
        mine, other = model.tokenizer, small.tokenizer
    except NotACheckpoint:  # one without words of its own is as good as its guesses
        return
    if (found := mine.difference(other)) is not None:
        id, word, guess = found
        raise UsageError(
            f"assistant_model: another vocabulary: id {id} is {guess!r}, and {word!r} to the model"
        )


def _runners(
    model: Model, small: Model, prompt: Tensor, most: int, use_cache: bool
) -> tuple[Runner, Runner]:
    large = Runner(model, prompt, None, room=most, use_cache=use_cache)
    try:
        return large, Runner(small, prompt, None, room=most, use_cache=use_cache)
    except ZooError as error:
        raise type(error)(f"assistant_model: {error}") from None


def _row(
    large: Runner, draft: Runner, dice: Dice, rules: Constraints, asked: Options
) -> Iterator[tuple[int, float]]:
    draft.feed()
    count, accepted = 0, _first(large.feed()[0], large, rules, asked.sampling, dice)
    while True:
        for token, logprob in accepted:
            count += 1
            yield token, logprob
            if count == rules.most:
                return
        guesses = min(asked.num_assistant_tokens, rules.most - count - 1)
        chances = partial(_chances, rules=rules, sampling=asked.sampling)
        accepted = _round(draft, large, accepted[-1][0], count, guesses, chances, dice)


def _first(
    logits: Tensor, runner: Runner, rules: Constraints, sampling: Sampling, dice: Dice
) -> list[tuple[int, float]]:
    chances = _chances(logits, runner.rows[0], 0, rules, sampling)
    token = int(pick(chances, dice.numbers())[0])
    return [(token, _logprob(logits, token))]


def _round(
    small: Runner,
    large: Runner,
    last: int,
    count: int,
    guesses: int,
    chances: Callable[[Tensor, list[int], int], Tensor],
    dice: Dice,
) -> list[tuple[int, float]]:
    """The guesses that hold, and a token of the large model's own behind them.

    `last` is the last of `count` new tokens.
    """
    length = large.ids.shape[1] + 1  # with `last`, which is certain
    token, said, guessed = last, [], []
    for n in range(guesses):
        logits = small.feed(_one(large, token), last=1)[0]
        said.append(chances(logits, small.rows[0], count + n))
        token = int(pick(said[-1], dice.numbers())[0])
        guessed.append(token)
    tokens = torch.cat([_one(large, t) for t in (last, *guessed)], dim=1)
    before = large.rows[0]
    logits = large.feed(tokens, last=guesses + 1)[0]
    out: list[tuple[int, float]] = []
    for n in range(guesses + 1):
        mine = chances(logits[n : n + 1], [*before, last, *guessed[:n]], count + n)
        if n < guesses:
            token = guessed[n]
            if _holds(mine[0, token], said[n][0, token], dice.numbers()[0, 0]):
                out.append((token, _logprob(logits[n : n + 1], token)))
                continue
            mine = _left(mine, said[n])
        token = int(pick(mine, dice.numbers())[0])
        out.append((token, _logprob(logits[n : n + 1], token)))
        break
    # both have seen `last` and what was accepted, but not the token that comes now
    large.cut(length + len(out) - 1)
    if len(out) == guesses + 1 and guesses:
        small.feed(_one(large, guessed[-1]))  # all held: the small one has not read its last
    small.cut(length + len(out) - 1)
    return out


def _holds(mine: Tensor, said: Tensor, number: Tensor) -> bool:
    """A guess, in as many cases of those where the small model makes it as the large one would."""
    return bool(number * said < mine)


def _left(mine: Tensor, said: Tensor) -> Tensor:
    """What the large model gives more often than guesses do: the rest of its distribution."""
    return (mine - said).clamp(min=0)


def _one(runner: Runner, token: int) -> Tensor:
    return torch.full_like(runner.ids[:, :1], token)


def _chances(
    logits: Tensor, row: list[int], new: int, rules: Constraints, sampling: Sampling
) -> Tensor:
    """(1, v) probabilities; all of it on the likeliest where it is greedy."""
    logits = rules.apply(logits.float(), [row], new)
    if sampling.greedy:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).double()
    return sampling.warped(logits).double().softmax(dim=-1)


def _logprob(logits: Tensor, token: int) -> float:
    return logits.float().log_softmax(dim=-1)[0, token].item()
