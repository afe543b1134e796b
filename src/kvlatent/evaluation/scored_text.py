"""The text that the standard evaluation reads: a file, a data set, or what every Python installation carries."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from kvlatent.evaluation.sliding import read_documents
from kvlatent.jobs.fingerprints import identity
from kvlatent.jobs.record import spoken_name
from kvlatent.text.corpus import evaluation_blocks
from kvlatent.text.standard_library import stdlib_documents

__all__ = ["Text"]


class Text:
    """The text that is read: a file's, a data set's, or the standard library's."""

    def __init__(
        self,
        source: str | Path | None,
        separator: str | None,
        field: str,
        folder: Path,
        tokenizer: Any = None,
    ) -> None:
        self.source, self.separator, self.field, self.folder = source, separator, field, folder
        self.tokenizer = tokenizer  # its chat template writes conversations

    @cached_property
    def documents(self) -> list[str]:
        """All of it, one string a document; raises `ValueError` where there is none."""
        if self.source is None:
            return stdlib_documents("held_out")
        options: dict[str, Any] = {"separator": self.separator, "text_field": self.field}
        found = list(read_documents(self.source, tokenizer=self.tokenizer, **options))
        if not any(document.strip() for document in found):
            raise ValueError(f"{Path(self.source).name} holds no text; give a text that can be scored")
        return found

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
        return {"name": spoken_name(self.source), "sha256": identity(self.source)}
