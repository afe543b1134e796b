"""The global pass: what it measures, what it may change, and that it never makes things worse."""

from functools import cache

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from calibration_setup import realistic_model, short_descent, text
from kvlatent.conversion import tuning
from kvlatent.conversion.convert_model import convert
from kvlatent.conversion.global_pass import tune_all_layers
from kvlatent.jobs.progress import Progress
from kvlatent.model.assembly import full_width
from kvlatent.model.classes import latent_config_of
from kvlatent.selection.calibrate import calibrate
from kvlatent.text.recall_blocks import held_out_blocks
from kvlatent.training.trainable import shared_copy
from tiny import FAMILIES, HEAD_DIM

pytestmark = pytest.mark.numerics

BATCH = text(blocks=34, length=40)
HELD = held_out_blocks(34)


@pytest.fixture(autouse=True)
def gentle(monkeypatch):
    """The rate for trained weights is high for a few steps on random ones."""
    monkeypatch.setattr(tuning, "_RATE", 0.05)


def converted(name, *options):
    """A realistic model, its closed-form conversion and the statistics; the conversion may be changed."""
    model, latent, statistics = made(name, *options)
    return model, shared_copy(latent), statistics


@cache
def made(name, d_qk=8, d_vo=8, dtype=torch.float32):
    """The same, made once."""
    model = realistic_model(name).requires_grad_(False)
    for layer in model.model.layers:  # else the distribution hardly depends on the attention
        layer.self_attn.o_proj.weight *= 3
    model.get_output_embeddings().weight /= model(BATCH["input_ids"][:1]).logits.std()
    model.to(dtype)
    statistics = calibrate(model, BATCH)
    with short_descent():
        latent = convert(model, d_qk=d_qk, d_vo=d_vo, statistics=statistics, align=0, refit=False)
    return model, latent.requires_grad_(False), statistics


def tuned(model, latent, statistics, steps=16, **options):
    given = {"steps": steps, "seed": 0, "dtype": "float32", "progress": Progress()} | options
    config = latent_config_of(latent.config)
    return tune_all_layers(full_width(model), latent, config, statistics, **given)


def divergence(model, latent, blocks):
    """Mean KL(model || latent) a token, block by block from whole logits."""
    sums = []
    for block in blocks:
        ids, positions = BATCH["input_ids"][block, None], BATCH["position_ids"][block, None]
        with torch.no_grad():
            goal, given = (
                log_softmax(each(input_ids=ids, position_ids=positions, use_cache=False).logits.double(), -1)
                for each in (model, latent)
            )
        sums.append(float(kl_div(given, goal, reduction="sum", log_target=True)) / ids.numel())
    return sum(sums) / len(sums)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_divergence_falls_and_is_that_of_whole_logits(name):
    model, latent, statistics = converted(name)
    before = divergence(model, latent, HELD)
    measured = tuned(model, latent, statistics)
    assert measured["before"] == pytest.approx(before, rel=1e-3)
    assert measured["after"] < measured["before"]
    assert measured["after"] == pytest.approx(divergence(model, latent, HELD), rel=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_of_the_original_changes_and_what_is_shared_stays_shared(name):
    model, latent, statistics = converted(name)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shared = {
        n for n, t in latent.state_dict().items() if any(t.data_ptr() == o.data_ptr() for o in kept_in(model))
    }
    tuned(model, latent, statistics)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    mlp_and_norms = {n for n in shared if "self_attn" not in n}
    assert mlp_and_norms
    now = latent.state_dict()
    assert all(any(now[n].data_ptr() == o.data_ptr() for o in kept_in(model)) for n in mlp_and_norms)


def kept_in(model):
    return model.state_dict().values()


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize(("d_qk", "d_vo"), [(8, HEAD_DIM), (HEAD_DIM, 8)])
def test_a_side_at_full_width_stays_as_it_is(name, d_qk, d_vo):
    model, latent, statistics = converted(name, d_qk, d_vo)
    before = {n: t.clone() for n, t in latent.state_dict().items()}
    tuned(model, latent, statistics)
    changed = {n for n, t in latent.state_dict().items() if not torch.equal(t, before[n])}
    attention = latent.model.layers[0].self_attn
    if d_vo == HEAD_DIM:
        assert changed and not any("o_proj" in n or ".v_proj" in n for n in changed)
    else:
        assert any("o_proj" in n for n in changed) and not any(
            ".q_proj" in n or ".k_proj" in n for n in changed
        )
    if hasattr(attention, "qkv_proj"):
        rows = attention.parameters_of("v" if d_vo == HEAD_DIM else "q")
        for parameter, part in rows:
            assert torch.equal(parameter[part], before["model.layers.0.self_attn.qkv_proj.weight"][part])


def test_a_rate_that_ruins_everything_leaves_the_start():
    model, latent, statistics = converted("llama")
    before = {n: t.clone() for n, t in latent.state_dict().items()}
    measured = tuned(model, latent, statistics, rate=1e4)
    assert measured["after"] == measured["before"]
    assert all(torch.equal(t, before[n]) for n, t in latent.state_dict().items())


def test_it_tunes_a_model_that_is_held_in_half_precision():
    model, latent, statistics = converted("llama", 8, 8, torch.bfloat16)
    measured = tuned(model, latent, statistics)
    assert measured["after"] < measured["before"]
    assert {p.dtype for p in latent.parameters()} == {torch.bfloat16}


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    first, again, other = (converted("llama") for _ in range(3))
    for (model, latent, statistics), seed in zip((first, again, other), (0, 0, 1), strict=True):
        tuned(model, latent, statistics, seed=seed)
    a, b, c = (each[1].state_dict() for each in (first, again, other))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)


def test_convert_runs_it_when_it_is_asked_to():
    model, latent, statistics = converted("llama")
    told = []
    with short_descent():
        passed = convert(
            model, d_qk=8, d_vo=8, statistics=statistics, align=0, refit=False, global_steps=24,
            progress=lambda step, done, total: told.append((step, done, total)),
        )  # fmt: skip
    assert ("tune all layers", 24, 24) in told
    assert divergence(model, passed, HELD) < divergence(model, latent, HELD)
    assert all(p.requires_grad for p in passed.parameters())


def test_a_sink_of_massive_activations_does_not_mislead_the_conversion(monkeypatch):
    """Most models put one channel of the first token hundreds of times above all others, and look at it from everywhere."""
    model = realistic_model("llama").requires_grad_(False)
    batch = {name: column.clone() for name, column in BATCH.items()}
    batch["input_ids"][batch["position_ids"] == 0] = 1
    model.model.embed_tokens.weight[1, 0] = 3000 * model.model.embed_tokens.weight.std()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 3
    model.get_output_embeddings().weight /= model(batch["input_ids"][:1]).logits.std()
    states = model(**batch, output_hidden_states=True, use_cache=False).hidden_states[1]
    assert states[..., 0].abs().max() > 100 * states.abs().median()
    monkeypatch.setitem(globals(), "BATCH", batch)  # what `divergence` reads
    statistics = calibrate(model, batch)
    options = {"d_qk": 16, "d_vo": 16, "statistics": statistics}
    with short_descent():
        blind = convert(model, d_qk=16, d_vo=16, preset="own-frequency")
        closed = convert(model, **options, align=0)
        tuned_too = convert(model, **options, align=8, global_steps=16)
    lost = [divergence(model, latent, HELD) for latent in (blind, closed, tuned_too)]
    assert lost[2] <= lost[1] < lost[0]
