"""The command line of the calibrated conversion: tables on stdout, warnings on stderr, one sentence for mistakes."""

import json

import pytest

from kvlatent.selection.statistics import Statistics
from kvlatent_cli.options import read_bytes
from on_disk import SETTINGS, write_checkpoint, write_text
from test_cli import answer, call, mistake

QUICK = [word for key in ("data.block_size=32", "calibration.rows=8") for word in ("--set", key)]
SET = [*QUICK, "--blocks", 6, "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    """model, text.txt, other.txt, and s.safetensors made by the command."""
    folder = tmp_path_factory.mktemp("cli-calibrated")
    write_checkpoint(folder / "model", tiny_tokenizer)
    write_text(folder / "text.txt")
    write_text(folder / "other.txt", 60, seed=5)
    done = calibrate(folder, folder / "s.safetensors")
    assert done.exit_code == 0, done.stderr
    return folder


def calibrate(place, out, *words):
    return call(
        "calibrate",
        place / "model",
        "--data",
        place / "text.txt",
        "--out",
        out,
        "--blocks",
        6,
        *QUICK,
        *words,
    )


def convert_words(place, out, *words):
    align = () if "--preset" in words else ("--align", 2)
    return ("convert", place / "model", "--out", out, *words, *SET, *align)


def test_calibrate_says_what_it_wrote(place, tmp_path):
    done = calibrate(place, tmp_path / "s.safetensors")
    assert done.exit_code == 0 and "192" in done.stdout and "s.safetensors" in done.stdout
    assert Statistics.load(tmp_path / "s.safetensors").tokens == 192
    document = json.loads(calibrate(place, tmp_path / "two", "--seed", 1, "--json").stdout)
    assert document["tokens"] == Statistics.load(tmp_path / "two").tokens == 192
    assert calibrate(place, tmp_path / "two").exit_code == 2
    assert calibrate(place, tmp_path / "two", "--overwrite").exit_code == 0


def test_plan_is_a_table_and_what_the_widths_are_worth(place):
    words = ("plan", place / "model", "--statistics", place / "s.safetensors", "--memory", "1GB")
    done = call(*words, "--kv", 0.5)
    assert done.exit_code == 0, done.stderr
    for text in ("predicted error", "50.0%", "256 of 512 bytes per token", "longest context", "transformers"):
        assert text in done.stdout
    document = answer(*words, "--kv", 0.25)
    assert document["plan"]["share"] == 0.25 and document["serving"]["maximum_context"]
    layers = call(*words, "--per-layer", "--kv", 0.4, *QUICK)
    assert layers.exit_code == 0
    fresh = answer("plan", place / "model", "--data", place / "text.txt", "--kv", 0.25, "--blocks", 6, *QUICK)
    assert fresh["plan"] == document["plan"]


def test_convert_prints_the_layers_and_the_scopes(place, tmp_path):
    done = call(*convert_words(place, tmp_path / "out", "--data", place / "text.txt", "--explain"))
    assert done.exit_code == 0, done.stderr
    assert "chosen after calibration (preset calibrated)" in done.stderr
    assert "cache: at most 256 of 512 bytes per token" in done.stderr
    assert "up to 6 blocks of text, one rotary table per head, 2 steps of alignment a layer" in done.stderr
    report = ("calibrated on 192 tokens", "relative squared error", "matched", "one rotary table per: head")
    for text in (*report, "latent", "saved in"):
        assert text in done.stdout
    plain = call(*convert_words(place, tmp_path / "three", "--data", place / "text.txt"))
    assert "relative squared error" not in plain.stdout and report[-1] in plain.stdout
    document = answer(*convert_words(place, tmp_path / "two", "--data", place / "text.txt"))
    assert document == json.loads((tmp_path / "two" / "run.json").read_text()) | {
        "out": str(tmp_path / "two")
    }


def test_convert_with_statistics_and_another_text(place, tmp_path):
    words = ("--statistics", place / "s.safetensors", "--eval-data", place / "other.txt", "--table", "model")
    document = answer(*convert_words(place, tmp_path / "out", *words))
    assert document["plan"]["choices"]["table"] == "model" and document["calibration"]["seconds"] == 0
    assert document["figures"]["latent"]["ratio"] > 0
    inspected = answer("inspect", tmp_path / "out")
    assert inspected["selection"]["table"] == "model" and inspected["calibration"]["tokens"] == 192
    seen = call(*convert_words(place, tmp_path / "two", *words[:2], "--eval-data", place / "text.txt"))
    assert "the calibration has looked at" in seen.stdout


def test_convert_without_text_warns_on_stderr(place, tmp_path):
    for words in (("--dry-run",), ()):
        done = call(*convert_words(place, tmp_path / "out", *words))
        assert done.exit_code == 0 and "warning: no text to calibrate on" in done.stderr
        assert "warning" not in done.stdout
    quiet = call(*convert_words(place, tmp_path / "two", "--kv", 1))
    assert quiet.exit_code == 0 and "warning" not in quiet.stderr


def test_compress_calibrates_by_default(place, tmp_path):
    words = [word for setting in SETTINGS[1:] for word in ("--set", setting)]
    document = answer(
        "compress", place / "model", "--data", place / "text.txt", "--out", tmp_path / "out", "--stages", "1",
        "--tokens", 64, "--align", 2, *words, *SET,
    )  # fmt: skip
    assert document["plan"]["preset"] == "calibrated" and document["calibration"]["tokens"] == 192


def test_a_dry_run_leaves_the_split_open(place, tmp_path):
    words = convert_words(place, tmp_path / "out", "--data", place / "text.txt", "--dry-run")
    done = call(*words)
    assert "widths: split of 50.0% of 16 + 16 chosen after calibration" in done.stdout
    plan = answer(*words)["plan"]
    assert plan["d_qk"] is None and plan["calibration_blocks"] == 6
    given = answer(*words, "--d-qk", 6, "--d-vo", 10)["plan"]
    assert (given["d_qk"], given["d_vo"]) == (6, 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--data", "text.txt", "--statistics", "s.safetensors"],
            "got --statistics and --data; leave one out",
        ),
        (["--statistics", "none.safetensors"], "no statistics at"),
        (["--statistics", "text.txt"], "is damaged"),
        (["--statistics", "s.safetensors", "--preset", "paper"], "looks at no statistics"),
        (["--data", "text.txt", "--eval-data", "text.txt"], "--eval-data is the text to calibrate on"),
        (["--data", "text.txt", "--eval-data", "other.txt", "--preset", "paper"], "needs one text at most"),
        (["--data", "text.txt", "--eval-data", "none.txt"], "none.txt"),
        (["--data", "text.txt", "--engine", "vlm"], "unknown engine 'vlm'; did you mean vllm"),
        (["--data", "text.txt", "--engine", "vllm"], "smallest width of engine vllm is 32: got head_dim=16"),
        (["--engine", "mlx", "--d-qk", "12", "--d-vo", "12"], "multiples of 8: got d_qk=12; try 8"),
        (["--data", "text.txt", "--table", "all"], "unknown table 'all'"),
        (["--data", "text.txt", "--kv", "0.2"], "smallest widths are d_qk=4 and d_vo=4; try 0.25"),
        (["--per-layer"], "--per-layer needs statistics"),
        (["--per-layer", "--d-qk", "8"], "--per-layer lets a plan choose the widths"),
        (["--data", "text.txt", "--set", "data.held_out=0"], "nothing is held out"),
        (["--data", "text.txt", "--set", "calibration.foo=1"], "known keys there are blocks, rows"),
    ],
)
def test_mistakes_in_convert(place, tmp_path, words, sentence):
    files = [place / word if "." in word and "=" not in word and word[0] != "0" else word for word in words]
    at_work = sentence == "is damaged"  # the model is loaded and the plan said before the file is read
    assert sentence in mistake(*convert_words(place, tmp_path / "out", *files), at_work=at_work)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [("--blocks", 0), ("--align", -1)])
def test_mistakes_in_counts(place, tmp_path, option):
    words = ("convert", place / "model", "--out", tmp_path / "out", "--data", place / "text.txt", *QUICK)
    assert f"got {option[1]}" in mistake(*words, *option)


def test_mistakes_in_plan(place, tmp_path):
    words = ("plan", place / "model")
    assert "got neither" in mistake(*words)
    saved = (*words, "--statistics", place / "s.safetensors")
    assert "got both" in mistake(*saved, "--data", place / "text.txt")
    assert "got '24'; try 24GB" in mistake(*saved, "--memory", 24)
    assert "the memory must hold the weights" in mistake(*saved, "--memory", "0.01MB")
    assert "got 'a.gif'" in mistake(*saved, "--figure", tmp_path / "a.gif")
    assert "the model is latent already" in mistake("plan", latent(place, tmp_path), *saved[2:])


def latent(place, tmp_path):
    assert call("convert", place / "model", "--out", tmp_path / "latent").exit_code == 0
    return tmp_path / "latent"


def test_too_little_text_names_both_numbers(place, tmp_path):
    words = ("convert", place / "model", "--data", place / "text.txt", "--out", tmp_path / "out", *QUICK)
    sentence = mistake(*words, "--blocks", 1, at_work=True)
    assert "64 tokens" in sentence and "got 32" in sentence
    assert list(tmp_path.iterdir()) == []


def test_memory_has_a_unit():
    assert [read_bytes("memory", text) for text in ("24GB", "1.5 gib", "80mb", "1TB")] == [
        24e9,
        1.5 * 2**30,
        80e6,
        1e12,
    ]
    for text in ("24", "GB", "24XB", "-1GB", "0GB", "1.2.3GB", "nanGB", ""):
        with pytest.raises(ValueError, match="--memory is a number of MB, GB or TB.*try 24GB"):
            read_bytes("memory", text)


def test_a_strategy_that_is_impossible_says_why(place, tmp_path):
    words = ("--statistics", place / "s.safetensors", "--d-qk", 6, "--d-vo", 10, "--explain")
    done = call(*convert_words(place, tmp_path / "out", *words))
    assert "paper is impossible: " in done.stdout and "got d_qk=6, head_dim=16" in done.stdout
