"""`train --dry-run`: what a stage will do, and what it will take on so many cards, before anything is read but configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvlatent.checkpoints.load import load_config
from kvlatent.training.training_costs import predict_stage
from kvlatent.workflows.settings import recipe_overrides
from kvlatent.workflows.train_checkpoint import plan_training

__all__ = ["foresee_training"]


def foresee_training(
    model: str | Path,
    out: str | Path,
    *,
    stage: int,
    cards: int = 1,
    tokens: int | None = None,
    recipe: str | Path | None = None,
    device: str = "auto",
    stream: bool = False,
    **given: Any,
) -> dict[str, Any]:
    """The plan of a stage, and its predicted costs on cards of 80 GB. JSON-able.

    Args:
        cards: how many; given: of the command, of which those that stand for recipe keys count.
        model, out, stage, tokens, recipe, device, stream: as for `train`.

    Raises:
        ValueError: as `train`, or the cards do not divide the batch, or the stage is to be streamed, which needs no card.
    """
    if stream:
        raise ValueError(
            "--dry-run predicts a stage that holds the whole model: got --stream, whose run says what it will take before it "
            "begins; leave one of them out"
        )
    settings = recipe_overrides(given)
    if tokens is not None and stage in (1, 2):
        settings.append(f"stage{stage}.tokens={tokens}")
    plan = plan_training(model, out, stage=stage, recipe=recipe, overrides=settings, device=device)
    batch = (plan.recipe.stage1 if stage == 1 else plan.recipe.stage2).batch_size
    if cards < 1 or batch % cards:
        raise ValueError(
            f"the number of cards must divide the batch: got --cards {cards} and stage{stage}.batch_size={batch}; try "
            f"--cards {max(n for n in range(1, min(max(cards, 1), batch) + 1) if batch % n == 0)}"
        )
    cost = predict_stage(load_config(str(model)), plan.recipe, stage, cards=cards)
    return {"plan": plan.summary(), "costs": cost.summary()}
