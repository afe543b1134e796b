"""What a latent checkpoint costs and saves, beside its original: perplexity and the bytes a token takes in the cache.

Both numbers are read off the running model: the perplexity from its losses, the bytes from the tensors that its cache
holds after a forward pass. The ratio of two perplexities comes with a standard error from paired blocks, so that a
small difference is not drowned by the spread that both models share.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.checkpoints.load import check_block_size
from kvlatent.checkpoints.source import check_same_vocabulary, resolve_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.evaluation.perplexity import Perplexity, perplexity, perplexity_ratio
from kvlatent.model.cache_bytes import live_cache_bytes
from kvlatent.text.corpus import evaluation_blocks

__all__ = ["cache_bytes_per_token", "compare", "evaluate", "measure", "precision", "speedometer"]

_CACHE_POSITIONS = 64


def precision(device: str | torch.device, dtype: str) -> AbstractContextManager[Any]:
    """The autocast context in which a model with fp32 trained and narrower frozen weights is run."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, dtype))


def cache_bytes_per_token(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    """Bytes that one token of one sequence holds in the cache, measured after a forward pass.

    Args:
        model: original or latent; the cache is the one it makes itself, in its own dtype.
        input_ids: [B, T], T at most the sliding window where there is one (a longer text measures the window).
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            cache = model(
                input_ids=input_ids.to(model.device), use_cache=True, logits_to_keep=1
            ).past_key_values
    finally:
        model.train(training)
    return live_cache_bytes(cache) / input_ids.numel()


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
    figures = {
        "perplexity": result.perplexity,
        "standard_error": result.standard_error,
        "loss": result.loss,
        "tokens": result.tokens,
        "cache_bytes_per_token": cache_bytes_per_token(model, ids[:, :_CACHE_POSITIONS]),
        "cache_dtype": str(model.dtype).removeprefix("torch."),
    }
    return figures, result


def compare(latent: Perplexity, original: Perplexity) -> dict[str, float | None]:
    """Perplexity of the latent model over the original's, with the paired standard error."""
    ratio, standard_error = perplexity_ratio(latent, original)
    return {"ratio": ratio, "ratio_standard_error": standard_error}


def evaluate(
    model: str | Path | PreTrainedModel,
    data: str | Path | Dataset,
    *,
    against: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    block_size: int = 512,
    batch_size: int = 8,
    max_tokens: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    separator: str | None = "<|endoftext|>",
    text_field: str = "text",
    progress: Callable[[str, int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure a model, and the original it came from when `against` is given.

    Args:
        model: a directory, a hub id or a loaded model.
        data: a text file or hub data set, all of which is scored; or blocks made by `data.evaluation_blocks`.
        against: the original.
        tokenizer: of the text; None takes the model's own (then `model` is a directory or hub id).
        block_size: tokens a window; a document's first token is context only.
        max_tokens: score about that many tokens, from the start of the text; None scores all.
        dtype: "float32", "bfloat16", "float16" or None, what the checkpoint has; on models that are loaded already it is ignored.
        separator, text_field: how `data` splits into documents.
        progress: called with a step's name, blocks done, their number, and a note.

    Returns:
        {"latent": {perplexity, standard_error, loss, tokens, cache_bytes_per_token, cache_dtype}} and, with
        `against`, "original" with the same keys, "ratio", "ratio_standard_error" and "cache_ratio".

    Raises:
        ValueError: the two models have different vocabularies, the text is too short, or an unknown dtype.
    """
    loaded = resolve_model(model, dtype, device)
    other = None if against is None else resolve_model(against, dtype, device)
    if other is not None:
        check_same_vocabulary(loaded, other)
    if tokenizer is None and not isinstance(data, Dataset):
        if isinstance(model, PreTrainedModel):
            raise ValueError("a loaded model comes without its tokenizer: pass tokenizer=, or blocks as data")
        tokenizer = load_tokenizer(model, loaded.config)
    with tempfile.TemporaryDirectory(prefix="kvlatent-") as cache:
        if isinstance(data, Dataset):
            blocks = data
        else:
            limit = getattr(loaded.config, "max_position_embeddings", None) or block_size
            blocks = evaluation_blocks(
                data,
                tokenizer,
                block_size=min(block_size, limit),
                cache_dir=cache,
                vocab_size=loaded.config.vocab_size,
                separator=separator,
                text_field=text_field,
                max_tokens=max_tokens,
            )
        figures, result = measure(
            loaded, blocks, batch_size=batch_size, progress=speedometer(progress, "measure", blocks)
        )
        report: dict[str, Any] = {"latent": figures}
        if other is not None:
            report["original"], original = measure(
                other,
                blocks,
                batch_size=batch_size,
                progress=speedometer(progress, "measure the original", blocks),
            )
            report |= compare(result, original)
            report["cache_ratio"] = (
                figures["cache_bytes_per_token"] / report["original"]["cache_bytes_per_token"]
            )
    return report


def speedometer(
    progress: Callable[[str, int, int, str], None] | None, step: str, blocks: Dataset
) -> Callable[[int, int], None] | None:
    """What `measure` calls with blocks done and their number, handed on as `step` with the tokens per second."""
    if progress is None:
        return None
    report, start, block_tokens = progress, time.monotonic(), len(blocks[0]["input_ids"])

    def call(done: int, total: int) -> None:
        speed = done * block_tokens / max(time.monotonic() - start, 1e-9)
        report(step, done, total, f"{speed:,.0f} tokens/s")

    return call
