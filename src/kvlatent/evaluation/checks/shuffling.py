"""The trials of the order check: windows of a text, and the same windows with a short span shuffled.

Made before any model runs, so that a text or a grid that allows none is refused first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kvlatent.evaluation.sequences import check_counts, context_limit, leading_ids, token_stream

__all__ = ["AFTER", "DEPTHS", "SPANS", "check_order"]

SPANS = (2, 3, 4, 6, 8)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
AFTER = 16
_WINDOWS = 8  # a text is read up to so many times the tokens that the trials need


def check_order(
    config: Any,
    text: Sequence[int] | Iterable[str],
    tokenizer: Any = None,
    *,
    spans: Sequence[int] = SPANS,
    depths: Sequence[float] = DEPTHS,
    length: int = 256,
    after: int = AFTER,
    trials: int = 32,
    permutations: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
) -> tuple[np.ndarray, list[int], list[tuple[np.ndarray, np.ndarray]]]:
    """The trials of `order`, which has the same arguments; raises what it raises before a model runs.

    Returns:
        Windows [W, length]; the token at which the spans of each depth begin; and for each depth windows with a span
        shuffled, [R, length], with the places of their span and window, [R, 2].
    """
    check_counts(after=(after, 2), trials=(trials, 1), permutations=(permutations, 1))
    check_counts(batch_size=(1 if batch_size is None else batch_size, 1), seed=(seed, 0))
    lead = [] if tokenizer is None else leading_ids(tokenizer)
    _check(spans, depths, length, after + max(1, len(lead)), context_limit(config))
    stream = token_stream(text, tokenizer, _WINDOWS * trials * length)
    windows = _windows(stream, lead, length, trials, seed)
    first, keep = max(1, len(lead)), max(spans) + after
    begins = [first + round(depth * (length - first - keep)) for depth in depths]
    return windows, begins, [_shuffled(windows, spans, begin, permutations, seed) for begin in begins]


def _check(spans: Sequence[int], depths: Sequence[float], length: int, extra: int, limit: int | None) -> None:
    if not len(spans) or not len(depths):
        raise ValueError(
            f"order needs a span and a depth: got {len(spans)} and {len(depths)}; leave them out"
        )
    if min(spans) < 2:
        raise ValueError(f"a span needs two tokens to change places: got {min(spans)}; try 2")
    if limit is not None and length > limit:
        raise ValueError(
            f"a window cannot be longer than the model's context: got length={length}, "
            f"max_position_embeddings={limit}; pass length={limit}"
        )
    if max(spans) + extra > length:
        raise ValueError(
            f"a span and the {extra} tokens around it must fit the window: a span of {max(spans)} needs "
            f"{max(spans) + extra} tokens, got length={length}; take shorter spans or a longer window"
        )
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"a depth is a share of the window, 0 to 1: got {depth}; try 0.5")


def _windows(stream: np.ndarray, lead: list[int], length: int, trials: int, seed: int) -> np.ndarray:
    """Up to `trials` stretches of the text that do not overlap, each led by `lead`: int64 [W, length]."""
    body = length - len(lead)
    number = len(stream) // body
    if number == 0:
        raise ValueError(
            f"the text is too short for one window of {length} tokens: got {len(stream)}; give more text, "
            "a shorter window, or leave order out of the checks"
        )
    chosen = np.random.default_rng(seed).permutation(number)[:trials]
    return np.array([[*lead, *stream[at * body : (at + 1) * body].tolist()] for at in chosen], dtype=np.int64)


def _shuffled(
    windows: np.ndarray, spans: Sequence[int], begin: int, permutations: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Windows [R, length] with a span shuffled, and for each the places of its span and window, [R, 2]."""
    rows, origin = [], []
    for place, span in enumerate(spans):
        for index, window in enumerate(windows):
            rng = np.random.default_rng([seed, index, begin, span])
            for other in _other_orders(window[begin : begin + span], permutations, rng):
                rows.append(np.concatenate([window[:begin], other, window[begin + span :]]))
                origin.append((place, index))
        if not origin or origin[-1][0] != place:
            raise ValueError(
                f"order needs spans with two different tokens: all {len(windows)} spans of {span} at token {begin} "
                "of a window repeat one token; give more varied text or more trials"
            )
    return np.array(rows), np.array(origin)


def _other_orders(tokens: np.ndarray, number: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Up to `number` different sequences of the same tokens, none of them `tokens`, all equally likely."""
    true = tuple(tokens.tolist())
    orders = math.factorial(len(true)) // math.prod(map(math.factorial, Counter(true).values()))
    found: dict[tuple[int, ...], None] = {}
    while len(found) < min(number, orders - 1):
        other = tuple(rng.permutation(tokens).tolist())
        if other != true:
            found[other] = None
    return list(found)
