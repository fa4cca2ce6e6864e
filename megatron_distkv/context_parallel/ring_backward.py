"""The backward pass of ring attention: KV is sent and dK, dV come back, or Q with all that is its own, and dQ does."""

import torch

from megatron_distkv.context_parallel.ring_comm import Buffers
from megatron_distkv.context_parallel.ring_steps import RingBlock
from megatron_distkv.context_parallel.tile_attention import tile_backward


class RingBackward:
    """`d_q` and `d_kv` are the gradients when all steps have run (contract: ring_comm.RingPass)."""

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

    def send_buffers(self, block: RingBlock) -> Buffers:
        if block.pass_kv:
            return [torch.stack([block.keys.take(x) for x in self._of_keys])]
        return [
            torch.stack([block.queries.take(x) for x in self._of_queries]),
            block.queries.take(self._lse).contiguous(),
        ]

    def recv_buffers(self, block: RingBlock) -> Buffers:
        q, k = self._of_queries[0], self._of_keys[0]
        if block.pass_kv:
            return [k.new_empty(2, block.keys.num_rows, *k.shape[1:])]
        shape = (block.queries.num_rows, *q.shape[1:])
        return [q.new_empty(3, *shape), self._lse.new_empty(shape[:3])]

    def compute(self, block: RingBlock, buffers: Buffers) -> Buffers:
        if block.pass_kv:
            q, out, d_out = (block.queries.take(x) for x in self._of_queries)
            lse, (k, v) = block.queries.take(self._lse), buffers[0]
        else:
            (q, out, d_out), lse = buffers
            k, v = (block.keys.take(x) for x in self._of_keys)
        d_q = torch.zeros_like(q, dtype=lse.dtype, memory_format=torch.contiguous_format)
        d_kv = k.new_zeros(2, *k.shape, dtype=lse.dtype)
        for rows, keys, is_causal in block.tiles:
            tile = tile_backward(d_out[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], self._scale, is_causal)
            d_q[rows] += tile.q_SBHD
            d_kv[0, keys] += tile.k_XBKD
            d_kv[1, keys] += tile.v_XBKD
        return self._keep(block, d_q, d_kv)

    def _keep(self, block: RingBlock, d_q: torch.Tensor, d_kv: torch.Tensor) -> Buffers:
        """Add what belongs to this rank; returns the sender's."""
        if block.is_local or block.pass_kv:
            block.queries.add(self.d_q, d_q)
        if block.is_local or not block.pass_kv:
            self._add_keys(block, d_kv)
        return [d_kv.to(self._of_keys[0].dtype) if block.pass_kv else d_q.to(self._of_queries[0].dtype)]

    def result_buffers(self, block: RingBlock) -> Buffers:
        return self.recv_buffers(block)[:1] if block.pass_kv else [self.recv_buffers(block)[0][0]]

    def accumulate(self, block: RingBlock, results: Buffers) -> None:
        if block.pass_kv:
            self._add_keys(block, results[0])
        else:
            block.queries.add(self.d_q, results[0])

    def _add_keys(self, block: RingBlock, d_kv: torch.Tensor) -> None:
        for sums, part in zip(self.d_kv, d_kv, strict=True):
            block.keys.add(sums, part)
