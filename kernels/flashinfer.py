"""FlashInfer for full rBlocks of the past, of any size, where they lie. Optional; never been run here.

Its LSE has base 2.
"""

import importlib.util
import math
from functools import cache
from typing import Any

import torch

from .full_blocks import FullBlocks, Library, served_by
from .native import apply_rope as apply_rope
from .native import gather_rblocks as gather_rblocks
from .native import merge as merge
from .native import scatter_rblocks as scatter_rblocks
from .native import store_kv as store_kv

WORKSPACE_BYTES = 128 << 20  # what its documentation asks for
HEAD_DIMS = (64, 128, 256)


@cache
def is_here() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("flashinfer") is not None


def can_serve(q_THD: torch.Tensor, pool_BLK2ND: torch.Tensor) -> bool:
    is_half = q_THD.dtype in (torch.bfloat16, torch.float16) and q_THD.dtype == pool_BLK2ND.dtype
    return q_THD.is_cuda and is_half and q_THD.shape[-1] in HEAD_DIMS


def _library(q_THD: torch.Tensor, pool_BLK2ND: torch.Tensor) -> Library | None:
    return _attend if can_serve(q_THD, pool_BLK2ND) else None


@cache
def _wrapper(device: torch.device) -> Any:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    return BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device), kv_layout="HND"
    )


def _attend(blocks: FullBlocks) -> tuple[torch.Tensor, torch.Tensor]:
    k_BKND, v_BKND = blocks.pool_BK2ND.unbind(2)
    num_heads, head_dim = blocks.q_THD.shape[1:]
    wrapper, size = _wrapper(blocks.q_THD.device), k_BKND.shape[2]
    last_page = torch.full_like(blocks.cu_blocks[1:], size).int()
    wrapper.plan(
        blocks.cu_queries.int(), blocks.cu_blocks.int(), blocks.block_ids_M.int(), last_page,
        num_heads, k_BKND.shape[1], head_dim, size,
        causal=False, sm_scale=blocks.scale, q_data_type=blocks.q_THD.dtype, kv_data_type=k_BKND.dtype,
    )  # fmt: skip
    out, lse = wrapper.run(blocks.q_THD, (k_BKND, v_BKND), return_lse=True)
    return out, lse * math.log(2)


micro_attention = served_by(_library)
