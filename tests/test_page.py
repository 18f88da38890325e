"""The page of what was measured, what is drawn on it, and the record of the last full run."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from tiny import build

from zoo import cli, parity, registry
from zoo.parity.drawing import layers_joined, svg, wiring
from zoo.parity.evidence import Run, gather
from zoo.parity.mutants import MUTANTS
from zoo.parity.page import page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# a page of our own, from a file: nothing is fetched
ALONE = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-quic"),
)


@pytest.fixture(scope="module")
def run() -> Run:
    report = parity.verify("gpt2", variants=["base"])
    return gather(report, mutants=False)


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
def test_wiring_is_found_by_running(name: str, part: str, nodes: str) -> None:
    assert ", ".join(drawn(name, part)) == nodes


class Tags(HTMLParser):
    """What is open, and all names there are; meta and the like are never closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_is_one_page_without_scripts(run: Run) -> None:
    text = page(run)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert not tags.seen & {"script", "link", "img", "iframe"}
    assert "http" not in text.replace("http-equiv", "")
    for said in (
        "fp64",
        "gradients",
        "bfloat16",
        "blocks.1",
        "nanogpt",
        "{layer}",
        "prefers-color",
    ):
        assert said in text
    assert 'class="bad"' not in text and "NOT all" not in text


def test_what_fails_is_named(run: Run) -> None:
    (found,) = run.architectures
    worst = replace(found.checks["bf16"], failed=("base",), shown="0.1 9.00x")
    broken = replace(found, checks={**found.checks, "bf16": worst})
    text = page(Run(run.date, run.versions, [broken]))
    assert 'class="bad"' in text and "9.00x (base)" in text and "NOT all" in text


def test_a_cell_is_the_worst_of_its_column(run: Run) -> None:
    report = parity.verify("gpt2", variants=["base", "untied"])
    (found,) = gather(report, mutants=False).architectures
    rows = [row for row in report.rows if row.check == "fp32"]
    assert found.checks["fp32"].value == max(row.value for row in rows)
    assert found.variants == 2 and found.checks["fp32"].count == 2


def test_marks_in_names_are_escaped() -> None:
    model = build("gpt2").eval()
    nodes = wiring(model, model.blocks[0], lambda: model(torch.full((1, 5), 7)))
    text = svg([replace(nodes[1], about='<b>"')], "a<b")
    assert "<b>" not in text and "&lt;b&gt;" in text


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = parity.verify("mobilellm", variants=["base"])
    monkeypatch.setattr("zoo.verify", lambda *_, **__: report)
    monkeypatch.setattr("zoo.parity.evidence.MUTANTS", dict(list(MUTANTS.items())[:2]))
    assert cli.main(["verify", "mobilellm", "--html", str(tmp_path / "report")]) == 0
    assert "mobilellm" in (tmp_path / "report" / "index.html").read_text()
    (told,) = json.loads((tmp_path / "report" / "report.json").read_text())["architectures"]
    assert told["ok"] and list(told["mutants"].values()) == ["killed", "killed"]


@pytest.mark.parametrize("width", [390, 1300])
def test_a_browser_shows_it(run: Run, width: int, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    # a page that is wider than its window has a scroll bar; only its tables may
    probe = "<script>document.title = document.documentElement.scrollWidth</script>"
    place = tmp_path / "index.html"
    place.write_text(page(run).replace("</body>", probe + "</body>"), encoding="utf-8")
    own = f"--user-data-dir={tmp_path / 'profile'}"
    command = [browser, *ALONE, own, f"--window-size={width},900", "--dump-dom", place.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "<td" in done.stdout and "gpt2" in done.stdout
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    assert int(title) <= max(width, 500)  # no window is narrower than that


# --- the last full run ---------------------------------------------------------------------------


def test_every_architecture_is_in_the_record() -> None:
    known = registry.evidence()
    assert known.keys() == registry.architectures().keys()
    for name, measured in known.items():
        assert measured["ok"], name
        assert measured["variants"] == len(registry.architectures()[name].variants)


def test_the_list_of_what_is_verified(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--verified"]) == 0
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[-5:] == ["VERIFIED", "FP64", "FP32", "BF16", "MUTANTS"]
    assert registry.evidence()["gpt2"]["date"] in first
    assert cli.main(["list", "--verified", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told) == len(registry.checkpoints()) and told[0]["fp64"]
