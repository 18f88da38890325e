"""What a checkpoint sets for generation, read as the reference's `generate` reads it.

That is generation_config.json; where there is none, the same fields of config.json.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from converters.formats.gguf import open_gguf
from converters.paths import confined
from converters.strict_json import read_json
from zoo.components.model import Model
from zoo.errors import ConfigError, UsageError, did_you_mean, option
from zoo.tokenizers.gguf import GENERATION, ends

if TYPE_CHECKING:
    from zoo.text.generate import Options

# What the reference's generate reads, zoo does not implement, and the values that change nothing.
NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "watermarking_config": (),
    "max_time": (),
    "token_healing": (False,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "constraints": (),
    "force_words_ids": (),
    "dola_layers": (),
    "top_h": (),
    "penalty_alpha": (0,),
    "assistant_ensemble_weight": (),
    "cache_implementation": (
        *("dynamic", "dynamic_full", "static", "offloaded", "offloaded_static", "hybrid"),
        *("sliding_window", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked"),
        "paged",
    ),
}
SAMPLING = (  # fields that count only where tokens are drawn
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    "top_h",
)
BEAMS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty")
TOP_K = 50  # the reference's own, where a file asks for sampling and names none


class Ends(NamedTuple):
    """Where texts begin and end."""

    eos: tuple[int, ...]
    pad: int | None
    start: int | None  # of an answer, where a question is read apart


class Defaults(NamedTuple):
    """What a checkpoint sets; nothing of it is null."""

    fields: Mapping[str, Any]
    ends: Ends
    where: str

    def but(self, ignored: bool | Collection[str]) -> dict[str, Any]:
        """The fields without those that a caller does not want."""
        if isinstance(ignored, bool):
            return {} if ignored else dict(self.fields)
        if isinstance(ignored, str) or not isinstance(ignored, Collection):
            raise UsageError(f"ignore_generation_config={ignored!r}: True, or names of fields")
        for name in ignored:
            if name not in self.fields:
                near = did_you_mean(str(name), self.fields)
                raise UsageError(
                    f"ignore_generation_config: {self.where} does not set {name!r}.{near}"
                )
        return {name: value for name, value in self.fields.items() if name not in ignored}


NO_DEFAULTS = Defaults({}, Ends((), None, None), "")


def defaults_of(model: Model) -> Defaults:
    """Read from the checkpoint's files, which takes a call each time."""
    start, pad = (getattr(model.config, name, None) for name in ("start", "pad"))
    own = {"decoder_start_token_id": start, "pad_token_id": pad}
    fields, where = dict[str, Any](), "the model's config"
    if (provenance := model.provenance) is not None:
        fields, where = json.loads(provenance.origin.config), f"config.json of {provenance.ref}"
        if provenance.origin.dialect == "gguf":
            fields |= ends(next(iter(open_gguf(provenance.files[0]).values())).values)
        path = provenance.directory / GENERATION
        if path.is_file():  # then nothing but what an answer begins with comes from elsewhere
            where, others = str(path), fields if provenance.origin.dialect == "gguf" else {}
            read = read_json(confined(path.parent, path.name), ConfigError)
            fields = others | {name: value for name, value in read.items() if value is not None}
            begins = (fields.get("decoder_start_token_id"), fields.get("bos_token_id"), start)
            own = {"decoder_start_token_id": next((id for id in begins if id is not None), pad)}
    fields |= {name: id for name, id in own.items() if id is not None}
    fields = {name: value for name, value in fields.items() if value is not None}
    return Defaults(fields, _ends(fields, model, where), where)


def _ends(fields: Mapping[str, Any], model: Model, where: str) -> Ends:
    eos, pad = fields.get("eos_token_id"), fields.get("pad_token_id")
    many = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    start = fields.get("decoder_start_token_id", pad)
    named = {"eos_token_id": many, "pad_token_id": (pad,), "decoder_start_token_id": (start,)}
    for name, ids in named.items():
        for id in ids:
            if id is None and name != "eos_token_id":
                continue
            if type(id) is not int or id >= model.config.vocab:
                raise ConfigError(
                    f"{where}: {name}: {id!r} is no id of {model.config.vocab} tokens"
                )
    return Ends(tuple(id for id in many if id >= 0), pad, start)


def check_implemented(fields: Mapping[str, Any], asked: Options, where: str) -> None:
    """Refuse what would change the reference's output, and would not change zoo's."""
    idle = set[str]()
    if not asked.sampled:
        idle.update(SAMPLING)
    if asked.num_beams == 1:
        idle.update(BEAMS)
    if asked.sampled or asked.num_beams > 1 or fields.get("top_k") in (0, 1):
        idle.add("penalty_alpha")  # contrastive search
    if asked.assistant_model is None:
        idle.add("assistant_ensemble_weight")
    problems = [
        f"{name}: {value!r}"
        for name, neutral in NOT_IMPLEMENTED.items()
        if name not in idle and (value := fields.get(name)) is not None and value not in neutral
    ]
    if problems:
        raise ConfigError(
            "\n  ".join([f"{where}: not implemented, and the reference obeys it:", *problems])
            + f"\nTo generate without: {option('ignore_generation_config')}; in Python the names "
            "of these fields will do",
            problems,
        )
