"""Recall: how much of what the original copies out of its cache does a latent model still copy?

Perplexity hardly notices a cache that lost what was said hundreds of tokens ago. Random strings in held-out text do:
nothing but the cache can know them. Both models read the same strings, and the error of the share that is kept is of
pairs. It is measured after every conversion, so it reads a tenth of what the perplexity reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset

from kvlatent.evaluation.copying import COUNTED, PREFIX, STRING, copied_tokens
from kvlatent.evaluation.evidence import LEAST
from kvlatent.evaluation.perplexity import ratio_error
from kvlatent.evaluation.sequences import context_limit, counter
from kvlatent.model.time_estimate import rows_at_once

__all__ = ["MOST_TOKENS", "compare_recall", "measure_recall"]

MOST_TOKENS = 6_553
"""Tokens of all sequences together; a tenth of the 65,536 that a perplexity is measured on by default."""

_DISTANCES = (50, 200, 400)  # tokens from the start of a string to the start of its second occurrence
_MOST_ROWS = 8


def measure_recall(
    model: Any, tokenizer: Any, blocks: Dataset, *, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any] | None:
    """Share of the tokens of random strings that a model repeats, some way back in held-out text.

    Args:
        model, tokenizer: original or latent.
        blocks: of held-out text, as `perplexity` takes them; the strings are planted in their tokens.
        progress: called with the sequences done and their number.

    Returns:
        {"copied": share of the predicted tokens, "distances", "trials" a distance, "hits": [tokens of 14 by sequence,
        distance after distance]}, JSON-able; None where the context or the text is too short for the nearest distance.

    Raises:
        ValueError: a logit is not finite.
    """
    filler = torch.as_tensor(blocks[:]["input_ids"]).flatten().numpy()
    limit = context_limit(model.config) or math.inf
    lengths = {distance: PREFIX + distance + STRING for distance in _DISTANCES}
    distances = [
        distance
        for distance, length in lengths.items()
        if length <= limit and len(filler) > max(PREFIX, distance - STRING)
    ]
    if not distances:
        return None
    trials = MOST_TOKENS // sum(lengths[distance] for distance in distances)
    advance = counter(progress, trials * len(distances))
    at_once = rows_at_once(model, lengths[distances[-1]], _MOST_ROWS)
    found = copied_tokens(model, tokenizer, filler, distances, trials, batch_size=at_once, advance=advance)
    hits = [int(count) for counts in found.values() for count in counts]
    copied = sum(hits) / (COUNTED * len(hits))
    return {"copied": copied, "distances": distances, "trials": trials, "hits": hits}


def compare_recall(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of "original", "latent" and others, with what the latent model's recall is of the original's.

    Returns:
        The same, and "kept" and "kept_standard_error" in `figures["latent"]["recall"]` where both recalls are known; both
        None where the original copies less than a tenth, which no loss can be told from.
    """
    before, after = (figures.get(role, {}).get("recall") for role in ("original", "latent"))
    if before is None or after is None:
        return dict(figures)
    kept: dict[str, float | None] = {"kept": None, "kept_standard_error": None}
    if before["copied"] >= LEAST:
        kept = {
            "kept": sum(after["hits"]) / sum(before["hits"]),
            "kept_standard_error": ratio_error(after["hits"], before["hits"]),
        }
    return {**figures, "latent": {**figures["latent"], "recall": after | kept}}
