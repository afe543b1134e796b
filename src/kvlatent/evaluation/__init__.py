"""What a model is worth: perplexity and cache bytes beside its original, and what perplexity alone does not show."""

from .quality import cache_bytes_per_token, compare, evaluate, measure, precision, speedometer

__all__ = ["cache_bytes_per_token", "compare", "evaluate", "measure", "precision", "speedometer"]
