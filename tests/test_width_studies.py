"""The studies of nested widths and of shared caches: what their cells measure, at which cost, and what they conclude."""

import json

import pytest
import torch

from kvlatent.conversion.convert_model import convert
from kvlatent_lab.shared_cache import share_cache
from kvlatent_lab.study import STUDIES
from kvlatent_lab.study.cross_layer_grid import forward_flops
from kvlatent_lab.study.grid_cells import Scale
from study_worker import SETTINGS, STEP, lay_out, run
from tiny import tiny_model

LENGTH = 32


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    return lay_out(tmp_path_factory.mktemp("widths"), tiny_tokenizer)


def figures_of(place, out, name):
    return json.loads((place / out / f"{name}.json").read_text())["figures"]


def counted(d_qk, d_vo, caching):
    """Products of a forward pass of the tiny Llama a token, by hand; `caching` of its three layers project keys and values."""
    width, ffn, vocabulary, heads, kv_heads, layers = 64, 96, 128, 4, 2, 3
    queries, outputs = 2 * width * heads * d_qk, 2 * heads * d_vo * width
    attended = 2 * LENGTH * heads * (d_qk + d_vo)
    keys_values = 2 * width * kv_heads * (d_qk + d_vo)
    feed_forward = 3 * 2 * width * ffn
    return (
        layers * (queries + outputs + attended + feed_forward)
        + caching * keys_values
        + 2 * width * vocabulary
    )


def test_flops_are_those_counted_by_hand():
    model = tiny_model("llama-mha", num_key_value_heads=2)
    assert forward_flops(model, LENGTH) == counted(32, 32, 3)
    assert forward_flops(convert(model, d_qk=16, d_vo=16, preset="own-frequency"), LENGTH) == counted(
        16, 16, 3
    )
    assert forward_flops(share_cache(model, "mean", 32, 32), LENGTH) == counted(32, 32, 2)
    assert forward_flops(share_cache(model, "first", 16, 16), LENGTH) == counted(16, 16, 2)


def test_designs_are_compared_at_equal_bytes_and_flops(place):
    cells = "shared-mean-16x16-*,shared-first-8x8-*,narrow-8x8-*,narrow-4x4-*"
    report = run(place, "cross-layer", "shared", tokens=20 * STEP, cells=cells)
    assert (len(report["measured"]), report["failed"]) == (4, {})
    shared, narrow, both, quarter = (figures_of(place, "shared", name) for name in report["cells"])
    assert (shared["cache_ratio"], narrow["cache_ratio"]) == (0.5, 0.5)
    assert (both["cache_ratio"], quarter["cache_ratio"]) == (0.25, 0.25)
    trained = [each["training_flops"] for each in (shared, narrow, both, quarter)]
    assert max(trained) / min(trained) < 1.05  # a step in twenty
    assert narrow["tokens_trained"] > shared["tokens_trained"] > 20 * STEP  # its forward is cheaper
    assert both["forward_flops"] < shared["forward_flops"]
    assert all(torch.isfinite(torch.tensor(each["ratio"])) for each in (shared, narrow, both, quarter))
    assert shared["converted_ratio"] != shared["ratio"]


def document(settings, figures):
    return {"settings": settings, "figures": figures}


def test_designs_stand_beside_narrow_heads_of_the_same_bytes_and_seed():
    def of(design, ratio, seed, loss):
        return document({"design": design, "seed": seed}, {"cache_ratio": ratio, "loss": loss})

    documents = [of("narrow", 0.5, 0, 2.0), of("narrow", 0.5, 1, 3.0), of("narrow", 0.25, 0, 9.0)]
    documents += [
        of("shared-mean", 0.5, 0, 2.5),
        of("shared-mean", 0.5, 1, 3.1),
        of("shared-mean", 0.25, 1, 0.0),
    ]
    (row,) = STUDIES["cross-layer"].conclude(documents)["comparisons"]
    assert (row["design"], row["cache_ratio"], row["seeds"]) == ("shared-mean", 0.5, 2)
    assert row["log_ratio"] == pytest.approx(0.3)
    assert row["standard_error"] == pytest.approx(0.2)


def test_a_nested_checkpoint_is_trained_once_for_all_its_widths(place):
    seen = []
    report = run(
        place,
        "nested",
        "nested",
        tokens=4 * STEP,
        overrides=SETTINGS,
        progress=lambda step, done, total, note: seen.append(step),
    )
    names = [f"{trained}-{width}x{width}-seed0" for width in (8, 4) for trained in ("alone", "nested")]
    assert (report["measured"], report["failed"]) == (names, {})
    assert len({step for step in seen if "stage II" in step}) == 3  # one of the nested cells finds it trained
    alone, nested, narrow, cut = (figures_of(place, "nested", name) for name in names)
    assert (nested["cache_ratio"], cut["cache_ratio"]) == (0.5, 0.25)
    assert nested["tokens_trained"] == cut["tokens_trained"] == alone["tokens_trained"] == 4 * STEP
    assert len({each["ratio"] for each in (alone, nested, narrow, cut)}) == 4
    wide, half = STUDIES["nested"].conclude(
        [json.loads((place / "nested" / f"{name}.json").read_text()) for name in names]
    )["comparisons"]
    assert (wide["d_qk"], half["d_qk"]) == (8, 4)
    assert half["log_ratio"] == pytest.approx(cut["loss"] - narrow["loss"])


def test_cells_scale_with_the_head():
    scale = Scale(64, (0, 1), 1000, 0.2, STEP)
    names = [cell.name for cell in STUDIES["nested"].cells(scale)]
    assert names[:4] == ["alone-32x32-seed0", "nested-32x32-seed0", "alone-18x18-seed0", "nested-18x18-seed0"]
    cells = {cell.name: cell for cell in STUDIES["cross-layer"].cells(scale)}
    assert {cell.extra["design"] for cell in cells.values()} == {
        "shared-mean",
        "shared-first",
        "narrow",
        "calibrated",
    }
    assert {
        "shared-mean-64x64-seed0",
        "narrow-32x32-seed1",
        "shared-first-32x32-seed0",
        "calibrated-16x16-seed0",
    } <= set(cells)
