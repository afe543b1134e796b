"""Attention of one query on a CPU: grouped products and the compiled kernel against a slow oracle, and in a model."""

import copy
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvlatent.conversion.convert_model import convert
from kvlatent.engines import cpu_decode
from kvlatent.engines.native_code import NoNativeCode, load_native
from kvlatent.model import attention as attention_module
from kvlatent.model.grouped_attention import adds_one_token, grouped_attention
from tiny import HEAD_DIM, logits, padded, tiny_model, tokens
from tolerances import ROUNDING, assert_close_to_scale

pytestmark = pytest.mark.numerics

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="the kernel is compiled at first use"
)
HALF = torch.finfo(torch.bfloat16).eps
MODULE = SimpleNamespace(training=False)


def slow(query, key, value, seen, scaling):
    """Oracle in float64: one sequence and one head at a time, over the positions that are seen."""
    out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    groups = query.shape[1] // key.shape[1]
    for row in range(query.shape[0]):
        kept = torch.ones(key.shape[2], dtype=torch.bool) if seen is None else seen[row]
        for head in range(query.shape[1]):
            keys, values = (x[row, head // groups, kept].double() for x in (key, value))
            shares = (scaling * keys @ query[row, head, 0].double()).exp()
            out[row, head, 0] = shares @ values / shares.sum()
    return out


def by_products(query, key, value, seen, scaling):
    mask = None if seen is None else seen[:, None, None]
    return grouped_attention(MODULE, query, key, value, mask, scaling=scaling)[0].transpose(1, 2)


def by_kernel(query, key, value, seen, scaling):
    return cpu_decode.decode_attention(query, key, value, seen, scaling)


ways = pytest.mark.parametrize(
    "attend", [by_products, pytest.param(by_kernel, marks=needs_compiler)], ids=["products", "kernel"]
)


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 128, 300])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("widths", [(64, 32), (24, 40), (7, 33), (16, 96)])
def test_one_query_against_a_slow_oracle(attend, widths, groups, length, dtype):
    """Widths that are whole vectors and odd ones, groups that fill the registers and others, views with strides."""
    d_qk, d_vo = widths
    torch.manual_seed(groups + length)
    query = torch.randn(2, 2 * groups, 1, d_qk).to(dtype)
    key = torch.randn(2, 2, length + 9, d_qk).to(dtype)[:, :, 4 : 4 + length]
    value = torch.randn(2, 2, length, d_vo).to(dtype)
    for hidden in {0, length // 2}:
        seen = None
        if hidden:
            seen = torch.ones(2, length, dtype=torch.bool)
            seen[0, :hidden] = False  # left padding
        expected = slow(query, key, value, seen, 0.3)
        found = attend(query, key, value, seen, 0.3)
        assert found.dtype == dtype
        # In bfloat16 the products round scores before the softmax, and scores reach about 12 here.
        tolerance = ROUNDING if dtype == torch.float32 else 4 * HALF if attend is by_kernel else 16 * HALF
        assert_close_to_scale(found.double(), expected, tolerance)


@needs_compiler
def test_the_kernel_is_the_same_function_however_the_positions_are_split(monkeypatch):
    """One key-value head and 5,000 positions: parts for several threads, combined at the end."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 3, 1, 40), torch.randn(1, 1, 5000, 40), torch.randn(1, 1, 5000, 24)
    query[:, 1] *= 30  # one position takes nearly all weight
    whole = cpu_decode.decode_attention(query, key, value)
    for threads in (2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert_close_to_scale(cpu_decode.decode_attention(query, key, value), whole, ROUNDING)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), enable_gqa=True
    )
    assert_close_to_scale(whole.double(), expected, ROUNDING)


@needs_compiler
def test_a_sequence_that_sees_nothing_gets_zeros():
    seen = torch.zeros(2, 200, dtype=torch.bool)
    seen[1, 3] = True
    query, key, value = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 200, 16), torch.randn(2, 2, 200, 8)
    found = cpu_decode.decode_attention(query, key, value, seen)
    assert torch.equal(found[0], torch.zeros(4, 1, 8))
    assert_close_to_scale(found[1, :, 0], value[1, [0, 0, 1, 1], 3], ROUNDING)


@pytest.mark.parametrize("per_head", [False, True])
def test_masks_of_numbers_and_per_head(per_head):
    """What upstream's sdpa takes beside true and false, in the products; the kernel leaves such masks to them."""
    query, key, value = torch.randn(2, 6, 1, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 8)
    added = torch.randn(2, 6 if per_head else 1, 1, 20)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), attn_mask=added
    )
    for attend in (grouped_attention, cpu_decode._attend):
        found, weights = attend(MODULE, query, key, value, added)
        assert weights is None
        assert_close_to_scale(found.transpose(1, 2), expected, ROUNDING)
    kept = added > 0
    masked = expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), attn_mask=kept
    )
    for attend in (grouped_attention, cpu_decode._attend):
        assert_close_to_scale(attend(MODULE, query, key, value, kept)[0].transpose(1, 2), masked, ROUNDING)


@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("kvlatent", marks=needs_compiler)])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3-window", "phi3"])
def test_a_narrow_model_decodes_by_it_and_a_prompt_does_not(name, implementation, monkeypatch):
    latent = convert(tiny_model(name), d_qk=16, d_vo=8, preset="paper")
    latent.set_attn_implementation(implementation)
    called = []
    if implementation == "sdpa":
        slow_way = attention_module.grouped_attention
        monkeypatch.setattr(
            attention_module, "grouped_attention", lambda *a, **k: called.append(1) or slow_way(*a, **k)
        )
    else:
        slow_way = cpu_decode.decode_attention
        monkeypatch.setattr(cpu_decode, "decode_attention", lambda *a: called.append(1) or slow_way(*a))
    x = tokens(batch=2, length=30)
    expected = logits(latent, x)
    assert not called
    ids, mask = padded(x, 5)
    for inputs, seen, start in ((x, None, 0), (ids, mask, 5)):
        positions = None if seen is None else (seen.cumsum(-1) - 1).clamp(min=0)
        cache, found = None, []
        for at in range(inputs.shape[1]):
            now = slice(at, at + 1)
            with torch.no_grad():
                out = latent(
                    inputs[:, now],
                    past_key_values=cache,
                    use_cache=True,
                    attention_mask=None if seen is None else seen[:, : at + 1],
                    position_ids=None if seen is None else positions[:, now],
                )
            cache = out.past_key_values
            found.append(out.logits)
        assert_close_to_scale(torch.cat(found, 1)[:, start:], expected, ROUNDING)
    assert len(called) >= 3 * 30


def test_a_layer_at_full_width_keeps_upstreams_arithmetic():
    """Bit for bit, at one token as well; narrow, torch's math path would be the other choice."""
    model = tiny_model("llama")
    full = convert(model, d_qk=HEAD_DIM, d_vo=HEAD_DIM, preset="paper")
    x = tokens(batch=1, length=9)
    for at in range(2):
        caches = [m(x[:, : 5 + at], use_cache=True).past_key_values for m in (model, full)]
        steps = [
            logits(m, x[:, 5 + at : 6 + at], past_key_values=c)
            for m, c in zip((model, full), caches, strict=True)
        ]
        assert torch.equal(*steps)
    narrow = convert(model, d_qk=16, d_vo=8, preset="paper")
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # which refuses unequal widths
        cache = narrow(x, use_cache=True).past_key_values
        narrow(x[:, :1], past_key_values=cache)


@needs_compiler
def test_an_original_decodes_by_the_kernel_too():
    model = tiny_model("qwen3")
    x = tokens(batch=2, length=10)
    plan = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(x, **plan)
    model.set_attn_implementation("kvlatent")
    assert torch.equal(model.generate(x, **plan), expected)


@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("kvlatent", marks=needs_compiler)])
def test_a_gradient_flows_through_one_token(implementation):
    latent = convert(tiny_model("llama"), d_qk=16, d_vo=8, preset="paper")
    weight = latent.model.layers[0].self_attn.q_proj.weight
    found = []
    for name in ("eager", implementation):
        latent.set_attn_implementation(name)
        cache = latent(tokens(length=8), use_cache=True).past_key_values
        latent(tokens(length=9)[:, 8:], past_key_values=cache).logits.logsumexp(-1).sum().backward()
        found.append(weight.grad)
        weight.grad = None
    assert_close_to_scale(found[1], found[0], ROUNDING)


def test_what_a_compiler_or_another_device_sees_is_torchs():
    assert adds_one_token(torch.zeros(1, 4, 1, 8))
    assert not adds_one_token(torch.zeros(1, 4, 2, 8))
    assert not adds_one_token(torch.zeros(1, 4, 1, 8, device="meta"))
    seen = []

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(query):
        seen.append(adds_one_token(query))
        return query

    compiled(torch.zeros(1, 4, 1, 8))
    assert not any(seen)


def test_without_a_compiler_the_products_take_over_with_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        NoNativeCode, match="no C\\+\\+ compiler is on the PATH .* install one, such as g\\+\\+"
    ):
        load_native(tmp_path / "any.cpp", tmp_path)
    fresh = copy.copy(cpu_decode.kernel.__wrapped__)
    monkeypatch.setattr(cpu_decode, "kernel", fresh)
    latent = convert(tiny_model("llama"), d_qk=16, d_vo=8, preset="paper")
    x = tokens(batch=1, length=6)
    with torch.no_grad():
        cache = latent(x, use_cache=True).past_key_values
        expected = latent(x[:, :1], past_key_values=copy.deepcopy(cache)).logits
        latent.set_attn_implementation("kvlatent")
        with pytest.warns(UserWarning, match="products instead of its own kernel, .*: no C\\+\\+ compiler"):
            found = latent(x[:, :1], past_key_values=cache).logits
    assert torch.equal(found, expected)


@needs_compiler
def test_source_is_compiled_once_and_a_broken_one_says_where(tmp_path):
    source = tmp_path / "twice.cpp"
    source.write_text('extern "C" int twice(int x) { return 2 * x; }')
    assert load_native(source, tmp_path / "kept").twice(21) == 42
    (kept,) = (tmp_path / "kept").iterdir()
    time = kept.stat().st_mtime_ns
    load_native(source, tmp_path / "kept")
    assert [kept] == list((tmp_path / "kept").iterdir()) and kept.stat().st_mtime_ns == time
    source.write_text("int broken(")
    with pytest.raises(NoNativeCode, match="does not compile twice.cpp: .*error"):
        load_native(source, tmp_path / "kept")
    assert [kept] == list((tmp_path / "kept").iterdir())
    source.write_text('extern "C" int twice(int x) { return 2 * x; }')
    (tmp_path / "spoilt").mkdir()
    (tmp_path / "spoilt" / kept.name).write_bytes(b"not a library")
    with pytest.raises(NoNativeCode, match="cannot be compiled or loaded"):
        load_native(source, tmp_path / "spoilt")


@needs_compiler
def test_the_kernel_compiles_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu_decode.kernel() is not None
