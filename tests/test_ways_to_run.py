"""Greedy tokens are the same however a latent model is run: every attention with every cache, paged and batched ones too."""

import shutil

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from kvlatent.conversion.convert_model import convert
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import effective_table
from tiny import HEAD_DIM, padded, tiny_model, tokens

pytestmark = pytest.mark.numerics

NEW_TOKENS = 6
PLAN = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# d_qk and d_vo of each layer: keys wider, values wider, and both within one model.
WIDTHS = {"keys wider": (16, 8), "values wider": (8, 16), "by layer": ((8, 16, 12), (16, 8, 20))}
IMPLEMENTATIONS = [
    "eager",
    "sdpa",
    pytest.param(
        "kvlatent",
        marks=pytest.mark.skipif(
            not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="compiled at first use"
        ),
    ),
]


def latent_config(model, d_qk, d_vo) -> LatentConfig:
    """Other channels and so another rotary table in every layer and key-value head."""
    table, layers = effective_table(model.config), model.config.num_hidden_layers
    half, heads = table.rotary_dim // 2, model.config.num_key_value_heads
    widths = (d_qk,) * layers if isinstance(d_qk, int) else d_qk
    kept = [
        [[(3 * head + layer + 2 * i) % half for i in range(width // 2)] for head in range(heads)]
        for layer, width in enumerate(widths)
    ]
    return LatentConfig(
        d_qk,
        d_vo,
        tuple(tuple(table.subset(pairs) for pairs in layer) for layer in kept),
        tuple(tuple((*pairs, *(p + half for p in pairs)) for pairs in layer) for layer in kept),
        HEAD_DIM,
        model.config.model_type,
        keys="stride",
        values="svd",
        qk_norm="full" if model.config.model_type == "qwen3" else "none",
    )


@pytest.fixture(scope="module")
def models():
    """Llama and Qwen3 in full attention, Mistral with a window, each at all widths."""
    made = {}
    for name in ("llama", "mistral", "qwen3"):
        original = tiny_model(name)
        for kind, widths in WIDTHS.items():
            latent = made[name, kind] = convert(original, latent_config(original, *widths))
            with (
                torch.no_grad()
            ):  # attention decides the next token, or every way repeats one token and all agree
                for layer in latent.model.layers:
                    layer.self_attn.q_proj.weight.mul_(3)
                    layer.self_attn.o_proj.weight.mul_(8)
                    layer.mlp.down_proj.weight.mul_(0.25)
                latent.model.norm.weight.fill_(1)
    return made


@pytest.fixture(params=["llama", "mistral", "qwen3"])
def name(request):
    return request.param


@pytest.fixture(params=list(WIDTHS))
def latent(request, models, name):
    return models[name, request.param].eval()


def generate(latent, x, **options):
    return latent.generate(x, **PLAN, **options)[:, x.shape[1] :]


@pytest.fixture
def expected(latent):
    """By the full forward of every prefix, with the plainest attention; the two prompts go different ways."""
    latent.set_attn_implementation("eager")
    found = generate(latent, tokens(batch=2, length=20), use_cache=False)
    assert not torch.equal(found[0], found[1])
    return found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_attention_with_every_cache(latent, expected, implementation):
    latent.set_attn_implementation(implementation)
    x = tokens(batch=2, length=20)
    assert torch.equal(generate(latent, x), expected)
    assert torch.equal(generate(latent, x, cache_implementation="static"), expected)
    assert torch.equal(generate(latent, x, prefill_chunk_size=7), expected)
    assert torch.equal(generate(latent, x, prefill_chunk_size=7, cache_implementation="static"), expected)
    assert torch.equal(generate(latent, x[:1], prompt_lookup_num_tokens=3), expected[:1])
    ids, mask = padded(x, 3)
    assert torch.equal(generate(latent, ids, attention_mask=mask), expected)
    assert torch.equal(generate(latent, ids, attention_mask=mask, cache_implementation="static"), expected)


# Every length compiles again, and what one process may compile is limited: one family, both orders of widths at once.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"), reason="see test_flex.py")
def test_flex_attention(models):
    latent = models["llama", "by layer"].eval()
    x = tokens(batch=2, length=20)
    latent.set_attn_implementation("eager")
    expected = generate(latent, x, use_cache=False)
    torch._dynamo.reset()
    latent.set_attn_implementation("flex_attention")
    assert torch.equal(generate(latent, x), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_assisted_by_a_narrower_model(models, latent, name, expected, implementation):
    latent.set_attn_implementation(implementation)
    assistant = (
        models[name, "keys wider"] if latent is not models[name, "keys wider"] else models[name, "by layer"]
    )
    assistant.set_attn_implementation(implementation)
    found = generate(latent, tokens(batch=2, length=20)[:1], assistant_model=assistant)
    assert torch.equal(found, expected[:1])


@pytest.mark.parametrize("implementation", ["paged|eager", "sdpa"])
def test_paged_and_batched_continuously(latent, expected, implementation):
    """Its cache has one width for keys and values of all layers, to which the module pads."""
    prompts = [*tokens(batch=2, length=20).tolist(), tokens(batch=2, length=20)[0, :11].tolist()]
    alone = generate(latent, torch.tensor(prompts[2:]), use_cache=False)
    latent.set_attn_implementation(implementation)
    out = latent.generate_batch(
        prompts,
        generation_config=GenerationConfig(**PLAN),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=16, page_size=16, max_batch_tokens=64, max_memory_percent=0.1
        ),
    )
    found = [one.generated_tokens for one in out.values()]
    assert len(found) == 3
    assert sorted(found) == sorted([*expected.tolist(), *alone.tolist()])
