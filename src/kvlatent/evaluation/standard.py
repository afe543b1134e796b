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

from kvlatent.checkpoints.source import check_same_vocabulary, named, opened
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.evaluation.check_options import CHECKS, check_all, checks_of, options_of
from kvlatent.evaluation.checks.causality import causality
from kvlatent.evaluation.checks.fidelity import fidelity
from kvlatent.evaluation.checks.needle import needle
from kvlatent.evaluation.checks.tasks import compare_tasks, run_tasks
from kvlatent.evaluation.checks.word_order import order
from kvlatent.evaluation.diagnosis import diagnose
from kvlatent.evaluation.extent import Extent
from kvlatent.evaluation.perplexity import Perplexity, perplexity_ratio
from kvlatent.evaluation.quality import cache_bytes_per_token
from kvlatent.evaluation.result_models import Evaluation
from kvlatent.evaluation.scored_text import Text
from kvlatent.evaluation.sliding import measure_sliding
from kvlatent.jobs.record import environment

__all__ = ["CHECKS", "standard_evaluation"]

_CACHE_POSITIONS = 64

Progress = Callable[[str, int, int, str], None]


def standard_evaluation(
    model: str | Path | PreTrainedModel,
    data: str | Path | None = None,
    *,
    against: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    checks: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    block_size: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    contexts: Sequence[int] | None = None,
    template: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    separator: str | None = "<|endoftext|>",
    text_field: str = "text",
    seed: int = 0,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a model, beside its original when `against` is given, and say what is wrong.

    Everything is checked before the first measurement, and an option that no check would look at is refused. What
    nobody chose is as much as two minutes on two cores hold, by the models' size (see `extent`).

    Args:
        model, against: directories, hub ids or loaded models.
        data: a text file or hub data set; None: the standard library text.
        tokenizer: of the text; None takes the model's own (then `model` is a directory or hub id).
        checks: of `CHECKS`; None takes them all, without `against` all but "fidelity", which needs it, and of a very
            large model those that end in time.
        tasks, include_path, limit: see `tasks.run_tasks`; None runs no task.
        block_size: tokens of a window of perplexity and fidelity, and at most of order; None takes 512, or the
            context where that is shorter.
        stride: see `sliding.measure_sliding`.
        batch_size: sequences at a time, in every check; None takes each check's own.
        max_tokens: of perplexity alone, so many tokens are scored; None scores all of `data`, of the standard library
            text 50,000, of a large model fewer.
        contexts, template: see `needle.needle`; by default 128 tokens and the model's context, or what of it is
            read in time.
        dtype, device: to load with.
        separator, text_field: how `data` splits into documents.
        seed: of everything random.
        progress: called with a step's name, what is done, of how much, and a note; at every step's begin already.
        say: called with a sentence where less is measured than of a small model.

    Returns:
        {"kind": "evaluation", "model", "original", "figures": {"latent", "original", "ratio", "ratio_standard_error",
        "cache_ratio", "fidelity", "tasks"}, "diagnosis", "record"}; what was not measured is left out.

    Raises:
        ValueError: nothing to measure, an option without a use, models of different vocabularies, too little text, or
            what a check refuses.
    """
    given: dict[str, Any] = {
        "data": data,
        "block_size": block_size,
        "stride": stride,
        "batch_size": batch_size,
    }
    given |= {"max_tokens": max_tokens, "contexts": contexts, "template": template}
    given |= {"limit": limit, "include_path": include_path}
    wanted = checks_of(checks, tasks, against is not None, given)
    start = time.perf_counter()
    if progress is not None:
        progress("load", 0, 0, "")
    models = {"latent": opened(model, dtype, device)}
    if against is not None:
        models["original"] = opened(against, dtype, device)
        check_same_vocabulary(models["latent"], models["original"])
    tokenizer = tokenizer or _tokenizer(model, models["latent"])
    with tempfile.TemporaryDirectory(prefix="kvlatent-") as folder:
        text = Text(data, separator, text_field, Path(folder), tokenizer)
        extent, options = options_of(models, given, wanted, seed=seed, optional=checks is None)
        if progress is not None:
            progress("read the text", 0, 0, "")
        check_all(list(extent.measured), tasks, models, tokenizer, text, options, extent)
        if say is not None and extent.sentence is not None:
            say(extent.sentence)
        bench = _Bench(models, tokenizer, text, options, extent, progress)
        for name in [name for name in CHECKS if name in extent.measured]:
            getattr(bench, name)()
        if tasks:
            bench.tasks(tasks)
    sources = {"latent": model, "original": against}
    about = {role: _about(each, sources[role]) for role, each in models.items()}
    record = environment(models["latent"].device.type) | {"seed": seed, "text": text.about()}
    record["extent"] = extent.about()
    document = {
        "kind": "evaluation",
        "model": about["latent"],
        "original": about.get("original"),
        "figures": bench.figures,
        "diagnosis": diagnose(bench.figures),
        "record": record | {"seconds": round(time.perf_counter() - start, 1)},
    }
    return Evaluation.checked(document)


class _Bench:
    """Both models at work, one check after another; `figures` collects what they say."""

    def __init__(
        self,
        models: dict[str, PreTrainedModel],
        tokenizer: Any,
        text: Text,
        options: dict[str, dict[str, Any]],
        extent: Extent,
        progress: Progress | None,
    ) -> None:
        self.models, self.tokenizer, self.text, self.options = models, tokenizer, text, options
        self.extent, self.progress = extent, progress
        self.figures: dict[str, Any] = {role: {} for role in models}

    def perplexity(self) -> None:
        """Perplexity and cache bytes of each, and what one is over the other."""
        found: dict[str, Perplexity] = {}
        documents = self.text.documents
        for role, model in self.models.items():
            report = self._report(f"perplexity, {role}")
            figures, found[role] = measure_sliding(
                model, self.tokenizer, documents, progress=report, **self.options["perplexity"]
            )
            ids = self.tokenizer(documents[0], return_tensors="pt")["input_ids"][:, :_CACHE_POSITIONS]
            figures["cache_bytes_per_token"] = cache_bytes_per_token(model, ids)
            figures["cache_dtype"] = str(model.dtype).removeprefix("torch.")
            self.figures[role] |= figures
        if "original" in found:
            ratio, error = perplexity_ratio(found["latent"], found["original"])
            both = [self.figures[role]["cache_bytes_per_token"] for role in ("latent", "original")]
            self.figures |= {"ratio": ratio, "ratio_standard_error": error, "cache_ratio": both[0] / both[1]}

    def fidelity(self) -> None:
        """Distance of the latent model from its original."""
        report = self._report("fidelity")
        number = self.extent.measured["fidelity"]["blocks"]
        rows = self.models["latent"].config.vocab_size
        blocks = self.text.blocks(self.tokenizer, rows, self.options["perplexity"]["window"], number)
        pair = [self.models[role] for role in ("original", "latent")]
        self.figures["fidelity"] = fidelity(*pair, blocks, progress=report, **self.options["fidelity"])

    def needle(self) -> None:
        """Needles in the text, found by each."""
        for role, model in self.models.items():
            report, options = self._report(f"needle, {role}"), self.options["needle"]
            self.figures[role]["needle"] = needle(
                model, self.tokenizer, haystack=self.text.documents, progress=report, **options
            )

    def order(self) -> None:
        """The order of near tokens, as each knows it."""
        for role, model in self.models.items():
            report, options = self._report(f"order, {role}"), self.options["order"]
            self.figures[role]["order"] = order(
                model, self.text.documents, self.tokenizer, progress=report, **options
            )

    def causality(self) -> None:
        """Whether each looks ahead."""
        for role, model in self.models.items():
            self._report(f"causality, {role}")
            self.figures[role]["causality"] = causality(model, **self.options["causality"])

    def tasks(self, names: Sequence[str]) -> None:
        """lm-eval's tasks on each, and their differences."""
        for number, (role, model) in enumerate(self.models.items()):
            if self.progress is not None:
                self.progress("tasks", number, len(self.models), role)
            self.figures[role]["tasks"] = run_tasks(model, self.tokenizer, names, **self.options["tasks"])
        if "original" in self.models:
            pair = [self.figures[role]["tasks"] for role in ("original", "latent")]
            self.figures["tasks"] = compare_tasks(*pair)

    def _report(self, step: str) -> Callable[[int, int], None] | None:
        """What a check calls; the step is told at once, before it has read its text."""
        report = self.progress
        if report is None:
            return None
        report(step, 0, 0, "")
        return lambda done, total: report(step, done, total, "")


def _tokenizer(source: str | Path | PreTrainedModel, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    if isinstance(source, PreTrainedModel):
        raise ValueError("a loaded model comes without its tokenizer: pass tokenizer=")  # noqa: TRY004
    return load_tokenizer(source, model.config)


def _about(model: PreTrainedModel, source: Any) -> dict[str, Any]:
    """Name and fingerprint, and the latent config where there is one."""
    latent = getattr(model.config, "kv_latent", None)
    return named(model, source) | ({} if latent is None else {"latent": latent})
