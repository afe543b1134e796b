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

from kvlatent.checkpoints.sharded import ShardedWeights
from kvlatent.model.assembly import full_width, skeleton
from kvlatent.model.attention import LatentAttention
from kvlatent.model.classes import latent_classes, latent_config_of
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import family_of
from kvlatent.model.hidden_states import isolate_layer
from kvlatent.model.layer_parts import parts_of
from kvlatent.model.rotary import LatentRotary

__all__ = ["EMBEDDING", "HEAD", "NORM", "LatentLayers", "ResidentLayers", "layer_prefix"]

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_ROWS = 1 << 14  # of two embeddings compared at once
_STALE = "rotary_emb.inv_freq"  # in checkpoints of earlier releases, and read by none since


def layer_prefix(index: int) -> str:
    """What the names of a layer's tensors start with."""
    return f"model.layers.{index}."


class ResidentLayers:
    """A checkpoint's model, full width, whose layers get weights one at a time.

    Args:
        weights: of the checkpoint; config: its transformers config.
        dtype, device: of the weights in memory.

    Raises:
        ValueError: names or shapes of the tensors are not those of the model.
    """

    def __init__(
        self, weights: ShardedWeights, config: Any, dtype: torch.dtype, device: str | torch.device
    ) -> None:
        self.weights, self.dtype, self.device = weights, dtype, torch.device(device)
        self.config, self.family = copy.deepcopy(config), family_of(config)
        self.config.tie_word_embeddings = _has_one_embedding(weights, config)
        with torch.device("meta"):
            original = self.family.upstream("ForCausalLM")(self.config)
        self.original = original.to(dtype).requires_grad_(False).eval()
        self.names = _check_names(weights, self.original)
        self.twin = full_width(self.original).requires_grad_(False).eval()
        self.decoder = self.twin.model
        _place(self.decoder, dtype, self.device)

    @property
    def count(self) -> int:
        """Layers."""
        return self.config.num_hidden_layers

    def names_of(self, index: int) -> list[str]:
        """Tensors of a layer."""
        return _of_layer(self.names, index)

    def largest_layer_bytes(self) -> int:
        """Of the weights of a layer in memory."""
        return max(self.weights.num_bytes(self.names_of(index), self.dtype) for index in range(self.count))

    def embed(self, ids: Tensor) -> Iterator[Tensor]:
        """Hidden states [1, T, D] before the first layer of every row of ids [blocks, T]."""
        used, numbers = ids.cpu().unique(return_inverse=True)
        module = copy.copy(self.decoder.embed_tokens)
        module._parameters, module.padding_idx = dict(module._parameters), None
        rows = self.weights.read_rows(EMBEDDING, used).to(self.device, self.dtype)
        module.weight = nn.Parameter(rows, requires_grad=False)
        for row in numbers:
            yield module(row[None].to(self.device))

    @contextmanager
    def resident(self, index: int, *, attention_only: bool = False) -> Generator[Any]:
        """Layer `index` of the twin with its weights, and what its output passes next; without them again afterwards.

        Args:
            attention_only: nothing but its attention and the norm before that.
        """
        parts = parts_of(self.decoder, index)
        following = (
            self.decoder.norm if index + 1 == self.count else parts_of(self.decoder, index + 1).attention_norm
        )
        name = NORM if index + 1 == self.count else self._norm_name(index + 1)
        kept = (self.family.attention + ".", self.family.attention_norm + ".")
        state = {
            name.removeprefix(layer_prefix(index)): name
            for name in self.names_of(index)
            if not attention_only or name.removeprefix(layer_prefix(index)).startswith(kept)
        }
        layer = self.decoder.layers[index]
        try:
            layer.load_state_dict(
                {short: self._read(name) for short, name in state.items()},
                assign=True,
                strict=not attention_only,
            )
            if not attention_only:
                following.load_state_dict({"weight": self._read(name)}, assign=True)
            yield parts
        finally:
            layer.to("meta")
            following.to("meta")

    def _norm_name(self, index: int) -> str:
        return f"{layer_prefix(index)}{self.family.attention_norm}.weight"

    def _read(self, name: str) -> Tensor:
        return self.weights.read(name, self.dtype, self.device)

    def latent_skeleton(self, config: LatentConfig) -> Any:
        """The latent model without weights."""
        latent = skeleton(self.original, config).to(self.dtype).requires_grad_(False).eval()
        latent.model.embed_tokens.weight = self.decoder.embed_tokens.weight
        return latent

    @contextmanager
    def converted(
        self, latent: Any, index: int, config: LatentConfig, attention: Mapping[str, Tensor]
    ) -> Generator[Any]:
        """Layer `index` of `latent` with this attention, and the rest as in the twin, where the layer is resident.

        Args:
            config: says what that layer keeps; of the others it may say anything.
        """
        with torch.device("meta"):
            module = LatentAttention(latent.config, config, index).requires_grad_(False)
        layer = latent.model.layers[index]
        setattr(layer, self.family.attention, module.to(self.dtype))
        latent.model.rotary_emb = LatentRotary(config.tables_at(index) if config.one_table else ())
        shared = self.decoder.layers[index].state_dict()
        own = f"{self.family.attention}."
        state = {name: tensor for name, tensor in shared.items() if not name.startswith(own)}
        try:
            layer.load_state_dict(state | {own + name: t for name, t in attention.items()}, assign=True)
            yield layer.eval()
        finally:
            layer.to("meta")


class LatentLayers:
    """A latent checkpoint's model without weights, whose layers get theirs one at a time, to be trained.

    Args:
        weights: of the checkpoint; config: its transformers config.
        dtype, device: of the weights in memory.

    Raises:
        ValueError: names or shapes of the tensors are not those of the model.
    """

    def __init__(
        self, weights: ShardedWeights, config: Any, dtype: torch.dtype, device: str | torch.device
    ) -> None:
        self.weights, self.dtype, self.device = weights, dtype, torch.device(device)
        self.config = copy.deepcopy(config)
        self.config.tie_word_embeddings = _has_one_embedding(weights, config)
        causal_type = latent_classes(latent_config_of(config).original_model_type)[2]
        with torch.device("meta"):
            model = causal_type(self.config)
        self.model = model.to(dtype).requires_grad_(False).eval()
        self.names = _check_names(weights, self.model)
        _place(self.model.model, dtype, self.device)

    @property
    def count(self) -> int:
        """Layers."""
        return self.config.num_hidden_layers

    def names_of(self, index: int) -> list[str]:
        """Tensors of a layer."""
        return _of_layer(self.names, index)

    def read_layer(self, index: int) -> Any:
        """A decoder of layer `index` alone, without a final norm, with its weights; nobody else holds them."""
        decoder, prefix = self.model.model, layer_prefix(index)
        state = {
            name.removeprefix(prefix): self.weights.read(name, self.dtype, self.device)
            for name in self.names_of(index)
        }
        shell = isolate_layer(decoder, index)
        shell.layers = nn.ModuleList([copy.deepcopy(decoder.layers[index])])
        shell.layers[0].load_state_dict(state, assign=True)
        return shell


def _of_layer(names: list[str], index: int) -> list[str]:
    return [name for name in names if name.startswith(layer_prefix(index))]


def _place(decoder: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Say where a decoder is and what it computes in, which is read off its first parameter."""
    empty = torch.empty(0, decoder.config.hidden_size, dtype=dtype, device=device)
    decoder.embed_tokens.weight = nn.Parameter(empty, requires_grad=False)


def _has_one_embedding(weights: ShardedWeights, config: Any) -> bool:
    """Whether the head is the embedding, as upstream finds when it loads both."""
    if not config.tie_word_embeddings or HEAD not in weights or EMBEDDING not in weights:
        return bool(config.tie_word_embeddings)
    if weights.shape(HEAD) != weights.shape(EMBEDDING):
        return False
    chunks = torch.arange(weights.shape(HEAD)[0]).split(_ROWS)
    return all(torch.equal(*(weights.read_rows(name, rows) for name in (EMBEDDING, HEAD))) for rows in chunks)


def _check_names(weights: ShardedWeights, original: Any) -> list[str]:
    """The names of the tensors that the model is made of; `ValueError` where the checkpoint's are others."""
    wanted = {name: tuple(tensor.shape) for name, tensor in original.state_dict().items()}
    if original.config.tie_word_embeddings:
        wanted.pop(HEAD, None)
    found = {name for name in weights.names if not name.endswith(_STALE)}
    if original.config.tie_word_embeddings:
        found.discard(HEAD)
    other = [name for name in sorted(wanted.keys() & found) if weights.shape(name) != wanted[name]]
    for kind, names in (
        ("missing", sorted(wanted.keys() - found)),
        ("unexpected", sorted(found - wanted.keys())),
        ("mismatched", other),
    ):
        if names:
            raise ValueError(
                f"the weights of {weights.path} do not fit its config: {len(names)} {kind} tensors, e.g. {names[0]}; download "
                "or convert the checkpoint again"
            )
    return sorted(wanted)
