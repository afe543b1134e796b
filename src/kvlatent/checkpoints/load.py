"""Where checkpoints come from: loading with its checks.

safetensors, or a GGUF file dequantised.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from kvlatent.checkpoints.gguf_files import Gguf, check_tensors_read, gguf_config, open_gguf
from kvlatent.checkpoints.registration import register
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.checkpoints.weight_files import check_weights, first_line, weights_dtype
from kvlatent.model.assembly import has_tied_head
from kvlatent.model.families import FAMILIES, family_of
from kvlatent.model.finite import check_finite_weights
from kvlatent.model.wrappers import is_wrapper, language_model_of, register_wrapper, text_config_of

__all__ = ["check_block_size", "load_config", "load_model", "load_tokenizer", "load_whole_config"]

_DTYPES = ("float32", "bfloat16", "float16")


def load_model(
    path_or_id: str | os.PathLike[str], *, dtype: str | torch.dtype | None = None, device: str = "cpu"
) -> PreTrainedModel:
    """Load an original or latent causal language model of a supported family, in eval mode; of a multimodal checkpoint, the one inside.

    Args:
        path_or_id: a local directory, a hub id, or a GGUF file, or a directory that holds one and no safetensors.
        dtype: "float32", "bfloat16", ...; None keeps the checkpoint's, and is float32 for a GGUF file.
        device: "cpu", "cuda", ...

    Raises:
        FileNotFoundError: no such directory or hub id.
        ValueError: unsupported architecture; weights missing, truncated, pickled, not finite, or with missing or
            unexpected names; a GGUF file of which transformers would make another model.
    """
    register()
    path = str(path_or_id)
    if isinstance(dtype, str) and dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(_DTYPES)}")
    config = load_whole_config(path)
    family_of(text_config_of(config))
    gguf = open_gguf(path)
    if gguf is None and Path(path).is_dir():
        check_weights(Path(path), config)
    model, info = _read_weights(path, gguf, config, "auto" if dtype is None else dtype)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(kind) or ())
        if names:
            raise ValueError(
                f"the weights of {path} do not fit its config: {len(names)} {kind.replace('_', ' ')}, e.g. {names[0]}; "
                "download or convert the checkpoint again"
            )
    if gguf is not None:
        check_tensors_read(gguf, model)
        model.config._name_or_path = path
    model = _language_model(model, path)
    check_finite_weights(model, path)
    # What is saved from it later must be tied or not as it was loaded, whatever the file said.
    model.config.tie_word_embeddings = has_tied_head(model)
    return model.to(device).eval()


def _read_weights(path: str, gguf: Gguf | None, config: Any, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """The model as transformers loads it, and what it says of the names of the weights."""
    place, more = path, {}
    if gguf is not None:
        place, name = gguf.loading()
        # Without it what is loaded counts as quantised, although it is not, and cannot be saved.
        more = {"gguf_file": name, "quantization_config": GgufConfig(dequantize=True)}
    try:
        auto: Any = AutoModelForImageTextToText if is_wrapper(config) else AutoModelForCausalLM
        loaded: Any = auto.from_pretrained(
            place,
            **more,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ValueError:
        raise
    except (
        Exception
    ) as error:  # of a config that says nonsense, transformers makes a model until something breaks
        raise ValueError(
            f"cannot load the weights of {path}: {first_line(error)}; download the checkpoint again"
        ) from error
    return loaded


def _language_model(model: Any, path: str) -> Any:
    """The language model inside, with what else its config says of where it is from; of no multimodal one the model itself."""
    text = language_model_of(model)
    if text is not model:
        text.config.dtype, text.config._name_or_path = model.dtype, path
    return text


def load_config(path: str) -> Any:
    """The transformers config of a model (see `load_model`), of a multimodal one that of the language model inside.

    Where it names no dtype, with the weights' own.

    Raises:
        FileNotFoundError, ValueError: as `load_model`, of what the config says.
    """
    whole = load_whole_config(path)
    config = text_config_of(whole)
    if config is not whole:
        config.dtype, config._name_or_path = whole.dtype, path
    return config


def load_whole_config(path: str) -> Any:
    """As `load_config`, of a multimodal model with all its parts."""
    local, gguf = Path(path), open_gguf(path)
    if gguf is not None:
        return gguf_config(gguf)
    if local.is_dir() and not (local / "config.json").is_file():
        raise ValueError(
            f"{path} holds no config.json and no .gguf file, so it is no model directory; give a checkpoint's directory"
        )
    try:
        register_wrapper(str(PreTrainedConfig.get_config_dict(path)[0].get("model_type", "")))
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, json.JSONDecodeError) as error:
        if local.is_dir():
            raise ValueError(f"cannot read {path}/config.json: {first_line(error)}") from error
        raise FileNotFoundError(
            f"{path} is neither a local directory or GGUF file nor a model that the hub gives us; check the path or the hub id "
            f"({first_line(error)})"
        ) from error
    except Exception as error:  # transformers' own validation raises classes of its own
        if type(error) is ValueError and "kv_latent" in str(error):
            raise
        raise ValueError(
            f"cannot use {path}: its config.json is not that of a supported model ({first_line(error)}); supported "
            f"are {', '.join(FAMILIES)}"
        ) from error
    if config.dtype is None:
        config.dtype = weights_dtype(path, config) or torch.float32
    if not isinstance(config.dtype, torch.dtype):
        raise ValueError(  # noqa: TRY004 - a sentence for users
            f"dtype in the config.json of {path} is a type of numbers such as float32: got {config.dtype!r}; download it again"
        )
    return config


def check_block_size(config: Any, block_size: int) -> None:
    """Raise `ValueError` if blocks of that many tokens exceed the model's context."""
    limit = getattr(config, "max_position_embeddings", None) or block_size
    if block_size > limit:
        raise ValueError(
            f"a block cannot be longer than the model's context: got data.block_size={block_size}, "
            f"max_position_embeddings={limit}; pass --set data.block_size={limit}"
        )
