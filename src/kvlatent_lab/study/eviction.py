"""Fewer tokens on top of narrower ones: a latent cache under token eviction, as in the paper's Table 4.

The methods are those of the library kvpress. Its releases pin an older transformers, so it lives in an environment of its
own, and `press_worker` runs there on exported checkpoints, which carry their modelling file. A cache is filled with the
first half of a stretch of text and thinned once; the second half is scored against what is left.

kvpress gathers keys and values by one head width, and asks the decoder for its rotary table: so both widths are equal
here, and one table serves the model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvlatent.checkpoints.gguf_files import open_gguf
from kvlatent.checkpoints.save import save
from kvlatent.evaluation.perplexity import Perplexity, summarise
from kvlatent.jobs.atomic import atomic_directory
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.scratch import scratch_folder
from kvlatent_lab.study.grid_cells import Cell, Grid, Scale, widths_of
from kvlatent_lab.study.measure_cell import compare_losses, forget, train_cell
from kvlatent_lab.study.press_worker import PRESSES
from kvlatent_lab.study.subject import Subject

__all__ = ["EVICTION"]

EVICTED = (0.5, 0.75)
HOW = (
    "token eviction needs kvpress, whose releases pin an older transformers, so give it an environment of its own: "
    "`python -m venv kvpress-env && kvpress-env/bin/pip install torch==2.13.0 kvpress==0.5.5`, then pass "
    "--python kvpress-env/bin/python"
)
_SHORTEST = 65  # SnapKV scores by the last 64 tokens of a context and needs one more


def eviction_cells(scale: Scale) -> list[Cell]:
    """The original and latent models at half the width, under every method; the paper's preset where it is trained."""
    models: dict[str, dict[str, Any]] = {
        "original": {"d_qk": scale.head_dim, "d_vo": scale.head_dim, "preset": "own-frequency"}
    }
    for width in widths_of(scale.head_dim, (2,)):
        narrow = {"d_qk": width, "d_vo": width, **scale.trained()}
        models["calibrated"] = {"preset": "calibrated", "choices": {"table": "model"}, **narrow}
        if scale.tokens:
            models["paper"] = {"preset": "paper", **narrow}
    methods = [("none", 0.0), *((press, share) for share in EVICTED for press in PRESSES)]
    return [
        Cell(
            f"{model}-{press}{f'-{share:g}' if share else ''}-seed{seed}",
            seed=seed,
            extra={"model": model, "press": press, "evicted": share},
            **options,
        )
        for press, share in methods
        for model, options in models.items()
        for seed in (scale.seeds[:1] if model == "original" else scale.seeds)
    ]


def find_kvpress(python: str | None) -> dict[str, Any]:
    """The interpreter that has kvpress, and versions there.

    Raises:
        ValueError: there is none, or kvpress cannot be imported in it.
    """
    if python is None and importlib.util.find_spec("kvpress") is None:
        raise ValueError(HOW)
    code = (
        "import json, kvpress; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in ('kvpress', 'transformers', 'torch')}))"
    )
    command = [python or sys.executable, "-I", "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
        versions = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError) as error:
        raise ValueError(
            f"{python or sys.executable} cannot import kvpress: {_last(error)}; {HOW}"
        ) from error
    return {"python": python or sys.executable, "versions": versions}


def check_context(subject: Subject) -> None:
    """Raise `ValueError` unless half a block is long enough to evict from."""
    if subject.block_size // 2 < _SHORTEST:
        raise ValueError(
            f"half a block must hold {_SHORTEST} tokens to evict some of them: got data.block_size={subject.block_size}; "
            f"pass --set data.block_size={2 * _SHORTEST}, or take a model of longer context"
        )


def measure_eviction(subject: Subject, cell: Cell, progress: Progress) -> dict[str, Any]:
    """Perplexity of text behind a thinned context, beside the original's behind a whole one, and the bytes kept."""
    original = subject.remembered("eviction-original", lambda: _score(subject, _original(subject)))
    if cell.extra["model"] == "original":
        checkpoint, on_the_way = _original(subject), {}
    else:
        checkpoint, on_the_way = _export(subject, cell, progress)
    progress.report(f"score, {cell.extra['press']}")
    own = _score(subject, checkpoint, cell)
    figures = compare_losses(_perplexity(own), _perplexity(original))
    tokens = own["context"] * len(own["losses"])
    size, whole = own["cache_bytes"] / tokens, original["cache_bytes"] / tokens
    return {
        **figures,
        "original_perplexity": _perplexity(original).perplexity,
        "context": own["context"],
        "cache_bytes_per_token": size,
        "original_cache_bytes_per_token": whole,
        "cache_ratio": size / whole,
        **on_the_way,
    }


def _original(subject: Subject) -> Path | str:
    """Where the worker finds the original: weights of a GGUF file are saved plain, since it need not read such files."""
    if open_gguf(subject.source.model) is None:
        return subject.source.model
    path = subject.folder.work / "checkpoints" / "original"

    def make() -> dict[str, Any]:
        path.parent.mkdir(exist_ok=True)
        with atomic_directory(path, overwrite=True) as folder:
            subject.model.save_pretrained(folder)
        return {}

    subject.remembered("checkpoint-original", make)
    return path


def _export(subject: Subject, cell: Cell, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that all methods of one model share, made once, and the figures of its training."""
    base = replace(cell, name=f"{cell.extra['model']}-seed{cell.seed}", extra={})
    path = subject.folder.work / "checkpoints" / base.name

    def make() -> dict[str, Any]:
        model, on_the_way = train_cell(subject, base, progress)
        path.parent.mkdir(exist_ok=True)
        save(model, path, tokenizer=subject.tokenizer, overwrite=True)
        forget(subject, base)
        return on_the_way

    return path, subject.remembered(f"checkpoint-{base.name}", make)


def _score(subject: Subject, checkpoint: Any, cell: Cell | None = None) -> dict[str, Any]:
    """What the worker says of a checkpoint; without a cell nothing is evicted.

    Raises:
        ChildProcessError: the worker failed.
    """
    blocks = torch.as_tensor(subject.running_blocks()[:]["input_ids"]).numpy()
    context = subject.block_size // 2
    extra = {"press": "none", "evicted": 0.0} if cell is None else dict(cell.extra)
    job = {
        "checkpoint": str(checkpoint),
        "latent": cell is not None and cell.extra["model"] != "original",
        "context": context,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "device": subject.device,
        "threads": torch.get_num_threads(),
        **extra,
    }
    with scratch_folder() as folder:
        files = {name: folder / name for name in ("job.json", "result.json", "blocks.npy")}
        np.save(files["blocks.npy"], blocks)
        files["job.json"].write_text(json.dumps(job | {"blocks": str(files["blocks.npy"])}))
        worker = Path(__file__).with_name("press_worker.py")
        command = [subject.python or sys.executable, "-I", str(worker)]
        command += [str(files["job.json"]), str(files["result.json"])]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
        except subprocess.CalledProcessError as error:
            raise ChildProcessError(f"the worker with kvpress failed: {_last(error)}") from error
        return json.loads(files["result.json"].read_text()) | {"context": context}


def _perplexity(scores: dict[str, Any]) -> Perplexity:
    return summarise(scores["losses"], [scores["tokens"]] * len(scores["losses"]))


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def _last(error: Exception) -> str:
    """The last line of what a process said, else how it ended; its command, a script of several lines, is no reason."""
    if isinstance(error, subprocess.CalledProcessError):
        said = (error.stderr or "").strip().splitlines()
        return said[-1].strip() if said else f"it ended with exit status {error.returncode} and said nothing"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "it did not name its versions"


EVICTION = Grid(
    "token-eviction",
    "a latent cache with token eviction on top (Table 4 of the paper)",
    eviction_cells,
    measure_eviction,
    requires=find_kvpress,
    check=check_context,
)
