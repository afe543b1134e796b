"""Stage I that holds one layer in memory: the weights of the stage in memory, what survives a kill, what is refused."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.save import save
from kvlatent.conversion.convert_model import convert
from kvlatent.training.streamed_stage import StreamedStage
from kvlatent.workflows import streamed_training
from kvlatent.workflows.foreseen_training import foresee_training
from kvlatent.workflows.train_checkpoint import plan_training, train
from kvlatent_cli.main import app
from on_disk import snapshot, write_text
from tiny import tiny_model

SMALL = [
    "data.block_size=32",
    "lora.rank=2",
    "stage1.tokens=512",
    "stage1.batch_size=2",
    "stage1.gradient_accumulation=2",
    "stage1.learning_rate=0.003",
    "stage1.warmup_ratio=0",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    """original and latent, of three layers in shards, and text.txt."""
    folder = tmp_path_factory.mktemp("streamed")
    write_models(folder, tiny_tokenizer, "llama")
    write_text(folder / "text.txt", documents=40)
    return folder


def write_models(folder, tokenizer, family, dtype=torch.float32):
    model = tiny_model(family, vocab_size=320).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder / "original", max_shard_size="50KB")
    tokenizer.save_pretrained(folder / "original")
    model = load_model(folder / "original")
    latent = convert(model, d_qk=16, d_vo=[8, 16, 8], preset="own-frequency")
    save(latent, folder / "latent", tokenizer=tokenizer, max_shard_size="40KB")
    (folder / "latent" / "LICENSE").write_text("ours")


def call(folder, out, *overrides, source=None, **options):
    """`train` of stage 1 on the text of `folder`, of the models in `source`."""
    source = source or folder
    given = {"stage": 1, "teacher": source / "original", "device": "cpu", "data": folder / "text.txt"}
    return train(source / "latent", out=out, overrides=[*SMALL, *overrides], **(given | options))


def tensors_of(folder):
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def both(place, folder, *overrides, source=None, **options):
    """Summaries and tensors of the stage in memory and streamed."""
    found = []
    for name, stream in (("whole", False), ("streamed", True)):
        summary = call(place, folder / name, *overrides, source=source, stream=stream, **options)
        found.append((summary, tensors_of(folder / name)))
    return found


def difference(one, other):
    """Largest, relative to the tensor's largest entry."""
    assert {n: (t.dtype, t.shape) for n, t in one.items()} == {
        n: (t.dtype, t.shape) for n, t in other.items()
    }
    return max(float((one[n] - other[n]).abs().max() / one[n].abs().max()) for n in one)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["llama-tied", "phi3-window"])
def test_families_are_those_in_memory(name, place, tmp_path, tiny_tokenizer):
    write_models(tmp_path, tiny_tokenizer, name)
    (whole, tensors), (streamed, again) = both(place, tmp_path, source=tmp_path)
    # Eight steps of 0.003: another rounding of a product can turn the sign of an entry's tiny gradient.
    assert difference(tensors, again) < 1e-4
    assert difference(tensors, tensors_of(tmp_path / "latent")) > 1e-3
    assert {key: whole[key] for key in ("steps", "tokens")} == {"steps": 4, "tokens": 512}
    for key in ("steps", "tokens", "first_loss", "last_loss", "first_layer_losses", "layer_losses"):
        assert whole[key] == pytest.approx(streamed[key], rel=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        ("stage1.own_stream=0.5",),
        ("stage1.max_grad_norm=1e-4", "stage1.log_steps=3"),
        ("stage1.tokens=2048", "lora.rank=0", "stage1.max_grad_norm=0"),  # twice through the text
    ],
    ids=lambda overrides: overrides[0].partition(".")[2],
)
def test_settings_are_those_in_memory(overrides, place, tmp_path):
    (whole, tensors), (streamed, again) = both(place, tmp_path, *overrides)
    assert difference(tensors, again) < 1e-4
    assert whole["layer_losses"] == pytest.approx(streamed["layer_losses"], rel=1e-3)
    journals = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "streamed")
    ]
    for one, other in zip(*journals, strict=True):
        assert one.keys() == other.keys()
        for key in ("stage", "step", "tokens", "loss", "learning_rate", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-3), key


def test_the_own_stream_changes_the_result(place, tmp_path):
    ends = []
    for share in (0, 0.5):
        call(place, tmp_path / str(share), f"stage1.own_stream={share}", stream=True)
        ends.append(tensors_of(tmp_path / str(share)))
    layers = {n.split(".")[2] for n in ends[0] if not torch.equal(ends[0][n], ends[1][n])}
    assert layers == {"1", "2"}  # the lowest has no layer below it


def test_a_bfloat16_checkpoint_is_trained_and_written_as_in_memory(place, tmp_path, tiny_tokenizer):
    write_models(tmp_path, tiny_tokenizer, "llama", torch.bfloat16)
    (_, tensors), (_, again) = both(place, tmp_path, "dtype=float32", source=tmp_path)
    assert {tensor.dtype for tensor in again.values()} == {torch.bfloat16}
    assert difference(tensors, again) < 0.01  # a step of bfloat16


def test_the_output_is_a_checkpoint_that_says_how_it_was_made(place, tmp_path):
    before = snapshot(place)
    summary = call(place, tmp_path / "out", stream=True)
    out = tmp_path / "out"
    assert AutoModelForCausalLM.from_pretrained(out)(torch.arange(5)[None]).logits.isfinite().all()
    record = json.loads((out / "run.json").read_text())
    assert record["training"] == {"stage1": summary} and "--stream" in record["command"]
    assert (out / "LICENSE").read_text() == "ours" and "stages trained: I." in (out / "README.md").read_text()
    assert "rank: 2" in (out / "recipe.yaml").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert snapshot(place) == before


def test_in_place_and_from_the_command_line(place, tmp_path):
    for name in ("original", "latent"):
        shutil.copytree(place / name, tmp_path / name)
    words = ["train", tmp_path / "latent", "--stage", 1, "--data", place / "text.txt", "--stream"]
    words += ["--teacher", tmp_path / "original", "--device", "cpu"]
    words += [word for setting in SMALL for word in ("--set", setting)]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.stderr
    assert "streamed, layer by layer, as --stream says so" in done.stderr
    assert "predicted: 0.6 GB of memory" in done.stderr
    call(place, tmp_path / "out", stream=True)
    assert difference(tensors_of(tmp_path / "latent"), tensors_of(tmp_path / "out")) == 0


def test_it_streams_by_itself_where_the_models_do_not_fit(place, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(streamed_training, "memory_to_train", lambda *given: 1e15)
    call(place, tmp_path / "out", announce=told.append)
    assert "streamed, layer by layer, as it takes about 1000000.0 GB at once" in told[0]["notes"][0]


def test_a_run_that_was_stopped_goes_on_with_the_layer_it_was_at(place, tmp_path, monkeypatch):
    own = "stage1.own_stream=0.5"
    call(place, tmp_path / "undisturbed", own, stream=True)
    trained, seen = StreamedStage._train, []

    def stop(self, index):
        rows = trained(self, index)  # its shard is written, its end not noted
        if index == 1:
            raise KeyboardInterrupt
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(StreamedStage, "_train", stop)
        with pytest.raises(KeyboardInterrupt):
            call(place, tmp_path / "out", own, stream=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"recipe.seed \(0, now 1\)"):
        call(place, tmp_path / "out", own, "seed=1", stream=True)
    monkeypatch.setattr(
        StreamedStage, "_train", lambda self, index: (seen.append(index), trained(self, index))[1]
    )
    call(place, tmp_path / "out", own, stream=True)
    assert seen == [1, 2]
    one, other = tensors_of(tmp_path / "undisturbed"), tensors_of(tmp_path / "out")
    assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()
    assert not (tmp_path / "out.partial").exists()


# What is refused, each before anything is written or with nothing left.


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stage": 2}, "--stream trains stage 1, whose layers are problems of their own: got --stage 2"),
        ({"teacher": None}, "pass it as the teacher"),
        ({"overrides": "stage1.learning_rate=1e30"}, "layer 0 of 3: stage 1 stopped at step"),
        ({"memory": 1000}, "holds one layer while it learns, about .* MB: 0.0 MB of memory are free; free some"),
        ({"disk": 1000}, "the result and the states between its layers take .* GB at the most"),
    ],
)  # fmt: skip
def test_mistakes_leave_nothing_behind(change, sentence, place, tmp_path, monkeypatch):
    before = snapshot(place)
    if "memory" in change:
        monkeypatch.setattr(streamed_training, "free_memory", lambda device: change["memory"])
    if "disk" in change:
        usage = type("Usage", (), {"free": change["disk"]})
        monkeypatch.setattr("kvlatent.workflows.streamed_plan.shutil.disk_usage", lambda path: usage)
    options = {name: value for name, value in change.items() if name in ("stage", "teacher")}
    with pytest.raises(ValueError, match=sentence) as caught:
        call(place, tmp_path / "out", *filter(None, [change.get("overrides")]), stream=True, **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [] and snapshot(place) == before


@pytest.mark.parametrize("which", ["original", "latent"])
def test_a_damaged_checkpoint_is_named(which, place, tmp_path):
    for name in ("original", "latent"):
        shutil.copytree(place / name, tmp_path / name)
    shard = sorted((tmp_path / which).glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 8)
    with pytest.raises(ValueError, match="truncated or damaged"):
        call(place, tmp_path / "out", source=tmp_path, stream=True)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_hub_id_cannot_be_streamed(place, tmp_path, monkeypatch):
    with pytest.raises(
        (ValueError, FileNotFoundError), match="--stream reads the safetensors|neither a local"
    ):
        call(place, tmp_path / "out", teacher="hub/name", stream=True)


def test_a_family_of_other_layers_is_refused(place, tmp_path, tiny_tokenizer):
    write_models(tmp_path, tiny_tokenizer, "olmo2")
    with pytest.raises(ValueError, match="--stream trains decoders whose layers are those of a Llama"):
        call(place, tmp_path / "out", source=tmp_path, stream=True)
    assert not (tmp_path / "out.partial").exists()


def test_several_processes_do_not_stream(place, tmp_path):
    plan = plan_training(place / "latent", tmp_path / "out", stage=1, overrides=SMALL, device="cpu")
    with pytest.raises(ValueError, match="runs in one process: got 2, and it streams, as --stream says so"):
        streamed_training.why_training_streams(
            place / "latent", place / "original", plan, asked=True, processes=2
        )


def test_a_dry_run_predicts_whole_models_alone(place, tmp_path):
    with pytest.raises(
        ValueError, match="--dry-run predicts a stage that holds the whole model: got --stream"
    ):
        foresee_training(place / "latent", tmp_path / "out", stage=1, device="cpu", stream=True)
