"""`generate`: continue prompts token by token, by greedy search, sampling, beams or speculation.

Every row is independent: its tokens depend neither on the other rows of its batch nor on the side
of its padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.checkpoints.provenance import check_sources
from zoo.components.model import Model
from zoo.errors import InputError, UsageError
from zoo.text.beams import beam_search
from zoo.text.inference import device_of, is_encoder_decoder, model_of
from zoo.text.options import (
    GenerationOptions,
    SpecialIds,
    keyword,
    resolve_options,
    show_options,
    within_positions,
)
from zoo.text.pieces import StopStrings, TextPieces
from zoo.text.runner import NewToken, Runner, check_prompt
from zoo.text.sampling import RowGenerators, Sampling, seeds_of
from zoo.text.speculative import speculate

NEW_TOKENS_OF_TEXT = 100  # where nothing sets a length
LOADING = ("head", "config", "ignore_config", "revision")  # options that are zoo.load's


class Generated(NamedTuple):
    """`sequences`: (b, s + n), each prompt with its new tokens, then padding.

    `logprobs`: (b, n), of each new token under the model itself; of beams (b, 1), their scores.
    """

    sequences: Tensor
    logprobs: Tensor


class Text(NamedTuple):
    """The text that continues a prompt. `ids` include an end token or the stop string's tokens."""

    text: str
    ids: list[int]
    logprobs: list[float]


@show_options()
@torch.no_grad()
def generate(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    return_logprobs: bool = False,
    stream: bool = False,
    **options: Any,
) -> Tensor | Generated | Iterator[NewToken]:
    """Continue each row of token ids, until the model's own end or `max_new_tokens`.

    Options that the call leaves open come from the checkpoint's generation_config.json. Where
    neither sets a length, 20 new tokens.

    Args:
        model: a decoder or an encoder-decoder with a language-modelling head.
        input_ids: (b, s) token ids.
        attention_mask: (b, s), 1 at real tokens and 0 at padding, on either side.
        return_logprobs: return `Generated`, with each new token's log-probability.
        stream: return an iterator over `NewToken`s, each with its row's number.
        **options: as `zoo.text.options.GenerationOptions` describes them, and
            `ignore_generation_config`: True, or the names of fields to ignore.

    Returns:
        (b, s + n): each prompt with its new tokens, then padding; of an encoder-decoder the
        answer only. With `num_return_sequences`, a row's samples are below each other.

    Raises:
        UsageError: an option is unknown, out of range, or contradicts another.
        InputError: `input_ids` or `attention_mask` are not (b, s).
        ConfigError: generation_config.json asks for something that is not implemented.
        SequenceTooLong: the model has fewer positions.

    Example:
        >>> model = zoo.load("tiny-gpt2")
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> model.generate(ids, max_new_tokens=4, eos_token_id=[]).shape
        torch.Size([1, 7])
        >>> out = model.generate(ids, max_new_tokens=4, top_p=0.9, seed=0, return_logprobs=True)
        >>> bool((out.logprobs <= 0).all())
        True
    """
    check_sources(model)
    resolved, special = resolve_options(model, options)
    if stream:
        if resolved.num_beams > 1:
            raise UsageError("stream: beam search knows its tokens only at the end; num_beams=1")
        check_prompt(input_ids, attention_mask)
        return new_tokens(model, input_ids, attention_mask, resolved, special)
    rows, numbers = token_rows(model, input_ids, attention_mask, resolved, special)
    width = max(map(len, rows))
    full = [row + [special.pad] * (width - len(row)) for row in rows]
    new = torch.tensor(full, dtype=input_ids.dtype, device=input_ids.device)
    prompts = input_ids.repeat_interleave(len(rows) // len(input_ids), dim=0)
    if is_encoder_decoder(model):
        prompts = torch.full_like(prompts[:, :1], special.start or 0)
    sequences = torch.cat((prompts, new), dim=1)
    if not return_logprobs:
        return sequences
    return Generated(sequences, torch.tensor([n + [0.0] * (width - len(n)) for n in numbers]))


@show_options(
    keyword("head", None, "str | None"),
    keyword("config", None, "Mapping[str, Any] | None"),
    keyword("ignore_config", (), "bool | Collection[str]"),
    keyword("revision", None, "str | None"),
)
def generate_text(
    model: Model | str | PathLike[str],
    prompt: str | Sequence[str],
    *,
    stream: bool = False,
    special: bool = False,
    return_logprobs: bool = False,
    **options: Any,
) -> Any:
    """Continue a text, or several.

    Options that the call leaves open come from the checkpoint's generation_config.json. Where
    neither sets a length, 100 new tokens.

    Args:
        model: a model, or a reference that `zoo.load` loads.
        prompt: one text, or several.
        stream: return an iterator over pieces of the text, each as soon as it is final.
        special: read special tokens in the prompt as such, not as text.
        return_logprobs: return `Text`s, with ids and log-probabilities.
        **options: as `zoo.text.options.GenerationOptions` describes them,
            `ignore_generation_config`, and of a reference `head`, `config`, `ignore_config` and
            `revision` of `zoo.load`.

    Returns:
        The text after the prompt, up to a stop string; of several prompts or samples, a list.

    Raises:
        UsageError: an option is unknown, out of range, or contradicts another.
        InputError: the prompt is no text, or has no tokens.
        ConfigError: generation_config.json asks for something that is not implemented.
        SequenceTooLong: the model has fewer positions.

    Example:
        >>> model = zoo.load("tiny-gpt2")
        >>> text = zoo.generate(model, "abc", max_new_tokens=5)
        >>> "".join(zoo.generate(model, "abc", max_new_tokens=5, stream=True)) == text
        True
        >>> len(zoo.generate(model, ["abc", "de"], max_new_tokens=5, temperature=0.8, seed=1))
        2
    """
    model = model_of(model, **{name: options.pop(name) for name in LOADING if name in options})
    if not isinstance(prompt, Iterable):
        raise InputError(f"expected a text, or several, found {type(prompt).__name__}")
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    resolved, ids_of_call = resolve_options(model, options)
    if stream:
        if return_logprobs:
            raise UsageError(
                "stream: pieces of text have no log-probabilities; m.generate streams tokens"
            )
        if len(texts) != 1 or resolved.num_return_sequences > 1 or resolved.num_beams > 1:
            raise UsageError("stream: expected one text, with one sample of it")
        ids, mask = encode_prompts(model, texts, special)
        return text_pieces(model, ids, mask, with_text_length(resolved, model, ids), ids_of_call)
    written = continue_texts(model, texts, resolved, ids_of_call, special)
    result = written if return_logprobs else [each.text for each in written]
    return result[0] if isinstance(prompt, str) and len(result) == 1 else result


# --- tokens --------------------------------------------------------------------------------------


@torch.no_grad()
def token_rows(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    special: SpecialIds,
) -> tuple[list[list[int]], list[list[float]]]:
    """The new tokens of each row, and their log-probabilities; of a beam [its score]."""
    if options.num_beams > 1:
        return beam_search(model, input_ids, attention_mask, options, special)
    check_prompt(input_ids, attention_mask)
    count = len(input_ids) * options.num_return_sequences
    rows: list[list[int]] = [[] for _ in range(count)]
    numbers: list[list[float]] = [[] for _ in range(count)]
    for row, token, logprob in new_tokens(model, input_ids, attention_mask, options, special):
        rows[row].append(token)
        numbers[row].append(logprob)
    return rows, numbers


@torch.no_grad()
def new_tokens(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    special: SpecialIds,
    runners: Sequence[Runner] = (),
) -> Iterator[NewToken]:
    """Generate token by token, until every row has ended.

    `runners` may have read some of the tokens before: the model's, and one of the assistant's.
    """
    if options.assistant_model is not None:
        yield from speculate(model, input_ids, attention_mask, options, special, runners)
        return
    max_new = options.max_new(model, input_ids)
    samples = options.num_return_sequences
    if runners:
        (runner,) = runners
    else:
        more: dict[str, Any] = {"use_cache": options.use_cache, "start": special.start}
        runner = Runner(model, input_ids, attention_mask, room=max_new, **more)
    generators = RowGenerators(seeds_of(options.seed, len(input_ids), samples))
    rules = options.constraints(model, input_ids, max_new, special)
    logits = runner.feed()[:, -1]
    if samples > 1:
        each = torch.arange(len(input_ids), device=logits.device).repeat_interleave(samples)
        runner.select_rows(each)
        logits = logits[each]
    running = dict.fromkeys(range(len(logits)))
    stops: dict[int, StopStrings] = {}
    if options.stops:
        stops = {n: StopStrings(model, options.stops, runner.rows[n]) for n in running}
    for length in range(1, max_new + 1):
        rows = runner.rows if rules.reads_rows else []
        allowed = rules.apply(logits.float(), rows, length - 1)
        chosen = choose(allowed, options.sampling, generators)
        likely = logits.float().log_softmax(dim=-1).gather(1, chosen[:, None]).squeeze(1).tolist()
        tokens = chosen.tolist()
        for n in list(running):
            yield NewToken(n, tokens[n], likely[n])
            if tokens[n] in special.eos or (n in stops and stops[n].reached(tokens[n])):
                del running[n]
        if not running or length == max_new:
            return
        logits = runner.feed(chosen[:, None].to(runner.ids.dtype))[:, -1]


def choose(logits: Tensor, sampling: Sampling, generators: RowGenerators) -> Tensor:
    """(b,) tokens: the most likely ones, or drawn from the warped distribution."""
    if sampling.greedy:
        return logits.argmax(dim=-1)
    return generators.choose(sampling.warp(logits))


# --- text ----------------------------------------------------------------------------------------


def with_text_length(options: GenerationOptions, model: Model, ids: Tensor) -> GenerationOptions:
    """The options with the length that a text has where nothing sets one."""
    if options.max_new_tokens is not None or options.max_length is not None:
        return options
    length = within_positions(NEW_TOKENS_OF_TEXT, model, ids.shape[1])
    return replace(options, max_new_tokens=length)


def continue_texts(
    model: Model,
    texts: Sequence[str],
    options: GenerationOptions,
    special_ids: SpecialIds,
    special: bool = False,
) -> list[Text]:
    """Each text's samples, one after the other."""
    ids, mask = encode_prompts(model, texts, special)
    options = with_text_length(options, model, ids)
    rows, numbers = token_rows(model, ids, mask, options, special_ids)
    out, samples = [], len(rows) // len(texts)
    for n, (row, logprobs) in enumerate(zip(rows, numbers, strict=True)):
        pieces = TextPieces(model, options.stops, prompt_ids(model, ids, mask, n // samples))
        text = "".join(pieces.put(id) for id in row if id not in special_ids.eos) + pieces.end()
        out.append(Text(text, row, logprobs))
    return out


def prompt_ids(model: Model, ids: Tensor, mask: Tensor | None, row: int) -> list[int]:
    """The real tokens before a row's text; none for an encoder-decoder, whose answer is apart."""
    if is_encoder_decoder(model):
        return []
    return (ids[row] if mask is None else ids[row, mask[row].bool()]).tolist()


def encode_prompts(
    model: Model, texts: Sequence[str], special: bool = False
) -> tuple[Tensor, Tensor]:
    """(ids, mask) of texts, padded on the left, on the model's device."""
    device = device_of(model)
    tokenizer = model.tokenizer
    pad = 0 if tokenizer.pad is None and tokenizer.eos is None else None  # masked: any id will do
    eos = None if is_encoder_decoder(model) else False
    batch = tokenizer.batch(texts, padding_side="left", pad=pad, eos=eos, special=special)
    if not batch.input_ids.numel() or not batch.attention_mask.any(dim=1).all():
        raise InputError(
            "an empty text has no tokens, and this tokenizer puts none before it; "
            "expected at least one word"
        )
    return batch.input_ids.to(device), batch.attention_mask.to(device)


def text_pieces(
    model: Model,
    ids: Tensor,
    mask: Tensor | None,
    options: GenerationOptions,
    special: SpecialIds,
    runners: Sequence[Runner] = (),
) -> Iterator[str]:
    """The text that continues one row, piece by piece."""
    pieces = TextPieces(model, options.stops, prompt_ids(model, ids, mask, 0))
    for new in new_tokens(model, ids, mask, options, special, runners):
        if new.token not in special.eos and (piece := pieces.put(new.token)):
            yield piece
    if piece := pieces.end():
        yield piece
