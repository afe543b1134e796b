"""The pages of the documentation that are read off the code: `python tools/site_pages.py` writes them.

tests/test_site.py fails where a page is no longer what this writes.
"""

from __future__ import annotations

import math
from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from kvlatent.evaluation.checks.causality import LEAK
from kvlatent.evaluation.checks.fidelity import ENTROPY_RATIO, FOCUS_KEPT
from kvlatent.evaluation.diagnosis import diagnose
from kvlatent.evaluation.evidence import FORGETTING_NATS, SCORE_KEPT
from kvlatent_cli.main import app

__all__ = ["PAGES", "failures_page"]

DOCS = Path(__file__).resolve().parent.parent / "docs"
_GRID = {"contexts": [128], "depths": [0.5], "trials": 1, "seed": 0}
_FIDELITY = {"kl": 0.01, "kl_standard_error": 0.001, "layers": []}
_LAYER = {"layer": 0, "uniformity_original": 0.2, "uniformity_latent": 0.9, "entropy_ratio": 2.0}
_SIGNATURES = {
    "forgetting": (
        (
            f"perplexity over the original's is above x{math.exp(FORGETTING_NATS):.2f} and KL above {FORGETTING_NATS} "
            "nats a token, both by two standard errors"
        ),
        {"ratio": 2.0, "ratio_standard_error": 0.01, "fidelity": _FIDELITY | {"kl": 1.0}},
    ),
    "positional confusion": (
        (
            f"ordinary text is predicted as before, and needle or word order kept less than {SCORE_KEPT:.0%} of the "
            "original's score above chance"
        ),
        {
            "ratio": 1.0,
            "ratio_standard_error": 0.01,
            "fidelity": _FIDELITY,
            **{
                side: {
                    "needle": {**_GRID, "rank": [[score]], "exact": [[score]]},
                    "order": {**_GRID, "preferred": [[0.5 + score / 2]]},
                }
                for side, score in (("original", 1.0), ("latent", 0.1))
            },
        },
    ),
    "attention collapse": (
        (
            f"in some layer attention kept less than {FOCUS_KEPT:.0%} of its focus, and its entropy is {ENTROPY_RATIO} "
            "times the original's or more"
        ),
        {"fidelity": _FIDELITY | {"layers": [_LAYER]}},
    ),
    "non-causal": (
        f"logits of the past move by more than {LEAK:g} when the future changes",
        {"latent": {"causality": 1.0}, "original": {"causality": 0.0}},
    ),
}
"""By failure: its signature in words, and figures that show it, from which `diagnose` gives the advice."""

_HEAD = "<!-- Written by tools/site_pages.py; edit that. -->\n"


def failures_page() -> str:
    """What can be wrong with a latent model, and what to do, as `kvlatent eval` says it."""
    lines = [
        f"{_HEAD}# What can go wrong",
        (
            "`kvlatent eval DIR --against ORIGINAL` names these by their figures and says what to do. A figure counts where it "
            "passes its threshold by two standard errors; what was not measured is said to be missing, never taken for good."
        ),
    ]
    for name, (signature, figures) in _SIGNATURES.items():
        (advice,) = (one["advice"] for one in diagnose(figures)["findings"] if one["name"] == name)
        lines += [f"## {name.capitalize()}", f"**Seen by:** {signature}.", f"**What to do:** {advice}"]
    lines += [
        "## A warning right after the conversion",
        (
            "`convert` and `compress` measure on held-out text before they save. A perplexity of x1.1 or more, or a recall under "
            "0.9 of the original's, is warned of on stderr, in `run.json` and in the card, with the next step that is possible. "
            "Heed it: it is measured on your text."
        ),
    ]
    return "\n\n".join(lines) + "\n"


def cli_page() -> str:
    """typer's own description of every command."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="kvlatent")
    return f"{_HEAD}{text.replace('```console', '```text').strip()}\n"


PAGES = {"cli.md": cli_page, "failures.md": failures_page}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (DOCS / name).write_text(write(), encoding="utf-8")
