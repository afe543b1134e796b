"""What the tests of the bench share: a pair of tiny models, and its sizes."""

from kvlatent.conversion.convert_model import convert
from tiny import tiny_model

LAYERS, HEADS, FULL = 3, 2, 32  # of the tiny Llama
QUICK = {"batches": (1, 2), "contexts": (8, 21), "new_tokens": 2, "repeats": 3}


def make_pair():
    """(original, latent at d_qk 16 and d_vo 8)."""
    original = tiny_model("llama")
    return original, convert(original, d_qk=16, d_vo=8, preset="own-frequency")
