"""What is wrong with a latent model, named from its figures: each failure with its number, its threshold and a remedy.

Four failures have a signature of their own. Forgetting: the next-token distribution is far off on ordinary text.
Positional confusion: ordinary text is fine, but distant tokens or the order of near ones are lost. Attention collapse:
layers that looked at few tokens now look at all alike. Non-causal: the past depends on the future. Nothing is
measured here; a figure that is missing is said to be missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvlatent.evaluation.kept_scores import SCORES, kept_scores

__all__ = ["ENTROPY_RATIO", "FOCUS_KEPT", "FORGETTING_NATS", "LEAK", "SCORE_KEPT", "diagnose"]

FORGETTING_NATS = 0.2
"""Nats a token, of KL and of log perplexity ratio (on text that the original could have written, the two are one
number). By the scaling law of Hoffmann et al. 2022 (406.4 / N^0.34), 0.21 nats is what 1 B parameters have over a
quarter of them: a model that forgot this much is worth less than a smaller one."""

SCORE_KEPT = 0.8
"""Share of the original's score above chance, in needle and order; the fall must also exceed two standard errors.
Conversions of the embedded model that hold perplexity (ratios to 1.15) kept 0.96 and more."""

FOCUS_KEPT = 0.5
"""Share of a layer's focus that is kept; focus is how far attention is from uniform, 1 - entropy / log of keys seen.
Below half, a layer is nearer to uniform than to the original. In the embedded model, no layer had less than 0.66 at a
perplexity ratio of 1.2; at 30, where attention is lost, two of four layers had less than 0.3."""

ENTROPY_RATIO = 1.25
"""Least rise of a layer's entropy that counts as collapse. It spares layers that were close to uniform already, whose
focus is a small number with a large relative error."""

LEAK = 1e-3
"""Change of a past logit under another future. A causal model repeats its bits; a leak moves logits by far more."""

_ERRORS = 2.0  # standard errors by which a figure must pass its threshold
_POSITIONAL = {
    "needle": "for distant tokens widen keys and values (--d-qk, --d-vo or --kv) and train stage II on blocks as long as "
    "the contexts in use (--set data.block_size=N)",
    "order": "for the order of near tokens let every head keep the frequencies it uses (--preset calibrated --table head) "
    "or widen keys (--d-qk)",
}

Answer = tuple[dict[str, dict[str, Any]], str | None]


def diagnose(figures: Mapping[str, Any]) -> dict[str, Any]:
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
    for name, question in _QUESTIONS.items():
        evidence, advice = question(figures, missing)
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


def _ordinary(figures: Mapping[str, Any], missing: list[str]) -> dict[str, dict[str, Any]]:
    """What is known of ordinary text."""
    evidence = {}
    ratio = _ratio(figures)
    if ratio is None:
        missing.append("perplexity ratio: needs the perplexities of both models on the same text")
    else:
        threshold, error = math.exp(FORGETTING_NATS), figures.get("ratio_standard_error")
        evidence["perplexity_ratio"] = _figure(ratio, threshold, error)
    fidelity = figures.get("fidelity")
    if not fidelity:
        missing.append("divergence: needs the fidelity of the two models")
    else:
        evidence["kl"] = _figure(fidelity["kl"], FORGETTING_NATS, fidelity.get("kl_standard_error"))
    return evidence


def _forgetting(figures: Mapping[str, Any], missing: list[str]) -> Answer:
    """Perplexity and KL, as far as they were measured, are both up; not judged where only one is."""
    evidence = _ordinary(figures, missing)
    up = {name: _surely_above(figure) for name, figure in evidence.items()}
    if len(set(up.values())) > 1 or None in up.values():
        shown = [
            f"{name} {one['value']:.3g} (threshold {one['threshold']:.3g})" for name, one in evidence.items()
        ]
        unsure = " and ".join(name for name, sure in up.items() if sure is None)
        why = f"{unsure} of one block has no standard error" if unsure else "one is up and the other is not"
        missing.append(f"forgetting: {', '.join(shown)}: {why}; measure on more text")
        return {}, None
    advice = (
        "Keep more of the cache (--kv; --d-vo alone if keys are wide enough), calibrate on more text of the kind that is "
        "measured (--data, --blocks), and train stage II on more tokens (--stages both --tokens N)."
    )
    return evidence, advice if up and all(up.values()) else None


def _positional(figures: Mapping[str, Any], missing: list[str]) -> Answer:
    """Needle or order have fallen while ordinary text is predicted as before."""
    evidence: dict[str, dict[str, Any]] = {}
    fallen: list[str] = []
    for name in SCORES:
        scores, silent = kept_scores(name, *(_of(figures, side, name) for side in ("original", "latent")))
        missing += silent
        found = {key: one | {"threshold": SCORE_KEPT} for key, one in scores.items()}
        evidence |= found
        if any(map(_surely_fallen, found.values())):
            fallen.append(name)
    up = [_surely_above(figure) for figure in _ordinary(figures, []).values()]
    if evidence and not up:
        missing.append("positional confusion: needs perplexity or fidelity, to tell it from forgetting")
        return {}, None
    if fallen and any(sure is not False for sure in up):
        so = "so did" if all(up) else "so may have"
        missing.append(f"positional confusion: {' and '.join(fallen)} fell, but {so} ordinary text")
        return {}, None
    evidence = dict(sorted(evidence.items(), key=lambda item: item[1]["value"]))
    advice = "; ".join(_POSITIONAL[name] for name in fallen)
    return evidence, f"Ordinary text is predicted as before: {advice}." if fallen else None


def _collapse(figures: Mapping[str, Any], missing: list[str]) -> Answer:
    """Layers have lost most of their focus, and their entropy has risen."""
    rows = [
        (max(1.0 - row["uniformity_latent"], 0.0) / (1.0 - row["uniformity_original"]), row)
        for row in (figures.get("fidelity") or {}).get("layers", ())
        if row.get("uniformity_original", 1.0) < 1.0
    ]
    if not rows:
        missing.append("attention: needs the fidelity layer by layer")
        return {}, None
    risen = [pair for pair in rows if (pair[1]["entropy_ratio"] or math.inf) >= ENTROPY_RATIO]
    fallen = [pair for pair in risen if pair[0] < FOCUS_KEPT]
    kept, worst = min(fallen or rows, key=lambda pair: pair[0])
    where = {"layer": worst["layer"], "layers": [row["layer"] for _, row in fallen]}
    uniformity = {name: worst[f"uniformity_{name}"] for name in ("original", "latent")}
    evidence = {
        "focus_kept": _figure(kept, FOCUS_KEPT) | where | uniformity,
        "entropy_ratio": _figure(worst["entropy_ratio"], ENTROPY_RATIO) | where,
    }
    advice = (
        "The logits of these layers no longer tell tokens apart: widen keys (--d-qk, or --kv with --per-layer), convert "
        "with --preset calibrated, which keeps the softmax scale and aligns attention (--align 200), and train stage I."
    )
    return evidence, advice if fallen else None


def _non_causal(figures: Mapping[str, Any], missing: list[str]) -> Answer:
    """The logits of the past change with the future."""
    change, before = (_of(figures, side, "causality") for side in ("latent", "original"))
    if change is None:
        missing.append("causality: needs the causality of the latent model")
        return {}, None
    evidence = {"causality": _figure(change, LEAK) | {"original": before}}
    if change <= LEAK:
        return evidence, None
    if (before or 0.0) > LEAK:
        return evidence, "The original looks ahead as well: convert a decoder-only model."
    return evidence, (
        "The causal mask is lost, so every perplexity is too good: load the checkpoint with kvlatent.load_model, pass no "
        "attention_mask of your own, and use attention sdpa or eager."
    )


_QUESTIONS = {
    "forgetting": _forgetting,
    "positional confusion": _positional,
    "attention collapse": _collapse,
    "non-causal": _non_causal,
}


def _ratio(figures: Mapping[str, Any]) -> float | None:
    """The paired ratio, or that of the two perplexities."""
    found = [_of(figures, side, "perplexity") for side in ("latent", "original")]
    latent, original = (one["perplexity"] if isinstance(one, Mapping) else one for one in found)
    return figures.get("ratio") or (latent / original if latent and original else None)


def _of(figures: Mapping[str, Any], side: str, name: str) -> Any:
    return (figures.get(side) or {}).get(name)


def _figure(value: float | None, threshold: float, error: float | None = None) -> dict[str, Any]:
    return {"value": value, "threshold": threshold, "standard_error": error}


def _surely_above(figure: Mapping[str, Any]) -> bool | None:
    """None for a figure that is above and has no standard error."""
    error = figure["standard_error"]
    if error is None:
        return None if figure["value"] > figure["threshold"] else False
    return figure["value"] - _ERRORS * error > figure["threshold"]


def _surely_fallen(figure: Mapping[str, Any]) -> bool:
    most = figure["value"] + _ERRORS * (figure["standard_error"] or 0.0)
    return figure["value"] < figure["threshold"] and most < 1.0


def _summary(findings: list[dict[str, Any]], clear: list[str], unknown: list[str]) -> str:
    """What was found, what was not, what nobody looked at."""
    found = []
    for finding in findings:
        name, figure = next(iter(finding["evidence"].items()))
        found.append(f"{finding['name']} ({name} {figure['value']:.3g}, threshold {figure['threshold']:.3g})")
    parts = {"found": ", ".join(found), "no sign of": ", ".join(clear), "not judged": ", ".join(unknown)}
    text = "; ".join(f"{start}: {names}" for start, names in parts.items() if names)
    return text[0].upper() + text[1:] + "."
