"""What is wrong with a latent model, named from its figures: each failure with its number, its threshold and a remedy.

Four failures have a signature of their own. Forgetting: the next-token distribution is far off on ordinary text.
Positional confusion: ordinary text is fine, but distant tokens or the order of near ones are lost. Attention collapse:
layers that looked at few tokens now look at all alike. Non-causal: the past depends on the future. Nothing is
measured here; a figure that is missing is said to be missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvlatent.evaluation.checks import CHECKS
from kvlatent.evaluation.evidence import Figures, Sign, surely_above

__all__ = ["diagnose"]

Signs = Mapping[str, Mapping[str, Sign]]
"""What the checks say: by failure, and then by the check's name."""


def diagnose(figures: Figures) -> dict[str, Any]:
    """Name what is wrong with a latent model.

    Args:
        figures: plain figures, any of which may be missing. `latent` and `original` hold those of one model each:
            `perplexity` (a number, or a dict with that key; on contexts of ordinary length), `needle`, `order` (of
            the same grid and seed in both) and `causality` (largest change of past logits). Beside them stand
            `ratio` and `ratio_standard_error` (paired perplexities; without, the two perplexities make the ratio)
            and `fidelity`. Other keys are passed over.

    Returns:
        `findings`, each with `name`, `evidence` (by figure: `value`, `threshold`, and what else is known) and
        `advice`: "forgetting", "positional confusion", "attention collapse" and "non-causal", as many as hold, or
        "none" where none of those that could be judged does; `not_measured`, sentences; `summary`, one sentence.

    Raises:
        ValueError: a figure is NaN or infinite.
    """
    _check_finite(figures, "figures")
    missing: list[str] = []
    findings: list[dict[str, Any]] = []
    clear: dict[str, dict[str, Any]] = {}
    unknown: list[str] = []
    signs: dict[str, dict[str, Sign]] = {}
    for name in dict.fromkeys([*_RULES, *(name for check in CHECKS for name in check.signs)]):
        signs[name] = {
            check.name: check.signs[name](figures, missing) for check in CHECKS if name in check.signs
        }
        evidence, advice = _RULES.get(name, _judge_each)(signs, name, missing)
        if not evidence:
            unknown.append(name)
        elif advice is None:
            clear[name] = evidence
        else:
            findings.append({"name": name, "evidence": evidence, "advice": advice})
    summary = _summary(findings, list(clear), unknown)
    if not findings and clear:
        known = {key: value for evidence in clear.values() for key, value in evidence.items()}
        findings = [
            {"name": "none", "evidence": known, "advice": "Nothing to change, as far as was measured."}
        ]
    return {"findings": findings, "not_measured": missing, "summary": summary}


def _check_finite(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_finite(inner, f"{where}.{key}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            _check_finite(inner, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"figures must be finite: got {value} in {where}; measure again, in float32")


def _evidence(signs: Mapping[str, Sign]) -> dict[str, dict[str, Any]]:
    return {name: one for sign in signs.values() for name, one in sign.evidence.items()}


def _judge_each(signs: Signs, failure: str, _: list[str]) -> Sign:
    """A failure that each check judges by itself."""
    advice = [sign.advice for sign in signs[failure].values() if sign.advice is not None]
    return Sign(_evidence(signs[failure]), " ".join(advice) or None)


def _judge_forgetting(signs: Signs, failure: str, missing: list[str]) -> Sign:
    """Perplexity and KL, as far as they were measured, are both up; not judged where only one is."""
    evidence = _evidence(signs[failure])
    up = {name: surely_above(one) for name, one in evidence.items()}
    if len(set(up.values())) > 1 or None in up.values():
        shown = [
            f"{name} {one['value']:.3g} (threshold {one['threshold']:.3g})" for name, one in evidence.items()
        ]
        unsure = " and ".join(name for name, sure in up.items() if sure is None)
        why = f"{unsure} of one block has no standard error" if unsure else "one is up and the other is not"
        missing.append(f"forgetting: {', '.join(shown)}: {why}; measure on more text")
        return Sign({})
    advice = (
        "Keep more of the cache (--kv; --d-vo alone if keys are wide enough), calibrate on more text of the kind that is "
        "measured (--data, --blocks), and train stage II on more tokens (--stages both --tokens N)."
    )
    return Sign(evidence, advice if up and all(up.values()) else None)


def _judge_position(signs: Signs, failure: str, missing: list[str]) -> Sign:
    """Scores of position have fallen while ordinary text is predicted as before."""
    evidence = _evidence(signs[failure])
    fallen = {name: sign.advice for name, sign in signs[failure].items() if sign.advice is not None}
    up = [surely_above(one) for one in _evidence(signs["forgetting"]).values()]
    if evidence and not up:
        missing.append("positional confusion: needs perplexity or fidelity, to tell it from forgetting")
        return Sign({})
    if fallen and any(sure is not False for sure in up):
        so = "so did" if all(up) else "so may have"
        missing.append(f"positional confusion: {' and '.join(fallen)} fell, but {so} ordinary text")
        return Sign({})
    evidence = dict(sorted(evidence.items(), key=lambda item: item[1]["value"]))
    advice = "; ".join(fallen.values())
    return Sign(evidence, f"Ordinary text is predicted as before: {advice}." if fallen else None)


_RULES: dict[str, Callable[[Signs, str, list[str]], Sign]] = {
    "forgetting": _judge_forgetting,
    "positional confusion": _judge_position,
}
"""How the signs of several checks are weighed together."""


def _summary(findings: list[dict[str, Any]], clear: list[str], unknown: list[str]) -> str:
    """What was found, what was not, what nobody looked at."""
    shown = []
    for finding in findings:
        name, figure = next(iter(finding["evidence"].items()))
        shown.append(f"{finding['name']} ({name} {figure['value']:.3g}, threshold {figure['threshold']:.3g})")
    parts = {"found": ", ".join(shown), "no sign of": ", ".join(clear), "not judged": ", ".join(unknown)}
    text = "; ".join(f"{start}: {names}" for start, names in parts.items() if names)
    return text[0].upper() + text[1:] + "."
