"""Guess an architecture's spec, model file and registry entry from names and shapes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from converters.language import Rule, parse_rule
from converters.plan import Native, make_plan
from converters.spec import SPECS, Spec, load_spec, parse_spec
from converters.strict_yaml import parse_yaml, read_yaml
from scaffold.fields import Fields
from scaffold.lines import Line, collapse, elementary, reads
from scaffold.names import ALIKE, Family, alike, families, fits, fused, plain
from scaffold.text import MARK, flow, inserted, quoted
from zoo import registry
from zoo.errors import ConfigError, SpecError, ZooError
from zoo.registry import Architecture

if TYPE_CHECKING:
    from scaffold.reference import Probe, Survey


class Guess:
    """The rules that follow from names and shapes in all tiny checkpoints of the reference."""

    def __init__(self, like: Architecture, survey: Survey) -> None:
        self.like, self.survey = like, survey
        self.spec = load_spec(like.spec)
        self.fields = Fields(like, self.spec.dialect("hf"), survey)
        self.raw = read_yaml(SPECS / like.spec / "hf.yaml", SpecError)
        # the similar spec's rules, expanded -> whether they map a tensor here
        self.kept: dict[tuple[str, str], dict[Rule, bool]] = {
            (section, source): dict.fromkeys(elementary(parse_rule(source, targets)), False)
            for section in ("weights", "heads")
            for source, targets in (self.raw.get(section) or {}).items()
        }
        self.guessed: list[Line] = []
        self.proposed: dict[str, tuple[Family, str]] = {}  # on disk; what the model should call it
        self.unmapped: dict[str, Family] = {}  # in the model, on no disk
        self.owned: set[str] = set()  # families that the model held in some checkpoint
        for probe in survey.probes:
            self._learn(probe)

    @property
    def misses(self) -> list[str]:
        """The tensors that keep the similar architecture's model from fitting."""
        return [
            *(f"on disk alone: {disk}" for disk, _ in self.proposed.values()),
            *(f"in the model alone: {native}" for native in self.unmapped.values()),
        ]

    def _learn(self, probe: Probe) -> None:
        native = self._native(probe)
        disk = {name: (shape, head) for name, shape, head in self._disk(probe)}
        used: set[str] = set()
        filled: set[str] = set()
        for rules in self.kept.values():
            for rule in rules:
                rules[rule] |= reads(rule, disk, native, used, filled)
        for line in self.guessed:
            for rule in elementary(line.rule):
                reads(rule, disk, native, used, filled)
        native_families = families((name, shape, False) for name, shape in native.shapes.items())
        self.owned.update(family.name for family in native_families)
        here = [f for f in native_families if f.name not in {plain(n) for n in filled}]
        there = families((n, s, h) for n, (s, h) in disk.items() if n not in used)
        self._match([f for f in there if f.name not in self.proposed], here)

    def _native(self, probe: Probe) -> Native:
        import torch

        from zoo.checkpoints.build import native_of

        # of several heads the fullest: that is the one whose tensors the reference writes
        head = self.like.heads[self.survey.classes[probe.reference_class]][0]
        with torch.device("meta"):
            return native_of(self.like.model(self.fields.native(probe.config, head)))

    def _disk(self, probe: Probe) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        """Yield (name without prefix, shape, whether it belongs to a head)."""
        prefix = self.survey.prefix
        some = bool(prefix) and any(name.startswith(prefix) for name in probe.header)
        for name, info in probe.header.items():
            under = some and name.startswith(prefix)
            yield name.removeprefix(prefix) if under else name, info.shape, some and not under

    def _match(self, disk: list[Family], native: list[Family]) -> None:
        """Pair tensors by name and shape, then fused tensors with their parts; record the rest."""
        scored = [(alike(d, n), d, n) for d in disk for n in native if fits(d, n)]
        for score, d, n in sorted(scored, key=lambda s: -s[0]):
            if score >= ALIKE and d in disk and n in native:
                disk.remove(d)
                native.remove(n)
                self._pair(d, n)
        for d in disk:
            if parts := fused(d, native):
                self._fuse(d, parts)
                native = [n for n in native if n not in parts]
            else:
                self.proposed[d.name] = (d, self._native_name(d))
        wanted = {name for _, name in self.proposed.values()}
        for n in native:
            if n.name not in wanted:
                self.unmapped.setdefault(n.name, n)

    def _pair(self, disk: Family, native: Family) -> None:
        if disk.shape == native.shape:
            self.guessed.append(Line(disk.name, native.name, disk.head))
        else:
            note = "guessed: the file holds the transpose"
            texts = (f"{disk.name} [i o]", f"{native.name} [o i]")
            self.guessed.append(Line(*texts, disk.head, note))

    def _fuse(self, disk: Family, parts: Sequence[Family]) -> None:
        across = disk.shape[0] != sum(p.shape[0] for p in parts)
        names = [p.path[-1] for p in parts]
        same = len({p.shape for p in parts}) == 1
        sides = ["o"] * len(parts) if same else names
        group = "(n o)" if same else f"({' | '.join(names)})"
        bias = len(disk.shape) == 1
        left = f"[{group}]" if bias else f"[i {group}]" if across else f"[{group} i]"
        targets: str | list[str] = [
            f"{part.name} [{side}]" if bias else f"{part.name} [{side} i]"
            for part, side in zip(parts, sides, strict=True)
        ]
        if same:
            path = [*parts[0].path[:-1], f"{{n={','.join(names)}}}", parts[0].leaf]
            targets = f"{'.'.join(path)} {'[o]' if bias else '[o i]'}"
        note = f"guessed: {', '.join(names)} one behind the other"
        if "q" in names:
            heads = "h n e" if same else "g (r | one | one) e"
            note += f"; interleaved by head it is [({heads}){'' if bias else ' i'}]"
        self.guessed.append(Line(f"{disk.name} {left}", targets, disk.head, note))

    def _native_name(self, disk: Family) -> str:
        """Return a native name: the module that its siblings map to, then its own name."""
        moved: dict[tuple[str, ...], list[str]] = {}
        for rule in self._rules():
            here, there = (str(r.name).split(".")[:-1] for r in (rule.source, rule.targets[0]))
            while here and there and here[-1].startswith("{") == there[-1].startswith("{"):
                moved.setdefault(tuple(here), there)
                here, there = here[:-1], there[:-1]
        for cut in range(len(disk.path), 0, -1):
            if (start := moved.get(tuple(disk.path[:cut]))) is not None:
                return ".".join([*start, *disk.path[cut:], disk.leaf])
        return ".".join([*disk.path, disk.leaf])

    def _rules(self) -> Iterator[Rule]:
        """Yield the rules that apply, one for each enumerated name."""
        for rules in self.kept.values():
            yield from (rule for rule, reads in rules.items() if reads)
        for line in self.guessed:
            yield from elementary(line.rule)

    # --- the spec as text ---

    def lines(self) -> list[Line]:
        out: list[Line] = []
        for (section, source), rules in self.kept.items():
            head = section == "heads"
            stale = [r for r, reads in rules.items() if not reads and self._owns(r)]
            if not stale and (any(rules.values()) or head):
                out.append(Line(source, self.raw[section][source], head))
            else:
                pairs = [r for r, reads in rules.items() if reads]
                out += [Line(s, t, head) for s, t in collapse(pairs)]
        for head in (False, True):
            plain = [x.rule for x in self.guessed if not x.note and x.head == head]
            out += [Line(s, t, head, "guessed by name") for s, t in collapse(plain)]
        out += [line for line in self.guessed if line.note]
        for head in (False, True):
            new = [(d, n) for d, n in self.proposed.values() if d.head == head]
            pairs = [parse_rule(d.name, n) for d, n in new]
            for source, target in collapse(pairs):
                note = f"guessed: named as its neighbors are; {self.like.name}'s model has none"
                out.append(Line(source, target, head, note))
        return out

    def _owns(self, rule: Rule) -> bool:
        names = {plain(str(t.name)) for t in rule.targets}
        return any(t in self.owned for t in names)

    def spec_text(self, name: str) -> str:
        lines = self.lines()
        out = [
            "# yaml-language-server: $schema=../../../docs/schemas/dialect.json",
            f"# {name}: drafted from {self.survey.reference_class} beside {self.like.name}.",
        ]
        if self.survey.prefix:
            out.append(f"prefix: {self.survey.prefix}")
        for section, head in (("weights", False), ("heads", True)):
            mine = [line for line in lines if line.head == head]
            out += [f"{section}:"] if mine else []
            for before, line in zip([None, *mine], mine, strict=False):
                out += line.text()[before is not None and before.note == line.note != "" :]
        for section in ("optional", "tied", "aliases", "drop"):
            if carried := self._carried(section):
                out.append(f"{section}:")
                out += [f"  {quoted(key)}: {flow(value)}" for key, value in carried.items()]
        return "\n".join([*out, *self.fields.text()]) + "\n"

    def native_text(self) -> str:
        """Return `native.yaml`: the axes of the similar spec whose fields exist here too."""
        axes = {a: field for a, field in self.spec.axes.items() if field in self.fields.paths}
        schema = "# yaml-language-server: $schema=../../../docs/schemas/native.json"
        return f"{schema}\naxes: {flow(axes)}\n"

    def _carried(self, section: str) -> dict[str, Any]:
        """Return the entries of a section of the similar spec whose modules exist here too."""
        if section == "optional":
            here = {str(rule.targets[0].name).partition(".")[0] for rule in self._rules()}
        else:
            here = {plain(n) for probe in self.survey.probes for n, _, _ in self._disk(probe)}
        return {k: v for k, v in (self.raw.get(section) or {}).items() if _beside(k, here)}

    # --- the model and the proof ---

    def model_text(self, name: str, source: str) -> str:
        """Return the similar model's code with marks for what is missing and superfluous."""
        tree = ast.parse(source)
        end = tree.body[0].end_lineno if ast.get_docstring(tree) is not None else 0
        code = source.splitlines()[end:]
        proposed = self.proposed.values()
        head = [
            f'"""{name}: {MARK} what sets it apart. Below stands {self.like.name} as it is."""',
            "",
            *(f"# {MARK} not here yet: {name}, {disk} on disk" for disk, name in proposed),
            *(f"# {MARK} here and on no disk: {native}" for native in self.unmapped.values()),
            *(f"# {MARK} no field of config.json sets {field}" for field in self.fields.idle),
        ]
        return "\n".join([*head, *code]) + "\n"

    def verdict(self, name: str, text: str) -> list[str]:
        """Return the errors that loading with this spec and the similar model would raise."""
        spec = self._parsed(name, text)
        dialect = spec.dialect("hf")
        verdicts: dict[str, str] = {}
        for probe in self.survey.probes:
            fields, problems = dialect.read_config(probe.config)
            try:
                self.like.config_class(**fields)
            except ConfigError as error:
                problems.append(str(error))
            try:
                sizes = {k: v for k, v in fields.items() if isinstance(v, int)}
                make_plan(spec, "hf", sizes, self._native(probe), probe.header, probe.name)
            except ZooError as error:
                first, *rest = str(error).split("\n  ")
                problems += rest or [first]
            for problem in problems:
                kind = re.sub(r"\d+", "", problem.partition(": ")[0])
                verdicts.setdefault(kind, f"{probe.name}: {problem}")
        return list(verdicts.values())

    def _parsed(self, name: str, text: str) -> Spec:
        texts = {"native": self.native_text(), "hf": text}
        where = f"converters/specs/{name}"
        files = {k: parse_yaml(t, f"{where}/{k}.yaml", SpecError) for k, t in texts.items()}
        return parse_spec(name, files, where)


def _beside(name: str, here: set[str]) -> bool:
    """Return whether `here` has a name below the module of `name`."""
    rules = elementary(parse_rule(name, name))
    paths = [str(rule.source.name).split(".")[:-2] or [str(rule.source.name)] for rule in rules]
    return any(name_here.split(".")[: len(p)] == p for p in paths for name_here in here)


def registered(text: str, name: str, guess: Guess, module: str | None) -> str:
    """Return the registry's text with the new entry; the other entries do not change."""
    survey, like = guess.survey, guess.like
    heads = {new: like.heads[old] for new, old in survey.classes.items()}
    entry = [f"  {name}:", f"    model_type: {survey.model_type}"]
    entry += [f"    model: {module}"] if module else []
    entry += ["    heads:"]
    entry += [f"      {c}: {h[0] if len(h) == 1 else flow(list(h))}" for c, h in heads.items()]
    covered = {head for several in heads.values() for head in several}
    missing = [h for several in like.heads.values() for h in several if h not in covered]
    if missing:
        entry.append(f"      # {MARK} heads of {like.name} that {name} has no class for: {missing}")
    variants = [f"  {name}:"]
    for probe in survey.probes:
        if probe.name == "base":
            config = f"&{name}-config {flow(survey.fields)}"
        elif probe.changes:
            config = f"{{<<: *{name}-config, {flow(dict(probe.changes))[1:]}"
        else:
            config = f"*{name}-config"
        variants.append(f"    {probe.name}: {{class: {probe.reference_class}, config: {config}}}")
    mark = f"  # {MARK} {name}: a published checkpoint, with all that its neighbors say"
    blocks = {"architectures": entry, "checkpoints": [mark], "variants": variants}
    for section, block in blocks.items():
        text = inserted(text, section, name, block)
    architectures = registry.parse_architectures(registry.parse_section(text, "architectures"))
    registry.parse_variants(registry.parse_section(text, "variants"), architectures)
    return text
