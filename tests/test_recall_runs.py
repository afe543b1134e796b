"""Which runs calibrate on recall blocks, which do without and say so, and what their records count."""

import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from corpora import flat
from kvlatent.checkpoints.load import load_model
from kvlatent.jobs.recipe import Recipe
from kvlatent.selection.calibrate import calibrate
from kvlatent.selection.choices import resolve_choices
from kvlatent.selection.statistics import Statistics
from kvlatent.text.parts import calibration_blocks, recall_share
from kvlatent.text.recall_blocks import (
    replace_by_recall,
    why_no_recall,
)
from kvlatent.workflows.calibrate_and_plan import calibrate_checkpoint, plan_checkpoint
from kvlatent.workflows.compress_checkpoint import compress
from kvlatent.workflows.convert_checkpoint import convert_checkpoint
from kvlatent_cli.main import app
from kvlatent_lab.study.grid_cells import Cell
from kvlatent_lab.study.measure_cell import name_text
from numbered_text import numbered, rows_of
from on_disk import snapshot, write_checkpoint, write_text


def recipe(*overrides: str) -> Recipe:
    return Recipe.load(None, ["calibration.blocks=8", *overrides])


def test_only_a_conversion_that_learns_from_the_text_asks_for_recall(tiny_tokenizer):
    assert resolve_choices("calibrated").learns_from_text
    for other in (resolve_choices("calibrated", align=0), resolve_choices("paper")):
        assert not other.learns_from_text
    text = rows_of(numbered(40))
    plain = calibration_blocks(text, recipe(), tiny_tokenizer, learns=False)
    assert "is_recall" not in plain.column_names
    mix = calibration_blocks(text, recipe(), tiny_tokenizer, learns=True)[:]
    natural = ~mix["is_recall"].bool()
    assert natural.sum() == 8 - 3 and torch.equal(mix["input_ids"][natural], plain[:]["input_ids"][natural])
    none = calibration_blocks(text, recipe("calibration.recall=0"), tiny_tokenizer, learns=True)
    assert none[:].keys() == plain[:].keys() and flat(none) == flat(plain)
    half = calibration_blocks(text, recipe("calibration.recall=.5"), tiny_tokenizer, learns=True)
    assert half[:]["is_recall"].sum() == 5


def test_a_share_that_is_left_open_gives_way_and_one_that_is_named_does_not(tiny_tokenizer):
    short = rows_of(numbered(8, 128))
    assert calibration_blocks(short, recipe(), tiny_tokenizer, learns=True) is short
    assert recall_share(short, recipe(), learns=True) == 0
    assert recall_share(short, recipe("calibration.recall=.25"), learns=False) == 0
    with pytest.raises(ValueError, match="at least 192 tokens: got blocks of 128"):
        calibration_blocks(short, recipe("calibration.recall=.25"), tiny_tokenizer, learns=True)
    assert why_no_recall(128, 512, 0.25) is None
    assert why_no_recall(3, 512, 0.25) and why_no_recall(128, 191, 0.25)
    for wrong in ("1", "-.1"):
        with pytest.raises(ValueError, match=r"recipe key calibration\.recall: input should be"):
            recipe(f"calibration.recall={wrong}")


SETTINGS = ("data.block_size=192", "calibration.blocks=8", "conversion.align=2", "data.held_out=0.1")
QUICK = {"overrides": SETTINGS, "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    """A model with a context of 256, another with one of 64, and a text."""
    folder = tmp_path_factory.mktemp("recall")
    write_checkpoint(folder / "model", tiny_tokenizer, max_position_embeddings=256)
    write_checkpoint(folder / "short", tiny_tokenizer, max_position_embeddings=64)
    write_text(folder / "text.txt", 200)
    return folder


def test_records_count_the_recall_blocks_and_statistics_remember_them(place, tmp_path):
    record = convert_checkpoint(
        place / "model", tmp_path / "a", data=place / "text.txt", eval_tokens=384, **QUICK
    )
    figures = json.loads((tmp_path / "a" / "run.json").read_text())["calibration"]
    assert (figures["blocks"], figures["recall_blocks"]) == (8, 3) and "no_recall" not in figures
    assert (
        record["calibration"] == figures
        and Recipe.load(tmp_path / "a" / "recipe.yaml").calibration.recall is None
    )
    assert load_model(tmp_path / "a").config.kv_latent
    without = convert_checkpoint(
        place / "model", tmp_path / "b", data=place / "text.txt", eval_tokens=384, **QUICK, align=0
    )
    assert without["calibration"]["recall_blocks"] == 0 and "no_recall" not in without["calibration"]

    made = calibrate_checkpoint(
        place / "model", place / "text.txt", tmp_path / "s.safetensors", **QUICK, align=0
    )
    assert made["recall_blocks"] == 3  # whatever converts with them later
    statistics = Statistics.load(tmp_path / "s.safetensors")
    assert statistics.recall_blocks == 3
    whole = torch.arange(192, dtype=torch.int32)
    assert sum(torch.equal(row, whole) for row in statistics.position_ids) >= 3
    by_file = convert_checkpoint(
        place / "model", tmp_path / "c", statistics=tmp_path / "s.safetensors", **QUICK
    )
    assert by_file["calibration"]["recall_blocks"] == 3
    planned = plan_checkpoint(place / "model", data=place / "text.txt", **QUICK)
    assert planned["calibration"]["recall_blocks"] == 3


def test_compress_asks_for_recall_too(place, tmp_path):
    record = compress(
        place / "model", place / "text.txt", tmp_path / "out", stages="none", eval_tokens=384, **QUICK
    )
    assert record["calibration"]["recall_blocks"] == 3


def test_a_short_context_converts_without_and_says_so_or_refuses(place, tmp_path):
    asked = {"data": place / "text.txt", "eval_tokens": 128}
    record = convert_checkpoint(place / "short", tmp_path / "a", **asked, **QUICK)
    assert record["calibration"]["recall_blocks"] == 0
    assert record["calibration"]["no_recall"] == "a recall block takes at least 192 tokens: got blocks of 64"
    before = snapshot(place)
    named = {**QUICK, "overrides": (*SETTINGS, "calibration.recall=0.25")}
    with pytest.raises(ValueError, match=r"got blocks of 64; give longer .* or set calibration.recall=0"):
        convert_checkpoint(place / "short", tmp_path / "b", **asked, **named)
    with pytest.raises(ValueError, match=r"got blocks of 64; give longer .* or set calibration.recall=0"):
        calibrate_checkpoint(place / "short", place / "text.txt", tmp_path / "b.safetensors", **named)
    assert snapshot(place) == before and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_console_says_how_many_ask_for_recall_and_why_none_does(place, tmp_path):
    shared = ["--data", str(place / "text.txt"), *(f"--set={setting}" for setting in SETTINGS)]
    lines = {
        "model": "3 of 8 blocks were made to ask for recall",
        "short": "no block asks for recall: a recall block takes at least 192 tokens: got blocks of 64",
    }
    for name, line in lines.items():
        done = CliRunner().invoke(app, ["convert", str(place / name), "--out", str(tmp_path / name), *shared])
        assert done.exit_code == 0, done.stderr
        assert line in " ".join(done.stdout.split())
    named = [*shared, "--set", "calibration.recall=.5", "--out", str(tmp_path / "s.safetensors")]
    done = CliRunner().invoke(app, ["calibrate", str(place / "short"), *named])
    assert done.exit_code != 0 and "or set calibration.recall=0" in " ".join(done.stderr.split())
    done = CliRunner().invoke(app, ["calibrate", str(place / "model"), *named, "--json"])
    assert json.loads(done.stdout)["recall_blocks"] == 5
    assert "calibration.recall=0" in CliRunner().invoke(app, ["calibrate", "--help"]).stdout


def test_cells_of_a_study_share_statistics_of_one_text_only():
    subject = SimpleNamespace(recipe=recipe("conversion.align=2"), train_blocks=rows_of(numbered(40)))
    cells = (
        Cell("aligned", 8, 8),
        Cell("statistics-only", 8, 8, choices={"align": 0}),
        Cell("without", 8, 8, recipe={"calibration.recall": 0}),
        Cell("half", 8, 8, recipe={"calibration.recall": 0.5}),
        Cell("few", 8, 8, recipe={"calibration.blocks": 2}),
    )
    names = [name_text(subject, cell) for cell in cells]
    assert names == ["seed0-recall0.25", "seed0", "seed0", "seed0-recall0.5", "seed0-blocks2"]


def test_python_users_mix_them_in_themselves(place, tiny_tokenizer):
    model = load_model(place / "model")
    text = torch.randint(3, 300, (8, 192), generator=torch.Generator().manual_seed(0))
    blocks = replace_by_recall(rows_of(text), tiny_tokenizer, share=0.5)
    assert calibrate(model, blocks).recall_blocks == 5
    assert calibrate(model, rows_of(text)).recall_blocks == 0
    assert calibrate(model, {k: v for k, v in blocks[:].items() if k != "is_recall"}).recall_blocks == 0
