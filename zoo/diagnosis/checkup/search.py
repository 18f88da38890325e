"""A text under each hypothesis about a file: what makes it much likelier is reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import Tensor

from converters.spec_lines import field_line, rule_line
from zoo.checkpoints.plan_by_names import spec_of
from zoo.components.model import Model
from zoo.diagnosis.checkup.finding import Finding
from zoo.diagnosis.checkup.likelihood import EVERY, chance, hidden_as, nats
from zoo.diagnosis.edits import Hypothesis, applied, stars
from zoo.diagnosis.faults import hypotheses, inside, narrowed, without
from zoo.errors import InputError, ZooError
from zoo.text.inference import at_rest, device_of

FEW = 96  # tokens that every hypothesis is tried on
TIMES = 3  # that a masked LM is shown them, of EVERY
GOOD = 8  # hypotheses that are tried on the whole text
HEATS = (1.0, 2.0, 4.0)  # what logits are divided by
MOST_EXPLANATIONS = 5
FEW_NAMES = 3  # of more than these, layers are left open
MUCH = 1.0  # nats a token
HELPFUL = 3  # that are tried in each block alone, too
BRANCHES = 3  # of single blocks, that are looked into
# nats a token, and standard errors, by which a text has to become likelier: healthy models, under
# hundreds of hypotheses, gained at most 0.025 (docs/decisions/text-search.md)
GAIN, ERRORS = 0.06, 3.0
EVEN = 0.02  # nats a token: two explanations are as good as each other
LEAST = 32  # tokens of a text
CHANCE = 0.95  # of what a token costs where all are alike: from there on nothing is known


# nats a token, when it was tried, and what
Tried = tuple[float, int, Hypothesis]


@dataclass(frozen=True)
class Explanation:
    """A hypothesis, or two, and what they make of a text."""

    hypotheses: tuple[Hypothesis, ...]
    costs: Tensor  # (heats, n), nats of each token

    @property
    def plain(self) -> float:
        """Nats a token of the logits as they are."""
        return float(self.costs[0].mean())

    @property
    def best(self) -> Tensor:
        """(n,), of logits as calm as is best: being sure of less is no better knowledge."""
        return self.costs[self.costs.mean(1).argmin()]

    @property
    def nll(self) -> float:
        """Nats a token, of logits as calm as is best."""
        return float(self.best.mean())

    def gain(self, than: Explanation) -> tuple[float, float]:
        """By how many nats a token a text is likelier, and the standard error of that."""
        off = than.best - self.best
        return float(off.mean()), float(off.std()) / math.sqrt(len(off))


@dataclass
class Search:
    """The search for what makes a text likelier, with its count of what was tried."""

    model: Model
    ids: Tensor
    mask: int | None
    progress: Callable[[int, int], None] | None = None
    done: int = 0
    expected: int = 0
    base: Explanation = field(init=False)

    def __post_init__(self) -> None:
        self.ids = self.ids.to(device_of(self.model))
        self.base = Explanation((), self.costs(self.model, self.ids))

    @property
    def chance(self) -> float:
        """What a token costs where all are alike, in nats."""
        return chance(self.model)

    def costs(self, model: Model, ids: Tensor) -> Tensor:
        """What is no number says less than nothing. Of few tokens a masked LM is shown some."""
        costs = nats(model, ids, self.mask, HEATS, EVERY if len(ids) > FEW else TIMES)
        return costs.nan_to_num(2 * self.chance, posinf=2 * self.chance)

    def tried(self, model: Model, hypothesis: Hypothesis, ids: Tensor) -> Tensor | None:
        """What the text costs then; None where the hypothesis does not fit the model."""
        self.done += 1
        if self.progress:
            self.progress(self.done, max(self.done, self.expected))
        try:
            with applied(model, hypothesis) as edited:
                return self.costs(edited, ids)
        except (RuntimeError, ZooError):
            return None

    def best(self, base: Explanation) -> list[Explanation]:
        """One more hypothesis beside what is known: those that surely help, the best first."""
        with ExitStack() as stack:
            model = self.model
            for each in base.hypotheses:
                model = stack.enter_context(applied(model, each))
            few = self.ids[:FEW]
            before = Explanation((), self.costs(model, few)).nll
            coarse = self._coarse(model, hypotheses(model), few, before)
            # what helps so much is not in one block alone; a second fault may be, and comes later
            if not coarse or coarse[0][0] > before - MUCH:
                helpful = [hypothesis for *_, hypothesis in coarse[:HELPFUL]]
                coarse += self._coarse(model, narrowed(model, helpful), few, before)
                coarse += self._coarse(model, self._inside(model, few), few, before)
                coarse.sort(key=lambda each: each[:2])
            tried = [(n, h, self.tried(model, h, self.ids)) for _, n, h in once(coarse)[:GOOD]]
        outcomes = [
            (n, Explanation((*base.hypotheses, h), costs))
            for n, h, costs in tried
            if costs is not None
        ]
        helps = [(n, r) for n, r in outcomes if sure(r, base) and r.nll < CHANCE * self.chance]
        least = min((r.nll for _, r in helps), default=0.0)
        # of what is as good, the more usual one
        helps.sort(key=lambda pair: (max(pair[1].nll, least + EVEN), pair[0]))
        return [explanation for _, explanation in helps]

    def _coarse(
        self, model: Model, some: Iterable[Hypothesis], few: Tensor, before: float
    ) -> list[Tried]:
        listed = list(some)
        self.expected = max(self.expected, self.done + len(listed))
        helpful = []
        for hypothesis in listed:
            costs = self.tried(model, hypothesis, few)
            if costs is not None and (nll := Explanation((), costs).nll) < before - GAIN / 4:
                helpful.append((nll, self.done, hypothesis))
        return sorted(helpful, key=lambda each: each[:2])

    def _inside(self, model: Model, few: Tensor) -> Iterator[Hypothesis]:
        """Of single blocks, where leaving a branch out costs least."""
        branches = list[tuple[float, str, Hypothesis]]()
        for branch, hypothesis in without(model):
            costs = self.tried(model, hypothesis, few)
            nll = math.inf if costs is None else Explanation((), costs).nll
            branches.append((nll, branch, hypothesis))
        branches.sort(key=lambda each: each[0])
        for _, branch, left in branches[:BRANCHES]:
            yield left
            yield from inside(model, branch)


def once(some: Iterable[Tried]) -> list[Tried]:
    """Each that says the same a single time."""
    unique = dict[tuple[str, str], Tried]()
    for each in some:
        unique.setdefault((each[2].what, each[2].fix), each)
    return list(unique.values())


def sure(explanation: Explanation, than: Explanation) -> bool:
    """Whether an explanation makes a text likelier by more than noise."""
    gain, error = explanation.gain(than)
    return gain > max(GAIN, ERRORS * error)


def searched(search: Search) -> list[Explanation]:
    """Of two faults both, then what explains at least half as much, the likeliest first."""
    first = search.best(search.base)
    if not first:
        return []
    best = [*search.best(first[0])[:1], *first]
    enough = best[0].gain(search.base)[0] / 2
    return [each for each in best if each.gain(search.base)[0] >= enough][:MOST_EXPLANATIONS]


def explanations(
    model: Model,
    ids: Tensor,
    *,
    mask: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Find what makes a text of (s,) ids likelier than the file as it is read, the best first.

    Nothing, where nothing does so by more than noise. `mask` is the id that hides a token from a
    masked LM, that of the model's tokenizer unless it is given.
    """
    mask = hidden_as(model) if mask is None else mask
    if len(ids) < LEAST:
        raise InputError(f"{len(ids)} tokens tell nothing: a text of some {FEW} or more does")
    with at_rest(model):
        search = Search(model, ids, mask, progress)
        best = searched(search)
    return [_finding(search, each, best[0]) for each in best] or list(_hopeless(search))


def _finding(search: Search, explanation: Explanation, best: Explanation) -> Finding:
    gain, whole = (each.gain(search.base)[0] for each in (explanation, best))
    certainty = 1 - explanation.nll / search.chance
    # surely better; as good as the best; and good enough to be of a model that has learnt
    likely = gain / (gain + GAIN) * gain / whole * min(1.0, 2 * certainty) ** 2
    fixes = ", and ".join(each.fix for each in explanation.hypotheses)
    return Finding(
        what="; and ".join(each.what for each in explanation.hypotheses),
        where=_where(
            search.model, [name for each in explanation.hypotheses for name in each.parameters]
        ),
        seen=f"perplexity {shown(search.base.plain)} -> {shown(explanation.plain)} if {fixes}",
        likely=round(likely, 2),
        fix=" ".join(filter(None, (_line(search.model, each) for each in explanation.hypotheses))),
    )


def _hopeless(search: Search) -> Iterator[Finding]:
    if search.base.nll > CHANCE * search.chance:
        cost = shown(search.base.plain)
        yield Finding(
            "a text is no likelier than chance, and no hypothesis makes it so",
            (),
            f"perplexity {cost}, where each of {search.model.config.vocab:,} tokens is alike",
            0.5,
            "Is the model untrained, or the tokenizer another's?",
        )


def shown(nll: float) -> str:
    """A perplexity, as text."""
    value = math.exp(min(nll, 700.0))
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _where(model: Model, names: Iterable[str]) -> tuple[str, ...]:
    """The file's own names of parameters, alike ones once."""
    provenance = model.provenance
    sources = {
        target: step.sources
        for step in (provenance.plan.steps if provenance else ())
        for target in step.targets
    }
    names_in_file = dict.fromkeys(source for name in names for source in sources.get(name, (name,)))
    return (
        tuple(names_in_file)
        if len(names_in_file) <= FEW_NAMES
        else tuple(dict.fromkeys(map(stars, names_in_file)))
    )


def _line(model: Model, hypothesis: Hypothesis) -> str:
    if model.provenance is None:
        return ""
    spec, dialect = spec_of(model), model.provenance.origin.dialect
    lines = [field_line(spec, name, dialect) for name in hypothesis.config]
    kinds = {stars(name): name for name in hypothesis.parameters}
    lines += [rule_line(spec, name, dialect) for name in kinds.values()]
    unique = [line for line in dict.fromkeys(lines) if line][:3]
    return " ".join(f"It is read by {line}." for line in unique)
