"""Perplexity of whole documents by a window that slides over them: every token is scored once.

The window is as many tokens as the model reads at a time; it moves on by a stride, and of each window only the tokens
that no window before it has scored count. A stride equal to the window gives windows side by side, the fewest forward
passes and the least context; a smaller one gives every token but a document's first ones at least
`window - stride + 1` tokens before it. A document's first token is predicted from the beginning-of-text token, or the
end-of-text token where the tokenizer has no other. With stride = window this is the sum that lm-eval calls
`loglikelihood_rolling`. Where a tokenizer puts a token of its own in front of a text, it is that with
`add_bos_token=False`: such a token is no text, and not scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.evaluation import check
from kvlatent.evaluation.branches import table_switch
from kvlatent.evaluation.check import CheckRequest, Levels, Settings
from kvlatent.evaluation.evidence import FORGETTING_NATS, Figures, Sign, figure, figure_of
from kvlatent.evaluation.perplexity import Perplexity, Rows, score_rows, summarise
from kvlatent.evaluation.quality import cache_figures, measure_models
from kvlatent.evaluation.sequences import context_limit, counter
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.record import with_error
from kvlatent.model.head import IGNORED
from kvlatent.model.time_estimate import rows_at_once
from kvlatent.text.tokenise import check_token_ids

__all__ = ["CHECK", "check_window", "measure_documents", "measure_text"]

_MOST_WINDOWS = 8
_LONGEST = 2048  # tokens in a window that nobody chose: memory grows with it
_TOKENS = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000)


class Window(NamedTuple):
    """Ids `begin` to `end` - 1 of a stream are read; the tokens behind ids `first` to `end` - 1 are scored."""

    document: int
    begin: int
    first: int
    end: int

    def length(self) -> int:
        return self.end - self.begin


def measure_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], Perplexity]:
    """Perplexity per token and bits per byte of `documents`; one code path for originals and latent models.

    Ids and losses of all documents are kept (8 bytes a token), logits of 256 tokens at a time.

    Args:
        documents: texts, each on its own; none sees another.
        window: tokens read at a time; None takes the model's context, at most 2048.
        stride: tokens by which the window moves on; None takes the window.
        batch_size: windows read together; None takes 8, fewer of a large model.
        max_tokens: score no more than the first so many tokens; None scores all.
        progress: called with the tokens scored and their number.

    Returns:
        A JSON-able dict (perplexity, standard_error, loss in nats a token, tokens, bytes in UTF-8, bits_per_byte,
        documents, window, stride), and the `Perplexity` that a ratio of two models is made from. Its blocks, whose
        spread is the standard error, are stretches of a document of a window's length, whatever the stride.

    Raises:
        ValueError: a window longer than the model's context, a stride outside 1 to window, no text, ids the model
            lacks, or a loss that is NaN, infinite or above 700.
        TypeError: one string in place of several.
    """
    window, stride = check_window(
        model.config, window=window, stride=stride, batch_size=batch_size, max_tokens=max_tokens
    )
    streams, size = _encode(tokenizer, documents, _lead(tokenizer), model.config.vocab_size, max_tokens)
    windows = [w for number, ids in enumerate(streams) for w in _windows(number, len(ids), window, stride)]
    at_once = batch_size or rows_at_once(model, window, _MOST_WINDOWS, scored=True)
    losses = _token_losses(model, streams, list(_batches(windows, at_once, model.config)), progress)
    parts = [part for document in losses for part in document.split(window)]
    result = summarise([part.double().sum().item() for part in parts], list(map(len, parts)))
    figures = result.figures() | {
        "bytes": size,
        "bits_per_byte": result.loss * result.tokens / (math.log(2) * size),
        "documents": len(streams),
        "window": window,
        "stride": stride,
    }
    return figures, result


def _lead(tokenizer: Any) -> int:
    """The id before a document's first token."""
    for candidate in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    raise ValueError(
        "the first token needs one to be predicted from, and this tokenizer has neither a beginning-of-text nor an "
        "end-of-text token; name one of its tokens as eos_token in tokenizer_config.json"
    )


def _encode(
    tokenizer: Any, documents: Iterable[str], lead: int, vocabulary: int, max_tokens: int | None
) -> tuple[list[Tensor], int]:
    """Ids of each document behind `lead`, int32 [1 + tokens], up to `max_tokens`; and the bytes of what they spell."""
    if isinstance(documents, str):
        raise TypeError("documents are several texts: got one string; pass [text]")
    streams: list[Tensor] = []
    total, size = 0, 0
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        room = len(ids) if max_tokens is None else max_tokens - total
        if room < len(ids):
            ids = ids[:room]
            document = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if not ids:
            continue
        streams.append(torch.tensor([lead, *ids], dtype=torch.int32))
        total, size = total + len(ids), size + len(document.encode())
        if total == max_tokens:
            break
    if not streams:
        raise ValueError("perplexity needs text: the documents hold 0 tokens; give at least one word")
    largest = max(int(stream.max()) for stream in streams)
    check_token_ids(largest, vocabulary, tokenizer)
    return streams, size


def _token_losses(
    model: PreTrainedModel,
    streams: list[Tensor],
    batches: list[list[Window]],
    progress: Callable[[int, int], None] | None,
) -> list[Tensor]:
    """Nats of every token of every document, fp32."""
    losses = [torch.full((len(stream) - 1,), math.nan) for stream in streams]
    advance = counter(progress, sum(map(len, losses)))
    rows = (_padded(streams, batch) for batch in batches)
    scored = score_rows(model, rows, lambda rows: advance(int(rows.labels.ne(IGNORED).sum())))
    for batch, part in zip(batches, scored, strict=True):
        for row, (document, begin, first, end) in zip(part, batch, strict=True):
            losses[document][first:end] = row[first - begin : end - begin]
    return losses


def _padded(streams: list[Tensor], batch: list[Window]) -> Rows:
    """Windows as rows of one length."""
    shape = len(batch), max(map(Window.length, batch))
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    for row, (document, begin, first, end) in enumerate(batch):
        ids[row, : end - begin] = streams[document][begin:end]
        labels[row, first - begin : end - begin] = streams[document][first + 1 : end + 1]
    return Rows(ids, labels)


def check_window(
    config: Any,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
) -> tuple[int, int]:
    """Window and stride of `measure_documents`, which has the same arguments; raises what it raises, text aside."""
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


def _windows(document: int, ids: int, window: int, stride: int) -> Iterator[Window]:
    """The windows of a stream of `ids`; the last one reaches back as far as the others."""
    first = 0
    while first < ids - 1:
        end = min(ids - 1, first + (stride if first else window))
        yield Window(document, max(0, end - window), first, end)
        first = end


def _batches(windows: list[Window], batch_size: int, config: Any) -> Iterator[list[Window]]:
    """Windows by length, the longest first: little padding, and a lack of memory shows at once."""
    switch = table_switch(config)
    ordered = sorted(windows, key=Window.length, reverse=True)
    for _, group in groupby(ordered, key=lambda window: window.length() > switch):
        members = list(group)
        yield from (members[at : at + batch_size] for at in range(0, len(members), batch_size))


def measure_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], **options: Any
) -> tuple[dict[str, Any], Perplexity]:
    """Figures of `measure_documents`, which takes the options, and the cache's bytes a token in the first document."""
    figures, result = measure_documents(model, tokenizer, documents, **options)
    ids = tokenizer(documents[0], return_tensors="pt")["input_ids"]
    return figures | cache_figures(model, ids), result


def _refuse(request: CheckRequest, options: Settings) -> None:
    for model in request.models.values():
        check_window(model.config, window=request.window, **options)


def _run(request: CheckRequest, options: Settings, progress: Progress) -> Figures:
    """Perplexity and cache bytes of each, and what one is over the other."""

    def measure(role: str, model: Any) -> tuple[dict[str, Any], Perplexity]:
        step, documents = progress.step(f"perplexity, {role}"), request.text.documents
        return measure_text(
            model, request.tokenizer, documents, window=request.window, progress=step.to, **options
        )

    return measure_models(request.models, measure)


def _extents(request: CheckRequest) -> Levels:
    tokens = request.given["max_tokens"]
    if tokens is None and request.given["data"] is not None:
        return [({"max_tokens": None}, 0.0)]  # all of the user's text
    each = request.seconds(request.window, 1 / request.window, scored=True)
    return [({"max_tokens": n}, n * each) for n in (_TOKENS if tokens is None else (tokens,))]


def _lines(figures: Figures) -> list[str]:
    if "ratio" not in figures:
        return []
    ratio = with_error(figures["ratio"], figures["ratio_standard_error"])
    return [f"perplexity over the original's: {ratio}; cache: {figures['cache_ratio']:.1%}"]


def _sign(figures: Figures, missing: list[str]) -> Sign:
    """The ratio of perplexities, paired or that of the two."""
    pair = [figure_of(figures, side, "perplexity") for side in ("latent", "original")]
    latent, original = (one["perplexity"] if isinstance(one, Mapping) else one for one in pair)
    ratio = figures.get("ratio") or (latent / original if latent and original else None)
    if ratio is None:
        missing.append("perplexity ratio: needs the perplexities of both models on the same text")
        return Sign({})
    threshold = math.exp(FORGETTING_NATS)
    return Sign({"perplexity_ratio": figure(ratio, threshold, figures.get("ratio_standard_error"))})


CHECK = check.Check(
    name="perplexity",
    arguments=(check.DATA, check.BLOCK_SIZE, "stride", check.BATCH_SIZE, "max_tokens"),
    refuse=_refuse,
    run=_run,
    extents=_extents,
    units={"max_tokens": "tokens"},
    is_random=False,
    more=lambda _: f"--max-tokens {_TOKENS[-1]} for all tokens",
    rows=lambda _: {
        "perplexity": lambda f: with_error(f["perplexity"], f["standard_error"]),
        "bits per byte": lambda f: f"{f['bits_per_byte']:.4f}",
        "cache bytes/token": lambda f: f"{f['cache_bytes_per_token']:,.0f}",
    },
    lines=_lines,
    signs={"forgetting": _sign},
)
