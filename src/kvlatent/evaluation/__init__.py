"""What a model is worth: perplexity and cache bytes beside its original, and what perplexity alone does not show.

`quality` is what training and converting measure on the way; `standard` is `kvlatent eval`, which puts all of these
together: `sliding` (perplexity of documents), `fidelity` (distance from the original), `needle` and `order` (what
position still means), `causality`, `tasks` (lm-eval), and `diagnosis`, which names what is wrong. `door` checks what
it is asked for before any of them runs.
"""

from .quality import cache_bytes_per_token, compare, evaluate, measure, precision, speedometer

__all__ = ["cache_bytes_per_token", "compare", "evaluate", "measure", "precision", "speedometer"]
