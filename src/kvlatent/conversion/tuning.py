"""Adam on a few parameters of one layer, keeping what does best on held-out blocks.

Shapes: T positions of a block, R sampled query rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kvlatent.model.projection import Rows

__all__ = ["BLOCKS", "TunableRows", "tune"]

BLOCKS = 4
"""Text blocks of a step."""

_RATE = 0.75  # Adam's rate for weights of root mean square 1 and a fan-in of 1, see `_rate_of`
_ROWS = 128
_EVALUATIONS = 8
_PATIENCE = 3
_ATTEMPTS, _SLOWER = 3, 0.25  # at falling rates, until one does better than the start

TunableRows = list[tuple[nn.Parameter, Rows]]
"""Parameters to tune, each with the rows that may change."""


def tune(
    chosen: TunableRows,
    loss: Callable[[list[int], Tensor], Tensor],
    positions: Tensor,
    held_out: list[int],
    *,
    fan_in: int,
    steps: int,
    seed: int,
    progress: Callable[[], None],
    rate: float = 1.0,
    together: int = BLOCKS,
) -> dict[str, float]:
    """Adam on a cosine, keeping the parameters that did best on held-out blocks; stops when they do no better.

    Where none did better than the start, it starts again at a quarter of the rate, and at a quarter of that.

    Args:
        chosen: what to tune; everything else stays as it is.
        loss: of some blocks at sampled query rows [len(blocks), R].
        positions: [blocks, T]; held_out: indices of the blocks that only measure.
        fan_in: of the vectors among the parameters (biases, norms), which scales their rate.
        steps: of the first attempt at most; each of the others takes what it left, or a third of it; seed: of the
            sampling; progress: called after each.
        rate: times the rate that goes by the weights' size.
        together: blocks of a step.

    Returns:
        The loss on the held-out blocks "before" and "after".
    """
    generator = torch.Generator().manual_seed(seed)
    learnt = [block for block in range(len(positions)) if block not in set(held_out)]

    def sample(count: int) -> Tensor:
        picks = [torch.randperm(positions.shape[1], generator=generator)[:_ROWS] for _ in range(count)]
        return torch.stack(picks).to(positions.device)

    held = [held_out[i : i + together] for i in range(0, len(held_out), together)]
    fixed = [(blocks, sample(len(blocks))) for blocks in held]

    @torch.no_grad()
    def measured() -> float:
        total = sum(float(loss(blocks, rows)) * len(blocks) for blocks, rows in fixed)
        return total / max(1, len(held_out))

    def batches() -> Iterator[tuple[list[int], Tensor]]:
        order: list[int] = []
        while True:
            if len(order) < together:
                order += torch.randperm(len(learnt), generator=generator).tolist()
            blocks, order = [learnt[b] for b in order[:together]], order[together:]
            yield blocks, sample(len(blocks))

    with _unfreeze(chosen) as parameters:
        before = best = measured()
        start, left = [p.detach().clone() for p in parameters], steps
        kept = start
        for attempt in range(_ATTEMPTS if steps else 0):
            rates = [rate * _SLOWER**attempt * _rate_of(p, fan_in) for p in start]
            run = _Descent(parameters, rates, loss, batches(), measured if held else None)
            best, kept = run.go(max(left, steps // _ATTEMPTS, 1), best, kept, progress)
            if best < before or not held:
                break
            left -= run.taken
            _put(parameters, start)
        _put(parameters, kept)
    return {"before": before, "after": best}


class _Descent:
    """Adam on a cosine, from the parameters as they are.

    Args:
        parameters, rates: what learns, and how fast.
        loss: of blocks and rows; batches: those of every step.
        measured: the loss on held-out blocks; None without any, and then the last parameters are the best.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        rates: list[float],
        loss: Callable[[list[int], Tensor], Tensor],
        batches: Iterator[tuple[list[int], Tensor]],
        measured: Callable[[], float] | None,
    ) -> None:
        self.parameters, self.rates, self.loss = parameters, rates, loss
        self.batches, self.measured, self.taken = batches, measured, 0

    def go(
        self, steps: int, best: float, kept: list[Tensor], progress: Callable[[], None]
    ) -> tuple[float, list[Tensor]]:
        """Take at most so many steps; returns the least held-out loss and its parameters, or those that were given."""
        groups = [{"params": [p], "lr": r} for p, r in zip(self.parameters, self.rates, strict=True)]
        optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
        every, last, waited = max(1, steps // _EVALUATIONS), best, 0
        for step in range(1, steps + 1):
            optimiser.zero_grad()
            self.loss(*next(self.batches)).backward()
            optimiser.step()
            schedule.step()
            self.taken += 1
            progress()
            if step % every and step != steps:
                continue
            now = best if self.measured is None else self.measured()
            if now < best or self.measured is None:
                best, kept = now, [p.detach().clone() for p in self.parameters]
            # Against the last one, not the best: a rate that is high at first often pays only once it has come down.
            waited = 0 if now < last or self.measured is None else waited + 1
            if waited == _PATIENCE:
                break
            last = now
        return best, kept


@torch.no_grad()
def _put(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _rate_of(parameter: Tensor, fan_in: int) -> float:
    """Adam's rate: a step moves a weight by its rate whatever the gradient, so it goes by the weights' own size.

    What a step changes in the output grows with the fan-in, what the output is with its root: hence size / root of the
    fan-in (maximal update parametrisation, Yang et al. 2022). 3e-3 for 256 inputs at the usual size of 1 / 16.
    """
    if parameter.dim() < 2:
        return _RATE / fan_in
    return _RATE * float(parameter.detach().float().square().mean().sqrt()) / math.sqrt(parameter.shape[-1])


def _rate(step: int, steps: int) -> float:
    """A short warm-up, then a cosine to 0."""
    return min(1.0, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


@contextmanager
def _unfreeze(chosen: TunableRows) -> Generator[list[nn.Parameter]]:
    """Make the chosen rows learn and nothing else; freeze all again afterwards."""
    masks: dict[nn.Parameter, Tensor] = {}
    for parameter, rows in chosen:
        mask = masks.setdefault(parameter, torch.zeros_like(parameter))
        mask[rows] = 1
    hooks = []
    for parameter, mask in masks.items():
        parameter.requires_grad_(True)
        if not bool(mask.all()):
            hooks.append(parameter.register_hook(lambda gradient, mask=mask: gradient * mask))
    try:
        yield list(masks)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in masks:
            parameter.requires_grad_(False)
            parameter.grad = None
