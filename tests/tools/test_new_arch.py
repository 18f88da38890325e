"""The newcomer's path: drafts of real architectures, what they mark, and what is refused."""

import difflib
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import scaffold
import yaml
from conftest import PATIENCE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scaffold import Draft
from scaffold.lines import collapse, elementary
from scaffold.names import families, plain
from scaffold.text import flow, inserted

from converters.language import parse_rule
from converters.spec import load_spec, parse_spec
from zoo import registry
from zoo.errors import ConfigError, OutputExists, UnknownName, UsageError, ZooError

ROOT = Path(__file__).parents[2]
REGISTRY = (ROOT / "registry.yaml").read_text(encoding="utf-8")


def without(name: str, text: str) -> str:
    """registry.yaml before an architecture was in it."""
    blocks = re.split(r"(?m)^(?=  [\w.-]+:(?: |$)|[a-z])", text)
    own = [b for b in blocks if b.startswith(f"  {name}:") or f"architecture: {name}\n" in b]
    return "".join(block for block in blocks if block not in own)


EARLIER = without("neox", without("mistral", REGISTRY))


@cache
def earlier() -> TemporaryDirectory[str]:
    """A tree in which Mistral and GPT-NeoX, which the drafts are of, are not known yet."""
    root = TemporaryDirectory(prefix="zoo-earlier-")
    tree(Path(root.name))
    return root


def test_similar_architecture_needs_no_model_file() -> None:
    draft = mistral()
    assert draft.only_data
    assert set(draft.files) == {
        "converters/specs/kin/native.yaml",
        "converters/specs/kin/hf.yaml",
        "registry.yaml",
    }
    llama = yaml.safe_load((ROOT / "converters/specs/llama/hf.yaml").read_text())
    assert names(hf(draft)["weights"]) == names(llama["weights"])
    assert names(hf(draft)["heads"]) == names(llama["heads"])


def test_nothing_is_left_unguessed() -> None:
    """A draft that somebody wrote and has not finished says here what it still needs."""
    assert scaffold.left() == []


@cache
def drafted(name: str, like: str, reference: str) -> Draft:
    return scaffold.draft(name, like, reference, root=Path(earlier().name))


def mistral() -> Draft:
    """Known by now, and drafted again as if it were not."""
    return drafted("kin", "llama", "MistralForCausalLM")


def olmo2() -> Draft:
    return drafted("olmo2", "llama", "Olmo2ForCausalLM")


def hf(draft: Draft) -> dict[str, Any]:
    folder = f"converters/specs/{draft.name}"
    texts = {name: draft.files[f"{folder}/{name}.yaml"] for name in ("native", "hf")}
    files = {name: yaml.safe_load(text) for name, text in texts.items()}
    parse_spec(draft.name, files)
    sections: dict[str, Any] = files["hf"]
    return sections


def names(rules: dict[str, Any]) -> set[tuple[str, ...]]:
    """Rules without their enumerations: each source with its targets."""
    return {
        (str(one.source), *map(str, one.targets))
        for source, target in rules.items()
        for one in elementary(parse_rule(source, target))
    }


# --- real architectures --------------------------------------------------------------------------


def test_unguessed_parts_are_marked_and_refused() -> None:
    draft = mistral()
    assert sum("sliding_window" in mark for mark in draft.marks) == 1
    assert sum("published checkpoint" in mark for mark in draft.marks) == 1
    assert len(draft.marks) == 2
    assert [line for line in draft.verdict if "sliding_window: unknown field" in line]


def test_fused_projections_are_found_by_shape() -> None:
    draft = drafted("phi3", "llama", "Phi3ForCausalLM")
    assert draft.only_data
    weights = hf(draft)["weights"]
    layer, block = "layers.{layer}", "blocks.{layer}"
    assert weights[f"{layer}.self_attn.qkv_proj.weight [(q | k | v) i]"] == [
        f"{block}.attn.{n}.weight [{n} i]" for n in "qkv"
    ]
    fused = weights[f"{layer}.mlp.gate_up_proj.weight [(n o) i]"]
    assert fused == f"{block}.mlp.{{n=gate,up}}.weight [o i]"
    assert hf(draft)["require"]["sliding_window"] == []


def test_different_architecture_gets_a_model_file() -> None:
    draft = olmo2()
    assert not draft.only_data
    assert set(draft.files) == {
        "converters/specs/olmo2/native.yaml",
        "converters/specs/olmo2/hf.yaml",
        "zoo/models/olmo2.py",
        "registry.yaml",
    }
    code = draft.files["zoo/models/olmo2.py"]
    compile(code, "olmo2.py", "exec")
    own = [mark for mark in draft.marks if mark.startswith("zoo/models")]
    for note in ("what sets it apart", "attn.q_norm", "attn.k_norm", "post_feedforward_layernorm"):
        assert sum(note in mark for mark in own) == 1
    assert sum("here and on no disk: blocks.{layer}.norm1.weight [72]" in m for m in own) == 1
    assert sum("no field of config.json sets mlp_bias" in mark for mark in own) == 1
    source = (ROOT / "zoo/models/llama.py").read_text(encoding="utf-8")
    assert code.endswith(source.split('"""', 2)[2].lstrip("\n"))
    assert names(hf(draft)["weights"]) >= {
        (f"layers.{{layer}}.self_attn.{n}_norm.weight", f"blocks.{{layer}}.attn.{n}_norm.weight")
        for n in "qk"
    }
    assert any("blocks.0.norm1.weight" in line for line in draft.verdict)


def test_names_outside_the_table_are_matched() -> None:
    """GPT-NeoX beside Llama: every word differs, fields too, and qkv is one tensor."""
    draft = drafted("gpt_neox", "llama", "GPTNeoXForCausalLM")
    spec = hf(draft)
    assert spec["prefix"] == "gpt_neox."
    rules = names(spec["weights"]) | names(spec["heads"])
    assert rules >= {
        ("embed_in.weight", "embed.weight"),
        ("embed_out.weight", "head.weight"),
        ("layers.{layer}.attention.dense.bias", "blocks.{layer}.attn.out.bias"),
        ("layers.{layer}.mlp.dense_h_to_4h.weight", "blocks.{layer}.mlp.up.weight"),
        ("layers.{layer}.mlp.dense_4h_to_h.weight", "blocks.{layer}.mlp.down.weight"),
        ("layers.{layer}.input_layernorm.bias", "blocks.{layer}.norm1.bias"),
        (
            "layers.{layer}.attention.query_key_value.weight [(n o) i]",
            "blocks.{layer}.attn.{n=q,k,v}.weight [o i]",
        ),
    }
    assert "[(h n e) i]" in draft.files["converters/specs/gpt_neox/hf.yaml"]
    assert spec["config"]["eps"] == "layer_norm_eps"
    assert spec["require"]["use_parallel_residual"] == [True]
    assert any("partial_rotary_factor" in mark for mark in draft.marks)


def test_transposed_kernels_and_other_fields() -> None:
    """OPT beside GPT-2: linears where GPT-2 has transposed ones, `ffn_dim` for the width."""
    draft = drafted("opt", "gpt2", "OPTForCausalLM")
    spec = hf(draft)
    assert spec["config"]["hidden"] == "ffn_dim"
    prefix = "decoder.layers.{layer}"
    assert names(spec["weights"]) >= {
        (f"{prefix}.fc1.weight", "blocks.{layer}.mlp.up.weight"),
        (f"{prefix}.self_attn.v_proj.bias", "blocks.{layer}.attn.v.bias"),
        (f"{prefix}.self_attn_layer_norm.bias", "blocks.{layer}.norm1.bias"),
    }


@pytest.mark.parametrize("draft", [mistral, olmo2], ids=lambda d: d.__name__)
def test_the_registry_only_grows(draft: Any) -> None:
    made = draft()
    text = made.files["registry.yaml"]
    changes = list(difflib.ndiff(EARLIER.split("\n"), text.split("\n")))
    assert not [line for line in changes if line.startswith(("-", "?"))]
    assert [line[2:] for line in changes if line.startswith("+")] == made.added
    architectures = registry.parse_architectures(registry.parse_section(text, "architectures"))
    entry = architectures[made.name]
    assert entry.module == ("llama" if made.only_data else made.name)
    assert sorted(h for heads in entry.heads.values() for h in heads) == sorted(
        ("lm", "none", "sequence_classification")
    )
    variants = registry.parse_variants(registry.parse_section(text, "variants"), architectures)
    classes = {variant["class"] for variant in variants[made.name].values()}
    assert classes == set(entry.heads)
    sizes = next(iter(variants[made.name].values()))["config"]
    assert isinstance(sizes["rms_norm_eps"], float)  # 3e-05 would be a word
    assert sizes["vocab_size"] < 200


# --- writing -------------------------------------------------------------------------------------


def tree(destination: Path) -> Path:
    """What drafting needs of a checkout, in a place of its own."""
    for folder in ("zoo", "converters", "tools"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, destination / folder, ignore=skip)
    (destination / "registry.yaml").write_text(EARLIER, encoding="utf-8")
    return destination


def contents(root: Path) -> dict[str, bytes]:
    paths = (path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    root, draft = tree(tmp_path), olmo2()
    before = contents(root)
    draft.write(root)
    after = contents(root)
    assert {path for path in after if after[path] != before.get(path)} == set(draft.files)
    assert len(scaffold.left(root)) == len(draft.marks)
    with pytest.raises(OutputExists, match=r"olmo2/hf\.yaml, zoo/models/olmo2\.py: there already"):
        draft.write(root)
    with pytest.raises(OutputExists, match="olmo2 is there already"):
        scaffold.draft("olmo2", "llama", "Olmo2ForCausalLM", root=root)
    again = scaffold.draft("olmo2", "llama", "Olmo2ForCausalLM", root=root, force=True)
    again.write(root, force=True)
    assert contents(root) == after


def run(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.slow
def test_draft_reaches_parity(tmp_path: Path) -> None:
    """The tool, the two edits that it asks for, and a green table."""
    root = tree(tmp_path)
    made = ("tools/new_arch.py", "kin", "--like", "llama", "--reference", "MistralForCausalLM")
    shown = run(root, *made, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert not (root / "converters/specs/kin").exists()
    done = run(root, *made)
    assert done.returncode == 0, done.stderr
    assert "only data" in done.stdout
    verify = (
        "-c",
        "import zoo; r = zoo.verify('kin', variants=['base', 'classify']);"
        "print(r.to_text()); raise SystemExit(not r.ok)",
    )
    missing = run(root, *verify)
    assert missing.returncode == 1
    assert "sliding_window: unknown field" in missing.stdout
    spec, entries = root / "converters/specs/kin/hf.yaml", root / "registry.yaml"
    lines = [line for line in spec.read_text().splitlines() if scaffold.MARK not in line]
    spec.write_text("\n".join([*lines, "require: {sliding_window: []}", ""]))
    entries.write_text(entries.read_text().replace("sliding_window: 17", "sliding_window: null"))
    green = run(root, *verify)
    assert green.returncode == 0, green.stdout


# --- CONTRIBUTING.md -----------------------------------------------------------------------------

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_rules_in_contributing_parse() -> None:
    rows = re.findall(r"^\| (`.*?`) \| ", PAGE.replace(r"\|", "/"), re.M)
    rules = [re.findall("`(.*?)`", row) for row in rows if ".weight`" in row or "]" in row]
    assert len(rules) >= 6
    for first, *parts in rules:
        source, _, target = first.replace("/", "|").partition(":")
        listed = [part.removeprefix("- ") for part in parts]
        parse_rule(source, listed or target.strip(), "CONTRIBUTING.md")


def test_targets_and_files_in_contributing_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    last = PAGE.strip().splitlines()[-1]
    for target in {*re.findall(r"`make ([\w-]+)`", PAGE), *re.findall(r"`([\w-]+)`", last)} - {
        "make"
    }:
        assert re.search(rf"^{target}:", makefile, re.M), target
    for path in re.findall(r"`((?:zoo|converters|tools|docs|tests)/[\w./]+)`", PAGE):
        if Path(path).stem != "x":
            assert (ROOT / path).exists(), path
    assert PAGE.count("\n") <= 90  # a page


# --- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "like", "reference", "error", "message"),
    [
        ("kin", "lama", "MistralForCausalLM", UsageError, "Did you mean llama"),
        ("llama", "llama", "MistralForCausalLM", UsageError, "is what is to be drafted"),
        ("gpt2", "llama", "MistralForCausalLM", OutputExists, "gpt2 is there already"),
        ("Mis-tral", "llama", "MistralForCausalLM", UsageError, "small letters"),
        ("kin", "llama", "MistralForCausalLn", UnknownName, "Did you mean MistralForCausalLM"),
        ("kin", "llama", "MistralConfig", UsageError, "no model class"),
        ("kin", "llama", "MistralForTokenClassification", UsageError, "try MistralForCausalLM"),
        ("lama", "bert", "GPT2Model", UsageError, "gpt2 has its model_type"),
    ],
)
def test_wrong_arguments_are_refused(
    name: str, like: str, reference: str, error: type[ZooError], message: str
) -> None:
    with pytest.raises(error, match=message):
        scaffold.draft(name, like, reference)


def test_only_data_can_be_required() -> None:
    with pytest.raises(UsageError, match=r"in the model alone: blocks.\{layer\}.norm1.weight"):
        scaffold.draft("olmo2", "llama", "Olmo2ForCausalLM", only_data=True)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"hiden_size": 8}, UsageError, "no hiden_size. Did you mean hidden_size"),
        ({"num_attention_heads": 5}, ConfigError, "cannot be built.*--set FIELD=VALUE"),
        ({"hidden_size": 6000}, ConfigError, "not tiny"),
    ],
)
def test_sizes_that_the_reference_rejects_are_refused(
    settings: dict[str, int], error: type[ZooError], message: str
) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        scaffold.draft("kin", "llama", "MistralForCausalLM", settings=settings)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["x", "--like", "nobody", "--reference", "LlamaModel"], 2, "no such architecture"),
        (["x", "--like", "gpt2"], 2, "--reference"),
        (["x", "--like", "gpt2", "--reference", "Y", "--set", "a"], 2, "expected FIELD=VALUE"),
    ],
)
def test_command_prints_errors_on_one_line(arguments: list[str], code: int, message: str) -> None:
    done = run(ROOT, "tools/new_arch.py", *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# --- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", registry.architectures().values(), ids=lambda e: e.name)
def test_rules_expand_and_collapse(entry: registry.Architecture) -> None:
    """Fewer lines than names, and the same names."""
    rules = [one for r in load_spec(entry.spec).dialect("hf").rules for one in elementary(r)]
    lines = collapse(rules)
    again = [one for source, target in lines for one in elementary(parse_rule(source, target))]
    assert {str(r) for r in again} == {str(r) for r in rules}
    assert len(again) == len(rules)
    assert len(lines) <= len(load_spec(entry.spec).dialect("hf").rules) + 6


def test_indices_become_placeholders() -> None:
    assert plain("h.10.attn.q") == "h.{layer}.attn.q"
    assert plain("model.layers.3.experts.7.w1") == "model.layers.{layer}.experts.{expert}.w1"
    assert plain("conv.0.weight") == "conv.{conv}.weight"
    groups = families([("h.0.a", (2,), False), ("h.1.a", (2,), False), ("b", (3,), True)])
    assert [(f.name, f.head) for f in groups] == [("h.{layer}.a", False), ("b", True)]


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["C"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc_:#", min_size=1), inner),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(values)
def test_values_read_back_as_they_were(value: Any) -> None:
    assert yaml.safe_load(f"key: {flow(value)}") == {"key": value}


def test_an_entry_replaces_the_one_before() -> None:
    text = "# top\na:\n  x: 1\n  new:\n    old: 1\n  y: 2\n\n# about b\nb: {}\n"
    after = inserted(text, "a", "new", ["  new: 3"])
    assert after == "# top\na:\n  x: 1\n  y: 2\n  new: 3\n\n# about b\nb: {}\n"
    assert inserted(after, "a", "new", ["  new: 3"]) == after
    assert inserted(text, "b", "new", ["  new: 3"]).endswith("# about b\nb:\n  new: 3\n")


def test_settings_are_json() -> None:
    """The tool's `--set` reads numbers as numbers and words as words."""
    from new_arch import _setting

    assert _setting("a.b=3") == ("a.b", 3)
    assert _setting("a=gelu") == ("a", "gelu")
    assert _setting("a=[1, null]") == ("a", json.loads("[1, null]"))
