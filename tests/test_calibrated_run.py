"""compress and convert with the calibrated preset: what they look at, what they note, and that a kill costs nothing."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvlatent.checkpoints.load import load_model
from kvlatent.jobs.recipe import Recipe
from kvlatent.model.classes import latent_config_of
from kvlatent.selection import calibrate as calibration
from kvlatent.selection.choices import NO_DATA, UNMEASURED
from kvlatent.selection.statistics import Statistics
from kvlatent.workflows import saved_attention, steps
from kvlatent.workflows.calibrate_and_plan import calibrate_checkpoint
from kvlatent.workflows.compress_checkpoint import compress
from kvlatent.workflows.convert_checkpoint import convert_checkpoint
from on_disk import SETTINGS, TOKENS, snapshot, write_checkpoint, write_text
from training_setup import hashes

QUICK = (*SETTINGS, "conversion.preset=calibrated", "conversion.align=2", "calibration.blocks=6")
OPTIONS = {"overrides": QUICK, "tokens": TOKENS, "device": "cpu"}
ALONE = {"overrides": QUICK, "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer) -> Path:
    """model, text.txt, other.txt, and statistics of the model on other.txt."""
    folder = tmp_path_factory.mktemp("calibrated")
    write_checkpoint(folder / "model", tiny_tokenizer)
    write_text(folder / "text.txt")
    write_text(folder / "other.txt", 60, seed=5)
    calibrate_checkpoint(folder / "model", folder / "other.txt", folder / "other.safetensors", **ALONE)
    return folder


@pytest.fixture(scope="module")
def whole(place):
    return compress(place / "model", place / "text.txt", place / "whole", explain=True, **OPTIONS)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_compress_notes_what_it_looked_at_and_what_it_chose(place, whole):
    assert json.loads((place / "whole" / "run.json").read_text()) == whole
    calibrated, conversion = whole["calibration"], whole["conversion"]
    assert (calibrated["blocks"], calibrated["tokens"]) == (6, 6 * 32)
    assert calibrated["seconds"] > 0 and len(calibrated["fingerprint"]) == 64
    assert conversion["seconds"] > 0
    assert list(conversion["scope_errors"]) == ["head", "layer", "model"]
    plan, predicted = whole["plan"], conversion["predicted"]
    assert (plan["d_qk"], plan["d_vo"]) == (predicted["d_qk"], predicted["d_vo"])
    assert plan["d_qk"] + plan["d_vo"] == 16 and plan["share"] == 0.5
    assert list(whole["figures"]) == ["original", "converted", "stage1", "latent"]
    config = latent_config_of(load_model(place / "whole").config)
    assert (config.d_qk, config.d_vo) == (plan["d_qk"], plan["d_vo"])
    assert (config.keys, config.values, config.frequencies) == ("gram", "whitened", "own")
    card = (place / "whole" / "README.md").read_text()
    assert "Calibrated on 192 tokens of text, then 2 steps of attention alignment a layer." in card
    assert "with preset `calibrated`" in card and "from the held-out part of the data" in card


def test_what_is_explained_has_a_row_a_layer_and_every_strategy(whole):
    assert " --explain" in whole["command"]
    rows = whole["conversion"]["layers"]
    assert [row["layer"] for row in rows] == [0, 1]
    for row in rows:
        assert row["d_qk"] + row["d_vo"] == 16
        assert list(row["errors"]) == ["paper", "matched", "stride", "energy", "calibrated"]
        assert 0 < row["errors"]["calibrated"] < row["errors"]["paper"]


ORDER = ["calibrate", "measure original", "convert", "measure converted", "stage I"]


@pytest.mark.parametrize("step", [*ORDER, "refine layers"])
def test_interrupted_anywhere_it_continues_to_the_same_weights(place, whole, tmp_path, step):
    def interrupt(name: str, done: int, total: int, note: str) -> None:
        if name == step and (done >= 3 or step not in ("stage I", "calibrate", "refine layers")):
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(place / "model", place / "text.txt", out, progress=interrupt, **OPTIONS)
    assert not out.exists()
    resumed = []
    explain = step == "stage I"  # asked for when the conversion is there already
    record = compress(
        place / "model", place / "text.txt", out, explain=explain,
        progress=lambda *event: resumed.append(event[0]), **OPTIONS,
    )  # fmt: skip
    assert ("layers" in record["conversion"]) == ("explain" in resumed) == explain
    assert record["conversion"].get("layers", whole["conversion"]["layers"]) == whole["conversion"]["layers"]
    assert same(weights(out), weights(place / "whole"))
    assert not (tmp_path / "out.partial").exists()
    finished = ORDER[: ORDER.index("convert" if step == "refine layers" else step)]
    assert not set(finished) & set(resumed)


@pytest.mark.parametrize(("step", "done"), [("measure original", 1), ("stage I", 3)])
def test_killed_it_continues_without_calibrating_again(place, whole, tmp_path, monkeypatch, step, done):
    script = f"""
import os, signal
from kvlatent.workflows.compress_checkpoint import compress
def kill(name, done, total, note):
    if name == {step!r} and done >= {done}:
        os.kill(os.getpid(), signal.SIGKILL)
compress({str(place / "model")!r}, {str(place / "text.txt")!r}, {str(tmp_path / "out")!r}, progress=kill,
         overrides={QUICK!r}, tokens={TOKENS}, device="cpu")
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()
    monkeypatch.setattr(steps, "calibrate", None)
    if step == "stage I":
        monkeypatch.setattr(steps, "convert", None)
    record = compress(place / "model", place / "text.txt", tmp_path / "out", **OPTIONS)
    assert same(weights(tmp_path / "out"), weights(place / "whole"))
    assert record["conversion"]["predicted"] == whole["conversion"]["predicted"]


def test_saved_attention_comes_back_bit_for_bit(place, tmp_path):
    model = load_model(place / "model")
    statistics = Statistics.load(place / "other.safetensors")
    latent = steps.convert(model, d_qk=6, d_vo=16, align=0, statistics=statistics)
    saved_attention.write_attention(latent, tmp_path / "a.safetensors")
    again = saved_attention.restore_attention(model, tmp_path / "a.safetensors")
    assert hashes(again) == hashes(latent)
    assert again.config.to_dict() == latent.config.to_dict()
    assert again.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_a_recipe_is_as_good_as_its_file(place, tmp_path):
    recipe = Recipe.load(None, QUICK)
    (tmp_path / "r.yaml").write_text(recipe.dump_yaml())
    options = {"tokens": 640, "seed": 3, "device": "cpu", "dry_run": True}
    plans = [
        compress(place / "model", place / "text.txt", tmp_path / "out", recipe=given, **options)["plan"]
        for given in (recipe, tmp_path / "r.yaml")
    ]
    for plan in plans:
        plan.pop("estimated_seconds")  # by the clock
    assert plans[0] == plans[1] and plans[0]["calibration_blocks"] == 6
    record = convert_checkpoint(place / "model", tmp_path / "out", kv=1, recipe=recipe, seed=3, device="cpu")
    assert "--recipe" not in record["command"] and "--seed 3" in record["command"]
    assert Recipe.load(tmp_path / "out" / "recipe.yaml") == Recipe.load(recipe, ["seed=3", "dtype=float32"])


def test_only_what_looks_at_statistics_is_explained(place, tmp_path):
    for options, sentence in (
        ({"data": place / "text.txt", "preset": "paper"}, r"none \(got preset paper\); leave it out"),
        ({"data": place / "text.txt", "kv": 1}, r"none \(got the full width\)"),
        ({}, r"none \(got no text\); leave it out, or give a text and the preset calibrated"),
    ):
        with pytest.raises(ValueError, match=f"--explain judges strategies by the statistics.*{sentence}"):
            convert_checkpoint(place / "model", tmp_path / "out", explain=True, device="cpu", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_seed_draws_other_text(place, tmp_path, whole):
    other = compress(place / "model", place / "text.txt", tmp_path / "out", stages="none", seed=1, **ALONE)
    assert other["calibration"]["fingerprint"] == whole["calibration"]["fingerprint"]
    assert other["conversion"]["scope_errors"] != whole["conversion"]["scope_errors"]


def test_compress_takes_statistics_of_an_earlier_calibration(place, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "calibrate", None)
    record = compress(
        place / "model", place / "text.txt", tmp_path / "out", stages="none",
        statistics=place / "other.safetensors", **ALONE,
    )  # fmt: skip
    assert record["calibration"]["seconds"] == 0 and record["sha256"]["statistics"]
    assert 0 <= record["calibration"]["seen_share"] < 0.2
    assert "--statistics other.safetensors" in record["command"]


def test_statistics_decide_the_run(place, tmp_path):
    """Another file of statistics is another run, which does not continue the first."""

    def stop(name: str, *event) -> None:
        if name == "measure original":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(place / "model", place / "text.txt", tmp_path / "out", progress=stop, **OPTIONS)
    assert {"statistics.safetensors", "step-calibration.json"} <= set(snapshot(tmp_path / "out.partial"))
    with pytest.raises(ValueError, match=r"unfinished run with another statistics \(None, now "):
        compress(
            place / "model", place / "text.txt", tmp_path / "out", statistics=place / "other.safetensors", **OPTIONS
        )  # fmt: skip


def test_convert_calibrates_and_measures_on_what_it_held_out(place, tmp_path):
    record = convert_checkpoint(
        place / "model", tmp_path / "out", data=place / "text.txt", eval_tokens=640, **ALONE
    )
    assert record["calibration"]["tokens"] == 192 and "seen_share" not in record["calibration"]
    assert 0 < record["figures"]["original"]["tokens"] <= 640
    assert record["figures"]["latent"]["cache_bytes_per_token"] == 256
    assert record["figures"]["latent"]["ratio"] > 0
    assert record == json.loads((tmp_path / "out" / "run.json").read_text())
    assert "from the held-out part of the data" in (tmp_path / "out" / "README.md").read_text()


def test_convert_with_statistics_needs_no_text(place, tmp_path):
    saved = place / "other.safetensors"
    record = convert_checkpoint(place / "model", tmp_path / "out", statistics=saved, d_qk=6, **ALONE)
    assert record["figures"] == {} and record["calibration"]["seconds"] == 0
    assert latent_config_of(load_model(tmp_path / "out").config).keys == "gram"
    measured = convert_checkpoint(
        place / "model", tmp_path / "two", statistics=saved, eval_data=place / "other.txt", d_qk=6, **ALONE
    )
    assert measured["calibration"]["seen_share"] > 0.03
    assert same(weights(tmp_path / "out"), weights(tmp_path / "two"))
    card = (tmp_path / "two" / "README.md").read_text()
    assert "the calibration has looked at" in card and "from a separate text" in card


def test_convert_measures_another_text_where_one_is_given(place, tmp_path):
    options = {"data": place / "text.txt", "eval_data": place / "other.txt"}
    record = convert_checkpoint(place / "model", tmp_path / "out", eval_tokens=320, **options, **ALONE)
    assert record["sha256"]["eval_data"] and record["figures"]["latent"]["tokens"] <= 320
    same_text = {"data": place / "text.txt", "eval_data": place / "text.txt"}
    with pytest.raises(ValueError, match="--eval-data is the text to calibrate on; leave it out"):
        convert_checkpoint(place / "model", tmp_path / "two", **same_text, **ALONE)
    assert not (tmp_path / "two").exists()


def test_convert_without_text_says_what_that_costs(place, tmp_path):
    record = convert_checkpoint(place / "model", tmp_path / "out", device="cpu")
    assert record["plan"]["notes"] == [NO_DATA, UNMEASURED] and record["calibration"] is None
    config = latent_config_of(load_model(tmp_path / "out").config)
    assert (config.keys, config.values, config.d_qk, config.d_vo) == ("weights", "svd", 8, 8)
    assert "No text to calibrate on" in (tmp_path / "out" / "README.md").read_text()


def test_convert_keeps_the_dtype_and_calibrates_in_fp32(place, tmp_path, tiny_tokenizer, monkeypatch):
    seen = []

    def spy(model, *args, **kwargs):
        seen.append(model.dtype)
        return calibration.calibrate(model, *args, **kwargs)

    monkeypatch.setattr(steps, "calibrate", spy)
    source = write_checkpoint(tmp_path / "half", tiny_tokenizer, dtype=torch.bfloat16)
    convert_checkpoint(source, tmp_path / "out", data=place / "text.txt", **ALONE)
    assert seen == [torch.float32] and load_model(tmp_path / "out").dtype == torch.bfloat16


def test_one_table_for_the_model_and_widths_by_layer(place, tmp_path):
    options = {"statistics": place / "other.safetensors", **ALONE}
    one = convert_checkpoint(place / "model", tmp_path / "one", table="model", align=0, **options)
    assert one["plan"]["choices"]["align"] == 0
    assert latent_config_of(load_model(tmp_path / "one").config).one_table
    many = convert_checkpoint(place / "model", tmp_path / "many", kv=0.4, per_layer=True, **options)
    widths = latent_config_of(load_model(tmp_path / "many").config)
    total = sum(widths.d_qk_at(i) + widths.d_vo_at(i) for i in range(2))
    assert total <= 0.4 * 2 * 32 and many["plan"]["share"] == total / 64


def test_an_engine_gets_what_it_takes(tmp_path, tiny_tokenizer, place):
    wide = write_checkpoint(tmp_path / "wide", tiny_tokenizer, head_dim=32)
    record = convert_checkpoint(wide, tmp_path / "out", data=place / "text.txt", engine="mlx", **ALONE)
    plan = record["plan"]
    assert plan["d_qk"] == plan["d_vo"] == 16 and plan["choices"]["table"] == "model"
    assert latent_config_of(load_model(tmp_path / "out").config).one_table


@pytest.mark.parametrize("command", ["compress", "convert"])
def test_mistakes_of_the_calibration_leave_nothing(place, tmp_path, tiny_tokenizer, command):
    def run(model, **options):
        options = {**ALONE, **options}
        if command == "convert":
            return convert_checkpoint(model, tmp_path / "out", data=place / "text.txt", **options)
        return compress(model, place / "text.txt", tmp_path / "out", **options)

    few = [*QUICK, "data.block_size=16"]
    with pytest.raises(
        ValueError, match=r"calibration needs at least .* = 64 tokens.*got 16; give more text"
    ):
        run(place / "model", blocks=1, overrides=few)
    broken = write_checkpoint(tmp_path / "broken", tiny_tokenizer)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"weights must be finite: .*broken has NaN or infinity in 1 of .*k_proj"
    ):
        run(broken)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_statistics_of_another_model_are_refused(place, tmp_path, tiny_tokenizer):
    other = write_checkpoint(tmp_path / "other", tiny_tokenizer, initializer_range=0.1)
    saved = place / "other.safetensors"
    for call in (
        lambda: convert_checkpoint(other, tmp_path / "out", statistics=saved, **ALONE),
        lambda: compress(other, place / "text.txt", tmp_path / "out", statistics=saved, **OPTIONS),
    ):
        with pytest.raises(ValueError, match="the statistics are of another model"):
            call()
    with pytest.raises(FileNotFoundError, match="no statistics at"):
        compress(
            place / "model", place / "text.txt", tmp_path / "out", statistics="no.safetensors", **OPTIONS
        )
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_training_carries_the_calibration_on(place, tmp_path):
    import kvlatent

    convert_checkpoint(place / "model", tmp_path / "out", data=place / "text.txt", **ALONE)
    options = {"data": place / "text.txt", "teacher": place / "model", "device": "cpu", "overrides": SETTINGS}
    kvlatent.train(tmp_path / "out", stage=1, out=tmp_path / "one", **options)
    record = json.loads((tmp_path / "one" / "run.json").read_text())
    assert record["plan"]["preset"] == "calibrated" and record["plan"]["choices"]["align"] == 2
    assert record["earlier"][0]["calibration"]["tokens"] == 192
