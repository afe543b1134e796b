"""`train` from checkpoint directory to checkpoint directory: what it writes, continues and refuses."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from kvlatent.checkpoints.save import save
from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.fingerprints import identity
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.work_directory import WorkDirectory
from kvlatent.workflows.train_checkpoint import train
from kvlatent_cli.main import app
from training_setup import hashes

SENTENCE = "Once upon a time there was a small cat who lived near the river and liked the sun. "


@pytest.fixture
def directories(tmp_path, tiny_llama, tiny_tokenizer):
    """An original and its latent model on disk, in bfloat16, and a text of many documents."""
    tiny_llama.config.dtype = torch.bfloat16
    tiny_llama.to(torch.bfloat16)
    save(tiny_llama, tmp_path / "original", tokenizer=tiny_tokenizer)
    save(convert(tiny_llama, d_qk=8, d_vo=8, preset="paper"), tmp_path / "latent", tokenizer=tiny_tokenizer)
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(f"{n} {SENTENCE * 3}" for n in range(60)))
    return tmp_path


SMALL = [
    "data.block_size=32", "lora.rank=2",
    *(f"stage{n}.{item}" for n in (1, 2) for item in ("tokens=1024", "batch_size=4", "save_steps=3")),
]  # fmt: skip


def train_directory(folder, out="out", stage=1, overrides=(), teacher="original", source="latent", **options):
    return train(
        folder / source, stage=stage, data=folder / "text.txt", out=folder / out, device="cpu",
        teacher=None if teacher is None else folder / teacher, overrides=[*SMALL, *overrides], **options,
    )  # fmt: skip


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("stage", [1, 2])
def test_train_from_directory_to_directory(directories, stage):
    summary = train_directory(directories, stage=stage)
    assert (summary["steps"], summary["tokens"]) == (8, 1024)
    out = directories / "out"
    assert {path.name for path in directories.iterdir()} == {"original", "latent", "text.txt", "out"}
    model, latent = (AutoModelForCausalLM.from_pretrained(directories / name) for name in ("out", "latent"))
    assert set(model.state_dict()) == set(latent.state_dict())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    changed = {n for n, digested in hashes(model).items() if digested != hashes(latent)[n]}
    assert changed
    assert all("proj" in name for name in changed)
    assert Recipe.load(out / "recipe.yaml") == Recipe.load(None, [*SMALL, "dtype=float32"])
    record = record_of(out)
    assert record["training"] == {f"stage{stage}": summary}
    assert (record["figures"], record["earlier"]) == ({}, [])
    assert record["sha256"] == {
        "model": identity(directories / "latent"),
        "teacher": identity(directories / "original"),
        "data": identity(directories / "text.txt"),
    }
    start = f"kvlatent train latent --data text.txt --teacher original --out out --stage {stage} --set"
    assert record["command"].startswith(start)
    card = (out / "README.md").read_text()
    assert "Its quality has not been measured;" in card and record["command"] in card
    assert "width 8 and values at 8 a head, where the original has 16 for both: 50.0%" in card
    assert f"with preset `paper`; stages trained: {'I' * stage}." in card
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    with pytest.raises(FileExistsError, match="overwrite"):
        train_directory(directories, stage=stage)


def test_second_call_goes_on_where_the_first_was_stopped(directories):
    def stop(stage, step, *rest):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_directory(directories, progress=stop)
    assert not (directories / "out").exists()
    with pytest.raises(ValueError, match=r"recipe.seed \(0, now 1\)"):
        train_directory(directories, overrides=["seed=1"])
    seen = []
    train_directory(directories, progress=lambda *told: seen.append(told))
    assert [told[:3] for told in seen] == [(1, step, 8) for step in range(4, 9)]
    assert all(speed > 0 and 0 < loss < 100 for *_, speed, loss in seen)
    train_directory(directories, out="whole")
    weights = [load_file(directories / name / "model.safetensors") for name in ("out", "whole")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
    assert not list(directories.glob("*.partial"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stage": 3}, "got stage=3"),
        ({"teacher": None}, "pass it as the teacher"),
        ({"overrides": ["data.block_size=129"]}, "block_size=129, max_position_embeddings=128; pass --set"),
        (
            {"teacher": "latent"},
            "the teacher must be the original model: got a latent one of type kv_latent_llama",
        ),
        ({"source": "original"}, "original is not a latent checkpoint; make one with kvlatent convert first"),
        ({"source": "original", "out": "original"}, "is not a latent checkpoint"),
        ({"source": "hub/name", "out": "hub/name"}, "is no local directory.*give --out DIR"),
        ({"overrides": ["stage1.learning_rate=1e30", "stage1.save_steps=99"]}, "stage 1 stopped at step"),
    ],
)
def test_mistakes_leave_nothing_behind(directories, change, sentence):
    before = {path.name for path in directories.iterdir()}
    weights = (directories / "original" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=sentence) as caught:
        train_directory(directories, **change)
    assert "\n" not in str(caught.value)
    assert {path.name for path in directories.iterdir()} == before
    assert (directories / "original" / "model.safetensors").read_bytes() == weights


def stop_after(last):
    def stop(stage, step, *rest):
        if step == last:
            raise KeyboardInterrupt

    return stop


def test_interrupted_before_any_checkpoint_leaves_nothing_behind(directories):
    before = {path.name for path in directories.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        train_directory(directories, progress=stop_after(2))
    assert {path.name for path in directories.iterdir()} == before


@pytest.mark.parametrize("out", ["latent", "out"])
def test_killed_between_save_and_cleanup_is_not_trained_twice(directories, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(WorkDirectory, "remove", lambda self: None)
        summary = train_directory(directories, out=out)
    partial = directories / f"{out}.partial"
    assert partial.is_dir()
    weights = (directories / out / "model.safetensors").read_bytes()
    seen = []
    assert train_directory(directories, out=out, progress=lambda *told: seen.append(told)) == summary
    assert not seen
    assert (directories / out / "model.safetensors").read_bytes() == weights
    assert not partial.exists()
    with pytest.raises((KeyboardInterrupt, FileExistsError)):  # a new run, or the output is in the way
        train_directory(directories, out=out, progress=stop_after(1))


def test_leftover_of_a_finished_stage_does_not_stop_the_next(directories, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(WorkDirectory, "remove", lambda self: None)
        train_directory(directories, out="latent")
    assert train_directory(directories, out="latent", stage=2)["stage"] == 2
    assert not list(directories.glob("*.partial"))


def test_in_place_keeps_an_unfinished_run_of_other_arguments(directories):
    with pytest.raises(KeyboardInterrupt):
        train_directory(directories, out="latent", progress=stop_after(5))
    kept = directories / "latent.partial" / "stage1" / "checkpoint-3" / "model.safetensors"
    assert kept.is_file()
    with pytest.raises(ValueError, match="stage .1, now 2.*--overwrite to start anew"):
        train_directory(directories, out="latent", stage=2)
    assert kept.is_file()
    told = []
    train_directory(directories, out="latent", stage=2, overwrite=True, announce=told.append)
    assert (told[0]["tokens"], told[0]["device"]) == ({"stage2": 1024}, "cpu")
    assert told[0]["estimated_seconds"] > 0
    assert not kept.exists()


def test_stages_in_place_carry_their_history(directories):
    first = train_directory(directories, out="latent")
    before = record_of(directories / "latent")
    edited = {**before, "plan": {**before["plan"], "preset": "own-frequency"}, "figures": {"latent": {}}}
    (directories / "latent" / "run.json").write_text(json.dumps(edited))
    second = train_directory(directories, out="latent", stage=2)
    record = record_of(directories / "latent")
    assert record["training"] == {"stage1": first, "stage2": second}
    assert record["figures"] == {}
    assert record["earlier"] == [
        {name: edited[name] for name in ("command", "sha256", "training", "figures")}
    ]
    assert record["fingerprint"] != before["fingerprint"]
    assert record["plan"]["tokens"] == {"stage1": 1024, "stage2": 1024}
    lines = (directories / "latent" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["stage"], row["step"]) for row in rows] == [(s, n) for s in (1, 2) for n in range(1, 9)]
    assert "own-frequency`; stages trained: I, II." in (directories / "latent" / "README.md").read_text()
    (directories / "latent" / "run.json").write_text("[1]")
    with pytest.raises(ValueError, match="is not the record of a run"):
        train_directory(directories, out="latent", stage=2)


def test_selection_that_is_no_preset_is_called_custom(directories):
    latent = convert(
        AutoModelForCausalLM.from_pretrained(directories / "original"),
        d_qk=8,
        d_vo=8,
        keys="matched",
        preset="paper",
    )
    save(latent, directories / "matched", tokenizer=AutoTokenizer.from_pretrained(directories / "original"))
    train_directory(directories, source="matched")
    assert record_of(directories / "out")["plan"]["preset"] == "custom"


def test_command_says_its_plan_and_keeps_the_unfinished_run_in_place(directories):
    def call(stage, *more):
        words = ["train", "latent", "--stage", stage, "--data", "text.txt", "--teacher", "original"]
        words += ["--device", "cpu", "--tokens", 512, *more, *(word for s in SMALL for word in ("--set", s))]
        return CliRunner().invoke(app, [str(word) for word in words])

    with contextlib.chdir(directories):
        with pytest.raises(KeyboardInterrupt):
            train_directory(directories, out="latent", progress=stop_after(5))
        refused = call(2)
        assert refused.exit_code == 2 and "--overwrite to start anew" in refused.stderr
        assert "tokens on cpu" not in refused.stderr
        done = call(2, "--overwrite")
    assert done.exit_code == 0, done.stderr
    assert "stage II: 512 tokens on cpu in float32, about " in done.stderr
    assert "(an estimate from the model's size and this machine's speed)" in done.stderr
    command = record_of(directories / "latent")["command"]
    assert command.startswith("kvlatent train latent --data text.txt --teacher original --stage 2 --set ")
    assert command.endswith("--tokens 512 --device cpu")
