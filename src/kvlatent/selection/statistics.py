"""What a text says about the attention of one model: the statistics that selection, factoring and planning need.

One pass collects them (`calibrate.calibrate`); they serve any widths. They carry the text they came from, because the
refit of the outputs and the alignment of the attention look at it again.

Shapes: L layers, N query heads, K key-value heads, d head width, P = d / 2 channel pairs, T positions of a block.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvlatent.jobs.atomic import write_atomically
from kvlatent.jobs.fingerprints import model_fingerprint
from kvlatent.model.finite import first_not_finite

__all__ = ["LayerStatistics", "Statistics"]

_FORMAT = "2"


@dataclass(frozen=True)
class LayerStatistics:
    """Moments of one layer, in float64.

    Args:
        output_gram: [N, P, P], E over sampled queries t of <W_O u_i, W_O u_j> with u_j(t) = sum_s p(t,s) m_j(t,s) v_s,
            where m_j is what pair j adds to the logit, centred over s under the attention weights p(t, .): to first
            order, the sum over the dropped block is the squared error of the head's share of the attention output.
        outputs: [N, d, d], second moment of the attention-averaged values y of each query head.
        output_means: [N, d], their mean.
        query_energy: [N, P], E |q_j|^2 per channel pair; key_energy: [K, P], E |k_j|^2.
        value_errors: [d + 1], expected squared error of the attention output when every head keeps r value channels
            (factored under `outputs`), for r = 0 ... d.
        output_energy: [], E |o - E o|^2 of the attention output o, per token: what varies, since a constant part, however
            large, costs nothing to keep.
        head_energy: [N], the same of each query head's share of the output alone.
        gates: [N, d, d], second moment of the output gates (sigmoids); [N, 0, 0] without. `outputs` are then those before
            the gate.
        unrotated_queries: [N, u, u], second moment of the u query channels that no rotation touches; unrotated_keys:
            [N, u, u], that of the keys' channels, centred under the attention weights that `output_gram` has.
    """

    output_gram: Tensor
    outputs: Tensor
    output_means: Tensor
    query_energy: Tensor
    key_energy: Tensor
    value_errors: Tensor
    output_energy: Tensor
    head_energy: Tensor
    gates: Tensor
    unrotated_queries: Tensor
    unrotated_keys: Tensor


@dataclass(frozen=True)
class Statistics:
    """Moments of every layer, and the text behind them.

    Args:
        layers: one `LayerStatistics` a layer.
        input_ids, position_ids: [blocks, T] int32, the calibration text.
        fingerprint: of the model, see `model_fingerprint`.
        num_key_value_heads, head_dim: of the model.
        recall_blocks: how many of the blocks were made to ask for recall (`kvlatent.text.recall_blocks`).
    """

    layers: tuple[LayerStatistics, ...]
    input_ids: Tensor
    position_ids: Tensor
    fingerprint: str
    num_key_value_heads: int
    head_dim: int
    recall_blocks: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the calibration text."""
        return self.input_ids.numel()

    @property
    def num_heads(self) -> int:
        """Query heads of the model."""
        return self.layers[0].output_gram.shape[0]

    def check(self, model: Any) -> None:
        """Raise `ValueError` unless the statistics were collected from `model`."""
        self.check_fingerprint(model_fingerprint(model), model.dtype)

    def check_fingerprint(self, fingerprint: str, dtype: torch.dtype) -> None:
        """As `check`, of a model with this fingerprint in that dtype."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the statistics are of another model, or of this one in another dtype than {str(dtype)[6:]}: they "
                f"have fingerprint {self.fingerprint[:12]}, this model has {fingerprint[:12]}; calibrate this model, or "
                "give the checkpoint and the dtype that they were made from"
            )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write one safetensors file; it appears whole or not at all.

        Raises:
            FileExistsError: `path` exists and `overwrite` is False.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; choose another name or pass overwrite (--overwrite)")
        tensors = {"input_ids": self.input_ids.contiguous(), "position_ids": self.position_ids.contiguous()}
        for index, layer in enumerate(self.layers):
            for field in fields(layer):
                tensors[f"layers.{index}.{field.name}"] = getattr(layer, field.name).contiguous()
        about = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "sizes": json.dumps([self.num_key_value_heads, self.head_dim, len(self.layers)]),
            "recall_blocks": str(self.recall_blocks),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=about))

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote; tensors of earlier versions that nothing reads any more ("gram") are left out.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a file of statistics, or a damaged one.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no statistics at {path}; make them with `kvlatent calibrate`")
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise _damaged(path, error) from error
        if about.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a file of statistics; make one with `kvlatent calibrate`")
        if (broken := first_not_finite(tensors.items())) is not None:
            raise _damaged(path, ValueError(f"{broken} holds NaN or infinity"))
        try:
            heads, head_dim, count = json.loads(about["sizes"])
            layers = tuple(_layer(tensors, f"layers.{i}.") for i in range(count))
            text = tensors["input_ids"], tensors["position_ids"]
            recall = int(about.get("recall_blocks", 0))  # earlier versions made none
            return cls(layers, *text, about["fingerprint"], heads, head_dim, recall)
        except (KeyError, ValueError) as error:
            raise _damaged(path, error) from error


_LATER = (
    "gates",
    "unrotated_queries",
    "unrotated_keys",
)  # than the first files of this format, which lack them


def _layer(tensors: dict[str, Tensor], prefix: str) -> LayerStatistics:
    """What the file holds of a layer."""
    held = {f.name: tensors[prefix + f.name] for f in fields(LayerStatistics) if f.name not in _LATER}
    nothing = held["head_energy"].new_zeros(len(held["head_energy"]), 0, 0)
    return LayerStatistics(**held, **{name: tensors.get(prefix + name, nothing) for name in _LATER})


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged ({error}); calibrate the model again")
