"""A cache that grows in place gives what upstream's gives, writes only what is new, and keeps out of what it must not touch."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache, StaticCache

from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation.speed.memory import held_bytes
from kvlatent.model.growing_cache import GrowingLayer, GrowingSlidingWindowLayer, grow_in_place
from tiny import logits, tiny_model, tokens
from tolerances import ROUNDING, assert_close_to_scale

KINDS = [None, 5]
WIDTHS = (8, 3)


def cache_of(window):
    if window is None:
        return DynamicCache()
    config = tiny_model("mistral", sliding_window=window).config
    return DynamicCache(config=config)


def states(size, at=0):
    generator = torch.Generator().manual_seed(100 * at + size)
    return [torch.randn(2, 2, size, width, generator=generator) for width in WIDTHS]


def update(cache, size, at, *, grows):
    new = states(size, at)
    if grows:
        grow_in_place(cache, 0, new[0])
    return cache.update(*new, 0)


@pytest.mark.parametrize("window", KINDS)
def test_every_update_gives_what_upstreams_gives(window):
    ours, theirs = cache_of(window), cache_of(window)
    with torch.no_grad():
        for at, size in enumerate((3, 1, 1, 40, 1, 7, *[1] * 80)):
            found, expected = update(ours, size, at, grows=True), update(theirs, size, at, grows=False)
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b)
            assert ours.get_seq_length() == theirs.get_seq_length()
            assert ours.get_mask_sizes(2, 0) == theirs.get_mask_sizes(2, 0)
            assert held_bytes(ours) == held_bytes(theirs)
    assert isinstance(ours.layers[0], GrowingLayer if window is None else GrowingSlidingWindowLayer)


@pytest.mark.parametrize("window", KINDS)
def test_a_token_is_written_into_room_that_is_there(window):
    cache = cache_of(window)
    with torch.no_grad():
        update(cache, 400, 0, grows=True)
        places = []
        for at in range(1, 400):
            keys, _ = update(cache, 1, at, grows=True)
            places.append(keys.untyped_storage().data_ptr())
    moves = sum(a != b for a, b in itertools.pairwise(places))
    assert moves <= (7 if window is None else 13)  # an eighth of 400 and more; 32 beside a window of 5
    room = cache.layers[0]._rooms[0]
    assert room.shape[2] <= max(33, keys.shape[2]) * 9 // 8 + 33


def test_what_was_handed_out_stays_as_it_was():
    cache = cache_of(None)
    with torch.no_grad():
        before, _ = update(cache, 10, 0, grows=True)
        kept = before.clone()
        copied = copy.deepcopy(cache)
        update(cache, 1, 1, grows=True)
        update(copied, 1, 2, grows=True)
    assert torch.equal(before, kept)
    assert not torch.equal(cache.layers[0].keys[:, :, 10], copied.layers[0].keys[:, :, 10])
    assert torch.equal(cache.layers[0].keys[:, :, :10], copied.layers[0].keys[:, :, :10])


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-4),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_repeat_interleave(1),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda cache: cache.reset(),
        lambda cache: setattr(cache.layers[0], "keys", cache.layers[0].keys * 2),
    ],
    ids=["crop", "reorder", "repeat", "select", "reset", "replace"],
)
def test_what_else_changes_a_cache_is_taken_up(change):
    ours, theirs = cache_of(None), cache_of(None)
    with torch.no_grad():
        for at, size in enumerate((20, 1, 1)):
            update(ours, size, at, grows=True), update(theirs, size, at, grows=False)
        change(ours), change(theirs)
        for at, size in enumerate((1, 3, 1), start=5):
            found, expected = update(ours, size, at, grows=True), update(theirs, size, at, grows=False)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_view_of_someone_elses_tensor_is_not_written_into():
    theirs = torch.zeros(2, 2, 50, WIDTHS[0])
    cache = cache_of(None)
    with torch.no_grad():
        update(cache, 10, 0, grows=True)
        cache.layers[0].keys = theirs[:, :, :10]
        update(cache, 1, 1, grows=True)
    assert not theirs.any()


@pytest.mark.parametrize("mode", ["gradient", "inference then not", "other types"])
def test_where_writing_in_place_would_fail_tensors_are_joined(mode):
    cache, expected = cache_of(None), cache_of(None)
    with torch.inference_mode() if mode.startswith("inference") else torch.no_grad():
        update(cache, 4, 0, grows=True), update(expected, 4, 0, grows=False)
    keys, values = states(1, 1)
    if mode == "gradient":
        keys.requires_grad_()
        grow_in_place(cache, 0, keys)
        cache.update(keys, values, 0)[0].sum().backward()
        assert torch.equal(keys.grad, torch.ones_like(keys))
        return
    if mode == "other types":
        keys, values = keys.double(), values.double()
    with torch.no_grad():
        grow_in_place(cache, 0, keys)
        found = cache.update(keys, values, 0)
        for a, b in zip(found, expected.update(keys, values, 0), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype


def test_other_caches_and_other_devices_are_left_alone():
    class Own(DynamicCache):
        pass

    config = tiny_model("llama").config
    meta = torch.zeros(1, 2, 1, 8, device="meta")
    with torch.no_grad():
        for cache in (Own(config=config), StaticCache(config, max_cache_len=8)):
            kind = type(cache.layers[0])
            grow_in_place(cache, 0, states(1)[0])
            assert type(cache.layers[0]) is kind
        cache = DynamicCache(config=config)
        grow_in_place(cache, 0, meta)
        grow_in_place(None, 0, states(1)[0])
    grow_in_place(cache, 0, states(1)[0])  # a gradient may be wanted
    assert not any(isinstance(layer, GrowingLayer) for layer in cache.layers)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-window"])
def test_generation_writes_in_place_and_gives_the_same_tokens(name):
    latent = convert(tiny_model(name), d_qk=16, d_vo=8, preset="paper")
    x = tokens(batch=2, length=20)
    plan = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = latent.generate(x, return_dict_in_generate=True, **plan)
    kinds = {type(layer) for layer in out.past_key_values.layers}
    assert kinds <= {GrowingLayer, GrowingSlidingWindowLayer} and type(out.past_key_values) is DynamicCache
    assert torch.equal(out.sequences, latent.generate(x, use_cache=False, **plan))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_step_takes_over_a_cache_that_grew():
    latent = convert(tiny_model("llama"), d_qk=16, d_vo=8, preset="paper")
    x = tokens(batch=1, length=12)
    expected = logits(latent, x)
    step = torch.compile(latent, backend="eager", dynamic=True)
    cache = DynamicCache(config=latent.config)
    with torch.no_grad():
        latent(x[:, :9], past_key_values=cache)
        found = [step(x[:, at : at + 1], past_key_values=cache).logits for at in (9, 10)]
        found.append(latent(x[:, 11:], past_key_values=cache).logits)
    assert_close_to_scale(torch.cat(found, 1), expected[:, 9:], ROUNDING)
