"""Ring attention with autograd: each rank of a context group holds a shard of the sequence.

Every rank's queries meet every rank's keys where fewer bytes have to be sent (pass-KV or pass-Q); partial results merge
by LSE. In the backward pass each tile takes the global LSE, so that the tiles' gradients add up to the exact ones.
"""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_distkv.context_parallel.context_shard import ContextShard
from megatron_distkv.context_parallel.ring_backward import RingBackward
from megatron_distkv.context_parallel.ring_comm import RingComm
from megatron_distkv.context_parallel.ring_forward import RingForward
from megatron_distkv.context_parallel.ring_steps import HeadSizes, plan_ring_steps
from megatron_distkv.errors import ConfigError
from megatron_distkv.messages import Scoring


@dataclass(frozen=True)
class RingAttention:
    """How attention layers attend over this rank's shard (contract: attention.SequenceAttention)."""

    shard: ContextShard

    def check_scoring(self, scoring: Scoring) -> None:
        """Raises ConfigError for sliding windows and soft-caps."""
        if scoring.window is not None or scoring.soft_cap is not None:
            raise ConfigError(
                f"context parallelism knows no sliding window ({scoring.window}) and no soft-cap"
                f" ({scoring.soft_cap}) yet: train this model with context_parallel 1"
            )

    def positions(self, num_tokens: int) -> torch.Tensor:
        """Raises ValueError for another number of tokens than the shard has."""
        self.shard.check_num_rows(num_tokens)
        return self.shard.layout.positions(self.shard.cp_rank)

    def attend(
        self, q_SBHD: torch.Tensor, k_SBKD: torch.Tensor, v_SBKD: torch.Tensor, scale: float, scoring: Scoring
    ) -> torch.Tensor:
        return ring_attention(q_SBHD, k_SBKD, v_SBKD, self.shard, scale)


def ring_attention(
    q_SBHD: torch.Tensor, k_SBKD: torch.Tensor, v_SBKD: torch.Tensor, shard: ContextShard, scale: float
) -> torch.Tensor:
    """Causal attention over the whole sequence for the shard's S queries, `[S, b, H, D]`; a collective of the group."""
    shard.check_num_rows(q_SBHD.shape[0])
    return _RingAttentionFunction.apply(q_SBHD, k_SBKD, v_SBKD, shard, scale)


class _RingAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shard: ContextShard, scale: float
    ) -> torch.Tensor:
        heads = HeadSizes(q.shape[2], k.shape[2], q.shape[3], q.element_size())
        ctx.comm, ctx.scale = RingComm(shard.cp_rank, shard.cp_group), scale
        ctx.steps = plan_ring_steps(shard.layout, shard.cp_rank, heads)
        ring_pass = RingForward(q, k, v, scale)
        ctx.comm.run(ring_pass, ctx.steps)
        out = ring_pass.merged.out_SBHD.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, ring_pass.merged.lse_SBH)
        return out

    @staticmethod
    def backward(ctx: Any, *d_outs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        ring_pass = RingBackward(d_outs[0], q, k, v, out, lse, ctx.scale)
        ctx.comm.run(ring_pass, ctx.steps)
        return ring_pass.d_q.to(q.dtype), ring_pass.d_kv[0].to(k.dtype), ring_pass.d_kv[1].to(v.dtype), None, None
