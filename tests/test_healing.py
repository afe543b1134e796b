"""Stage II within a budget in minutes: its rate, its tokens, its end, and what is kept of it."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from kvlatent.jobs.recipe import Recipe
from kvlatent.training.stages import train_stage
from kvlatent.training.trainable import prepare_for_training, trainable_state
from kvlatent.workflows import healing, minutes
from kvlatent.workflows.compress_checkpoint import compress
from on_disk import write_checkpoint, write_text
from test_minutes import NOTHING, QUICK, Clock, set_costs
from training_setup import blocks, original, student_of

OPTIONS = {"overrides": QUICK, "device": "cpu", "eval_tokens": 320, "minutes": 3}
LATE = 1e9  # seconds by which a clock is set on between calls


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("healing")
    write_checkpoint(folder / "model", tiny_tokenizer)
    write_text(folder / "text.txt", 400)
    return folder


@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted run: its record."""
    with pytest.MonkeyPatch.context() as patch:
        _set_clock(patch)
        return run(place, place / "whole")


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    return _set_clock(monkeypatch)


def _set_clock(monkeypatch):
    """A second passes at every look, so a step of training takes one, and a step of the conversion `COSTS`."""
    clock = Clock(tick=1.0)
    monkeypatch.setattr(minutes, "monotonic", clock)
    set_costs(monkeypatch)
    return clock


def run(place, out, **options):
    return compress(place / "model", place / "text.txt", out, **{**OPTIONS, **options})


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:on held-out text")
def test_the_budget_is_split_and_every_step_says_what_it_gained(place, whole):
    record = whole
    rows = {row["step"]: row for row in record["minutes"]["steps"]}
    assert list(rows) == [
        "foresee the time", "calibration", "widths", "closed form", "measure the speed", "alignment and refit",
        "global pass", "search of the rate", "stage II",
    ]  # fmt: skip
    stage, search = record["training"]["stage2"], record["training"]["stage2"]["search"]
    assert list(record["training"]) == ["stage2"] and "stage1" not in record["figures"]
    assert rows["stage II"]["after"] < rows["stage II"]["before"] == search["start"]
    base = Recipe().stage2.learning_rate
    assert [row["learning_rate"] for row in search["trials"]] == [base / 3, base, base * 3]
    best = min(search["trials"], key=lambda row: row["divergence"])
    recipe = Recipe.load(place / "whole" / "recipe.yaml")
    assert recipe.stage2.learning_rate == best["learning_rate"] != base / 3
    assert "did best of 3" in record["minutes"]["why"] and "33%" in record["minutes"]["why"]
    assert recipe.conversion.align == rows["alignment and refit"]["steps"]
    checks = {row["step"]: row["divergence"] for row in stage["checks"]}
    assert checks[0] == search["start"] and checks[stage["kept_step"]] == min(checks.values())
    assert stage["steps"] * 4 * 32 <= recipe.stage2.tokens
    assert record["plan"]["tokens"] == {"stage2": recipe.stage2.tokens} and "minutes" not in record["plan"]
    assert record["figures"]["latent"]["perplexity"] != record["figures"]["converted"]["perplexity"]
    assert not (place / "whole.partial").exists()
    assert json.loads((place / "whole" / "run.json").read_text()) == record


@pytest.mark.filterwarnings("ignore:on held-out text")
def test_a_killed_run_keeps_to_what_it_had_decided(place, whole, tmp_path, clock):
    steps, told = whole["training"]["stage2"]["steps"], []

    def interrupt(step, done, total, note):
        told.append((step, done))
        if step == "stage II" and done == steps // 2 and total > 20:  # a trial is shorter
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "out", progress=interrupt)
    clock.now, clock.tick = LATE, 0.0  # a machine where any number of steps would fit
    resumed = []
    record = run(place, tmp_path / "out", progress=lambda *event: resumed.append(event[0]))
    assert "calibrate" not in resumed and "refine layers" not in resumed and "stage II" in resumed
    assert same(weights(tmp_path / "out"), weights(place / "whole"))
    assert record["training"]["stage2"]["checks"] == whole["training"]["stage2"]["checks"]
    assert record["training"]["stage2"]["search"] == whole["training"]["stage2"]["search"]
    assert (tmp_path / "out" / "recipe.yaml").read_text() == (place / "whole" / "recipe.yaml").read_text()
    names = [row["step"] for row in record["minutes"]["steps"]]
    assert names == [row["step"] for row in whole["minutes"]["steps"]]
    assert record["minutes"]["spent"] > 0.3, "what the first call had spent counts"


@pytest.mark.filterwarnings("ignore:on held-out text")
@pytest.mark.parametrize("step", ["refine layers", "tune all layers", "measure converted"])
def test_interrupted_elsewhere_it_decides_nothing_anew(place, whole, tmp_path, clock, step):

    def interrupt(name, done, total, note):
        if name == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "out", progress=interrupt)
    split = tmp_path / "out.partial" / "step-split.json"
    decided = json.loads(split.read_text())
    clock.now = LATE
    record = run(place, tmp_path / "out")
    rows = {row["step"]: row for row in record["minutes"]["steps"]}
    assert rows["alignment and refit"]["steps"] == decided["align"]
    assert decided["align"] == whole["plan"]["choices"]["align"]
    assert record["minutes"]["spent"] < 6, "the time between the calls is not counted"


def test_what_made_nothing_better_is_not_kept_and_said(place, tmp_path):
    rate = ("stage2.learning_rate=30", "stage2.max_grad_norm=0")
    with pytest.warns(UserWarning, match="stage II made the model no better") as caught:
        record = run(place, tmp_path / "out", overrides=(*QUICK, *rate))
    sentence = record["warnings"][0]
    assert sentence in [str(each.message) for each in caught]
    stage = record["training"]["stage2"]
    first = stage["checks"][0]["divergence"]
    assert stage["kept_step"] == 0 and f"{first:.4f} nats" in sentence and "\n" not in sentence
    assert sentence.endswith("give more --minutes, or more text")
    assert all(row["divergence"] > first for row in stage["checks"][1:])
    assert (
        len(stage["checks"]) == 1 + 4
        and stage["steps"] < Recipe.load(tmp_path / "out" / "recipe.yaml").stage2.tokens / 128
    )
    assert record["figures"]["latent"]["perplexity"] == pytest.approx(
        record["figures"]["converted"]["perplexity"]
    )
    assert stage["search"]["trials"] == [] and "the rate was given" in stage["search"]["why"]


@pytest.mark.filterwarnings("ignore:on held-out text")
def test_where_no_step_of_the_stage_fits_the_conversion_is_the_result(place, tmp_path, clock, monkeypatch):
    measure = healing.Healing._timed_check

    def late(self):
        clock.now += 170
        return measure(self)

    monkeypatch.setattr(healing.Healing, "_timed_check", late)
    with pytest.warns(
        UserWarning, match=r"no step of stage II fits into --minutes 3, so .* takes about [0-9.]+ minutes"
    ):
        record = run(place, tmp_path / "out")
    assert record["training"] == {} and record["plan"]["tokens"] == {}
    assert record["figures"]["latent"]["perplexity"] == record["figures"]["converted"]["perplexity"]


def test_without_any_step_that_fits_nothing_is_left(place, tmp_path, clock, monkeypatch):
    told = []
    with pytest.raises(ValueError, match=r"--minutes has to be enough for .*about .* got 0\.15"):
        run(place, tmp_path / "out", minutes=0.15, progress=lambda step, *rest: told.append(step))
    assert "foresee the time" in told and "calibrate" not in told and list(tmp_path.iterdir()) == []
    set_costs(monkeypatch, foreseen=NOTHING)
    for options in ({"minutes": 0.15}, {"minutes": 0.12, "overrides": (*QUICK, "conversion.preset=paper")}):
        with pytest.raises(
            ValueError, match=r"--minutes has to be enough for .*(?:about|at least) .* got 0\.1"
        ):
            run(place, tmp_path / "out", **options)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:on held-out text")
def test_a_conversion_without_steps_leaves_all_to_the_stage(place, tmp_path):
    record = run(place, tmp_path / "out", minutes=1, overrides=(*QUICK, "conversion.preset=paper"))
    assert [row["step"] for row in record["minutes"]["steps"]][-2:] == ["search of the rate", "stage II"]
    assert record["calibration"] is None and "takes no steps" in record["minutes"]["why"]
    conversion_alone = run(place, tmp_path / "alone", stages="none")
    assert conversion_alone["training"] == {} and "stage II" not in conversion_alone["minutes"]["why"]


def test_blocks_to_decide_on_are_neither_trained_on_nor_reported_on(place, tmp_path, monkeypatch):
    parted = []
    part = healing.part_checked
    monkeypatch.setattr(
        "kvlatent.workflows.compress_steps.part_checked",
        lambda *given: parted.append((given, part(*given))) or parted[-1][1],
    )
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "out", progress=_stop_at("measure original"))
    (((texts, size), (kept, checked)),) = parted
    rows = [tuple(row) for row in texts.train[:]["input_ids"]]
    assert [tuple(row) for row in kept.train[:]["input_ids"]] == rows[: len(kept.train)]
    assert [tuple(row) for row in checked[:]["input_ids"]] == rows[len(kept.train) :]
    assert 1 <= len(checked) <= 0.1 * len(rows) + 1 and kept.held_out is texts.held_out
    with pytest.raises(ValueError, match=r"at least 2 blocks of 32 tokens: got 1; give more text"):
        part(texts._replace(train=texts.train.select(range(1))), size)


def _stop_at(wanted):
    def stop(step, done, total, note):
        if step == wanted:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize(
    ("values", "steps", "kept"),
    [
        ([5, 4, 3, 3.5, 3.6, 3.7, 3.8, 0], 6, 2),  # four without a new least, and it stops
        ([5, 6, 6, 6, 6, 0], 4, 0),
        ([5, 4, 5, 5, 5, 3, 5, 5, 5, 2, 9], 10, 9),
    ],
)
def test_a_stage_ends_when_nothing_is_gained_and_keeps_its_best(tmp_path, values, steps, kept):
    teacher = original()
    model = student_of(teacher)
    recipe = Recipe.load(
        None, ["stage2.batch_size=4", f"stage2.tokens={4 * 16 * 10}", "lora.rank=2", "stage2.save_steps=100"]
    )
    prepare_for_training(model, recipe)
    states, told = [], iter(values)

    def divergence():
        states.append({name: tensor.clone() for name, tensor in trainable_state(model.get_decoder()).items()})
        return next(told)

    summary = train_stage(model, teacher, 2, blocks(), recipe, tmp_path / "stage2", divergence=divergence)
    assert (summary["steps"], summary["kept_step"]) == (steps, kept)
    assert [row["step"] for row in summary["checks"]] == list(range(steps + 1))
    assert same(trainable_state(model.get_decoder()), states[kept])
    assert not same(states[0], states[-1]) and math.isfinite(summary["last_loss"])
    again = train_stage(model, teacher, 2, blocks(), recipe, tmp_path / "stage2", divergence=divergence)
    assert again == summary and same(trainable_state(model.get_decoder()), states[kept])
