"""Models that were measured: what each is called, what it is, and on which text it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvlatent.evaluation.result_models import Diagnosis, Fidelity, Figures
from kvlatent.model.config import LatentConfig
from kvlatent_lab.report.page_listings import distinct
from kvlatent_lab.report.result_files import Document, Documents

__all__ = ["Measured", "measured_models", "one_text"]

_STEPS = {"converted": "converted", "stage1": "after stage I", "latent": "latent"}


@dataclass(frozen=True)
class Measured:
    """A model with its figures, those of its original, what compares the two, and the document that says so."""

    label: str
    figures: Figures
    original: Figures | None
    source: Document
    is_original: bool = False
    ratio: float | None = None
    ratio_standard_error: float | None = None
    fidelity: Fidelity | None = None

    @property
    def config(self) -> LatentConfig | None:
        """Widths and tables of a latent model, where its document has them."""
        known = not self.is_original and self.source.kind == "evaluation"
        return self.source.content.model.latent if known else None

    @property
    def diagnosis(self) -> Diagnosis | None:
        """What is wrong with a latent model, where that was asked."""
        return None if self.is_original else getattr(self.source.content, "diagnosis", None)

    @property
    def kept(self) -> float | None:
        """Share of the original's cache."""
        if self.original is None or self.is_original:
            return None
        own, whole = self.figures.cache_bytes_per_token, self.original.cache_bytes_per_token
        return own / whole if own and whole else None

    @property
    def over_original(self) -> float | None:
        """Perplexity over the original's: as it was measured, else of the two perplexities."""
        if self.ratio is not None or self.original is None or self.is_original:
            return self.ratio
        own, before = self.figures.perplexity, self.original.perplexity
        return own / before if own and before else None

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
    evaluations = documents.of("evaluation")
    models: list[Measured] = []
    for document in evaluations or documents.of("run"):
        for one in _evaluated(document) if evaluations else _of_run(document):
            if not (one.is_original and any(m.is_original and m.figures == one.figures for m in models)):
                models.append(one)
    return _labelled(models)


def _evaluated(document: Document) -> list[Measured]:
    """Original and model of an evaluation; a model without a latent config and without an original is one itself."""
    content, figures = document.content, document.content.figures
    name = content.model.name or document.name
    if content.original is None and figures.original is None and content.model.latent is None:
        return [Measured(name, figures.latent, None, document, is_original=True)]
    both = {"ratio": figures.ratio, "ratio_standard_error": figures.ratio_standard_error}
    latent = Measured(name, figures.latent, figures.original, document, fidelity=figures.fidelity, **both)
    if figures.original is None:
        return [latent]
    known = content.original.name if content.original else None
    return [
        Measured(known or "original", figures.original, figures.original, document, is_original=True),
        latent,
    ]


def _of_run(document: Document) -> list[Measured]:
    """Original and steps of a run."""
    figures = document.content.figures
    original = figures.get("original")
    models = (
        [] if original is None else [Measured("original", original, original, document, is_original=True)]
    )
    for name, label in _STEPS.items():
        if (own := figures.get(name)) is not None:
            both = {"ratio": own.ratio, "ratio_standard_error": own.ratio_standard_error}
            models.append(Measured(label, own, original, document, **both))
    return models


def _labelled(models: list[Measured]) -> list[Measured]:
    """Models with labels of their own: those that share one also say where they are from, then what they are."""
    labels = [one.label for one in models]
    labels = [f"{m.label} ({m.source.name})" if labels.count(m.label) > 1 else m.label for m in models]
    places = [(label, one.source.path) for label, one in zip(labels, models, strict=True)]
    labels = [
        label if places.count(place) == 1 else f"{label}, {'original' if one.is_original else 'latent'}"
        for label, place, one in zip(labels, places, models, strict=True)
    ]
    return [replace(one, label=label) for one, label in zip(models, distinct(labels), strict=True)]


def one_text(models: Sequence[Measured]) -> bool:
    """Whether all of them are known to have read one text, as many tokens of it, in windows of one kind.

    Models of one file did, whether it names the text or not.
    """
    texts = {one.text for one in models}
    known = None not in texts or len({one.source.path for one in models}) == 1
    read = [one.figures for one in models if one.figures.perplexity is not None]
    return known and len(texts) == 1 and len({(one.tokens, one.window, one.stride) for one in read}) < 2
