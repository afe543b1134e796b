"""What serves a latent model: one row an engine, with the widths and rotary tables that it accepts.

Facts, not wishes: a row states what was run (or, where `ran` is false, read in the engine's source) with transformers
5.23.0, vLLM 0.32.0 (CPU), llama-cpp-python 0.3.36, OpenVINO 2026.4.1 and mlx-lm 0.32.2. Stock engines were tried at
multiples of 8 only, and the GPU kernels behind them ask for it. Not listed is what would load a latent model and run
it wrongly: the model builder of ONNX Runtime GenAI drops the rotary table without an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from kvlatent.model.config import TABLE_SCOPES
from kvlatent.model.widths import Width, width_per_layer

__all__ = ["ENGINES", "TABLE_SCOPES", "Engine", "check_engine", "engine_named", "engines_for"]


@dataclass(frozen=True)
class Engine:
    """One engine: what it accepts.

    Args:
        name: as users give it.
        route: how a latent model gets there.
        scopes: of the rotary table, the finest first: one per key-value head, per layer, or for the model.
        symmetric: d_qk must equal d_vo. (Zero-padding to the wider one would fit, at the cost of the wider cache.)
        uniform: every layer must have the same widths.
        multiple: widths are multiples of this.
        smallest: least width, channels.
        ran: it was run; else its source was read.
        refused: families (`model_type` of the original) that cannot carry their own rotary table there, or were
            never tried.
    """

    name: str
    route: str
    scopes: tuple[str, ...] = ("model",)
    symmetric: bool = True
    uniform: bool = True
    multiple: int = 8
    smallest: int = 8
    ran: bool = True
    refused: tuple[str, ...] = ()


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "transformers",
            "as it is: with kvlatent installed, or with the checkpoint's own modelling file",
            scopes=TABLE_SCOPES,
            symmetric=False,
            uniform=False,
            multiple=1,
            smallest=1,
        ),
        Engine("transformers-stock", "as a plain Llama (Mistral, Qwen2, Qwen3) with a longrope table"),
        # The CPU backend refused width 16 and ran 32, 48 and 64; the Triton backend starts at 32.
        Engine("vllm", "as a plain Llama with a longrope table", smallest=32),
        Engine("sglang", "as a plain Llama with a longrope table", ran=False, refused=("qwen3",)),
        Engine("llama.cpp", "as GGUF of architecture llama with rope_freqs", refused=("qwen3",)),
        Engine(
            "llama.cpp-step35",
            "as GGUF under the architecture name step35 (experimental)",
            symmetric=False,
            refused=("qwen3",),
        ),
        Engine(
            "openvino",
            "as an IR traced from the decoder",
            scopes=TABLE_SCOPES,
            symmetric=False,
            uniform=False,
            multiple=1,
            smallest=1,
        ),
        Engine("mlx", "as a plain Llama with a longrope table", refused=("qwen3",)),
    )
}


def engine_named(name: str) -> Engine:
    """The row of an engine.

    Raises:
        ValueError: there is none of that name; the sentence lists near matches and the known ones.
    """
    if name not in ENGINES:
        near = get_close_matches(name.lower(), ENGINES, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown engine {name!r}; {hint}choose one of {', '.join(ENGINES)}")
    return ENGINES[name]


def check_engine(
    engine: str, d_qk: Width, d_vo: Width, scope: str = "head", *, model_type: str | None = None
) -> Engine:
    """The row of `engine`, once it is known to accept these widths and this scope of the rotary table.

    Args:
        engine: a key of `ENGINES`.
        d_qk, d_vo: widths in channels, one number or one per layer.
        scope: of the rotary table: "head", "layer" or "model".
        model_type: of the original model, where it is known.

    Raises:
        ValueError: an unknown engine or scope, or something that the engine does not accept; the sentence says what
            and names the next step.
    """
    row = engine_named(engine)
    if scope not in TABLE_SCOPES:
        raise ValueError(f"unknown table {scope!r}; choose one of {', '.join(TABLE_SCOPES)}")
    obstacle = _obstacle(row, _distinct(d_qk), _distinct(d_vo), scope, model_type)
    if obstacle is not None:
        raise ValueError(obstacle)
    return row


def engines_for(
    d_qk: Width, d_vo: Width, scope: str = "head", *, model_type: str | None = None
) -> tuple[str, ...]:
    """Names of the engines that accept these widths with a rotary table of this scope."""
    keys, values = _distinct(d_qk), _distinct(d_vo)
    return tuple(
        name for name, row in ENGINES.items() if _obstacle(row, keys, values, scope, model_type) is None
    )


def _distinct(width: Width) -> tuple[int, ...]:
    return tuple(sorted(set(width_per_layer(width))))


def _obstacle(
    row: Engine, keys: tuple[int, ...], values: tuple[int, ...], scope: str, model_type: str | None
) -> str | None:
    """What keeps an engine from running these distinct widths, as a sentence, or None."""
    engine = f"engine {row.name}"
    if model_type in row.refused:
        return (
            f"{engine} cannot run a {model_type} model with its own rotary table; use --engine transformers"
        )
    if scope not in row.scopes:
        return (
            f"{engine} takes one rotary table per {' or '.join(row.scopes)}: got one per {scope}; "
            f"use --table {row.scopes[0]}"
        )
    if row.uniform and max(len(keys), len(values)) > 1:
        return (
            f"{engine} needs the same widths in every layer: got {len(keys)} different d_qk and {len(values)} "
            "different d_vo; give one number each"
        )
    if row.symmetric and keys != values:
        return (
            f"{engine} needs d_qk = d_vo: got d_qk={keys[0]}, d_vo={values[0]}; "
            f"try {_nearest((keys[0] + values[0]) / 2, row)} for both"
        )
    for name, widths in (("d_qk", keys), ("d_vo", values)):
        for width in widths:
            if width % row.multiple:
                return (
                    f"{engine} needs widths that are multiples of {row.multiple}: got {name}={width}; "
                    f"try {_nearest(width, row)}"
                )
            if width < row.smallest:
                return f"{engine} needs widths of at least {row.smallest}: got {name}={width}; try {row.smallest}"
    return None


def _nearest(width: float, row: Engine) -> int:
    """The largest acceptable width up to `width`, or the smallest acceptable one."""
    return max(row.smallest, int(width) // row.multiple * row.multiple)
