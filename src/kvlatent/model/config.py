"""What the artifact is: how wide keys and values are, and which rotary table turns the keys.

`LatentConfig` is saved inside `config.json` as the dict `kv_latent`, the single source of truth of a latent
checkpoint. This module needs no torch: tables and index lists are Python tuples, tensors are built from them at
the first forward (a buffer would come back as uninitialised memory from the meta-device load).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvlatent.model.table import RotaryTable
from kvlatent.model.widths import Widths, width_per_layer

__all__ = ["FORMAT_VERSION", "TABLE_SCOPES", "LatentConfig", "table_scope"]

FORMAT_VERSION = 1
TABLE_SCOPES = ("head", "layer", "model")
"""Who may share a rotary table: one a key-value head, one a layer, one for the model."""
_ALLOWED = {
    "scale": ("original", "d_qk"),
    "qk_norm": ("none", "full", "sliced"),
    "unrotated": ("selected", "factored"),
}


Tables = tuple[tuple[RotaryTable, ...], ...]
Channels = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class LatentConfig:
    """Widths, rotary tables and the record of what was kept.

    Args:
        d_qk: cached key width per head: one number, or one per layer.
        d_vo: cached value width per head: one number, or one per layer.
        tables: rotary tables by layer, then by key-value head. One layer entry serves every layer, one head entry
            every head of its layer: so one table for the model, per layer, or per key-value head.
        channels: the original key channels that were kept, in order, with the same nesting as `tables`. A record
            for most families; with a QK-norm at full width the forward pass gathers them.
        keys: how key channels were chosen ("full", or one of `choose.Choices.keys`).
        values: which basis of values was kept ("full", or one of `choose.Choices.values`).
        frequencies: how the tables were made ("own", "frequency_aware").
        scale: softmax scale: "original" (folded into W_Q) or "d_qk" (the paper's).
        qk_norm: "none", "full" (normalise at full width, then select) or "sliced".
        layers: numbers of the layers that have attention, where not all have; lists by layer have an entry for each of
            these. None: all.
        unrotated: original key channels that no rotation touches are "selected", or "factored": in narrow layers the channels
            behind the rotated ones are then linear maps of all of them, numbered from the first on.
        original_head_dim: head width of the source model.
        original_model_type: `model_type` of the source model.
        version: of this format.

    Raises:
        ValueError: a width is not a positive integer or exceeds the head, d_qk is odd, the number of frequencies
            exceeds d_qk / 2, or the format is newer than this code.
    """

    d_qk: int | tuple[int, ...]
    d_vo: int | tuple[int, ...]
    tables: Tables
    channels: Channels
    original_head_dim: int
    original_model_type: str
    keys: str = "full"
    values: str = "full"
    frequencies: str = "own"
    scale: str = "original"
    qk_norm: str = "none"
    layers: tuple[int, ...] | None = None
    unrotated: str = "selected"
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _check_version(self.version)
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is one of {', '.join(allowed)}: got {getattr(self, name)!r}; convert the model again"
                )
        for name, width in Widths.check(self.d_qk, self.d_vo, self.original_head_dim)._asdict().items():
            object.__setattr__(self, name, width)  # a list becomes a tuple
        if not len(self.tables) == len(self.channels) > 0:
            raise ValueError(
                f"rotary tables and kept channels must be listed for the same layers: got {len(self.tables)} and "
                f"{len(self.channels)}; the config was edited by hand or is damaged"
            )

    @property
    def widths(self) -> Widths:
        """Key and value width."""
        return Widths(self.d_qk, self.d_vo)

    def widths_at(self, layer: int) -> tuple[int, int]:
        """(d_qk, d_vo) of `layer`."""
        return self.d_qk_at(layer), self.d_vo_at(layer)

    def _place(self, layer: int) -> int:
        """Where lists by layer have their entry for `layer`."""
        return layer if self.layers is None else self.layers.index(layer)

    def d_qk_at(self, layer: int) -> int:
        """Key width of `layer`."""
        return self.d_qk if isinstance(self.d_qk, int) else self.d_qk[self._place(layer)]

    def d_vo_at(self, layer: int) -> int:
        """Value width of `layer`."""
        return self.d_vo if isinstance(self.d_vo, int) else self.d_vo[self._place(layer)]

    def tables_at(self, layer: int) -> tuple[RotaryTable, ...]:
        """Rotary tables of `layer`: one for all its heads, or one per key-value head."""
        return self.tables[self._place(layer) if len(self.tables) > 1 else 0]

    def channels_at(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """Kept original key channels of `layer`: one list for all its heads, or one per key-value head."""
        return self.channels[self._place(layer) if len(self.channels) > 1 else 0]

    @property
    def one_table(self) -> bool:
        """True when the whole model shares one rotary table."""
        return len(self.tables) == 1 and len(self.tables[0]) == 1

    @property
    def max_d_qk(self) -> int:
        """Largest key width over the layers."""
        return max(width_per_layer(self.d_qk))

    @property
    def max_d_vo(self) -> int:
        """Largest value width over the layers."""
        return max(width_per_layer(self.d_vo))

    def cache_bytes_per_token(self, num_layers: int, num_key_value_heads: int, element_size: int) -> int:
        """Bytes to store one token of one sequence: sum over layers of kv_heads x (d_qk + d_vo) x element size.

        Args:
            num_layers: how many have attention.
        """
        channels = sum(sum(widths) for widths in self.widths.per_layer(num_layers))
        return channels * num_key_value_heads * element_size

    def check_model(self, attention_layers: Sequence[int], num_key_value_heads: int) -> None:
        """Raise `ValueError` unless lists per layer and per head fit a model with attention in these layers, and its heads."""
        num_layers = len(attention_layers)
        if (self.layers or tuple(range(num_layers))) != tuple(attention_layers):
            raise ValueError(
                f"the model has attention in the layers {list(attention_layers)} but kv_latent was made for "
                f"{'all' if self.layers is None else list(self.layers)}; convert the model again"
            )
        self.widths.check_layers(num_layers)
        if len(self.tables) not in (1, num_layers):
            raise ValueError(
                f"rotary tables are listed once or once per layer: got {len(self.tables)} for {num_layers} layers; "
                "convert the model again"
            )
        for layer in attention_layers:
            tables, channels = self.tables_at(layer), self.channels_at(layer)
            if len(tables) not in (1, num_key_value_heads) or len(channels) != len(tables):
                raise ValueError(
                    f"layer {layer} needs 1 or {num_key_value_heads} rotary tables and as many channel lists: got "
                    f"{len(tables)} and {len(channels)}; convert the model again"
                )
            kinds = sorted({(len(t.short), t.switch or 0, t.attention_factor) for t in tables})
            if len(kinds) > 1:
                raise ValueError(
                    f"the heads of layer {layer} must share table length, switch length and attention factor: got "
                    f"{kinds[0]} and {kinds[1]}; convert the model again"
                )
            for table, kept in zip(tables, channels, strict=True):
                if table.rotary_dim > self.d_qk_at(layer) or len(kept) != self.d_qk_at(layer):
                    raise ValueError(
                        f"layer {layer} has d_qk={self.d_qk_at(layer)} but a rotary table for {table.rotary_dim} "
                        f"channels and {len(kept)} kept channels; convert the model again"
                    )
                if len(set(kept)) < len(kept) or not all(0 <= c < self.original_head_dim for c in kept):
                    raise ValueError(
                        f"layer {layer} must keep different channels in [0, {self.original_head_dim}): got "
                        f"{min(kept)} to {max(kept)}, {len(set(kept))} different; convert the model again"
                    )

    def to_dict(self) -> dict[str, Any]:
        """The JSON dict saved as `kv_latent`."""
        return {
            "version": self.version,
            "widths": self.widths.to_dict(),
            "tables": [[table.to_dict() for table in layer] for layer in self.tables],
            "selection": {
                "keys": self.keys,
                "values": self.values,
                "frequencies": self.frequencies,
                "scale": self.scale,
                "qk_norm": self.qk_norm,
                **({} if self.unrotated == "selected" else {"unrotated": self.unrotated}),
                "channels": [[list(kept) for kept in layer] for layer in self.channels],
            },
            **({} if self.layers is None else {"layers": list(self.layers)}),
            "original_head_dim": self.original_head_dim,
            "original_model_type": self.original_model_type,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LatentConfig:
        """Inverse of `to_dict`; raises `ValueError` when a field is missing or of another type, or the format is newer."""
        _check_version(data.get("version") if isinstance(data, dict) else None)
        try:
            _Saved.model_validate(data)
            widths, selection = data["widths"], data["selection"]
            return cls(
                d_qk=widths["d_qk"],
                d_vo=widths["d_vo"],
                tables=tuple(tuple(RotaryTable.from_dict(t) for t in layer) for layer in data["tables"]),
                channels=tuple(tuple(tuple(kept) for kept in layer) for layer in selection["channels"]),
                original_head_dim=data["original_head_dim"],
                original_model_type=data["original_model_type"],
                keys=selection["keys"],
                values=selection["values"],
                frequencies=selection["frequencies"],
                scale=selection["scale"],
                qk_norm=selection["qk_norm"],
                unrotated=selection.get("unrotated", "selected"),
                layers=None if data.get("layers") is None else tuple(data["layers"]),
                version=data["version"],
            )
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(
                f"kv_latent in config.json is damaged ({place}: {first['msg']}); convert the model again"
            ) from error


def _check_version(version: Any) -> None:
    """Raise `ValueError` for a format of a later kvlatent, whatever else has changed in it."""
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"the checkpoint has kv_latent version {version} but this kvlatent reads up to {FORMAT_VERSION}; update kvlatent"
        )


class _Strict(BaseModel):
    """Types of what is saved; what a value may be is checked where it is used."""

    model_config = ConfigDict(strict=True)


class _SavedTable(_Strict):
    short: list[float]
    long: list[float] | None = None
    switch: int | None = None
    attention_factor: float = 1.0


class _SavedSelection(_Strict):
    keys: str
    values: str
    frequencies: str
    scale: str
    qk_norm: str
    unrotated: str = "selected"
    channels: list[list[list[int]]]


class _SavedWidths(_Strict):
    d_qk: Any
    d_vo: Any


class _Saved(_Strict):
    version: int
    widths: _SavedWidths
    tables: list[list[_SavedTable]]
    selection: _SavedSelection
    layers: Annotated[list[int], Field(min_length=1)] | None = None
    original_head_dim: Annotated[int, Field(gt=0)]
    original_model_type: str


def table_scope(config: LatentConfig) -> str:
    """Who shares a rotary table in `config`: "head", "layer" or "model"."""
    if any(len(layer) > 1 for layer in config.tables):
        return "head"
    return "layer" if len(set(config.tables)) > 1 else "model"
