"""Alignment of one layer: what it measures, what it may change, and that it never makes things worse."""

from functools import cache, partial

import pytest
import torch

from calibration_setup import realistic_model, short_descent, text
from kvlatent.conversion import alignment, tuning
from kvlatent.conversion.alignment import TunedLayer, align_attention, align_output, copy_for_tuning
from kvlatent.conversion.convert_model import convert
from kvlatent.conversion.refinement import layer_streams, pass_original
from kvlatent.model.assembly import full_width
from kvlatent.model.hidden_states import isolate_layer
from kvlatent.model.rotary import LatentRotary
from kvlatent.selection import attention_rows
from kvlatent.selection.attention_rows import (
    allowed,
    masked_logits,
    recorded_projections,
    rotary_by_position,
    rotary_of,
    row_logits,
)
from kvlatent.selection.calibrate import calibrate
from tiny import FAMILIES, HEAD_DIM, SWITCH
from tolerances import assert_close_to_scale

pytestmark = pytest.mark.numerics

BATCH = text(blocks=8, length=40)  # beyond the longrope switch
HELD = [6, 7]


@pytest.fixture(autouse=True)
def gentle(monkeypatch):
    """The rate for trained weights is high for a few steps on random ones."""
    monkeypatch.setattr(tuning, "_RATE", 0.2)


@cache
def converted(name, d_qk, d_vo):
    """The full-width twin of a realistic model, and its closed-form conversion."""
    model = realistic_model(name)
    options = {"d_qk": d_qk, "d_vo": d_vo, "align": 0, "refit": False}
    with short_descent():
        latent = convert(model, statistics=calibrate(model, text()), **options)
    return full_width(model).requires_grad_(False), latent.requires_grad_(False)


seen = {}  # hidden states of `BATCH`, by model


def pair_of(name, folder, index=1, held_out=HELD, batch=BATCH, d_qk=8, d_vo=8):
    """A layer of a realistic model beside that of its closed-form conversion, and their streams."""
    model, latent = converted(name, d_qk, d_vo)
    key = (name, d_qk, d_vo) if batch is BATCH else None
    ours, theirs = seen[key] if key in seen else (states(latent.model, batch), states(model.model, batch))
    if key is not None:
        seen[key] = ours, theirs
    blocks, size = batch["input_ids"].shape
    streams = layer_streams(folder, model, blocks, size, "float32")
    streams["inputs"].write(theirs[index])
    streams["latent"].write(ours[index])
    tuned = TunedLayer(
        index,
        model.model,
        latent.model,
        copy_for_tuning(latent.model.layers[index].self_attn),
        streams,
        batch["position_ids"],
        list(held_out),
    )
    pass_original(tuned, with_attention=True)
    return tuned


def states(decoder, batch):
    """Hidden states before each layer but the first and last norm: a list of [blocks, T, D]."""
    blocks = []
    with torch.no_grad():
        for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
            out = decoder(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, output_hidden_states=True
            )
            blocks.append(out.hidden_states)
    return [torch.cat(depth) for depth in zip(*blocks, strict=True)]


def weights_of(decoder, pair, block):
    """Attention weights of the layer on the original's inputs, from the eager implementation: [N, T, T]."""
    caught = []
    module = decoder.layers[pair.index].self_attn
    before, decoder.config._attn_implementation = decoder.config._attn_implementation, "eager"
    hook = module.register_forward_hook(lambda *call: caught.append(call[-1][1]))
    with torch.no_grad():
        isolate_layer(decoder, pair.index)(
            inputs_embeds=pair.streams["inputs"].read([block]),
            position_ids=pair.positions[block, None],
            use_cache=False,
        )
    hook.remove()
    decoder.config._attn_implementation = before
    return caught[0][0].double()


def changed(pair):
    """Names of the tuned copy's parameters that differ from the latent layer's."""
    original = pair.latent.layers[pair.index].self_attn
    return {n for n, p in pair.attention.named_parameters() if not torch.equal(p, original.get_parameter(n))}


def nothing():
    pass


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_alignment_measures_and_lowers_the_divergence_of_held_out_blocks(name, tmp_path):
    pair = pair_of(name, tmp_path)
    expected = 0.0
    for block in HELD:
        p, q = (weights_of(decoder, pair, block) for decoder in (pair.original, pair.latent))
        expected += float(torch.where(p > 0, p * (p.log() - q.log()), 0).sum(-1).mean()) / len(HELD)
    found = align_attention(pair, 16, 0, nothing)
    assert found["before"] == pytest.approx(expected, rel=1e-3)
    assert found["after"] < found["before"]
    again = align_attention(pair, 1, 0, nothing)  # the parameters are the ones that were measured
    assert again["before"] == pytest.approx(found["after"], rel=1e-5)
    sides = {"q_proj", "k_proj"} if "phi3" not in name else {"qkv_proj"}
    if "qwen3" in name:
        assert changed(pair) == {"q_map"}
    else:
        assert {each.split(".")[0] for each in changed(pair)} == sides
    if "phi3" in name:
        ours, theirs = pair.attention.qkv_proj, pair.latent.layers[1].self_attn.qkv_proj
        rows = sum(pair.attention.widths[:2])
        assert torch.equal(ours.weight[rows:], theirs.weight[rows:])
        assert not torch.equal(ours.weight[:rows], theirs.weight[:rows])


@pytest.mark.parametrize("name", FAMILIES)
def test_output_alignment_measures_and_lowers_the_error_behind_the_next_norm(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_RATE", 0.02)
    pair = pair_of(name, tmp_path)
    norm, blocks = pair.original.layers[2].input_layernorm, list(range(8))
    with torch.no_grad():
        wanted = norm(pair.streams["outputs"].read(blocks))
        energy = wanted[: tuning.BLOCKS].square().mean()
        given = torch.cat(
            [
                isolate_layer(pair.latent, 1)(
                    inputs_embeds=pair.streams["latent"].read([b]),
                    position_ids=pair.positions[b, None],
                    use_cache=False,
                ).last_hidden_state
                for b in blocks
            ]
        )
        expected = (norm(given)[HELD] - wanted[HELD]).square().mean() / energy
    found = align_output(pair, 16, 0, nothing, keys=True, values=True)
    assert found["before"] == pytest.approx(float(expected), rel=1e-3)
    assert found["after"] < found["before"]
    again = align_output(pair, 1, 0, nothing, keys=True, values=True)
    assert again["before"] == pytest.approx(found["after"], rel=1e-5)
    modules = {each.split(".")[0] for each in changed(pair)}
    if "qwen3" in name:
        assert modules == {"q_map", "v_proj", "o_proj"}
    else:
        split = {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert modules == ({"qkv_proj", "o_proj"} if "phi3" in name else split)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_a_side_at_full_width_is_not_touched(name, tmp_path):
    pair = pair_of(name, tmp_path, d_vo=HEAD_DIM)
    align_output(pair, 4, 0, nothing, keys=True, values=False)
    assert not any(each.startswith(("v_", "o_")) for each in changed(pair)) and changed(pair)
    if name == "phi3":
        rows = sum(pair.attention.widths[:2])
        theirs = pair.latent.layers[1].self_attn.qkv_proj.weight
        assert torch.equal(pair.attention.qkv_proj.weight[rows:], theirs[rows:])
    (tmp_path / "values").mkdir()
    pair = pair_of(name, tmp_path / "values", d_qk=HEAD_DIM)
    align_output(pair, 4, 0, nothing, keys=False, values=True)
    assert not any(each.startswith(("q_", "k_")) for each in changed(pair)) and changed(pair)
    if name == "phi3":
        rows = sum(pair.attention.widths[:2])
        theirs = pair.latent.layers[1].self_attn.qkv_proj.weight
        assert torch.equal(pair.attention.qkv_proj.weight[:rows], theirs[:rows])


@pytest.mark.parametrize("align", [align_attention, align_output])
def test_steps_that_make_it_worse_are_undone(align, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_RATE", 1e4)
    pair = pair_of("qwen3", tmp_path)
    options = {"keys": True, "values": True} if align is align_output else {}
    found = align(pair, 10, 0, nothing, **options)
    assert found["after"] == found["before"] and not changed(pair)


def test_a_rise_at_first_does_not_stop_what_pays_later(monkeypatch):
    held = iter([5.0, 9.0, 8.0, 7.0, 6.0, 4.0, 3.0, 2.0, 1.0])
    weight = torch.nn.Parameter(torch.zeros(2, 2))

    def loss(blocks, rows):
        return weight.sum() if torch.is_grad_enabled() else torch.tensor(next(held))

    options = {"fan_in": 2, "steps": 8, "seed": 0, "progress": nothing}
    found = tuning.tune([(weight, None)], loss, torch.zeros(3, 4), [2], **options)
    assert found == {"before": 5.0, "after": 1.0}
    held = iter([5.0, 4.0, 6.0, 7.0, 8.0])  # it stops here, and goes back to where it was best
    with torch.no_grad():
        weight.zero_()
    found = tuning.tune([(weight, None)], loss, torch.zeros(3, 4), [2], **options)
    assert found == {"before": 5.0, "after": 4.0} and next(held, None) is None


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_nothing_else_learns_and_nothing_is_left_behind(name, tmp_path):
    pair = pair_of(name, tmp_path)
    everything = [*pair.original.parameters(), *pair.latent.parameters()]
    before = [p.clone() for p in everything]
    align_attention(pair, 3, 0, nothing)
    align_output(pair, 3, 0, nothing, keys=True, values=True)
    assert all(torch.equal(a, b) for a, b in zip(before, everything, strict=True))

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        align_attention(pair, 3, 0, stop)
    for parameter in (*everything, *pair.attention.parameters()):
        assert parameter.grad is None and not parameter.requires_grad
        assert not parameter._backward_hooks


def test_the_seed_decides(tmp_path):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        (tmp_path / str(number)).mkdir()
        pair = pair_of("llama", tmp_path / str(number))
        align_attention(pair, 4, seed, nothing)
        found.append(pair.attention.q_proj.weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_few_blocks_are_enough(tmp_path):
    for blocks, held in ((1, []), (2, [1]), (3, [2])):
        folder = tmp_path / str(blocks)
        folder.mkdir()
        pair = pair_of("llama", folder, held_out=held, batch=text(blocks=blocks, length=128))
        align_attention(pair, 3, 0, nothing)
        assert all(p.isfinite().all() for p in pair.attention.parameters()) and changed(pair)


def test_long_and_short_blocks_together_are_each_turned_by_their_own_table(tmp_path):
    batch = text(blocks=8, length=40)
    batch["position_ids"][::2] = torch.arange(40) % (SWITCH // 2)  # short documents only
    pair = pair_of("phi3-longrope", tmp_path, batch=batch)
    rows = torch.arange(40).repeat(8, 1)
    norm = pair.original.layers[1].input_layernorm
    for decoder, attention in (
        (pair.original, pair.original.layers[1].self_attn),
        (pair.latent, pair.attention),
    ):
        with torch.no_grad():
            normed = norm(pair.streams["inputs"].read(range(8)))
            together = row_logits(attention, decoder, normed, pair.positions, rows)
            for b in range(8):
                one = row_logits(attention, decoder, normed[b, None], pair.positions[b, None], rows[b, None])
                assert_close_to_scale(together[b, None], one, 1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3-window", "phi3-longrope"])
def test_what_is_kept_of_the_original_gives_its_attention(tmp_path, name):
    pair = pair_of(name, tmp_path)
    rows = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(b))[:6] for b in range(2)])
    original = pair.original.layers[1]
    with torch.no_grad():
        normed = original.input_layernorm(pair.streams["inputs"].read([0, 1]))
        wanted = row_logits(original.self_attn, pair.original, normed, pair.positions[:2], rows)
        query, key = (
            pair.streams[part].read([0, 1]).unflatten(-1, (-1, 32)).transpose(1, 2)
            for part in ("queries", "keys")
        )
        query = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, 32))
        found = masked_logits(
            original.self_attn,
            query,
            key,
            allowed(pair.positions[:2], rows, original.self_attn.sliding_window),
        )
    assert_close_to_scale(found.softmax(-1), wanted.softmax(-1), 1e-5)
    assert torch.equal(found < -1e29, wanted < -1e29)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("width", [32, 8])
def test_each_projection_alone_is_that_of_all_three(name, width):
    model, latent = converted(name, 8, 8)
    attention = (model if width == 32 else latent).model.layers[1].self_attn
    hidden = torch.randn(2, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with recorded_projections(attention) as recorded, torch.no_grad():
        every = attention.project(hidden)
        for part, expected in zip("qkv", every[:3], strict=True):
            assert_close_to_scale(attention.project_one(part, hidden), expected, 1e-6)
    assert recorded == [every] and "project" not in vars(attention)


@pytest.mark.parametrize("name", FAMILIES)
def test_cosines_that_are_looked_up_are_those_that_are_computed(name, tmp_path):
    pair = pair_of(name, tmp_path)
    attention, decoder, positions = pair.attention, pair.latent, pair.positions
    like = torch.empty(0)
    look_up = rotary_by_position(attention, decoder, like, positions)
    for some in (positions, positions[[5, 2]]):
        for found, wanted in zip(look_up(some), rotary_of(attention, decoder, like, some), strict=True):
            assert found.shape == wanted.shape
            assert_close_to_scale(found, wanted, 1e-6)  # kernels may round a table's ends otherwise


@pytest.mark.parametrize("align", [align_attention, partial(align_output, keys=True, values=True)])
def test_a_step_computes_no_cosines_and_no_documents(align, tmp_path, monkeypatch):
    pair, calls = pair_of("llama", tmp_path), []
    forward, documents = LatentRotary.forward, attention_rows.document_ids
    monkeypatch.setattr(LatentRotary, "forward", lambda *given: calls.append("cos") or forward(*given))
    for module in (attention_rows, alignment):
        monkeypatch.setattr(module, "document_ids", lambda given: calls.append("ids") or documents(given))
    align(pair, 4, 0, nothing)
    assert sorted(calls) == ["cos", "ids"]
