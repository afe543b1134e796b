"""The demo end to end, on a model and a library small enough for a test."""

import json
from pathlib import Path

import pytest

from kvlatent.checkpoints.load import load_model
from kvlatent.text import standard_library as embedded
from kvlatent.workflows import demo_run as demo_module
from kvlatent_cli.listings import demo_listing
from on_disk import SETTINGS, TOKENS, WORDS, write_checkpoint

QUICK = (*SETTINGS, "conversion.align=2", "calibration.blocks=4")
DISTANCES = (50, 200, 400, 700)


@pytest.fixture
def small(tmp_path, tiny_tokenizer, monkeypatch) -> Path:
    """The embedded model and the standard library, replaced; the working directory is empty."""
    model = write_checkpoint(tmp_path / "embedded", tiny_tokenizer, max_position_embeddings=1024)

    def documents(split: str, include_tests: bool = False) -> list[str]:
        start = 0 if split == "train" else 7
        return [" ".join(WORDS[i % 29 :] + WORDS) for i in range(start, start + 40)]

    for module in (demo_module, embedded):
        monkeypatch.setattr(module, "stdlib_documents", documents)
    monkeypatch.setattr(demo_module, "model_path", lambda: model)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_demo_reports_both_sides_and_can_be_repeated(small):
    said = []
    report = demo_module.demo(tokens=TOKENS, copy_trials=1, overrides=QUICK, say=said.append)
    assert report["original"]["cache_bytes_per_token"] == 512
    assert report["latent"]["cache_bytes_per_token"] == 256
    for side in ("original", "latent"):
        assert report[side]["perplexity"] > 1
        assert list(report[side]["copy_accuracy"]) == [str(distance) for distance in DISTANCES]
        assert isinstance(report[side]["continuation"], str)
    assert list(report["run"]["training"]) == ["stage1", "stage2"]
    assert report["run"]["plan"]["preset"] == "calibrated"
    assert report["run"]["calibration"]["blocks"] == 4
    widths = load_model(small / "kvlatent-demo").config.kv_latent["widths"]
    assert widths["d_qk"] + widths["d_vo"] == 16
    assert "50%" in said[0]
    json.dumps(report)
    table, *lines = demo_listing(report)
    assert table.row_count == 2 + len(DISTANCES)
    assert "saved in kvlatent-demo" in lines[-1]
    again = demo_module.demo(tokens=TOKENS, copy_trials=1, overrides=QUICK)
    assert again["latent"] == report["latent"]
    paper = demo_module.demo(tokens=TOKENS, copy_trials=1, overrides=SETTINGS, preset="paper")
    assert paper["run"]["plan"]["preset"] == "paper" and paper["latent"] != report["latent"]


def test_demo_within_minutes_spends_them_on_the_conversion(small):
    settings = [each for each in SETTINGS if "tokens" not in each]
    report = demo_module.demo(minutes=2, copy_trials=1, overrides=(*settings, "calibration.blocks=4"))
    spent = report["run"]["minutes"]
    assert spent["asked"] == 2 and spent["spent"] < 2
    steps = {row["step"]: row.get("steps") for row in spent["steps"]}
    assert steps["alignment and refit"] > 0 and "stage II" not in steps
    with pytest.raises(ValueError, match="got --minutes 2 and --tokens 512"):
        demo_module.demo(minutes=2, tokens=512, overrides=settings)


def test_demo_touches_no_stranger(small):
    (small / "kvlatent-demo").mkdir()
    (small / "kvlatent-demo" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        demo_module.demo(tokens=TOKENS, overrides=SETTINGS)


def test_demo_refuses_before_it_gathers_text(small, monkeypatch):
    """That takes a minute on a busy machine."""
    monkeypatch.setattr(demo_module, "stdlib_documents", lambda split: pytest.fail("it read the library"))
    (small / "taken").mkdir()
    (small / "taken" / "thesis.txt").write_text("mine")
    for options, sentence in (
        ({"kv": 2.0}, "lies in .0, 1.: got 2"),
        ({"model": small / "nowhere"}, "nowhere"),
        ({"out": small / "taken"}, "already holds something"),
        ({"minutes": 2.0, "tokens": 512}, "got --minutes 2 and --tokens 512"),
    ):
        with pytest.raises((ValueError, OSError), match=sentence):
            demo_module.demo(**options)


def test_demo_needs_the_library(small, monkeypatch):
    monkeypatch.setattr(demo_module, "stdlib_documents", lambda split: [])
    with pytest.raises(ValueError, match="no standard library text"):
        demo_module.demo()
