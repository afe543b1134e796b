"""Where checkpoints come from and go to: registration with transformers, loading, atomic saving.

safetensors only. What is written appears whole or not at all (see `output`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .families import FAMILIES, LATENT_PREFIX, family_of
from .finite import check_finite_weights
from .modeling import latent_classes
from .output import atomic_directory
from .remote_code import MODULE_NAME, remote_code

__all__ = ["check_block_size", "load_config", "load_model", "load_tokenizer", "register", "save"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = ("float32", "bfloat16", "float16")


def register() -> None:
    """Make `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know every latent family. Idempotent."""
    for model_type in FAMILIES:
        config, decoder, causal = latent_classes(model_type)
        AutoConfig.register(LATENT_PREFIX + model_type, config, exist_ok=True)
        AutoModel.register(config, decoder, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
        decoder.add_code = causal.add_code = staticmethod(_add_code)


def load_model(
    path_or_id: str | os.PathLike[str], *, dtype: str | torch.dtype | None = None, device: str = "cpu"
) -> PreTrainedModel:
    """Load an original or latent causal language model of a supported family, in eval mode.

    Args:
        path_or_id: a local directory or a hub id.
        dtype: "float32", "bfloat16", ...; None keeps the checkpoint's.
        device: "cpu", "cuda", ...

    Raises:
        FileNotFoundError: no such directory or hub id.
        ValueError: unsupported architecture; weights missing, truncated, pickled, not finite, or with missing or
            unexpected names.
    """
    register()
    path = str(path_or_id)
    if isinstance(dtype, str) and dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(_DTYPES)}")
    config = load_config(path)
    family_of(config)
    if Path(path).is_dir():
        _check_weights(Path(path))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, info = loaded
    except (SafetensorError, RuntimeError, OSError, KeyError) as error:
        raise ValueError(
            f"cannot load the weights of {path}: {_first_line(error)}; download the checkpoint again"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(kind) or ())
        if names:
            raise ValueError(
                f"the weights of {path} do not fit its config: {len(names)} {kind.replace('_', ' ')}, e.g. {names[0]}; "
                "download or convert the checkpoint again"
            )
    check_finite_weights(model, path)
    return model.to(device).eval()


def load_config(path: str) -> Any:
    """The transformers config of a local directory or hub id."""
    local = Path(path)
    if local.exists() and not local.is_dir():
        raise ValueError(
            f"{path} is a file, not a model directory; give the directory that holds config.json"
        )
    if local.is_dir() and not (local / "config.json").is_file():
        raise ValueError(
            f"{path} holds no config.json, so it is no model directory; give a checkpoint's directory"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, json.JSONDecodeError) as error:
        if local.is_dir():
            raise ValueError(f"cannot read {path}/config.json: {_first_line(error)}") from error
        raise FileNotFoundError(
            f"{path} is neither a local directory nor a model that the hub gives us; check the path or the hub id "
            f"({_first_line(error)})"
        ) from error
    except Exception as error:  # transformers' own validation raises classes of its own
        if type(error) is ValueError and "kv_latent" in str(error):
            raise
        raise ValueError(
            f"cannot use {path}: its config.json is not that of a supported model ({_first_line(error)}); supported "
            f"are {', '.join(FAMILIES)}"
        ) from error


def _check_weights(path: Path) -> None:
    """Raise `ValueError` unless every shard of a local checkpoint is there and its header and size agree."""
    shards = [path / _SINGLE]
    if (path / _INDEX).is_file():
        shards = [path / name for name in _shard_names(path / _INDEX)]
    elif not shards[0].is_file():
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
        if pickled:
            raise ValueError(
                f"{path} has pickled weights only ({pickled[0]}), which can run code when loaded; convert them to "
                "safetensors first"
            )
        raise ValueError(f"{path} holds no weights: expected {_SINGLE} or {_INDEX}")
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of {len(shards)} weight shards, e.g. {missing[0]}; download it again"
        )
    for shard in shards:
        try:
            with safe_open(shard, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{shard} is truncated or damaged ({_first_line(error)}); download it again"
            ) from error


def _shard_names(index: Path) -> list[str]:
    """Files that a weight index lists, sorted."""
    try:
        data = json.loads(index.read_text())
        names = sorted(set(data["weight_map"].values()))
        data["metadata"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is damaged ({type(error).__name__}: {_first_line(error)}); download it again"
        ) from error
    if not names:
        raise ValueError(f"{index} lists no weights; download it again")
    return names


def load_tokenizer(path_or_id: str | os.PathLike[str], config: Any) -> Any:
    """Load a tokenizer and check it against the embedding.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it can produce ids that the embedding lacks.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(path_or_id), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise FileNotFoundError(f"{path_or_id} has no tokenizer that loads: {_first_line(error)}") from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer's vocabulary exceeds the embedding: {len(tokenizer)} tokens, {config.vocab_size} rows; "
            "use the tokenizer that belongs to the model"
        )
    return tokenizer


def check_block_size(config: Any, block_size: int) -> None:
    """Raise `ValueError` if blocks of that many tokens exceed the model's context."""
    limit = getattr(config, "max_position_embeddings", None) or block_size
    if block_size > limit:
        raise ValueError(
            f"a block cannot be longer than the model's context: got data.block_size={block_size}, "
            f"max_position_embeddings={limit}; pass --set data.block_size={limit}"
        )


def save(
    model: PreTrainedModel,
    out: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    card: str | None = None,
    files: dict[str, str] | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a latent model as a loadable checkpoint, whole or not at all.

    The directory carries config, safetensors (sharded above `max_shard_size`), generation config, tokenizer with its
    chat template, the self-contained modelling file named by `auto_map`, a model card, and `files` (name -> text).

    A latent model may replace the directory that it was loaded from; an original is never written to.

    Raises:
        FileExistsError: `out` holds something and `overwrite` is false.
        ValueError: `out` is, holds or lies in the directory that `model`, or what it was converted from, was loaded from.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    out = Path(out)
    with atomic_directory(out, overwrite=overwrite, inputs=_loaded_from(model, out)) as folder:
        try:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        except SafetensorError as error:  # safetensors reports a full disk as its own error
            raise OSError(f"cannot write the weights to {out}: {_first_line(error)}") from error
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for name, text in {**({} if card is None else {"README.md": card}), **(files or {})}.items():
            (folder / name).write_text(text)
    return out


def _loaded_from(model: PreTrainedModel, out: Path) -> dict[str, str]:
    """What a saved model must be apart from: its source, unless that is a latent checkpoint, saved where it was."""
    source = getattr(model.config, "_name_or_path", "")
    config = Path(source, "config.json")
    if not source or (
        out.resolve() == Path(source).resolve() and config.is_file() and "kv_latent" in config.read_text()
    ):
        return {}
    return {"model": source}


def _add_code(folder: str | os.PathLike[str], config: Any) -> None:
    """Put the modelling file into a saved directory and name it in `auto_map`, for loading without kvlatent."""
    model_type = str(config.model_type).removeprefix(LATENT_PREFIX)
    path = Path(folder) / "config.json"
    data = json.loads(path.read_text())
    names = zip(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), latent_classes(model_type), strict=True)
    data["auto_map"] = {auto: f"{MODULE_NAME}.{made.__name__}" for auto, made in names}
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
    (Path(folder) / f"{MODULE_NAME}.py").write_text(remote_code(model_type))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
