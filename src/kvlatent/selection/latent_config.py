"""What a conversion keeps: from widths and choices to a `LatentConfig`; no weights are needed."""

from __future__ import annotations

from typing import Any

from kvlatent.model.assembly import listed_layers
from kvlatent.model.config import Channels, LatentConfig, Tables
from kvlatent.model.families import (
    attention_layers_of,
    effective_tables,
    family_of_original,
    head_dim_of,
    rope_theta_of,
)
from kvlatent.model.rotary import frequency_aware_table
from kvlatent.model.table import RotaryTable
from kvlatent.model.widths import Width, Widths, width_per_layer
from kvlatent.selection.choices import BY_PAIRS, FULL, PAPER, Choices
from kvlatent.selection.pairs import Pairs
from kvlatent.selection.paper_rules import (
    latent_rotary_dim,
    matched_pairs,
    pairs_to_channels,
    stride_channels,
    stride_pairs,
)

__all__ = ["build_latent_config", "check_widths", "choose"]


def choose(
    config: Any,
    d_qk: Width,
    d_vo: Width,
    choices: Choices = PAPER,
    *,
    qk_norm: str = "full",
    pairs: Pairs | None = None,
) -> LatentConfig:
    """The latent config for a source model's transformers config.

    Args:
        config: of the source model.
        d_qk, d_vo: widths, one number or one per layer; the head width leaves that side exactly as it is.
        choices: of channels, table, values and scale.
        qk_norm: for models with a QK-norm, "full" (normalise at full width, then keep d_qk channels: exact on what
            is kept) or "sliced" (normalise the kept channels, corrected by a constant: for stock engines).
        pairs: the kept channel pairs by layer and key-value head, where `choices.keys` looks at statistics or weights.

    Raises:
        ValueError: a width is impossible for this model or these choices.
    """
    family_of_original(config)
    return build_latent_config(
        config, check_widths(config, d_qk, d_vo), choices, qk_norm=qk_norm, pairs=pairs
    )


def build_latent_config(
    config: Any, widths: Widths, choices: Choices, *, qk_norm: str = "full", pairs: Pairs | None = None
) -> LatentConfig:
    """What `choose` returns, at widths that `check_widths` has checked.

    Raises:
        ValueError: the widths are impossible for these choices, or the choices for this model.
    """
    family = family_of_original(config)
    if qk_norm not in ("full", "sliced"):
        raise ValueError(f"unknown qk_norm {qk_norm!r}; choose one of full, sliced")
    if qk_norm == "sliced" and family.gates_output:
        raise ValueError(
            f"a sliced QK-norm is for stock engines, and none runs {family.model_type!r} with a narrow cache (its attention has "
            "an output gate): got qk_norm='sliced'; use qk_norm=full"
        )
    head_dim = head_dim_of(config)
    key_width, value_width = widths
    for name, width, rule in (("d_qk", key_width, choices.keys), ("d_vo", value_width, choices.values)):
        if rule == FULL and width != head_dim:
            raise ValueError(
                f'the rule "full" keeps every channel, {head_dim} of them: got {name}={width}; name another rule'
            )
    tables, channels = _keys(config, key_width, choices, pairs)
    if choices.values == "slice":
        for width in width_per_layer(value_width):
            stride_channels("d_vo", width, head_dim)
    return LatentConfig(
        d_qk=key_width,
        d_vo=value_width,
        tables=tables,
        channels=channels,
        original_head_dim=head_dim,
        original_model_type=family.model_type,
        keys="full" if key_width == head_dim else choices.keys,
        frequencies="own" if key_width == head_dim else choices.frequencies,
        values="full" if value_width == head_dim else choices.values,
        scale=choices.scale,
        qk_norm=qk_norm if family.qk_norm else "none",
        layers=listed_layers(config),
        unrotated=choices.unrotated if key_width != head_dim else "selected",
    )


def check_widths(config: Any, d_qk: Width, d_vo: Width) -> Widths:
    """The widths, each one number where all layers agree, once they are known to fit a source model's config.

    Raises:
        ValueError: see `Widths.check`.
    """
    return Widths.check(d_qk, d_vo, head_dim_of(config), len(attention_layers_of(config)))


def _keys(
    config: Any, key_width: int | tuple[int, ...], choices: Choices, pairs: Pairs | None
) -> tuple[Tables, Channels]:
    """Tables and kept channels, by layer and key-value head."""
    head_dim, originals = head_dim_of(config), effective_tables(config)
    if choices.keys not in BY_PAIRS or key_width == head_dim:
        count = max(len(originals), len(width_per_layer(key_width)))
        kept = [
            _keep_keys(head_dim, width, table, rope_theta_of(config, layer), choices)
            for layer, width, table in zip(
                attention_layers_of(config)[:count],
                width_per_layer(key_width, count),
                _spread(originals, count),
                strict=True,
            )
        ]
        return tuple((new,) for _, new in kept), tuple((channels,) for channels, _ in kept)
    if pairs is None:
        raise ValueError(
            f"keys={choices.keys!r} needs the pairs that statistics or weights name; use convert(model, ...), or "
            "keys=stride"
        )
    whole = tuple(range(head_dim // 2))
    count = max(len(originals), len(pairs))
    widths, originals = width_per_layer(key_width, count), _spread(originals, count)
    kept_pairs = [
        (whole,) if width == head_dim else layer
        for width, layer in zip(widths, _spread(pairs, count), strict=True)
    ]
    layers = list(zip(originals, kept_pairs, strict=True))
    if choices.unrotated == "factored":
        layers = [
            (table, [tuple(pair for pair in pairs if pair < len(table.short)) for pairs in layer])
            for table, layer in layers
        ]
        return (
            tuple(tuple(table.subset(pairs) for pairs in layer) for table, layer in layers),
            tuple(
                tuple(_channels_before_maps(pairs, table.rotary_dim, width) for pairs in layer)
                for (table, layer), width in zip(layers, widths, strict=True)
            ),
        )
    return (
        tuple(tuple(table.subset(p) if p != whole else table for p in layer) for table, layer in layers),
        tuple(tuple(_channels(p, table.rotary_dim, head_dim) for p in layer) for table, layer in layers),
    )


def _channels_before_maps(pairs: tuple[int, ...], rotary_dim: int, width: int) -> tuple[int, ...]:
    """Kept channels of rotated pairs, then numbers for the maps of the others that fill the width."""
    return (
        *pairs_to_channels(pairs, rotary_dim),
        *range(rotary_dim, rotary_dim + width - 2 * len(pairs)),
    )


def _spread(entries: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """One entry for all layers, or one a layer, as one a layer."""
    return entries * count if len(entries) == 1 else entries


def _channels(pairs: tuple[int, ...], rotary_dim: int, head_dim: int) -> tuple[int, ...]:
    """Kept channels of `pairs`; all of them keep their original order."""
    if len(pairs) == head_dim // 2:
        return tuple(range(head_dim))
    return pairs_to_channels(pairs, rotary_dim, head_dim)


def _keep_keys(
    head_dim: int, d_qk: int, table: RotaryTable, theta: float, choices: Choices
) -> tuple[tuple[int, ...], RotaryTable]:
    """Kept key channels (rotated ones first) and their rotary table at width `d_qk`."""
    if d_qk == head_dim:
        return tuple(range(head_dim)), table
    if not table.rotary_dim:
        return stride_channels("d_qk", d_qk, head_dim), table
    rotary_dim = table.rotary_dim
    if choices.keys == "stride":
        stride_channels("d_qk", d_qk, head_dim, 4 if choices.frequencies == "frequency_aware" else 2)
    kept_rotary = latent_rotary_dim(head_dim, rotary_dim, d_qk)
    if choices.keys == "matched":
        pairs = matched_pairs(head_dim, d_qk, rotary_dim, kept_rotary)
    else:
        pairs = stride_pairs(rotary_dim // 2, kept_rotary // 2)
    passed = (
        stride_channels("d_qk", d_qk - kept_rotary, head_dim - rotary_dim) if head_dim > rotary_dim else ()
    )
    channels = (*pairs_to_channels(pairs, rotary_dim), *(rotary_dim + channel for channel in passed))
    if choices.frequencies == "own":
        return channels, table.subset(pairs)
    return channels, frequency_aware_table(table, kept_rotary, theta)
