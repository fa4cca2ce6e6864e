"""rBlocks in int8: half the memory and half the reading of bf16, at an error of about 8e-3.

K has a scale per rBlock, KV head and channel, because some channels of K are far larger than others; V has one per
token and KV head. So an rBlock becomes int8 when it is full; what is still being written stays as it is, and the two
partial results are merged.

In a pool the scales lie behind the numbers that they belong to, head by head, so that an rBlock, or some of its heads,
travels as one piece of bytes like any other:

    packed `[B, L, K, X]`, uint8:  | K and V, int8 `[2, N, D]` | scales of K, fp32 `[D]` | scales of V, fp32 `[N]` |
"""

from typing import NamedTuple

import torch

from megatron_distkv.kernels import cpu
from megatron_distkv.kernels.cpu import attend_again
from megatron_distkv.ops.backend import cpu_comes_first, kernels

LARGEST = 127.0


class Int8RBlocks(NamedTuple):
    """`quantize_rblocks` says what they are."""

    pool_BLK2ND: torch.Tensor
    k_scales_BLKD: torch.Tensor
    v_scales_BLKN: torch.Tensor


def quantize_rblocks(pool_BLK2ND: torch.Tensor) -> Int8RBlocks:
    """Full rBlocks as int8 of the same shape, and the scales of K `[B, L, K, D]` and of V `[B, L, K, N]`, fp32."""
    k_BLKND, v_BLKND = (part.float() for part in pool_BLK2ND.unbind(3))
    k_scales_BLKD = k_BLKND.abs().amax(dim=-2).div_(LARGEST)
    v_scales_BLKN = v_BLKND.abs().amax(dim=-1).div_(LARGEST)
    k_BLKND = k_BLKND / k_scales_BLKD.unsqueeze(-2).clamp_min(torch.finfo(torch.float32).tiny)
    v_BLKND = v_BLKND / v_scales_BLKN.unsqueeze(-1).clamp_min(torch.finfo(torch.float32).tiny)
    numbers = torch.stack([k_BLKND, v_BLKND], dim=3).round_().to(torch.int8)
    return Int8RBlocks(numbers, k_scales_BLKD, v_scales_BLKN)


def pack_rblocks(pool_BLK2ND: torch.Tensor) -> torch.Tensor:
    """Full rBlocks as int8 with their scales, `[B, L, K, X]`."""
    numbers, *scales = quantize_rblocks(pool_BLK2ND)
    return torch.cat([part.view(torch.uint8) for part in (numbers.flatten(3), *scales)], dim=-1)


def pack_rblocks_into(
    rblocks_BLK2ND: torch.Tensor,
    from_layer: int,
    from_ids: torch.Tensor,
    pool_BLKX: torch.Tensor,
    layer: int,
    block_ids: torch.Tensor,
) -> None:
    """A layer of some full rBlocks into a layer of a packed pool: the same bytes as `pack_rblocks` makes of them."""
    if cpu_comes_first() and cpu.can_serve(rblocks_BLK2ND):
        cpu.pack_into(rblocks_BLK2ND, from_layer, from_ids, pool_BLKX, layer, block_ids)
    else:
        pool_BLKX[block_ids, layer] = pack_rblocks(rblocks_BLK2ND[from_ids, from_layer].unsqueeze(1))[:, 0]


def unpack_rblocks(packed_BLKX: torch.Tensor, head_dim: int) -> Int8RBlocks:
    """Views, no copy."""
    rblock_size = (packed_BLKX.shape[-1] - 4 * head_dim) // (2 * head_dim + 4)
    num_numbers = 2 * rblock_size * head_dim
    numbers = packed_BLKX.view(torch.int8)[..., :num_numbers].unflatten(-1, (2, rblock_size, head_dim))
    scales = packed_BLKX.view(torch.float32)[..., num_numbers // 4 :]
    return Int8RBlocks(numbers, scales[..., :head_dim], scales[..., head_dim:])


def readable(pool: torch.Tensor, head_dim: int) -> torch.Tensor | Int8RBlocks:
    """What attention reads of a pool or a copy of some rBlocks: itself `[B, L, K, 2, N, D]`, or, packed, its views."""
    return unpack_rblocks(pool, head_dim) if pool.dtype is torch.uint8 else pool


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


def micro_attention_int8_out(
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
    window: int | None,
    soft_cap: float | None,
    out_THD: torch.Tensor,
    lse_TH: torch.Tensor,
) -> None:
    """The same into tensors at hand (fp32, contiguous), as `micro_attention_out`."""
    args = (layer, block_ids_M, block_starts_M, cu_blocks, cu_queries, positions_T, scale, causal, window, soft_cap)
    if torch.compiler.is_compiling():
        tensors = (q_THD, pool_BLK2ND, k_scales_BLKD, v_scales_BLKN)
        torch.ops.distkv.micro_attention_int8_out(*tensors, *args, out_THD, lse_TH)
        return
    out, scales = (out_THD, lse_TH), (k_scales_BLKD, v_scales_BLKN)
    if not cpu_comes_first() or attend_again(q_THD, pool_BLK2ND, *args, out, scales) is None:
        kernels(q_THD, *scales).micro_attention(q_THD, pool_BLK2ND, *args, out=out, scales=scales)


torch.library.custom_op(
    "distkv::micro_attention_int8_out", micro_attention_int8_out, mutates_args=("out_THD", "lse_TH")
)


@torch.library.register_fake("distkv::micro_attention_int8_out")
def _(*_: object) -> None:
    return None
