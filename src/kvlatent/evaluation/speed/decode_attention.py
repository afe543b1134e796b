"""One layer's attention when a token is added, timed on a CPU beside a plain read of the same bytes.

Adding a token reads the cache once, so its time should be that of the read, and shrink as the bytes do. Every width is
measured with every way in the same rounds (`variants.interleaved`), and ratios are taken inside each round. As between
the layers of a model, the cache comes from memory: as many tensors as no processor's cache holds are read by turns.

Shapes: B batch, S cached positions, N query heads, K key-value heads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer

from kvlatent.engines.cpu_decode import IMPLEMENTATION
from kvlatent.evaluation.speed.variants import interleaved
from kvlatent.model.grouped_attention import grouped_attention
from kvlatent.model.growing_cache import GrowingLayer

__all__ = [
    "WAYS",
    "DecodeRow",
    "WriteRow",
    "decode_lines",
    "measure_cache_writes",
    "measure_decode_attention",
    "write_lines",
]

Layer = tuple[Tensor, Tensor, Tensor]
"""Query [B, N, 1, d_qk], keys [B, K, S, d_qk], values [B, K, S, d_vo]."""

_COLD_BYTES = 256 * 2**20
_READ = "read"


def _read(module: Any, layer: Layer) -> None:
    """A plain read: torch's sum, over whole words whatever the type."""
    for tensor in layer[1:]:
        tensor.view(torch.float32).sum()


def _interface(name: str, module: Any, layer: Layer) -> None:
    AttentionInterface()[name](module, *layer, None, scaling=module.scaling)


def _products(module: Any, layer: Layer) -> None:
    grouped_attention(module, *layer, None, scaling=module.scaling)


WAYS: dict[str, Callable[[Any, Layer], None]] = {
    "kernel": partial(_interface, IMPLEMENTATION),
    "products": _products,
    "sdpa": partial(_interface, "sdpa"),
}
"""The compiled kernel, the grouped products that need none, and transformers' own."""


@dataclass(frozen=True)
class WriteRow:
    """One token written into a layer's cache.

    Args:
        batch, context, dtype, d_qk, d_vo: what was measured.
        joined_ms, in_place_ms: median time with transformers' dynamic layer, and with the one that grows.
    """

    batch: int
    context: int
    dtype: str
    d_qk: int
    d_vo: int
    joined_ms: float
    in_place_ms: float


@dataclass(frozen=True)
class DecodeRow:
    """One width measured one way.

    Args:
        batch, context, dtype, d_qk, d_vo, way: what was measured.
        cache_bytes: keys and values of the layer.
        ms, read_ms: median time of a call, and of a plain read of the same bytes.
        of_read: median of the rounds' ratios of the two.
        byte_ratio, time_ratio: against the first widths, measured the same way; the latter the median of the rounds.
        gigabytes_per_s: `cache_bytes` in that time.
    """

    batch: int
    context: int
    dtype: str
    d_qk: int
    d_vo: int
    way: str
    cache_bytes: int
    ms: float
    read_ms: float
    of_read: float
    byte_ratio: float
    time_ratio: float
    gigabytes_per_s: float


@torch.no_grad()
def measure_decode_attention(
    batch: int,
    context: int,
    widths: Sequence[tuple[int, int]],
    *,
    heads: int = 32,
    key_value_heads: int = 8,
    dtype: str = "bfloat16",
    ways: Sequence[str] = ("kernel", "products"),
    repeats: int = 9,
    seed: int = 0,
) -> list[DecodeRow]:
    """Time one layer's attention for one token.

    Args:
        batch, context: sequences, and cached tokens of each.
        widths: (d_qk, d_vo); the first are what the others are compared with.
        heads, key_value_heads: N and K.
        dtype: of queries, keys and values.
        ways: keys of `WAYS`.
        repeats: rounds.
        seed: of the random numbers.

    Raises:
        ValueError: an unknown way.
    """
    if unknown := [way for way in ways if way not in WAYS]:
        raise ValueError(f"unknown way {unknown[0]!r}; choose from {', '.join(WAYS)}")
    generator = torch.Generator().manual_seed(seed)
    measures: dict[tuple[tuple[int, int], str], Callable[[], float]] = {}
    sizes: dict[tuple[int, int], int] = {}
    for d_qk, d_vo in widths:
        shapes = ((heads, 1, d_qk), (key_value_heads, context, d_qk), (key_value_heads, context, d_vo))
        size = batch * key_value_heads * context * (d_qk + d_vo) * getattr(torch, dtype).itemsize
        layers = [
            tuple(
                torch.randn(batch, *shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes
            )
            for _ in range(max(1, -(-_COLD_BYTES // size)))
        ]
        sizes[d_qk, d_vo] = size
        module = SimpleNamespace(
            training=False, is_causal=True, num_key_value_groups=heads // key_value_heads, scaling=d_qk**-0.5
        )
        for way in (_READ, *ways):
            call = _read if way == _READ else WAYS[way]
            measures[(d_qk, d_vo), way] = partial(_seconds, call, module, layers)
    for measure in measures.values():
        measure()
    times = interleaved(measures, repeats)
    return [
        _row(times, sizes, width, way, widths[0], (batch, context, dtype)) for width in widths for way in ways
    ]


def _seconds(call: Callable[[Any, Any], None], module: Any, layers: Sequence[Any]) -> float:
    """Of one call, the mean over all layers."""
    start = time.perf_counter()
    for layer in layers:
        call(module, layer)
    return (time.perf_counter() - start) / len(layers)


def _row(
    times: dict[Any, list[float]],
    sizes: dict[tuple[int, int], int],
    width: tuple[int, int],
    way: str,
    first: tuple[int, int],
    what: tuple[int, int, str],
) -> DecodeRow:
    found, read, base = times[width, way], times[width, _READ], times[first, way]
    return DecodeRow(
        *what,
        *width,
        way,
        cache_bytes=sizes[width],
        ms=1e3 * median(found),
        read_ms=1e3 * median(read),
        of_read=median(a / b for a, b in zip(found, read, strict=True)),
        byte_ratio=sizes[width] / sizes[first],
        time_ratio=median(a / b for a, b in zip(found, base, strict=True)),
        gigabytes_per_s=sizes[width] / median(found) / 1e9,
    )


@torch.no_grad()
def measure_cache_writes(
    batch: int,
    context: int,
    widths: Sequence[tuple[int, int]],
    *,
    key_value_heads: int = 8,
    dtype: str = "bfloat16",
    repeats: int = 9,
) -> list[WriteRow]:
    """Time a token's write into a cache of `context` tokens; arguments as in `measure_decode_attention`."""
    rows = []
    for width in widths:
        kinds = {"joined": DynamicLayer(), "in place": GrowingLayer()}
        held, new = (
            [torch.zeros(batch, key_value_heads, n, w, dtype=getattr(torch, dtype)) for w in width]
            for n in (context, 1)
        )
        for layer in kinds.values():
            layer.update(*held)
        times = interleaved({name: partial(_write, layer, new) for name, layer in kinds.items()}, repeats)
        joined, in_place = (1e3 * median(times[name]) for name in kinds)
        rows.append(WriteRow(batch, context, dtype, *width, joined, in_place))
    return rows


def _write(layer: DynamicLayer, new: Sequence[Tensor]) -> float:
    """Seconds."""
    start = time.perf_counter()
    layer.update(*new)
    return time.perf_counter() - start


def write_lines(rows: Sequence[WriteRow]) -> list[str]:
    """A line a row."""
    return [
        f"a token into {row.d_qk}/{row.d_vo} x {row.context:,}, batch {row.batch}, {row.dtype}: {row.joined_ms:.3f} ms "
        f"joined, {row.in_place_ms:.3f} ms in place"
        for row in rows
    ]


def decode_lines(rows: Sequence[DecodeRow]) -> list[str]:
    """A table of rows; the two last columns are what is asked of them: 1.15 and 1.5 at most."""
    lines = [
        (
            f"{'batch':>5} {'context':>8} {'type':>9} {'widths':>8} {'way':>9} {'MB':>7} {'ms':>9} {'read ms':>8} {'GB/s':>6} "
            f"{'time':>6} {'bytes':>6} {'time/bytes':>10} {'of read':>8}"
        )
    ]
    for row in rows:
        one = asdict(row)
        lines.append(
            "{batch:>5} {context:>8,} {dtype:>9} {w:>8} {way:>9} {mb:>7.1f} {ms:>9.3f} {read_ms:>8.3f} "
            "{gigabytes_per_s:>6.1f} {time_ratio:>6.3f} {byte_ratio:>6.3f} {excess:>10.2f} {of_read:>8.2f}".format(
                **one,
                w=f"{row.d_qk}/{row.d_vo}",
                mb=row.cache_bytes / 1e6,
                excess=row.time_ratio / row.byte_ratio,
            )
        )
    return lines
