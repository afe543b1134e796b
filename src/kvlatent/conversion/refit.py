"""W_O of one latent layer, refitted by ridge regression on what the converted layers below it give.

Shapes: D model width, F = num_attention_heads x d_vo inputs of W_O.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvlatent.conversion.alignment import TunedLayer
from kvlatent.jobs.devices import precision
from kvlatent.model.hidden_states import blocks_at_once, isolate_layer
from kvlatent.model.layer_parts import carried_share, parts_of

__all__ = ["refit_outputs"]

_SMALLEST = torch.finfo(torch.float32).tiny
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # of the mean diagonal; the last resort is no change at all


@dataclass
class _Moments:
    """Sums over tokens: y y^T [F, F], r y^T [D, F], in float64."""

    inner: Tensor
    missing: Tensor

    def add(self, y: Tensor, r: Tensor) -> None:
        self.inner += (y.T @ y).double()
        self.missing += (r.T @ y).double()

    def change(self, ridge: float) -> Tensor:
        """(sum r y^T)(sum y y^T + l I)^-1: what the ridge adds to W_O."""
        scale = ridge * self.inner.diagonal().mean() + torch.finfo(torch.float64).tiny
        eye = torch.eye(len(self.inner), dtype=torch.float64, device=self.inner.device)
        return torch.linalg.solve(self.inner + scale * eye, self.missing.T).T

    def gained(self, change: Tensor) -> float:
        """Sum of |r|^2 - |r - change y|^2: what a change of W_O takes off the squared error."""
        return float(2 * (change * self.missing).sum() - ((change @ self.inner) * change).sum())


@torch.no_grad()
def refit_outputs(tuned: TunedLayer) -> float | None:
    """Regress W_O towards itself: W_O + (sum r y^T)(sum y y^T + l I)^-1, in place in `tuned.attention`.

    y is what enters the converted W_O on the converted stream h', r what is then missing from o + c (h - h') (c = 1, see `carried_share`), so that the
    layer also takes back what those below it left (method: closed-form refit; towards the factored W_O, as a ridge
    towards zero would move a full-width one). Both are divided by their token's root mean square, as the
    next norm does, in o + c h or in what the converted model has in its place, whichever is larger: otherwise the few tokens
    of massive activation that most models have rule the sums, those above all that only one of the two makes massive. The
    ridge is the one of four that does best on the held-out blocks, and W_O stays as it is where none helps there: little
    text fits itself only.

    Args:
        tuned: with `latent` holding what was tuned so far; its stream "wanted" is o + c h.

    Returns:
        The ridge chosen, over the mean diagonal; None where W_O stayed.
    """
    module = parts_of(tuned.latent, tuned.index).attention.o_proj
    learnt, held = (_empty(module) for _ in range(2))
    for block, y, r in _missing(tuned, module):
        (held if block in tuned.held_out else learnt).add(y, r)
    ridge: float | None = _RIDGES[0]
    if tuned.held_out:
        gains = {ridge: held.gained(learnt.change(ridge)) for ridge in _RIDGES}
        best = max(_RIDGES, key=lambda ridge: gains[ridge])
        ridge = best if gains[best] > 0 else None
    if ridge is None:
        return None
    learnt.inner += held.inner
    learnt.missing += held.missing
    weight = tuned.attention.o_proj.weight
    weight.copy_((weight.double() + learnt.change(ridge)).to(weight.dtype))
    return ridge


def _empty(module: Any) -> _Moments:
    features = module.in_features
    like: dict[str, Any] = {"dtype": torch.float64, "device": module.weight.device}
    return _Moments(
        torch.zeros(features, features, **like), torch.zeros(module.out_features, features, **like)
    )


def _missing(tuned: TunedLayer, module: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For every block: its number, y [T, F] and r [T, D] in float32, each token over its size."""
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda m, args, output: seen.extend((args[0], output)))
    layer = isolate_layer(tuned.latent, tuned.index, attention_only=True)
    together = blocks_at_once(tuned.latent, tuned.positions.shape[1])
    try:
        for blocks in torch.arange(len(tuned.positions)).split(together):
            hidden, wanted = (tuned.streams[name].read(blocks.tolist()) for name in ("latent", "wanted"))
            with precision(hidden.device, tuned.dtype):
                layer(inputs_embeds=hidden, position_ids=tuned.positions[blocks], use_cache=False)
            y, given = (t.float() for t in seen)
            seen.clear()
            given = given + carried_share(tuned.latent.config) * hidden.float()
            size = torch.maximum(_root_mean_square(wanted.float()), _root_mean_square(given)).clamp(
                min=_SMALLEST
            )
            missing = wanted.float() - given
            yield from zip(blocks.tolist(), y / size, missing / size, strict=True)
    finally:
        hook.remove()


def _root_mean_square(tokens: Tensor) -> Tensor:
    """Over the channels, kept as one [..., T, 1]."""
    return tokens.square().mean(-1, keepdim=True).sqrt()
