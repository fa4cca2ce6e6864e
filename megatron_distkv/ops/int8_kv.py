"""rBlocks in int8: half the memory and half the reading of bf16, at an error of about 8e-3.

K has a scale per rBlock, KV head and channel, because some channels of K are far larger than others; V has one per
token and KV head. So an rBlock becomes int8 when it is full; what is still being written stays as it is, and the two
partial results are merged.
"""

import torch

from megatron_distkv.ops.backend import kernels

LARGEST = 127.0


def quantize_rblocks(pool_BLK2ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Full rBlocks as int8 of the same shape, and the scales of K `[B, L, K, D]` and of V `[B, L, K, N]`, fp32."""
    k_BLKND, v_BLKND = (part.float() for part in pool_BLK2ND.unbind(3))
    k_scales_BLKD = k_BLKND.abs().amax(dim=-2).div_(LARGEST)
    v_scales_BLKN = v_BLKND.abs().amax(dim=-1).div_(LARGEST)
    k_BLKND /= k_scales_BLKD.unsqueeze(-2).clamp_min(torch.finfo(torch.float32).tiny)
    v_BLKND /= v_scales_BLKN.unsqueeze(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.stack([k_BLKND, v_BLKND], dim=3).round_().to(torch.int8), k_scales_BLKD, v_scales_BLKN


def micro_attention_int8(
    q_THD: torch.Tensor,
    pool_BLK2ND: torch.Tensor,
    k_scales_BLKD: torch.Tensor,
    v_scales_BLKN: torch.Tensor,
    layer: int,
    block_ids_M: torch.Tensor,
    block_starts_M: torch.Tensor,
    cu_blocks: torch.Tensor,
    cu_queries: torch.Tensor,
    positions_T: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`micro_attention` over a pool of int8 with its scales (see `quantize_rblocks`)."""
    args = (layer, block_ids_M, block_starts_M, cu_blocks, cu_queries, positions_T, scale, causal, window, soft_cap)
    if torch.compiler.is_compiling():
        return torch.ops.distkv.micro_attention_int8(q_THD, pool_BLK2ND, k_scales_BLKD, v_scales_BLKN, *args)
    scales = (k_scales_BLKD, v_scales_BLKN)
    out, lse = kernels(q_THD, *scales).micro_attention(q_THD, pool_BLK2ND, *args, scales=scales)
    return out, lse


torch.library.custom_op("distkv::micro_attention_int8", micro_attention_int8, mutates_args=())


@torch.library.register_fake("distkv::micro_attention_int8")
def _(q_THD: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return q_THD.new_empty(q_THD.shape, dtype=torch.float32), q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)
