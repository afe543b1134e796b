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
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import text
from ..modeling import latent_config_of
from ..perplexity import Perplexity, summarise
from ..stage2 import IGNORED, token_losses

__all__ = ["measure_sliding", "read_documents", "sliding_perplexity"]

_LONGEST = 2048  # tokens in a window that nobody chose: memory grows with it


class _Window(NamedTuple):
    """Ids `begin` to `end` - 1 of a stream are read; the tokens behind ids `first` to `end` - 1 are scored."""

    document: int
    begin: int
    first: int
    end: int

    def length(self) -> int:
        return self.end - self.begin


def sliding_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], **options: Any
) -> dict[str, Any]:
    """The figures of :func:`measure_sliding`; `options` are those of it."""
    return measure_sliding(model, tokenizer, documents, **options)[0]


def measure_sliding(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    lead: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], Perplexity]:
    """Perplexity per token and bits per byte of `documents`; one code path for originals and latent models.

    Ids and losses of all documents are kept (8 bytes a token), logits of 256 tokens at a time.

    Args:
        documents: texts, each on its own; none sees another.
        window: tokens read at a time; None takes the model's context, at most 2048.
        stride: tokens by which the window moves on; None takes the window.
        batch_size: windows read together.
        max_tokens: score no more than the first so many tokens; None scores all.
        lead: the id that predicts a document's first token; None takes the beginning of text, else the end of text.
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
    window, stride = _check(model.config, window, stride, batch_size, max_tokens)
    streams, size = _encode(tokenizer, documents, _lead(tokenizer, lead), model.config.vocab_size, max_tokens)
    windows = [w for number, ids in enumerate(streams) for w in _windows(number, len(ids), window, stride)]
    batches = _batches(windows, batch_size, _switch(model.config))
    losses = _losses(model, streams, batches, progress)
    parts = [part for document in losses for part in document.split(window)]
    result = summarise([part.double().sum().item() for part in parts], list(map(len, parts)))
    figures = {
        "perplexity": result.perplexity,
        "standard_error": result.standard_error,
        "loss": result.loss,
        "tokens": result.tokens,
        "bytes": size,
        "bits_per_byte": result.loss * result.tokens / (math.log(2) * size),
        "documents": len(streams),
        "window": window,
        "stride": stride,
    }
    return figures, result


def read_documents(
    source: str | Path, *, separator: str | None = "<|endoftext|>", text_field: str = "text"
) -> Iterator[str]:
    """Yield the documents of a .txt, .jsonl, .json or .parquet file, or of a data set, as :mod:`kvlatent.data` cuts them.

    Raises:
        FileNotFoundError: no such file or data set.
        ValueError: binary or undecodable text, broken JSON or Parquet, a record without the field.
    """
    parts: list[str] = []
    for piece in text.pieces(text.resolve(source), separator=separator, text_field=text_field):
        parts.append(piece.text)
        if piece.last:
            yield "".join(parts)
            parts = []


def _check(
    config: Any, window: int | None, stride: int | None, batch_size: int, max_tokens: int | None
) -> tuple[int, int]:
    context = getattr(config, "max_position_embeddings", None)
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
    if batch_size < 1:
        raise ValueError(f"a batch holds at least one window: got batch_size={batch_size}; try 8")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is at least 1: got {max_tokens}; leave it out to score all of the text")
    return window, stride


def _lead(tokenizer: Any, lead: int | None) -> int:
    for candidate in (lead, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    raise ValueError(
        "the first token needs one to be predicted from, and this tokenizer has neither a beginning-of-text nor an "
        "end-of-text token; pass lead=ID"
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
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer makes ids that the model lacks: {largest} of a vocabulary of {vocabulary}; use the model's own"
        )
    return streams, size


def _windows(document: int, ids: int, window: int, stride: int) -> Iterator[_Window]:
    """The windows of a stream of `ids`; the last one reaches back as far as the others."""
    first = 0
    while first < ids - 1:
        end = min(ids - 1, first + (stride if first else window))
        yield _Window(document, max(0, end - window), first, end)
        first = end


def _switch(config: Any) -> float:
    """Length beyond which longrope turns everything in a batch by its other table; infinity without longrope."""
    if getattr(config, "kv_latent", None):
        return latent_config_of(config).tables[0][0].switch or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else math.inf


def _batches(windows: list[_Window], batch_size: int, switch: float) -> Iterator[list[_Window]]:
    """Windows by length, the longest first: little padding, and a lack of memory shows at once."""
    ordered = sorted(windows, key=_Window.length, reverse=True)
    for _, group in groupby(ordered, key=lambda window: window.length() > switch):
        members = list(group)
        yield from (members[at : at + batch_size] for at in range(0, len(members), batch_size))


# Not inference_mode: tables that latent attention builds at its first forward must stay usable in training.
@torch.no_grad()
def _losses(
    model: PreTrainedModel,
    streams: list[Tensor],
    batches: Iterable[list[_Window]],
    progress: Callable[[int, int], None] | None,
) -> list[Tensor]:
    """Nats of every token of every document, fp32."""
    losses = [torch.full((len(stream) - 1,), math.nan) for stream in streams]
    done, total, training = 0, sum(map(len, losses)), model.training
    model.eval()
    try:
        for batch in batches:
            ids, labels = (part.to(model.device) for part in _padded(streams, batch))
            decoder: Any = model.get_decoder()
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            rows = token_losses(hidden, model.get_output_embeddings(), labels).cpu()
            for row, (document, begin, first, end) in zip(rows, batch, strict=True):
                losses[document][first:end] = row[first - begin : end - begin]
                done += end - first
            if progress is not None:
                progress(done, total)
    finally:
        model.train(training)
    return losses


def _padded(streams: list[Tensor], batch: list[_Window]) -> tuple[Tensor, Tensor]:
    """Ids and labels, int64 [B, T], padded on the right, where no token looks."""
    shape = len(batch), max(map(_Window.length, batch))
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    for row, (document, begin, first, end) in enumerate(batch):
        ids[row, : end - begin] = streams[document][begin:end]
        labels[row, first - begin : end - begin] = streams[document][first + 1 : end + 1]
    return ids, labels
