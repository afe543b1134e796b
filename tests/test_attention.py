"""The latent model against the original, against a slow oracle, and against itself in every way of running it."""

import inspect

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, StaticCache

from kvlatent.conversion.convert_model import convert
from kvlatent.model.attention import LatentAttention
from kvlatent.model.cache_bytes import live_cache_bytes
from kvlatent.model.classes import latent_config_of
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import effective_table, family_of
from kvlatent.model.kernel_width import kernel_width
from kvlatent.model.table import RotaryTable
from kvlatent.selection.choices import resolve_choices
from kvlatent.selection.latent_config import choose
from tiny import FAMILIES, HEAD_DIM, SWITCH, logits, padded, tiny_model, tokens
from tolerances import ROUNDING, assert_close_to_scale

pytestmark = pytest.mark.numerics

NARROW = {"d_qk": 16, "d_vo": 8}
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(scope="module")
def converted():
    return {name: convert(tiny_model(name), **NARROW, preset="paper") for name in FAMILIES}


@pytest.fixture
def narrow(converted):
    """Models at (16, 8) of 32, made once, each test starting from sdpa in eval mode."""
    for model in converted.values():
        model.eval().set_attn_implementation("sdpa")
    return converted


def per_head(model) -> LatentConfig:
    """A config with other widths and kept pairs in every layer and every key-value head."""
    table = effective_table(model.config)
    layers, heads, half = (
        model.config.num_hidden_layers,
        model.config.num_key_value_heads,
        table.rotary_dim // 2,
    )
    d_qk = tuple(8 + 4 * layer for layer in range(layers))
    passed = HEAD_DIM - table.rotary_dim
    tables, channels = [], []
    for layer in range(layers):
        kept_rotary = d_qk[layer] * table.rotary_dim // HEAD_DIM
        kept_pass = d_qk[layer] - kept_rotary
        row = []
        for head in range(heads):
            pairs = [(3 * head + layer + 2 * i) % half for i in range(kept_rotary // 2)]
            rest = [table.rotary_dim + (head + i) % passed for i in range(kept_pass)] if passed else []
            row.append((table.subset(pairs), (*pairs, *(p + half for p in pairs), *rest)))
        tables.append(tuple(t for t, _ in row))
        channels.append(tuple(c for _, c in row))
    return LatentConfig(
        d_qk,
        tuple(4 + 8 * layer for layer in range(layers)),
        tuple(tables),
        tuple(channels),
        HEAD_DIM,
        model.config.model_type,
        keys="stride",
        values="svd",
        qk_norm="full" if model.config.model_type == "qwen3" else "none",
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_full_width_is_the_identity(name, implementation):
    model = tiny_model(name)
    model.set_attn_implementation(implementation)
    latent = convert(model, d_qk=HEAD_DIM, d_vo=HEAD_DIM, preset="paper")
    assert type(latent).__name__.startswith("KVLatent")
    for length in (SWITCH - 4, SWITCH + 8):  # both sides of the longrope switch
        x = tokens(length=length)
        torch.testing.assert_close(logits(latent, x), logits(model, x), **EXACT)
    narrow = convert(model, **NARROW, preset="paper")
    assert (logits(narrow, x) - logits(model, x)).abs().max() > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_each_side_is_the_identity_on_its_own(name):
    model = tiny_model(name)
    attention = model.model.layers[1].self_attn
    keys_kept = convert(model, d_vo=8, preset="paper")
    values_kept = convert(model, d_qk=16, preset="paper")
    assert keys_kept.model.layers[1].self_attn.scaling == attention.scaling
    assert latent_config_of(keys_kept.config).tables == ((effective_table(model.config),),)
    if FAMILIES[name][2].get("hidden_size") == 128 and "phi3" in name:
        rows = attention.qkv_proj.weight.split([4 * HEAD_DIM, 2 * HEAD_DIM, 2 * HEAD_DIM])
        new = keys_kept.model.layers[1].self_attn.qkv_proj.weight
        assert torch.equal(new[: 6 * HEAD_DIM], torch.cat(rows[:2])) and new.shape[0] == 6 * HEAD_DIM + 2 * 8
        assert torch.equal(values_kept.model.layers[1].self_attn.qkv_proj.weight[6 * 16 :], rows[2])
    else:
        for side, names in ((keys_kept, ("q_proj", "k_proj")), (values_kept, ("v_proj", "o_proj"))):
            for projection in names:
                ours = getattr(side.model.layers[1].self_attn, projection)
                assert ours.weight.data_ptr() == getattr(attention, projection).weight.data_ptr()
    assert torch.equal(values_kept.model.layers[1].self_attn.o_proj.weight, attention.o_proj.weight)


def slow_attention(attention, hidden, latent, layer, scale):
    """Oracle: one head, one query, one key at a time, from the *original* attention's weights (unfused, slice)."""
    head_dim, config = latent.original_head_dim, attention.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if hasattr(attention, "qkv_proj"):
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        q, k, v = attention.qkv_proj(hidden).split(sizes, -1)
    else:
        q, k, v = attention.q_proj(hidden), attention.k_proj(hidden), attention.v_proj(hidden)
    q, k, v = (x.view(len(hidden), -1, head_dim) for x in (q, k, v))
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    stride = head_dim // latent.d_vo_at(layer)
    out = torch.zeros(len(hidden), heads, head_dim)
    for head in range(heads):
        group = head // (heads // kv_heads)
        tables, channels = latent.tables_at(layer), latent.channels_at(layer)
        table, kept = tables[group % len(tables)], list(channels[group % len(channels)])
        for t in range(len(hidden)):
            window = family_of(config).sliding_window(config, layer)
            first = 0 if window is None else max(0, t - window + 1)
            scores = [
                scale * turn(q[t, head, kept], t, table) @ turn(k[s, group, kept], s, table)
                for s in range(first, t + 1)
            ]
            weights = torch.softmax(torch.stack(scores), 0)
            mixed = sum(w * v[s, group] for w, s in zip(weights, range(first, t + 1), strict=True))
            out[t, head, ::stride] = mixed[::stride]
    return attention.o_proj(out.flatten(1))


def turn(x, position, table):
    half = len(table.short)
    angle = position * torch.tensor(table.short)
    a, b = x[:half], x[half : 2 * half]
    turned = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), x[2 * half :]])
    return (
        turned * table.attention_factor
        if half * 2 == len(x)
        else torch.cat([turned[: 2 * half] * table.attention_factor, x[2 * half :]])
    )


@pytest.mark.parametrize("preset", ["paper", "own", "per head"])
@pytest.mark.parametrize("name", FAMILIES)
def test_narrow_attention_against_a_slow_oracle(name, preset):
    model = tiny_model(name)
    if preset == "per head":
        latent_config = per_head(model)
        latent_config = LatentConfig(**{**vars(latent_config), "values": "slice", "d_vo": (4, 8, 16)})
    else:
        own = {"frequencies": "own"} if preset == "own" else {}
        latent_config = choose(model.config, 16, 8, resolve_choices("paper", **own))
    latent = convert(model, latent_config)
    hidden = torch.randn(20, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    for layer in (0, 2):
        d_qk = latent_config.d_qk_at(layer)
        scale = d_qk**-0.5 if preset == "paper" else HEAD_DIM**-0.5
        with torch.no_grad():
            expected = slow_attention(
                model.model.layers[layer].self_attn, hidden, latent_config, layer, scale
            )
            caught = run_layer_attention(latent, layer, hidden)
        assert_close_to_scale(caught, expected, ROUNDING)


def run_layer_attention(latent, layer, hidden):
    """Attention output of one layer, called as the decoder calls it, on chosen hidden states."""
    module, caught = latent.model.layers[layer].self_attn, []

    def replace(_, args, kwargs):
        return args, {**kwargs, "hidden_states": hidden[None]}

    hooks = [
        module.register_forward_pre_hook(replace, with_kwargs=True),
        module.register_forward_hook(lambda *call: caught.append(call[-1][0])),
    ]
    latent(tokens(batch=1, length=len(hidden)))
    for hook in hooks:
        hook.remove()
    return caught[0][0]


@pytest.mark.parametrize("name", FAMILIES)
def test_tables_and_widths_per_layer_and_head_run_everywhere(name):
    model = tiny_model(name)
    latent = convert(model, per_head(model))
    x = tokens()
    full = logits(latent, x)
    latent.set_attn_implementation("eager")
    assert_close_to_scale(logits(latent, x), full, ROUNDING)
    out = latent(x, use_cache=True)
    expected = latent_config_of(latent.config).cache_bytes_per_token(3, model.config.num_key_value_heads, 4)
    if getattr(model.config, "sliding_window", None) is None:
        assert live_cache_bytes(out.past_key_values) == expected * x.numel()


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_future_token_never_changes_past_logits(narrow, name, implementation, training, padding):
    latent = narrow[name]
    latent.set_attn_implementation(implementation)
    latent.train(training)
    x = tokens(length=40)
    changed = x.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 100 + 3
    first, second = (padded(v) if padding else (v, None) for v in (x, changed))
    a, b = (
        logits(latent, first[0], attention_mask=first[1]),
        logits(latent, second[0], attention_mask=second[1]),
    )
    start = 5 if padding else 0
    torch.testing.assert_close(a[:, start:-1], b[:, start:-1], **EXACT)
    assert (a[:, -1] - b[:, -1]).abs().max() > 0.1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_left_padding_changes_nothing(narrow, name, implementation, training):
    latent = narrow[name]
    x = tokens(length=24)
    expected = logits(latent, x)
    latent.train(training).set_attn_implementation(implementation)
    ids, mask = padded(x)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    actual = logits(latent, ids, attention_mask=mask, position_ids=position_ids)[:, 5:]
    assert_close_to_scale(actual, expected, ROUNDING)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_cached_decoding_equals_the_full_forward(narrow, name, implementation, training, padding):
    latent = narrow[name]
    expected = logits(latent, tokens(length=24))
    latent.train(training).set_attn_implementation(implementation)
    x, mask = padded(tokens(length=24), padding)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    length = x.shape[1]
    for cache in (
        DynamicCache(config=latent.config),
        StaticCache(config=latent.config, max_cache_len=length),
    ):
        start, outputs = 0, []
        for size in (9, 3, *[1] * (length - 12)):  # prefill, a chunk, then token by token
            now = slice(start, start := start + size)
            inputs = {"position_ids": positions[:, now], "past_key_values": cache, "use_cache": True}
            if padding:
                inputs["attention_mask"] = mask[:, :start]
            outputs.append(logits(latent, x[:, now], **inputs))
        assert_close_to_scale(torch.cat(outputs, 1)[:, padding:], expected, ROUNDING)


@pytest.mark.parametrize("name", FAMILIES)
def test_live_cache_bytes_are_the_formula(narrow, name):
    latent = narrow[name]
    config = latent.config
    per_token = latent_config_of(config).cache_bytes_per_token(3, config.num_key_value_heads, 4)
    x = tokens(batch=2, length=40)
    cache = DynamicCache(config=config)
    latent(x, past_key_values=cache, use_cache=True)
    windows = [layer.self_attn.sliding_window for layer in latent.model.layers]
    # transformers keeps the last window - 1 tokens of a sliding layer, and a whole window in a static cache
    cached = sum(40 if window is None else window - 1 for window in windows)
    assert live_cache_bytes(cache) == per_token // 3 * 2 * cached
    static = StaticCache(config=config, max_cache_len=64)
    latent(x, past_key_values=static, use_cache=True)
    assert live_cache_bytes(static) == per_token // 3 * 2 * sum(min(64, window or 64) for window in windows)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_every_way_to_generate_agrees(narrow, name):
    latent = narrow[name]
    x = tokens(batch=2, length=10)
    plan = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    greedy = latent.generate(x, **plan)
    assert torch.equal(latent.generate(x, use_cache=False, **plan), greedy)
    assert torch.equal(latent.generate(x, cache_implementation="static", **plan), greedy)
    ids, mask = padded(x, 3)
    assert torch.equal(latent.generate(ids, attention_mask=mask, **plan)[:, 3:], greedy)
    assert torch.equal(latent.generate(x[:1], prompt_lookup_num_tokens=3, **plan), greedy[:1])
    smaller = convert(tiny_model(name), d_qk=8, d_vo=4, preset="paper")
    assert torch.equal(latent.generate(x[:1], assistant_model=smaller, **plan), greedy[:1])
    chunked = {"prefill_chunk_size": 4, "cache_implementation": "static"}
    assert torch.equal(latent.generate(x, **chunked, **plan), greedy)
    beams = latent.generate(x, num_beams=3, **plan)
    assert torch.equal(beams, latent.generate(x, num_beams=3, use_cache=False, **plan))


def test_prefill_on_a_cpu_uses_the_fused_kernel_and_decoding_stays_unpadded(narrow):
    latent = narrow["llama"]
    attention = latent.model.layers[0].self_attn
    x = tokens(batch=1)
    expected = logits(latent, x)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # refuses unequal widths
        assert_close_to_scale(logits(latent, x), expected, ROUNDING)
    query = torch.zeros(1, 4, 1, 16)
    widths = attention.d_qk, attention.d_vo
    assert kernel_width(latent.config, *widths, query, is_paged=False) is None
    assert kernel_width(latent.config, *widths, query.expand(-1, -1, 2, -1), is_paged=False) == 16
    assert kernel_width(latent.config, *widths, query, is_paged=True) == latent.config.head_dim


def test_values_wider_than_keys_run_as_well():
    latent = convert(tiny_model("llama"), d_qk=8, d_vo=16, preset="paper")
    x = tokens()
    expected = logits(latent, x)
    latent.set_attn_implementation("eager")
    assert_close_to_scale(logits(latent, x), expected, ROUNDING)


def test_attention_weights_are_recorded(narrow):
    latent = narrow["llama"]
    latent.set_attn_implementation("eager")
    weights = latent(tokens(length=7), output_attentions=True).attentions
    assert len(weights) == 3 and weights[0].shape == (2, 4, 7, 7)
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 4, 7))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_what_is_built_in_inference_mode_still_trains(name):
    latent = convert(tiny_model(name), **NARROW, preset="paper")
    with torch.inference_mode():
        latent(tokens())
    latent(tokens()).logits.sum().backward()
    assert latent.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_table_of_another_head_changes_the_output():
    model = tiny_model("llama")
    config = per_head(model)
    swapped = LatentConfig(**{**vars(config), "tables": tuple(layer[::-1] for layer in config.tables)})
    x = tokens()
    assert not torch.equal(logits(convert(model, config), x), logits(convert(model, swapped), x))
    assert all(isinstance(t, RotaryTable) for layer in config.tables for t in layer)


def test_generation_across_the_longrope_switch():
    model = tiny_model("phi3-longrope")
    plan = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    x = tokens(batch=1, length=SWITCH - 5)
    same = convert(model, d_qk=HEAD_DIM, d_vo=HEAD_DIM, preset="paper")
    assert torch.equal(same.generate(x, **plan), model.generate(x, **plan))
    narrow = convert(model, **NARROW, preset="paper")
    assert torch.equal(narrow.generate(x, **plan), narrow.generate(x, use_cache=False, **plan))


def test_the_module_fits_on_a_screen():
    """What a reader holds beside the paper; projections, widths of kernels and refusals have modules of their own."""
    assert len(inspect.getsource(LatentAttention).splitlines()) < 90
