"""DistAttention with autograd: each rank of a context group holds a shard of the sequence.

Every rank's queries meet every rank's keys where fewer bytes have to travel to; partial results merge by LSE. In the
backward pass each tile takes the global LSE, so that the tiles' gradients add up to the exact ones.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_distkv.attention.exchange import Goods, exchange
from megatron_distkv.attention.shard_order import ShardOrder
from megatron_distkv.attention.tile_attention import attend, attend_backward
from megatron_distkv.attention.visits import Heads, Visit, plan_rounds


class ContextShard(NamedTuple):
    """This process's place in a context group: it holds the tokens that `order` gives to `rank`."""

    order: ShardOrder
    rank: int = 0
    group: dist.ProcessGroup | None = None


def context_attention(
    q_SBHD: torch.Tensor, k_SBKD: torch.Tensor, v_SBKD: torch.Tensor, shard: ContextShard, scale: float
) -> torch.Tensor:
    """Causal attention over the whole sequence for the shard's S queries, `[S, b, H, D]`; a collective of the group."""
    num_rows = sum(segment.stop - segment.start for segment in shard.order.segments(shard.rank))
    if q_SBHD.shape[0] != num_rows:
        raise ValueError(f"rank {shard.rank} holds {num_rows} tokens of {shard.order}, got {q_SBHD.shape[0]}")
    return _ContextAttention.apply(q_SBHD, k_SBKD, v_SBKD, shard, scale)


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shard: ContextShard, scale: float
    ) -> torch.Tensor:
        ctx.shard, ctx.scale = shard, scale
        ctx.rounds = plan_rounds(shard.order, shard.rank, Heads(q.shape[2], k.shape[2], q.shape[3], q.element_size()))
        travel = _Forward(q, k, v, scale)
        exchange(travel, ctx.rounds, shard.rank, shard.group)
        out = travel.sums.out_SBHD.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, travel.sums.lse_SBH)
        return out

    @staticmethod
    def backward(ctx: Any, *d_outs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        travel = _Backward(d_outs[0], q, k, v, out, lse, ctx.scale)
        exchange(travel, ctx.rounds, ctx.shard.rank, ctx.shard.group)
        return travel.d_q.to(q.dtype), travel.d_kv[0].to(k.dtype), travel.d_kv[1].to(v.dtype), None, None


class _Sums(NamedTuple):
    """Partial results merged so far; no key yet is (0, -inf)."""

    out_SBHD: torch.Tensor
    lse_SBH: torch.Tensor

    @classmethod
    def none(cls, q_SBHD: torch.Tensor) -> "_Sums":
        precise = torch.promote_types(q_SBHD.dtype, torch.float32)
        return cls(
            torch.zeros_like(q_SBHD, dtype=precise, memory_format=torch.contiguous_format),
            q_SBHD.new_full(q_SBHD.shape[:3], float("-inf"), dtype=precise),
        )

    def merge(self, rows: slice, out: torch.Tensor, lse: torch.Tensor) -> None:
        """`lse` is finite."""
        total = torch.logaddexp(self.lse_SBH[rows], lse)
        self.out_SBHD[rows] *= (self.lse_SBH[rows] - total).exp()[..., None]
        self.out_SBHD[rows] += out * (lse - total).exp()[..., None]
        self.lse_SBH[rows] = total


class _Forward:
    """Keys travel and nothing comes back, or queries travel and take home out and lse."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        self._q, self._k, self._v, self._scale = q, k, v, scale
        self.sums = _Sums.none(q)

    def goods(self, visit: Visit) -> Goods:
        if visit.keys_travel:
            return [torch.stack([visit.keys.take(self._k), visit.keys.take(self._v)])]
        return [visit.queries.take(self._q).contiguous()]

    def room_for_goods(self, visit: Visit) -> Goods:
        if visit.keys_travel:
            return [self._k.new_empty(2, visit.keys.num_rows, *self._k.shape[1:])]
        return [self._q.new_empty(visit.queries.num_rows, *self._q.shape[1:])]

    def work(self, visit: Visit, goods: Goods) -> Goods:
        if visit.keys_travel:
            q, (k, v) = visit.queries.take(self._q), goods[0]
        else:
            q, k, v = goods[0], visit.keys.take(self._k), visit.keys.take(self._v)
        sums = _Sums.none(q)
        for tile in visit.tiles:
            sums.merge(tile.queries, *attend(q[tile.queries], k[tile.keys], v[tile.keys], self._scale, tile.is_causal))
        if not visit.keys_travel:
            return [sums.out_SBHD.to(q.dtype), sums.lse_SBH]
        self._merge(visit, sums.out_SBHD, sums.lse_SBH)
        return []

    def room_for_answer(self, visit: Visit) -> Goods:
        if visit.keys_travel:
            return []
        shape = (visit.queries.num_rows, *self._q.shape[1:])
        return [self._q.new_empty(shape), self.sums.lse_SBH.new_empty(shape[:3])]

    def take(self, visit: Visit, answer: Goods) -> None:
        if answer:
            self._merge(visit, *answer)

    def _merge(self, visit: Visit, out: torch.Tensor, lse: torch.Tensor) -> None:
        row = 0
        for part in visit.queries.parts:
            rows = slice(row, row + part.stop - part.start)
            self.sums.merge(part, out[rows], lse[rows])
            row = rows.stop


class _Backward:
    """Keys travel and take home their gradients, or queries travel, with all that is theirs, and do so."""

    def __init__(
        self,
        d_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> None:
        self._of_queries, self._of_keys, self._lse, self._scale = (q, out, d_out), (k, v), lse, scale
        self.d_q = torch.zeros_like(q, dtype=lse.dtype, memory_format=torch.contiguous_format)
        self.d_kv = k.new_zeros(2, *k.shape, dtype=lse.dtype)

    def goods(self, visit: Visit) -> Goods:
        if visit.keys_travel:
            return [torch.stack([visit.keys.take(x) for x in self._of_keys])]
        return [
            torch.stack([visit.queries.take(x) for x in self._of_queries]),
            visit.queries.take(self._lse).contiguous(),
        ]

    def room_for_goods(self, visit: Visit) -> Goods:
        q, k = self._of_queries[0], self._of_keys[0]
        if visit.keys_travel:
            return [k.new_empty(2, visit.keys.num_rows, *k.shape[1:])]
        shape = (visit.queries.num_rows, *q.shape[1:])
        return [q.new_empty(3, *shape), self._lse.new_empty(shape[:3])]

    def work(self, visit: Visit, goods: Goods) -> Goods:
        of_queries, of_keys = self._of_queries, self._of_keys
        if visit.keys_travel:
            q, out, d_out = (visit.queries.take(x) for x in of_queries)
            lse, (k, v) = visit.queries.take(self._lse), goods[0]
        else:
            (q, out, d_out), lse = goods
            k, v = (visit.keys.take(x) for x in of_keys)
        d_q = torch.zeros_like(q, dtype=lse.dtype, memory_format=torch.contiguous_format)
        d_kv = k.new_zeros(2, *k.shape, dtype=lse.dtype)
        for rows, keys, is_causal in visit.tiles:
            tile = attend_backward(d_out[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], self._scale, is_causal)
            d_q[rows] += tile.q_SBHD
            d_kv[0, keys] += tile.k_XBKD
            d_kv[1, keys] += tile.v_XBKD
        return self._keep(visit, d_q, d_kv)

    def _keep(self, visit: Visit, d_q: torch.Tensor, d_kv: torch.Tensor) -> Goods:
        """Add what belongs to this rank; returns the guest's."""
        is_home = visit.host == visit.guest
        if is_home or visit.keys_travel:
            visit.queries.add(self.d_q, d_q)
        if is_home or not visit.keys_travel:
            self._add_keys(visit, d_kv)
        return [d_kv.to(self._of_keys[0].dtype) if visit.keys_travel else d_q.to(self._of_queries[0].dtype)]

    def room_for_answer(self, visit: Visit) -> Goods:
        return self.room_for_goods(visit)[:1] if visit.keys_travel else [self.room_for_goods(visit)[0][0]]

    def take(self, visit: Visit, answer: Goods) -> None:
        if visit.keys_travel:
            self._add_keys(visit, answer[0])
        else:
            visit.queries.add(self.d_q, answer[0])

    def _add_keys(self, visit: Visit, d_kv: torch.Tensor) -> None:
        for sums, part in zip(self.d_kv, d_kv, strict=True):
            visit.keys.add(sums, part)
