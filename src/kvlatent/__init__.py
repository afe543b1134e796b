"""kvlatent: shrink the KV cache of a pretrained RoPE decoder by narrowing keys and values inside every head.

Importing the package registers the latent model classes with transformers' `Auto*` classes, so that
`AutoModelForCausalLM.from_pretrained(DIR)` loads a converted checkpoint. Reading order of the modules:

    what the artifact is    table -> config -> rope -> select -> families -> attention -> modeling
    what a text says        statistics -> calibration -> subset -> pairs, factor -> prediction -> planning
    how it is made          choices -> choose -> projections -> alignment -> refit -> refinement -> conversion -> remote_code -> apart -> output -> hub
    how it is trained       data -> stage1, stage2 -> recipe -> training
    what it is worth        cost -> engines -> serving -> perplexity -> evaluation, bench -> report
    the whole of it         settings -> budget -> texts -> steps -> workspace, record, lineage, card -> run -> pipeline, converting, survey, study -> demo
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import LatentConfig
from .hub import register
from .table import RotaryTable

if TYPE_CHECKING:
    from .calibration import calibrate
    from .conversion import convert
    from .evaluation import evaluate
    from .hub import load_model, save
    from .pipeline import compress
    from .planning import plan
    from .recipe import Recipe
    from .statistics import Statistics
    from .training import train

__version__ = "0.1.0"

__all__ = [
    "LatentConfig",
    "Recipe",
    "RotaryTable",
    "Statistics",
    "__version__",
    "calibrate",
    "compress",
    "convert",
    "evaluate",
    "load_model",
    "plan",
    "save",
    "train",
]

# Loaded at first use: training and evaluation import peft's and datasets' dependencies. No module bears the name of
# one of these functions, since a submodule's import would put itself in the function's place.
_LAZY = {
    "Recipe": "recipe",
    "Statistics": "statistics",
    "calibrate": "calibration",
    "compress": "pipeline",
    "convert": "conversion",
    "evaluate": "evaluation",
    "load_model": "hub",
    "plan": "planning",
    "save": "hub",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


register()
