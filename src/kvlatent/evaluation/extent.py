"""How much the standard evaluation measures where nobody said: as much as two minutes on two cores hold.

A long context and a large model cost hours where a small one costs seconds, and a default that hangs is no default. The
extents come from a coarse grid and from the models' size alone, never from a clock: the same models are measured alike
on every machine of a kind, and small ones as fully as ever. What was asked for is measured as asked, however long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvlatent.evaluation.check import Check, CheckRequest, Settings
from kvlatent.model.time_estimate import DEFAULT_SECONDS, affordable, listed

__all__ = ["Extent", "choose_extent"]


@dataclass(frozen=True)
class Extent:
    """What is measured.

    Args:
        measured: of each check that is run, its settings: perplexity "max_tokens", fidelity "blocks", needle "contexts"
            and "trials", order "length" and "trials".
        seconds: by the estimate, on two cores or the GPU; without the text of a file, whose length is not known.
        sentence: what is less than it would be for a small model, and how to get more; None where nothing is.
    """

    measured: dict[str, Settings]
    seconds: float
    sentence: str | None

    def about(self) -> dict[str, Any]:
        """JSON-able: what was chosen, and why."""
        return {
            "measured": self.measured,
            "estimated_seconds": round(self.seconds, 1),
            "default_seconds": DEFAULT_SECONDS,
            "sentence": self.sentence,
        }


def choose_extent(request: CheckRequest, checks: Sequence[Check], *, optional: bool) -> Extent:
    """The extent of every check that is wanted; all of them share the time.

    Args:
        optional: nobody named the checks, so one may be left out where even its smallest extent takes too long.
    """
    levels = {}
    for check in checks:
        if check.extents is not None:
            levels[check.name] = check.extents(request)
            if optional and check.may_be_left_out and not _is_asked_for(check, checks, request):
                levels[check.name].insert(0, (None, 0.0))
    at = affordable({name: [cost for _, cost in each] for name, each in levels.items()}, DEFAULT_SECONDS)
    chosen = {name: levels[name][at[name]] for name in levels}
    seconds = sum(cost for _, cost in chosen.values())
    less = {
        check.name: _spell_out(check, chosen[check.name][0], levels[check.name][-1][0])
        for check in checks
        if check.name in chosen and chosen[check.name][0] != levels[check.name][-1][0]
    }
    measured = {name: settings for name, (settings, _) in chosen.items() if settings is not None}
    return Extent(measured, seconds, _sentence(less, checks, seconds, request) if less else None)


def _is_asked_for(check: Check, checks: Sequence[Check], request: CheckRequest) -> bool:
    """Whether an argument is given that no other check would look at."""
    given = [name for name, value in request.given.items() if value is not None and name in check.arguments]
    return any(not any(name in other.arguments for other in checks if other is not check) for name in given)


def _spell_out(check: Check, settings: Settings | None, full: Settings | None) -> str:
    """What is measured of a check, of what would be of a small model."""
    assert full is not None
    if settings is None:
        return f"{check.name} left out"
    parts = []
    for key, value in settings.items():
        if isinstance(value, list) and value != full[key]:
            parts.append(f"{key} of {listed(value)} tokens, not {listed(full[key])}")
        elif value != full[key]:
            parts.append(f"{value:,} of {full[key]:,} {check.units[key]}")
    return f"{check.name}: {', '.join(parts)}"


def _sentence(less: Mapping[str, str], checks: Sequence[Check], seconds: float, request: CheckRequest) -> str:
    """All of it in one sentence, with the next step."""
    more = [check.more(request) for check in checks if check.name in less and check.more is not None]
    more.append("--checks NAME for one check in all of the time")
    aim = "for two minutes on two cores"
    if seconds > DEFAULT_SECONDS:
        aim = f"and yet it takes two cores {seconds / 60:.0f} min or more"
    return f"measured by the models' size, {aim}: {'; '.join(less.values())}; give {', '.join(more)}"
