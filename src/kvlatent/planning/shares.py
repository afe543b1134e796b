"""What to say where a share of the cache has no widths: which shares and which widths do, and never a width that nobody
gave.

Some choices fit some widths only (a stride takes divisors of the head), so a share that is split evenly may have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvlatent.engines.facts import check_engine
from kvlatent.jobs.recipe import Conversion
from kvlatent.model.families import attention_layers_of, family_of, head_dim_of
from kvlatent.model.widths import Widths, width_per_layer
from kvlatent.planning.candidates import candidates_for, share_at_least
from kvlatent.selection.choices import BY_PAIRS, Choices
from kvlatent.selection.latent_config import build_latent_config, check_widths
from kvlatent.selection.pairs import check_shared_width

__all__ = ["check_latent", "share_without_widths"]

Fits = Callable[[int, int], bool]
"""Whether a conversion can have these d_qk and d_vo."""


def check_latent(
    config: Any,
    widths: Any,
    choices: Choices,
    conversion: Conversion,
    engine: str | None,
    *,
    kv: float | None,
    given: bool,
) -> Widths | None:
    """The widths, checked (None while they are open), once the model, the choices and the engine can have them.

    Args:
        config: of the original.
        widths: (d_qk, d_vo), each one number or one per layer; None while they are open.
        choices: of the conversion, `conversion` the recipe's section that they follow from.
        engine: that must run the result, or None.
        kv: share of the cache that the widths came from, None by default; given: they did not, users gave them.

    Raises:
        ValueError: the model, the choices or the engine cannot have the widths.
    """
    try:
        checked = _check(config, widths, choices, conversion.qk_norm, engine)
    except ValueError as error:
        sentence = None if given or kv == 1 else _share_refused(config, kv, choices, conversion, engine)
        if sentence is None:
            raise
        raise ValueError(sentence) from error
    return None if widths is None else checked


def _share_refused(
    config: Any, kv: float | None, choices: Choices, conversion: Conversion, engine: str | None
) -> str | None:
    """What to say where the even split of a share does not fit; None where no widths would."""
    head_dim = head_dim_of(config)

    def fits(d_qk: int, d_vo: int) -> bool:
        try:
            _check(config, (d_qk, d_vo), choices, conversion.qk_norm, engine)
        except ValueError:
            return False
        return True

    own = conversion.keys or conversion.frequencies or conversion.values
    what = "the conversion" if own else f"the preset {conversion.preset}"
    what += f" with engine {engine}" if engine else ""
    widths = candidates_for(head_dim, engine, choices.table).widths
    return share_without_widths(what, kv, widths, head_dim, fits)


def _check(config: Any, widths: Any, choices: Choices, qk_norm: str, engine: str | None) -> Widths:
    """The checked widths; raises `ValueError` unless model, choices and engine can have them (None: open, so all)."""
    checked = check_widths(config, *(widths or [head_dim_of(config)] * 2))
    each = width_per_layer(checked.d_qk, len(attention_layers_of(config)))
    if choices.keys in BY_PAIRS:
        check_shared_width(each, choices.table)
    pairs = tuple((tuple(range(width // 2)),) for width in each)  # any will do: only their number is checked
    build_latent_config(config, checked, choices, qk_norm=qk_norm, pairs=pairs)
    if qk_norm == "sliced" and family_of(config).qk_norm and choices.table == "head":
        raise ValueError(
            "a sliced QK-norm has one weight for all heads, so they must keep the same channels: got a rotary table per "
            "head; use --table layer or model, or qk_norm=full"
        )
    if engine is not None and widths is not None:
        check_engine(engine, *checked, choices.table, model_type=str(config.model_type))
    return checked


def share_without_widths(
    what: str, kv: float | None, widths: Sequence[int], head_dim: int, fits: Fits
) -> str | None:
    """One sentence: what fits instead of an even split of `kv`; None where nothing does, so the widths are not at fault.

    Args:
        what: that has no such widths, in words.
        kv: share of the cache to keep; None is half, by default.
        widths: that an even split may have, in channels, ascending.
        head_dim: original head width, channels.
        fits: see `Fits`.
    """
    share = 0.5 if kv is None else kv
    even = [width for width in widths if fits(width, width)]
    below = [width for width in even if width <= share * head_dim]
    above = [width for width in even if width > share * head_dim]
    near = [f"--kv {share_at_least(width / head_dim):g}" for width in (*below[-1:], *above[:1])]
    uneven = _uneven(share, widths, head_dim, fits)
    if uneven and sum(uneven) > 2 * max(below, default=0):
        kept = sum(uneven) / (2 * head_dim)
        near.append(f"--d-qk {uneven[0]} --d-vo {uneven[1]}, which keep {kept:.4g} of the cache")
    if not near:
        return None
    given = f"--kv {share:g}{' (the default)' if kv is None else ''}"
    return (
        f"{what} fits only some widths of a head, and none of them keeps {given} of both keys and values: got "
        f"head_dim={head_dim}; try {', or '.join(near)}"
    )


def _uneven(share: float, widths: Sequence[int], head_dim: int, fits: Fits) -> tuple[int, int] | None:
    """Different widths that keep the most of a share, neither side less than half of it; keys are the wider in a draw."""
    room, least = 2 * share * head_dim, share * head_dim / 2
    keys = [width for width in widths if width >= least and fits(width, head_dim)]
    values = [width for width in widths if width >= least and fits(head_dim, width)]
    pairs = [(d_qk, d_vo) for d_qk in keys for d_vo in values if d_qk != d_vo and d_qk + d_vo <= room + 1e-6]
    pairs.sort(key=lambda pair: (-sum(pair), abs(pair[0] - pair[1]), -pair[0]))
    return next((pair for pair in pairs if fits(*pair)), None)
