"""Studies: what a cell holds, and that the cells of a folder are measured once, by however many processes."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import study_worker
from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation.perplexity import perplexity, perplexity_ratio
from kvlatent.jobs.recipe import Recipe
from kvlatent.text.corpus import prepare
from kvlatent.training.stages import train_stage
from kvlatent.training.trainable import merged_copy, prepare_for_training
from kvlatent_lab.study import STUDIES, study
from kvlatent_lab.study.folder import StudyFolder, read_cell
from on_disk import write_text
from study_worker import RANKS, SETTINGS, STEP, blocks_in, lay_out, original_and_blocks, ranks, run


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer) -> Path:
    return lay_out(tmp_path_factory.mktemp("study"), tiny_tokenizer)


@pytest.fixture(scope="module")
def worked(place) -> dict:
    """What the processes of `study_worker` left."""
    command = [sys.executable, study_worker.__file__, str(place)]
    subprocess.run(command, check=True, timeout=900)
    return json.loads((place / "report.json").read_text())


def cell(place, out, name):
    return json.loads((place / out / f"{name}.json").read_text())


def by_hand(place, *stages, **recipe):
    """Ratio of the paper's preset at half width, without any code of the studies."""
    original, tokenizer, blocks = original_and_blocks(place, 512)
    latent = convert(original, d_qk=8, d_vo=8, preset="paper")
    if stages:
        settings = Recipe.load(None, [*SETTINGS, *(f"{key}={value}" for key, value in recipe.items())])
        train = prepare(place / "text.txt", tokenizer, held_out=0.0, **blocks_in(place)).train
        prepare_for_training(latent, settings)
        for stage in stages:
            train_stage(latent, original, stage, train, settings, place / f"by-hand-{stage}")
        latent = merged_copy(latent)
    return perplexity_ratio(perplexity(latent, blocks), perplexity(original, blocks))


def test_a_cell_holds_what_was_measured_and_how(place, tmp_path):
    report = run(place, "widths", tmp_path / "widths", cells="paper-8x8-*", seeds=[3, 4])
    assert (
        report["cells"] == report["finished"] == report["measured"] == ["paper-8x8-seed3"]
    )  # no draw, one seed
    document = cell(place, tmp_path / "widths", "paper-8x8-seed3")
    assert document["kind"] == "study"
    assert (document["study"], document["cell"]) == ("widths", "paper-8x8-seed3")
    assert document["model"]["name"] == "model"
    assert len(document["model"]["fingerprint"]) == 64
    expected = {"preset": "paper", "d_qk": 8, "d_vo": 8, "seed": 3, "stage1_tokens": 0, "stage2_tokens": 0}
    assert document["settings"] == expected
    ratio, error = by_hand(place)
    figures = document["figures"]
    assert (figures["ratio"], figures["ratio_standard_error"]) == (ratio, error)
    assert figures["perplexity"] == pytest.approx(ratio * figures["original_perplexity"])
    # 2 layers x 2 key-value heads x (width + width) x 4 bytes, on the live cache
    assert (figures["cache_bytes_per_token"], figures["original_cache_bytes_per_token"]) == (256, 512)
    assert figures["cache_ratio"] == 0.5
    record = document["record"]
    assert record["command"].startswith(
        "kvlatent study widths --model model --data text.txt --eval-data valid.txt"
    )
    assert record["command"].endswith("--cells paper-8x8-seed3")
    assert record["seed"] == 3
    assert record["seconds"] > 0
    assert record["cpu_seconds"] > 0
    assert str(place) not in json.dumps(document)
    assert str(tmp_path) not in json.dumps(document)


def test_a_trained_cell_equals_training_by_hand(place, worked):
    tokens = {"stage1.tokens": round(0.2 * 4 * STEP), "stage2.tokens": 4 * STEP - round(0.2 * 4 * STEP)}
    ranks(place)
    figures = cell(place, "ranks", "rank4-seed0")["figures"]
    ratio, _ = by_hand(place, 1, 2, **tokens, **{"lora.rank": 4, "lora.alpha": 8})
    assert figures["ratio"] == ratio  # though the cell's first process was killed on the way
    assert figures["tokens_trained"] == 5 * STEP  # a fifth of four steps is rounded up to one
    assert figures["converted_ratio"] == by_hand(place)[0]
    assert figures["ratio"] != figures["converted_ratio"]


def test_a_killed_study_goes_on_without_repeating_a_finished_cell(place, worked):
    assert worked["killed"] == -9
    assert set(worked["after"]) == {"study.json", f"{RANKS[0]}.json"}
    assert worked["litter"] == []
    report = ranks(place)
    assert report["finished"] == RANKS
    assert set(report["measured"]) <= set(RANKS[1:])
    assert (report["redone"], report["failed"], report["elsewhere"]) == ({}, {}, [])
    for name, written in worked["after"].items():
        assert (place / "ranks" / name).stat().st_mtime_ns == written
    assert ranks(place)["measured"] == []
    assert not (place / "ranks" / "work" / "training" / RANKS[1]).exists()


def test_two_processes_share_the_cells(place, worked):
    assert worked["shared"] == [0, 0]
    reports = [json.loads((place / f"{name}.json").read_text()) for name in ("first", "second")]
    first, second = (set(report["measured"]) for report in reports)
    assert first
    assert second
    assert not first & second
    assert first | second == set(reports[0]["cells"])
    assert set(reports[0]["cells"]) == {path.stem for path in (place / "shared").glob("paper-*.json")}


def test_a_folder_of_other_settings_is_refused(place, worked, tmp_path):
    with pytest.raises(
        ValueError, match=r"another eval_tokens \(512, now 256\); call it with the same arguments"
    ):
        run(place, "widths", "shared", eval_tokens=256)
    with pytest.raises(ValueError, match=r"another recipe\.calibration\.blocks \(4, now 5\)"):
        run(place, "widths", "shared", overrides=[*SETTINGS, "calibration.blocks=5"])
    with pytest.raises(ValueError, match=r"another study \(widths, now rope\)"):
        run(place, "rope", "shared")
    with pytest.raises(ValueError, match=r"another data \(\w+\.\.\., now \w+\.\.\.\)"):
        run(place, "widths", "shared", data=write_text(tmp_path / "other.txt", seed=2))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(FileExistsError, match=r"no study \(cat\.jpg\); give another --out"):
        run(place, "widths", tmp_path / "photos")


def test_a_corrupted_cell_is_named_and_redone(place, worked):
    folder = place / "shared"
    names = sorted(path.stem for path in folder.glob("paper-*.json"))
    sound = {name: (folder / f"{name}.json").read_text() for name in names}
    cut, number, other, moved = names[:4]
    (folder / f"{cut}.json").write_text(sound[cut][:-20])
    (folder / f"{number}.json").write_text(sound[number].replace('"loss": ', '"loss": "low", "was": '))
    (folder / f"{other}.json").write_text(sound[other].replace('"seed": 0', '"seed": 1'))
    (folder / f"{moved}.json").write_text(sound[cut])
    report = run(place, "widths", "shared", cells="paper-*")
    assert set(report["redone"]) == set(report["measured"]) == {cut, number, other, moved}
    assert "is damaged, not JSON" in report["redone"][cut]
    assert "loss must be a finite number, or a list or map of some: got 'low'" in report["redone"][number]
    assert "is of another seed (1, now 0)" in report["redone"][other]
    assert "is not the result of a cell of that name" in report["redone"][moved]
    for name in names:
        again = read_cell(folder / f"{name}.json")
        assert again["figures"] == json.loads(sound[name])["figures"]


def test_a_cell_that_cannot_be_measured_is_a_result_and_not_repeated(place, tmp_path, monkeypatch):
    calls = []

    def diverges(subject, cell, progress):
        calls.append(cell.name)
        if "4x4" in cell.name:
            return {"loss": float("nan")}
        raise ValueError(f"the loss is nan; see {subject.folder.work}/training")

    monkeypatch.setitem(STUDIES, "widths", dataclasses.replace(STUDIES["widths"], figures=diverges))
    for _ in range(2):
        report = run(place, "widths", tmp_path / "w", cells="paper-8x8-*,paper-4x4-*")
        reasons = ("the loss is nan; see training", "a figure is not a finite number")
        assert report["failed"] == dict(zip(report["cells"], reasons, strict=True))
    assert calls == ["paper-8x8-seed0", "paper-4x4-seed0"]
    assert read_cell(tmp_path / "w" / "paper-8x8-seed0.json")["figures"] == {}


def test_limit_dry_run_and_cells_too_narrow_for_the_model(place, tmp_path):
    report = run(place, "widths", tmp_path / "w", dry_run=True)
    assert not (tmp_path / "w").exists()
    assert len(report["cells"]) == 26 - len(report["impossible"])
    assert "divisible by 4: got 2" in report["impossible"]["paper-2x2-seed0"]
    threads = torch.get_num_threads()
    report = run(place, "widths", tmp_path / "w", cells="paper-*", limit=1, threads=2)
    assert report["measured"] == report["finished"] == report["cells"][:1]
    assert torch.get_num_threads() == threads
    assert cell(place, tmp_path / "w", report["cells"][0])["record"]["machine"]["torch_threads"] == 2


BAD = {
    "near match": ({"name": "width"}, "there is no study 'width'; did you mean 'widths'?"),
    "no match": ({"name": "banana"}, "choose one of widths, lora-rank, stages"),
    "pattern": (
        {"cells": "narrow-*"},
        "no cell of the study widths matches narrow-*: the model has 23, such as",
    ),
    "seed twice": ({"seeds": [1, 1]}, "different seeds from 0 on: got [1, 1]"),
    "no seed": ({"seeds": []}, "different seeds from 0 on: got []"),
    "tokens": ({"tokens": -1}, "must be 0 (untrained) or more: got -1"),
    "untrained": ({"name": "lora-rank", "tokens": 0}, "must be positive, as it is about training: got 0"),
    "few steps": ({"name": "stages", "tokens": 500}, "ten optimiser steps: got 500 tokens, a step takes 128"),
    "limit": ({"limit": 0}, "--limit must be at least 1: got 0"),
    "eval tokens": ({"eval_tokens": 0}, "--eval-tokens must be at least 1: got 0"),
    "threads": ({"threads": 0}, "--threads must be at least 1: got 0"),
    "no text": (
        {"data": None, "eval_data": None},
        "needs text to calibrate and train on: got none; pass --data",
    ),
    "preset": ({"overrides": ["conversion.keys=stride"]}, "a study sets conversion.keys itself"),
    "no kvpress": ({"name": "token-eviction"}, "token eviction needs kvpress, whose releases pin"),
    "no interpreter": ({"name": "token-eviction", "python": "/nowhere"}, "/nowhere cannot import kvpress"),
    "silent interpreter": (
        {"name": "token-eviction", "python": shutil.which("false")},
        "/false cannot import kvpress: it ended with exit status 1 and said nothing; token eviction needs",
    ),
    "interpreter without kvpress": (
        {"name": "token-eviction", "python": sys.executable},
        "cannot import kvpress: ModuleNotFoundError: No module named 'kvpress'; token eviction needs",
    ),
    "interpreter for nothing": (
        {"python": "there"},
        "--python is for the study token-eviction only: got --python there with widths; leave it out",
    ),
}


@pytest.mark.parametrize(("options", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_calls_are_refused_before_anything_is_written(place, tmp_path, options, sentence):
    name, options = options.get("name", "widths"), {k: v for k, v in options.items() if k != "name"}
    with pytest.raises(ValueError) as raised:
        run(place, name, tmp_path / "out", **options)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_texts_of_a_study_are_checked(place, tmp_path):
    with pytest.raises(ValueError, match="--eval-data is the training text"):
        run(place, "widths", tmp_path / "out", eval_data=place / "text.txt")
    with pytest.raises(ValueError, match="got --eval-data alone; pass --data FILE"):
        study("widths", out=tmp_path / "out", eval_data=place / "text.txt")
    with pytest.raises(FileNotFoundError):
        run(place, "widths", tmp_path / "out", data=tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="reported, which leaves none; give a longer --eval-data or fewer"):
        run(place, "objective", tmp_path / "out", tokens=STEP, eval_tokens=10**6)
    assert not list((tmp_path / "out").glob("*rate*"))


def test_a_study_that_cannot_begin_takes_back_its_folder_alone(tmp_path):
    folder = StudyFolder(tmp_path / "out", "widths", {"a": 1})
    assert folder.join() and not folder.join()
    with folder.claim("cell"):
        folder.abandon()  # another process is at a cell
    assert not folder.join()
    folder.step_file("cell").write_text("{}")
    folder.abandon()  # there is a result
    assert not folder.join()
    folder.step_file("cell").unlink()
    (tmp_path / "out" / "note").write_text("")
    folder.abandon()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["note"]
