"""evidence.json: what its stamps cover, when they are old, and which checkpoints are verified."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import zoo
from zoo import evidence, parity, registry
from zoo.checkpoints import sources
from zoo.cli import app
from zoo.parity.result import Published, Report, Row

GPT2 = registry.architectures()["gpt2"]
COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A record of our own, a copy of what there is."""
    place = tmp_path / "evidence.json"
    shutil.copy(evidence.place(), place)
    monkeypatch.setattr("zoo.evidence.place", lambda: place)
    return place


# --- stamps --------------------------------------------------------------------------------------


CACHED = (
    *(evidence._path, evidence._tree, evidence._table),
    *(evidence._imports, evidence._code, evidence._yaml),
)


def forget() -> None:
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the code, which stamps are made of."""
    for name in ("zoo", "converters"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(evidence._ROOT / name, tmp_path / name, ignore=ignored)
    monkeypatch.setattr(evidence, "_ROOT", tmp_path)
    monkeypatch.setattr(evidence, "SPECS", tmp_path / "converters" / "specs")
    forget()
    yield tmp_path
    forget()


def is_changed_by(path: Path, edit: Callable[[str], str], section: str = "parity") -> bool:
    """Whether the stamp of gpt2 is another one after an edit, which is undone."""
    measuring, text = evidence.MEASURED_BY[section], path.read_text()
    before = evidence.digest(measuring, GPT2)
    path.write_text(edit(text))
    forget()
    after = evidence.digest(measuring, GPT2)
    path.write_text(text)
    forget()
    return before != after


def one_more(text: str) -> str:
    return f"{text}\nONE_MORE = 1\n"


@pytest.mark.slow
def test_a_stamp_covers_all_that_verification_imports(copy: Path) -> None:
    for name in (
        "zoo/models/gpt2.py",
        "zoo/components/attention.py",
        "zoo/loading.py",
        "zoo/checkpoints/plan.py",
        "zoo/text/generate.py",  # a verb of every model, which a table names
        "zoo/lora/__init__.py",
        "zoo/parity/checks.py",  # which a function imports
        "converters/plan.py",
        "converters/formats/tf_bundle.py",  # which is imported by a name in a string
    ):
        if (copy / name).is_file():
            assert is_changed_by(copy / name, one_more), name
    rule = "h.{layer}.ln_{n=1,2}"
    for spec in ("gpt2/hf.yaml", "gpt2/native.yaml", "common/hf.yaml"):
        assert is_changed_by(copy / "converters/specs" / spec, lambda text: text + "\nmore: {}\n")
    assert rule in (copy / "converters/specs/gpt2/hf.yaml").read_text()
    other = GPT2._replace(heads={**GPT2.heads, "Other": ("lm",)})
    assert evidence.digest("zoo.parity", other) != evidence.digest("zoo.parity", GPT2)


@pytest.mark.slow
def test_a_stamp_leaves_out_what_measures_nothing(copy: Path) -> None:
    for name in ("zoo/models/llama.py", "zoo/cli/app.py", "zoo/report/page.py", "zoo/evidence.py"):
        assert not is_changed_by(copy / name, one_more), name
    assert not is_changed_by(
        copy / "converters/specs/llama/hf.yaml", lambda text: text + "\na: {}\n"
    )


@pytest.mark.slow
def test_sections_are_stamped_apart(copy: Path) -> None:
    """Planted bugs are measured by code that parity does not import, and round trips by other."""
    for name, sections in (
        ("zoo/diagnosis/gate.py", {"bugs"}),
        ("zoo/parity/gates/trips.py", {"trips"}),
        ("zoo/parity/truth.py", {"parity", "bugs", "trips", "checkpoints"}),
    ):
        changed = {s for s in evidence.SECTIONS if is_changed_by(copy / name, one_more, s)}
        assert changed == sections, name


@pytest.mark.slow
def test_comments_docstrings_and_layout_do_not_count(copy: Path) -> None:
    path = copy / "zoo/components/mlp.py"
    assert not is_changed_by(path, lambda text: text.replace('"""', '"""Other. ', 1))
    assert not is_changed_by(path, lambda text: f"{text}\n# a comment\n")
    assert not is_changed_by(path, lambda text: text.replace("(self, x", "(\n        self, x"))
    assert is_changed_by(path, lambda text: text.replace("(self, x", "(self, y", 1))
    spec = copy / "converters/specs/gpt2/hf.yaml"
    assert not is_changed_by(spec, lambda text: f"# a comment\n{text}")


def test_what_changed_is_named() -> None:
    digest = evidence.digest("zoo.parity", GPT2)
    entry = {"date": "d", "versions": evidence.stamp("parity", None)["versions"], "code": digest}
    assert evidence.when("parity", "gpt2", entry) == "d"
    assert evidence.when("bugs", "gpt2", entry) == "d, changed since: code"
    plain = {**entry["versions"], "torch": entry["versions"]["torch"].partition("+")[0]}
    assert evidence.when("parity", "gpt2", {**entry, "versions": plain}) == "d"
    older = {**entry["versions"], "torch": "1.0", "transformers": "4.0"}
    shown = evidence.when("parity", "gpt2", {**entry, "versions": older, "code": "other"})
    assert shown == "d, changed since: code, torch, transformers"
    assert evidence.when("trips", "gpt2", None) == "not run"


@pytest.mark.release
@pytest.mark.parametrize("section", evidence.SECTIONS)
def test_the_committed_record_is_of_this_code(section: str) -> None:
    """Else measure again and commit zoo/evidence.json: the message says by which command."""
    entries = evidence.read()[section]
    old = {
        name: changed
        for name in entries
        if (changed := evidence.changes(section, name, entries[name]))
    }
    reasons = sorted({reason for changed in old.values() for reason in changed})
    changed_since = f"{', '.join(reasons)} changed since {section} of {', '.join(old)} was measured"
    assert not old, f"{changed_since}. Run: {evidence.SECTIONS[section]}"


# --- checkpoints ---------------------------------------------------------------------------------


def measured(value: float = 1e-14, revision: str = COMMIT) -> Report:
    """Of the weights of two checkpoints, one of them named; and of a variant."""
    limits = [("gpt2", value), ("gpt2/base", 1e-15), ("gpt2, hot", 1e-15), ("a directory", 1e-15)]
    rows = [Row(name, "fp64", error, 1e-10, f"{error:.1e}") for name, error in limits]
    return Report(rows, published={"gpt2": Published("gpt2", "openai-community/gpt2", revision)})


def recorded(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.verify", lambda *_, **__: report)
    app.main(["verify", "gpt2", "--record"])


def test_a_checkpoint_is_verified_by_its_own_weights(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = registry.checkpoints()["gpt2"]
    recorded(measured(), monkeypatch)
    entry = json.loads(kept.read_text())["checkpoints"]["gpt2"]
    assert (entry["repo"], entry["revision"], entry["ok"]) == (named.repo, COMMIT, True)
    assert entry["checks"] == {"fp64": {"shown": "1.0e-14", "value": 1e-14, "limit": 1e-10}}
    monkeypatch.setitem(registry.checkpoints(), "gpt2", named._replace(revision=COMMIT))
    assert [entry.name for entry in zoo.list(verified=True)] == ["gpt2"]
    capsys.readouterr()
    assert app.main(["list", "--verified"]) == 0
    head, row = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert head.split()[0] == "CHECKPOINT" and row.split()[0] == "gpt2" and COMMIT in row
    assert "1.0e-14" in row
    assert app.main(["list", "--verified", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert shown["checkpoint"] == "gpt2" and shown["revision"] == COMMIT


def test_neither_a_failure_nor_another_revision_verifies_a_checkpoint(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = registry.checkpoints()["gpt2"]
    monkeypatch.setitem(registry.checkpoints(), "gpt2", named._replace(revision=COMMIT))
    recorded(measured(value=1.0), monkeypatch)
    assert zoo.list(verified=True) == []
    recorded(measured(revision="f" * 40), monkeypatch)
    assert zoo.list(verified=True) == []
    recorded(measured(), monkeypatch)
    assert len(zoo.list(verified=True)) == 1
    monkeypatch.setitem(registry.checkpoints(), "gpt2", named._replace(repo="some/other"))
    assert zoo.list(verified=True) == []


def test_only_weights_from_the_hub_under_a_name_are_a_checkpoints(
    made: Callable[..., Path],
) -> None:
    place = made("gpt2")
    entry = registry.checkpoints()["gpt2"]
    named = sources.Source(place, "gpt2", entry, entry.repo, COMMIT)
    own, hot = parity._checkpoint_jobs(named, "gpt2", {})
    assert own.published == Published("gpt2", entry.repo, COMMIT) and hot.published is None
    own, _ = parity._checkpoint_jobs(sources.Source(place, str(place)), "x", {})
    assert own.published is None
    own, _ = parity._checkpoint_jobs(named, "gpt2", {"config": {"eps": 1e-3}})
    assert own.published is None


def test_verify_says_which_published_weights_it_ran(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    published = Published("gpt2", "openai-community/gpt2", COMMIT)
    job = parity.Job("gpt2", "GPT2LMHeadModel", directory=made("gpt2"), published=published)
    monkeypatch.setattr(parity, "_jobs", lambda *_: [job])
    monkeypatch.setattr(parity, "_run", lambda *_: iter([Row("gpt2", "fp64", 0.0, 1, "0")]))
    assert parity.verify("gpt2").published == {"gpt2": published}
