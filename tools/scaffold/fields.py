"""The config section of a spec, guessed from field names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from converters.spec import SPECS, Dialect
from converters.strict_yaml import read_yaml
from scaffold.text import MARK, flow, shortened
from zoo.errors import ConfigError, SpecError
from zoo.registry import Architecture

if TYPE_CHECKING:
    from scaffold.reference import Survey

# What configs call the sizes and rates that a native config calls so.
CALLED = {
    "dim": "d_model n_embd hidden_size",
    "layers": "n_layers num_layers n_layer",
    "heads": "n_heads num_heads n_head",
    "kv_heads": "num_kv_heads n_kv_heads multi_query_group_num",
    "hidden": "ffn_dim d_ff hidden_dim ffn_hidden_size n_inner d_inner intermediate_size",
    "positions": "n_positions n_ctx max_seq_len max_sequence_length",
    "eps": "layer_norm_epsilon layer_norm_eps norm_eps norm_epsilon rms_norm_eps",
    "act": "activation_function activation hidden_activation afn",
    "dropout": "hidden_dropout resid_pdrop dropout",
    "attn_dropout": "attn_pdrop",
    "init_std": "init_std",
}


class Fields:
    """The config section: the similar architecture's mapping where it applies, marks elsewhere."""

    def __init__(self, like: Architecture, dialect: Dialect, survey: Survey) -> None:
        self.like, self.survey = like, survey
        raw = read_yaml(SPECS / like.spec / "hf.yaml", SpecError)
        present = {**survey.defaults, **survey.config}
        self.paths: dict[str, tuple[str, ...]] = {}
        self.guessed: list[str] = []
        self.missing: list[str] = []  # fields that the similar config requires
        self.refused = ""
        absent = []
        for native, paths in dialect.config.items():
            here = tuple(p for p in paths if p.partition(".")[0] in present)
            own = tuple(dict.fromkeys(o for p in paths if (o := survey.own(p)) in present))
            if here or own:
                # further paths are older spellings: they belong to the first
                self.paths[native] = paths if paths[0] in here else here or own
            else:
                absent.append((native, paths))
        common = dialect.ignore - set(raw.get("ignore") or [])
        self.require = {k: v for k, v in (raw.get("require") or {}).items() if k in present}
        self.ignore = [k for k in raw.get("ignore") or [] if k in present]
        shared = dialect.require.keys() - (raw.get("require") or {}).keys()
        spoken = (
            common
            | shared
            | self.require.keys()
            | set(self.ignore)
            | {p.partition(".")[0] for paths in self.paths.values() for p in paths}
        )
        self.unknown = {k: v for k, v in survey.config.items() if k not in spoken}
        needed = {
            name for name, field in like.config_class.model_fields.items() if field.is_required()
        }
        for native, paths in absent:
            near = [k for k in CALLED.get(native, "").split() if k in self.unknown]
            near += get_close_matches(paths[0], self.unknown, n=1, cutoff=0.7)
            if near:
                self.paths[native] = (near[0],)
                self.guessed.append(native)
                del self.unknown[near[0]]
            elif native in needed:
                self.missing.append(native)
        self.idle = [n for n, _ in absent if n not in self.guessed and n not in self.missing]
        self.dialect = replace(dialect, config=self.paths)

    def native(self, config: Mapping[str, Any], head: str) -> Any:
        """Return the similar architecture's config; a value that it refuses keeps its default."""
        fields, _ = self.dialect.read_config(config)
        try:
            return self.like.config_class(**fields, head=head)
        except ConfigError as error:
            message = " ".join(str(error).split())
            self.refused = self.refused or message
            kept = {k: v for k, v in fields.items() if not re.search(rf"(^|; ){k}: ", message)}
            return self.like.config_class(**kept, head=head)

    def text(self) -> list[str]:
        out = ["config:"]
        sure = {n: p for n, p in self.paths.items() if n not in self.guessed}
        out += [f"  {native}: {' | '.join(paths)}" for native, paths in sure.items()]
        out += ["  # guessed by name"] if self.guessed else []
        out += [f"  {native}: {self.paths[native][0]}" for native in self.guessed]
        out += [f"  # {MARK} {name}: no field is called so" for name in self.missing]
        if self.refused:
            out.append(f"  # {MARK} {self.like.name}'s config refuses a value: {self.refused}")
        fixed = {k: v for k, v in self.unknown.items() if _neutral(v)}
        for name, value in self.unknown.items():
            if name not in fixed:
                usual = self.survey.defaults.get(name)
                where = f"{shortened(value)} here"
                where += f", usually {shortened(usual)}" if usual != value else ""
                out.append(f"  # {MARK} {name} ({where}): under config, require or ignore")
        if self.require or fixed:
            out.append("require:")
            out += [f"  {name}: {flow(allowed)}" for name, allowed in self.require.items()]
        if fixed:
            out.append("  # guessed: as the tiny checkpoints have it; any other value is refused")
            out += [f"  {k}: {flow([] if v is None else [v])}" for k, v in fixed.items()]
        if self.ignore:
            out.append(f"ignore: {flow(self.ignore)}")
        return out


def _neutral(value: Any) -> bool:
    """Return whether a value can be required: a boolean, a string, null, or a factor of 0 or 1."""
    return value is None or isinstance(value, bool | str) or value in (0.0, 1.0)
