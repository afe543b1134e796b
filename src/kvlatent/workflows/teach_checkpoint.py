"""What an original says of a text, written once: the store that stage II trains from without the original in memory.

The unfinished store lives in `OUT.partial`, a file every 65,536 tokens; a call that was killed goes on behind the last
whole one.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlatent.checkpoints.load import check_block_size
from kvlatent.jobs.atomic import atomic_directory, prepare_output, read_json, write_text
from kvlatent.jobs.devices import choose_device, precision, resolve_precision
from kvlatent.jobs.fingerprints import blocks_fingerprint, file_sha256, fingerprint, tokenizer_fingerprint
from kvlatent.jobs.progress import Progress, Report
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.work_directory import WorkDirectory, partial_of, prepare_place
from kvlatent.model.divergences import TopTokens, top_tokens
from kvlatent.model.head import Head, tokens_of_logits
from kvlatent.text.parts import TextReader
from kvlatent.text.tokenise import frame_of
from kvlatent.training.loop import collate
from kvlatent.training.teacher_store import RECORD, StoreRecord, facts_of, is_store, row_bytes, write_shard
from kvlatent.workflows.run_plan import load_original_config
from kvlatent.workflows.settings import recipe_overrides
from kvlatent.workflows.steps import check_texts, describe_run, hash_sources, load_original, options_as_typed

__all__ = ["teach"]

_SHARD_TOKENS = 65_536


class StoreDirectory(WorkDirectory):
    """An unfinished store: its shards, and the text in blocks."""

    content = "an unfinished teacher store"

    def shard(self, index: int) -> Path:
        """Where one of its files stands."""
        return self.path / f"shard-{index:05d}.safetensors"

    def has_work(self) -> bool:
        """Whether a shard is finished."""
        return self.shard(0).is_file()


def teach(
    model: str | Path,
    *,
    data: str | Path,
    out: str | Path,
    top_k: int = 64,
    tokens: int | None = None,
    recipe: str | Path | Recipe | None = None,
    overrides: Iterable[str] = (),
    dtype: str | None = None,
    seed: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | Report | None = None,
    announce: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Store the original's likeliest tokens, and what all others share, at every position of the training text.

    A call that was killed continues when it is repeated with the same arguments.

    Args:
        model: directory, hub id or GGUF file of the original.
        data: training text, as for `train`, whose held-out part is not stored.
        out: directory to write; `out.partial` beside it holds unfinished work.
        top_k: tokens kept a position; fewer than the vocabulary has.
        tokens: of the text's start, at the least; None: of all of it.
        recipe: `data`, `seed`, `dtype`, `stage2.temperature` and `stage2.batch_size` are read.
        overrides: `section.key=value` on top of it; dtype, seed: on top of both.
        device: "auto", "cpu" or "cuda".
        overwrite: replace `out` and an unfinished store of other arguments.
        progress: see `Progress`.
        announce: called with "blocks", "tokens", "bytes_per_token" and "bytes" before the work.

    Returns:
        {"out", "top_k", "blocks", "tokens", "bytes_per_token", "bytes" (of the shards), "seconds"}.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one sentence naming what is wrong and what to do.
    """
    device = choose_device(device)
    given: dict[str, Any] = {"overrides": list(overrides), "dtype": dtype, "seed": seed}
    config = load_original_config(model)
    settings = resolve_precision(Recipe.load(recipe, recipe_overrides(given)), config, device)
    _check_counts(top_k, tokens, config.vocab_size)
    check_block_size(config, settings.data.block_size)
    check_texts(data)
    inputs = {"model": model, "data": data, "recipe": recipe}
    place = prepare_place(out, True, inputs)
    sha256 = hash_sources({"model": model, "data": data}, "training text")
    space = StoreDirectory(partial_of(place), {**sha256, **_decisions(settings, top_k, tokens, device)})
    if (finished := _finished(space, place)) is not None:
        return finished
    prepare_output(place, overwrite)
    options = {"top_k": top_k, "tokens": tokens, "recipe": recipe, **given, "device": device}
    about = describe_run(
        "teach", model, options_as_typed({"data": data, "out": place}, options), sha256, device
    )
    space.open(overwrite=overwrite)
    start = time.monotonic()
    try:
        told = Progress.of(progress)
        found = _Teaching(space, settings, top_k, device, told)
        found.read(model, data, tokens, announce)
        found.store()
        record = {**about, **found.record(), "seconds": round(time.monotonic() - start, 2)}
        _publish(space, StoreRecord.checked(record), place, overwrite)
    except BaseException:
        if not space.has_work():
            space.remove()
        raise
    space.remove()
    return _summary(record, place)


def _check_counts(top_k: int, tokens: int | None, vocabulary: int) -> None:
    if not 1 <= top_k < vocabulary:
        raise ValueError(
            f"--top-k must be at least 1 and leave a token of the vocabulary to the rest: got {top_k} of {vocabulary}; try "
            f"{max(1, min(64, vocabulary - 1))}"
        )
    if tokens is not None and tokens < 1:
        raise ValueError(f"--tokens must be positive: got {tokens}; leave it out to store the whole text")


def _decisions(recipe: Recipe, top_k: int, tokens: int | None, device: str) -> dict[str, Any]:
    """What decides a store, beside what it reads."""
    return {
        "top_k": top_k,
        "tokens": tokens,
        "temperature": recipe.stage2.temperature,
        "dtype": recipe.dtype,
        "device": device,
        "seed": recipe.seed,
        "data": recipe.data.model_dump(mode="json"),
    }


class _Teaching:
    """One store in the making: what is loaded, and what is written."""

    def __init__(
        self, space: StoreDirectory, recipe: Recipe, top_k: int, device: str, told: Progress
    ) -> None:
        self.space, self.recipe, self.top_k, self.device, self.progress = space, recipe, top_k, device, told

    def read(
        self,
        model: str | Path,
        data: str | Path,
        tokens: int | None,
        announce: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        """Load the original, bring the text into blocks, say how large the store will be."""
        dtype = "float32" if self.recipe.dtype == "float32" else None
        self.original, self.tokenizer = load_original(model, dtype, self.device, self.progress)
        reader = TextReader(
            self.recipe,
            self.tokenizer,
            self.original.config,
            self.space.path / "data",
            progress=self.progress,
        )
        blocks = reader.prepare(data).train
        assert blocks is not None  # a recipe holds less than all of it out
        self.blocks = blocks
        size = self.recipe.data.block_size
        self.count = len(self.blocks) if tokens is None else min(len(self.blocks), -(-tokens // size))
        a_token = row_bytes(self.top_k, self.original.config.vocab_size)
        if announce is not None:
            stored = self.count * size
            announce(
                {
                    "blocks": self.count,
                    "tokens": stored,
                    "bytes_per_token": a_token,
                    "bytes": a_token * stored,
                }
            )

    def store(self) -> None:
        """Write the shards that are not there yet."""
        size = self.recipe.data.block_size
        self.shards = self._parts(max(1, _SHARD_TOKENS // size))
        step = self.progress.step("teach", self.count, tokens=size)
        for index, part in enumerate(self.shards):
            file = self.space.shard(index)
            if not file.is_file():
                write_shard(file, self._likeliest(part, step.advance), self.original.config.vocab_size)
            step.to(part.stop)

    def _parts(self, length: int) -> list[range]:
        return [range(i, min(i + length, self.count)) for i in range(0, self.count, length)]

    def _likeliest(self, part: range, done: Callable[[int], None]) -> TopTokens:
        """Of some blocks: [blocks, T, k] and [blocks, T, k + 1], on the CPU."""
        found = []
        for start in range(part.start, part.stop, self.recipe.stage2.batch_size):
            some = range(start, min(start + self.recipe.stage2.batch_size, part.stop))
            batch = collate([self.blocks[index] for index in some])
            one = self._of_batch({name: tensor.to(self.device) for name, tensor in batch.items()})
            if not one.log_shares.isfinite().all():
                raise ValueError(
                    f"the original gives logits that are not finite in blocks {some.start} to {some.stop - 1} of the text, "
                    "so they teach nothing; run kvlatent eval on it to see whether it is whole"
                )
            found.append(one)
            done(len(some))
        return TopTokens(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    @torch.no_grad()
    def _of_batch(self, batch: dict[str, Tensor]) -> TopTokens:
        call = {name: batch[name] for name in ("input_ids", "position_ids")}
        with precision(self.device, self.recipe.dtype):
            hidden = self.original.get_decoder()(**call, use_cache=False).last_hidden_state
            head = Head.of_model(self.original).in_autocast()
            rows = hidden.flatten(0, 1).split(tokens_of_logits(head))
            temperature = self.recipe.stage2.temperature
            found = [top_tokens(head.logits(some), self.top_k, temperature) for some in rows]
        shape = batch["input_ids"].shape
        return TopTokens(*(torch.cat(p).view(*shape, -1).cpu() for p in zip(*found, strict=True)))

    def record(self) -> dict[str, Any]:
        """What `teacher.json` says of the finished store, beside how the run went."""
        config, recipe = self.original.config, self.recipe
        files = [(self.space.shard(index), part) for index, part in enumerate(self.shards)]
        stored = self.blocks.select(range(self.count))
        return {
            "kind": "teacher-store",
            "format": 1,
            "fingerprint": fingerprint(self.space.plan),
            "top_k": self.top_k,
            "temperature": recipe.stage2.temperature,
            "block_size": recipe.data.block_size,
            "blocks": self.count,
            "text_blocks": len(self.blocks),
            "bytes_per_token": row_bytes(self.top_k, config.vocab_size),
            "blocks_fingerprint": blocks_fingerprint(stored),
            "tokenizer": tokenizer_fingerprint(self.tokenizer, frame_of(self.tokenizer)),
            "seed": recipe.seed,
            "dtype": recipe.dtype,
            "data": recipe.data.model_dump(mode="json"),
            "original": facts_of(config),
            "shards": [
                {
                    "file": file.name,
                    "blocks": len(part),
                    "bytes": file.stat().st_size,
                    "sha256": file_sha256(file),
                }
                for file, part in files
            ],
        }


def _publish(space: StoreDirectory, record: dict[str, Any], out: Path, overwrite: bool) -> None:
    """Put the store in its place; the shards stay where they are until then, so a kill on the way costs none."""
    with atomic_directory(out, overwrite=overwrite) as folder:
        for shard in record["shards"]:
            try:
                os.link(space.path / shard["file"], folder / shard["file"])
            except OSError:  # a file system without links
                shutil.copyfile(space.path / shard["file"], folder / shard["file"])
        write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")


def _finished(space: StoreDirectory, out: Path) -> dict[str, Any] | None:
    """The summary of a call that was killed after its output appeared and before its workspace went."""
    if not space.is_ours() or not is_store(out):
        return None
    try:
        record = StoreRecord.checked(read_json(out / RECORD, ""))
    except ValueError:  # damaged, so `out` is not that call's
        return None
    if record["fingerprint"] != fingerprint(space.plan):
        return None
    space.remove()
    return _summary(record, out)


def _summary(record: dict[str, Any], out: Path) -> dict[str, Any]:
    kept = {name: record[name] for name in ("top_k", "blocks", "bytes_per_token", "seconds")}
    size = sum(shard["bytes"] for shard in record["shards"])
    return {"out": str(out), **kept, "tokens": record["blocks"] * record["block_size"], "bytes": size}
