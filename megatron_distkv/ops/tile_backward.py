"""Gradients of attention, tile by tile."""

import torch

from megatron_distkv.kernels import reference
from megatron_distkv.ops.backend import kernels


def tile_backward(
    d_out_SBHD: torch.Tensor,
    q_SBHD: torch.Tensor,
    k_XBKD: torch.Tensor,
    v_XBKD: torch.Tensor,
    out_SBHD: torch.Tensor,
    lse_SBH: torch.Tensor,
    scale: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One tile's share of the gradients of q `[S, B, H, D]`, k and v `[X, B, K, D]`, in fp32.

    `out` and `lse` (natural log) are those over all keys, not over the tile's: shares then add up exactly. A causal
    tile has S = X, the same tokens; another is seen in full. S query tokens, X key tokens, B sequences.
    The C++ kernels have none: torch's own op serves CPUs (context_parallel/tile_attention.py).
    """
    tensors = (d_out_SBHD, q_SBHD, k_XBKD, v_XBKD)
    backend = kernels(*tensors)
    run = getattr(backend, "tile_backward", reference.tile_backward)
    d_q, d_k, d_v = run(*tensors, out_SBHD, lse_SBH, scale, is_causal)
    return d_q, d_k, d_v
