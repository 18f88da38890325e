"""Text from a model: tokens one by one, by what `zoo.text.sampling` makes of the logits.

Every row stands for itself: what it gives does not depend on the others of its batch, nor on the
side where its padding is.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from os import PathLike
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.checkpoints.finite import check_finite, watched
from zoo.checkpoints.provenance import check_sources
from zoo.components.cache import Cache
from zoo.components.heads import LOGITS
from zoo.components.inputs import check_mask
from zoo.components.model import Model
from zoo.errors import (
    ConfigError,
    InputError,
    SequenceTooLong,
    TokenIdError,
    UsageError,
    did_you_mean,
    option,
)
from zoo.text.constraints import Constraints
from zoo.text.generation_config import (
    BEAMS,
    NO_DEFAULTS,
    SAMPLING,
    TOP_K,
    Defaults,
    check_implemented,
    defaults_of,
)
from zoo.text.inference import at_rest, device_of, model_of
from zoo.text.sampling import Dice, Sampling, seeds_of

NEW_TOKENS, NEW_TOKENS_OF_TEXT = 20, 100  # where nothing sets a length; the first as the reference
OUTPUTS = ("return_logprobs", "stream")  # options that say what is given back
IGNORE = "ignore_generation_config"
LARGEST, MOST_ROWS = 3e38, 1 << 12  # of a float; of beams, or samples, of each row
NESTED = "sequence_bias, exponential_decay_length_penalty"
NOT_FROM_FILES = (  # of tokens `Defaults.ends` tells
    *("seed", "assistant_model", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
)


class Generated(NamedTuple):
    """`sequences`: (b, s + n), each prompt with what follows it, then padding.

    `logprobs`: (b, n), each new token's under the model itself; or each row's score of a beam.
    """

    sequences: Tensor
    logprobs: Tensor


class Bounds(NamedTuple):
    """Where the texts of one call begin and end: as asked, or as the checkpoint says."""

    eos: frozenset[int]
    pad: int  # behind a row that has ended: anything will do
    start: int | None


# --- one step ------------------------------------------------------------------------------------


def check_writes(model: Model) -> None:
    """Refuses a model that gives no logits of what comes next."""
    if "cache" not in inspect.signature(model.forward).parameters:
        name = model.architecture or type(model).__module__.rpartition(".")[2]
        raise UsageError(f"{name} is an encoder: it fills gaps and writes no text")
    if model.config.head not in LOGITS:
        raise UsageError(f"a head {model.config.head!r} writes no text; load it with head='lm'")


class Runner:
    """A model and all that it was given so far; it answers with (b, v) logits of what follows.

    Rows lie with their padding on the left, whatever side it was on. The cache has room for `room`
    tokens beyond the prompt; without one every step computes all of it again. An answer apart
    begins with `start`.
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
        self.row: int | None = None  # of a batch, where it holds that one alone
        self.question: dict[str, Tensor | None] = {}
        check_writes(model)
        real = _real(input_ids, attention_mask)
        self.ids, self.mask = left_aligned(input_ids, real)
        if answers(model):
            if start is None:
                told = "missing, and no pad_token_id either; say it in generation_config.json"
                raise ConfigError(f"decoder_start_token_id: {told}")
            self.question = {"input_ids": self.ids, "attention_mask": self.mask}
            self.ids = torch.full_like(self.ids[:, :1], start)
            self.mask = None
        self._check(room, use_cache)
        self.cache = Cache(self.ids.shape[1] + room) if use_cache else None
        self.fresh = True

    def _check(self, room: int, use_cache: bool) -> None:
        config, length = self.model.config, self.ids.shape[1] + room - 1
        limit = config.limit_cached if use_cache else config.limit
        if limit is not None and length > limit and not self.question:
            told = "fewer max_new_tokens, or a shorter prompt"
            if config.limit is None:
                told = "use_cache=False goes on beyond them"
            elif hasattr(config, "extrapolate"):
                told += ", or config={'extrapolate': True}"
            raise SequenceTooLong(f"{length} tokens, and the model has {limit} positions: {told}")

    @property
    def rows(self) -> list[list[int]]:
        """The real tokens of each row up to now."""
        if self.mask is None:
            return self.ids.tolist()
        return [ids[mask.bool()].tolist() for ids, mask in zip(self.ids, self.mask, strict=True)]

    def feed(self, tokens: Tensor | None = None, last: int = 1) -> Tensor:
        """(b, last, v), after (b, n) tokens more; at first after the prompt."""
        if tokens is not None:
            self.ids = torch.cat((self.ids, tokens), dim=1)
            if self.mask is not None:
                self.mask = torch.cat((self.mask, torch.ones_like(tokens)), dim=1)
        known = 0 if self.cache is None or self.fresh else self.cache.length
        ids = self.ids[:, known:]
        mask = None if self.mask is None else self.mask[:, known:]
        first, self.fresh = self.fresh, False
        try:
            with watched(self.model) if first else nullcontext():
                with _last_only(self.model, last), _without_dropout(self.model):
                    logits: Tensor = self._forward(ids, mask, self.cache)
                each = max(1, len(self.ids) // max(1, self.prompts))
                again = partial(self._forward, self.ids, self.mask, None)
                check_finite(self.model, logits, row=lambda n: self._row(n // each), again=again)
            return logits
        except BaseException:
            if self.cache is not None:  # places were taken that not every layer has filled
                self.cache.cut(min(known, self.cache.length))
            raise

    def _forward(self, ids: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        if self.question:
            names: dict[str, Any] = {"decoder_input_ids": ids, **self.question}
            return self.model(**names, decoder_attention_mask=mask, cache=cache)
        return self.model(ids, mask, cache=cache)

    def _row(self, n: int) -> int | None:
        """The number that a prompt has in the batch; none where it is alone."""
        return n if self.prompts > 1 else self.row

    def cut(self, length: int) -> None:
        """Forget all tokens but the first `length` of each row."""
        self.ids = self.ids[:, :length]
        self.mask = None if self.mask is None else self.mask[:, :length]
        if self.cache is not None:
            self.cache.cut(min(length, self.cache.length))

    def resume(self, ids: Tensor) -> int:
        """(1, s) in the place of what was there. How many first tokens need no computing again."""
        both = min(self.ids.shape[1], ids.shape[1] - 1)  # the last one's logits are wanted
        differs = (self.ids[0, :both] != ids[0, :both]).nonzero()
        self.cut(int(differs[0]) if len(differs) else both)
        self.ids = ids
        return 0 if self.cache is None else self.cache.length

    def take(self, rows: Tensor) -> None:
        """These rows in the place of those that were there."""
        self.ids = self.ids[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        self.question = {k: None if x is None else x[rows] for k, x in self.question.items()}
        if self.cache is not None:
            self.cache.take(rows)


def _real(ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.numel() == 0:
        raise InputError(
            "input_ids: expected (batch, sequence) of token ids; for text zoo.generate"
        )
    return check_mask(attention_mask, ids)


def left_aligned(ids: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Each row's real tokens in their order, at the end; the mask is None where all are real."""
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
    """Logits of the last tokens alone: those of a whole prompt can be larger than the model."""
    head: Any = model.head
    owner = get_ident()  # another thread may be reading with the same model

    def cut(_: Any, args: tuple[Tensor]) -> tuple[Tensor] | None:
        return (args[0][:, -count:],) if get_ident() == owner else None

    hook = head.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        hook.remove()


# --- many steps ----------------------------------------------------------------------------------


def _numbers_in(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from _numbers_in([*value.values()])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _numbers_in(each)
    else:
        yield value


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to go on: greedily, unless there is a temperature or another sign of sampling.

    What a call does not set, its checkpoint's generation_config.json does, as in the reference.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None  # of prompt and new tokens together; max_new_tokens goes before
    min_length: int = 0
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    sequence_bias: Any = None  # [[ids, bias], …]: added where the last of the ids would complete it
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    forced_bos_token_id: int | None = None  # after a single token
    forced_eos_token_id: int | Sequence[int] | None = None  # as the last token of the length
    exponential_decay_length_penalty: Sequence[float] | None = None  # from which token, by what
    renormalize_logits: bool = False
    num_return_sequences: int = 1  # of each row, one below the other
    num_beams: int = 1
    length_penalty: float = 1.0  # of beams: their scores are divided by their length to this
    early_stopping: bool | str = False  # once enough beams have ended; "never": if none can win
    seed: int | Sequence[int] | None = None  # or one for each row, which alone decides its samples
    eos_token_id: int | Collection[int] | None = None  # the model's own; []: none
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None  # what an answer begins with
    stop_strings: str | Sequence[str] | None = ()
    use_cache: bool = True
    assistant_model: Model | None = None  # smaller, of the same vocabulary; it guesses ahead
    num_assistant_tokens: int = 5

    def __post_init__(self) -> None:
        self._check_numbers()
        counts = ("max_new_tokens", "max_length", "num_return_sequences", "num_beams")
        for name in (*counts, "num_assistant_tokens"):
            value, unset = getattr(self, name), name in ("max_new_tokens", "max_length")
            if (value is not None or not unset) and (type(value) is not int or value < 1):
                raise UsageError(f"{name}={value!r}: expected a positive number")
        if self.early_stopping not in (True, False, "never"):
            raise UsageError(f"early_stopping={self.early_stopping!r}: True, False or 'never'")
        if type(self.length_penalty) not in (int, float) or not abs(self.length_penalty) <= 20:
            raise UsageError(f"length_penalty={self.length_penalty!r}: a number from -20 to 20")
        if type(self.use_cache) is not bool or self.do_sample not in (None, True, False):
            raise UsageError(
                f"use_cache={self.use_cache!r}, do_sample={self.do_sample!r}: True or False"
            )
        if self.assistant_model is not None and not isinstance(self.assistant_model, Model):
            raise UsageError("assistant_model: expected a model, as zoo.load gives it")
        self.stops  # noqa: B018  its own checks
        self.sampling  # noqa: B018  likewise
        self._constraints()

    def _check_numbers(self) -> None:
        """What arithmetic would raise of itself: words as numbers, and numbers beyond fp32."""
        numbers = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        for name, value in numbers.items():
            if value is not None and type(value) not in (int, float):
                raise UsageError(f"{name}={value!r}: expected a number")
        numbers |= {"repetition_penalty": self.repetition_penalty, "num_beams": self.num_beams}
        more = (self.sequence_bias, self.exponential_decay_length_penalty)
        for name, value in (*numbers.items(), *((NESTED, each) for each in _numbers_in(more))):
            most = 1 << 53 if type(value) is int else LARGEST
            if type(value) in (int, float) and abs(value) > most:
                raise UsageError(f"{name}: a number beyond those that are computed with")
        for name in ("num_beams", "num_return_sequences"):
            if type(value := getattr(self, name)) is int and value > MOST_ROWS:
                raise UsageError(f"{name}={value:.3g}: {MOST_ROWS} at most")
        if not isinstance(self.stop_strings, str | list | tuple | None):
            raise UsageError(f"stop_strings={self.stop_strings!r}: expected words")

    def check_together(self) -> None:
        """What fits alone may contradict something else, from the call or from the checkpoint."""
        if self.do_sample and self.temperature == 0:
            raise UsageError("temperature=0 is greedy, and do_sample=True is not")
        if self.num_beams > 1 and (self.sampled or self.assistant_model or self.stops):
            raise UsageError(
                "num_beams: beams neither sample, nor guess ahead, nor stop at strings"
            )
        if self.num_return_sequences > 1 and not self.sampled and self.num_beams == 1:
            raise UsageError("num_return_sequences: all would be the same; give a temperature")
        if self.num_return_sequences > self.num_beams > 1:
            raise UsageError(f"num_return_sequences: more than {self.num_beams} beams")

    @classmethod
    def of(cls, options: Mapping[str, Any], defaults: Defaults = NO_DEFAULTS) -> Options:
        """The options of a call, each checked for itself; behind them what the checkpoint sets.

        `ignore_generation_config` among them: True, or names of fields that shall not count.
        """
        known = {field.name: field.default for field in fields(cls)}
        for name in options:
            if name not in (*known, IGNORE):
                near = did_you_mean(name, [*known, *OUTPUTS, IGNORE])
                raise UsageError(f"generate: no option {name!r}.{near}")
        own = {
            n: v
            for n, v in options.items()
            if n != IGNORE and (v is not None or known[n] is not None)
        }
        asked = cls(**own)
        if defaults is NO_DEFAULTS:
            return asked
        file = defaults.but(options.get(IGNORE) or False)
        merged = {n: v for n, v in file.items() if n in known and n not in NOT_FROM_FILES} | own
        if "do_sample" not in own:
            greedy = own.get("temperature") == 0
            merged["do_sample"] = not greedy and (asked.sampled or merged.get("do_sample", False))
        if merged["do_sample"] is True and file.get("do_sample") is True:
            merged.setdefault("top_k", TOP_K)
        idle = set[str]() if merged["do_sample"] else {*SAMPLING}
        idle |= {*BEAMS} if merged.get("num_beams", 1) == 1 else set()
        idle |= {"max_new_tokens"} if asked.max_length and not asked.max_new_tokens else set()
        merged = {n: v for n, v in merged.items() if n in own or n not in idle}
        try:
            made = cls(**merged)
            check_implemented(file, made, defaults.where)
            made.check_together()
            return made
        except UsageError as error:
            if not merged.keys() & file.keys() - own.keys():  # it set none of these
                raise
            asked.check_together()
            raise ConfigError(
                f"{defaults.where}: {error}. Arguments override what it sets; "
                f"{option('ignore_generation_config')} leaves all of it aside"
            ) from None

    @property
    def sampled(self) -> bool:
        if self.do_sample is not None:
            return self.do_sample
        return bool(self.temperature or self.top_k) or self.top_p < 1 or self.min_p > 0

    @property
    def sampling(self) -> Sampling:
        warm = 1.0 if self.temperature is None else self.temperature
        names = [field.name for field in fields(Sampling) if field.name != "temperature"]
        given = {name: getattr(self, name) for name in names}
        return Sampling(temperature=warm if self.sampled else 0.0, **given)

    def constraints(self, model: Model, prompt: Tensor, most: int, bounds: Bounds) -> Constraints:
        """Those of a call with this prompt, for `most` new tokens."""
        length = 1 if answers(model) else prompt.shape[1]
        made = self._constraints(prompt=length, most=most, ends=sorted(bounds.eos))
        made.check_ids(model.config.vocab)
        return made

    def _constraints(self, **call: Any) -> Constraints:
        names = {field.name for field in fields(Constraints)} & {f.name for f in fields(self)}
        return Constraints(**{name: getattr(self, name) for name in names}, **call)

    @property
    def stops(self) -> list[str]:
        one = isinstance(self.stop_strings, str)
        stops = [str(self.stop_strings)] if one else list(self.stop_strings or ())
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise UsageError(f"stop_strings={stops!r}: expected words")
        return stops

    def bounds(self, model: Model, defaults: Defaults) -> Bounds:
        known = defaults.ends
        eos: Any = known.eos if self.eos_token_id is None else self.eos_token_id
        eos = eos.tolist() if isinstance(eos, Tensor) else eos
        ends = tuple(eos) if isinstance(eos, Collection) else (eos,)
        _check_ids("eos_token_id", ends, model)
        for name in ("pad_token_id", "decoder_start_token_id"):
            if getattr(self, name) is not None:
                _check_ids(name, (getattr(self, name),), model)
        pads = (self.pad_token_id, known.pad, *ends)
        pad = next((id for id in pads if id is not None and id >= 0), 0)
        start = self.decoder_start_token_id
        return Bounds(frozenset(ends), pad, known.start if start is None else start)

    def most(self, model: Model, input_ids: Tensor) -> int:
        """New tokens at most, where the padding of a batch counts as in the reference."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        prompt = 1 if answers(model) else input_ids.shape[1]
        if self.max_length is not None:
            if self.max_length <= prompt:
                raise SequenceTooLong(
                    f"max_length={self.max_length}: the prompt has {prompt} tokens; "
                    "pass max_new_tokens, which counts new ones alone"
                )
            return self.max_length - prompt
        return up_to_positions(NEW_TOKENS, model, prompt)


def up_to_positions(count: int, model: Model, prompt: int) -> int:
    """So many new tokens, or as many as the model has positions for: one at least."""
    positions = None if answers(model) else getattr(model.config, "positions", None)
    if positions is None or (positions <= prompt and model.config.limit is None):
        return count
    return max(1, min(count, positions - prompt))


def _check_ids(name: str, ids: Collection[Any], model: Model) -> None:
    last = model.config.vocab - 1
    if wrong := [id for id in ids if type(id) is not int or not 0 <= id <= last]:
        raise TokenIdError(f"{name}: {wrong[0]!r} is outside 0..{last}")


def asked_of(model: Model, options: Mapping[str, Any]) -> tuple[Options, Bounds]:
    """What a call asks for, and what its checkpoint says; its files are read once."""
    Options.of(options)  # a mistake of the call before one of the files
    defaults = defaults_of(model)
    asked = Options.of(options, defaults)
    return asked, asked.bounds(model, defaults)


class Step(NamedTuple):
    """A token that a row goes on with, and how likely the model itself had it."""

    row: int
    token: int
    logprob: float


@torch.no_grad()
def generate(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    return_logprobs: bool = False,
    stream: bool = False,
    **options: Any,
) -> Tensor | Generated | Iterator[Step]:
    """(b, s + n): each prompt with what follows, until the model's own end or `max_new_tokens`.

    `options` are those of `zoo.text.generate.Options`; what they leave open, the checkpoint's
    generation_config.json sets, unless `ignore_generation_config=True`. Where neither sets a
    length, 20 new tokens. What an encoder-decoder gives is the answer alone. `stream=True` gives
    an iterator over tokens as they come, each with its row's number.
    """
    check_sources(model)
    asked, bounds = asked_of(model, options)
    if stream:
        if asked.num_beams > 1:
            raise UsageError("stream: beams know their tokens at their end")
        _real(input_ids, attention_mask)
        return steps(model, input_ids, attention_mask, asked, bounds)
    rows, numbers = written(model, input_ids, attention_mask, asked, bounds)
    width = max(map(len, rows))
    full = [row + [bounds.pad] * (width - len(row)) for row in rows]
    new = torch.tensor(full, dtype=input_ids.dtype, device=input_ids.device)
    prompts = input_ids.repeat_interleave(len(rows) // len(input_ids), dim=0)
    if answers(model):
        prompts = torch.full_like(prompts[:, :1], bounds.start or 0)
    sequences = torch.cat((prompts, new), dim=1)
    if not return_logprobs:
        return sequences
    return Generated(sequences, torch.tensor([n + [0.0] * (width - len(n)) for n in numbers]))


@torch.no_grad()
def written(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    asked: Options,
    bounds: Bounds,
) -> tuple[list[list[int]], list[list[float]]]:
    """What each row goes on with, and its logprobs, or [score] of a beam."""
    if asked.num_beams > 1:
        from zoo.text.beams import search

        return search(model, input_ids, attention_mask, asked, bounds)
    _real(input_ids, attention_mask)
    count = len(input_ids) * asked.num_return_sequences
    rows: list[list[int]] = [[] for _ in range(count)]
    numbers: list[list[float]] = [[] for _ in range(count)]
    for row, token, logprob in steps(model, input_ids, attention_mask, asked, bounds):
        rows[row].append(token)
        numbers[row].append(logprob)
    return rows, numbers


def answers(model: Model) -> bool:
    """Whether it reads a question and writes an answer, each apart."""
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


@torch.no_grad()
def steps(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    asked: Options,
    bounds: Bounds,
    runners: Sequence[Runner] = (),
) -> Iterator[Step]:
    """Tokens as they come, until every row has ended.

    `runners`, if they have read some of it before: the model's, and one of the assistant's.
    """
    if asked.assistant_model is not None:
        from zoo.text.speculative import ahead

        yield from ahead(model, input_ids, attention_mask, asked, bounds, runners)
        return
    most = asked.most(model, input_ids)
    samples = asked.num_return_sequences
    if runners:
        (runner,) = runners
    else:
        more: dict[str, Any] = {"use_cache": asked.use_cache, "start": bounds.start}
        runner = Runner(model, input_ids, attention_mask, room=most, **more)
    dice = Dice(seeds_of(asked.seed, len(input_ids), samples))
    rules = asked.constraints(model, input_ids, most, bounds)
    logits = runner.feed()[:, -1]
    if samples > 1:
        each = torch.arange(len(input_ids), device=logits.device).repeat_interleave(samples)
        runner.take(each)
        logits = logits[each]
    running = dict.fromkeys(range(len(logits)))
    stops = {n: Stop(model, asked.stops, runner.rows[n]) for n in running} if asked.stops else {}
    for length in range(1, most + 1):
        rows = runner.rows if rules.reads_rows else []
        chosen = choose(rules.apply(logits.float(), rows, length - 1), asked.sampling, dice)
        likely = logits.float().log_softmax(dim=-1).gather(1, chosen[:, None]).squeeze(1).tolist()
        tokens = chosen.tolist()
        for n in list(running):
            yield Step(n, tokens[n], likely[n])
            if tokens[n] in bounds.eos or (n in stops and stops[n].reached(tokens[n])):
                del running[n]
        if not running or length == most:
            return
        logits = runner.feed(chosen[:, None].to(runner.ids.dtype))[:, -1]


def choose(logits: Tensor, sampling: Sampling, dice: Dice) -> Tensor:
    """(b,) tokens."""
    if sampling.greedy:
        return logits.argmax(dim=-1)
    return dice.choose(sampling.warped(logits))


class Reading:
    """What tokens behind a prompt say. Those that only the model's table has, to make its size
    round, say nothing.
    """

    def __init__(self, model: Model, prompt: Sequence[int], *, skip_special: bool = False) -> None:
        self.stream = model.tokenizer.stream(skip_special=skip_special)
        self.size = model.tokenizer.vocab_size
        for id in prompt:  # lest the first token lose the space before it
            self.put(id)

    def put(self, id: int) -> str:
        return self.stream.put(id) if id < self.size else ""

    def end(self) -> str:
        return self.stream.end()


class Stop:
    """Whether one of some strings has come up in what a row wrote."""

    def __init__(self, model: Model, strings: Sequence[str], prompt: Sequence[int] = ()) -> None:
        self.strings, self.stream, self.text = strings, Reading(model, prompt), ""

    def reached(self, token: int) -> bool:
        self.text += self.stream.put(token)
        return any(s in self.text for s in self.strings)


# --- text ----------------------------------------------------------------------------------------


class Text(NamedTuple):
    """What follows a prompt. `ids` are all that were written, an end or a stop string too."""

    text: str
    ids: list[int]
    logprobs: list[float]


READING = ("head", "config", "ignore_config", "revision")  # options that are zoo.load's


def generate_text(
    model: Model | str | PathLike[str],
    prompt: str | Sequence[str],
    *,
    stream: bool = False,
    special: bool = False,
    return_logprobs: bool = False,
    **options: Any,
) -> Any:
    """What follows a text; of several texts, or samples, a list. Options are those of `m.generate`.

    Where neither they nor the checkpoint's generation_config.json set a length, 100 new tokens.
    Of a reference also head, config, ignore_config and revision, as `zoo.load` has them.

    `stream=True` gives an iterator over pieces of the text, each as soon as its characters are
    whole; `return_logprobs=True` gives `Text`s. Texts end before a stop string. `special`: special
    tokens in the prompt are such.
    """
    model = model_of(model, **{name: options.pop(name) for name in READING if name in options})
    if not isinstance(prompt, Iterable):
        raise InputError(f"expected a text, or several, found {type(prompt).__name__}")
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    asked, bounds = asked_of(model, options)
    if stream:
        if return_logprobs:
            raise UsageError("stream: pieces of text have no logprobs; m.generate streams tokens")
        if len(texts) != 1 or asked.num_return_sequences > 1 or asked.num_beams > 1:
            raise UsageError("stream: one text at a time, sampled once")
        ids, mask = encoded(model, texts, special)
        return pieces_of(model, ids, mask, as_long_as_texts(asked, model, ids), bounds)
    written = complete(model, texts, asked, bounds, special)
    found = written if return_logprobs else [each.text for each in written]
    return found[0] if isinstance(prompt, str) and len(found) == 1 else found


def as_long_as_texts(asked: Options, model: Model, ids: Tensor) -> Options:
    """With the length that a text has where nothing sets one."""
    if asked.max_new_tokens is not None or asked.max_length is not None:
        return asked
    length = up_to_positions(NEW_TOKENS_OF_TEXT, model, ids.shape[1])
    return replace(asked, max_new_tokens=length)


def complete(
    model: Model, texts: Sequence[str], asked: Options, bounds: Bounds, special: bool = False
) -> list[Text]:
    """Each text's samples, one after the other."""
    ids, mask = encoded(model, texts, special)
    asked = as_long_as_texts(asked, model, ids)
    rows, numbers = written(model, ids, mask, asked, bounds)
    found, samples = [], len(rows) // len(texts)
    for n, (row, logprobs) in enumerate(zip(rows, numbers, strict=True)):
        pieces = Pieces(model, asked.stops, prompt_of(model, ids, mask, n // samples))
        text = "".join(pieces.put(id) for id in row if id not in bounds.eos) + pieces.end()
        found.append(Text(text, row, logprobs))
    return found


def prompt_of(model: Model, ids: Tensor, mask: Tensor | None, row: int) -> list[int]:
    """What stands before the text that a row writes: nothing, if that is an answer apart."""
    if answers(model):
        return []
    return (ids[row] if mask is None else ids[row, mask[row].bool()]).tolist()


def encoded(model: Model, texts: Sequence[str], special: bool = False) -> tuple[Tensor, Tensor]:
    device = device_of(model)
    tokenizer = model.tokenizer
    anything = 0 if tokenizer.pad is None and tokenizer.eos is None else None  # behind a mask
    eos = None if answers(model) else False
    batch = tokenizer.batch(texts, padding_side="left", pad=anything, eos=eos, special=special)
    if not batch.input_ids.numel() or not batch.attention_mask.any(dim=1).all():
        raise InputError("an empty text, and this tokenizer puts nothing before it: give a word")
    return batch.input_ids.to(device), batch.attention_mask.to(device)


def cut(text: str, stops: Sequence[str]) -> str:
    """Up to the first stop string."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


class Pieces:
    """Tokens to text as far as it is sure: nothing of a stop string, no half characters."""

    def __init__(self, model: Model, stops: Sequence[str], prompt: Sequence[int] = ()) -> None:
        self.stream, self.stops = Reading(model, prompt, skip_special=True), stops
        self.text, self.said, self.over = "", 0, False

    def put(self, token: int) -> str:
        return self._add(self.stream.put(token), final=False)

    def end(self) -> str:
        return self._add(self.stream.end(), final=True)

    def _add(self, piece: str, final: bool) -> str:
        if self.over:
            return ""
        whole = self.text + piece
        self.text = cut(whole, self.stops)
        self.over = final or self.text != whole
        held = 0 if self.over else max(map(self._begun, self.stops), default=0)
        start, self.said = self.said, max(self.said, len(self.text) - held)
        return self.text[start : self.said]

    def _begun(self, stop: str) -> int:
        """How much of the end may be the beginning of a stop string."""
        longest = min(len(stop) - 1, len(self.text))
        return next((n for n in range(longest, 0, -1) if self.text.endswith(stop[:n])), 0)


def pieces_of(
    model: Model,
    ids: Tensor,
    mask: Tensor | None,
    asked: Options,
    bounds: Bounds,
    runners: Sequence[Runner] = (),
) -> Iterator[str]:
    """The text of one row, piece by piece."""
    pieces = Pieces(model, asked.stops, prompt_of(model, ids, mask, 0))
    for step in steps(model, ids, mask, asked, bounds, runners):
        if step.token not in bounds.eos and (piece := pieces.put(step.token)):
            yield piece
    if piece := pieces.end():
        yield piece
