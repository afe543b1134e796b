"""What a report reads, what it skips and names, what it refuses; how it writes numbers; and that results are typed once."""

import json
import re
import subprocess
import sys
from itertools import product
from typing import Any

import pandas as pd
import pytest

from kvlatent.evaluation.result_models import Bench, Evaluation
from kvlatent.jobs.record import Result
from kvlatent.workflows.run_record import RunRecord
from kvlatent_lab.report import page as page_module
from kvlatent_lab.report import report
from kvlatent_lab.report.charts import Line, dot_chart, line_chart, points
from kvlatent_lab.report.page_listings import number, plain
from kvlatent_lab.report.study_groups import frontier
from kvlatent_lab.study.study_cell import StudyCell
from report_page import Page
from report_setup import (
    CONFIG,
    LATENT,
    MODEL,
    RESULTS,
    bench,
    comparison,
    conversion,
    evaluation,
    perplexity_alone,
    run,
    study,
    write,
    write_run,
)

OTHER = {"name": "another", "fingerprint": "77" * 32}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "report.html"


def of_train(model, **changes):
    """`run.json` of `kvlatent train`, which names the model it went on from."""
    return run(sha256={"model": model, "teacher": None, "data": "aa"}, **changes)[0]


def of_figures(**latent):
    return evaluation(figures={"latent": latent})


NEEDLE = {"contexts": [8], "depths": [0.5], "exact": [[1], [0]], "rank": [[1]]}
CURVES = {"positions": [0, 1], "latent": [1.0], "original": [1.0, 0.5]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"kind": "evaluation", "model"', "no JSON: Expecting ':' delimiter in line 1"),
        ("[1, 2]", "it holds a list, and a result is an object"),
        ('{"kind": "evaluation", "figures": {"latent": {"perplexity": NaN}}}', "it holds NaN"),
        (
            json.dumps(of_figures(loss="big")).replace('"big"', "1e999"),
            "figures.latent.loss: Input should be a finite number",
        ),
        ("[" * 100_000, "nested too deeply"),
        ({"kind": "card"}, "no result that a report knows: kind 'card'"),
        ({"kind": ["bench"]}, "no result that a report knows"),
        ({"python": "3.11", "rows": {"llama": {}}}, "no result that a report knows"),
        ({"kind": "evaluation", "model": MODEL}, "figures: Field required"),
        (evaluation(model={"latent": {"widths": 3}}), "model.latent: kv_latent in config.json is damaged"),
        (
            evaluation(model={"latent": {**CONFIG.to_dict(), "tables": [[{"short": []}]] * 4}}),
            "a rotary table of latent has 1 frequency or more: got 0",
        ),
        (bench(rows=[]), "rows: List should have at least 1 item"),
        (bench(rows=[{"batch": "one"}]), "rows.0.batch: Input should be a valid integer"),
        (bench(rows=[{**bench()["rows"][0], "decode_ms_per_token": -1}]), "should be greater than 0: got -1"),
        (of_figures(perplexity="low"), "figures.latent.perplexity: Input should be a valid number"),
        (
            of_figures(standard_error=-1.0),
            "standard_error: Input should be greater than or equal to 0: got -1.0",
        ),
        (of_figures(needle=NEEDLE), "figures.latent.needle: exact must have 1 rows of 1: got [1, 1]"),
        (study("rope", "c", {}, {"attenuation": CURVES}), "latent must have 2 numbers: got 1"),
        (study("widths", "c", {}, {"ratio": 0}), "figures.ratio: Input should be greater than 0: got 0"),
        (
            study("widths", "c", {}, {"loss": "high"}),
            "loss must be a finite number, or a list or map of some",
        ),
        (study("widths", "c", {"d_qk": [8]}, {"ratio": 1.5}), "settings.d_qk"),
        (
            conversion(cells={"paper": {"ratio": 1.5, "command": ["python"]}}),
            "command: Input should be a valid string",
        ),
        (
            {"rows": {"original": 3}},
            "rows.original: Input should be a valid dictionary or instance of ConversionVariant: got 3",
        ),
    ],
    ids=lambda one: one if isinstance(one, str) and len(one) < 100 else "",
)
def test_what_cannot_be_used_is_skipped_and_named(tmp_path, out, content, reason):
    write(tmp_path / "results" / "a<b>.json", content)
    write(tmp_path / "results" / "good.json", comparison())
    said = report([tmp_path / "results"], out)
    (skipped,) = said["skipped"]
    assert skipped["file"] == "results/a<b>.json" and reason in skipped["reason"]
    assert "\n" not in skipped["reason"] and "Value error" not in skipped["reason"]
    assert [one["kind"] for one in said["used"]] == ["comparison"]
    page = Page(out.read_text())
    assert f"results/a<b>.json: {skipped['reason']}" in page.text and "1 file could not be used" in page.text


def test_no_setting_or_figure_of_a_cell_stops_the_page(tmp_path, out):
    """Every entry of a cell in turn is something else; its file is used or skipped, and the others are used."""
    figures = {"ratio": 1.5, "ratio_standard_error": 0.1, "tokens": 10, "cache_ratio": 0.5, "perplexity": 3.0}
    settings = {"preset": "paper", "d_qk": 8, "d_vo": 8, "stage1_tokens": 1, "stage2_tokens": 2}
    junk = [None, "x", [], {"a": 1}, -1, 0, 10**140, True, "\x00\ud800\x1b$_{"]
    entries = [("settings", name) for name in settings] + [("figures", name) for name in figures]
    for kind in ("widths", "stages", "rope"):
        for i, ((part, name), value) in enumerate(product(entries, junk)):
            document = study(kind, f"c{i}", {**settings, "other": i % 7}, dict(figures))
            document[part][name] = value
            write(tmp_path / "results" / kind / f"{i}.json", document)
    write(
        tmp_path / "results" / "name.json", study("stages", "\x01\ud800 name", settings, {"perplexity": 2.0})
    )
    said = report([tmp_path / "results"], out)
    assert len(said["used"]) + len(said["skipped"]) == 3 * 10 * len(junk) + 1
    assert "results/name.json" in [one["file"] for one in said["used"]]
    assert len(Page(out.read_text()).listings) > 5


def test_files_that_cannot_be_read(tmp_path, out):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "binary.json").write_bytes(b"\xff\xfe")
    write(tmp_path / "results" / "good.json", comparison())
    write(
        tmp_path / "results" / "m" / "metrics.jsonl", '{"stage": 1, "tokens": 8, "loss": 2.0}\n{"stage": 1,\n'
    )
    write(tmp_path / "results" / "n" / "metrics.jsonl", "")
    skipped = {one["file"]: one["reason"] for one in report([tmp_path / "results"], out)["skipped"]}
    expected = "no JSON: Expecting property name enclosed in double quotes in line 1"
    assert skipped == {
        "results/binary.json": "no text in UTF-8",
        "results/m/metrics.jsonl": f"line 2 of 2: {expected}",
        "results/n/metrics.jsonl": "it holds no steps",
    }


def test_which_files_of_a_folder_are_read(tmp_path, out):
    folder = tmp_path / "results"
    write(folder / "evaluation.json", perplexity_alone())
    write(write_run(folder / "deep" / "checkpoint") / "tokenizer.json", {})
    write(folder / "deep" / "out.partial" / "plan.json", {})
    write(folder / ".hidden" / "bench.json", bench())
    write(folder / "widths" / "study.json", {"kind": "study-folder"})
    write(folder / "widths" / "work" / "original.json", {})
    for name in ("one", "two"):  # a cell counts once
        write(folder / "widths" / f"{name}.json", study("widths", "one", {}, {"ratio": 1.5}))
    (folder / "folder.json").mkdir()
    said = report([folder / "evaluation.json", folder], out)  # one file twice counts once
    assert [one["file"] for one in said["used"]] == [
        "evaluation.json",
        "results/deep/checkpoint/metrics.jsonl",
        "results/deep/checkpoint/run.json",
        "results/widths/one.json",
    ]
    reason = "cell one of study widths was read from results/widths/one.json already"
    assert said["skipped"] == [{"file": "results/widths/two.json", "reason": reason}]


@pytest.mark.parametrize(
    "other",
    [
        bench(model=OTHER, original=None),
        study("widths", "c", {}, {"ratio": 1.5}, model=OTHER),
        evaluation(original=OTHER),
        evaluation(original=None),  # of the latent model alone: nobody knows what it came from
        conversion(sha256={"model": OTHER["fingerprint"]}),
        {**comparison(), "sha256": {"model": OTHER["fingerprint"]}},
        of_train(OTHER["fingerprint"]),
    ],
)
def test_different_models_are_refused(tmp_path, out, other):
    write(tmp_path / "results" / "a.json", evaluation())
    write(tmp_path / "results" / "b.json", other)
    with pytest.raises(ValueError, match="one report is about one model") as error:
        report([tmp_path / "results"], out)
    assert f"results/a.json is of {MODEL['name']} ({MODEL['fingerprint'][:12]})" in str(error.value)
    assert "results/b.json of" in str(error.value) and "make a report of each" in str(error.value)
    assert not out.exists()


def test_a_trained_run_is_known_by_the_first_original(tmp_path, out):
    own, latent = MODEL["fingerprint"], LATENT["fingerprint"]
    earlier = [{"sha256": {"model": own}}, {"sha256": {"model": latent}}]
    write(tmp_path / "results" / "a.json", perplexity_alone())
    write(tmp_path / "results" / "run.json", of_train(latent, earlier=earlier))
    write(tmp_path / "results" / "taught" / "run.json", run(sha256={"model": "x", "teacher": own})[0])
    assert len(report([tmp_path / "results"], out)["used"]) == 3


def test_nothing_to_report_is_refused(tmp_path, out):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match="needs at least 1 result: got 0 files and 0 that can be used; give what"
    ):
        report([tmp_path / "empty"], out)
    bad = write(tmp_path / "bad.json", "{")
    with pytest.raises(ValueError, match="got 1 files and 0 that can be used .bad.json: no JSON"):
        report([bad], out)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give files or folders"):
        report([tmp_path / "nowhere"], out)


def test_where_a_page_may_be_written(tmp_path, out, monkeypatch):
    source = write(tmp_path / "a.json", comparison())
    with pytest.raises(ValueError, match="is a directory; give .*report.html"):
        report([source], tmp_path)
    with pytest.raises(FileExistsError, match="exists and is no report; choose another name"):
        report([source], write(tmp_path / "other.json", comparison()))
    for given in ([source], [tmp_path]):
        with pytest.raises(
            ValueError, match="must be apart from what it is made from: .* (is|lies in) the input"
        ):
            report(given, source, overwrite=True)
    assert json.loads(source.read_text()) == comparison()
    report([source], out)
    first = out.read_text()
    report([write(tmp_path / "b.json", conversion())], out)  # an earlier report is replaced
    assert out.read_text() != first
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        report([source], out)
    report([source], out, overwrite=True)
    assert out.read_text() == first

    def torn(path, write):
        write(path.with_name("half"))
        raise OSError("the disk is full")

    monkeypatch.setattr(page_module, "write_atomically", torn)
    with pytest.raises(OSError, match="the disk is full"):
        report([tmp_path / "b.json"], out)
    assert out.read_text() == first


@pytest.mark.parametrize("command", ["report x.json --out y.html", "study widths --out y"])
def test_a_missing_extra_is_named(tmp_path, command):
    code = f"""
import sys
sys.modules["matplotlib"] = None
from kvlatent_cli.main import main
sys.argv = {["kvlatent", *command.split()]!r}
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    sentence = 'error: kvlatent study and kvlatent report need matplotlib; pip install "kvlatent[lab]"'
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr


def undeclared(one: Any, place: str = "") -> list[str]:
    """Fields of a document that its model does not know."""
    if isinstance(one, list | tuple | dict):
        parts = one.items() if isinstance(one, dict) else enumerate(one)
        return [name for key, part in parts for name in undeclared(part, f"{place}.{key}")]
    if not isinstance(one, Result):
        return []
    return [f"{place}.{name}" for name in one.model_extra or {}] + undeclared(dict(one), place)


def test_results_are_typed_once():
    """Every field of the committed documents is declared by the model that the command writes with."""
    for path in sorted(RESULTS.glob("*_embedded*.json")):
        document = json.loads(path.read_text())
        model = {"evaluation": Evaluation, "bench": Bench}.get(document.get("kind"))
        if model is not None:
            assert undeclared(model.model_validate(document)) == []
    cell = json.loads((RESULTS / "study_rope_embedded" / "calibrated-8-seed0.json").read_text())
    assert [name for name in undeclared(StudyCell.model_validate(cell)) if ".figures." not in name] == [
        ".settings.rope"
    ]
    assert undeclared(RunRecord.model_validate(run()[0])) == []


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (8.7611, 0.2731, "8.76 ± 0.27"),
        (9.99961, 0.0996, "10.000 ± 0.100"),
        (12345.6, 234.0, "12,346 ± 234"),
        (9.6603631, 0.0000521, "9.66036 ± 0.00005"),
        (1.5, 0.0, "1.500 ± 0"),
        (8192.0, None, "8,192"),
        (0.78112, None, "0.7811"),
        (-2.5, None, "−2.500"),
        (0.0, None, "0"),
        (0.0000123, None, "1.23 × 10^−5"),
    ],
)
def test_numbers_keep_the_digits_that_their_error_leaves(value, error, text):
    assert number(value, error) == text


def test_plain_numbers_have_no_zeros_behind():
    assert [plain(x) for x in (0.25, 100.0, 1e-5, 12.5)] == ["0.25", "100", "1.00 × 10^−5", "12.5"]


@pytest.mark.parametrize(
    ("values", "rising", "kept"),
    [
        ({50: 1.2, 25: 1.5, 60: 1.9, 75: 1.1}, False, [25, 50, 75]),
        ({1: 0.5, 2: 0.4, 3: 0.6}, True, [1, 3]),
        ({1: 1.0, 2: 1.0}, False, [1]),
    ],
)
def test_frontier_leaves_out_what_a_smaller_place_does_as_well(values, rising, kept):
    assert list(frontier(pd.Series(values), rising=rising).index) == kept


def test_lines_take_colours_that_nobody_asked_for():
    at = points([1], [1])
    lines = [Line("a", at), Line("b", at, "c1"), Line("c", at, "original", marks=False)]
    legend = line_chart("x", lines, title="t", x_label="x", y_label="y").legend
    assert [(role, mark) for _, role, _, mark in legend] == [("c2", "s"), ("c1", "o"), ("original", "")]


def test_dots_have_labels_and_one_axis():
    labels = ["first", "a label that is so long that it does not fit into one line of a chart for a phone"]
    dots = pd.DataFrame({"y": [1.0, 3.0], "error": [None, 0.5]}, index=labels, dtype=float)
    texts = re.findall(r">([^<>]+)</text>", dot_chart("x", dots, title="t", x_label="ratio", level=1.0).svg)
    assert "first" in texts and "ratio" in texts
    assert len([text for text in texts if text.startswith("a label") or text.endswith("phone")]) == 2
    numbers = [float(text) for text in texts if re.fullmatch(r"[\d.]+", text)]
    assert len(numbers) > 2 and numbers == sorted(numbers)  # of the one axis


def test_the_head_is_known_from_another_document(tmp_path, out):
    write(tmp_path / "results" / "conversion.json", conversion())
    report([tmp_path / "results"], out)
    assert Page(out.read_text()).number("quality", "paper, 32/32", "channels") == 64
    write(tmp_path / "results" / "run.json", run(plan={"head_dim": 128}, figures={})[0])
    report([tmp_path / "results"], out)
    assert Page(out.read_text()).number("quality", "paper, 32/32", "cache kept") == 0.25


@pytest.mark.parametrize(
    "values",
    [[1.0, 2.0], [5.0, 5.0], [0.0, 64.0], [1e-9, 1e9], [0.0, 0.0], [-3.0, 2e6], [1, 10**40], [0, 10**140]],
)
@pytest.mark.parametrize("ticks", [True, False])
def test_axes_of_any_range(values, ticks):
    line = Line("$a_b$ <c>", points(values, values, [None, abs(values[1])], values, values))
    given = {"log_x": True, "log_y": True, "level": 1.0, "at_points": ticks}
    svg = line_chart("x", [line], title="<t>", x_label="x", y_label="y", **given).svg
    assert svg.startswith('<svg viewBox="0 0 360') and 'aria-label="&lt;t&gt;"' in svg
