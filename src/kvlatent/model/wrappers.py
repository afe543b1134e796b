"""The language model inside a multimodal one: taken out to be converted, and put back.

Nothing is copied: what is taken out shares its modules with the wrapper, and what is put back shares every tensor but those
of its attention. Towers and projectors are carried over as they are.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from kvlatent.model.assembly import NOT_CARRIED, share_buffers
from kvlatent.model.families import family_of_original
from kvlatent.model.wrapper_classes import WRAPPED, wrapper_classes

__all__ = ["text_model_of", "with_text_model"]


def text_model_of(model: Any) -> Any:
    """The causal language model inside a multimodal one, sharing its modules; any other model as it is.

    Raises:
        ValueError: its language model is of no supported family, or is latent already, or turns its keys by positions with several axes.
    """
    inner = getattr(model.config, "text_config", None)
    kinds = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    if type(model).__name__.removeprefix(WRAPPED) not in kinds or inner is None:
        return model
    family, decoder = family_of_original(inner), model.get_decoder()
    wanted = family.upstream("Model")
    if family.position_axes > 1:
        raise ValueError(
            f"a latent attention turns keys by one position a token: the images of a {type(model).__name__} have "
            f"{family.position_axes} (time, height, width); convert its language model alone, for text"
        )
    if not isinstance(decoder, wanted):
        raise ValueError(  # noqa: TRY004 - the command line shows ValueError as one sentence
            f"the language model of a {type(model).__name__} is a {wanted.__name__} in transformers: got {type(decoder).__name__}; "
            "convert the original checkpoint"
        )
    with torch.device("meta"):
        text: Any = family.upstream("ForCausalLM")(decoder.config)
    setattr(text, text.base_model_prefix, decoder)
    text.set_output_embeddings(model.get_output_embeddings())
    return text.train(model.training)


def with_text_model(model: Any, latent: Any) -> Any:
    """The wrapper `model` around a latent language model, made from `text_model_of(model)`."""
    config_type, model_type = wrapper_classes(type(model))
    fields = model.config.to_dict() | {"text_config": latent.config.to_dict()}
    for name in set(NOT_CARRIED) - {"head_dim"}:
        fields.pop(name, None)
    config = config_type(**fields)
    config._attn_implementation = model.config._attn_implementation
    place = next(name for name, each in model.named_modules() if each is model.get_decoder())
    kept = {n: t for n, t in model.state_dict().items() if not n.startswith(f"{place}.")}
    ours = {f"{place}.{n}": t for n, t in latent.get_decoder().state_dict().items()}
    with torch.device("meta"):
        whole = model_type(config)
    whole.load_state_dict(kept | ours, assign=True)
    share_buffers(model, whole)
    whole.tie_weights()
    whole.generation_config = copy.deepcopy(model.generation_config)
    return whole.train(model.training)
