"""A new architecture drafted from a reference and a kindred one: rules guessed by name and shape.

What could not be guessed carries the word `unguessed:` in the files written; `left` lists it.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher, get_close_matches, unified_diff
from itertools import combinations, product, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from converters.language import NUMBER_WORDS, Placeholder, Ref, Rule, Template, parse_rule, solve
from converters.plan import Native, make_plan
from converters.spec import SPECS, Dialect, Spec, load_spec, parse_spec, read_yaml
from zoo import registry
from zoo.errors import ConfigError, OutputExists, UsageError, ZooError, did_you_mean
from zoo.registry import Architecture

if TYPE_CHECKING:
    from zoo.parity.scaffold_reference import Probe, Survey

ROOT = Path(__file__).parents[1]
REGISTRY = "registry.yaml"
MARK = "unguessed:"

# What published files call the parts that a native model calls so.
CALLED = {
    "embed": "wte embed_tokens embed_in word_embeddings tok_embeddings embedding embeddings",
    "positions": "wpe position_embeddings embed_positions",
    "norm": "ln_f final_layer_norm final_layernorm layer_norm norm_f",
    "norm1": "ln_1 input_layernorm attention_norm self_attn_layer_norm sa_layer_norm norm_1",
    "norm2": "ln_2 post_attention_layernorm ffn_norm final_layer_norm output_layer_norm norm_2",
    "attn": "self_attn attention self_attention self",
    "q": "q_proj query wq q_lin",
    "k": "k_proj key wk k_lin",
    "v": "v_proj value wv v_lin",
    "out": "o_proj out_proj c_proj dense wo out_lin",
    "mlp": "ffn feed_forward intermediate",
    "gate": "gate_proj w1",
    "up": "up_proj w3 c_fc fc1 dense_h_to_4h fc_in lin1",
    "down": "down_proj w2 c_proj fc2 dense_4h_to_h fc_out lin2",
    "head": "lm_head embed_out",
}
LEAVES = {"gamma": "weight", "beta": "bias"}
LAYERS = {"layers", "layer", "h", "blocks", "block"}
ALIKE = 0.75  # of 1: names that are less alike are not paired


@dataclass(frozen=True)
class Family:
    """Tensors whose names differ in their indices alone."""

    name: str  # with {layer} and the like for numbers
    shape: tuple[int, ...]
    head: bool = False  # on disk: never under the prefix

    @property
    def path(self) -> list[str]:
        return self.name.split(".")[:-1]

    @property
    def leaf(self) -> str:
        leaf = self.name.rpartition(".")[2]
        return LEAVES.get(leaf, leaf)

    @property
    def indices(self) -> list[str]:
        return [part for part in self.path if part.startswith("{")]

    @property
    def tail(self) -> list[str]:
        """The modules below the last index: what tells one tensor of a layer from another."""
        last = max((k for k, part in enumerate(self.path) if part.startswith("{")), default=-1)
        return self.path[last + 1 :] or self.path

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)}"


@dataclass
class Line:
    """One rule of the draft as text, and what a person has to know of it."""

    source: str
    targets: str | list[str]
    head: bool = False
    note: str = ""

    @property
    def rule(self) -> Rule:
        return parse_rule(self.source, self.targets)

    def text(self) -> list[str]:
        out = [f"    # {self.note}"] if self.note else []
        if isinstance(self.targets, str):
            return [*out, f"    {self.source}: {self.targets}"]
        return [*out, f"    {self.source}:", *(f"      - {target}" for target in self.targets)]


@dataclass
class Draft:
    """The texts of the files, and what loading would say of them as they stand."""

    name: str
    only_data: bool
    files: dict[str, str]  # path in the tree -> what will stand there
    added: list[str]  # to the registry
    marks: list[str]
    verdict: list[str]

    def write(self, root: Path = ROOT, *, force: bool = False) -> list[Path]:
        """All of them or none; only force replaces what is there."""
        texts = {root / path: text for path, text in self.files.items()}
        there = [p for p in self.files if p != REGISTRY and (root / p).exists()]
        if there and not force:
            raise OutputExists(f"{', '.join(there)}: there already; --force replaces it")
        staged = {path: path.with_name(f".{path.name}.new") for path in texts}
        try:
            for path, place in staged.items():
                place.write_text(texts[path], encoding="utf-8")
            for path, place in staged.items():
                place.replace(path)
        finally:
            for place in staged.values():
                place.unlink(missing_ok=True)
        return list(texts)


def draft(
    name: str,
    like: str,
    reference: str,
    *,
    root: Path = ROOT,
    only_data: bool | None = None,
    force: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Draft:
    """The files of architecture `name`: three, or two where `like`'s model holds it as it is.

    `only_data` insists on two (True) or three (False); `settings` are fields of the tiny config.
    """
    text = (root / REGISTRY).read_text(encoding="utf-8")
    known = registry.parse_architectures(registry.parse_section(text, "architectures"))
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UsageError(f"{name!r}: the name is a module's: small letters, digits and _")
    if like not in known or like == name:
        near = did_you_mean(like, known.keys() - {name})
        raise UsageError(
            f"--like {like}: "
            + ("that is what is to be drafted" if like == name else "no such architecture")
            + f".{near or f' There is {chr(44).join(known)}.'}"
        )
    if name in known and not force:
        raise OutputExists(f"{REGISTRY}: {name} is there already; --force replaces it")

    from zoo.parity.scaffold_reference import survey  # transformers, and seconds

    entry = known[like]
    found = survey(reference, entry, settings or {})
    for other in known.values():
        if other.model_type == found.model_type and other.name != name:
            raise UsageError(
                f"--reference {reference}: {other.name} has its model_type {other.model_type!r} "
                f"already; add the class to that entry of {REGISTRY}"
            )
    guess = Guess(entry, found)
    if only_data and guess.misses:
        raise UsageError(
            "\n  ".join([f"--only-data: {name} is no {like} with other names:", *guess.misses])
        )
    data = not guess.misses if only_data is None else only_data
    spec = guess.spec_text(name)
    files = {f"converters/specs/{name}.yaml": spec}
    if not data:
        source = root / "zoo" / "models" / f"{entry.module}.py"
        files[f"zoo/models/{name}.py"] = guess.model_text(name, source.read_text(encoding="utf-8"))
    files[REGISTRY] = registered(text, name, guess, entry.module if data else None)
    added = _added(text, files[REGISTRY])
    texts = {**files, REGISTRY: "\n".join(added)}
    marks = [
        f"{path}: {_said(line)}"
        for path, written in texts.items()
        for line in written.splitlines()
        if MARK in line
    ]
    return Draft(name, data, files, added, marks, guess.verdict(name, spec))


def _added(before: str, after: str) -> list[str]:
    lines = unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return [line[1:] for line in list(lines)[2:] if line.startswith("+")]


def left(root: Path = ROOT) -> list[str]:
    """Every mark that is still in the tree: `file:line: what`."""
    return [
        f"{path.relative_to(root)}:{number}: {_said(line)}"
        for pattern in ("zoo/models/*.py", "converters/specs/*.yaml", REGISTRY)
        for path in sorted(root.glob(pattern))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MARK in line
    ]


def _said(line: str) -> str:
    return line[line.index(MARK) :].strip().rstrip('"')


# --- guessing rules ------------------------------------------------------------------------------


class Guess:
    """What names and shapes tell, gathered over every tiny checkpoint of the reference."""

    def __init__(self, like: Architecture, found: Survey) -> None:
        self.like, self.found = like, found
        self.spec = load_spec(like.spec)
        self.fields = Fields(like, self.spec.dialect("hf"), found)
        self.raw = read_yaml(SPECS / f"{like.spec}.yaml")["hf"]
        # the kindred's rules, taken apart: which of them read something here?
        self.kept: dict[tuple[str, str], dict[Rule, bool]] = {
            (section, source): dict.fromkeys(_elementary(parse_rule(source, targets)), False)
            for section in ("weights", "heads")
            for source, targets in (self.raw.get(section) or {}).items()
        }
        self.guessed: list[Line] = []
        self.proposed: dict[str, tuple[Family, str]] = {}  # on disk; what the model should call it
        self.unmapped: dict[str, Family] = {}  # in the model, on no disk
        self.owned: set[str] = set()  # families that the model held in some checkpoint
        for probe in found.probes:
            self._learn(probe)

    @property
    def misses(self) -> list[str]:
        """What keeps this from being the kindred's model with other names."""
        return [
            *(f"on disk alone: {disk}" for disk, _ in self.proposed.values()),
            *(f"in the model alone: {native}" for native in self.unmapped.values()),
        ]

    def _learn(self, probe: Probe) -> None:
        native = self._native(probe)
        disk = {name: (shape, head) for name, shape, head in self._disk(probe)}
        taken: set[str] = set()
        filled: set[str] = set()
        for rules in self.kept.values():
            for rule in rules:
                rules[rule] |= _reads(rule, disk, native, taken, filled)
        for line in self.guessed:
            for rule in _elementary(line.rule):
                _reads(rule, disk, native, taken, filled)
        held = _families((name, shape, False) for name, shape in native.shapes.items())
        self.owned.update(family.name for family in held)
        here = [f for f in held if f.name not in {_plain(n) for n in filled}]
        there = _families((n, s, h) for n, (s, h) in disk.items() if n not in taken)
        self._match([f for f in there if f.name not in self.proposed], here)

    def _native(self, probe: Probe) -> Native:
        import torch

        from zoo.pretrained import native_of

        # of several heads the fullest: that is the one whose tensors the reference writes
        head = self.like.heads[self.found.classes[probe.reference_class]][0]
        with torch.device("meta"):
            return native_of(self.like.model(self.fields.native(probe.config, head)))

    def _disk(self, probe: Probe) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        """Names less their prefix; one that lacks what its neighbours carry belongs to a head."""
        prefix = self.found.prefix
        some = bool(prefix) and any(name.startswith(prefix) for name in probe.header)
        for name, info in probe.header.items():
            under = some and name.startswith(prefix)
            yield name.removeprefix(prefix) if under else name, info.shape, some and not under

    def _match(self, disk: list[Family], native: list[Family]) -> None:
        """Pairs by name and shape, then several natives fused into one; the rest is noted."""
        scored = [(_alike(d, n), d, n) for d in disk for n in native if _fits(d, n)]
        for score, d, n in sorted(scored, key=lambda s: -s[0]):
            if score >= ALIKE and d in disk and n in native:
                disk.remove(d)
                native.remove(n)
                self._pair(d, n)
        for d in disk:
            if parts := _fused(d, native):
                self._fuse(d, parts)
                native = [n for n in native if n not in parts]
            else:
                self.proposed[d.name] = (d, self._native_name(d))
        wanted = {name for _, name in self.proposed.values()}
        self.unmapped.update({n.name: n for n in native if n.name not in wanted})

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
        if same and not bias:
            note += "; interleaved by head it is [(h n e) i]"
        self.guessed.append(Line(f"{disk.name} {left}", targets, disk.head, note))

    def _native_name(self, disk: Family) -> str:
        """Where its neighbours went, and then the name as it is."""
        known: dict[tuple[str, ...], list[str]] = {}
        for rule in self._rules():
            here, there = (str(r.name).split(".")[:-1] for r in (rule.source, rule.targets[0]))
            while here and there and here[-1].startswith("{") == there[-1].startswith("{"):
                known.setdefault(tuple(here), there)
                here, there = here[:-1], there[:-1]
        for cut in range(len(disk.path), 0, -1):
            if (start := known.get(tuple(disk.path[:cut]))) is not None:
                return ".".join([*start, *disk.path[cut:], disk.leaf])
        return ".".join([*disk.path, disk.leaf])

    def _rules(self) -> Iterator[Rule]:
        """The rules that hold, one for each enumerated name."""
        for rules in self.kept.values():
            yield from (rule for rule, reads in rules.items() if reads)
        for line in self.guessed:
            yield from _elementary(line.rule)

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
                out += [Line(s, t, head) for s, t in _collapse(pairs)]
        for head in (False, True):
            plain = [x.rule for x in self.guessed if not x.note and x.head == head]
            out += [Line(s, t, head, "guessed by name") for s, t in _collapse(plain)]
        out += [line for line in self.guessed if line.note]
        for head in (False, True):
            new = [(d, n) for d, n in self.proposed.values() if d.head == head]
            pairs = [parse_rule(d.name, n) for d, n in new]
            for source, target in _collapse(pairs):
                note = f"guessed: named as its neighbours are; {self.like.name}'s model has none"
                out.append(Line(source, target, head, note))
        return out

    def _owns(self, rule: Rule) -> bool:
        names = {_plain(str(t.name)) for t in rule.targets}
        return any(t in self.owned for t in names)

    def spec_text(self, name: str) -> str:
        lines = self.lines()
        out = [
            f"# {name}: drafted from {self.found.reference_class} beside {self.like.name}.",
            f"axes: {flow(self._axes())}",
            "hf:",
        ]
        if self.found.prefix:
            out.append(f"  prefix: {self.found.prefix}")
        for section, head in (("weights", False), ("heads", True)):
            mine = [line for line in lines if line.head == head]
            out += [f"  {section}:"] if mine else []
            for before, line in zip([None, *mine], mine, strict=False):
                out += line.text()[before is not None and before.note == line.note != "" :]
        for section in ("optional", "tied", "aliases", "drop"):
            if carried := self._carried(section):
                out.append(f"  {section}:")
                out += [f"    {key}: {flow(value)}" for key, value in carried.items()]
        return "\n".join([*out, *self.fields.text()]) + "\n"

    def _axes(self) -> dict[str, str]:
        known = set(self.fields.paths)
        return {axis: field for axis, field in self.spec.axes.items() if field in known}

    def _carried(self, section: str) -> dict[str, Any]:
        """The kindred's further names, where the modules that they stand in are here too."""
        here = {family[: family.rfind("}") + 1] for family in self._disk_families()}
        tails = {str(rule.targets[0].name) for rule in self._rules()}
        return {
            key: value
            for key, value in (self.raw.get(section) or {}).items()
            if (section == "optional" and any(t.startswith(f"{key}.") for t in tails))
            or (section != "optional" and self._beside(key, here))
        }

    def _disk_families(self) -> set[str]:
        return {_plain(name) for probe in self.found.probes for name, _, _ in self._disk(probe)}

    def _beside(self, name: str, indexed: set[str]) -> bool:
        names = self._disk_families()
        for rule in _elementary(parse_rule(name, name)):
            words = str(rule.source.name).split(".")
            if any(n.split(".")[: len(words) - 2] == words[:-2] for n in names) and len(words) > 2:
                return True
        return False

    # --- the model and the proof ---

    def model_text(self, name: str, source: str) -> str:
        """The kindred's code under a docstring that says what it lacks and has too much."""
        tree = ast.parse(source)
        end = tree.body[0].end_lineno if ast.get_docstring(tree) is not None else 0
        code = source.splitlines()[end:]
        proposed = self.proposed.values()
        head = [
            f'"""{name}: {MARK} what sets it apart. Below stands {self.like.name} as it is."""',
            "",
            *(f"# {MARK} not here yet: {name}, {disk} on disk" for disk, name in proposed),
            *(f"# {MARK} here and on no disk: {native}" for native in self.unmapped.values()),
        ]
        return "\n".join([*head, *code]) + "\n"

    def verdict(self, name: str, text: str) -> list[str]:
        """What is wrong with the spec beside the kindred's model, as loading would say it."""
        spec = _parsed(name, text)
        dialect = spec.dialect("hf")
        said: dict[str, str] = {}
        for probe in self.found.probes:
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
                said.setdefault(re.sub(r"\d+", "", problem), f"{probe.name}: {problem}")
        return list(said.values())


def _parsed(name: str, text: str) -> Spec:
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return parse_spec(name, read_yaml(path), f"converters/specs/{name}.yaml")


# --- the parts of a guess ------------------------------------------------------------------------


def _elementary(rule: Rule) -> list[Rule]:
    """A rule for each value of the enumerations that stand on both sides."""
    listed = {n: p for n, p in rule.loops.items() if p.values}

    def chosen(ref: Ref, at: Mapping[str, int]) -> Ref:
        parts: list[str | Placeholder] = []
        for part in ref.name.parts:
            if isinstance(part, Placeholder) and part.name in at:
                part = part.spell(at[part.name])
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            else:
                parts.append(part)
        return Ref(Template(tuple(parts)), ref.pattern)

    points = [
        dict(zip(listed, point, strict=True))
        for point in product(*(range(len(p.values)) for p in listed.values()))
    ]
    return [
        Rule(chosen(rule.source, at), tuple(chosen(t, at) for t in rule.targets)) for at in points
    ]


def _reads(
    rule: Rule,
    disk: Mapping[str, tuple[tuple[int, ...], bool]],
    native: Native,
    taken: set[str],
    filled: set[str],
) -> bool:
    """Does the rule read a name on disk into the model? What it takes and fills is noted."""
    found = False
    for name, (shape, _) in disk.items():
        if name in taken or (binding := rule.source.name.match(name)) is None:
            continue
        known = []
        for target in rule.targets:
            spread = rule.spread(target)
            for point in product(*(range(len(p.values) or 1) for p in spread.values())):
                into = target.name.format({**binding, **dict(zip(spread, point, strict=True))})
                known.append((into, target, native.shapes.get(native.ties.get(into, into))))
        if any(size is None for _, _, size in known) or not _solves(rule, shape, known):
            continue
        taken.add(name)
        filled.update(native.ties.get(into, into) for into, _, _ in known)
        found = True
    return found


def _solves(rule: Rule, shape: tuple[int, ...], known: Sequence[tuple[str, Ref, Any]]) -> bool:
    if rule.source.pattern is None:
        return all(size == shape for _, _, size in known)
    sizes = dict(NUMBER_WORDS)
    for ref in (rule.source, *rule.targets):
        sizes.update({n: len(p.values) for n, p in ref.name.placeholders.items() if p.values})
    for _, ref, size in known:
        if ref.pattern is None or solve(ref.pattern, size, sizes):
            return False
    return solve(rule.source.pattern, shape, sizes) is None


def _plain(name: str) -> str:
    """`h.3.attn.q` as `h.{layer}.attn.q`."""
    parts: list[str] = []
    for part in name.split("."):
        if part.isdigit():
            before = parts[-1] if parts else ""
            word = "layer" if before in LAYERS else before.removesuffix("s")
            word = word if word.isidentifier() else "n"
            while f"{{{word}}}" in parts:
                word += "2"
            part = f"{{{word}}}"
        parts.append(part)
    return ".".join(parts)


def _families(tensors: Iterable[tuple[str, tuple[int, ...], bool]]) -> list[Family]:
    out: dict[str, Family] = {}
    for name, shape, head in tensors:
        out.setdefault(_plain(name), Family(_plain(name), shape, head))
    return list(out.values())


def _fits(disk: Family, native: Family) -> bool:
    if disk.leaf != native.leaf or disk.indices != native.indices:
        return False
    return native.shape in (disk.shape, disk.shape[::-1])


def _alike(disk: Family, native: Family) -> float:
    """0 … 1: how far the names say the same. The module counts most, then the one around it."""
    here, there = disk.tail, native.tail
    around = [_same(a, b) for a in here[:-1] for b in there[:-1]]
    outer = max(around) if around else 1.0 if len(here) == len(there) else 0.5
    return 0.7 * _same(here[-1], there[-1]) + 0.3 * outer


def _same(disk: str, native: str) -> float:
    if disk == native or disk in CALLED.get(native, "").split():
        return 1.0
    if native in disk.split("_"):
        return 0.8
    return 0.6 * SequenceMatcher(None, disk, native).ratio()


def _fused(disk: Family, native: Sequence[Family]) -> list[Family]:
    """Sisters in the model that lie one behind the other in one tensor on disk."""
    sisters: dict[tuple[str, ...], list[Family]] = {}
    for n in native:
        if n.leaf == disk.leaf and n.indices == disk.indices and len(n.shape) == len(disk.shape):
            sisters.setdefault(tuple(n.path[:-1]), []).append(n)
    for group in sisters.values():
        outer = group[0].tail[:-1]
        if outer and not any(_same(a, outer[-1]) >= ALIKE for a in disk.tail):
            continue
        for count in range(len(group), 1, -1):
            for parts in combinations(group, count):
                total = sum(p.shape[0] for p in parts)
                if all((total, *p.shape[1:]) in (disk.shape, disk.shape[::-1]) for p in parts):
                    return list(parts)
    return []


def _collapse(rules: Sequence[Rule]) -> list[tuple[str, str | list[str]]]:
    """Rules as few lines: weight and bias as one, then names that differ in one place."""
    out: list[tuple[str, str | list[str]]] = []
    stems: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for rule in rules:
        if not rule.plain or len(rule.targets) > 1:
            texts = [str(t) for t in rule.targets]
            out.append((str(rule.source), texts[0] if len(texts) == 1 else texts))
            continue
        here, _, leaf = str(rule.source.name).rpartition(".")
        there, _, into = str(rule.targets[0].name).rpartition(".")
        stems.setdefault((here, there), []).append((leaf, into))
    items: list[_Item] = [(s.split("."), t.split("."), tuple(p)) for (s, t), p in stems.items()]
    while items:
        first = items[0]
        groups = [
            (i, j, [o for o in items if _differs(first, o, i, j)])
            for i in range(1, len(first[0]))  # a key that begins with { is no plain YAML
            for j in range(1, len(first[1]))
        ]
        i, j, group = max(groups, key=lambda g: len(g[2]), default=(0, 0, [first]))
        items = [item for item in items if item not in group]
        source, target, leaves = list(first[0]), list(first[1]), first[2]
        if len(group) > 1:
            source[i] = _enumerated("n", [s[i] for s, _, _ in group])
            target[j] = _enumerated("n", [t[j] for _, t, _ in group])
        ends = [_enumerated("p", [pair[k] for pair in leaves]) for k in (0, 1)]
        out.append((".".join([*source, ends[0]]).lstrip("."), ".".join([*target, ends[1]])))
    return out


_Item = tuple[list[str], list[str], tuple[tuple[str, str], ...]]


def _differs(a: _Item, b: _Item, i: int, j: int) -> bool:
    """Equal, or unlike at place i of the source and j of the target and nowhere else."""
    if a == b:
        return True
    if a[2] != b[2] or len(a[0]) != len(b[0]) or len(a[1]) != len(b[1]):
        return False
    return all(
        (x[at] != y[at] and "{" not in x[at] + y[at])
        and x[:at] + x[at + 1 :] == y[:at] + y[at + 1 :]
        for x, y, at in ((a[0], b[0], i), (a[1], b[1], j))
    )


def _shared(words: Sequence[str]) -> str:
    """What all of them begin with."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*words, strict=False))
    return "".join(letters[0] for letters in same)


def _enumerated(name: str, words: Sequence[str]) -> str:
    """`{n=q,k,v}_proj`"""
    if len(words) == 1:
        return words[0]
    start = _shared(words)
    start = start if all(w[len(start) :].isdigit() for w in words) else ""
    cut = [w[len(start) :] for w in words]
    end = _shared([w[::-1] for w in cut])[::-1]
    end = end[end.find("_") :] if "_" in end else ""
    return f"{start}{{{name}={','.join(w.removesuffix(end) for w in cut)}}}{end}"


# --- config --------------------------------------------------------------------------------------


class Fields:
    """The config section: the kindred's mapping as far as its fields are here; the rest is marked."""

    def __init__(self, like: Architecture, dialect: Dialect, found: Survey) -> None:
        self.like, self.found = like, found
        raw = read_yaml(SPECS / f"{like.spec}.yaml")["hf"]
        known = {**found.defaults, **found.config}
        self.paths: dict[str, tuple[str, ...]] = {}
        self.notes: dict[str, str] = {}
        self.refused = ""
        absent = []
        for native, paths in dialect.config.items():
            here = tuple(p for p in paths if p.partition(".")[0] in known)
            own = tuple(dict.fromkeys(o for p in paths if (o := found.own(p)) in known))
            if here or own:
                # further paths are older spellings: they belong to the first
                self.paths[native] = paths if paths[0] in here else here or own
            else:
                absent.append((native, paths))
        common = dialect.ignore - set(raw.get("ignore") or [])
        self.require = {k: v for k, v in (raw.get("require") or {}).items() if k in known}
        self.ignore = [k for k in raw.get("ignore") or [] if k in known]
        shared = dialect.require.keys() - (raw.get("require") or {}).keys()
        spoken = (
            common
            | shared
            | self.require.keys()
            | set(self.ignore)
            | {p.partition(".")[0] for paths in self.paths.values() for p in paths}
        )
        self.unknown = {k: v for k, v in found.config.items() if k not in spoken}
        needed = {
            f.name
            for f in dataclasses.fields(like.config_class)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        for native, paths in absent:
            if near := get_close_matches(paths[0], self.unknown, n=1, cutoff=0.7):
                self.paths[native] = (near[0],)
                self.notes[native] = "guessed by name"
                del self.unknown[near[0]]
            elif native in needed:
                self.notes[native] = f"{MARK} {native}: no field is called like {paths[0]}"
        self.dialect = replace(dialect, config=self.paths)

    def native(self, config: Mapping[str, Any], head: str) -> Any:
        """The kindred's config; a value that it refuses is left at its default."""
        fields, _ = self.dialect.read_config(config)
        try:
            return self.like.config_class(**fields, head=head)
        except ConfigError as error:
            said = " ".join(str(error).split())
            self.refused = self.refused or said
            kept = {k: v for k, v in fields.items() if not re.search(rf"(^|; ){k}: ", said)}
            return self.like.config_class(**kept, head=head)

    def text(self) -> list[str]:
        out = ["  config:"]
        for native in (*self.paths, *(n for n in self.notes if n not in self.paths)):
            if native in self.notes:
                out.append(f"    # {self.notes[native]}")
            if native in self.paths:
                out.append(f"    {native}: {' | '.join(self.paths[native])}")
        if self.refused:
            out.append(f"    # {MARK} {self.like.name}'s config refuses a value: {self.refused}")
        fixed = {k: v for k, v in self.unknown.items() if _neutral(v)}
        for name, value in self.unknown.items():
            if name not in fixed:
                usual = self.found.defaults.get(name)
                where = f"{flow(value)} here" + (
                    f", {flow(usual)} usually" if usual != value else ""
                )
                out.append(f"    # {MARK} {name} ({where}): under config, require or ignore")
        if self.require or fixed:
            out.append("  require:")
            out += [f"    {name}: {flow(allowed)}" for name, allowed in self.require.items()]
        if fixed:
            out.append("    # guessed: as the tiny checkpoints have it; any other value is refused")
            out += [f"    {k}: {flow([] if v is None else [v])}" for k, v in fixed.items()]
        if self.ignore:
            out.append(f"  ignore: {flow(self.ignore)}")
        return out


def _neutral(value: Any) -> bool:
    """A switch, a word, nothing, or a factor without effect: a model is proven for this value alone."""
    return value is None or isinstance(value, bool | str) or value in (0.0, 1.0)


# --- registry.yaml -------------------------------------------------------------------------------


def registered(text: str, name: str, guess: Guess, module: str | None) -> str:
    """The registry with an entry more; not a letter of the others changes."""
    found, like = guess.found, guess.like
    heads = {new: like.heads[old] for new, old in found.classes.items()}
    entry = [f"  {name}:", f"    model_type: {found.model_type}"]
    entry += [f"    model: {module}"] if module else []
    entry += ["    heads:"]
    entry += [f"      {c}: {h[0] if len(h) == 1 else flow(list(h))}" for c, h in heads.items()]
    covered = {head for several in heads.values() for head in several}
    missing = [h for several in like.heads.values() for h in several if h not in covered]
    if missing:
        entry.append(f"      # {MARK} heads of {like.name} that {name} has no class for: {missing}")
    variants = [f"  {name}:"]
    for probe in found.probes:
        if probe.name == "base":
            config = f"&{name}-config {flow(found.fields)}"
        elif probe.changes:
            config = f"{{<<: *{name}-config, {flow(dict(probe.changes))[1:]}"
        else:
            config = f"*{name}-config"
        variants.append(f"    {probe.name}: {{class: {probe.reference_class}, config: {config}}}")
    mark = f"  # {MARK} {name}: a published checkpoint, with all that its neighbours say"
    blocks = {"architectures": entry, "checkpoints": [mark], "variants": variants}
    for section, block in blocks.items():
        text = _inserted(text, section, name, block)
    known = registry.parse_architectures(registry.parse_section(text, "architectures"))
    registry.parse_variants(registry.parse_section(text, "variants"), known)
    return text


def _inserted(text: str, section: str, name: str, block: Sequence[str]) -> str:
    """`block` behind the last entry of a section; an entry of that name goes."""
    lines = text.splitlines()
    at = next(k for k, line in enumerate(lines) if re.match(rf"{section}\s*:", line))
    tops = [k for k in range(at + 1, len(lines)) if re.match(r"[^\s#]", lines[k])]
    end = tops[0] if tops else len(lines)
    body: list[str] = []
    inside = False
    for line in lines[at + 1 : end]:
        if re.match(r"  \S", line) or re.match(r"\S", line):
            inside = section != "checkpoints" and line.startswith(f"  {name}:")
        if not inside and not (MARK in line and line in block):
            body.append(line)
    last = max((k for k, line in enumerate(body) if re.match(r"\s+\S", line)), default=-1)
    body[last + 1 : last + 1] = block
    opening = re.sub(r":\s*\{\s*\}", ":", lines[at])
    return "\n".join([*lines[:at], opening, *body, *lines[end:]]) + "\n"


def flow(value: Any) -> str:
    """YAML on one line, as it reads back: a float has its point, and words quotes if need be."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(str(k))}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, float):
        said = repr(value)
        return said if "." in said or "e" not in said else said.replace("e", ".0e", 1)
    if isinstance(value, str):
        reserved = value.lower() in ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
        if re.fullmatch(r"[A-Za-z_][\w ./+-]*", value) and not reserved and value == value.strip():
            return value
    return json.dumps(value, ensure_ascii=False)
