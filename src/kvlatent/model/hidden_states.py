"""Hidden states between layers, on disk: [blocks, T, D] read and written a block at a time.

Memory then does not grow with the amount of text. Plain file reads, no mapping: a mapped page counts as the process's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvlatent.model.families import family_of
from kvlatent.model.layer_parts import parts_of
from kvlatent.model.rotary import LatentRotary

__all__ = [
    "HiddenStateFile",
    "HiddenStateTensor",
    "HiddenStates",
    "blocks_at_once",
    "embed",
    "hold_hidden_states",
    "isolate_layer",
    "with_layers",
]


_TOKENS_ON_CPU, _TOKENS_ON_GPU = 2048, 16384  # read together: more is not faster and takes more memory
_SHARE = 0.4  # of a GPU's free memory that hidden states may take


def blocks_at_once(decoder: Any, length: int) -> int:
    """How many blocks of `length` tokens a latent decoder or full-width twin reads together, each as if it were alone."""
    if any(isinstance(module, LatentRotary) and module.switches for module in decoder.modules()):
        return 1
    return max(1, (_TOKENS_ON_CPU if decoder.device.type == "cpu" else _TOKENS_ON_GPU) // length)


def hold_hidden_states(
    path: Path, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, blocks: int, streams: int
) -> HiddenStates:
    """Room for `blocks` blocks: on the GPU where all of so many streams fit beside the model, else in a file at `path`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if streams * blocks * shape[0] * shape[1] * dtype.itemsize < _SHARE * free:
            return HiddenStateTensor(dtype, device)
    return HiddenStateFile(path, shape, dtype, device)


class HiddenStateTensor:
    """As `HiddenStateFile`, in the memory of the device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._blocks: list[Tensor] = []

    def write(self, blocks: Iterable[Tensor]) -> None:
        """Replace what is held by these blocks, each [b, T, D] or [T, D]; the old ones can be read until the end."""
        sibling = HiddenStateTensor(self.dtype, self.device)
        for block in blocks:
            sibling.append(block)
        self._blocks = sibling._blocks

    def append(self, block: Tensor) -> None:
        """Add blocks [b, T, D], or one, at the end."""
        held = block.detach().to(self.device, self.dtype, copy=True)
        self._blocks += held.unbind() if held.dim() == 3 else [held]

    def clear(self) -> None:
        """Hold nothing any more."""
        self._blocks = []

    def read(self, indices: Sequence[int]) -> Tensor:
        """Blocks [len(indices), T, D]."""
        return torch.stack([self._blocks[index] for index in indices])


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
        """Replace the file by these blocks, each [b, T, D] or [T, D]; the old one can be read until the end."""
        sibling = HiddenStateFile(self.path.with_suffix(".new"), self.shape, self.dtype, self.device)
        sibling.path.unlink(missing_ok=True)
        for block in blocks:
            sibling.append(block)
        sibling.path.replace(self.path)

    def append(self, block: Tensor) -> None:
        """Add blocks [b, T, D], or one, at the end."""
        raw = block.detach().to("cpu", self.dtype).contiguous().flatten().view(torch.uint8)
        with self.path.open("ab") as file:
            file.write(raw.numpy())

    def clear(self) -> None:
        """Hold nothing any more."""
        self.path.unlink(missing_ok=True)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Blocks [len(indices), T, D]."""
        found = torch.empty(len(indices), *self.shape, dtype=self.dtype)
        room = found.flatten(1).view(torch.uint8).numpy()
        with self.path.open("rb", buffering=0) as file:
            for row, index in enumerate(indices):
                file.seek(index * self._bytes)
                if file.readinto(room[row]) != self._bytes:
                    raise ValueError(f"{self.path} ends before block {index}; the disk may be full")
        return found.to(self.device)


HiddenStates = HiddenStateFile | HiddenStateTensor


def isolate_layer(decoder: Any, index: int, *, attention_only: bool = False) -> Any:
    """`decoder` with layer `index` alone and no final norm, sharing its modules; call it with `inputs_embeds`.

    So upstream makes the masks and the rotary embedding, for every family. With `attention_only` what comes out means
    nothing: the feed-forward part is left out for those who look at the attention with hooks.
    """
    layer = decoder.layers[index]
    if attention_only:
        ffn = parts_of(decoder, index).ffn
        layer = copy.copy(layer)
        layer._modules = {name: nn.Identity() if m is ffn else m for name, m in layer._modules.items()}
    shell = with_layers(decoder, [layer], index)
    setattr(shell, family_of(decoder.config).final_norm, nn.Identity())
    return shell


def embed(decoder: Any, input_ids: Tensor) -> Tensor:
    """What enters the first layer, [B, T, D], as upstream makes it of tokens [B, T]."""
    family = family_of(decoder.config)
    shell = with_layers(decoder, [], 0)
    setattr(shell, family.final_norm, nn.Identity())
    if family.embedding_multiplier:
        multiplier = family.number(decoder.config, "embedding_multiplier")
        setattr(shell, family.embedding_multiplier, multiplier)
    return shell(input_ids=input_ids, use_cache=False).last_hidden_state


def with_layers(decoder: Any, layers: Sequence[nn.Module], first: int) -> Any:
    """`decoder` with these layers in place of its own, sharing the rest; call it with `inputs_embeds`, taken as they are.

    Args:
        layers: they stand where the decoder's own stand from number `first` on.
    """
    family = family_of(decoder.config)
    shell = copy.copy(decoder)
    shell._modules = dict(decoder._modules)
    shell.layers = nn.ModuleList(layers)
    if family.embedding_multiplier:
        setattr(shell, family.embedding_multiplier, 1.0)  # states between layers carry it already
    shell.config = copy.copy(decoder.config)
    shell.config.num_hidden_layers = len(layers)
    if getattr(decoder.config, "layer_types", None) is not None:
        _set_layer_types(shell.config, decoder.config.layer_types[first : first + len(layers)])
    return shell


def _set_layer_types(config: Any, types: list[str]) -> None:
    """Give a config these layer types, where its class computes them as well."""
    kind = type(config)
    if isinstance(getattr(kind, "layer_types", None), property):
        config.__class__ = type(kind.__name__, (kind,), {"layer_types": types, "__module__": kind.__module__})
    else:
        config.layer_types = types
