"""A needle in a haystack: can a model still read something small out of a long cache, and where in it?

The needle is a cue and a value, planted at some depth of running text; the text ends with the cue again, and the value
has to follow. Cue and value are random tokens, so nothing but the cache can know them, and a small base model that
never saw a question can take part: repeating what followed the same tokens before is the first thing that language
models learn to do with their context (Olsson et al. 2022, induction heads). A model that reads language can be asked in
words instead, with a template. The grid of context and depth is that of Kamradt (2023); both scores are our choice:
exact reproduction, which users see, and the rank of the value's tokens, which moves before the former does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.evaluation import check
from kvlatent.evaluation.check import CheckRequest, Levels, Settings
from kvlatent.evaluation.checks.haystack import (
    PlantedNeedle,
    planted_rows,
    random_needles,
    written_needles,
)
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

__all__ = ["CHECK", "check_needle", "needle", "needle_drop"]

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)

_SHORTEST = 128  # of the contexts that nobody chose; two checks of position then take a minute, not five
_TRIALS = (2, 4, 8)  # that nobody chose
_MOST_ROWS = 8
_HAYSTACKS = 16  # so many contexts of a text are looked at, whatever other contexts are measured
_SETTINGS = ("contexts", "depths", "trials", "needle_tokens", "cue_tokens", "template", "seed")


class Grid(NamedTuple):
    """What is asked: the contexts, the needles of each, and the settings that the figures are given with."""

    contexts: list[int]
    needles: list[PlantedNeedle]
    settings: Settings


def needle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    haystack: Sequence[int] | Iterable[str],
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """How well a model finds a needle, by context length and depth.

    A sequence has exactly the context's tokens, the answer included. The answer is read under teacher forcing; all
    its tokens are the likeliest ones exactly when greedy generation writes it. A trial has the same needle in every
    cell, and the same text at every depth of a context, whatever else is measured beside it.

    Args:
        haystack: text to hide the needle in, as strings or token ids, read from a random place on and from its
            start again at its end.
        batch_size: sequences read together; None takes 8, fewer where the context is long or the model large.
        progress: called with the tokens of all sequences done, and of all that there are.
        options: the grid and the needles, see `check_needle`.

    Returns:
        The settings "contexts", "depths", "trials", "needle_tokens", "cue_tokens" (None with a template), "template" and
        "seed"; "exact": [[...]] share of trials with the whole value reproduced, contexts x depths; "rank": [[...]] mean
        reciprocal rank of the value's tokens; "trial_exact" and "trial_rank": the same by trial, over all cells.

    Raises:
        ValueError: see `check_needle`; there is no text, or a logit is not finite.
    """
    lengths, needles, settings = check_needle(model.config, tokenizer, batch_size=batch_size, **options)
    depths, seed, lead = settings["depths"], settings["seed"], leading_ids(tokenizer)
    stream = token_stream(haystack, tokenizer, _HAYSTACKS * max(lengths))
    advance = counter(progress, sum(lengths) * len(depths) * len(needles))

    keep = max(len(one.value) for one in needles)
    exact, rank = (np.empty((len(lengths), len(depths), len(needles))) for _ in range(2))
    for place, context in enumerate(lengths):
        rows = planted_rows(needles, stream[: _HAYSTACKS * context], lead, context, depths, seed)
        at_once = batch_size or rows_at_once(model, context, _MOST_ROWS)
        answers = at_the_ends(
            model, rows, keep, _hits_and_ranks, batch_size=at_once,
            advance=lambda done, context=context: advance(done * context),
        )  # fmt: skip
        for index, (hits, ranks) in enumerate(answers):
            trial, depth = divmod(index, len(depths))
            answer = slice(keep - len(needles[trial].value), keep)
            exact[place, depth, trial], rank[place, depth, trial] = hits[answer].all(), ranks[answer].mean()
    scores = {"exact": exact, "rank": rank}
    cells = {name: score.mean(axis=2).tolist() for name, score in scores.items()}
    return settings | cells | {f"trial_{name}": s.mean(axis=(0, 1)).tolist() for name, s in scores.items()}


def check_needle(
    config: Any,
    tokenizer: Any,
    *,
    contexts: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    trials: int = 20,
    needle_tokens: int = 8,
    cue_tokens: int = 4,
    template: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Grid:
    """The grid of `needle`, before a model runs.

    Args:
        contexts: lengths in tokens.
        depths: share of the haystack before the needle, 0 to 1; at 1 the question follows at once.
        trials: needles a cell.
        needle_tokens: tokens to be reproduced; with a template, decimal digits.
        cue_tokens: tokens before them, which the question repeats; a template has its own.
        template: a needle in words, such as "The magic number for {key} is {value}."; up to {value} it is the question.

    Raises:
        ValueError: a context is longer than the model's or too short for the needle, a depth is outside 0 to 1, the
            template lacks {key} before {value}, or there is no cue.
    """
    lengths = _lengths(config, contexts, depths)
    check_counts(
        trials=(trials, 1), needle_tokens=(needle_tokens, 1), batch_size=(batch_size, 1), seed=(seed, 0)
    )
    if template is None:
        needles = random_needles(tokenizer, config.vocab_size, trials, needle_tokens, cue_tokens, seed)
    else:
        needles = written_needles(tokenizer, trials, needle_tokens, template, seed)
    _check_fits(lengths, len(leading_ids(tokenizer)) + max(one.size for one in needles))
    cue = cue_tokens if template is None else None
    numbers = (lengths, [float(depth) for depth in depths], trials, needle_tokens, cue, template, seed)
    return Grid(lengths, needles, dict(zip(_SETTINGS, numbers, strict=True)))


def needle_drop(original: dict[str, Any], latent: dict[str, Any]) -> dict[str, Any]:
    """What a latent model finds less than its original: latent minus original, from two documents of `needle`.

    Returns:
        {"contexts", "depths", "exact": [[...]], "rank": [[...]] by cell, and over all cells "exact_mean",
        "exact_standard_error", "rank_mean", "rank_standard_error"}; the errors are of paired needles, None for one.

    Raises:
        ValueError: the two were not measured alike.
    """
    check_same(original, latent, _SETTINGS)
    result: dict[str, Any] = {"contexts": original["contexts"], "depths": original["depths"]}
    for name in ("exact", "rank"):
        result[name] = (np.array(latent[name]) - np.array(original[name])).tolist()
        by_trial = np.array(latent[f"trial_{name}"]) - np.array(original[f"trial_{name}"])
        result[f"{name}_mean"], result[f"{name}_standard_error"] = mean_and_error(by_trial)
    return result


def _lengths(config: Any, contexts: Sequence[int] | None, depths: Sequence[float]) -> list[int]:
    """The contexts to measure, once the grid is known to be possible."""
    limit = context_limit(config)
    if contexts is None:
        raise ValueError(
            "contexts are chosen where the model's config names none: got contexts=None; pass contexts=[1024]"
        )
    if not len(contexts) or not len(depths):
        raise ValueError(
            f"the grid needs a context and a depth: got {len(contexts)} and {len(depths)}; leave them out"
        )
    if limit is not None and max(contexts) > limit:
        raise ValueError(
            f"a context cannot be longer than the model's: got {max(contexts)} tokens, "
            f"max_position_embeddings={limit}; ask for {limit} at the most"
        )
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"a depth is a share of the text, 0 to 1: got {depth}; try 0.5")
    return [int(context) for context in contexts]


def _check_fits(contexts: Sequence[int], needed: int) -> None:
    if min(contexts) < needed:
        raise ValueError(
            f"needle, question and answer must fit the context: they take {needed} tokens, the context has "
            f"{min(contexts)}; ask for contexts of {needed} tokens or more"
        )


def _hits_and_ranks(logits: Tensor, target: Tensor) -> Tensor:
    """Whether a token is the likeliest, and its reciprocal rank, ties sharing the middle one: [B, 2, keep]."""
    own = logits.gather(-1, target.unsqueeze(-1))
    above, level = (logits > own).sum(-1), (logits == own).sum(-1) - 1
    hits = logits.argmax(-1) == target
    return torch.stack([hits.float(), 1 / (1 + above + level / 2)], dim=1)


def _refuse(request: CheckRequest, options: Settings) -> None:
    for model in request.models.values():
        check_needle(model.config, request.tokenizer, **options)


def _measure(model: Any, request: CheckRequest, step: Step, options: Settings) -> dict[str, Any]:
    return needle(model, request.tokenizer, haystack=request.text.documents, progress=step.to, **options)


def _extents(request: CheckRequest) -> Levels:
    """The short and one longer context, the longest the model's own; fewer trials where that is too much."""
    most, contexts, limit = _TRIALS[-1], request.given["contexts"], request.limit
    if contexts is not None or limit is None:
        lengths = [length for length in contexts or () if length > 0]
        seconds = sum(request.seconds(n, most * len(DEPTHS)) for n in lengths)
        return [({"contexts": contexts, "trials": most}, seconds)]
    short = min(_SHORTEST, limit)
    grid: list[tuple[tuple[int, ...], int]] = [((short,), trials) for trials in _TRIALS]
    powers = [1 << power for power in range(short.bit_length(), limit.bit_length()) if 1 << power < limit]
    grid += [((short, longest), most) for longest in (*powers, limit) if longest > short]
    return [
        (
            {"contexts": list(lengths), "trials": trials},
            sum(request.seconds(n, trials * len(DEPTHS)) for n in lengths),
        )
        for lengths, trials in grid
    ]


CHECK = check.Check(
    name="needle",
    arguments=(check.DATA, check.BATCH_SIZE, "contexts", "template"),
    refuse=_refuse,
    run=check.run_each("needle", _measure),
    extents=_extents,
    may_be_left_out=True,
    units={"trials": "trials"},
    more=lambda request: f"--contexts {request.limit} for the whole context",
    rows=lambda _: {
        "needle, exact": lambda f: check.grid_mean(f["needle"]["exact"]),
        "needle, reciprocal rank": lambda f: check.grid_mean(f["needle"]["rank"]),
    },
    signs={
        "positional confusion": score_sign(
            "needle",
            {"rank": 0.0, "exact": 0.0},
            "for distant tokens widen keys and values (--d-qk, --d-vo or --kv) and train stage II on blocks as long as "
            "the contexts in use (--set data.block_size=N)",
        )
    },
)
