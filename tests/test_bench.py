"""The bench: its order and times by a fake clock, its document against formulas, compiled steps, and its text."""

import json
import math
from itertools import count

import pytest
import torch

from bench_setup import FULL, HEADS, LAYERS, QUICK, make_pair
from kvlatent.conversion.convert_model import convert
from kvlatent.engines.kv_dtypes import kv_dtype_named
from kvlatent.engines.roofline import decode_speedup
from kvlatent.engines.serving_figures import serving_figures
from kvlatent.evaluation.result_models import Bench
from kvlatent.evaluation.speed import variants as cells
from kvlatent.evaluation.speed.bench_run import bench
from kvlatent.evaluation.speed.caches import make_cache
from kvlatent.evaluation.speed.lines import bench_lines, bench_listing, json_line
from kvlatent.evaluation.speed.memory import read_bytes, weight_bytes
from kvlatent.evaluation.speed.ratios import (
    Spread,
    cell_rows,
    largest_contexts,
    ratio_rows,
    ratios,
    spread,
    stacked_rows,
)
from kvlatent.evaluation.speed.variants import Run, Variant, interleaved, measure_cell, random_prompt, run
from tiny import SIZES, tiny_model, tokens


@pytest.fixture(scope="module")
def pair():
    return make_pair()


@pytest.fixture(scope="module")
def document(pair):
    """A bench of the pair with an unquantised and a quantised cache."""
    return bench(pair[1], pair[0], caches=("dynamic", "quantized-fp8"), memory=2e6, **QUICK)


# Times


def test_rounds_alternate_in_order():
    order = []
    found = interleaved({name: lambda name=name: order.append(name) or len(order) for name in "AB"}, 4)
    assert "".join(order) == "ABBAABBA"
    assert found == {"A": [1, 4, 5, 8], "B": [2, 3, 6, 7]}


def test_a_machine_that_slows_down_favours_neither():
    clock = count()
    seconds = interleaved({name: lambda: 1.0 + 0.1 * next(clock) for name in "AB"}, 6)
    found = ratios(seconds["A"], seconds["B"])
    assert found.lower < 1 < found.upper
    assert found.median == pytest.approx(1, abs=0.03)


def test_spread_is_the_quartiles():
    assert spread([5, 1, 2, 4, 3]) == Spread(3, 2, 4)


def test_a_run_is_the_greedy_continuation_and_its_times_exclude_the_rest(pair, monkeypatch):
    clock, seen = count(), []
    monkeypatch.setattr(cells.time, "perf_counter", lambda: next(clock) ** 2)
    original, prompt = pair[0], tokens(2, 9)

    def spy(**inputs):
        seen.append(inputs["input_ids"])
        return original(**inputs)

    found = run(original, prompt, make_cache("dynamic", original.config, 20), 4, decode=spy)
    expected = original.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(torch.cat(seen, 1), expected[:, 9:])
    assert (found.prefill, found.decode) == (1 - 0, 9 - 4)
    assert found.last_cache_bytes / found.cache_bytes == 13 / 9


def test_order_of_a_whole_cell(pair, monkeypatch):
    order = []

    def fake(model, prompt, cache, new_tokens, decode):
        order.append("latent" if model is pair[1] else "original")
        return Run(1.0, 1.0, 1, 1, (1.0,))

    monkeypatch.setattr(cells, "run", fake)
    bench(pair[1], pair[0], caches=("dynamic",), contexts=(8,), new_tokens=1, repeats=3)
    weighed, timed = order[:4], order[4:]
    assert weighed == ["original", "original", "latent", "latent"]
    assert timed == ["original", "latent", "latent", "original", "original", "latent"]


def test_prompts_repeat_with_their_seed():
    cpu = torch.device("cpu")
    first, again, other = (random_prompt(50, 2, 30, seed, cpu) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= 0 and first.max() < 50


# The document


def test_rows_cover_the_grid_with_finite_numbers(document):
    keys = [(row["batch"], row["context"], row["cache"], row["model"]) for row in document["rows"]]
    assert len(set(keys)) == len(keys) == 2 * 2 * 2 * 2
    assert json.loads(json_line(document)) == document
    assert "\n" not in json_line(document)
    for row in document["rows"]:
        low, high = row["decode_ms_per_token_quartiles"]
        assert 0 < low <= row["decode_ms_per_token"] <= high
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["decode_ms_per_token"])
        width = {"original": 2 * FULL, "latent": 24}[row["model"]]
        numbers = row["batch"] * row["context"] * LAYERS * HEADS * width
        scales = 2 * 4 * LAYERS
        expected = 4 * numbers if row["cache"] == "dynamic" else numbers + scales
        assert row["cache_bytes"] == expected
        assert row["peak_bytes"] is None or row["peak_bytes"] >= weight_bytes_of(document, row["model"])


def weight_bytes_of(document, role):
    return document["model" if role == "latent" else "original"]["weight_bytes"]


def test_prediction_is_the_bound_by_bytes(pair, document):
    figures = serving_figures(pair[0].config, 16, 8, element_size=4)
    fp8 = kv_dtype_named("fp8", "transformers")
    quantised = serving_figures(pair[0].config, 16, 8, element_size=4, kv_dtype=fp8, original_kv_dtype=fp8)
    for row in document["ratios"]:
        known = figures if row["cache"] == "dynamic" else quantised
        expected = known.speedup(row["context"], row["batch"])
        assert row["predicted_decode"] == pytest.approx(expected, rel=1e-12 if known is figures else 1e-3)
        assert row["cache_bytes"] == pytest.approx(24 / 64, rel=2e-2)


def test_stacked_compares_everything_with_the_original_and_the_first_cache(pair, document):
    assert len(document["stacked"]) == 16
    shares = {
        (row["model"], row["cache"]): row["cache_bytes"]
        for row in document["stacked"]
        if row["context"] == 21
    }
    assert shares["original", "dynamic"] == 1
    assert shares["latent", "dynamic"] == 24 / 64
    assert shares["original", "quantized-fp8"] == pytest.approx(1 / 4, rel=1e-2)
    assert shares["latent", "quantized-fp8"] == pytest.approx(24 / 64 / 4, rel=2e-2)
    stacked = next(r for r in document["stacked"] if (r["batch"], r["context"], r["cache"], r["model"]) == (2, 21, "quantized-fp8", "latent"))  # fmt: skip
    sizes = [4 * 2 * 21 * LAYERS * HEADS * 64, 2 * 21 * LAYERS * HEADS * 24 + 24]
    weights = [read_bytes(model) for model in pair]
    assert stacked["predicted_decode"] == decode_speedup(weights[0], sizes[0], weights[1], sizes[1])


def test_longest_contexts_fill_the_memory(pair, document):
    rows = document["largest_context"]["rows"]
    assert len(rows) == 8
    for row in rows:
        model = pair[row["model"] == "latent"]
        width = {"original": 2 * FULL, "latent": 24}[row["model"]]
        size = 4 if row["cache"] == "dynamic" else 1
        exact = (2e6 - weight_bytes(model)) / (row["batch"] * LAYERS * HEADS * width * size)
        assert row["tokens"] == int(exact) if size == 4 else 0.97 * exact < row["tokens"] <= exact


def test_a_memory_that_holds_the_latent_weights_alone(pair):
    room = (weight_bytes(pair[0]) + weight_bytes(pair[1])) / 2
    found = bench(pair[1], pair[0], caches=("dynamic",), contexts=(8,), new_tokens=1, repeats=3, memory=room)
    tokens_of = {row["model"]: row["tokens"] for row in found["largest_context"]["rows"]}
    assert tokens_of["original"] == 0 < tokens_of["latent"]


def test_windows_keep_the_cache_from_growing():
    original = tiny_model("mistral")
    found = bench(
        original, caches=("dynamic", "static"), contexts=(8, 40), new_tokens=2, repeats=3, memory=1e7
    )
    assert {row["tokens"] for row in found["largest_context"]["rows"]} == {None}
    assert found["original"] is None and not found["ratios"]
    assert {row["model"] for row in found["rows"]} == {"original"}


def test_a_model_against_itself(pair):
    found = bench(pair[0], pair[0], caches=("dynamic", "static"), memory=1e7, **QUICK)
    for row in [*found["ratios"], *(row for row in found["stacked"] if row["cache"] == "dynamic")]:
        assert row["cache_bytes"] == row["predicted_decode"] == 1
        assert 0.05 < row["decode"] < 20
        low, high = row["decode_quartiles"]
        assert low <= row["decode"] <= high
    assert found["model"] == found["original"]
    by_place = {}
    for row in found["largest_context"]["rows"]:
        by_place.setdefault((row["batch"], row["cache"]), set()).add(row["tokens"])
    assert all(len(limits) == 1 for limits in by_place.values())


def test_progress_counts_every_run(pair):
    seen = []
    bench(pair[1], caches=("dynamic",), progress=lambda *step: seen.append(step), **QUICK)
    total = 5 * 3 * (8 + 2 + 21 + 2)  # tokens of five runs, of one sequence and of two
    assert seen[0] == ("load", 0, 0, "") and {step[2] for step in seen[1:]} == {total}
    first = [step[1] for step in seen[1:] if step[3] == "batch 1, context 8"]
    assert first == list(range(0, 51, 10))  # before the first run already
    assert seen[-1] == ("measure", total, total, "batch 2, context 21")


def test_the_models_come_back_as_they_were(pair):
    original = tiny_model("llama").train()
    found = bench(original, caches=("dynamic",), contexts=(8,), new_tokens=1, repeats=3, attention="eager")
    assert found["attention"] == "eager"
    assert original.training and original.config._attn_implementation == "sdpa"
    assert found["model"]["name"] == "LlamaForCausalLM"
    assert found["record"]["seed"] == 0 and found["record"]["seconds"] > 0


def test_directories_are_named_by_their_files(pair, tmp_path):
    from kvlatent.checkpoints.save import save
    from kvlatent.jobs.fingerprints import identity

    pair[0].save_pretrained(tmp_path / "whole")
    save(pair[1], tmp_path / "half")
    options = {"caches": ("dynamic",), "contexts": (8,), "new_tokens": 1, "repeats": 3, "dtype": "bfloat16"}
    found = bench(tmp_path / "half", str(tmp_path / "whole"), **options)
    assert found["model"]["name"] == "half" and found["original"]["name"] == "whole"
    assert found["model"]["fingerprint"] == identity(tmp_path / "half")
    assert found["dtype"] == "bfloat16"
    assert found["rows"][0]["cache_bytes"] == 2 * 8 * LAYERS * HEADS * 2 * FULL


def test_contexts_left_out_reach_as_far_as_the_model(pair):
    found = bench(pair[1], caches=("dynamic",), new_tokens=100, repeats=3)
    assert found["settings"]["contexts"] == [SIZES["max_position_embeddings"] - 100]


def test_what_runs_out_of_memory_is_skipped_and_named(pair, monkeypatch):
    def fails(model, prompt, cache, new_tokens, decode):
        if prompt.shape[1] > 8 and model is pair[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Run(2.0 if model is pair[0] else 1.0, 3.0, 64 if model is pair[0] else 24, 70, (1.0,) * LAYERS)

    monkeypatch.setattr(cells, "run", fails)
    found = bench(
        pair[1], pair[0], caches=("dynamic",), contexts=(8, 16), new_tokens=2, repeats=3, memory=1e7
    )
    where = {"batch": 1, "context": 16, "model": "original", "cache": "dynamic"}
    assert found["skipped"] == [where | {"reason": "out of memory"}]
    assert [row["context"] for row in found["ratios"]] == [8]
    assert found["ratios"][0]["prefill"] == 2 and found["ratios"][0]["decode"] == 1
    assert len(found["rows"]) == 3 and len(found["stacked"]) == 2
    assert "not measured: batch 1, context 16, dynamic, original: out of memory" in bench_lines(found)


def test_figures_of_nothing_are_nothing():
    assert (
        cell_rows([], 1) == ratio_rows([], {"original": None}) == stacked_rows([], {"original": None}) == []
    )
    assert largest_contexts([], {}, 1.0) == []


# Compiled steps


def test_a_compiled_step_decodes_and_keeps_its_static_cache(pair, monkeypatch):
    made, calls, caches = [], [], []

    def compile(model, **options):
        made.append((model, options))

        def step(**inputs):
            calls.append(inputs["input_ids"].shape[1])
            caches.append(inputs["past_key_values"])
            return model(**inputs)

        return step

    monkeypatch.setattr(torch, "compile", compile)
    found = bench(
        pair[1], caches=("dynamic", "static"), compile=True, contexts=(8, 9), new_tokens=2, repeats=3
    )
    assert found["compile"] and len(made) == 4 and made[0][0] is pair[1]
    assert [options["mode"] for _, options in made] == ["default"] * 4
    assert set(calls) == {1} and len(calls) == 2 * 2 * 5 * 2
    kinds = [type(cache).__name__ for cache in dict.fromkeys(caches)]
    assert kinds.count("DynamicCache") == 2 * 5 and kinds.count("StaticCache") == 2
    rates = {(row["cache"], row["context"]): row["last_cache_bytes"] for row in found["rows"]}
    assert rates["static", 8] == rates["dynamic", 8] == 4 * 10 * LAYERS * HEADS * 24


def test_a_static_cache_that_is_kept_says_the_same_again(pair):
    variant = Variant("latent", "static", pair[1], compiled=True)
    variant._step = pair[1]
    seen = []
    hook = pair[1].register_forward_hook(lambda *call: seen.append(call[-1].logits[:, -1]))
    try:
        with torch.no_grad():
            for _ in range(2):
                variant.run(tokens(1, 9), 2)
    finally:
        hook.remove()
    assert len(seen) == 6
    for first, again in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(again, first)


# Text


def test_the_table_repeats_the_document(document):
    table = bench_listing(Bench.model_validate(document))
    assert len(table) == 1 + len(document["rows"])
    for cells_, row in zip(table[1:], document["rows"], strict=True):
        assert cells_[:4] == [str(row["batch"]), str(row["context"]), row["cache"], row["model"]]
        assert cells_[4] == f"{row['prefill_s']:.3g} s"
        assert bool(cells_[-1]) == ((row["model"], row["cache"]) != ("original", "dynamic"))
    stacked = {(r["batch"], r["context"], r["cache"], r["model"]): r for r in document["stacked"]}
    for cells_, row in zip(table[1:], document["rows"], strict=True):
        if (row["model"], row["cache"]) == ("original", "quantized-fp8"):
            bound = stacked[row["batch"], row["context"], row["cache"], "original"]["predicted_decode"]
            assert bound > 1 and cells_[-1] == f"{bound:.2f}"
    ratio = document["ratios"][0]
    assert table[2][-1] == f"{ratio['predicted_decode']:.2f}"
    assert table[2][-2].startswith(f"{ratio['decode']:.2f} (")
    lines = bench_lines(document)
    assert lines[0].startswith("model: KVLatentLlamaForCausalLM, weights 401 kB, d_qk 16 and d_vo 8")
    assert any("longest context in 2 MB" in line for line in lines)
    rows = lines[lines.index("") + 2 :][: len(document["rows"])]
    assert len({line.index(row["model"]) for line, row in zip(rows, document["rows"], strict=True)}) == 1


def test_the_table_of_one_model_compares_its_caches(pair):
    found = bench(pair[1], caches=("dynamic", "quantized-fp8"), contexts=(8,), new_tokens=2, repeats=3)
    table = bench_listing(Bench.model_validate(found))
    assert table[1][-2:] == ["", ""] and all(table[2][-2:])


def test_a_number_that_is_not_finite_is_no_json(document):
    with pytest.raises(ValueError, match="JSON"):
        json_line(document | {"seconds": math.nan})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's builder of extensions warns
def test_narrower_heads_and_four_bits_stack(pair):
    """Slow once a machine: optimum-quanto builds its code at first use."""
    pytest.importorskip("optimum.quanto")
    found = bench(
        pair[1], pair[0], caches=("dynamic", "quantized-int4"), contexts=(64,), new_tokens=3, repeats=3
    )
    shares = {(row["model"], row["cache"]): row["cache_bytes"] for row in found["stacked"]}
    assert (
        shares["latent", "quantized-int4"]
        < shares["original", "quantized-int4"]
        < shares["latent", "dynamic"]
        < 1
    )
    assert found["model"]["group_sizes"] == {"quantized-int4": 16}
    assert "optimum-quanto" in found["record"]["versions"]


def test_every_family_runs_with_every_plain_cache():
    for name in ("llama-mha", "qwen3", "phi3-longrope"):
        original = tiny_model(name)
        latent = convert(original, d_qk=16, d_vo=8, preset="paper")
        variants = [Variant("latent", kind, latent) for kind in ("dynamic", "static", "quantized-fp8")]
        found, too_large = measure_cell(variants, tokens(1, 12), 2, 3, lambda: None)
        assert not too_large
        assert [len(each.runs) for each in found] == [3, 3, 3]
