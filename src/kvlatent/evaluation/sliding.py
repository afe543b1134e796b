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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.evaluation.perplexity import Perplexity, summarise
from kvlatent.evaluation.windows import Window, batches_of, check_window, windows_of
from kvlatent.model.head import IGNORED, token_losses
from kvlatent.model.time_estimate import rows_at_once
from kvlatent.text import documents as text
from kvlatent.text.tokenise import check_token_ids

__all__ = ["measure_sliding", "read_documents", "sliding_perplexity"]

_MOST_WINDOWS = 8


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
    batch_size: int | None = None,
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
        batch_size: windows read together; None takes 8, fewer of a large model.
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
    window, stride = check_window(
        model.config, window=window, stride=stride, batch_size=batch_size, max_tokens=max_tokens
    )
    streams, size = _encode(tokenizer, documents, _lead(tokenizer, lead), model.config.vocab_size, max_tokens)
    windows = [w for number, ids in enumerate(streams) for w in windows_of(number, len(ids), window, stride)]
    at_once = batch_size or rows_at_once(model, window, _MOST_WINDOWS, scored=True)
    batches = batches_of(windows, at_once, model.config)
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
    source: str | Path,
    *,
    separator: str | None = "<|endoftext|>",
    text_field: str = "text",
    tokenizer: Any = None,
) -> Iterator[str]:
    """Yield the documents of a .txt, .jsonl, .json or .parquet file, or of a data set, as :mod:`kvlatent.text` cuts them.

    Conversations are written by the chat template of `tokenizer`, less its beginning-of-text token: measurements put
    that before a document themselves.

    Raises:
        FileNotFoundError: no such file or data set.
        ValueError: binary or undecodable text, broken JSON or Parquet, a record without the field, a conversation
            that no template writes.
    """
    parts: list[str] = []
    begin = getattr(tokenizer, "bos_token", None) or ""
    origin = text.resolve(source)
    for piece in text.pieces(origin, separator=separator, text_field=text_field, tokenizer=tokenizer):
        starts = piece.is_rendered and piece.first
        parts.append(piece.text.removeprefix(begin) if starts else piece.text)
        if piece.last:
            yield "".join(parts)
            parts = []


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
    check_token_ids(largest, vocabulary, tokenizer)
    return streams, size


# Not inference_mode: tables that latent attention builds at its first forward must stay usable in training.
@torch.no_grad()
def _losses(
    model: PreTrainedModel,
    streams: list[Tensor],
    batches: Iterable[list[Window]],
    progress: Callable[[int, int], None] | None,
) -> list[Tensor]:
    """Nats of every token of every document, fp32."""
    losses = [torch.full((len(stream) - 1,), math.nan) for stream in streams]
    done, total, training = 0, sum(map(len, losses)), model.training
    model.eval()
    if progress is not None:
        progress(0, total)
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


def _padded(streams: list[Tensor], batch: list[Window]) -> tuple[Tensor, Tensor]:
    """Ids and labels, int64 [B, T], padded on the right, where no token looks."""
    shape = len(batch), max(map(Window.length, batch))
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    for row, (document, begin, first, end) in enumerate(batch):
        ids[row, : end - begin] = streams[document][begin:end]
        labels[row, first - begin : end - begin] = streams[document][first + 1 : end + 1]
    return ids, labels
