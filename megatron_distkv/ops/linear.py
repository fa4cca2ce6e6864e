"""The product of a linear layer, as serving computes it: no autograd, weights as they lie in their module."""

import torch
import torch.nn.functional as F

from megatron_distkv.kernels import cpu
from megatron_distkv.ops.backend import cpu_comes_first


def linear(x_MK: torch.Tensor, w_NK: torch.Tensor) -> torch.Tensor:
    """x w^T, `[M, N]`, in the dtype of both; rows of `w_NK` may lie apart.

    bf16 on a CPU: sums in fp32, rounded once, so that what differs from torch is the last bit at most. Of up to as many
    rows as the C++ kernels are the faster ones for (all, but for CPUs with products of bf16 of their own), a row's bits
    are the same whatever else is in the batch. Everything else is torch's `F.linear` to the bit.

    Raises ValueError where the shapes do not fit.
    """
    if x_MK.ndim != 2 or w_NK.ndim != 2 or x_MK.shape[1] != w_NK.shape[1]:
        raise ValueError(f"linear: x {tuple(x_MK.shape)} does not fit weights {tuple(w_NK.shape)}")
    return cpu.linear(x_MK, w_NK) if _is_ours(x_MK, w_NK) else F.linear(x_MK, w_NK)


def _is_ours(x_MK: torch.Tensor, w_NK: torch.Tensor) -> bool:
    are_bf16 = x_MK.dtype is torch.bfloat16 and w_NK.dtype is torch.bfloat16 and x_MK.is_cpu
    return are_bf16 and cpu_comes_first() and len(x_MK) <= cpu.most_linear_rows()
