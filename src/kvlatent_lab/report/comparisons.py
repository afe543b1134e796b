"""The section on named variants of one model, such as the choices of a conversion tried one by one."""

from __future__ import annotations

from kvlatent_lab.report.blocks import Block, Section
from kvlatent_lab.report.charts import dot_chart
from kvlatent_lab.report.html_tables import Table, cell
from kvlatent_lab.report.result_files import Documents

__all__ = ["comparisons"]


def comparisons(documents: Documents) -> Section | None:
    """Named variants of one model, by their perplexity over the original's."""
    blocks = []
    for document in documents.of("comparison"):
        rows = document.content.rows
        base = rows["original"].perplexity
        names = [name for name, one in rows.items() if name != "original" and one.perplexity and base]
        ratios = [rows[name].ratio or rows[name].perplexity / base for name in names]
        errors = [rows[name].ratio_standard_error for name in names]
        if not names:
            continue
        title = document.name.rpartition("/")[2].removesuffix(".json").replace("_", " ")
        chart = dot_chart(
            f"comparison-{document.name}",
            names,
            ratios,
            errors,
            title=title,
            x_label="perplexity over the original's",
            log_x=max(ratios) > 4 * min(ratios),
            level=1.0,
        )
        lines = [("original", [cell(base, rows["original"].standard_error), cell(1.0)])]
        lines += [
            (name, [cell(rows[name].perplexity, rows[name].standard_error), cell(ratio, error)])
            for name, ratio, error in zip(names, ratios, errors, strict=True)
        ]
        table = Table.of(
            f"comparison-{document.name}", "variant", ["perplexity", "over the original's"], lines
        )
        blocks.append(Block(title, (table,), chart, sources=(document,)))
    lead = "Variants of one conversion; 1 is the original's perplexity, ± one paired standard error."
    return Section("comparisons", "Variants", lead, tuple(blocks)) if blocks else None
