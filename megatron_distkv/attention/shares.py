"""MicroAttention over the rBlocks of many sequences, all in the past of all queries: what every holder computes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_distkv.attention.fixed_order.leaves import KV, FixedIndex
from megatron_distkv.clock import Clock
from megatron_distkv.errors import DistkvError
from megatron_distkv.messages import QueryShare, Scoring
from megatron_distkv.ops import Int8RBlocks, micro_attention, micro_attention_int8, readable

ORDINARY = Scoring()
# A measurement is the best of so many, each over so many rBlocks (a smaller pool's are read again: a call has a price
# of its own, and figures must be comparable).
MEASUREMENTS, MEASURED_RBLOCKS = 5, 32


class ShareIndex(NamedTuple):
    """Made once per step and way of scoring, used by all its layers (int64; contract: ops.micro_attention)."""

    block_ids_M: torch.Tensor
    cu_blocks: torch.Tensor
    cu_queries: torch.Tensor
    block_starts_M: torch.Tensor
    positions_T: torch.Tensor
    scoring: Scoring

    @property
    def num_rows(self) -> int:
        return int(self.cu_queries[-1])


def index_shares(shares: Sequence[QueryShare], scoring: Scoring = ORDINARY) -> ShareIndex:
    """Raises DistkvError when a window needs positions that are not there."""
    window = scoring.window
    cu_blocks, cu_queries, block_ids = [0], [0], []
    starts: list[int] = []
    positions: list[int] = []
    for share in shares:
        if window is not None and len(share.block_starts) != len(share.block_ids):
            raise DistkvError(f"{len(share.block_starts)} positions for {len(share.block_ids)} rBlocks of a window")
        block_ids.extend(share.block_ids)
        cu_blocks.append(len(block_ids))
        cu_queries.append(cu_queries[-1] + share.num_queries)
        if window is not None:
            starts.extend(share.block_starts)
            positions.extend(range(share.first_position, share.first_position + share.num_queries))
    if window is None:  # they are not looked at
        starts, positions = [0] * len(block_ids), [0] * cu_queries[-1]

    def int64(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64)

    return ShareIndex(int64(block_ids), int64(cu_blocks), int64(cu_queries), int64(starts), int64(positions), scoring)


def attend_shares(
    q_THD: torch.Tensor,
    kv: KV,
    layer: int,
    index: ShareIndex | FixedIndex,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out `[T, H, D]` and lse `[T, H]`, fp32, where the pool lies. `scale` is the ordinary one."""
    if isinstance(index, FixedIndex):  # T is then the number of partials
        return index.attend(q_THD, kv, layer, scale)
    scoring = index.scoring
    args = (
        layer, index.block_ids_M, index.block_starts_M, index.cu_blocks, index.cu_queries, index.positions_T,
        scoring.scale or scale, False, scoring.window, scoring.soft_cap,
    )  # fmt: skip
    if isinstance(kv, Int8RBlocks):
        return micro_attention_int8(q_THD, kv.pool_BLK2ND, kv.k_scales_BLKD, kv.v_scales_BLKN, *args)
    return micro_attention(q_THD, kv, *args)


def measure_query_us(
    pool: torch.Tensor, num_query_heads: int, head_dim: int, dtype: torch.dtype, scale: float, clock: Clock
) -> float:
    """What one query over one rBlock costs where this pool lies: microseconds for all layers, without the way there.

    Clears the first rBlocks, so it belongs before their use; untouched memory would read faster than it is.
    """
    block_ids = [number % pool.shape[0] for number in range(MEASURED_RBLOCKS)]
    pool[:MEASURED_RBLOCKS].zero_()
    kv = readable(pool, head_dim)
    q_THD = torch.zeros((1, num_query_heads, head_dim), dtype=dtype, device=pool.device)
    index = index_shares([QueryShare([], block_ids, 1)])
    took_s = []
    for _ in range(1 + MEASUREMENTS):  # the first one is there to warm up
        began_s = clock.monotonic_s()
        attend_shares(q_THD, kv, 0, index, scale)[0].cpu()
        took_s.append(clock.monotonic_s() - began_s)
    return min(took_s[1:]) * 1e6 * pool.shape[1] / MEASURED_RBLOCKS
