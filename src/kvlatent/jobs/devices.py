"""Which device and dtype a job runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import psutil
import torch

from kvlatent.jobs.recipe import Recipe

__all__ = [
    "check_precision",
    "check_product_dtype",
    "choose_device",
    "faster_dtype",
    "free_memory",
    "has_bfloat16_units",
    "precision",
    "resolve_precision",
    "working_dtype",
]

_PRECISIONS = ("float32", "bfloat16")
_WIDE = 512  # of a model: below it, casting costs what the products save

# As torch names them: AVX-512's products, Intel's tiles, Arm's two.
_BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


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


def free_memory(device: str) -> int:
    """Bytes that a job may take on "cpu" or "cuda", as far as the system says."""
    return psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]


def has_bfloat16_units(device: str | torch.device) -> bool:
    """Whether the device multiplies bfloat16 numbers itself; elsewhere torch imitates it, slower than float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _BFLOAT16_UNITS)


def check_precision(name: str, device: str | torch.device) -> None:
    """Raise where products are asked for in a dtype that the device only imitates.

    Args:
        name: "float32", "bfloat16", ...; only "bfloat16" needs units of its own.
        device: where the products run.

    Raises:
        ValueError: bfloat16 on a device without units for it.
    """
    if name != "bfloat16" or has_bfloat16_units(device):
        return
    kind = torch.device(device).type
    units = ", ".join(_BFLOAT16_UNITS) if kind == "cpu" else "compute capability 8.0"
    raise ValueError(
        f"dtype bfloat16 needs a {kind} device with units for it ({units}), and this one has none and would run slower "
        "than in float32; use dtype float32"
    )


def resolve_precision(recipe: Recipe, config: Any, device: str | torch.device) -> Recipe:
    """The recipe with the dtype that `auto` stands for: training in bfloat16 where it is faster, else float32.

    Args:
        config: of the model, for its `hidden_size`.

    Raises:
        ValueError: bfloat16 was asked for by name on a device without units for it.
    """
    check_precision(recipe.dtype, device)
    if recipe.dtype != "auto":
        return recipe
    return recipe.model_copy(update={"dtype": faster_dtype(config, device)})


def faster_dtype(config: Any, device: str | torch.device) -> str:
    """ "bfloat16" where training in it is faster than in "float32": units for it, and a model wide enough."""
    return "bfloat16" if config.hidden_size >= _WIDE and has_bfloat16_units(device) else "float32"


def check_product_dtype(dtype: str, device: str | torch.device) -> str:
    """`dtype`, if products can run in it.

    Raises:
        ValueError: another than "float32" and "bfloat16", or bfloat16 on a device without units for it.
    """
    if dtype not in _PRECISIONS:
        raise ValueError(f"unknown precision {dtype!r}; choose one of {', '.join(_PRECISIONS)}")
    check_precision(dtype, device)
    return dtype


def precision(device: str | torch.device, dtype: str) -> AbstractContextManager[Any]:
    """The autocast context in which products run in `dtype` and weights stay as they are."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, dtype))


def working_dtype(dtype: str, device: str, stored: torch.dtype) -> str:
    """Dtype that weights are held in while products run in `dtype`: never narrower than a float32 checkpoint's own.

    On a CPU it is float32, and autocast does the rest; on a GPU the recipe's, unless the checkpoint is stored in float32.

    Args:
        dtype: of the recipe, resolved; stored: of the checkpoint's weights.
    """
    return "float32" if device == "cpu" or stored == torch.float32 else dtype
