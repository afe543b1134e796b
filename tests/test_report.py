"""The report: its figures equal the JSON, it needs nothing but itself, and what cannot be used is refused or named."""

import json
import math
import re
import statistics
from random import Random

import pytest

from kvlatent_lab.report import report
from kvlatent_lab.report.cells import frontier
from kvlatent_lab.report.measured import measured_models, one_text
from kvlatent_lab.report.result_files import read_documents
from report_page import Page, read_number
from report_setup import (
    CONFIG,
    CONTEXTS,
    DEPTHS,
    LATENT,
    MODEL,
    PLACES,
    SPANS,
    WIDTHS,
    bench,
    comparison,
    conversion,
    cost,
    evaluation,
    everything,
    order,
    run,
    studies,
    study,
    write,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A page of everything, rendered once, and what `report` said of it."""
    folder = tmp_path_factory.mktemp("report")
    said = report([everything(folder / "results")], folder / "page" / "report.html")
    return Page((folder / "page" / "report.html").read_text()), said


@pytest.fixture
def page_of(tmp_path):
    """Write documents to files of their own and render them."""

    def call(*documents):
        files = [write(tmp_path / f"{i}.json", document) for i, document in enumerate(documents)]
        said = report(files, tmp_path / "report.html")
        return Page((tmp_path / "report.html").read_text()), said

    return call


def mean_of(grid):
    """Mean of all entries of a grid."""
    return statistics.fmean(value for row in grid for value in row)


def test_progress_comes_before_every_file_and_section(tmp_path):
    paths = [write(tmp_path / f"{index}.json", evaluation()) for index in range(3)]
    told = []
    report(paths, tmp_path / "page.html", progress=lambda *event: told.append(event))
    steps = {
        step: [event[1:3] for event in told if event[0] == step] for step in ("read the results", "draw")
    }
    assert steps["read the results"] == [(0, 3), (1, 3), (2, 3)]
    drawn, total = zip(*steps["draw"], strict=True)
    assert list(drawn) == list(range(total[0] + 1)) and set(total) == {total[0]}
    assert len(told) == 3 + len(drawn)


def test_says_what_it_used(whole):
    _, said = whole
    kinds = [one["kind"] for one in said["used"]]
    assert {kind: kinds.count(kind) for kind in sorted(set(kinds))} == {
        "bench": 1,
        "comparison": 1,
        "conversion": 1,
        "evaluation": 1,
        "metrics": 1,
        "run": 1,
        "study": len(studies()),
    }
    assert said["skipped"] == [] and said["model"] == MODEL["name"]
    assert "results/tiny-stories-half/run.json" in [one["file"] for one in said["used"]]
    json.dumps(said)


def test_every_entry_is_its_number_rounded(whole):
    page, _ = whole
    entries = [entry for table in page.tables.values() for entry in table.values() if entry.value is not None]
    assert len(entries) > 2000
    for entry in entries:
        value, rounding = read_number(entry.text)
        assert abs(value - entry.value) <= rounding, entry
        if entry.error:
            error, rounding = read_number(entry.text.partition("± ")[2])
            assert abs(error - entry.error) <= rounding, entry


def test_every_chart_has_its_numbers(whole):
    page, _ = whole
    drawn = [figure for figure in page.figures if figure["svg"]]
    assert len(drawn) > 30
    assert all(figure["table"] and figure["cells"] for figure in drawn)


def test_headline_equals_the_json(whole):
    page, _ = whole
    figures = evaluation()["figures"]
    for name, label in (("original", MODEL["name"]), ("latent", LATENT["name"])):
        own = figures[name]
        wanted = {
            "perplexity": own["perplexity"]["perplexity"],
            "bits per byte": own["perplexity"]["bits_per_byte"],
            "cache, bytes per token": own["cache_bytes_per_token"],
            "needle reproduced, mean of the grid": mean_of(own["needle"]["exact"]),
            "needle's reciprocal rank, mean": mean_of(own["needle"]["rank"]),
            "true word order likelier by, nats": mean_of(own["order"]["margin"]),
            "arc_easy, acc": own["tasks"]["tasks"]["arc_easy"]["acc"],
        }
        for row, value in wanted.items():
            assert page.number("headline", row, label) == pytest.approx(value, rel=1e-12), row
        assert page.error("headline", "perplexity", label) == own["perplexity"]["standard_error"]
        assert (
            page.error("headline", "arc_easy, acc", label) == own["tasks"]["tasks"]["arc_easy"]["acc_stderr"]
        )
    label, latent = LATENT["name"], figures["latent"]
    assert page.number("headline", "perplexity over the original's", label) == latent["ratio"]
    assert page.error("headline", "perplexity over the original's", label) == latent["ratio_standard_error"]
    assert page.number("headline", "cache kept", label) == 0.5
    assert page.number("headline", "divergence from the original, nats per token", label) == 0.01134
    assert page.number("headline", "same likeliest token as the original", label) == 0.9462
    assert page.tables["headline"]["diagnosis", label].text == "positional confusion"
    assert page.number("headline", "arc_easy, acc_norm", label) is None  # not measured
    assert page.tables["headline"]["widths of keys/values", label].text == "32\u201336/28\u201332"
    row = "positional confusion: needle exact kept"
    assert page.number(f"diagnosis-{label}", row, "value") == 0.71
    assert page.number(f"diagnosis-{label}", row, "threshold") == 0.8


def test_grids_equal_the_json(whole):
    page, _ = whole
    for name, label in (("original", MODEL["name"]), ("latent", LATENT["name"])):
        needle, order = (evaluation()["figures"][name][kind] for kind in ("needle", "order"))
        for score in ("exact", "rank"):
            for i, context in enumerate(CONTEXTS):
                for j, depth in enumerate(DEPTHS):
                    found = page.number(f"needle-{score}-{label}", f"{context:,}", f"{100 * depth:.0f} %")
                    assert found == needle[score][i][j]
        for i, span in enumerate(SPANS):
            for j, place in enumerate(PLACES):
                cell = f"order-margin-{label}", str(span), f"depth {place:g}"
                assert page.number(*cell) == order["margin"][i][j]
                assert page.error(*cell) == order["margin_standard_error"][i][j]
            mean = statistics.fmean(order["margin"][i])
            assert page.number("order-margin", str(span), label) == pytest.approx(mean, rel=1e-12)


def test_layers_and_losses_equal_the_json(whole):
    page, _ = whole
    layers = evaluation()["figures"]["latent"]["fidelity"]["layers"]
    for name in ("relative_error", "attention_kl", "entropy_ratio"):
        assert page.column(f"layers-{name}", LATENT["name"]) == [layer[name] for layer in layers]
    assert page.column(f"widths-{LATENT['name']}", "keys, d_qk") == [d_qk for d_qk, _ in WIDTHS]
    assert page.column(f"widths-{LATENT['name']}", "values, d_vo") == [d_vo for _, d_vo in WIDTHS]
    made, steps = run()
    name = "results/tiny-stories-half/run.json"
    rows = made["conversion"]["layers"]
    for strategy in ("calibrated", "paper", "stride", "energy"):
        assert page.column(f"layer-errors-{name}", strategy) == [row["errors"][strategy] for row in rows]
    assert page.column(f"layer-widths-{name}", "keys, d_qk") == [row["d_qk"] for row in rows]
    assert page.column(f"layer-widths-{name}", "values, d_vo") == [row["d_vo"] for row in rows]
    assert page.column(f"stages-{name}", "stage II") == [150, 614_400, 3.0, 2200.0, 0.4, 0.09]
    assert page.column(f"steps-{name}", "perplexity") == [8.6831, 9.41, 9.02, 8.7611]
    first = [step["loss"] for step in steps if step["stage"] == 1]
    assert page.column("loss-stage1", "tiny-stories-half") == first
    second = {step["tokens"]: step["loss"] for step in steps if step["stage"] == 2}
    drawn = {row: entry.value for (row, _), entry in page.tables["loss-stage2"].items()}
    assert len(drawn) == 100 and {"4,096", "614,400"} <= set(drawn)  # 50 of 150 left out, not the ends
    assert all(second[int(row.replace(",", ""))] == value for row, value in drawn.items())


def ends(page, table, row, column):
    """The ends of a band, as its table has them."""
    return [page.number(table, row, f"{column}, {end}") for end in ("lower", "upper")]


def test_every_band_has_its_numbers(whole):
    page, _ = whole
    document = bench()
    for row in document["rows"]:
        cells = f"decode-{row['batch']}-results/bench.json", f"{row['context']:,}"
        assert ends(page, *cells, f"{row['model']}, {row['cache']}") == row["decode_ms_per_token_quartiles"]
    for ratio in document["ratios"]:
        cells = f"faster-{ratio['batch']}-results/bench.json", f"{ratio['context']:,}"
        assert ends(page, *cells, f"measured, {ratio['cache']}") == ratio["decode_quartiles"]
    margins = evaluation()["figures"]["latent"]["order"]["margin"]
    for span, row in zip(SPANS, margins, strict=True):
        assert ends(page, "order-margin", str(span), LATENT["name"]) == [min(row), max(row)]
    tables = [table.short for layer in CONFIG.tables for table in layer]
    curves = [sum(math.cos(100 * f) for f in table) / len(table) for table in tables]
    drawn = ends(page, "attenuation-models", "100", LATENT["name"])
    assert drawn == pytest.approx([min(curves), max(curves)], abs=1e-9)


def test_every_kind_of_cache_has_its_bound_and_its_bytes(whole):
    page, _ = whole
    document = bench()
    assert len(document["stacked"]) == 32
    for one in document["stacked"]:
        row = f"{one['model']}, {one['cache']}, context {one['context']:,}"
        cells = f"stacked-{one['batch']}-results/bench.json", row
        assert page.number(*cells, "times faster") == one["decode"]
        found = [page.number(*cells, end) for end in ("lower", "upper")]
        assert found == one["decode_quartiles"]
        assert page.number(*cells, "predicted by bytes") == one["predicted_decode"]
        assert page.number(*cells, "share of the cache") == one["cache_bytes"]
    assert "original, quantized-int4, predicted" in page.text  # drawn, too


def test_a_bench_says_what_ran(page_of):
    document = {**bench(), "rows": bench()["rows"][:1], "ratios": [], "stacked": []}
    setup = "cpu, float32, sdpa attention, step not compiled"
    page, _ = page_of(document)
    assert f"Measured: {setup}." in page.text and page.text.count(setup) == 2
    assert "random weights" not in page.text
    compiled = {**document, "compile": True, "model": {**LATENT, "random_weights": True}}
    page, _ = page_of(document, compiled)
    other = "cpu, float32, sdpa attention, step compiled, random weights"
    assert f"Measured: {setup}; {other}." in page.text
    for name in ("attention", "compile"):
        del document[name]
    assert "Measured: cpu, float32." in page_of(document)[0].text


def test_speed_equals_the_json(whole):
    page, _ = whole
    document = bench()
    for row in document["rows"]:
        name = f"{row['model']}, {row['cache']}, batch {row['batch']}, context {row['context']:,}"
        cells = "bench-results/bench.json", name
        assert page.number(*cells, "decode, ms per token") == row["decode_ms_per_token"]
        assert page.number(*cells, "prefill, s") == row["prefill_s"]
        assert page.number(*cells, "cache, bytes") == row["cache_bytes"]
        drawn = (
            f"decode-{row['batch']}-results/bench.json",
            f"{row['context']:,}",
            f"{row['model']}, {row['cache']}",
        )
        assert page.number(*drawn) == row["decode_ms_per_token"]
    for ratio in document["ratios"]:
        cells = f"faster-{ratio['batch']}-results/bench.json", f"{ratio['context']:,}"
        assert page.number(*cells, f"measured, {ratio['cache']}") == ratio["decode"]
        assert page.number(*cells, f"predicted, {ratio['cache']}") == ratio["predicted_decode"]
    longest = page.tables["longest-results/bench.json"]
    assert longest["latent, dynamic, batch 1", "tokens"].value == 242_000
    assert longest["latent, quantized-int4, batch 1", "tokens"].text == "no limit"


def cells_of(name, **wanted):
    """Cells of a study whose settings are those."""
    return [one for one in studies() if one["study"] == name and wanted.items() <= one["settings"].items()]


def test_studies_are_means_over_seeds(whole):
    page, _ = whole
    for rank in (0, 4, 64):
        ratios = [one["figures"]["ratio"] for one in cells_of("lora-rank", lora_rank=rank)]
        assert len(ratios) == 3
        cells = [("study-lora-rank", f"rank {rank}"), ("study-lora-rank-lora_rank-ratio", str(rank))]
        for table, row in cells:
            column = "perplexity over the original's"
            assert page.number(table, row, column) == pytest.approx(statistics.fmean(ratios), rel=1e-12)
            assert page.error(table, row, column) == pytest.approx(
                statistics.stdev(ratios) / 3**0.5, rel=1e-12
            )
        assert page.number("study-lora-rank", f"rank {rank}", "seeds") == 3
    paper = cells_of("widths", preset="paper", d_qk=16, d_vo=64)[0]["figures"]
    cell = "study-widths", "paper, d_qk 16, d_vo 64", "perplexity over the original's"
    assert page.number(*cell) == paper["ratio"] and page.error(*cell) == paper["ratio_standard_error"]
    assert "paper-4x4-seed0 could not be measured: the frequency-aware table needs" in page.text


def test_stage_one_is_compared_seed_by_seed(whole):
    page, _ = whole

    def perplexities(first, second):
        found = cells_of("stages", preset="paper", d_qk=8, stage1_tokens=first, stage2_tokens=second)
        return [one["figures"]["perplexity"] for one in found]

    ratios = [a / b for a, b in zip(perplexities(20_000, 80_000), perplexities(0, 100_000), strict=True)]
    cell = "study-stages-gain-paper, 100,000 tokens", "20", "12.5 % of the cache"
    assert page.number(*cell) == pytest.approx(statistics.fmean(ratios), rel=1e-12)
    assert page.error(*cell) == pytest.approx(statistics.stdev(ratios) / len(ratios) ** 0.5, rel=1e-9)


def test_benchmark_files_are_read_by_their_shape(whole):
    page, _ = whole
    column = "perplexity over the original's"
    assert page.number("quality", "ours head aligned, 32/32", column) == pytest.approx(1.0092)
    assert page.error("quality", "ours head aligned, 32/32", column) == pytest.approx(
        statistics.stdev([1.009, 1.0094]) / 2**0.5
    )
    assert page.number("quality", "ours head aligned, 32/32", "seeds") == 2
    assert page.number("quality", "paper, 32/32", "cache kept") == 0.5  # values whole are 64, so the head is
    assert page.number("quality", "keys statistics, 32/64", "cache kept") == 0.75
    assert page.number("quality", LATENT["name"], column) == 1.00898
    variants = "comparison-results/choices.json"
    assert page.column(variants, "perplexity") == [8.68, 39.51, 8.737]
    assert page.column(variants, "over the original's") == [1.0, 4.5516, 1.0065]


def test_attenuation_curves(whole, page_of):
    page, _ = whole
    figures = cells_of("rope", rope="calibrated", d_qk=16)[0]["figures"]["attenuation"]
    assert page.column("attenuation-d_qk = 16", "calibrated") == figures["latent"]
    assert page.column("attenuation-d_qk = 16", "original") == figures["original"]
    own = page.column("attenuation-models", LATENT["name"])
    tables = [table.short for layer in CONFIG.tables for table in layer]
    for x in (0, 1, 100, 128):
        curves = [sum(math.cos(x * f) for f in table) / len(table) for table in tables]
        assert own[x] == pytest.approx(statistics.fmean(curves), abs=1e-9)
    bare, _ = page_of(
        study("rope", "one", {"rope": "bare"}, {"inv_freq": [[1.0, 0.1], [0.5, 0.2]], "ratio": 2.0})
    )
    drawn = bare.column("attenuation-Similarity by distance", "one")
    for x in (0, 1, 100, 128):
        assert drawn[x] == pytest.approx(sum(math.cos(x * f) for f in (1.0, 0.1, 0.5, 0.2)) / 4, abs=1e-9)


def test_page_needs_nothing_else(whole):
    page, _ = whole
    assert not re.search(r"https?:|//\w|@import|javascript", page.html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert not any(name.startswith("on") for _, given in page.tags for name in given)
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:].replace("%20", " ") for link in page.links} <= set(page.ids)
    references = re.findall(r"url\(([^)]*)\)", page.html)
    assert references and all(one.startswith("#") and one[1:] in page.ids for one in references)
    assert len(page.ids) == len(set(page.ids))


def test_charts_take_the_colours_of_the_page(whole):
    page, _ = whole
    drawn = "".join(re.findall(r"<svg.*?</svg>", page.html, flags=re.DOTALL))
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b(?!-)", re.sub(r'(href="|url\()#[^")]*', "", drawn))
    used = set(re.findall(r"var\(--([\w]+)\)", drawn))
    style = page.html.partition("<style>")[2].partition("</style>")[0]
    light, _, dark = style.partition("prefers-color-scheme: dark")
    for name in used | {"page", "heat"}:
        assert f"--{name}:" in light and f"--{name}:" in dark


def test_provenance(whole):
    page, _ = whole
    table = page.tables["provenance-evaluation"]
    assert table["results/evaluation.json", "command"].text == evaluation()["record"]["command"]
    assert table["results/evaluation.json", "seed"].text == "0"
    assert table["results/evaluation.json", "seconds"].text == "12.5"
    study_table = page.tables["provenance-study-stages"]
    one = cells_of("stages", seed=2)[0]
    assert study_table[f"results/study/stages/{one['cell']}.json", "seed"].text == "2"
    own = page.tables["provenance-conversion"]["results/conversion.json: paper-32x32", "command"].text
    assert own == "python benchmarks/conversion.py --cells paper-32x32"
    assert "Python 3.11.7, kvlatent 0.1.0, torch 2.13.0+cpu, transformers 5.23.0" in page.text
    assert "processor: AMD EPYC, cores: 2, torch threads: 2" in page.text  # the bench's


def test_sections_are_there_with_their_data_only(page_of):
    page, said = page_of(bench())
    assert said["sections"] == ["Speed against context"]
    assert page.headings == [MODEL["name"], "Speed against context", "Where it is from"]
    assert page_of(comparison())[1]["sections"] == ["Variants"]
    assert page_of(conversion())[1]["sections"] == ["Quality against cache"]
    alone = evaluation(original=None, model=MODEL, diagnosis=None)
    alone["figures"] = {"latent": {"perplexity": 8.5, "standard_error": 0.2}}
    page, said = page_of(alone)
    assert said["sections"] == ["At a glance"]
    assert page.tables["headline"] == {
        ("perplexity", MODEL["name"]): ("8.50 ± 0.20", 8.5, 0.2),
        ("text", MODEL["name"]): ("valid.txt", None, None),
    }


def test_figures_may_lie_flat_as_evaluate_returns_them(page_of):
    flat = {
        "perplexity": 9.0,
        "standard_error": 0.3,
        "loss": 2.2,
        "tokens": 100,
        "cache_bytes_per_token": 50.0,
    }
    before = {**flat, "perplexity": 8.0, "cache_bytes_per_token": 100.0}
    figures = {
        "latent": flat,
        "original": before,
        "ratio": 1.12,
        "ratio_standard_error": 0.01,
        "cache_ratio": 0.5,
    }
    page, _ = page_of(evaluation(figures=figures))
    cell = "headline", "perplexity over the original's", LATENT["name"]
    assert page.number(*cell) == 1.12 and page.error(*cell) == 0.01
    for name in ("ratio", "ratio_standard_error"):
        del figures[name]
    page, _ = page_of(evaluation(figures=figures))
    assert page.number(*cell) == 9.0 / 8.0 and page.error(*cell) is None


def test_models_of_one_name_are_told_apart(page_of):
    page, _ = page_of(evaluation(), evaluation(seed=1))
    columns = {column for _, column in page.tables["headline"]}
    assert columns == {f"{LATENT['name']} ({i}.json)" for i in (0, 1)} | {
        f"{MODEL['name']} ({i}.json)" for i in (0, 1)
    }


def test_models_of_one_name_in_one_file_say_what_they_are(page_of):
    same = {"name": "model"}
    twins = evaluation(model={**LATENT, **same, "latent": CONFIG.to_dict()}, original={**MODEL, **same})
    page, _ = page_of(twins)
    columns = {column for _, column in page.tables["headline"]}
    assert columns == {"model (0.json), original", "model (0.json), latent"}
    assert page.number("headline", "cache, bytes per token", "model (0.json), latent") == 4096


def test_files_of_one_name_are_told_apart(tmp_path):
    files = [write(tmp_path / name / "x.json", evaluation(seed)) for seed, name in enumerate("ab")]
    report(files, tmp_path / "report.html")
    columns = {column for _, column in Page((tmp_path / "report.html").read_text()).tables["headline"]}
    name = LATENT["name"]
    assert {f"{name} (x.json)", f"{name} (x.json) (2)"} < columns and len(columns) == 4


def perplexity_alone(seed=0):
    """An evaluation of nothing else."""
    document = evaluation(seed)
    for figures in document["figures"].values():
        for name in ("needle", "order", "fidelity", "tasks"):
            figures.pop(name, None)
    return document


def other_text(**changes):
    """An evaluation of another text, or of the same one read in another way."""
    document = perplexity_alone(seed=1)
    document["record"]["text"] = {"name": "valid.txt", "sha256": "ab" * 32} | changes.pop("text", {})
    for figures in document["figures"].values():
        figures["perplexity"] |= changes
    return document


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"text": {"name": "copy.txt"}}, True),
        ({"text": {"sha256": "cd" * 32}}, False),
        ({"text": {"sha256": None, "name": None}}, False),
        ({"tokens": 29_557}, False),
        ({"window": 256}, False),
        ({"stride": 128}, False),
    ],
)
def test_one_text_is_one_that_was_read_in_one_way(tmp_path, changes, same):
    documents = evaluation(), other_text(**changes)
    files = [write(tmp_path / f"{i}.json", document) for i, document in enumerate(documents)]
    assert one_text(measured_models(read_documents(files))) == same
    assert one_text(measured_models(read_documents(files[1:])))


def test_texts_that_nobody_wrote_down_may_differ(tmp_path):
    nameless = {"sha256": None, "name": None}
    files = [write(tmp_path / f"{i}.json", other_text(text=nameless)) for i in range(2)]
    assert one_text(measured_models(read_documents(files[:1])))
    files[1].write_text(files[1].read_text().replace("8.7611", "8.8"))
    assert not one_text(measured_models(read_documents(files)))


def test_the_headline_says_whether_all_read_one_text(page_of):
    differ = "The texts differ, or how they were read: columns compare only within one file."
    page, _ = page_of(perplexity_alone())
    assert "on the same text" in page.text and differ not in page.text
    page, _ = page_of(perplexity_alone(), other_text(tokens=1000, text={"name": "b.txt", "sha256": "cd"}))
    assert "on the same text" not in page.text and differ in page.text
    for i, text, tokens in ((0, "valid.txt", 29558), (1, "b.txt", 1000)):
        label = f"{LATENT['name']} ({i}.json)"
        assert page.tables["headline"]["text", label].text == text
        assert page.number("headline", "tokens scored", label) == tokens


def test_quality_says_where_texts_differ(page_of):
    sentence = "points compare only within one source"
    cells = [study("widths", "a", {"preset": "paper", "d_qk": 8, "d_vo": 8}, cost(3.0, 0.5))]
    alike = perplexity_alone()
    alike["figures"]["original"]["perplexity"]["perplexity"] = 8.68
    assert sentence not in page_of(alike, *cells)[0].text
    longer = {**cost(2.0, 0.25), "tokens": 50_000, "original_perplexity": 9.1}
    page, _ = page_of(alike, *cells, study("widths", "b", {"preset": "paper"}, longer))
    wanted = "29,558 to 50,000 tokens scored, the original's perplexity there 8.68 to 9.1"
    assert f"The texts differ, or how they were read ({wanted}): {sentence}." in page.text
    assert (
        f"or how they were read: {sentence}"
        in page_of(perplexity_alone(), other_text(text={"sha256": "cd"}))[0].text
    )


def test_an_original_evaluated_alone_is_one(page_of):
    alone = evaluation(original=None, model=MODEL)
    alone["figures"] = {"latent": alone["figures"]["original"]}
    alone["diagnosis"] = {"findings": [], "not_measured": ["needle: needs figures of both models"]}
    page, said = page_of(alone)
    assert "Diagnosis" not in said["sections"] and "Not measured" not in page.text
    assert "The original, on the same text" in page.text
    assert "times the original's perplexity" not in page.text and "of needles found" not in page.text
    drawn = "".join(re.findall(r"<svg.*?</svg>", page.html, flags=re.DOTALL))
    assert "var(--original)" in drawn and "var(--c1)" not in drawn  # word order, in the original's colour
    alone["model"] = {**MODEL, "latent": CONFIG.to_dict()}
    page, said = page_of(alone)
    assert "Diagnosis" in said["sections"] and "Not measured. needle" in page.text
    assert "of needles found" in page.text


def test_hostile_names_are_text(page_of):
    name = '<script>alert("1")</script> & $x$ "\'>'
    hostile = evaluation(model={**LATENT, "name": name}, original={**MODEL, "name": f"{name} before"})
    cells = [study(name, f"{i}", {"a": name, "_b": i, "c": f"_{i}"}, {name: 1.0 + i}) for i in range(3)]
    page, said = page_of(hostile, *cells)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script"}) and "<script" not in page.html
    assert said["model"] == f"{name} before" == page.headings[0]
    assert page.number("headline", "perplexity", name) == 8.7611
    assert page.column(f"study-{name}", name) == [1.0, 2.0, 3.0]


def test_equal_files_give_an_equal_page(page_of):
    assert page_of(evaluation(), comparison())[0].html == page_of(evaluation(), comparison())[0].html


@pytest.mark.parametrize(
    ("values", "sign", "kept"),
    [
        ({50: 1.2, 25: 1.5, 60: 1.9, 75: 1.1}, 1, [25, 50, 75]),
        ({1: 0.5, 2: 0.4, 3: 0.6}, -1, [1, 3]),
        ({1: 1.0, 2: 1.0}, 1, [1]),
        ({}, 1, []),
    ],
)
def test_frontier_leaves_out_what_a_smaller_place_does_as_well(values, sign, kept):
    assert frontier(values, sign) == kept


def test_trained_and_untrained_cells_of_a_study_stay_apart(page_of):
    def cells(tokens, ratio):
        settings = {"preset": "paper", "stage1_tokens": tokens // 5, "stage2_tokens": tokens - tokens // 5}
        return [
            study("widths", f"paper-{d}x{d}-seed0", {**settings, "d_qk": d, "d_vo": d}, cost(ratio * 64 / d, d / 64))
            for d in (32, 16)
        ]  # fmt: skip

    page, _ = page_of(*cells(0, 3.0), *cells(1000, 1.5))
    column = "perplexity over the original's"
    assert page.number("quality", "paper, 32/32", column) == 6.0
    assert page.number("quality", "paper, trained on 1,000 tokens, 32/32", column) == 3.0
    assert "Perplexity over the original's: untrained" in page.text
    assert "Perplexity over the original's: 1,000 tokens" in page.text


def test_trained_and_untrained_rotary_tables_share_curves_and_not_word_order(page_of):
    def cells(tokens):
        settings = {"stage1_tokens": 0, "stage2_tokens": tokens, "rope": "standard"}
        return [
            study("rope", f"standard-{d}", {**settings, "d_qk": d}, cost(2.0, 0.5) | {"inv_freq": [1.0, 0.1], "order": order(tokens, Random(0))})
            for d in (32, 16)
        ]  # fmt: skip

    page, _ = page_of(*cells(0), *cells(1000))
    tables = [name for name in page.tables if name.startswith(("attenuation-", "rope-order-"))]
    assert sorted(tables) == [
        "attenuation-d_qk = 16",
        "attenuation-d_qk = 32",
        "rope-order-d_qk = 16, 1,000 tokens",
        "rope-order-d_qk = 16, untrained",
        "rope-order-d_qk = 32, 1,000 tokens",
        "rope-order-d_qk = 32, untrained",
    ]
