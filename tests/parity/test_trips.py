"""Round trips: every dialect of every architecture to every other and back; and the report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.dialects import every_dialect
from converters.spec import load_spec, spec_names
from zoo import registry
from zoo.parity.gates import formats, trips
from zoo.parity.gates.trips import End, Trip

ARCHITECTURES = registry.architectures()
MADE = trips.sources(Path(__file__).parents[1] / "data")
COARSE = {"llama2c-q8", "gguf q8_0"}  # eight bits a number
PAIRS = [(name, a, b) for name, entry in ARCHITECTURES.items() for a, b in trips.pairs(entry)]
VARIANTS = [
    pytest.param(name, variant, marks=[pytest.mark.long] if n else [])
    for name, entry in ARCHITECTURES.items()
    for n, variant in enumerate(entry.variants)
]


# of each architecture from HF's files to each dialect and back; those between others are alike
ALIKE = [pytest.param(*p, marks=() if str(p[1]) == "hf" else pytest.mark.long) for p in PAIRS]


@pytest.mark.parametrize(("name", "a", "b"), ALIKE, ids=lambda part: str(part).replace(" ", "-"))
def test_round_trip(name: str, a: End, b: End, tmp_path: Path) -> None:
    """Equal bytes between exact dialects, except for fields that one cannot represent."""
    trip = trips.travel(ARCHITECTURES[name], a, b, tmp_path, MADE)
    assert trip.ok, trip.detail
    made = (name, a.dialect) in MADE
    if trips.clash(ARCHITECTURES[name], a.dialect, b.dialect):
        assert (trip.result, trip.why) == ("refused", "act")
    elif str(b) in COARSE - {str(a)} and not made:  # rows of what was made are too short for it
        assert trip.result == "lossy" and 1e-3 < trip.error < 0.1
        assert "Q8_0" in trip.why or "int8 in groups of" in trip.why
    elif made:
        assert trip.result == "values"
        assert trip.why == ("without its head" if (name, b.dialect) == ("bert", "gguf") else "")
    else:
        assert trip.result == "bytes" or trip.why == "without positions", trip
        assert (trip.result == "bytes") or b.dialect == "meta"  # which no params.json says


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_round_trip_of_what_the_reference_writes(name: str, variant: str, tmp_path: Path) -> None:
    """To each dialect and back: the same weights, or a refusal that names the fields."""
    for trip in trips.published(ARCHITECTURES[name], variant, tmp_path):
        assert trip.ok, trip.detail
        if trip.to in trips.OWN:
            assert trip.result == "bytes", trip
        if trip.result == "refused":
            assert trip.why and "\n" not in trip.why and trip.detail
        else:
            assert trip.result in ("bytes", "weights") or trip.why == "without its head", trip


def test_every_dialect_is_covered() -> None:
    """Only one kind of pair has no model in common."""
    boxes = {(spec.name, dialect.name): box for spec, dialect, box in every_dialect()}
    assert {key for key, box in boxes.items() if not box.file} == MADE.keys()
    assert boxes.keys() <= {(name, end.dialect) for name, *ends in PAIRS for end in ends}
    assert {d for _, d in boxes} >= {"meta", "llama2c", "nanogpt", "mingpt", "book", "gguf"}
    several = {name for name in spec_names() if len(load_spec(name).dialects) > 1}
    assert several == {name for name, _ in boxes}
    ends = [(ARCHITECTURES[name], a.dialect, b.dialect) for name, a, b in PAIRS]
    apart = {frozenset((a, b)) for entry, a, b in ends if trips.clash(entry, a, b)}
    others = ("mingpt", "book", "gguf", "openai")
    assert apart == {frozenset(("nanogpt", other)) for other in others}


# --- it can fail ---------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["weight", "field"])
def test_wrong_conversion_is_detected(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trips.load

    def load(place: Path, **how: Any) -> Any:
        model = real(place, **how)
        if place.name == "there" and what == "weight":
            with torch.no_grad():
                next(model.parameters())[0] *= 1 + 1e-6
        elif place.name == "there":
            model.config = model.config.replace(eps=2e-5)
        return model

    monkeypatch.setattr(trips, "load", load)
    trip = trips.travel(ARCHITECTURES["llama"], End("hf"), End("llama2c"), tmp_path, {})
    assert trip.result == "WRONG" and not trip.ok
    assert ("eps" if what == "field" else "embed.weight") in trip.detail


def test_other_bytes_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trips.convert

    def convert(source: Path, place: Path, **how: Any) -> None:
        real(source, place, **how)
        if place.name == "back":
            path = place / "config.json"
            path.write_text(path.read_text() + "\n")

    monkeypatch.setattr(trips, "convert", convert)
    trip = trips.travel(ARCHITECTURES["mobilellm"], End("hf"), End("native"), tmp_path, {})
    assert trip.result == "weights"


def test_report_of_round_trips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "formats.md"
    assert formats.main(["mobilellm", "--write", str(page)]) == 0
    out = capsys.readouterr().out
    assert "| mobilellm | bytes        | bytes        | 4 × bytes" in out
    assert page.read_text().startswith("# Formats: round trips\n\nMeasured by `make formats`: 12 r")
    with pytest.raises(SystemExit):
        formats.main(["lama"])
    assert "Did you mean llama?" in capsys.readouterr().err


def test_report_of_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    journeys = [
        Trip("llama", "hf", "gguf", "bytes"),
        Trip("llama", "hf", "gguf q8_0", "lossy", "Q8_0", 0.0123),
        Trip("llama", "gguf", "hf", "WRONG", "differs", 0.5, "norm.weight"),
        Trip("llama", "gguf", "meta", "refused", "eps", detail="eps: 1 cannot be said there"),
        Trip("llama", "gguf", "gguf q8_0", "lossy", "Q8_0", 0.9),
    ]
    monkeypatch.setattr(formats, "run", lambda *_: iter(journeys))
    assert formats.main(["llama"]) == 1
    out = capsys.readouterr().out
    for words in ("1.2e-02 (Q8_0)", "no: eps", "WRONG llama, gguf to hf: norm.weight"):
        assert words in out
    assert "WRONG llama, gguf to gguf q8_0" in out  # further off than eight bits are
    assert formats.main(["llama", "--json"]) == 1
    out = json.loads(capsys.readouterr().out)
    assert out["ok"] is False and out["trips"][1]["error"] == 0.0123
