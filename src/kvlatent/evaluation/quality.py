"""What a latent checkpoint costs and saves, beside its original: perplexity and the bytes a token takes in the cache.

Both numbers are read off the running model: the perplexity from its losses, the bytes from the tensors that its cache
holds after a forward pass. The ratio of two perplexities comes with a standard error from paired blocks, so that a
small difference is not drowned by the spread that both models share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from kvlatent.checkpoints.load import check_block_size
from kvlatent.evaluation.perplexity import Perplexity, perplexity, perplexity_ratio
from kvlatent.evaluation.sequences import evaluation_mode
from kvlatent.model.cache_bytes import live_cache_bytes

__all__ = [
    "cache_bytes_per_token",
    "cache_figures",
    "compare",
    "measure",
    "measure_models",
]

_CACHE_POSITIONS = 64


def cache_bytes_per_token(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    """Bytes that one token of one sequence holds in the cache, measured after a forward pass.

    Args:
        model: original or latent; the cache is the one it makes itself, in its own dtype.
        input_ids: [B, T], T at most the sliding window where there is one (a longer text measures the window).
    """
    with evaluation_mode(model):
        output = model(input_ids=input_ids.to(model.device), use_cache=True, logits_to_keep=1)
    return live_cache_bytes(output.past_key_values) / input_ids.numel()


def cache_figures(model: PreTrainedModel, input_ids: torch.Tensor) -> dict[str, Any]:
    """Cache bytes a token after the first tokens of a text [B, T], and the dtype that takes so many."""
    size = cache_bytes_per_token(model, input_ids[:, :_CACHE_POSITIONS])
    return {"cache_bytes_per_token": size, "cache_dtype": str(model.dtype).removeprefix("torch.")}


def measure(
    model: PreTrainedModel,
    blocks: Dataset,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], Perplexity]:
    """Perplexity with standard error, and cache bytes per token, of one model.

    `progress` is called with the blocks done and their number.

    Returns:
        A JSON-able dict, and the `Perplexity` that a ratio is made from.

    Raises:
        ValueError: a block is longer than the model's context, or a loss is not finite.
    """
    ids = torch.as_tensor(blocks[0]["input_ids"])[None]
    check_block_size(model.config, ids.shape[1])
    result = perplexity(model, blocks, batch_size=batch_size, progress=progress)
    return result.figures() | cache_figures(model, ids), result


def compare(latent: Perplexity, original: Perplexity) -> dict[str, float | None]:
    """Perplexity of the latent model over the original's, with the paired standard error."""
    ratio, standard_error = perplexity_ratio(latent, original)
    return {"ratio": ratio, "ratio_standard_error": standard_error}


def measure_models(
    models: Mapping[str, PreTrainedModel],
    measure_one: Callable[[str, PreTrainedModel], tuple[dict[str, Any], Perplexity]],
) -> dict[str, Any]:
    """Figures by role, "latent" and "original" where there is one, and beside them those of the pair.

    Args:
        measure_one: gives the figures of a role's model and its `Perplexity`, cache bytes included.
    """
    figures: dict[str, Any] = {}
    results: dict[str, Perplexity] = {}
    for role, model in models.items():
        figures[role], results[role] = measure_one(role, model)
    if "original" in results:
        latent, original = (figures[role]["cache_bytes_per_token"] for role in ("latent", "original"))
        figures |= compare(results["latent"], results["original"]) | {"cache_ratio": latent / original}
    return figures
