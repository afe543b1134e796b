"""Where the windows of sliding perplexity lie on a text, and which of them are read together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

from kvlatent.evaluation.sequences import context_limit
from kvlatent.model.classes import latent_config_of

__all__ = ["Window", "batches_of", "check_window", "windows_of"]

_LONGEST = 2048  # tokens in a window that nobody chose: memory grows with it


class Window(NamedTuple):
    """Ids `begin` to `end` - 1 of a stream are read; the tokens behind ids `first` to `end` - 1 are scored."""

    document: int
    begin: int
    first: int
    end: int

    def length(self) -> int:
        return self.end - self.begin


def check_window(
    config: Any,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
) -> tuple[int, int]:
    """Window and stride of `measure_sliding`, which has the same arguments; raises what it raises, text aside."""
    context = context_limit(config)
    window = min(context or _LONGEST, _LONGEST) if window is None else window
    if window < 1:
        raise ValueError(f"a window reads at least 1 token: got window={window}; try 512")
    if context is not None and window > context:
        raise ValueError(
            f"a window cannot be longer than the model's context: got window={window}, "
            f"max_position_embeddings={context}; use window={context} or less"
        )
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(
            f"the stride is between 1 and the window: got stride={stride}, window={window}; use {window} or less"
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"a batch holds at least one window: got batch_size={batch_size}; try 8")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is at least 1: got {max_tokens}; leave it out to score all of the text")
    return window, stride


def windows_of(document: int, ids: int, window: int, stride: int) -> Iterator[Window]:
    """The windows of a stream of `ids`; the last one reaches back as far as the others."""
    first = 0
    while first < ids - 1:
        end = min(ids - 1, first + (stride if first else window))
        yield Window(document, max(0, end - window), first, end)
        first = end


def _switch(config: Any) -> float:
    """Length beyond which longrope turns everything in a batch by its other table; infinity without longrope."""
    if getattr(config, "kv_latent", None):
        return latent_config_of(config).tables[0][0].switch or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else math.inf


def batches_of(windows: list[Window], batch_size: int, config: Any) -> Iterator[list[Window]]:
    """Windows by length, the longest first: little padding, and a lack of memory shows at once."""
    switch = _switch(config)
    ordered = sorted(windows, key=Window.length, reverse=True)
    for _, group in groupby(ordered, key=lambda window: window.length() > switch):
        members = list(group)
        yield from (members[at : at + batch_size] for at in range(0, len(members), batch_size))
