"""GGUF files of tiny models, written as llama.cpp's converter does: names, permuted queries and keys, metadata, tokens."""

import json
import re
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize

F32 = GGMLQuantizationType.F32
CONTROL, NORMAL = 3, 1
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


def write_gguf(path: Path, model, tokenizer, kind=F32, *, arch=None, settings=(), tensors=()) -> Path:
    """A model of the families Llama, Qwen or Phi-3 in a GGUF file.

    Args:
        arch: that the file names instead of the model's.
        kind: of the matrices; norms and biases stay F32.
        settings: (method of the writer, arguments) for further metadata.
        tensors: (name, array, type or None) of further tensors; an array with a type is raw bytes.
    """
    config = model.config
    own = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = GGUFWriter(path, arch or own)
    writer.add_name("tiny")
    _add_sizes(writer, config)
    _add_tokens(writer, tokenizer, config.vocab_size)
    for key, value in settings:
        getattr(writer, key)(*value)
    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == own)
    names = get_tensor_name_map(number, config.num_hidden_layers)
    tied = bool(config.tie_word_embeddings)
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stem, _, ending = name.rpartition(".")
        values = _arranged(name, tensor.detach().float().numpy(), config, own)
        _add(writer, f"{names.get_name(stem)}.{ending}", values, kind)
    for name, array, raw in tensors:
        writer.add_tensor(name, array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _arranged(name: str, values: np.ndarray, config, arch: str) -> np.ndarray:
    """Queries and keys of Llamas with the two channels of a pair side by side, as ggml rotates them."""
    if arch != "llama" or not re.search(r"(q_proj|k_proj)\.weight", name):
        return values
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, values.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _add(writer: GGUFWriter, name: str, values: np.ndarray, kind) -> None:
    if values.ndim == 1 or kind == F32:
        writer.add_tensor(name, values)
    elif kind == GGMLQuantizationType.F16:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)


def _add_sizes(writer: GGUFWriter, config) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)


def _add_tokens(writer: GGUFWriter, tokenizer, size: int) -> None:
    """A byte-level BPE as GPT-2's, its end-of-text token, and a chat template."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].get)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary[:size])
    writer.add_token_types([CONTROL if token in special else NORMAL for token in vocabulary[:size]])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    )
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(TEMPLATE)
