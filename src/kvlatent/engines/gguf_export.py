"""Export as a GGUF file for llama.cpp, written here: its own converter drops the rotary table of such a model in silence.

Of equal widths the file is of architecture llama, whose queries and keys hold the two channels of a pair side by side. Unequal
widths fit under the name step35 alone, whose graph has separate widths, with an empty layer that its loader insists on:
an abuse of a name, hence experimental.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from kvlatent.checkpoints.lineage import lineage
from kvlatent.engines import llama_cpp_reading
from kvlatent.engines.export_options import ExportOptions
from kvlatent.engines.gguf_tokens import Vocabulary, add_vocabulary, read_vocabulary
from kvlatent.engines.matrix_rounding import MatrixRounding
from kvlatent.engines.plain_weights import PlainShape, plain_shape, plain_weights, recipe_of
from kvlatent.engines.shared_table import BASE, frequency_factors
from kvlatent.model.families import family_of

__all__ = ["check_exportable", "matrix_rounding", "read_logits", "read_token_ids", "write_export"]

_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_STORED = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_TARGET = "llama.cpp"
_FFN_BIASES = ("gate_proj.bias", "up_proj.bias", "down_proj.bias")
_WINDOW = 128  # of the empty layer; any does


def check_exportable(latent: Any, options: ExportOptions) -> int:
    """The context; raises `ValueError` where llama.cpp cannot run the model, or is not installed, see `plain_shape`."""
    shape = _shape(latent, options)
    llama_cpp_reading.engine_installed()
    return shape.context


def matrix_rounding(options: ExportOptions) -> MatrixRounding | None:
    """llama.cpp rounds what is multiplied by a matrix, too."""
    kind = _file_type(options)
    return None if kind == "f32" else MatrixRounding(kind, inputs=True)


def _file_type(options: ExportOptions) -> str:
    return options.dtype or _STORED[options.stored_dtype]


def _shape(latent: Any, options: ExportOptions) -> PlainShape:
    config = latent.config
    if family_of(config).qk_norm:
        raise ValueError(
            f"llama.cpp turns the keys of a {family_of(config).model_type} model by its own table and takes no other; export "
            f"with --to stock (as it is, or converted with {recipe_of('transformers-stock', config.head_dim)} --set "
            "conversion.qk_norm=sliced)"
        )
    if config.hidden_act != "silu":
        raise ValueError(
            f"llama.cpp's architecture llama has the activation silu: got {config.hidden_act!r}; export with --to stock"
        )
    shape = plain_shape(
        latent, _TARGET, "llama.cpp", pad=options.pad, unequal=options.experimental, has_window=False
    )
    placeless = [name for name in latent.state_dict() if name.endswith(("o_proj.bias", *_FFN_BIASES))]
    if shape.key_width != shape.value_width and placeless:
        raise ValueError(
            f"llama.cpp's architecture step35 has biases for queries, keys and values alone: got {len(placeless)} others, e.g. "
            f"{placeless[0]}; use --pad instead of --experimental"
        )
    return shape


def write_export(latent: Any, source: Path, out: Path, options: ExportOptions) -> dict[str, Any]:
    """Write one GGUF file; see `export_options` for the facts returned.

    Raises:
        ValueError: the tokenizer does not go into one, see `read_vocabulary`.
    """
    shape, config = _shape(latent, options), latent.config
    vocabulary = read_vocabulary(source, config)
    kind = _file_type(options)
    is_llama = shape.key_width == shape.value_width
    writer = GGUFWriter(out / f"model-{kind}.gguf", "llama" if is_llama else "step35")
    _add_description(writer, source, kind)
    _add_sizes(writer, config, shape)
    if not is_llama:
        _add_empty_layer(writer, config, shape)
    add_vocabulary(writer, vocabulary)
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.LLAMA if is_llama else gguf.MODEL_ARCH.STEP35, config.num_hidden_layers
    )
    weights = plain_weights(latent, shape)
    if is_llama and config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    coarse = []
    for name, tensor in weights.items():
        stem, _, ending = name.rpartition(".")
        values = (_interleaved(name, tensor, config) if is_llama else tensor).float().numpy()
        coarse += _add(writer, f"{names.get_name(stem)}.{ending}", values, kind)
    factors = np.array(frequency_factors(shape.table.frequencies), dtype=np.float32)
    writer.add_tensor(f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return _facts(config, shape, vocabulary, kind, coarse)


def read_logits(out: Path, input_ids: Tensor) -> Tensor:
    """What llama.cpp computes: logits [1, T, V], or log-probabilities of the last positions."""
    return llama_cpp_reading.read_logits(_file(out), input_ids)


def read_token_ids(out: Path, texts: list[str]) -> list[list[int]]:
    """The ids of the file's own tokenizer."""
    return llama_cpp_reading.read_token_ids(_file(out), texts)


def _file(out: Path) -> Path:
    return next(out.glob("*.gguf"))


def _add_description(writer: GGUFWriter, source: Path, kind: str) -> None:
    said = lineage(source)
    writer.add_type("model")
    writer.add_name(source.resolve().name)
    writer.add_file_type(_TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if said.get("license"):
        writer.add_license(said["license"])
    if isinstance(base := said.get("base_model"), str):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.rpartition("/")[2])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")


def _add_sizes(writer: GGUFWriter, config: Any, shape: PlainShape) -> None:
    writer.add_context_length(shape.context)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(shape.key_width)
    writer.add_value_length(shape.value_width)
    writer.add_rope_dimension_count(shape.key_width)
    writer.add_rope_freq_base(BASE)
    writer.add_vocab_size(config.vocab_size)


def _add_empty_layer(writer: GGUFWriter, config: Any, shape: PlainShape) -> None:
    """What step35 is told besides: a last layer for the next-next token, without tensors, the only one with a window."""
    layers = config.num_hidden_layers
    for key, value in (("block_count", layers + 1), ("rope.dimension_count", 2 * shape.key_width)):
        writer.kv_data[0][f"step35.{key}"].value = value  # it halves the second for layers without a window
    writer.add_nextn_predict_layers(1)
    writer.add_sliding_window(_WINDOW)
    writer.add_sliding_window_pattern([False] * layers + [True])
    writer.add_expert_feed_forward_length(0)


def _interleaved(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Queries and keys with the two channels of a pair side by side, as ggml turns them for Llamas; others as they are."""
    part = name.rpartition(".self_attn.")[2].partition(".")[0]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part)
    if heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add(writer: GGUFWriter, name: str, values: np.ndarray, kind: str) -> list[str]:
    """Write a tensor, and give its name where it is of another type than asked for: rows that are no whole blocks."""
    wanted = GGMLQuantizationType.F32 if values.ndim == 1 else _TYPES[kind][0]
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    used = wanted if values.shape[-1] % block == 0 else GGMLQuantizationType.F16
    values = np.ascontiguousarray(values)
    if used in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        writer.add_tensor(name, values.astype(np.float32 if used == GGMLQuantizationType.F32 else np.float16))
    else:
        writer.add_tensor(name, gguf.quantize(values, used), raw_dtype=used)
    return [] if used == wanted else [name]


def _facts(
    config: Any, shape: PlainShape, vocabulary: Vocabulary, kind: str, coarse: list[str]
) -> dict[str, Any]:
    heads = config.num_key_value_heads * config.num_hidden_layers
    changes = list(shape.changes)
    if coarse:
        changes.append(
            f"{len(coarse)} matrices are f16, as their rows are no whole blocks of 32, e.g. {coarse[0]}"
        )
    if vocabulary.composes:
        changes.append(
            "letters with combining marks are not composed (NFC) before they are tokens, as in any GGUF file"
        )
    if shape.key_width != shape.value_width:
        changes.append(
            "experimental: the file is of architecture step35, which llama.cpp may change with any version"
        )
    file = f"DIR/model-{kind}.gguf"
    return {
        "engine": llama_cpp_reading.engine_installed(),
        "cache_bytes_per_token": (shape.key_width + shape.value_width) * heads * torch.float16.itemsize,
        "cache_dtype": "float16",
        "context": shape.context,
        "changes": changes,
        "run_with": [f"llama-server -m {file}", f"llama-cli -m {file}"],
        "architecture": "llama" if shape.key_width == shape.value_width else "step35",
        "file_type": kind,
        "tokenizer": f"{vocabulary.model}, split as {vocabulary.splitting}",
        "has_chat_template": vocabulary.template is not None,
    }
