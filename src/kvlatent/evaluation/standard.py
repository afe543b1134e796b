"""The evaluation behind `kvlatent eval`: every check of this folder on one model, and on its original beside it.

Both models read the same text, needles and shuffled spans, by the same code. Without a text the modules of the Python
standard library are read that the embedded model never saw: every installation carries them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..hub import load_tokenizer
from ..perplexity import Perplexity, perplexity_ratio
from ..record import environment
from ..sources import check_same_vocabulary, named, opened
from .causality import causality
from .diagnosis import diagnose
from .fidelity import fidelity
from .needle import needle
from .order import order
from .quality import cache_bytes_per_token
from .reading import Text
from .sequences import context_limit
from .sliding import measure_sliding
from .tasks import compare_tasks, run_tasks

__all__ = ["CHECKS", "standard_evaluation"]

CHECKS = ("perplexity", "fidelity", "needle", "order", "causality")
"""What is measured when nothing is asked for; "tasks" comes with names of tasks."""

_CACHE_POSITIONS = 64
_SHORT_CONTEXT = (
    128  # of the needle, beside the longest; so that both checks of position take a minute, not five
)
_NEEDLE_TRIALS = 8
_SPAN_WINDOW, _SPAN_TRIALS = 256, 16

Progress = Callable[[str, int, int, str], None]


def standard_evaluation(
    model: str | Path | PreTrainedModel,
    data: str | Path | None = None,
    *,
    against: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    checks: Sequence[str] = CHECKS,
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    block_size: int = 512,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    contexts: Sequence[int] | None = None,
    template: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    separator: str | None = "<|endoftext|>",
    text_field: str = "text",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model, beside its original when `against` is given, and say what is wrong.

    Args:
        model, against: directories, hub ids or loaded models.
        data: a text file or hub data set; None: the standard library text, `reading.STANDARD_TOKENS` of it.
        tokenizer: of the text; None takes the model's own (then `model` is a directory or hub id).
        checks: of `CHECKS`; "fidelity" needs `against`, and is passed over without.
        tasks, include_path, limit: see `tasks.run_tasks`.
        block_size: tokens of a perplexity window (at most the context); stride: see `sliding.measure_sliding`.
        max_tokens: score so many tokens; None scores all of `data`.
        contexts, template: see `needle.needle`; by default 128 tokens and the model's context.
        dtype, device: to load with.
        separator, text_field: how `data` splits into documents.
        seed: of everything random.
        progress: called with a step's name, what is done, of how much, and a note.

    Returns:
        {"kind": "evaluation", "model", "original", "figures": {"latent", "original", "ratio", "ratio_standard_error",
        "cache_ratio", "fidelity", "tasks"}, "diagnosis", "record"}; what was not measured is left out.

    Raises:
        ValueError: an unknown check, models of different vocabularies, too little text, or what a check refuses.
    """
    _check_names(checks)
    start = time.perf_counter()
    models = {"latent": opened(model, dtype, device)}
    if against is not None:
        models["original"] = opened(against, dtype, device)
        check_same_vocabulary(models["latent"], models["original"])
    tokenizer = tokenizer or _tokenizer(model, models["latent"])
    bench = _Bench(models, tokenizer, batch_size, seed, progress)
    with tempfile.TemporaryDirectory(prefix="kvlatent-") as folder:
        text = Text(data, separator, text_field, Path(folder), max_tokens)
        size = min(block_size, context_limit(models["latent"].config) or block_size)
        if "perplexity" in checks:
            bench.perplexity(text, size, stride)
        if "fidelity" in checks and against is not None:
            bench.fidelity(text, size)
        if "needle" in checks:
            contexts = contexts or _two_contexts(models["latent"])
            bench.each("needle", lambda m, p: needle(
                m, tokenizer, haystack=text.documents, contexts=contexts, template=template, trials=_NEEDLE_TRIALS, seed=seed, progress=p
            ))  # fmt: skip
        if "order" in checks:
            length = min(_SPAN_WINDOW, size)
            bench.each("order", lambda m, p: order(
                m, text.documents, tokenizer, length=length, trials=_SPAN_TRIALS, seed=seed, progress=p
            ))  # fmt: skip
        if "causality" in checks:
            bench.each("causality", lambda m, p: causality(m, seed=seed))
        if tasks:
            bench.tasks(tasks, include_path, limit)
    sources = {"latent": model, "original": against}
    about = {role: _about(each, sources[role]) for role, each in models.items()}
    record = environment(models["latent"].device.type) | {"seed": seed, "text": text.about()}
    return {
        "kind": "evaluation",
        "model": about["latent"],
        "original": about.get("original"),
        "figures": bench.figures,
        "diagnosis": diagnose(bench.figures),
        "record": record | {"seconds": round(time.perf_counter() - start, 1)},
    }


class _Bench:
    """Both models at work, one check after another; `figures` collects what they say."""

    def __init__(
        self,
        models: dict[str, PreTrainedModel],
        tokenizer: Any,
        batch_size: int,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.models, self.tokenizer, self.batch_size, self.seed = models, tokenizer, batch_size, seed
        self.progress = progress
        self.figures: dict[str, Any] = {role: {} for role in models}

    def each(self, name: str, check: Callable[[Any, Any], Any]) -> None:
        """One check on every model."""
        for role, model in self.models.items():
            self.figures[role][name] = check(model, self._report(f"{name}, {role}"))

    def perplexity(self, text: Text, size: int, stride: int | None) -> None:
        """Perplexity and cache bytes of each, and what one is over the other."""
        found: dict[str, Perplexity] = {}
        documents = text.documents
        for role, model in self.models.items():
            figures, found[role] = measure_sliding(
                model,
                self.tokenizer,
                documents,
                window=size,
                stride=stride,
                batch_size=self.batch_size,
                max_tokens=text.max_tokens,
                progress=self._report(f"perplexity, {role}"),
            )
            ids = self.tokenizer(documents[0], return_tensors="pt")["input_ids"][:, :_CACHE_POSITIONS]
            figures["cache_bytes_per_token"] = cache_bytes_per_token(model, ids)
            figures["cache_dtype"] = str(model.dtype).removeprefix("torch.")
            self.figures[role] |= figures
        if "original" in found:
            ratio, error = perplexity_ratio(found["latent"], found["original"])
            both = [self.figures[role]["cache_bytes_per_token"] for role in ("latent", "original")]
            self.figures |= {"ratio": ratio, "ratio_standard_error": error, "cache_ratio": both[0] / both[1]}

    def fidelity(self, text: Text, size: int) -> None:
        """Distance of the latent model from its original."""
        self.figures["fidelity"] = fidelity(
            self.models["original"],
            self.models["latent"],
            text.blocks(self.tokenizer, size),
            seed=self.seed,
            progress=self._report("fidelity"),
        )

    def tasks(self, names: Sequence[str], include_path: str | Path | None, limit: int | None) -> None:
        """lm-eval's tasks on each, and their differences."""
        for number, (role, model) in enumerate(self.models.items()):
            if self.progress is not None:
                self.progress("tasks", number, len(self.models), role)
            self.figures[role]["tasks"] = run_tasks(
                model, self.tokenizer, names, include_path=include_path, limit=limit, seed=self.seed
            )
        if "original" in self.models:
            pair = [self.figures[role]["tasks"] for role in ("original", "latent")]
            self.figures["tasks"] = compare_tasks(*pair)

    def _report(self, step: str) -> Callable[[int, int], None] | None:
        report = self.progress
        return None if report is None else lambda done, total: report(step, done, total, "")


def _two_contexts(model: PreTrainedModel) -> list[int] | None:
    """A short context and the longest."""
    limit = context_limit(model.config)
    return None if limit is None else sorted({min(_SHORT_CONTEXT, limit), limit})


def _check_names(checks: Sequence[str]) -> None:
    for name in checks:
        if name not in CHECKS:
            raise ValueError(f"unknown check {name!r}; choose of {', '.join(CHECKS)}")


def _tokenizer(source: str | Path | PreTrainedModel, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    if isinstance(source, PreTrainedModel):
        raise ValueError("a loaded model comes without its tokenizer: pass tokenizer=")  # noqa: TRY004
    return load_tokenizer(source, model.config)


def _about(model: PreTrainedModel, source: Any) -> dict[str, Any]:
    """Name and fingerprint, and the latent config where there is one."""
    latent = getattr(model.config, "kv_latent", None)
    return named(model, source) | ({} if latent is None else {"latent": latent})
