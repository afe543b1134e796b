"""Result files to documents: what is read, what is skipped and why, and that all of it is about one model.

A document is known by its `kind`, or, where it has none, by its shape. Names on the page are those below the folder
that was given; no path of the machine appears.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvlatent_lab.report.bench_shapes import Bench
from kvlatent_lab.report.figures import Record, Shape
from kvlatent_lab.report.number_words import parsed, sentence, showable
from kvlatent_lab.report.result_shapes import Comparison, Conversion, Evaluation, Run, Step, StudyCell

__all__ = ["Document", "Documents", "read_documents"]

_KINDS: dict[str, type[Shape]] = {
    "evaluation": Evaluation,
    "bench": Bench,
    "study": StudyCell,
    "run": Run,
    "conversion": Conversion,
    "comparison": Comparison,
}
_JOURNAL = "metrics.jsonl"


@dataclass(frozen=True)
class Document:
    """One result: where it was found, what it is, which original it is about, how it came about."""

    path: Path
    name: str
    kind: str
    content: Any
    record: Record
    fingerprint: str | None
    model: str | None


@dataclass
class Documents:
    """All documents of a report by kind, in the order they were found, and the files that were skipped."""

    found: list[Document] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def of(self, kind: str) -> list[Document]:
        return [document for document in self.found if document.kind == kind]

    @property
    def model(self) -> tuple[str | None, str | None]:
        """Name and fingerprint of the original that the report is about, as far as the documents know them."""
        names = [document.model for document in self.found if document.model]
        prints = [document.fingerprint for document in self.found if document.fingerprint]
        return (names[0] if names else None), (prints[0] if prints else None)


def read_documents(
    paths: Sequence[str | Path], progress: Callable[[int, int], None] | None = None
) -> Documents:
    """Read files and folders of results.

    Args:
        paths: a file is read whatever its name. A folder is searched for .json and metrics.jsonl at any depth; of a
            checkpoint in it only the record of its making is read. Hidden files and unfinished work (`*.partial`, the
            `work` of a study) are passed over.
        progress: called with the files read and their number.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no usable document, or documents about different models.
    """
    documents = Documents()
    cells: dict[tuple[str, str, str], str] = {}
    files = list(_files(paths))
    for number, (path, name) in enumerate(files):
        if progress is not None:
            progress(number, len(files))
        try:
            document = _journal(path, name) if path.suffix == ".jsonl" else _document(path, name)
            if document.kind == "study":
                settings = json.dumps(document.content.settings, sort_keys=True)
                key = (document.content.study, document.content.cell, settings)
                if key in cells:
                    raise ValueError(f"cell {key[1]} of study {key[0]} was read from {cells[key]} already")
                cells[key] = name
        except _NoResultError:
            continue
        except (ValueError, OSError, RecursionError) as error:
            documents.skipped.append((name, sentence(error)))
        else:
            documents.found.append(document)
    if not documents.found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in documents.skipped[:3])
        raise ValueError(
            f"a report needs at least 1 result: got {len(documents.skipped)} files and 0 that can be used"
            f"{f' ({reasons})' if reasons else ''}; give what --json of eval and bench, a study or a run wrote"
        )
    _check_one_model(documents.found)
    return documents


def _files(paths: Sequence[str | Path]) -> Iterator[tuple[Path, str]]:
    """Files to read and their names on the page; each file once."""
    seen: set[Path] = set()
    for given in map(Path, paths):
        if not given.exists():
            raise FileNotFoundError(f"{given} does not exist; give files or folders of results")
        files = _inside(given) if given.is_dir() else [given]
        for path in files:
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            root = given.resolve()
            name = f"{root.name}/{path.relative_to(given)}" if given.is_dir() else path.name
            yield path, showable(name)


def _inside(folder: Path) -> list[Path]:
    """Result files below a folder, in order of their names."""
    found = []
    for path in sorted([*folder.rglob("*.json"), *folder.rglob(_JOURNAL)]):
        parts = path.relative_to(folder).parts
        parents = [folder.joinpath(*parts[:depth]) for depth in range(len(parts))]
        unfinished = any(part.startswith(".") or part.endswith(".partial") for part in parts)
        unfinished |= "work" in parts and any((parent / "study.json").is_file() for parent in parents)
        checkpoint = (path.parent / "config.json").is_file() and any(path.parent.glob("*.safetensors"))
        if path.is_file() and not unfinished and (not checkpoint or path.name in ("run.json", _JOURNAL)):
            found.append(path)
    return found


def _document(path: Path, name: str) -> Document:
    """Read and check one JSON file.

    Raises:
        ValueError: not JSON, a number that no figure can be, or no kind that is known.
        OSError: it cannot be read.
    """
    data = parsed(path.read_text(encoding="utf-8"))
    kind = _kind(data)
    content = _KINDS[kind].model_validate(data)
    record = getattr(content, "record", None) or Record.model_validate(data)
    return Document(path, name, kind, content, record, *_about(content))


def _journal(path: Path, name: str) -> Document:
    """The losses of a run: a list of steps."""
    lines = path.read_text(encoding="utf-8").splitlines()
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            steps.append(Step.model_validate(parsed(line)))
        except ValueError as error:
            raise ValueError(f"line {number} of {len(lines)}: {sentence(error)}") from error
    if not steps:
        raise ValueError("it holds no steps")
    return Document(path, name, "metrics", steps, Record(), None, None)


def _kind(data: Any) -> str:
    """The kind of a document: its own word, or its shape."""
    if not isinstance(data, dict):
        raise ValueError(f"it holds a {type(data).__name__}, and a result is an object")  # noqa: TRY004
    kind = data.get("kind")
    if kind in ("evaluation", "bench", "study"):
        return kind
    if isinstance(kind, str) and kind.startswith("study-"):
        raise _NoResultError
    if kind is None and isinstance(data.get("cells"), dict):
        return "conversion"
    rows = data.get("rows")
    original = rows.get("original") if isinstance(rows, dict) else None
    if kind is None and isinstance(original, dict) and "perplexity" in original:
        return "comparison"
    if kind is None and "versions" in data and ("training" in data or "figures" in data):
        return "run"
    raise ValueError("no result that a report knows" + (f": kind {kind!r}" if kind is not None else ""))


class _NoResultError(Exception):
    """A file that belongs beside results and is none, such as what a study says of its folder."""


def _about(content: Any) -> tuple[str | None, str | None]:
    """Fingerprint and name of the original a document is about.

    A latent model is known by the original it came from, so that results of several widths go together.
    """
    if isinstance(content, (Evaluation, Bench, StudyCell)):
        origin = getattr(content, "original", None) or content.model
        return origin.fingerprint or content.model.fingerprint, origin.name or content.model.name
    if isinstance(content, Run):
        sources = content.earlier[0].sha256 if content.earlier else content.sha256
        return sources.get("teacher") or sources.get("model"), None
    return getattr(content, "sha256", {}).get("model"), None


def _check_one_model(found: Sequence[Document]) -> None:
    """Raise `ValueError` where two documents are about different originals."""
    known = [document for document in found if document.fingerprint]
    for document in known[1:]:
        first = known[0]
        if document.fingerprint != first.fingerprint:
            raise ValueError(
                f"one report is about one model: {first.name} is of {_called(first)} and {document.name} of "
                f"{_called(document)}; make a report of each, or name the original when you evaluate (--against)"
            )


def _called(document: Document) -> str:
    digest = f"{document.fingerprint}"[:12]
    return f"{document.model} ({digest})" if document.model else digest
