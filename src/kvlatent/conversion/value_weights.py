"""The value and output tensors of one latent layer, from the original's: a slice, or factored per key-value head.

Shapes: D model width, d head width, N query heads, K key-value heads, G = N / K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvlatent.model.config import LatentConfig
from kvlatent.selection.paper_rules import product_svd, stride_channels
from kvlatent.selection.statistics import LayerStatistics
from kvlatent.selection.value_bases import best_outputs, gated_metric, metric_root, value_basis

__all__ = ["gated_values", "narrow_values", "take_rows"]


def take_rows(tensor: Tensor, channels: tuple[tuple[int, ...], ...], head_dim: int) -> Tensor:
    """Rows of `tensor` ([H * head_dim, ...]) that survive, per head; each list serves the heads of its group."""
    heads = tensor.unflatten(0, (-1, head_dim))
    groups = heads.shape[0] // len(channels)
    kept = [heads[h][list(channels[h // groups])] for h in range(heads.shape[0])]
    return torch.cat(kept)


def narrow_values(
    source: dict[str, Tensor],
    latent: LatentConfig,
    layer: int,
    num_key_value_heads: int,
    statistics: LayerStatistics | None,
) -> dict[str, Tensor]:
    """New v and o tensors of one layer: a slice, or factored per key-value head."""
    head_dim, d_vo = latent.original_head_dim, latent.d_vo_at(layer)
    w_v, b_v, w_o = source["v_proj.weight"], source.get("v_proj.bias"), source["o_proj.weight"]
    if latent.values == "slice":
        channels = (stride_channels("d_vo", d_vo, head_dim),)
        new = {
            "v_proj.weight": take_rows(w_v, channels, head_dim),
            "o_proj.weight": take_rows(w_o.T, channels, head_dim).T,
        }
        if b_v is not None:
            new["v_proj.bias"] = take_rows(b_v, channels, head_dim)
        return {name: tensor.contiguous() for name, tensor in new.items()}
    if latent.values == "whitened" and statistics is not None:
        new = _whitened_values(source, d_vo, statistics)
    else:
        new = _svd_values(w_v, b_v, w_o, d_vo, num_key_value_heads)
    return {name: tensor.to(w_v).contiguous() for name, tensor in new.items()}


def gated_values(
    source: dict[str, Tensor],
    latent: LatentConfig,
    layer: int,
    num_key_value_heads: int,
    statistics: LayerStatistics | None,
) -> dict[str, Tensor]:
    """New v tensors and the map back to the channels that the output gate multiplies; W_O stays.

    Without statistics values are taken to be those of white inputs, and the gates to be half open and constant.
    """
    head_dim, d_vo = latent.original_head_dim, latent.d_vo_at(layer)
    w_v = source["v_proj.weight"].double().cpu().unflatten(0, (num_key_value_heads, head_dim))  # [K, d, D]
    w_o = source["o_proj.weight"].double().cpu().unflatten(1, (-1, head_dim)).transpose(0, 1)  # [N, D, d]
    groups = len(w_o) // num_key_value_heads
    metric = w_o.transpose(1, 2) @ w_o
    if latent.values == "whitened" and statistics is not None:
        moments, metric = statistics.outputs, gated_metric(metric, statistics.gates)
    else:
        moments = (w_v @ w_v.transpose(1, 2)).repeat_interleave(groups, dim=0)
    if latent.values == "slice":
        kept = list(stride_channels("d_vo", d_vo, head_dim))
        bases = [torch.eye(head_dim, dtype=torch.float64)[kept]] * num_key_value_heads
        lifts = torch.stack(bases).transpose(1, 2).repeat_interleave(groups, dim=0)
    else:
        roots, each = metric_root(metric), moments.split(groups)
        bases = [value_basis(*pair, d_vo) for pair in zip(roots.split(groups), each, strict=True)]
        eye = torch.eye(head_dim, dtype=torch.float64).expand(groups, -1, -1)
        lifts = torch.cat([best_outputs(eye, *pair) for pair in zip(each, bases, strict=True)])
    new = _in_bases(source, bases) | {"v_map": lifts}
    return {name: tensor.to(source["v_proj.weight"]).contiguous() for name, tensor in new.items()}


def _in_bases(source: dict[str, Tensor], bases: list[Tensor]) -> dict[str, Tensor]:
    """W_V and its bias, where there is one, in a basis [d_vo, d] of each key-value head; float64, on the CPU."""
    names = [name for name in ("v_proj.weight", "v_proj.bias") if name in source]
    heads = {name: source[name].double().cpu().unflatten(0, (len(bases), -1)) for name in names}
    return {
        name: torch.cat([basis @ rows for basis, rows in zip(bases, rows_of, strict=True)])
        for name, rows_of in heads.items()
    }


def _svd_values(
    w_v: Tensor, b_v: Tensor | None, w_o: Tensor, d_vo: int, num_key_value_heads: int
) -> dict[str, Tensor]:
    """Values and outputs by the SVD of their product, per key-value head."""
    values, biases, outputs = [], [], []
    head_dim = w_v.shape[0] // num_key_value_heads
    # [D, N * d] -> per key-value head [G * D, d], the output blocks of its query heads stacked.
    blocks = w_o.unflatten(1, (num_key_value_heads, -1, head_dim)).permute(1, 2, 0, 3).flatten(1, 2)
    for head, rows in enumerate(w_v.unflatten(0, (num_key_value_heads, head_dim))):
        bias = None if b_v is None else b_v.unflatten(0, (num_key_value_heads, head_dim))[head]
        value, new_bias, output = product_svd(rows, bias, blocks[head], d_vo)
        values.append(value)
        biases.append(new_bias)
        outputs.append(output.unflatten(0, (-1, w_o.shape[0])))
    new = {
        "v_proj.weight": torch.cat(values),
        "o_proj.weight": torch.cat(outputs).permute(1, 0, 2).flatten(1),
    }
    return new if b_v is None else new | {"v_proj.bias": torch.cat(biases)}


def _whitened_values(source: dict[str, Tensor], d_vo: int, statistics: LayerStatistics) -> dict[str, Tensor]:
    """Values and outputs by the second moments of what attention averages, per key-value head.

    Where the architecture has an output bias, the mean goes there and the moments are centred.
    """
    moments, means = statistics.outputs, statistics.output_means
    if "o_proj.bias" in source:
        moments = moments - means[:, :, None] * means[:, None]
    heads, head_dim = means.shape
    w_o = source["o_proj.weight"].double().cpu().unflatten(1, (heads, head_dim)).transpose(0, 1)  # [N, D, d]
    w_v = source["v_proj.weight"].double().cpu().unflatten(0, (-1, head_dim))  # [K, d, D]
    groups = heads // len(w_v)
    bases = [value_basis(*pair, d_vo) for pair in zip(w_o.split(groups), moments.split(groups), strict=True)]
    spread = [basis for basis in bases for _ in range(groups)]
    outputs = [best_outputs(w_o[h, None], moments[h, None], spread[h])[0] for h in range(heads)]
    new = _in_bases(source, bases) | {"o_proj.weight": torch.cat(outputs, dim=1)}
    if "o_proj.bias" in source:
        left = sum(w_o[h] @ means[h] - outputs[h] @ (spread[h] @ means[h]) for h in range(heads))
        new["o_proj.bias"] = source["o_proj.bias"].double().cpu() + left
    return new
