"""How much a bench measures where nobody said: contexts that two minutes on two cores hold, and caches that work here.

By the models' size alone, never by a clock; what was asked for is measured as asked. See `kvlatent.model.time_estimate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvlatent.evaluation.speed.caches import CACHES, cached_widths
from kvlatent.evaluation.speed.memory import read_bytes
from kvlatent.evaluation.speed.variants import UNTIMED
from kvlatent.model.families import key_value_heads_of
from kvlatent.model.time_estimate import (
    DEFAULT_SECONDS,
    affordable,
    assumed_speed,
    forward_operations,
    listed,
)

__all__ = ["CONTEXTS", "NEW_TOKENS", "REPEATS", "BenchExtent", "extent_of"]

CONTEXTS = (256, 1024, 4096)
NEW_TOKENS, REPEATS = 16, 5
_FEW_TOKENS, _FEW_REPEATS = 4, 3
_SHORT_CONTEXTS = (16, 32, 64, 128)

# A step that adds a token, measured on two cores: the weights are read, the cache copied or unpacked, layers called.
_READ_BYTES_PER_S = {"cpu": 8e9, "cuda": 5e11}
_LAYER_S, _COPIED_S, _UNPACKED_S = 5e-4, 2e-9, 2e-8  # the latter two a number of the cache


@dataclass(frozen=True)
class BenchExtent:
    """What is measured.

    Args:
        contexts, new_tokens, repeats: as in `bench`.
        seconds: of all cells, by the estimate.
        sentence: what is less than it would be for a small model, and how to get more; None where nothing is.
    """

    contexts: tuple[int, ...]
    new_tokens: int
    repeats: int
    seconds: float
    sentence: str | None = None


def extent_of(
    models: Sequence[Any],
    caches: Sequence[str],
    batches: Sequence[int],
    *,
    contexts: Sequence[int] | None,
    new_tokens: int | None,
    repeats: int | None,
    limit: int | None,
) -> BenchExtent:
    """Contexts, new tokens and rounds, where they are None; all of them as they are for a small model if contexts are given.

    Args:
        limit: the shortest context of the models; None where their configs name none.
    """
    new, rounds = new_tokens or NEW_TOKENS, repeats or REPEATS
    room = max(CONTEXTS) if limit is None else max(1, limit - new)
    if contexts is None:
        grid = _grid(room, (new_tokens or _FEW_TOKENS, new), (repeats or _FEW_REPEATS, rounds))
    else:
        grid = [(tuple(contexts), new, rounds)]
    costs = []
    for lengths, added, runs in grid:
        each = [
            _run_seconds(m, c, b, n, added) for m in models for c in caches for b in batches for n in lengths
        ]
        costs.append((runs + UNTIMED) * sum(each))
    at = affordable({"bench": costs}, DEFAULT_SECONDS)["bench"]
    chosen = BenchExtent(*grid[at], costs[at])
    return chosen if grid[at] == grid[-1] else BenchExtent(*grid[at], costs[at], _sentence(chosen, grid[-1]))


def _grid(
    room: int, new_tokens: tuple[int, int], repeats: tuple[int, int]
) -> list[tuple[tuple[int, ...], int, int]]:
    """What could be measured, ascending in time: contexts, new tokens, rounds."""
    (few, new), (short, rounds) = new_tokens, repeats
    lengths = sorted({min(context, room) for context in CONTEXTS})
    grid: list[tuple[tuple[int, ...], int, int]] = []
    grid += [((length,), few, short) for length in _SHORT_CONTEXTS if length < lengths[0]]
    grid += [((lengths[0],), few, short), ((lengths[0],), new, short)]
    grid += [(tuple(lengths[: number + 1]), new, rounds) for number in range(len(lengths))]
    return list(dict.fromkeys(grid))


def _run_seconds(model: Any, cache: str, batch: int, context: int, new_tokens: int) -> float:
    """Of reading a prompt and adding tokens once."""
    config, speed = model.config, assumed_speed(model.device, model.dtype)
    numbers = batch * context * key_value_heads_of(config) * sum(map(sum, cached_widths(config)))
    reading = read_bytes(model) / _READ_BYTES_PER_S.get(model.device.type, _READ_BYTES_PER_S["cpu"])
    step = max(reading, batch * forward_operations(model, 1, scored=True) / speed)
    step += config.num_hidden_layers * _LAYER_S
    if model.device.type == "cpu":
        step += numbers * (_COPIED_S if CACHES.get(cache) is None else _UNPACKED_S)
    return batch * forward_operations(model, context) / speed + new_tokens * step


def _sentence(chosen: BenchExtent, full: tuple[tuple[int, ...], int, int]) -> str:
    contexts, new_tokens, repeats = full
    parts = []
    if chosen.contexts != contexts:
        parts.append(f"contexts {listed(chosen.contexts)}, not {listed(contexts)}")
    for name, value, most in (
        ("new tokens", chosen.new_tokens, new_tokens),
        ("rounds", chosen.repeats, repeats),
    ):
        if value != most:
            parts.append(f"{value} of {most} {name}")
    aim = "for two minutes on two cores"
    if chosen.seconds > DEFAULT_SECONDS:
        aim = f"and yet it takes two cores {chosen.seconds / 60:.0f} min or more"
    wanted = ",".join(map(str, contexts))
    return f"measured by the models' size, {aim}: {', '.join(parts)}; give --contexts {wanted} for all"
