"""What a run will do, before it does it: widths, bytes per token, tokens per stage, and an estimate of the time.

Numbers of tokens follow from the model's size and the device alone, never from a clock, so that a second call
plans the same run; the clock only serves the printed estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from transformers import PretrainedConfig

from .choose import choose, resolve_choices
from .config import LatentConfig
from .cost import equal_widths
from .estimate import estimate_seconds, layer_size, stage_settings
from .families import LATENT_PREFIX, family_of
from .hub import load_config
from .recipe import Recipe

__all__ = [
    "STAGES",
    "Plan",
    "PlanOptions",
    "choose_device",
    "plan_run",
    "resolve_widths",
    "working_dtype",
]

STAGES: dict[str, tuple[int, ...]] = {"none": (), "1": (1,), "2": (2,), "both": (1, 2)}
Width = int | list[int] | tuple[int, ...]

# A default run spends this many floating-point operations, about ten minutes on two laptop cores or on one
# data-centre GPU; within these bounds in tokens.
_DEFAULT_FLOPS = {"cpu": 2e13, "cuda": 1e17}
_DEFAULT_TOKENS = (65_536, 20_000_000)


class PlanOptions(TypedDict, total=False):
    """What decides a run, beside model and text; all of it can be left out.

    Keys:
        kv: share of the original cache to keep, in (0, 1]; d_qk, d_vo: widths instead, one number or one per layer.
        preset: of the conversion; recipe: YAML file; overrides: `section.key=value` strings on top of it.
        tokens: of all stages together; stages: "none", "1", "2" or "both".
        device: "auto", "cpu" or "cuda"; dtype: "float32" or "bfloat16" (autocast); seed: of everything random.
    """

    kv: float | None
    d_qk: Width | None
    d_vo: Width | None
    preset: str | None
    recipe: str | Path | None
    overrides: Sequence[str]
    tokens: int | None
    stages: str
    device: str
    dtype: str | None
    seed: int | None


@dataclass(frozen=True)
class Plan:
    """A run of `compress` as it would happen.

    Args:
        latent: what the result will be.
        num_layers, num_key_value_heads: of the model.
        recipe: resolved, with its tokens.
        stages: which stages run.
        device: "cpu" or "cuda".
        stored_dtype: of the original's weights, and so of the result's.
        seconds: rough estimate of the training time.
    """

    latent: LatentConfig
    num_layers: int
    num_key_value_heads: int
    recipe: Recipe
    stages: tuple[int, ...]
    device: str
    stored_dtype: torch.dtype
    seconds: float

    def summary(self) -> dict[str, Any]:
        """JSON-able: widths, bytes per token before and after, tokens per stage, estimated seconds."""
        latent = self.latent
        measured_in = working_dtype(self.recipe.dtype, self.device)
        sizes = (self.num_layers, self.num_key_value_heads, getattr(torch, measured_in).itemsize)
        before = replace(latent, d_qk=latent.original_head_dim, d_vo=latent.original_head_dim)
        original, reduced = before.cache_bytes_per_token(*sizes), latent.cache_bytes_per_token(*sizes)
        return {
            "d_qk": latent.d_qk,
            "d_vo": latent.d_vo,
            "head_dim": latent.original_head_dim,
            "preset": self.recipe.conversion.preset,
            "cache_bytes_per_token": {"original": original, "latent": reduced, "dtype": measured_in},
            "share": reduced / original,
            "tokens": {f"stage{stage}": stage_settings(self.recipe, stage).tokens for stage in self.stages},
            "device": self.device,
            "dtype": self.recipe.dtype,
            "estimated_seconds": float(f"{self.seconds:.2g}"),
        }


def choose_device(device: str) -> str:
    """`auto` is CUDA where torch sees one, else the CPU.

    Raises:
        ValueError: another name, or CUDA where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda: got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for but torch sees no GPU here; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def resolve_widths(
    config: PretrainedConfig, kv: float | None = None, d_qk: Width | None = None, d_vo: Width | None = None
) -> tuple[Width, Width]:
    """(d_qk, d_vo) from a share of the cache or from explicit numbers; half of the cache when nothing is said.

    A side that is left out beside an explicit one keeps its full width. Whether the model can have the widths is for
    `convert.choose` to say.

    Raises:
        ValueError: both ways at once, or a share outside (0, 1].
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kv is not None and (d_qk is not None or d_vo is not None):
        raise ValueError(
            f"--kv and --d-qk/--d-vo exclude each other: got kv={kv:g}, d_qk={d_qk}, d_vo={d_vo}; give one of the two"
        )
    if d_qk is None and d_vo is None:
        width = equal_widths(0.5 if kv is None else kv, head_dim)
        return width, width
    return head_dim if d_qk is None else d_qk, head_dim if d_vo is None else d_vo


def plan_run(model: str | Path, **options: Unpack[PlanOptions]) -> Plan:
    """What `compress` would do with these arguments; reads the model's config, not its weights.

    Raises:
        ValueError: an argument, a recipe key or a width that cannot be.
    """
    stages = STAGES.get(options.get("stages", "both"))
    if stages is None:
        raise ValueError(f"--stages is one of {', '.join(STAGES)}: got {options['stages']!r}")
    device = choose_device(options.get("device", "auto"))
    config = load_config(str(model))
    family_of(config)
    if str(config.model_type).startswith(LATENT_PREFIX):
        raise ValueError(
            f"the model is latent already (model_type {config.model_type!r}); convert the original checkpoint instead"
        )
    size, head = layer_size(config)
    recipe = resolve_recipe(options, size=size, device=device, stages=stages)
    wanted = recipe.conversion
    choices = resolve_choices(wanted.preset, wanted.keys, wanted.frequencies, wanted.values)
    widths = resolve_widths(config, options.get("kv"), options.get("d_qk"), options.get("d_vo"))
    latent = choose(config, *widths, choices, qk_norm=wanted.qk_norm)
    return Plan(
        latent=latent,
        num_layers=config.num_hidden_layers,
        num_key_value_heads=config.num_key_value_heads,
        recipe=recipe,
        stages=stages,
        device=device,
        stored_dtype=config.dtype or torch.float32,
        seconds=estimate_seconds(recipe, stages, size, head, config.num_hidden_layers, device),
    )


def working_dtype(dtype: str, device: str) -> str:
    """Dtype that weights are held in: fp32 on the CPU, where autocast does the rest; the recipe's on a GPU."""
    return "float32" if device == "cpu" else dtype


def resolve_recipe(options: PlanOptions, *, size: int, device: str, stages: tuple[int, ...]) -> Recipe:
    """The recipe of a run, with its number of tokens settled.

    Without `tokens`, a recipe that was given keeps its own numbers, else one is chosen that finishes in reasonable
    time. The stages that run share `tokens` in proportion to the recipe's numbers.

    Args:
        options: as for `plan_run`.
        size: parameters of the model's layers, without embeddings and head.
        device: "cpu" or "cuda".
        stages: which stages run.

    Raises:
        ValueError: `tokens` is not positive, or what `Recipe.load` refuses.
    """
    tokens, path = options.get("tokens"), options.get("recipe")
    if tokens is not None and tokens <= 0:
        raise ValueError(
            f"--tokens must be positive: got {tokens}; try 100000, or --stages none to skip training"
        )
    overrides = list(options.get("overrides", ()))
    for name, key in (("seed", "seed"), ("dtype", "dtype"), ("preset", "conversion.preset")):
        if (value := options.get(name)) is not None:
            overrides.append(f"{key}={value}")
    recipe = Recipe.load(path, overrides)
    said = path is not None or any(key.startswith(("stage1.tokens=", "stage2.tokens=")) for key in overrides)
    if not stages or (tokens is None and said):
        return recipe
    total = tokens if tokens is not None else default_tokens(size, device)
    whole = sum(stage_settings(recipe, stage).tokens for stage in stages)
    shares = [
        f"stage{s}.tokens={max(1, round(total * stage_settings(recipe, s).tokens / whole))}" for s in stages
    ]
    return Recipe.load(path, [*overrides, *shares])


def default_tokens(size: int, device: str) -> int:
    """Tokens of a run nobody gave a number for, from the model's size (parameters) and the device alone."""
    low, high = _DEFAULT_TOKENS
    return int(min(high, max(low, _DEFAULT_FLOPS[device] / (8 * size))))
