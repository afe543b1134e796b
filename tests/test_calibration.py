"""The statistics against slow loops over rows, heads and keys, and what they predict against what happens."""

import numpy as np
import pytest
import torch

from calibration_setup import (
    PAIRS,
    digest,
    output_weights,
    projected,
    realistic_model,
    slow_rows,
    text,
    turned,
)
from kvlatent.conversion.convert_model import convert
from kvlatent.model.families import effective_table
from kvlatent.selection import moment_sums
from kvlatent.selection.attention_rows import allowed, document_ids, pair_layout
from kvlatent.selection.calibrate import calibrate
from tiny import FAMILIES, HEAD_DIM, tiny_model, tokens
from tolerances import assert_close_to_scale

pytestmark = pytest.mark.numerics

EVERY_ROW = 1000
SMALL = {"blocks": 5, "length": 36}  # beyond the longrope switch, and more tokens than 4 heads have channels


@pytest.mark.parametrize("name", FAMILIES)
def test_moments_against_a_slow_oracle(name):
    model, batch = realistic_model(name), text(**SMALL)
    statistics = calibrate(model, batch, rows=EVERY_ROW)
    total = batch["input_ids"].numel()
    assert statistics.tokens == total and len(statistics.layers) == 3
    for layer in (0, 2):  # of the windowed models, one with and one without
        w_o = output_weights(model, layer)
        heads = len(w_o)
        output_gram = torch.zeros(heads, PAIRS, PAIRS).double()
        outputs = torch.zeros(heads, HEAD_DIM, HEAD_DIM).double()
        means, energy, mean = torch.zeros(heads, HEAD_DIM).double(), 0.0, 0.0
        shares: list[list] = [[] for _ in range(heads)]
        queries, parts = torch.zeros(heads, PAIRS).double(), []
        for row in slow_rows(model, batch, layer):
            y = row.weights @ row.values
            weights = (row.pairs.sum(1) / 2).softmax(0)  # tempered
            centred = row.pairs - weights @ row.pairs
            moved = w_o[row.head] @ ((weights[:, None] * centred).T @ row.values).T  # [D, P]
            output_gram[row.head] += moved.T @ moved
            outputs[row.head] += torch.outer(y, y)
            means[row.head] += y
            queries[row.head] += row.query.abs().square()
            parts.append(w_o[row.head] @ y)
            shares[row.head].append(parts[-1])
            if len(parts) == heads:
                energy += float(sum(parts).square().sum())
                mean = mean + sum(parts) / total
                parts.clear()
        found = statistics.layers[layer]
        assert_close_to_scale(found.output_gram, output_gram / total, 2e-4)
        assert_close_to_scale(found.outputs, outputs / total, 2e-4)
        assert_close_to_scale(found.output_means, means / total, 2e-4)
        assert_close_to_scale(found.query_energy, queries / total, 2e-4)
        variance = energy / total - mean.square().sum()
        assert_close_to_scale(found.output_energy, variance, 2e-4, float(energy / total))
        of_heads = [torch.stack(share) for share in shares]
        assert_close_to_scale(
            found.head_energy, torch.stack([(s - s.mean(0)).square().sum(1).mean() for s in of_heads]), 2e-4
        )


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3-longrope"])
def test_key_energies_are_those_of_every_position(name):
    model, batch = realistic_model(name), text(**SMALL)
    found = calibrate(model, batch, rows=1).layers[0].key_energy  # sampling rows samples no keys
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(batch["input_ids"])).detach()
    table = effective_table(model.config)
    expected = sum(
        turned(projected(model, h, 0)[1], p, table).abs().square().sum(0)
        for h, p in zip(hidden, batch["position_ids"], strict=True)
    )
    assert_close_to_scale(found, expected / batch["input_ids"].numel(), 2e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3-window", "phi3-longrope"])
def test_the_gram_matrix_predicts_what_a_small_change_of_the_logits_does(name, monkeypatch):
    monkeypatch.setattr(moment_sums, "_TEMPER", 1.0)
    model, batch = realistic_model(name), text(**SMALL)
    statistics = calibrate(model, batch, rows=EVERY_ROW).layers[1]
    w_o, small = output_weights(model, 1), 1e-3
    dropped = torch.arange(PAIRS) % 3 == 0
    error = torch.zeros(len(w_o)).double()
    for row in slow_rows(model, batch, 1):
        changed = (row.pairs.sum(1) - small * row.pairs[:, dropped].sum(1)).softmax(0)
        error[row.head] += (w_o[row.head] @ (row.values.T @ (changed - row.weights))).square().sum()
    total = batch["input_ids"].numel() * small**2
    block = (slice(None), dropped.nonzero(), dropped.nonzero().T)
    torch.testing.assert_close(error / total, statistics.output_gram[block].sum((1, 2)), rtol=0.01, atol=0)


def test_rows_a_few_at_a_time_change_nothing(monkeypatch):
    model, batch = realistic_model("qwen2-window"), text()
    expected = calibrate(model, batch, rows=7)
    monkeypatch.setattr(moment_sums, "_CHUNK_ON_CPU", 1)
    found = calibrate(model, batch, rows=7)
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        for name, tensor in vars(theirs).items():
            assert_close_to_scale(getattr(ours, name), tensor, 1e-5)


def test_the_order_of_the_sampled_rows_changes_nothing(monkeypatch):
    model, batch = realistic_model("llama"), text()
    expected = calibrate(model, batch, rows=9)
    add = moment_sums.MomentSums.add_attention

    def backwards(self, *call):
        self.rows = self.rows.flip(1)
        add(self, *call)

    monkeypatch.setattr(moment_sums.MomentSums, "add_attention", backwards)
    for ours, theirs in zip(calibrate(model, batch, rows=9).layers, expected.layers, strict=True):
        assert_close_to_scale(ours.output_gram, theirs.output_gram, 1e-5)


def test_sampled_rows_are_drawn_from_the_seed_and_estimate_all_rows():
    model, batch = realistic_model("llama-mha"), text()
    once, again = (calibrate(model, batch, rows=8, seed=1).layers[1] for _ in range(2))
    assert torch.equal(once.output_gram, again.output_gram)
    samples = [calibrate(model, batch, rows=8, seed=seed).layers[1] for seed in range(9)]
    full, other = (calibrate(model, batch, rows=EVERY_ROW, seed=seed).layers[1] for seed in (1, 2))
    assert torch.equal(full.output_gram, other.output_gram)
    assert not torch.equal(samples[1].output_gram, samples[2].output_gram)
    trace = torch.stack([one.output_gram.diagonal(dim1=1, dim2=2).sum() for one in samples])
    wanted, spread = full.output_gram.diagonal(dim1=1, dim2=2).sum(), trace.std() / 3
    assert (trace.mean() - wanted).abs() < 3 * spread and spread < 0.1 * wanted


def test_documents_and_windows_against_a_loop():
    positions = text(blocks=4, length=30)["position_ids"]
    rows = torch.stack([torch.randperm(30, generator=torch.Generator().manual_seed(b))[:6] for b in range(4)])
    documents = document_ids(positions)
    for window in (None, 1, 5):
        found = allowed(positions, rows, window)
        for block in range(4):
            for number, t in enumerate(rows[block].tolist()):
                start = t - int(positions[block, t])
                for s in range(30):
                    seen = start <= s <= t and (window is None or t - s < window)
                    assert bool(found[block, number, s]) == seen
                    if s <= t:
                        assert bool(documents[block, s] == documents[block, t]) == (s >= start)


def test_pairs_of_a_partial_rotation_are_laid_out_as_the_kept_channels_are():
    x = torch.arange(20)
    first, second = pair_layout(x, 12)
    assert first.tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15]
    assert second.tolist() == [6, 7, 8, 9, 10, 11, 16, 17, 18, 19]
    first, second = pair_layout(x, 20)
    assert first.tolist() == list(range(10)) and second.tolist() == list(range(10, 20))


def test_the_model_is_left_as_it_was_and_runs_in_evaluation_mode():
    model = tiny_model("qwen3", attention_dropout=0.5)
    expected = calibrate(model, text())
    before = digest(model)
    model.train()
    found = calibrate(model, text())
    assert digest(model) == before and model.training and all(p.requires_grad for p in model.parameters())
    assert not any(p.grad is not None for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(found.layers[2].output_gram, expected.layers[2].output_gram)


class Blocks:
    """As `kvlatent.text` gives them: slices of integer arrays."""

    def __init__(self, columns):
        self.columns = {name: value.numpy().astype(np.int32) for name, value in columns.items()}

    def __len__(self):
        return len(self.columns["input_ids"])

    def __getitem__(self, part):
        return {name: value[part] for name, value in self.columns.items()}


def test_blocks_from_a_dataset_and_progress():
    model, batch, seen = tiny_model("llama"), text(), []
    expected = calibrate(model, batch, progress=lambda *done: seen.append(done))
    found = calibrate(model, Blocks(batch))
    assert torch.equal(found.input_ids, expected.input_ids) and found.input_ids.dtype == torch.int32
    assert torch.equal(found.position_ids, batch["position_ids"].int())
    assert torch.equal(found.layers[1].output_gram, expected.layers[1].output_gram)
    assert seen[0] == (0, 4) and seen[-1] == (4, 4) and seen == sorted(seen)


def test_bfloat16_is_summed_in_float64_and_stays_close():
    model = realistic_model("llama").bfloat16()
    found = calibrate(model, text(), rows=EVERY_ROW).layers
    expected = calibrate(model.float(), text(), rows=EVERY_ROW).layers
    for ours, theirs in zip(found, expected, strict=True):
        for name, tensor in vars(theirs).items():
            assert_close_to_scale(getattr(ours, name), tensor, 0.1)


def test_sums_of_finite_float16_states_do_not_overflow():
    model = tiny_model("llama").half()
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1)
        model.model.norm.weight.fill_(16)
        final = model.model(text()["input_ids"]).last_hidden_state
    assert final.isfinite().all() and final.sum().isinf()
    calibrate(model, text())


def test_bad_input_is_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="at least 1 query row a block: got rows=0; try 32"):
        calibrate(model, text(), rows=0)
    for blocks in (text(1, 127), {name: value[:0] for name, value in text().items()}):
        got = blocks["input_ids"].numel()
        with pytest.raises(
            ValueError, match=f"at least num_attention_heads x head_dim = 128 tokens.*got {got}"
        ):
            calibrate(model, blocks)
    assert calibrate(model, text(1, 128)).tokens == 128
    with pytest.raises(ValueError, match="latent already"):
        calibrate(convert(model, d_qk=16, preset="paper"), text())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("model.layers.1.self_attn.q_proj.weight", "queries that are NaN or infinite .layer 1, block 0"),
        ("model.layers.2.self_attn.k_proj.weight", "keys that are NaN or infinite .layer 2, block 0"),
        ("model.layers.1.self_attn.v_proj.weight", "outputs that are NaN or infinite .layer 1, block 0"),
        ("model.layers.0.mlp.up_proj.weight", "queries that are NaN or infinite .layer 1, block 0"),
        ("model.layers.2.mlp.up_proj.weight", "final hidden states that are NaN or infinite .layer 2"),
    ],
)
def test_activations_that_are_not_finite_are_refused(weight, message, value):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(weight)[0, 0] = value
    with pytest.raises(ValueError, match=message + ".*try float32"):
        calibrate(model, text())


def test_a_token_that_overflows_names_its_block():
    model, batch = tiny_model("llama"), text()
    batch["input_ids"][2, 5] = 2  # a token nowhere else
    with torch.no_grad():
        model.model.embed_tokens.weight[2] = float("nan")
    with pytest.raises(ValueError, match="queries that are NaN or infinite .layer 0, block 2"):
        calibrate(model, batch)
    assert (tokens() != 2).all()
