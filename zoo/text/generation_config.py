"""The defaults that a checkpoint sets for generation, read as the reference's `generate` does.

They are in generation_config.json; where there is none, in the same fields of config.json.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from converters.formats.gguf import open_gguf
from converters.paths import confined
from converters.strict_json import read_json
from zoo.components.model import Model
from zoo.errors import ConfigError, UsageError, did_you_mean
from zoo.tokenizers.gguf import GENERATION, ends

# fields that the reference implements and zoo does not, with the values that change nothing
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
SAMPLING_FIELDS = (  # they have no effect on greedy search
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    "top_h",
)
BEAM_FIELDS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty")
TOP_K = 50  # the reference's own, where a file asks for sampling and names none


class PresetIds(NamedTuple):
    """The token ids that a checkpoint sets."""

    eos: tuple[int, ...]
    pad: int | None
    start: int | None  # the first token of a decoder that has an encoder


class Defaults(NamedTuple):
    """The fields that a checkpoint sets, without null values, and the file they come from."""

    fields: Mapping[str, Any]
    special: PresetIds
    source: str

    def without(self, ignored: bool | Collection[str]) -> dict[str, Any]:
        """The fields, without those that a caller ignores."""
        if isinstance(ignored, bool):
            return {} if ignored else dict(self.fields)
        if isinstance(ignored, str) or not isinstance(ignored, Collection):
            raise UsageError(
                f"ignore_generation_config={ignored!r}: expected True, or names of fields"
            )
        for name in ignored:
            if name not in self.fields:
                near = did_you_mean(str(name), self.fields)
                raise UsageError(
                    f"ignore_generation_config: {self.source} does not set {name!r}.{near}"
                )
        return {name: value for name, value in self.fields.items() if name not in ignored}


NO_DEFAULTS = Defaults({}, PresetIds((), None, None), "")


def defaults_of(model: Model) -> Defaults:
    """Read the defaults from the checkpoint's files, again at each call."""
    start, pad = (getattr(model.config, name, None) for name in ("start", "pad"))
    own = {"decoder_start_token_id": start, "pad_token_id": pad}
    fields, source = dict[str, Any](), "the model's config"
    if (provenance := model.provenance) is not None:
        fields, source = json.loads(provenance.origin.config), f"config.json of {provenance.ref}"
        if provenance.origin.dialect == "gguf":
            fields |= ends(next(iter(open_gguf(provenance.files[0]).values())).values)
        path = provenance.directory / GENERATION
        if path.is_file():  # then only the decoder's start token comes from elsewhere
            source, others = str(path), fields if provenance.origin.dialect == "gguf" else {}
            read = read_json(confined(path.parent, path.name), ConfigError)
            fields = others | {name: value for name, value in read.items() if value is not None}
            begins = (fields.get("decoder_start_token_id"), fields.get("bos_token_id"), start)
            own = {"decoder_start_token_id": next((id for id in begins if id is not None), pad)}
    fields |= {name: id for name, id in own.items() if id is not None}
    fields = {name: value for name, value in fields.items() if value is not None}
    return Defaults(fields, _preset_ids(fields, model, source), source)


def _preset_ids(fields: Mapping[str, Any], model: Model, source: str) -> PresetIds:
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
                    f"{source}: {name}: expected an id below {model.config.vocab}, found {id!r}"
                )
    return PresetIds(tuple(id for id in many if id >= 0), pad, start)
