"""The checks of `kvlatent eval`, in the order in which they run: a new one is its file, and its line here."""

from kvlatent.evaluation.check import Check
from kvlatent.evaluation.checks import causality, fidelity, needle, tasks, text_perplexity, word_order

__all__ = ["CHECKS", "DEFAULT_CHECKS"]

CHECKS: tuple[Check, ...] = (
    text_perplexity.CHECK,
    fidelity.CHECK,
    needle.CHECK,
    word_order.CHECK,
    causality.CHECK,
    tasks.CHECK,
)

DEFAULT_CHECKS = tuple(check.name for check in CHECKS if check.asked_by is None)
"""Names of what is measured where nothing is asked for."""
