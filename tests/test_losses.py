"""A result that held-out text says users would not want: one sentence with both numbers and steps that exist."""

import json
import warnings
from functools import partial

import pytest

from kvlatent.jobs.work_directory import WorkDirectory
from kvlatent.selection.choices import BLIND, NO_DATA
from kvlatent.text.standard_library import MODEL_PATH, stdlib_documents
from kvlatent.workflows import losses
from kvlatent.workflows.compress_checkpoint import compress
from kvlatent.workflows.convert_checkpoint import convert_checkpoint
from kvlatent.workflows.losses import HEALING, judge_losses
from kvlatent.workflows.run_plan import plan_run
from on_disk import SETTINGS, write_checkpoint, write_text
from test_cli import call

QUICK = [*SETTINGS[1:], "calibration.rows=8", "calibration.blocks=4", "conversion.align=0"]
UNSEEING = [
    f"conversion.{key}" for key in ("keys=weights", "values=svd", "gains=false", "refit=false", "align=0")
]
SOME = "on held-out text a user would miss something"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    """model (its context holds the nearest string), brief (its context does not), text.txt."""
    folder = tmp_path_factory.mktemp("losses")
    write_checkpoint(folder / "model", tiny_tokenizer, max_position_embeddings=256)
    write_checkpoint(folder / "brief", tiny_tokenizer)
    write_checkpoint(folder / "wide", tiny_tokenizer, head_dim=64)
    write_text(folder / "text.txt")
    return folder


def judged(model, ratio=None, kept=None, command="convert", has_text=True, **options):
    """The sentences on a result with these figures, of a plan with these options."""
    if command == "convert":
        options |= {"stages": "none"}
    replan = partial(plan_run, model, has_text=has_text)
    options = {"device": "cpu", **options}
    latent = {} if ratio is None else {"ratio": ratio}
    latent |= {} if kept == "unknown" else {"recall": {"copied": 0.5, "kept": kept}}
    return judge_losses(command, {"latent": latent}, replan(**options), options, replan)


@pytest.mark.parametrize(
    ("ratio", "kept", "warned"),
    [
        (1.0999, 0.9, False), (1.1, 0.9, True), (1.0999, 0.8999, True), (2.0, 0.1, True), (0.99, 1.2, False),
        (1.0, None, False), (1.5, None, True), (1.0, "unknown", False), (1.5, "unknown", True),
    ],
)  # fmt: skip
def test_perplexity_and_recall_are_held_against_their_limits(place, ratio, kept, warned):
    found = judged(place / "model", ratio, kept)
    assert len(found) == warned
    for sentence in found:
        assert f"{SOME}: perplexity is x{ratio:.3f} the original's (x1.1 and more is much)" in sentence
        known = isinstance(kept, float)
        assert ("recall" in sentence) == known
        assert not known or f"{kept:.3f} of its recall is left (under 0.9 is little)" in sentence
        assert "\n" not in sentence and sentence.endswith(HEALING)


def test_what_nobody_measured_or_looked_at_is_not_warned_of_again(place):
    assert judged(place / "model") == []
    replan = partial(plan_run, place / "model", has_text=False)
    assert judge_losses("convert", {}, replan(stages="none"), {"stages": "none"}, replan) == []
    for preset, note in (("calibrated", NO_DATA), ("own-frequency", BLIND), ("paper", BLIND)):
        assert replan(preset=preset, stages="none").notes[0] == note
        assert judged(place / "model", 600.0, 0.0, has_text=False, preset=preset) == []


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, "--kv 0.625 or --per-layer"),
        ({"kv": 0.25}, "--kv 0.375 or --per-layer"),
        ({"kv": 0.46}, "--kv 0.625 or --per-layer"),
        ({"kv": 0.875}, "--per-layer"),
        ({"per_layer": True}, "--kv 0.625"),
        ({"table": "model"}, "--kv 0.625 or --table head"),
        ({"table": "layer"}, "--kv 0.625, --per-layer or --table head"),
        ({"d_qk": 32, "d_vo": 32}, "--kv 0.625 instead of --d-qk and --d-vo"),
        ({"d_qk": 32, "table": "model"}, "--kv 0.875 instead of --d-qk and --d-vo or --table head"),
        ({"engine": "mlx"}, "--kv 0.625"),
        ({"engine": "vllm"}, "--kv 0.625, --per-layer or --table head"),
        ({"preset": "paper"}, "--preset calibrated"),
        ({"preset": "own-frequency"}, "--preset calibrated"),
        ({"preset": "own-frequency", "overrides": UNSEEING}, "--kv 0.625"),
    ],
)
def test_the_next_steps_exist(place, options, steps):
    (sentence,) = judged(place / "wide", 2.0, 0.5, **options)
    assert sentence.endswith(f"; try `kvlatent convert` with {steps}, or {HEALING}")


def test_where_nothing_else_can_be_done_it_is_trained(place):
    (sentence,) = judged(place / "wide", 2.0, 0.5, kv=0.875, per_layer=True)
    assert sentence.endswith(f"; {HEALING}") and "try" not in sentence


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"stages": "none"}, "--kv 0.625, --per-layer or --minutes 60 instead of --stages"),
        ({"stages": "1"}, "--kv 0.625, --per-layer or --minutes 60 instead of --stages"),
        ({"stages": "both"}, "--kv 0.625, --per-layer or --minutes 60"),
        ({}, "--kv 0.625, --per-layer or --minutes 60"),
        ({"tokens": 1000}, "--kv 0.625, --per-layer or --minutes 60 instead of --tokens"),
        ({"tokens": 1000, "preset": "paper"}, "--preset calibrated or --minutes 60 instead of --tokens"),
        ({"minutes": 45}, "--kv 0.625, --per-layer or --minutes 90"),
        ({"minutes": 45, "stages": "none"}, "--kv 0.625, --per-layer or --minutes 90 without --stages"),
        ({"tokens": 1000, "align": 9}, "--kv 0.625, --per-layer or --tokens 2000"),
        ({"align": 9, "stages": "none"}, "--kv 0.625, --per-layer or --stages both"),
    ],
)
def test_a_run_that_trains_can_train_more(place, options, steps):
    (sentence,) = judged(place / "wide", 2.0, 0.5, "compress", **options)
    assert sentence.endswith(f"; try `kvlatent compress` with {steps}")


def test_every_proposed_budget_is_more_than_was_kept(place):
    options = {"preset": "own-frequency", "overrides": ["conversion.keys=weights"], "device": "cpu"}
    kept = plan_run(place / "model", stages="none", **options)
    (sentence,) = judged(place / "model", 2.0, 0.5, **options)
    # 10 of 16 channels are no multiple of 4, so an even split of 0.625 would keep no more than half
    assert kept.widths == (8, 8) and "--kv 0.75" in sentence


def fake_recall(monkeypatch, *copied):
    """Every model measured recalls the next of these shares."""
    shares = iter(copied)

    def measure(*_, **__):
        share = next(shares)
        return {"copied": share, "distances": [50], "trials": 2, "hits": [round(14 * share)] * 2}

    monkeypatch.setattr("kvlatent.workflows.steps.measure_recall", measure)


def convert(place, out, *words):
    settings = [word for setting in QUICK for word in ("--set", setting)]
    return call("convert", place / "model", "--data", place / "text.txt", "--out", out, *settings, "--device", "cpu", *words)  # fmt: skip


def test_record_card_and_console_say_it(place, tmp_path, monkeypatch):
    fake_recall(monkeypatch, 0.5, 1.0)  # the latent model first
    done = convert(place, tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    record, card = (
        json.loads((tmp_path / "out" / "run.json").read_text()),
        (tmp_path / "out" / "README.md").read_text(),
    )
    (sentence,) = record["warnings"]
    ratio = record["figures"]["latent"]["ratio"]
    assert f"x{ratio:.3f} the original's" in sentence and "and 0.500 of its recall is left" in sentence
    assert done.stderr.count(sentence) == 1 and f"warning: {sentence}\n" in done.stderr
    assert SOME not in done.stdout and f"**Warning:** {sentence}." in card
    recall = record["figures"]["latent"]["recall"]
    assert (recall["copied"], recall["kept"], recall["kept_standard_error"]) == (0.5, 0.5, 0)
    assert record["figures"]["original"]["recall"]["copied"] == 1.0
    for text in (done.stdout, card):
        assert "recall (kept)" in text and "0.500 (0.500 ± 0.000)" in text and "1.000" in text
    assert "repeats, 50 tokens back" in card.replace("\n", " ")


def test_what_holds_is_not_warned_of(place, tmp_path, monkeypatch):
    fake_recall(monkeypatch, 0.95, 1.0)
    monkeypatch.setattr(losses, "MOST_RATIO", 100.0)
    done = convert(place, tmp_path / "out")
    assert done.exit_code == 0 and "warning" not in done.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["warnings"] == []
    assert "Warning" not in (tmp_path / "out" / "README.md").read_text()


def test_an_original_that_recalls_nothing_is_recorded_and_not_warned_of(place, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "MOST_RATIO", 100.0)
    done = convert(place, tmp_path / "out")  # random weights
    figures = json.loads((tmp_path / "out" / "run.json").read_text())["figures"]
    assert figures["original"]["recall"]["copied"] < 0.1 and figures["original"]["recall"]["distances"] == [
        50
    ]
    assert figures["latent"]["recall"]["kept"] is None and "warning" not in done.stderr
    assert "recall" in done.stdout


def test_a_context_too_short_for_a_string_leaves_recall_out(place, tmp_path):
    record = convert_checkpoint(
        place / "brief", tmp_path / "out", data=place / "text.txt", overrides=QUICK, device="cpu"
    )
    assert all("recall" not in row for row in record["figures"].values())
    assert "recall" not in (tmp_path / "out" / "README.md").read_text().partition("**Warning")[0]


def test_from_python_it_is_a_warning_at_the_line_of_the_call(place, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "MOST_RATIO", 0.5)
    given = {"overrides": QUICK, "device": "cpu"}
    for number, run in enumerate((convert_checkpoint, compress)):
        out = tmp_path / str(number)
        options = given | ({"stages": "none"} if run is compress else {})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            record = run(place / "model", data=place / "text.txt", out=out, **options)
        (sentence,) = record["warnings"]
        assert [(str(each.message), each.filename) for each in caught] == [(sentence, __file__)]
        assert json.loads((out / "run.json").read_text())["warnings"] == [sentence]


def test_a_finished_run_that_is_called_again_says_it_again(place, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "MOST_RATIO", 0.5)
    given = {"overrides": QUICK, "device": "cpu", "stages": "none"}
    with monkeypatch.context() as killed:
        killed.setattr(WorkDirectory, "remove", lambda _: None)  # as if killed after the rename
        first = compress(place / "model", place / "text.txt", tmp_path / "out", **given)
    with pytest.warns(UserWarning, match=SOME) as caught:
        assert compress(place / "model", place / "text.txt", tmp_path / "out", **given) == first
    assert [(str(each.message), each.filename) for each in caught] == [(first["warnings"][0], __file__)]
    assert not (tmp_path / "out.partial").exists()


def test_of_a_trained_result_the_final_figures_count(place, tmp_path, monkeypatch):
    fake_recall(monkeypatch, 1.0, 0.5)  # the original first; what is not final is not measured
    record = compress(
        place / "model", place / "text.txt", tmp_path / "out", overrides=SETTINGS, tokens=1024, device="cpu"
    )
    (sentence,) = record["warnings"]
    figures = record["figures"]
    assert f"x{figures['latent']['ratio']:.3f} the original's" in sentence
    assert "0.500 of its recall" in sentence and "--tokens 2048" in sentence
    assert "recall" not in figures["converted"] and "recall" not in figures["stage1"]
    assert figures["latent"]["recall"]["kept"] == 0.5


def test_the_embedded_model_is_warned_of_where_it_forgets(tmp_path):
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in stdlib_documents("train")[:8])
    )
    given = {"overrides": ["calibration.blocks=4"], "align": 0, "device": "cpu", "eval_tokens": 4096}
    narrow = convert_checkpoint(MODEL_PATH, tmp_path / "a", data=tmp_path / "text.jsonl", kv=0.25, table="model", **given)  # fmt: skip
    recall = narrow["figures"]["latent"]["recall"]
    assert recall["kept"] < 0.5 and narrow["figures"]["original"]["recall"]["copied"] > 0.8
    assert len(narrow["warnings"]) == 1 and "--table head" in narrow["warnings"][0]
