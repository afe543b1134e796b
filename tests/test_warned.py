"""A conversion that looks at no text, or that nothing measures, says so before and beside its result."""

import json
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvlatent
from kvlatent.selection.choices import BLIND, NO_DATA, UNMEASURED
from kvlatent_cli.main import app
from on_disk import SETTINGS, write_checkpoint, write_text

SET = [word for setting in SETTINGS[1:] for word in ("--set", setting)]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("warned")
    write_checkpoint(folder / "model", tiny_tokenizer)
    write_text(folder / "text.txt")
    return folder


def convert(place, out, *words):
    """The notes of a conversion in its record; they stand on stderr and in the card, too."""
    done = CliRunner().invoke(
        app, [str(w) for w in ("convert", place / "model", "--out", out, *words, "--json")]
    )
    assert done.exit_code == 0, done.stderr
    record, card = json.loads(done.stdout), (out / "README.md").read_text()
    for note in record["plan"]["notes"]:
        assert f"warning: {note}" in done.stderr and f"{note[0].upper()}{note[1:]}." in card
    assert ("Its quality has not been measured; `kvlatent eval DIR --against ORIGINAL`" in card) == (
        not record["figures"]
    )
    return record["plan"]["notes"]


def test_the_sentences_hold_the_figures_and_the_next_step():
    for figure in (
        "x1,388",
        "own-frequency",
        "x625",
        "paper",
        "SmolLM2-135M-Instruct",
        "x1.4 to x2.3",
        "--data FILE",
    ):
        assert figure in BLIND
    assert "1,388" in NO_DATA and "--data FILE" in NO_DATA
    assert "kvlatent eval OUT --against MODEL" in UNMEASURED and "--data FILE" in UNMEASURED


@pytest.mark.parametrize(
    ("preset", "note"), [("own-frequency", BLIND), ("paper", BLIND), ("calibrated", NO_DATA)]
)
def test_without_text(place, tmp_path, preset, note):
    assert convert(place, tmp_path / "out", "--preset", preset) == [note, UNMEASURED]
    measured = convert(place, tmp_path / "two", "--preset", preset, "--eval-data", place / "text.txt", *SET)
    assert measured == [note]
    assert convert(place, tmp_path / "full", "--preset", preset, "--kv", 1) == []


def test_with_text(place, tmp_path):
    data = ("--data", place / "text.txt", *SET, "--align", 0)
    assert convert(place, tmp_path / "one", *data) == []
    assert (
        convert(place, tmp_path / "two", "--preset", "own-frequency", "--data", place / "text.txt", *SET)
        == []
    )
    done = CliRunner().invoke(
        app,
        [
            str(w)
            for w in ("calibrate", place / "model", *data[:2], *SET, "--out", tmp_path / "s.safetensors")
        ],
    )
    assert done.exit_code == 0, done.stderr
    statistics = ("--statistics", tmp_path / "s.safetensors", "--align", 0)
    assert convert(place, tmp_path / "three", *statistics) == [UNMEASURED]
    plan = CliRunner().invoke(
        app,
        [
            str(w)
            for w in ("convert", place / "model", "--out", tmp_path / "x", "--preset", "paper", "--dry-run")
        ],
    )
    assert f"warning: {BLIND}" in plan.stderr and f"warning: {UNMEASURED}" in plan.stderr


def test_training_makes_the_warning_void(place, tmp_path):
    convert(place, tmp_path / "out", "--preset", "paper")
    words = (
        "train",
        tmp_path / "out",
        "--stage",
        1,
        "--teacher",
        place / "model",
        "--data",
        place / "text.txt",
        *SET,
    )
    done = CliRunner().invoke(app, [str(w) for w in (*words, "--device", "cpu")])
    assert done.exit_code == 0, done.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["plan"]["notes"] == []
    assert "noise until it is trained" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("preset", "note"), [("own-frequency", BLIND), ("paper", BLIND), ("calibrated", NO_DATA)]
)
def test_from_python(place, preset, note):
    model = kvlatent.load_model(place / "model")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kvlatent.convert(model, d_qk=8, d_vo=8, preset=preset)
        assert [(str(each.message), each.filename) for each in caught] == [(note, __file__)]
        kvlatent.convert(model, preset=preset)  # full width
    assert len(caught) == 1
