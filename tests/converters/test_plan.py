"""The proof: nothing missing, nothing extra, nothing twice, and all of what is wrong at once."""

import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import spec_files
from converters.carry_out import carry_out, invert
from converters.formats import TensorInfo
from converters.plan import Native, identity_plan, make_plan, target_names
from converters.spec import load_spec, parse_spec
from zoo.errors import (
    ConfigError,
    DtypeMismatch,
    DuplicateTensor,
    MissingTensors,
    PlanError,
    ShapeMismatch,
    SpecError,
    TieConflict,
    UnexpectedTensors,
    ZooError,
)

LAYERS, H, G, E, D, F, V, X = 3, 4, 2, 6, 10, 7, 13, 5

SPEC = {
    "native": {
        "axes": {"layer": "layers", "h": "heads", "g": "kv_heads", "expert": "experts"},
    },
    "hf": {
        "prefix": "model.",
        "weights": {
            "wte.weight": "embed.weight",
            "h.{layer}.ln_{n=1,2}.{p=weight,bias}": "blocks.{layer}.norm{n=1,2}.{p=weight,bias}",
            "h.{layer}.qkv.weight [(g (r|one|one) e) i]": [
                "blocks.{layer}.q.weight [(g r e) i]",
                "blocks.{layer}.k.weight [(g e) i]",
                "blocks.{layer}.v.weight [(g e) i]",
            ],
            "h.{layer}.up.weight [i (n f)]": "blocks.{layer}.{n=gate,up}.weight [f i]",
            "h.{layer}.x.{expert}.w [f d]": "blocks.{layer}.experts [expert f d]",
            "pooler.weight": "pooler.weight",
        },
        "heads": {"lm_head.weight": "head.weight", "score.weight": "score.weight"},
        "optional": {"pooler": "the class has no pooler"},
        "tied": {"decoder.weight": "wte.weight"},
        "aliases": {"h.{layer}.ln_{n=1,2}.{p=gamma,beta}": "h.{layer}.ln_{n=1,2}.{p=weight,bias}"},
        "drop": {"h.{layer}.attn.bias": "causal mask buffer"},
        "config": {"layers": "n_layer", "heads": "n_head"},
    },
}
CONFIG = {"layers": LAYERS, "heads": H, "kv_heads": G, "experts": X}


def native(*, tied=False, pooler=False):
    shapes = {"embed.weight": (V, D)}
    for n in range(LAYERS):
        for k in (1, 2):
            shapes |= {f"blocks.{n}.norm{k}.{p}": (D,) for p in ("weight", "bias")}
        shapes[f"blocks.{n}.q.weight"] = (H * E, D)
        shapes |= {f"blocks.{n}.{p}.weight": (G * E, D) for p in "kv"}
        shapes |= {f"blocks.{n}.{p}.weight": (F, D) for p in ("gate", "up")}
        shapes[f"blocks.{n}.experts"] = (X, F, D)
    if pooler:
        shapes["pooler.weight"] = (D, D)
    if tied:
        return Native(shapes, {"head.weight": "embed.weight"})
    return Native({**shapes, "head.weight": (V, D)})


def disk(prefix="model.", *, head=True):
    shapes = {"wte.weight": (V, D)}
    for n in range(LAYERS):
        for k in (1, 2):
            shapes |= {f"h.{n}.ln_{k}.{p}": (D,) for p in ("weight", "bias")}
        shapes[f"h.{n}.qkv.weight"] = ((H + 2 * G) * E, D)
        shapes[f"h.{n}.up.weight"] = (D, 2 * F)
        shapes |= {f"h.{n}.x.{x}.w": (F, D) for x in range(X)}
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    if head:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def header(shapes, dtype="F32"):
    return {name: TensorInfo(name, tuple(shape), dtype) for name, shape in shapes.items()}


def spec(**changes):
    return parse_spec("toy", {**SPEC, "hf": {**SPEC["hf"], **changes}}, "specs/toy")


def plan(shapes, *, where=None, **kind):
    return make_plan(spec(), "hf", CONFIG, where or native(**kind), header(shapes))


def filled(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_plan_maps_tensors_to_the_model_and_back(prefix):
    source = filled(disk(prefix))
    made = plan(disk(prefix))
    state = dict(carry_out(made, source.__getitem__))
    assert {k: tuple(v.shape) for k, v in state.items()} == native().shapes
    assert same(invert(made, state), source)
    assert list(invert(made, state)) == list(source)


def test_order_does_not_matter():
    names = list(disk())
    truth = dict(carry_out(plan(disk()), filled(disk()).__getitem__))
    for seed in range(5):
        random.Random(seed).shuffle(names)
        shuffled = {name: disk()[name] for name in names}
        assert same(dict(carry_out(plan(shuffled), filled(disk()).__getitem__)), truth)


def test_a_spec_is_a_bijection():
    made = plan(disk())
    sources = [name for step in made.steps for name in step.sources]
    targets = [name for step in made.steps for name in step.targets]
    assert sorted(sources) == sorted(disk()) and len(set(sources)) == len(sources)
    assert sorted(targets) == sorted(native().shapes) and len(set(targets)) == len(targets)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(disk())),
    st.sampled_from(["remove", "add", "rename", "reshape", "dtype"]),
)
def test_any_one_change_is_caught(name, change):
    shapes = disk()
    infos = header(shapes)
    if change == "remove":
        del infos[name]
    elif change == "add":
        infos[name + "_"] = TensorInfo(name + "_", shapes[name], "F32")
    elif change == "rename":
        infos[name[:-1]] = TensorInfo(name[:-1], infos.pop(name).shape, "F32")
    elif change == "reshape":
        infos[name] = TensorInfo(name, (*shapes[name][:-1], shapes[name][-1] + 1), "F32")
    else:
        infos[name] = TensorInfo(name, shapes[name], "I8")
    with pytest.raises((PlanError, ConfigError, DuplicateTensor, DtypeMismatch)) as error:
        make_plan(spec(), "hf", CONFIG, native(), infos)
    assert name.removeprefix("model.")[:-1] in str(error.value)


def test_all_problems_are_in_one_error():
    shapes = disk()
    del shapes["model.h.1.ln_1.weight"], shapes["lm_head.weight"]
    shapes["model.h.0.up.weight"] = (D, 2 * F + 1)
    shapes["stranger"] = (1,)
    with pytest.raises(MissingTensors) as error:
        plan(shapes)
    message = str(error.value)
    for word in ("h.1.ln_1.weight", "lm_head.weight", "stranger", "h.0.up.weight"):
        assert word in message
    assert f"[{D}, {2 * F + 1}], expected [{D}, {2 * F}] = [i={D} (n=2 f={F})]" in message


def test_layer_count_on_disk_must_equal_the_config():
    shapes = {k: v for k, v in disk().items() if ".h.2." not in k}
    with pytest.raises(ConfigError, match="n_layer: 2 found, 3 declared"):
        plan(shapes)
    with pytest.raises(ConfigError, match="n_layer: 3 found, 2 declared"):
        two = Native({k: v for k, v in native().shapes.items() if "blocks.2" not in k})
        make_plan(spec(), "hf", {**CONFIG, "layers": 2}, two, header(disk()))


def test_a_missing_layer_index_is_refused():
    shapes = {k.replace(".x.4.", ".x.5."): v for k, v in disk().items()}
    with pytest.raises(MissingTensors, match=r"x\.4\.w"):
        plan(shapes)
    shapes = {k: v for k, v in disk().items() if ".h.1." not in k}
    with pytest.raises(MissingTensors, match=r"layer 1 of 0\.\.2 missing"):
        plan(shapes)


def test_experts_under_other_indices_are_reported_missing():
    """All that are there count from 1: as many as there should be, and one of them is missing."""
    shapes = {
        re.sub(r"\.x\.(\d)\.", lambda m: f".x.{int(m[1]) + 1}.", name): shape
        for name, shape in disk().items()
    }
    with pytest.raises(MissingTensors, match=r"expert 0 of 0\.\.4 missing"):
        plan(shapes)


def test_parts_of_one_array_in_two_dtypes_are_refused():
    infos = header(disk())
    bad = "model.h.1.x.3.w"
    infos[bad] = TensorInfo(bad, infos[bad].shape, "BF16")
    with pytest.raises(DtypeMismatch, match=r"model\.h\.1\.x\.0\.w, .*one array in BF16 and F32"):
        make_plan(spec(), "hf", CONFIG, native(), infos)


def test_a_tied_name_does_not_stand_for_one_of_several_parts():
    """Two halves make an array; a tied name of the first half alone does not fill it."""
    made = spec(
        prefix="",
        weights={"wte.{n=0,1}.weight [d]": "embed.weight [(n d)]"},
        tied={"decoder.weight": "wte.0.weight"},
        heads={},
    )
    whole = Native({"embed.weight": (6,)})
    with pytest.raises(MissingTensors, match=r"wte\.0\.weight, wte\.1\.weight"):
        make_plan(made, "hf", CONFIG, whole, header({"decoder.weight": (3,)}))


def test_a_copy_that_a_shard_lacks_is_missing():
    rules = {"{shard}/one": "one", "{shard}/two": "two"}
    made = parse_spec(
        "toy", {"native": {"axes": {"shard": "shards"}}, "hf": {"weights": rules}}, "toy"
    )
    both = Native({"one": (D,), "two": (D,)})
    there = dict.fromkeys(("0/one", "1/one", "0/two", "1/two"), (D,))
    assert make_plan(made, "hf", {"shards": 2}, both, header(there)).steps
    for name in there:
        less = {n: shape for n, shape in there.items() if n != name}
        with pytest.raises(MissingTensors, match=f"1 tensor missing: {name}"):
            make_plan(made, "hf", {"shards": 2}, both, header(less))


def test_one_tensor_under_two_names_is_refused():
    both = {**disk(), "wte.weight": (V, D)}
    with pytest.raises(DuplicateTensor, match=r"model\.wte\.weight, wte\.weight"):
        plan(both)
    mixed = {k.replace("model.h.0", "h.0"): v for k, v in disk().items()}
    with pytest.raises(DuplicateTensor, match=r"prefix 'model\.'"):
        plan(mixed)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_wrappers_are_named_as_the_cause(wrapper):
    with pytest.raises(MissingTensors, match=f"starts with '{wrapper}'"):
        plan({wrapper + name: shape for name, shape in disk().items()})


def test_a_misspelt_name_gets_a_suggestion():
    shapes = disk()
    shapes["model.wte.wieght"] = shapes.pop("model.wte.weight")
    with pytest.raises(MissingTensors, match=r"Did you mean model\.wte\.wieght"):
        plan(shapes)


def test_dropped_tensors_have_a_reason():
    shapes = {**disk(), "model.h.0.attn.bias": (1, 1, 9, 9), "pooler.weight": (D, D)}
    assert plan(shapes).dropped == {
        "model.h.0.attn.bias": "causal mask buffer",
        "pooler.weight": "the class has no pooler",
    }
    with pytest.raises(UnexpectedTensors, match=r"h\.0\.attn\.bias2"):
        plan({**disk(), "model.h.0.attn.bias2": (1,)})


def test_a_head_that_was_not_asked_for_is_dropped():
    bare = Native({k: v for k, v in native().shapes.items() if k != "head.weight"})
    shapes = {**disk(), "score.weight": (2, D)}
    dropped = make_plan(spec(), "hf", CONFIG, bare, header(shapes)).dropped
    assert set(dropped) == {"lm_head.weight", "score.weight"}
    assert "head that was not asked for" in dropped["lm_head.weight"]


def test_tensors_of_a_part_that_the_config_lacks_are_refused():
    less = Native({k: v for k, v in native().shapes.items() if not k.endswith("norm1.bias")})
    with pytest.raises(
        UnexpectedTensors, match=r"the config's model has no blocks\.0\.norm1\.bias"
    ):
        make_plan(spec(), "hf", CONFIG, less, header(disk()))


class TestTies:
    def test_either_name_of_a_tied_tensor_is_read(self):
        for shapes in (disk(head=False), {k: v for k, v in disk().items() if "wte" not in k}):
            source = filled(shapes)
            made = plan(shapes, tied=True)
            state = dict(carry_out(made, source.__getitem__))
            assert "head.weight" not in state and state["embed.weight"].shape == (V, D)
            assert same(invert(made, state), source)  # the way back keeps the source's choice

    def test_tied_tensors_that_differ_are_refused(self):
        source = filled(disk())
        made = plan(disk(), tied=True)
        with pytest.raises(TieConflict, match=r"wte\.weight and lm_head\.weight"):
            dict(carry_out(made, source.__getitem__))
        for name in ("model.wte.weight", "lm_head.weight"):
            state = dict(carry_out(made, source.__getitem__, trust=(name,)))
            assert torch.equal(state["embed.weight"], source[name])
        source["lm_head.weight"] = source["model.wte.weight"].clone()
        state = dict(carry_out(made, source.__getitem__))
        assert same(invert(made, state), source)

    def test_a_tied_tensor_under_neither_name_is_missing(self):
        shapes = {k: v for k, v in disk(head=False).items() if "wte" not in k}
        with pytest.raises(MissingTensors, match=r"wte\.weight"):
            plan(shapes, tied=True)

    def test_tied_names_that_only_files_have_must_agree(self):
        shapes = {**disk(), "decoder.weight": (V, D)}
        source = filled(shapes)
        with pytest.raises(TieConflict, match=r"decoder\.weight"):
            dict(carry_out(plan(shapes), source.__getitem__))
        source["decoder.weight"] = source["model.wte.weight"]
        assert same(invert(plan(shapes), dict(carry_out(plan(shapes), source.get))), source)


class TestAliases:
    def test_legacy_names_are_read_and_never_written(self):
        modern = filled(disk())
        old = {"weight": "gamma", "bias": "beta"}

        def legacy(name):
            stem, _, last = name.rpartition(".")
            return f"{stem}.{old[last]}" if ".ln_" in name else name

        shapes = {legacy(name): shape for name, shape in disk().items()}
        source = {legacy(name): tensor for name, tensor in modern.items()}
        made = plan(shapes)
        state = dict(carry_out(made, source.__getitem__))
        assert same(state, dict(carry_out(plan(disk()), modern.__getitem__)))
        assert same(invert(made, state), modern)

    def test_a_legacy_and_a_modern_name_together_are_refused(self):
        with pytest.raises(DuplicateTensor, match="gamma"):
            plan({**disk(), "model.h.0.ln_1.gamma": (D,)})

    def test_an_alias_applies_only_under_its_prefix(self):
        with pytest.raises(UnexpectedTensors, match="gamma"):
            plan({**disk(), "model.h.0.scale.gamma": (D,)})


class TestShards:
    SPEC = parse_spec(
        "meta",
        {
            "native": {"axes": {"g": "kv_heads"}},
            "meta": {
                "weights": {
                    "{shard}/wq [o i]": "q [(shard o) i]",
                    "{shard}/wo [o i]": "out [o (shard i)]",
                    "{shard}/norm": "norm",
                }
            },
        },
    )
    NATIVE = Native({"q": (8, 5), "out": (5, 8), "norm": (5,)})

    def shapes(self, count=2):
        out = {}
        for n in range(count):
            out |= {f"{n}/wq": (8 // count, 5), f"{n}/wo": (5, 8 // count), f"{n}/norm": (5,)}
        return out

    def test_shards_join_by_axis_and_replicas_must_agree(self):
        source = filled(self.shapes())
        made = make_plan(self.SPEC, "meta", {}, self.NATIVE, header(self.shapes()))
        with pytest.raises(TieConflict, match="1/norm"):
            dict(carry_out(made, source.__getitem__))
        source["1/norm"] = source["0/norm"]
        state = dict(carry_out(made, source.__getitem__))
        assert torch.equal(state["q"], torch.cat([source["0/wq"], source["1/wq"]]))
        assert torch.equal(state["out"], torch.cat([source["0/wo"], source["1/wo"]], dim=1))
        assert same(invert(made, state), source)

    def test_a_shard_without_a_replica_is_refused(self):
        shapes = self.shapes()
        del shapes["1/norm"]
        with pytest.raises(PlanError):
            make_plan(self.SPEC, "meta", {}, self.NATIVE, header({**shapes, "1/stray": (5,)}))


def test_an_unmapped_native_tensor_is_named():
    less = {k: v for k, v in SPEC["hf"]["weights"].items() if "wte" not in k}
    with pytest.raises(SpecError, match=r"no rule for embed\.weight of the model"):
        make_plan(spec(weights=less), "hf", CONFIG, native(), header(disk()))


def test_two_rules_for_one_tensor_are_refused():
    more = {**SPEC["hf"]["weights"], "other.weight": "embed.weight"}
    with pytest.raises(SpecError, match=r"embed\.weight: produced twice"):
        make_plan(spec(weights=more), "hf", CONFIG, native(), header(disk()))


def test_an_unsolved_axis_is_named():
    rules = {"w [(a b)]": "m [(b a)]"}
    toy = parse_spec("toy", {"hf": {"weights": rules}}, "specs/toy")
    with pytest.raises(SpecError, match="axis 'a' cannot be solved"):
        make_plan(toy, "hf", {}, Native({"m": (6,)}), header({"w": (6,)}))


def test_target_names_are_the_published_header():
    wanted = target_names(spec(), "hf", CONFIG, native(), bare=False)
    assert {k: v.shape for k, v in wanted.items()} == disk()
    tied = target_names(spec(), "hf", CONFIG, native(tied=True), bare=True)
    assert {k: v.shape for k, v in tied.items()} == disk("", head=False)


def test_identity_plan_has_the_names_of_the_model():
    shapes = native(tied=True)
    made = identity_plan(shapes, header(shapes.shapes), "native")
    source = filled(shapes.shapes)
    assert same(dict(carry_out(made, source.__getitem__)), source)
    with pytest.raises(MissingTensors, match=r"embed\.weight"):
        identity_plan(shapes, header({"x": (1,)}), "native")


def test_describe_lists_steps_shapes_and_bytes():
    text = plan({**disk(), "model.h.0.attn.bias": (1,)}).describe()
    for word in ("model.wte.weight", "blocks.0.q.weight", "[(g (r | one | one) e) i]", "causal"):
        assert word in text


class TestSpec:
    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"wieghts": {}}, "unknown section wieghts. Did you mean weights"),
            ({"when": {"a == b": {}}}, "when.a == b: expected a field"),
            ({"when": {"gated": {"x": "y"}}}, "when.gated: expected a field"),
            ({"weights": {"a [b": "c"}}, "column 3"),
            ({"weights": ["a"]}, "expected `name: …` lines"),
            ({"config": {"a": "b |"}}, "expected a field"),
            ({"require": {"a": True}}, "expected a list of the values"),
        ],
    )
    def test_schema_errors_say_where(self, change, why):
        with pytest.raises(SpecError, match=r"specs/toy/hf\.yaml: ") as error:
            spec(**change)
        assert why in str(error.value)

    def test_a_bad_value_is_named_with_its_line_in_the_file_that_has_it(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(spec_files, "SPECS", tmp_path)
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "native.yaml").write_text("axes: {}\n")
        (tmp_path / "a" / "hf.yaml").write_text("weights: {x: y}\nrequire:\n  u: [1]\n  v: 2\n")
        (tmp_path / "b" / "hf.yaml").write_text("like: a/hf\nconfig: {dim: 'd |'}\nfoo: 1\n")
        with pytest.raises(SpecError) as error:
            load_spec.__wrapped__("b")
        message, folder = str(error.value), "converters/specs"
        assert f"{folder}/a/hf.yaml: line 4: require.v: expected a list of the values" in message
        assert f"{folder}/b/hf.yaml: line 2: config.dim: expected a field or several" in message
        assert "unknown section foo" in message

    def test_what_a_config_leaves_out(self):
        hf = spec(config={"kv_heads": "n_kv"}, defaults={"kv_heads": 8, "bias": True}).dialect("hf")
        assert hf.read_config({})[0] == {"kv_heads": 8, "bias": True}
        assert hf.read_config({"n_kv": 2})[0] == {"kv_heads": 2, "bias": True}
        assert hf.read_config({"n_kv": None})[0] == {"kv_heads": None, "bias": True}
        assert hf.write_config({"kv_heads": 2, "bias": True}) == {"n_kv": 2}

    def test_rules_under_a_condition(self):
        """One name where a field holds something, two where it does not; nothing by the files."""
        made = spec(
            weights={"out": "out"},
            prefix="",
            when={
                "gated": {"weights": {"wi_{n=0,1}": "{n=gate,up}"}},
                "not gated": {"weights": {"wi": "up"}, "heads": {"more": "head"}},
            },
        )
        two = Native({"out": (3,), "gate": (3,), "up": (3,)})
        one = Native({"out": (3,), "up": (3,), "head": (3,)})
        for fields, native, names in (
            ({"gated": True}, two, {"out", "wi_0", "wi_1"}),
            ({"gated": False}, one, {"out", "wi", "more"}),
            ({}, one, {"out", "wi", "more"}),
        ):
            header = {name: TensorInfo(name, (3,), "F32") for name in names}
            assert make_plan(made, "hf", fields, native, header).dropped == {}
            assert target_names(made, "hf", fields, native, bare=False).keys() == names
        with pytest.raises(MissingTensors, match="wi_0"):
            make_plan(made, "hf", {"gated": True}, two, {"wi": TensorInfo("wi", (3,), "F32")})

    def test_alternative_rules_replace_the_usual_ones(self):
        made = spec(
            prefix="m.",
            weights={"x.{expert}.w [f]": "gate [expert f]", "x.{expert}.v [f]": "up [expert f]"},
            alternatives={"both [expert (a|b)]": ["gate [expert a]", "up [expert b]"]},
        )
        native, fields = Native({"gate": (2, 3), "up": (2, 3)}), {"experts": 2}
        stacked = {"m.both": TensorInfo("m.both", (2, 6), "F32")}
        (step,) = make_plan(made, "hf", fields, native, stacked).steps
        assert step.sources == ("m.both",) and step.targets == ("gate", "up")
        apart = {
            n: TensorInfo(n, (3,), "F32") for n in ("m.x.0.w", "m.x.1.w", "m.x.0.v", "m.x.1.v")
        }
        assert len(make_plan(made, "hf", fields, native, apart).steps) == 2
        # a writer that has no files to go by uses the first names
        assert target_names(made, "hf", fields, native, bare=False).keys() == apart.keys()
        with pytest.raises(ZooError, match=r"no rule maps: m\.x\.0\.w"):
            make_plan(made, "hf", fields, native, stacked | {"m.x.0.w": apart["m.x.0.w"]})

    @pytest.mark.parametrize("prefix", ["m.", ""])
    def test_of_two_rules_for_one_name_the_shape_decides(self, prefix):
        """With the prefix and without it; where none fits, the first rule says what is wrong."""
        made = spec(
            prefix="m.",
            weights={"e [v d]": "embed [v d]"},
            alternatives={"e [d v]": "embed [v d]"},
            heads={},
            tied={},
        )
        native, name = Native({"embed": (V, D)}), f"{prefix}e"
        (step,) = make_plan(made, "hf", {}, native, header({name: (V, D)})).steps
        assert step.sources == (name,) and step.transform is None
        (step,) = make_plan(made, "hf", {}, native, header({name: (D, V)})).steps
        assert step.sources == (name,) and step.transform is not None
        with pytest.raises(ShapeMismatch, match=rf"expected \[{V}, {D}\]"):
            make_plan(made, "hf", {}, native, header({name: (D, D)}))

    def test_dialects_but_the_published_one_are_read_when_they_are_used(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(spec_files, "SPECS", tmp_path)
        (tmp_path / "a").mkdir()
        for name in ("native", "hf", "gguf"):
            (tmp_path / "a" / f"{name}.yaml").write_text("{}\n" if name != "gguf" else "foo: 1\n")
        made = load_spec.__wrapped__("a")
        assert list(made.dialects) == ["hf", "gguf"] and "gguf" in made.dialects
        with pytest.raises(SpecError, match=r"converters/specs/a/gguf\.yaml: unknown section foo"):
            made.dialect("gguf")
        (tmp_path / "a" / "gguf.yaml").write_text("prefix: m.\n")
        assert made.dialect("gguf").prefix == "m."
        with pytest.raises(SpecError, match="no dialect 'tf'; there is hf, gguf"):
            made.dialect("tf")

    def test_a_spec_laid_over_another(self, tmp_path, monkeypatch):
        monkeypatch.setattr(spec_files, "SPECS", tmp_path)
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        (tmp_path / "a" / "native.yaml").write_text("axes: {layer: layers}\n")
        (tmp_path / "b" / "native.yaml").write_text("like: a/native\naxes: {h: heads}\n")
        below, above = tmp_path / "a" / "hf.yaml", tmp_path / "b" / "hf.yaml"
        below.write_text("weights: {x: one, y: two}\nignore: [u]\n")
        above.write_text("like: a/hf\nweights: {y: null, z: two}\nignore: [v]\nprefix: m.\n")
        assert load_spec.__wrapped__("b").axes == {"layer": "layers", "h": "heads"}
        made = load_spec.__wrapped__("b").dialect("hf")
        assert [str(rule) for rule in made.weights] == ["x: one", "z: two"]
        assert {"u", "v"} <= made.ignore and made.prefix == "m."
        below.write_text("like: b/hf\n")
        with pytest.raises(SpecError, match="b/hf -> a/hf -> b/hf is a circle"):
            load_spec.__wrapped__("b")
        above.write_text("like: aa/hf\n")
        with pytest.raises(SpecError, match="Did you mean a/hf"):
            load_spec.__wrapped__("b")

    def test_config_both_ways(self):
        hf = spec(
            config={"kv_heads": "n_kv | n_head", "base": "rope.theta | theta", "rope": "rope"},
            require={"decoder": [False]},
            ignore=["use_cache"],
        ).dialect("hf")
        fields, problems = hf.read_config({"n_head": 4, "n_kv": None, "theta": 9.0})
        assert fields == {"kv_heads": 4, "base": 9.0} and not problems
        fields, problems = hf.read_config({"n_kv": 2, "n_head": 4, "rope": {"theta": 1.0, "f": 2}})
        assert fields == {"kv_heads": 2, "base": 1.0, "rope": {"f": 2}}
        written = hf.write_config({"kv_heads": 2, "base": 1.0, "rope": {"f": 2}})
        assert written == {"n_kv": 2, "rope": {"theta": 1.0, "f": 2}}
        _, problems = hf.read_config({"decoder": True, "n_haed": 4, "use_cache": 1, "odd": 1})
        assert len(problems) == 3
        assert "decoder: True is not implemented" in problems[0]
        assert "Did you mean n_head" in problems[1]
        assert hf.read_config({"odd": 1}, ignore=["odd"])[1] == []
        assert hf.read_config({"decoder": None})[1] == []
        assert "0 is not implemented" in hf.read_config({"decoder": 0})[1][0]
