"""Numbered text, in which every token tells its place, as arrays and as blocks of a calibration."""

import numpy as np
import torch
from datasets import Dataset


def numbered(count: int = 32, size: int = 256) -> np.ndarray:
    """Blocks in which every token is its own place in the text, so that a repetition is seen, and whence it comes."""
    return 10 + np.arange(count * size).reshape(count, size)


def rows_of(ids) -> Dataset:
    ids = torch.as_tensor(ids)
    positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    positions[:, 100:] -= 100
    columns = {"input_ids": ids, "position_ids": positions, "labels": ids.roll(-1, 1)}
    return Dataset.from_dict({name: column.numpy() for name, column in columns.items()}).with_format("torch")
