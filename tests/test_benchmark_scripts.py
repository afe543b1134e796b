"""The scripts that measure costs and quantised caches, end to end on a tiny checkpoint."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.save import save
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.conversion.convert_model import convert
from kvlatent.engines.matrix_rounding import MatrixRounding
from kvlatent.selection.choices import Choices
from on_disk import write_checkpoint, write_text

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer) -> Path:
    """A tiny checkpoint, its latent model and a text."""
    folder = tmp_path_factory.mktemp("scripts")
    model = load_model(write_checkpoint(folder / "model", tiny_tokenizer), dtype="float32")
    save(convert(model, d_qk=8, d_vo=8, preset="own-frequency"), folder / "latent", tokenizer=tiny_tokenizer)
    write_text(folder / "text.txt")
    return folder


@pytest.fixture
def call(place, monkeypatch, capsys):
    """Run a script in this process; its standard output."""

    def run(script, *words):
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        importlib.import_module(script).main()
        return capsys.readouterr().out

    return run


def test_seconds_of_calibration_and_conversion(place, call):
    words = ("--model", place / "model", "--data", place / "text.txt", "--block-size", 32, "--blocks", 64)
    found = json.loads(call("costs", "seconds", *words, "--align", 1))
    assert found["tokens"] == 64 * 32
    assert found["total_seconds"] == pytest.approx(
        found["calibration_seconds"] + found["conversion_seconds"], abs=0.01
    )
    assert found["calibration_over_forward_at_2048"] > 0
    assert found["sha256"]["data"]
    assert str(place) not in json.dumps(found)


def test_a_step_of_stage_one_beside_its_reference(place, call):
    words = ("--model", place / "model", "--data", place / "text.txt", "--block-size", 32, "--rounds", 3)
    found = json.loads(call("costs", "stage1", *words))
    low, middle, high = found["quartiles_seconds"]["stage I step"]
    assert 0 < low <= middle <= high
    assert found["ratio"] == pytest.approx(middle / found["quartiles_seconds"]["reference"][1], rel=1e-3)
    held = found["bytes"]
    assert 0 < held["one at a time"] < 0.6 * held["with all graphs"]  # of two layers
    assert held["one at a time"] < 1.05 * held["one layer's graph"] < held["states and one graph"]


def test_converting_copies_only_what_it_changes():
    """In a process of its own: figures must not begin at the size of this one, which is larger than the model."""
    command = [sys.executable, FOLDER / "costs.py", "memory"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert result["model_bytes"] >= 1e9
    assert 1 < result["ratio"] == round(result["peak_bytes"] / result["model_bytes"], 4) < 1.3


def test_quantised_caches_stand_beside_narrow_ones(place, call, tmp_path):
    words = ("--model", place / "latent", "--against", place / "model", "--data", place / "text.txt")
    words += ("--out", tmp_path / "rival.json", "--work", tmp_path / "work", "--caches", "dynamic")
    shown = call("rival", *words, "--block-size", 32, "--blocks", 6)
    assert "original  dynamic          1.0000 ± 0.0000  100.0 % of the bytes" in shown
    found = json.loads((tmp_path / "rival.json").read_text())
    assert found["blocks"] == [6, 32]
    original, latent = found["rows"]
    assert (original["ratio"], latent["share"]) == (1, 0.5)
    assert latent["ratio"] != 1
    assert found["record"]["command"].startswith("python benchmarks/rival.py --model latent --against model")


@pytest.mark.slow
def test_stage_two_beside_a_plain_trainer(place, call, tmp_path):
    """Both have the same losses, so both do the same work; each run is a process of its own."""
    words = ("--model", place / "model", "--data", place / "text.txt", "--block-size", 32, "--batch-size", 2)
    out = tmp_path / "speed.json"
    found = json.loads(
        call("training_speed", *words, "--rounds", 1, "--steps", 2, "--device", "cpu", "--out", out)
    )
    ours, plain = found["stage II"], found["plain Trainer"]
    assert ours["first_and_last_loss"] == pytest.approx(plain["first_and_last_loss"], rel=1e-4)
    assert ours["first_and_last_loss"][0] != ours["first_and_last_loss"][1]
    assert [len(run) for run in ours["seconds"]] == [2] and found["tokens_a_step"] == 64
    assert found["ratio"] == pytest.approx(ours["tokens_per_second"] / plain["tokens_per_second"], abs=1e-3)
    assert min(ours["peak_bytes"], plain["peak_bytes"]) > 0
    assert json.loads(out.read_text()) == {"float32": found}
    assert str(place) not in json.dumps(found)


@pytest.mark.parametrize("what", ["tempering", "metric", "widths"])
def test_what_decides_the_closed_form(place, call, what):
    words = ("--model", place / "model", "--data", place / "text.txt", "--block-size", 32, "--blocks", 34)
    found = json.loads(call("closed_form", what, *words, "--held-out", 4, "--shares", 0.5))
    figures = [each for each in found["figures"].values() if isinstance(each, dict) and "kl" in each]
    assert len(figures) == {"tempering": 4, "metric": 2, "widths": 4}[what]
    assert all(each["kl"] >= 0 and each["standard_error"] >= 0 for each in figures)
    assert len({each["kl"] for each in figures}) > 1
    assert str(place) not in json.dumps(found)


def test_training_from_a_store_beside_the_original(place, call, tmp_path):
    words = ("--model", place / "model", "--data", place / "text.txt", "--eval-data", place / "text.txt")
    small = ("--block-size", 32, "--set", "stage2.batch_size=4")
    out = tmp_path / "found.json"
    call(
        "stored_teacher",
        *words,
        *small,
        "--tokens",
        512,
        "--eval-tokens",
        512,
        "--top-k",
        "2,64",
        "--out",
        out,
    )
    found = json.loads(out.read_text())
    runs = found["runs"]
    assert list(runs) == ["original", "top-2", "top-64"]
    assert runs["original"]["ratio"] == 1
    assert runs["top-2"]["perplexity"] != runs["top-64"]["perplexity"]
    assert [runs[name]["store"]["bytes_per_token"] for name in ("top-2", "top-64")] == [12, 260]
    assert str(place) not in out.read_text()


def test_a_coarser_file_beside_the_same_of_the_original(place, tmp_path, monkeypatch, call):
    """The engine is one that rounds as ours does, and then one that computes something else."""
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("gguf_types")
    one_table = tmp_path / "latent"
    model = load_model(place / "model", dtype="float32")
    save(convert(model, d_qk=8, d_vo=8, choices=Choices(keys="weights", table="model")), one_table)
    load_tokenizer(place / "model", model.config).save_pretrained(one_table)
    asked, off = [], 0.0

    def engine(args, path, kv_dtype, ids, vocabulary):
        asked.append((Path(path).name, kv_dtype, ids.shape))
        given = script.loaded(str(place / "model" if len(asked) % 2 else one_table))
        with MatrixRounding("q8_0", inputs=True).applied(given):
            found = script.logits_of(given, ids)
        return {"logits": (found + off * found.std()).numpy()}

    monkeypatch.setattr(script, "run_engine", engine)
    words = ["gguf_types", "--original", place / "model", "--latent", one_table, "--data", place / "text.txt"]
    words += ["--out", tmp_path / "out", "--work", tmp_path / "work", "--dtypes", "q8_0", "--tokens", 32]
    call(*words)
    found = json.loads((tmp_path / "out" / "latent.json").read_text())
    assert asked == [("model-q8_0.gguf", "f32", (1, 32))] * 2
    for role in ("original", "latent"):
        assert found["rows"][0][role]["relative"] == pytest.approx(found["rows"][0][role]["rounding"])
    assert (found["d_qk"], found["d_vo"], found["head_dim"]) == (8, 8, 16)
    assert str(tmp_path) not in json.dumps(found)
    off = 1.0
    with pytest.raises(SystemExit, match=r"more than 2.0 times what rounding costs: original in q8_0 by 1, .* by rounding; latent in"):  # fmt: skip
        call(*words)


def test_answers_are_judged_by_words_and_caches_by_answers(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("served_chat")
    assert script.is_right("It is PARIS.", ("Paris",)) and script.is_right("7 days", ("seven", "7"))
    assert not script.is_right("Parisian, 17", ("Paris", "7")) and not script.is_right("", ("Paris",))
    servers = [
        {"model": name, "right": right, "cache_bytes_per_token": size}
        for name, right, size in (("original", 10, 100), ("most", 8, 75), ("half", 7, 50))
    ]
    found = script.verdict(servers)
    assert (found["right_needed"], found["answering"], found["smallest"]) == (8.0, ["original", "most"], "most")  # fmt: skip


def test_the_committed_transcript_is_what_its_answers_give(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("served_chat")
    file = FOLDER / "results" / "served_chat.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    assert file.with_suffix(".md").read_text(encoding="utf-8") == script.render(document)
    words = dict(script.QUESTIONS)
    for server in document["servers"]:
        for one in server["answers"]:
            assert one["is_right"] == script.is_right(one["answer"], words[one["question"]])
    assert {key: document[key] for key in ("right_needed", "answering", "smallest")} == script.verdict(document["servers"])  # fmt: skip
