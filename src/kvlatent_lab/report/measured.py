"""Models that were measured: what each is called, what it is, and on which text it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvlatent.model.config import LatentConfig
from kvlatent_lab.report.figures import Figures
from kvlatent_lab.report.html_tables import distinct
from kvlatent_lab.report.result_files import Document, Documents

__all__ = ["Measured", "measured_models", "one_text"]


@dataclass(frozen=True)
class Measured:
    """A model with its figures, those of its original, and the document that says so."""

    label: str
    figures: Figures
    original: Figures | None
    source: Document
    is_original: bool = False

    @property
    def config(self) -> LatentConfig | None:
        """Widths and tables of a latent model, where its document has them."""
        return (
            None if self.is_original or self.source.kind != "evaluation" else self.source.content.model.config
        )

    @property
    def text(self) -> str | None:
        """What the text that was read is known by: its hash, else its name; None where nobody wrote it down."""
        if self.source.kind == "run":
            hashes = self.source.content.sha256
            return hashes.get("eval_data") or hashes.get("data")
        read = self.source.record.text
        return None if read is None else read.sha256 or read.name


def measured_models(documents: Documents) -> list[Measured]:
    """Models of the evaluations, an original before what came from it; without evaluations those of the runs.

    An original that was measured twice with the same result stands there once.
    """
    found: list[Measured] = []
    for document in documents.of("evaluation"):
        _add(found, document, _evaluated(document), document.content.figures.get("original"))
    if not found:
        steps = {"converted": "converted", "stage1": "after stage I", "latent": "latent"}
        for document in documents.of("run"):
            figures = document.content.figures
            named = [("original", figures.get("original"), True)]
            named += [(text, figures.get(name), False) for name, text in steps.items()]
            _add(found, document, named, figures.get("original"))
    return _labelled(found)


def _evaluated(document: Document) -> list[tuple[str, Figures | None, bool]]:
    """Original and model of an evaluation; a model without a latent config and without an original is one itself."""
    content = document.content
    own, original = content.figures.get("latent"), content.figures.get("original")
    name = content.model.name or document.name
    if content.original is None and original is None and content.model.latent is None:
        return [(name, own, True)]
    known = content.original.name if content.original else None
    known = known or (name if own is None else "original")
    return [(known, original, True), (name, own, False)]


def _add(
    found: list[Measured],
    document: Document,
    named: Sequence[tuple[str, Figures | None, bool]],
    original: Figures | None,
) -> None:
    for label, figures, is_original in named:
        known = is_original and any(one.is_original and one.figures == figures for one in found)
        if figures is not None and not known:
            found.append(Measured(label, figures, original, document, is_original))


def _labelled(found: list[Measured]) -> list[Measured]:
    """Models with labels of their own: those that share one also say where they are from, then what they are."""
    labels = [one.label for one in found]
    labels = [
        one.label if labels.count(one.label) == 1 else f"{one.label} ({one.source.name})" for one in found
    ]
    places = [(label, one.source.path) for label, one in zip(labels, found, strict=True)]
    labels = [
        label if places.count(place) == 1 else f"{label}, {'original' if one.is_original else 'latent'}"
        for label, place, one in zip(labels, places, found, strict=True)
    ]
    return [replace(one, label=label) for one, label in zip(found, distinct(labels), strict=True)]


def one_text(models: Sequence[Measured]) -> bool:
    """Whether all of them are known to have read one text, as many tokens of it, in windows of one kind.

    Models of one file did, whether it names the text or not.
    """
    texts = {one.text for one in models}
    known = None not in texts or len({one.source.path for one in models}) == 1
    read = [one.figures for one in models if one.figures.perplexity is not None]
    return known and len(texts) == 1 and len({(one.tokens, one.window, one.stride) for one in read}) < 2
