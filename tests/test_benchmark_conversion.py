"""The benchmark of the conversion: its script end to end, and other papers' selections against slow, obvious ones."""

import importlib
import json
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from on_disk import write_checkpoint, write_text
from tiny import tiny_model, tokens
from tolerances import assert_close_to_scale

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
BLOCKS, LENGTH = 3, 24


@pytest.fixture
def module(monkeypatch):
    """A module that lies beside the script, by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def packed():
    """Blocks of two documents, with labels; the last token of a document predicts nothing."""
    positions = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)]).expand(BLOCKS, -1)
    ids = tokens(BLOCKS, LENGTH)
    labels = torch.cat([ids[:, 1:], torch.full((BLOCKS, 1), -100)], 1)
    labels[:, 9] = -100
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def test_fisher_scores_are_squared_gradients_times_squared_weights(module):
    model, blocks = tiny_model("llama"), packed()
    scores = module("conversion_baselines").fisher_scores(model, blocks)
    assert not any(p.requires_grad for p in model.parameters())
    heads, groups, size = 4, 2, 32
    for layer, score in zip(model.model.layers, scores, strict=True):
        expected = torch.zeros(heads // groups, size // 2)
        attention = layer.self_attn
        for block in range(BLOCKS):
            for weight, per_head in ((attention.q_proj.weight, groups), (attention.k_proj.weight, 1)):
                weight.requires_grad_(True)
                logits = model(
                    blocks["input_ids"][block, None],
                    position_ids=blocks["position_ids"][block, None],
                    use_cache=False,
                ).logits[0]
                labels = blocks["labels"][block]
                chances = logits.log_softmax(-1)
                counted = [t for t in range(LENGTH) if labels[t] >= 0]
                loss = -sum(chances[t, labels[t]] for t in counted) / len(counted)
                (gradient,) = torch.autograd.grad(loss, weight)
                weight.requires_grad_(False)
                for row in range(len(weight)):
                    head, pair = row // size // per_head, row % size % (size // 2)
                    expected[head, pair] += (gradient[row] * weight[row]).square().sum() / BLOCKS
        assert_close_to_scale(score.float(), expected, 1e-4)


def test_score_grams_are_products_of_what_pairs_add_to_the_logits(module):
    model, blocks = tiny_model("llama"), packed()
    grams = module("conversion_baselines").score_grams(model, blocks, rows=LENGTH)
    attention, caught = model.model.layers[0].self_attn, []
    hook = attention.register_forward_pre_hook(
        lambda m, a, kwargs: caught.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model.model(input_ids=blocks["input_ids"], position_ids=blocks["position_ids"], use_cache=False)
    hook.remove()
    heads, size, half = 4, 32, 16
    with torch.no_grad():
        query = attention.q_proj(caught[0]).unflatten(-1, (heads, size)).double()
        key = attention.k_proj(caught[0]).unflatten(-1, (2, size)).double()
    inv_freq = model.model.rotary_emb.inv_freq.double()
    expected, seen = torch.zeros(heads, half, half, dtype=torch.float64), 0
    for block, t, s in product(range(BLOCKS), range(LENGTH), range(LENGTH)):
        place = blocks["position_ids"][block]
        if s > t or (t >= 10) != (s >= 10):
            continue
        seen += 1
        turn = torch.polar(torch.ones(half, dtype=torch.float64), inv_freq * float(place[t] - place[s]))
        for head in range(heads):
            q, k = query[block, t, head], key[block, s, head // 2]
            added = (torch.complex(q[:half], q[half:]) * torch.complex(k[:half], k[half:]).conj() * turn).real
            expected[head] += torch.outer(added, added) / size
    assert_close_to_scale(grams[0], expected / seen, 1e-4)


def test_fewer_rows_are_a_sample_of_the_same_sum(module):
    baselines = module("conversion_baselines")
    model, blocks = tiny_model("llama"), packed()
    whole, some = (baselines.score_grams(model, blocks, rows=rows)[1] for rows in (LENGTH, 8))
    assert not torch.equal(whole, some)
    ratio = some.diagonal(dim1=1, dim2=2).sum(1) / whole.diagonal(dim1=1, dim2=2).sum(1)
    assert ratio.min() > 0.5 and ratio.max() < 2


def test_greedy_adds_what_lowers_the_error_most(module):
    baselines = module("conversion_baselines")
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 50, 8, generator=generator, dtype=torch.float64) + 0.5
    grams = features.transpose(1, 2) @ features

    def error(kept):
        rest = [pair for pair in range(8) if pair not in kept]
        return float(features[:, :, rest].sum(-1).square().sum())

    kept: list[int] = []
    for number in range(1, 9):
        kept.append(min((p for p in range(8) if p not in kept), key=lambda p: error([*kept, p])))
        assert baselines.greedy_without_gains(grams, number) == sorted(kept)
    assert sorted(kept[:3]) != sorted(grams.sum(0).diagonal().argsort(descending=True)[:3].tolist())
    chosen = baselines.score_pairs([torch.cat([grams, grams])], 2, 6)
    assert chosen == ((tuple(sorted(kept[:3])),) * 2,)


def test_top_pairs_are_the_highest_scores_of_each_head(module):
    scores = [torch.tensor([[1.0, 4.0, 2.0, 3.0], [9.0, 1.0, 1.5, 8.0]])]
    assert module("conversion_baselines").top_pairs(scores, 4) == (((1, 3), (0, 3)),)


def test_cells_are_named_once_and_cover_the_table(module):
    cells = module("conversion_cells")
    all_of_them = cells.all_cells([0, 1, 2], other=True)
    names = [cell.name for cell in all_of_them]
    assert len(set(names)) == len(names) and len(names) > 80
    assert names[0] == "ours-48x48-planned-head-aligned-seed0"
    assert all(cell.aligned and cell.per_layer and cell.part == "aligned" for cell in all_of_them[:12])
    assert {"ours-16x20-model-aligned-seed2", "ours-32x32-head-aligned-seed1"} <= set(names)
    only_first = [cell for cell in all_of_them if cell.part in ("ablation", "curves", "other")]
    assert only_first and {cell.seed for cell in only_first} == {0}
    assert not any(cell.text == "other" for cell in cells.all_cells([0]))


def test_widths_scale_with_the_head(module, tmp_path):
    setting = module("conversion_setting").Setting.__new__(module("conversion_setting").Setting)
    cells = module("conversion_cells")
    found = {}
    for setting.head_dim in (16, 64, 128):
        found[setting.head_dim] = [
            setting.widths(cells.ours("", w, aligned=True)) for w in ((36, 28), (8, 8))
        ]
    assert found == {16: [(8, 8), (2, 2)], 64: [(36, 28), (8, 8)], 128: [(72, 56), (16, 16)]}
    setting.head_dim = 16
    assert setting.widths(cells.values_only(24, "factored")) == (16, 6)
    assert setting.widths(cells.keys_only(8, "paper")) == (2, 16)


@pytest.fixture(scope="module")
def place(tmp_path_factory, request):
    """A tiny checkpoint and two texts."""
    folder = tmp_path_factory.mktemp("benchmark")
    write_checkpoint(folder / "model", request.getfixturevalue("tiny_tokenizer"))
    write_text(folder / "train.txt"), write_text(folder / "held_out.txt", seed=1)
    write_text(folder / "other.txt", seed=2)
    return folder


CELLS = (
    "ours-32x32-head-*-seed0",
    "ours-32x32-*-other-*",
    "ours-36x28-head-*-seed0",
    "paper-*",
    "*-32x32-plain-seed0",
    "ablation-32x32-stride-*",
    "values-48-sliced",
    "keys-16-statistics",
)


SIZES = {"eval-tokens": 640, "blocks": 20, "block-size": 32, "align": 1, "seeds": 0}


@pytest.fixture
def run(place, module, monkeypatch, capsys):
    """Call the script on the tiny checkpoint; its standard output."""

    def call(*more, data="train.txt"):
        words = ["conversion.py", "--out", str(place / "out"), *more]
        if "--table" not in more:
            files = {"model": "model", "data": data, "eval": "held_out.txt", "other-data": "other.txt"}
            words += [word for name, file in files.items() for word in (f"--{name}", str(place / file))]
            words += [f"--{name}={value}" for name, value in SIZES.items()]
            words += [word for cell in CELLS for word in ("--cells", cell)]
        monkeypatch.setattr(sys, "argv", words)
        module("conversion").main()
        return capsys.readouterr().out

    return call


@pytest.mark.slow
def test_script_end_to_end(place, run):
    names = run("--list").split()
    output = run()
    assert all(f"] {name} " in output for name in names)
    rows = {path.stem: json.loads(path.read_text()) for path in (place / "out").glob("*.json")}
    assert set(rows) == set(names)
    ours = rows["ours-32x32-head-aligned-seed0"]
    assert (ours["d_qk"], ours["d_vo"], ours["calibration_tokens"]) == (8, 8, 640)
    assert ours["choices"]["align"] == 1 and ours["ratio"] != rows["paper-32x32"]["ratio"]
    assert ours["ratio"] == pytest.approx(ours["perplexity"] / ours["original_perplexity"])
    assert ours["tokens"] > 500 and ours["ratio_standard_error"] > 0 and ours["calibration_seconds"] > 0
    assert (
        ours["versions"]["torch"]
        and ours["sha256"]["data"]
        and ours["command"].endswith(f"--cells {ours['cell']}")
    )
    assert rows["ours-32x32-head-aligned-other-seed0"]["text"] == "other"
    assert rows["ours-32x32-head-aligned-tenth-seed0"]["calibration_tokens"] == 64
    assert rows["fisher-32x32-plain-seed0"]["choices"]["keys"] == "fisher"
    assert "head_dim divisible by d_vo" in rows["values-48-sliced"]["impossible"]
    assert str(place) not in json.dumps(rows)

    before = {path: path.stat().st_mtime_ns for path in (place / "out").glob("*.json")}
    (place / "out" / "paper-8x8.json").unlink()
    assert run().split()[1:2] == ["paper-8x8"]
    after = {path: path.stat().st_mtime_ns for path in (place / "out").glob("*.json")}
    assert [path.stem for path in after if after[path] != before[path]] == ["paper-8x8"]

    table = run("--table", "--collect", str(place / "all.json"))
    assert f"| 32/32 | {ours['ratio']:.4f} ± {ours['ratio_standard_error']:.4f} |" in table
    assert "versions of the library's code" not in table and "impossible" in table
    collected = json.loads((place / "all.json").read_text())
    assert set(collected["cells"]) == set(names) and collected["sha256"] == ours["sha256"]

    with pytest.raises(SystemExit, match="holds results of another model, text or size"):
        run(data="other.txt")


def test_tables_show_the_spread_over_seeds(module):
    tables, cells = module("conversion_tables"), module("conversion_cells")
    results = {
        cells.ours("", cells.HALF, aligned=True, seed=seed).name: {
            "ratio": 1.01 + seed / 100,
            "ratio_standard_error": 0.001,
            "source": str(seed),
        }
        for seed in range(3)
    }
    tenth = cells.ours("", cells.HALF, aligned=True, share=cells.TENTH).name
    results[tenth] = {"ratio": 1.03, "ratio_standard_error": 0.002, "source": "0"}
    shown = tables.markdown(results)
    assert "1.0200 [0.0200, 3 seeds]" in shown and "1.0300 ± 0.0020" in shown and "| 1.500 |" in shown
    assert "Cells come from 3 versions of the library's code." in shown


def test_a_text_of_too_few_blocks(place, run, monkeypatch):
    monkeypatch.setitem(SIZES, "blocks", 10_000)
    with pytest.raises(SystemExit, match=r"data has \d+ blocks of 32 tokens, 10000 are asked for"):
        run("--work", str(place / "more"), "--cells", "ours-16x20-head-statistics-seed0")


@pytest.mark.slow
def test_memory_of_a_fresh_process(place, module):
    """The child's figures must not begin at the parent's size, which is larger than the model."""
    costs = module("conversion_costs")
    forward = costs._fresh("random", "random", 1, "forward", 0, 1)
    assert forward["peak_bytes"] > forward["model_bytes"] > 4e8
    ids = torch.arange(300 // 32 * 32).view(-1, 32)
    positions = torch.arange(32).expand_as(ids).contiguous()
    save_file({"input_ids": ids, "position_ids": positions}, place / "text.safetensors")
    found = costs._fresh(str(place / "model"), str(place / "text.safetensors"), 4, "statistics", 0, 1)
    assert found["peak_bytes"] > 0 and found["model_bytes"] < 1e6
