"""kvlatent: shrink the KV cache of a pretrained RoPE decoder by narrowing keys and values inside every head.

Importing the package registers the latent model classes with transformers' `Auto*` classes, so that
`AutoModelForCausalLM.from_pretrained(DIR)` loads a converted checkpoint, and the attention implementation "kvlatent". What stands in the packages, from
the ground up: `jobs`, `model`, `checkpoints` and `text`, `selection` and `engines`, `planning`, `conversion`, `training` and
`evaluation`, `workflows` (docs/architecture.md); docs/walkthrough.md follows one width through them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvlatent.checkpoints.registration import register
from kvlatent.engines.cpu_decode import register_cpu_decode
from kvlatent.model.config import LatentConfig
from kvlatent.model.table import RotaryTable

if TYPE_CHECKING:
    from kvlatent.checkpoints.load import load_model
    from kvlatent.checkpoints.save import save
    from kvlatent.conversion.convert_model import convert
    from kvlatent.evaluation.standard import evaluate
    from kvlatent.jobs.recipe import Recipe
    from kvlatent.planning.width_plan import plan
    from kvlatent.selection.calibrate import calibrate
    from kvlatent.selection.statistics import Statistics
    from kvlatent.workflows.compress_checkpoint import compress
    from kvlatent.workflows.export_checkpoint import export
    from kvlatent.workflows.slice_checkpoint import slice_checkpoint
    from kvlatent.workflows.teach_checkpoint import teach
    from kvlatent.workflows.train_checkpoint import train

__version__ = "0.2.0"

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
    "export",
    "load_model",
    "plan",
    "save",
    "slice_checkpoint",
    "teach",
    "train",
]

# Loaded at first use: training and evaluation import peft's and datasets' dependencies. No module bears the name of
# one of these functions, since a submodule's import would put itself in the function's place.
_LAZY = {
    "Recipe": "jobs.recipe",
    "Statistics": "selection.statistics",
    "calibrate": "selection.calibrate",
    "compress": "workflows.compress_checkpoint",
    "convert": "conversion.convert_model",
    "evaluate": "evaluation.standard",
    "export": "workflows.export_checkpoint",
    "load_model": "checkpoints.load",
    "plan": "planning.width_plan",
    "save": "checkpoints.save",
    "slice_checkpoint": "workflows.slice_checkpoint",
    "teach": "workflows.teach_checkpoint",
    "train": "workflows.train_checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


register()
register_cpu_decode()
