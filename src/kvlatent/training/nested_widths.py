"""Several widths trained in one checkpoint: each step runs at one of them, the channels behind it set to 0.

Which one is drawn from the seed and the step's number alone, so a resumed run and every process of a run take the same.
Each width comes once in as many steps, in an order that is drawn anew. A masked forward costs what the whole one does, to
two products with a row of zeros and ones; gradients of masked channels are 0.
"""

from __future__ import annotations

import json
import random
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.jobs.atomic import read_json, write_text
from kvlatent.jobs.devices import precision
from kvlatent.model.channel_slices import first_channels, widths_at_share
from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import attention_layers_of
from kvlatent.model.layer_parts import parts_of
from kvlatent.model.projection import Projected
from kvlatent.selection.channel_order import apply_order, rank_channels

__all__ = ["NestedWidths", "put_in_order"]

ORDER = "channel_order.json"


class NestedWidths:
    """The widths that a stage trains, and which of them a step does.

    Args:
        model: latent, whose channels are in the order of their worth (`put_in_order`).
        shares: of the original's cache, of each width.
        seed: of the order in which they come.

    Raises:
        ValueError: a share is wider than the model, or too narrow for a head.
    """

    def __init__(self, model: PreTrainedModel, shares: list[float], seed: int) -> None:
        latent, self.layers = latent_config_of(model.config), attention_layers_of(model.config)
        self.turning = [latent.tables_at(layer)[0].rotary_dim for layer in self.layers]
        self.widths = [widths_at_share(latent, len(self.layers), kv, "stage2.nested_kv") for kv in shares]
        self.decoder, self.seed = model.get_decoder(), seed

    def index_at(self, step: int) -> int:
        """Which of the widths the step trains, steps numbered from 0."""
        turn, place = divmod(step, len(self.widths))
        order = list(range(len(self.widths)))
        random.Random(f"{self.seed} {turn}").shuffle(order)
        return order[place]

    @contextmanager
    def narrowed(self, step: int) -> Generator[None]:
        """Run every forward and backward inside at the step's width."""
        pairs = self.widths[self.index_at(step)].per_layer(len(self.layers))
        with ExitStack() as masked:
            for layer, turning, (d_qk, d_vo) in zip(self.layers, self.turning, pairs, strict=True):
                attention = parts_of(self.decoder, layer).attention
                if (d_qk, d_vo) != (attention.d_qk, attention.d_vo):
                    masked.enter_context(_masked(attention, turning, d_qk, d_vo))
            yield

    def summary(self) -> list[dict[str, Any]]:
        """Every width, as a record has it."""
        return [widths.to_dict() for widths in self.widths]


@contextmanager
def _masked(attention: Any, turning: int, d_qk: int, d_vo: int) -> Generator[None]:
    """Give a layer the queries of its first `d_qk` key channels and its first `d_vo` value directions, and 0 for the others.

    Keys stay whole: what meets a query of 0 adds nothing.
    """
    device = attention.o_proj.weight.device
    queries, values = torch.zeros(attention.d_qk, device=device), torch.zeros(attention.d_vo, device=device)
    queries[first_channels(attention.d_qk, turning, d_qk)] = 1
    values[:d_vo] = 1

    def project(hidden_states: Tensor) -> Projected:
        whole = type(attention).project(attention, hidden_states)
        query, value = whole.query * queries.to(whole.query.dtype), whole.value * values.to(whole.value.dtype)
        return whole._replace(query=query, value=value)

    attention.project = project
    try:
        yield
    finally:
        del attention.project


def put_in_order(model: PreTrainedModel, blocks: Any, folder: Path, dtype: str) -> None:
    """Order the channels of a model that is to be trained at several widths, in place, as an earlier call in `folder` did.

    A resumed run needs the very same order, which another number of threads might rank otherwise.

    Args:
        blocks: to train on; the first of them rank the channels.
        folder: of the stage.
        dtype: that the model runs in.
    """
    path = folder / ORDER
    if not path.is_file():
        with precision(str(model.device), dtype):
            ranks = rank_channels(model, blocks)
        write_text(path, json.dumps(ranks))
    apply_order(model, read_json(path, "delete the directory of the stage to train it anew"))
