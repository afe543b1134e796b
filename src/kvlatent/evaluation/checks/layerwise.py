"""Two models layer by layer: how far the outputs are apart, and where attention looks.

Both run end to end, each on its own hidden states, so a layer's figures hold what the layers below it did. They go in
lockstep: the hidden states of one layer of both models are all that is in memory.

Shapes: B blocks of a batch, T positions, R sampled query rows, N query heads, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from kvlatent.model.assembly import full_width
from kvlatent.model.hidden_states import embed, isolate_layer
from kvlatent.model.layer_parts import final_norm, first_norm, parts_of
from kvlatent.selection.attention_rows import allowed, document_ids, row_logits

__all__ = ["LayerSums", "as_latent", "in_lockstep", "sampled_rows"]

_ROUNDING = 1e-9  # of a layer's energy: less than this is the rounding of an output that does not vary


def as_latent(model: Any) -> Any:
    """The model itself if its attention is ours, else its full-width twin: the same function, bit for bit."""
    return model if hasattr(model.config, "kv_latent") else full_width(model)


def sampled_rows(positions: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Query rows [B, R], first those that see another key than their own; drawn block by block, for any batch size."""
    documents = document_ids(positions)
    order = torch.stack([torch.rand(positions.shape[1], generator=generator) for _ in positions])
    order = order.to(positions.device, torch.float64)
    order[:, 1:] += (documents[:, 1:] == documents[:, :-1]).double()  # behind 1: a document's first positions
    return order.topk(min(rows, positions.shape[1]), dim=1).indices.sort(dim=1).values


def in_lockstep(
    pair: tuple[Any, Any], ids: Tensor, positions: Tensor, rows: Tensor, sums: dict[int, LayerSums]
) -> list[Tensor]:
    """Final hidden states [B, T, D] of both models, whose layers are compared on the way."""
    decoders = [model.get_decoder() for model in pair]
    hidden = [embed(decoder, ids) for decoder in decoders]
    norms = [
        *(first_norm(decoders[0], index) for index in range(1, len(decoders[0].layers))),
        final_norm(decoders[0]),
    ]
    for index, following in enumerate(norms):
        for block in range(len(ids)) if index in sums else ():
            part = slice(block, block + 1)
            states = [h[part] for h in hidden]
            sums[index].add_rows(*_attention_rows(decoders, index, states, positions[part], rows[part]))
        hidden = [
            isolate_layer(decoder, index)(
                inputs_embeds=states, position_ids=positions, use_cache=False
            ).last_hidden_state
            for decoder, states in zip(decoders, hidden, strict=True)
        ]
        if index in sums:
            sums[index].add_outputs(*(following(states.float()).flatten(0, 1) for states in hidden))
    return [final_norm(decoder)(states) for decoder, states in zip(decoders, hidden, strict=True)]


def _attention_rows(
    decoders: list[Any], index: int, hidden: list[Tensor], positions: Tensor, rows: Tensor
) -> Iterator[Tensor]:
    """Log-attention [N, R, T] of both models in layer `index` of one block, and how many keys each row sees, [R]."""
    for decoder, states in zip(decoders, hidden, strict=True):
        attention, attention_norm, *_ = parts_of(decoder, index)
        normed = attention_norm(states)
        yield log_softmax(row_logits(attention, decoder, normed, positions, rows)[0], dim=-1)
    window = parts_of(decoders[0], index).attention.sliding_window
    yield allowed(positions, rows, window)[0].sum(-1)


class LayerSums:
    """Running sums of one layer, in float64."""

    def __init__(self) -> None:
        self.wrong = self.energy = 0.0
        self.total = torch.zeros((), dtype=torch.float64)
        self.tokens = self.rows = 0
        self.attention = torch.zeros(5, dtype=torch.float64)

    def add_outputs(self, wanted: Tensor, given: Tensor) -> None:
        """Outputs [n, D] of the original and of the latent layer, behind the next norm."""
        self.wrong += float((given - wanted).square().sum(dtype=torch.float64))
        self.energy += float(wanted.square().sum(dtype=torch.float64))
        self.total = self.total + wanted.sum(0, dtype=torch.float64).cpu()
        self.tokens += len(wanted)

    def add_rows(self, wanted: Tensor, given: Tensor, keys: Tensor) -> None:
        """Log-attention [N, R, T] of the original and of the latent layer; keys [R] seen, rows of one key left out."""
        chosen = keys > 1
        wanted, given = wanted[:, chosen], given[:, chosen]
        terms = (wanted.exp() * (wanted - given), -wanted.exp() * wanted, -given.exp() * given)
        means = [term.sum(-1, dtype=torch.float64).mean(0).cpu() for term in terms]
        shares = [mean / keys[chosen].double().log().cpu() for mean in means[1:]]
        self.attention += torch.stack([*means, *shares]).sum(1)
        self.rows += int(chosen.sum())

    def finish(self) -> dict[str, float | None]:
        """Sums to means."""
        if self.rows == 0:
            raise ValueError(
                "attention is compared where a token sees 2 keys or more: 0 of the sampled rows do; give longer "
                "documents"
            )
        varying = self.energy - float((self.total / self.tokens).square().sum()) * self.tokens
        kl, original, latent, *uniformity = (self.attention / self.rows).tolist()
        return {
            "relative_error": self.wrong / max(varying, _ROUNDING * self.energy),
            "attention_kl": kl,
            "entropy_original": original,
            "entropy_latent": latent,
            "entropy_ratio": latent / original if original else None,
            "uniformity_original": uniformity[0],
            "uniformity_latent": uniformity[1],
        }
