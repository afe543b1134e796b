"""Does a model still know in which order its text came? Short spans of real text are shuffled, and it has to notice.

A frequency-aware rotary table gives up the fastest rotations, which tell near positions apart. Perplexity sees that
only together with everything else. Here the tokens of one span, 2 to 8 of them, change places, and nothing else: the
score is how much likelier the true order is than the shuffled one, in nats over the span and what follows it.

Most of that can be had without any attention, since every token is predicted from its direct predecessor too. From
the second token behind the span on, predecessor and target are the same in both orders, and the difference reaches
the prediction through keys and values alone. That part is given apart, as `after`: a model that sees its past as a
bag of words scores 0 there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.evaluation import check
from kvlatent.evaluation.branches import can_branch
from kvlatent.evaluation.check import CheckRequest, Levels, Settings
from kvlatent.evaluation.evidence import score_sign
from kvlatent.evaluation.sequences import (
    at_the_ends,
    check_counts,
    check_same,
    context_limit,
    counter,
    leading_ids,
    mean_and_error,
    token_stream,
)
from kvlatent.jobs.progress import Step
from kvlatent.model.time_estimate import rows_at_once

__all__ = ["CHECK", "check_order", "order", "order_drop"]

SPANS = (2, 3, 4, 6, 8)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
AFTER = 16
_SETTINGS = ("spans", "depths", "length", "after", "permutations", "trials", "seed")
_PARTS = ("margin", "after_margin")
_CHANCES = {"after_margin": 0.0, "margin": 0.0, "preferred": 0.5}  # the first is what only attention can know
_MOST_ROWS = 16
_TEXT = 8  # a text is read up to so many times the tokens that the trials need
_EXTENTS = ((64, 2), (128, 2), (256, 2), (256, 4), (256, 8), (256, 16))  # tokens of a window, trials


class Trials(NamedTuple):
    """What is asked of a model, and the settings that its figures are given with."""

    windows: np.ndarray  # of the text, [W, length]
    begins: list[int]  # the token at which the spans of each depth begin
    plans: list[
        tuple[np.ndarray, np.ndarray]
    ]  # windows shuffled, [R, length]; places of span and window, [R, 2]
    settings: Settings


def order(
    model: PreTrainedModel,
    text: Sequence[int] | Iterable[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """How much likelier a model finds the true order of short spans than a shuffled one.

    A trial is a window of text that shares no token with another trial's; all its spans of one depth begin at the same
    token. Both orders have the same tokens before, in and behind the span. The same text and seed give every model the
    same trials.

    Args:
        text: strings, which need the tokenizer, or token ids; documents are laid end to end.
        tokenizer: whose leading token, if it puts one, begins every window.
        batch_size: sequences read together; None takes 16, fewer of a large model.
        progress: called with the sequences done and their number.
        options: the spans and windows, see `check_order`.

    Returns:
        {"spans", "depths", "margin": [[...]] mean nats by which the true order is likelier, spans x depths,
        "preferred": [[...]] share of shuffled orders that it beats, ties counting half, "after_margin" and
        "after_preferred": the same from the second token behind the span on, each with "..._standard_error" (windows
        being independent; None for one), "trial_margin" and "trial_after_margin": spans x trials, mean over depths,
        and the settings "trials", "permutations", "length", "after", "seed"}. A span whose tokens are all equal has no
        other order and is left out (None in a trial that has no other).

    Raises:
        ValueError: see `check_order`; or a logit is not finite.
    """
    windows, begins, plans, settings = check_order(
        model.config, text, tokenizer, batch_size=batch_size, **options
    )
    spans, after = settings["spans"], settings["after"]
    keep = max(spans) + after
    batch_size = batch_size or rows_at_once(model, windows.shape[1], _MOST_ROWS)
    advance = counter(progress, sum(len(windows) + len(rows) for rows, _ in plans))

    scores = []
    for begin, (shuffled, origin) in zip(begins, plans, strict=True):
        rows = np.concatenate([windows, shuffled])[:, : begin + keep]
        nats = at_the_ends(model, rows, keep, _log_likelihoods, batch_size=batch_size, advance=advance)
        scores.append(_scores(nats[: len(windows)], nats[len(windows) :], origin, spans, after))
    return settings | _document(np.stack(scores, axis=2))


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
) -> Trials:
    """The trials of `order`, before a model runs.

    Args:
        spans: tokens that change places, 2 or more.
        depths: share of the window before the span, 0 to 1.
        length: tokens of a window.
        after: tokens scored behind the span, 2 or more.
        trials: windows; a short text gives fewer, as the result says.
        permutations: shuffled orders a span, all different; a span has no more than its tokens allow.

    Raises:
        ValueError: a span is below 2 or longer than the window has room for, a window is longer than the model's
            context or the text, a depth is outside 0 to 1, or all spans of a cell repeat one token.
    """
    check_counts(after=(after, 2), trials=(trials, 1), permutations=(permutations, 1))
    check_counts(batch_size=(batch_size, 1), seed=(seed, 0))
    lead = [] if tokenizer is None else leading_ids(tokenizer)
    _check_grid(spans, depths, length, after + max(1, len(lead)), context_limit(config))
    stream = token_stream(text, tokenizer, _TEXT * trials * length)
    windows = _windows(stream, lead, length, trials, seed)
    first, keep = max(1, len(lead)), max(spans) + after
    begins = [first + round(depth * (length - first - keep)) for depth in depths]
    plans = [_shuffled(windows, spans, begin, permutations, seed) for begin in begins]
    numbers = (
        list(map(int, spans)),
        list(map(float, depths)),
        length,
        after,
        permutations,
        len(windows),
        seed,
    )
    return Trials(windows, begins, plans, dict(zip(_SETTINGS, numbers, strict=True)))


def order_drop(original: dict[str, Any], latent: dict[str, Any]) -> dict[str, Any]:
    """What a latent model knows less of order than its original, from two documents of `order`.

    Returns:
        {"spans", "depths", "margin", "preferred", "after_margin", "after_preferred": latent minus original by cell, and
        "by_span": a dict a span with "span" and, for "margin" and "after_margin", "..._difference" in nats over all
        depths, "..._standard_error" of paired windows (None for one) and "..._kept", latent over original (None where
        the original's is not positive)}.

    Raises:
        ValueError: the two were not measured alike.
    """
    check_same(original, latent, _SETTINGS)
    result: dict[str, Any] = {"spans": original["spans"], "depths": original["depths"]}
    for name in ("margin", "preferred", "after_margin", "after_preferred"):
        result[name] = (np.array(latent[name]) - np.array(original[name])).tolist()
    result["by_span"] = [{"span": span} for span in original["spans"]]
    for place, row in enumerate(result["by_span"]):
        for name in _PARTS:
            pairs = zip(latent[f"trial_{name}"][place], original[f"trial_{name}"][place], strict=True)
            ours, theirs = np.array([pair for pair in pairs if None not in pair], dtype=float).T
            mean, error = mean_and_error(ours - theirs)
            row[f"{name}_difference"], row[f"{name}_standard_error"] = mean, error
            row[f"{name}_kept"] = float(ours.mean() / theirs.mean()) if theirs.mean() > 0 else None
    return result


def _log_likelihoods(logits: Tensor, target: Tensor) -> Tensor:
    """log p of every token in nats, [B, keep]."""
    return -F.cross_entropy(logits.transpose(1, 2), target, reduction="none")


def _scores(
    true: np.ndarray, other: np.ndarray, origin: np.ndarray, spans: Sequence[int], after: int
) -> np.ndarray:
    """Margin and share preferred, of the whole and of the part behind: [4, spans, windows], NaN without another order.

    Args:
        true, other: log p of the tokens from the span on, [windows, keep] and [R, keep].
        origin: the places of span and window of `other`, [R, 2].
    """
    scores = np.full((2 * len(_PARTS), len(spans), len(true)), np.nan)
    for place, window in np.unique(origin, axis=0):
        rivals = other[(origin == (place, window)).all(axis=1)]
        differences = (true[window] - rivals)[:, : spans[place] + after]
        for part, total in enumerate(
            (differences.sum(axis=1), differences[:, spans[place] + 1 :].sum(axis=1))
        ):
            preferred = (np.sign(total) + 1) / 2
            scores[2 * part : 2 * part + 2, place, window] = total.mean(), preferred.mean()
    return scores


def _document(scores: np.ndarray) -> dict[str, Any]:
    """Means and standard errors by cell, and the margins by trial, of scores [4, spans, depths, windows]."""
    result: dict[str, Any] = {}
    for name, values in zip(("margin", "preferred", "after_margin", "after_preferred"), scores, strict=True):
        cells = [[mean_and_error(cell[~np.isnan(cell)]) for cell in row] for row in values]
        result[name] = [[mean for mean, _ in row] for row in cells]
        result[f"{name}_standard_error"] = [[error for _, error in row] for row in cells]
    for name, values in zip(_PARTS, scores[::2], strict=True):
        counts = (~np.isnan(values)).sum(axis=1)
        means = np.nansum(values, axis=1) / np.maximum(counts, 1)
        result[f"trial_{name}"] = [
            [float(mean) if count else None for mean, count in zip(*row, strict=True)]
            for row in zip(means, counts, strict=True)
        ]
    return result


def _check_grid(
    spans: Sequence[int], depths: Sequence[float], length: int, extra: int, limit: int | None
) -> None:
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
    others: dict[tuple[int, ...], None] = {}
    while len(others) < min(number, orders - 1):
        other = tuple(rng.permutation(tokens).tolist())
        if other != true:
            others[other] = None
    return list(others)


def _refuse(request: CheckRequest, options: Settings) -> None:
    for model in request.models.values():
        check_order(model.config, request.text.documents, request.tokenizer, **options)


def _measure(model: Any, request: CheckRequest, step: Step, options: Settings) -> dict[str, Any]:
    return order(model, request.text.documents, request.tokenizer, progress=step.to, **options)


def _extents(request: CheckRequest) -> Levels:
    levels: dict[tuple[int, int], float] = {}
    for length, trials in _EXTENTS:
        length = min(length, request.window)
        keep = max(SPANS) + AFTER
        read = [max(1, round(keep + depth * (length - keep))) for depth in DEPTHS]
        orders = 1 + len(SPANS)
        if all(map(can_branch, request.models.values())):  # what stands before the span is read once
            levels[length, trials] = sum(request.seconds(n + (orders - 1) * keep, trials) for n in read)
        else:
            levels[length, trials] = sum(request.seconds(n, trials * orders) for n in read)
    return [({"length": length, "trials": trials}, cost) for (length, trials), cost in levels.items()]


CHECK = check.Check(
    name="order",
    arguments=(check.DATA, check.BLOCK_SIZE, check.BATCH_SIZE),
    refuse=_refuse,
    run=check.run_each("order", _measure),
    extents=_extents,
    may_be_left_out=True,
    units={"length": "tokens a window", "trials": "trials"},
    rows=lambda _: {
        "true order likelier by": lambda f: check.grid_mean(f["order"]["margin"], " nats"),
        "true order preferred": lambda f: check.grid_mean(f["order"]["preferred"]),
    },
    signs={
        "positional confusion": score_sign(
            "order",
            _CHANCES,
            "for the order of near tokens let every head keep the frequencies it uses (--preset calibrated --table head) "
            "or widen keys (--d-qk)",
        )
    },
)
