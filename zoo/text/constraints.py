"""Logits processors: constraints on the next token by the tokens so far and by their number.

They are applied before sampling, and to greedy search and beam search too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from zoo.errors import TokenIdError, UsageError


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that occur in (b, v) `seen` less likely.

    Their logits are divided by the penalty where positive, multiplied where negative.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def no_repeat_ngram(logits: Tensor, rows: Sequence[Sequence[int]], size: int) -> Tensor:
    """Exclude tokens that would complete an n-gram of `size` a second time in their row."""
    out = logits.clone()
    for n, row in enumerate(rows):
        start = tuple(row[len(row) - size + 1 :])
        for at in range(len(row) - size + 1):
            if tuple(row[at : at + size - 1]) == start:
                out[n, row[at + size - 1]] = -torch.inf
    return out


class Biases:
    """Biases by sequence of tokens; those of a single token are kept in one tensor."""

    def __init__(self, biases: Mapping[tuple[int, ...], float]) -> None:
        self.ids = [id for ids in biases for id in ids]
        self.longer = {ids: bias for ids, bias in biases.items() if len(ids) > 1}
        self._single = {ids[0]: bias for ids, bias in biases.items() if len(ids) == 1}

    @cached_property
    def single(self) -> tuple[Tensor, Tensor]:
        """(ids, biases); a tensor only once the ids have been checked."""
        ids, values = [*self._single], [*self._single.values()]
        return torch.tensor(ids, dtype=torch.long), torch.tensor(values, dtype=torch.float64)


def sequence_bias(logits: Tensor, rows: Sequence[Sequence[int]], biases: Biases) -> Tensor:
    """Add each bias to the last token of its sequence, in rows that end with the tokens before."""
    total = torch.zeros_like(logits)
    ids, values = biases.single
    total[:, ids.to(logits.device)] = values.to(logits)
    for (*start, last), bias in biases.longer.items():
        for n, row in enumerate(rows):
            if list(row[-len(start) :]) == start:
                total[n, last] += bias
    return logits + total


def only(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Exclude all tokens but these; their logits become 0."""
    out = torch.full_like(logits, -torch.inf)
    out[:, list(ids)] = 0
    return out


def without(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Exclude these tokens."""
    out = logits.clone()
    out[:, list(ids)] = -torch.inf
    return out


def favor_ends(logits: Tensor, ends: Sequence[int], factor: float) -> Tensor:
    """Add `|logit| * (factor - 1)` to the end tokens; an excluded one stays excluded."""
    out, size = logits.clone(), logits[:, list(ends)]
    more = (size.abs() * (factor - 1)).masked_fill(~size.isfinite(), 0.0)
    out[:, list(ends)] = size + more
    return out


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """All constraints of one call, applied in the reference's order.

    `prompt` is the number of tokens before the first new one, padding included, and `max_new` the
    number of new tokens at which all rows end.
    """

    prompt: int = 0
    max_new: int = 0
    ends: Sequence[int] = ()
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    sequence_bias: Any = None  # [[ids, bias], …], or {ids: bias}
    bad_words_ids: Sequence[Sequence[int]] | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    exponential_decay_length_penalty: Sequence[float] | None = None  # from which token, by what
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    renormalize_logits: bool = False

    def __post_init__(self) -> None:
        for name, expected in _problems(self):
            raise UsageError(f"{name}={getattr(self, name)!r}: expected {expected}")

    def check_ids(self, vocab: int) -> None:
        """Refuse to bias or force ids outside the vocabulary; suppressing one has no effect."""
        forced = {"forced_bos_token_id": _ids(self.forced_bos_token_id)}
        forced["forced_eos_token_id"] = _ids(self.forced_eos_token_id)
        forced["sequence_bias"] = self._biases.ids
        forced["bad_words_ids"] = [id for ids in self.bad_words_ids or () for id in ids]
        for name, ids in forced.items():
            if wrong := [id for id in ids if not 0 <= id < vocab]:
                raise TokenIdError(f"{name}: {wrong[0]} is outside 0..{vocab - 1}")

    @cached_property
    def _biases(self) -> Biases:
        biases = self.sequence_bias or {}
        pairs = biases.items() if isinstance(biases, Mapping) else biases
        return Biases({tuple(ids): float(bias) for ids, bias in pairs})

    @cached_property
    def _banned(self) -> Biases:
        """The bad words; an end token is never one."""
        words, ends = map(tuple, self.bad_words_ids or ()), {(end,) for end in self.ends}
        return Biases({ids: -torch.inf for ids in words if ids not in ends})

    @property
    def reads_rows(self) -> bool:
        """Whether `apply` needs the tokens of each row."""
        return bool(
            self.repetition_penalty != 1
            or self.no_repeat_ngram_size
            or self._biases.longer
            or self._banned.longer
        )

    def apply(self, logits: Tensor, rows: Sequence[Sequence[int]], new: int) -> Tensor:
        """(b, v) logits in fp32 after `new` tokens; `rows` are each row's real tokens so far."""
        if self._biases.ids:
            logits = sequence_bias(logits, rows, self._biases)
        if self.repetition_penalty != 1:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for n, row in enumerate(rows):
                seen[n, list(set(row))] = True
            logits = repetition_penalty(logits, seen, self.repetition_penalty)
        if self.no_repeat_ngram_size:
            logits = no_repeat_ngram(logits, rows, self.no_repeat_ngram_size)
        if self._banned.ids:
            logits = sequence_bias(logits, rows, self._banned)
        return self._by_length(logits, new)

    def _by_length(self, logits: Tensor, new: int) -> Tensor:
        vocab, length = logits.shape[-1], self.prompt + new
        if length < self.min_length or new < (self.min_new_tokens or 0):
            logits = without(logits, self.ends)
        if self.forced_bos_token_id is not None and length == 1:
            logits = only(logits, [self.forced_bos_token_id])
        if (last := _ids(self.forced_eos_token_id)) and new == self.max_new - 1:
            logits = only(logits, last)
        if self.exponential_decay_length_penalty is not None and self.ends:
            start, factor = self.exponential_decay_length_penalty
            if new > start:
                logits = favor_ends(logits, self.ends, factor ** (new - start))
        if self.suppress_tokens:
            logits = without(logits, _within(self.suppress_tokens, vocab))
        # the first token that is not forced
        first = int(self.prompt == 1 and self.forced_bos_token_id is not None)
        if self.begin_suppress_tokens and new == first:
            logits = without(logits, _within(self.begin_suppress_tokens, vocab))
        return logits.log_softmax(dim=-1) if self.renormalize_logits else logits


def _within(ids: Iterable[int], vocab: int) -> list[int]:
    return [id for id in ids if 0 <= id < vocab]


def _ids(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _problems(c: Constraints) -> Iterable[tuple[str, str]]:
    """(field, the expected value) of each field that has another."""
    penalty = c.repetition_penalty
    if not _is_number(penalty) or not 0 < penalty < float("inf"):
        yield "repetition_penalty", "a number above 0"
    for name in ("no_repeat_ngram_size", "min_length"):
        if type(getattr(c, name)) is not int or getattr(c, name) < 0:
            yield name, "a whole number, 0 or more"
    if c.min_new_tokens is not None and (type(c.min_new_tokens) is not int or c.min_new_tokens < 0):
        yield "min_new_tokens", "a whole number, 0 or more"
    if c.forced_bos_token_id is not None and type(c.forced_bos_token_id) is not int:
        yield "forced_bos_token_id", "a token id"
    forced = c.forced_eos_token_id
    if forced is not None and type(forced) is not int and not _are_ids(forced):
        yield "forced_eos_token_id", "a token id, or several"
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        if getattr(c, name) is not None and not _are_ids(getattr(c, name)):
            yield name, "token ids"
    words = c.bad_words_ids
    if words is not None and not (_is_list(words) and all(_are_ids(w) and len(w) for w in words)):
        yield "bad_words_ids", "a list of lists of token ids"
    if not _are_biases(c.sequence_bias):
        yield "sequence_bias", "[[token ids, number], …], or numbers by tuples of token ids"
    decay = c.exponential_decay_length_penalty
    if decay is not None and not (
        _is_list(decay) and len(decay) == 2 and all(map(_is_number, decay)) and decay[1] > 0
    ):
        yield "exponential_decay_length_penalty", "[the token it begins at, a factor above 0]"
    if type(c.renormalize_logits) is not bool:
        yield "renormalize_logits", "True or False"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_list(value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)


def _are_ids(value: Any) -> bool:
    return _is_list(value) and all(type(id) is int for id in value)


def _are_biases(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, Mapping):
        if not _is_list(value) or not all(_is_list(pair) and len(pair) == 2 for pair in value):
            return False
        value = [tuple(pair) for pair in value]
    pairs = value.items() if isinstance(value, Mapping) else value
    return all(_are_ids(ids) and len(ids) and _is_number(bias) for ids, bias in pairs)
