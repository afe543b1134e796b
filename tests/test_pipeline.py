"""compress: complete, resumable from anywhere, and nothing half-written."""

import hashlib
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvlatent
from kvlatent.checkpoints.load import load_model
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.record import command_line
from kvlatent.jobs.work_directory import WorkDirectory, partial_of
from kvlatent.model.time_estimate import estimate_seconds, layer_size
from kvlatent.workflows.compress_checkpoint import compress
from kvlatent.workflows.convert_checkpoint import convert_checkpoint
from on_disk import SETTINGS, TOKENS, snapshot, write_checkpoint, write_text
from training_setup import hashes

OPTIONS = {"overrides": SETTINGS, "tokens": TOKENS, "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    write_checkpoint(folder / "model", tiny_tokenizer)
    write_text(folder / "text.txt")
    return folder


@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted run: its record, and the model directory as it was before."""
    before = snapshot(place / "model")
    record = compress(place / "model", place / "text.txt", place / "whole", **OPTIONS)
    return record, before


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_output_is_loadable_measured_and_complete(place, whole):
    record, before = whole
    out = place / "whole"
    assert snapshot(place / "model") == before
    assert not (place / "whole.partial").exists()
    assert json.loads((out / "run.json").read_text()) == record
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.kv_latent["widths"] == {"d_qk": 8, "d_vo": 8}
    assert len(AutoTokenizer.from_pretrained(out)) == 300
    assert not any("lora" in name for name in weights(out))
    figures = record["figures"]
    assert list(figures) == ["original", "converted", "stage1", "latent"]
    # 2 layers x 2 key-value heads x (width + width) x 4 bytes, measured on the live cache
    assert figures["original"]["cache_bytes_per_token"] == 2 * 2 * (16 + 16) * 4
    assert figures["latent"]["cache_bytes_per_token"] == 2 * 2 * (8 + 8) * 4
    assert record["plan"]["cache_bytes_per_token"] == {"original": 512, "latent": 256, "dtype": "float32"}
    assert figures["latent"]["perplexity"] != figures["converted"]["perplexity"]
    assert record["training"]["stage1"]["tokens"] == record["training"]["stage2"]["tokens"] == TOKENS / 2


def test_the_original_in_memory_is_untouched_by_a_whole_run(place, tmp_path, monkeypatch):
    """It shares most tensors with the latent model; adapters are merged into the exported copy only."""
    loaded = []

    def spy(*args, **kwargs):
        model = load_model(*args, **kwargs)
        loaded.append((model, hashes(model)))
        return model

    monkeypatch.setattr("kvlatent.workflows.steps.load_model", spy)
    compress(place / "model", place / "text.txt", tmp_path / "out", **OPTIONS)
    ((model, before),) = loaded
    assert hashes(model) == before
    trained = hashes(load_model(tmp_path / "out"))
    assert trained["model.layers.0.mlp.up_proj.weight"] != before["model.layers.0.mlp.up_proj.weight"]


def test_settings_travel_with_the_weights_but_paths_do_not(place, whole):
    record, _ = whole
    out = place / "whole"
    settled = Recipe.load(out / "recipe.yaml")
    assert settled == Recipe.load(
        None, [*SETTINGS, f"stage1.tokens={TOKENS // 2}", f"stage2.tokens={TOKENS // 2}", "dtype=float32"]
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [1] * 4 + [2] * 4
    for name in ("run.json", "README.md", "recipe.yaml", "config.json", "metrics.jsonl"):
        assert str(place) not in (out / name).read_text()
    assert record["command"].startswith(
        "kvlatent compress model --data text.txt --out whole --set conversion.preset=paper --set data.block_size=32"
    )
    assert record["sha256"]["data"] and record["versions"]["torch"] == torch.__version__
    card = (out / "README.md").read_text()
    assert f"{record['figures']['latent']['perplexity']:.3f}" in card
    assert "tokens from the held-out part of the data" in card
    assert record["sha256"]["eval_data"] is None


def test_the_command_is_quoted_for_the_shell():
    words = ["kvlatent", "compress", "my model", "--data", "a;b.txt", "--set", "data.separator=$x y"]
    options = {"data": "a;b.txt", "set": ["data.separator=$x y"]}
    assert shlex.split(command_line("compress", "/place/my model", options)) == words


STEPS = [
    "tokenise",
    "measure original",
    "measure converted",
    "stage I",
    "measure stage1",
    "stage II",
    "measure latent",
    "save",
]


@pytest.mark.parametrize("step", STEPS)
def test_interrupted_anywhere_it_continues_to_the_same_weights(place, whole, tmp_path, step):
    seen = []

    def interrupt(name: str, done: int, total: int, note: str) -> None:
        seen.append(name)
        if name == step and (done >= 3 or not name.startswith("stage ")):
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(place / "model", place / "text.txt", out, progress=interrupt, **OPTIONS)
    assert not out.exists()
    resumed = []
    compress(
        place / "model", place / "text.txt", out, progress=lambda *event: resumed.append(event[0]), **OPTIONS
    )
    assert same(weights(out), weights(place / "whole"))
    assert not (tmp_path / "out.partial").exists()
    for earlier in STEPS[1 : STEPS.index(step)]:
        assert earlier not in resumed


def test_killed_in_a_stage_it_continues_to_the_same_weights(place, whole, tmp_path):
    script = f"""
import os, signal
from kvlatent.workflows.compress_checkpoint import compress
def kill(name, done, total, note):
    if name == "stage II" and done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
compress({str(place / "model")!r}, {str(place / "text.txt")!r}, {str(tmp_path / "out")!r}, progress=kill,
         overrides={SETTINGS!r}, tokens={TOKENS}, device="cpu")
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()
    compress(place / "model", place / "text.txt", tmp_path / "out", **OPTIONS)
    assert same(weights(tmp_path / "out"), weights(place / "whole"))


def test_another_seed_gives_other_weights(place, whole, tmp_path):
    compress(place / "model", place / "text.txt", tmp_path / "out", seed=1, **OPTIONS)
    assert not same(weights(tmp_path / "out"), weights(place / "whole"))


def test_killed_after_the_rename_it_only_cleans_up(place, tmp_path):
    out = tmp_path / "whole"
    compress(place / "model", place / "text.txt", out, stages="none", overrides=SETTINGS, device="cpu")
    first = json.loads((out / "run.json").read_text())
    before = snapshot(out)
    decides = _plan_of(place, out)
    WorkDirectory(partial_of(out), decides).open()
    assert (
        compress(place / "model", place / "text.txt", out, stages="none", overrides=SETTINGS, device="cpu")
        == first
    )
    assert snapshot(out) == before and not (tmp_path / "whole.partial").exists()


def _plan_of(place: Path, out: Path) -> dict:
    """The plan that a run would note, caught on its way."""
    caught = {}

    def stop(*event) -> None:
        caught.update(json.loads((out.with_name("spy.partial") / "plan.json").read_text()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(
            place / "model", place / "text.txt", out.with_name("spy"), stages="none", overrides=SETTINGS, device="cpu", progress=stop
        )  # fmt: skip
    return caught


def test_unfinished_work_of_other_arguments_is_refused_by_name(place, tmp_path):
    out = tmp_path / "out"

    def stop(name: str, *event) -> None:
        if name == "measure converted":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(place / "model", place / "text.txt", out, progress=stop, **OPTIONS)
    with pytest.raises(
        ValueError, match=r"unfinished run with another .*recipe\.seed \(0, now 7\).*--overwrite"
    ):
        compress(place / "model", place / "text.txt", out, seed=7, **OPTIONS)
    assert not out.exists()
    compress(
        place / "model", place / "text.txt", out, seed=7, overwrite=True, **{**OPTIONS, "stages": "none"}
    )
    assert json.loads((out / "run.json").read_text())["training"] == {}


def test_a_strangers_directory_where_unfinished_work_goes_is_refused(place, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    partial.mkdir()
    (partial / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out\.partial .*precious\.txt.*--overwrite"):
        compress(place / "model", place / "text.txt", out, **OPTIONS)
    assert snapshot(tmp_path) == {"out.partial/precious.txt": b"mine"}
    (partial / "precious.txt").unlink()
    partial.rmdir()
    partial.write_text("mine")
    with pytest.raises(FileExistsError, match=r"out\.partial is a file"):
        compress(place / "model", place / "text.txt", out, overwrite=True, **OPTIONS)
    assert partial.read_text() == "mine"


def test_a_strangers_directory_survives_beside_a_finished_run(place, tmp_path):
    out, options = tmp_path / "out", {"stages": "none", "overrides": SETTINGS, "device": "cpu"}
    compress(place / "model", place / "text.txt", out, **options)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds something"):
        compress(place / "model", place / "text.txt", out, **options)
    assert (tmp_path / "out.partial" / "precious.txt").read_text() == "mine"


def test_a_damaged_record_is_no_finished_run(place, tmp_path):
    out = tmp_path / "whole"
    decides = _plan_of(place, out)
    WorkDirectory(partial_of(out), decides).open()
    out.mkdir()
    (out / "run.json").write_text("[1]")
    with pytest.raises(FileExistsError, match="already holds something"):
        compress(place / "model", place / "text.txt", out, stages="none", overrides=SETTINGS, device="cpu")


@pytest.mark.parametrize("out", [".", "/", ""])
def test_places_that_no_output_can_have(place, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: compress(place / "model", place / "text.txt", out, overwrite=True, **OPTIONS),
        lambda: convert_checkpoint(place / "model", out, overwrite=True, device="cpu"),
    ):
        with pytest.raises(FileExistsError, match="cannot be replaced as a whole"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_the_training_text_is_no_evaluation_text(place, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_bytes((place / "text.txt").read_bytes())
    with pytest.raises(ValueError, match="--eval-data is the training text"):
        compress(place / "model", place / "text.txt", tmp_path / "out", eval_data=copy, **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["copy.txt"]


def test_a_latent_model_is_refused_before_its_widths_are(place, tmp_path):
    convert_checkpoint(place / "model", tmp_path / "latent", kv=0.25, device="cpu")
    with pytest.raises(ValueError, match="the model is latent already"):
        compress(tmp_path / "latent", place / "text.txt", tmp_path / "out", kv=0.1, dry_run=True)


def test_sizes_that_build_no_model_are_refused(place):
    config = load_model(place / "model").config
    config.num_key_value_heads = 0
    with pytest.raises(ValueError, match="no llama can be built"):
        layer_size(config)


def test_the_plan_is_announced_once_all_checks_passed(place, tmp_path):
    events = []
    compress(
        place / "model", place / "text.txt", tmp_path / "out", stages="none", overrides=SETTINGS, device="cpu",
        announce=lambda plan: events.append(plan["share"]), progress=lambda step, *rest: events.append(step),
    )  # fmt: skip
    assert events[:4] == ["load", "tokenise", 0.5, "measure original"] and events.count(0.5) == 1
    short = tmp_path / "short.txt"
    short.write_text("A cat.")
    for call in (
        lambda: compress(place / "model", short, tmp_path / "two", announce=events.append, **OPTIONS),
        lambda: convert_checkpoint(place / "model", tmp_path / "two", data=short, announce=events.append),
    ):
        with pytest.raises(ValueError, match="block"):
            call()
    assert not any(isinstance(event, dict) for event in events)


def test_full_output_is_refused_until_overwritten_at_the_end(place, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(FileExistsError, match="already holds something"):
        compress(place / "model", place / "text.txt", out, **OPTIONS)
    assert snapshot(tmp_path) == {"out/thesis.txt": b"irreplaceable"}
    seen = []
    compress(
        place / "model", place / "text.txt", out, overwrite=True, stages="none", overrides=SETTINGS, device="cpu",
        progress=lambda *event: seen.append((out / "thesis.txt").exists()),
    )  # fmt: skip
    assert all(seen) and not (out / "thesis.txt").exists() and (out / "run.json").is_file()


def test_dry_run_writes_nothing(place, tmp_path):
    plan = compress(place / "model", place / "text.txt", tmp_path / "out", dry_run=True, **OPTIONS)["plan"]
    assert plan["tokens"] == {"stage1": TOKENS // 2, "stage2": TOKENS // 2}
    assert (plan["d_qk"], plan["d_vo"], plan["share"]) == (8, 8, 0.5)
    assert plan["estimated_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("stages", "shares"), [("1", {"stage1": 900}), ("2", {"stage2": 900}), ("none", {})])
def test_tokens_go_to_the_stages_that_run(place, tmp_path, stages, shares):
    plan = compress(
        place / "model", place / "text.txt", tmp_path / "out", dry_run=True, stages=stages, tokens=900
    )
    assert plan["plan"]["tokens"] == shares


def test_a_recipe_keeps_its_tokens_and_the_default_is_bounded(place, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("stage1: {tokens: 111}\n")
    common = {"dry_run": True}
    said = compress(place / "model", place / "text.txt", tmp_path / "out", recipe=recipe, **common)["plan"][
        "tokens"
    ]
    assert said["stage1"] == 111
    free = compress(place / "model", place / "text.txt", tmp_path / "out", **common)["plan"]["tokens"]
    assert 65_536 <= sum(free.values()) <= 20_000_001


def test_own_evaluation_text_leaves_all_of_the_data_for_training(place, tmp_path):
    other = write_text(tmp_path / "other.txt", 40, seed=5)
    record = compress(
        place / "model", place / "text.txt", tmp_path / "out", eval_data=other, eval_tokens=64, stages="none",
        overrides=SETTINGS, device="cpu",
    )  # fmt: skip
    assert 0 < record["figures"]["original"]["tokens"] <= 64
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    assert record["sha256"]["eval_data"] == digest
    assert f"from a separate text (sha256 {digest})" in (tmp_path / "out" / "README.md").read_text()


def test_a_failure_before_any_work_leaves_nothing(place, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A cat.")
    with pytest.raises(ValueError, match="block"):
        compress(place / "model", short, tmp_path / "out", **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_a_block_longer_than_the_context_is_refused(place, tmp_path):
    with pytest.raises(ValueError, match=r"data\.block_size=512, max_position_embeddings=128"):
        compress(place / "model", place / "text.txt", tmp_path / "out", tokens=TOKENS, device="cpu")


def test_nothing_held_out_is_refused(place, tmp_path):
    with pytest.raises(ValueError, match="held out"):
        compress(
            place / "model",
            place / "text.txt",
            tmp_path / "out",
            overrides=[*SETTINGS, "data.held_out=0"],
            device="cpu",
        )
    assert list(tmp_path.iterdir()) == []


def test_convert_alone_keeps_the_dtype_and_measures_on_request(place, tmp_path, tiny_tokenizer):
    source = write_checkpoint(tmp_path / "half", tiny_tokenizer, dtype=torch.bfloat16)
    plain = convert_checkpoint(source, tmp_path / "plain", d_qk=8, device="cpu")
    assert plain["figures"] == {}
    assert plain["command"] == "kvlatent convert half --out plain --d-qk 8 --device cpu"
    model = load_model(tmp_path / "plain")
    assert model.config.kv_latent["widths"] == {"d_qk": 8, "d_vo": 16}
    measured = convert_checkpoint(
        source, tmp_path / "measured", kv=0.5, data=place / "text.txt", overrides=SETTINGS, device="cpu"
    )
    assert load_model(tmp_path / "measured").dtype == torch.bfloat16
    assert measured["figures"]["latent"]["ratio"] > 0
    assert measured["figures"]["latent"]["cache_bytes_per_token"] == 256
    card = (tmp_path / "measured" / "README.md").read_text()
    assert "±" in card and "tokens of the given text" in card and "held-out" not in card
    with pytest.raises(FileExistsError):
        convert_checkpoint(place / "model", tmp_path / "plain", device="cpu")


def test_full_width_costs_nothing(place, tmp_path):
    record = compress(
        place / "model",
        place / "text.txt",
        tmp_path / "out",
        kv=1.0,
        stages="none",
        overrides=SETTINGS,
        device="cpu",
    )
    figures = record["figures"]
    assert figures["latent"]["ratio"] == 1.0
    assert figures["latent"]["perplexity"] == figures["original"]["perplexity"]
    assert kvlatent.LatentConfig.from_dict(load_model(tmp_path / "out").config.kv_latent).d_qk == 16


def test_the_estimate_counts_what_tiny_layers_cost_beside_their_parameters(monkeypatch):
    monkeypatch.setattr("kvlatent.model.time_estimate._matmul_speed", lambda device, dtype: 1e11)
    recipe = Recipe.load(None, ["stage1.tokens=65536"])
    # Measured on one thread of 1e11 operations per second: two layers of width 32 take about 2.6 s.
    assert 1 < estimate_seconds(recipe, (1,), 21_664, 9_600, 2, "cpu") < 6
    assert estimate_seconds(recipe, (1,), 21_664, 9_600, 2, "cuda") < 0.5
    large = estimate_seconds(recipe, (1,), 10**9, 10**8, 20, "cpu")
    assert large == pytest.approx(8 * 10**9 * 65536 / 4e10, rel=0.01)
    assert estimate_seconds(recipe, (), 10**9, 10**8, 20, "cpu") == 0
