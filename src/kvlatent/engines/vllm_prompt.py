"""One prompt through vLLM's attention before any request: what a latent checkpoint says of itself, compared.

The prompt is written into the first blocks of the cache, which are free at the start, by the metadata that vLLM's own
builders make. Whatever a served request goes through is in it: weights as loaded and fused, rotary tables, padding, the
paged cache and its kernels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from kvlatent.checkpoints.self_check import SELF_CHECK, SelfCheck, allowed_difference

__all__ = ["attention_layers", "compare", "read_self_check"]


def read_self_check(model: str, revision: str | None = None) -> SelfCheck | None:
    """What the checkpoint says of itself, None where it was saved without.

    Args:
        model: a directory or hub id; revision: of the latter.

    Raises:
        ValueError: the file is damaged.
    """
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    try:
        data = get_hf_file_to_dict(SELF_CHECK, model, revision)
    except ValueError as error:  # no JSON
        raise ValueError(
            f"{SELF_CHECK} is damaged, not JSON ({error}); save the model again with kvlatent, or delete the file to go "
            "without the check"
        ) from error
    return None if data is None else SelfCheck.from_dict(data)


def compare(model: Any, check: SelfCheck) -> tuple[float, float]:
    """Largest distance of a log-probability from the checkpoint's, and the one that is allowed.

    Args:
        model: vLLM's model, its attention layers bound to their caches.

    Raises:
        ValueError: it is larger than allowed.
    """
    config = model.vllm_config
    quantised = config.quant_config is not None or config.cache_config.cache_dtype.startswith(("fp8", "int"))
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    allowed = allowed_difference(dtype, check.dtype, quantised=quantised)
    found = check.difference(_logits(model, check.input_ids[: config.model_config.max_model_len]))
    if not found <= allowed:
        raise ValueError(
            f"vLLM does not compute what this checkpoint says of itself: log-probabilities differ by {found:.3g}, allowed "
            f"are {allowed:g} in {dtype}; it is not served. Weights or {SELF_CHECK} are damaged, or this vLLM runs them "
            "wrongly: compare with `kvlatent generate`, and save the model again where that is right"
        )
    return found, allowed


def attention_layers(model: Any) -> list[Any]:
    """vLLM's layers of a model that own a cache, in the order of the model's."""
    return [module for module in model.modules() if hasattr(module, "bind_kv_cache")]


@torch.inference_mode()
def _logits(model: Any, input_ids: tuple[int, ...]) -> Tensor:
    """Logits [T, V] of one sequence, through the caches that are bound."""
    from vllm.forward_context import set_forward_context

    device = model.device_config.device
    tokens = torch.tensor(input_ids, device=device)
    metadata, slots = {}, {}
    for layer in attention_layers(model):
        name = layer.layer_name
        metadata[name], slots[name] = _metadata(layer, name, len(input_ids), model.vllm_config, device)
    context = set_forward_context(
        metadata, model.vllm_config, num_tokens=len(input_ids), slot_mapping=slots, skip_compiled=True
    )
    with context:
        hidden = model(input_ids=tokens, positions=torch.arange(len(input_ids), device=device))
        return model.compute_logits(hidden)


def _metadata(layer: Any, name: str, num_tokens: int, config: Any, device: Any) -> tuple[Any, Tensor]:
    """What one layer's kernel wants to know of a first prompt of so many tokens in the blocks 0, 1, ..."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    block_size = layer.kv_cache.shape[2]
    num_blocks = -(-num_tokens // block_size)
    # Not the block size of the spec but the kernel's, which may be a part of it.
    spec = dataclasses.replace(layer.get_kv_cache_spec(config), block_size=block_size)
    builder = layer.get_attn_backend().get_builder_cls()(spec, [name], config, device)
    starts = torch.tensor([0, num_tokens], dtype=torch.int32)
    slots = torch.arange(num_tokens, dtype=torch.int64, device=device)
    lengths = torch.tensor([num_tokens], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(device),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=1,
        num_actual_tokens=num_tokens,
        max_query_len=num_tokens,
        max_seq_len=num_tokens,
        block_table_tensor=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
        slot_mapping=slots,
        positions=torch.arange(num_tokens, device=device),
    )
    return builder.build(0, common), slots
