"""What a conversion keeps: from widths and a preset to a `LatentConfig`; no weights are needed.

Keys: which channels, turned by which table. Values: which basis. Softmax: whose scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .config import LatentConfig, check_length, check_width
from .families import LATENT_PREFIX, effective_table, family_of, head_dim_of
from .rope import frequency_aware_table
from .select import latent_rotary_dim, matched_pairs, pairs_to_channels, stride_channels, stride_pairs
from .table import RotaryTable

__all__ = ["PRESETS", "Choices", "choose", "resolve_choices"]

Widths = int | list[int] | tuple[int, ...]


@dataclass(frozen=True)
class Choices:
    """What conversion keeps: `keys` "stride" or "matched", `frequencies` "own" or "frequency_aware", `values`
    "slice" or "svd", and the softmax `scale` "original" (folded into W_Q) or "d_qk" (the paper's 1/sqrt(d_qk))."""

    keys: str = "stride"
    frequencies: str = "own"
    values: str = "svd"
    scale: str = "original"


PAPER = Choices(keys="stride", frequencies="frequency_aware", values="slice", scale="d_qk")
PRESETS = {"paper": PAPER, "own-frequency": Choices()}
_ALLOWED = {
    "keys": ("stride", "matched"),
    "frequencies": ("own", "frequency_aware"),
    "values": ("slice", "svd"),
}


def resolve_choices(
    preset: str = "paper", keys: str | None = None, frequencies: str | None = None, values: str | None = None
) -> Choices:
    """A preset with single choices replaced; whatever is no longer the paper's keeps the original softmax scale.

    Raises:
        ValueError: unknown preset or choice.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    given = {"keys": keys, "frequencies": frequencies, "values": values}
    for name, value in given.items():
        if value is not None and value not in _ALLOWED[name]:
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(_ALLOWED[name])}")
    choices = replace(PRESETS[preset], **{name: value for name, value in given.items() if value is not None})
    return choices if choices == PAPER else replace(choices, scale="original")


def choose(
    config: Any, d_qk: Widths, d_vo: Widths, choices: Choices = PAPER, *, qk_norm: str = "full"
) -> LatentConfig:
    """The latent config for a source model's transformers config.

    Args:
        config: of the source model.
        d_qk, d_vo: widths, one number or one per layer; the head width leaves that side exactly as it is.
        choices: of channels, table, values and scale.
        qk_norm: for models with a QK-norm, "full" (normalise at full width, then keep d_qk channels: exact on what
            is kept) or "sliced" (normalise the kept channels, corrected by a constant: for stock engines).

    Raises:
        ValueError: a width is impossible for this model or these choices.
    """
    family = family_of(config)
    if str(config.model_type).startswith(LATENT_PREFIX):
        raise ValueError(
            f"the model is latent already (model_type {config.model_type!r}); convert the original checkpoint instead"
        )
    if qk_norm not in ("full", "sliced"):
        raise ValueError(f"unknown qk_norm {qk_norm!r}; choose one of full, sliced")
    head_dim = head_dim_of(config)
    key_width = _normalise("d_qk", d_qk, config.num_hidden_layers, head_dim)
    value_width = _normalise("d_vo", d_vo, config.num_hidden_layers, head_dim)
    table, theta = effective_table(config), float(config.rope_parameters["rope_theta"])
    kept = [_keep_keys(head_dim, width, table, theta, choices) for width in _each(key_width)]
    if choices.values == "slice":
        for width in _each(value_width):
            stride_channels("d_vo", width, head_dim)
    return LatentConfig(
        d_qk=key_width,
        d_vo=value_width,
        tables=tuple((new_table,) for _, new_table in kept),
        channels=tuple((channels,) for channels, _ in kept),
        original_head_dim=head_dim,
        original_model_type=family.model_type,
        keys="full" if key_width == head_dim else choices.keys,
        frequencies="own" if key_width == head_dim else choices.frequencies,
        values="full" if value_width == head_dim else choices.values,
        scale=choices.scale,
        qk_norm=qk_norm if family.qk_norm else "none",
    )


def _each(widths: int | tuple[int, ...]) -> tuple[int, ...]:
    return (widths,) if isinstance(widths, int) else widths


def _normalise(name: str, widths: Widths, num_layers: int, head_dim: int) -> int | tuple[int, ...]:
    """One validated number when all layers agree, else a validated tuple."""
    if not isinstance(widths, list | tuple):
        check_width(name, widths, head_dim)
        return widths
    check_length(name, widths, num_layers)
    for width in widths:
        check_width(name, width, head_dim)
    return widths[0] if len(set(widths)) == 1 else tuple(widths)


def _keep_keys(
    head_dim: int, d_qk: int, table: RotaryTable, theta: float, choices: Choices
) -> tuple[tuple[int, ...], RotaryTable]:
    """Kept key channels (rotated ones first) and their rotary table at width `d_qk`."""
    if d_qk == head_dim:
        return tuple(range(head_dim)), table
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
