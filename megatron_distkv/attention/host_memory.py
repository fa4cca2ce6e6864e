"""The tier below a rank's pool: rBlocks in its own host memory, with attention computed there, by the CPU."""

from collections.abc import Sequence

import torch

from megatron_distkv.attention.fixed_order.leaves import Leaves
from megatron_distkv.attention.metadata import RemoteShare
from megatron_distkv.attention.partial import Partial
from megatron_distkv.attention.shares import ORDINARY, ShareIndex, attend_shares, index_shares, measure_query_us
from megatron_distkv.clock import Clock
from megatron_distkv.messages import Scoring
from megatron_distkv.ops import gather_rblocks, readable, scatter_rblocks


class HostMemory:
    """A creditor in this process: takes in rBlocks and answers queries like any, without a channel or a loan."""

    def __init__(self, pool_BLK2ND: torch.Tensor, scale: float, head_dim: int | None = None) -> None:
        """`head_dim`: needed of a pool in int8 (ops.int8_kv), which does not tell."""
        self._pool = pool_BLK2ND
        self._head_dim = head_dim or pool_BLK2ND.shape[-1]
        self._kv = readable(pool_BLK2ND, self._head_dim)
        self._scale = scale
        self._share: RemoteShare | None = None
        self._seen: dict[Scoring, tuple[torch.Tensor, ShareIndex] | None] = {}  # query rows, and the rBlocks they see

    def store(self, data_MLK2ND: torch.Tensor, block_ids: Sequence[int]) -> None:
        scatter_rblocks(data_MLK2ND.to(self._pool.device), self._pool, torch.tensor(block_ids, dtype=torch.int64))

    def load(self, block_ids: Sequence[int]) -> torch.Tensor:
        """A copy: `[M, layers, KV heads, 2, slots, head_dim]`, or packed (ops.int8_kv)."""
        return gather_rblocks(self._pool, torch.tensor(block_ids, dtype=torch.int64))

    def warm_up(self, num_query_heads: int, dtype: torch.dtype, clock: Clock) -> float:
        """What a query costs here, measured before any rBlock is in use."""
        return measure_query_us(self._pool, num_query_heads, self._head_dim, dtype, self._scale, clock)

    def begin_step(self, share: RemoteShare | None) -> None:
        """None: this step has no rBlocks here."""
        self._share = share
        self._seen = {}

    def partials(self, layer: int, q_THD: torch.Tensor, scoring: Scoring = ORDINARY) -> list[Partial]:
        """The partial of the rows that see rBlocks here, if there are any."""
        if scoring not in self._seen:
            self._seen[scoring] = self._seen_by(scoring)
        seen = self._seen[scoring]
        if seen is None:
            return []
        rows_R, index = seen
        q_RHD = q_THD[rows_R].to(self._pool.device)
        out, lse = attend_shares(q_RHD, self._kv, layer, index, self._scale)
        return [Partial(rows_R, out.to(q_THD.device), lse.to(q_THD.device))]

    def attend(
        self,
        leaves: Leaves,
        q_THD: torch.Tensor,
        layer: int,
        scoring: Scoring,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """In fixed order, into `out` and `lse`."""
        leaves.attend(q_THD, self._kv, layer, self._scale, scoring, out, lse)

    def _seen_by(self, scoring: Scoring) -> tuple[torch.Tensor, ShareIndex] | None:
        share = None if self._share is None else self._share.within(scoring.window)
        return None if share is None else (share.rows_R, index_shares(share.shares, scoring))
