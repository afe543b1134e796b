"""Export to OpenVINO: an intermediate representation (IR) of our own, which OpenVINO GenAI serves as it is.

Keys and values stay at their own widths, keys also layer by layer, and rotary tables may differ by layer and by head. Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvlatent.checkpoints.tokenizer_files import HARD_STRINGS, has_tokenizer, load_tokenizer, write_tokenizer
from kvlatent.checkpoints.weight_files import first_line
from kvlatent.engines.export_options import ExportOptions
from kvlatent.engines.matrix_rounding import MatrixRounding
from kvlatent.engines.plain_weights import context_of
from kvlatent.model.classes import latent_config_of
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import family_of
from kvlatent.model.layer_parts import windows_of

__all__ = ["check_exportable", "matrix_rounding", "read_logits", "write_export"]

# openvino, tokenizers and genai load each other's binaries, so they go together. The versions are those that the tests ran with.
_PACKAGES = {
    "openvino": "2026.4.1",
    "openvino-tokenizers": "2026.4.1.0",
    "openvino-genai": "2026.4.1.0",
}
_DTYPES = ("f32", "f16")
_CACHE_DTYPE = "f16"  # what optimum-intel asks for beside unquantised weights; left out, the engine takes u8
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
_RUN = "openvino_genai.LLMPipeline('DIR', 'CPU').generate('Once upon a time', max_new_tokens=64)"


def check_exportable(latent: Any, options: ExportOptions) -> int:
    """The context; raises `ValueError` where the model cannot go to OpenVINO: see `export_options`."""
    missing = [name for name in _PACKAGES if find_spec(name.replace("-", "_")) is None]
    if missing:
        pinned = " ".join(f"{name}=={number}" for name, number in _PACKAGES.items())
        raise ValueError(
            f"an export to openvino is made and read back with {', '.join(_PACKAGES)}, and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed; pip install {pinned}"
        )
    if options.dtype not in (None, *_DTYPES):
        raise ValueError(
            f"an export to openvino stores matrices in {' or '.join(_DTYPES)}: got --dtype {options.dtype}; leave it out"
        )
    family = family_of(latent.config)
    if family.attention_layer_type:
        raise ValueError(
            f"an export to openvino caches keys and values alone, and a {family.model_type} model has {family.besides}; run the "
            "checkpoint itself with transformers"
        )
    if family.expert_parameters:
        raise ValueError(
            f"an export to openvino is traced, and which experts a token of a {family.model_type} model goes to would be fixed by "
            "the trace; run the checkpoint itself with transformers"
        )
    _check_value_widths(latent_config_of(latent.config), latent.config.num_hidden_layers)
    if _dtype(options) == "f16":
        _check_fits_half(latent)
    return context_of(latent.config, "openvino")[0]


def matrix_rounding(options: ExportOptions) -> MatrixRounding | None:
    """OpenVINO computes in float32 with matrices of float16, as it is read back."""
    return MatrixRounding("f16", inputs=False) if _rounds(options) else None


def _check_value_widths(config: LatentConfig, layers: int) -> None:
    """Raise `ValueError` for widths that paged attention misreads.

    OpenVINO 2026.4.1 on a CPU: two layers of d_qk 16 with d_vo 8 and 32 gave other tokens than over a state, or ended the
    process; d_qk 8 and 32 beside one d_vo, and d_qk = d_vo of 16 and 32, gave the same.
    """
    widths = [config.widths_at(layer) for layer in range(layers)]
    values = sorted({d_vo for _, d_vo in widths})
    if len(values) > 1 and any(d_qk != d_vo for d_qk, d_vo in widths):
        raise ValueError(
            "paged attention of OpenVINO computes something else where d_vo differs by layer, unless d_qk = d_vo in every layer: "
            f"got d_vo from {values[0]} to {values[-1]} with other d_qk; convert with one d_vo, or with --engine openvino"
        )


def _check_fits_half(latent: Any) -> None:
    """Raise `ValueError` where a weight is beyond float16."""
    limit = torch.finfo(torch.float16).max
    largest = max(float(parameter.detach().abs().max()) for parameter in latent.parameters())
    if largest > limit:
        raise ValueError(
            f"float16 holds numbers up to {limit:,.0f} and the largest weight is {largest:,.0f}; give --dtype f32"
        )


def _dtype(options: ExportOptions) -> str:
    """Of the matrices: as asked for, else as wide as they are stored."""
    return options.dtype or ("f32" if options.stored_dtype == "float32" else "f16")


def write_export(latent: Any, source: Path, out: Path, options: ExportOptions) -> dict[str, Any]:
    """Write the graph, the tokenizer (as graphs, and as it was, with its chat template), config and generation config.

    Returns:
        `ExportFacts`, and "weights", "versions", "k_head_size" and "v_head_size": as paged attention reads them, by layer where
        layers differ.

    Raises:
        ValueError: the tokenizer encodes otherwise in OpenVINO; or paged attention reads other widths or windows.
    """
    import openvino as ov

    from kvlatent.engines.openvino_graph import compress_weights, stateful_graph
    from kvlatent.engines.openvino_paging import MODEL_FILE, check_paging, paged_cache

    # Paged attention is given parts of prompts, and of several sequences together: no part knows the length that a rotary
    # table goes by.
    context, changes = context_of(latent.config, "openvino")
    changes = [*changes, *_changes(latent, options)]
    if has_tokenizer(source):
        _write_tokenizer(load_tokenizer(source, latent.config), out)
    else:
        changes.append("the checkpoint has no tokenizer, so a pipeline needs one from elsewhere")
    graph = stateful_graph(latent)
    if _dtype(options) == "f16":
        compress_weights(graph)
    graph.set_rt_info(_CACHE_DTYPE, ["runtime_options", "KV_CACHE_PRECISION"])
    ov.save_model(graph, out / MODEL_FILE, compress_to_fp16=False)
    del graph
    latent.generation_config.save_pretrained(out)
    _write_config(latent.config, context, out)
    cache = paged_cache(out)
    check_paging(latent, cache)
    return {
        "engine": f"OpenVINO {version('openvino')}",
        "versions": {name: version(name) for name in _PACKAGES},
        "weights": _dtype(options),
        "cache_bytes_per_token": int(cache["bytes_per_token"]),
        "cache_dtype": cache["cache_dtype"],
        "context": context,
        "k_head_size": _of_all(cache["k_head_sizes"]),
        "v_head_size": _of_all(cache["v_head_sizes"]),
        "changes": changes,
        "run_with": [f'python -c "import openvino_genai; print({_RUN})"'],
    }


def _of_all(sizes: list[int]) -> int | list[int]:
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _write_config(config: Any, context: int, out: Path) -> None:
    """Write a model's config with this context, less what names the modelling file, which is not there."""
    written = copy.deepcopy(config)
    written.max_position_embeddings = context
    if hasattr(written, "auto_map"):
        del written.auto_map
    written.save_pretrained(out)


def _rounds(options: ExportOptions) -> bool:
    """Whether float16 is coarser than what is stored; bfloat16 is coarser still."""
    return _dtype(options) == "f16" and options.stored_dtype == "float32"


def _changes(latent: Any, options: ExportOptions) -> list[str]:
    """Clauses on what is not as it was in the checkpoint."""
    changes = []
    if _rounds(options):
        changes.append(
            "matrices are rounded from float32 to float16; rotary tables, norms and biases are not"
        )
    windows = [window for window in windows_of(latent) if window is not None]
    if windows:
        changes.append(
            f"a sliding window of {max(windows)} tokens hides what lies before it and frees no cache in this engine"
        )
    return changes


def _write_tokenizer(tokenizer: Any, out: Path) -> None:
    """Write a tokenizer's own files, and tokenizer and detokenizer as OpenVINO runs them.

    Raises:
        ValueError: it cannot be converted, or encodes or decodes otherwise then.
    """
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer

    refused = "the tokenizer does not go to openvino, {}; leave its files out of the checkpoint to export the model alone"
    try:
        encoder, decoder = convert_tokenizer(tokenizer, with_detokenizer=True)
        encode, decode = ov.compile_model(encoder, "CPU"), ov.compile_model(decoder, "CPU")
    except Exception as error:  # it raises RuntimeError, KeyError, and classes of its own
        raise ValueError(refused.format(f"which says: {first_line(error)}")) from error
    for text in HARD_STRINGS:
        ids = tokenizer(text)["input_ids"]
        if list(encode(np.array([text]))["input_ids"][0]) != ids:
            raise ValueError(refused.format(f"where {text!r} becomes other ids"))
        if decode(np.array([ids]))["string_output"][0] != tokenizer.decode(ids, skip_special_tokens=True):
            raise ValueError(refused.format(f"where the ids of {text!r} become another text"))
    ov.save_model(encoder, out / "openvino_tokenizer.xml")
    ov.save_model(decoder, out / "openvino_detokenizer.xml")
    write_tokenizer(tokenizer, out)


def read_logits(out: Path, input_ids: Tensor) -> Tensor:
    """Logits [B, T, V] of an export for input_ids [B, T], computed and cached in float32.

    Raises:
        RuntimeError: OpenVINO does not load the graph.
    """
    import openvino as ov

    from kvlatent.engines.openvino_paging import MODEL_FILE

    batch, length = input_ids.shape
    compiled = ov.compile_model(out / MODEL_FILE, "CPU", _EXACT)
    given = {
        "input_ids": input_ids.numpy(),
        "attention_mask": np.ones((batch, length), dtype=np.int64),
        "position_ids": np.arange(length)[None].repeat(batch, axis=0),
        "beam_idx": np.arange(batch, dtype=np.int32),
    }
    return torch.from_numpy(compiled(given)["logits"].copy())
