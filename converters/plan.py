"""Prove that spec, config and headers fit completely, or report everything that does not.

No weights are read here, and torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from converters.formats import TensorInfo
from converters.language import NUMBER_WORDS, Binding, Ref, Rule, Sizes, Template, Transform, solve
from converters.spec import Dialect, Spec
from zoo.errors import (
    ConfigError,
    DtypeMismatch,
    DuplicateTensor,
    MissingTensors,
    PlanError,
    ShapeMismatch,
    SpecError,
    UnexpectedTensors,
    ZooError,
    did_you_mean,
    listing,
)

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_SHOWN = 20  # problems of a kind that a message lists
WRAPPERS = {
    "base_model.model.": "a LoRA or another adapter of peft",
    "_forward_module.": "Lightning's Fabric",
    "module.": "DataParallel",
    "_orig_mod.": "torch.compile",
    "model.module.": "DeepSpeed",
    "state_dict.": "a nested state_dict",
}


class Native(NamedTuple):
    """A model's arrays: the shape of each, and further names of the same array."""

    shapes: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, str] = {}  # further name -> name in `shapes`


class PlanStep(NamedTuple):
    """One use of one rule: these tensors on disk become these tensors of the model."""

    rule: Rule
    transform: Transform | None  # None: unchanged
    sources: tuple[str, ...]  # names on disk, in the transform's grid order
    targets: tuple[str, ...]
    also: tuple[tuple[str, ...], ...] = ()  # names on disk that must hold the same arrays


@dataclass(frozen=True)
class Plan:
    """A complete correspondence between a checkpoint and a model."""

    spec: Spec
    dialect: Dialect
    native: Native
    header: Mapping[str, TensorInfo]
    steps: tuple[PlanStep, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)  # name on disk -> reason
    modern: Mapping[str, str] = field(
        default_factory=dict
    )  # legacy name on disk -> its current name

    def rule_of(self) -> dict[str, str]:
        """Return native name -> the rule that makes it."""
        return {target: str(step.rule) for step in self.steps for target in step.targets}

    def describe(self, inverse: bool = False) -> str:
        """Return the plan as text: each step with shapes and bytes, then what is dropped.

        `inverse` shows the steps of a writer: from the model to the names on disk.
        """
        rows = [("source", "target", "axes", "shape", "dtype", "bytes")]
        total = 0
        for step in self.steps:
            first = self.header[step.sources[0]]
            size = sum(self.header[s].nbytes for s in step.sources)
            total += size
            also = f" (= {listing(s for names in step.also for s in names)})" if step.also else ""
            names = (_shorten(step.sources) + also, _shorten(step.targets))
            rule = step.rule
            axes = (str(rule.source.pattern), " ".join(str(t.pattern) for t in rule.targets))
            if inverse:
                names, axes = names[::-1], axes[::-1]
            pattern = "" if step.transform is None else " -> ".join(axes)
            shape = "x".join(map(str, first.shape))
            rows.append((*names, pattern, shape, first.dtype, f"{size:,}"))
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines += [f"dropped: {name}: {reason}" for name, reason in self.dropped.items()]
        count = sum(len(step.targets) for step in self.steps)
        return "\n".join([*lines, f"{count} native tensors, {total:,} bytes"])


def _shorten(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"


def make_plan(
    spec: Spec,
    dialect: str,
    config: Mapping[str, object],
    native: Native,
    header: Mapping[str, TensorInfo],
    where: str = "checkpoint",
    spare: Callable[[str], str] = lambda name: "",
) -> Plan:
    """Prove a complete plan, or raise one error that lists everything wrong.

    Args:
        spec: The mapping of an architecture.
        dialect: Whose names the tensors on disk have.
        config: Native config fields.
        native: The model's arrays.
        header: Name, shape and dtype of each tensor on disk.
        where: What the checkpoint is called in messages.
        spare: Returns why a tensor that no rule maps may be left out; empty if it may not.

    Returns:
        The plan: every native array is made once, every tensor on disk is used or dropped by name.

    Raises:
        PlanError: With all problems; its subclass is that of the gravest, such as MissingTensors.

    Example:
        >>> from converters.spec import parse_spec
        >>> spec = parse_spec("tiny", {"hf": {"weights": {"wte.weight": "embed.weight"}}})
        >>> header = {"wte.weight": TensorInfo("wte.weight", (5, 2), "F32")}
        >>> plan = make_plan(spec, "hf", {}, Native({"embed.weight": (5, 2)}), header)
        >>> plan.rule_of()
        {'embed.weight': 'wte.weight: embed.weight'}
    """
    planner = _Planner(spec, spec.dialect(dialect), config, native, header, where)
    planner.spare = spare
    return planner.plan()


def identity_plan(native: Native, header: Mapping[str, TensorInfo], where: str) -> Plan:
    """Return the plan of a native checkpoint, whose names are the model's own."""
    spec = _own_names(native)
    return _Planner(spec, spec.dialect("native"), {}, native, header, where).plan()


def _own_names(native: Native) -> Spec:
    refs = [Ref(Template((name,)), None) for name in native.shapes]
    dialect = Dialect("native", where="native", weights=tuple(Rule(ref, (ref,)) for ref in refs))
    return Spec("native", "native", {}, {"native": dialect})


class Fitting(NamedTuple):
    """The best partial plan, used to explain why the full plan failed."""

    steps: tuple[PlanStep, ...]
    # tensors of another shape: name on disk -> (expected shape, native names)
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]


def what_fits(
    spec: Spec | None,
    dialect: str,
    config: Mapping[str, object],
    native: Native,
    header: Mapping[str, TensorInfo],
) -> Fitting:
    """Return the steps whose tensors are there in the right shape; without a spec, by name."""
    spec = spec or _own_names(native)
    return _Planner(spec, spec.dialect(dialect), config, native, header, "").what_fits()


def target_names(
    spec: Spec,
    dialect: str,
    config: Mapping[str, object],
    native: Native,
    *,
    bare: bool,
    alternatives: bool = False,
) -> dict[str, TensorInfo]:
    """Return the header that a writer of `dialect` publishes: names and shapes.

    Args:
        spec: The mapping of an architecture.
        dialect: Whose names to return.
        config: Native config fields.
        native: The model's arrays.
        bare: Whether to omit the prefix, as files of a class without a head do.
        alternatives: Whether alternative rules replace those they stand for.
    """
    planner = _Planner(spec, spec.dialect(dialect), config, native, {}, dialect)
    planner.alternatives_first = alternatives
    header: dict[str, TensorInfo] = {}
    for use in planner.uses():
        if any(target in native.ties for target in use.targets):
            continue  # a tied name is written once, under the name that owns the array
        prefix = "" if bare or use.rule in planner.dialect.heads else planner.dialect.prefix
        for name in (n for names in (use.sources, *use.copies) for n in names):
            header[prefix + name] = TensorInfo(prefix + name, use.shape, "F32")
    planner.raise_problems()
    return header


# --- the planner ---------------------------------------------------------------------------------

_NativeSide = tuple[str, Ref, tuple[int, ...]]  # a native tensor, its side of the rule, its shape


class _Use(NamedTuple):
    """A rule under one binding of its loops, before names on disk are known."""

    rule: Rule
    binding: Binding
    targets: tuple[str, ...]
    transform: Transform | None
    sources: tuple[str, ...]  # canonical names, in grid order
    copies: tuple[tuple[str, ...], ...]  # replicas of them
    shape: tuple[int, ...]  # of each source


class _Planner:
    def __init__(
        self,
        spec: Spec,
        dialect: Dialect,
        config: Mapping[str, object],
        native: Native,
        header: Mapping[str, TensorInfo],
        where: str,
    ) -> None:
        self.spec, self.dialect, self.native = spec, dialect.under(config), native
        self.header, self.where = header, where
        self.problems: list[tuple[type[ZooError], str]] = []
        self.causes: list[str] = []  # likely causes
        self.fields = {n: v for n, v in config.items() if type(v) is int and v > 1}
        self.axes: Sizes = dict(NUMBER_WORDS)
        for axis, name in spec.axes.items():
            whole, _, parts = (part.strip() for part in name.partition("/"))
            if isinstance(size := config.get(whole), int):
                if size < 1:
                    field_name = self.dialect.reference_field(whole)
                    raise ConfigError(f"{where}: {field_name}: {size} is not positive")
                # `heads / shards`: how many each file has of what is split over several
                count = config.get(parts, 1)
                assert isinstance(count, int)
                if size % count:
                    field_name = self.dialect.reference_field(whole)
                    raise ConfigError(
                        f"{where}: {field_name}: {size} cannot be cut into {count} {parts}"
                    )
                self.axes[axis] = size // count
        self.alternatives_first = False
        self.spare: Callable[[str], str] = lambda name: ""
        self._transforms: dict[tuple[int, tuple[tuple[str, int], ...]], Transform] = {}

    def problem(self, kind: type[ZooError], text: str) -> None:
        self.problems.append((kind, text))

    def raise_problems(self) -> None:
        """Raise one error for all problems, of the gravest class among them."""
        if not self.problems:
            return
        gravity: list[type[ZooError]] = [
            SpecError,
            ConfigError,
            DuplicateTensor,
            MissingTensors,
            ShapeMismatch,
            DtypeMismatch,
            UnexpectedTensors,
        ]
        kinds = {kind for kind, _ in self.problems}
        kind = next((k for k in gravity if k in kinds), PlanError)
        lines = [f"{self.where}:", *self.causes]
        for each in gravity:
            texts = [text for error, text in self.problems if error is each]
            lines += texts[:_SHOWN]
            if len(texts) > _SHOWN:
                lines.append(f"… and {len(texts) - _SHOWN} more of this kind")
        raise kind("\n  ".join(lines))

    # --- rules under their bindings ---

    def uses(self) -> list[_Use]:
        """Return every use of a rule whose native tensors exist: the proof of the native side."""
        uses = list(self._alternatives())
        instead = {target for use in uses for target in use.targets}
        produced = {target: use.rule for use in uses for target in use.targets}
        for rule in self.dialect.weights + self.dialect.heads:
            for binding in self._bindings(rule):
                before = len(self.problems)
                use = self._use(rule, binding)
                if use is None or instead & set(use.targets):
                    if use is not None or instead & set(self._targets(rule, binding)):
                        del self.problems[before:]  # of a rule that does not apply here
                    continue
                for target in use.targets:
                    if target in produced:
                        self.problem(SpecError, f"{target}: produced twice, also by {rule}")
                    produced[target] = rule
                uses.append(use)
        owners = {self.native.ties.get(name, name) for name in produced}
        if unmapped := [name for name in self.native.shapes if name not in owners]:
            self.problem(
                SpecError,
                f"no rule for {listing(unmapped)} of the model. "
                f"Add one in {self.dialect.where or self.spec.where}.weights",
            )
        return uses

    def _alternatives(self) -> Iterator[_Use]:
        """Yield alternative rules whose tensors are on disk; they replace the usual ones.

        Of rules that read the same names, the one counts whose shape fits.
        """
        same = {str(rule.source.name) for rule in self.dialect.weights + self.dialect.heads}
        for rule in self.dialect.alternatives:
            for binding in self._bindings(rule):
                before = len(self.problems)
                use = self._use(rule, binding)
                shapes = [
                    self.header[name].shape
                    for source in (use.sources if use is not None else ())
                    for name in (self.dialect.prefix + source, source)
                    if name in self.header
                ]
                alike = str(rule.source.name) in same
                fits = bool(shapes) and (not alike or use is None or shapes[0] == use.shape)
                if use is not None and (fits or self.alternatives_first):
                    yield use
                elif alike:
                    del self.problems[before:]

    def _targets(self, rule: Rule, binding: Binding) -> list[str]:
        every = [t.name for t in rule.targets if set(t.name.placeholders) <= set(binding)]
        return [name.format(binding) for name in every]

    def _knows(self, name: str) -> bool:
        return name in self.native.shapes or name in self.native.ties

    def _bindings(self, rule: Rule) -> Iterator[Binding]:
        ranges = []
        for name, placeholder in rule.loops.items():
            if placeholder.values:
                ranges.append(range(len(placeholder.values)))
            else:
                ranges.append(self._numbers(name, [t.name for t in rule.targets]))
        for point in product(*ranges):
            yield dict(zip(rule.loops, point, strict=True))

    def _numbers(self, name: str, templates: Sequence[Template]) -> range:
        if name in self.axes:
            return range(self.axes[name])
        names = list(self.native.shapes) + list(self.native.ties)
        bindings = (t.match(n) for t in templates for n in names)
        return range(1 + max((b[name] for b in bindings if b), default=-1))

    def _shape(self, name: str) -> tuple[int, ...] | None:
        return self.native.shapes.get(self.native.ties.get(name, name))

    def _use(self, rule: Rule, binding: Binding) -> _Use | None:
        if rule.plain and not rule.replicated:
            target = rule.targets[0].name.format(binding)
            if (shape := self._shape(target)) is None:
                return None
            source = rule.source.name.format(binding)
            return _Use(rule, binding, (target,), None, (source,), (), shape)
        targets: list[str] = []
        refs: list[Ref] = []
        sizes: Sizes = {}
        for ref in rule.targets:
            spread = rule.spread(ref)
            for name, placeholder in spread.items():
                count = len(placeholder.values) or len(self._numbers(name, [ref.name]))
                sizes[name] = count
            for point in product(*(range(sizes[name]) for name in spread)):
                here = {**binding, **dict(zip(spread, point, strict=True))}
                targets.append(ref.name.format(here))
                refs.append(ref)
        there = [name for name in targets if self._knows(name)]
        if not there:
            return None
        if len(there) != len(targets):
            missing = listing(n for n in targets if n not in there)
            self.problem(SpecError, f"{rule}: the model has {there[0]} but not {missing}")
            return None
        shapes = [self.native.shapes[self.native.ties.get(n, n)] for n in targets]
        sides = list(zip(targets, refs, shapes, strict=True))
        return self._transformed(rule, binding, sides, sizes)

    def _transformed(
        self, rule: Rule, binding: Binding, sides: Sequence[_NativeSide], sizes: Sizes
    ) -> _Use | None:
        for p in (*rule.source.name.placeholders.values(), *rule.loops.values()):
            if p.values:
                sizes[p.name] = len(p.values)
        copies = {name: self._count_on_disk(rule, name, binding) for name in rule.replicated}
        if not rule.plain:
            mine = _axes_of(rule)
            sizes.update({a: n for a, n in self.axes.items() if a in mine and a not in sizes})
            if not self._solve(rule, binding, sides, sizes):
                return None
            key = (id(rule), tuple(sorted((a, n) for a, n in sizes.items())))
            transform = self._transforms.setdefault(key, Transform(rule, key[1]))
            shape = transform.source_shape()
        else:
            transform, shape = None, sides[0][2]
        grids = []
        for copy in product(*(range(n) for n in copies.values())):
            bound = {**binding, **dict(zip(copies, copy, strict=True))}
            points = transform.grid(rule.stacked) if transform else [{}]
            grids.append(tuple(rule.source.name.format({**bound, **p}) for p in points))
        if _is_identity(rule):
            transform = None
        targets = tuple(name for name, _, _ in sides)
        return _Use(rule, binding, targets, transform, grids[0], tuple(grids[1:]), shape)

    def _count_on_disk(self, rule: Rule, name: str, binding: Binding) -> int:
        """Return how many values a source index has on disk."""
        if name in self.axes:
            return self.axes[name]
        highest = 0
        for disk in self.header:
            for canonical in self._canonical(disk):
                match = rule.source.name.match(canonical)
                if match and all(match[k] == v for k, v in binding.items() if k in match):
                    highest = max(highest, match[name] + 1)
        return max(1, highest)

    def _solve(
        self, rule: Rule, binding: Binding, sides: Sequence[_NativeSide], sizes: Sizes
    ) -> bool:
        """Solve sizes from native shapes, then from headers; return False if they do not fit."""
        for _ in range(2):  # a ragged axis may need the size of a later tensor
            for name, ref, shape in sides:
                assert ref.pattern is not None
                if problem := solve(ref.pattern, shape, sizes):
                    self.problem(ShapeMismatch, f"{name}: {rule}: {problem}")
                    return False
        wanted = _axes_of(rule) | set(rule.stacked)
        if wanted - sizes.keys() and self.header:
            for name in rule.stacked:
                if name not in sizes:
                    sizes[name] = self._count_on_disk(rule, name, binding)
            self._solve_from_header(rule, binding, sizes)
            for _, ref, shape in sides:
                assert ref.pattern is not None
                solve(ref.pattern, shape, sizes)
        if missing := sorted(wanted - sizes.keys()):
            self.problem(
                SpecError,
                f"{rule}: size of axis '{missing[0]}' cannot be solved from native shapes, headers "
                f"and config; name its config field in {self.spec.where}: axes",
            )
        return not missing

    def _solve_from_header(self, rule: Rule, binding: Binding, sizes: Sizes) -> None:
        first = dict.fromkeys((*rule.stacked, *rule.replicated), 0)
        name = rule.source.name.format({**binding, **first})
        for disk in (self.dialect.prefix + name, name):
            if disk in self.header:
                assert rule.source.pattern is not None
                solve(rule.source.pattern, self.header[disk].shape, sizes)

    # --- names on disk ---

    def _canonical(self, disk: str) -> tuple[str, ...]:
        prefix = self.dialect.prefix
        return (disk[len(prefix) :], disk) if prefix and disk.startswith(prefix) else (disk,)

    def plan(self) -> Plan:
        uses = self.uses()
        if any(kind is SpecError for kind, _ in self.problems):
            self.raise_problems()
        disk = _Disk(self, uses)
        missing: list[str] = []
        steps = [step for step in self._steps(uses, disk, missing) if step is not None]
        dropped = disk.leftovers()
        self._check_missing(missing, disk)
        self.raise_problems()
        header_order = {name: k for k, name in enumerate(self.header)}
        steps.sort(key=lambda step: header_order[step.sources[0]])
        return Plan(
            self.spec,
            self.dialect,
            self.native,
            self.header,
            tuple(steps),
            dropped,
            disk.modern,
        )

    def what_fits(self) -> Fitting:
        uses = self.uses()
        steps, misshapen = list[PlanStep](), dict[str, tuple[tuple[int, ...], tuple[str, ...]]]()
        for step in self._steps(uses, _Disk(self, uses), []):
            if step is None:
                continue
            transform = step.transform
            wanted = self._shape(step.targets[0])
            if transform is not None:
                wanted = transform.source_shape()
            misfits = [name for name in step.sources if self.header[name].shape != wanted]
            if not misfits:
                steps.append(step)
            misshapen |= dict.fromkeys(misfits, (wanted or (), step.targets))
        return Fitting(tuple(steps), misshapen)

    def _steps(
        self, uses: list[_Use], disk: _Disk, missing: list[str]
    ) -> Iterator[PlanStep | None]:
        groups: dict[tuple[str, ...], list[_Use]] = {}
        for use in uses:
            owners = tuple(self.native.ties.get(t, t) for t in use.targets)
            groups.setdefault(owners, []).append(use)
        for owners, group in groups.items():
            yield self._step(owners, group, disk, missing)

    def _step(
        self, owners: tuple[str, ...], group: list[_Use], disk: _Disk, missing: list[str]
    ) -> PlanStep | None:
        """Return the step that fills `owners` from the first use on disk; others must agree."""
        present: list[tuple[_Use, tuple[str, ...]]] = []
        for use in group:
            heads = use.rule in self.dialect.heads
            for names in (use.sources, *use.copies):
                names_on_disk = [disk.find(name, heads) for name in names]
                if all(names_on_disk):
                    present.append((use, tuple(f for f in names_on_disk if f)))
                elif any(names_on_disk) or (use.copies and use is group[0]):
                    gone = (n for n, f in zip(names, names_on_disk, strict=True) if not f)
                    missing.extend(disk.spelt(n, heads) for n in gone)
                    return None
        if not present:
            present = [(u, names) for u in group for names in disk.tied(u.sources)]
        if not present:
            heads = group[0].rule in self.dialect.heads
            missing.extend(disk.spelt(n, heads) for n in group[0].sources)
            return None
        for use, names in present:
            self._check(use, names)
        use, names = present[0]
        also = [other for _, other in present[1:]]
        also += [other for other in disk.tied(use.sources) if other not in (names, *also)]
        return PlanStep(use.rule, use.transform, names, owners, tuple(also))

    def _by_field(self, shape: Sequence[int]) -> str:
        """Return a shape in the names of config fields of these sizes; empty if there is none."""
        named = {size: name for name, size in reversed(self.fields.items())}
        if not named.keys() & set(shape):
            return ""
        return f" = [{' '.join(f'{named[n]}={n}' if n in named else str(n) for n in shape)}]"

    def _check(self, use: _Use, names: Sequence[str]) -> None:
        for name in names:
            info = self.header[name]
            if info.shape != use.shape:
                axes = self._by_field(use.shape)
                if use.transform is not None and use.rule.source.pattern is not None:
                    axes = f" = {use.rule.source.pattern.describe(dict(use.transform.sizes))}"
                into = f" for {listing(use.targets)}"
                self.problem(
                    ShapeMismatch,
                    f"{name}: shape {list(info.shape)}, expected {list(use.shape)}{axes}{into}",
                )
            if info.dtype not in FLOATS:
                self.problem(
                    DtypeMismatch,
                    f"{name}: dtype {info.dtype}; a weight is one of {', '.join(sorted(FLOATS))}",
                )
        dtypes = {self.header[name].dtype for name in names}
        if len(dtypes) > 1:
            self.problem(
                DtypeMismatch, f"{listing(names)}: one array in {' and '.join(sorted(dtypes))}"
            )

    def _check_missing(self, missing: list[str], disk: _Disk) -> None:
        if missing or disk.unexpected:
            self._check_counts(disk)
        if not missing:
            return
        unexpected = disk.unexpected
        counts = []
        for name in missing[:20]:
            near = did_you_mean(name, unexpected[:200])
            counts.append(name + (f" ({near.strip()})" if near else ""))
        if hint := disk.wrapper_hint():
            self.causes.append(hint)
        if not self.header:
            self.causes.append("The files hold no tensors at all")
        self.problem(
            MissingTensors,
            f"{_tensors(len(missing))} missing: {listing(counts)}"
            + (f" … {len(missing)} in all" if len(missing) > 20 else ""),
        )

    def _check_counts(self, disk: _Disk) -> None:
        """Check that indices on disk are exactly those that the config declares."""
        suspects = [*disk.unexpected, *disk.used]
        for axis, field_name in self.spec.axes.items():
            if axis not in self.axes:
                continue
            templates = [
                r.source.name
                for r in self.dialect.rules
                if (p := r.source.name.placeholders.get(axis)) and not p.values
            ]
            if not templates:
                continue
            declared = self.axes[axis]
            indices: set[int] = set()
            for name in suspects:
                for canonical in self._canonical(name):
                    match = next((m for t in templates if (m := t.match(canonical))), None)
                    if match and axis in match:
                        indices.add(match[axis])
            if not indices or indices == set(range(declared)):
                continue
            field = self.dialect.reference_field(field_name)
            if indices == set(range(len(indices))):
                self.problem(
                    ConfigError,
                    f"{field}: {len(indices)} found, {declared} declared in the config",
                )
            elif len(indices) <= declared:
                gone = sorted(set(range(declared)) - indices)
                self.problem(
                    MissingTensors, f"{axis} {listing(map(str, gone))} of 0..{declared - 1} missing"
                )


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def _axes_of(rule: Rule) -> set[str]:
    patterns = [rule.source.pattern, *(t.pattern for t in rule.targets)]
    return {a for p in patterns if p for a in p.axes} - {"1"}


def _is_identity(rule: Rule) -> bool:
    """Return whether brackets say the same on both sides: then they are documentation."""
    return (
        len(rule.targets) == 1
        and rule.source.pattern == rule.targets[0].pattern
        and not rule.stacked
        and not rule.spread(rule.targets[0])
    )


class _Disk:
    """The names on disk: which rules use them, and why each of the others is there."""

    def __init__(self, planner: _Planner, uses: Iterable[_Use]) -> None:
        self.planner = planner
        self.header, self.dialect = planner.header, planner.dialect
        self.used: dict[str, None] = {}
        self.unexpected: list[str] = []
        self.modern: dict[str, str] = {}
        self._with: list[str] = []
        self._without: list[str] = []
        self._canonical_names = {n for use in uses for g in (use.sources, *use.copies) for n in g}
        self._aliases = self._resolve_aliases()

    def spelt(self, name: str, head: bool) -> str:
        """Return a canonical name with the prefix, if other names here have it."""
        prefix = "" if head else self.dialect.prefix
        return prefix + name if any(n.startswith(prefix) for n in self.header) else name

    def find(self, name: str, head: bool) -> str | None:
        """Return the name on disk of a canonical name."""
        prefix = "" if head else self.dialect.prefix
        forms = [prefix + name, name] if prefix else [name]
        forms += self._aliases.get(name, ())
        here = [form for form in forms if form in self.header]
        if len(here) > 1:
            self.planner.problem(
                DuplicateTensor, f"{listing(here)}: one tensor under {len(here)} names"
            )
        if not here:
            return None
        if prefix:
            (self._with if here[0].startswith(prefix) else self._without).append(here[0])
        self.used[here[0]] = None
        if here[0] in self._aliases.get(name, ()):
            self.modern[here[0]] = (prefix if here[0].startswith(prefix) else "") + name
        return here[0]

    def _resolve_aliases(self) -> dict[str, list[str]]:
        """Return canonical name -> its legacy names that are on disk."""
        out: dict[str, list[str]] = {}
        if not self.dialect.aliases:
            return out
        for disk in self.header:
            if disk in self._canonical_names:
                continue
            for canonical in self.planner._canonical(disk):
                for legacy, modern in self.dialect.aliases:
                    if (binding := legacy.match(canonical)) is not None:
                        name = modern.format(binding)
                        if disk not in out.setdefault(name, []):
                            out[name].append(disk)
        return out

    def tied(self, sources: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Return further names on disk of the array `sources`, by the spec's `tied`."""
        if len(sources) > 1:
            return []
        groups: list[tuple[str, ...]] = []
        for other, main in self.dialect.tied:
            if (binding := main.match(sources[0])) is None:
                continue
            name = other.format(binding)
            if name in self._canonical_names:
                continue  # a rule of its own reads it
            for form in dict.fromkeys((self.dialect.prefix + name, name)):
                if form in self.header:
                    self.used[form] = None
                    groups.append((form,))
        return groups

    def leftovers(self) -> dict[str, str]:
        """Drop by name what the spec names; everything left is unexpected."""
        self._check_prefix()
        dropped: dict[str, str] = {}
        for name in self.header:
            if name in self.used:
                continue
            reason, hint = self._why(name)
            reason = reason or self.planner.spare(name)
            if reason:
                dropped[name] = reason
            else:
                self.unexpected.append(name)
                if hint:
                    self.planner.problem(UnexpectedTensors, f"{name}: {hint}")
        plain = [n for n in self.unexpected if not self._why(n)[1]]
        if plain:
            self.planner.problem(
                UnexpectedTensors,
                f"{_tensors(len(plain))} that no rule maps: {listing(plain)}. Map or drop them in "
                f"{self.dialect.where or self.planner.spec.where}",
            )
        return dropped

    def _why(self, name: str) -> tuple[str, str]:
        """Return (the reason to drop a name, a hint why it cannot be dropped)."""
        dialect = self.dialect
        for canonical in self.planner._canonical(name):
            if (reason := dialect.dropped(canonical)) is not None:
                return reason, ""
        modern = [
            m.format(b)
            for c in self.planner._canonical(name)
            for legacy, m in dialect.aliases
            if (b := legacy.match(c)) is not None
        ]
        for canonical in (*self.planner._canonical(name), *modern):
            for rule in dialect.rules:
                if (binding := rule.source.name.match(canonical)) is None:
                    continue
                targets = [
                    t.name.format({**dict.fromkeys(t.name.placeholders, 0), **binding})
                    for t in rule.targets
                ]
                if any(self.planner._knows(t) for t in targets):
                    continue
                for part, reason in dialect.optional.items():
                    if targets[0] == part or targets[0].startswith(f"{part}."):
                        return reason, ""
                if rule in dialect.heads:
                    return f"{targets[0]} belongs to a head that was not asked for", ""
                return "", f"the config's model has no {listing(targets)}"
            for other, main in dialect.tied:
                if (binding := other.match(canonical)) is not None:
                    why = f"tied to {main.format(binding)}, which this model lacks"
                    return why, ""
        return "", ""

    def _check_prefix(self) -> None:
        if self._with and self._without:
            few = min(self._with, self._without, key=len)
            self.planner.problem(
                DuplicateTensor,
                f"prefix '{self.dialect.prefix}' on {len(self._with)} names and not on "
                f"{len(self._without)}: {listing(few)}",
            )

    def wrapper_hint(self) -> str:
        for wrapper, cause in WRAPPERS.items():
            if self.unexpected and all(name.startswith(wrapper) for name in self.unexpected):
                return (
                    f"Every unknown name starts with '{wrapper}', which {cause} leaves: "
                    "save the inner module's state_dict"
                )
        return ""
