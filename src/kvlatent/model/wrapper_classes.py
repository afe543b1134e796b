"""Classes of multimodal models whose language model is latent: upstream's own wrapper around a latent decoder.

A wrapper makes its language model from `config.text_config`, so what differs is the type of that config; towers, projectors
and masks are upstream's. Each wrapper has a `model_type` of its own (`kv_latent_gemma3`, ...), so that no stock class loads it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kvlatent.model.classes import CarriesItsCode, latent_classes
from kvlatent.model.families import LATENT_PREFIX

__all__ = ["WRAPPED", "register_text_model", "wrapper_classes"]

WRAPPED = "KVLatentWrapped"
"""What the names of these classes start with, before upstream's."""


def register_text_model(model_type: str) -> None:
    """Make transformers know the latent classes of a source `model_type`, from which wrappers make their language model."""
    config, decoder, causal = latent_classes(model_type)
    AutoConfig.register(LATENT_PREFIX + model_type, config, exist_ok=True)
    AutoModel.register(config, decoder, exist_ok=True)
    AutoModelForCausalLM.register(config, causal, exist_ok=True)


@cache
def wrapper_classes(base: Any) -> tuple[Any, Any]:
    """Config and model classes for a wrapper's class, such as `Gemma3ForConditionalGeneration`."""
    base_config = base.config_class

    class Config(base_config):
        model_type = LATENT_PREFIX + base_config.model_type

        def __post_init__(self, **kwargs: Any) -> None:
            if isinstance(self.text_config, dict):
                source = self.text_config["kv_latent"]["original_model_type"]
                self.text_config = latent_classes(source)[0](**self.text_config)
            super().__post_init__(**kwargs)

    class Wrapper(CarriesItsCode, base):
        config_class = Config

        def __init__(self, config: Any) -> None:
            register_text_model(config.text_config.kv_latent["original_model_type"])
            super().__init__(config)

    Config.__name__ = Config.__qualname__ = f"{WRAPPED}{base_config.__name__}"
    Wrapper.__name__ = Wrapper.__qualname__ = f"{WRAPPED}{base.__name__}"
    return Config, Wrapper
