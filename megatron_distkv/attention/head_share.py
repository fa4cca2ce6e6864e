"""Which KV heads a tensor-parallel rank holds, and which of them another instance's rank holds too.

4 heads     0 1 2 3
2 ranks    |0 1|2 3|        rank 1 of 2 and rank 0 of 1 have heads 2 and 3 in common:
1 rank     |0 1 2 3|        its own 0 and 1, the other's 2 and 3
"""

from typing import NamedTuple

import torch

from megatron_distkv.attention.fixed_order.leaves import KV, FixedIndex
from megatron_distkv.attention.shares import ShareIndex, attend_shares
from megatron_distkv.ops import Int8RBlocks


class HeadShare(NamedTuple):
    """Rank `rank` of `num_ranks`, which share `num_kv_heads` heads evenly; each brings its group of query heads."""

    rank: int
    num_ranks: int
    num_kv_heads: int

    @property
    def heads(self) -> range:
        """In the whole model."""
        per_rank = self.num_kv_heads // self.num_ranks
        return range(self.rank * per_rank, (self.rank + 1) * per_rank)

    def common_with(self, other: "HeadShare") -> slice:
        """What both hold, counted from this rank's first head; an empty slice if there is none."""
        mine, theirs = self.heads, other.heads
        start, stop = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
        return slice(start - mine.start, max(start, stop) - mine.start)


def attend_heads(
    q_THD: torch.Tensor, kv: KV, layer: int, index: ShareIndex | FixedIndex, scale: float, kv_heads: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_shares` of the query heads of `kv_heads` alone.

    No copy: heads lie behind each other in a layer, so `[B, L, K, ...]` is `[B, L K/n, n, ...]` too, and n heads that
    begin at a multiple of n are a layer there.
    """
    numbers_BLK2ND = kv.pool_BLK2ND if isinstance(kv, Int8RBlocks) else kv
    num_kv_heads, num_wanted = numbers_BLK2ND.shape[2], kv_heads.stop - kv_heads.start
    if num_wanted == num_kv_heads:
        return attend_shares(q_THD, kv, layer, index, scale)
    step = _largest_step(kv_heads, num_kv_heads)
    group = q_THD.shape[1] // num_wanted
    view = Int8RBlocks(*(_cut(x, step) for x in kv)) if isinstance(kv, Int8RBlocks) else _cut(kv, step)
    parts = [
        attend_shares(
            q_THD[:, (head - kv_heads.start) * group : (head - kv_heads.start + step) * group],
            view,
            (layer * num_kv_heads + head) // step,
            index,
            scale,
        )
        for head in range(kv_heads.start, kv_heads.stop, step)
    ]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)


def _cut(x_BLKX: torch.Tensor, step: int) -> torch.Tensor:
    num_rblocks, num_layers, num_kv_heads, *rest = x_BLKX.shape
    return x_BLKX.view(num_rblocks, num_layers * num_kv_heads // step, step, *rest)


def _largest_step(kv_heads: slice, num_kv_heads: int) -> int:
    """That divides the number of heads, and begin and end of the wanted ones."""
    start, stop = kv_heads.start, kv_heads.stop
    return max(n for n in range(1, stop - start + 1) if not (num_kv_heads % n or start % n or stop % n))
