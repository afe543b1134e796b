"""Channel pairs of a conversion that is streamed: chosen layer by layer from what each shows while it is resident.

As a conversion in memory chooses them, which has the statistics or weights of all layers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvlatent.checkpoints.resident_layers import ResidentLayers
from kvlatent.conversion.convert_model import weight_energy
from kvlatent.model.families import effective_table, effective_tables, head_dim_of, key_value_heads_of
from kvlatent.selection.choices import Choices
from kvlatent.selection.pairs import Pairs, choose_pairs, strongest_pairs
from kvlatent.selection.statistics import Statistics
from kvlatent.selection.unrotated import selected_where_maps_have_no_place

__all__ = ["choose_some_pairs", "energy_of", "pairs_from_json", "resolve_unrotated"]


def resolve_unrotated(
    config: Any, choices: Choices, qk_norm: str, statistics: Statistics | None, *, has_text: bool
) -> Choices:
    """The choices, selecting unrotated channels where they cannot be factored.

    Args:
        config: of the original.
        statistics: where they are known already; has_text: otherwise they will be collected.
    """
    if statistics is not None:
        widths = {layer.unrotated_keys.shape[-1] for layer in statistics.layers}
    else:
        tables = effective_tables(config) if has_text else ()
        widths = {head_dim_of(config) - table.rotary_dim for table in tables}
    return selected_where_maps_have_no_place(choices, widths, qk_norm)


def energy_of(layers: ResidentLayers, index: int) -> Tensor:
    """What pairs are chosen by without text, of a layer whose attention is resident: [K, P]."""
    return weight_energy(layers.decoder, index, effective_table(layers.config, index).rotary_dim)


def choose_some_pairs(
    found: Sequence[Any], text: Any, config: Any, width: int | tuple[int, ...], choices: Choices
) -> Pairs:
    """Pairs by the statistics, or energies, of some layers.

    Args:
        found: `LayerStatistics`, or energies where the choices look at weights.
        text: a `StreamedText`; config: of the original.
    """
    if choices.keys == "weights":
        return strongest_pairs(list(found), width, choices.table)
    heads, size = key_value_heads_of(config), head_dim_of(config)
    seen = Statistics(tuple(found), text.input_ids, text.position_ids, "", heads, size)
    factored = choices.unrotated == "factored"
    return choose_pairs(seen, width, choices.table, choices.keys, factored=factored)


def pairs_from_json(listed: Any) -> Pairs:
    """Pairs from their JSON form."""
    return tuple(tuple(tuple(kept) for kept in layer) for layer in listed)
