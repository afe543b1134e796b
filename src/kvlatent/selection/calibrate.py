"""One pass over text that collects what selection, factoring, alignment and planning need to know of a model.

The model runs as its full-width latent twin (exact, sharing every tensor), whose attention modules speak one language
for all families. Hooks look at what enters and leaves them; nothing is kept but sums.

Shapes: N query heads, K key-value heads, G = N / K, d head width, P = d / 2 channel pairs, T positions, R sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kvlatent.jobs.devices import check_product_dtype
from kvlatent.jobs.devices import precision as autocast
from kvlatent.jobs.fingerprints import model_fingerprint
from kvlatent.jobs.progress import Progress
from kvlatent.model.assembly import full_width
from kvlatent.model.families import attention_layers_of
from kvlatent.model.hidden_states import HiddenStates, blocks_at_once, isolate_layer
from kvlatent.model.layer_parts import parts_of
from kvlatent.model.wrappers import text_model_of
from kvlatent.selection.moment_sums import MomentSums
from kvlatent.selection.statistics import LayerStatistics, Statistics

__all__ = ["calibrate", "calibrate_layer", "sample_rows"]


@torch.no_grad()
def calibrate(
    model: Any,
    blocks: Any,
    *,
    rows: int = 32,
    seed: int = 0,
    precision: str = "float32",
    progress: Progress | Callable[[int, int], None] | None = None,
) -> Statistics:
    """Statistics of `model` over `blocks`; the model is left as it was.

    Args:
        model: the original, a causal language model of a supported family, or a multimodal one around such.
        blocks: from `kvlatent.text`, or anything whose `[i : j]` has `input_ids` and `position_ids`, [j - i, T];
            positions that restart at 0 separate documents. Blocks with a true `is_recall` [j - i] are counted (they come
            from `kvlatent.text.recall_blocks.replace_by_recall`: text for a conversion that aligns).
        rows: query positions sampled a block for the Gram matrices; 0 < rows. Memory and time grow with
            rows x T, not with T squared.
        seed: of the sampling.
        precision: of the products of the forward pass, "float32" or "bfloat16"; all sums are float32 or float64.
        progress: told after every block; a function is called with the blocks done and their number.

    Raises:
        ValueError: too little text for the rank of the statistics, activations that are not finite, or a model that
            is not supported, or the precision is not one of the device.
    """
    model = text_model_of(model)
    twin = full_width(model).eval()
    columns = blocks[0 : len(blocks)] if not isinstance(blocks, dict) else blocks
    names = ("input_ids", "position_ids")
    ids, positions = (torch.as_tensor(columns[name]) for name in names)
    decoder = twin.get_decoder()
    attentions = [parts_of(decoder, layer).attention for layer in attention_layers_of(model.config)]
    sampled = sample_rows(*ids.shape, rows, attentions[0].o_proj.in_features, seed)
    sums = [MomentSums(attention, decoder) for attention in attentions]
    told = Progress.of(progress, ("done", "total"))
    counter = told.step("calibrate", len(ids), tokens=ids.shape[1])
    size = blocks_at_once(decoder, ids.shape[1])
    with ExitStack() as hooks:
        for one in sums:
            hooks.enter_context(one.watching())
        hooks.enter_context(autocast(model.device, check_product_dtype(precision, model.device)))
        for start in range(0, len(ids), size):
            batch = [t[start : start + size] for t in (ids, positions)]
            for one in sums:
                one.rows, one.positions = sampled[start : start + size], batch[1].to(model.device)
            given = decoder(
                **dict(zip(names, (t.to(model.device) for t in batch), strict=True)), use_cache=False
            )
            _check_finite(sums, given.last_hidden_state, start)
            counter.advance(len(batch[0]))
    return Statistics(
        tuple(one.finish() for one in sums),
        ids.to("cpu", torch.int32),
        positions.to("cpu", torch.int32),
        model_fingerprint(model),
        attentions[0].num_key_value_heads,
        attentions[0].d_qk,
        int(torch.as_tensor(columns.get("is_recall", 0)).sum()),
    )


def sample_rows(blocks: int, length: int, rows: int, needed: int, seed: int) -> Tensor:
    """Which query rows of every block the Gram matrices look at: [blocks, rows], sorted.

    Args:
        rows: a block; needed: tokens, the rank of the largest statistic.

    Raises:
        ValueError: no rows, or too little text.
    """
    if rows < 1:
        raise ValueError(f"calibration samples at least 1 query row a block: got rows={rows}; try 32")
    if blocks * length < needed:
        raise ValueError(
            f"calibration needs at least num_attention_heads x head_dim = {needed} tokens, the rank of its largest "
            f"statistic: got {blocks * length}; give more text or more blocks"
        )
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randperm(length, generator=generator)[:rows].sort().values for _ in range(blocks)]
    return torch.stack(picks)


@torch.no_grad()
def calibrate_layer(
    decoder: Any,
    index: int,
    inputs: HiddenStates,
    positions: Tensor,
    rows: Tensor,
    outputs: HiddenStates | None = None,
) -> LayerStatistics:
    """What `calibrate` collects of one layer of a full-width twin, to the bit, from the hidden states before it.

    Args:
        decoder: the twin's; only that layer needs weights.
        inputs: [blocks, T, D]; outputs: gets the hidden states behind the layer; None where nobody needs them.
        positions: [blocks, T], on the device; rows: from `sample_rows`.

    Raises:
        ValueError: activations that are not finite.
    """
    sums = MomentSums(parts_of(decoder, index).attention, decoder)
    layer = isolate_layer(decoder, index, attention_only=outputs is None)

    def behind() -> Iterator[Tensor]:
        for some in torch.arange(len(positions)).split(blocks_at_once(decoder, positions.shape[1])):
            sums.rows, sums.positions = rows[some], positions[some]
            hidden = inputs.read(some.tolist())
            given = layer(inputs_embeds=hidden, position_ids=positions[some], use_cache=False)
            _check_finite([sums], given.last_hidden_state, int(some[0]), index)
            yield given.last_hidden_state

    with sums.watching():
        if outputs is None:
            for _ in behind():
                pass
        else:
            outputs.write(behind())
    return sums.finish()


def _check_finite(sums: list[MomentSums], final: Tensor, start: int, first: int = 0) -> None:
    """Raise `ValueError` if activations of the blocks from `start` on are not finite; waits for the device once.

    Args:
        sums: of the layers from `first` on; final: hidden states behind them.
    """
    found = torch.cat(
        [
            torch.stack([one.finite_sums() for one in sums]).flatten(),
            final.sum(dtype=torch.float64)[None],  # in float16 sums of finite numbers overflow
        ]
    )
    if bool(torch.isfinite(found).all()):
        return
    bad = torch.isfinite(final).flatten(1).all(1).logical_not().nonzero()
    block = start + (int(bad[0]) if len(bad) else 0)
    layer, what = divmod(int(torch.isfinite(found).logical_not().nonzero()[0]), 3)
    kind = ("queries", "keys", "attention outputs")[what] if layer < len(sums) else "final hidden states"
    raise ValueError(
        f"calibration met {kind} that are NaN or infinite (layer {first + min(layer, len(sums) - 1)}, block {block}); the weights "
        "are broken or the dtype overflows, try float32"
    )
