"""What is rendered from the rows of the baseline tables: old beside new, sentences on fewer bits, pictures."""

import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvlatent_lab.baseline.against_quantised import against_quantised
from kvlatent_lab.baseline.finished_rows import paired_change, read_finished
from kvlatent_lab.baseline.label_places import place_labels
from kvlatent_lab.baseline.markdown_table import render_markdown
from kvlatent_lab.baseline.pictures import draw_bytes, draw_minutes
from kvlatent_lab.baseline.side_by_side import pairs_of, render_side_by_side
from kvlatent_lab.baseline.table_rows import TableRow

TOKENS = [100, 101, 99, 100]
SVG = "{http://www.w3.org/2000/svg}"


def make_row(name, ratio=1.0, size=1000.0, noise=0.01, minutes=None, right=(1, 1, 0, 1), **more):
    """A document whose losses are the original's times a ratio, and apart from it by another amount in each block."""
    losses = [n * (3 + 0.2 * i) for i, n in enumerate(TOKENS)]
    if name != "original":
        away = np.random.default_rng(len(name)).normal(size=4)
        away = math.log(ratio) + noise * (away - np.average(away, weights=TOKENS))
        losses = (np.array(losses) + TOKENS * away).tolist()
    loss = sum(losses) / sum(TOKENS)
    text = {
        "loss": loss, "perplexity": math.exp(loss), "standard_error": 1.0, "tokens": sum(TOKENS), "block_losses": losses,
        "block_tokens": TOKENS, "kl": ratio - 1, "kl_standard_error": 0.03, "top1_agreement": 0.5,
    } | more  # fmt: skip
    trials = [float(x) for x in right]
    needle = {"trials": 4, "exact": [trials], "rank": [trials], "trial_exact": trials, "trial_rank": trials}
    task = {"acc": float(np.mean(right)), "samples": 4, "answers": {"acc": trials}}
    order = {"margin": [[1.0]], "preferred": [[1.0]], "trial_margin": [trials, trials]}
    figures = {"cache": {"bytes_per_token": size}, "text fineweb": text, "task lambada": task}
    figures |= {"pass key 1024": needle, "needle 1024": needle, "order": order}
    seconds = {} if minutes is None else {"calibration": 60.0, "conversion": 60.0 * (minutes - 1)}
    record = {"machine": {"processor": "a processor"}, "dtype": "float32"}
    return {
        "model": "toy", "row": name, "settings": {"cache": "dynamic"}, "figures": figures, "seconds": seconds,
        "record": record,
    }  # fmt: skip


def made(*rows):
    return {row["row"]: row for row in rows}


@pytest.fixture
def found():
    return made(
        make_row("original"),
        make_row("head-passed-50", 1.1, 500, minutes=30),
        make_row("model-passed-75", 1.001, 750, noise=0.05),
        make_row("head-passed-50-int8", 1.12, 265),
        make_row("head-passed-75-kl-0.3M", 0.9, 750),
        make_row("original-int4", 1.03, 280, noise=0.001, right=(1, 1, 1, 1)),
        make_row("original-int8", 1.01, 530, noise=0.001),
        make_row("head-aligned-50", 1.4, 500, right=(1, 0, 0, 0), minutes=20),
        make_row("head-aligned-12.5", 30, 125),
        make_row("paper-50", 600, 500, minutes=1.01),
    )


def cells(markdown, start):
    return [
        line.strip("| ").split(" | ")[1:] for line in markdown.splitlines() if line.startswith(f"| {start} |")
    ]


def test_a_pair_is_compared_block_by_block_and_item_by_item(found):
    lines = {line[0]: line[1:] for line in cells(render_side_by_side(found), "head 50")}
    old, new = (found[f"head-{name}-50"]["figures"]["text fineweb"] for name in ("aligned", "passed"))
    changes = np.subtract(new["block_losses"], old["block_losses"])
    mean = changes.sum() / sum(TOKENS)
    spread = changes - mean * np.array(TOKENS)
    error = math.sqrt((spread**2).sum() * 4 / 3) / sum(TOKENS)
    shown = f"x{math.exp(mean):.3f} ± {math.exp(mean) * error:.3f}"
    assert lines["perplexity, fineweb"] == [f"{old['perplexity']:.2f}", f"{new['perplexity']:.2f}", shown]
    change = np.array([0, 1, 0, 1.0])
    shown = f"+0.500 ± {change.std(ddof=1) / 2:.3f}"
    for name in ("lambada, acc", "pass key, exact, at 1024", "needle, rank, at 1024", "word order, nats"):
        assert lines[name] == ["0.250", "0.750", shown]
    assert lines["KL to the original, nats"] == ["0.400", "0.100", "-0.300 ± 0.042 (not paired)"]
    assert lines["top-1 agreement"] == ["0.500", "0.500", "+0.000"]


def test_divergences_that_were_kept_by_block_are_paired(found):
    for name, more in (("aligned", 5.0), ("passed", 0.0)):
        text = found[f"head-{name}-50"]["figures"]["text fineweb"]
        text["block_divergences"] = [n * 0.1 * i + more for i, n in enumerate(TOKENS)]
        text["block_agreed"] = [50 + i for i in range(4)]
    lines = {line[0]: line[1:] for line in cells(render_side_by_side(found), "head 50")}
    assert lines["KL to the original, nats"][2] == "-0.300 ± 0.000"  # each apart by as much
    assert lines["top-1 agreement"][2] == "+0.000 ± 0.000"


def test_only_rows_that_both_exist_are_paired(found):
    assert list(pairs_of(found)) == ["head 50"]
    found["model-aligned-75"] = make_row("model-aligned-75")
    found["head-aligned-75-kl-0.3M"] = make_row("head-aligned-75-kl-0.3M")
    assert list(pairs_of(found)) == ["head 50", "model 75", "head 75 kl 0.3M"]
    found["model-aligned-75"]["record"]["failed"] = "no room"
    assert list(pairs_of(found)) == ["head 50", "head 75 kl 0.3M"]
    del found["head-passed-50"], found["head-passed-75-kl-0.3M"]
    assert render_side_by_side(found) == ""


def test_rows_of_other_items_are_not_compared():
    with pytest.raises(ValueError, match="on the same items: got 2 and 3; delete the row of fewer items"):
        paired_change([0, 1], [0, 1, 1])


def test_sentences_say_where_fewer_bits_are_better(found):
    int4, int8, half = against_quantised(found)
    assert "280 bytes a token and has x1.03" in int4 and "530 bytes a token and has x1.01" in int8
    before, _, after = int4.partition("Of rows with fewer bytes")
    assert "better than `head-passed` at 50 % (x1.068)" in before
    assert "within 2 standard errors of `model-passed` at 75 %" in before
    assert "worse than `head-passed-kl-0.3M` at 75 % (x0.874)" in before
    assert "better: none; within the errors: none; worse: 2." in after  # 12.5 % and half under int8
    assert "Of rows with fewer bytes, better: none" in int8 and "better than none" in int8
    shown = "LAMBADA -0.250 ± 0.250, pass key, rank, at 1024 -0.250 ± 0.250"
    assert half.startswith("**Half the width under an int8 cache**, `head-passed-50-int8` (265 bytes)")
    assert shown in half
    assert "head-aligned-50" not in int4 + int8  # there is a newer row
    better = {**found, "head-passed-50": make_row("head-passed-50", 1.001, 200, noise=0.001)}
    assert "Of rows with fewer bytes, better: `head-passed` at 50 %" in against_quantised(better)[0]


def test_sentences_need_rows_to_be_about(found):
    assert against_quantised({"original": found["original"]}) == []
    some = {name: found[name] for name in ("original", "original-int4", "head-aligned-50")}
    assert "`head-aligned` at 50 %" in against_quantised(some)[0]  # where nothing newer is measured


def read_svg(path):
    root = ElementTree.parse(path).getroot()
    texts = ["".join(one.itertext()).strip() for one in root.iter(f"{SVG}text")]
    return root, texts


def test_the_picture_of_bytes(found, tmp_path):
    assert draw_bytes(found, tmp_path / "a.svg")
    root, texts = read_svg(tmp_path / "a.svg")
    assert root.attrib["role"] == "img" and root.attrib["aria-labelledby"] == "title about"
    assert [root.find(f"{SVG}{tag}").attrib["id"] for tag in ("title", "desc")] == ["title", "about"]
    about = root.find(f"{SVG}desc").text
    for row in ("original-int4", "head-passed-50", "head-aligned-50", "head-passed-50-int8"):
        assert f"{row} x" in about
    for name in (
        "original", "int4 alone", "int8 alone", "narrower, int8", "narrower, a table a head", "narrower, trained on 0.3M tokens",
        "narrower, a table a head, as before", "narrower, one table for the model", "above the picture: head-aligned-12.5 x30",
    ):  # fmt: skip
        assert name in texts
    assert "narrower, int4" not in texts
    assert draw_bytes(found, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_old_method_stands_in_where_nothing_newer_is_measured(found, tmp_path):
    found["model-aligned-75"] = make_row("model-aligned-75", 1.2, 750)
    found["head-aligned-50-kl-0.3M"] = make_row("head-aligned-50-kl-0.3M", 1.2, 500)
    draw_bytes(found, tmp_path / "a.svg")
    assert not {"narrower, one table for the model, as before", "narrower, trained on 0.3M tokens, as before"} & set(
        read_svg(tmp_path / "a.svg")[1]
    )  # fmt: skip
    del found["model-passed-75"], found["head-passed-75-kl-0.3M"]
    draw_bytes(found, tmp_path / "a.svg")
    assert {"narrower, one table for the model, as before", "narrower, trained on 0.3M tokens, as before"} <= set(
        read_svg(tmp_path / "a.svg")[1]
    )  # fmt: skip


def test_the_picture_of_minutes(found, tmp_path):
    trained = make_row("head-passed-50-kl-0.3M", 1.02, 500, minutes=30)
    trained["seconds"]["training"] = 1200.0
    assert draw_minutes(found | made(trained), tmp_path / "a.svg")
    root, texts = read_svg(tmp_path / "a.svg")
    for name in (
        "a table a head", "a table a head, as before", "0.3M tokens", "above the picture: paper-50 x600"
    ):  # fmt: skip
        assert name in texts
    about = root.find(f"{SVG}desc").text
    assert "at 50 minutes" in about and "head-aligned-50 x1.4" in about
    assert "int8" not in about and "75" not in about  # half the cache, in 16 bits


def test_nothing_to_draw(found, tmp_path):
    original = {"original": found["original"]}
    assert not draw_bytes(original, tmp_path / "a.svg") and not draw_minutes(original, tmp_path / "a.svg")
    without = {name: row for name, row in found.items() if name != "original"}
    assert not draw_bytes(without, tmp_path / "a.svg") and not draw_minutes(without, tmp_path / "a.svg")
    far = {name: found[name] for name in ("original", "paper-50")}
    assert not draw_minutes(far, tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []


def test_labels_keep_clear_of_each_other_and_of_points():
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    axes.set(xlim=(0, 10), ylim=(0, 10))
    labels = [(f"a longer name {i}", 5 + 0.02 * i, 5 + 0.1 * i, "black") for i in range(4)]
    place_labels(axes, [*labels, ("", 5.6, 5.1, "black"), ("at the edge", 9.99, 9.99, "black")])
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert len(boxes) == 5
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    points = [axes.transData.transform(label[1:3]) for label in labels]
    assert not any(box.contains(*point) for box in boxes for point in points)
    frame = axes.get_window_extent(renderer)
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and box.y1 <= frame.y1 for box in boxes)


def test_the_markdown_holds_pictures_sentences_and_both_tables(found, tmp_path):
    text = render_markdown(found, {"Quality against bytes": "x.svg"})
    order = ("![Quality against bytes](x.svg)", "**The original under an int4 cache**", "| row | widths |", "Errors are", "## Old and new side by side")  # fmt: skip
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "side by side" not in render_markdown({"original": found["original"]}, {})


def test_finished_rows_are_read_in_order(found, tmp_path):
    for name in ("original", "head-passed-50"):
        (tmp_path / f"{name}.json").write_text(json.dumps(found[name]))
    rows = [TableRow("head-passed-50"), TableRow("missing"), TableRow("original")]
    assert list(read_finished(tmp_path, rows)) == ["head-passed-50", "original"]


def test_the_last_sentence_names_what_computed(found):
    """A card where there was one, the processor otherwise."""
    assert "Measured in float32 on a processor.\n" in render_markdown(found, {})
    for one in found.values():
        one["record"]["machine"]["accelerator"] = "a card"
    assert "Measured in float32 on a card.\n" in render_markdown(found, {})
