"""The page: sections in order, one template, one file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from kvlatent.jobs.apart import check_apart
from kvlatent.jobs.atomic import write_atomically
from kvlatent.jobs.progress import Progress, Report
from kvlatent_lab.report.bench_charts import speed
from kvlatent_lab.report.blocks import Section
from kvlatent_lab.report.comparisons import comparisons
from kvlatent_lab.report.headline import diagnoses, headline
from kvlatent_lab.report.model_charts import needles, word_order
from kvlatent_lab.report.provenance import anchor, provenance, title_of
from kvlatent_lab.report.quality_charts import quality
from kvlatent_lab.report.result_files import Documents, read_documents
from kvlatent_lab.report.rotary_charts import attenuation_curves
from kvlatent_lab.report.run_charts import layers, training
from kvlatent_lab.report.study_charts import studies

__all__ = ["report"]

_MARK = '<meta name="generator" content="kvlatent report">'


def report(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | Report | None = None,
) -> dict[str, Any]:
    """Write one self-contained HTML page from result files.

    The page needs no network and no script. It is written whole or not at all; an earlier report in its place is
    replaced.

    Args:
        paths: files and folders with what `eval --json`, `bench --json`, `study`, `compress`, `convert` and the
            benchmarks wrote.
        out: the HTML file.
        overwrite: replace `out` even if it is no report.
        progress: called with a step's name, files or sections done, their number, and a note.

    Returns:
        A JSON-able dict: `out`, `model`, `sections` (titles), `used` (`file` and `kind`), `skipped` (`file` and
        `reason`).

    Raises:
        FileNotFoundError: a path does not exist.
        FileExistsError: `out` exists, is no report, and `overwrite` is false.
        ValueError: `out` is a directory or one of the inputs, no usable result, or results of different models.
    """
    out = Path(out)
    _check_out(out, overwrite, paths)
    told = Progress.of(progress)
    documents = read_documents(paths, told)
    sections = _sections(documents, told)
    html = _rendered(documents, sections)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda file: file.write_text(html, encoding="utf-8"))
    return {
        "out": str(out),
        "model": documents.model[0],
        "sections": [section.title for section in sections],
        "used": [{"file": one.name, "kind": one.kind} for one in documents.used],
        "skipped": [{"file": name, "reason": reason} for name, reason in documents.skipped],
    }


def _check_out(out: Path, overwrite: bool, paths: Sequence[str | Path]) -> None:
    """Refuse, before any work, a place where the page cannot be written.

    A new page, or one that replaces a report, may stand in a folder of results; what is read is replaced by none.
    """
    if out.is_dir():
        raise ValueError(f"a report is one HTML file: {out} is a directory; give {out / 'report.html'}")
    foreign = out.exists() and not _is_report(out)
    for path in paths:
        if foreign or not Path(path).is_dir():
            check_apart(out, {"input": path})
    if foreign and not overwrite:
        raise FileExistsError(
            f"{out} exists and is no report; choose another name or pass overwrite (--overwrite)"
        )


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return _MARK.encode() in file.read(1000)


def _sections(documents: Documents, progress: Progress) -> list[Section]:
    """Sections in reading order: what it is worth, why, how it was made."""
    of_models = (
        headline,
        diagnoses,
        quality,
        needles,
        word_order,
        speed,
        layers,
        training,
        attenuation_curves,
    )
    sections: list[Section | None] = []
    for number, draw in enumerate(of_models):
        progress.report("draw", number, len(of_models) + 1, draw.__name__.replace("_", " "))
        sections.append(draw(documents))
    progress.report("draw", len(of_models), len(of_models) + 1, "studies")
    sections += [*studies(documents), comparisons(documents)]
    progress.report("draw", len(of_models) + 1, len(of_models) + 1)
    return [section for section in sections if section is not None]


def _rendered(documents: Documents, sections: Sequence[Section]) -> str:
    """The page as text; every name in it is escaped, and charts, whose text is escaped already, are put in as they are."""
    here = files("kvlatent_lab.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["origin"] = lambda document: (anchor(document), title_of(document))
    template = environment.from_string((here / "page.html.j2").read_text(encoding="utf-8"))
    name, fingerprint = documents.model
    sheets, machines = provenance(documents)
    return template.render(
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        mark=Markup(_MARK),
        svg=Markup,
        model=name,
        fingerprint=fingerprint,
        sections=sections,
        sheets=sheets,
        machines=machines,
        documents=documents,
    )
