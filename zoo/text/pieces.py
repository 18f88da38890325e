"""Streamed text: tokens become characters as soon as these are complete, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from zoo.components.model import Model


class TokenDecoder:
    """Decode the tokens after a prompt, one by one.

    Ids beyond the tokenizer's vocabulary, which only pad the embedding's size, have no text.
    """

    def __init__(self, model: Model, prompt: Sequence[int], *, skip_special: bool = False) -> None:
        self.stream = model.tokenizer.stream(skip_special=skip_special)
        self.size = model.tokenizer.vocab_size
        for id in prompt:  # or the first token would lose the space before it
            self.put(id)

    def put(self, id: int) -> str:
        """The characters that this token completes."""
        return self.stream.put(id) if id < self.size else ""

    def end(self) -> str:
        """The rest, where the last character is incomplete."""
        return self.stream.end()


class StopStrings:
    """Watch one row for stop strings."""

    def __init__(self, model: Model, strings: Sequence[str], prompt: Sequence[int] = ()) -> None:
        self.strings, self.decoder, self.text = strings, TokenDecoder(model, prompt), ""

    def reached(self, token: int) -> bool:
        """Whether the text contains a stop string after this token."""
        self.text += self.decoder.put(token)
        return any(s in self.text for s in self.strings)


class TextPieces:
    """Turn tokens into text that is final: no part of a stop string, no incomplete character."""

    def __init__(self, model: Model, stops: Sequence[str], prompt: Sequence[int] = ()) -> None:
        self.decoder, self.stops = TokenDecoder(model, prompt, skip_special=True), stops
        self.text, self.written, self.over = "", 0, False

    def put(self, token: int) -> str:
        """The text that is final after this token."""
        return self._add(self.decoder.put(token), final=False)

    def end(self) -> str:
        """The rest, after the last token."""
        return self._add(self.decoder.end(), final=True)

    def _add(self, piece: str, final: bool) -> str:
        if self.over:
            return ""
        whole = self.text + piece
        self.text = before_stop(whole, self.stops)
        self.over = final or self.text != whole
        pending = 0 if self.over else max(map(self._pending, self.stops), default=0)
        start, self.written = self.written, max(self.written, len(self.text) - pending)
        return self.text[start : self.written]

    def _pending(self, stop: str) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = min(len(stop) - 1, len(self.text))
        return next((n for n in range(longest, 0, -1) if self.text.endswith(stop[:n])), 0)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop string."""
    starts = [start for stop in stops if (start := text.find(stop)) >= 0]
    return text[: min(starts)] if starts else text
