"""What a stage's work directory belongs to, so that two runs are never mixed in it.

Why: a resume takes the trained tensors from the directory and everything else from the model at hand; a
changed learning rate, text or frozen weight would silently give a result that belongs to neither run.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvlatent.jobs.atomic import write_atomically
from kvlatent.jobs.fingerprints import differences
from kvlatent.jobs.recipe import Recipe, Stage

__all__ = ["claim", "stage_identity"]


def stage_identity(
    model: nn.Module, stage: int, settings: Stage, recipe: Recipe, blocks: Any
) -> dict[str, Any]:
    """What decides the stage's result, apart from the trained tensors' start; cheap samples instead of whole
    hashes."""
    frozen, trained = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained.update(f"{name} {tuple(parameter.shape)};".encode())
        else:
            values = parameter.detach().flatten()
            sample = values[:: max(1, values.numel() // 64)][:64].float().cpu()
            frozen.update(f"{name} {tuple(parameter.shape)} {sample.tolist()};".encode())
    text = hashlib.sha256()
    for index in range(0, len(blocks), max(1, len(blocks) // 64)):
        text.update(torch.as_tensor(blocks[index]["input_ids"]).numpy().tobytes())
    return {
        "stage": stage,
        "seed": recipe.seed,
        "dtype": recipe.dtype,
        "settings": settings.model_dump(mode="json", exclude={"save_steps", "keep", "log_steps"}),
        "lora": recipe.lora.model_dump(mode="json"),
        "trained": trained.hexdigest(),
        "frozen": frozen.hexdigest(),
        "blocks": [len(blocks), text.hexdigest()],
    }


def claim(work_dir: Path, run: dict[str, Any]) -> None:
    """Note in `stage.json` what a work directory is for.

    Raises:
        ValueError: it is for another run; the sentence names what differs.
    """
    note = work_dir / "stage.json"
    run = json.loads(json.dumps(run))
    if note.is_file():
        changed = differences(json.loads(note.read_text(encoding="utf-8")), run)
        if changed:
            raise ValueError(
                f"{work_dir} holds a stage with another {', '.join(changed)}; train with the same arguments to "
                "continue, or delete that directory"
            )
        return
    write_atomically(note, lambda file: file.write_text(json.dumps(run, indent=2), encoding="utf-8"))
