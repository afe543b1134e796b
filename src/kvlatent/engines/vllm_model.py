"""The class that vLLM builds for a latent checkpoint: its Transformers backend, with what is checked at the start.

It exists where vLLM does, so the class is made when vLLM asks for it by name. Once the cache is there, and before the
first request, one prompt runs through vLLM's own attention and is compared with what the checkpoint says of itself.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlatent.checkpoints.self_check import SELF_CHECK, SelfCheck
from kvlatent.engines import vllm_diffkv
from kvlatent.engines.vllm_plugin import check_version, current_device, describe_cache
from kvlatent.engines.vllm_prompt import attention_layers, compare, read_self_check
from kvlatent.model.classes import latent_config_of
from kvlatent.model.projection import KeptChannels
from kvlatent.model.rotary import LatentRotary

__all__ = ["LatentBackend", "check_settings", "latent_model_class", "wants_diffkv"]

_log = logging.getLogger("vllm.kvlatent")
"""Under vLLM's own logger, which has the handlers."""


def check_settings(vllm_config: Any) -> None:
    """Refuse what the modelling code would compute wrongly.

    Raises:
        ValueError: several devices share a layer or the layers, or a context beyond the length where a second rotary
            table takes over.
    """
    parallel = vllm_config.parallel_config
    devices = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    if devices != (1, 1):
        raise ValueError(
            f"a latent checkpoint runs on one device of vLLM: got tensor_parallel_size={devices[0]} and "
            f"pipeline_parallel_size={devices[1]}; `kvlatent export --to stock` writes one that is split"
        )
    config = vllm_config.model_config.hf_config
    switches = [
        table.switch
        for layer in latent_config_of(config).tables
        for table in layer
        if table.switch is not None
    ]
    longest = vllm_config.model_config.max_model_len
    if switches and longest > min(switches):
        raise ValueError(
            "vLLM computes long and short sequences together, and this model has another rotary table for those beyond "
            f"{min(switches)} tokens: got max_model_len={longest}; pass --max-model-len {min(switches)}"
        )


def wants_diffkv(vllm_config: Any) -> bool:
    """Whether the user asked for the backend that keeps keys and values at their own widths."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == vllm_diffkv.BACKEND


class LatentBackend:
    """What a latent checkpoint adds to vLLM's Transformers backend, the class behind this one in the order of bases.

    Raises:
        ValueError: this vLLM, or what it is asked for, was not tested or would be computed wrongly; the self-check's file
            is damaged, or says something else than vLLM computes.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        note = check_version(current_device())
        if note is not None:
            _log.warning(note)
        check_settings(vllm_config)
        model = vllm_config.model_config
        self_check = read_self_check(model.model, model.revision)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # ty: ignore[unknown-argument]
        self._self_check: SelfCheck | None = self_check
        self._unbound = attention_layers(self)
        for layer in self._unbound:
            layer.on_bound = self._layer_is_bound
        config = model.hf_config
        if wants_diffkv(vllm_config):
            ALL_ATTENTION_FUNCTIONS.register(vllm_diffkv.INTERFACE, vllm_diffkv.attend)
            config._attn_implementation = vllm_diffkv.INTERFACE
            _log.warning(
                f"{vllm_diffkv.BACKEND} was never run with kvlatent: the self-check at start decides"
            )
        size = self._unbound[0].kv_cache_torch_dtype.itemsize
        widths = [(layer.head_size, layer.head_size_v) for layer in self._unbound]
        _log.info(describe_cache(latent_config_of(config), widths, config.num_key_value_heads, size))
        if self_check is None:
            _log.warning(
                f"the checkpoint has no {SELF_CHECK}, so it is served without a self-check; save it again with kvlatent"
            )

    def _get_attn_cls(self) -> Any:
        """What builds a layer's attention from vLLM's arguments."""
        attention = _reporting(super()._get_attn_cls())  # ty: ignore[missing-attribute]
        vllm_config = self.vllm_config  # ty: ignore[missing-attribute]
        if not wants_diffkv(vllm_config):
            return attention
        config = vllm_config.model_config.hf_config
        latent = latent_config_of(config)
        vllm_diffkv.check_diffkv(latent, config.num_hidden_layers, current_device())
        backend = vllm_config.attention_config.backend.get_class()
        backend.set_head_size_v(latent.max_d_vo)

        def build(**arguments: Any) -> Any:
            widths = vllm_diffkv.layer_arguments(latent, arguments["prefix"])
            return attention(**{**arguments, **widths}, attn_backend=backend)

        return build

    def process_weights_after_loading(self) -> None:
        """Put tables and indices on the device before vLLM compiles: they are made at first use."""
        device = next(self.parameters()).device  # ty: ignore[missing-attribute]
        for module in self.modules():  # ty: ignore[missing-attribute]
            if isinstance(module, LatentRotary) and module.tables:
                module.inv_freq(device, torch.tensor(1, device=device))
            elif isinstance(module, KeptChannels):
                module.index(device)

    def _layer_is_bound(self, layer: Any) -> None:
        """Compare, as soon as the last layer has its cache."""
        self._unbound = [other for other in self._unbound if other is not layer]
        if self._unbound or self._self_check is None:
            return
        check, self._self_check = self._self_check, None
        found, allowed = compare(self, check)
        _log.info(
            f"self-check passed: log-probabilities within {found:.1e} of the checkpoint's (allowed {allowed:.1e})"
        )


@cache
def latent_model_class() -> type:
    """vLLM's `TransformersForCausalLM` for latent checkpoints."""
    from vllm.model_executor.models.transformers import TransformersForCausalLM as Backend

    class Model(LatentBackend, Backend):
        pass

    # vLLM asks by this name whether its Transformers backend is at work.
    Model.__name__ = Model.__qualname__ = Backend.__name__
    return Model


@cache
def _reporting(attention: Any) -> type:
    """vLLM's attention layer, which tells when it got its cache."""

    class Attention(attention):
        on_bound: Any = None

        def bind_kv_cache(self, kv_cache: Any) -> None:
            super().bind_kv_cache(kv_cache)
            if self.on_bound is not None:
                self.on_bound(self)

    return Attention


def __getattr__(name: str) -> Any:
    """The class by the name that the plugin registers."""
    if name == "TransformersForCausalLM":
        return latent_model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
