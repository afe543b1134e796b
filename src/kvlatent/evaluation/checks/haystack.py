"""Needles and the text they are hidden in.

A needle is planted somewhere, asked for at the end, and answered by its value. It is made of random tokens, or written
in words from a template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvlatent.evaluation.sequences import ordinary_ids

__all__ = ["PlantedNeedle", "planted_rows", "random_needles", "written_needles"]

_ADJECTIVES = (
    *("old", "small", "quiet", "red", "cold", "gentle", "clever", "tired"),
    *("heavy", "bright", "green", "narrow", "empty", "early", "simple", "proud"),
)
_NOUNS = (
    *("sailor", "lamp", "river", "garden", "teacher", "window", "letter", "market"),
    *("horse", "bridge", "farmer", "basket", "tower", "kettle", "singer", "road"),
)


class PlantedNeedle(NamedTuple):
    """Token ids of what is planted (`planted`, which contains the value), asked (`question`) and answered (`value`)."""

    planted: list[int]
    question: list[int]
    value: list[int]

    @property
    def size(self) -> int:
        """Tokens of a sequence that are not haystack."""
        return sum(map(len, self))


def random_needles(
    tokenizer: Any, vocab_size: int, trials: int, length: int, cue_length: int, seed: int
) -> list[PlantedNeedle]:
    """A needle a trial of random ordinary tokens: `cue_length` that the question repeats, then `length` of value.

    Raises:
        ValueError: there is no cue.
    """
    if cue_length < 1:
        raise ValueError(
            f"the question repeats the needle's cue, so no cue is too short: got cue_tokens={cue_length}; try 4"
        )
    ids, needles = ordinary_ids(tokenizer, vocab_size), []
    for trial in range(trials):
        tokens = np.random.default_rng([seed, trial]).choice(ids, size=cue_length + length).tolist()
        needles.append(PlantedNeedle(tokens, tokens[:cue_length], tokens[cue_length:]))
    return needles


def written_needles(
    tokenizer: Any, trials: int, digits: int, template: str, seed: int
) -> list[PlantedNeedle]:
    """A needle a trial in words: {key} becomes an adjective and a noun, {value} a number of so many digits, wherever they stand.

    Raises:
        ValueError: the template lacks {key} before {value}, or its last token before the value depends on the value.
    """
    before, mark, after = template.partition("{value}")
    if not mark or "{key}" not in before:
        raise ValueError(
            f"the question is the template up to {{value}} and must name {{key}}: got {template!r}; "
            'try "The magic number for {key} is {value}."'
        )

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    needles = []
    for trial in range(trials):
        rng = np.random.default_rng([seed, trial])
        key = f"{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"
        asked, number = (
            before.replace("{key}", key),
            "".join(str(digit) for digit in rng.integers(0, 10, digits)),
        )
        whole = encode(asked + number)
        rest = after.replace("{key}", key).replace("{value}", number)
        question = encode(asked.rstrip())
        value = whole[len(question) :]
        if whole[: len(question)] != question or not value:
            raise ValueError(
                f"the value must begin a token of its own: in {template!r} it joins the text before it; "
                "put a space before {value}"
            )
        needles.append(PlantedNeedle(whole + (encode(rest) if rest else []), question, value))
    return needles


def planted_rows(
    needles: Sequence[PlantedNeedle],
    stream: np.ndarray,
    lead: list[int],
    context: int,
    depths: Sequence[float],
    seed: int,
) -> np.ndarray:
    """Sequences that end with question and value, int64 [trials * depths, context], a trial's depths side by side.

    Args:
        stream: haystack, int64 [N], read in a circle from a random place on, the same for all depths of a trial.
        lead: ids at the start of every sequence.
        depths: share of the haystack before the needle.
    """
    rows = []
    for trial, one in enumerate(needles):
        start = np.random.default_rng([seed, trial, context]).integers(len(stream))
        filler = stream[(start + np.arange(context - len(lead) - one.size)) % len(stream)].tolist()
        for depth in depths:
            at = round(depth * len(filler))
            rows.append([*lead, *filler[:at], *one.planted, *filler[at:], *one.question, *one.value])
    return np.array(rows, dtype=np.int64)
