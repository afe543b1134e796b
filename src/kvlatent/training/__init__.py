"""Both training stages on `transformers.Trainer`: what is trained, the loop, checkpoints, resume after a kill."""

from .directory import train
from .stages import train_stage
from .trainable import merged_copy, prepare_for_training

__all__ = ["merged_copy", "prepare_for_training", "train", "train_stage"]
