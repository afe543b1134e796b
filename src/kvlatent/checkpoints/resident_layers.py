"""The original and its latent model as modules without weights, of which one decoder layer at a time has any.

Modules, masks and rotary tables are those of the whole model, so what runs a layer does not know that the others are empty.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import local_torch_dtype

from kvlatent.checkpoints.named_weights import NamedWeights
from kvlatent.checkpoints.sharded import ShardedWeights
from kvlatent.model.assembly import full_width, skeleton
from kvlatent.model.attention import LatentAttention
from kvlatent.model.classes import latent_classes, latent_config_of
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import attention_layers_of, family_of
from kvlatent.model.hidden_states import embed, isolate_layer
from kvlatent.model.layer_parts import final_norm, first_norm
from kvlatent.model.rotary import LatentRotary

__all__ = ["LatentLayers", "NamedLayers", "ResidentLayers"]

_ROWS = 1 << 14  # of two embeddings compared at once


class NamedLayers:
    """A checkpoint's model without weights, and what its tensors are called.

    Args:
        weights: of the checkpoint; config: its transformers config.
        kind: the model's class.
        dtype, device: of the weights in memory.

    Raises:
        ValueError: names or shapes of the tensors are not those of the model.
    """

    def __init__(
        self,
        weights: ShardedWeights,
        config: Any,
        kind: type,
        dtype: torch.dtype,
        device: str | torch.device,
    ) -> None:
        self.dtype, self.device, self._kind = dtype, torch.device(device), kind
        self.config = copy.deepcopy(config)
        self.model = self._without_weights()
        self.embedding = _name_of(self.model, self.model.get_input_embeddings())
        self.head = _name_of(self.model, self.model.get_output_embeddings())
        self.weights = NamedWeights(weights, self.model)
        if self.config.tie_word_embeddings and not self._has_one_embedding():
            self.config.tie_word_embeddings = False
            self.model = self._without_weights()
        self.names = self.weights.check(self.head if self.config.tie_word_embeddings else None)

    def _without_weights(self) -> Any:
        with torch.device("meta"), local_torch_dtype(torch.bfloat16):
            model = self._kind(self.config)
        self._pinned = {n: t.dtype for n, t in model.state_dict().items() if t.dtype != torch.bfloat16}
        return model.to(self.dtype).requires_grad_(False).eval()

    def _has_one_embedding(self) -> bool:
        """Whether the head is the embedding, as upstream finds when it loads both."""
        weights, both = self.weights, (self.embedding, self.head)
        if any(name not in weights for name in both):
            return True
        if weights.shape(self.head) != weights.shape(self.embedding):
            return False
        chunks = torch.arange(self.config.vocab_size).split(_ROWS)
        return all(torch.equal(*(weights.read_rows(name, rows) for name in both)) for rows in chunks)

    @property
    def count(self) -> int:
        """Layers."""
        return self.config.num_hidden_layers

    def prefix(self, index: int) -> str:
        """What the names of a layer's tensors start with."""
        return f"{self.model.base_model_prefix}.layers.{index}."

    def names_of(self, index: int) -> list[str]:
        """Tensors of a layer."""
        return [name for name in self.names if name.startswith(self.prefix(index))]

    def names_behind(self) -> list[str]:
        """Tensors that are neither in a layer nor the embedding: the last norm and the head, where it has its own."""
        layers = self.prefix(0).removesuffix("0.")
        return [name for name in self.names if not name.startswith(layers) and name != self.embedding]

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """What a tensor is in a model of that dtype: its own where upstream gives it one (biases of a router, say)."""
        return self._pinned.get(name, dtype)

    def written_name(self, name: str) -> str:
        """What a checkpoint that is made of this one calls a tensor of its model."""
        return self.weights.weights.written_name(name)

    def _read(self, name: str) -> Tensor:
        return self.weights.read(name, self.dtype_of(name, self.dtype), self.device)

    def place(self, decoder: Any) -> None:
        """Say where a decoder is and what it computes in, which is read off its first parameter."""
        empty = torch.empty(0, self.config.hidden_size, dtype=self.dtype, device=self.device)
        decoder.get_input_embeddings().weight = nn.Parameter(empty, requires_grad=False)


class ResidentLayers(NamedLayers):
    """A checkpoint's model, full width, whose layers get weights one at a time.

    Args:
        weights, config, dtype, device: as for `NamedLayers`.
    """

    def __init__(
        self, weights: ShardedWeights, config: Any, dtype: torch.dtype, device: str | torch.device
    ) -> None:
        self.family = family_of(config)
        super().__init__(weights, config, self.family.upstream("ForCausalLM"), dtype, device)
        self.original = self.model
        self.attending = attention_layers_of(self.config)
        self.twin = full_width(self.original).requires_grad_(False).eval()
        self.decoder = self.twin.get_decoder()
        self.place(self.decoder)

    def own(self, index: int) -> str:
        """What the names of the tensors of a layer's attention start with."""
        return f"{self.prefix(index)}{self.family.attention}."

    def largest_layer_bytes(self) -> int:
        """Of the weights of a layer in memory."""
        return max(self.weights.num_bytes(self.names_of(index), self.dtype) for index in range(self.count))

    def embed(self, ids: Tensor) -> Iterator[Tensor]:
        """Hidden states [1, T, D] before the first layer of every row of ids [blocks, T]."""
        used, numbers = ids.cpu().unique(return_inverse=True)
        known = self.decoder.get_input_embeddings()
        module = copy.copy(known)
        module._parameters, module.padding_idx = dict(module._parameters), None
        module._buffers = {
            name: torch.empty_like(b, device=self.device) for name, b in known._buffers.items()
        }
        if module._buffers:  # not stored: upstream fills them when it starts a model
            self.decoder._init_weights(module)
        rows = self.weights.read_rows(self.embedding, used).to(self.device, self.dtype)
        module.weight = nn.Parameter(rows, requires_grad=False)
        decoder = copy.copy(self.decoder)
        decoder._modules = {
            name: module if each is known else each for name, each in decoder._modules.items()
        }
        for row in numbers:
            yield embed(decoder, row[None].to(self.device))

    @contextmanager
    def resident(self, index: int, *, attention_only: bool = False) -> Generator[None]:
        """Layer `index` of the twin with its weights, and what its output passes next; without them again afterwards.

        Args:
            attention_only: nothing but its attention and the norm before that.
        """
        layer, following, prefix = self.decoder.layers[index], self._following(index), self.prefix(index)
        kept = (self.family.attention + ".", self.family.attention_norm + ".")
        try:
            layer.load_state_dict(
                {
                    self._latent_name(name, index): self._read(name)
                    for name in self.names_of(index)
                    if not attention_only or name.removeprefix(prefix).startswith(kept)
                },
                assign=True,
                strict=not attention_only,
            )
            if not attention_only:
                start = f"{self.original.base_model_prefix}.{_place_of(self.decoder, following)}."
                state = {n.removeprefix(start): self._read(n) for n in self.names if n.startswith(start)}
                following.load_state_dict(state, assign=True)
            yield
        finally:
            layer.to("meta")
            following.to("meta")

    def _following(self, index: int) -> Any:
        """What a layer's output passes next."""
        last = index + 1 == self.count
        return final_norm(self.decoder) if last else first_norm(self.decoder, index + 1)

    def _latent_name(self, name: str, index: int) -> str:
        """A tensor's name inside the twin's layer."""
        own = self.family.attention + "."
        short = name.removeprefix(self.prefix(index))
        return own + self.family.latent_name(short.removeprefix(own)) if short.startswith(own) else short

    def latent_skeleton(self, config: LatentConfig) -> Any:
        """The latent model without weights."""
        latent = skeleton(self.original, config).to(self.dtype).requires_grad_(False).eval()
        latent.get_input_embeddings().weight = self.decoder.get_input_embeddings().weight
        return latent

    @contextmanager
    def converted(
        self, latent: Any, index: int, config: LatentConfig, attention: Mapping[str, Tensor]
    ) -> Generator[Any]:
        """Layer `index` of `latent` with this attention, and the rest as in the twin, where the layer is resident.

        Args:
            config: says what that layer keeps; of the others it may say anything.
            attention: nothing for a layer without.
        """
        decoder, own = latent.get_decoder(), f"{self.family.attention}."
        layer = decoder.layers[index]
        if attention:
            with torch.device("meta"):
                module = LatentAttention(latent.config, config, index).requires_grad_(False)
            setattr(layer, self.family.attention, module.to(self.dtype))
        tables = config.tables_at(index) if config.one_table else ()
        rotary = LatentRotary(tables, in_float32=self.family.rotates_in_float32)
        if self.family.rotary:
            setattr(decoder, self.family.rotary, rotary)
        shared = self.decoder.layers[index].state_dict()
        state = {name: tensor for name, tensor in shared.items() if not name.startswith(own)}
        try:
            layer.load_state_dict(state | {own + name: t for name, t in attention.items()}, assign=True)
            yield layer.eval()
        finally:
            layer.to("meta")


class LatentLayers(NamedLayers):
    """A latent checkpoint's model without weights, whose layers get theirs one at a time, to be trained.

    Args:
        weights, config, dtype, device: as for `NamedLayers`.
    """

    def __init__(
        self, weights: ShardedWeights, config: Any, dtype: torch.dtype, device: str | torch.device
    ) -> None:
        kind = latent_classes(latent_config_of(config).original_model_type)[2]
        super().__init__(weights, config, kind, dtype, device)
        self.place(self.model.get_decoder())

    def read_layer(self, index: int) -> Any:
        """A decoder of layer `index` alone, without a final norm, with its weights; nobody else holds them."""
        decoder, prefix = self.model.get_decoder(), self.prefix(index)
        state = {name.removeprefix(prefix): self._read(name) for name in self.names_of(index)}
        shell = isolate_layer(decoder, index)
        shell.layers = nn.ModuleList([copy.deepcopy(decoder.layers[index])])
        shell.layers[0].load_state_dict(state, assign=True)
        return shell


def _place_of(root: nn.Module, module: nn.Module) -> str:
    """The dotted name of a module inside another; "?" where it is in none, and so has no tensors."""
    return next((name for name, each in root.named_modules() if each is module), "?")


def _name_of(model: Any, module: nn.Module) -> str:
    """The name of a module's weight in a model."""
    return f"{_place_of(model, module)}.weight"
