"""The language model inside a multimodal one: taken out to be converted, and put back.

Nothing is copied: what is taken out shares its modules with the wrapper, and what is put back shares every tensor but those
of its attention. Towers and projectors are carried over as they are.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from kvlatent.model.assembly import NOT_CARRIED, share_buffers
from kvlatent.model.classes import latent_classes
from kvlatent.model.families import LATENT_PREFIX, family_of, family_of_original
from kvlatent.model.wrapper_classes import wrapper_classes

__all__ = [
    "empty_wrapper",
    "is_wrapper",
    "language_model_of",
    "register_wrapper",
    "text_config_of",
    "text_model_of",
    "text_places",
    "upstream_wrapper",
    "with_text_model",
]


def upstream_wrapper(model_type: str) -> Any:
    """Upstream's class for a multimodal `model_type`, such as "gemma3"."""
    return getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])


def register_wrapper(model_type: str) -> None:
    """Make transformers know a multimodal `model_type` such as "kv_latent_gemma3"; of any other, do nothing."""
    name = model_type.removeprefix(LATENT_PREFIX)
    if name != model_type and name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        config, model = wrapper_classes(upstream_wrapper(name))
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModelForImageTextToText.register(config, model, exist_ok=True)


def is_wrapper(config: Any) -> bool:
    """Whether a transformers config is that of a multimodal model around a language model, original or latent."""
    model_type = str(config.model_type).removeprefix(LATENT_PREFIX)
    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and hasattr(config, "text_config")


def text_config_of(config: Any) -> Any:
    """The config of the language model inside a multimodal one; any other config as it is.

    Raises:
        ValueError: its language model is of no supported family, or turns its keys by positions with several axes.
    """
    if not is_wrapper(config):
        return config
    family = family_of(config.text_config)
    if family.position_axes > 1:
        raise ValueError(
            f"a latent attention turns keys by one position a token: the images of a model of type {config.model_type!r} have "
            f"{family.position_axes} (time, height, width); convert its language model alone, for text: save what "
            f"transformers' {family.prefix}ForCausalLM loads of it"
        )
    return config.text_config


def text_model_of(model: Any) -> Any:
    """As `language_model_of`, of a model that is not latent yet.

    Raises:
        ValueError: as `language_model_of`; or the language model is latent.
    """
    if is_wrapper(model.config):
        family_of_original(model.config.text_config)
    return language_model_of(model)


def language_model_of(model: Any) -> Any:
    """The causal language model inside a multimodal one, sharing its modules; any other model as it is.

    Raises:
        ValueError: see `text_config_of`; or a module is not transformers' own.
    """
    inner = text_config_of(model.config)
    if inner is model.config:
        return model
    family, decoder = family_of(inner), model.get_decoder()
    wanted, causal = family.upstream("Model"), family.upstream("ForCausalLM")
    if inner.model_type.startswith(LATENT_PREFIX):
        _, wanted, causal = latent_classes(family.model_type)
    if not isinstance(decoder, wanted):
        raise ValueError(  # noqa: TRY004 - the command line shows ValueError as one sentence
            f"the language model of a {type(model).__name__} is a {wanted.__name__} in transformers: got {type(decoder).__name__}; "
            "convert the original checkpoint"
        )
    with torch.device("meta"):
        text: Any = causal(decoder.config)
    setattr(text, text.base_model_prefix, decoder)
    text.set_output_embeddings(model.get_output_embeddings())
    text.generation_config = copy.deepcopy(model.generation_config)
    return text.train(model.training)


def empty_wrapper(model: Any, latent: Any) -> Any:
    """As `with_text_model`, without weights."""
    model_name = str(model.config.model_type).removeprefix(LATENT_PREFIX)
    config_type, model_type = wrapper_classes(upstream_wrapper(model_name))
    fields = model.config.to_dict() | {"text_config": latent.config.to_dict()}
    fields["tie_word_embeddings"] = latent.config.tie_word_embeddings
    for name in set(NOT_CARRIED) - {"head_dim"}:
        fields.pop(name, None)
    config = config_type(**fields)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        whole = model_type(config)
    whole.generation_config = copy.deepcopy(model.generation_config)
    return whole.train(model.training)


def text_places(model: Any, text: Any) -> dict[str, str]:
    """Where the decoder and the head of a wrapper's language model lie in the wrapper, by where they lie in `text`, that alone."""
    return {
        _place_of(text, ours): _place_of(model, theirs)
        for ours, theirs in (
            (text.get_decoder(), model.get_decoder()),
            (text.get_output_embeddings(), model.get_output_embeddings()),
        )
    }


def _place_of(model: Any, module: Any) -> str:
    return next(name for name, each in model.named_modules() if each is module)


def with_text_model(model: Any, latent: Any) -> Any:
    """The wrapper `model` around a latent language model, made from `text_model_of(model)`."""
    whole, places = empty_wrapper(model, latent), text_places(model, latent)
    inside = tuple(f"{place}." for place in places.values())
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    ours = {
        f"{place}.{name}": tensor
        for own, place in places.items()
        for name, tensor in latent.get_submodule(own).state_dict().items()
    }
    whole.load_state_dict(kept | ours, assign=True)
    share_buffers(model, whole)
    whole.tie_weights()
    return whole
