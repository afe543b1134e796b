"""Tensors of a local safetensors checkpoint by name, read one at a time from whichever shard holds them.

Plain reads, no mapping: a mapped page counts as the process's, and a file that shrinks under a mapping kills the process
where a read says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlatent.checkpoints.weight_files import check_weights, index_map, read_header, weight_files
from kvlatent.jobs.fingerprints import sampled_entries
from kvlatent.model.finite import first_not_finite

__all__ = ["ShardedWeights", "open_sharded"]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Place(NamedTuple):
    """Where a tensor is: its file, the offset there, and what it is."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class ShardedWeights:
    """The tensors of a checkpoint, none of them in memory.

    Args:
        path: of the checkpoint.
        places: by the tensors' names.
    """

    def __init__(self, path: Path, places: Mapping[str, _Place]) -> None:
        self.path, self._places = path, dict(places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def written_name(self, name: str) -> str:
        """What a checkpoint that is made of this one calls a tensor of its model."""
        return name

    def renamed(self, names: Mapping[str, str], places: Mapping[str, str]) -> ShardedWeights:
        """Some of the tensors, under other names.

        Args:
            names: new name -> name here.
            places: what new names start with -> what it is called instead in what is made of them.
        """
        return _Renamed(self.path, {new: self._places[old] for new, old in names.items()}, places)

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._places)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of all tensors."""
        return {place.dtype for place in self._places.values()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._places[name].shape

    def num_bytes(self, names: Iterable[str] | None = None, dtype: torch.dtype | None = None) -> int:
        """Of these tensors (None: all) in that dtype (None: as stored)."""
        places = self._places.values() if names is None else [self._places[name] for name in names]
        return sum(place.numel * (dtype or place.dtype).itemsize for place in places)

    def read(self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Tensor:
        """One tensor in that dtype (None: as stored).

        Raises:
            ValueError: the file ends before the tensor does, or a number is not finite.
        """
        place = self._places[name]
        found = torch.empty(place.numel, dtype=place.dtype)
        self._fill(name, found, 0)
        if first_not_finite([(name, found)]) is not None:
            raise ValueError(
                f"weights must be finite: {self.path} has NaN or infinity in {name} ({place.file.name}); download or make it "
                "again"
            )
        return found.view(place.shape).to(device, dtype or place.dtype)

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Rows [R] of a matrix, as stored: [R, ...], without reading the others."""
        place = self._places[name]
        width = place.numel // place.shape[0]
        found = torch.empty(len(rows), width, dtype=place.dtype)
        for target, row in zip(found, rows.tolist(), strict=True):
            self._fill(name, target, row * width)
        return found.view(len(rows), *place.shape[1:])

    def sample(self, name: str, dtype: torch.dtype) -> Tensor:
        """The entries of a tensor that its fingerprint goes by, in that dtype."""
        place = self._places[name]
        chosen = sampled_entries(place.numel)
        found = torch.empty(len(chosen), dtype=place.dtype)
        for target, entry in zip(found.split(1), chosen, strict=True):
            self._fill(name, target, entry)
        return found.to(dtype)

    def entry(self, name: str, number: int) -> Tensor:
        """One number of a tensor, counted row after row: [1], as stored."""
        found = torch.empty(1, dtype=self._places[name].dtype)
        self._fill(name, found, number)
        return found

    def _fill(self, name: str, room: Tensor, start: int) -> None:
        """Fill `room` with the entries of a tensor from `start` on."""
        place = self._places[name]
        view = memoryview(room.view(torch.uint8).numpy())
        offset, read = place.start + start * place.dtype.itemsize, 0
        with place.file.open("rb", buffering=0) as file:
            while read < len(view):
                more = os.preadv(file.fileno(), [view[read:]], offset + read)
                if not more:
                    raise ValueError(
                        f"{place.file} ends {len(view) - read:,} bytes before its tensor {name} does; it was cut short while it "
                        "was read, so download it again"
                    )
                read += more


class _Renamed(ShardedWeights):
    """Tensors that have other names where they are written."""

    def __init__(self, path: Path, places: Mapping[str, _Place], prefixes: Mapping[str, str]) -> None:
        super().__init__(path, places)
        self._prefixes = dict(prefixes)

    def written_name(self, name: str) -> str:
        start = next(prefix for prefix in self._prefixes if name.startswith(f"{prefix}."))
        return self._prefixes[start] + name.removeprefix(start)


def open_sharded(path: Path, config: Any) -> ShardedWeights:
    """The tensors of a checkpoint whose files `check_weights` takes.

    Raises:
        ValueError: files are missing or damaged, a tensor lies in two of them, the index disagrees with them, or a tensor
            is of no floating-point dtype.
    """
    check_weights(path, config)
    places: dict[str, _Place] = {}
    for file in weight_files(path, config):
        tensors, begin = read_header(file)
        for name, info in tensors.items():
            if name in places:
                raise ValueError(
                    f"a tensor lies in one shard: {name} is in {places[name].file.name} and in {file.name} of {path}; download "
                    "the checkpoint again"
                )
            if info.dtype not in _DTYPES:
                raise ValueError(
                    f"weights are floating-point numbers of 16 bits or more: {name} of {path} is {info.dtype}; convert the "
                    "unquantised checkpoint"
                )
            shape = tuple(info.shape)
            places[name] = _Place(file, begin + info.data_offsets[0], _DTYPES[info.dtype], shape)
    _check_index(path, index_map(path, config), places)
    return ShardedWeights(path, places)


def _check_index(path: Path, listed: Mapping[str, str] | None, places: Mapping[str, _Place]) -> None:
    """Raise `ValueError` unless the index, where there is one, lists every tensor in the shard that holds it."""
    if listed is None:
        return
    for name in sorted(listed.keys() | places.keys()):
        says = listed.get(name)
        found = places[name].file.name if name in places else None
        if says != found:
            raise ValueError(
                f"the index of {path} disagrees with its shards: {name} is {'not listed' if says is None else f'listed in {says}'} "
                f"and {'in none of them' if found is None else f'lies in {found}'}; download the checkpoint again"
            )
