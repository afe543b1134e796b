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
from kvlatent.model.families import FAMILIES
from kvlatent.model.widths import Width, width_per_layer

__all__ = ["ENGINES", "TABLE_SCOPES", "Engine", "check_engine", "engine_named", "engines_for"]


@dataclass(frozen=True)
class Engine:
    """One engine: what it accepts.

    Args:
        name: as users give it.
        route: how a latent model gets there.
        scopes: of the rotary table, the one that plans take first: one per key-value head, per layer, or for the model.
        symmetric: d_qk must equal d_vo in every layer. (Zero-padding to the wider one would fit, at the cost of the wider
            cache.)
        sizes: most different widths that layers may have; None for any number.
        multiple: widths are multiples of this.
        smallest: least width, channels.
        ran: it was run; else its source was read.
        refused: families (`model_type` of the original) that cannot carry their own rotary table there, or were
            never tried.
        takes_all: it runs, or was given, every family's own layers; others take what a plain decoder's layers are.
    """

    name: str
    route: str
    scopes: tuple[str, ...] = ("model",)
    symmetric: bool = True
    sizes: int | None = 1
    multiple: int = 8
    smallest: int = 8
    ran: bool = True
    refused: tuple[str, ...] = ()
    takes_all: bool = False

    def scope(self, *, per_layer: bool = False) -> str:
        """Of the rotary table where nobody named one; widths that differ by layer cannot share one for the model."""
        finer = [scope for scope in self.scopes if scope != "model"]
        return finer[0] if per_layer and finer else self.scopes[0]


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "transformers",
            "as it is: with kvlatent installed, or with the checkpoint's own modelling file",
            scopes=TABLE_SCOPES,
            takes_all=True,
            symmetric=False,
            sizes=None,
            multiple=1,
            smallest=1,
        ),
        Engine("transformers-stock", "as a plain Llama (Mistral, Qwen2, Qwen3) with a longrope table"),
        # The CPU backend refused width 16 and ran 32, 48 and 64; the Triton backend starts at 32. One table for the model and
        # one width need no plugin, so they come first; tables per layer ran through the plugin, tables per head go the same
        # way and were not run. Layers of different sizes cost their exact bytes as long as all of them have full attention (read in
        # `UniformTypeKVCacheSpecs`).
        Engine(
            "vllm",
            "as a plain Llama with a longrope table; tables or widths per layer through kvlatent's plugin",
            scopes=("model", "layer", "head"),
            sizes=3,
            smallest=32,
        ),
        Engine("sglang", "as a plain Llama with a longrope table", ran=False, refused=("qwen3",)),
        Engine("llama.cpp", "as GGUF of architecture llama with rope_freqs", refused=("qwen3",)),
        Engine(
            "llama.cpp-step35",
            "as GGUF under the architecture name step35 (experimental)",
            symmetric=False,
            refused=("qwen3",),
        ),
        # Layers of different d_qk ran, and of different d_qk = d_vo; of different d_vo beside another d_qk its paged attention gave
        # other tokens, and crashed. So plans give it the same widths everywhere.
        Engine(
            "openvino",
            "as an IR traced from the decoder",
            scopes=TABLE_SCOPES,
            takes_all=True,
            symmetric=False,
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
    obstacle = _obstacle(row, _distinct(d_qk, d_vo), scope, model_type)
    if obstacle is not None:
        raise ValueError(obstacle)
    return row


def engines_for(
    d_qk: Width, d_vo: Width, scope: str = "head", *, model_type: str | None = None
) -> tuple[str, ...]:
    """Names of the engines that accept these widths with a rotary table of this scope."""
    pairs = _distinct(d_qk, d_vo)
    return tuple(name for name, row in ENGINES.items() if _obstacle(row, pairs, scope, model_type) is None)


def _distinct(d_qk: Width, d_vo: Width) -> tuple[tuple[int, int], ...]:
    """The different (d_qk, d_vo) of the layers, ascending."""
    layers = max(len(width_per_layer(width)) for width in (d_qk, d_vo))
    return tuple(sorted(set(zip(width_per_layer(d_qk, layers), width_per_layer(d_vo, layers), strict=True))))


def _obstacle(
    row: Engine, pairs: tuple[tuple[int, int], ...], scope: str, model_type: str | None
) -> str | None:
    """What keeps an engine from running layers of these widths, as a sentence, or None."""
    engine = f"engine {row.name}"
    if model_type in row.refused:
        return (
            f"{engine} cannot run a {model_type} model with its own rotary table; use --engine transformers"
        )
    family = FAMILIES.get(model_type or "")
    if family is not None and family.besides and not row.takes_all:
        return f"{engine} was tried with plain decoders, and a {model_type} model has {family.besides}; use --engine transformers"
    if scope not in row.scopes:
        return (
            f"{engine} takes one rotary table per {' or '.join(row.scopes)}: got one per {scope}; "
            f"use --table {row.scope()}"
        )
    if row.sizes == 1 and len(pairs) > 1:
        keys, values = (len(set(side)) for side in zip(*pairs, strict=True))
        return (
            f"{engine} needs the same widths in every layer: got {keys} different d_qk and {values} "
            "different d_vo; give one number each"
        )
    if row.sizes is not None and len(pairs) > row.sizes:
        return (
            f"{engine} takes layers of at most {row.sizes} different sizes: got {len(pairs)}; "
            "let --kv with --per-layer choose, or use --engine transformers"
        )
    return next((sentence for pair in pairs if (sentence := _width_obstacle(row, *pair))), None)


def _width_obstacle(row: Engine, d_qk: int, d_vo: int) -> str | None:
    """What keeps an engine from running a layer of these widths, as a sentence, or None."""
    engine = f"engine {row.name}"
    if row.symmetric and d_qk != d_vo:
        where = "" if row.sizes == 1 else " in every layer"
        return (
            f"{engine} needs d_qk = d_vo{where}: got d_qk={d_qk}, d_vo={d_vo}; "
            f"try {_nearest((d_qk + d_vo) / 2, row)} for both"
        )
    for name, width in (("d_qk", d_qk), ("d_vo", d_vo)):
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
