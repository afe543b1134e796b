"""The four choices of a conversion: which channels are kept, turned by which table, with which gains and alignment,
and whether outputs are refitted. A preset is one set of answers; everything in between is another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kvlatent.model.config import TABLE_SCOPES

__all__ = [
    "BLIND",
    "BY_PAIRS",
    "NO_DATA",
    "PAPER",
    "PRESETS",
    "UNMEASURED",
    "Choices",
    "resolve_choices",
    "without_statistics",
]

_ALLOWED = {
    "keys": ("stride", "matched", "gram", "energy", "weights"),
    "frequencies": ("own", "frequency_aware"),
    "values": ("slice", "svd", "whitened"),
    "table": TABLE_SCOPES,
    "unrotated": ("selected", "factored"),
}
BY_PAIRS = ("gram", "energy", "weights")
FULL = "full"  # of keys or values in the record of a checkpoint: that side was not narrowed


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
        global_steps: of the pass over all layers at once; 0 leaves it out.
        unrotated: key channels that no rotation touches are "selected" in pairs like the others, or "factored", a low-rank
            map of them being cached; with keys="gram" only.
    """

    keys: str = "stride"
    frequencies: str = "own"
    values: str = "svd"
    scale: str = "original"
    table: str = "model"
    gains: bool = False
    refit: bool = False
    align: int = 0
    global_steps: int = 0
    unrotated: str = "selected"

    def __post_init__(self) -> None:
        """Raise `ValueError` for an unknown answer, or answers that contradict each other."""
        for name, values in _ALLOWED.items():
            given = getattr(self, name)
            if given not in values and not (given == FULL and name in ("keys", "values")):
                raise ValueError(f"unknown {name} {given!r}; choose one of {', '.join(values)}")
        if self.align < 0:
            raise ValueError(f"alignment takes 0 steps (off) or more: got align={self.align}; try 200")
        if self.global_steps < 0:
            raise ValueError(
                f"the global pass takes 0 steps (off) or more: got global_steps={self.global_steps}; try 100"
            )
        if self.unrotated == "factored" and self.keys != "gram":
            raise ValueError(
                f"unrotated channels are factored by statistics, beside rotated pairs chosen by them: got keys={self.keys!r}; use "
                "keys=gram or unrotated=selected"
            )
        if self.frequencies != "own" and (self.keys in BY_PAIRS or self.gains):
            what = (
                f"pairs chosen by {self.keys!r} keep"
                if self.keys in BY_PAIRS
                else "gains are for pairs that keep"
            )
            raise ValueError(
                f"{what} their own frequencies: got frequencies={self.frequencies!r}; use frequencies=own, or "
                "keys=stride without gains"
            )
        if self.keys not in BY_PAIRS and self.table != "model":
            raise ValueError(
                f"keys={self.keys!r} takes the same channels everywhere, so there is one table for the model: got "
                f"table={self.table!r}; leave it out, or use the preset calibrated"
            )

    @property
    def needs_statistics(self) -> bool:
        """Whether any of the choices looks at text."""
        return self.keys in ("gram", "energy") or self.values == "whitened" or self.gains or self.tunes

    @property
    def tunes(self) -> bool:
        """Whether weights are fitted to the text, beyond the closed form of a layer alone."""
        return self.refit or self.learns_from_text

    @property
    def learns_from_text(self) -> bool:
        """Whether steps are taken on the text, which then needs blocks that ask for recall."""
        return self.align > 0 or self.global_steps > 0


PAPER = Choices(keys="stride", frequencies="frequency_aware", values="slice", scale="d_qk")
PRESETS = {
    "calibrated": Choices(
        keys="gram",
        values="whitened",
        table="head",
        gains=True,
        refit=True,
        align=200,
        global_steps=64,
        unrotated="factored",
    ),
    "paper": PAPER,
    "own-frequency": Choices(),
}
NO_DATA = (
    "no text to calibrate on: channel pairs are chosen by their weights and values by the plain SVD, without gains, "
    "refit or alignment; at half the cache such a conversion multiplies the perplexity of a real model hundreds of times "
    "(SmolLM2-135M-Instruct from 4-bit weights: x1,388 with the preset own-frequency), where the calibrated one doubles "
    "it, so give --data FILE"
)
BLIND = (
    "a conversion that looks at no text leaves noise until it is trained: at half the cache the perplexity of "
    "SmolLM2-135M-Instruct (from 4-bit weights) rose x1,388 with the preset own-frequency and x625 to x1,007 with paper "
    "(of toy models: x1.4 to x2.3); train the result, or give --data FILE with the preset calibrated"
)
UNMEASURED = (
    "nothing is measured, as there is no text to measure on; give --data FILE or --eval-data FILE, or run `kvlatent eval "
    "OUT --against MODEL` afterwards"
)


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
    global_steps: int | None = None,
) -> Choices:
    """A preset with single choices replaced; whatever is no longer the paper's keeps the original softmax scale.

    Without alignment (0 steps) there is no global pass either, unless its steps are named: statistics alone.

    Raises:
        ValueError: unknown preset or choice, or choices that contradict each other.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    start = PRESETS[preset]
    if align == 0 and global_steps is None:
        global_steps = 0  # statistics alone
    if table is None and keys is not None and (keys in BY_PAIRS) != (start.keys in BY_PAIRS):
        table = "head" if keys in BY_PAIRS else "model"
    if gains is None and frequencies not in (None, "own"):
        gains = False  # they make up for dropped pairs, and here none keeps its turn
    given = {
        "unrotated": "selected" if keys not in (None, "gram") else None,
        "keys": keys,
        "frequencies": frequencies,
        "values": values,
        "table": table,
    }
    replaced: dict[str, Any] = given | {
        "align": align,
        "gains": gains,
        "refit": refit,
        "global_steps": global_steps,
    }
    choices = replace(start, **{name: value for name, value in replaced.items() if value is not None})
    return choices if choices == PAPER else replace(choices, scale="original")


def without_statistics(choices: Choices) -> Choices:
    """The same without text: pairs by their weights, values by the plain SVD, no gains, refit or alignment."""
    keys = "weights" if choices.keys in ("gram", "energy") else choices.keys
    values = "svd" if choices.values == "whitened" else choices.values
    return replace(
        choices,
        keys=keys,
        values=values,
        gains=False,
        refit=False,
        align=0,
        global_steps=0,
        unrotated="selected",
    )
