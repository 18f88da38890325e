"""Build tiny reference checkpoints for `tools/new_arch.py` and read their configs and headers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from converters.formats import TensorInfo
from converters.opening import open_checkpoint
from zoo.checkpoints.oracle import transformers
from zoo.errors import ConfigError, UnknownName, UsageError, did_you_mean
from zoo.parity.fixtures import write
from zoo.registry import Architecture

MOST_PARAMETERS = 3_000_000  # beyond that some size was not made small
GROWN = 64  # a whole number from here on is a size to make small
PARTIAL = "partial_rotary_factor"
SAME_KIND = {"LMHeadModel": "ForCausalLM", "ForCausalLM": "LMHeadModel"}


@dataclass(frozen=True)
class Probe:
    """The config and header of one tiny checkpoint of the reference."""

    name: str
    reference_class: str
    changes: Mapping[str, Any]  # from the tiny config's fields
    config: Mapping[str, Any]  # config.json
    header: Mapping[str, TensorInfo]


@dataclass
class Survey:
    """What the classes, configs and files of a reference show without its code."""

    reference_class: str
    model_type: str
    stem: str  # what all its classes' names begin with
    prefix: str  # of the base model's names in files of a class with a head
    classes: dict[str, str]  # reference class -> the similar architecture's class
    usual: dict[str, str]  # similar architecture's name of a config field -> the library's
    renamed: dict[str, str]  # the usual one -> this config's own
    defaults: dict[str, Any]  # every config field
    fields: dict[str, Any] = field(default_factory=dict)  # the tiny config, over the defaults
    probes: list[Probe] = field(default_factory=list)

    def own(self, name: str) -> str:
        """Return this config's name of a field of the similar architecture."""
        name = self.usual.get(name, name)
        return self.renamed.get(name, name)

    @property
    def config(self) -> dict[str, Any]:
        """Every field of any probe's config.json, with the first probe's value."""
        return {k: v for probe in reversed(self.probes) for k, v in probe.config.items()}


def make_survey(reference: str, like: Architecture, settings: Mapping[str, Any]) -> Survey:
    """Write tiny checkpoints of a reference class and its siblings, and read their headers."""
    kind = _named(reference)
    similar = _named(next(iter(like.heads)))
    stems = [k.config_class.__name__.removesuffix("Config") for k in (similar, kind)]
    suffixes = {c: c.removeprefix(stems[0]) for c in like.heads}
    classes = {
        stems[1] + spelled: old
        for old, suffix in suffixes.items()
        for spelled in (suffix, SAME_KIND.get(suffix, suffix))
        if hasattr(transformers(), stems[1] + spelled)
    }
    if reference not in classes:
        raise UsageError(
            f"--reference {reference}: {like.name} has no class of that kind, and so no head to "
            f"draft it by; try {' or '.join(classes) or 'another --like'}"
        )
    defaults = {**kind.config_class().to_dict(), "num_labels": 2}
    result = Survey(
        reference_class=reference,
        model_type=kind.config_class.model_type,
        stem=stems[1],
        prefix=f"{kind.base_model_prefix}." if kind.base_model_prefix else "",
        classes=classes,
        usual={own: name for name, own in similar.config_class.attribute_map.items()},
        renamed=dict(kind.config_class.attribute_map),
        defaults=defaults,
    )
    base, others = _translated(like, result)
    result.fields = _tiny(defaults, base)
    _settle(result, settings)
    _write_all(result, others)
    return result


def _settle(survey: Survey, settings: Mapping[str, Any]) -> None:
    for path, value in settings.items():
        *outer, last = path.split(".")
        if (name := path.partition(".")[0]) not in survey.defaults:
            near = did_you_mean(name, survey.defaults)
            raise UsageError(f"--set {path}: {survey.model_type}'s config has no {name}.{near}")
        place = survey.fields
        for key in outer:
            inside = place.get(key, survey.defaults.get(key))
            place[key] = dict(inside) if isinstance(inside, dict) else {}
            place = place[key]
        place[last] = value


def _named(name: str) -> Any:
    library = transformers()
    if name.startswith("_") or not hasattr(library, name):
        classes = [n for n in dir(library) if "For" in n or n.endswith("Model")]
        near = did_you_mean(name, classes)
        raise UnknownName(f"--reference {name}: transformers has no such class.{near}")
    kind = getattr(library, name)
    if getattr(kind, "config_class", None) is None:
        raise UsageError(f"--reference {name}: no model class; one such as MistralForCausalLM")
    return kind


def _translated(
    like: Architecture, survey: Survey
) -> tuple[dict[str, Any], dict[str, tuple[str, dict[str, Any]]]]:
    """Return the first variant's fields under this config's names, and the others' changes."""
    own, here = survey.own, survey.defaults
    base, *others = like.variants.values()
    names = list(like.variants)[1:]
    first = {own(k): v for k, v in base["config"].items() if own(k) in here}
    changed = {}
    for name, data in zip(names, others, strict=True):
        config = data["config"]
        keys = [*config, *(k for k in base["config"] if k not in config)]
        changes = {
            own(k): deepcopy(config.get(k)) for k in keys if config.get(k) != base["config"].get(k)
        }
        # another depth or activation is no case of its own here
        tells = [k for k in changes if "act" not in k and "layer" not in k]
        if all(k in here for k in changes) and (tells or data["class"] != base["class"]):
            changed[name] = (data["class"], changes)
    return first, changed


def _tiny(defaults: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return small sizes, all different; the similar architecture's where names are equal."""
    fields: dict[str, Any] = {}
    for name, value in base.items():
        if _is_number(value) and name != "tie_word_embeddings":
            fields[name] = value
    used = {v for v in fields.values() if isinstance(v, int)}
    uneven, even, eights = (_unused(used, *of) for of in ((17, 2), (14, 2), (24, 8)))
    for name, value in defaults.items():
        if name in fields:
            continue
        if name.endswith("_token_id"):
            if _is_whole(value):
                fields[name] = 1 + ("eos" in name) + 2 * ("pad" in name)
        elif "eps" in name and isinstance(value, float):
            fields[name] = 3e-5
        elif name == "rope_theta" and value is not None:
            fields[name] = 5000.0
        elif name == "rope_parameters" and isinstance(value, dict) and "rope_theta" in value:
            fields[name] = {**value, "rope_theta": 5000.0}
            if value.get(PARTIAL, 1.0) < 1:
                fields[name][PARTIAL] = 0.5  # of a narrow head, still even
        elif not _is_whole(value):
            continue
        elif twins := [k for k in fields if name.endswith(f"_{k}") and defaults.get(k) == value]:
            fields[name] = fields[twins[0]]  # pooler_hidden_size, which is hidden_size
        elif "experts_per" in name or "top_k" in name or "topk" in name:
            fields[name] = min(value, 2)
        elif "experts" in name and value < 1000:
            fields[name] = min(value, 5)
        elif "max_position" in name:
            fields[name] = fields.get("max_position_embeddings", 61)
        elif "rotary" in name:
            fields[name] = min(value, 4)
        elif value >= GROWN:
            # the reference's products over experts want rows of whole 16 bytes
            moe = "moe" in name or "expert" in name
            fields[name] = next(even if "head" in name else eights if moe else uneven)
    return fields


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _unused(used: set[int], start: int, step: int) -> Iterator[int]:
    """Yield unused sizes from `start`; uneven ones have no small factors."""
    for n in count(start, step):
        if n not in used and (n % 2 == 0 or all(n % d for d in (3, 5, 7))):
            used.add(n)
            yield n


def _write_all(survey: Survey, others: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
    """Write a checkpoint of each class; skip variants that the reference cannot build."""
    new_classes = {old: new for new, old in survey.classes.items()}
    survey.probes.append(_probe(survey, "base", survey.reference_class, {}))
    for name, (old, changes) in others.items():
        if (new := new_classes.get(old)) is None or name == "base":
            continue
        for field_name, value in changes.items():
            own = survey.fields.get(field_name)
            if isinstance(own, dict) and isinstance(value, dict) and PARTIAL in own:
                value.setdefault(PARTIAL, own[PARTIAL])
        with suppress(ConfigError):
            survey.probes.append(_probe(survey, name, new, changes))
    for missed in survey.classes.keys() - {probe.reference_class for probe in survey.probes}:
        kind = missed.removeprefix(survey.stem).removeprefix("For")
        name = re.sub(r"(?<=.)(?=[A-Z][a-z])", "-", kind).lower()
        survey.probes.append(_probe(survey, name, missed, {}))


def _probe(survey: Survey, name: str, reference_class: str, changes: Mapping[str, Any]) -> Probe:
    fields = deepcopy({**survey.fields, **changes})  # the reference writes into what it is given
    where = f"{reference_class} with {fields}"
    library = transformers()
    try:
        config = library.AutoConfig.for_model(survey.model_type, **fields)
        config._experts_implementation = "eager"  # the other ones want sizes that tiny models lack
        with torch.device("meta"):
            model = getattr(library, reference_class)(config)
        total = sum(p.numel() for p in model.parameters())
        if total <= MOST_PARAMETERS:
            # sizes may build and still not go together
            getattr(library, reference_class)(config)(torch.ones(1, 7, dtype=torch.long))
    except Exception as error:  # whatever the reference raises: the sizes do not go together
        raise ConfigError(
            f"{where}: the reference cannot be built: {error}. Choose: --set FIELD=VALUE"
        ) from error
    if total > MOST_PARAMETERS:
        big = {k: v for k, v in survey.defaults.items() if _is_whole(v) and v >= GROWN}
        raise ConfigError(
            f"{where}: {total:,} parameters, not tiny. Choose with --set, perhaps {big}"
        )
    with TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write(reference_class, fields, directory, model_type=survey.model_type)
        written = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        header = dict(open_checkpoint(directory).tensors)
    return Probe(name, reference_class, changes, written, header)
