"""The reference implementation in any dtype, and in fp64 throughout for the true outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.checkpoints.oracle import Oracle, transformers
from zoo.errors import ParityError, listing

Outputs = dict[str, Tensor]

# fields of an output object that are not the model's outputs
_NO_VALUE = (
    "loss",
    "past_key_values",
    "hidden_states",
    "attentions",
    "encoder_last_hidden_state",
)
# options that trade precision for speed; they have no meaning in fp64
_PRECISION_OPTIONS = {"reorder_and_upcast_attn": False}


class Lift(TorchFunctionMode):
    """Replace fp32 by fp64 wherever the reference's code requests it or uses the default dtype."""

    def __enter__(self) -> Lift:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._default)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        raised = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **raised)


class Watch(TorchDispatchMode):
    """Check a lift: raise if an operation returns a float narrower than fp64.

    bf16 is allowed: the model has no bf16 weights, so such a cast is part of its function.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if tensor.dtype not in (torch.float64, torch.bfloat16):
                raise ParityError(f"the fp64 reference computes in {tensor.dtype} in {func}")
        return out


def fuses(reference_class: str) -> bool:
    """Return whether the reference's fused attention equals its eager attention."""
    named = Oracle(reference_class).reference_class
    return bool(getattr(getattr(transformers(), named), "_supports_sdpa", True))


class Reference:
    """A reference model from a directory; `lifted` computes in fp64 from end to end."""

    def __init__(
        self,
        directory: Path,
        reference_class: str,
        dtype: torch.dtype,
        *,
        lifted: bool = False,
        attention: str = "",
    ) -> None:
        # users run the fused kernel; where eager attention differs (Falcon adds ALiBi twice),
        # that is a bug of the reference
        self.oracle = Oracle(reference_class)
        reference_class = self.oracle.reference_class
        attention = attention or ("sdpa" if fuses(reference_class) else "eager")
        kind = getattr(transformers(), reference_class)
        with self.oracle.directory(directory) as place:
            self.model, info = kind.from_pretrained(
                place,
                dtype=dtype,
                attn_implementation=attention,
                experts_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
            )
        self.problems = [
            f"{what}: {listing(map(str, info[what]))}"
            for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info.get(what)
        ]
        for parameter in self.model.parameters():
            parameter.data = parameter.to(dtype)  # some stay fp32 whatever dtype was requested
        self.directory = directory
        self.model.eval()
        self.config = self.model.config
        self.lifted = lifted
        if lifted:
            self._lift()
        # a long input may recompute the rotary frequencies for good: every call restores them
        self._state = [
            (m, dict(vars(m)), dict(m._buffers)) for m in self.model.modules() if m._buffers
        ]

    def _lift(self) -> None:
        for module in self.model.modules():
            for option, value in _PRECISION_OPTIONS.items():
                if hasattr(module, option):
                    setattr(module, option, value)
        self._lift_buffers()
        narrow = [
            name
            for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers())
            if tensor.is_floating_point() and tensor.dtype != torch.float64
        ]
        if narrow:
            raise ParityError(f"the fp64 reference keeps {listing(narrow)} in less than fp64")

    def _lift_buffers(self) -> None:
        """Rebuild buffers in fp64; a cast of an fp32 buffer would lack the digits."""
        again: dict[str, nn.Module] | None = None
        for name, module in self.model.named_modules():
            if not any(b.is_floating_point() for b in module._buffers.values() if b is not None):
                continue
            with Lift():
                try:
                    module._buffers.update(type(module)(self.config)._buffers)
                except TypeError:  # needs more arguments: take it from a new model
                    again = again or dict(type(self.model)(self.config).named_modules())
                    module._buffers.update(again[name]._buffers)

    def __call__(self, inputs: Mapping[str, Tensor], *, watch: bool = False) -> Outputs:
        """Return all outputs under the reference's names."""
        return self.run(self.model, inputs, watch=watch)

    def hidden(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(b, s, d), return the hidden states of the model without its head."""
        model = self.model.base_model
        if model is self.model and model.get_output_embeddings() is not None:
            # the head is part of this model, so load the model without it
            bare = Reference(self.directory, "AutoModel", torch.float64, lifted=self.lifted)
            return bare.hidden(inputs)
        return next(iter(self.run(model, inputs).values()))

    def run(
        self, model: nn.Module, inputs: Mapping[str, Tensor], *, watch: bool = False
    ) -> Outputs:
        """Return the outputs of `model`, which is the reference or its base model."""
        for module, attributes, buffers in self._state:
            vars(module).update(attributes)
            module._buffers.update(buffers)
        accepted = inspect.signature(model.forward).parameters
        arguments = {name: value for name, value in inputs.items() if name in accepted}
        if "use_cache" in accepted:
            arguments["use_cache"] = False  # type: ignore[assignment]
        modes: list[Callable[[], Any]] = ([Watch] if watch else []) + (
            [Lift] if self.lifted else []
        )
        return _outputs(_under(modes, lambda: model(**arguments)))

    def by_rows(self, inputs: Mapping[str, Tensor]) -> Outputs:
        """Return a batch's outputs, row by row if the reference refuses the batch."""
        labels = type(self.model).__name__.endswith("SequenceClassification")
        if not labels or self.config.pad_token_id is not None:
            return self(inputs)
        rows = len(inputs["input_ids"])
        outs = [self({k: v[i : i + 1] for k, v in inputs.items()}) for i in range(rows)]
        return {name: torch.cat([out[name] for out in outs]) for name in outs[0]}

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients under the names that the reference saves the weights under."""
        kept = {name: p.data for name, p in self.model.named_parameters()}
        try:
            for p in self.model.parameters():
                p.data = torch.zeros_like(p) if p.grad is None else p.grad
            with TemporaryDirectory() as scratch:
                self.model.save_pretrained(scratch)
                named = load_file(f"{scratch}/model.safetensors")
                gradients = {name: gradient.clone() for name, gradient in named.items()}
                return self.oracle.folded(self.directory, gradients)
        finally:
            for name, p in self.model.named_parameters():
                p.data = kept[name]
            self.model.zero_grad(set_to_none=True)


def _under(modes: list[Callable[[], Any]], call: Callable[[], Any]) -> Any:
    if not modes:
        return call()
    with modes[0]():
        return _under(modes[1:], call)


def _outputs(out: Any) -> Outputs:
    values = {k: v for k, v in out.items() if k not in _NO_VALUE}
    return {k: v for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
