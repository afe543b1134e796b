"""kvlatent: shrink the KV cache of a pretrained RoPE decoder by narrowing keys and values inside every head.

Importing the package registers the latent model classes with transformers' `Auto*` classes, so that
`AutoModelForCausalLM.from_pretrained(DIR)` loads a converted checkpoint. Reading order of the modules:

    table -> config -> rope -> select -> families -> attention -> modeling -> convert -> remote_code -> hub
           -> data -> stage1 -> stage2 -> recipe -> train -> perplexity -> evaluate -> pipeline -> demo
"""

from importlib import import_module
from typing import Any

from .config import LatentConfig
from .hub import register
from .table import RotaryTable

__version__ = "0.1.0"

_LAZY = {
    "Recipe": "recipe",
    "compress": "pipeline",
    "convert": "convert",
    "evaluate": "evaluate",
    "load_model": "hub",
    "save": "hub",
    "train": "train",
}

__all__ = ["LatentConfig", "RotaryTable", "__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


register()
