"""Our own runtime on a checkpoint, behind the server of `transformers serve`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.engines.engine_process import EngineSettings
from kvlatent.engines.openai_server import serve_model
from kvlatent.jobs.devices import choose_device
from kvlatent.model.cache_bytes import layer_cache_bytes
from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import attention_layers_of, head_dim_of, key_value_heads_of

__all__ = ["serve"]


def serve(settings: EngineSettings) -> tuple[dict[str, Any], Callable[[], None]]:
    """Listen; `EngineFacts`, and what ends it."""
    torch.set_num_threads(settings.num_threads)
    model: Any = load_model(settings.path, device=choose_device("auto"))
    config = model.config
    tokenizer = load_tokenizer(settings.path, config)
    url, stop = serve_model(model, tokenizer, settings)
    latent = latent_config_of(config) if getattr(config, "kv_latent", None) else None
    keys, values = (head_dim_of(config),) * 2 if latent is None else (latent.d_qk, latent.d_vo)
    sizes = (len(attention_layers_of(config)), key_value_heads_of(config), model.dtype.itemsize)
    return {
        "engine": f"transformers {version('transformers')}",
        "url": url,
        "cache_dtype": str(model.dtype).removeprefix("torch."),
        "cache_bytes_per_token": sum(layer_cache_bytes(keys, values, *sizes)),
        "cache_said_by": "the shapes of keys and values",
    }, stop
