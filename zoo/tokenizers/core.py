"""The `Tokenizer` class: an engine, special tokens around a text, batches and chat templates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from zoo.errors import InputError, TemplateError, TokenIdError, UsageError, did_you_mean, listing
from zoo.tokenizers.engines import Engine, TextStream

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["left", "right"]


class Batch(NamedTuple):
    """Padded ids and their mask, (b, s) each: `model(**batch._asdict())`."""

    input_ids: Tensor
    attention_mask: Tensor


class Tokenizer:
    """Encode text to ids and decode ids to text. Immutable: threads and copies may share it.

    `bos`, `eos`, `pad`, `unk`, `mask`, `cls` and `sep` are the ids of special tokens, or None.

    Example:
        >>> tokenizer = zoo.tokenizer("tiny-bert")
        >>> ids = tokenizer.encode("the fox")
        >>> ids
        [2, 5, 7, 3]
        >>> tokenizer.decode(ids, skip_special=True)
        'the fox'
    """

    def __init__(
        self,
        engine: Engine,
        *,
        roles: Mapping[str, int] | None = None,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
        padding_side: Side = "right",
        templates: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self._engine, self._roles = engine, dict(roles or {})
        self._before, self._after = list(before), list(after)
        self.padding_side: Side = padding_side
        self.templates = dict(templates or {})
        self.directory = directory

    def __repr__(self) -> str:
        kind = type(self._engine).__name__
        return f"{type(self).__name__}({self.directory or kind}, {self.vocab_size} ids)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    # --- text and ids ---

    def encode(
        self,
        text: str,
        *,
        bos: bool | None = None,
        eos: bool | None = None,
        special: bool = False,
    ) -> list[int]:
        """Encode a text.

        Args:
            text: the text.
            bos: True puts a begin token (bos or cls) first, False none (default: as the checkpoint
                does).
            eos: True puts an end token (eos or sep) last, False none (default: as the checkpoint
                does).
            special: read special tokens in the text as such, not as the characters they are
                written with.

        Returns:
            The token ids.

        Raises:
            InputError: `text` is no text, or half a surrogate pair is in it.
            UsageError: `bos` or `eos` is True, and the tokenizer has no such token.
        """
        _check_text(text)
        ids = self._engine.encode(text, special)
        before = self._around(bos, self._before, ("bos", "cls"), "bos")
        return [*before, *ids, *self._around(eos, self._after, ("eos", "sep"), "eos")]

    def _around(
        self, flag: bool | None, custom: list[int], roles: tuple[str, str], name: str
    ) -> list[int]:
        if flag is None or (flag and custom):
            return custom
        if not flag:
            return []
        if (id := self._roles.get(roles[0], self._roles.get(roles[1]))) is None:
            raise UsageError(f"{name}=True: this tokenizer has no such token")
        return [id]

    def decode(self, ids: int | Iterable[int] | Tensor, *, skip_special: bool = False) -> str:
        """Decode ids. An incomplete character becomes U+FFFD.

        Args:
            ids: one id, or one row of ids.
            skip_special: leave special tokens out.

        Raises:
            InputError: `ids` is no row of ids.
            TokenIdError: an id is outside the vocabulary.
        """
        values: Any = ids.tolist() if hasattr(ids, "tolist") else ids
        if not isinstance(values, int | Iterable) or getattr(ids, "ndim", 1) > 1:
            raise InputError(
                f"expected one row of ids, found {type(ids).__name__}; decode rows one by one"
            )
        numbers = [values] if isinstance(values, int) else list(values)
        for id in numbers:
            self._check(id)
        if skip_special:
            specials = self._engine.specials
            numbers = [id for id in numbers if id not in specials]
        return self._engine.decode(numbers)

    def stream(self, *, skip_special: bool = False) -> TextStream:
        """Decode id by id: the results of `put` and `end` together are that of `decode`."""
        return _Checked(self, self._engine.stream(), skip_special)

    def batch(
        self,
        texts: Sequence[str],
        *,
        padding_side: Side | None = None,
        pad: int | None = None,
        bos: bool | None = None,
        eos: bool | None = None,
        special: bool = False,
    ) -> Batch:
        """Encode several texts, padded to one length.

        Args:
            texts: the texts.
            padding_side: "left" or "right" (default: the checkpoint's).
            pad: the id that pads (default: the pad token, else the end token; the mask hides it).
            bos: as in `encode`.
            eos: as in `encode`.
            special: as in `encode`.

        Returns:
            A `Batch` of ids and mask.

        Raises:
            UsageError: `texts` is one text, or no token can pad.

        Example:
            >>> batch = zoo.tokenizer("tiny-bert").batch(["the fox", "a"])
            >>> batch.attention_mask.tolist()
            [[1, 1, 1, 1], [1, 1, 1, 0]]
        """
        import torch

        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise UsageError(f"expected several texts, found {type(texts).__name__}")
        side = self.padding_side if padding_side is None else padding_side
        if side not in ("left", "right"):
            raise UsageError(f"padding_side={side!r}: expected 'left' or 'right'")
        rows = [self.encode(text, bos=bos, eos=eos, special=special) for text in texts]
        width = max(map(len, rows), default=0)
        if pad is not None:
            self._check(pad)
        elif any(len(row) < width for row in rows):
            pad = self.eos if self.pad is None else self.pad
            if pad is None:
                raise UsageError("rows of several lengths, and no pad token: pass pad=")
        filled, masks = [], []
        for row in rows:
            blank = width - len(row)
            padding, zeros, ones = [pad or 0] * blank, [0] * blank, [1] * len(row)
            filled.append(padding + row if side == "left" else row + padding)
            masks.append(zeros + ones if side == "left" else ones + zeros)
        shape = (len(rows), width)
        ids = torch.tensor(filled, dtype=torch.int64).reshape(shape)
        return Batch(ids, torch.tensor(masks, dtype=torch.int64).reshape(shape))

    def _check(self, id: Any) -> None:
        if type(id) is not int or not 0 <= id < self._engine.size:
            raise TokenIdError(f"token id {id!r} is outside 0..{self._engine.size - 1}")

    # --- the vocabulary ---

    @property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included: all ids are below it."""
        return self._engine.size

    def token(self, id: int) -> str:
        """The token of an id, as the vocabulary writes it: Ġthe, ▁the, ##ing."""
        self._check(id)
        if (text := self._engine.token(id)) is None:
            raise TokenIdError(f"token id {id} has no token in this vocabulary")
        return text

    def id(self, token: str) -> int:
        """The id of a token, as the vocabulary writes it."""
        if (number := self._engine.id(token)) is None:
            raise TokenIdError(f"{token!r} is no token of this vocabulary")
        return number

    def difference(self, other: Tokenizer) -> tuple[int, str | None, str | None] | None:
        """(id, own token, other's token) of the first id that differs, special tokens aside."""
        mine, theirs = self._engine, other._engine
        for id in range(max(mine.size, theirs.size)):
            if id in mine.specials or id in theirs.specials:
                continue
            a, b = (e.token(id) if id < e.size else None for e in (mine, theirs))
            if a != b:
                return id, a, b
        return None

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Every special token with its id, in the order of ids."""
        return {self.token(id): id for id in sorted(self._engine.specials)}

    @property
    def bos(self) -> int | None:
        """The id of the token that begins a text."""
        return self._roles.get("bos")

    @property
    def eos(self) -> int | None:
        """The id of the token that ends a text."""
        return self._roles.get("eos")

    @property
    def pad(self) -> int | None:
        """The id of the padding token."""
        return self._roles.get("pad")

    @property
    def unk(self) -> int | None:
        """The id of the token for unknown text."""
        return self._roles.get("unk")

    @property
    def mask(self) -> int | None:
        """The id of the mask token."""
        return self._roles.get("mask")

    @property
    def cls(self) -> int | None:
        """The id of BERT's first token, [CLS]."""
        return self._roles.get("cls")

    @property
    def sep(self) -> int | None:
        """The id of BERT's separator, [SEP]."""
        return self._roles.get("sep")

    # --- chat ---

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **vars: Any,
    ) -> str:
        """Write messages as the checkpoint's chat template does.

        Encode the result with `encode(text, bos=False, eos=False, special=True)`.

        Args:
            messages: mappings such as `{"role": "user", "content": "Hi"}`.
            add_generation_prompt: end with the beginning of the assistant's turn.
            template: the name of a template, or the text of one.
            **vars: further variables of the template, such as `tools`.

        Returns:
            The text of the whole chat.

        Raises:
            InputError: `messages` is no list of mappings.
            TemplateError: there is no such template, or it refuses the messages.

        Example:
            >>> tokenizer = zoo.tokenizer("tiny-gpt2")
            >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
            >>> tokenizer.chat([{"role": "user", "content": "hi"}], template=template)
            'user: hi'
        """
        from zoo.tokenizers.chat import render

        is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
        if not is_list or not all(isinstance(each, Mapping) for each in messages):
            raise InputError(
                "messages: expected a list of mappings, such as {'role': 'user', 'content': 'Hi'}"
            )
        if not isinstance(template, str | None):
            raise InputError(f"template={template!r}: expected a name, or a template's text")
        name = template or ("tool_use" if self._has_tools(vars) else "default")
        text = self.templates.get(name)
        if text is None and template and ("{" in template):
            text, name = template, "template="
        if text is None:
            names = listing(sorted(self.templates)) or "none"
            near = did_you_mean(name, self.templates)
            raise TemplateError(f"{self!r}: no chat template {name!r}; it has {names}.{near}")
        words = {f"{role}_token": self.token(id) for role, id in self._roles.items()}
        variables = {**words, "tools": None, "documents": None, **vars}
        variables |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        return render(text, variables, f"{self.directory or 'chat template'}: {name}")

    def _has_tools(self, vars: Mapping[str, Any]) -> bool:
        return vars.get("tools") is not None and "tool_use" in self.templates


class _Checked:
    """A stream that refuses unknown ids, and may leave special tokens out."""

    def __init__(self, owner: Tokenizer, stream: TextStream, skip_special: bool) -> None:
        self._owner, self._stream = owner, stream
        self._skipped = owner._engine.specials if skip_special else frozenset()

    def put(self, id: int) -> str:
        self._owner._check(id)
        return "" if id in self._skipped else self._stream.put(id)

    def end(self) -> str:
        return self._stream.end()


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise InputError(f"expected a text, found {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"half a surrogate pair at character {error.start}, so this is no text: "
                "decode it with errors='replace'"
            ) from None
