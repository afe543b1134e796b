"""Read documents from a text file, JSON, Parquet or a hub dataset, never more than a piece at a time.

A document longer than :data:`PIECE_CHARACTERS` is handed over in several pieces cut before white space,
so a file that is one gigantic document needs no more memory than one with a million short ones. The
price is one word boundary per piece that the tokenizer cannot see across.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvlatent.jobs.fingerprints import file_sha256
from kvlatent.text.chat import FIELDS
from kvlatent.text.fields import Document, documents

PIECE_CHARACTERS = 1 << 18
_READ_CHARACTERS = 1 << 20
_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_HUB_NAME = re.compile(r"^(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[^:]*))?(:(?P<split>[^:]+))?$")


class Piece(NamedTuple):
    """Part of a document: `first` and `last` say whether the document starts and ends with it.

    `is_rendered`: a chat template wrote it, and with it the special tokens around it.
    """

    text: str
    first: bool
    last: bool
    is_rendered: bool = False


@dataclass(frozen=True)
class TextSource:
    """Where documents come from: a local file, or a dataset that the `datasets` library can load."""

    name: str
    path: Path | None = None
    builder: Any = None
    split: str = ""

    def is_plain(self) -> bool:
        """Whether it is a text without records, so without conversations."""
        return self.path is not None and self.path.suffix == ".txt"

    def fingerprint(self) -> str:
        """Return a hash of the content: SHA-256 of a file, the builder's own hash of a dataset."""
        if self.path is None:
            return f"{self.name}:{self.builder.config.name}:{self.split}:{self.builder.hash}"
        return file_sha256(self.path)


def resolve(source: str | Path) -> TextSource:
    """Find what `source` names: a file, or a dataset `name`, `name:config` or `name:config:split`.

    Raises:
        FileNotFoundError: there is neither such a file nor such a dataset.
        ValueError: it is a directory, the file's extension is none of .txt, .jsonl, .json, .parquet, or the dataset
            has several configurations and none is named.
    """
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give a file that ends in {', '.join(_SUFFIXES)}")
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise ValueError(
                f"a data file must end in {', '.join(_SUFFIXES)}: got {path}; convert it, or rename a plain text to .txt"
            )
        return TextSource(str(source), path=path)
    match = _HUB_NAME.match(str(source))
    if path.suffix in _SUFFIXES or match is None:
        raise FileNotFoundError(
            f"there is no data file {path}; give an existing file or a hub dataset's name"
        )
    return _resolve_dataset(str(source), match["name"], match["config"] or None, match["split"] or "train")


def pieces(
    source: TextSource, *, separator: str | None, text_field: str, tokenizer: Any = None
) -> Iterator[Piece]:
    """Yield the documents of `source` in order, without blank ones.

    Args:
        separator: a `.txt` file is cut into documents at this string, and line breaks next to it are
            dropped; None takes the file as one document. Other sources have a document per record.
        text_field: the column that holds the text, or conversations, in all sources but `.txt`.
        tokenizer: its chat template writes conversations as text.

    Raises:
        ValueError: binary or undecodable text, broken JSON or Parquet, a record without the field, a conversation
            that no template writes.
    """
    if source.path is None:
        return _cut(documents(_dataset_records(source), source.name, text_field, tokenizer))
    if source.is_plain():
        return _split(source.path, separator)
    reader = _parquet_records if source.path.suffix == ".parquet" else _json_records
    return _cut(documents(reader(source.path, text_field), str(source.path), text_field, tokenizer))


def _resolve_dataset(source: str, name: str, config: str | None, split: str) -> TextSource:
    from datasets import load_dataset_builder  # a second of import that local files do not need

    try:
        builder = load_dataset_builder(name, config)
    except (OSError, ValueError) as error:
        reason, *more = str(error).splitlines()
        if reason == "Config name is missing.":
            raise ValueError(
                f"dataset {name} has several configurations; give one as {name}:CONFIG: {' '.join(more[:1])}"
            ) from error
        raise FileNotFoundError(
            f"there is neither a file nor a dataset {source}; check the name and the network: {reason}"
        ) from error
    return TextSource(source, builder=builder, split=split)


def _dataset_records(source: TextSource) -> Iterator[tuple[int, Any]]:
    builder = source.builder
    prepared = Path(builder.cache_dir).is_dir()  # downloaded before: usable without a network
    try:
        rows = builder.as_dataset(source.split) if prepared else builder.as_streaming_dataset(source.split)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"dataset {source.name} cannot be read; check the split {source.split}: {reason}"
        ) from error
    return enumerate(rows, 1)


@contextmanager
def _utf8(path: Path) -> Generator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8") from error


def _split(path: Path, separator: str | None) -> Iterator[Piece]:
    buffer, first = "", True
    margin = len(separator or "")  # a separator may still be cut in two at the end of the buffer
    with _utf8(path) as file:
        while chunk := file.read(_READ_CHARACTERS):
            if "\0" in chunk:
                raise ValueError(f"{path} is binary, not text (it contains a zero byte); give a text file")
            *complete, buffer = (buffer + chunk).split(separator) if separator else (buffer + chunk,)
            for text in complete:
                yield from _chop(text.strip("\n") if first else text.rstrip("\n"), first)
                first = True
            buffer = buffer.lstrip("\n") if first else buffer
            while len(buffer) > PIECE_CHARACTERS + margin:
                cut = _cut_point(buffer)
                yield Piece(buffer[:cut], first, False)
                buffer, first = buffer[cut:], False
    yield from _chop(buffer.rstrip("\n"), first)


def _chop(text: str, first: bool = True, is_rendered: bool = False) -> Iterator[Piece]:
    """Cut a document, or what is left of one, into pieces; a blank document has none."""
    if first and (not text or text.isspace()):
        return
    while len(text) > PIECE_CHARACTERS:
        cut = _cut_point(text)
        yield Piece(text[:cut], first, False, is_rendered)
        text, first = text[cut:], False
    yield Piece(text, first, True, is_rendered)


def _cut_point(text: str) -> int:
    """Return where to cut: before the last line break, else the last space, within a piece's length."""
    for white in ("\n", " "):
        cut = text.rfind(white, PIECE_CHARACTERS // 2, PIECE_CHARACTERS)
        if cut > 0:
            return cut
    return PIECE_CHARACTERS


def _cut(texts: Iterable[Document]) -> Iterator[Piece]:
    for text, is_rendered in texts:
        yield from _chop(text, is_rendered=is_rendered)


def _json_records(path: Path, text_field: str) -> Iterator[tuple[int, Any]]:
    """Yield numbered records of JSON lines, or of a `.json` file that is one array, or one record over several lines."""
    del text_field
    with _utf8(path) as file:
        is_whole = path.suffix == ".json" and not _is_record(
            next((line for line in file if line.strip()), "")
        )
        file.seek(0)
        number = 0
        try:
            if is_whole:
                document = json.load(file)
                yield from enumerate(document if isinstance(document, list) else [document], 1)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            line, reason = number or getattr(error, "lineno", 1), getattr(error, "msg", str(error))
            if isinstance(error, RecursionError):
                reason = "nested too deeply"
            raise ValueError(f"{path} is not valid JSON at line {line}: {reason}") from error


def _is_record(line: str) -> bool:
    """Whether a file that begins with this line holds a record a line: it is JSON by itself, and no array."""
    try:
        return not isinstance(json.loads(line), list)
    except (ValueError, RecursionError):
        return False


def _parquet_records(path: Path, text_field: str) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
    with file:
        found = file.schema_arrow.names
        columns = [name for name in found if name in (text_field, *FIELDS)] if text_field in found else None
        batches = file.iter_batches(batch_size=256, columns=columns)
        yield from enumerate((record for batch in batches for record in batch.to_pylist()), 1)
