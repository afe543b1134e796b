"""What every cell measures: perplexity beside the original's on the same blocks, and the live bytes of the cache."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from kvlatent.evaluation.perplexity import Perplexity, perplexity, perplexity_ratio
from kvlatent.evaluation.quality import measure
from kvlatent.jobs.progress import Progress
from kvlatent_lab.study.subject import Subject

__all__ = ["measured", "paired", "ratio_of"]


def measured(
    subject: Subject, model: PreTrainedModel, progress: Progress, part: str = "reported"
) -> dict[str, Any]:
    """Figures of a latent model on a part of the text, beside the original's.

    Returns:
        perplexity, standard_error, loss (nats a token), tokens, original_perplexity, original_loss, ratio,
        ratio_standard_error (of paired blocks; both errors are left out for a single block), cache_bytes_per_token and
        original_cache_bytes_per_token (read off the live caches), cache_ratio.
    """
    blocks = subject.blocks(part)
    original, reference = subject.original(part)
    step = progress.step("measure", len(blocks), tokens=subject.block_size)
    with subject.precision():
        figures, result = measure(model, blocks, progress=step.to)
    size, whole = figures["cache_bytes_per_token"], original["cache_bytes_per_token"]
    found = paired(result, reference) | {
        "original_perplexity": original["perplexity"],
        "original_loss": original["loss"],
        "cache_bytes_per_token": size,
        "original_cache_bytes_per_token": whole,
        "cache_ratio": size / whole,
    }
    return found


def paired(result: Perplexity, reference: Perplexity) -> dict[str, Any]:
    """Perplexity, and its ratio to a reference on the same blocks; errors only where there are several blocks."""
    ratio, error = perplexity_ratio(result, reference)
    found = {
        "perplexity": result.perplexity,
        "standard_error": result.standard_error,
        "loss": result.loss,
        "tokens": result.tokens,
        "ratio": ratio,
        "ratio_standard_error": error,
    }
    return {name: value for name, value in found.items() if value is not None}


def ratio_of(subject: Subject, model: PreTrainedModel) -> float:
    """Perplexity over the original's on the reported text, nothing else."""
    with subject.precision():
        result = perplexity(model, subject.blocks())
    return perplexity_ratio(result, subject.original()[1])[0]
