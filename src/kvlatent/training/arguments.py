"""A stage of the recipe in the words of `transformers.TrainingArguments`.

Why apart: every setting that upstream would choose otherwise, and the reason, in one place.
"""

from __future__ import annotations

import math
from pathlib import Path

from transformers import TrainingArguments

from kvlatent.jobs.recipe import Recipe, Stage

__all__ = ["training_arguments"]


def training_arguments(
    settings: Stage, recipe: Recipe, stage: int, block_size: int, work_dir: Path, device: str
) -> TrainingArguments:
    """Upstream's arguments for one stage; `settings.tokens` is rounded up to whole optimiser steps."""
    args = TrainingArguments(
        output_dir=str(work_dir),
        seed=recipe.seed + stage,
        bf16=recipe.dtype == "bfloat16",
        use_cpu=device == "cpu",
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        max_grad_norm=settings.max_grad_norm,
        activation_checkpointing=settings.activation_checkpointing,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=settings.keep,
        logging_strategy="steps",
        logging_steps=settings.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not finite ends the run instead
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=0,
        dataloader_pin_memory=device != "cpu",
        ddp_find_unused_parameters=False,  # hook losses are not in the forward's output: True dies
        disable_tqdm=True,
        report_to="none",
        max_steps=1,
    )
    if args.n_gpu > 1:
        args._n_gpu = (
            1  # one process uses one GPU; several go through torchrun (DataParallel breaks the hooks)
        )
    per_step = settings.batch_size * settings.gradient_accumulation * block_size * args.world_size
    args.max_steps = math.ceil(settings.tokens / per_step)
    args.warmup_steps = math.ceil(settings.warmup_ratio * args.max_steps)
    return args
