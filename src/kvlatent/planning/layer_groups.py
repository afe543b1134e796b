"""Different widths in different layers: which layers go together and what each group of them gets.

Whoever serves the result wants few distinct shapes, so layers form at most three groups. For a given grouping the best
options are found exactly; the grouping is searched: all of them in shallow models, else cuts of the layers sorted by
how much they mind being narrow, improved by moving single layers.

Shapes: L layers, W options (here pairs of widths).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, combinations_with_replacement, product
from math import gcd

import numpy as np
from numpy.typing import NDArray

__all__ = ["GROUPS", "best_options", "group_layers"]

GROUPS = 3
_EXHAUSTIVE_LAYERS = 6
Array = NDArray[np.float64]
Counts = NDArray[np.int64]
Grouping = tuple[float, tuple[int, ...], tuple[int, ...]]  # error, option of each group, group of each layer


def group_layers(errors: Array, costs: Sequence[int], room: int) -> list[int]:
    """The option of each layer: at most three different ones, least summed error, summed cost at most `room`.

    Args:
        errors: [L, W], of each layer under each option.
        costs: W positive numbers.
        room: what all layers may cost together.

    Raises:
        ValueError: even the cheapest option is too dear for all layers.
    """
    _check_room(errors, costs, room)
    order = np.argsort(costs, kind="stable")
    ordered, cost = errors[:, order], np.asarray(costs)[order]
    starts = [min(_solve(ordered, cost, groups, room) for groups in part) for part in _groupings(ordered)]
    best = min(_move_layers(ordered, cost, start, room) for start in dict.fromkeys(starts))
    _, options, groups = best
    return [int(order[options[group]]) for group in groups]


def best_options(errors: Array, costs: Sequence[int], room: int) -> list[int]:
    """As `group_layers`, with as many different options as pay: exact, by dynamic programming over the room.

    Raises:
        ValueError: even the cheapest option is too dear for all layers.
    """
    _check_room(errors, costs, room)
    unit = gcd(*costs)
    prices, left = [cost // unit for cost in costs], room // unit
    least = np.zeros(left + 1)  # of the layers so far, by what they may cost
    chosen = np.zeros((len(errors), left + 1), dtype=np.int64)
    for layer, row in enumerate(errors):
        sums = np.full((len(prices), left + 1), np.inf)
        for option, (price, error) in enumerate(zip(prices, row, strict=True)):
            sums[option, price:] = least[: left + 1 - price] + error
        chosen[layer], least = sums.argmin(0), sums.min(0)
    options: list[int] = []
    for layer in reversed(range(len(errors))):
        options.append(int(chosen[layer, left]))
        left -= prices[options[-1]]
    return options[::-1]


def _check_room(errors: Array, costs: Sequence[int], room: int) -> None:
    if len(errors) * min(costs) > room:
        raise ValueError(
            f"{len(errors)} layers cost at least {min(costs)} each, {len(errors) * min(costs)} in all: got room for "
            f"{room}; give more room"
        )


def _solve(errors: Array, costs: Counts, groups: tuple[int, ...], room: int) -> Grouping:
    """The best options of a grouping; costs ascend."""
    last = np.flatnonzero(np.append(np.diff(costs), 1))  # where each cost occurs last
    members = np.array(groups) == np.arange(GROUPS)[:, None]
    sums = members.astype(float) @ errors
    curves, prices = [], []
    for size, total in zip(members.sum(1), sums, strict=True):
        # An empty group costs nothing, whatever it gets.
        curves.append(np.minimum.accumulate(total)[last] if size else np.zeros(1))
        prices.append(size * costs[last] if size else np.zeros(1, np.int64))
    left = room - prices[0][:, None] - prices[1][None, :]
    third = np.searchsorted(prices[2], left, side="right") - 1  # the dearest that the rest still pays for
    error = curves[0][:, None] + curves[1][None, :] + curves[2][np.maximum(third, 0)]
    error[third < 0] = np.inf
    flat = int(error.argmin())
    first, second = divmod(flat, error.shape[1])
    within = (first, second, int(third[first, second]))
    options = tuple(int(total[: last[end] + 1].argmin()) for total, end in zip(sums, within, strict=True))
    return float(error[first, second]), options, groups


def _groupings(errors: Array) -> Iterator[list[tuple[int, ...]]]:
    """Groups of the layers to try: all in shallow models, else the cuts of each of several orders of the layers."""
    num_layers, num_options = errors.shape
    if num_layers <= _EXHAUSTIVE_LAYERS:
        yield list(product(range(GROUPS), repeat=num_layers))
        return
    cheapest, middle = errors[:, 0], errors[:, num_options // 2]
    for sensitivity in (cheapest, middle, cheapest - middle, errors.mean(1)):
        ranks = sensitivity.argsort(kind="stable").argsort(kind="stable").tolist()
        cuts = combinations_with_replacement(range(num_layers + 1), 2)
        yield [tuple((rank >= low) + (rank >= high) for rank in ranks) for low, high in cuts]


def _move_layers(errors: Array, costs: Counts, best: Grouping, room: int) -> Grouping:
    """Move a layer to another group, or let two layers change places, as long as that lowers the error."""
    while True:
        solved = (_solve(errors, costs, groups, room) for groups in _neighbours(best[2]))
        better = next((one for one in solved if one[0] < best[0] * (1 - 1e-6)), None)
        if better is None:
            return best
        best = better


def _neighbours(groups: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for layer in range(len(groups)):
        for group in range(GROUPS):
            yield (*groups[:layer], group, *groups[layer + 1 :])
    for one, other in combinations(range(len(groups)), 2):
        if groups[one] != groups[other]:
            swapped = list(groups)
            swapped[one], swapped[other] = groups[other], groups[one]
            yield tuple(swapped)
