"""Which weight files of a local checkpoint are read, chosen as upstream chooses them, and whether they are whole.

transformers takes the file that the config names, else `model.safetensors`, else the shards of the index; whatever else
lies in the directory (the index of an earlier, sharded save) it never opens, so neither do we.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    get_safetensors_metadata,
    parse_local_safetensors_file_metadata,
    try_to_load_from_cache,
)
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from huggingface_hub.utils import TensorInfo

__all__ = ["check_weights", "first_line", "index_map", "read_header", "weight_files", "weights_dtype"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_weights(path: Path, config: Any) -> None:
    """Raise `ValueError` unless every file that upstream reads is there and its header and size agree."""
    shards = weight_files(path, config)
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of {len(shards)} weight shards, e.g. {missing[0]}; download it again"
        )
    for shard in shards:
        read_header(shard)


def read_header(shard: Path) -> tuple[dict[str, TensorInfo], int]:
    """The tensors of a safetensors file, in their order there, and where the first begins; nothing is mapped, however large.

    Raises:
        ValueError: its header is damaged, or says another size than the file has.
    """
    try:
        with shard.open("rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
        tensors = parse_local_safetensors_file_metadata(shard).tensors
        end = begin + max((info.data_offsets[1] for info in tensors.values()), default=0)
    except Exception as error:  # the parser takes whatever JSON the header is for a header
        raise ValueError(
            f"{shard} is truncated or damaged ({first_line(error)}); download it again"
        ) from error
    if (size := shard.stat().st_size) != end:
        raise ValueError(
            f"{shard} is truncated or damaged (its header says {end:,} bytes, it has {size:,}); download it again"
        )
    return tensors, begin


def weights_dtype(source: str, config: Any) -> torch.dtype | None:
    """What upstream's dtype="auto" takes where the config names no dtype: that of the first floating tensor.

    Args:
        source: a local directory or a hub id; of a hub model only the headers are fetched.

    Returns:
        None where the files cannot be read: loading them says why.
    """
    cached = None if Path(source).is_dir() else try_to_load_from_cache(source, "config.json")
    try:
        names = _dtypes_in(Path(cached).parent if isinstance(cached, str) else Path(source), config)
    except (OSError, ValueError):
        try:
            headers = {} if Path(source).is_dir() else get_safetensors_metadata(source).files_metadata
        except (OSError, ValueError, NotASafetensorsRepoError, SafetensorsParsingError):
            return None
        names = [tensor.dtype for name in sorted(headers) for tensor in headers[name].tensors.values()]
    return next((_DTYPES[name] for name in names if name in _DTYPES), None)


def _dtypes_in(folder: Path, config: Any) -> list[str]:
    """Types of the tensors of the first weight file, in the order of their names."""
    tensors, _ = read_header(weight_files(folder, config)[0])
    return [tensors[name].dtype for name in sorted(tensors)]


def weight_files(path: Path, config: Any) -> list[Path]:
    """The files upstream reads, in the order of their names.

    Raises:
        ValueError: there are none, or pickled ones only, or the index is damaged.
    """
    named = _named_weights(path, config)
    name = named or next((each for each in (_SINGLE, _INDEX) if (path / each).is_file()), None)
    if name is None:
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
        if pickled:
            raise ValueError(
                f"{path} has pickled weights only ({pickled[0]}), which can run code when loaded; convert them to "
                "safetensors first"
            )
        raise ValueError(f"{path} holds no weights: expected {_SINGLE} or {_INDEX}")
    if not str(name).endswith(".index.json"):
        return [path / name]
    return [path / shard for shard in sorted(set(_read_index(path / name).values()))]


def _named_weights(path: Path, config: Any) -> str | None:
    """The file that the config names instead of the usual ones."""
    named = getattr(config, "transformers_weights", None)
    if named is not None and not isinstance(named, str):
        raise ValueError(
            f"transformers_weights in {path}/config.json is the name of a file: got {named!r}; download it again"
        )
    return named


def index_map(path: Path, config: Any) -> dict[str, str] | None:
    """The shard of every tensor as the index says it; None where upstream reads no index.

    Raises:
        ValueError: the index is damaged.
    """
    named = _named_weights(path, config)
    name = named or (_SINGLE if (path / _SINGLE).is_file() else _INDEX)
    return _read_index(path / name) if str(name).endswith(".index.json") else None


def _read_index(index: Path) -> dict[str, str]:
    """Tensors that a weight index lists, with their files."""
    try:
        data = json.loads(index.read_text())
        listed = dict(data["weight_map"])
        sorted(set(listed.values()))
        data["metadata"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is damaged ({type(error).__name__}: {first_line(error)}); download it again"
        ) from error
    if not listed:
        raise ValueError(f"{index} lists no weights; download it again")
    return listed


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its class."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
