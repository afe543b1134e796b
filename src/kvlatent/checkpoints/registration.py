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

from kvlatent.checkpoints.remote_code import MODULE_NAME, remote_code
from kvlatent.model.classes import CarriesItsCode, latent_classes
from kvlatent.model.families import FAMILIES, LATENT_PREFIX
from kvlatent.model.wrapper_classes import WRAPPED, register_text_model

__all__ = ["SELF_CHECK", "installed_families", "register"]

SELF_CHECK = "self_check.json"
"""Beside the weights: what the model says to one prompt (`self_check`)."""


def register() -> None:
    """Make `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know every latent family. Idempotent."""
    for model_type in installed_families():
        register_text_model(model_type)
    CarriesItsCode.add_code = staticmethod(_add_code)


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
    path = Path(folder) / "config.json"
    data = json.loads(path.read_text())
    architecture = str(data["architectures"][0])
    if wraps := architecture.startswith(WRAPPED):
        autos = ("AutoConfig", "AutoModelForImageTextToText")
        kinds = (type(config).__name__, architecture)
        model_type = config.text_config.kv_latent["original_model_type"]
    else:
        model_type = str(config.model_type).removeprefix(LATENT_PREFIX)
        autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
        kinds = tuple(kind.__name__ for kind in latent_classes(model_type))
    data["auto_map"] = {auto: f"{MODULE_NAME}.{kind}" for auto, kind in zip(autos, kinds, strict=True)}
    if data.get("use_cache") is False:  # trainers turn the cache off and leave it so
        data["use_cache"] = True
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
    code = remote_code(model_type, architecture.removeprefix(WRAPPED) if wraps else "")
    (Path(folder) / f"{MODULE_NAME}.py").write_text(code)
    # What it said before, when it was saved here: these may be other weights.
    (Path(folder) / SELF_CHECK).unlink(missing_ok=True)
