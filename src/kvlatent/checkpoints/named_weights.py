"""The tensors of a checkpoint under the names that its model has for them, read one at a time.

Some architectures are stored otherwise than they are held: experts one by one and not stacked, a head or a block under an
older name. transformers knows how to turn one into the other; its rules are applied here to one tensor at a time, so that a
model that does not fit in memory is read as one that does.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from kvlatent.checkpoints.sharded import ShardedWeights
from kvlatent.jobs.fingerprints import sampled_entries

__all__ = ["NamedWeights"]

_STALE = "rotary_emb.inv_freq"  # in checkpoints of earlier releases, and read by none since


class NamedWeights:
    """The tensors of a model, none of them in memory.

    Args:
        weights: of the checkpoint.
        model: without weights.
    """

    def __init__(self, weights: ShardedWeights, model: Any) -> None:
        self.weights, self._model = weights, model
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        # Of every tensor of the model: the rule that makes it, and what it is made of, in the order of the numbers in names.
        self._sources: dict[str, list[tuple[str | None, str]]] = {}
        for source in sorted(weights.names, key=dot_natural_key):
            name, pattern = self._named(source)
            self._sources.setdefault(name, []).append((pattern, source))

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def _named(self, source: str) -> tuple[str, str | None]:
        """What the model calls a tensor of the checkpoint, and the pattern of the rule that it becomes a part by."""
        prefix, known = self._model.base_model_prefix, self._shapes
        found = rename_source_key(source, self._renamings, self._converters, prefix, known)
        if found[0] not in known and source in known:
            return source, None
        return found

    def check(self, head: str | None) -> list[str]:
        """The names of the tensors that the model is made of, sorted.

        Args:
            head: the name of a head that is the embedding, which may be stored or not; None where it is not.

        Raises:
            ValueError: names or shapes of the checkpoint's tensors are not those of the model.
        """
        ignored = [*(self._model._keys_to_ignore_on_load_unexpected or ()), re.escape(_STALE) + "$"]
        wanted = set(self._shapes) - {head}
        found = {name for name in self._sources if not any(re.search(one, name) for one in ignored)}
        found.discard(head or "")
        other = [name for name in sorted(wanted & found) if self.shape(name) != self._shapes[name]]
        for kind, names in (
            ("missing", sorted(wanted - found)),
            ("unexpected", sorted(found - wanted)),
            ("mismatched", other),
        ):
            if names:
                raise ValueError(
                    f"the weights of {self.weights.path} do not fit its config: {len(names)} {kind} tensors, e.g. {names[0]}; "
                    "download or convert the checkpoint again"
                )
        return sorted(wanted)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that a tensor will have; None where its parts do not fit together."""
        if self._is_stored(name):
            return self.weights.shape(self._source(name))
        try:
            rows, width = self._rows_of(name)
        except (ValueError, RuntimeError, KeyError):
            return None
        return (*rows.shape[:-1], width)

    def names_from(self, prefix: str) -> list[str]:
        """Tensors of the model that the checkpoint has and whose names start so."""
        return [name for name in self._sources if name.startswith(prefix)]

    def stored_name(self, name: str) -> str | None:
        """What the checkpoint calls a tensor of the model; None where it is made of others."""
        return self._source(name) if self._is_stored(name) else None

    def _is_stored(self, name: str) -> bool:
        """Whether the checkpoint has this tensor as it is, under whatever name."""
        return self._sources[name][0][0] is None

    def _source(self, name: str) -> str:
        return self._sources[name][0][1]

    def _made(self, name: str, parts: dict[str, Any]) -> Tensor:
        """A tensor that a rule makes of these parts, by the checkpoint's names; each a tensor or what gives it."""
        pattern = self._sources[name][0][0]
        rule = copy.deepcopy(next(one for one in self._converters if pattern in one.source_patterns))
        for part, source in self._sources[name]:
            assert part is not None
            rule.add_tensor(name, source, part, parts[source])
        return rule.convert(name, model=self._model, config=self._model.config)[name]

    def _rows_of(self, name: str) -> tuple[Tensor, int]:
        """Of a tensor that a rule makes: which row of which part every row of it is [..., 1], counted through, and its width.

        Found by making it of the rows' numbers; so rules may stack, join and split rows, and leave a row as it is.
        """
        parts, start, widths = {}, 0, set()
        for _, source in self._sources[name]:
            *rows, width = self.weights.shape(source)
            count = torch.Size(rows).numel()
            parts[source] = torch.arange(start, start + count).view(*rows, 1)
            start += count
            widths.add(width)
        found = self._made(name, parts)
        if len(widths) > 1 or found.shape[-1] != 1:
            raise ValueError(f"{name} is made of rows of several widths")
        return found, widths.pop()

    def num_bytes(self, names: Iterable[str] | None = None, dtype: torch.dtype | None = None) -> int:
        """Of these tensors (None: all) in that dtype (None: as stored)."""
        if names is None:
            return self.weights.num_bytes(dtype=dtype)
        return self.weights.num_bytes([source for name in names for _, source in self._sources[name]], dtype)

    def read(self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Tensor:
        """One tensor in that dtype (None: as stored).

        Raises:
            ValueError: a file ends before the tensor does, or a number is not finite.
        """
        if self._is_stored(name):
            return self.weights.read(self._source(name), dtype, device)
        sources = [source for _, source in self._sources[name]]
        return self._made(
            name, {source: partial(self.weights.read, source, dtype, device) for source in sources}
        )

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Rows [R] of a matrix that the checkpoint has as it is: [R, ...], without reading the others."""
        return self.weights.read_rows(self._source(name), rows)

    def sample(self, name: str, dtype: torch.dtype) -> Tensor:
        """The entries of a tensor that its fingerprint goes by, in that dtype."""
        if self._is_stored(name):
            return self.weights.sample(self._source(name), dtype)
        numbers, width = self._rows_of(name)
        flat, starts = numbers.flatten(), [0]
        for _, source in self._sources[name]:
            starts.append(starts[-1] + torch.Size(self.weights.shape(source)[:-1]).numel())
        found = []
        for entry in sampled_entries(flat.numel() * width):
            row = int(flat[entry // width])
            part = next(index for index, end in enumerate(starts[1:]) if row < end)
            found.append(
                self.weights.entry(self._sources[name][part][1], (row - starts[part]) * width + entry % width)
            )
        return torch.cat(found).to(dtype)
