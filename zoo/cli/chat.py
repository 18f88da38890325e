"""A dialogue at a terminal; at each turn the model reads only what is new."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zoo.checkpoints.provenance import check_sources
from zoo.components.model import Model
from zoo.errors import (
    InputError,
    OutputExists,
    SequenceTooLong,
    TemplateError,
    UsageError,
    ZooError,
)
from zoo.terminal import BOLD, DIM, RED, has_color, paint
from zoo.text.generate import text_pieces
from zoo.text.inference import is_encoder_decoder
from zoo.text.options import resolve_options
from zoo.text.runner import Runner, check_can_generate

HELP = '''\
/reset      forget the dialogue
/save FILE  write it to a file, as JSON
/help       this
A line that ends in \\ goes on in the next one; so do all between two lines of """.
Ctrl-C stops an answer, Ctrl-D leaves.'''
NAMES = {"user": "User", "assistant": "Assistant"}  # where there is no chat template
MAX_NEW_TOKENS, ROOM = 1000, 1024
# what another line can mend: a program that writes to the dialogue goes on after these alone
MENDABLE = (UsageError, InputError, OutputExists, TemplateError)


class Dialogue:
    """Messages, and a cache of what the model has read of them."""

    def __init__(self, model: Model, **options: Any) -> None:
        check_can_generate(model)
        self.model = model
        self.asked, self.special = resolve_options(model, options)
        if is_encoder_decoder(model):
            raise UsageError(f"{model.architecture} answers each question for itself: zoo generate")
        if self.asked.num_beams > 1 or self.asked.num_return_sequences > 1:
            raise UsageError(
                "a dialogue has one answer at a time: num_beams and num_return_sequences are 1"
            )
        if not model.tokenizer.templates:
            stops = (*self.asked.stops, f"\n{NAMES['user']}:")
            self.asked = replace(self.asked, stop_strings=stops)
        self.messages: list[dict[str, str]] = []
        self.runners: dict[int, Runner] = {}
        self.saved: set[Path] = set()

    def answer(self, text: str) -> Iterator[str]:
        """Yield the answer piece by piece; one that is left early is remembered as far as it came.

        Raises:
            InputError: The text holds a special token, or is longer than the model's positions.
            SourceChanged: The model's files changed since it was loaded.
        """
        for model in self._models:  # their files may have changed since the last turn
            check_sources(model)
        tokenizer = self.model.tokenizer
        if tokenizer.templates and (named := [t for t in tokenizer.special_tokens if t in text]):
            raise InputError(f"{named[0]} is a special token, and would end or begin a turn")
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = torch.tensor([self._ids(messages)], device=next(self.model.parameters()).device)
        limit = self._max_new_tokens(ids.shape[1])
        asked, answer = replace(self.asked, max_new_tokens=limit), ""
        runners = [self._runner(n, ids, limit) for n in range(len(self._models))]
        try:
            for piece in text_pieces(self.model, ids, None, asked, self.special, runners):
                piece = piece if answer else piece.lstrip()
                answer += piece
                yield piece
        finally:
            self.messages = [*messages, {"role": "assistant", "content": answer.strip()}]

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        tokenizer = self.model.tokenizer
        if tokenizer.templates:
            return tokenizer.encode(tokenizer.chat(messages), bos=False, eos=False, special=True)
        turns = [f"{NAMES[turn['role']]}: {turn['content']}\n" for turn in messages]
        return tokenizer.encode("".join(turns) + f"{NAMES['assistant']}:", eos=False)

    @property
    def _models(self) -> list[Model]:
        """The model that answers, and the assistant that guesses ahead."""
        return [m for m in (self.model, self.asked.assistant_model) if m is not None]

    def _max_new_tokens(self, length: int) -> int:
        most = self.asked.max_new_tokens or MAX_NEW_TOKENS
        if self.asked.max_length is not None and self.asked.max_new_tokens is None:
            most = self.asked.max_length - length
            if most < 1:
                raise SequenceTooLong(
                    f"the dialogue has {length} tokens, and max_length is {self.asked.max_length}: "
                    "/reset starts over"
                )
        models = self._models
        names = ("the model", "its assistant")[: len(models)]
        for model, name in zip(models, names, strict=True):
            if (limit := model.config.limit_cached) is None:
                continue
            if length > limit:
                raise SequenceTooLong(
                    f"the dialogue has {length} tokens, and {name} {limit} positions: "
                    "/reset starts over"
                )
            most = min(most, limit + 1 - length)
        return most

    def _runner(self, n: int, ids: torch.Tensor, new: int) -> Runner:
        """The model's runner of the turn before, or a larger one where its cache has no room."""
        need, runner = ids.shape[1] + new, self.runners.get(n)
        if runner is not None and runner.cache is not None and need <= runner.cache.size:
            runner.resume(ids)
            return runner
        model = self._models[n]
        limit = model.config.limit_cached
        size = max(2 * need, ROOM) if limit is None else min(max(2 * need, ROOM), limit + 1)
        self.runners[n] = Runner(model, ids, None, room=size - ids.shape[1])
        return self.runners[n]

    def reset(self) -> None:
        """Forget all messages."""
        self.messages, self.runners = [], {}

    def save(self, name: str) -> Path:
        """Write the messages to a file as JSON.

        Raises:
            OutputExists: There is such a file, and this dialogue did not write it.
            InputError: It cannot be written.
        """
        path = Path(name)
        if path.exists() and path.resolve() not in self.saved:
            raise OutputExists(f"{path} is there already; /save to another file")
        text = json.dumps(self.messages, indent=2, ensure_ascii=False)
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; /save to another file") from None
        self.saved.add(path.resolve())
        return path


# --- the terminal --------------------------------------------------------------------------------


def talk(model: Model, options: Mapping[str, Any]) -> None:
    """Answer each line of standard input until it ends.

    A mistake is printed, and the dialogue goes on. Where nobody watches, an error that no other
    line can mend ends it.

    Raises:
        ZooError: Such an error: weights that are not finite, files that changed …
    """
    if sys.stdin is None:
        raise UsageError("chat: standard input is closed, and a dialogue is read from it")
    dialogue, is_terminal = Dialogue(model, **options), sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401  input() then knows arrows and earlier lines

        print(paint("/help tells more, Ctrl-D leaves", DIM, has_color(sys.stdout)))
    while True:
        try:
            text = _read("> " if is_terminal else "", "… " if is_terminal else "")
            if text.strip():
                _turn(dialogue, text)
        except EOFError:
            if is_terminal:
                print()
            return
        except KeyboardInterrupt:
            print(flush=True)
        except ZooError as error:
            if not is_terminal and not isinstance(error, MENDABLE):
                raise
            title = paint("zoo: error:", BOLD + RED, has_color(sys.stderr))
            print(title, error, file=sys.stderr, flush=True)


def _read(prompt: str, more: str) -> str:
    """A line, or several; a text that has begun ends where the input does."""
    text = input(prompt)
    if text.strip() == '"""':
        lines: list[str] = []
        while (line := _next(more)) is not None and line.strip() != '"""':
            lines.append(line)
        return "\n".join(lines)
    while text.endswith("\\"):
        line = _next(more)
        text = text[:-1] if line is None else f"{text[:-1]}\n{line}"
    return text


def _next(prompt: str) -> str | None:
    try:
        return input(prompt)
    except EOFError:
        if prompt:
            print()
        return None


def _turn(dialogue: Dialogue, text: str) -> None:
    word, _, rest = text.strip().partition(" ")
    if word == "/help":
        print(HELP)
    elif word == "/reset":
        dialogue.reset()
    elif word == "/save":
        if not rest:
            raise UsageError("/save FILE: which file?")
        print(f"saved in {dialogue.save(rest.strip())}")
    elif word.startswith("/"):
        raise UsageError(f"{word}: no such command; /help lists them")
    else:
        with _stoppable() as pressed, closing(dialogue.answer(text)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                print(piece, end="", flush=True)
                if pressed:
                    break
        print()
    sys.stdout.flush()


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Ctrl-C is noted, and seen between two tokens; pressed again, it breaks in at once."""
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
