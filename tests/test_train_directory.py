"""`train` from checkpoint directory to checkpoint directory: what it writes, continues and refuses."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kvlatent.conversion import convert
from kvlatent.hub import save
from kvlatent.recipe import Recipe
from kvlatent.training.stages import train
from training_setup import hashes

SENTENCE = "Once upon a time there was a small cat who lived near the river and liked the sun. "


@pytest.fixture
def directories(tmp_path, tiny_llama, tiny_tokenizer):
    """An original and its latent model on disk, in bfloat16, and a text of many documents."""
    tiny_llama.config.dtype = torch.bfloat16
    tiny_llama.to(torch.bfloat16)
    save(tiny_llama, tmp_path / "original", tokenizer=tiny_tokenizer)
    save(convert(tiny_llama, d_qk=8, d_vo=8), tmp_path / "latent", tokenizer=tiny_tokenizer)
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(f"{n} {SENTENCE * 3}" for n in range(60)))
    return tmp_path


SMALL = [
    "data.block_size=32", "lora.rank=2",
    *(f"stage{n}.{item}" for n in (1, 2) for item in ("tokens=1024", "batch_size=4", "save_steps=3")),
]  # fmt: skip


def train_directory(folder, out="out", stage=1, overrides=(), teacher="original", **options):
    return train(
        folder / "latent", stage=stage, data=folder / "text.txt", out=folder / out, device="cpu",
        teacher=None if teacher is None else folder / teacher, overrides=[*SMALL, *overrides], **options,
    )  # fmt: skip


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
    assert Recipe.load(out / "recipe.yaml") == Recipe.load(None, SMALL)
    assert json.loads((out / "run.json").read_text())["training"] == {f"stage{stage}": summary}
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
    train_directory(directories, progress=lambda stage, step, *rest: seen.append(step))
    assert seen == [4, 5, 6, 7, 8]
    train_directory(directories, out="whole")
    weights = [load_file(directories / name / "model.safetensors") for name in ("out", "whole")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
    assert not list(directories.glob("*.partial"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stage": 3}, "got stage=3"),
        ({"teacher": None}, "pass it as the teacher"),
        ({"overrides": ["data.block_size=999999"]}, "999"),
        ({"overrides": ["stage1.learning_rate=1e30", "stage1.save_steps=99"]}, "stage 1 stopped at step"),
    ],
)
def test_mistakes_leave_nothing_behind(directories, change, sentence):
    before = {path.name for path in directories.iterdir()}
    with pytest.raises(ValueError, match=sentence) as caught:
        train_directory(directories, **change)
    assert "\n" not in str(caught.value)
    assert {path.name for path in directories.iterdir()} == before
