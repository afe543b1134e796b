"""When a conversion streams its checkpoint layer by layer, and what it then does otherwise.

Nothing that needs the whole model at once: no widths by measurement, no pass over all layers, no figures of the result.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvlatent.checkpoints.gguf_files import open_gguf
from kvlatent.checkpoints.load import load_config
from kvlatent.checkpoints.sharded import ShardedWeights, open_sharded
from kvlatent.checkpoints.wrapper_files import wrapper_of
from kvlatent.jobs.devices import choose_device, free_memory
from kvlatent.jobs.work_directory import partial_of
from kvlatent.model.families import family_of, family_of_original
from kvlatent.model.time_estimate import StreamCosts
from kvlatent.workflows.run_plan import Plan, plan_run

__all__ = [
    "check_space",
    "is_streamable",
    "memory_to_convert",
    "open_source",
    "plan_streamed",
    "why_streamed",
]

_NOT_MEASURED = (
    "streamed, layer by layer, as {reason}: nothing is measured, and the pass over all layers is left out; run `kvlatent "
    "eval OUT --against MODEL` where both fit"
)
_EVEN = (
    "the share of the cache is split evenly between keys and values, which only a whole model can tell apart"
)
_ROOM = 1.2  # of the weights, for what is computed from them


def open_source(model: str | Path) -> tuple[ShardedWeights, Any]:
    """The tensors of a checkpoint to stream, and its config.

    Raises:
        ValueError: it is no local directory of safetensors, or see `open_sharded`.
    """
    path = Path(model)
    if not _is_local(model):
        raise ValueError(
            f"--stream reads the safetensors of a local directory, layer by layer: got {model}; download the checkpoint, or "
            "leave --stream out"
        )
    config = load_config(str(model))
    family_of(config)
    weights = _open_language_model(model, config)
    if len(weights.dtypes) > 1:
        found = ", ".join(sorted(str(dtype)[6:] for dtype in weights.dtypes))
        warnings.warn(
            f"the tensors of {path} are of several dtypes ({found}); all are written in {str(config.dtype)[6:]}, as transformers "
            "loads them",
            stacklevel=2,
        )
    return weights, config


def _open_language_model(model: str | Path, config: Any) -> ShardedWeights:
    """Tensors of the language model, also where it lies inside a multimodal checkpoint."""
    wrapper = wrapper_of(model)
    return open_sharded(Path(model), config) if wrapper is None else wrapper.open_language_model()


def is_streamable(model: str | Path) -> bool:
    """Whether it is a local directory of safetensors, of a family whose layers can be read one at a time."""
    try:
        family_of(load_config(str(model)))
    except (ValueError, OSError):  # loading it says why
        return False
    return _is_local(model)


def _is_local(model: str | Path) -> bool:
    return Path(model).is_dir() and open_gguf(model) is None


def why_streamed(model: str | Path, *, asked: bool, calibrates: bool, device: str | None) -> str | None:
    """Why a conversion streams, in words; None where it does not.

    Args:
        asked: users want it to.
        calibrates: there is text to look at; device: "auto", "cpu" or "cuda".
    """
    if asked:
        return "--stream says so"
    if not is_streamable(model):
        return None
    try:
        config = load_config(str(model))
        family_of_original(config)
        weights = _open_language_model(model, config)
    except (ValueError, OSError):  # loading it says why
        return None
    for place in sorted({"cpu", choose_device(device or "auto")}):
        needed = memory_to_convert(weights, config.dtype, calibrates=calibrates, device=place)
        if needed > (free := free_memory(place)):
            where = "" if place == "cpu" else " of the GPU"
            return f"it takes about {needed / 1e9:.1f} GB at once and {free / 1e9:.1f} GB{where} are free"
    return None


def memory_to_convert(
    weights: ShardedWeights, stored: torch.dtype, *, calibrates: bool, device: str
) -> float:
    """Bytes that a conversion in memory takes at its peak, roughly.

    Without text, the model as it is stored. With text, on a CPU, in float32 for the calibration, as it is written, and in
    float32 again to be measured; where those are one dtype they are one copy. On a GPU it lies there in the stored dtype.
    """
    working = torch.float32 if calibrates and device == "cpu" else stored
    copies = weights.num_bytes(dtype=working)
    if working != stored:
        copies = 2 * copies + weights.num_bytes(dtype=stored)
    return _ROOM * copies


def plan_streamed(model: str | Path, *, has_text: bool, reason: str, **options: Any) -> Plan:
    """As `plan_run`, of a conversion that streams for that reason: a share is split evenly, and no pass is over all layers.

    Raises:
        ValueError: an option that needs the whole model in memory; or as `plan_run`.
    """
    _refuse_whole(options, reason)
    overrides = [*(options.get("overrides") or ()), "conversion.global_steps=0"]
    options |= {"overrides": overrides, "global_steps": None, "stages": "none"}
    even = plan_run(model, has_text=False, **options).widths
    assert even is not None, "without text nothing is left open"
    given = options.get("d_qk") is not None or options.get("d_vo") is not None
    widths: dict[str, Any] = {"kv": None, "d_qk": even.d_qk, "d_vo": even.d_vo}
    plan = plan_run(model, has_text=has_text, **options | widths)
    notes = [*plan.notes, _NOT_MEASURED.format(reason=reason)]
    if plan.calibrates and not given:
        notes.append(_EVEN)
    kv = options.get("kv")
    return replace(plan, notes=tuple(notes), kv=plan.kv if kv is None else kv)


def _refuse_whole(options: Mapping[str, Any], reason: str) -> None:
    """Raise `ValueError` for an option that needs the whole model in memory."""
    needs = {
        "per_layer": "--per-layer measures what the whole model loses by each layer; give --d-qk and --d-vo a list",
        "minutes": "--minutes times the whole model; give --align",
        "explain": "--explain converts the whole model once for each strategy; leave it out",
        "global_steps": "--global-steps are steps on all layers at once; leave it out",
    }
    for name, sentence in needs.items():
        if options.get(name):
            raise ValueError(f"this conversion is streamed, layer by layer, as {reason}, and {sentence}")


def check_space(place: Path, costs: StreamCosts) -> None:
    """Raise `ValueError` where the disk has no room for the result and for the states between layers."""
    there = sum(file.stat().st_size for file in partial_of(place).rglob("*") if file.is_file())
    parent = next(folder for folder in place.parents if folder.exists())
    free = shutil.disk_usage(parent).free + there
    if costs.disk_bytes > free:
        raise ValueError(
            f"the result and the states between its layers take {costs.disk_bytes / 1e9:.3f} GB at the most: {parent} has "
            f"{free / 1e9:.3f} GB free; make room, or give --out another disk"
        )
