"""The grids of the studies, what each measures, and what is concluded from all cells."""

import json
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from kvlatent.checkpoints.save import save
from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation.perplexity import perplexity, perplexity_ratio
from kvlatent.jobs.recipe import Recipe
from kvlatent.planning.width_plan import plan
from kvlatent.selection.choices import resolve_choices
from kvlatent.selection.latent_config import choose
from kvlatent.selection.statistics import Statistics
from kvlatent_lab.study import STUDIES, summary
from kvlatent_lab.study import eviction as eviction_study
from kvlatent_lab.study.grid_cells import Cell, Scale, choices_of, recipe_of
from kvlatent_lab.study.press_worker import main as press_main
from kvlatent_lab.study.press_worker import scores
from kvlatent_lab.study.rotary_grid import measure_curves, standard_config
from kvlatent_lab.study.study_cell import numeric
from on_disk import write_checkpoint
from study_worker import SETTINGS, STEP, lay_out, original_and_blocks, run
from tiny import LLAMA3_ROPE

SCALE = Scale(head_dim=128, seeds=(0, 1), tokens=0, stage1_share=0.2, step=STEP)
# The columns of the paper's Tables 2 and 6, but (128, 128), which is the original.
TABLE_2 = "64,64 32,32 16,16 64,128 32,128 16,128 128,64 128,32 128,16"
TABLE_6 = "64,32 32,64 64,16 16,64"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer) -> Path:
    return lay_out(tmp_path_factory.mktemp("grids"), tiny_tokenizer)


def figures_of(place, out, name):
    return json.loads((place / out / f"{name}.json").read_text())["figures"]


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("tokens", [0, 20 * STEP])
def test_cells_are_named_apart_and_so_are_their_settings(name, tokens):
    cells = STUDIES[name].cells(Scale(64, (0, 1, 2), tokens or 10 * STEP, 0.2, STEP))
    assert len({cell.name for cell in cells}) == len(cells)
    assert len({json.dumps(cell.settings, sort_keys=True) for cell in cells}) == len(cells)
    assert all(set(cell.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.+-") for cell in cells)


def test_widths_are_those_of_the_paper_and_scale_with_the_head():
    expected = {tuple(map(int, pair.split(","))) for pair in f"{TABLE_2} {TABLE_6}".split()}
    for preset, seeds in (
        ("paper", 1),
        ("calibrated", 2),
    ):  # a seed changes nothing in the untrained paper preset
        found = [(c.d_qk, c.d_vo) for c in STUDIES["widths"].cells(SCALE) if c.preset == preset]
        assert len(found) == seeds * len(expected)
        assert set(found) == expected
    small = STUDIES["widths"].cells(Scale(64, (0,), 0, 0.2, STEP))
    assert {(2 * c.d_qk, 2 * c.d_vo) for c in small} == expected


def test_stages_compare_at_equal_tokens_and_whole_steps():
    cells = STUDIES["stages"].cells(Scale(64, (0, 1, 2), 1000 * STEP + 7, 0.2, STEP))
    assert len(cells) == 2 * 3 * 3 * 5  # presets, ratios, seeds, lengths
    lengths = {(cell.stage1, cell.stage2) for cell in cells}
    assert all(tokens % STEP == 0 for pair in lengths for tokens in pair)
    totals = [sum(pair) for pair in lengths]
    assert sorted(totals) == [500 * STEP] * 2 + [1000 * STEP] * 3
    assert {total: min(pair[0] for pair in lengths if sum(pair) == total) for total in totals} == {
        500 * STEP: 0,
        1000 * STEP: 0,
    }


def test_objectives_are_trained_alike_at_every_rate():
    cells = STUDIES["objective"].cells(Scale(64, (0,), 1000, 0.2, STEP))
    assert {(cell.stage1, cell.stage2) for cell in cells} == {(0, 1000)}
    rates = {
        name: sorted(c.recipe["stage2.learning_rate"] for c in cells if c.recipe["stage2.objective"] == name)
        for name in ("next_token", "kl", "mix")
    }
    assert rates["next_token"] == rates["kl"] == rates["mix"]
    assert len(set(rates["kl"])) == 4


def document(settings, figures):
    return {"settings": settings, "figures": figures}


def test_stages_conclude_from_pairs_of_one_seed():
    def of(seed, first, loss, total=10, preset="paper"):
        tokens = {"stage1_tokens": first, "stage2_tokens": total - first}
        return document({"preset": preset, "d_qk": 8, "d_vo": 8, "seed": seed, **tokens}, {"loss": loss})

    documents = [of(0, 0, 2.0), of(1, 0, 3.0), of(2, 0, 9.0), of(0, 2, 1.9), of(1, 2, 3.1), of(2, 2, 8.7)]
    documents += [of(0, 5, 2.5), of(3, 5, 0.0), of(0, 1, 7.0, total=5)]  # no partner: seed 3, and five tokens
    rows = STUDIES["stages"].conclude(documents)["comparisons"]
    shared = {"preset": "paper", "d_qk": 8, "d_vo": 8, "tokens": 10}
    assert [{name: row[name] for name in shared} for row in rows] == [shared, shared]
    assert [(row["stage1_tokens"], row["seeds"]) for row in rows] == [(2, 3), (5, 1)]
    differences = np.array([-0.1, 0.1, -0.3])
    assert rows[0]["log_ratio"] == pytest.approx(differences.mean())
    assert rows[0]["standard_error"] == pytest.approx(differences.std(ddof=1) / 3**0.5)
    assert (rows[1]["log_ratio"], rows[1]["standard_error"]) == (0.5, None)


def test_objectives_are_chosen_by_other_text_than_is_reported():
    def of(rate, seed, validation, loss, objective="kl"):
        settings = {"stage2_objective": objective, "stage2_learning_rate": rate, "seed": seed}
        return document(settings, {"validation_loss": validation, "loss": loss, "ratio": 10 * loss})

    documents = [of(0.1, 0, 3, 1), of(0.1, 1, 3, 1), of(0.2, 0, 2, 5), of(0.2, 1, 2, 6), of(0.3, 0, 1, 0)]
    documents += [of(0.1, 0, 1, 4, "mix"), of(0.2, 0, 2, 4, "mix")]
    kl, mix = STUDIES["objective"].conclude(documents)["chosen"]
    # 0.1 would look better where it is reported; of 0.3 a seed diverged
    assert kl == {
        "objective": "kl",
        "learning_rate": 0.2,
        "at_the_edge": False,
        "seeds": 2,
        "loss": 5.5,
        "ratio": 55,
    }
    assert (mix["learning_rate"], mix["at_the_edge"]) == (0.1, True)


def write_cell(folder, name, settings, figures, model="a", study="widths", record=None):
    folder.mkdir(exist_ok=True)
    written = {
        "kind": "study",
        "study": study,
        "cell": name,
        "model": {"name": "m", "fingerprint": model},
        "settings": settings,
        "figures": figures,
        "record": record or {},
    }
    (folder / f"{name}.json").write_text(json.dumps(written))


def test_summary_averages_over_seeds_and_names_what_is_wrong(tmp_path):
    folder = tmp_path / "s"
    for seed, loss in enumerate((1.0, 2.0, 6.0)):
        write_cell(folder, f"w32-{seed}", {"d_qk": 32, "seed": seed}, {"loss": loss, "map": {"x": [loss]}})
    write_cell(folder, "w8", {"d_qk": 8, "seed": 0}, {"loss": 4.0})
    write_cell(folder, "bad", {"d_qk": 4, "seed": 0}, {}, record={"failed": "it diverged"})
    (folder / "cut.json").write_text("{")
    (folder / "study.json").write_text("{}")
    found = summary(folder)
    assert (found["study"], found["model"]["fingerprint"]) == ("widths", "a")
    assert found["failed"] == {"bad": "it diverged"}
    assert list(found["damaged"]) == ["cut"]
    narrow, wide = found["rows"]  # in the order of the settings
    assert narrow == {
        "settings": {"d_qk": 8},
        "seeds": [0],
        "figures": {"loss": {"mean": 4.0, "standard_error": None}},
    }
    assert (wide["settings"], wide["seeds"], list(wide["figures"])) == ({"d_qk": 32}, [0, 1, 2], ["loss"])
    losses = np.array([1.0, 2.0, 6.0])
    assert wide["figures"]["loss"]["mean"] == pytest.approx(losses.mean())
    assert wide["figures"]["loss"]["standard_error"] == pytest.approx(losses.std(ddof=1) / 3**0.5)


def test_summary_refuses_a_mixture_and_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished cell"):
        summary(tmp_path)
    write_cell(tmp_path / "m", "a", {"seed": 0}, {})
    write_cell(tmp_path / "m", "b", {"seed": 0}, {}, model="b")
    with pytest.raises(ValueError, match="more than one model: a and b differ; give each its own folder"):
        summary(tmp_path / "m")
    write_cell(tmp_path / "s", "a", {"seed": 0}, {})
    write_cell(tmp_path / "s", "b", {"seed": 0}, {}, study="rope")
    with pytest.raises(ValueError, match="more than one study"):
        summary(tmp_path / "s")


@pytest.mark.parametrize(
    ("figures", "sound"),
    [
        ({"a": 1, "b": {"c": [1.5, [2]]}}, True),
        ({"a": "1"}, False),
        ({"a": True}, False),
        ({"a": None}, False),
        ({"a": [float("nan")]}, False),
    ],
)
def test_figures_are_numbers(figures, sound):
    assert numeric(figures) is sound


# Computed apart from this code: share of positions below 0 in %, minimum, noise; theta 1e4, positions below 4,096.
CURVES = {
    ("own", 8): (56.1, -0.963, 0.251),
    ("own", 16): (39.0, -0.656, 0.158),
    ("own", 32): (25.4, -0.386, 0.105),
    ("frequency_aware", 8): (36.4, -0.611, 0.183),
    ("frequency_aware", 16): (20.8, -0.396, 0.093),
    ("frequency_aware", 32): (8.2, -0.199, 0.051),
}


@pytest.mark.parametrize(("table", "width"), CURVES)
def test_curves_have_known_values(table, width):
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, num_hidden_layers=2, head_dim=128)
    latent = choose(config, width, 128, resolve_choices("own-frequency", frequencies=table))
    found = measure_curves(config, latent)
    negative, minimum, noise = CURVES[table, width]
    assert 100 * found["attenuation_negative_share"] == pytest.approx(negative, abs=0.06)
    assert found["attenuation_minimum"] == pytest.approx(minimum, abs=6e-4)
    assert found["attenuation_noise"] == pytest.approx(noise, abs=1e-3)
    curve = found["attenuation"]
    assert curve["positions"][0] == 0
    assert curve["latent"][0] == curve["original"][0] == 1.0
    assert curve["positions"][-1] == 4095
    assert len(curve["positions"]) == len(curve["latent"]) == len(curve["original"])


def test_the_standard_table_is_the_base_formula_whatever_scaling_the_model_has():
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "head_dim": 32}
    cell, choices = Cell("c", 8, 32), resolve_choices("own-frequency")
    expected = [1e4 ** (-2 * j / 8) for j in range(4)]
    for rope in ({"rope_type": "default", "rope_theta": 1e4}, dict(LLAMA3_ROPE)):
        config = LlamaConfig(**sizes, rope_parameters=rope)
        made = standard_config(config, cell, choices)
        assert made.tables_at(1)[0].short == pytest.approx(expected)
        own = choose(config, 8, 32, choices).tables_at(1)[0].short
        assert (own == pytest.approx(expected, rel=1e-5)) is (rope["rope_type"] == "default")


def test_rope_measures_curves_perplexity_order_and_needle(place):
    report = run(place, "rope", "rope", cells="standard-8-*,own-frequency-8-*,calibrated-8-*")
    assert (report["failed"], len(report["measured"])) == ({}, 3)
    standard, own, calibrated = (figures_of(place, "rope", name) for name in report["cells"])
    # of a plain model, the base formula at a width that divides the head's is the kept pairs' own frequencies
    for name in ("perplexity", "attenuation_noise", "order_margin_mean", "needle_rank_mean"):
        assert standard[name] == pytest.approx(own[name], rel=1e-4)
    assert calibrated["attenuation_noise"] != own["attenuation_noise"]
    assert np.array(standard["order"]["margin"]).shape == (5, 3)
    assert np.array(standard["needle"]["exact"]).shape == (2, 3)
    assert standard["original_order"] == calibrated["original_order"]
    drop = np.array(own["needle"]["rank"]) - np.array(own["original_needle"]["rank"])
    assert own["needle_rank_mean"] == pytest.approx(drop.mean())
    margins = np.array(own["order"]["margin"]) - np.array(own["original_order"]["margin"])
    # its mean is over windows, of which some have no second order of a span at some depth
    assert own["order_margin_mean"] == pytest.approx(margins.mean(), abs=0.03)
    # keys of 8, values of 16, of 2 layers x 2 heads x (16 + 16) x 4 bytes
    assert own["cache_bytes_per_token"] == 2 * 2 * (8 + 16) * 4


def test_conversion_covers_what_is_chosen_and_scales_with_the_head():
    cells = {cell.name: cell for cell in STUDIES["conversion"].cells(Scale(64, (0, 1, 2), 0, 0.2, STEP))}
    first, *_ = cells.values()
    assert (first.name, first.per_layer) == ("planned-head-aligned-48x48-seed0", True)
    named = "model-aligned-16x20-seed2 head-statistics-36x28-seed1 gram-selection-8x8-seed0 paper-16x16-seed0"
    named += " fisher-refit-32x32-seed0 scores-selection-48x48-seed0 head-aligned-16x64-seed0 svd-aligned-32x32-seed0"
    assert set(named.split()) <= set(cells)
    assert cells["tenth-head-aligned-32x32-seed0"].settings["calibration_blocks"] == 13
    assert cells["fisher-refit-32x32-seed0"].settings["keys"] == "fisher"
    widths = {}
    for size in (16, 128):
        found = STUDIES["conversion"].cells(Scale(size, (0,), 0, 0.2, STEP))
        widths[size] = [(c.d_qk, c.d_vo) for c in found if c.name.startswith("values-factored")]
    assert widths == {16: [(16, 12), (16, 8), (16, 4), (16, 2)], 128: [(128, w) for w in (96, 64, 32, 16)]}


def test_conversion_measures_plans_other_selections_and_less_text(place):
    words = "planned-head-aligned-12x12 head-aligned-8x8 fisher-selection-8x8 gram-selection-8x8"
    words += " tenth-head-aligned-8x8 values-sliced-16x12"
    names = [f"{word}-seed0" for word in words.split()]
    settings = [*SETTINGS, "calibration.blocks=20"]
    report = run(
        place, "conversion", "conversion", cells=",".join(names), eval_tokens=256, overrides=settings
    )
    assert set(report["measured"]) == set(names)
    assert "head_dim divisible by d_vo: got d_vo=12" in report["failed"].pop(names[-1])
    assert report["failed"] == {}
    figures = {name: figures_of(place, "conversion", name) for name in names}
    work = place / "conversion" / "work"
    assert {path.name for path in work.glob("statistics-*")} >= {
        "statistics-seed0.safetensors",
        "statistics-seed0-blocks2.safetensors",
    }
    planned, plain, fisher, gram, tenth, _ = (figures[name] for name in names)
    assert len({found["ratio"] for found in (planned, plain, fisher, gram, tenth)}) >= 4

    model, _, blocks = original_and_blocks(place, 256)
    statistics = Statistics.load(work / "statistics-seed0.safetensors")
    assert len(statistics.input_ids) == 20
    found = plan(statistics, 0.75, table="head", per_layer=True)
    assert isinstance(found.d_qk, tuple)  # layers differ
    by_layer = {side: np.broadcast_to(getattr(found, side), 2).tolist() for side in ("d_qk", "d_vo")}
    assert {side: planned[f"planned_{side}"] for side in by_layer} == by_layer
    reference = perplexity(model, blocks)
    order = json.loads((work / "pairs-fisher-seed0.json").read_text())
    pairs = tuple(tuple(tuple(sorted(head[:4])) for head in layer) for layer in order)
    alone = {"align": 0, "gains": False, "refit": False}
    by_fisher = choose(model.config, 8, 8, resolve_choices(**alone), pairs=pairs)
    for own, options in (
        (planned, {"d_qk": found.d_qk, "d_vo": found.d_vo, "align": 2}),
        (gram, {"d_qk": 8, "d_vo": 8, **alone}),
        (fisher, {"config": by_fisher, **alone}),
    ):
        latent = convert(model, **options, statistics=statistics)
        assert own["ratio"] == perplexity_ratio(perplexity(latent, blocks), reference)[0]


def test_objective_measures_two_parts_of_the_text(place):
    report = run(place, "objective", "objective", cells="mix-rate0.01-*", tokens=3 * STEP, eval_tokens=256)
    figures = figures_of(place, "objective", report["measured"][0])
    assert figures["validation_loss"] != figures["loss"]
    assert figures["tokens"] <= 256
    assert figures["validation_tokens"] <= 256
    assert figures["tokens_trained"] == 3 * STEP
    assert "stage1_ratio" not in figures


class Dropping:
    """A press for tests: keeps the newest `kept` tokens of every layer."""

    def __init__(self, kept):
        self.kept = kept

    @contextmanager
    def __call__(self, model):
        yield
        self.cache_of(model)

    def cache_of(self, model):
        for layer in model.caches[-1].layers:
            layer.keys, layer.values = layer.keys[:, :, -self.kept :], layer.values[:, :, -self.kept :]


@pytest.fixture
def caches(tiny_llama, monkeypatch):
    """A latent model that remembers the caches that were made for it."""
    model = convert(tiny_llama, d_qk=8, d_vo=8, preset="own-frequency").eval()
    object.__setattr__(model, "caches", [])

    class Remembered(DynamicCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            model.caches.append(self)

    monkeypatch.setattr("transformers.DynamicCache", Remembered)
    return model


@pytest.mark.parametrize("kept", [24, 10])
def test_text_behind_a_thinned_cache_is_scored_as_token_by_token(caches, kept):
    ids = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    found = scores(caches, ids, 24, Dropping(kept), batch_size=2)
    assert (found["tokens"], len(found["losses"])) == (15, 3)
    assert found["cache_bytes"] == 3 * kept * 2 * 2 * (8 + 8) * 4
    with torch.no_grad():
        for row, losses in zip(ids, found["losses"], strict=True):
            cache, total = DynamicCache(), 0.0
            caches.model(input_ids=row[None, :24], past_key_values=cache)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]
            for at in range(24, 39):
                place = torch.tensor([[at]])
                step = caches(input_ids=row[None, at : at + 1], past_key_values=cache, position_ids=place)
                total -= float(step.logits[0, -1].double().log_softmax(-1)[row[at + 1]])
            assert losses == pytest.approx(total, rel=1e-5)


def test_eviction_runs_the_worker_on_exported_checkpoints(place, tmp_path, monkeypatch, tiny_tokenizer):
    """The worker runs in this process, without kvpress and so without evicting."""
    write_checkpoint(tmp_path / "model", tiny_tokenizer, max_position_embeddings=160)
    jobs = []

    def worker(command, **options):
        *_, job, result = command
        jobs.append(json.loads(Path(job).read_text()))
        press_main(job, result)

    monkeypatch.setattr(eviction_study.subprocess, "run", worker)
    monkeypatch.setattr(eviction_study, "find_kvpress", None)
    grid = eviction_study.EVICTION
    monkeypatch.setitem(
        STUDIES,
        grid.name,
        type(grid)(
            **{**vars(grid), "requires": lambda python: {"python": python, "versions": {"kvpress": "0"}}}
        ),
    )
    for text in ("text.txt", "valid.txt"):
        (tmp_path / text).write_text((place / text).read_text())
    settings = ["data.block_size=160", "calibration.blocks=4", "conversion.align=0"]
    options = {"cells": "*-none-*", "eval_tokens": 1600, "overrides": settings, "python": "there"}
    report = run(tmp_path, grid.name, "evicted", **options)
    assert report["measured"] == ["original-none-seed0", "calibrated-none-seed0"]
    original, latent = (figures_of(tmp_path, "evicted", name) for name in report["measured"])
    assert original["ratio"] == original["cache_ratio"] == 1
    assert latent["cache_ratio"] == 0.5
    assert latent["cache_bytes_per_token"] == 2 * 2 * (8 + 8) * 4
    assert latent["context"] == 80
    assert [job["latent"] for job in jobs] == [False, False, True]
    assert {job["context"] for job in jobs} == {80}
    document = json.loads((tmp_path / "evicted" / "original-none-seed0.json").read_text())
    assert document["record"]["tools"] == {"kvpress": "0"}

    def broken(*_, **__):
        raise subprocess.CalledProcessError(1, "worker", stderr="a traceback\nOSError: no space")

    monkeypatch.setattr(eviction_study.subprocess, "run", broken)
    with pytest.raises(ChildProcessError, match="the worker with kvpress failed: OSError: no space"):
        run(tmp_path, grid.name, "evicted", **{**options, "cells": "original-knorm-0.5-*"})
    with pytest.raises(ValueError, match=r"half a block must hold 65 tokens .* got data\.block_size=100"):
        run(tmp_path, grid.name, "short", **{**options, "overrides": [*settings, "data.block_size=100"]})


def test_a_latent_checkpoint_of_equal_widths_is_what_the_methods_can_read(tiny_llama, tmp_path):
    """kvpress gathers keys and values by the attention's `head_dim`, and asks the decoder for one rotary table."""
    cells = STUDIES["token-eviction"].cells(Scale(16, (0,), 0, 0.2, STEP))
    latent = next(cell for cell in cells if cell.extra["model"] == "calibrated")
    assert latent.d_qk == latent.d_vo == 8
    assert latent.choices == {"table": "model"}
    model = convert(tiny_llama, d_qk=8, d_vo=8, preset="own-frequency")
    save(model, tmp_path / "latent")
    attention = model.model.layers[0].self_attn
    assert attention.head_dim == attention.d_qk == attention.d_vo
    turned = model.model.rotary_emb(torch.zeros(1, 4, 8), torch.arange(4)[None])
    assert [tuple(part.shape) for part in turned] == [(1, 4, 8), (1, 4, 8)]


def test_a_cell_is_trained_by_its_own_seed_tokens_and_keys():
    base = Recipe.load(None, ["conversion.align=7", "stage1.tokens=11", "stage2.learning_rate=0.5"])
    keys = {"lora.rank": 3, "stage2.objective": "mix"}
    cell = Cell("c", 8, 8, seed=5, stage2=99, recipe=keys)
    made = recipe_of(cell, base)
    assert (made.seed, made.stage1.tokens, made.stage2.tokens) == (5, 11, 99)  # stage I does not run
    assert (made.lora.rank, made.stage2.objective, made.stage2.learning_rate) == (3, "mix", 0.5)
    assert cell.settings["lora_rank"] == 3
    assert choices_of(cell, base).align == 7
    assert choices_of(Cell("c", 8, 8, choices={"align": 0}), base).align == 0
    assert choices_of(Cell("c", 8, 8, "paper"), base).align == 0
