"""A calibrated conversion on disk between two calls of a run: what it made anew, the attention tensors alone."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.jobs.atomic import write_atomically
from kvlatent.model.assembly import assemble
from kvlatent.model.classes import latent_config_of
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import family_of

__all__ = ["restore_attention", "write_attention"]


def write_attention(latent: PreTrainedModel, path: Path) -> None:
    """Save what a conversion made, the attention tensors and the latent config, whole or not at all."""
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in latent.state_dict().items()
        if f".{family_of(latent.config).attention}." in name
    }
    about = {"kv_latent": json.dumps(latent_config_of(latent.config).to_dict())}
    write_atomically(path, lambda file: save_file(tensors, file, metadata=about))


def restore_attention(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    """The latent model that `write_attention` saved, put together again from the original, bit for bit."""
    with safe_open(path, framework="pt", device=str(model.device)) as file:
        config = LatentConfig.from_dict(json.loads(file.metadata()["kv_latent"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict

    def of_layer(index: int) -> dict[str, Tensor]:
        prefix = f"{model.base_model_prefix}.layers.{index}.{family_of(model.config).attention}."
        return {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }

    return assemble(model, config, of_layer)
