"""What a checkpoint was made from, as the hub's model cards say it: base model, licence, languages.

A base model is a name on the hub; where only a path is known, nothing is said rather than a path of this machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from kvlatent.checkpoints.gguf_files import Gguf, open_gguf

__all__ = ["lineage"]

_CARRIED = ("license", "license_name", "license_link", "language")
_CACHED = re.compile(r"models--(.+)")  # folder of a model in the cache of the hub
_HUB_LINK = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)/?")
_STEP = re.compile(
    r"checkpoint-\d+"
)  # folder of a training run: "output/checkpoint-500" is no name on the hub


def lineage(model: str | Path) -> dict[str, Any]:
    """Metadata of a card for what is made from `model`; what is not known is left out. JSON-able.

    Args:
        model: directory, hub id or GGUF file. Of what is local the hub's name is known where it lies in the cache of the
            hub, or its config says it; else the base model that its own card names is taken, or its GGUF file.
    """
    gguf = open_gguf(model)
    card = ({} if gguf is None else _said_by(gguf)) | _metadata(model)
    carried = {name: card[name] for name in _CARRIED if _is_text(card.get(name))}
    base = next(_names(model), None) or _hub_names(card.get("base_model"))
    return {"base_model": base, **carried} if base else carried


def _said_by(gguf: Gguf) -> dict[str, Any]:
    """What a GGUF file says of its model, in the words of a card."""
    said = {name: gguf.settings.get(f"general.{name.replace('_', '.')}") for name in _CARRIED}
    said["language"] = gguf.settings.get("general.languages")
    links = (gguf.settings.get(f"general.{of}.repo_url") for of in ("source", "base_model.0"))
    named = (_HUB_LINK.fullmatch(link) for link in links if isinstance(link, str))
    return said | {"base_model": next((match[1] for match in named if match), None)}


def _metadata(model: str | Path) -> dict[str, Any]:
    """What stands at the top of a model's card; nothing where there is none, or it cannot be read."""
    try:
        local = Path(model, constants.REPOCARD_NAME)
        metadata = metadata_load(
            local if Path(model).exists() else hf_hub_download(str(model), constants.REPOCARD_NAME)
        )
    except (OSError, ValueError, YAMLError):
        return {}
    return metadata or {}


def _names(model: str | Path) -> Iterator[str]:
    """Names on the hub of a model, the surest first."""
    if not Path(model).exists():
        yield str(model)
        return
    for part in reversed(Path(model).resolve().parts):
        if cached := _CACHED.fullmatch(part):
            yield cached[1].replace("--", "/")
    try:
        said = json.loads(Path(model, "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        return
    if isinstance(said, str) and said.count("/") == 1 and _hub_names(said):
        yield said


def _hub_names(said: Any) -> str | list[str] | None:
    """One name or several, as a card gives them, where all of them can be names on the hub."""
    names = said if isinstance(said, list) else [said]
    return said if names and all(_is_hub_name(name) for name in names) else None


def _is_hub_name(name: Any) -> bool:
    if not isinstance(name, str) or not name or Path(name).exists() or _STEP.fullmatch(Path(name).name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _is_text(value: Any) -> bool:
    return bool(value) and all(
        isinstance(one, str) for one in (value if isinstance(value, list) else [value])
    )
