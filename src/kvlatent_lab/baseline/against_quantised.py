"""What the rows say of widths against fewer bits, in sentences that follow from the figures and change with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvlatent_lab.baseline.finished_rows import Figures, bytes_of, paired_change, ratio_between
from kvlatent_lab.baseline.table_rows import NEW, OLD, QUANTISED, SHARES

__all__ = ["against_quantised", "latest_widths"]

_SURE = 2  # standard errors between two rows that are told apart


def latest_widths(found: Mapping[str, Figures]) -> dict[str, Figures]:
    """Rows of narrower caches by the method of now, and by the old one where that is all there is."""
    return {
        name: document
        for name, document in found.items()
        if f"-{NEW}-" in name or (f"-{OLD}-" in name and name.replace(f"-{OLD}-", f"-{NEW}-") not in found)
        if bytes_of(document) is not None and "text fineweb" in document["figures"]
    }


def against_quantised(found: Mapping[str, Figures]) -> list[str]:
    """A sentence for each quantised cache of the original, and one for half the width under int8 against int4 alone."""
    return [*_on_text(found), *_half_under_int8(found)]


def _on_text(found: Mapping[str, Figures]) -> Iterator[str]:
    original, rows = found.get("original"), latest_widths(found)
    for kind in QUANTISED:
        quantised = found.get(f"original-{kind}")
        if original is None or quantised is None or not rows:
            continue
        size, own = bytes_of(quantised), ratio_between(quantised, original)
        if size is None or own is None:
            continue
        verdicts: dict[tuple[str, bool], dict[str, float]] = {}
        for name, row in rows.items():
            width, ratio = bytes_of(row), ratio_between(row, quantised)
            assert width is not None and ratio is not None
            verdicts.setdefault((_verdict(*ratio), width < size), {})[name] = ratio[0]
        as_large, smaller = (
            {v: rows for (v, less), rows in verdicts.items() if less is is_less} for is_less in (False, True)
        )
        yield (
            f"**The original under an {kind} cache** takes {size:,.0f} bytes a token and has x{_with_error(*own)} of its "
            f"perplexity on FineWeb. At the same bytes or fewer it is better than {_grouped(as_large.get('worse'))}; within "
            f"{_SURE} standard errors of {_grouped(as_large.get('level'))}; worse than {_grouped(as_large.get('better'))}. "
            f"Of rows with fewer bytes, better: {_grouped(smaller.get('better'))}; within the errors: "
            f"{_grouped(smaller.get('level'))}; worse: {len(smaller.get('worse', {}))}. In brackets: perplexity over that "
            "under it."
        )


def _grouped(ratios: Mapping[str, float] | None) -> str:
    """`head-passed` at 75 % (x1.01), 50 % (x1.08), ...: rows that differ in their share alone are named once."""
    groups: dict[str, list[str]] = {}
    for share in SHARES:
        for name, ratio in (ratios or {}).items():
            if f"-{share}-" in f"{name}-":
                groups.setdefault(name.replace(f"-{share}", "", 1), []).append(f"{share} % (x{ratio:.3f})")
    return ", ".join(f"`{name}` at {', '.join(shares)}" for name, shares in groups.items()) or "none"


def _verdict(ratio: float, error: float | None) -> str:
    """Of a row, from its perplexity over that under the quantised cache."""
    if error is None or abs(ratio - 1) <= _SURE * error:
        return "level"
    return "worse" if ratio > 1 else "better"


def _half_under_int8(found: Mapping[str, Figures]) -> Iterator[str]:
    alone = found.get("original-int4")
    for name, row in latest_widths(found).items():
        if alone is None or not name.endswith("-50-int8"):
            continue
        changes = []
        for measure, column, items in (
            ("LAMBADA", "task lambada", "acc"),
            ("pass key, rank, at 1024", "pass key 1024", "trial_rank"),
            ("pass key, exact, at 1024", "pass key 1024", "trial_exact"),
        ):
            pair = [one["figures"].get(column) for one in (row, alone)]
            if pair[0] is not None and pair[1] is not None:
                values = [one["answers"][items] if "answers" in one else one[items] for one in pair]
                changes.append(f"{measure} {_with_error(*paired_change(*values), sign='+')}")
        if changes:
            sizes = [bytes_of(one) for one in (row, alone)]
            at = [f"{size:,.0f} bytes" for size in sizes if size is not None]
            yield (
                f"**Half the width under an int8 cache**, `{name}` ({at[0]}), less int4 alone ({at[-1]}): "
                f"{', '.join(changes)}."
            )


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")
