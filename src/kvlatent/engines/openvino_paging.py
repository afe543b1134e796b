"""What OpenVINO's paged attention makes of an exported graph, read off the graph that it compiles.

OpenVINO GenAI rewrites attention over a growing state into attention over pages, by patterns: where one does not match, a
window is lost or a width misread without a word. So the same rewriting is done here, and looked at.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import openvino as ov
from openvino._offline_transformations import paged_attention_transformation

from kvlatent.model.classes import latent_config_of
from kvlatent.model.layer_parts import windows_of

__all__ = ["MODEL_FILE", "check_paging", "paged_cache"]

MODEL_FILE = "openvino_model.xml"
_BLOCK_TOKENS = 32  # of one page on a CPU
_WINDOW_INPUT = 10


def paged_cache(out: Path, cache_dtype: str | None = None) -> dict[str, Any]:
    """The cache of an export, as paged attention on a CPU allocates it.

    Args:
        out: directory of the export.
        cache_dtype: "f32", "f16" or "u8"; None: what the export asks for.

    Returns:
        "k_head_sizes", "v_head_sizes" and "windows" (tokens, None for full attention) by layer, "cache_dtype", and
        "bytes_per_token" over all heads and layers, with the scales and zero points of u8.
    """
    core = ov.Core()
    graph = core.read_model(out / MODEL_FILE)
    paged_attention_transformation(graph)
    layers = [node for node in graph.get_ordered_ops() if node.get_type_name() == "PagedAttentionExtension"]
    windows = [_window(layer) for layer in layers]
    sizes = {
        name: [layer.get_rt_info()[name].value for layer in layers] for name in ("k_head_size", "v_head_size")
    }
    # Without the hint, processors with units for bfloat16 take it for computing, and then for the cache in place of f16.
    asked = {"INFERENCE_PRECISION_HINT": "f32"} | (
        {} if cache_dtype is None else {"KV_CACHE_PRECISION": cache_dtype}
    )
    compiled = core.compile_model(graph, "CPU", asked)
    pages = [port for port in compiled.inputs if port.any_name.startswith(("key_cache.", "value_cache."))]
    page_bytes = sum(
        prod(size.get_length() for size in list(page.partial_shape)[1:]) * page.element_type.size
        for page in pages
    )
    return {
        "k_head_sizes": sizes["k_head_size"],
        "v_head_sizes": sizes["v_head_size"],
        "windows": windows,
        "cache_dtype": pages[0].element_type.get_type_name() if pages else None,
        "bytes_per_token": page_bytes / _BLOCK_TOKENS,
    }


def _window(layer: Any) -> int | None:
    """Sliding window of a layer of paged attention, in tokens; 0 stands for none."""
    node = layer.input_value(_WINDOW_INPUT).get_node()
    while node.get_type_name() != "Constant":  # the negative of a converted constant
        node = node.input_value(0).get_node()
    return abs(int(node.data.ravel()[0])) or None


def check_paging(latent: Any, cache: dict[str, Any]) -> None:
    """Raise `ValueError` unless a `paged_cache` has the widths and windows of the model that was exported."""
    config, layers = latent_config_of(latent.config), range(latent.config.num_hidden_layers)
    expected = {
        "k_head_sizes": [config.d_qk_at(layer) for layer in layers],
        "v_head_sizes": [config.d_vo_at(layer) for layer in layers],
        "windows": windows_of(latent),
    }
    for name, wanted in expected.items():
        if cache[name] != wanted:
            raise ValueError(
                f"OpenVINO {ov.__version__} would serve another model with paged attention: it reads {name} off the graph as "
                f"{cache[name]} where the checkpoint has {wanted}; use the version that was tested, pip install openvino==2026.4.1"
            )
