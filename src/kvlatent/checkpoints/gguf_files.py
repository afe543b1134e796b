"""Checkpoints in a GGUF file, which transformers' own reader dequantises; refused where it would read another model.

The reader takes what it knows and passes over the rest in silence: rotary scaling, windows, biases. A file whose model is
more than what is read of it is no original to compare with, so what the reader left out is looked for.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

from kvlatent.checkpoints.weight_files import first_line
from kvlatent.model.families import FAMILIES

__all__ = [
    "Gguf",
    "check_tensors_read",
    "describe_weights",
    "find_gguf",
    "gguf_config",
    "open_gguf",
]

_MAGIC = b"GGUF"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_DAMAGE = (
    ValueError,
    IndexError,
    KeyError,
    OverflowError,
    TypeError,
    OSError,
)  # what the reader gives for it
_NEEDED = (  # for these transformers would take the sizes of a 7B model instead
    *("context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count"),
    "attention.layer_norm_rms_epsilon",
)
_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Gguf:
    """What a GGUF file says of itself.

    Args:
        path: of the file.
        architecture: in llama.cpp's words, which are transformers' for the families that we support.
        quantisation: type of most of the entries of its matrices, such as "Q4_1"; "F32", "F16" or "BF16" where none is
            quantised.
        tensors: their names.
        num_tokens: of the vocabulary.
        settings: the metadata by their keys, without the arrays of vocabulary.
    """

    path: Path
    architecture: str
    quantisation: str
    tensors: tuple[str, ...]
    num_tokens: int
    settings: Mapping[str, Any]

    def loading(self) -> tuple[str, str]:
        """The directory and the `gguf_file` that `from_pretrained` asks for."""
        return str(self.path.parent), self.path.name

    def setting(self, key: str) -> Any:
        """A value of the architecture's own metadata, or None."""
        return self.settings.get(f"{self.architecture}.{key}")


def find_gguf(source: str | Path) -> Path | None:
    """The GGUF file that a model's name stands for: a file itself, or the one in a directory; None where there is none.

    In a directory, a config.json beside safetensors comes first.

    Raises:
        ValueError: the directory holds several models in GGUF files.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir() or ((path / "config.json").is_file() and any(path.glob("*.safetensors*"))):
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf" and file.is_file())
    models: dict[str, Path] = {}
    for file in files:
        part = _PART.fullmatch(file.name)
        models.setdefault(part["stem"] if part else file.name, file)
    if len(models) > 1:
        names = ", ".join(file.name for file in models.values())
        raise ValueError(
            f"{source} holds {len(models)} models in GGUF files ({names}); give one of the files"
        )
    return files[0] if files else None


def open_gguf(source: str | Path) -> Gguf | None:
    """What the GGUF file of a model's name says of itself (see `find_gguf`); None where the name stands for none.

    Raises:
        ValueError: the file is no GGUF, damaged, a part of a split, of an architecture that we do not support, or has
            tensors of a type that the reader lacks; or as for `find_gguf`.
    """
    path = find_gguf(source)
    if path is None:
        return None
    status = path.stat()
    return _read(path, status.st_size, status.st_mtime_ns)


def describe_weights(source: str | Path) -> str | None:
    """Where the weights of a model come from if not from a checkpoint of floats: "dequantised from m.gguf (Q4_1)".

    Of what was made from such a file its own record says it.
    """
    gguf = open_gguf(source)
    if gguf is None:
        try:
            said = json.loads(Path(source, "run.json").read_text(encoding="utf-8")).get("weights")
        except (
            OSError,
            ValueError,
            AttributeError,
            RecursionError,
        ):  # none, or damaged, which its readers say
            return None
        return said if isinstance(said, str) else None
    how = "read" if gguf.quantisation in _FLOATS else "dequantised"
    return f"{how} from {gguf.path.name} ({gguf.quantisation})"


def gguf_config(gguf: Gguf) -> Any:
    """The transformers config of the model in a GGUF file, in float32: its types are no types to compute in.

    Raises:
        ValueError: transformers does not read the file, or reads a model that works otherwise than the file says.
    """
    status = gguf.path.stat()
    return copy.deepcopy(_config(gguf.path, status.st_size, status.st_mtime_ns))


def check_tensors_read(gguf: Gguf, model: Any) -> None:
    """Raise `ValueError` where the file has tensors for which the model that transformers made of it has no place."""
    known = get_gguf_hf_weights_map(model, TensorProcessor())
    unread = sorted(name for name in gguf.tensors if name not in known)
    if unread:
        raise ValueError(
            f"transformers' reader of GGUF leaves out {len(unread)} of the {len(gguf.tensors)} tensors of {gguf.path}, "
            f"e.g. {unread[0]}, so it would be another model; take the model's safetensors checkpoint"
        )


@lru_cache(maxsize=4)
def _read(path: Path, _size: int, _changed: int) -> Gguf:
    """`open_gguf` of a file, kept while it is the same: the reader takes seconds for a vocabulary."""
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(
                f"{path} is a file, not a model directory, and it is no GGUF (it does not begin with the letters GGUF); "
                "give a checkpoint's directory or a .gguf file"
            )
    try:
        reader = GGUFReader(path)
        settings = {
            key: field.contents()
            for key, field in reader.fields.items()
            if len(field.types) == 1 or key.startswith("general.")
        }
    except _DAMAGE as error:
        if unknown := re.search(rf"(\d+)\)? is not a valid {GGMLQuantizationType.__name__}", str(error)):
            raise ValueError(_unknown_type(path, unknown[1])) from error
        raise ValueError(
            f"{path} is truncated or damaged ({first_line(error)}); download it again"
        ) from error
    _check_whole(path, settings)
    architecture = settings.get("general.architecture")
    if architecture not in FAMILIES:
        raise ValueError(
            f"{path} holds a model of architecture {architecture!r}; supported are {', '.join(FAMILIES)}"
        )
    _check_types(path, reader)
    entries: Counter[str] = Counter()
    for tensor in reader.tensors:
        if len(tensor.shape) > 1:
            entries[tensor.tensor_type.name] += int(tensor.n_elements)
    vocabulary = reader.fields.get("tokenizer.ggml.tokens")
    return Gguf(
        path,
        architecture,
        quantisation=max(entries, key=lambda name: entries[name], default="F32"),
        tensors=tuple(tensor.name for tensor in reader.tensors),
        num_tokens=0 if vocabulary is None else len(vocabulary.data),
        settings=settings,
    )


def _check_whole(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a part of a split: the reader takes one file for all."""
    part, count = _PART.fullmatch(path.name), int(settings.get("split.count", 1))
    if count <= 1:
        return
    if part is None:
        raise ValueError(
            f"{path} is one of {count} parts of a model, under a name of its own; get the model in one file, or "
            "give the parts their names back and join them with llama-gguf-split --merge"
        )
    names = [f"{part['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ValueError(
            f"{path} is one of {count} parts of a model, and {len(missing)} of them are not beside it, e.g. {missing[0]}; "
            "download them, and join all with llama-gguf-split --merge"
        )
    raise ValueError(
        f"{path} is one of {count} parts of a model, and transformers reads GGUF from one file only; join them: "
        f"llama-gguf-split --merge {names[0]} {part['stem']}.gguf"
    )


def _check_types(path: Path, reader: GGUFReader) -> None:
    """Raise `ValueError` where a tensor has a type that the reader does not dequantise, by trying a row of each."""
    for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
        try:
            dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(_unknown_type(path, tensor.tensor_type.name)) from error


def _unknown_type(path: Path, name: str) -> str:
    return (
        f"{path} has tensors of the type {name}, which the package gguf does not dequantise; take a file of another "
        "type, such as Q8_0 or Q4_K_M"
    )


@lru_cache(maxsize=4)
def _config(path: Path, size: int, changed: int) -> Any:
    gguf = _read(path, size, changed)
    lacking = [f"{gguf.architecture}.{key}" for key in _NEEDED if gguf.setting(key) is None]
    if lacking:
        raise ValueError(f"the metadata of {path} lack {', '.join(lacking)}; take another file of this model")
    folder, name = gguf.loading()
    try:
        config = AutoConfig.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    except Exception as error:  # whatever is missing from the metadata
        raise ValueError(
            f"transformers cannot read the settings of {path} ({type(error).__name__}: {first_line(error)}); take "
            "another file of this model"
        ) from error
    config.__dict__.pop("_model_name_or_path", None)  # the model's title, taken for a path
    config.dtype = torch.float32
    for left_out in _settings_left_out(gguf, config):
        raise ValueError(
            f"transformers' reader of GGUF leaves out that {path} has {left_out}, so it would be another model; take the "
            "model's safetensors checkpoint"
        )
    return config


def _settings_left_out(gguf: Gguf, config: Any) -> Iterator[str]:
    """What the metadata say of attention and the config does not."""
    scaling = gguf.setting("rope.scaling.type")
    if scaling not in (None, "none") and config.rope_parameters.get("rope_type", "default") == "default":
        yield f"rotary scaling of type {scaling}"
    window, context = gguf.setting("attention.sliding_window"), gguf.setting("context_length")
    if window and window < (context or window + 1) and getattr(config, "sliding_window", None) != window:
        yield f"a window of {window} tokens"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for what, key in (("rotated channels", "rope.dimension_count"), ("channels", "attention.key_length")):
        width = gguf.setting(key)
        if width and width != head_dim:
            yield f"heads of {width} {what}, not {head_dim}"
