"""A conversion of a checkpoint that need not fit in memory: each decoder layer is read, converted, written and let go.

While a layer is in memory the original's text runs through it, its statistics are taken, the closed form is computed and
refined, and the converted text goes on to the next; so nothing is read twice, unless the whole model shares one table,
which the statistics of all layers choose. The states between layers lie on disk, and every finished layer is noted, so
work that was killed goes on with the layer that it was at. The numbers are those of a conversion in memory.

Shapes: B blocks, T positions, D model width.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlatent.checkpoints.resident_layers import ResidentLayers
from kvlatent.checkpoints.shard_output import shard_name, write_shard
from kvlatent.conversion.alignment import TunedLayer, copy_for_tuning
from kvlatent.conversion.attention_weights import attention_weights
from kvlatent.conversion.refinement import carry_on, refine_layer
from kvlatent.conversion.streamed_pairs import (
    choose_some_pairs,
    energy_of,
    pairs_from_json,
    resolve_unrotated,
)
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.work_directory import WorkDirectory
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import head_dim_of, key_value_heads_of
from kvlatent.model.hidden_states import HiddenStateFile
from kvlatent.model.layer_parts import parts_of
from kvlatent.model.widths import Widths, width_per_layer
from kvlatent.selection.calibrate import calibrate_layer, sample_rows
from kvlatent.selection.choices import BY_PAIRS, Choices
from kvlatent.selection.latent_config import build_latent_config
from kvlatent.selection.pairs import Pairs
from kvlatent.selection.statistics import LayerStatistics, Statistics
from kvlatent.text.recall_blocks import held_out_blocks

__all__ = ["StreamedText", "Streaming"]


@dataclass(frozen=True)
class StreamedText:
    """What a streamed conversion looks at.

    Args:
        input_ids, position_ids: [B, T], the calibration text.
        rows: query positions sampled a block (see `calibrate`).
        statistics: of that text, where they are known already.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: int = 32
    statistics: Statistics | None = None


@dataclass
class Streaming:
    """One conversion, layer by layer.

    Args:
        layers: the original.
        widths, choices, qk_norm, seed: as for `convert`; the choices without a pass over all layers.
        text: None where the choices look at none.
        stored: dtype that is written.
        dtype: of the products while layers are tuned, "float32" or "bfloat16".
        work: which layers are finished, and the states between layers; folder: gets the shards.
        progress: told after every step of every layer.
    """

    layers: ResidentLayers
    widths: Widths
    choices: Choices
    qk_norm: str
    seed: int
    text: StreamedText | None
    stored: torch.dtype
    dtype: str
    work: WorkDirectory
    folder: Path
    progress: Progress = field(default_factory=Progress)

    def run(self) -> tuple[Any, list[dict[str, Any]]]:
        """Convert what is not finished yet.

        Returns:
            The latent model without weights, and of every layer with attention what its tuning measured (see `refine`).

        Raises:
            ValueError: a file was cut short, or holds what is no number, or the text is too short.
            OSError: the disk is full; finished layers stay finished.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._states.mkdir(exist_ok=True)
        self._write_part("embeddings", 0, [self.layers.embedding])
        # It writes one layer while the next is computed. inference_mode(False) also turns gradients on.
        with ThreadPoolExecutor(1) as writer, torch.inference_mode(False):
            self._writer = writer
            self._pairs = self._start_pairs()
            self._latent = self.layers.latent_skeleton(self._config())
            measured = [self._finish_layer(index) for index in range(self.layers.count)]
            self._wait()
        self._write_part("head", self.layers.count + 1, self.layers.names_behind())
        self._told.to(self._told.total)
        return self.layers.latent_skeleton(self._config()), [measured[index] for index in self._attending]

    def __post_init__(self) -> None:
        head_dim = head_dim_of(self.layers.config)
        self._attending = self.layers.attending
        self._is_narrow = self.widths != (head_dim, head_dim)
        self._by_pairs = self.choices.keys in BY_PAIRS and self.widths.d_qk != head_dim
        statistics = None if self.text is None else self.text.statistics
        self.choices = resolve_unrotated(
            self.layers.config, self.choices, self.qk_norm, statistics, has_text=self.text is not None
        )
        self._tunes = self.text is not None and self.choices.tunes and self._is_narrow
        # In float32 the states that the refinement passes on are those that statistics are taken on.
        self._shares = self._tunes and self.dtype == "float32"
        self._states = self.work.path / "states"
        self._each = 2 * self.choices.align + 1
        self._told = self.progress.step("convert layers", self._each * self.layers.count)
        self._pending: Future[None] | None = None
        if self.text is None:
            return
        self._positions = self.text.position_ids.long().to(self.layers.device)
        if self.text.statistics is None:
            needed = parts_of(self.layers.decoder, self._attending[0]).attention.o_proj.in_features
            shape = self.text.input_ids.shape
            self._rows = sample_rows(*shape, self.text.rows, needed, self.seed)

    def _write_part(self, name: str, number: int, tensors: list[str]) -> None:
        """Write tensors that no conversion changes, unless they are there."""
        if self.work.done(name) is None:
            self._write({each: self.layers.weights.read(each) for each in tensors}, number)
            self.work.finish(name, {})

    def _write(self, tensors: dict[str, Tensor], number: int) -> None:
        """Write a shard, in the dtype that is stored."""
        layers, kind = self.layers, self.stored
        named = {layers.written_name(n): t.to("cpu", layers.dtype_of(n, kind)) for n, t in tensors.items()}
        stored = {n: t.contiguous() for n, t in named.items()}
        write_shard(stored, self.folder / shard_name(number, self.layers.count + 2))

    def _config(self) -> LatentConfig:
        pairs = tuple(self._pairs) if self._by_pairs else None
        return build_latent_config(
            self.layers.config, self.widths, self.choices, qk_norm=self.qk_norm, pairs=pairs
        )

    def _start_pairs(self) -> list[Any]:
        """The pairs of every layer: of one table for the model its own, else a place for those to come."""
        if not self._by_pairs:
            return []
        if self.choices.table == "model":
            return list(self._pairs_of_all())
        heads = key_value_heads_of(self.layers.config) if self.choices.table == "head" else 1
        widths = width_per_layer(self.widths.d_qk, len(self._attending))
        return [(tuple(range(width // 2)),) * heads for width in widths]

    def _pairs_of_all(self) -> Pairs:
        """One set for the model, by a pass over all layers before they are converted."""
        if (known := self.work.done("table")) is not None:
            return pairs_from_json(known["pairs"])
        found: list[Any] = []
        by_weights = self.choices.keys == "weights"
        for index in self._attending if by_weights else range(self._attending[-1] + 1):
            with self.layers.resident(index, attention_only=by_weights):
                if index not in self._attending:
                    self._carry(index, ("first",), "float32")
                else:
                    found.append(
                        energy_of(self.layers, index) if by_weights else self._look_at(index, "first")
                    )
            (self._states / f"first-{index:05}").unlink(missing_ok=True)
        pairs = self._choose(found, self.widths.d_qk)
        self.work.finish("table", {"pairs": pairs})
        return pairs

    def _choose(self, found: list[Any], width: int | tuple[int, ...]) -> Pairs:
        return choose_some_pairs(found, self.text, self.layers.config, width, self.choices)

    def _finish_layer(self, index: int) -> dict[str, Any]:
        """What the tuning of a layer measured, now or when it was finished."""
        name = f"layer-{index:05}"
        known = self.work.done(name) or self._convert_and_write(index, name)
        if known["pairs"] is not None:
            self._pairs[self._place(index)] = pairs_from_json([known["pairs"]])[0]
        return known["measured"]

    def _convert_and_write(self, index: int, step: str) -> dict[str, Any]:
        """Convert a layer and write it, or let it be written while the next is computed; what is to be known of it."""
        self._told.to(self._each * index)
        for file in self._states.glob("*"):
            if not file.name.endswith(f"-{index:05}"):
                file.unlink()
        measured, tensors, pairs = {}, {}, None
        if index in self._attending:
            with self.layers.resident(index, attention_only=self.text is None):
                measured, tensors = self._convert_layer(index)
            if len(self._pairs) == len(self._attending):
                pairs = self._pairs[self._place(index)]
        elif self.text is not None and index < self._attending[-1]:
            with self.layers.resident(index):
                self._pass_by(index)
        known = {"measured": measured, "pairs": pairs}
        write = partial(self._write_layer, index, tensors, step, known)
        self._wait()
        if (
            self.text is not None
        ):  # the next layer would take away the states that a repetition of this one needs
            write()
        else:
            self._pending = self._writer.submit(write)
        return known

    def _wait(self) -> None:
        """Until the layer before is written; raises what went wrong there."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write_layer(self, index: int, tensors: dict[str, Tensor], step: str, about: dict[str, Any]) -> None:
        """Write a layer, with those of its tensors that were not in memory, and note that it is finished."""
        own = self.layers.own(index)
        for name in self.layers.names_of(index):
            if name not in tensors and not name.startswith(own):
                tensors[name] = self.layers.weights.read(name)
        self._write(tensors, index + 1)
        self.work.finish(step, about)

    def _convert_layer(self, index: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the tuning of the layer that is resident measured, and the tensors to write."""
        statistics = self._statistics(index)
        if self._by_pairs and self.choices.table != "model":
            found = statistics if self.choices.keys != "weights" else energy_of(self.layers, index)
            place = self._place(index)
            width = width_per_layer(self.widths.d_qk, len(self._attending))[place]
            self._pairs[place] = self._choose([found], width)[0]
        config, layers = self._config(), self.layers
        attention = attention_weights(
            dict(parts_of(layers.decoder, index).attention.state_dict()),
            layers.family,
            layers.config,
            config,
            index,
            statistics=statistics,
            gains=self.choices.gains,
        )
        if not self._tunes:
            return {"layer": index}, self._tensors(index, attention)
        with layers.converted(self._latent, index, config, attention) as layer:
            measured = self._refine(index, config)
            prefix = layers.family.attention + "."
            state = layer.state_dict().items()
            tuned = {name.removeprefix(prefix): t for name, t in state if name.startswith(prefix)}
            return measured, self._tensors(index, tuned)

    def _tensors(self, index: int, attention: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a layer that are in memory, by their whole names."""
        prefix, own = self.layers.prefix(index), self.layers.own(index)
        resident = self.layers.decoder.layers[index].state_dict()
        held = {prefix + name: tensor for name, tensor in resident.items() if not tensor.is_meta}
        rest = {name: tensor for name, tensor in held.items() if not name.startswith(own)}
        return rest | {own + name: tensor for name, tensor in attention.items()}

    def _statistics(self, index: int) -> LayerStatistics | None:
        """Of a layer that is resident; None where no text is looked at."""
        if self.text is None:
            return None
        if self.text.statistics is not None:
            return self.text.statistics.layers[self._place(index)]
        return self._look_at(index, "inputs" if self._shares else "seen", passes_on=not self._shares)

    def _place(self, index: int) -> int:
        """Where lists by layer with attention have their entry for a layer."""
        return self._attending.index(index)

    def _pass_by(self, index: int) -> None:
        """Pass all streams through a layer without attention, which is resident and which nothing is done to."""
        if self.text is not None and self.text.statistics is None and not self._shares:
            self._carry(index, ("seen",), "float32")
        if self._tunes:
            with self.layers.converted(self._latent, index, self._config(), {}):
                self._carry(index, ("inputs", "latent"), self.dtype)

    def _carry(self, index: int, names: tuple[str, ...], dtype: str) -> None:
        for name in names:
            decoder = self._latent.get_decoder() if name == "latent" else self.layers.decoder
            above = self._state(name, index + 1)
            carry_on(decoder, index, self._start(name, index), self._positions, above, dtype)

    def _look_at(self, index: int, name: str, *, passes_on: bool = True) -> LayerStatistics:
        inputs, outputs = self._start(name, index), self._state(name, index + 1)
        return calibrate_layer(
            self.layers.decoder,
            index,
            inputs,
            self._positions,
            self._rows,
            outputs if passes_on and index < self._attending[-1] else None,
        )

    def _refine(self, index: int, config: LatentConfig) -> dict[str, Any]:
        streams = {name: self._start(name, index) for name in ("inputs", "latent")}
        streams |= {"outputs": self._state("inputs", index + 1), "wanted": self._state("wanted", index)}
        attention = parts_of(self.layers.decoder, index).attention
        for name, heads in (("queries", attention.num_heads), ("keys", attention.num_key_value_heads)):
            width, kind = heads * attention.d_qk, getattr(torch, self.dtype)
            streams[name] = self._state(name, index, width, kind)
        tuned = TunedLayer(
            index,
            self.layers.decoder,
            self._latent.get_decoder(),
            copy_for_tuning(parts_of(self._latent.get_decoder(), index).attention),
            dict(streams),
            self._positions,
            held_out_blocks(len(self._positions)),
            self.dtype,
        )
        last, told = self._each * (index + 1), self._told
        above = self._state("latent", index + 1)
        return refine_layer(
            tuned, config, self.choices, self.seed, lambda: told.to(min(told.done + 1, last)), above
        )

    def _start(self, name: str, index: int) -> HiddenStateFile:
        """A stream before a layer; before the first, the embeddings of the text."""
        state = self._state(name, index)
        if index == 0 and self.text is not None:
            state.write(self.layers.embed(self.text.input_ids.long()))
        return state

    def _state(
        self, name: str, index: int, width: int | None = None, kind: torch.dtype | None = None
    ) -> HiddenStateFile:
        shape = (self._positions.shape[1], width or self.layers.config.hidden_size)
        path = self._states / f"{name}-{index:05}"
        return HiddenStateFile(path, shape, kind or self.layers.dtype, self.layers.device)
