"""In which types engines keep keys and values: bytes with their scales, the widths that each type takes, and where.

Width and type multiply: 64 of 128 channels in fp8 are a quarter of the bytes of 128 in bfloat16. Not every pair exists,
though. A type stores blocks of 16 or 32 numbers, or has kernels for some widths only, and that depends on the backend.
Names are the engine's own, as its option takes them (`--kv-cache-dtype`, `--cache-type-k`); versions as in `facts`. What
is not listed is not known here, which does not mean that the engine lacks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from kvlatent.model.widths import Width, width_per_layer

__all__ = ["KVDtype", "check_kv_dtype", "kv_bytes_by_layer", "kv_dtype_named", "kv_dtypes_of"]

_POWERS_OF_TWO = (16, 32, 64, 128, 256, 512)
_MULTIPLES_OF_64 = tuple(range(64, 513, 64))
_SHORT = {"bf16": "bfloat16", "int4": "int4_per_token_head"}
_CUDA_KERNELS = (40, 64, 72, 80, 96, 112, 128, 256, 512)


@dataclass(frozen=True)
class KVDtype:
    """One type of a cache, and the widths that an engine takes in it.

    Args:
        name: as the engine's option takes it.
        key_bits, value_bits: of one stored number, the scales that a block of numbers shares included.
        key_scale, value_scale: bytes of the scales of one token and head, where they are not shared by blocks.
        multiple: widths are multiples of this.
        only: the widths that are taken; empty: all that the engine takes.
        rule: what `multiple` or `only` say, in words.
        edge_layers: so many layers at either end stay in bfloat16.
        ran: it was run at some width; else the engine's source was read.
        note: what else holds, except at the widths of `note_free`.
    """

    name: str
    key_bits: float
    value_bits: float
    key_scale: int = 0
    value_scale: int = 0
    multiple: int = 1
    only: tuple[int, ...] = ()
    rule: str = ""
    edge_layers: int = 0
    ran: bool = False
    note: str = ""
    note_free: tuple[int, ...] = ()

    @property
    def is_lossless(self) -> bool:
        """Whether it has the precision that models are measured in, or more: 16 bits."""
        return min(self.key_bits, self.value_bits) >= 16

    def takes(self, width: int) -> bool:
        """Whether keys or values may have this width, in channels."""
        return width % self.multiple == 0 and (not self.only or width in self.only)

    def note_at(self, *widths: int) -> str:
        """What users should know of these widths; "" for nothing."""
        return "" if all(width in self.note_free for width in widths) else self.note

    def token_bytes(self, d_qk: int, d_vo: int) -> float:
        """Bytes of one token and one key-value head: a key, a value and their scales."""
        return (d_qk * self.key_bits + d_vo * self.value_bits) / 8 + self.key_scale + self.value_scale


def _ggml(*, cuda: bool) -> tuple[KVDtype, ...]:
    """Types of llama.cpp: q8_0 has 34 bytes for 32 numbers, q5_1 24, q5_0 22, q4_1 20, q4_0 and iq4_nl 18.

    On CUDA a quantised cache needs a flash-attention kernel of that width; in 16 bits other widths take the plain path.
    """
    plain = KVDtype("f16", 16, 16, ran=not cuda)
    if cuda:
        note = "no CUDA flash-attention kernel at this width, so the plain path"
        plain = replace(plain, note=note, note_free=_CUDA_KERNELS)
    blocks = {"q8_0": 34, "q5_1": 24, "q5_0": 22, "q4_1": 20, "q4_0": 18, "iq4_nl": 18}
    quantised = (
        KVDtype(
            name,
            size * 8 / 32,
            size * 8 / 32,
            multiple=32,
            only=(64, 128, 256) if cuda else (),
            rule="the widths of its CUDA kernels, 64, 128 and 256"
            if cuda
            else "multiples of its block of 32",
            ran=name == "q8_0" and not cuda,
            note="not rotated before it is quantised, as llama.cpp rotates multiples of 64 only",
            note_free=_MULTIPLES_OF_64,
        )
        for name, size in blocks.items()
    )
    return (plain, replace(plain, name="f32", key_bits=32, value_bits=32), *quantised)


def _vllm_cuda(nvfp4: tuple[int, ...], rule: str) -> tuple[KVDtype, ...]:
    """Types of vLLM on CUDA; of nvfp4 one fp8 scale for 16 numbers, of int4 one float32 for a key and for a value.

    Keys of turboquant bear a norm of 2 bytes (fp8 keys none), its values a scale and a zero of 2 bytes each.
    """
    int4 = KVDtype("int4_per_token_head", 4, 4, 4, 4, only=_POWERS_OF_TWO, rule="powers of two")
    turboquant = replace(
        int4, value_scale=4, edge_layers=2, note="the first and the last two layers stay bf16"
    )
    return (
        KVDtype("bfloat16", 16, 16),
        KVDtype("fp8", 8, 8),
        int4,
        KVDtype("nvfp4", 4.5, 4.5, only=nvfp4, rule=rule),
        replace(turboquant, name="turboquant_k8v4", key_bits=8, key_scale=0),
        replace(turboquant, name="turboquant_4bit_nc", key_scale=2),
        replace(turboquant, name="turboquant_3bit_nc", key_bits=3, value_bits=3, key_scale=2),
    )


_BFLOAT16 = KVDtype("bfloat16", 16, 16, ran=True)
_FLOAT32 = KVDtype("float32", 32, 32, ran=True)
_OWN = (
    _BFLOAT16,
    _FLOAT32,
    KVDtype(
        "fp8",
        8,
        8,
        ran=True,
        note="QuantizedCache of transformers: full attention only, computed in the model's dtype",
    ),
)
# Read off the cache that it compiles, of blocks of 32 tokens: each channel of a block's keys has a scale and a zero, 8 bytes
# together, and each token's value has the same.
_OPENVINO = (
    replace(_BFLOAT16, name="bf16"),
    replace(_BFLOAT16, name="f16"),  # what an export asks for
    replace(_FLOAT32, name="f32"),
    KVDtype("u8", 8 + 8 * 8 / 32, 8, value_scale=8, ran=True),
    KVDtype("u4", 4 + 8 * 8 / 32, 4, value_scale=8),
)

_KV_DTYPES: dict[str, dict[str, tuple[KVDtype, ...]]] = {
    "transformers": {"any": _OWN},
    "transformers-stock": {"any": _OWN},
    "vllm": {
        "cuda": _vllm_cuda((128, 256, 512), "widths 128, 256 and 512 (64 on --backend sm100 only)"),
        "sm100": _vllm_cuda((64, 128, 256, 512), "widths 64, 128, 256 and 512"),
        "cpu": (_BFLOAT16, KVDtype("fp8", 8, 8, multiple=32, rule="multiples of 32")),
    },
    "sglang": {"cuda": (KVDtype("bfloat16", 16, 16),)},
    "llama.cpp": {"cpu": _ggml(cuda=False), "cuda": _ggml(cuda=True)},
    "llama.cpp-step35": {"cpu": _ggml(cuda=False)},
    "openvino": {"cpu": _OPENVINO},
    "mlx": {"cpu": (_BFLOAT16,)},
}
"""By engine and backend, the first of each by default; the first type is the one without loss."""


def kv_dtypes_of(engine: str | None, backend: str | None = None) -> tuple[str, tuple[KVDtype, ...]]:
    """The backend, and the types of an engine's cache on it.

    Args:
        engine: a key of `facts.ENGINES`; None is kvlatent's own runtime, on transformers.
        backend: what the engine runs on; left out, the engine's first.

    Raises:
        ValueError: the engine has no such backend; the sentence lists those that it has.
    """
    by_backend = _KV_DTYPES[engine or "transformers"]
    backend = backend or next(iter(by_backend))
    if backend not in by_backend and "any" in by_backend:
        raise ValueError(
            f"engine {engine or 'transformers'} keeps its cache alike on all backends: got --backend {backend}; leave it out, "
            "or name another --engine"
        )
    if backend not in by_backend:
        raise ValueError(
            f"engine {engine or 'transformers'} is known on {_listed(list(by_backend))}: got --backend {backend}; "
            f"try --backend {next(iter(by_backend))}"
        )
    return backend, by_backend[backend]


def kv_dtype_named(name: str, engine: str | None, backend: str | None = None) -> KVDtype:
    """The type of that name; `bf16` and `int4` stand for what the engine calls them.

    Raises:
        ValueError: the engine has none of that name on this backend; the sentence lists near matches and the known ones.
    """
    backend, known = kv_dtypes_of(engine, backend)
    by_name = {dtype.name: dtype for dtype in known}
    found = by_name.get(name) or by_name.get(_SHORT.get(name, name))
    if found is not None:
        return found
    near = get_close_matches(name.lower(), by_name, n=2)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"{_place(engine, backend)} has no KV dtype {name!r}; {hint}choose one of {', '.join(by_name)}"
    )


def check_kv_dtype(
    name: str, engine: str | None, d_qk: Width, d_vo: Width, backend: str | None = None
) -> KVDtype:
    """The type of that name, once the engine is known to keep these widths in it.

    Args:
        name: of the type, see `kv_dtype_named`.
        engine, backend: see `kv_dtypes_of`.
        d_qk, d_vo: widths in channels, one number or one per layer.

    Raises:
        ValueError: an unknown type or backend, or a width that the type does not take; the sentence says which and
            names the nearest ones and the narrowest type that takes it.
    """
    dtype = kv_dtype_named(name, engine, backend)
    sides = (("d_qk", width_per_layer(d_qk)), ("d_vo", width_per_layer(d_vo)))
    refused = [(side, width) for side, widths in sides for width in widths if not dtype.takes(width)]
    if refused:
        raise ValueError(_refusal(dtype, engine, backend, *refused[0]))
    return dtype


def _refusal(dtype: KVDtype, engine: str | None, backend: str | None, side: str, width: int) -> str:
    """Why a width cannot be kept in a type, and what can: the widths on either side, the narrowest type."""
    backend, known = kv_dtypes_of(engine, backend)
    taken = [other for other in range(8, 513, 8) if dtype.takes(other)]
    near = [*[one for one in taken if one < width][-1:], *[one for one in taken if one > width][:1]]
    steps = [f"{_listed([str(one) for one in near], 'or')} channels"]
    fitting = [other for other in known if other.takes(width)]
    if fitting:
        steps.append(f"--kv-dtype {min(fitting, key=lambda other: other.token_bytes(width, width)).name}")
    return (
        f"{_place(engine, backend)} takes {dtype.rule} in {dtype.name}: got {side}={width}; "
        f"try {', or '.join(steps)}"
    )


def kv_bytes_by_layer(
    dtype: KVDtype, d_qk: Width, d_vo: Width, num_layers: int, num_key_value_heads: int
) -> tuple[float, ...]:
    """Bytes to store one token of one sequence in each layer, scales included.

    Args:
        dtype: of the cache.
        d_qk, d_vo: widths in channels, one number or one per layer.
        num_layers, num_key_value_heads: of the model.
    """
    keys, values = width_per_layer(d_qk, num_layers), width_per_layer(d_vo, num_layers)
    edge, whole = dtype.edge_layers, KVDtype("bfloat16", 16, 16)
    return tuple(
        num_key_value_heads
        * (dtype if edge <= layer < num_layers - edge else whole).token_bytes(keys[layer], values[layer])
        for layer in range(num_layers)
    )


def _place(engine: str | None, backend: str) -> str:
    return f"engine {engine or 'transformers'}" + ("" if backend == "any" else f" on {backend}")


def _listed(words: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
