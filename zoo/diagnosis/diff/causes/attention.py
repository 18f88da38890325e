"""Attention whose queries, keys and values agree, and whose output does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from zoo.components.masks import Mask
from zoo.diagnosis.attention import Form, Sizes, Variant, all_of
from zoo.diagnosis.diff.causes import catalogue
from zoo.diagnosis.diff.causes.attention_trial import Trial
from zoo.diagnosis.diff.causes.attention_variants import row_variants, variants_of
from zoo.diagnosis.diff.causes.scene import Reached, Scene
from zoo.diagnosis.diff.causes.score_variants import ATTENDED, merges, softmaxes, spelled
from zoo.diagnosis.edits import PARTS, Hypothesis, stars
from zoo.diagnosis.families import rows_of
from zoo.diagnosis.kinds import attentions
from zoo.errors import ConfigError
from zoo.parity.checks import call


def ideas(scene: Scene) -> Iterator[Hypothesis]:
    """Explain what goes into `out`, or into q, k and v where those run again."""
    name = scene.name.rpartition(".")[0]
    sample = _sample(scene, name) if scene.name.endswith(".out") else None
    explained = False
    for idea in _explained(scene, name, sample) if sample is not None else ():
        explained = True
        yield idea
    if not explained:
        if scene.name.endswith(".out"):
            yield from catalogue.ideas(scene)
        yield from _content_and_positions(scene, name)


def _content_and_positions(scene: Scene, name: str) -> Iterator[Hypothesis]:
    """DeBERTa's attention with other terms between content and positions."""
    attn: Any = scene.above
    here = [n.rpartition(".")[0] for n in scene.alike()]
    for terms in ATTENDED if hasattr(attn, "position_terms") else ():
        if set(terms) != set(attn.position_terms):
            here_and_there = spelled(attn.position_terms), spelled(terms)
            idea = Hypothesis(
                f"{stars(name)}: here {here_and_there[0]}, in the other model {here_and_there[1]}",
                f"position_terms is {terms}",
                settings={one: {"position_terms": terms} for one in here},
            )
            if scene.restores(idea):
                yield idea


def _sample(scene: Scene, name: str) -> Trial | None:
    attn: Any = scene.above
    listened = _listen(scene, name) if hasattr(attn, "attend") else None
    if listened is None:
        return None
    masks, own = listened
    values = [scene.made(f"{name}.{part}") for part in PARTS]
    values += [scene.flow.ours, scene.flow.theirs]
    split = [None if x is None else scene.rows(x) for x in values]
    rows = [some[: len(masks)] for some in split if some is not None]
    if len(rows) != len(split):
        return None
    parts = [dict(zip(PARTS, each, strict=True)) for each in zip(*rows[:3], strict=True)]
    layer = next((int(part) + 1 for part in name.split(".") if part.isdecimal()), 1)
    sizes = Sizes.of(scene.model.config, attn, layer)
    return Trial(parts, masks, own, sizes, torch.cat(rows[3]), torch.cat(rows[4]))


def _explained(scene: Scene, name: str, trial: Trial) -> Iterator[Hypothesis]:
    """Fit known forms to what each model made; what is between them is the cause."""
    own = trial.own
    code = list(variants_of(scene, own, trial.sizes))
    # of what this model makes with its own parameters, none is read in another order
    slips = [*merges(), *softmaxes(own)]
    ours = trial.fitted([*code, *slips], trial.ours)
    rows, joint = row_variants(scene, name), row_variants(scene, name, joint=True)
    theirs = trial.fitted([*rows, *code, *joint], trial.theirs)
    if theirs:
        yield from _in_other_model(scene, own, name, theirs)
    if ours:
        here = [n.rpartition(".")[0] for n in scene.alike()]
        what = f"{stars(name)}: here {' and '.join(variant.what for variant in ours)}"
        there = " and ".join(variant.what for variant in theirs or ())
        yield Hypothesis(
            what + ("; the other model does what the class does" if theirs == () else f"; {there}"),
            f"{stars(name)} does what its class does",
            settings=_settings(scene, here, lambda form: form),
            fault=ours[0].fault,
        )


def _in_other_model(
    scene: Scene, own: Form, name: str, variants: Sequence[Variant]
) -> Iterator[Hypothesis]:
    """The other model computes another form than the class here."""
    undone = [each for variant in variants for each in variant.hypotheses]
    if undone and len(undone) == len(variants):
        if len(undone) == 1:
            yield from catalogue.wider(scene, undone[0])
            return
        rows = all_of(variants, own).rows
        kind = next(kind for kind in attentions(scene.model) if name in kind.modules)
        what, fix = (" and ".join(getattr(h, x) for h in undone) for x in ("what", "fix"))
        both = replace(undone[0], what=what, fix=fix, parameters=rows_of(kind, rows))
        yield catalogue.at_place(scene, both)
        return
    what = f"{stars(name)}: in the other model {' and '.join(v.what for v in variants)}"
    if undone:  # rows and code at once: either alone changes too little to be seen
        yield Hypothesis(what)
        return
    config = {key: value for variant in variants for key, value in variant.config.items()}
    if config and scene.steady:
        fix = ", ".join(f"{key} is {value}" for key, value in config.items())
        yield Hypothesis(what, fix, config=config, fault=variants[0].fault)
    else:
        here = [n.rpartition(".")[0] for n in scene.alike()]
        settings = _settings(scene, here, lambda own: all_of(variants, own))
        fix = f"{stars(name)} does likewise"
        yield Hypothesis(what, fix, settings=settings, fault=variants[0].fault)


def _settings(
    scene: Scene, names: Sequence[str], change: Callable[[Form], Form]
) -> dict[str, dict[str, Any]]:
    forms = {name: change(Form.of(scene.fresh.get_submodule(name))) for name in names}
    return {
        name: {"rotary": form.rotary, "attend": form.attend, "scale": form.scale}
        for name, form in forms.items()
    }


def _listen(scene: Scene, name: str) -> tuple[list[Mask], Form] | None:
    """What the class gives this attention beside queries, keys and values, row by row."""
    try:
        attn: Any = scene.fresh.get_submodule(name)
    except (RuntimeError, ConfigError, AttributeError):
        return None
    masks, left = list[Mask](), 0

    def hear(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            masks.extend([x for x in (*args, *kwargs.values()) if isinstance(x, Mask)][:1])
            raise Reached

    handle = attn.register_forward_pre_hook(hear, with_kwargs=True)
    try:
        for inputs in scene.comparison.way.other()[:3]:
            left = scene.measurement.call
            try:
                with torch.no_grad():
                    call(scene.fresh, inputs)
            except Reached:
                continue
            return None
    finally:
        handle.remove()
    return masks, Form.of(attn)
