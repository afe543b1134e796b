"""The report: its figures equal the JSON, it needs nothing but itself, and models and texts are told apart."""

import json
import math
import re
import statistics

import pytest

from kvlatent_lab.report import report
from kvlatent_lab.report.measured_models import measured_models, one_text
from kvlatent_lab.report.result_files import read_documents
from report_page import Page, read_number
from report_setup import (
    CONFIG,
    LATENT,
    MODEL,
    RESULTS,
    WIDTHS,
    bench,
    committed,
    comparison,
    conversion,
    cost,
    evaluation,
    perplexity_alone,
    run,
    study,
    write,
    write_run,
)

RATIO = "perplexity over the original's"
STUDIES = [path for path in sorted(RESULTS.glob("study_*_embedded")) if "stages" not in path.name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A page of everything, rendered once, and what `report` said of it."""
    folder = tmp_path_factory.mktemp("report")
    kinds = {"evaluation": evaluation(model=LATENT), "bench": bench(), "comparison": comparison()}
    kinds |= {"conversion": conversion()}
    for name, document in kinds.items():
        write(folder / "results" / f"{name}.json", document)
    write_run(folder / "results" / "half")
    said = report([folder / "results", *STUDIES], folder / "page" / "report.html")
    return Page((folder / "page" / "report.html").read_text()), said


@pytest.fixture
def page_of(tmp_path):
    """Write documents to files of their own and render them."""

    def call(*documents):
        files = [write(tmp_path / f"{i}.json", document) for i, document in enumerate(documents)]
        said = report(files, tmp_path / "report.html")
        return Page((tmp_path / "report.html").read_text()), said

    return call


def cells_of(name, **wanted):
    """Committed cells of a study whose settings are those."""
    cells = [json.loads(path.read_text()) for path in sorted((RESULTS / name).glob("*-seed*.json"))]
    return [one for one in cells if wanted.items() <= one["settings"].items()]


def standard_error(values):
    return statistics.stdev(values) / len(values) ** 0.5


def mean_of(grid):
    """Mean of all entries of a grid."""
    return statistics.fmean(value for row in grid for value in row)


def test_progress_comes_before_every_file_and_section(tmp_path):
    paths = [write(tmp_path / f"{index}.json", perplexity_alone()) for index in range(3)]
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
    cells = sum(len(list(folder.glob("*-seed*.json"))) for folder in STUDIES)
    once = dict.fromkeys(("bench", "comparison", "conversion", "evaluation", "metrics", "run"), 1)
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {**once, "study": cells}
    assert said["skipped"] == [] and said["model"] == MODEL["name"]
    assert "results/half/run.json" in [one["file"] for one in said["used"]]
    json.dumps(said)


def test_every_entry_is_its_number_rounded(whole):
    page, _ = whole
    entries = [entry for one in page.listings.values() for entry in one.values() if entry.value is not None]
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
            "perplexity": own["perplexity"],
            "bits per byte": own["bits_per_byte"],
            "cache, bytes per token": own["cache_bytes_per_token"],
            "needle reproduced, mean of the grid": mean_of(own["needle"]["exact"]),
            "needle's reciprocal rank, mean": mean_of(own["needle"]["rank"]),
            "true word order likelier by, nats": mean_of(own["order"]["margin"]),
            "tokens scored": own["tokens"],
        }
        for row, value in wanted.items():
            assert page.number("headline", row, label) == pytest.approx(value, rel=1e-12), row
        assert page.error("headline", "perplexity", label) == own["standard_error"]
    label = LATENT["name"]
    assert page.number("headline", RATIO, label) == figures["ratio"]
    assert page.error("headline", RATIO, label) == figures["ratio_standard_error"]
    assert page.number("headline", "cache kept", label) == 0.5
    row = "divergence from the original, nats per token"
    assert page.number("headline", row, label) == figures["fidelity"]["kl"]
    row = "same likeliest token as the original"
    assert page.number("headline", row, label) == figures["fidelity"]["top1_agreement"]
    assert page.listings["headline"]["widths of keys/values", label].text == "32\u201336/28\u201332"
    assert page.listings["headline"]["diagnosis", label].text == "none"
    evidence = evaluation()["diagnosis"]["findings"][0]["evidence"]["needle_rank_kept"]
    for column in ("value", "threshold"):
        assert page.number(f"diagnosis-{label}", "none: needle rank kept", column) == evidence[column]


def test_tasks_and_findings_are_shown(page_of):
    document = perplexity_alone()
    document["figures"]["latent"]["tasks"] = {
        "tasks": {"arc_easy": {"acc": 0.405, "acc_stderr": 0.014, "samples": 9}}
    }
    document["diagnosis"] = {
        "findings": [{"name": "forgetting", "evidence": {"kl": {"value": 0.5}}, "advice": "Keep more."}],
        "not_measured": ["needle: needs both"],
        "summary": "Found forgetting.",
    }
    page, _ = page_of(document)
    cell = "headline", "arc_easy, acc", LATENT["name"]
    assert page.number(*cell) == 0.405 and page.error(*cell) == 0.014
    assert page.number("headline", "arc_easy, acc", MODEL["name"]) is None  # not measured
    for text in ("Found forgetting.", "forgetting: Keep more.", "Not measured. needle: needs both"):
        assert text in page.text


def test_grids_and_layers_equal_the_json(whole):
    page, _ = whole
    figures = evaluation()["figures"]
    for name, label in (("original", MODEL["name"]), ("latent", LATENT["name"])):
        needle, order = figures[name]["needle"], figures[name]["order"]
        for score in ("exact", "rank"):
            drawn = [entry.value for entry in page.listings[f"needle-{score}-{label}"].values()]
            assert drawn == [value for row in needle[score] for value in row]
        for span, margins, errors in zip(
            order["spans"], order["margin"], order["margin_standard_error"], strict=True
        ):
            columns = [f"depth {depth:g}" for depth in order["depths"]]
            assert [page.number(f"order-margin-{label}", str(span), one) for one in columns] == margins
            assert [page.error(f"order-margin-{label}", str(span), one) for one in columns] == errors
            mean = pytest.approx(statistics.fmean(margins), rel=1e-12)
            assert page.number("order-margin", str(span), label) == mean
            ends = [page.number("order-margin", str(span), f"{label}, {end}") for end in ("lower", "upper")]
            assert ends == [min(margins), max(margins)]
    for name in ("relative_error", "attention_kl", "entropy_ratio"):
        wanted = [layer[name] for layer in figures["fidelity"]["layers"]]
        assert page.column(f"layers-{name}", LATENT["name"]) == wanted
    for name, widths in zip(("keys, d_qk", "values, d_vo"), zip(*WIDTHS, strict=True), strict=True):
        assert page.column(f"widths-{LATENT['name']}", name) == list(widths)


def test_runs_and_losses_equal_the_json(whole):
    page, _ = whole
    document, steps = run()
    name = "results/half/run.json"
    rows = document["conversion"]["layers"]
    for strategy in ("calibrated", "paper", "energy"):
        assert page.column(f"layer-errors-{name}", strategy) == [row["errors"][strategy] for row in rows]
    assert page.column(f"layer-widths-{name}", "keys, d_qk") == [row["d_qk"] for row in rows]
    assert page.column(f"stages-{name}", "stage II") == [150, 204_800, 1.5, 14.0, 2.9]
    assert page.column(f"steps-{name}", "perplexity") == [8.68, 9.41, 9.02, 8.76]
    assert page.column("loss-stage1", "half") == [step["loss"] for step in steps if step["stage"] == 1]
    second = {step["tokens"]: step["loss"] for step in steps if step["stage"] == 2}
    drawn = {row: entry.value for (row, _), entry in page.listings["loss-stage2"].items()}
    assert len(drawn) == 100 and {"4,096", "614,400"} <= set(drawn)  # 50 of 150 left out, not the ends
    assert all(second[int(row.replace(",", ""))] == value for row, value in drawn.items())


def test_speed_equals_the_json(whole):
    page, _ = whole
    document, name = bench(), "results/bench.json"
    for row in document["rows"]:
        label = f"{row['model']}, {row['cache']}, batch {row['batch']}, context {row['context']:,}"
        assert page.number(f"bench-{name}", label, "decode, ms per token") == row["decode_ms_per_token"]
        assert page.number(f"bench-{name}", label, "cache, bytes") == row["cache_bytes"]
        cells = f"decode-{row['batch']}-{name}", f"{row['context']:,}"
        column = f"{row['model']}, {row['cache']}"
        assert page.number(*cells, column) == row["decode_ms_per_token"]
        ends = [page.number(*cells, f"{column}, {end}") for end in ("lower", "upper")]
        assert ends == row["decode_ms_per_token_quartiles"]
    for ratio in document["ratios"]:
        cells = f"faster-{ratio['batch']}-{name}", f"{ratio['context']:,}"
        assert page.number(*cells, f"measured, {ratio['cache']}") == ratio["decode"]
        assert page.number(*cells, f"predicted, {ratio['cache']}") == ratio["predicted_decode"]
    for one in document["stacked"]:
        cells = (
            f"stacked-{one['batch']}-{name}",
            f"{one['model']}, {one['cache']}, context {one['context']:,}",
        )
        found = [page.number(*cells, column) for column in ("times faster", "lower", "upper")]
        assert found == [one["decode"], *one["decode_quartiles"]]
        assert page.number(*cells, "share of the cache") == one["cache_bytes"]
    assert page.listings[f"longest-{name}"]["latent, dynamic, batch 1", "tokens"].value == 242_000
    assert page.listings[f"longest-{name}"]["latent, quantized-int4, batch 1", "tokens"].text == "no limit"


def test_a_bench_says_what_ran(page_of):
    small = bench(rows=bench()["rows"][:1], ratios=[], stacked=[])
    setup = "cpu, float32, sdpa attention, step not compiled"
    page, _ = page_of(small)
    assert f"Measured: {setup}." in page.text and page.text.count(setup) == 2
    random = {**small["model"], "random_weights": True}
    page, _ = page_of(small, {**small, "compile": True, "model": random})
    other = "cpu, float32, sdpa attention, step compiled, random weights"
    assert f"Measured: {setup}; {other}." in page.text


def test_studies_are_means_over_seeds(whole):
    page, _ = whole
    for rank in (0, 4, 64):
        cells = cells_of("study_lora_rank_embedded", lora_rank=rank)
        assert len(cells) == 1
        wanted = cells[0]["figures"]["ratio"], cells[0]["figures"]["ratio_standard_error"]
        for listing, row in (
            ("study-lora-rank", f"rank {rank}"),
            ("study-lora-rank-lora_rank-ratio", str(rank)),
        ):
            assert (page.number(listing, row, RATIO), page.error(listing, row, RATIO)) == wanted
    ratios = [
        one["figures"]["ratio"]
        for one in cells_of("study_widths_embedded", preset="calibrated", d_qk=8, d_vo=8)
    ]
    cell = "study-widths", "untrained", RATIO
    rows = {row for row, _ in page.listings["study-widths"]}
    row = next(row for row in rows if "calibrated" in row and "d_qk 8, d_vo 8" in row)
    cell = "study-widths", row, RATIO
    assert page.number(*cell) == pytest.approx(statistics.fmean(ratios), rel=1e-12)
    assert page.number("study-widths", row, "seeds") == len(ratios)


def test_seeds_are_averaged_and_stage_one_is_compared_seed_by_seed(page_of):
    cells = []
    for stage1, ratios in ((0, (1.5, 1.7, 1.6)), (200, (1.2, 1.5, 1.1))):
        settings = {
            "preset": "paper",
            "d_qk": 8,
            "d_vo": 8,
            "stage1_tokens": stage1,
            "stage2_tokens": 1000 - stage1,
        }
        for seed, ratio in enumerate(ratios):
            cells.append(study("stages", f"{stage1}-{seed}", {**settings, "seed": seed}, cost(ratio, 0.125)))
    failed = study("stages", "paper-4x4", {"preset": "paper", "d_qk": 4}, {}, record={"failed": "too narrow"})
    page, _ = page_of(*cells, failed)
    row = "stage1 tokens 0"
    assert page.number("study-stages", row, RATIO) == pytest.approx(1.6, rel=1e-12)
    assert page.error("study-stages", row, RATIO) == pytest.approx(standard_error([1.5, 1.7, 1.6]), rel=1e-9)
    assert page.number("study-stages", row, "seeds") == 3
    gains = [1.2 / 1.5, 1.5 / 1.7, 1.1 / 1.6]
    cell = "study-stages-gain-paper, 1,000 tokens", "20", "12.5 % of the cache"
    assert page.number(*cell) == pytest.approx(statistics.fmean(gains), rel=1e-12)
    assert page.error(*cell) == pytest.approx(standard_error(gains), rel=1e-9)
    assert "paper-4x4 could not be measured: too narrow" in page.text


def test_conversions_and_variants_equal_the_json(whole):
    page, _ = whole
    cells = conversion()["cells"]
    ratios = [cells[f"ours-32x32-model-aligned-seed{seed}"]["ratio"] for seed in range(3)]
    row = "ours model aligned, 32/32"
    assert page.number("quality", row, RATIO) == pytest.approx(statistics.fmean(ratios), rel=1e-12)
    assert page.error("quality", row, RATIO) == pytest.approx(standard_error(ratios), rel=1e-9)
    assert page.number("quality", row, "seeds") == 3 and page.number("quality", row, "cache kept") == 0.5
    assert page.number("quality", LATENT["name"], RATIO) == evaluation()["figures"]["ratio"]
    rows, name = comparison()["rows"], "comparison-results/comparison.json"
    assert page.column(name, "perplexity") == [one["perplexity"] for one in rows.values()]
    assert page.column(name, "over the original's") == [one.get("ratio", 1.0) for one in rows.values()]


def test_studies_of_variants_are_dots(page_of):
    cells = [
        study(
            name,
            f"{cell}-seed0",
            {"preset": "paper", "keys": cell, "d_qk": 16, "d_vo": 16},
            cost(ratio, 0.25),
        )
        for name in ("choices", "conversion")
        for cell, ratio in (("head-aligned-16x16", 1.1), ("paper-16x16", 3.0))
    ]
    page, _ = page_of(*cells)
    assert page.number("study-choices-ratio", "paper-16x16", RATIO) == 3.0
    assert page.number("study-conversion-ratio", "head-aligned-16x16", RATIO) == 1.1
    assert page.number("quality", "head aligned, 16/16", RATIO) == 1.1


def test_attenuation_curves(whole):
    page, _ = whole
    figures = committed("study_rope_embedded/calibrated-16-seed0.json")["figures"]["attenuation"]
    assert page.column("attenuation-d_qk = 16", "calibrated") == figures["latent"]
    assert page.column("attenuation-d_qk = 16", "original") == figures["original"]
    tables = [table.short for layer in CONFIG.tables for table in layer]
    for x in (0, 1, 100, 128):
        curves = [sum(math.cos(x * f) for f in table) / len(table) for table in tables]
        wanted = [statistics.fmean(curves), min(curves), max(curves)]
        columns = [LATENT["name"], *(f"{LATENT['name']}, {end}" for end in ("lower", "upper"))]
        drawn = [page.number("attenuation-models", str(x), column) for column in columns]
        assert drawn == pytest.approx(wanted, abs=1e-9)


def test_trained_and_untrained_cells_stay_apart(whole):
    page, _ = whole
    trained = "163,840 tokens"
    for name in ("untrained", trained):
        assert f"study-widths-cache kept, %-ratio-{name}" in page.listings
        assert f"rope-order-d_qk = 16, {name}" in page.listings
    assert "attenuation-d_qk = 16" in page.listings  # training leaves the tables as they are
    cells = {tokens: cells_of(f"study_widths_{name}embedded", preset="paper", d_qk=16, d_vo=16)[0]
             for tokens, name in (("", ""), (f", trained on {trained}", "trained_"))}  # fmt: skip
    for tokens, cell in cells.items():
        if not tokens:  # the conversion benchmark has the same conversion, as another seed
            continue
        assert page.number("quality", f"paper{tokens}, 16/16", RATIO) == cell["figures"]["ratio"]


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
    style = page.html.partition("<style>")[2].partition("</style>")[0]
    light, _, dark = style.partition("prefers-color-scheme: dark")
    for name in {*re.findall(r"var\(--([\w]+)\)", drawn), "page", "heat"}:
        assert f"--{name}:" in light and f"--{name}:" in dark


def test_provenance(whole):
    page, _ = whole
    row, record = page.listings["provenance-evaluation"], evaluation()["record"]
    assert row["results/evaluation.json", "command"].text == record["command"]
    assert row["results/evaluation.json", "seed"].text == str(record["seed"])
    assert row["results/evaluation.json", "seconds"].text == f"{record['seconds']:.1f}"
    own = page.listings["provenance-conversion"]["results/conversion.json: paper-32x32", "command"].text
    assert own == conversion()["cells"]["paper-32x32"]["command"]
    assert "Python 3.11.7, torch 2.13.0+cpu, transformers 5.23.0" in page.text
    assert "processor: AMD EPYC, cores: 2, torch threads: 2" in page.text


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
    assert page.listings["headline"]["perplexity", MODEL["name"]] == ("8.50 ± 0.20", 8.5, 0.2)


def test_models_of_one_name_are_told_apart(page_of):
    latent, original = LATENT["name"], MODEL["name"]
    page, _ = page_of(perplexity_alone(), perplexity_alone(tokens=9))
    columns = {column for _, column in page.listings["headline"]}
    assert columns == {f"{name} ({i}.json)" for name in (latent, original) for i in (0, 1)}
    twins = perplexity_alone() | {"model": {**LATENT, "name": "one"}, "original": {**MODEL, "name": "one"}}
    columns = {column for _, column in page_of(twins)[0].listings["headline"]}
    assert columns == {"one (0.json), original", "one (0.json), latent"}


def test_files_of_one_name_are_told_apart(tmp_path):
    files = [write(tmp_path / name / "x.json", perplexity_alone(tokens=ord(name))) for name in "ab"]
    report(files, tmp_path / "report.html")
    columns = {column for _, column in Page((tmp_path / "report.html").read_text()).listings["headline"]}
    assert {f"{LATENT['name']} (x.json)", f"{LATENT['name']} (x.json) (2)"} < columns and len(columns) == 4


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
    documents = perplexity_alone(), perplexity_alone(perplexity=9.0, **changes)
    files = [write(tmp_path / f"{i}.json", document) for i, document in enumerate(documents)]
    assert one_text(measured_models(read_documents(files))) == same
    assert one_text(measured_models(read_documents(files[1:])))


def test_the_page_says_whether_all_read_one_text(page_of):
    differ = "The texts differ, or how they were read: columns compare only within one file."
    page, _ = page_of(perplexity_alone())
    assert "on the same text" in page.text and differ not in page.text
    page, _ = page_of(perplexity_alone(), perplexity_alone({"name": "b.txt", "sha256": "cd"}, tokens=1000))
    assert "on the same text" not in page.text and differ in page.text
    for i, text, tokens in ((0, "valid.txt", 50_000), (1, "b.txt", 1000)):
        label = f"{LATENT['name']} ({i}.json)"
        assert page.listings["headline"]["text", label].text == text
        assert page.number("headline", "tokens scored", label) == tokens
    assert "50,000" in page.text and "points compare only within one source" in page.text
    same = study("widths", "a", {"preset": "paper"}, cost(3.0, 0.5))
    assert "points compare only within one source" not in page_of(same)[0].text


def test_an_original_evaluated_alone_is_one(page_of):
    alone = evaluation(original=None, model=MODEL)
    alone["figures"] = {"latent": alone["figures"]["original"]}
    alone["diagnosis"] = {"findings": [], "not_measured": ["needle: needs figures of both models"]}
    page, said = page_of(alone)
    assert "Diagnosis" not in said["sections"] and "Not measured" not in page.text
    assert "The original, on the same text" in page.text and "of needles found" not in page.text
    drawn = "".join(re.findall(r"<svg.*?</svg>", page.html, flags=re.DOTALL))
    assert "var(--original)" in drawn and "var(--c1)" not in drawn  # word order, in the original's colour
    alone["model"] = {**MODEL, "latent": CONFIG.to_dict()}
    page, said = page_of(alone)
    assert "Diagnosis" in said["sections"] and "Not measured. needle" in page.text
    assert "of needles found" in page.text


def test_hostile_names_are_text(page_of):
    name = '<script>alert("1")</script> & $x$ "\'>'
    hostile = evaluation(model={**LATENT, "name": name}, original={**MODEL, "name": f"{name} before"})
    cells = [
        study(
            kind,
            f"{i}",
            {"preset": name, "_b": i, "c": f"_{i}", "d_qk": 8, "d_vo": 8},
            {name: i, "ratio": 1.5 + i},
        )
        for kind in (name, "widths", "choices")
        for i in range(3)
    ]
    page, said = page_of(hostile, *cells)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script"}) and "<script" not in page.html
    assert said["model"] == f"{name} before" == page.headings[0]
    assert page.number("headline", "perplexity", name) == evaluation()["figures"]["latent"]["perplexity"]
    assert page.column(f"study-{name}", name) == [0.0, 1.0, 2.0]


def test_equal_files_give_an_equal_page(page_of):
    assert page_of(evaluation(), comparison())[0].html == page_of(evaluation(), comparison())[0].html
