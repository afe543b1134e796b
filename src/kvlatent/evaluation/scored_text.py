"""The text that an evaluation reads: a file, a data set, or what every Python installation carries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from kvlatent.jobs.fingerprints import identity
from kvlatent.jobs.record import name_for_record
from kvlatent.text import documents
from kvlatent.text.corpus import evaluation_blocks
from kvlatent.text.standard_library import stdlib_documents

__all__ = ["ScoredText", "read_documents"]


class ScoredText:
    """The text that is read: a file's, a data set's, or the standard library's.

    Args:
        source: a file or data set; None: the modules of the standard library that the embedded model never saw.
        separator, field: how it splits into documents.
        folder: an empty one, for blocks.
        tokenizer: its chat template writes conversations.
    """

    def __init__(
        self,
        source: str | Path | None,
        separator: str | None,
        field: str,
        folder: Path,
        tokenizer: Any = None,
    ) -> None:
        self.source, self.separator, self.field, self.folder = source, separator, field, folder
        self.tokenizer = tokenizer

    @cached_property
    def documents(self) -> list[str]:
        """All of it, one string a document; raises `ValueError` where there is none."""
        if self.source is None:
            return stdlib_documents("held_out")
        options: dict[str, Any] = {"separator": self.separator, "text_field": self.field}
        texts = list(read_documents(self.source, tokenizer=self.tokenizer, **options))
        if not any(text.strip() for text in texts):
            raise ValueError(f"{Path(self.source).name} holds no text; give a text that can be scored")
        return texts

    def blocks(self, tokenizer: Any, vocab_size: int, size: int, number: int) -> Any:
        """Blocks for fidelity, at most so many."""
        source = self.source
        if source is None:
            source = self.folder / "text.jsonl"
            lines = [json.dumps({"text": document}) + "\n" for document in self.documents]
            source.write_text("".join(lines), encoding="utf-8")
        return evaluation_blocks(
            source,
            tokenizer,
            size,
            cache_dir=self.folder / "blocks",
            vocab_size=vocab_size,
            separator=self.separator,
            text_field=self.field,
            max_tokens=number * size,
        )

    def about(self) -> dict[str, Any]:
        """Which text it was, without its path."""
        if self.source is None:
            return {"name": "Python standard library, modules held out from the embedded model"}
        return {"name": name_for_record(self.source), "sha256": identity(self.source)}


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
    origin = documents.resolve(source)
    for piece in documents.pieces(origin, separator=separator, text_field=text_field, tokenizer=tokenizer):
        starts = piece.is_rendered and piece.first
        parts.append(piece.text.removeprefix(begin) if starts else piece.text)
        if piece.last:
            yield "".join(parts)
            parts = []
