"""What an evaluation is asked for, checked before anything is measured: an hour's work must not end at a bad option.

Each check refuses its own arguments (`check_needle` and its like). Here stands what they share, what they are given
where nobody chose, and the refusal of options that nothing of what is measured would look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvlatent.evaluation.checks.fidelity import check_fidelity
from kvlatent.evaluation.checks.needle import check_needle
from kvlatent.evaluation.checks.shuffling import check_order
from kvlatent.evaluation.checks.tasks import check_tasks
from kvlatent.evaluation.extent import CAUSALITY_TOKENS, Extent, extent_of
from kvlatent.evaluation.scored_text import Text
from kvlatent.evaluation.sequences import check_counts, context_limit
from kvlatent.evaluation.windows import check_window

__all__ = ["CHECKS", "check_all", "checks_of", "options_of"]

CHECKS = ("perplexity", "fidelity", "needle", "order", "causality")
"""What is measured when nothing is asked for; "tasks" comes with names of tasks."""

_READERS = ("perplexity", "fidelity", "needle", "order")
_USERS = {
    "data": _READERS,
    "block_size": ("perplexity", "fidelity", "order"),
    "stride": ("perplexity",),
    "batch_size": (*_READERS, "tasks"),
    "max_tokens": ("perplexity",),
    "contexts": ("needle",),
    "template": ("needle",),
    "limit": ("tasks",),
    "include_path": ("tasks",),
}
_WINDOW = 512
_LARGEST_SEED = 2**32 - 1  # NumPy's, which lm-eval sets


def checks_of(
    checks: Sequence[str] | None, tasks: Sequence[str] | None, paired: bool, given: Mapping[str, Any]
) -> tuple[str, ...]:
    """The checks to run; None asks for all that make sense.

    Args:
        paired: whether there is an original.
        given: the options by name, None where nobody chose.

    Raises:
        ValueError: an unknown check, nothing to measure, fidelity without an original, or an option without a use.
    """
    for name in checks or ():
        if name not in CHECKS:
            raise ValueError(f"unknown check {name!r}; choose of {', '.join(CHECKS)}")
    if tasks is not None and not tasks:
        raise ValueError(
            "--tasks names at least one task: got 0; name one, such as arc_easy, or leave it out"
        )
    if checks is None:
        checks = [name for name in CHECKS if paired or name != "fidelity"]
    elif "fidelity" in checks and not paired:
        raise ValueError(
            "fidelity is the distance from an original: got --checks with fidelity and no --against; name the original, "
            "or leave fidelity out"
        )
    measured = [*dict.fromkeys(checks), *(["tasks"] if tasks else [])]
    if not measured:
        raise ValueError(
            f"an evaluation measures something: got 0 checks and 0 tasks; name some of {', '.join(CHECKS)}, or leave "
            "--checks out"
        )
    for name, value in given.items():
        users = _USERS[name]
        if value is not None and not set(users) & set(measured):
            shown = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            raise ValueError(
                f"--{name.replace('_', '-')} is for {' and '.join(users)} only: got {shown}, and what is measured is "
                f"{', '.join(measured)}; leave it out, or ask for {users[0]}"
            )
    return tuple(checks)


def options_of(
    models: Mapping[str, Any],
    given: Mapping[str, Any],
    checks: Sequence[str],
    *,
    seed: int,
    optional: bool = False,
) -> tuple[Extent, dict[str, dict[str, Any]]]:
    """How much is measured, and the arguments of every check, the same for all models.

    Args:
        given: see `checks_of`.
        checks: to run.
        optional: see `extent_of`, which may leave some of them out.

    Raises:
        ValueError: a window beyond a model's context, no batch, or no seed.
    """
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"a seed is between 0 and {_LARGEST_SEED}: got {seed}; try 0")
    found = [context_limit(model.config) for model in models.values()]
    limit = min((each for each in found if each is not None), default=None)
    size, common = given["block_size"], {"seed": seed}
    if size is None:
        size = min(_WINDOW, limit or _WINDOW)
    elif size < 2 or (limit is not None and size > limit):
        context = "" if limit is None else f", the model's context has {limit}"
        raise ValueError(
            f"a window has 2 tokens or more, and no more than the model's context: got --block-size {size}{context}; "
            f"give {min(_WINDOW, limit or _WINDOW)}, or leave it out"
        )
    extent = extent_of(list(models.values()), checks, given, window=size, limit=limit, optional=optional)
    measured = {name: dict(extent.measured.get(name, {})) for name in CHECKS}
    measured["fidelity"].pop("blocks", None)  # of the text, which is made before
    batch = {}
    if given["batch_size"] is not None:
        batch = {"batch_size": given["batch_size"]}
        check_counts(batch_size=(given["batch_size"], 1))
    return extent, {
        "perplexity": {"window": size, "stride": given["stride"]} | measured["perplexity"] | batch,
        "fidelity": measured["fidelity"] | common | batch,
        "needle": {"template": given["template"]} | measured["needle"] | common | batch,
        "order": measured["order"] | common | batch,
        "causality": {"length": min(CAUSALITY_TOKENS, limit or CAUSALITY_TOKENS)} | common,
        "tasks": {"include_path": given["include_path"], "limit": given["limit"], **common} | batch,
    }


def check_all(
    measured: Sequence[str],
    tasks: Sequence[str] | None,
    models: Mapping[str, Any],
    tokenizer: Any,
    text: Text,
    options: Mapping[str, dict[str, Any]],
    extent: Extent,
) -> None:
    """Raise, before any model runs, what the checks `measured` and the tasks would raise for their arguments.

    Reads the text, and fetches the data of tasks.
    """
    configs = [model.config for model in models.values()]
    for config in configs:
        if "perplexity" in measured:
            check_window(config, **options["perplexity"])
        if "needle" in measured:
            check_needle(config, tokenizer, **options["needle"])
    if set(_READERS) & set(measured):
        _ = text.documents  # a text that cannot be read, or holds none
    if "order" in measured:
        for config in configs:
            check_order(config, text.documents, tokenizer, **options["order"])
    if "fidelity" in measured:
        check_fidelity(models["original"], models["latent"], **options["fidelity"])
        size, number = options["perplexity"]["window"], extent.measured["fidelity"]["blocks"]
        text.blocks(tokenizer, models["latent"].config.vocab_size, size, number)
    if tasks:
        shortest = min(configs, key=lambda config: context_limit(config) or 0)
        check_tasks(shortest, tokenizer, tasks, **options["tasks"])
