"""What a run is told: a `Recipe`, from YAML, keywords or the shell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from converters.strict_yaml import parse_yaml
from zoo.errors import UsageError, did_you_mean

Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

DATA, MODEL, BATCHES = "Data", "Model", "Batches"
OPTIMIZER, MACHINE, REPORTS = "Optimizer", "Machine", "Reports"


def _field(default: Any, section: str, help: str, **more: Any) -> Any:
    extra: Any = {"section": section}
    return Field(default=default, description=help, json_schema_extra=extra, **more)


class Recipe(BaseModel):
    """Every setting of a run. The defaults train a small model in minutes on a laptop.

    Example:
        >>> Recipe(data="shakespeare.txt", tokenizer="char", steps=200).lr
        0.001
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    # data
    data: str | None = _field(None, DATA, "a text file, a directory of them, JSONL, or train.bin")
    tokenizer: str | None = _field(
        None, DATA, "char, a letter a token; or a checkpoint's name or directory"
    )
    val_share: Share = _field(0.1, DATA, "the share of the data, at its end, that is held back")

    # model
    arch: str = _field("gpt2", MODEL, "the architecture to train from scratch")
    base: str | None = _field(None, MODEL, "the checkpoint to go on from", alias="from")
    head: str | None = _field(None, MODEL, "the model's head (default: the architecture's first)")
    config: dict[str, Any] = _field({}, MODEL, "config fields of the model")
    dropout: Share | None = _field(None, MODEL, "of every kind (default: 0 from scratch)")
    lora: list[str] = _field([], MODEL, "train factors beside these modules, and nothing else")
    rank: Size = _field(8, MODEL, "of the factors")
    alpha: Positive = _field(16.0, MODEL, "the factors' product is scaled by alpha / rank")

    # batches
    batch: Size = _field(32, BATCHES, "sequences a step, of all processes together")
    accumulate: Size = _field(1, BATCHES, "parts that a batch is computed in")
    context: Size = _field(128, BATCHES, "tokens of a sequence")
    steps: Size = _field(2000, BATCHES, "how many batches")
    seed: Count = _field(1337, BATCHES, "of weights, batches and dropout")

    # optimizer
    optimizer: Literal["adamw", "muon"] = _field(
        "adamw", OPTIMIZER, "adamw; or muon for matrices and adamw for the rest"
    )
    lr: Positive = _field(1e-3, OPTIMIZER, "the highest learning rate")
    min_lr: Amount | None = _field(None, OPTIMIZER, "the last one (default: a tenth)")
    warmup: Count = _field(100, OPTIMIZER, "steps in which the learning rate rises from 0")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = _field(
        "cosine", OPTIMIZER, "how the learning rate falls; wsd: over the last fifth alone"
    )
    weight_decay: Amount = _field(0.1, OPTIMIZER, "of matrices")
    beta1: Share = _field(0.9, OPTIMIZER, "of the first moment")
    beta2: Share = _field(0.99, OPTIMIZER, "of the second moment")
    eps: Positive = _field(1e-8, OPTIMIZER, "beside the root of the second moment")
    clip: Amount = _field(1.0, OPTIMIZER, "the largest norm of all gradients; 0: any")

    # machine
    device: str = _field("auto", MACHINE, "auto, cpu, cuda or mps")
    precision: Literal["fp32", "bf16", "fp16"] = _field("fp32", MACHINE, "of products (autocast)")
    tf32: bool = _field(False, MACHINE, "let products of fp32 be rounded to TF32 on GPUs")
    compile: bool = _field(False, MACHINE, "run the model through torch.compile")
    recompute: bool = _field(False, MACHINE, "compute activations again instead of keeping them")
    shard: Literal["ddp", "fsdp"] = _field(
        "ddp", MACHINE, "under torchrun: whole models (ddp), or a part of one each (fsdp)"
    )

    # reports
    out: str | None = _field(None, REPORTS, "the run's directory")
    eval_every: Count = _field(250, REPORTS, "steps between evaluations; 0: at the end alone")
    eval_batches: Size = _field(20, REPORTS, "batches of an evaluation")
    save_every: Count = _field(0, REPORTS, "steps between checkpoints (0: at each evaluation)")
    sample_every: Count = _field(0, REPORTS, "steps between samples; 0: none")
    sample_tokens: Size = _field(200, REPORTS, "tokens of a sample")
    prompt: str = _field("\n", REPORTS, "what samples begin with")
    log_every: Size = _field(10, REPORTS, "steps between lines of metrics.jsonl")
    log: list[Literal["tensorboard", "wandb"]] = _field([], REPORTS, "tensorboard, wandb")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate: {self.accumulate} does not divide batch {self.batch}")
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ValueError(f"min_lr: {self.min_lr} is above lr {self.lr}")
        return self

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Make a recipe of plain values.

        Raises:
            UsageError: Every setting that is wrong, with what was expected.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            lines = [_problem(each) for each in error.errors()]
            raise UsageError(
                "\n  ".join([f"{where}:", *lines]) if lines[1:] else f"{where}: {lines[0]}"
            ) from None

    @classmethod
    def read(cls, path: Path, changes: Mapping[str, Any] | None = None) -> Recipe:
        """Read a recipe from a YAML file; `changes` are settings that differ from it."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror or error}") from None
        values = parse_yaml(text, str(path), UsageError) or {}
        if not isinstance(values, Mapping):
            raise UsageError(f"{path}: expected settings, a line each, such as steps: 2000")
        return cls.of(merged(values, changes or {}), str(path))

    def changed(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with other values, checked as a new recipe is."""
        return Recipe.of(merged(self.to_dict(), changes))

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, under the names that YAML has."""
        return self.model_dump(by_alias=True)

    def to_yaml(self) -> str:
        """All settings as YAML, which `read` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @property
    def lowest_lr(self) -> float:
        """The learning rate at the end."""
        return self.lr / 10 if self.min_lr is None else self.min_lr


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes; fields of the model's config are changed one by one."""
    whole = {**values, **changes}
    if "config" in values and "config" in changes:
        whole["config"] = {**values["config"], **changes["config"]}
    return whole


def placed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Sort `--set FIELD=VALUE` into settings of the recipe and fields of the model's config."""
    own = {field.alias or name: name for name, field in Recipe.model_fields.items()}
    mine = {name: value for name, value in settings.items() if name in own}
    fields = {name: value for name, value in settings.items() if name not in own}
    return {**mine, "config": fields} if fields else mine


def _problem(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    name = path[0] if path else ""
    if error["type"] == "extra_forbidden":
        names = [field.alias or name for name, field in Recipe.model_fields.items()]
        return f"{name}: no such setting.{did_you_mean(name, names)}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    message = error["msg"][:1].lower() + error["msg"][1:]
    return f"{name}: {message.removeprefix('input ')}, found {error['input']!r}"
