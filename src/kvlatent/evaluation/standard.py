"""The evaluation behind `kvlatent eval`: every check on one model, and on its original beside it.

Both models read the same text, needles and shuffled spans, by the same code. Without a text the modules of the Python
standard library are read that the embedded model never saw: every installation carries them. Everything is refused
before anything is measured: an hour's work must not end at a bad option.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.checkpoints.source import check_same_vocabulary, name_and_fingerprint, resolve_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.evaluation.check import DATA, Check, CheckRequest
from kvlatent.evaluation.checks import CHECKS, DEFAULT_CHECKS
from kvlatent.evaluation.checks.text_perplexity import measure_text
from kvlatent.evaluation.diagnosis import diagnose
from kvlatent.evaluation.extent import Extent, choose_extent
from kvlatent.evaluation.perplexity import Perplexity
from kvlatent.evaluation.quality import measure, measure_models
from kvlatent.evaluation.result_models import Evaluation
from kvlatent.evaluation.scored_text import ScoredText
from kvlatent.evaluation.sequences import check_counts, shortest_context
from kvlatent.jobs.progress import Progress, Report
from kvlatent.jobs.record import environment
from kvlatent.jobs.scratch import scratch_folder

__all__ = ["evaluate", "standard_evaluation"]

_WINDOW = 512
_LARGEST_SEED = 2**32 - 1  # NumPy's, which lm-eval sets


def evaluate(
    model: str | Path | PreTrainedModel,
    data: str | Path | Dataset,
    *,
    against: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    block_size: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    separator: str | None = "<|endoftext|>",
    text_field: str = "text",
    progress: Progress | Report | None = None,
) -> dict[str, Any]:
    """Perplexity and cache bytes of a model, and of the original it came from when `against` is given.

    On a text they are those of `kvlatent eval --checks perplexity`, to the bit.

    Args:
        model: a directory, a hub id, a GGUF file or a loaded model.
        data: a text file or hub data set, all of which is scored; or blocks made by `text.corpus.evaluation_blocks`.
        against: the original.
        tokenizer: of the text; None takes the model's own (then `model` is no loaded one).
        block_size: tokens a window of the text; None takes 512, or the context where that is shorter.
        batch_size: windows or blocks read together; None takes 8, of a text fewer of a large model.
        max_tokens: score no more than so many tokens, from the start of the text; None scores all.
        dtype: "float32", "bfloat16", "float16" or None, what the checkpoint has; on models that are loaded already it is ignored.
        separator, text_field: how `data` splits into documents.
        progress: called with a step's name, tokens or blocks done, their number, and a note.

    Returns:
        {"latent": {perplexity, standard_error, loss, tokens, cache_bytes_per_token, cache_dtype, and of a text what
        `measure_documents` gives besides}} and, with `against`, "original" with the same keys, "ratio",
        "ratio_standard_error" and "cache_ratio".

    Raises:
        ValueError: the two models have different vocabularies, there is no text, a window is longer than the context,
            or an unknown dtype.
    """
    models, told = _load_models(model, against, dtype, device), Progress.of(progress)
    steps = {"latent": "measure", "original": "measure the original"}
    if isinstance(data, Dataset):
        blocks, at_once = data, 8 if batch_size is None else batch_size

        def measure_blocks(role: str, each: PreTrainedModel) -> tuple[dict[str, Any], Perplexity]:
            step = told.step(steps[role], len(blocks), tokens=len(blocks[0]["input_ids"]))
            return measure(each, blocks, batch_size=at_once, progress=step.to)

        return measure_models(models, measure_blocks)
    tokenizer = tokenizer or _load_tokenizer(model, models["latent"], ", or blocks as data")
    options = {
        "window": _choose_window(models, block_size),
        "batch_size": batch_size,
        "max_tokens": max_tokens,
    }
    with scratch_folder() as folder:
        documents = ScoredText(data, separator, text_field, folder, tokenizer).documents

    def measure_one(role: str, each: PreTrainedModel) -> tuple[dict[str, Any], Perplexity]:
        step = told.step(steps[role], tokens=1)  # tokens are what is counted
        return measure_text(each, tokenizer, documents, progress=step.to, **options)

    return measure_models(models, measure_one)


def standard_evaluation(
    model: str | Path | PreTrainedModel,
    data: str | Path | None = None,
    *,
    against: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    checks: Sequence[str] | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    separator: str | None = "<|endoftext|>",
    text_field: str = "text",
    seed: int = 0,
    progress: Progress | Report | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure a model, beside its original when `against` is given, and say what is wrong.

    Everything is checked before the first measurement, and an option that no check would look at is refused. What
    nobody chose is as much as two minutes on two cores hold, by the models' size (see `extent`).

    Args:
        model, against: directories, hub ids, GGUF files or loaded models.
        data: a text file or hub data set; None: the standard library text.
        tokenizer: of the text; None takes the model's own (then `model` is no loaded one).
        checks: by name; None takes them all, without `against` those that need no original, and of a very large model
            those that end in time.
        dtype, device: to load with.
        separator, text_field: how `data` splits into documents.
        seed: of everything random.
        progress: called with a step's name, what is done, of how much, and a note; at every step's begin already.
        say: called with a sentence where less is measured than of a small model.
        options: arguments of the checks by name; None, where nobody chose. `block_size`, tokens a window; `batch_size`,
            sequences at a time; `stride`, tokens by which the window of perplexity moves; `max_tokens`, scored for
            perplexity; `contexts`, of the needle, in tokens; `template`, a needle in words, with {key} and {value};
            `tasks`, names of lm-eval's tasks; `include_path`, a folder of your own; `limit`, questions a task.

    Returns:
        {"kind": "evaluation", "model", "original", "figures": {"latent", "original", "ratio", "ratio_standard_error",
        "cache_ratio", "fidelity", "tasks"}, "diagnosis", "record"}; what was not measured is left out.

    Raises:
        TypeError: an option that no check has.
        ValueError: nothing to measure, an option without a use, models of different vocabularies, too little text, or
            what a check refuses.
    """
    given = _fill_in(options | {DATA: data})
    chosen = _choose_checks(checks, given, against is not None)
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"a seed is between 0 and {_LARGEST_SEED}: got {seed}; try 0")
    start, told = time.perf_counter(), Progress.of(progress)
    told.report("load")
    models = _load_models(model, against, dtype, device)
    tokenizer = tokenizer or _load_tokenizer(model, models["latent"])
    with scratch_folder() as folder:
        text = ScoredText(data, separator, text_field, folder, tokenizer)
        window, limit = _choose_window(models, given["block_size"]), shortest_context(models.values())
        request = CheckRequest(models, tokenizer, text, given, window, limit, seed)
        extent = choose_extent(request, chosen, optional=checks is None)
        chosen = [check for check in chosen if check.extents is None or check.name in extent.measured]
        told.report("read the text")
        _refuse(request, chosen, extent)
        if say is not None and extent.sentence is not None:
            say(extent.sentence)
        figures = _measure(request, chosen, extent, told)
    sources = {"latent": model, "original": against}
    about = {role: _describe(each, sources[role]) for role, each in models.items()}
    record = environment(models["latent"].device.type) | {"seed": seed, "text": text.about()}
    record["extent"] = extent.about()
    document = {
        "kind": "evaluation",
        "model": about["latent"],
        "original": about.get("original"),
        "figures": figures,
        "diagnosis": diagnose(figures),
        "record": record | {"seconds": round(time.perf_counter() - start, 1)},
    }
    return Evaluation.checked(document)


def _fill_in(options: Mapping[str, Any]) -> dict[str, Any]:
    """A value for every argument of the checks, None where nobody chose."""
    arguments = dict.fromkeys(name for check in CHECKS for name in check.arguments)
    for name in options:
        if name not in arguments:
            raise TypeError(f"an evaluation has no option {name!r}; it has {', '.join(arguments)}")
    return arguments | dict(options)


def _choose_checks(names: Sequence[str] | None, given: Mapping[str, Any], paired: bool) -> list[Check]:
    """The checks to run, in order; None asks for all that make sense.

    Args:
        given: arguments by name, None where nobody chose.
        paired: whether there is an original.

    Raises:
        ValueError: an unknown check, nothing to measure, a comparison without an original, or an option without a use.
    """
    for name in names or ():
        if name not in DEFAULT_CHECKS:
            raise ValueError(f"unknown check {name!r}; choose of {', '.join(DEFAULT_CHECKS)}")
    chosen = []
    for check in CHECKS:
        if check.asked_by is not None:
            wanted = given[check.asked_by] is not None
        elif names is None:
            wanted = paired or not check.needs_original
        else:
            wanted = check.name in names
        if wanted and check.needs_original and not paired:
            raise ValueError(
                f"{check.name} is the distance from an original: got --checks with {check.name} and no --against; name "
                f"the original, or leave {check.name} out"
            )
        chosen += [check] if wanted else []
    if not chosen:
        raise ValueError(
            f"an evaluation measures something: got 0 checks and 0 tasks; name some of {', '.join(DEFAULT_CHECKS)}, or "
            "leave --checks out"
        )
    for name, value in given.items():
        if value is not None and not any(name in check.arguments for check in chosen):
            users = [check.name for check in CHECKS if name in check.arguments]
            shown = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            raise ValueError(
                f"--{name.replace('_', '-')} is for {' and '.join(users)} only: got {shown}, and what is measured is "
                f"{', '.join(check.name for check in chosen)}; leave it out, or ask for {users[0]}"
            )
    return chosen


def _choose_window(models: Mapping[str, Any], size: int | None) -> int:
    """Tokens of a window that all models can read; None takes 512, or the context where that is shorter."""
    limit = shortest_context(models.values())
    default = min(_WINDOW, limit or _WINDOW)
    if size is not None and (size < 2 or (limit is not None and size > limit)):
        context = "" if limit is None else f", the model's context has {limit}"
        raise ValueError(
            f"a window has 2 tokens or more, and no more than the model's context: got --block-size {size}{context}; "
            f"give {default}, or leave it out"
        )
    return default if size is None else size


def _refuse(request: CheckRequest, checks: Sequence[Check], extent: Extent) -> None:
    """Raise, before any model runs, what the checks would raise for their arguments and the text."""
    check_counts(batch_size=(request.given["batch_size"], 1))
    for check in checks:
        check.refuse(request, check.options(request, extent.measured.get(check.name, {})))
    if any(DATA in check.arguments for check in checks):
        _ = request.text.documents  # a text that cannot be read, or holds none


def _measure(
    request: CheckRequest, checks: Sequence[Check], extent: Extent, progress: Progress
) -> dict[str, Any]:
    """The figures of all checks: by role, and beside them those of the pair."""
    figures: dict[str, Any] = {role: {} for role in request.models}
    for check in checks:
        options = check.options(request, extent.measured.get(check.name, {}))
        measured = dict(check.run(request, options, progress))
        for role in figures.keys() & request.models.keys() & measured.keys():
            figures[role] |= measured.pop(role)
        figures |= measured
    return figures


def _load_models(model: Any, against: Any, dtype: str | None, device: str) -> dict[str, PreTrainedModel]:
    """By role, known to have one vocabulary."""
    models = {"latent": resolve_model(model, dtype, device)}
    if against is not None:
        models["original"] = resolve_model(against, dtype, device)
        check_same_vocabulary(models["latent"], models["original"])
    return models


def _load_tokenizer(source: Any, model: PreTrainedModel, instead: str = "") -> PreTrainedTokenizerBase:
    if isinstance(source, PreTrainedModel):
        raise ValueError(f"a loaded model comes without its tokenizer: pass tokenizer={instead}")  # noqa: TRY004
    return load_tokenizer(source, model.config)


def _describe(model: PreTrainedModel, source: Any) -> dict[str, Any]:
    """Name and fingerprint, and the latent config where there is one."""
    latent = getattr(model.config, "kv_latent", None)
    return name_and_fingerprint(model, source) | ({} if latent is None else {"latent": latent})
