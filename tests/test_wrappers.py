"""Multimodal models: the language model inside is converted, towers and projectors are carried over as they are."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from calibration_setup import text
from kvlatent import calibrate, convert
from kvlatent.checkpoints.save import save
from kvlatent.model.assembly import full_width
from kvlatent.model.wrappers import text_model_of, with_text_model
from tiny import logits, tiny_model, tokens
from tolerances import ROUNDING

EXACT = {"rtol": 0, "atol": 0}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
IMAGE = 127
PIXTRAL = {**VISION, "model_type": "pixtral", "head_dim": 16}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
SIGLIP_2 = {**VISION, "model_type": "siglip2_vision_model", "num_patches": 16}
CLIP = {**VISION, "model_type": "clip_vision_model"}
WRAPPERS = {
    "gemma3": (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        "gemma3",
        {"vision_config": SIGLIP, "mm_tokens_per_image": 4, "image_token_index": IMAGE},
    ),
    "mistral3": (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        "mistral",
        {"vision_config": PIXTRAL, "image_token_index": IMAGE, "tie_word_embeddings": False},
    ),
    "llava": (
        LlavaConfig,
        LlavaForConditionalGeneration,
        "qwen2",
        {"vision_config": CLIP, "image_token_index": IMAGE, "image_seq_length": 16},
    ),
    "lfm2-vl": (
        Lfm2VlConfig,
        Lfm2VlForConditionalGeneration,
        "lfm2",
        {"vision_config": SIGLIP_2, "image_token_id": IMAGE},
    ),
}
IMAGES = {"gemma3": 4, "llava": 16, "mistral3": 4}
"""Tokens of an image of 16 x 16."""


def tiny_wrapper(name, **more):
    """A random wrapper around a toy of tests/tiny.py."""
    config_type, model_type, inner, fields = WRAPPERS[name]
    toy = tiny_model(inner, **more)
    fields = {key: dict(value) if isinstance(value, dict) else value for key, value in fields.items()}
    model = model_type(config_type(text_config=toy.config.to_dict(), **fields)).eval()
    model.get_decoder().load_state_dict(toy.get_decoder().state_dict())
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(toy.get_output_embeddings().weight)
        for tensor in outside(model).values():  # a projector may start with zeros
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def with_image(name):
    """A prompt with an image in it."""
    count = IMAGES[name]
    ids = tokens(batch=1, length=count + 12)
    ids[:, 3 : 3 + count] = IMAGE
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    given = {"pixel_values": pixels}
    if name == "gemma3":
        given["token_type_ids"] = (ids == IMAGE).long()
    if name == "mistral3":
        given["image_sizes"] = torch.tensor([[16, 16]])
    return ids, given


def outside(model):
    """Tensors that are not the language model's."""
    return {n: t for n, t in model.state_dict().items() if "language_model" not in n and "lm_head" not in n}


@pytest.fixture(scope="module")
def models():
    return {name: tiny_wrapper(name) for name in WRAPPERS}


@pytest.fixture(scope="module")
def halves(models):
    halves = {}
    for name, model in models.items():
        statistics = calibrate(model, text(blocks=4, length=48))
        halves[name] = convert(model, d_qk=16, d_vo=16, align=1, global_steps=1, statistics=statistics)
    return halves


@pytest.mark.parametrize("name", WRAPPERS)
def test_at_full_width_text_and_images_give_the_same_bits(models, name):
    model = models[name]
    twin = with_text_model(model, full_width(text_model_of(model)))
    torch.testing.assert_close(logits(twin, tokens()), logits(model, tokens()), **EXACT)
    if name in IMAGES:
        ids, given = with_image(name)
        torch.testing.assert_close(logits(twin, ids, **given), logits(model, ids, **given), **EXACT)
        assert (logits(model, ids, **given) - logits(model, ids, **given | {"pixel_values": -given["pixel_values"]})).abs().max() > 1e-3  # fmt: skip
    theirs, ours = model.state_dict(), twin.state_dict()
    assert {t.data_ptr() for t in theirs.values()} == {t.data_ptr() for t in ours.values()}


@pytest.mark.parametrize("name", WRAPPERS)
def test_half_the_cache_and_everything_else_as_it_was(models, halves, name):
    model, latent = models[name], halves[name]
    assert latent.config.model_type == f"kv_latent_{model.config.model_type}"
    assert (logits(latent, tokens()) - logits(model, tokens())).abs().max() > 1e-2
    ours = outside(latent)
    assert all(ours[n].data_ptr() == tensor.data_ptr() for n, tensor in outside(model).items())
    assert ours.keys() == outside(model).keys() and len(ours) > 10
    with torch.no_grad():
        cache = latent(tokens(), use_cache=True).past_key_values
    widths = {
        (layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers if hasattr(layer, "keys")
    }
    assert widths == {(16, 16)}
    inner = convert(text_model_of(model), d_qk=16, d_vo=16, preset="own-frequency")
    whole = convert(model, d_qk=16, d_vo=16, preset="own-frequency")
    torch.testing.assert_close(logits(whole, tokens()), logits(inner, tokens()), **EXACT)


LOAD = """
import importlib.util, json, sys, torch
from transformers import AutoModelForImageTextToText
for folder in sys.argv[1:]:
    ids, given, logits, state = torch.load(f"{folder}/expected.pt")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    ours = model.state_dict()
    same = ours.keys() == state.keys() and all(torch.equal(ours[n], t) for n, t in state.items())
    with torch.no_grad():
        off = float((model(ids, **given).logits - logits).abs().max() / logits.abs().max())
    print(json.dumps([same, off, importlib.util.find_spec("kvlatent") is not None]))
"""


def test_a_saved_wrapper_loads_without_kvlatent(halves, tmp_path):
    """Towers to the byte, through the checkpoint's own modelling file."""
    folders = []
    for name, latent in halves.items():
        ids, given = with_image(name) if name in IMAGES else (tokens(), {})
        save(latent, tmp_path / name)
        torch.save(
            (ids, given, logits(latent, ids, **given), latent.state_dict()), tmp_path / name / "expected.pt"
        )
        folders.append(str(tmp_path / name))
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"} | {
        "HF_MODULES_CACHE": str(tmp_path / "m")
    }
    command = [sys.executable, "-S", "-c", "import sys; sys.path += %r\n" % [p for p in sys.path if "site-packages" in p] + LOAD]  # fmt: skip
    done = subprocess.run([*command, *folders], capture_output=True, text=True, check=True, env=environment)
    for line, name in zip(done.stdout.splitlines(), halves, strict=True):
        same, off, has_kvlatent = json.loads(line)
        assert same and off <= ROUNDING and not has_kvlatent, name


def test_positions_with_axes_are_refused():
    """The images of Qwen3.5 have rows and columns; its language model alone reads text, and is converted."""
    inner = tiny_model("qwen3.5").config.to_dict()
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=inner, vision_config=vision)).eval()
    with pytest.raises(ValueError, match=r"the images of a model of type 'qwen3_5' have 3 \(time, height"):
        convert(model, d_qk=16, preset="own-frequency")


def test_a_latent_language_model_is_not_converted_again(halves):
    with pytest.raises(ValueError, match="latent already .*'kv_latent_gemma3_text'"):
        convert(halves["gemma3"], d_qk=8, preset="own-frequency")


def test_a_language_model_without_a_row_is_refused():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig())
    with pytest.raises(ValueError, match="'qwen2_5_vl_text'"):
        convert(model, d_qk=16, preset="own-frequency")
