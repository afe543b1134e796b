"""Which part of a text is looked at by the calibration, and which part only measures.

Figures of quality are worth something on text that nothing was fitted to: one text is parted by whole documents, or
two texts are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from kvlatent.jobs.progress import Progress, Report
from kvlatent.jobs.recipe import Recipe
from kvlatent.text.corpus import Corpus, evaluation_blocks, prepare
from kvlatent.text.recall_blocks import RECALL_SHARE, replace_by_recall, why_no_recall

__all__ = [
    "ROOM",
    "TextReader",
    "Texts",
    "calibration_blocks",
    "check_sources",
    "check_statistics",
    "first_blocks",
    "read_texts",
    "recall_share",
    "seen_share",
    "text_to_calibrate",
]

_WINDOW = 24  # tokens; a shorter stretch is shared by texts that have nothing to do with each other

ROOM = 8
"""How many times the text that is needed is read, so that the blocks come from many documents."""


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
            "statistics take the place of the text they were collected from: got --statistics and --data; leave one out, "
            "and give a text to measure on as --eval-data"
        )
    if data is not None and eval_data is not None and not calibrates:
        raise ValueError(
            "a conversion that looks at no text needs one text at most, to measure on: got --data and --eval-data; leave "
            "one out, or use the preset calibrated"
        )


@dataclass(frozen=True)
class TextReader:
    """How the texts of one run become blocks, of the recipe's size, or of the model's context where that is shorter.

    Args:
        recipe: `data`, `calibration` and `seed` are read.
        tokenizer, config: of the model.
        cache_dir: where blocks are kept between calls.
        progress: told of the tokens that have been read of a text to fit to.
    """

    recipe: Recipe
    tokenizer: Any
    config: Any
    cache_dir: str | Path
    progress: Progress | Report | None = None

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        wanted = self.recipe.data.block_size
        return min(wanted, getattr(self.config, "max_position_embeddings", None) or wanted)

    def prepare(self, data: str | Path, **limits: Any) -> Corpus:
        """Blocks to fit to and a held-out part; `limits` are arguments of :func:`corpus.prepare`."""
        given: dict[str, Any] = {"held_out": self.recipe.data.held_out, **self._shared(), **limits}
        told = Progress.of(self.progress)
        return prepare(data, self.tokenizer, seed=self.recipe.seed, progress=told, **given)

    def measured(self, source: str | Path, max_tokens: int | None = None) -> Dataset:
        """All blocks of a text, or of its first `max_tokens`, to measure on."""
        return evaluation_blocks(source, self.tokenizer, max_tokens=max_tokens, **self._shared())

    def split(
        self,
        data: str | Path,
        eval_data: str | Path | None,
        *,
        max_eval_tokens: int | None = None,
        **limits: Any,
    ) -> tuple[Dataset, Dataset]:
        """Blocks of `data` to fit to, and blocks to measure on: a held-out part of it, or `eval_data` where it is given.

        Raises:
            ValueError: a text is too short, or nothing is held out.
        """
        if eval_data is not None:
            limits["held_out"] = 0.0
        corpus = self.prepare(data, **limits)
        held_out = corpus.held_out if eval_data is None else self.measured(eval_data, max_eval_tokens)
        if held_out is None:
            raise ValueError(
                "nothing is held out to measure on: data.held_out is 0; raise it, or pass --eval-data FILE"
            )
        assert corpus.train is not None
        return corpus.train, held_out

    def _shared(self) -> dict[str, Any]:
        section = self.recipe.data
        return {
            "block_size": self.block_size,
            "cache_dir": self.cache_dir,
            "vocab_size": self.config.vocab_size,
            "separator": section.separator,
            "isolate": section.isolate,
            "text_field": section.text_field,
        }


def read_texts(
    reader: TextReader,
    data: str | Path | None,
    eval_data: str | Path | None,
    *,
    eval_tokens: int,
    calibrates: bool,
    trains: bool = False,
) -> Texts:
    """The texts of one run as blocks.

    Reads no more of a text than it needs: all of it for a training, else a few times what the calibration takes, and
    `eval_tokens`.

    Args:
        data: to train or calibrate on, less a held-out part (without training at least `eval_tokens`, within a quarter
            of it) to measure on unless `eval_data` is given; where nothing is fitted to it, to measure on.
        eval_data: to measure on.
        eval_tokens: to measure on at the most.
        calibrates: statistics will be collected from `data`; trains: it will be trained on.

    Raises:
        ValueError: a text is too short, or nothing is held out.
    """
    size = reader.block_size
    train = held_out = None
    if data is not None and trains:
        train, held_out = reader.split(data, eval_data)
    elif data is not None and calibrates:
        train, held_out = reader.split(
            data,
            eval_data,
            least_held_out=eval_tokens,
            max_tokens=ROOM * (reader.recipe.calibration.blocks * size + eval_tokens),
            max_eval_tokens=max(eval_tokens, size),
        )
    elif (source := eval_data if data is None else data) is not None:
        held_out = reader.measured(source, max(eval_tokens, size))
    return Texts(train, None if held_out is None else first_blocks(held_out, eval_tokens, size))


def text_to_calibrate(reader: TextReader, data: str | Path) -> Dataset:
    """All blocks of the start of a text, a few times as many as are calibrated on; nothing is held out.

    Raises:
        ValueError: the text is shorter than a block.
    """
    tokens = ROOM * reader.recipe.calibration.blocks * reader.block_size
    train = reader.prepare(data, held_out=0.0, max_tokens=tokens).train
    assert train is not None
    return train


def first_blocks(blocks: Dataset, tokens: int, block_size: int) -> Dataset:
    """About that many tokens from the start, at least one block."""
    return blocks.select(range(min(len(blocks), max(1, tokens // block_size))))


def calibration_blocks(train: Dataset, recipe: Recipe, tokenizer: Any, *, learns: bool) -> Dataset:
    """`calibration.blocks` blocks drawn at random (by the seed), in their order; all of them where there are fewer.

    Args:
        train: to draw from.
        recipe: `calibration` and `seed` are read.
        tokenizer: of the text.
        learns: a conversion will take steps on the blocks, of which `calibration.recall` are made to ask for recall.

    Raises:
        ValueError: the recipe names a share of recall blocks, and the blocks are too short or too few for one.
    """
    wanted = min(len(train), recipe.calibration.blocks)
    blocks = train
    if wanted < len(train):
        generator = torch.Generator().manual_seed(recipe.seed)
        blocks = train.select(torch.randperm(len(train), generator=generator)[:wanted].sort().values.tolist())
    share = recall_share(train, recipe, learns=learns)
    return replace_by_recall(blocks, tokenizer, share=share, seed=recipe.seed) if share else blocks


def recall_share(train: Dataset, recipe: Recipe, *, learns: bool) -> float:
    """The share of the calibration blocks that ask for recall: none where no steps are taken on them.

    A share that the recipe leaves open is 0 where the blocks are too short or too few; one that it names is not.
    """
    if not learns:
        return 0.0
    if recipe.calibration.recall is not None:
        return recipe.calibration.recall
    count = min(len(train), recipe.calibration.blocks)
    size = len(train[0]["input_ids"])
    return RECALL_SHARE if why_no_recall(count, size, RECALL_SHARE) is None else 0.0


def seen_share(held_out: Dataset, looked_at: torch.Tensor) -> float:
    """Share of the stretches of 24 tokens in the blocks to measure on that the blocks looked at ([B, T]) hold, too."""
    seen: set[bytes] = set()
    for block in looked_at:
        seen.update(_windows(block, 1))
    known = [
        window in seen
        for block in held_out["input_ids"]
        for window in _windows(torch.as_tensor(block), _WINDOW)
    ]
    return sum(known) / max(1, len(known))


def _windows(ids: torch.Tensor, step: int) -> list[bytes]:
    """Stretches of 24 tokens, one every `step`, as bytes."""
    raw, size = ids.to(torch.int32).numpy().tobytes(), 4
    starts = range(0, len(ids) - _WINDOW + 1, step)
    return [raw[size * start : size * (start + _WINDOW)] for start in starts]
