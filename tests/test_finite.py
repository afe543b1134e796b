"""A checkpoint or statistics with NaN or infinity are refused at the door, by every command and preset."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import kvlatent
from kvlatent.model.finite import check_finite_weights, first_not_finite
from kvlatent_cli.main import app
from on_disk import SETTINGS, snapshot, write_checkpoint, write_text

SET = [word for setting in SETTINGS for word in ("--set", setting)]
KEY, MLP = "model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("finite")
    write_checkpoint(folder / "model", tiny_tokenizer)
    write_text(folder / "text.txt")
    done = call("convert", folder / "model", "--out", folder / "latent", "--preset", "paper")
    assert done.exit_code == 0, done.stderr
    return folder


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def broken(folder: Path, to: Path, name: str, value: float) -> Path:
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("preset", ["calibrated", "own-frequency", "paper"])
@pytest.mark.parametrize(
    ("name", "value"), [(KEY, torch.nan), (MLP, torch.inf), ("model.norm.weight", -torch.inf)]
)
def test_every_preset_refuses_it(place, tmp_path, preset, name, value):
    model = broken(place / "model", tmp_path / "broken", name, value)
    done = call("convert", model, "--out", tmp_path / "out", "--preset", preset)
    assert done.exit_code == 2 and not (tmp_path / "out").exists()
    assert (
        f"{model} has NaN or infinity in 1 of the " in done.stderr
        and f"numbers of {name} (float32)" in done.stderr
    )


def test_every_command_refuses_it(place, tmp_path):
    model = broken(place / "model", tmp_path / "broken", MLP, torch.nan)
    latent = broken(place / "latent", tmp_path / "broken-latent", MLP, torch.nan)
    data = ["--data", place / "text.txt"]
    before = snapshot(tmp_path)
    for words in (
        ["compress", model, *data, *SET, "--out", tmp_path / "out"],
        ["calibrate", model, *data, *SET, "--out", tmp_path / "s.safetensors"],
        ["plan", model, *data, *SET],
        ["eval", latent, *data, "--block-size", 32],
        ["eval", place / "latent", *data, "--against", model, "--block-size", 32],
        ["train", latent, "--stage", 1, "--teacher", place / "model", *data, *SET],
        ["train", place / "latent", "--stage", 1, "--teacher", model, *data, *SET, "--out", tmp_path / "out"],
        ["bench", latent],
        ["generate", latent, "--prompt", "x"],
    ):
        done = call(*words)
        assert done.exit_code == 2 and f"numbers of {MLP}" in done.stderr, (words, done.stderr)
        assert snapshot(tmp_path) == before
    done = call(
        "study", "stages", "--model", model, *data, "--set", "data.block_size=32", "--out", tmp_path / "study"
    )
    assert done.exit_code == 2 and f"numbers of {MLP}" in done.stderr


def test_a_model_in_memory_is_refused_too(place):
    model = kvlatent.load_model(place / "model")
    with torch.no_grad():
        model.get_parameter(KEY)[0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"the model has NaN or infinity in 1 of the .* numbers of {KEY}"):
        kvlatent.convert(model, d_qk=8, d_vo=8, preset="own-frequency")


def test_numbers_beyond_the_dtype_asked_for(place, tmp_path):
    model = broken(place / "model", tmp_path / "large", MLP, 1e6)
    kvlatent.load_model(model)
    with pytest.raises(ValueError, match=r"\(float16\).*load it in a dtype that holds its numbers"):
        kvlatent.load_model(model, dtype="float16")


def test_statistics_are_looked_at(place, tmp_path):
    file = tmp_path / "s.safetensors"
    done = call("calibrate", place / "model", "--data", place / "text.txt", *SET, "--out", file)
    assert done.exit_code == 0, done.stderr
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        about = opened.metadata()
    tensors = load_file(file)
    tensors["layers.1.output_gram"].view(-1)[0] = torch.nan
    save_file(tensors, file, metadata=about)
    done = call("convert", place / "model", "--statistics", file, "--out", tmp_path / "out")
    assert done.exit_code == 2 and "layers.1.output_gram holds NaN or infinity" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_counts():
    fine = {"whole": torch.tensor([1]), "empty": torch.zeros(0), "bf16": torch.ones(3, dtype=torch.bfloat16)}
    assert first_not_finite(fine.items()) is None
    assert first_not_finite({**fine, "x": torch.tensor([1.0, torch.nan, torch.inf])}.items()) == "x"
    half = torch.nn.Linear(2, 2).to(torch.bfloat16)
    with torch.no_grad():
        half.bias[1] = torch.inf
    with pytest.raises(
        ValueError, match=r"it has NaN or infinity in 1 of the 2 numbers of bias \(bfloat16\)"
    ):
        check_finite_weights(half, "it")
