"""The options of `generate`: their values, their checks, and what a checkpoint sets for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from inspect import Parameter, signature
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from zoo.components.model import Model
from zoo.errors import (
    ConfigError,
    SequenceTooLong,
    TokenIdError,
    UsageError,
    did_you_mean,
    option,
)
from zoo.text.constraints import Constraints
from zoo.text.generation_config import (
    BEAM_FIELDS,
    NO_DEFAULTS,
    NOT_IMPLEMENTED,
    SAMPLING_FIELDS,
    TOP_K,
    Defaults,
    defaults_of,
)
from zoo.text.inference import is_encoder_decoder
from zoo.text.sampling import Sampling

F = TypeVar("F", bound=Callable[..., Any])

NEW_TOKENS = 20  # where nothing sets a length, as in the reference
OUTPUTS = ("return_logprobs", "stream")  # options of `generate` that choose what it returns
IGNORE = "ignore_generation_config"
MAX_NUMBER, MAX_ROWS = 3e38, 1 << 12  # of a float; of beams, or samples, of each row
NESTED = "sequence_bias, exponential_decay_length_penalty"
# fields of generation_config.json that do not become options: `Defaults.special` has the token ids
NOT_FROM_FILES = (
    *("seed", "assistant_model", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
)


class SpecialIds(NamedTuple):
    """The token ids that begin, end and pad the texts of one call."""

    eos: frozenset[int]
    pad: int  # fills rows that have ended; any id will do
    start: int | None  # the first token of a decoder that has an encoder


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to continue a text: greedily by default, sampling with a temperature, or with beams.

    An option that a call does not set comes from the checkpoint's generation_config.json, as in
    the reference.

    Args:
        max_new_tokens: the number of new tokens at most.
        max_length: prompt and new tokens together; `max_new_tokens` takes precedence.
        min_length: no end before so many tokens, prompt included.
        min_new_tokens: no end before so many new tokens.
        do_sample: True samples, False is greedy; by default any option of sampling turns it on.
        temperature: divides the logits; 0 is greedy.
        top_k: sample from the K most likely tokens.
        top_p: nucleus sampling: from the smallest set of tokens whose probabilities sum to P.
        min_p: sample from tokens with this share of the most likely one's probability.
        typical_p: locally typical sampling, up to this mass.
        epsilon_cutoff: sample from tokens of this probability at least.
        eta_cutoff: the same, with a lower cutoff where the distribution is flat.
        repetition_penalty: above 1, tokens that occurred before are less likely.
        no_repeat_ngram_size: no n-gram of this size occurs twice.
        sequence_bias: `[[ids, bias], …]`, added where the last of the ids would complete them.
        bad_words_ids: sequences of token ids that are not written.
        suppress_tokens: token ids that are never written.
        begin_suppress_tokens: token ids that do not come first.
        forced_bos_token_id: the token after a prompt of one token.
        forced_eos_token_id: the last token, or tokens, of a text of full length.
        exponential_decay_length_penalty: `[start, factor]`: ends become likelier after `start`.
        renormalize_logits: apply log-softmax after all constraints.
        num_return_sequences: samples, or beams, returned for each row, one below the other.
        num_beams: beam search with so many beams.
        length_penalty: a beam's score is divided by its length to this power.
        early_stopping: True stops once enough beams have ended, False when no running beam is
            likely to win, "never" when none can.
        seed: of the sampling; a list has a seed for each row. A row's samples depend on its seed
            alone.
        eos_token_id: ids that end a text, by default the checkpoint's; [] for none.
        pad_token_id: fills rows that have ended, by default the checkpoint's.
        decoder_start_token_id: the first token of an encoder-decoder's answer.
        stop_strings: a text ends before any of these.
        use_cache: False computes the whole sequence at each step, without a KV cache.
        assistant_model: a smaller model of the same vocabulary, for speculative decoding.
        num_assistant_tokens: tokens that the assistant proposes at a time.

    Raises:
        UsageError: an option has a value of the wrong type or range.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
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
    sequence_bias: Any = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    exponential_decay_length_penalty: Sequence[float] | None = None
    renormalize_logits: bool = False
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    seed: int | Sequence[int] | None = None
    eos_token_id: int | Collection[int] | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    stop_strings: str | Sequence[str] | None = ()
    use_cache: bool = True
    assistant_model: Model | None = None
    num_assistant_tokens: int = 5

    def __post_init__(self) -> None:
        self._check_numbers()
        counts = ("max_new_tokens", "max_length", "num_return_sequences", "num_beams")
        for name in (*counts, "num_assistant_tokens"):
            value, unset = getattr(self, name), name in ("max_new_tokens", "max_length")
            if (value is not None or not unset) and (type(value) is not int or value < 1):
                raise UsageError(f"{name}={value!r}: expected a positive number")
        if self.early_stopping not in (True, False, "never"):
            raise UsageError(
                f"early_stopping={self.early_stopping!r}: expected True, False or 'never'"
            )
        if type(self.length_penalty) not in (int, float) or not abs(self.length_penalty) <= 20:
            raise UsageError(
                f"length_penalty={self.length_penalty!r}: expected a number from -20 to 20"
            )
        if type(self.use_cache) is not bool or self.do_sample not in (None, True, False):
            raise UsageError(
                f"use_cache={self.use_cache!r}, do_sample={self.do_sample!r}: "
                "expected True or False"
            )
        if self.assistant_model is not None and not isinstance(self.assistant_model, Model):
            raise UsageError("assistant_model: expected a model, as zoo.load returns it")
        self.stops  # noqa: B018  its own checks
        self.sampling  # noqa: B018  likewise
        self._constraints()

    def _check_numbers(self) -> None:
        """Refuse what arithmetic would fail on: strings for numbers, and numbers beyond fp32."""
        numbers = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        for name, value in numbers.items():
            if value is not None and type(value) not in (int, float):
                raise UsageError(f"{name}={value!r}: expected a number")
        numbers |= {"repetition_penalty": self.repetition_penalty, "num_beams": self.num_beams}
        more = (self.sequence_bias, self.exponential_decay_length_penalty)
        for name, value in (*numbers.items(), *((NESTED, each) for each in _numbers_in(more))):
            most = 1 << 53 if type(value) is int else MAX_NUMBER
            if type(value) in (int, float) and abs(value) > most:
                raise UsageError(f"{name}: expected numbers up to {most:.3g}, found a larger one")
        for name in ("num_beams", "num_return_sequences"):
            if type(value := getattr(self, name)) is int and value > MAX_ROWS:
                raise UsageError(f"{name}={value:.3g}: expected {MAX_ROWS} at most")
        if not isinstance(self.stop_strings, str | list | tuple | None):
            raise UsageError(f"stop_strings={self.stop_strings!r}: expected strings")

    def check_together(self) -> None:
        """Refuse options that contradict each other, from the call or from the checkpoint."""
        if self.do_sample and self.temperature == 0:
            raise UsageError("temperature=0 is greedy, and do_sample=True is not")
        if self.num_beams > 1 and (self.sampled or self.assistant_model or self.stops):
            raise UsageError(
                "num_beams: beam search works neither with sampling, nor with an assistant_model, "
                "nor with stop_strings"
            )
        if self.num_return_sequences > 1 and not self.sampled and self.num_beams == 1:
            raise UsageError(
                "num_return_sequences: greedy sequences would all be the same; set a temperature"
            )
        if self.num_return_sequences > self.num_beams > 1:
            raise UsageError(f"num_return_sequences: more than {self.num_beams} beams")

    @classmethod
    def of(cls, options: Mapping[str, Any], defaults: Defaults = NO_DEFAULTS) -> GenerationOptions:
        """Check the options of a call, and fill in what a checkpoint sets.

        `ignore_generation_config` among them: True, or names of fields that shall not count.
        """
        plain = {field.name: field.default for field in fields(cls)}
        for name in options:
            if name not in (*plain, IGNORE):
                near = did_you_mean(name, [*plain, *OUTPUTS, IGNORE])
                raise UsageError(f"generate: no option {name!r}.{near}")
        own = {
            n: v
            for n, v in options.items()
            if n != IGNORE and (v is not None or plain[n] is not None)
        }
        call = cls(**own)
        if defaults is NO_DEFAULTS:
            return call
        file = defaults.without(options.get(IGNORE) or False)
        merged = {n: v for n, v in file.items() if n in plain and n not in NOT_FROM_FILES} | own
        if "do_sample" not in own:
            greedy = own.get("temperature") == 0
            merged["do_sample"] = not greedy and (call.sampled or merged.get("do_sample", False))
        if merged["do_sample"] is True and file.get("do_sample") is True:
            merged.setdefault("top_k", TOP_K)
        idle = set[str]() if merged["do_sample"] else {*SAMPLING_FIELDS}
        idle |= {*BEAM_FIELDS} if merged.get("num_beams", 1) == 1 else set()
        idle |= {"max_new_tokens"} if call.max_length and not call.max_new_tokens else set()
        merged = {n: v for n, v in merged.items() if n in own or n not in idle}
        try:
            made = cls(**merged)
            _check_implemented(file, made, defaults.source)
            made.check_together()
            return made
        except UsageError as error:
            if not merged.keys() & file.keys() - own.keys():  # it set none of these
                raise
            call.check_together()
            raise ConfigError(
                f"{defaults.source}: {error}. Arguments override what it sets; "
                f"{option('ignore_generation_config')} ignores all of it"
            ) from None

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn; else the most likely one is chosen."""
        if self.do_sample is not None:
            return self.do_sample
        return bool(self.temperature or self.top_k) or self.top_p < 1 or self.min_p > 0

    @property
    def sampling(self) -> Sampling:
        """The warpers of the distribution that tokens are drawn from."""
        temperature = 1.0 if self.temperature is None else self.temperature
        names = [field.name for field in fields(Sampling) if field.name != "temperature"]
        values = {name: getattr(self, name) for name in names}
        return Sampling(temperature=temperature if self.sampled else 0.0, **values)

    def constraints(
        self, model: Model, prompt: Tensor, max_new: int, special: SpecialIds
    ) -> Constraints:
        """The logits processors of a call with this prompt and at most `max_new` new tokens."""
        length = 1 if is_encoder_decoder(model) else prompt.shape[1]
        made = self._constraints(prompt=length, max_new=max_new, ends=sorted(special.eos))
        made.check_ids(model.config.vocab)
        return made

    def _constraints(self, **call: Any) -> Constraints:
        names = {field.name for field in fields(Constraints)} & {f.name for f in fields(self)}
        return Constraints(**{name: getattr(self, name) for name in names}, **call)

    @property
    def stops(self) -> list[str]:
        """`stop_strings` as a list."""
        is_one = isinstance(self.stop_strings, str)
        stops = [str(self.stop_strings)] if is_one else list(self.stop_strings or ())
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise UsageError(f"stop_strings={stops!r}: expected strings that are not empty")
        return stops

    def special_ids(self, model: Model, defaults: Defaults) -> SpecialIds:
        """The call's own ids, else the checkpoint's."""
        preset = defaults.special
        eos: Any = preset.eos if self.eos_token_id is None else self.eos_token_id
        eos = eos.tolist() if isinstance(eos, Tensor) else eos
        ends = tuple(eos) if isinstance(eos, Collection) else (eos,)
        _check_ids("eos_token_id", ends, model)
        for name in ("pad_token_id", "decoder_start_token_id"):
            if getattr(self, name) is not None:
                _check_ids(name, (getattr(self, name),), model)
        pads = (self.pad_token_id, preset.pad, *ends)
        pad = next((id for id in pads if id is not None and id >= 0), 0)
        start = self.decoder_start_token_id
        return SpecialIds(frozenset(ends), pad, preset.start if start is None else start)

    def max_new(self, model: Model, input_ids: Tensor) -> int:
        """The number of new tokens at most; padding of a batch counts, as in the reference."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        prompt = 1 if is_encoder_decoder(model) else input_ids.shape[1]
        if self.max_length is not None:
            if self.max_length <= prompt:
                raise SequenceTooLong(
                    f"max_length={self.max_length}: the prompt has {prompt} tokens; "
                    "set max_new_tokens, which counts new tokens only"
                )
            return self.max_length - prompt
        return within_positions(NEW_TOKENS, model, prompt)


def resolve_options(
    model: Model, options: Mapping[str, Any]
) -> tuple[GenerationOptions, SpecialIds]:
    """Merge the options of a call with the checkpoint's own; its files are read once."""
    GenerationOptions.of(options)  # a mistake in the call before one in the files
    defaults = defaults_of(model)
    merged = GenerationOptions.of(options, defaults)
    return merged, merged.special_ids(model, defaults)


def within_positions(count: int, model: Model, prompt: int) -> int:
    """`count` new tokens, or as many as the model has positions for, but at least one."""
    positions = None if is_encoder_decoder(model) else getattr(model.config, "positions", None)
    if positions is None or (positions <= prompt and model.config.limit is None):
        return count
    return max(1, min(count, positions - prompt))


def show_options(*more: Parameter) -> Callable[[F], F]:
    """Show help() and completion the fields of `GenerationOptions` in place of `**options`."""

    def decorate(function: F) -> F:
        shown = signature(function)
        own = [p for p in shown.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        each = [
            Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields(GenerationOptions)
        ]
        ignore = keyword(IGNORE, False, "bool | Collection[str]")
        everything = [*own, *each, ignore, *more]
        function.__signature__ = shown.replace(parameters=everything)  # type: ignore[attr-defined]
        return function

    return decorate


def keyword(name: str, default: Any, annotation: str) -> Parameter:
    """A keyword-only parameter for `show_options`."""
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _numbers_in(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from _numbers_in([*value.values()])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _numbers_in(each)
    else:
        yield value


def _check_ids(name: str, ids: Collection[Any], model: Model) -> None:
    last = model.config.vocab - 1
    if wrong := [id for id in ids if type(id) is not int or not 0 <= id <= last]:
        raise TokenIdError(f"{name}: {wrong[0]!r} is outside 0..{last}")


def _check_implemented(file: Mapping[str, Any], options: GenerationOptions, source: str) -> None:
    """Refuse fields that change the reference's output and that zoo does not implement."""
    idle = set[str]()
    if not options.sampled:
        idle.update(SAMPLING_FIELDS)
    if options.num_beams == 1:
        idle.update(BEAM_FIELDS)
    if options.sampled or options.num_beams > 1 or file.get("top_k") in (0, 1):
        idle.add("penalty_alpha")  # contrastive search
    if options.assistant_model is None:
        idle.add("assistant_ensemble_weight")
    problems = [
        f"{name}: {value!r}"
        for name, neutral in NOT_IMPLEMENTED.items()
        if name not in idle and (value := file.get(name)) is not None and value not in neutral
    ]
    if problems:
        raise ConfigError(
            "\n  ".join([f"{source}: not implemented, and the reference obeys it:", *problems])
            + f"\nTo generate without: {option('ignore_generation_config')}; in Python the names "
            "of these fields will do",
            problems,
        )
