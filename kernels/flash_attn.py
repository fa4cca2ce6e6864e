"""FlashAttention-2 for full rBlocks of the past: torch's own, on CPUs and GPUs, or the flash-attn package on GPUs.

On CPUs it is checked in CI, and slower than our own kernels. On GPUs it has never been run.
The package reads scattered rBlocks where their size is a multiple of 256; else they are gathered first.
"""

import importlib.util
from functools import cache

import torch

from .full_blocks import FullBlocks, Library, served_by
from .native import apply_rope as apply_rope
from .native import gather_rblocks as gather_rblocks
from .native import merge as merge
from .native import scatter_rblocks as scatter_rblocks
from .native import store_kv as store_kv

# Head sizes: GPUs have no others; on CPUs the result is rounded to bf16, which over fewer dims is no small error.
PAGE_MULTIPLE, HEAD_MULTIPLE, LARGEST_HEAD = 256, 8, 256


def is_here() -> bool:
    return hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


@cache
def has_package() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def can_serve(q_THD: torch.Tensor, pool_BLK2ND: torch.Tensor) -> bool:
    if q_THD.dtype != pool_BLK2ND.dtype or q_THD.shape[-1] % HEAD_MULTIPLE:
        return False
    if q_THD.is_cuda:
        return q_THD.dtype in (torch.bfloat16, torch.float16) and q_THD.shape[-1] <= LARGEST_HEAD
    return q_THD.is_cpu and q_THD.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _library(q_THD: torch.Tensor, pool_BLK2ND: torch.Tensor) -> Library | None:
    if not can_serve(q_THD, pool_BLK2ND):
        return None
    return _on_cpu if q_THD.is_cpu else _on_gpu


def _on_cpu(blocks: FullBlocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence by sequence; a KV head's query heads and tokens are rows of one head, as nothing is masked."""
    kv_heads, size = blocks.pool_BK2ND.shape[1], blocks.pool_BK2ND.shape[3]
    k_XKD, v_XKD = blocks.packed_kv()
    outs, lses = torch.empty_like(blocks.q_THD), blocks.q_THD.new_empty(blocks.q_THD.shape[:2], dtype=torch.float32)
    keys, queries = (blocks.cu_blocks * size).tolist(), blocks.cu_queries.tolist()
    for s in range(len(queries) - 1):
        rows, seen = slice(queries[s], queries[s + 1]), slice(keys[s], keys[s + 1])
        q_THD = blocks.q_THD[rows]
        q_KRD = q_THD.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)
        k_KXD, v_KXD = (x[seen].transpose(0, 1) for x in (k_XKD, v_XKD))
        out_KRD, lse_KR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_KRD[None], k_KXD[None], v_KXD[None], scale=blocks.scale
        )
        outs[rows] = out_KRD[0].unflatten(1, (len(q_THD), -1)).transpose(0, 1).flatten(1, 2)
        lses[rows] = lse_KR[0].unflatten(1, (len(q_THD), -1)).transpose(0, 1).flatten(1, 2)
    return outs, lses


def _on_gpu(blocks: FullBlocks) -> tuple[torch.Tensor, torch.Tensor]:
    if blocks.pool_BK2ND.shape[3] % PAGE_MULTIPLE == 0 and has_package():
        return _paged(blocks)
    k_XKD, v_XKD = blocks.packed_kv()
    cu_keys = blocks.cu_blocks * blocks.pool_BK2ND.shape[3]
    longest = [int(cu.diff().max()) for cu in (blocks.cu_queries, cu_keys)]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        blocks.q_THD, k_XKD, v_XKD, blocks.cu_queries.int(), cu_keys.int(), *longest, 0.0, False, False,
        scale=blocks.scale,
    )  # fmt: skip
    return out, _by_token(lse, blocks.cu_queries)


def _paged(blocks: FullBlocks) -> tuple[torch.Tensor, torch.Tensor]:
    from flash_attn import flash_attn_varlen_func

    k, v = (blocks.pool_BK2ND[:, :, part].transpose(1, 2) for part in (0, 1))
    counts = blocks.cu_blocks.diff()
    table = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32, device=k.device)
    is_listed = torch.arange(table.shape[1], device=k.device) < counts[:, None]
    table[is_listed] = blocks.block_ids_M.int()
    cu_keys = blocks.cu_blocks * k.shape[1]
    out, lse, _ = flash_attn_varlen_func(
        blocks.q_THD, k, v, blocks.cu_queries.int(), cu_keys.int(),
        int(blocks.cu_queries.diff().max()), int(cu_keys.diff().max()),
        softmax_scale=blocks.scale, causal=False, return_attn_probs=True, block_table=table,
    )  # fmt: skip
    return out, _by_token(lse, blocks.cu_queries)


def _by_token(lse: torch.Tensor, cu_queries: torch.Tensor) -> torch.Tensor:
    """`[H, T]`, or of older versions `[S, H, longest]`, as `[T, H]`."""
    if lse.dim() == 2:
        return lse.T
    is_there = torch.arange(lse.shape[2], device=lse.device) < cu_queries.diff()[:, None]
    return lse.transpose(1, 2)[is_there]


micro_attention = served_by(_library)
