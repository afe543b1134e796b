"""Where figures come from: command, seed, versions and machine of every document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvlatent_lab.report.figures import Record
from kvlatent_lab.report.result_files import Document, Documents

__all__ = ["Machine", "Sheet", "anchor", "provenance", "title_of"]

_TITLES = {
    "evaluation": "Evaluations",
    "bench": "Bench",
    "run": "Runs",
    "metrics": "Losses",
    "conversion": "Conversion benchmark",
    "comparison": "Variants",
}


@dataclass(frozen=True)
class Machine:
    """Python, versions and machine that documents share, under a number."""

    number: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    """Documents of one kind (of one study): for each its file, command, seed, seconds and the number of its machine."""

    name: str
    title: str
    rows: tuple[tuple[str, str, str, str, str], ...]


def anchor(document: Document) -> str:
    """The name of the sheet that a document stands in."""
    return f"study-{document.content.study}" if document.kind == "study" else document.kind


def title_of(document: Document) -> str:
    """What the sheet is called."""
    return _TITLES.get(document.kind) or f"Study {document.content.study}"


def provenance(documents: Documents) -> tuple[list[Sheet], list[Machine]]:
    """Sheets in the order of the documents, and the machines they name."""
    machines: dict[tuple[str, ...], int] = {}
    sheets: dict[str, list[tuple[str, str, str, str, str]]] = {}
    titles: dict[str, str] = {}
    for document in documents.found:
        name = anchor(document)
        titles[name] = title_of(document)
        for label, record in _records(document):
            number = "–"
            if described := _described(record):
                number = str(machines.setdefault(described, len(machines) + 1))
            seed = "–" if record.seed is None else str(record.seed)
            seconds = "–" if record.seconds is None else f"{record.seconds:,.1f}"
            sheets.setdefault(name, []).append((label, record.command or "–", seed, seconds, number))
    made = [Sheet(name, titles[name], tuple(_merged(rows))) for name, rows in sheets.items()]
    return made, [Machine(number, lines) for lines, number in machines.items()]


def _records(document: Document) -> Iterator[tuple[str, Record]]:
    """The document's record, or, where each of its cells has a command of its own, theirs."""
    cells = document.content.cells if document.kind == "conversion" else {}
    if not any("command" in one for one in cells.values()):
        yield document.name, document.record
    for name in cells:
        yield f"{document.name}: {name}", document.content.record_of(name, document.record)


def _merged(rows: Sequence[tuple[str, str, str, str, str]]) -> Iterator[tuple[str, str, str, str, str]]:
    """Rows without those that say the same as one before."""
    yield from dict.fromkeys(rows)


def _described(record: Record) -> tuple[str, ...]:
    """Versions and machine as lines; nothing where the record names none."""
    lines = []
    known = {name: version for name, version in record.versions.items() if version}
    if record.python or known:
        named = [f"Python {record.python}"] if record.python else []
        lines.append(", ".join([*named, *(f"{name} {version}" for name, version in known.items())]))
    machine = {name.replace("_", " "): value for name, value in record.machine.items() if value is not None}
    if machine:
        lines.append(", ".join(f"{name}: {value}" for name, value in machine.items()))
    return tuple(lines)
