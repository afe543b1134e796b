"""How much the standard evaluation measures where nobody said: as much as two minutes on two cores hold.

A long context and a large model cost hours where a small one costs seconds, and a default that hangs is no default. The
extents come from a coarse grid and from the models' size alone, never from a clock: the same models are measured alike
on every machine of a kind, and small ones as fully as ever. What was asked for is measured as asked, however long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvlatent.evaluation.checks.needle import DEPTHS as NEEDLE_DEPTHS
from kvlatent.evaluation.checks.shuffling import AFTER, DEPTHS, SPANS
from kvlatent.model.time_estimate import (
    DEFAULT_SECONDS,
    affordable,
    assumed_speed,
    forward_operations,
    listed,
)

__all__ = ["CAUSALITY_TOKENS", "Extent", "extent_of"]

CAUSALITY_TOKENS = 32
_SHORT_CONTEXT = (
    128  # of the needle, beside the longest: both checks of position then take a minute, not five
)
_TOKENS = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
_BLOCKS = (2, 4, 8, 16, 32)
_NEEDLE_TRIALS = (2, 4, 8)
_SPANS_OF = ((64, 2), (128, 2), (256, 2), (256, 4), (256, 8), (256, 16))  # tokens of a window, trials
_CAUSALITY_ROWS = 10
_FIDELITY = 1.5  # of two scored passes: attention is compared row by row as well

Settings = dict[str, Any]
Levels = list[tuple[Settings | None, float]]
"""What could be measured, ascending, each with its seconds; None leaves the check out."""


@dataclass(frozen=True)
class Extent:
    """What is measured.

    Args:
        measured: of each check that is run, its settings: perplexity "max_tokens", fidelity "blocks", needle "contexts"
            and "trials", order "length" and "trials".
        seconds: by the estimate, on two cores or the GPU; without the text of a file, whose length is not known.
        sentence: what is less than it would be for a small model, and how to get more; None where nothing is.
    """

    measured: dict[str, Settings]
    seconds: float
    sentence: str | None

    def about(self) -> dict[str, Any]:
        """JSON-able: what was chosen, and why."""
        return {
            "measured": self.measured,
            "estimated_seconds": round(self.seconds, 1),
            "default_seconds": DEFAULT_SECONDS,
            "sentence": self.sentence,
        }


def extent_of(
    models: Sequence[Any],
    checks: Sequence[str],
    given: Mapping[str, Any],
    *,
    window: int,
    limit: int | None,
    optional: bool,
) -> Extent:
    """The extent of every check.

    Args:
        models: all that are measured; they share the time.
        checks: that are wanted.
        given: "data", "max_tokens" and "contexts", None where nobody chose.
        window: tokens of a window of perplexity and fidelity, and at most of order.
        limit: the shortest context of the models; None where their configs name none.
        optional: a check may be left out where even its smallest extent takes too long (nobody named it).
    """
    levels = {
        "perplexity": _perplexity(models, given, window),
        "fidelity": [({"blocks": n}, _FIDELITY * _seconds(models, window, n, scored=True)) for n in _BLOCKS],
        "needle": _needle(models, given["contexts"], limit),
        "order": _order(models, window),
        "causality": [
            ({}, _seconds(models, min(CAUSALITY_TOKENS, limit or CAUSALITY_TOKENS), _CAUSALITY_ROWS))
        ],
    }
    levels = {name: found for name, found in levels.items() if name in checks}
    asked = {"needle"} if given["contexts"] is not None else set()
    for name in {"fidelity", "needle", "order"} & set(levels) - asked if optional else ():
        levels[name] = [(None, 0.0), *levels[name]]
    at = affordable({name: [cost for _, cost in each] for name, each in levels.items()}, DEFAULT_SECONDS)
    chosen = {name: levels[name][at[name]] for name in levels}
    seconds = sum(cost for _, cost in chosen.values())
    less = {
        name: _told(name, settings, levels[name][-1][0])
        for name, (settings, _) in chosen.items()
        if settings != levels[name][-1][0]
    }
    measured = {name: settings for name, (settings, _) in chosen.items() if settings is not None}
    return Extent(measured, seconds, _sentence(less, seconds, limit) if less else None)


def _seconds(models: Sequence[Any], length: int, rows: float, *, scored: bool = False) -> float:
    """Of reading so many sequences with every model."""
    return rows * sum(
        forward_operations(model, length, scored=scored) / assumed_speed(model.device, model.dtype)
        for model in models
    )


def _perplexity(models: Sequence[Any], given: Mapping[str, Any], window: int) -> Levels:
    tokens = given["max_tokens"]
    if tokens is None and given["data"] is not None:
        return [({"max_tokens": None}, 0.0)]  # all of the user's text
    each = _seconds(models, window, 1 / window, scored=True)
    return [({"max_tokens": n}, n * each) for n in (_TOKENS if tokens is None else (tokens,))]


def _needle(models: Sequence[Any], contexts: Sequence[int] | None, limit: int | None) -> Levels:
    """Contexts of the short and one longer length, the longest the model's own; fewer trials where that is too much."""
    most = _NEEDLE_TRIALS[-1]
    if contexts is not None or limit is None:
        lengths = [length for length in contexts or () if length > 0]
        settings = {"contexts": contexts, "trials": most}
        return [(settings, sum(_seconds(models, n, most * len(NEEDLE_DEPTHS)) for n in lengths))]
    short = min(_SHORT_CONTEXT, limit)
    grid: list[tuple[tuple[int, ...], int]] = [((short,), trials) for trials in _NEEDLE_TRIALS]
    powers = [1 << power for power in range(short.bit_length(), limit.bit_length()) if 1 << power < limit]
    grid += [((short, longest), most) for longest in (*powers, limit) if longest > short]
    return [
        (
            {"contexts": list(lengths), "trials": trials},
            sum(_seconds(models, n, trials * len(NEEDLE_DEPTHS)) for n in lengths),
        )
        for lengths, trials in grid
    ]


def _order(models: Sequence[Any], window: int) -> Levels:
    levels: dict[tuple[int, int], float] = {}
    for length, trials in _SPANS_OF:
        length = min(length, window)
        keep = max(SPANS) + AFTER
        read = [max(1, round(keep + depth * (length - keep))) for depth in DEPTHS]
        levels[length, trials] = sum(_seconds(models, n, trials * (1 + len(SPANS))) for n in read)
    return [({"length": length, "trials": trials}, cost) for (length, trials), cost in levels.items()]


def _told(name: str, settings: Settings | None, full: Settings | None) -> str:
    """What is measured of a check, of what would be of a small model."""
    assert full is not None
    if settings is None:
        return f"{name} left out"
    parts = []
    for key, value in settings.items():
        if isinstance(value, list) and value != full[key]:
            parts.append(f"{key} of {listed(value)} tokens, not {listed(full[key])}")
        elif value != full[key]:
            parts.append(f"{value:,} of {full[key]:,} {_UNITS[key]}")
    return f"{name}: {', '.join(parts)}"


_UNITS = {
    "max_tokens": "tokens",
    "blocks": "blocks",
    "length": "tokens a window",
    "trials": "trials",
}


def _sentence(less: Mapping[str, str], seconds: float, limit: int | None) -> str:
    """All of it in one sentence, with the next step."""
    more = ["--checks NAME for one check in all of the time"]
    if "needle" in less:
        more.insert(0, f"--contexts {limit} for the whole context")
    if "perplexity" in less:
        more.insert(0, f"--max-tokens {_TOKENS[-1]} for all tokens")
    aim = "for two minutes on two cores"
    if seconds > DEFAULT_SECONDS:
        aim = f"and yet it takes two cores {seconds / 60:.0f} min or more"
    return f"measured by the models' size, {aim}: {'; '.join(less.values())}; give {', '.join(more)}"
