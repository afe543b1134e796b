"""Stage I of a checkpoint that need not fit in memory: all steps of one decoder layer, then all of the next.

Layers are fed the original's states and clipped one by one, so what one learns does not depend on the others, and the order
is free. Every layer sees the batches of the ordinary stage in their order, under the same schedule, from the same start, so its
weights are the same but for the rounding of products of other shapes. In steps on the student's own stream a layer needs
what the one below gave in that very step; it is written down as it comes, and so is the same, too.

The original's layer is read, takes the text's states one layer further and is let go, then the student's layer is read,
trained and written. States between layers lie on disk; a kill costs the layer that was being trained.

Shapes: B batch, T positions, D model width.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor, nn

from kvlatent.checkpoints.resident_layers import LatentLayers, ResidentLayers
from kvlatent.checkpoints.shard_output import shard_name, write_shard
from kvlatent.jobs.devices import precision
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.work_directory import WorkDirectory
from kvlatent.model.hidden_states import HiddenStateFile, blocks_at_once, isolate_layer
from kvlatent.training.layer_loss import squared_error
from kvlatent.training.loop import training_arguments
from kvlatent.training.resume import read_journal
from kvlatent.training.stages import forward_put_back
from kvlatent.training.trainable import merged_copy, prepare_for_training
from kvlatent.training.trainers import LayerTrainer

__all__ = ["StreamedStage"]

_JOURNAL = "layer.jsonl"


@dataclass
class StreamedStage:
    """One stage I, layer by layer.

    Args:
        original: gives the targets; student: is trained.
        blocks: rows of `input_ids`, `position_ids`, `labels` of one length.
        recipe: `stage1`, `lora`, `seed` and `dtype` are read, the latter resolved.
        stored: dtype that is written.
        work: which layers are finished, and the states between layers; folder: gets the shards.
        progress: told after every step of every layer.
    """

    original: ResidentLayers
    student: LatentLayers
    blocks: Any
    recipe: Recipe
    stored: torch.dtype
    work: WorkDirectory
    folder: Path
    progress: Progress

    def run(self) -> list[dict[str, Any]]:
        """Train what is not finished yet and write the shards.

        Returns:
            The journal of the stage, as that of all layers at once: a row a logged step.

        Raises:
            ValueError: a loss is not finite, or a file was cut short.
            OSError: the disk is full; finished layers stay finished.
        """
        for place in (self.folder, self._states):
            place.mkdir(exist_ok=True)
        self._draws = torch.Generator().manual_seed(self.recipe.seed)
        self._write_part("embeddings", 0, [self.student.embedding])
        rows = [self._finish_layer(index) for index in range(self.student.count)]
        self._write_part("head", self.student.count + 1, self.student.names_behind())
        return joined_rows(rows)

    def __post_init__(self) -> None:
        self._states = self.work.path / "states"
        self._length = len(self.blocks[0]["input_ids"])
        settings, device = self.recipe.stage1, self.student.device.type
        self._arguments = partial(
            training_arguments, settings, self.recipe, 1, self._length, self.work.path, device
        )
        arguments = self._arguments()
        # The loader reads a batch ahead.
        wanted = settings.batch_size * (arguments.max_steps * settings.gradient_accumulation + 1)
        # Rows of the blocks that are seen, in a text that is longer than the stage.
        order = SeedableRandomSampler(range(len(self.blocks)), data_seed=arguments.seed)
        self._seen = sorted(islice(order, min(wanted, len(self.blocks))))

    def _write_part(self, name: str, number: int, tensors: list[str]) -> None:
        """Write tensors that the stage does not change, unless they are there."""
        if self.work.done(name) is None:
            weights = self.student.weights
            write_shard({each: weights.read(each, self.stored) for each in tensors}, self._shard(number))
            self.work.finish(name, {})

    def _shard(self, number: int) -> Path:
        return self.folder / shard_name(number, self.student.count + 2)

    def _finish_layer(self, index: int) -> list[dict[str, Any]]:
        """The journal of a layer, trained now or when it was finished."""
        name = f"layer-{index:05}"
        known: Any = self.work.done(name)
        if known is None:
            for file in self._states.glob("*"):
                if not file.name.endswith(f"-{index:05}"):
                    file.unlink()
            self._pass_on(index)
            rows = self._train(index)
            draws = self._draws.get_state().numpy().tobytes().hex()
            known = self.work.finish(name, {"rows": rows, "draws": draws})
        drawn = bytearray.fromhex(known["draws"])
        self._draws.set_state(torch.frombuffer(drawn, dtype=torch.uint8))
        return known["rows"]

    def _state(self, name: str, index: int, device: torch.device | None = None) -> HiddenStateFile:
        shape = (self._length, self.original.config.hidden_size)
        place = device or self.student.device
        return HiddenStateFile(self._states / f"{name}-{index:05}", shape, self.original.dtype, place)

    def _pass_on(self, index: int) -> None:
        """Run the original's layer over the text's states."""
        entering = self._state("original", index)
        if index == 0:
            ids = torch.stack([torch.as_tensor(self.blocks[row]["input_ids"]) for row in self._seen])
            entering.write(self.original.embed(ids.long()))
        with self.original.resident(index), torch.no_grad():
            self._state("original", index + 1).write(self._outputs(index, entering))

    def _outputs(self, index: int, entering: HiddenStateFile) -> Iterator[Tensor]:
        decoder = self.original.decoder
        layer, device = isolate_layer(decoder, index), self.original.device
        for rows in torch.arange(len(self._seen)).split(blocks_at_once(decoder, self._length)):
            chosen = [self._seen[row] for row in rows.tolist()]
            positions = torch.stack([torch.as_tensor(self.blocks[row]["position_ids"]) for row in chosen])
            with precision(device, self.recipe.dtype):
                output = layer(
                    inputs_embeds=entering.read(rows.tolist()),
                    position_ids=positions.long().to(device),
                    use_cache=False,
                )
            yield output.last_hidden_state

    def _train(self, index: int) -> list[dict[str, Any]]:
        """All steps of a layer, which is then written; returns its journal."""
        layer = self.student.read_layer(index)
        prepare_for_training(layer, self.recipe, self._draws)
        layer.to(self.student.device)
        journal = self.work.path / _JOURNAL
        journal.unlink(missing_ok=True)
        arguments = self._arguments()
        arguments.save_strategy = "no"  # a kill costs a layer
        files = [self._state("original", at, torch.device("cpu")) for at in (index, index + 1)]
        trainer = OneLayerTrainer(
            layer,
            arguments,
            _BlocksWithStates(self.blocks, self._seen, *files),
            None,
            journal,
            self._told(index),
            settings=self.recipe.stage1,
            num_layers=self.student.count,
            below=self._state("own", index) if index else None,
            above=self._state("own", index + 1) if index + 1 < self.student.count else None,
        )
        try:
            with forward_put_back(layer):
                trainer.resume(None)
        except ValueError as error:
            raise ValueError(f"layer {index} of {self.student.count}: {error}") from error
        merged = merged_copy(layer, self.stored).state_dict().items()
        own = "layers.0."
        tensors = {
            self.student.prefix(index) + name.removeprefix(own): tensor.cpu().contiguous()
            for name, tensor in merged
            if name.startswith(own)
        }
        write_shard(tensors, self._shard(index + 1))
        del trainer, layer
        gc.collect()  # a trainer and its callbacks hold each other, and with them the optimiser's sums
        return read_journal(journal)

    def _told(self, index: int) -> Progress:
        """Tells of the steps of a layer as of those of all layers."""

        def tell(*, step: str, done: int, total: int, note: str, **figures: Any) -> None:
            total, done = self.student.count * total, index * total + done
            self.progress.report(step, done, total, f"layer {index}, {note}", **figures)

        return Progress(tell)


class OneLayerTrainer(LayerTrainer):
    """Stage I of one layer of so many, on states that are known.

    Args:
        num_layers: of the whole model: the loss is a mean over them.
        below: the own stream that enters the layer, a batch after the other as the steps use them; None: the embeddings.
        above: gets what the layer gives in these steps; None: there is no layer above.
        others: as for `LayerTrainer`.
    """

    def __init__(
        self,
        *args: Any,
        num_layers: int,
        below: HiddenStateFile | None,
        above: HiddenStateFile | None,
        **others: Any,
    ) -> None:
        super().__init__(*args, **others)
        self.num_layers, self.below, self.above = num_layers, below, above
        self.own_rows = 0

    def batch_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The layer's share of the mean over layers."""
        return super().batch_loss(model, inputs) / self.num_layers

    def losses_of_layers(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """[1]."""
        entering, own = inputs["entering"], self.feeds_own_stream()
        if own and self.below is not None:
            entering = self.below.read(range(self.own_rows, self.own_rows + len(entering)))
            self.own_rows += len(entering)
        output = model(inputs_embeds=entering, position_ids=inputs["position_ids"], use_cache=False)
        if own and self.above is not None:
            self.above.append(output.last_hidden_state)
        return squared_error(output.last_hidden_state, inputs["leaving"])[None]


class _BlocksWithStates(torch.utils.data.Dataset):
    """Blocks to train on, with what enters and leaves the original's layer there, "entering" and "leaving" [T, D]."""

    def __init__(
        self, blocks: Any, seen: list[int], entering: HiddenStateFile, leaving: HiddenStateFile
    ) -> None:
        self.blocks, self.entering, self.leaving = blocks, entering, leaving
        self.rows = {block: row for row, block in enumerate(seen)}

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        block, row = self.blocks[index], [self.rows[index]]
        known = {name: block[name] for name in ("input_ids", "position_ids")}
        return known | {"entering": self.entering.read(row)[0], "leaving": self.leaving.read(row)[0]}


def joined_rows(layers: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The journal of all layers at once from those of each: losses and seconds add up, norms by their squares."""
    joined = []
    for rows in zip(*layers, strict=True):
        seconds = sum(row["seconds"] for row in rows)
        norms = [row["grad_norm"] for row in rows if row["grad_norm"] is not None]
        joined.append(
            {
                **rows[0],
                "seconds": round(seconds, 3),
                "loss": sum(row["loss"] for row in rows),
                "grad_norm": sum(norm**2 for norm in norms) ** 0.5 if norms else None,
                "tokens_per_second": round(rows[0]["tokens"] / max(seconds, 1e-3), 1),
                "layer_losses": [loss for row in rows for loss in row["layer_losses"]],
            }
        )
    return joined
