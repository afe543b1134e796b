"""The four choices of a conversion: which channels are kept, turned by which table, with which gains and alignment,
and whether outputs are refitted. A preset is one set of answers; everything in between is another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .config import TABLE_SCOPES

__all__ = ["BY_PAIRS", "NO_DATA", "PAPER", "PRESETS", "Choices", "resolve_choices", "without_statistics"]


@dataclass(frozen=True)
class Choices:
    """What a conversion does: selection, table, gains and alignment, refit; and the basis of the values.

    Args:
        keys: which channel pairs stay: "stride" (paper), "matched", "gram" (search on the statistics), "energy"
            (MHA2MLA's rule), "weights" (energy of the weights alone).
        frequencies: "own" (each pair keeps the one it was trained with) or "frequency_aware" (paper).
        values: "slice" (paper), "svd" (of the value-output product) or "whitened" (by the statistics).
        scale: of the softmax: "original" (folded into W_Q) or "d_qk" (the paper's 1/sqrt(d_qk)).
        table: who shares kept pairs chosen by "gram", "energy" or "weights": "head", "layer" or "model".
        gains: scale kept pairs per query head to make up for dropped ones.
        refit: regress W_O on what the converted layer puts out.
        align: steps of attention alignment, and of output alignment, a layer; 0 turns both off.
    """

    keys: str = "stride"
    frequencies: str = "own"
    values: str = "svd"
    scale: str = "original"
    table: str = "head"
    gains: bool = False
    refit: bool = False
    align: int = 0

    @property
    def needs_statistics(self) -> bool:
        """Whether any of the choices looks at text."""
        return (
            self.keys in ("gram", "energy")
            or self.values == "whitened"
            or self.gains
            or self.refit
            or self.align > 0
        )


PAPER = Choices(keys="stride", frequencies="frequency_aware", values="slice", scale="d_qk", table="model")
PRESETS = {
    "calibrated": Choices(keys="gram", values="whitened", gains=True, refit=True, align=200),
    "paper": PAPER,
    "own-frequency": Choices(table="model"),
}
NO_DATA = (
    "no text to calibrate on: channel pairs are chosen by their weights and values by the plain SVD, without gains, "
    "refit or alignment; at half the cache that costs several times the loss of the calibrated conversion, so give "
    "--data FILE"
)
_ALLOWED = {
    "keys": ("stride", "matched", "gram", "energy", "weights"),
    "frequencies": ("own", "frequency_aware"),
    "values": ("slice", "svd", "whitened"),
    "table": TABLE_SCOPES,
}
BY_PAIRS = ("gram", "energy", "weights")


def resolve_choices(
    preset: str = "calibrated",
    keys: str | None = None,
    frequencies: str | None = None,
    values: str | None = None,
    *,
    table: str | None = None,
    align: int | None = None,
    gains: bool | None = None,
    refit: bool | None = None,
) -> Choices:
    """A preset with single choices replaced; whatever is no longer the paper's keeps the original softmax scale.

    Raises:
        ValueError: unknown preset or choice, or choices that contradict each other.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    given = {"keys": keys, "frequencies": frequencies, "values": values, "table": table}
    for name, value in given.items():
        if value is not None and value not in _ALLOWED[name]:
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(_ALLOWED[name])}")
    if align is not None and align < 0:
        raise ValueError(f"alignment takes 0 steps (off) or more: got align={align}; try 200")
    replaced: dict[str, Any] = given | {"align": align, "gains": gains, "refit": refit}
    choices = replace(
        PRESETS[preset], **{name: value for name, value in replaced.items() if value is not None}
    )
    if choices.keys in BY_PAIRS and choices.frequencies != "own":
        raise ValueError(
            f"pairs chosen by {choices.keys!r} keep their own frequencies: got frequencies={choices.frequencies!r}; "
            "use frequencies=own, or keys=stride"
        )
    if choices.keys not in BY_PAIRS and table in ("head", "layer"):
        raise ValueError(
            f"keys={choices.keys!r} takes the same channels everywhere, so there is one table for the model: got "
            f"table={table!r}; leave it out, or use the preset calibrated"
        )
    if choices.keys not in BY_PAIRS:
        choices = replace(choices, table="model")
    return choices if choices == PAPER else replace(choices, scale="original")


def without_statistics(choices: Choices) -> Choices:
    """The same without text: pairs by their weights, values by the plain SVD, no gains, refit or alignment."""
    keys = "weights" if choices.keys in ("gram", "energy") else choices.keys
    values = "svd" if choices.values == "whitened" else choices.values
    return replace(choices, keys=keys, values=values, gains=False, refit=False, align=0)
