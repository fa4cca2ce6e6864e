"""MicroAttention over the rBlocks of many sequences, all in the past of all queries: what every holder computes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_distkv.messages import QueryShare
from megatron_distkv.ops import micro_attention


class ShareIndex(NamedTuple):
    """Made once per step, used by all its layers (int64; contract: ops.micro_attention)."""

    block_ids_M: torch.Tensor
    cu_blocks: torch.Tensor
    cu_queries: torch.Tensor

    @property
    def num_rows(self) -> int:
        return int(self.cu_queries[-1])


def index_shares(shares: Sequence[QueryShare]) -> ShareIndex:
    cu_blocks, cu_queries, block_ids = [0], [0], []
    for share in shares:
        block_ids.extend(share.block_ids)
        cu_blocks.append(len(block_ids))
        cu_queries.append(cu_queries[-1] + share.num_queries)
    return ShareIndex(*(torch.tensor(x, dtype=torch.int64) for x in (block_ids, cu_blocks, cu_queries)))


def attend_shares(
    q_THD: torch.Tensor, pool_BLK2ND: torch.Tensor, layer: int, index: ShareIndex, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out `[T, H, D]` and lse `[T, H]`, fp32, where the pool lies."""
    starts_M = torch.zeros_like(index.block_ids_M)
    positions_T = torch.zeros(len(q_THD), dtype=torch.int64, device=q_THD.device)
    return micro_attention(
        q_THD, pool_BLK2ND, layer, index.block_ids_M, starts_M, index.cu_blocks, index.cu_queries, positions_T, scale,
        causal=False,
    )  # fmt: skip
