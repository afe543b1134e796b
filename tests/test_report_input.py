"""What a report reads, what it skips and names, what it refuses; and how it writes numbers."""

import json
import re
import sys
from itertools import product

import pytest

from kvlatent_lab.report import page as page_module
from kvlatent_lab.report import report
from kvlatent_lab.report.charts import Line, dot_chart, line_chart, styled
from kvlatent_lab.report.html_tables import number, plain
from kvlatent_lab.report.page_making import thinned
from report_page import Page
from report_setup import (
    CONFIG,
    FINGERPRINT,
    LATENT,
    MODEL,
    bench,
    comparison,
    conversion,
    evaluation,
    run,
    study,
    write,
)

OTHER = {"name": "another", "fingerprint": "77" * 32}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "report.html"


def of_train(model, **changes):
    """`run.json` of `kvlatent train`, which names the model it went on from."""
    made, _ = run()
    return {**made, "sha256": {"model": model, "teacher": None, "data": "aa"}, **changes}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"kind": "evaluation", "model"', "no JSON: Expecting ':' delimiter in line 1"),
        ("", "no JSON: Expecting value in line 1"),
        ("[1, 2]", "it holds a list, and a result is an object"),
        ('{"kind": "evaluation", "figures": {"latent": {"perplexity": NaN}}}', "it holds NaN"),
        (
            '{"kind": "evaluation", "figures": {"latent": {"perplexity": 1e999}}}',
            "numbers are 0 or between 1e-150 and 1e150 in size: it holds 1e999",
        ),
        ("[" * 100_000, "nested too deeply"),
        ({"kind": "card"}, "no result that a report knows: kind 'card'"),
        ({"python": "3.11", "rows": {"llama": {}}}, "no result that a report knows"),
        ({"kind": ["bench"]}, "no result that a report knows"),
        ({"kind": "evaluation", "model": MODEL}, "figures: Field required"),
        (
            evaluation(model={"name": "a", "latent": {"widths": 3}}),
            "model: kv_latent in config.json is damaged",
        ),
        ({**bench(), "rows": []}, "rows: List should have at least 1 item"),
        ({**bench(), "rows": [{"batch": "one"}]}, "rows.0.batch: Input should be a valid integer"),
        (
            evaluation(figures={"latent": {"perplexity": {"perplexity": "low"}}}),
            "figures.latent.perplexity: Input",
        ),
        (
            evaluation(
                figures={"latent": {"needle": {"contexts": [8], "depths": [0.5], "exact": [[1], [0]]}}}
            ),
            "figures.latent.needle: exact must have 1 rows of 1: got [1, 1]",
        ),
        (
            study("rope", "c", {}, {"attenuation": {"positions": [0, 1], "latent": [1.0]}}),
            "latent must have 2 numbers: got 1",
        ),
        (study("widths", "c", {}, {"ratio": 10**400}), "1e150 in size: it holds 10000000000000000000"),
        ('{"kind": "study", "figures": {"x": [-1%s]}}' % (5000 * "0"), "between 1e-150 and 1e150 in size"),
        (study("widths", "c", {"d_qk": 10**400}, {"ratio": 1.5}), "between 1e-150 and 1e150 in size"),
        (
            study("widths", "c", {}, {"ratio": 1.5, "ratio_standard_error": -0.1}),
            "figures.ratio_standard_error must not be negative: got -0.1",
        ),
        (
            study("widths", "c", {}, {"order": {"margin_stderr": [[0.1], [-0.2]]}}),
            "figures.order.margin_stderr must not be negative: got -0.2",
        ),
        (
            study("rope", "c", {}, {"inv_freq": [[]]}),
            "must hold 1 frequency or more in every table: got [[]]",
        ),
        (study("rope", "c", {}, {"inv_freq": []}), "must hold 1 frequency or more in every table: got []"),
        (study("widths", "c", {}, {"ratio": "high"}), "figures.ratio must be a number: got 'high'"),
        (
            study("widths", "c", {}, {"any": {"thing": [True]}}),
            "figures.any.thing must be a number: got True",
        ),
        (study("widths", "c", {}, {"ratio": [1.5]}), "figures.ratio must be a number: got [1.5]"),
        (study("widths", "c", {}, {"ratio": 0}), "figures.ratio must be above 0: got 0"),
        (study("widths", "c", {}, {"stage1_ratio": -1.5}), "figures.stage1_ratio must be above 0: got -1.5"),
        (study("widths", "c", {}, {"perplexity": -2}), "figures.perplexity must be above 0: got -2"),
        (
            study("widths", "c", {}, {"decode_ms_per_token": -1.0}),
            "figures.decode_ms_per_token must not be negative: got -1.0",
        ),
        (
            study("widths", "c", {"stage1_tokens": "many"}, {"ratio": 1.5}),
            "settings.stage1_tokens must be a number: got 'many'",
        ),
        (
            {**bench(), "rows": [{**bench()["rows"][0], "decode_ms_per_token": -1}]},
            "rows.0.decode_ms_per_token: Input should be greater than 0: got -1",
        ),
        (
            evaluation(figures={"latent": {"perplexity": 8.0, "standard_error": -1.0}}),
            "figures.latent.standard_error: Input should be greater than or equal to 0: got -1.0",
        ),
        (
            {**conversion(), "cells": {"paper-32x32": {"ratio": 1.5, "ratio_standard_error": -1}}},
            "cells.paper-32x32.ratio_standard_error must not be negative: got -1",
        ),
        (
            {**conversion(), "cells": {"paper-32x32": {"ratio": 1.5, "command": ["python"]}}},
            "command: Input should be a valid string",
        ),
        (
            evaluation(model={**LATENT, "latent": {**CONFIG.to_dict(), "tables": [[{"short": []}]] * 4}}),
            "a rotary table of latent has 1 frequency or more: got 0",
        ),
        ({"rows": {"original": 3}}, "no result that a report knows"),
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
    figures = {"ratio": 1.5, "ratio_standard_error": 0.1, "tokens": 10, "inv_freq": [1.0], "cache_ratio": 0.5}
    settings = {"preset": "paper", "d_qk": 8, "d_vo": 8, "stage1_tokens": 1, "stage2_tokens": 2}
    junk = [None, "x", [], {"a": 1}, -1, 0, 10**140, "\x00\ud800\x1b$_{"]
    entries = [("settings", name) for name in settings] + [("figures", name) for name in figures]
    for kind in ("widths", "stages", "rope"):
        for i, ((part, name), value) in enumerate(product(entries, junk)):
            document = study(kind, f"c{i}", {**settings, "other": i % 7}, dict(figures))
            document[part][name] = value
            write(tmp_path / "results" / kind / f"{i}.json", document)
    document = study("stages", "\x01\ud800 name", settings, {"perplexity": 2.0})
    document["settings"]["seed"] = [0]
    write(tmp_path / "results" / "name.json", document)
    said = report([tmp_path / "results"], out)
    assert len(said["used"]) + len(said["skipped"]) == 3 * 10 * len(junk) + 1
    assert "results/name.json" in [one["file"] for one in said["used"]]
    assert all("must" in one["reason"] or "should" in one["reason"] for one in said["skipped"])
    assert len(Page(out.read_text()).tables) > 5


def test_files_that_cannot_be_read(tmp_path, out):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "binary.json").write_bytes(b"\xff\xfe")
    write(tmp_path / "results" / "good.json", comparison())
    write(
        tmp_path / "results" / "m" / "metrics.jsonl", '{"stage": 1, "tokens": 8, "loss": 2.0}\n{"stage": 1,\n'
    )
    write(tmp_path / "results" / "n" / "metrics.jsonl", "")
    skipped = {one["file"]: one["reason"] for one in report([tmp_path / "results"], out)["skipped"]}
    assert skipped == {
        "results/binary.json": "no text in UTF-8",
        "results/m/metrics.jsonl": "line 2 of 2: no JSON: Expecting property name enclosed in double quotes in line 1",
        "results/n/metrics.jsonl": "it holds no steps",
    }


def test_which_files_of_a_folder_are_read(tmp_path, out):
    folder = tmp_path / "results"
    write(folder / "evaluation.json", evaluation())
    made, steps = run()
    for name in ("run.json", "config.json", "tokenizer.json", "model.safetensors"):
        write(folder / "deep" / "checkpoint" / name, made if name == "run.json" else {})
    write(folder / "deep" / "checkpoint" / "metrics.jsonl", json.dumps(steps[0]))
    write(folder / "deep" / "out.partial" / "plan.json", {})
    write(folder / ".hidden" / "bench.json", bench())
    write(folder / ".bench.json.tmp-7", bench())
    write(folder / "widths" / "study.json", {"kind": "study-folder"})
    write(folder / "widths" / "work" / "original.json", {})
    write(folder / "widths" / "one.json", study("widths", "one", {}, {"ratio": 1.5}))
    (folder / "folder.json").mkdir()
    said = report([folder / "evaluation.json", folder], out)  # one file twice counts once
    assert said["skipped"] == []
    assert [one["file"] for one in said["used"]] == [
        "evaluation.json",
        "results/deep/checkpoint/metrics.jsonl",
        "results/deep/checkpoint/run.json",
        "results/widths/one.json",
    ]


def test_a_cell_counts_once(tmp_path, out):
    for name in ("one", "copy"):
        write(tmp_path / "cells" / f"{name}.json", study("widths", "c", {}, {"ratio": 1.5}))
    said = report([tmp_path / "cells"], out)
    assert said["skipped"] == [
        {"file": "cells/one.json", "reason": "cell c of study widths was read from cells/copy.json already"}
    ]


@pytest.mark.parametrize(
    "other",
    [
        {**bench(), "model": OTHER, "original": None},
        study("widths", "c", {}, {"ratio": 1.5}) | {"model": OTHER},
        evaluation(original=OTHER),
        evaluation(original=None),  # of the latent model alone: nobody knows what it came from
        {**conversion(), "sha256": {"model": OTHER["fingerprint"]}},
        {**comparison(), "sha256": {"model": OTHER["fingerprint"]}},
        of_train(OTHER["fingerprint"]),
    ],
)
def test_different_models_are_refused(tmp_path, out, other):
    write(tmp_path / "results" / "a.json", evaluation())
    write(tmp_path / "results" / "b.json", other)
    with pytest.raises(ValueError, match="one report is about one model") as error:
        report([tmp_path / "results"], out)
    assert f"results/a.json is of {MODEL['name']} ({FINGERPRINT[:12]})" in str(error.value)
    assert "results/b.json of" in str(error.value) and "make a report of each" in str(error.value)
    assert not out.exists()


def test_a_trained_run_is_known_by_the_first_original(tmp_path, out):
    earlier = [{"sha256": {"model": FINGERPRINT}}, {"sha256": {"model": LATENT["fingerprint"]}}]
    write(tmp_path / "results" / "a.json", evaluation())
    write(tmp_path / "results" / "run.json", of_train(LATENT["fingerprint"], earlier=earlier))
    write(
        tmp_path / "results" / "taught" / "run.json",
        of_train("x", sha256={"model": "x", "teacher": FINGERPRINT}),
    )
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


def test_where_a_page_may_be_written(tmp_path, out):
    source = write(tmp_path / "a.json", comparison())
    with pytest.raises(ValueError, match="is a directory; give .*report.html"):
        report([source], tmp_path)
    other = write(tmp_path / "other.json", comparison())
    with pytest.raises(FileExistsError, match="exists and is no report; choose another name"):
        report([source], other)
    for given in ([source], [tmp_path]):
        with pytest.raises(
            ValueError, match="must be apart from what it is made from: .* (is|lies in) the input"
        ):
            report(given, source, overwrite=True)
    assert json.loads(source.read_text()) == comparison()
    report([source], out)
    first = out.read_text()
    report([write(tmp_path / "b.json", bench())], out)  # an earlier report is replaced
    assert out.read_text() != first
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        report([source], out)
    report([source], out, overwrite=True)
    assert out.read_text() == first


def test_a_failure_leaves_the_old_page(tmp_path, out, monkeypatch):
    report([write(tmp_path / "a.json", comparison())], out)
    before = out.read_text()

    def torn(path, write):
        write(path.with_name("half"))
        raise OSError("the disk is full")

    monkeypatch.setattr(page_module, "write_atomically", torn)
    with pytest.raises(OSError, match="the disk is full"):
        report([write(tmp_path / "b.json", bench())], out)
    assert out.read_text() == before


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_missing_libraries_are_named(tmp_path, out, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf'a report needs {name}; pip install "kvlatent\[report\]"'):
        report([write(tmp_path / "a.json", comparison())], out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (8.7611, 0.2731, "8.76 ± 0.27"),
        (1.00898, 0.00102, "1.0090 ± 0.0010"),
        (9.99961, 0.0996, "10.000 ± 0.100"),
        (12345.6, 234.0, "12,346 ± 234"),
        (9.6603631, 0.0000521, "9.66036 ± 0.00005"),
        (0.01134, 0.0004, "0.01134 ± 0.00040"),
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
    assert [plain(x) for x in (0.25, 100.0, 0.1, 1e-5, 12.5)] == [
        "0.25",
        "100",
        "0.1",
        "1.00 × 10^−5",
        "12.5",
    ]


def test_thinning_keeps_both_ends():
    assert thinned(range(5), 10) == [0, 1, 2, 3, 4]
    found = thinned(range(1001), 11)
    assert found == list(range(0, 1001, 100))


def test_lines_take_colours_that_nobody_asked_for():
    lines = [
        Line("a", [1], [1]),
        Line("b", [1], [1], role="c1"),
        Line("c", [1], [1], role="original", marks=False),
    ]
    assert [(role, mark) for _, role, mark in styled(lines)] == [("c2", "s"), ("c1", "o"), ("original", "")]


def test_dots_have_labels_and_one_axis():
    labels = ["first", "a label that is so long that it does not fit into one line of a chart for a phone"]
    chart = dot_chart("x", labels, [1.0, 3.0], [None, 0.5], title="t", x_label="ratio", level=1.0)
    texts = re.findall(r">([^<>]+)</text>", chart.svg)
    assert "first" in texts and "ratio" in texts
    assert [text for text in texts if text.startswith("a label") or text.endswith("phone")] != labels[1:]
    numbers = [float(text) for text in texts if re.fullmatch(r"[\d.]+", text)]
    assert len(numbers) > 2 and numbers == sorted(numbers)  # of the one axis


def test_the_head_is_known_from_another_document(tmp_path, out):
    cells = {name: cell for name, cell in conversion()["cells"].items() if name.startswith(("ours", "paper"))}
    write(tmp_path / "results" / "conversion.json", {**conversion(), "cells": cells})
    report([tmp_path / "results"], out)
    assert Page(out.read_text()).number("quality", "paper, 32/32", "channels") == 64
    write(tmp_path / "results" / "run.json", {**run()[0], "plan": {"head_dim": 128}})
    report([tmp_path / "results"], out)
    assert Page(out.read_text()).number("quality", "paper, 32/32", "cache kept") == 0.25


@pytest.mark.parametrize(
    "values",
    [
        [1.0, 2.0],
        [5.0, 5.0],
        [0.0, 64.0],
        [1e-9, 1e9],
        [0.0, 0.0],
        [-3.0, 2e6],
        [1, 10**40],
        [0, 10**140],
        [1e-140, 1e150],
    ],
)
@pytest.mark.parametrize("ticks", [True, False])
def test_axes_of_any_range(values, ticks):
    chart = line_chart(
        "x",
        [Line("$a_b$ <c>", values, values, error=[None, abs(values[1])], band=(values, values))],
        title="<t>",
        x_label="x",
        y_label="y",
        log_x=True,
        level=1.0,
        x_ticks=values if ticks else (),
    )
    assert chart.svg.startswith('<svg viewBox="0 0 360') and 'aria-label="&lt;t&gt;"' in chart.svg
