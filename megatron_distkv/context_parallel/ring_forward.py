"""The forward pass of ring attention: KV is sent and nothing comes back, or Q is sent and out and lse come back."""

from typing import NamedTuple

import torch

from megatron_distkv.context_parallel.ring_comm import Buffers
from megatron_distkv.context_parallel.ring_steps import RingBlock
from megatron_distkv.context_parallel.tile_attention import tile_forward


class OutAndLse(NamedTuple):
    """Partial results merged so far; no key yet is (0, -inf)."""

    out_SBHD: torch.Tensor
    lse_SBH: torch.Tensor

    @classmethod
    def empty(cls, q_SBHD: torch.Tensor) -> "OutAndLse":
        precise = torch.promote_types(q_SBHD.dtype, torch.float32)
        return cls(
            torch.zeros_like(q_SBHD, dtype=precise, memory_format=torch.contiguous_format),
            q_SBHD.new_full(q_SBHD.shape[:3], float("-inf"), dtype=precise),
        )

    def update(self, rows: slice, out: torch.Tensor, lse: torch.Tensor) -> None:
        """`lse` is finite."""
        total = torch.logaddexp(self.lse_SBH[rows], lse)
        self.out_SBHD[rows] *= (self.lse_SBH[rows] - total).exp()[..., None]
        self.out_SBHD[rows] += out * (lse - total).exp()[..., None]
        self.lse_SBH[rows] = total


class RingForward:
    """`merged` is the result when all steps have run (contract: ring_comm.RingPass)."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        self._q, self._k, self._v, self._scale = q, k, v, scale
        self.merged = OutAndLse.empty(q)

    def send_buffers(self, block: RingBlock) -> Buffers:
        if block.pass_kv:
            return [torch.stack([block.keys.take(self._k), block.keys.take(self._v)])]
        return [block.queries.take(self._q).contiguous()]

    def recv_buffers(self, block: RingBlock) -> Buffers:
        if block.pass_kv:
            return [self._k.new_empty(2, block.keys.num_rows, *self._k.shape[1:])]
        return [self._q.new_empty(block.queries.num_rows, *self._q.shape[1:])]

    def compute(self, block: RingBlock, buffers: Buffers) -> Buffers:
        if block.pass_kv:
            q, (k, v) = block.queries.take(self._q), buffers[0]
        else:
            q, k, v = buffers[0], block.keys.take(self._k), block.keys.take(self._v)
        merged = OutAndLse.empty(q)
        for rows, keys, is_causal in block.tiles:
            merged.update(rows, *tile_forward(q[rows], k[keys], v[keys], self._scale, is_causal))
        if not block.pass_kv:
            return [merged.out_SBHD.to(q.dtype), merged.lse_SBH]
        self._merge(block, merged.out_SBHD, merged.lse_SBH)
        return []

    def result_buffers(self, block: RingBlock) -> Buffers:
        if block.pass_kv:
            return []
        shape = (block.queries.num_rows, *self._q.shape[1:])
        return [self._q.new_empty(shape), self.merged.lse_SBH.new_empty(shape[:3])]

    def accumulate(self, block: RingBlock, results: Buffers) -> None:
        if results:
            self._merge(block, *results)

    def _merge(self, block: RingBlock, out: torch.Tensor, lse: torch.Tensor) -> None:
        row = 0
        for part in block.queries.parts:
            rows = slice(row, row + part.stop - part.start)
            self.merged.update(part, out[rows], lse[rows])
            row = rows.stop
