"""The decoding step: a model, its KV cache and the rows of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.checkpoints.finite import check_finite, watched
from zoo.components.cache import Cache
from zoo.components.heads import LOGITS
from zoo.components.inputs import check_mask
from zoo.components.model import Model
from zoo.errors import ConfigError, InputError, SequenceTooLong, UsageError
from zoo.text.inference import at_rest, is_encoder_decoder


class NewToken(NamedTuple):
    """The next token of a row, and its log-probability under the model itself."""

    row: int
    token: int
    logprob: float


class Runner:
    """A model and all tokens that it has read; each step returns the logits of the next ones.

    Rows are aligned so that their padding is on the left, whatever side it was on. The cache has
    room for `room` tokens beyond the prompt; without a cache every step computes everything again.
    An encoder-decoder's answer begins with `start`.
    """

    def __init__(
        self,
        model: Model,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        room: int,
        use_cache: bool = True,
        start: int | None = None,
    ) -> None:
        self.model, self.prompts = model, len(input_ids) if isinstance(input_ids, Tensor) else 0
        self.row: int | None = None  # its number in the batch, where it runs this row alone
        self.encoder_inputs: dict[str, Tensor | None] = {}
        check_can_generate(model)
        real = check_prompt(input_ids, attention_mask)
        self.ids, self.mask = left_align(input_ids, real)
        if is_encoder_decoder(model):
            if start is None:
                raise ConfigError(
                    "decoder_start_token_id: missing, and pad_token_id too; set it in "
                    "generation_config.json"
                )
            self.encoder_inputs = {"input_ids": self.ids, "attention_mask": self.mask}
            self.ids = torch.full_like(self.ids[:, :1], start)
            self.mask = None
        self._check_length(room, use_cache)
        self.cache = Cache(self.ids.shape[1] + room) if use_cache else None
        self.fresh = True

    def _check_length(self, room: int, use_cache: bool) -> None:
        config, length = self.model.config, self.ids.shape[1] + room - 1
        limit = config.limit_cached if use_cache else config.limit
        if limit is not None and length > limit and not self.encoder_inputs:
            advice = "fewer max_new_tokens, or a shorter prompt"
            if config.limit is None:
                advice = "use_cache=False goes on beyond them"
            elif hasattr(config, "extrapolate"):
                advice += ", or config={'extrapolate': True}"
            raise SequenceTooLong(f"{length} tokens, and the model has {limit} positions: {advice}")

    @property
    def rows(self) -> list[list[int]]:
        """The real tokens of each row up to now."""
        if self.mask is None:
            return self.ids.tolist()
        return [ids[mask.bool()].tolist() for ids, mask in zip(self.ids, self.mask, strict=True)]

    def feed(self, tokens: Tensor | None = None, last: int = 1) -> Tensor:
        """(b, last, v) logits after (b, n) more tokens; the first call reads the prompt."""
        if tokens is not None:
            self.ids = torch.cat((self.ids, tokens), dim=1)
            if self.mask is not None:
                self.mask = torch.cat((self.mask, torch.ones_like(tokens)), dim=1)
        cached = 0 if self.cache is None or self.fresh else self.cache.length
        ids = self.ids[:, cached:]
        mask = None if self.mask is None else self.mask[:, cached:]
        first, self.fresh = self.fresh, False
        try:
            with watched(self.model) if first else nullcontext():
                with _last_only(self.model, last), _without_dropout(self.model):
                    logits: Tensor = self._forward(ids, mask, self.cache)
                each = max(1, len(self.ids) // max(1, self.prompts))
                again = partial(self._forward, self.ids, self.mask, None)
                row = lambda n: self._prompt_number(n // each)  # noqa: E731
                check_finite(self.model, logits, row=row, again=again)
            return logits
        except BaseException:
            if self.cache is not None:  # it has room for tokens that not every layer has stored
                self.cache.cut(min(cached, self.cache.length))
            raise

    def _forward(self, ids: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        if self.encoder_inputs:
            names: dict[str, Any] = {"decoder_input_ids": ids, **self.encoder_inputs}
            return self.model(**names, decoder_attention_mask=mask, cache=cache)
        return self.model(ids, mask, cache=cache)

    def _prompt_number(self, n: int) -> int | None:
        """The number that a prompt has in the batch; None where it is alone."""
        return n if self.prompts > 1 else self.row

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length` of each row."""
        self.ids = self.ids[:, :length]
        self.mask = None if self.mask is None else self.mask[:, :length]
        if self.cache is not None:
            self.cache.cut(min(length, self.cache.length))

    def resume(self, ids: Tensor) -> int:
        """Replace all tokens by (1, s) ids; return how many of the first ones stay cached."""
        both = min(self.ids.shape[1], ids.shape[1] - 1)  # the last one's logits are needed
        differs = (self.ids[0, :both] != ids[0, :both]).nonzero()
        self.truncate(int(differs[0]) if len(differs) else both)
        self.ids = ids
        return 0 if self.cache is None else self.cache.length

    def select_rows(self, rows: Tensor) -> None:
        """Replace the rows by those of these numbers; a number may occur several times."""
        self.ids = self.ids[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        self.encoder_inputs = {
            k: None if x is None else x[rows] for k, x in self.encoder_inputs.items()
        }
        if self.cache is not None:
            self.cache.take(rows)


def check_can_generate(model: Model) -> None:
    """Refuse a model that has no logits of the next token."""
    if "cache" not in inspect.signature(model.forward).parameters:
        name = model.architecture or type(model).__module__.rpartition(".")[2]
        raise UsageError(
            f"{name} is an encoder and cannot generate text; zoo.fill predicts masked tokens"
        )
    if model.config.head not in LOGITS:
        raise UsageError(
            f"a head {model.config.head!r} cannot generate text; load the model with head='lm'"
        )


def check_prompt(ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Refuse what is no batch of ids; return the mask, True at real tokens, or None."""
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.numel() == 0:
        raise InputError(
            "input_ids: expected (batch, sequence) of token ids; zoo.generate takes text"
        )
    return check_mask(attention_mask, ids)


def left_align(ids: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Move each row's real tokens to its end, in order; the mask is None where all are real."""
    if real is None:
        return ids, None
    order = real.int().argsort(dim=1, stable=True)
    ids, real = ids.gather(1, order), real.gather(1, order)
    width = int(real.sum(dim=1).max())
    ids, real = ids[:, -width:], real[:, -width:]
    return ids, None if real.all() else real.long()


def _without_dropout(model: Model) -> AbstractContextManager[None]:
    return at_rest(model) if model.training else nullcontext()


@contextmanager
def _last_only(model: Model, count: int) -> Iterator[None]:
    """Compute logits of the last tokens only: those of a whole prompt can exceed the model."""
    head: Any = model.head
    owner = get_ident()  # another thread may run the same model

    def cut(_: Any, args: tuple[Tensor]) -> tuple[Tensor] | None:
        return (args[0][:, -count:],) if get_ident() == owner else None

    hook = head.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        hook.remove()
