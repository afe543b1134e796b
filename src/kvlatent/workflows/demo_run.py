"""The main job on what every installation has: the embedded model, and the standard library's own text.

The model is compressed to half its cache with text from modules it may train on, and measured on modules that neither
its pretraining nor this run has seen. Perplexity alone would not notice a cache that lost distant tokens, so copying
is measured too.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.evaluation.copying import copy_accuracy
from kvlatent.jobs.progress import Progress, Report
from kvlatent.text.standard_library import model_path, stdlib_documents
from kvlatent.workflows.compress_checkpoint import compress
from kvlatent.workflows.generate import generate_continuation

__all__ = ["demo"]

DEFAULT_OUT = Path("kvlatent-demo")
# For presets that need training, and for the text that the calibrated one draws its blocks from; stages and learning
# rates are those of the recipe.
_TOKENS = 800_000
DEFAULT_PRESET = "calibrated"
_EVALUATION_TOKENS = 32_768
_CHARACTERS_PER_TOKEN = 6  # at the most: a training text that long is read about once
_COPY_TRIALS = 50
_PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"


def demo(
    out: str | Path | None = None,
    *,
    kv: float = 0.5,
    preset: str = DEFAULT_PRESET,
    tokens: int | None = None,
    overwrite: bool = False,
    copy_trials: int = _COPY_TRIALS,
    overrides: tuple[str, ...] = (),
    progress: Progress | Report | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compress the embedded model on standard library text, and measure both models.

    Args:
        out: directory to write; None is `./kvlatent-demo`, which an earlier demo's output may be replaced in.
        kv: share of the cache to keep.
        preset: of the conversion.
        tokens: of both stages together; left out, the calibrated preset is not trained at all, others on 800,000.
        overwrite: replace what `out` holds.
        copy_trials: random strings a distance.
        overrides: `section.key=value` strings on top of the demo's recipe.
        progress, say: for people who wait.

    Returns:
        {"original": {...}, "latent": {...}, "prompt", "out", "minutes", "run"}; each side with cache_bytes_per_token,
        cache_dtype, perplexity, standard_error, copy_accuracy (distance in tokens -> share) and continuation.

    Raises:
        FileNotFoundError: the package was installed without its model.
        ValueError: this Python ships no standard library text.
    """
    start, source = time.monotonic(), model_path()
    target = DEFAULT_OUT if out is None else Path(out)
    overwrite = overwrite or (out is None and (target / "run.json").is_file())
    with tempfile.TemporaryDirectory(prefix="kvlatent-demo-") as folder:
        wanted = _TOKENS if tokens is None else tokens
        text = _write(Path(folder) / "train.jsonl", "train", _CHARACTERS_PER_TOKEN * wanted)
        held_out = _write(Path(folder) / "held_out.jsonl", "held_out")
        if say is not None:
            say(
                f"compressing the embedded model to {kv:.0%} of its cache, preset {preset}, on the standard library "
                "of this Python"
            )
        record = compress(
            source,
            text,
            target,
            kv=kv,
            tokens=wanted,
            stages="none" if tokens is None and preset == "calibrated" else "both",
            eval_data=held_out,
            eval_tokens=_EVALUATION_TOKENS,
            overrides=["data.block_size=512", *overrides],
            preset=preset,
            overwrite=overwrite,
            progress=progress,
        )
    report: dict[str, Any] = {"prompt": _PROMPT}
    for side, path in (("original", source), ("latent", target)):
        Progress.of(progress).report(f"copying, {side}")
        report[side] = _public(record["figures"][side]) | _behaviour(path, copy_trials)
    return report | {"out": str(target), "minutes": (time.monotonic() - start) / 60, "run": record}


def _public(figures: dict[str, Any]) -> dict[str, Any]:
    return {
        name: figures[name]
        for name in ("cache_bytes_per_token", "cache_dtype", "perplexity", "standard_error")
    }


def _behaviour(path: Path, trials: int) -> dict[str, Any]:
    """What a checkpoint does, loaded from disk as a user would: copying, and a continuation."""
    model = load_model(path, dtype="float32")
    tokenizer = load_tokenizer(path, model.config)
    shares = copy_accuracy(model, tokenizer, trials=trials)
    return {
        "copy_accuracy": {str(distance): share for distance, share in shares.items()},
        "continuation": generate_continuation(model, tokenizer, _PROMPT, 48),
    }


def _write(path: Path, split: Any, characters: int | None = None) -> Path:
    """One JSON line a module, so that no separator has to be guessed; a seeded sample up to `characters`."""
    documents = stdlib_documents(split)
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
    return path
