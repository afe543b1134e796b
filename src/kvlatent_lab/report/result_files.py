"""Result files to documents: what is read, what is skipped and why, and that all of it is about one model.

A document is known by its `kind`, or, where it has none, by its shape. Names on the page are those below the folder
that was given; no path of the machine appears.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from kvlatent.evaluation.result_models import Bench, Evaluation
from kvlatent.jobs.progress import Progress, Report
from kvlatent.jobs.record import Provenance, Result, complaint
from kvlatent.workflows.run_record import RunRecord, TrainingStep
from kvlatent_lab.benchmark_results import Comparison, ConversionBenchmark
from kvlatent_lab.study.study_cell import StudyCell

__all__ = ["Document", "Documents", "read_documents"]

_MODELS: dict[str, type[Result]] = {
    "evaluation": Evaluation,
    "bench": Bench,
    "study": StudyCell,
    "run": RunRecord,
    "conversion": ConversionBenchmark,
    "comparison": Comparison,
}
_JOURNAL = "metrics.jsonl"
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # no page can hold them


@dataclass(frozen=True)
class Document:
    """One result: where it was read, what it is, which original it is about, how it came about."""

    path: Path
    name: str
    kind: str
    content: Any
    record: Provenance
    fingerprint: str | None = None
    model: str | None = None


@dataclass
class Documents:
    """All documents of a report, in the order of their files, and the files that were skipped."""

    used: list[Document] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def of(self, kind: str) -> list[Document]:
        return [document for document in self.used if document.kind == kind]

    @property
    def model(self) -> tuple[str | None, str | None]:
        """Name and fingerprint of the original that the report is about, as far as the documents know them."""
        names = (document.model for document in self.used if document.model)
        prints = (document.fingerprint for document in self.used if document.fingerprint)
        return next(names, None), next(prints, None)


def read_documents(paths: Sequence[str | Path], progress: Progress | Report | None = None) -> Documents:
    """Read files and folders of results.

    Args:
        paths: a file is read whatever its name. A folder is searched for .json and metrics.jsonl at any depth; of a
            checkpoint in it only the record of its making is read. Hidden files and unfinished work (`*.partial`, the
            `work` of a study) are passed over.
        progress: told of the files read and their number.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no usable document, or documents about different models.
    """
    documents = Documents()
    cells: dict[str, str] = {}
    files, told = list(_files(paths)), Progress.of(progress)
    for number, (path, name) in enumerate(files):
        told.report("read the results", number, len(files))
        try:
            document = _journal(path, name) if path.suffix == ".jsonl" else _document(path, name)
            if document is not None and document.kind == "study":
                one = document.content
                first = cells.setdefault(
                    json.dumps([one.study, one.cell, one.settings.model_dump()], sort_keys=True), name
                )
                if first != name:
                    raise ValueError(f"cell {one.cell} of study {one.study} was read from {first} already")
        except (ValueError, OSError, RecursionError) as error:
            documents.skipped.append((name, _sentence(error)))
        else:
            documents.used += [] if document is None else [document]
    if not documents.used:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in documents.skipped[:3])
        raise ValueError(
            f"a report needs at least 1 result: got {len(documents.skipped)} files and 0 that can be used"
            f"{f' ({reasons})' if reasons else ''}; give what --json of eval and bench, a study or a run wrote"
        )
    _check_one_model(documents.used)
    return documents


def _files(paths: Sequence[str | Path]) -> Iterator[tuple[Path, str]]:
    """Files to read and their names on the page; each file once."""
    seen: set[Path] = set()
    for given in map(Path, paths):
        if not given.exists():
            raise FileNotFoundError(f"{given} does not exist; give files or folders of results")
        for path in _inside(given) if given.is_dir() else [given]:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                inside = f"{given.resolve().name}/{path.relative_to(given)}"
                yield path, _showable(inside if given.is_dir() else path.name)


def _inside(folder: Path) -> list[Path]:
    """Result files below a folder, in order of their names."""
    kept = []
    for path in sorted([*folder.rglob("*.json"), *folder.rglob(_JOURNAL)]):
        parts = path.relative_to(folder).parts
        parents = [folder.joinpath(*parts[:depth]) for depth in range(len(parts))]
        unfinished = any(part.startswith(".") or part.endswith(".partial") for part in parts)
        unfinished |= "work" in parts and any((parent / "study.json").is_file() for parent in parents)
        checkpoint = (path.parent / "config.json").is_file() and any(path.parent.glob("*.safetensors"))
        if path.is_file() and not unfinished and (not checkpoint or path.name in ("run.json", _JOURNAL)):
            kept.append(path)
    return kept


def _document(path: Path, name: str) -> Document | None:
    """Read one JSON file; None where it belongs beside results and is none, such as what a study says of its folder.

    Raises:
        ValueError: not JSON, or no document that is known.
        OSError: it cannot be read.
    """
    data = _parsed(path.read_text(encoding="utf-8"))
    kind = _kind(data)
    if kind is None:
        return None
    content: Any = _MODELS[kind].model_validate(data)
    record = content if isinstance(content, Provenance) else content.record
    return Document(path, name, kind, content, record, *_about(content))


def _journal(path: Path, name: str) -> Document:
    """The losses of a run: a list of steps."""
    lines = path.read_text(encoding="utf-8").splitlines()
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            steps.append(TrainingStep.model_validate(_parsed(line)))
        except ValueError as error:
            raise ValueError(f"line {number} of {len(lines)}: {_sentence(error)}") from error
    if not steps:
        raise ValueError("it holds no steps")
    return Document(path, name, "metrics", steps, Provenance())


def _kind(data: Any) -> str | None:
    """The kind of a document: its own word, or its shape; None of a study's folder."""
    if not isinstance(data, dict):
        raise ValueError(f"it holds a {type(data).__name__}, and a result is an object")  # noqa: TRY004
    kind = data.get("kind")
    if kind in ("evaluation", "bench", "study"):
        return kind
    if isinstance(kind, str) and kind.startswith("study-"):
        return None
    rows = data.get("rows")
    if kind is None and isinstance(data.get("cells"), dict):
        return "conversion"
    if kind is None and isinstance(rows, dict) and "original" in rows:
        return "comparison"
    if kind is None and "versions" in data and ("training" in data or "figures" in data):
        return "run"
    raise ValueError("no result that a report knows" + (f": kind {kind!r}" if kind is not None else ""))


def _about(content: Any) -> tuple[str | None, str | None]:
    """Fingerprint and name of the original a document is about.

    A latent model is known by the original it came from, so that results of several widths go together.
    """
    if isinstance(content, (Evaluation, Bench, StudyCell)):
        origin = getattr(content, "original", None) or content.model
        return origin.fingerprint or content.model.fingerprint, origin.name or content.model.name
    if isinstance(content, RunRecord):
        sources = content.earlier[0].sha256 if content.earlier else content.sha256
        return sources.get("teacher") or sources.get("model"), None
    return content.sha256.get("model"), None


def _check_one_model(documents: Sequence[Document]) -> None:
    """Raise `ValueError` where two documents are about different originals."""
    known = [document for document in documents if document.fingerprint]
    for document in known[1:]:
        if document.fingerprint != known[0].fingerprint:
            raise ValueError(
                f"one report is about one model: {known[0].name} is of {_called(known[0])} and {document.name} of "
                f"{_called(document)}; make a report of each, or name the original when you evaluate (--against)"
            )


def _called(document: Document) -> str:
    digest = f"{document.fingerprint}"[:12]
    return f"{document.model} ({digest})" if document.model else digest


def _parsed(text: str) -> Any:
    """The data of a JSON text; raises `ValueError` where it is none, or holds NaN or an infinity."""
    return _showable(json.loads(text, parse_constant=_refuse))


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"it holds {word}, and figures are finite")


def _showable(value: Any) -> Any:
    """The same data with every character that HTML and SVG cannot hold replaced: a name is no reason to lose a result."""
    if isinstance(value, str):
        return _UNSEEN.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_showable(key): _showable(part) for key, part in value.items()}
    return [_showable(part) for part in value] if isinstance(value, list) else value


def _sentence(error: Exception) -> str:
    """What is wrong with a file, without its path."""
    if isinstance(error, ValidationError):
        return complaint(error)
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON: {error.msg} in line {error.lineno}"
    if isinstance(error, UnicodeDecodeError):
        return "no text in UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.strerror or "cannot be read" if isinstance(error, OSError) else str(error)
