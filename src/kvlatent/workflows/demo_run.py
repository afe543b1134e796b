"""The main job on what every installation has: the embedded model or another, and the standard library's own text.

The model is compressed to half its cache with text from modules it may train on, and measured on modules that neither
its pretraining nor this run has seen. A model that is given was pretrained on the web, and reads prose instead: the
docstrings of the same modules. Perplexity alone would not notice a cache that lost distant tokens, so copying
is measured too.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.evaluation.copying import copy_accuracy
from kvlatent.jobs.progress import Progress, Report
from kvlatent.jobs.record import name_for_record
from kvlatent.jobs.scratch import scratch_folder
from kvlatent.text.library_prose import prose_documents
from kvlatent.text.standard_library import model_path, stdlib_documents
from kvlatent.workflows.compress_checkpoint import compress
from kvlatent.workflows.generate import generate_continuation

__all__ = ["demo"]

# For presets that need training, and for the text that the calibrated one draws its blocks from; stages and learning
# rates are those of the recipe.
_TOKENS = 800_000
DEFAULT_PRESET = "calibrated"
_OVERRIDES = ("data.block_size=512",)
_CHARACTERS_PER_TOKEN = 6  # at the most: a training text that long is read about once


@dataclass(frozen=True)
class _Scene:
    """What a demo reads, and how much of it: a given model is larger than the embedded one, and measured on less.

    Args:
        out: directory by default.
        text, held_out: in words; documents: of a part, "train" or "held_out".
    """

    out: Path
    text: str
    held_out: str
    prompt: str
    evaluation_tokens: int
    copy_trials: int
    documents: Callable[[Any], list[str]]


_CODE = _Scene(
    Path("kvlatent-demo"),
    text="the standard library of this Python",
    held_out="held-out modules",
    prompt="class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    evaluation_tokens=32_768,
    copy_trials=50,
    documents=lambda split: stdlib_documents(split),
)
_PROSE = _Scene(
    Path("kvlatent-demo-real"),
    text="the docstrings and the language reference of this Python",
    held_out="held-out docstrings",
    prompt="The most important thing to know about the sea is",
    evaluation_tokens=8_192,
    copy_trials=10,
    documents=prose_documents,
)


def demo(
    out: str | Path | None = None,
    *,
    model: str | Path | None = None,
    kv: float = 0.5,
    preset: str = DEFAULT_PRESET,
    tokens: int | None = None,
    minutes: float | None = None,
    overwrite: bool = False,
    copy_trials: int | None = None,
    overrides: tuple[str, ...] = (),
    progress: Progress | Report | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compress the embedded model on standard library text, and measure both models; or another on its prose.

    Args:
        out: directory to write; None is `./kvlatent-demo`, or `./kvlatent-demo-real` for a model that is given, which an
            earlier demo's output may be replaced in.
        model: directory, hub id or GGUF file of the original; None is the embedded model.
        kv: share of the cache to keep.
        preset: of the conversion.
        tokens: of both stages together; left out, the calibrated preset is not trained at all, others on 800,000.
        minutes: for the compression, instead of what its steps take; what is measured behind it is not counted.
        overwrite: replace what `out` holds.
        copy_trials: random strings a distance; None: 50, or 10 for a model that is given.
        overrides: `section.key=value` strings on top of the demo's recipe.
        progress, say: for people who wait.

    Returns:
        {"model", "weights", "held_out": what was measured on, "original": {...}, "latent": {...}, "prompt", "out", "minutes",
        "run"}; model and weights (see `describe_weights`) are None for the embedded model; each side with cache_bytes_per_token,
        cache_dtype, perplexity, standard_error, copy_accuracy (distance in tokens -> share) and continuation.

    Raises:
        FileNotFoundError: the package was installed without its model.
        ValueError: this Python ships no standard library text; or an option of `compress` that it refuses.
    """
    start, source, scene = time.monotonic(), model_path() if model is None else model, _CODE
    name = "the embedded model"
    if model is not None:
        name, scene = name_for_record(model), _PROSE
    target = scene.out if out is None else Path(out)
    overwrite = overwrite or (out is None and (target / "run.json").is_file())
    with scratch_folder() as folder:
        wanted = _TOKENS if tokens is None else tokens
        untrained = tokens is None and preset == "calibrated"
        train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
        options: dict[str, Any] = {
            "kv": kv,
            "tokens": wanted if minutes is None else tokens,
            "minutes": minutes,
            "stages": "none" if untrained else None,
            "eval_data": held_out,
            "eval_tokens": scene.evaluation_tokens,
            "overrides": [*_OVERRIDES, *overrides],
            "preset": preset,
            "overwrite": overwrite,
        }
        compress(source, train, target, dry_run=True, **options)  # refuses before a minute of gathering text
        _write(train, scene, "train", _CHARACTERS_PER_TOKEN * wanted)
        _write(held_out, scene, "held_out")
        if say is not None:
            say(f"compressing {name} to {kv:.0%} of its cache, preset {preset}, on {scene.text}")
        record = compress(source, train, target, progress=progress, **options)
    report: dict[str, Any] = {
        "model": None if model is None else name,
        "weights": record.get("weights"),
        "held_out": scene.held_out,
        "prompt": scene.prompt,
    }
    for side, path in (("original", source), ("latent", target)):
        Progress.of(progress).report(f"copying, {side}")
        report[side] = _public(record["figures"][side]) | _behaviour(path, scene, copy_trials)
    return report | {"out": str(target), "minutes": (time.monotonic() - start) / 60, "run": record}


def _public(figures: dict[str, Any]) -> dict[str, Any]:
    return {
        name: figures[name]
        for name in ("cache_bytes_per_token", "cache_dtype", "perplexity", "standard_error")
    }


def _behaviour(path: str | Path, scene: _Scene, trials: int | None) -> dict[str, Any]:
    """What a checkpoint does, loaded from disk as a user would: copying, and a continuation."""
    model = load_model(path, dtype="float32")
    tokenizer = load_tokenizer(path, model.config)
    streams = tokenizer(scene.documents("held_out"), add_special_tokens=False, verbose=False)["input_ids"]
    filler = np.array([token for stream in streams for token in stream], dtype=np.int64)
    shares = copy_accuracy(model, tokenizer, trials=trials or scene.copy_trials, filler=filler)
    return {
        "copy_accuracy": {str(distance): share for distance, share in shares.items()},
        "continuation": generate_continuation(model, tokenizer, scene.prompt, 48),
    }


def _write(path: Path, scene: _Scene, split: Any, characters: int | None = None) -> None:
    """One JSON line a document, so that no separator has to be guessed; a seeded sample up to `characters`."""
    documents = scene.documents(split)
    if not documents:
        raise ValueError(
            f"this Python ships no standard library text for the part {split!r}; use a full installation"
        )
    random.Random(0).shuffle(documents)
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for text in documents:
            if characters is not None and written >= characters:
                break
            written += file.write(json.dumps({"text": text}) + "\n")
