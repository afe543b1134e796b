"""Which part of a text is looked at by the calibration, and which part only measures.

Figures of quality are worth something on text that nothing was fitted to: one text is parted by whole documents, or
two texts are given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from kvlatent.jobs.recipe import Recipe
from kvlatent.text.corpus import evaluation_blocks, prepare

__all__ = [
    "Texts",
    "calibration_blocks",
    "check_sources",
    "check_statistics",
    "first_blocks",
    "read_texts",
    "seen_share",
    "text_to_calibrate",
]

_WINDOW = 24  # tokens; a shorter stretch is shared by texts that have nothing to do with each other
_ROOM = 8  # how much more text is read than is needed, so that the blocks come from many documents


class Texts(NamedTuple):
    """Blocks to fit to and blocks to measure on; None where there are none."""

    train: Dataset | None
    held_out: Dataset | None


def check_statistics(path: str | Path, calibrates: bool = True) -> None:
    """Raise `FileNotFoundError` unless there is such a file, `ValueError` where nothing would look at it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no statistics at {path}; make them with `kvlatent calibrate`")
    if not calibrates:
        raise ValueError(
            "this conversion looks at no statistics (its preset does not, or it keeps the full width): got --statistics; "
            "leave it out, or use the preset calibrated"
        )


def check_sources(data: Any, statistics: Any, eval_data: Any, *, calibrates: bool) -> None:
    """Check what a conversion alone is given to look at.

    Raises:
        FileNotFoundError: no such statistics.
        ValueError: two texts, or a text and statistics, for one purpose.
    """
    if statistics is not None:
        check_statistics(statistics, calibrates)
    if statistics is not None and data is not None:
        raise ValueError(
            "statistics take the place of the text they were gathered from: got --statistics and --data; leave one out, "
            "and give a text to measure on as --eval-data"
        )
    if data is not None and eval_data is not None and not calibrates:
        raise ValueError(
            "a conversion that looks at no text needs one text at most, to measure on: got --data and --eval-data; leave "
            "one out, or use the preset calibrated"
        )


def read_texts(
    recipe: Recipe,
    tokenizer: Any,
    config: Any,
    data: str | Path | None,
    eval_data: str | Path | None,
    *,
    eval_tokens: int,
    cache_dir: str | Path,
    calibrates: bool,
) -> Texts:
    """The texts of one conversion as blocks that fit the model's context.

    Reads no more of a text than it needs: a few times what the calibration takes, and `eval_tokens`.

    Args:
        recipe: `data`, `calibration` and `seed` are read.
        data: to calibrate on, less a held-out part (at least `eval_tokens`, within a quarter of it) to measure on
            unless `eval_data` is given; where nothing calibrates, to measure on.
        eval_data: to measure on.
        calibrates: statistics will be gathered from `data`.

    Raises:
        ValueError: a text is too short, or nothing is held out.
    """
    shared = _reading(recipe, config, cache_dir)
    size = shared["block_size"]
    measured = eval_data if calibrates or data is None else data
    held_out = train = None
    if measured is not None:
        held_out = evaluation_blocks(measured, tokenizer, max_tokens=max(eval_tokens, size), **shared)
    if calibrates and data is not None:
        corpus = prepare(
            data,
            tokenizer,
            held_out=recipe.data.held_out if held_out is None else 0.0,
            least_held_out=eval_tokens,
            max_tokens=_ROOM * (recipe.calibration.blocks * size + eval_tokens),
            seed=recipe.seed,
            **shared,
        )
        train, held_out = corpus.train, corpus.held_out if held_out is None else held_out
        if held_out is None:
            raise ValueError(
                "nothing is held out to measure on: data.held_out is 0; raise it, or pass --eval-data FILE"
            )
    return Texts(train, None if held_out is None else first_blocks(held_out, eval_tokens, size))


def text_to_calibrate(
    recipe: Recipe, tokenizer: Any, config: Any, data: str | Path, cache_dir: str | Path
) -> Dataset:
    """All blocks of the start of a text, a few times as many as are calibrated on; nothing is held out.

    Raises:
        ValueError: the text is shorter than a block.
    """
    shared = _reading(recipe, config, cache_dir)
    tokens = _ROOM * recipe.calibration.blocks * shared["block_size"]
    corpus = prepare(data, tokenizer, held_out=0.0, max_tokens=tokens, seed=recipe.seed, **shared)
    assert corpus.train is not None
    return corpus.train


def _reading(recipe: Recipe, config: Any, cache_dir: str | Path) -> dict[str, Any]:
    """How text becomes blocks; they are cut to the model's context where the recipe's are longer."""
    section = recipe.data
    limit = getattr(config, "max_position_embeddings", None) or section.block_size
    return {
        "block_size": min(section.block_size, limit),
        "cache_dir": cache_dir,
        "vocab_size": config.vocab_size,
        "separator": section.separator,
        "isolate": section.isolate,
        "text_field": section.text_field,
    }


def first_blocks(blocks: Dataset, tokens: int, block_size: int) -> Dataset:
    """About that many tokens from the start, at least one block."""
    return blocks.select(range(min(len(blocks), max(1, tokens // block_size))))


def calibration_blocks(train: Dataset, recipe: Recipe) -> Dataset:
    """`calibration.blocks` blocks drawn at random (by the seed), in their order; all of them where there are fewer."""
    wanted = recipe.calibration.blocks
    if len(train) <= wanted:
        return train
    generator = torch.Generator().manual_seed(recipe.seed)
    return train.select(torch.randperm(len(train), generator=generator)[:wanted].sort().values.tolist())


def seen_share(held_out: Dataset, looked_at: torch.Tensor) -> float:
    """Share of the stretches of 24 tokens in the blocks to measure on that the blocks looked at ([B, T]) hold, too."""
    seen: set[bytes] = set()
    for block in looked_at:
        seen.update(_windows(block, 1))
    found = [
        window in seen
        for block in held_out["input_ids"]
        for window in _windows(torch.as_tensor(block), _WINDOW)
    ]
    return sum(found) / max(1, len(found))


def _windows(ids: torch.Tensor, step: int) -> list[bytes]:
    """Stretches of 24 tokens, one every `step`, as bytes."""
    raw, size = ids.to(torch.int32).numpy().tobytes(), 4
    starts = range(0, len(ids) - _WINDOW + 1, step)
    return [raw[size * start : size * (start + _WINDOW)] for start in starts]
