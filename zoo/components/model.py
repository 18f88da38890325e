"""The base of every model: config, heads, initialization, and the factory users expect."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from zoo.components.config import Config
from zoo.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from contextlib import AbstractContextManager
    from os import PathLike

    from zoo.interpret import Activations
    from zoo.loading import Provenance
    from zoo.lora import Adapter
    from zoo.tokenizers import Tokenizer


class Model(nn.Module):
    """A plain module. On the meta device it has shapes only; elsewhere it is initialized."""

    heads: ClassVar[tuple[str, ...]] = ()
    headless: ClassVar[tuple[str, ...]] = ("none",)  # those of them that give hidden states

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config: Any = config
        self.provenance: Provenance | None = None
        self.architecture = ""  # the registry's name, once loaded through it
        self.adapter: Adapter | None = None  # low-rank factors beside the weights

    @classmethod
    def from_pretrained(cls, ref: str | PathLike[str], **options: Any) -> Self:
        """`zoo.load` that accepts this architecture only."""
        from zoo.loading import load

        return load(ref, expect=cls, **options)  # type: ignore[return-value]

    def save_pretrained(self, directory: str | PathLike[str], **options: Any) -> None:
        """`zoo.save`: a directory that the reference loads as it is."""
        from zoo.saving.save import save

        save(self, directory, **options)

    def load_adapter(self, directory: str | PathLike[str]) -> Self:
        """A LoRA directory of peft's beside the weights; from here on its factors are trained."""
        from zoo.lora import load_adapter

        return load_adapter(self, directory)  # type: ignore[return-value]

    def add_adapter(self, targets: Collection[str], **options: Any) -> Self:
        """A new one, on the reference's modules so called; options: r, alpha, dropout, rslora."""
        from zoo.lora import add_adapter

        return add_adapter(self, targets, **options)  # type: ignore[return-value]

    def merge_adapter(self) -> Self:
        """The adapter added to the weights."""
        from zoo.lora import merge_adapter

        return merge_adapter(self)  # type: ignore[return-value]

    def remove_adapter(self) -> Self:
        """The model as it was before the adapter."""
        from zoo.lora import remove_adapter

        return remove_adapter(self)  # type: ignore[return-value]

    def save_adapter(self, directory: str | PathLike[str], **options: Any) -> None:
        """The adapter alone, as a directory that peft loads."""
        from zoo.lora import save_adapter

        save_adapter(self, directory, **options)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Any:
        """Each prompt with what follows it; see `zoo.text.options.GenerationOptions`."""
        from zoo.text.generate import generate

        return generate(self, input_ids, attention_mask, **options)

    def run_with_cache(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        names: str | Iterable[str] = "*",
        **options: Any,
    ) -> tuple[Any, Activations]:
        """Its output, and what flowed by at the places of these names (`zoo.interpret`)."""
        from zoo.interpret import run_with_cache

        return run_with_cache(self, input_ids, attention_mask, names, **options)

    def patch(self, changes: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Within it other values flow inside: `{name: a tensor, or a function of what was}`."""
        from zoo.interpret import patch

        return patch(self, changes)

    def logit_lens(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Any:
        """(layers + 1, b, s, v): what the head says of the stream before and after each block."""
        from zoo.interpret import logit_lens

        return logit_lens(self, input_ids, attention_mask, **options)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The one that lies with the weights; nothing of it is read before."""
        from zoo.tokenizers import read

        if self.provenance is None:
            raise UsageError("a model of no checkpoint has no tokenizer: zoo.tokenizer reads one")
        return read(self.provenance.tokenizer_at)

    @torch.no_grad()
    def initialize(self) -> None:
        """Normal weights, zero biases, unit norms; a padding token's embedding is zero."""
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0, std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if draw := getattr(module, "draw", None):  # what is neither draws its own
                draw(std)
        for module in self.modules():  # last: a tied head has drawn the same weight again
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()

    def finish(self) -> None:
        """To be called at the end of a model's constructor."""
        if not any(p.is_meta for p in self.parameters()):
            self.initialize()


class Linear(nn.Linear):
    """Left as allocated: the model initializes, and a loaded one never needs it."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """Left as allocated, likewise."""

    def reset_parameters(self) -> None:
        pass


__all__ = ["Config", "Embedding", "Linear", "Model"]
