"""Registration of the latent classes with transformers, and the modelling file that a saved model carries.

`import kvlatent` and the vLLM plugin come through here, so nothing is imported that the older transformers of an engine
lacks: the classes themselves load from 5.1 on, the rest of the package asks for more.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kvlatent.checkpoints.remote_code import MODULE_NAME, remote_code
from kvlatent.model.classes import latent_classes
from kvlatent.model.families import FAMILIES, LATENT_PREFIX

__all__ = ["SELF_CHECK", "installed_families", "register"]

SELF_CHECK = "self_check.json"
"""Beside the weights: what the model says to one prompt (`self_check`)."""


def register() -> None:
    """Make `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know every latent family. Idempotent."""
    for model_type in installed_families():
        config, decoder, causal = latent_classes(model_type)
        AutoConfig.register(LATENT_PREFIX + model_type, config, exist_ok=True)
        AutoModel.register(config, decoder, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
        decoder.add_code = causal.add_code = staticmethod(_add_code)


def installed_families() -> tuple[str, ...]:
    """Source model types of all rows whose classes the installed transformers has: an engine may bring an older one."""
    found = []
    for family in FAMILIES.values():
        with suppress(ValueError):
            family.upstream("ForCausalLM")
            found.append(family.model_type)
    return tuple(found)


def _add_code(folder: str | os.PathLike[str], config: Any) -> None:
    """Put the modelling file into a saved directory and name it in `auto_map`, for loading without kvlatent."""
    model_type = str(config.model_type).removeprefix(LATENT_PREFIX)
    path = Path(folder) / "config.json"
    data = json.loads(path.read_text())
    names = zip(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), latent_classes(model_type), strict=True)
    data["auto_map"] = {auto: f"{MODULE_NAME}.{kind.__name__}" for auto, kind in names}
    if data.get("use_cache") is False:  # trainers turn the cache off and leave it so
        data["use_cache"] = True
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
    (Path(folder) / f"{MODULE_NAME}.py").write_text(remote_code(model_type))
    # What it said before, when it was saved here: these may be other weights.
    (Path(folder) / SELF_CHECK).unlink(missing_ok=True)
