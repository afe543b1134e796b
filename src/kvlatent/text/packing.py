"""Lay tokenised documents end to end, keep some out of training, and cut the rest into blocks.

Everything works on one flat array of ids that stays on disk; memory is bounded by a few blocks and
16 bytes per document.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from kvlatent.model.head import IGNORED

_CHUNK_TOKENS = 1 << 20


class Documents(NamedTuple):
    """Documents in the order of the flat array: tokens each, and a hash that equal documents share."""

    lengths: np.ndarray
    keys: np.ndarray


class Segments(NamedTuple):
    """Stretches of the flat array, each of one document: where they start, and their tokens."""

    starts: np.ndarray
    lengths: np.ndarray

    def tokens(self) -> int:
        return int(self.lengths.sum())


def hold_out(
    documents: Documents, share: float, block_size: int, name: str, least: int = 0
) -> tuple[Segments | None, Segments | None]:
    """Return what to train on and what to keep out; None where `share` leaves nothing to a side.

    A share that is less than `least` tokens is raised to them, though not beyond a quarter of the text.

    Whole documents are kept out in the order of their hashes, together with their copies, until the share
    is reached; those longer than the share are passed over. If they do not suffice, the end of the
    longest document is kept out, and its copies leave the training part.

    Raises:
        ValueError: a part is shorter than a block, or the text repeats too much to be parted.
    """
    ends = np.cumsum(documents.lengths)
    whole = Segments(ends - documents.lengths, documents.lengths)
    total = int(ends[-1])
    if total < block_size:
        raise ValueError(
            f"the text must fill a block: {name} has {total} tokens, block_size={block_size}; "
            "give more text or a smaller block_size"
        )
    if share in (0, 1):
        return (whole, None) if share == 0 else (None, whole)
    target = max(math.ceil(share * total), min(least, total // 4))
    if target < block_size or total - target < block_size:
        part, size = ("held-out", target) if target < block_size else ("training", total - target)
        raise ValueError(
            f"the {part} part must fill a block: held_out={share} of {total} tokens leaves it {size}, "
            f"block_size={block_size}; change held_out, give more text or a smaller block_size"
        )
    train, kept = _by_content(documents, whole, target) or _by_position(documents, whole, target, name)
    if train.tokens() < block_size:
        raise ValueError(
            f"the training part must fill a block: {name} leaves it {train.tokens()} tokens beside the held-out "
            f"documents, block_size={block_size}; give more text or a smaller block_size"
        )
    return train, kept


def _by_content(documents: Documents, whole: Segments, target: int) -> tuple[Segments, Segments] | None:
    """Part whole documents, or return None if those no longer than `target` do not add up to it."""
    _, group = np.unique(documents.keys, return_inverse=True)  # groups come in the order of their hashes
    size = np.bincount(group, weights=documents.lengths)
    eligible = np.where(size <= target, size, 0)
    sums = np.cumsum(eligible)
    if sums[-1] < target:
        return None
    chosen = (eligible > 0) & (sums - eligible < target)
    kept = chosen[group]
    return _select(whole, ~kept), _select(whole, kept)


def _by_position(documents: Documents, whole: Segments, target: int, name: str) -> tuple[Segments, Segments]:
    longest = int(documents.lengths.argmax())
    length = int(documents.lengths[longest])
    if length <= target:
        raise ValueError(
            f"{name} repeats its documents too often to hold out {target} tokens that training never sees "
            f"(its longest document has {length}); remove the copies, or set held_out=0 and measure on another file"
        )
    copies = documents.keys == documents.keys[longest]
    copies[longest] = False
    cut = whole.starts[longest] + length - target
    lengths = whole.lengths.copy()
    lengths[longest] -= target
    train = _select(Segments(whole.starts, lengths), ~copies)
    return train, Segments(np.array([cut]), np.array([target]))


def _select(segments: Segments, mask: np.ndarray) -> Segments:
    return Segments(segments.starts[mask], segments.lengths[mask])


def write_blocks(path: Path, tokens: np.ndarray, segments: Segments, block_size: int, isolate: bool) -> int:
    """Write blocks as an Arrow stream file of int32 lists, synced to disk, and return their number."""
    ends = np.cumsum(segments.lengths)
    count = int(ends[-1]) // block_size
    names = ("input_ids", "position_ids", "labels")
    schema = pa.schema([(name, pa.list_(pa.int32(), block_size)) for name in names])
    step = max(1, _CHUNK_TOKENS // block_size)
    with path.open("wb") as file:
        with pa.ipc.new_stream(file, schema) as writer:
            for first in range(0, count, step):
                span = np.arange(first * block_size, min(first + step, count) * block_size + 1)
                columns = _columns(span, tokens, segments, ends, block_size, isolate)
                arrays = [pa.FixedSizeListArray.from_arrays(column, block_size) for column in columns]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
        file.flush()
        os.fsync(file.fileno())
    return count


def _columns(
    span: np.ndarray, tokens: np.ndarray, segments: Segments, ends: np.ndarray, block_size: int, isolate: bool
) -> list[pa.Array]:
    """Return ids, positions and labels of the stream positions `span[:-1]`; the last one only labels."""
    inside = np.minimum(span, ends[-1] - 1)
    segment = np.searchsorted(ends, inside, side="right")
    begins = ends - segments.lengths
    stream = tokens[segments.starts[segment] + inside - begins[segment]]
    labels = stream[1:].copy()
    labels[span[1:] >= ends[-1]] = IGNORED
    origin = span[:-1] // block_size * block_size
    if isolate:
        labels[segment[1:] != segment[:-1]] = IGNORED
        origin = np.maximum(origin, begins[segment[:-1]])
    return [
        pa.array(np.asarray(column, dtype=np.int32)) for column in (stream[:-1], span[:-1] - origin, labels)
    ]
