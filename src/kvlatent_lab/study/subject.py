"""What all cells of a study share: the model, its texts in blocks, and what was found out about them once.

What takes long is kept in the work folder, each under a lock, so that of two processes one makes it and the other reads.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from kvlatent.checkpoints.load import load_config, load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.evaluation.perplexity import Perplexity
from kvlatent.evaluation.quality import measure
from kvlatent.jobs.atomic import write_text
from kvlatent.jobs.devices import precision, working_dtype
from kvlatent.jobs.fingerprints import fingerprint, identity
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.record import name_for_record
from kvlatent.text.documents import resolve
from kvlatent.text.parts import ROOM, TextReader, first_blocks
from kvlatent.text.standard_library import model_path, stdlib_documents
from kvlatent_lab.study.folder import StudyFolder

__all__ = ["Source", "Subject", "resolve_source"]


class Source(NamedTuple):
    """The model and the texts of a study: where they are, and what identifies them."""

    model: Path | str
    name: str
    data: Path | str | None
    eval_data: Path | str | None

    def sha256(self) -> dict[str, Any]:
        """What the files hold; the standard library stands for its text in this Python."""
        if self.data is None:
            texts = {split: read_stdlib(split) for split in ("train", "held_out")}
            found = {use: f"stdlib:{fingerprint({'text': text})}" for use, text in texts.items()}
            return {
                "model": identity(self.model),
                "data": found["train"],
                "eval_data": found["held_out"],
            }
        return {
            "model": identity(self.model),
            "data": identity(self.data),
            "eval_data": None if self.eval_data is None else identity(self.eval_data),
        }


def resolve_source(model: str | Path | None, data: Any, eval_data: Any) -> Source:
    """The model and texts that a call names; without a model the embedded one, without text the standard library's.

    Raises:
        ValueError: a model comes without text, or what is measured on is the training text.
        FileNotFoundError: no such text.
    """
    if model is not None and data is None:
        raise ValueError(
            f"a study of {model} needs text to calibrate and train on: got none; pass --data FILE, or leave the model "
            "out to study the embedded one"
        )
    if data is None and eval_data is not None:
        raise ValueError(
            "a text to measure on needs one to calibrate and train on beside it: got --eval-data alone; pass --data FILE"
        )
    for source in (data, eval_data):
        if source is not None:
            resolve(source)
    if eval_data is not None and identity(data) == identity(eval_data):
        raise ValueError(
            "--eval-data is the training text; leave it out to measure on a held-out part, or give another file"
        )
    path = model_path() if model is None else model
    return Source(path, name_for_record(path), data, eval_data)


def read_stdlib(split: Any) -> str:
    """Standard library text as JSON lines, one a module, in seeded order.

    Raises:
        ValueError: this Python ships none.
    """
    documents = stdlib_documents(split)
    if not documents:
        raise ValueError(
            f"this Python ships no standard library text for the part {split!r}; use a full installation, or pass "
            "--data FILE"
        )
    random.Random(0).shuffle(documents)
    return "".join(json.dumps({"text": text}) + "\n" for text in documents)


class Subject:
    """The model and the texts, loaded.

    Args:
        source: where they are.
        folder: of the study.
        recipe: `data`, `calibration`, `dtype` and `seed` are read.
        eval_tokens: measure on at most that many tokens.
        tokens: that a cell trains on at the most.
        device: "cpu" or "cuda".
        python: interpreter of an environment with the tools of a study that needs some.
    """

    def __init__(
        self,
        source: Source,
        folder: StudyFolder,
        recipe: Recipe,
        *,
        eval_tokens: int,
        tokens: int,
        device: str,
        python: str | None = None,
    ) -> None:
        self.source, self.folder, self.recipe, self.device = source, folder, recipe, device
        self.eval_tokens, self.tokens, self.python = eval_tokens, tokens, python
        dtype = working_dtype(recipe.dtype, device, load_config(str(source.model)).dtype)
        self.model = load_model(source.model, dtype=dtype, device=device).requires_grad_(False).eval()
        self.tokenizer = load_tokenizer(source.model, self.model.config)
        self.reader = TextReader(recipe, self.tokenizer, self.model.config, folder.work / "blocks")
        self.block_size = self.reader.block_size

    def remembered(self, name: str, compute: Callable[[], Any]) -> Any:
        """What `compute` returned when it was first called under that name in this folder (JSON-able)."""
        path = self.folder.shared_file(f"{name}.json", lambda path: write_text(path, json.dumps(compute())))
        return json.loads(path.read_text(encoding="utf-8"))

    @cached_property
    def train_blocks(self) -> Dataset:
        """Blocks to calibrate and train on."""
        return self._parts(self.recipe.data.isolate)[0]

    def with_room_for(self, tokens: int) -> Subject:
        """The same, with so many tokens to train on; what is measured on stays, and what was converted is found again.

        Blocks to calibrate on would be drawn from more text, so conversions are made before.
        """
        if tokens <= self.tokens:
            return self
        _ = self._held_out  # read here, from the shorter text
        larger = copy.copy(self)
        vars(larger).pop("train_blocks", None)
        larger.tokens = tokens
        return larger

    def blocks(self, part: str = "reported") -> Dataset:
        """Blocks to measure on: "reported", or "validation", which settings may be chosen by.

        Raises:
            ValueError: the text is too short for both.
        """
        held_out = self._held_out
        reported = first_blocks(held_out, self.eval_tokens, self.block_size)
        if part == "reported":
            return reported
        first = len(reported) + 1  # a block apart, so that they hardly share a document
        last = min(len(held_out), first + len(reported))
        if last <= first:
            raise ValueError(
                f"settings are chosen on other text than is reported: {len(reported)} of {len(held_out)} blocks of "
                f"{self.block_size} tokens are reported, which leaves none; give a longer --eval-data or fewer "
                "--eval-tokens"
            )
        return held_out.select(range(first, last))

    @cached_property
    def _held_out(self) -> Dataset:
        return self._parts(self.recipe.data.isolate)[1]

    def running_blocks(self) -> Dataset:
        """The reported text with documents end to end, as a cache sees it that is not told of their ends."""
        return first_blocks(self._parts(isolate=False)[1], self.eval_tokens, self.block_size)

    def _parts(self, isolate: bool) -> tuple[Dataset, Dataset]:
        """Blocks to train on, and blocks to measure on: at least twice `eval_tokens`, where there is so much."""
        wanted = 2 * self.eval_tokens + 2 * self.block_size
        fitted = ROOM * (self.recipe.calibration.blocks * self.block_size + wanted) + self.tokens
        section = self.recipe.data.model_copy(update={"isolate": isolate})
        recipe = self.recipe.model_copy(
            update={"seed": 0, "data": section}
        )  # all seeds hold out the same text
        return dataclasses.replace(self.reader, recipe=recipe).split(
            *self._files(), least_held_out=wanted, max_tokens=fitted, max_eval_tokens=wanted
        )

    def _files(self) -> tuple[Path | str, Path | str | None]:
        if self.source.data is not None:
            return self.source.data, self.source.eval_data

        def file(split: str) -> Path:
            return self.folder.shared_file(
                f"stdlib_{split}.jsonl", lambda path: write_text(path, read_stdlib(split))
            )

        return file("train"), file("held_out")

    def original(self, part: str = "reported") -> tuple[dict[str, Any], Perplexity]:
        """Figures and perplexity of the original on a part of the text, measured once."""

        def compute() -> dict[str, Any]:
            with self.precision():
                figures, result = measure(self.model, self.blocks(part))
            return {"figures": figures, "paired": dataclasses.asdict(result)}

        found = self.remembered(f"original-{part}", compute)
        fields: dict[str, Any] = dict(found["paired"])
        fields |= {name: tuple(fields[name]) for name in ("block_losses", "block_tokens")}
        return found["figures"], Perplexity(**fields)

    def precision(self) -> AbstractContextManager[Any]:
        """The context in which models are measured."""
        return precision(self.device, str(self.dtype).removeprefix("torch."))

    @property
    def dtype(self) -> torch.dtype:
        """That the original is held in."""
        return self.model.dtype
