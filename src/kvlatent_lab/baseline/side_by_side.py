"""Old and new side by side: of every pair of rows whose names differ in the method alone, one line a measure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import fmean

import numpy as np

from kvlatent.evaluation.perplexity import ratio_error
from kvlatent_lab.baseline.columns import CONTEXTS, TEXTS
from kvlatent_lab.baseline.finished_rows import Figures, paired_change, ratio_between
from kvlatent_lab.baseline.question_files import SETS
from kvlatent_lab.baseline.table_rows import NEW, OLD

__all__ = ["pairs_of", "render_side_by_side"]

Line = tuple[str, str, str, str]
"""A measure, its old and its new value, and what lies between them."""


def pairs_of(found: Mapping[str, Figures]) -> dict[str, tuple[Figures, Figures]]:
    """Old and new documents by what both are, such as `head 50` or `model 28 int8`; only where both are there."""
    pairs = {}
    for name, new in found.items():
        old = found.get(name.replace(f"-{NEW}-", f"-{OLD}-"))
        if f"-{NEW}-" in name and old is not None and not _failed(old) and not _failed(new):
            pairs[name.replace(f"-{NEW}-", " ").replace("-", " ")] = old, new
    return pairs


def _failed(document: Figures) -> bool:
    return "failed" in document["record"]


def render_side_by_side(found: Mapping[str, Figures]) -> str:
    """Markdown of the pairs; empty where there is none."""
    lines = [
        f"| {' | '.join((label, *line))} |"
        for label, (old, new) in pairs_of(found).items()
        for line in _compare(old, new)
    ]
    if not lines:
        return ""
    head = ["| row | measure | old | new | new against old |", "| --- | --- | --- | --- | --- |"]
    about = (
        f'Old are the rows "{OLD}" (200 steps of alignment, no text that asks for recall, no global pass), new the rows '
        f'"{NEW}". Between them stands new / old of a perplexity (x) and new - old of everything else, ± the standard error '
        "of paired blocks, questions or trials."
    )
    return "\n".join(["## Old and new side by side", "", about, "", *head, *lines])


def _compare(old: Figures, new: Figures) -> Iterator[Line]:
    before, after = old["figures"], new["figures"]
    for text in TEXTS:
        if (ratio := ratio_between(new, old, text)) is not None:
            values = [f"{one[f'text {text}']['perplexity']:.2f}" for one in (before, after)]
            yield f"perplexity, {text}", values[0], values[1], f"x{_shown(*ratio, sign='')}"
    yield from _divergence(before.get("text fineweb"), after.get("text fineweb"))
    for one in SETS:
        pair = before.get(f"task {one}"), after.get(f"task {one}")
        for metric in ("acc", "acc_norm"):
            yield from _items(f"{one}, {metric}", *(_answers(each, metric) for each in pair))
    for kind in ("pass key", "needle"):
        for context in CONTEXTS:
            pair = before.get(f"{kind} {context}"), after.get(f"{kind} {context}")
            for score in ("exact", "rank"):
                trials = [None if each is None else each[f"trial_{score}"] for each in pair]
                yield from _items(f"{kind}, {score}, at {context}", *trials)
    margins = [_margins(one.get("order")) for one in (before, after)]
    yield from _items("word order, nats", *margins)


def _divergence(old: Figures | None, new: Figures | None) -> Iterator[Line]:
    """Of the original; a row of before its blocks were kept has an error of its own alone."""
    for name, key, by_block in (
        ("KL to the original, nats", "kl", "block_divergences"),
        ("top-1 agreement", "top1_agreement", "block_agreed"),
    ):
        if old is None or new is None or key not in old or key not in new:
            continue
        note = ""
        if by_block in old and by_block in new:
            changes = [a - b for a, b in zip(new[by_block], old[by_block], strict=True)]
            error = ratio_error(changes, new["block_tokens"])
        else:
            apart = old.get(f"{key}_standard_error"), new.get(f"{key}_standard_error")
            error = None if apart[0] is None or apart[1] is None else math.hypot(apart[0], apart[1])
            note = "" if error is None else " (not paired)"
        yield name, f"{old[key]:.3f}", f"{new[key]:.3f}", _shown(new[key] - old[key], error) + note


def _items(name: str, old: list[float] | None, new: list[float] | None) -> Iterator[Line]:
    if old is not None and new is not None:
        yield name, f"{fmean(old):.3f}", f"{fmean(new):.3f}", _shown(*paired_change(new, old))


def _answers(found: Figures | None, metric: str) -> list[float] | None:
    return None if found is None else found["answers"].get(metric)


def _margins(found: Figures | None) -> list[float] | None:
    """By trial, over all numbers of spans."""
    return None if found is None else np.mean(found["trial_margin"], axis=0).tolist()


def _shown(value: float, error: float | None, sign: str = "+") -> str:
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")
