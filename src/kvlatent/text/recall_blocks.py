"""Blocks that ask for recall, made of a text's own tokens, in the place of some of its blocks.

Why: steps on natural text buy perplexity and lose exact recall first, as little of such a text can only be had by looking
far back. Two kinds in turn, each block one document: *spans* (text, then copies of spans of it with text between) and
*look-ups* (lines of a name, a colon and a value; text; then the same lines in other orders). Neither teaches to a
test: spans lift look-ups, and look-ups lift copying.

The blocks that only measure while the others are learnt from are chosen here, too, so that both get the same share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from kvlatent.model.head import IGNORED
from kvlatent.text.tokenise import frame_of

__all__ = [
    "RECALL_SHARE",
    "SMALLEST_BLOCK",
    "LineMarks",
    "held_out_blocks",
    "line_marks",
    "mix_recall_blocks",
    "recall_positions",
    "replace_by_recall",
    "why_no_recall",
]

RECALL_SHARE = 0.25
"""Of the blocks, where nothing else is asked for."""

SMALLEST_BLOCK = 192
"""Tokens; in fewer, six lines of the longest do not always fit twice beside the text around them."""

_HELD_OUT = 16  # one block in so many only measures,
_MEASURING = 8  # and about so many are enough

_JUMP = 0.3  # probability that a piece of text does not follow the one before
_SPAN = (16, 128)  # tokens of a copy,
_DISTANCE = 50  # which begins at least so many behind its source
_LINES = 6  # at least, and at most one in so many tokens of the block:
_TOKENS_A_LINE = 32
_BEFORE, _BETWEEN = 8, 16  # tokens of text before the lines, and before they come again; at least
_TRIES = 20  # for a name that is new and plain


class LineMarks(NamedTuple):
    """Token ids of the colon behind a name and of the newline behind a value; none where a tokenizer drops it."""

    colon: tuple[int, ...]
    newline: tuple[int, ...]


def line_marks(tokenizer: Any) -> LineMarks:
    """The marks as the tokenizer writes them behind a word (in front of one, some add a blank)."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def behind(mark: str) -> tuple[int, ...]:
        word, marked = ids("x"), ids("x" + mark)
        return tuple(marked[len(word) :] if marked[: len(word)] == word else ids(mark))

    return LineMarks(behind(":"), behind("\n"))


def held_out_blocks(count: int) -> list[int]:
    """Which of so many calibration blocks only measure, in order: the last of every stretch; none of a single block."""
    stride = max(_HELD_OUT, count // _MEASURING)
    return list(range(count))[stride - 1 :: stride] or ([count - 1] if count > 1 else [])


def recall_positions(count: int, share: float) -> tuple[list[int], list[int]]:
    """Which of so many blocks ask for recall: among those that are learnt from, and among those that only measure.

    Each is `share` of its side, spread evenly; of those that measure at least one, where any is learnt from.
    """
    measuring = held_out_blocks(count)
    learnt = sorted(set(range(count)) - set(measuring))
    first = _spread(learnt, round(share * len(learnt)))
    return first, _spread(measuring, max(1, round(share * len(measuring)))) if first else []


def _spread(places: Sequence[int], count: int) -> list[int]:
    """So many of the places, or all, at equal distances."""
    count = min(count, len(places))
    return [places[int((index + 0.5) * len(places) / count)] for index in range(count)]


def why_no_recall(count: int, size: int, share: float) -> str | None:
    """Why a share of `count` blocks of `size` tokens holds no recall block, with both numbers; None where it does."""
    if size < SMALLEST_BLOCK:
        return f"a recall block takes at least {SMALLEST_BLOCK} tokens: got blocks of {size}"
    if not recall_positions(count, share)[0]:
        return (
            f"recall blocks replace whole blocks: got a share of {share:g} of {count}, which is less than one"
        )
    return None


def replace_by_recall(
    blocks: Dataset, tokenizer: Any, *, share: float = RECALL_SHARE, seed: int = 0
) -> Dataset:
    """`blocks` with a share of them replaced by recall blocks made of their text; for `kvlatent.calibrate`.

    Args:
        blocks: with columns `input_ids`, `position_ids` and `labels`, [T] each, as `kvlatent.text` makes them.
        tokenizer: of the text.
        share: to replace, in [0, 1).
        seed: of the lengths and places.

    Returns:
        As many blocks of as many tokens, with a fourth column, `is_recall`; `blocks` themselves where `share` is 0.

    Raises:
        ValueError: a share outside [0, 1), or blocks too short or too few for one recall block.
    """
    if not 0 <= share < 1:
        raise ValueError(
            f"the share of recall blocks is at least 0 and less than 1: got {share:g}; try {RECALL_SHARE}"
        )
    if share == 0:
        return blocks
    columns = blocks.with_format("torch")[0 : len(blocks)]
    ids, positions, labels = (columns[name].clone() for name in ("input_ids", "position_ids", "labels"))
    if (reason := why_no_recall(*ids.shape, share)) is not None:
        raise ValueError(
            f"{reason}; give longer or more blocks (data.block_size, calibration.blocks, a model of a longer context, "
            "more text), or set calibration.recall=0"
        )
    before, after = frame_of(tokenizer)
    mixed, is_recall = mix_recall_blocks(
        ids.numpy(), line_marks(tokenizer), share=share, seed=seed, frame=(*before, *after)
    )
    ids, chosen = torch.from_numpy(mixed), torch.from_numpy(is_recall)
    positions[chosen] = torch.arange(ids.shape[1], dtype=positions.dtype)
    following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], 1).to(labels.dtype)
    labels[chosen] = following[chosen]
    made = {"input_ids": ids, "position_ids": positions, "labels": labels, "is_recall": chosen}
    return Dataset.from_dict({name: column.numpy() for name, column in made.items()}).with_format("torch")


def mix_recall_blocks(
    ids: np.ndarray, marks: LineMarks, *, share: float, seed: int, frame: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """A copy of the blocks ([B, T]) with recall blocks among them, and which they are (bool [B]); a pure function.

    Blocks that only measure are made of the text of such blocks alone, and so are those that are learnt from.

    Args:
        marks: of the lines of a look-up.
        share, seed: as for `replace_by_recall`; frame: ids around documents, left out, as a block is one document.
    """
    mixed, is_recall = ids.copy(), np.zeros(len(ids), dtype=bool)
    turn = 0
    measuring = held_out_blocks(len(ids))
    learnt = sorted(set(range(len(ids))) - set(measuring))
    for side, places in zip((learnt, measuring), recall_positions(len(ids), share), strict=True):
        plain = ~np.isin(ids[side], frame)
        starts = np.cumsum([0, *plain.sum(1)])
        text = ids[side][plain] if plain.any() else ids[side].ravel()
        for place in places:
            rng = np.random.default_rng([seed, place])
            source = _Source(text, int(starts[side.index(place)]), rng)
            made = _look_ups(source, ids.shape[1], marks) if turn % 2 else _spans(source, ids.shape[1])
            mixed[place], is_recall[place], turn = made, True, turn + 1
    return mixed, is_recall


class _Source:
    """Text that is read piece by piece from a place on; every piece may start elsewhere. Its end is followed by its start."""

    def __init__(self, text: np.ndarray, place: int, rng: np.random.Generator) -> None:
        self.text, self.place, self.rng = text, place, rng

    def read(self, least: int, most: int) -> list[int]:
        """The next `least` to `most` tokens."""
        if self.rng.random() < _JUMP:
            self.place = int(self.rng.integers(len(self.text)))
        count = self.draw(least, most)
        found = self.text.take(range(self.place, self.place + count), mode="wrap").tolist()
        self.place += count
        return found

    def draw(self, least: int, most: int) -> int:
        """A whole number, both ends included."""
        return int(self.rng.integers(least, max(least, most) + 1))


def _spans(source: _Source, size: int) -> list[int]:
    """Text, and again and again a copy of a span of it followed by more text."""
    block = source.read(32, 95)
    copied = [False] * len(block)
    while len(block) < size:
        start, length = _choose_span(np.array(copied), source.rng)
        text = source.read(16, 63)
        block += block[start : start + length] + text
        copied += [True] * length + [False] * len(text)
    return block[:size]


def _choose_span(copied: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Start and length of what is copied next: log-uniform up to the longest there is, then uniform; (0, 0) if none is.

    No span holds a token that is a copy, so few are longer than the text between two copies.
    """
    places = np.arange(len(copied))
    next_copy = np.minimum.accumulate(np.where(copied, places, len(copied))[::-1])[::-1]
    room = (next_copy - places)[: max(0, len(copied) - _DISTANCE + 1)]
    shortest, longest = _SPAN
    longest = min(longest, int(room.max(initial=0)))
    if longest < shortest:
        return 0, 0
    length = min(longest, int(math.exp(rng.uniform(math.log(shortest), math.log(longest + 1)))))
    return int(rng.choice(np.flatnonzero(room >= length))), length


def _look_ups(source: _Source, size: int, marks: LineMarks) -> list[int]:
    """Text; lines; text; then all lines again, in another order every time, with text between the rounds."""
    before = source.read(_BEFORE, 32)
    lines = _lines(source, size, marks)
    room = size - 2 * sum(map(len, lines))  # for text, so that every line comes again
    before = before[: max(_BEFORE, room - _BETWEEN)]
    between = source.read(_BETWEEN, min(size // 4, room - len(before)))
    block = [*before, *(token for line in lines for token in line), *between]
    while len(block) < size:
        for index in source.rng.permutation(len(lines)):
            block += lines[index]
        block += source.read(4, 32)
    return block[:size]


def _lines(source: _Source, size: int, marks: LineMarks) -> list[list[int]]:
    """Lines whose names differ, as many as are drawn, or as fit twice."""
    known: set[tuple[int, ...]] = set()
    lines: list[list[int]] = []
    wanted, room = source.draw(_LINES, size // _TOKENS_A_LINE), size - _BEFORE - _BETWEEN
    for _ in range(_TRIES * wanted):
        name, value = source.read(1, 3), source.read(3, 8)
        line = [*name, *marks.colon, *value, *marks.newline]
        is_plain = not set(name + value) & {*marks.colon, *marks.newline}
        if len(lines) == wanted or 2 * (sum(map(len, lines)) + len(line)) > room:
            break
        if tuple(name) not in known and is_plain:
            known.add(tuple(name))
            lines.append(line)
    return lines or [line]  # of a text of nothing but colons
