"""`zoo tokenize`, `score`, `fill`, `embed`, `generate` and `chat`: a model at work on a text."""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from typing import Annotated, Any

import zoo
from zoo.cli.command import Commands
from zoo.cli.exit_codes import ExitCode
from zoo.cli.options import (
    Json,
    Loading,
    Reading,
    Ref,
    SamplingOptions,
    Special,
    among,
    argument,
    exclusive,
    one_of,
    option,
    text,
    whole_number,
)
from zoo.cli.output import lines_of, read_text, to_json, visible
from zoo.errors import UsageError
from zoo.terminal import passing, table, unescaped

commands = Commands()
Text = Annotated[str, argument("TEXT", "the text")]


@commands.define("tokenize")
def tokenize(
    ref: Ref, words: Text, reading: Reading, special: Special = False, json: Json = False
) -> int:
    """Print ids and tokens."""
    tokenizer = zoo.tokenizer(ref, **reading.arguments())
    ids = tokenizer.encode(words, special=special)
    tokens = [tokenizer.token(id) for id in ids]
    if json:
        print(to_json({"ids": ids, "tokens": tokens}))
    elif ids:
        rows = [(str(id), visible(token)) for id, token in zip(ids, tokens, strict=True)]
        print(table(rows, right={0}))
    return ExitCode.OK


@commands.define("score")
def score(
    ref: Ref,
    file: Annotated[str, argument("FILE", "the text; - is standard input")],
    loading: Loading,
    window: Annotated[
        int | None,
        option(
            "--window",
            metavar="TOKENS",
            parser=whole_number,
            help="tokens of a window (default: all positions)",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        option(
            "--stride",
            metavar="TOKENS",
            parser=whole_number,
            help="tokens from one window to the next (default: half a window)",
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Print the perplexity of a text."""
    passage = read_text(file)

    def progress(done: int, count: int) -> None:
        passing(f"{done:,} of {count:,} tokens", sys.stderr)

    try:
        model = loading.load(ref)
        result = zoo.perplexity(model, passage, progress=progress, window=window, stride=stride)
    finally:
        passing("", sys.stderr)
    if json:
        print(to_json(result.to_json()))
        return ExitCode.OK
    bits = "unknown" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
    rows = [("tokens", f"{result.tokens:,}"), ("nats a token", f"{result.nll:.4f}")]
    rows += [("perplexity", f"{result.perplexity:.4f}"), ("bits a byte", bits)]
    print(table(rows))
    return ExitCode.OK


@commands.define("fill")
def fill(
    ref: Ref,
    words: Annotated[str, argument("TEXT", 'such as "The capital of [MASK] is"')],
    loading: Loading,
    top: Annotated[
        int,
        option(
            "--top",
            metavar="N",
            parser=whole_number,
            help="print N tokens for each gap (default: 5)",
        ),
    ] = 5,
    json: Json = False,
) -> int:
    """Print the most likely tokens of each gap."""
    gaps = zoo.fill(loading.load(ref), words, top=top)
    if json:
        print(to_json([[guess._asdict() for guess in gap] for gap in gaps]))
        return ExitCode.OK
    for n, gap in enumerate(gaps):
        if len(gaps) > 1:
            print(f"mask {n + 1}")
        print(table([(f"{guess.probability:.4f}", visible(guess.text)) for guess in gap]))
    return ExitCode.OK


@commands.define("embed")
def embed(
    ref: Ref,
    loading: Loading,
    texts: Annotated[list[str] | None, argument("[TEXT]...", "the texts")] = None,
    file: Annotated[
        str | None,
        option(
            "--file",
            metavar="FILE",
            help="embed each line of FILE; - is standard input (default: the TEXTs)",
            parser=text,
        ),
    ] = None,
    pooling: Annotated[
        str | None,
        option(
            "--pooling",
            metavar="HOW",
            help="mean, first, last or max of the tokens' vectors (default: the checkpoint's own, "
            "else mean)",
            parser=one_of("mean", "first", "last", "max"),
            autocompletion=among("mean", "first", "last", "max"),
        ),
    ] = None,
    normalize: Annotated[
        bool, option("--normalize", help="scale vectors to length one (default: off)")
    ] = False,
    truncate: Annotated[
        bool, option("--truncate", help="cut texts that are too long (default: refuse them)")
    ] = False,
    json: Annotated[
        bool, option("--json", help="print a JSON object with its text a line (default: off)")
    ] = False,
) -> int:
    """Print a vector a line."""
    if bool(texts) == bool(file):
        raise UsageError("embed: expected texts or --file FILE, and not both")
    passages = texts or lines_of(read_text(file or ""))
    how: dict[str, Any] = {"pooling": pooling, "normalize": normalize, "truncate": truncate}
    vectors = zoo.embed(loading.load(ref), passages, **how).tolist()
    for passage, vector in zip(passages, vectors, strict=True):
        if json:
            print(to_json({"text": passage, "embedding": vector}, indent=None))
        else:
            print(*(f"{number:.7g}" for number in vector))
    return ExitCode.OK


@commands.define("generate")
def generate(
    ref: Ref,
    prompt: Text,
    sampling: SamplingOptions,
    loading: Loading,
    num_return_sequences: Annotated[
        int | None,
        option(
            "--num-return-sequences",
            metavar="N",
            parser=whole_number,
            help="draw N samples (default: 1)",
        ),
    ] = None,
    beams: Annotated[
        int | None,
        option(
            "--beams",
            metavar="N",
            parser=whole_number,
            help="beam search with N beams (default: off)",
        ),
    ] = None,
    special: Special = False,
    json: Annotated[
        bool,
        option("--json", help="print text, ids, log probabilities and times (default: off)"),
    ] = False,
    stream: Annotated[
        bool,
        option(
            "--stream",
            help="print each piece as soon as it is written (default: on, but for several texts "
            "and --json)",
        ),
    ] = False,
    no_stream: Annotated[
        bool, option("--no-stream", help="print nothing before all is written (default: off)")
    ] = False,
) -> int:
    """Continue a text."""
    exclusive(stream=stream, no_stream=no_stream)
    from zoo.text.generate import continue_texts
    from zoo.text.options import GenerationOptions, resolve_options

    asked = sampling.arguments()
    if num_return_sequences is not None:
        asked["num_return_sequences"] = num_return_sequences
    if beams is not None:
        asked["num_beams"] = beams
    options = GenerationOptions.of(asked)  # before weights are looked at
    if sampling.assistant and options.num_beams > 1:
        raise UsageError("--assistant: beams do not guess ahead")
    model = loading.load(ref)
    asked |= sampling.load_assistant(loading, model)
    options, special_ids = resolve_options(model, asked)
    several = options.num_return_sequences > 1 or options.num_beams > 1
    with redirect_stdout(unescaped(sys.stdout)):  # what a model writes is printed as it is
        if not json and (stream or not (no_stream or several)):
            pieces = zoo.generate(model, prompt, stream=True, special=special, **asked)
            try:
                for piece in pieces:
                    print(piece, end="", flush=True)
            finally:  # of a text that is interrupted too
                print(flush=True)
            return ExitCode.OK
        started = time.perf_counter()
        results = continue_texts(model, [prompt], options, special_ids, special)
        seconds = time.perf_counter() - started
        if json:
            samples = [each._asdict() for each in results]
            report = samples[0] if len(samples) == 1 else {"samples": samples}
            speed = sum(len(each.ids) for each in results) / seconds
            print(to_json({**report, "seconds": seconds, "tokens_per_second": speed}))
        else:
            print("\n---\n".join(each.text for each in results))
    return ExitCode.OK


@commands.define("chat")
def chat(ref: Ref, sampling: SamplingOptions, loading: Loading) -> int:
    """Hold a dialogue."""
    from zoo.cli.chat import talk
    from zoo.text.options import GenerationOptions

    GenerationOptions.of(sampling.arguments())  # before weights are looked at
    model = loading.load(ref)
    with redirect_stdout(unescaped(sys.stdout)):
        talk(model, {**sampling.arguments(), **sampling.load_assistant(loading, model)})
    return ExitCode.OK
