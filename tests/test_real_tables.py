"""The baseline tables end to end on a tiny checkpoint: rows, columns, sharing, and the markdown."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvlatent.checkpoints.load import load_model
from kvlatent.evaluation.perplexity import perplexity
from kvlatent.evaluation.speed.caches import make_cache
from kvlatent.jobs.recipe import Recipe
from kvlatent.planning.predicted_errors import MEASURED, PREDICTED
from kvlatent.planning.width_plan import plan as plan_widths
from kvlatent_lab.baseline.baseline_run import pick_rows
from kvlatent_lab.baseline.cache_reading import document_mask, read_through_cache
from kvlatent_lab.baseline.question_files import write_tasks
from kvlatent_lab.baseline.table_rows import QUANTISED, SHARES, Steps, table_rows
from kvlatent_lab.study.grid_cells import choices_of, recipe_of
from kvlatent_lab.study.measure_cell import collect_cell_statistics, name_text
from on_disk import write_checkpoint, write_text

pytest.importorskip("lm_eval")

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = ("--blocks", 4, "--block-size", 64, "--questions", 6, "--needle-tokens", 512, "--order-trials", 2)
MADE = ("--calibration-blocks", 8, "--calibration-block-size", 32, "--pilot-tokens", 256)
STEPS = ("--align", 1, "--global-steps", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer) -> Path:
    """A checkpoint, texts and question sets."""
    folder = tmp_path_factory.mktemp("tables")
    write_checkpoint(folder / "model", tiny_tokenizer, max_position_embeddings=512)
    (folder / "texts").mkdir()
    (folder / "tasks").mkdir()
    for seed, name in enumerate(("fineweb_train", "fineweb_valid")):
        text = write_text(folder / "text.txt", 400, seed).read_text().split("<|endoftext|>")
        lines = [json.dumps({"text": document}) + "\n" for document in text]
        (folder / "texts" / f"{name}.jsonl").write_text("".join(lines))
    write_text(folder / "texts" / "tinystories_valid.txt", 100, 3)
    questions = [
        {"id": i, "query": f"Question: is {i} even?\nAnswer:", "choices": [" yes", " no"], "label": i % 2}
        for i in range(8)
    ]
    (folder / "tasks" / "arc_easy_test.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return folder


@pytest.fixture
def call(place, monkeypatch, capsys):
    """Run the script in this process; its standard output."""

    def run(*words, out=place / "out"):
        monkeypatch.syspath_prepend(str(FOLDER))
        given = ("--model", place / "model", "--texts", place / "texts", "--tasks", place / "tasks")
        given += ("--out", out, "--work", place / "work", *SMALL, *MADE, *STEPS)
        monkeypatch.setattr(sys, "argv", ["real_tables", *map(str, (*given, *words))])
        importlib.import_module("real_tables").main()
        return capsys.readouterr().out

    return run


def row(place, name):
    return json.loads((place / "out" / f"{name}.json").read_text())


def test_rows_are_measured_once_completed_later_and_rendered(place, call):
    names = ["original", "head-aligned-50", "paper-50"]
    assert call("--only", ",".join(names)).split() == names
    original, aligned = row(place, "original"), row(place, "head-aligned-50")
    assert original["figures"]["text fineweb"]["kl"] == pytest.approx(0, abs=1e-6)
    assert original["figures"]["text fineweb"]["top1_agreement"] == 1
    assert aligned["figures"]["text fineweb"]["kl"] > 1e-3
    assert (
        aligned["figures"]["cache"]["bytes_per_token"] == original["figures"]["cache"]["bytes_per_token"] / 2
    )
    assert len(aligned["figures"]["task arc_easy"]["answers"]["acc"]) == 6
    assert {"calibration", "conversion", "text fineweb", "order"} <= set(aligned["seconds"])
    assert {"commit", "seed", "machine", "versions", "dtype"} <= set(aligned["record"])
    assert str(place) not in json.dumps(aligned)
    assert call("--only", ",".join(names)) == "\n"

    late = [{"text": f"one two three number {i}"} for i in range(6)]
    (place / "tasks" / "lambada.jsonl").write_text("".join(json.dumps(one) + "\n" for one in late))
    assert call("--only", "original").split() == ["original"]
    assert row(place, "original")["figures"]["task lambada"]["samples"] == 6
    assert row(place, "original")["figures"]["order"] == original["figures"]["order"]

    assert call("--render").split() == [str(place / f"out{end}") for end in (".md", ".svg", "_minutes.svg")]
    table = (place / "out.md").read_text()
    assert "| head-aligned-50 | 8/8 |" in table and "(out.svg)" in table and "(out_minutes.svg)" in table
    assert "no file of that name: wikitext." in table and "hellaswag, piqa, openbookqa." in table
    lines = call("--list").splitlines()
    assert lines[0] == "original (done)" and lines[2].strip() == "model-passed-50"


def test_the_new_method_is_measured_beside_the_old(place, call, monkeypatch):
    names = ["head-passed-50", "head-passed-50-kl-0.3M", "head-aligned-50", "original"]
    module = importlib.import_module("kvlatent_lab.baseline.table_rows")
    monkeypatch.setitem(module.TOKENS, "0.3M", 256)
    call("--only", ",".join(names), "--rate", 1e-3, out=place / "new")
    new, trained, old, _ = (json.loads((place / "new" / f"{name}.json").read_text()) for name in names)
    assert (new["settings"]["align"], new["settings"]["global_steps"]) == (1, 1)
    assert "calibration_recall" not in new["settings"]  # the recipe's
    assert {name: old["settings"][name] for name in ("align", "global_steps", "calibration_recall")} == {
        "align": 200, "global_steps": 0, "calibration_recall": 0,
    }  # fmt: skip
    assert new["figures"]["text fineweb"]["loss"] != old["figures"]["text fineweb"]["loss"]
    assert trained["figures"]["training"]["tokens_trained"] >= 256
    for found in (new, old):
        text = found["figures"]["text fineweb"]
        assert sum(text["block_divergences"]) / sum(text["block_tokens"]) == pytest.approx(text["kl"])
        assert sum(text["block_agreed"]) / text["tokens"] == text["top1_agreement"]
    call("--render", out=place / "new")
    table = (place / "new.md").read_text()
    assert "| head 50 | perplexity, fineweb |" in table and "not paired" not in table


def test_widths_a_layer_of_the_new_method_are_measured_end_to_end(place, call, monkeypatch):
    module = importlib.import_module("kvlatent_lab.study.measure_cell")
    units = []

    def plan(*args, **more):
        made = plan_widths(*args, **more)
        units.append(made.unit)
        return made

    monkeypatch.setattr(module, "plan", plan)
    call("--only", "planned-statistics-50,planned-passed-50", out=place / "planned")
    assert sorted(units) == sorted([PREDICTED, MEASURED])
    rows = {name: json.loads((place / "planned" / f"planned-{name}-50.json").read_text()) for name in ("statistics", "passed")}  # fmt: skip
    assert (
        rows["passed"]["settings"]["widths"] == "measured" and "widths" not in rows["statistics"]["settings"]
    )
    for row in rows.values():
        assert "failed" not in row["record"]


def test_rows_of_before_the_new_choices_count_as_finished(place, call):
    """What their files are silent about was no option when they were measured."""
    out = place / "before"
    call("--only", "head-aligned-50", out=out)
    file = out / "head-aligned-50.json"
    found = json.loads(file.read_text())
    found["settings"] = {
        name: value
        for name, value in found["settings"].items()
        if name not in ("align", "global_steps", "calibration_recall")
    }
    file.write_text(json.dumps(found))
    told = json.loads((out / "study.json").read_text())
    del told["decides"]["recipe"]["calibration"]["recall"]
    (out / "study.json").write_text(json.dumps(told))
    assert call("--only", "head-aligned-50", out=out) == "\n"
    found["settings"]["d_qk"] = 4
    file.write_text(json.dumps(found))
    with pytest.raises(
        SystemExit, match=r"head-aligned-50.json is of another d_qk \(4, now 8\); call it with"
    ):
        call("--only", "head-aligned-50", out=out)


def test_rows_of_other_steps_do_not_mix(place, call):
    out = place / "steps"
    call("--only", "original,head-passed-50", out=out)
    (place / "tasks" / "hellaswag.jsonl").write_text((place / "tasks" / "arc_easy_test.jsonl").read_text())
    with pytest.raises(SystemExit, match=r"head-passed-50.json is of another global_steps \(1, now 2\)"):
        call("--only", "original,head-passed-50", "--global-steps", 2, out=out)
    (place / "tasks" / "hellaswag.jsonl").unlink()
    assert "task hellaswag" not in json.loads((out / "original.json").read_text())["figures"]
    for words in (("--global-steps", 0), ("--align", 0), ("--global-steps", -1)):
        with pytest.raises(
            SystemExit, match="1 step of each or more: got --align .* for head-passed-28; give"
        ):
            call("--only", "head-passed-28", *words, out=out)
    assert not (out / "head-passed-28.json").exists()


def test_a_row_that_trains_longer_is_calibrated_on_the_same_blocks(place, call, monkeypatch):
    """More text to train on does not change what the blocks to calibrate on are drawn from, nor what is measured on."""
    run, rows = (
        importlib.import_module(f"kvlatent_lab.baseline.{name}") for name in ("baseline_run", "table_rows")
    )
    trained, calibrated = [], []

    def train(subject, cell, *_):
        held_out = [ids.tolist() for ids in subject.blocks()["input_ids"]]
        trained.append((len(subject.train_blocks), held_out, dict(cell.recipe)))
        raise ValueError("far enough")

    def collect(subject, cell, told):
        calibrated.append([ids.tolist() for ids in subject.train_blocks["input_ids"]])
        return collect_cell_statistics(subject, cell, told)

    for name, value in (("train_cell", train), ("collect_cell_statistics", collect)):
        monkeypatch.setattr(run, name, value)
    for name in ("_POOL_TOKENS", "_CHOOSING_TOKENS"):
        monkeypatch.setattr(run, name, 32)
    monkeypatch.setitem(rows.TOKENS, "0.3M", 32)
    for name in ("head-statistics-50", "head-aligned-50-kl-0.3M", "head-aligned-50-kl-3M"):
        words = ("--only", name, "--rate", 1e-3, "--calibration-blocks", 2, "--work", place / name)
        call(*words, out=place / "longer")
    short, long = trained
    assert long[0] > short[0]
    assert long[1] == short[1]
    assert len(calibrated) == 3 and calibrated[0] == calibrated[1] == calibrated[2]
    assert long[2] == {"calibration.recall": 0.0, "stage2.learning_rate": 1e-3}


def test_training_chooses_its_rate_and_says_so(place, call, monkeypatch):
    module = importlib.import_module("kvlatent_lab.baseline.table_rows")
    monkeypatch.setitem(module.TOKENS, "0.3M", 256)
    assert call("--only", "paper-50-kl-0.3M").split() == ["paper-50-kl-0.3M"]
    found = row(place, "paper-50-kl-0.3M")["figures"]
    assert found["training"]["learning_rate"] in (1e-4, 3e-4, 1e-3)
    assert found["training"]["tokens_trained"] >= 256
    (place / "tasks" / "hellaswag.jsonl").write_text((place / "tasks" / "arc_easy_test.jsonl").read_text())
    monkeypatch.setattr("kvlatent.training.stages._run", lambda *_: pytest.fail("trained anew"))
    assert call("--only", "paper-50-kl-0.3M").split() == ["paper-50-kl-0.3M"]
    later = row(place, "paper-50-kl-0.3M")["figures"]
    assert {"task hellaswag"} == set(later) - set(found)
    (place / "tasks" / "hellaswag.jsonl").unlink()


def test_another_rate_is_another_training_and_the_same_conversion(place, call, monkeypatch):
    module = importlib.import_module("kvlatent_lab.baseline.table_rows")
    monkeypatch.setitem(module.TOKENS, "0.3M", 512)
    names, found = ("original", "paper-50-kl-0.3M"), {}
    for rate in (1e-4, 1e-1):
        out = place / f"rate-{rate}"
        assert call("--only", ",".join(names), "--rate", rate, out=out).split() == list(names)
        found[rate] = json.loads((out / f"{names[1]}.json").read_text())["figures"]
    assert found[1e-4]["text fineweb"] != found[1e-1]["text fineweb"]
    with pytest.raises(SystemExit, match=r"paper-50-kl-0.3M.json is of another rate \(0.1, now 0.01\)"):
        call("--only", ",".join(names), "--rate", 1e-2, out=place / "rate-0.1")
    assert call("--only", "original", "--rate", 1e-2, out=place / "rate-0.1") == "\n"


def test_a_quantised_cache_is_read_by_every_column(place, call, monkeypatch):
    module = importlib.import_module("kvlatent_lab.baseline.table_rows")
    monkeypatch.setitem(module.QUANTISED, "int4", "quantized-fp8")
    call("--only", "original,original-int4")
    whole, quantised = (row(place, name)["figures"] for name in ("original", "original-int4"))
    assert quantised["cache"]["bytes_per_token"] < whole["cache"]["bytes_per_token"]
    assert 0 < quantised["text fineweb"]["kl"] < 1
    assert quantised["order"]["margin"] != whole["order"]["margin"]
    assert quantised["needle 512"]["rank"] != whole["needle 512"]["rank"]


def test_a_cache_without_its_package_waits_for_it(place, call, monkeypatch, capsys):
    def refuse(*_):
        raise ValueError("cache quantized-int8-hqq needs the package hqq")

    monkeypatch.setattr("kvlatent_lab.baseline.baseline_run.check_caches", refuse)
    assert call("--only", "original-int8") == "\n"
    assert not (place / "out" / "original-int8.json").exists()


def test_a_row_that_cannot_be_is_a_result(place, call):
    call("--only", "paper-12.5")
    assert "needs a rotated width divisible by 4: got 2" in row(place, "paper-12.5")["record"]["failed"]
    call("--render")
    assert "`paper-12.5` has no figures" in (place / "out.md").read_text()


def test_other_sizes_do_not_mix(call):
    with pytest.raises(SystemExit, match="error: .* another sizes.questions"):
        call("--only", "original", "--questions", 5)


def test_a_pattern_without_rows():
    with pytest.raises(ValueError, match="matches none of"):
        pick_rows(table_rows(64), "nothing")


def test_a_table_without_finished_rows(call, tmp_path):
    with pytest.raises(
        SystemExit, match="error: .* holds no finished row; run benchmarks/real_tables.py first"
    ):
        call("--render", out=tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "original.json").touch()
    with pytest.raises(
        SystemExit, match="error: .*original.json is damaged, .*; delete it to measure it again"
    ):
        call("--render", out=tmp_path / "out")


def test_the_most_telling_rows_come_first():
    names = [row.name for row in table_rows(64)]
    assert names[:4] == ["original", "head-passed-50", "model-passed-50", "planned-passed-50"]
    assert names[4:9] == ["head-passed-75", "head-passed-28", "head-passed-12.5", "head-passed-50-int8", "head-passed-50-kl-0.3M"]  # fmt: skip
    everything = {f"{s}-passed-{share}{end}" for s in ("head", "model", "planned") for share in SHARES for end in ("", "-kl-0.3M", "-kl-1M", "-kl-3M")}  # fmt: skip
    both = {f"{s}-passed-{share}-{k}" for s in ("head", "model") for share in ("50", "28") for k in QUANTISED}
    assert everything | both <= set(names)
    assert len(names) == len(set(names))
    widths = {row.name: (row.cell.d_qk, row.cell.d_vo) for row in table_rows(64) if row.cell}
    assert widths["head-aligned-28"] == (16, 20)


def test_old_rows_stay_the_old_method_whatever_the_preset_becomes(monkeypatch):
    """And statistics of text that asks for recall lie in another file than those of text that does not."""
    choices = importlib.import_module("kvlatent.selection.choices")
    preset = replace(choices.PRESETS["calibrated"], align=50, global_steps=70)
    monkeypatch.setitem(choices.PRESETS, "calibrated", preset)
    blocks = [{"input_ids": [0] * 512}] * 200
    subject = SimpleNamespace(recipe=Recipe.load(None, ["conversion.align=9"]), train_blocks=blocks)
    found = {}
    for row in table_rows(64, steps=Steps(60, 80)):
        if row.cell is not None and row.cell.preset == "calibrated":
            made = choices_of(row.cell, subject.recipe)
            tuned = row.name.split("-")[1]
            found.setdefault(tuned, set()).add((made.align, made.global_steps, name_text(subject, row.cell)))
            assert recipe_of(row.cell, subject.recipe).seed == 0
    assert found == {
        "aligned": {(200, 0, "seed0")},
        "statistics": {(0, 0, "seed0")},
        "passed": {(60, 80, "seed0-recall0.25")},
    }


def test_questions_that_are_none(tmp_path):
    (tmp_path / "lambada.jsonl").write_text('{"text": "alone"}\n')
    with pytest.raises(
        ValueError, match="a text of two words or more: got \\['text'\\] in lambada.jsonl, line 1"
    ):
        write_tasks(tmp_path, tmp_path / "out", 3)


def test_documents_do_not_see_each_other():
    seen = document_mask(torch.tensor([[0, 1, 0, 1, 2]]))[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_what_is_scored_was_read_from_the_cache(tiny_tokenizer, place, monkeypatch):
    """A cache that gives back what it was given changes nothing; one that gives back nothing else than zeros does."""
    model = load_model(place / "model", dtype="float32")
    positions = torch.cat([torch.arange(30), torch.arange(34)]).expand(2, -1)
    ids = torch.randint(0, 300, (2, 65), generator=torch.Generator().manual_seed(0))
    blocks = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "position_ids": positions}

    class Blocks:
        def __len__(self):
            return 2

        def __getitem__(self, part):
            return {name: column[part] for name, column in blocks.items()}

    whole = perplexity(model, Blocks())
    monkeypatch.setattr(
        "kvlatent_lab.baseline.cache_reading.make_cache",
        lambda kind, config, length: make_cache("dynamic", config, length),
    )
    with read_through_cache(model, "quantized-int4"):
        same = perplexity(model, Blocks())
    assert same.block_losses == pytest.approx(whole.block_losses, rel=1e-5)
    assert perplexity(model, Blocks()) == whole

    def rounded(kind, config, length):
        cache = make_cache("dynamic", config, length)
        for layer in cache.layers:
            update = layer.update
            layer.update = lambda k, v, *rest, update=update, **more: update(
                k.round(), v.round(), *rest, **more
            )
        return cache

    monkeypatch.setattr("kvlatent_lab.baseline.cache_reading.make_cache", rounded)
    with read_through_cache(model, "quantized-int4"):
        assert perplexity(model, Blocks()).loss != pytest.approx(whole.loss, rel=1e-4)
    with read_through_cache(model, "quantized-int4"), pytest.raises(ValueError, match="without padding"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
