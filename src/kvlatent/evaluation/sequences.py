"""Sequences that a measurement builds itself: where their text comes from, and what a model says at their ends.

`needle` and `order` both plant something in running text and look at the last few predictions only. Rows of one batch
have one length, so there is no padding and no mask, and no logits are held but those that are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvlatent.evaluation.branches import can_branch, read_branches
from kvlatent.text.tokenise import check_token_ids

__all__ = [
    "at_the_ends",
    "check_counts",
    "check_same",
    "context_limit",
    "counter",
    "evaluation_mode",
    "leading_ids",
    "mean_and_error",
    "ordinary_ids",
    "shortest_context",
    "token_stream",
]

_DOCUMENTS_AT_ONCE = 16


def leading_ids(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before a text, if it puts one: at most one id."""
    begin = getattr(tokenizer, "bos_token_id", None)
    puts = begin is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [begin]
    return [begin] if puts else []


def token_stream(text: Sequence[int] | Iterable[str], tokenizer: Any, enough: int) -> np.ndarray:
    """One stream of token ids, documents end to end, int64 [N]; text is read no further than `enough` ids need.

    Args:
        text: token ids, one string, or strings.
        tokenizer: of the strings; ids need none.

    Raises:
        ValueError: there is no text, or strings come without a tokenizer.
    """
    parts = iter([text] if isinstance(text, str) else text)
    first = next(parts, None)
    if first is None:
        raise ValueError("the measurement needs text: got 0 tokens; give a text of some hundred words")
    parts = chain([first], parts)
    if isinstance(first, str):
        if tokenizer is None:
            raise ValueError("text in strings needs a tokenizer: got None; pass the model's, or token ids")
        ids: list[int] = []
        while len(ids) < enough and (group := list(islice(parts, _DOCUMENTS_AT_ONCE))):
            ids += chain(*tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"])
    else:
        ids = [int(token) for token in islice(parts, enough)]
    if not ids:
        raise ValueError("the measurement needs text: got 0 tokens; give a text of some hundred words")
    return np.array(ids, dtype=np.int64)


def context_limit(config: Any) -> int | None:
    """The longest sequence of a model in tokens; None where its config names none."""
    return getattr(config, "max_position_embeddings", None)


def shortest_context(models: Iterable[Any]) -> int | None:
    """The shortest context of several models; None where their configs name none."""
    limits = [context_limit(model.config) for model in models]
    return min((limit for limit in limits if limit is not None), default=None)


def check_counts(**counts: tuple[int | None, int]) -> None:
    """Raise `ValueError` unless every (value, smallest) pair is in order, naming the argument; None is."""
    for name, (value, smallest) in counts.items():
        if value is not None and value < smallest:
            raise ValueError(
                f"{name} must be at least {smallest}: got {name}={value}; raise it or leave it out"
            )


def counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """A function that adds up how many more are done, and tells `progress` the sum and `total`, which is told 0 at once."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    advance(0)
    return advance


@contextmanager
def evaluation_mode(*models: Any) -> Generator[None]:
    """Models in evaluation mode, and no gradients; afterwards they are as they were."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        # Not inference_mode: tables that latent attention builds at its first forward must stay usable in training.
        with torch.no_grad():
            yield
    finally:
        for model, training in zip(models, modes, strict=True):
            model.train(training)


def at_the_ends(
    model: Any,
    rows: np.ndarray,
    keep: int,
    score: Callable[[Tensor, Tensor], Tensor],
    *,
    batch_size: int,
    advance: Callable[[int], None],
) -> np.ndarray:
    """`score` of the predictions of the last `keep` tokens of every row, which are read under teacher forcing.

    The model runs in evaluation mode, without a cache, in its own dtype and on its own device. Rows that begin alike are
    read as branches of one beginning where the model's attention allows for it.

    Args:
        rows: int64 [R, T].
        score: of fp32 logits [B, keep, V] and the tokens they should predict [B, keep]: a tensor [B, ...].
        advance: called with the number of rows of each batch, when it is done.

    Raises:
        ValueError: a token is outside the model's vocabulary, or a logit is NaN or infinite.
    """
    for token in (int(rows.min()), int(rows.max())):
        check_token_ids(token, model.config.vocab_size)
    read = _read_whole
    groups = list(torch.arange(len(rows)).split(batch_size))
    if can_branch(model) and (families := _families(rows, keep)) is not None:
        read, groups = _read_branched, list(families.split(max(1, batch_size // families.shape[1])))
    scores: dict[int, np.ndarray] = {}
    with evaluation_mode(model):
        for places in groups:
            batch = torch.from_numpy(rows[places.numpy()]).to(model.device)
            logits = read(model, batch, keep).float()
            if not bool(torch.isfinite(logits).all()):
                raise ValueError(
                    f"logits must be finite: got NaN or infinity within {rows.shape[1]} tokens; the model's "
                    "weights are broken or its dtype overflows, try float32"
                )
            found = score(logits, batch.flatten(0, -2)[:, -keep:]).cpu().double().numpy()
            scores.update(zip(places.flatten().tolist(), found, strict=True))
            advance(places.numel())
    return np.stack([scores[place] for place in range(len(rows))])


def _read_whole(model: Any, rows: Tensor, keep: int) -> Tensor:
    """Logits [B, keep, V] that predict the last tokens of rows [B, T]."""
    output = model(input_ids=rows[:, :-1], use_cache=False, logits_to_keep=keep)
    return output.logits[:, -keep:]


def _read_branched(model: Any, rows: Tensor, keep: int) -> Tensor:
    """The same, [G * n, keep, V], of rows [G, n, T] of which the n of a group begin alike."""
    start = rows.shape[2] - keep - 1
    return read_branches(model, rows[:, 0, :start], rows[:, :, start:-1]).flatten(0, 1)


def _families(rows: np.ndarray, keep: int) -> Tensor | None:
    """Places [G, n] of rows that are equal but for the last tokens; None where that would not save half of the work."""
    start = rows.shape[1] - keep - 1
    if start < keep:
        return None
    _, group = np.unique(rows[:, :start], axis=0, return_inverse=True)
    places = np.argsort(group, kind="stable")
    sizes = np.unique(np.bincount(group))
    if len(sizes) > 1 or sizes[0] < 2 or start + sizes[0] * keep > sizes[0] * (start + keep) / 2:
        return None
    return torch.from_numpy(places.reshape(-1, sizes[0]))


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """Mean of independent values [N] and its standard error, None for one."""
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error


def check_same(original: dict[str, Any], latent: dict[str, Any], names: Iterable[str]) -> None:
    """Raise `ValueError` unless two documents of figures have the same settings."""
    for name in names:
        if original[name] != latent[name]:
            raise ValueError(
                f"both models must be measured alike: {name} is {original[name]} and {latent[name]}; measure again"
            )


def ordinary_ids(tokenizer: Any, vocab_size: int) -> np.ndarray:
    """Token ids that are not special and that an embedding of so many rows has, ascending: int64 [N]."""
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    return np.array([i for i in range(min(len(tokenizer), vocab_size)) if i not in special], dtype=np.int64)
