"""The refit of W_O against least squares, and what refining a whole model may and may not do."""

import tempfile
from functools import cache

import pytest
import torch

from calibration_setup import digest, divergence, realistic_model, short_descent, text
from kvlatent.conversion import refit as refit_module
from kvlatent.conversion import tuning
from kvlatent.conversion.alignment import TunedLayer, copy_for_tuning
from kvlatent.conversion.convert_model import convert
from kvlatent.model.classes import latent_config_of
from kvlatent.model.hidden_states import HiddenStateTensor
from kvlatent.selection.calibrate import calibrate
from tiny import HEAD_DIM, logits, tokens
from tolerances import assert_close_to_scale

pytestmark = pytest.mark.numerics

BATCH = text(blocks=6, length=48)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with short_descent():
        yield


def only_ridge(monkeypatch, ridge):
    """The refit takes this ridge, whatever the held-out blocks say."""
    monkeypatch.setattr(refit_module, "_RIDGES", (ridge,))
    monkeypatch.setattr(refit_module._Moments, "gained", lambda *_: 1.0)


@cache
def source(name):
    model = realistic_model(name)
    return model, calibrate(model, BATCH)


def converted(name, **choices):
    model, statistics = source(name)
    fixed = {"d_qk": 16, "d_vo": 8, "align": 0, "global_steps": 0, "statistics": statistics}
    return convert(model, **{**fixed, **choices})


def seen_by(decoder, layer, batch=BATCH):
    """What enters the layer, its attention's output and what enters its output projection, over the text."""
    caught = {"stream": [], "given": [], "reads": []}
    module = decoder.layers[layer]
    hooks = [
        module.register_forward_pre_hook(lambda _, args: caught["stream"].append(args[0])),
        module.self_attn.register_forward_hook(lambda *call: caught["given"].append(call[-1][0])),
        module.self_attn.o_proj.register_forward_pre_hook(lambda _, args: caught["reads"].append(args[0])),
    ]
    with torch.no_grad():
        for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
            decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(blocks).flatten(0, 1).double() for blocks in caught.values()]


def refit_problem(model, latent, start, layer, batch=BATCH):
    """y and the target o + h - h' (less the output bias) of the refit of a layer of the *finished* conversion.

    Both, token by token, over the larger of the root mean squares of o + h and of what the layer of `start` makes of it.
    """
    h, o, _ = seen_by(model.model, layer, batch)
    h_new, _, y = seen_by(latent.model, layer, batch)
    module = start.model.layers[layer].self_attn.o_proj
    bias = 0 if module.bias is None else module.bias.detach().double()
    given = h_new + y @ module.weight.detach().double().T + bias
    size = torch.maximum(*(each.square().mean(-1, keepdim=True).sqrt() for each in (o + h, given)))
    return y / size, (o + h - h_new - bias) / size


@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen2-window", "qwen3", "phi3-longrope"])
def test_without_a_ridge_every_layer_is_least_squares_on_the_converted_stream(name, monkeypatch):
    only_ridge(monkeypatch, 1e-13)
    model, _ = source(name)
    latent, start = converted(name), converted(name, refit=False)
    for layer in range(3):
        y, target = refit_problem(model, latent, start, layer)
        weight = latent.model.layers[layer].self_attn.o_proj.weight.double()
        best = torch.linalg.lstsq(y, target).solution.T
        ours, least = ((target - y @ w.T).square().sum() for w in (weight, best))
        assert ours <= least * (1 + 1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3-window", "phi3"])
def test_the_ridge_pulls_towards_the_factored_outputs(name, monkeypatch):
    only_ridge(monkeypatch, 1e-3)
    model, _ = source(name)
    start, latent = converted(name, refit=False), converted(name)
    y, target = refit_problem(model, latent, start, 0)
    w_0 = start.model.layers[0].self_attn.o_proj.weight.double()
    moments = y.T @ y
    ridge = 1e-3 * moments.diagonal().mean() * torch.eye(len(moments))
    expected = w_0 + torch.linalg.solve(moments + ridge, ((target - y @ w_0.T).T @ y).T).T
    found = latent.model.layers[0].self_attn.o_proj.weight.double()
    assert_close_to_scale(found.detach(), expected.detach(), 1e-4)
    assert (found - w_0).abs().max() > 1e-3


def test_a_huge_ridge_moves_nothing(monkeypatch):
    only_ridge(monkeypatch, 1e15)
    for name in ("llama", "qwen3"):
        latent, start = converted(name), converted(name, refit=False)
        for (key, ours), theirs in zip(latent.named_parameters(), start.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=key)


def test_the_ridge_is_the_one_that_does_best_on_held_out_blocks(monkeypatch):
    """By a slow oracle: every ridge fitted to the first 15 blocks, measured on the sixteenth; layer 0."""
    model, more = source("llama")[0], text(blocks=16, length=128)
    given = {"d_qk": 16, "d_vo": 4, "align": 0, "values": "svd", "statistics": calibrate(model, more)}
    start = convert(model, **given, refit=False)
    y, target = (each.detach() for each in refit_problem(model, start, start, 0, more))
    w_0 = start.model.layers[0].self_attn.o_proj.weight.detach().double()
    learnt, held = slice(0, 15 * 128), slice(15 * 128, None)

    def fitted(rows, ridge):
        moments = y[rows].T @ y[rows]
        inner = moments + ridge * moments.diagonal().mean() * torch.eye(len(moments))
        return w_0 + torch.linalg.solve(inner, ((target[rows] - y[rows] @ w_0.T).T @ y[rows]).T).T

    ridges = (1e-3, 1e-1, 1.0, 1e3)
    errors = [float((target[held] - y[held] @ fitted(learnt, r).T).square().sum()) for r in ridges]
    assert min(errors) < float((target[held] - y[held] @ w_0.T).square().sum())
    best = ridges[errors.index(min(errors))]
    for order in (ridges, ridges[::-1]):  # not simply the first or the last
        monkeypatch.setattr(refit_module, "_RIDGES", order)
        found = convert(model, **given).model.layers[0].self_attn.o_proj.weight.detach().double()
        assert_close_to_scale(found, fitted(slice(None), best), 1e-4)


def test_outputs_stay_where_no_ridge_helps_on_held_out_blocks(monkeypatch):
    monkeypatch.setattr(refit_module._Moments, "gained", lambda *_: -1.0)
    ours, theirs = digest(converted("llama")), digest(converted("llama", refit=False))
    assert ours == theirs


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3"])
def test_the_refit_changes_output_weights_only_and_helps(name, monkeypatch):
    only_ridge(monkeypatch, 1e-3)
    model, _ = source(name)
    latent, start = converted(name), converted(name, refit=False)
    ours, theirs = digest(latent), digest(start)
    assert {key.split(".")[-2] for key in ours if ours[key] != theirs[key]} == {"o_proj"}
    assert not any("bias" in key for key in ours if ours[key] != theirs[key])
    assert divergence(model, latent, BATCH) < divergence(model, start, BATCH)


@pytest.mark.parametrize("side", ["wanted", "latent"])
def test_a_token_of_massive_activation_does_not_rule_the_refit(side, monkeypatch):
    """One in every block, a thousand times the others in one channel, in one of the two models only."""
    only_ridge(monkeypatch, 1e-3)
    latent = converted("llama", refit=False)
    stream, given, y = (each.unflatten(0, (6, -1)).float() for each in seen_by(latent.model, 1))
    noise = torch.randn(stream.shape, generator=torch.Generator().manual_seed(0)) / 10
    plain = {"latent": stream, "wanted": stream + given + noise}
    massive = plain[side].clone()
    massive[:, 0, 3] += torch.tensor([1e3, -1e3, 2e3, -2e3, 3e3, 1e3])
    old = latent.model.layers[1].self_attn.o_proj.weight.detach()
    errors = []
    for streams in (plain, {**plain, side: massive}):
        tuned = TunedLayer(
            1, None, latent.model, copy_for_tuning(latent.model.layers[1].self_attn),
            {name: held_in_memory(blocks) for name, blocks in streams.items()}, BATCH["position_ids"], [],
        )  # fmt: skip
        refit_module.refit_outputs(tuned)
        moved = y @ (tuned.attention.o_proj.weight - old).T
        errors.append(float((noise - moved)[:, 1:].square().sum()))
    assert (
        errors[1] < 1.3 * errors[0]
    )  # the tokens behind a massive one see it, so they are not quite the same


def held_in_memory(stream):
    states = HiddenStateTensor(stream.dtype, stream.device)
    states.write(stream.split(1))
    return states


@pytest.mark.parametrize("refit", [False, True])
def test_alignment_helps_on_other_text(refit):
    for name in ("llama-mha", "qwen3"):
        model, other = source(name)[0], text(blocks=6, length=48, seed=9)
        before, after = (
            divergence(model, converted(name, d_qk=8, d_vo=16, refit=refit, align=steps), other)
            for steps in (0, 12)
        )
        assert after < before


@pytest.mark.parametrize(
    "choices",
    [
        {"align": 0},
        {"align": 3},
        {"align": 3, "refit": False},
        {"align": 3, "d_qk": HEAD_DIM},
        {"align": 3, "d_vo": HEAD_DIM},
        {"align": 3, "d_qk": [16, 16, HEAD_DIM], "d_vo": [8, 8, HEAD_DIM]},
        {"align": 16},
    ],
    ids=str,
)
def test_progress_never_goes_back_and_ends_at_its_total(choices, monkeypatch):
    if choices["align"] == 16:
        monkeypatch.setattr(tuning, "_RATE", 1e3)  # stops early
    calls = []
    converted("llama", progress=lambda *call: calls.append(call), **choices)
    done, totals = [call[1] for call in calls], {call[2] for call in calls}
    assert len(totals) == 1 and done == sorted(done) and done[0] >= 0 and done[-1] == totals.pop()
    assert {call[0] for call in calls} == {"refine layers"}


def test_layers_at_full_width_are_left_alone_beside_narrow_ones():
    model, _ = source("qwen2")
    latent = converted("qwen2", d_qk=[16, HEAD_DIM, 8], d_vo=[HEAD_DIM, HEAD_DIM, 8], align=3)
    old, new = model.model.layers, latent.model.layers
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        ours, theirs = (getattr(layers[1].self_attn, projection).weight for layers in (new, old))
        assert ours.data_ptr() == theirs.data_ptr()
    for projection in ("v_proj", "o_proj"):
        ours, theirs = (getattr(layers[0].self_attn, projection).weight for layers in (new, old))
        assert ours.data_ptr() == theirs.data_ptr()
    assert latent_config_of(latent.config).d_qk == (16, HEAD_DIM, 8)


def test_the_same_seed_gives_the_same_weights():
    once, again, other = (digest(converted("qwen3", d_vo=HEAD_DIM, align=4, seed=seed)) for seed in (5, 5, 6))
    assert once == again != other


def test_nothing_is_left_in_memory_or_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, _ = source("llama")
    before = digest(model)
    latent = converted("llama", align=3)
    assert not list(tmp_path.iterdir()) and digest(model) == before
    for parameter in (*latent.parameters(), *model.parameters()):
        assert parameter.grad is None and parameter.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in latent.modules())

    def stop(*call):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted("llama", align=3, progress=stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_where_gradients_are_off_and_the_result_still_trains(mode):
    expected = converted("llama", align=3)
    with mode():
        latent = converted("llama", align=3)
    assert digest(latent) == digest(expected)
    latent(tokens()).logits.square().mean().backward()
    assert all(p.grad is not None for p in latent.parameters())


def test_training_mode_and_dropout_do_not_enter():
    model, statistics = source("llama")
    expected = digest(converted("llama", align=3))
    model.config.attention_dropout = 0.5
    try:
        latent = convert(model.train(), d_qk=16, d_vo=8, align=3, statistics=statistics)
    finally:
        model.eval()
        model.config.attention_dropout = 0.0
    assert latent.training and digest(latent) == expected


def test_one_block_of_text_is_enough():
    model, _ = source("llama")
    batch = text(blocks=1, length=160)
    latent = convert(model, d_qk=16, d_vo=16, align=3, statistics=calibrate(model, batch))
    assert logits(latent, tokens()).isfinite().all()
    paper = convert(model, d_qk=16, d_vo=16, preset="paper")
    assert divergence(model, latent, BATCH) < divergence(model, paper, BATCH)
