"""What stage I gains: perplexity with it over that without, at equal tokens, seed by seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from kvlatent_lab.report.blocks import Block, line_block
from kvlatent_lab.report.cells import FIRST, SHARE, TOKENS, Group
from kvlatent_lab.report.charts import Line
from kvlatent_lab.report.result_files import Document
from kvlatent_lab.report.study_charts import said, setting_name
from kvlatent_lab.spread import standard_error

__all__ = ["gains"]

_SHARED = ("preset", "d_qk", "d_vo", "kv", TOKENS)
"""Settings in which the two sides of a comparison agree."""

_Point = tuple[float, float, float | None]


def gains(name: str, groups: Sequence[Group], cells: Sequence[Document]) -> list[Block]:
    """A chart for each preset and number of tokens, a line for each share of the cache; below 1 stage I pays."""
    charts: dict[str, dict[str, list[_Point]]] = {}
    for facet, line, point in _points(groups):
        charts.setdefault(facet, {}).setdefault(line, []).append(point)
    blocks = []
    for facet, found in charts.items():
        lines = []
        for label, points in found.items():
            x, y, error = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            lines.append(Line(label, x, y, error))
        block = line_block(
            f"study-{name}-gain-{facet}",
            f"What stage I gains: {facet}",
            lines,
            x_label=setting_name(FIRST),
            y_label="perplexity with stage I over without",
            x_ticks=sorted({x for line in lines for x in line.x}),
            level=1.0,
            note="At equal tokens in all, seed by seed; below 1 stage I pays.",
            sources=cells,
        )
        blocks += [block] if block is not None else []
    return blocks


def _points(groups: Sequence[Group]) -> Iterator[tuple[str, str, _Point]]:
    """Chart, line and point of every group with stage I that has a group without it."""
    alone = {_key(group): group.by_seed("perplexity") for group in groups if group.settings.get(FIRST) == 0}
    for group in groups:
        first, without = group.settings.get(FIRST), alone.get(_key(group), {})
        ratios = [y / without[seed] for seed, y in group.by_seed("perplexity").items() if without.get(seed)]
        if first and ratios:
            known = [one for one in ("preset", TOKENS) if one in group.settings]
            facet = ", ".join(said(one, group.settings[one]) for one in known)
            line = said(SHARE, group.settings.get(SHARE, group.settings.get("d_qk")))
            yield facet, line, (first, fmean(ratios), standard_error(ratios))


def _key(group: Group) -> tuple:
    return tuple(group.settings.get(name) for name in _SHARED)
