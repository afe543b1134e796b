"""A budget in minutes: how it is split, what it is refused with, and that a rerun needs no clock."""

import json
import math
import time
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from kvlatent.conversion import step_costs
from kvlatent.conversion.global_pass import held_out_divergence
from kvlatent.conversion.step_costs import StepCosts, measure_step_costs
from kvlatent.jobs.recipe import Recipe
from kvlatent.model.assembly import full_width
from kvlatent.selection.choices import resolve_choices
from kvlatent.workflows import foreseen_steps, minutes, timed_conversion
from kvlatent.workflows.calibrate_and_plan import calibrate_checkpoint
from kvlatent.workflows.compress_checkpoint import compress
from kvlatent.workflows.convert_checkpoint import convert_checkpoint
from kvlatent.workflows.minutes import Budget, TooFewMinutes, check_minutes, split_minutes
from kvlatent.workflows.run_plan import plan_run
from on_disk import SETTINGS, write_checkpoint, write_text
from test_cli import call
from test_global_pass import converted, tuned

QUICK = (
    *(each for each in SETTINGS[1:] if "tokens" not in each),
    "calibration.blocks=34",
    "calibration.rows=8",
)
NOTHING = StepCosts(refine_s=0, align_s=0, global_start_s=0, global_s=0, forward_s=0)
COSTS = StepCosts(refine_s=10, align_s=1, global_start_s=5, global_s=2, forward_s=0.001)


class Clock:
    """Seconds that pass when a test says so, and a little at every look if it likes."""

    def __init__(self, tick=0.0):
        self.now, self.tick = 100.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("minutes")
    write_checkpoint(folder / "model", tiny_tokenizer)
    write_text(folder / "text.txt", 400)
    return folder


@pytest.fixture
def clock(monkeypatch):
    """Stands still, and what steps cost is `COSTS`."""
    clock = Clock()
    monkeypatch.setattr(minutes, "monotonic", clock)
    set_costs(monkeypatch)
    return clock


def set_costs(monkeypatch, foreseen=COSTS):
    """Steps are found to cost `COSTS`, whatever was foreseen."""
    monkeypatch.setattr(timed_conversion, "measure_step_costs", lambda *args, **options: COSTS)
    monkeypatch.setattr(foreseen_steps, "foresee_step_costs", lambda *args, **options: foreseen)
    monkeypatch.setattr(foreseen_steps, "forward_seconds", lambda *args, **options: foreseen.forward_s)


@pytest.mark.parametrize(
    ("seconds", "costs", "most", "align", "steps"),
    [
        (310, {}, 1000, 100, 97),  # a third of 300 for alignment, then (300 - 100 - 5) / 2
        (309, {}, 1000, 50, 122),
        (160, {}, 1000, 50, 47),
        (85, {}, 1000, 25, 22),
        (84, {}, 1000, 0, 34),  # 25 are more than a third of 74
        (1000, {}, 1000, 200, 392),
        (1000, {}, 10, 200, 10),  # the text is short: the rest goes to alignment
        (115, {}, 10, 50, 10),
        (17, {}, 1000, 0, 1),
        (16.9, {}, 1000, None, None),
        (40, {"global_s": 100}, 1000, 25, 0),  # no step on all layers fits, so all is alignment's
        (34, {"global_s": 100}, 1000, None, None),
        (-5, {}, 1000, None, None),
        (10, {"refine_s": 0, "align_s": 0, "global_start_s": 0, "global_s": 0}, 7, 200, 7),
    ],
)
def test_the_split_follows_from_the_seconds(seconds, costs, most, align, steps):
    split = split_minutes(seconds, StepCosts(**{**vars(COSTS), **costs}), most_global_steps=most)
    if align is None:
        assert split is None
        return
    assert (split.align, split.global_steps) == (align, steps)
    full = StepCosts(**{**vars(COSTS), **costs})
    taken = full.refine_s + align * full.align_s + bool(steps) * full.global_start_s + steps * full.global_s
    assert taken <= seconds
    assert (
        f"{align} steps a layer" in split.reason
        and f"about {steps} on all layers" in split.reason
        and "33%" in split.reason
    )


def test_what_steps_cost_is_measured_and_nothing_stays(monkeypatch):
    model, latent, statistics = converted("llama")
    clock = Clock()
    refine, tune = step_costs.refine, step_costs.tune_all_layers

    def slow_refine(twin, latent, config, statistics, choices, **options):
        clock.now += 3 + 0.5 * choices.align
        return refine(twin, latent, config, statistics, choices, **options)

    def slow_tune(*args, progress, **options):
        told = []

        def report(step, done, total, note):
            clock.now += 20 if not told else 4  # before the first step, something else is done
            told.append(done)
            progress.report(step, done, total, note)

        return tune(*args, progress=step_costs.Progress.of(report), **options)

    monkeypatch.setattr(step_costs, "refine", slow_refine)
    monkeypatch.setattr(step_costs, "tune_all_layers", slow_tune)
    parameters = dict(latent.named_parameters())
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in parameters.items()}
    costs = measure_step_costs(
        model, latent, statistics, resolve_choices(), seed=0, dtype="float32", clock=clock
    )
    layers = len(statistics.layers)
    assert (costs.refine_s, costs.align_s, costs.global_s) == (3 * layers, 0.5 * layers, 4)
    assert costs.forward_s == costs.global_start_s == 0
    after = dict(latent.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert all(
        after[n].data_ptr() == pointer and torch.equal(after[n], t) for n, (pointer, t) in before.items()
    )
    monkeypatch.setattr(step_costs, "_put_back", lambda model: nullcontext())
    measure_step_costs(model, latent, statistics, resolve_choices(), seed=0, dtype="float32", clock=clock)
    changed = [n for n, tensor in latent.named_parameters() if not torch.equal(tensor, before[n][1])]
    assert changed, "the steps that were taken do change it"


def test_the_divergence_is_the_one_that_the_global_pass_begins_with():
    model, latent, statistics = converted("llama")
    found = held_out_divergence(full_width(model), latent, statistics, dtype="float32")
    measured = tuned(model, latent, statistics)
    assert found == pytest.approx(measured["before"], rel=1e-5)
    assert held_out_divergence(full_width(model), latent, statistics, dtype="float32") == pytest.approx(
        measured["after"], rel=1e-5
    )
    assert measured["after"] < measured["before"]


def convert(place, out, **options):
    given = {"data": place / "text.txt", "device": "cpu", "overrides": QUICK, "eval_tokens": 320, "kv": 0.5}
    return convert_checkpoint(place / "model", out, **{**given, **options})


def test_convert_takes_the_steps_that_fit_and_its_recipe_repeats_it(place, tmp_path, clock):
    record = convert(place, tmp_path / "out", minutes=2)
    told = record["minutes"]
    assert told["asked"] == 2 and told["spent"] == 0 and "33%" in told["why"]
    rows = {row["step"]: row for row in told["steps"]}
    assert list(rows) == [
        "foresee the time", "calibration", "widths", "closed form", "measure the speed", "alignment and refit",
        "global pass",
    ]  # fmt: skip
    aligned, tuned = rows["alignment and refit"], rows["global pass"]
    assert aligned["steps"] == 25 and 0 < tuned["steps"] <= 64
    assert aligned["after"] < aligned["before"]
    assert tuned["before"] == pytest.approx(aligned["after"], rel=1e-5) and tuned["after"] <= tuned["before"]
    recipe = Recipe.load(tmp_path / "out" / "recipe.yaml")
    assert (recipe.conversion.align, recipe.conversion.global_steps) == (25, tuned["steps"])
    assert record["plan"]["choices"]["align"] == 25 and "minutes" not in record["plan"]
    assert record["plan"]["choices"]["global_steps"] == tuned["steps"]
    assert "why" not in record["conversion"] and "--minutes 2" in record["command"]
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == record
    again = convert(place, tmp_path / "again", overrides=(), recipe=tmp_path / "out" / "recipe.yaml")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again["calibration"]["recall_blocks"] == record["calibration"]["recall_blocks"]
    assert "minutes" not in again


def test_steps_on_all_layers_follow_the_clock_once_more(place, tmp_path, clock, monkeypatch):
    """Alignment that took longer than was thought leaves less, and one that stopped early more."""
    tune = timed_conversion.tune_on_text

    def slow(model, latent, statistics, choices, **options):
        clock.now += 60 if choices.align else 0
        return tune(model, latent, statistics, choices, **options)

    monkeypatch.setattr(timed_conversion, "tune_on_text", slow)
    record = convert(place, tmp_path / "out", minutes=2)
    rows = {row["step"]: row for row in record["minutes"]["steps"]}
    assert rows["alignment and refit"]["minutes"] == 1
    left = 120 * 0.98 - 0.001 * 2 * (320 + minutes.MOST_TOKENS) - 60
    assert rows["global pass"]["steps"] == math.floor((left - 5) / 2)
    assert record["minutes"]["spent"] == 1


@pytest.mark.parametrize("when", ["load", "calibrate", "measure narrow sides", "split"])
def test_too_few_minutes_end_in_one_sentence_and_nothing_is_written(
    place, tmp_path, clock, monkeypatch, when
):
    """Also where nothing of it was foreseen."""

    def pass_time(step, done, total, note):
        if step == when:
            clock.now += 30

    set_costs(monkeypatch, foreseen=NOTHING)
    asked = 0.4 if when == "split" else 0.6
    with pytest.raises(
        ValueError, match=r"^--minutes has to be enough for .*, which take at least [0-9.]+ on"
    ) as error:
        convert(place, tmp_path / "out", minutes=asked, progress=pass_time)
    sentence = str(error.value)
    assert f"got {asked}" in sentence and "; try --minutes " in sentence and "\n" not in sentence
    least, tried = (
        float(sentence.partition(before)[2].split()[0].strip(","))
        for before in ("at least ", "try --minutes ")
    )
    assert asked < least < tried
    assert list(tmp_path.iterdir()) == []


def told_until_refused(run):
    """The steps that were told of, and the sentence."""
    told = []
    with pytest.raises(
        TooFewMinutes, match=r"^--minutes has to be enough for .*, which take about "
    ) as error:
        run(lambda step, done, total, note: told.append((step, done)))
    return told, str(error.value)


@pytest.mark.parametrize("source", ["text", "statistics"])
def test_what_is_foreseen_refuses_before_anything_long(place, tmp_path, clock, source):
    given = {}
    if source == "statistics":
        file = tmp_path / "seen.safetensors"
        calibrate_checkpoint(place / "model", place / "text.txt", file, device="cpu", overrides=QUICK)
        given = {"data": None, "eval_data": place / "text.txt", "statistics": file}
    # A step takes 17; two models are measured on 320 tokens and their recall, six with a narrow side on two blocks.
    tokens = 2 * (320 + minutes.MOST_TOKENS) + 6 * 2 * 32 + (2 * 34 * 32 if source == "text" else 0)
    expected = 17 + 0.001 * tokens
    out = tmp_path / "out"
    told, sentence = told_until_refused(
        lambda tell: convert(place, out, minutes=0.85 * expected / 60, progress=tell, **given)
    )
    assert [step for step, _ in told] == ["load", "foresee the time"] and not out.exists()
    least = float(sentence.partition("which take about ")[2].split()[0])
    assert least == pytest.approx(expected / 60, abs=0.01)
    assert f"; try --minutes {minutes._rounded_up(2 * expected / 60):g}" in sentence


@pytest.mark.parametrize(("when", "most"), [("calibrate", 30), ("measure narrow sides", 6)])
def test_a_step_whose_pace_leaves_no_time_is_ended_early(place, tmp_path, clock, monkeypatch, when, most):
    monkeypatch.setattr("kvlatent.selection.calibrate.blocks_at_once", lambda *given: 4)

    def pass_time(step, done, total, note):
        told.append((step, done))
        clock.now += 20 * (step == when and done > 0)

    told = []
    with pytest.raises(
        TooFewMinutes, match=r"which take about [0-9.]+ on this machine: got 2; try --minutes "
    ):
        convert(place, tmp_path / "out", minutes=2, progress=pass_time)
    done = [done for step, done in told if step == when]
    assert 0 < done[-1] < most and told[-1][0] == when and list(tmp_path.iterdir()) == []


def test_what_is_foreseen_is_less_than_what_is_measured():
    model, latent, statistics = converted("llama")
    choices, given = resolve_choices(), {"seed": 0, "dtype": "float32", "clock": time.process_time}
    step_costs.forward_seconds(model, statistics, "float32", time.process_time)
    foreseen = step_costs.foresee_step_costs(
        model, latent, step_costs._first_blocks(statistics, 5), choices, blocks=34, **given
    )
    measured = measure_step_costs(model, latent, statistics, choices, **given)
    for name in ("refine_s", "align_s", "global_start_s", "global_s", "forward_s"):
        assert 0 < getattr(foreseen, name) < 3 * getattr(measured, name), name


def test_enough_is_what_the_sentence_says(place, tmp_path, clock):
    with pytest.raises(ValueError, match="which take about") as error:
        convert(place, tmp_path / "out", minutes=0.1)
    tried = float(str(error.value).partition("try --minutes ")[2].split(",")[0])
    assert convert(place, tmp_path / "out", minutes=tried)["minutes"]["asked"] == tried


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"minutes": 0}, "--minutes must be a positive number: got 0; try 15"),
        ({"minutes": -1.5}, "got -1.5"),
        ({"minutes": math.nan}, "got nan"),
        ({"minutes": math.inf}, "got inf"),
        ({"minutes": 5, "tokens": 100}, "got --minutes 5 and --tokens 100; leave out"),
        ({"minutes": 5, "align": 0}, "--align 0"),
        ({"minutes": 5, "global_steps": 7}, "--global-steps 7"),
        ({"minutes": 5, "overrides": ["stage2.tokens=9"]}, "--set stage2.tokens=9"),
        ({"minutes": 5, "overrides": ["stage1.tokens=9"]}, "--set stage1.tokens=9"),
        ({"minutes": 5, "overrides": ["seed=1", " conversion.align = 9"]}, "conversion.align = 9"),
        ({"minutes": 5, "overrides": ["conversion.global_steps=9"]}, "conversion.global_steps=9"),
    ],
)
def test_what_minutes_decide_is_not_given_beside_them(place, tmp_path, options, sentence):
    with pytest.raises(ValueError, match=r"--minutes ") as error:
        check_minutes(options)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    for run in (convert_checkpoint, compress):
        with pytest.raises(ValueError) as raised:
            run(place / "model", out=tmp_path / "out", data=place / "text.txt", device="cpu", **options)
        assert str(raised.value) == str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_minutes_need_steps_that_learn(place, tmp_path):
    for options, reason in (
        ({"data": None}, "no text"),
        ({"preset": "paper"}, "preset paper"),
        ({"kv": 1}, "the full width"),
    ):
        with pytest.raises(
            ValueError, match=rf"steps that learn from a text.*\(got {reason}\); leave it out, or"
        ):
            convert(place, tmp_path / "out", minutes=5, **options)
    for stages in ("1", "both"):
        with pytest.raises(
            ValueError, match=rf"--minutes leaves stage 1 out.*got --stages {stages}; leave it out"
        ):
            compress(
                place / "model", place / "text.txt", tmp_path / "out", minutes=5, stages=stages, device="cpu"
            )
    assert list(tmp_path.iterdir()) == []


def test_the_text_asks_for_recall_whatever_a_recipe_says_of_steps(place):
    """They are open: a rerun, whose recipe names some, draws the same blocks."""
    recipe = Recipe.load(None, ["conversion.align=0", "conversion.global_steps=0", *QUICK])
    given = {"recipe": recipe, "device": "cpu", "stages": "none"}
    assert plan_run(place / "model", minutes=5, **given).choices.learns_from_text
    assert not plan_run(place / "model", **given).choices.learns_from_text
    paper = plan_run(place / "model", minutes=5, preset="paper", **{**given, "stages": None})
    assert not paper.calibrates and paper.choices.align == 0 and paper.stages == (2,)


def test_a_budget_counts_the_calls_that_it_continues():
    clock = Clock()
    budget = Budget(10, clock)
    clock.now += 60
    assert (budget.spent_s, budget.left_s) == (60, pytest.approx(600 * 0.98 - 60))
    budget.resume_at(200)
    assert budget.spent_s == 200
    budget.resume_at(100)  # less than this call has counted already
    assert budget.spent_s == 200


def test_the_command_line_takes_minutes(place, tmp_path):
    words = (
        "convert",
        place / "model",
        "--data",
        place / "text.txt",
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
    )
    planned = call(*words, "--minutes", 5, "--dry-run")
    assert "time: 5 minutes on cpu" in planned.stdout and "steps by the time that is left" in planned.stdout
    refused = call(*words, "--minutes", 5, "--align", 7)
    assert refused.exit_code == 2 and "got --minutes 5 and --align 7" in refused.stderr
    assert list(tmp_path.iterdir()) == []
