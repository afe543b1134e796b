"""One set of rotary frequencies for a whole model, where heads and layers hold the same ones in any order.

Engines turn every key by one table. A head whose table lists the same frequencies in another order keeps its keys by
permuting its rows, at no cost; channels that nothing turns sit at frequency 0; a slot that a head does not fill is 0.
Layout: half-split, slot j pairs channel j with channel j + D / 2.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from kvlatent.model.config import LatentConfig
from kvlatent.model.table import RotaryTable

__all__ = ["SharedTable", "frequency_factors", "share_table"]

BASE = 10_000.0  # every engine's fallback, so an engine that misses the key still has it right
# A frequency of 0 as a factor: finite in bfloat16, also times BASE, and below 1e-12 radians at a million tokens.
_STILL = 2.0**60
_NEIGHBOURS = 4


@dataclass(frozen=True)
class SharedTable:
    """One table for all heads.

    Args:
        frequencies: radians per position, one a slot; 0 where nothing turns.
        channels: by layer, then by key-value head (one list serves all heads of its layer): which channel of the latent
            head goes where, None for a channel of zeros; as long as twice the slots.
        scales: by layer: of the queries of each latent channel, what tables multiply cosine and sine by, squared.
    """

    frequencies: tuple[float, ...]
    channels: tuple[tuple[tuple[int | None, ...], ...], ...]
    scales: tuple[tuple[float, ...], ...]


def share_table(latent: LatentConfig, num_layers: int, slots: int) -> SharedTable | None:
    """One table of so many slots for a model, or None where its heads hold too many different frequencies for that."""
    order = _frequencies(
        latent.tables_at(0)[0], latent.d_qk_at(0)
    )  # so a model with one table keeps its rows
    needed = Counter(order)
    for layer in range(num_layers):
        for table in latent.tables_at(layer):
            for frequency, count in Counter(_frequencies(table, latent.d_qk_at(layer))).items():
                order += [frequency] * (count - needed[frequency])
                needed[frequency] = max(needed[frequency], count)
    if len(order) > slots:
        return None
    frequencies = (*order, *[0.0] * (slots - len(order)))
    channels = tuple(
        tuple(_place(table, latent.d_qk_at(layer), frequencies) for table in latent.tables_at(layer))
        for layer in range(num_layers)
    )
    scales = tuple(_scales(latent.tables_at(layer)[0], latent.d_qk_at(layer)) for layer in range(num_layers))
    return SharedTable(frequencies, channels, scales)


def frequency_factors(frequencies: tuple[float, ...]) -> list[float]:
    """What divides the plain frequencies BASE^(-2j/D): longrope's factors, and llama.cpp's rope_freqs.

    In float32, and of the neighbours the one whose frequency, as transformers computes it, is nearest: an error of one bit
    grows with the position.
    """
    half = len(frequencies)
    plain = BASE ** (torch.arange(0, 2 * half, 2, dtype=torch.int64).float() / (2 * half))
    wanted = torch.tensor(frequencies, dtype=torch.float32)
    still = wanted < 1 / _STILL
    factors = (1 / (wanted.where(~still, 1.0).double() * plain.double())).float()
    tried = [factors]
    for direction in (0.0, torch.inf):
        near = factors
        for _ in range(_NEIGHBOURS):
            near = torch.nextafter(near, torch.tensor(direction))
            tried.append(near)
    errors = torch.stack([(1 / (near * plain) - wanted).abs() for near in tried])
    best = torch.stack(tried).gather(0, errors.argmin(0)[None])[0]
    return best.where(~still, _STILL).tolist()


def _frequencies(table: RotaryTable, d_qk: int) -> list[float]:
    """Of every channel pair of a head, those that pass through last."""
    return [*table.short, *[0.0] * ((d_qk - table.rotary_dim) // 2)]


def _place(table: RotaryTable, d_qk: int, frequencies: tuple[float, ...]) -> tuple[int | None, ...]:
    """The latent channel behind each channel of a head in the shared table."""
    half, passed = len(table.short), (d_qk - table.rotary_dim) // 2
    waiting: dict[float, list[tuple[int, int]]] = {}
    for pair, frequency in enumerate(_frequencies(table, d_qk)):
        first = pair if pair < half else half + pair
        second = pair + half if pair < half else first + passed
        waiting.setdefault(frequency, []).append((first, second))
    taken = [waiting[f].pop(0) if waiting.get(f) else (None, None) for f in frequencies]
    return (*(first for first, _ in taken), *(second for _, second in taken))


def _scales(table: RotaryTable, d_qk: int) -> tuple[float, ...]:
    turned = table.rotary_dim
    return (*[table.attention_factor**2] * turned, *[1.0] * (d_qk - turned))
