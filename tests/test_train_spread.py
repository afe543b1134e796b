"""`kvlatent train` as people call it: by torchrun over two processes, ended by SIGTERM, on a data set of the hub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kvlatent.checkpoints.save import save
from kvlatent.conversion.convert_model import convert
from kvlatent.text import documents
from kvlatent.training.resume import read_journal
from kvlatent.workflows.train_checkpoint import train
from training_setup import hashes

SENTENCE = "Once upon a time there was a small cat who lived near the river and liked the sun. "
SMALL = [
    "data.block_size=32",
    "lora.rank=2",
    "stage2.tokens=2048",
    "stage2.batch_size=4",
    "stage2.save_steps=5",
]


@pytest.fixture
def place(tmp_path, tiny_llama, tiny_tokenizer):
    """An original, its latent model, a text, and the same text as a folder that stands for a hub data set."""
    save(tiny_llama, tmp_path / "original", tokenizer=tiny_tokenizer)
    save(convert(tiny_llama, d_qk=8, d_vo=8, preset="paper"), tmp_path / "latent", tokenizer=tiny_tokenizer)
    texts = [f"{n} {SENTENCE * 3}" for n in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


def words(place, out, *more):
    given = [
        "train",
        "latent",
        "--stage",
        "2",
        "--data",
        "text.jsonl",
        "--teacher",
        "original",
        "--out",
        out,
        "--device",
        "cpu",
    ]
    return [*given, *(word for item in SMALL for word in ("--set", item)), *more]


def test_torchrun_trains_sharded_and_writes_an_ordinary_checkpoint(place):
    """Once refused for its batch, then with what `kvlatent train` says in one process, by one answer on stdout."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "kvlatent_cli",
    ]
    options = {"cwd": place, "capture_output": True, "text": True, "timeout": 150}
    options["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *words(place, "two", "--set", "scale.sharding=fsdp2"), "--json"], check=False, **options
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 16
    assert not list(place.glob("*.partial"))
    one = train(
        place / "latent", stage=2, data=place / "text.jsonl", teacher=place / "original", out=place / "one", device="cpu",
        overrides=SMALL,
    )  # fmt: skip
    rows = [read_journal(place / name / "metrics.jsonl") for name in ("one", "two")]
    assert [row["loss"] for row in rows[1]] == pytest.approx([row["loss"] for row in rows[0]], rel=1e-5)
    weights = [load_file(place / name / "model.safetensors") for name in ("one", "two")]
    assert one["steps"] == 16 and set(weights[0]) == set(weights[1])
    assert all(torch.allclose(weights[0][key], weights[1][key], atol=2e-4) for key in weights[0])
    model, latent = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("two", "latent"))
    assert {n for n, digest in hashes(model).items() if digest != hashes(latent)[n]}


def test_sigterm_ends_the_command_with_a_sentence_and_a_state(place):
    command = [sys.executable, "-m", "kvlatent_cli", *words(place, "out", "--set", "stage2.tokens=65536")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        command, cwd=place, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    journal = place / "out.partial" / "stage2" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (journal.is_file() and journal.stat().st_size) and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    output, said = running.communicate(timeout=60)
    assert running.returncode == 143, said
    assert output == ""
    assert "stage 2 was asked to end (SIGTERM) at step" in said and said.rstrip().endswith(
        "repeat the same to continue"
    )
    assert "Traceback" not in said
    saved = list((place / "out.partial" / "stage2").glob("checkpoint-*/trainer_state.json"))
    assert saved and not (place / "out").exists()


def test_a_hub_data_set_is_on_the_disk_before_the_first_step_so_its_position_is_exact(place, monkeypatch):
    """Streamed once; a run that was cut goes on in the same blocks, though the data set cannot be reached any more."""
    (place / "hub").mkdir()
    (place / "text.jsonl").rename(place / "hub" / "train.jsonl")
    monkeypatch.chdir(place)
    streamed, read = [], documents._dataset_records
    monkeypatch.setattr(
        documents, "_dataset_records", lambda source: streamed.append(source.split) or read(source)
    )

    def call(out, progress=None):
        return train(
            place / "latent", stage=2, data="hub:default", teacher=place / "original", out=place / out, device="cpu",
            overrides=SMALL, progress=progress,
        )  # fmt: skip

    def stop(stage, step, *rest):
        if step == 12:
            raise KeyboardInterrupt

    call("whole")
    with pytest.raises(KeyboardInterrupt):
        call("cut", stop)
    monkeypatch.setattr(documents, "_dataset_records", lambda source: pytest.fail("read again"))
    steps = []
    call("cut", lambda stage, step, *rest: steps.append(step))
    assert steps == list(range(11, 17)) and streamed == ["train", "train"]
    weights = [load_file(place / name / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
