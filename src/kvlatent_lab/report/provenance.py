"""Where figures come from: command, seed, versions and machine of every document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvlatent.jobs.record import Provenance
from kvlatent_lab.report.result_files import Document, Documents

__all__ = ["Sheet", "anchor", "provenance", "title_of"]

_TITLES = {
    "evaluation": "Evaluations",
    "bench": "Bench",
    "run": "Runs",
    "metrics": "Losses",
    "conversion": "Conversion benchmark",
    "comparison": "Variants",
}


@dataclass
class Sheet:
    """Documents of one kind (of one study); a row is file, command, seed, seconds and the number of its machine."""

    name: str
    title: str
    rows: dict[tuple[str, str, str, str, str], None] = field(default_factory=dict)


def anchor(document: Document) -> str:
    """The name of the sheet that a document stands in."""
    return f"study-{document.content.study}" if document.kind == "study" else document.kind


def title_of(document: Document) -> str:
    """What the sheet is called."""
    return _TITLES.get(document.kind) or f"Study {document.content.study}"


def provenance(documents: Documents) -> tuple[list[Sheet], list[tuple[str, ...]]]:
    """Sheets in the order of the documents, and the machines they name, from 1 on: Python, versions and machine as lines."""
    machines: dict[tuple[str, ...], int] = {}
    sheets: dict[str, Sheet] = {}
    for document in documents.used:
        sheet = sheets.setdefault(anchor(document), Sheet(anchor(document), title_of(document)))
        for label, record in _records(document):
            lines = _described(record)
            number = str(machines.setdefault(lines, len(machines) + 1)) if lines else "–"
            seed = "–" if record.seed is None else str(record.seed)
            seconds = "–" if record.seconds is None else f"{record.seconds:,.1f}"
            sheet.rows[label, record.command or "–", seed, seconds, number] = None
    return list(sheets.values()), list(machines)


def _records(document: Document) -> Iterator[tuple[str, Provenance]]:
    """The document's record, or, where each of its cells has a command of its own, theirs: what one does not say is shared."""
    cells = document.content.cells if document.kind == "conversion" else {}
    if not any(one.command for one in cells.values()):
        yield document.name, document.record
    shared = document.record.model_dump(include={"python", "versions", "machine"})
    for name, one in cells.items():
        own = one.model_dump(include={"command", "seed", "machine"}, exclude_defaults=True)
        yield f"{document.name}: {name}", Provenance(**{**shared, **own, "seconds": one.conversion_seconds})


def _described(record: Provenance) -> tuple[str, ...]:
    """Versions and machine as lines; nothing where the record names none."""
    named = [f"Python {record.python}"] if record.python else []
    named += [f"{name} {version}" for name, version in record.versions.items() if version]
    machine = [f"{name.replace('_', ' ')}: {v}" for name, v in record.machine.items() if v is not None]
    return tuple(", ".join(line) for line in (named, machine) if line)
