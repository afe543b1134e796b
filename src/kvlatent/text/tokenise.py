"""Turn a stream of text pieces into one flat file of token ids, a bounded batch at a time."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvlatent.jobs.progress import Progress
from kvlatent.text.documents import Piece
from kvlatent.text.packing import Documents

_BATCH_CHARACTERS = 1 << 20


def frame_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids put before and after every document that no chat template has written."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_begin = begin is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [begin]
    return [begin] if adds_begin else [], [] if end is None else [end]


def tokenise(
    stream: Iterator[Piece],
    tokenizer: Any,
    path: Path,
    max_tokens: int | None,
    seed: int,
    progress: Progress,
) -> Documents:
    """Write all ids to `path` as int32 and return every document's length and content hash.

    The hash covers a document's first piece: two documents that agree in their first 256 k characters
    count as copies, and a document cut short by max_tokens still matches its other copies.
    """
    before, after = frame_of(tokenizer)
    salt = seed.to_bytes(8, "little", signed=True)
    limit = math.inf if max_tokens is None else max_tokens
    lengths, keys, total = array("q"), array("Q"), 0
    with path.open("wb") as file:
        for batch in _batches(stream):
            encoded = tokenizer([piece.text for piece in batch], add_special_tokens=False, verbose=False)
            for piece, ids in zip(batch, encoded["input_ids"], strict=True):
                if piece.first:
                    digest = hashlib.blake2b(array("i", ids).tobytes(), digest_size=8, salt=salt).digest()
                    keys.append(int.from_bytes(digest, "little"))
                    lengths.append(0)
                begin = before if piece.first and not piece.is_rendered else ()
                end = after if piece.last and not piece.is_rendered else ()
                framed = array("i", [*begin, *ids, *end])
                framed = framed[: int(min(len(framed), limit - total))]
                file.write(framed.tobytes())
                lengths[-1] += len(framed)
                total += len(framed)
                if total >= limit:
                    return Documents(np.array(lengths), np.array(keys))
            progress.report("tokenise", note=f"{total:,} tokens", tokens=total)
    return Documents(np.array(lengths), np.array(keys))


def _batches(stream: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, characters = [], 0
    for piece in stream:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def check_token_ids(largest: int, vocab_size: int, tokenizer: Any = None) -> None:
    """Raise `ValueError` if a text has made an id (`largest`) beyond the rows of the embedding (`vocab_size`)."""
    if not 0 <= largest < vocab_size:
        named = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(largest)!r})"
        raise ValueError(
            f"the text has a token that the model lacks: id {largest}{named}, the embedding has {vocab_size} rows; take "
            "it out of the text, or use the tokenizer that belongs to the model"
        )
