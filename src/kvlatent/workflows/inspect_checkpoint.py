"""What a checkpoint is, read from its config and the record of its making; no weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvlatent.checkpoints.gguf_files import describe_weights
from kvlatent.checkpoints.load import load_config
from kvlatent.checkpoints.wrapper_files import wrapper_of
from kvlatent.model.classes import latent_config_of
from kvlatent.model.config import table_scope
from kvlatent.model.families import attention_layers_of, family_of, key_value_heads_of
from kvlatent.workflows.run_record import read_record

__all__ = ["describe"]


def describe(model: str | Path) -> dict[str, Any]:
    """Family, widths, selection, cache bytes per token (computed), and the figures of the run that made it.

    Args:
        model: directory or hub id of a latent checkpoint, or of a supported original; or its GGUF file.
            Of a multimodal one the language model inside is described, and "wrapper" is the type of the whole.

    Returns:
        A JSON-able dict. `cache_bytes_per_token` is for the checkpoint's own dtype. "figures" is there when a local
        directory holds `run.json`.

    Raises:
        FileNotFoundError, ValueError: no such model, or not a supported one; a damaged `run.json`.
    """
    config = load_config(str(model))
    family = family_of(config)
    saved = getattr(config, "kv_latent", None)
    heads, layers = key_value_heads_of(config), len(attention_layers_of(config))
    dtype = config.dtype
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    document: dict[str, Any] = {
        "model_type": config.model_type,
        "family": family.model_type,
        "is_latent": saved is not None,
    }
    if (wrapper := wrapper_of(model)) is not None:
        document["wrapper"] = wrapper.config.model_type
    if (weights := describe_weights(model)) is not None:
        document["weights"] = weights
    document |= {
        "num_hidden_layers": config.num_hidden_layers,
        **({} if layers == config.num_hidden_layers else {"num_attention_layers": layers}),
        "num_key_value_heads": heads,
        "dtype": str(dtype).removeprefix("torch."),
    }
    document["max_position_embeddings"] = getattr(config, "max_position_embeddings", None)
    if saved is None:
        size = 2 * head_dim * layers * heads * dtype.itemsize
        return document | {"head_dim": head_dim, "cache_bytes_per_token": {"original": size}}
    latent = latent_config_of(config)
    original = 2 * latent.original_head_dim * layers * heads * dtype.itemsize
    reduced = latent.cache_bytes_per_token(layers, heads, dtype.itemsize)
    document |= {
        "d_qk": latent.d_qk,
        "d_vo": latent.d_vo,
        "original_head_dim": latent.original_head_dim,
        "selection": {
            "keys": latent.keys,
            "values": latent.values,
            "frequencies": latent.frequencies,
            "table": table_scope(latent),
            "qk_norm": latent.qk_norm,
        },
        "cache_bytes_per_token": {"original": original, "latent": reduced, "share": reduced / original},
    }
    if (record := read_record(Path(model) / "run.json")) is not None:
        document |= {
            name: record[name]
            for name in ("command", "calibration", "figures", "training")
            if record.get(name)
        }
    return document
