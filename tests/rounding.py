"""Kernels that each round in a way of their own: `pytest --rounding SEED` shows what holds by one processor's luck.

Results of products, sums, elementary functions, attention and factorizations are moved by one rounding of the
magnitudes that entered, and eigenvectors and singular vectors change signs. All is drawn from the seed, the kernel and
the shapes: as on a real processor, the same call gives the same bits, and one of another length or batch need not.
"""

import zlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default}
PRODUCTS |= {aten.addmm.default, aten.baddbmm.default}
SUMS = {aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim}
ELEMENTARY = {aten.exp.default, aten.log.default, aten.silu.default, aten.rsqrt.default, aten.cos.default}
ELEMENTARY |= {aten.sin.default, aten._softmax.default, aten._log_softmax.default, aten.logsumexp.default}
ROWS = {aten._scaled_dot_product_flash_attention_for_cpu.default, aten.linalg_qr.default}
ROWS |= {aten.linalg_lstsq.default, aten._linalg_solve_ex.default, aten._linalg_eigh.default}
ROWS |= {aten._linalg_svd.default}


class Rounding(TorchDispatchMode):
    """While it is entered, kernels round as drawn from `seed`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        result = kernel(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if kernel not in PRODUCTS | SUMS | ELEMENTARY | ROWS or not all(inexact(each) for each in given):
            return result
        first = 1 if kernel in ELEMENTARY else 0  # their results do not depend on how many rows there are
        key = f"{kernel} {[tuple(each.shape[first:]) for each in given]} {self.seed}"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        if kernel in PRODUCTS | SUMS:
            sizes = [each.abs() for each in given]
            entered = kernel(*sizes, *args[len(given) :], **(kwargs or {}))
            return moved(result, entered, generator)
        if kernel in ELEMENTARY:
            return moved(result, result.abs() / 2, generator, alike=True)
        parts = [moved(part, largest(part), generator) if inexact(part) else part for part in result]
        if kernel is aten._linalg_eigh.default:
            parts[1] *= signs(parts[0], generator)[..., None, :]
        elif kernel is aten._linalg_svd.default:
            sign, rank = signs(parts[1], generator), parts[1].shape[-1]
            parts[0][..., :rank] *= sign[..., None, :]
            parts[2][..., :rank, :] *= sign[..., :, None]
        return tuple(parts)


def inexact(part) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point() and part.numel() > 0


def largest(part: Tensor) -> Tensor:
    """The magnitude of a row of attention or of a factor, whose entries are all made of the same terms."""
    return part.abs().amax(-1, keepdim=True) if part.ndim else part.abs()


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator, dtype=like.dtype) * 2 - 1


def moved(result: Tensor, entered: Tensor, generator: torch.Generator, alike: bool = False) -> Tensor:
    """The result, each entry moved by up to a rounding of what entered; `alike` for all rows."""
    if not inexact(result):
        return result
    shape = (1, *result.shape[1:]) if alike and result.ndim else result.shape
    share = (
        2 * torch.rand(shape, generator=generator, dtype=torch.promote_types(result.dtype, torch.float32)) - 1
    )
    if result.dtype.itemsize < 4:  # summed in float32 and rounded once
        entered = result.abs()
    out = torch.empty_like(result)  # keeps the strides
    return out.copy_(result + (share * torch.finfo(result.dtype).eps * entered).to(result.dtype))
