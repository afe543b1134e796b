"""A teacher store in a run of `compress`: whether it is one, and of this model, this text and this recipe.

`train` has no original to compare the store with, `compress` has: the student will be made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kvlatent.checkpoints.load import load_config
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.model.logit_loss import needs_teacher
from kvlatent.training.teacher_store import TeacherStore, is_store
from kvlatent.workflows.run_plan import Plan

__all__ = ["check_store", "open_store"]


def open_store(teacher: str | Path, plan: Plan) -> TeacherStore:
    """The store at that place.

    Raises:
        ValueError: there is none, it is damaged, or nothing would be trained from it.
    """
    if not is_store(teacher):
        raise ValueError(
            f"--teacher is what kvlatent teach wrote: got {teacher}, which is no store; leave it out to train from MODEL itself"
        )
    if plan.minutes is not None:
        raise ValueError(
            f"--minutes keeps the original in memory to decide by: got --minutes {plan.minutes:g} with --teacher; leave one of "
            "them out"
        )
    if 2 not in plan.stages or not needs_teacher(plan.recipe.stage2):
        stages = ", ".join(map(str, plan.stages)) or "none"
        raise ValueError(
            f"--teacher is for stage II on a divergence: got stages {stages} with stage2.objective="
            f"{plan.recipe.stage2.objective}; leave it out, or train stage II on another objective"
        )
    return TeacherStore(teacher)


def check_store(
    store: TeacherStore,
    model: str | Path,
    plan: Plan,
    sha256: Mapping[str, str | None],
    *,
    has_other_text: bool,
) -> None:
    """Raise `ValueError` unless stage II of this run can be trained from the store.

    Args:
        model: the original.
        sha256: what identifies the sources of the run.
        has_other_text: nothing of the training text is held out, since another one is measured on.
    """
    known = store.record.sha256["model"]
    if sha256["model"] != known:
        raise ValueError(
            f"the teacher store {store.path} is of another original: got {str(sha256['model'])[:12]}, it has "
            f"{str(known)[:12]} (SHA-256); give the model that it was made from, or make one of this model with kvlatent teach"
        )
    config = load_config(str(model))
    recipe = plan.recipe
    if has_other_text:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"held_out": 0.0})})
    store.check(config, load_tokenizer(model, config), recipe, sha256)
