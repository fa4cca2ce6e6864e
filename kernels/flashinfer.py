"""FlashInfer for full rBlocks of the past, of any size, where they lie. Optional; never been run here.

Its LSE has base 2.
"""

import importlib.util
import math
from functools import cache
from typing import Any

import torch

from .own import apply_rope as apply_rope
from .own import gather_rblocks as gather_rblocks
from .own import merge as merge
from .own import scatter_rblocks as scatter_rblocks
from .own import store_kv as store_kv
from .past_rblocks import Library, Past, served_by

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


def _attend(past: Past) -> tuple[torch.Tensor, torch.Tensor]:
    k_BKND, v_BKND = past.pool_BK2ND.unbind(2)
    num_heads, head_dim = past.q_THD.shape[1:]
    wrapper, size = _wrapper(past.q_THD.device), k_BKND.shape[2]
    last_page = torch.full_like(past.cu_blocks[1:], size).int()
    wrapper.plan(
        past.cu_queries.int(), past.cu_blocks.int(), past.block_ids_M.int(), last_page,
        num_heads, k_BKND.shape[1], head_dim, size,
        causal=False, sm_scale=past.scale, q_data_type=past.q_THD.dtype, kv_data_type=k_BKND.dtype,
    )  # fmt: skip
    out, lse = wrapper.run(past.q_THD, (k_BKND, v_BKND), return_lse=True)
    return out, lse * math.log(2)


micro_attention = served_by(_library)
