"""A latent decoder as an OpenVINO graph whose cache the engine holds.

The decoder's own layers are traced, so that the graph computes what the checkpoint does, in any family, with any
rotary tables and any widths. Cached keys and values become state variables, each at its own width, gathered by
`beam_idx`: what OpenVINO GenAI asks of a model that it serves, with or without paged attention.

Shapes: B batch, T new positions, S all positions, N query heads, K key-value heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import family_of
from kvlatent.model.layer_parts import final_norm, rotary_of_decoder, windows_of

__all__ = ["INPUTS", "compress_weights", "stateful_graph"]

INPUTS = ("input_ids", "attention_mask", "position_ids")
_ATTENTION = "kvlatent_openvino"


def stateful_graph(latent: Any) -> ov.Model:
    """The graph of a latent model: `input_ids`, `attention_mask`, `position_ids` [B, T or S], `beam_idx` [B] to logits.

    Args:
        latent: a latent causal language model, float32, on the CPU; it is not changed.
    """
    config = latent.config
    widths = [latent_config_of(config).widths_at(layer) for layer in range(config.num_hidden_layers)]
    past = [torch.zeros(2, config.num_key_value_heads, 2, width) for pair in widths for width in pair]
    decoder = _Decoder(latent).eval()
    ids = torch.zeros(2, 3, dtype=torch.long)
    example = (ids, torch.ones(2, 5, dtype=torch.long), ids + torch.arange(2, 5), *past)
    with _attending_for_openvino(latent), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: which sizes it takes for constants
        decoder(
            *example
        )  # the rotary tables are made at the first forward, which the tracer would take for another graph
        traced = torch.jit.trace(decoder, example, check_trace=False)
        graph = ov.convert_model(traced, example_input=example)
    cached = [f"{layer}.{kind}" for layer in range(len(widths)) for kind in ("key", "value")]
    _name(graph, cached, past)
    _keep_cache_as_state(graph, cached)
    return graph


class _Decoder(nn.Module):
    """A latent model's forward on a cache that is given and returned tensor by tensor."""

    def __init__(self, latent: Any) -> None:
        super().__init__()
        self.latent = latent

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits [B, T, V], then keys and values of every layer [B, K, S, width]."""
        decoder, cache = self.latent.get_decoder(), _Cache(past)
        family, config = family_of(decoder.config), decoder.config
        hidden = decoder.get_input_embeddings()(input_ids)
        if family.embedding_multiplier:
            hidden = hidden * family.number(config, "embedding_multiplier")
        windows = windows_of(self.latent)
        masks = {window: _mask(attention_mask, input_ids.shape[1], window) for window in set(windows)}
        rotation = rotary_of_decoder(decoder)(hidden, position_ids)
        for window, layer in zip(windows, decoder.layers, strict=True):
            hidden = layer(
                hidden,
                attention_mask=masks[window],
                position_ids=position_ids,
                past_key_values=cache,
                position_embeddings=rotation,
            )
        logits = self.latent.get_output_embeddings()(final_norm(decoder)(hidden))
        if family.logit_divisor:
            logits = logits / family.number(config, "logit_divisor")
        return logits, *cache.tensors


class _Cache:
    """What a layer asks of a transformers cache, without any state but tensors: keys, values, keys, values, ..."""

    def __init__(self, past: Sequence[Tensor]) -> None:
        self.tensors = list(past)

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        for index, new in ((2 * layer, key), (2 * layer + 1, value)):
            self.tensors[index] = torch.cat((self.tensors[index], new), dim=-2)
        return self.tensors[2 * layer], self.tensors[2 * layer + 1]


def _mask(attention_mask: Tensor, num_new: int, window: int | None) -> Tensor:
    """Additive mask [B, 1, T, S]: a position sees itself and what lies before it, of a window the last so many.

    With a window, this very chain of operations is what the engine knows as one; a mask in another form is dropped in
    silence when paged attention takes over.
    https://github.com/openvinotoolkit/openvino/blob/master/src/common/transformations/src/transformations/paged_attention/state_management_pattern.cpp
    """
    batch, length = attention_mask.shape
    keys = torch.arange(length)[None, None, None, :]
    queries = (torch.arange(num_new) + (length - num_new))[None, None, :, None]
    given, causal = attention_mask[:, None, None, :].bool(), keys <= queries
    if window is None:
        seen = causal & given
    else:
        seen = causal & (keys > queries + (-window))
        seen = (given & (seen & given)) & causal
    seen = seen.expand(batch, 1, num_new, length)
    hidden = torch.finfo(torch.float32).min
    return torch.where(seen, torch.tensor(0.0), torch.tensor(hidden))[:, :, :, :length]


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """One attention operation, on keys and values as they are cached and then repeated by group: [B, T, N, d_vo]."""
    groups = module.num_key_value_groups
    key, value = (_repeat(x, groups) for x in (key, value))
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return output.transpose(1, 2), None


def _repeat(x: Tensor, groups: int) -> Tensor:
    """[B, K, S, d] to [B, N, S, d]; the engine takes the repetition out again."""
    if groups == 1:
        return x
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, groups, length, width).reshape(batch, -1, length, width)


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attend)


@contextmanager
def _attending_for_openvino(latent: Any) -> Generator[None]:
    """Within, the model's layers attend by `_attend`."""
    before = latent.config._attn_implementation
    latent.config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        latent.config._attn_implementation = before


def _name(graph: ov.Model, cached: Sequence[str], past: Sequence[Tensor]) -> None:
    """Give inputs and outputs their names and shapes: every size free but heads and widths."""
    free = ov.Dimension.dynamic()
    shapes = [[free, free]] * len(INPUTS) + [[free, x.shape[1], free, x.shape[3]] for x in past]
    names = [*INPUTS, *(f"past_key_values.{name}" for name in cached)]
    for port, name, shape in zip(graph.inputs, names, shapes, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        port.get_node().set_partial_shape(ov.PartialShape(shape))
    for port, name in zip(graph.outputs, ["logits", *(f"present.{name}" for name in cached)], strict=True):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()


def _keep_cache_as_state(graph: ov.Model, cached: Sequence[str]) -> None:
    """Make the cache a state of the graph, reordered by `beam_idx` and empty at first."""
    beams = ops.parameter(ov.PartialShape([ov.Dimension.dynamic()]), ov.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    graph.add_parameters([beams])
    first_axis = ops.constant(np.int64(0))
    for name in cached:
        past = graph.input(f"past_key_values.{name}").get_node()
        users = past.output(0).get_target_inputs()
        reordered = ops.gather(past, beams, first_axis).output(0)
        for user in users:
            user.replace_source_output(reordered)
    graph.validate_nodes_and_infer_types()
    states = {f"past_key_values.{name}": f"present.{name}" for name in cached}
    apply_make_stateful_transformation(graph, states)
    shape = ops.shape_of(graph.input("input_ids"), output_type="i64")
    batch = ops.gather(shape, ops.constant(np.array([0])), first_axis)
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, width = node.get_output_partial_shape(0)
            rest = ops.constant(np.array([heads.get_length(), 0, width.get_length()]))
            node.set_arguments([ops.broadcast(ops.constant(np.float32(0)), ops.concat([batch, rest], 0))])
    graph.validate_nodes_and_infer_types()


def compress_weights(graph: ov.Model) -> None:
    """Store the matrices as float16, in place. OpenVINO's own compression also rounds the rotary tables, which at 8,000
    tokens turns keys by radians."""
    for node in graph.get_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != ov.Type.f32:
            continue
        users = list(node.output(0).get_target_inputs())
        if any(user.get_node().get_type_name() in ("MatMul", "Gather") for user in users):
            half = ops.convert(ops.constant(node.data.astype(np.float16)), "f32").output(0)
            for user in users:
                user.replace_source_output(half)
