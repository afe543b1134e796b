"""Stage I of a checkpoint that need not fit in memory: when it streams, what it will take, and the run.

The unfinished run lives in `OUT.partial`, as that of any training; a second call with the same arguments goes on with the layer
that the first was at. `OUT` appears in one rename at the end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvlatent.checkpoints.load import load_config
from kvlatent.checkpoints.resident_layers import LatentLayers, ResidentLayers
from kvlatent.checkpoints.shard_output import finish_checkpoint
from kvlatent.checkpoints.sharded import open_sharded
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.checkpoints.wrapper_files import check_no_wrapper, wrapper_of
from kvlatent.jobs.atomic import put_in_place, write_text
from kvlatent.jobs.devices import free_memory
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.work_directory import WorkDirectory
from kvlatent.model.families import family_of
from kvlatent.model.time_estimate import StreamCosts
from kvlatent.text.parts import TextReader
from kvlatent.training.resume import JOURNAL
from kvlatent.training.stages import summary_of
from kvlatent.training.streamed_costs import memory_to_train, streamed_stage_costs
from kvlatent.training.streamed_stage import StreamedStage
from kvlatent.workflows.run_plan import Plan
from kvlatent.workflows.streamed_plan import check_space, is_streamable, open_source

__all__ = ["StreamedRun", "why_training_streams"]


def why_training_streams(
    model: str | Path, teacher: str | Path | None, plan: Plan, *, asked: bool, processes: int = 1
) -> str | None:
    """Why a stage streams its checkpoints, in words; None where it does not.

    Args:
        model: the latent checkpoint; teacher: its original.
        asked: users want it to; processes: that the run is spread over.

    Raises:
        ValueError: it is asked of stage II, which needs the whole model, or of several processes.
    """
    reason = _reason(model, teacher, plan, asked)
    if reason is not None and processes > 1:
        raise ValueError(
            f"a streamed stage 1 runs in one process: got {processes}, and it streams, as {reason}; start it without torchrun"
        )
    return reason


def _reason(model: str | Path, teacher: str | Path | None, plan: Plan, asked: bool) -> str | None:
    if plan.stages != (1,):
        if asked:
            raise ValueError(
                "--stream trains stage 1, whose layers are problems of their own: got --stage 2, which runs the whole model; "
                "leave --stream out"
            )
        return None
    if asked:
        return "--stream says so"
    if teacher is None or not all(
        is_streamable(path) and wrapper_of(path) is None for path in (model, teacher)
    ):
        return None
    if family_of(load_config(str(model))).besides:
        return None
    try:
        weights = [open_sharded(Path(path), load_config(str(path))) for path in (model, teacher)]
    except (ValueError, OSError):  # loading them says why
        return None
    needed = memory_to_train(*weights, plan.recipe, plan.stored_dtype)
    if needed > (free := free_memory(plan.device)):
        where = "" if plan.device == "cpu" else " of the GPU"
        return f"it takes about {needed / 1e9:.1f} GB at once and {free / 1e9:.1f} GB{where} are free"
    return None


class StreamedRun:
    """A stage I that streams its checkpoints.

    Args:
        model, teacher: directories; plan: of the stage; place: of the output.

    Raises:
        ValueError: a checkpoint cannot be streamed, or memory or disk are too small.
    """

    def __init__(self, model: str | Path, teacher: str | Path, plan: Plan, place: Path) -> None:
        self.model, self.recipe, self.stored = Path(model), plan.recipe, plan.stored_dtype
        # As in memory: the student as it is stored, for `prepare_for_training` to cast, the original as it is compared.
        for path in (model, teacher):
            check_no_wrapper(path, "--stream trains", "leave --stream out")
        weights, config = open_source(model)
        if besides := family_of(config).besides:
            raise ValueError(
                f"--stream trains decoders whose layers are those of a Llama: got {config.model_type}, which has {besides}; "
                "leave --stream out, on a machine that holds the whole model"
            )
        self.student = LatentLayers(weights, config, config.dtype, plan.device)
        weights, config = open_source(teacher)
        dtype = torch.float32 if plan.recipe.dtype == "float32" else config.dtype
        self.original = ResidentLayers(weights, config, dtype, plan.device)
        self.place = place
        size = min(self.recipe.data.block_size, self.student.config.max_position_embeddings)
        self.costs: StreamCosts = streamed_stage_costs(
            self.original, self.student, plan.recipe, self.stored, size=size
        )
        free = free_memory(plan.device)
        if self.costs.memory_bytes > free:
            where, step = (
                ("of the GPU", "--device cpu") if plan.device == "cuda" else ("of memory", "free some")
            )
            raise ValueError(
                f"a streamed stage 1 holds one layer while it learns, about {self.costs.memory_bytes / 1e6:,.1f} MB: "
                f"{free / 1e6:,.1f} MB {where} are free; {step}, or take a smaller stage1.batch_size"
            )
        check_space(place, self.costs)

    def train(self, work: WorkDirectory, data: str | Path, progress: Progress) -> tuple[Any, dict[str, Any]]:
        """Train what is not finished yet; returns the tokenizer and the stage's summary."""
        tokenizer = load_tokenizer(self.model, self.student.config)
        blocks = (
            TextReader(self.recipe, tokenizer, self.student.config, work.path / "data").prepare(data).train
        )
        stage = StreamedStage(
            self.original, self.student, blocks, self.recipe, self.stored, work, work.path / "out", progress
        )
        rows = stage.run()
        journal = work.path / "stage1" / JOURNAL
        journal.parent.mkdir(exist_ok=True)
        write_text(journal, "".join(json.dumps(row) + "\n" for row in rows))
        return tokenizer, summary_of(rows)

    def finish(self, work: WorkDirectory, tokenizer: Any, files: Mapping[str, str]) -> None:
        """Put the output in its place."""
        self.student.model.config.dtype = self.stored
        finish_checkpoint(work.path / "out", self.student.model, self.model, tokenizer, files)
        put_in_place(work.path / "out", self.place.resolve())
