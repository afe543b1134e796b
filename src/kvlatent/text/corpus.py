"""Prepare a corpus once per content, tokenizer and options, and find it again on disk after that."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from kvlatent.jobs.fingerprints import fingerprint, template_fingerprint, tokenizer_fingerprint
from kvlatent.jobs.progress import Progress
from kvlatent.text import documents as text
from kvlatent.text.packing import Documents, hold_out, write_blocks
from kvlatent.text.tokenise import check_token_ids, frame_of, tokenise

_FORMAT = 1
_PARTS = ("train", "held_out")


@dataclass(frozen=True)
class Corpus:
    """Blocks ready for training; a part that was not asked for is None and has 0 tokens.

    Each part is a memory-mapped dataset with the int64 columns `input_ids`, `position_ids` and `labels`,
    all of `block_size`. `fingerprint` identifies content, tokenizer and options.
    """

    train: Dataset | None
    held_out: Dataset | None
    train_tokens: int
    held_out_tokens: int
    fingerprint: str


def prepare(
    source: str | Path,
    tokenizer: Any,
    *,
    block_size: int,
    cache_dir: str | Path,
    vocab_size: int,
    separator: str | None = "<|endoftext|>",
    held_out: float = 0.02,
    least_held_out: int = 0,
    isolate: bool = True,
    text_field: str = "text",
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | Callable[[int], None] | None = None,
) -> Corpus:
    """Tokenise and pack `source`, or reuse what an earlier call with the same arguments wrote.

    A document is what the tokenizer makes of it, after the tokenizer's own beginning-of-text token if it
    adds one, and before its end-of-text token if it has one; a conversation is what the model's chat template makes of
    it, and nothing else. The last, incomplete block is dropped.

    Args:
        source: a .txt, .jsonl, .json or .parquet file, or a dataset `name[:config[:split]]`.
        block_size: tokens per block.
        cache_dir: where blocks are kept between calls.
        vocab_size: rows of the embedding that the ids are for.
        separator: cuts a .txt file into documents; None leaves it whole.
        held_out: share of the tokens kept out of training, in [0, 1]; whole documents chosen by their
            content, copies on one side; the end of the longest one where all are too long.
        least_held_out: tokens that a share above 0 is raised to, within a quarter of the text.
        isolate: keep documents apart in attention; otherwise positions run through the block.
        text_field: where other files than .txt hold the text; :mod:`kvlatent.text.chat` says which conversations are
            read where a record lacks it.
        max_tokens: read no more tokens than this.
        seed: varies which documents are held out.
        progress: called with the number of tokens read so far.

    Raises:
        FileNotFoundError: no such file or dataset.
        ValueError: the text is empty, binary or shorter than a block, or a part is; or it has a token beyond
            `vocab_size`.
    """
    _check(block_size, held_out, max_tokens)
    origin = text.resolve(source)
    options = {
        "block_size": block_size, "separator": separator, "held_out": held_out, "isolate": isolate,
        "least_held_out": least_held_out, "text_field": text_field, "max_tokens": max_tokens, "seed": seed, "format": _FORMAT,
    }  # fmt: skip
    identity = [origin.fingerprint(), tokenizer_fingerprint(tokenizer, frame_of(tokenizer)), options]
    if not origin.is_plain() and (template := template_fingerprint(tokenizer)) is not None:
        identity.append(template)
    key = fingerprint(identity)
    directory = Path(cache_dir) / key[:32]
    if not _is_complete(directory):
        stream = text.pieces(origin, separator=separator, text_field=text_field, tokenizer=tokenizer)
        _build(directory, stream, tokenizer, origin.name, options, Progress.of(progress, ("tokens",)))
    about = json.loads((directory / "meta.json").read_text())
    check_token_ids(about.get("largest_id", 0), vocab_size, tokenizer)
    return _open(directory, about["tokens"], key)


def evaluation_blocks(
    source: str | Path, tokenizer: Any, block_size: int, *, cache_dir: str | Path, **options: Any
) -> Dataset:
    """Return all of `source` as blocks to measure on; `options` are those of :func:`prepare`."""
    corpus = prepare(source, tokenizer, block_size=block_size, cache_dir=cache_dir, held_out=1.0, **options)
    assert corpus.held_out is not None
    return corpus.held_out


def _check(block_size: int, held_out: float, max_tokens: int | None) -> None:
    if block_size < 2:
        raise ValueError(f"a block needs at least 2 tokens to predict one: got {block_size}; try 512")
    if not 0 <= held_out <= 1:
        raise ValueError(f"held_out is a share between 0 and 1: got {held_out}; try 0.02")
    if max_tokens is not None and max_tokens < block_size:
        raise ValueError(f"max_tokens must fill a block: got {max_tokens}, block_size={block_size}; raise it")


def _is_complete(directory: Path) -> bool:
    try:
        files = json.loads((directory / "meta.json").read_text())["files"]
        return all((directory / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _open(directory: Path, tokens: dict[str, int], key: str) -> Corpus:
    parts: dict[str, Dataset | None] = dict.fromkeys(_PARTS)
    for part in _PARTS:
        if (directory / f"{part}.arrow").exists():
            parts[part] = Dataset.from_file(str(directory / f"{part}.arrow")).with_format("torch")
    return Corpus(parts["train"], parts["held_out"], tokens["train"], tokens["held_out"], key)


def _build(
    directory: Path,
    stream: Iterator[text.Piece],
    tokenizer: Any,
    name: str,
    options: dict[str, Any],
    progress: Progress,
) -> None:
    """Write one cache entry beside its final name and rename it, so that no reader sees half of it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{directory.name}.tmp-", dir=directory.parent))
    try:
        documents = tokenise(
            stream, tokenizer, temporary / "tokens.bin", options["max_tokens"], options["seed"], progress
        )
        if not documents.lengths.sum():
            raise ValueError(f"{name} holds no text; give a text of at least {options['block_size']} tokens")
        _write(temporary, documents, name, options)
        if directory.exists() and not _is_complete(directory):
            shutil.rmtree(directory)
        try:
            os.replace(temporary, directory)
        except OSError:
            if not _is_complete(directory):  # else another process was faster with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(directory: Path, documents: Documents, name: str, options: dict[str, Any]) -> None:
    """Turn `tokens.bin` into one Arrow file per part, and `meta.json` with their sizes and tokens."""
    block_size = options["block_size"]
    flat = directory / "tokens.bin"
    tokens = np.memmap(flat, dtype=np.int32, mode="r")
    counts = dict.fromkeys(_PARTS, 0)
    parts = hold_out(documents, options["held_out"], block_size, name, options["least_held_out"])
    for part, segments in zip(_PARTS, parts, strict=True):
        if segments is not None:
            path = directory / f"{part}.arrow"
            counts[part] = block_size * write_blocks(path, tokens, segments, block_size, options["isolate"])
    largest = int(tokens.max())
    flat.unlink()
    sizes = {file.name: file.stat().st_size for file in directory.iterdir()}
    about = {"files": sizes, "tokens": counts, "largest_id": largest, "options": options}
    (directory / "meta.json").write_text(json.dumps(about))
