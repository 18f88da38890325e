"""Why two models part: likely causes are tried where they do, and those that fit are confirmed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from converters.lines import field_line, rule_line
from zoo.errors import ZooError
from zoo.fitting import spec_of
from zoo.parity.causes import branches, fields, layers, looks, streams, trials
from zoo.parity.causes.scene import Idea, Scene, applied
from zoo.parity.divergence import Comparison, Difference

MOST = 5  # causes that are told
RULES = 3  # lines that are named


@dataclass(frozen=True)
class Cause:
    """Something that explains a difference, and what became of it when it was undone."""

    what: str
    fix: str = ""  # parity is restored if …
    change: str = ""  # a line of a file
    tried: bool = False
    restored: bool = False
    after: str = ""  # where the models part then

    def __str__(self) -> str:
        lines = [self.what + "."]
        done = self.fix or "the other model's numbers are put there"
        if self.restored:
            lines.append(f"Parity is restored if {done}.")
        elif self.tried:
            lines.append(f"If {done}, the first difference moves on to {self.after}.")
        elif self.fix:
            lines.append(f"Not confirmed: {self.fix}.")
        if self.change:
            lines.append(self.change)
        return " ".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "fix": self.fix,
            "change": self.change,
            "tried": self.tried,
            "restored": self.restored,
            "after": self.after,
            "text": str(self),
        }


def diagnosed(comparison: Comparison, difference: Difference) -> list[Cause]:
    """The most likely first: what restores parity, what moves the difference on, what fits."""
    if difference.first is None:
        return list(_unmet(difference))
    scene = Scene(comparison, difference)
    if difference.back:
        return [_confirmed(scene, idea) for idea in trials.learning(scene)]
    found = list[Cause]()
    for idea in _ideas(scene):
        if idea.what not in {cause.what for cause in found}:
            found.append(_confirmed(scene, idea))
        if len(found) == MOST or (found and found[-1].restored):
            break
    return sorted(found, key=lambda cause: (not cause.restored, not cause.tried))


def _unmet(difference: Difference) -> Iterator[Cause]:
    for names in difference.untied:
        yield Cause(f"{names} are no longer one array: the tie is broken", "they share one again")
    for name in difference.idle:
        yield Cause(f"{name} does not run here, and does in the other model")


def _ideas(scene: Scene) -> Iterator[Idea]:
    """The surest first."""
    if ideas := list(trials.restless(scene)):
        yield from ideas
        return
    yield from fields.read_again(scene)
    yield from trials.padding(scene)
    if scene.side == "out":
        yield from layers.ideas(scene) if scene.name else trials.outputs(scene)
    elif scene.name.rpartition(".")[2] in ("q", "k", "v", "out"):
        yield from looks.ideas(scene)
    elif scene.name.endswith(".down"):
        yield from branches.ideas(scene)
    if scene.side == "in":
        yield from streams.ideas(scene)
    yield from trials.alone(scene)
    yield from fields.tried(scene)


def _confirmed(scene: Scene, idea: Idea) -> Cause:
    change = _lines(scene, idea)
    try:
        with applied(scene.model, idea, scene) as model:
            but = idea.touched if idea.undoes else {scene.name}
            again = scene.comparison.again(
                model, scene.difference.healed, but, scene.difference.back
            )
    except (RuntimeError, ZooError):
        return Cause(idea.what, idea.fix, change)
    if again.first is None:
        return Cause(idea.what, idea.fix, change, True, True)
    if scene.later(again):
        return Cause(idea.what, idea.fix, change, True, False, str(again.first.reading))
    return Cause(idea.what, idea.fix, change)


# --- which line says it --------------------------------------------------------------------------


def _lines(scene: Scene, idea: Idea) -> str:
    """Where a rule or a field that is to be changed stands."""
    spec = spec_of(scene.model)
    if idea.config:
        lines = [line for name in idea.config if (line := field_line(spec, name))]
        return " ".join(f"It is read by {line}." for line in lines)
    rules = dict.fromkeys(line for name in idea.where if (line := rule_line(spec, name)))
    return " ".join(f"Change {line}." for line in list(rules)[:RULES])
