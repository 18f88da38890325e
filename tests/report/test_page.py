"""The page of what was measured, what is drawn on it, and the record of the last full run."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PATIENCE
from tiny import build

import zoo
from zoo import evidence, parity, registry
from zoo.cli import app
from zoo.diagnosis.diff import planted
from zoo.diagnosis.diff.planted import Trace
from zoo.diagnosis.gate import Verdict
from zoo.errors import MissingTensors
from zoo.parity.gates import formats
from zoo.parity.gates.trips import Trip
from zoo.parity.result import Report, Row
from zoo.report.gather import Run, _by_layer, gather
from zoo.report.page import COLUMNS, bug_counts, page
from zoo.report.wiring import about, layers_joined, svg, wiring

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# a page of our own, from a file: nothing is fetched
ALONE = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-quic"),
)


@pytest.fixture(scope="module")
def run() -> Run:
    return gather(parity.verify("gpt2", variants=["base"]), {})


RECORDED: dict[str, Any] = {
    "bugs": {
        "gpt2": {
            "date": "2001-02-03",
            "versions": {"torch": "9.8"},
            "code": "other",
            "bugs": {
                "q_k_exchanged": {"killed": "base: fp64 1", "located": True, "diagnosed": True},
                "k lost": {"killed": "x", "located": True, "diagnosed": False, "said": "v <lost>"},
                "lost": {"killed": "x", "located": False, "place": "in norm", "said": "nothing"},
                "a shape": {"refused": "base: ShapeMismatch"},
            },
        }
    },
    "trips": {
        "gpt2": {
            "date": "2004-05-06",
            "versions": {"torch": "7.6"},
            "code": "",
            "counts": {"bytes": 1, "refused": 1},
            "trips": {"hf": {"native": "bytes"}, "hf: base": {"native": "no: act"}},
            "wrong": {},
        }
    },
}


def with_record(run: Run, recorded: dict[str, Any] = RECORDED) -> Run:
    (each,) = run.architectures
    return Run(
        [replace(each, bugs=recorded["bugs"].get("gpt2"), trips=recorded["trips"].get("gpt2"))]
    )


def texts(html: str) -> str:
    """What a reader sees."""
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL).split())


def drawn(name: str, part: str = "") -> list[str]:
    """Each node with what it reads."""
    model = build(name).eval()
    ids = torch.full((1, 5), 7)
    more = {"decoder_input_ids": ids} if name == "t5" else {}
    module = model.get_submodule(part)
    nodes = wiring(model, module, lambda: model(ids, **more))
    nodes = layers_joined(nodes)
    return [" ".join(map(str, (node.label, *node.reads))) for node in nodes]


@pytest.mark.parametrize(
    ("name", "part", "nodes"),
    [
        ("gpt2", "", "in, embed 0, positions, + 1 2, blocks × 3 3, norm 4, head 5"),
        ("gpt2", "blocks.0", "in, norm1 0, attn 1, + 0 2, norm2 3, mlp 4, + 3 5"),
        ("bert", "blocks.0", "in, attn 0, + 0 1, norm1 2, mlp 3, + 3 4, norm2 5"),
        ("neox", "blocks.0", "in, norm1 0, attn 1, + 0 2, norm2 0, mlp 4, + 3 5"),
        (
            "gemma2",
            "blocks.0",
            "in, norm1 0, attn 1, norm1_out 2, + 0 3, norm2 4, mlp 5, norm2_out 6, + 4 7",
        ),
        ("t5", "", "in, embed 0, encoder 1, embed 0, decoder 3 2, head 4"),
    ],
)
def test_wiring_is_traced_by_running(name: str, part: str, nodes: str) -> None:
    assert ", ".join(drawn(name, part)) == nodes


class Tags(HTMLParser):
    """What is open, and all names there are; meta and the like are never closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_one_file_without_scripts(run: Run) -> None:
    text = page(run)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert not tags.seen & {"script", "link", "img", "iframe"}
    assert "http" not in text.replace("http-equiv", "")
    for words in (
        "fp64",
        "gradients",
        "bfloat16",
        "blocks.1",
        "nanogpt",
        "{layer}",
        "prefers-color",
    ):
        assert words in text
    assert 'class="bad"' not in text and "NOT all" not in text


def test_page_names_what_was_not_run(run: Run) -> None:
    seen = texts(page(run))
    assert seen.count("not run") == 6  # cells, what it was measured with, the chapter's titles
    assert "make diagnosis does" in seen and "make formats does" in seen


def test_recorded_results_show_date_and_versions(run: Run) -> None:
    seen = texts(page(with_record(run)))
    for words in (
        # planted, killed, located, diagnosed; code that is not the one that was measured
        "3 3 2 1 2001-02-03, changed since: code, torch, transformers",
        # bytes, weights, values, lossy, refused, wrong
        "1 0 0 0 1 0 2004-05-06",
        "Planted bugs: torch 9.8.",
        "Round trips: torch 7.6.",
        "k lost x yes no v &lt;lost&gt;",
        "lost x no no nothing (located at in norm)",
        "a shape refused, base: ShapeMismatch",
        "1 variant as the reference writes them",
        "all within limits",
    ):
        assert words in seen, words
    assert "not run" not in seen and "NOT all" not in seen


def test_page_of_some_architectures_says_so(run: Run) -> None:
    one, other = with_record(run).architectures[0], replace(run.architectures[0], name="another")
    assert "Planted bugs: torch 9.8; not run for 1 architecture." in texts(page(Run([one, other])))


def test_every_cell_describes_its_measurement(run: Run) -> None:
    (each,) = run.architectures
    seen = texts(page(run))
    assert "1 of 1" in seen and each.stamp["date"] in seen and "supported" not in seen
    for measured in each.checks.values():
        assert f"{measured.shown} {measured.limit:g} {measured.variant} 1 0" in seen


def test_page_contains_the_spec(run: Run) -> None:
    seen = texts(page(run))
    for words in (
        "h.{layer}.attn.c_attn.weight [i (n o)] blocks.{layer}.attn.{n=q,k,v}.weight [o i]",
        "dropped: causal mask",
        "lm_head.weight transformer.wte.weight tied",
        "n_embd dim",
        "transformer.… optional prefix of all names",
    ):
        assert words in seen, words


def failing(row: Row) -> Run:
    return gather(Report([row, replace(row, check="fp32", value=0.5, shown="fine")]), {})


def test_failure_is_named_and_expanded() -> None:
    """With any message; a model that cannot be loaded does not stop the page."""
    why = 'a <b>"tensor"</b> & more'
    row = Row("gpt2/base", "fp64", 0.5, 1e-10, "5.0e-01", why)
    text = page(failing(row))
    seen = texts(text)
    assert "<b>" not in text.replace("<b>fp", "").replace("<b>loads", "") and "NOT all" in seen
    assert seen.count("fp64 of base: a &lt;b&gt;") == 2 and "(at most 1e-10)" in seen
    assert "5.0e-01 base" in seen and '<details open="open"' in text


@pytest.mark.parametrize("check", ["load", "reference"])
def test_architecture_that_does_not_load(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise MissingTensors("2 tensors: <a>, b")

    monkeypatch.setattr("zoo.report.gather.load", refuse)
    run = failing(Row("gpt2/base", check, math.nan, 0, "MissingTensors", "2 tensors: <a>, b"))
    seen = texts(page(run))
    assert (
        "0 of 1" in seen
        and "no wiring diagram: base: MissingTensors: 2 tensors: &lt;a&gt;, b" in seen
    )
    assert not run.ok and json.loads(json.dumps(run.to_record()))["parity"]["gpt2"]["ok"] is False


def test_raising_check_is_shown_in_its_column() -> None:
    """Under the name of its function if it raised before its first row."""
    from zoo.parity.checks import CHECKS
    from zoo.parity.layouts import layouts

    columns = {name for names in COLUMNS.values() for name in names}
    assert {check.__name__ for check in (*CHECKS, layouts)} <= columns


def test_survivors_and_wrong_trips_fail_the_page(run: Run) -> None:
    recorded = copy.deepcopy(RECORDED)
    recorded["bugs"]["gpt2"]["bugs"]["k lost"]["killed"] = ""
    assert "planted bug survived: k lost" in texts(page(with_record(run, recorded)))
    recorded = copy.deepcopy(RECORDED)
    recorded["trips"]["gpt2"] |= {"wrong": {"hf to <b>": "differs"}, "counts": {"wrong": 1}}
    seen = texts(page(with_record(run, recorded)))
    assert "round trip, hf to &lt;b&gt;: differs" in seen and "NOT all" in seen


def test_heat_shows_nan(run: Run) -> None:
    match = SimpleNamespace(native="blocks.1.attn")
    readings = [SimpleNamespace(match=match, error=e, limit=1e-3) for e in (1e-5, math.nan, 1e-4)]
    heat = {"float64": {**_by_layer(readings), "head": (0.1, 1e-3)}}
    assert heat["float64"]["blocks.1"] == (None, 1e-3)
    (each,) = run.architectures
    seen = texts(page(Run([replace(each, heat=heat)])))
    assert "not finite, limit 1.0e-03" in seen and "1.0e-01, limit 1.0e-03" in seen


def test_empty_page() -> None:
    assert "Nothing was measured" in page(gather(Report(), {}))
    assert not Run([]).ok


def test_cell_shows_the_worst_of_its_column(run: Run) -> None:
    report = parity.verify("gpt2", variants=["base", "untied"])
    (entry,) = gather(report, {}).architectures
    rows = [row for row in report.rows if row.check == "fp32"]
    assert entry.checks["fp32"].value == max(row.value for row in rows)
    assert entry.variants == 2 and entry.checks["fp32"].count == 2
    assert entry.loaded == 2 and entry.seconds.keys() == {"base", "untied"}


def test_checkpoints_have_a_page() -> None:
    """Separate from the variants of an architecture of the same name, such as gpt2."""
    names = ("gpt2/base", "gpt2", "gpt2, hot", "other")
    rows = [Row(name, "fp64", 1e-15, 1e-10, "1.0e-15") for name in names]
    run = gather(Report(rows, {"gpt2": 2.0, "gpt2, hot": 3.0}), RECORDED)
    pages = {each.name: each for each in run.architectures}
    assert {name: each.variants for name, each in pages.items()} == {
        **dict.fromkeys(("gpt2", "other"), 1),
        "gpt2, the checkpoint": 2,
    }
    one = pages["gpt2, the checkpoint"]
    assert one.seconds == {"published": 2.0, "redrawn": 3.0} and not one.bugs and pages["gpt2"].bugs
    assert "redrawn, 3.0 s" in texts(page(run))


def test_long_sections_show_their_length() -> None:
    model = build("t5")
    assert about(model.embed) == f"Embedding, {'×'.join(map(str, model.embed.weight.shape))}"
    count = sum(p.numel() for p in model.encoder.parameters())
    assert about(model.encoder) == f"Stack, {count:,} parameters"


def test_names_are_escaped() -> None:
    model = build("gpt2").eval()
    nodes = wiring(model, model.blocks[0], lambda: model(torch.full((1, 5), 7)))
    text = svg([replace(nodes[1], about='<b>"')], "a<b")
    assert "<b>" not in text and "&lt;b&gt;" in text


def test_report_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = parity.verify("mobilellm", variants=["base"])
    monkeypatch.setattr("zoo.verify", lambda *_, **__: report)
    place = tmp_path / "report"
    assert app.main(["verify", "mobilellm", "--html", str(place), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    assert "mobilellm" in (place / "index.html").read_text()
    record = evidence.read(place / "report.json")
    assert record["parity"]["mobilellm"]["ok"]
    assert record["bugs"].keys() == {"mobilellm"} & evidence.read()["bugs"].keys()


def test_one_architecture_can_be_recorded_again(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = evidence.read()["parity"]
    rows = [Row(name, "fp64", 1e-15, 1e-10, "1.0e-15") for name in ("bert/masked-lm", "a file")]
    monkeypatch.setattr("zoo.verify", lambda *_, **__: Report(rows))
    assert app.main(["verify", "bert", "--record"]) == 0
    after = evidence.read()["parity"]
    assert after.keys() == before.keys() and after["bert"]["checks"].keys() == {"fp64"}
    assert {**after, "bert": 0} == {**before, "bert": 0}


@pytest.mark.slow
def test_published_outputs_have_a_page(fixtures: Path, tmp_path: Path) -> None:
    file = str(fixtures / "stories260K" / "stories260K.bin")
    asked = ["verify", file, "--golden", "stories260k", "--html", str(tmp_path)]
    assert app.main(asked) == 0
    assert "stories260K.bin" in texts((tmp_path / "index.html").read_text())


@pytest.mark.parametrize("wrong", ["place", "record"])
def test_unwritable_output_is_refused_before_the_run(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("zoo.verify", lambda *_, **__: pytest.fail("too late"))
    file = tmp_path / "evidence.json"
    file.write_text("[]")
    if wrong == "record":
        monkeypatch.setattr("zoo.evidence.place", lambda: file)
    place = tmp_path / "report" if wrong == "record" else file
    assert app.main(["verify", "gpt2", "--html", str(place)]) == 1
    assert "evidence.json" in capsys.readouterr().err


def rendered(place: Path, scratch: Path, fragment: str = "") -> str:
    """The page as a browser has it in the end."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    own = (f"--user-data-dir={scratch / 'profile'}", "--window-size=1500,900", "--dump-dom")
    command = [browser, *ALONE, *own, place.as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_link_opens_its_section(run: Run, tmp_path: Path) -> None:
    place = tmp_path / "index.html"
    place.write_text(page(run), encoding="utf-8")
    chapter = r'<details open="">(?:(?!<details).)*<div id="of-gpt2">'
    for fragment, opened in (("", False), ("#of-gpt2", True)):
        assert bool(re.search(chapter, rendered(place, tmp_path, fragment))) == opened


@pytest.mark.parametrize("kind", ["good", "bad"])
@pytest.mark.parametrize("width", [390, 1400])
def test_browser_shows_the_page(run: Run, kind: str, width: int, tmp_path: Path) -> None:
    shown = with_record(run)
    if kind == "bad":
        shown.architectures += failing(
            Row("gpt2/base", "fp64", math.nan, 1e-10, "Error", "x" * 500 + " " + "long " * 50)
        ).architectures
    # a page that is wider than its window has a scroll bar; only its tables may. No window is as
    # narrow as a phone, but a frame is; all that can be folded lies open in it
    inner = escape(page(shown).replace("<details", "<details open"))
    outer = (
        f"<iframe style='width:{width}px; border:0' srcdoc=\"{inner}\"></iframe><script>onload = "
        "() => document.title = frames[0].document.documentElement.scrollWidth</script>"
    )
    place = tmp_path / "index.html"
    place.write_text(f"<!doctype html><meta charset='utf-8'>{outer}", encoding="utf-8")
    title = rendered(place, tmp_path).partition("<title>")[2].partition("</title>")[0]
    assert 300 < int(title) <= width


# --- the record ----------------------------------------------------------------------------------


def test_every_architecture_is_in_the_record() -> None:
    recorded = evidence.read()
    assert recorded["parity"].keys() == registry.architectures().keys()
    assert all(recorded[name].keys() <= registry.architectures().keys() for name in recorded)
    for name, measured in recorded["parity"].items():
        assert measured["ok"], name
        assert measured["variants"] == len(registry.architectures()[name].variants)


def test_list_of_verified_architectures(capsys: pytest.CaptureFixture[str]) -> None:
    """One row for each architecture; tiny models do not count as a verified checkpoint."""
    assert app.main(["list", "--verified"]) == 0
    out = capsys.readouterr().out
    about, table, after = out.split("\n\n")
    assert "tiny models of random weights" in about
    head, *rows = table.splitlines()
    names = ["ARCHITECTURE", "MEASURED", "VARIANTS", "FP64", "FP32", "BF16", "BUGS"]
    assert head.split() == names
    assert [row.split()[0] for row in rows] == [*registry.architectures()]
    assert evidence.read()["parity"]["gpt2"]["date"] in rows[0]
    assert "published weights: none yet" in after and "zoo verify NAME --record" in after
    only_checkpoints = registry.checkpoints().keys() - registry.architectures().keys()
    assert not only_checkpoints & set(out.split())
    assert app.main(["list", "--verified", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["checkpoints"] == [] and zoo.list(verified=True) == []
    assert [row["architecture"] for row in listed["architectures"]] == [*registry.architectures()]
    assert all(row["fp64"] and row["variants"] for row in listed["architectures"])


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A record of our own, a copy of what there is."""
    place = tmp_path / "evidence.json"
    shutil.copy(evidence.place(), place)
    monkeypatch.setattr("zoo.evidence.place", lambda: place)
    return place


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[1]", "list where an object is expected"),
        ('{"date": "2026-11-21", "architectures": []}', "date is no section.* make report"),
        ('{"parity": 3}', "expected an object"),
        ('{"parity": {"gpt2": {"date": "2026-11-21"}}}', r"parity\.gpt2\.versions: missing"),
        ('{"bugs": {"gpt2": {"bugs": {"a": 1}}}}', r"bugs\.gpt2\.bugs: missing or malformed"),
        (None, "not there, so nothing is known to be verified. Run: make report"),
    ],
)
def test_invalid_record_is_refused(
    text: str | None, message: str, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept.unlink() if text is None else kept.write_text(text)
    assert app.main(["list", "--verified"]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert app.main(["list"]) == 0


def test_record_of_other_code_is_stale(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(kept.read_text())
    data["parity"]["gpt2"]["code"] = "another"
    data["parity"]["bert"]["ok"] = False
    data["parity"]["gone"] = data["parity"].pop("falcon")
    del data["bugs"]
    kept.write_text(json.dumps(data))
    assert app.main(["list", "--verified"]) == 0
    _, *rows = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert "changed since: code" in rows[0] and rows[0].startswith("gpt2 ")
    assert all(row.endswith("not run") for row in rows)
    assert not any(re.match(r"bert |falcon |gone ", row) for row in rows)


def test_repeated_part_replaces_its_record(kept: Path) -> None:
    before = evidence.read()
    entries = {name: {**RECORDED["bugs"]["gpt2"], "date": "2009-09-09"} for name in ("t5", "gpt2")}
    evidence.update("bugs", entries)
    after = evidence.read()
    assert after["parity"] == before["parity"]
    assert {**before["bugs"], **entries} == after["bugs"]
    order = [*registry.architectures()]
    assert [*after["bugs"]] == sorted(after["bugs"], key=order.index)


def test_record_of_planted_bugs() -> None:
    traces = [
        Trace("gpt2", "a", True, True, "base, whole", "out x", ("the cause",)),
        Trace("gpt2", "b", True, False, "base, whole", "out y", ("another", "the cause")),
        Trace("gpt2", "c", False, False),
    ]
    verdicts = [
        *(Verdict("gpt2", bug, "names", "killed", f"base: {bug}") for bug in "ab"),
        Verdict("gpt2", "c", "names", "SURVIVED"),
        Verdict("gpt2", "d", "names", "killed", "base: ShapeMismatch"),
        Verdict("gpt2", "e", "names", "n.a."),
    ]
    (entry,) = planted.to_record(traces, verdicts).values()
    assert entry["bugs"]["b"]["said"] == "another" and entry["bugs"]["c"]["said"] == "nothing"
    assert entry["bugs"].keys() == {*"abcd"}
    assert bug_counts(entry) == {"planted": 3, "killed": 2, "located": 2, "diagnosed": 1}


def test_record_of_round_trips() -> None:
    trips = [
        Trip("gpt2", "hf", "native", "bytes"),
        Trip("gpt2", "hf", "gguf", "refused", "act", detail="no word for act"),
        Trip("gpt2", "hf", "gguf q8_0", "lossy", "Q8_0", error=0.9, detail="logits"),
        Trip("gpt2", "native", "hf", "WRONG", "differs", detail="head.weight"),
    ]
    (entry,) = formats.to_record(trips).values()
    assert entry["trips"]["hf"] == {
        "native": "bytes",
        "gguf": "no: act",
        "gguf q8_0": "9.0e-01 (Q8_0)",
    }
    assert entry["wrong"] == {"hf to gguf q8_0": "logits", "native to hf": "head.weight"}
    assert entry["counts"] == {"bytes": 1, "refused": 1, "wrong": 2}
