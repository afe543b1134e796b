"""The section on named variants of one model, such as the choices of a conversion tried one by one."""

from __future__ import annotations

import pandas as pd

from kvlatent_lab.report.blocks import Block, Section, dot_block, section
from kvlatent_lab.report.page_listings import Listing, entry
from kvlatent_lab.report.result_files import Document, Documents

__all__ = ["comparisons"]


def comparisons(documents: Documents) -> Section | None:
    """Named variants of one model, by their perplexity over the original's."""
    lead = "Variants of one conversion; 1 is the original's perplexity, ± one paired standard error."
    return section("comparisons", "Variants", lead, [_variants(one) for one in documents.of("comparison")])


def _variants(document: Document) -> Block | None:
    rows = document.content.rows
    original = rows["original"]
    ratios = {name: one.ratio or one.perplexity / original.perplexity for name, one in rows.items()}
    errors = {name: one.ratio_standard_error for name, one in rows.items()}
    dots = pd.DataFrame({"y": ratios, "error": errors}, dtype=float).drop(index="original")
    if dots.empty:
        return None
    title = document.name.rpartition("/")[2].removesuffix(".json").replace("_", " ")
    lines = [
        (name, [entry(one.perplexity, one.standard_error), entry(ratios[name], errors[name])])
        for name, one in sorted(rows.items(), key=lambda item: item[0] != "original")
    ]
    columns = ["perplexity", "over the original's"]
    name = f"comparison-{document.name}"
    listing = Listing.of(name, "variant", columns, lines)
    return dot_block(name, title, dots, label="variant", sources=(document,), listing=listing)
