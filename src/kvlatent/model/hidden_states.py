"""Hidden states between layers, on disk: [blocks, T, D] read and written a block at a time.

Memory then does not grow with the amount of text. Plain file reads, no mapping: a mapped page counts as the process's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["HiddenStateFile", "isolate_layer"]


class HiddenStateFile:
    """A file of blocks of hidden states, in the dtype and for the device of the model.

    Args:
        path: of the file, made at the first write.
        shape: (T, D) of a block; dtype, device: of the tensors that `read` returns.
    """

    def __init__(self, path: Path, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.path, self.shape, self.dtype, self.device = path, shape, dtype, device
        self._bytes = shape[0] * shape[1] * dtype.itemsize

    def write(self, blocks: Iterable[Tensor]) -> None:
        """Replace the file by these blocks, each [1, T, D] or [T, D]; the old one can be read until the end."""
        sibling = HiddenStateFile(self.path.with_suffix(".new"), self.shape, self.dtype, self.device)
        sibling.path.unlink(missing_ok=True)
        for block in blocks:
            sibling.append(block)
        sibling.path.replace(self.path)

    def append(self, block: Tensor) -> None:
        """Add one block at the end."""
        raw = block.detach().to("cpu", self.dtype).contiguous().flatten().view(torch.uint8)
        with self.path.open("ab") as file:
            file.write(raw.numpy().tobytes())

    def read(self, indices: Sequence[int]) -> Tensor:
        """Blocks [len(indices), T, D]."""
        with self.path.open("rb") as file:
            return torch.stack([self._one(file, index) for index in indices]).to(self.device)

    def _one(self, file: Any, index: int) -> Tensor:
        file.seek(index * self._bytes)
        raw = np.frombuffer(bytearray(file.read(self._bytes)), dtype=np.uint8)
        return torch.from_numpy(raw).view(self.dtype).view(self.shape)


def isolate_layer(decoder: Any, index: int) -> Any:
    """`decoder` with layer `index` alone and no final norm, sharing its modules; call it with `inputs_embeds`.

    So upstream makes the masks and the rotary embedding, for every family.
    """
    shell = copy.copy(decoder)
    shell._modules = dict(decoder._modules)
    shell.layers = nn.ModuleList([decoder.layers[index]])
    shell.norm = nn.Identity()
    shell.config = copy.copy(decoder.config)
    shell.config.num_hidden_layers = 1
    if getattr(decoder.config, "layer_types", None) is not None:
        shell.config.layer_types = [decoder.config.layer_types[index]]
    return shell
