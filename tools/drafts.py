"""What `tools/new_arch.py` drafts of families that are there by now: `python tools/drafts.py`.

Each is drafted in a tree that does not know it, and compared with the spec that a person finished.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import scaffold  # noqa: E402
import yaml  # noqa: E402
from scaffold.lines import elementary  # noqa: E402

from converters.language import Rule  # noqa: E402
from converters.spec import Dialect, load_spec, parse_spec  # noqa: E402
from zoo import registry  # noqa: E402
from zoo.errors import ZooError  # noqa: E402

FAMILIES = {  # name: what it is most like, the reference's class
    "qwen2": ("llama", "Qwen2ForCausalLM"),
    "mistral": ("llama", "MistralForCausalLM"),
    "mixtral": ("llama", "MixtralForCausalLM"),
    "gemma2": ("llama", "Gemma2ForCausalLM"),
    "neox": ("llama", "GPTNeoXForCausalLM"),
    "bloom": ("gpt2", "BloomForCausalLM"),
    "falcon": ("llama", "FalconForCausalLM"),
    "roberta": ("bert", "RobertaForMaskedLM"),
    "distilbert": ("bert", "DistilBertForMaskedLM"),
    "deberta": ("bert", "DebertaForMaskedLM"),
}


def tree(root: Path, name: str) -> None:
    """Copy the project without one architecture."""
    for folder in ("converters/specs", "zoo/models"):
        shutil.copytree(ROOT / folder, root / folder)
    text = (ROOT / "registry.yaml").read_text(encoding="utf-8")
    blocks = re.split(r"(?m)^(?=  [\w.-]+:(?: |$)|[a-z])", text)
    mine = (f"  {name}:", f"architecture: {name}\n")
    kept = [b for b in blocks if not b.startswith(mine[0]) and mine[1] not in b]
    (root / "registry.yaml").write_text("".join(kept), encoding="utf-8")
    shutil.rmtree(root / f"converters/specs/{name}")
    (root / f"zoo/models/{name}.py").unlink(missing_ok=True)


def rules(of: tuple[Rule, ...]) -> set[str]:
    return {str(one) for rule in of for one in elementary(rule)}


def compared(name: str, like: str, reference: str) -> tuple[Any, ...]:
    """(seconds, rules right, rules, config fields right, fields, marks, only data or not)"""
    wanted = load_spec(registry.architectures()[name].spec).dialect("hf")
    fields = registry.architectures()[name].config_class.model_fields
    with tempfile.TemporaryDirectory(prefix="zoo-draft-") as scratch:
        tree(Path(scratch), name)
        started = time.perf_counter()
        draft = scaffold.draft(name, like, reference, root=Path(scratch))
        took = time.perf_counter() - started
    text = draft.files[f"converters/specs/{name}/hf.yaml"]
    drafted: Dialect = parse_spec(name, {"hf": yaml.safe_load(text)}).dialect("hf")
    mine, theirs = rules(drafted.weights + drafted.heads), rules(wanted.weights + wanted.heads)
    right = {f for f, paths in drafted.config.items() if paths[0] in wanted.config.get(f, ())}
    every = {f for f in wanted.config if f in fields}
    counts = (len(mine & theirs), len(theirs), len(right & every), len(every))
    return (took, *counts, len(draft.marks), draft.only_data)


def main() -> int:
    print("| | like | seconds | rules right | config fields right | left to a person | files |")
    print("|---|---|---|---|---|---|---|")
    for name, (like, reference) in FAMILIES.items():
        try:
            took, right, count, good, every, marks, data = compared(name, like, reference)
        except ZooError as error:
            print(f"| {name} | {like} | refused: {str(error).splitlines()[0][:70]} | | | | |")
            continue
        files = "two" if data else "three"
        print(
            f"| {name} | {like} | {took:.1f} | {right} of {count} | {good} of {every} "
            f"| {marks} | {files} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
